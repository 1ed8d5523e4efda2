"""The whole grid on tiny random models: order, resumption, failures, and the report; seconds in all."""

import json
import os
import re
import shutil
import signal
import time
import weakref
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
import yaml
from evaluation.test_metrics_comet import python as comet_python  # noqa: F401 (a fixture)
from filelock import FileLock
from tiny_training import fine_tuning, save_base_models, tiny_rows

from speechllm.evaluation.metrics.comet import CometUnavailable
from speechllm.recipes import UsageError, parse_settings
from speechllm.reproduction.claims import claims_of
from speechllm.reproduction.command import publish_report, reproduce
from speechllm.reproduction.measures import read_predictions
from speechllm.reproduction.plan import Row, Scale, at_fractions, digest, plan
from speechllm.reproduction.report import Report
from speechllm.reproduction.run import Runner, executor, read_result, visible_gpus
from speechllm.reproduction.scales import SCALES
from speechllm.reproduction.stages import predict, run_cell
from speechllm.reproduction.studies import STUDIES, scale_of
from speechllm.trainers import ContrastiveArguments, FineTuningArguments
from speechllm.training import DataArguments, ModelArguments


RECIPES = Path(__file__).parents[2] / "recipes"


PROJECTOR = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_queries": 2}  # fmt: skip
SCALE = Scale(
    name="test",
    recipes="small",
    rows=(
        Row("none"),
        Row("asr-pretraining", "asr-pretraining"),
        Row("contr-cos-all", "contr-cos-all", {"max_steps": 3}),
        Row("warm-start", "contr-cos-all", {"layers": "emb"}, seeds=1, fractions=()),
        Row("contr-cos-all-asr", "contr-cos-all", {"next_token_weight": 1}, start="warm-start", seeds=1),
        Row("oracle", seeds=1, fractions=(100, 0), fine_tuning={"lora_rank": 2}, pretrained_as="none", oracle=True),
    ),
    fractions=(100, 50),
    seeds=2,
    notes=("A test.",),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two base models, manifests and recipes, as the command finds them."""
    folder = tmp_path_factory.mktemp("world")
    speech, text = save_base_models(folder)
    tasks = [{"task": "asr"}, {"task": "st", "target_language": "German", "target": "etwas anderes",
              "gender_terms": "anderes andere", "category": "1F"},
             {"task": "sqa", "question": "What is it?", "target": "it is", "answers": ["it is", "it"]},
             {"task": "traits", "trait": "gender", "choices": ["female", "male"], "target": "male"}]  # fmt: skip
    lines = []
    for i, row in enumerate(tiny_rows(24)):
        soundfile.write(folder / f"{i}.wav", row["audio"], 16_000)
        language = "de" if i % 3 == 1 else "en"
        lines.append(
            {**row, "language": language, "audio": f"{i}.wav", "duration": len(row["audio"]) / 16_000, **tasks[i % 4]}
        )
    for name, rows in (("train", lines[:16]), ("test", lines[16:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"train_data": str(folder / "train.jsonl"), "eval_data": str(folder / "test.jsonl"), "max_steps": 2,
              "per_device_train_batch_size": 4, "save_strategy": "no", "dataloader_pin_memory": False,
              "feature_cache": str(folder / "cache"), "learning_rate": 1e-2, "logging_steps": 1}  # fmt: skip
    stage1 = {**common, "speech_model": speech, "text_model": text, "projector": PROJECTOR,
              "text_state_cache": str(folder / "cache")}  # fmt: skip
    recipes = {
        "base/stage1": stage1,
        "asr-pretraining": {"base": "base/stage1.yaml", "contrastive_weight": 0, "next_token_weight": 1},
        "contr-cos-all": {"base": "base/stage1.yaml", "layers": "0,2"},
        "finetune": {**common, "model": "elsewhere", "predict_with_generate": False, "max_new_tokens": 3},
    }
    (folder / "recipes" / "small" / "base").mkdir(parents=True)
    for name, values in recipes.items():
        (folder / "recipes" / "small" / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return folder


def cells_of(world, rows=("none", "contr-cos-all"), seeds=1, fractions=(100,), scale=SCALE):
    return plan(scale, world / "recipes", rows, seeds, fractions)


def names(cells):
    return [cell.name.removeprefix("cells/") for cell in cells]


# ---- the plan --------------------------------------------------------------------------------------------------------


def test_first_seed_of_all_rows_comes_first(world):
    cells = names(plan(SCALE, world / "recipes"))
    assert cells[:5] == [f"pretraining/{row.name}-seed-0" for row in SCALE.rows[:5]]
    assert cells[5:10] == [f"fine-tuning/{name}-100-percent-seed-0"
                           for name in ("none", "asr-pretraining", "contr-cos-all", "contr-cos-all-asr", "oracle")]  # fmt: skip
    assert cells[10] == "fine-tuning/none-50-percent-seed-0" and cells[14] == "fine-tuning/oracle-0-percent-seed-0"
    later = cells[15:]
    assert len(later) == 9 and all(name.endswith("seed-1") for name in later)  # rows of one seed are done
    assert not any("asr" in name and "contr" in name for name in later)


def test_a_row_brings_the_one_it_starts_from(world):
    cells = cells_of(world, ["contr-cos-all-asr"])
    assert names(cells) == ["pretraining/warm-start-seed-0", "pretraining/contr-cos-all-asr-seed-0",
                            "fine-tuning/contr-cos-all-asr-100-percent-seed-0"]  # fmt: skip
    assert cells[1].start is cells[0] and "speech_model" not in cells[1].settings


def test_fractions_that_are_asked_for_are_those_of_the_claims(world):
    scale = at_fractions(SCALES["tiny"], (100, 10))
    names = {cell.name for cell in plan(scale, RECIPES)}
    assert "cells/fine-tuning/contr-wasser-all-10-percent-seed-2" in names
    assert not any("oracle-10-percent" in name or "warm-start-1" in name for name in names)
    of_tiny, of_both = (
        {claim.name: len(claim.comparisons) for claim in claims_of(some)} for some in (SCALES["tiny"], scale)
    )
    assert of_tiny["a tenth of the data"] == 2 and of_both["a tenth of the data"] == 4
    assert of_both["all layers"] == 2 * of_tiny["all layers"]
    fewer = at_fractions(SCALES["tiny"], (10,))
    for some, expected in ((scale, of_both), (fewer, {**of_tiny, "all layers": 8})):
        claims = {claim.name: len(claim.comparisons) for claim in Report(some, [], Path("nowhere"), "")._claims()}
        assert {name: claims[name] for name in ("a tenth of the data", "all layers")} == {
            name: expected[name] for name in ("a tenth of the data", "all layers")
        }


def test_unknown_row(world):
    with pytest.raises(UsageError, match=r"no row 'contr'\. Choose from none, asr-pretraining"):
        cells_of(world, ["contr"])


def test_hash_tells_what_changes_a_result(world, tmp_path):
    def hashes(**changes):
        return [cell.hash for cell in cells_of(world, scale=replace(SCALE, **changes))]

    same = hashes()
    assert hashes(pretraining={"logging_steps": 7, "output_dir": "x"}) == same
    none, contrastive, *tested = hashes(pretraining={"learning_rate": 5e-3})
    assert [none != same[0], contrastive != same[1], *(a != b for a, b in zip(tested, same[2:]))] == [True] * 4
    assert [a == b for a, b in zip(hashes(fine_tuning={"max_steps": 9}), same)] == [True, True, False, False]
    copy = tmp_path / "train.jsonl"
    shutil.copy(world / "train.jsonl", copy)
    assert hashes(fine_tuning={"train_data": str(copy)}) == same  # the content counts, not the place
    copy.write_text(copy.read_text() + "\n")
    assert hashes(fine_tuning={"train_data": str(copy)}) != same


# ---- the run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """Two rows, two seeds, one fraction."""
    output = tmp_path_factory.mktemp("run")
    cells = cells_of(world, ("none", "contr-cos-all"), seeds=2)
    report = Report(SCALE, cells, output, command="speechllm reproduce")
    assert Runner(cells, output, report.write).run()
    return cells, output


def test_grid(finished):
    cells, output = finished
    assert len(cells) == 8
    results = {cell.name.removeprefix("cells/"): read_result(cell, output) for cell in cells}
    untrained = results["pretraining/none-seed-0"]
    assert untrained["steps"] == 0 and untrained["history"] == []
    pretrained = results["pretraining/contr-cos-all-seed-1"]
    assert pretrained["steps"] == 3 and len(pretrained["history"]) == 3 and pretrained["llm_tokens"] > 0
    assert pretrained["seconds"] > 0 and pretrained["peak_memory_bytes"] > 1e7
    assert pretrained["retrieval"]["texts"] == 8 and set(pretrained["retrieval"]["recall@1"]) == {"0", "3"}
    ranks = pretrained["retrieval"]["ranks"]["3"]
    assert len(ranks) == 8 and sum(ranks) / 8 == pytest.approx(pretrained["retrieval"]["mean_rank"]["3"])
    tested = results["fine-tuning/contr-cos-all-100-percent-seed-0"]
    assert tested["steps"] == 2 and tested["test_rows"] == 8
    lines = (output / "cells/fine-tuning/contr-cos-all-100-percent-seed-0/predictions.jsonl").read_text().splitlines()
    predictions = [json.loads(line) for line in lines]
    assert {line["task"] for line in predictions} == {"asr", "st", "sqa", "traits"}
    assert all(line["loss"] > 0 and line["tokens"] > 0 and isinstance(line["prediction"], str) for line in predictions)
    assert not (output / "cells/pretraining/none-seed-0/training").exists()


def test_fine_tuning_starts_from_the_pretrained_weights(finished):
    """The same seed and data, another start: other losses from the first step on."""
    cells, output = finished
    losses = {cell.row: read_result(cell, output)["history"][0]["loss"]
              for cell in cells if cell.stage == "fine-tuning" and cell.seed == 0}  # fmt: skip
    assert losses["none"] != losses["contr-cos-all"]


def test_report(finished):
    _, output = finished
    results = json.loads((output / "results.json").read_text())
    assert results["cells"] == {"planned": 8, "there": 8} and results["seeds"] == [0, 1]
    entry = results["rows"]["contr-cos-all"]["fine_tuning"]["100"]["measures"]["asr loss"]
    low, high = entry["interval"]
    assert low < entry["value"] < high and entry["value"] == pytest.approx(sum(entry["seeds"]) / 2)
    assert set(entry["against_none"]) >= {"value", "interval", "p"}
    retrieval = results["rows"]["contr-cos-all"]["pretraining"]["retrieval"]
    low, high = retrieval["recall@1_intervals"]["mean"]
    assert low <= sum(retrieval["recall@1"].values()) / 2 <= high and retrieval["recall@1_intervals"].keys() == {
        "0",
        "3",
        "mean",
    }
    by_language = retrieval["by_language"]
    assert {name: entry["utterances"] for name, entry in by_language.items()} == {"de": 3, "en": 5}
    found = sum(entry["utterances"] * entry["recall@1"]["3"] for entry in by_language.values())
    assert found / 8 == pytest.approx(retrieval["recall@1"]["3"])
    measures = results["rows"]["contr-cos-all"]["fine_tuning"]["100"]["measures"]
    assert 0 <= measures["st gender_accuracy"]["value"] <= 100 and "against_none" in measures["st gender_accuracy"]
    claim = next(claim for claim in results["claims"] if claim["name"] == "all layers")
    assert claim["by_metric"]["run"] == 2 and claim["by_metric"]["planned"] == 4
    assert claim["by_metric"]["verdict"] == "undecided"
    page, text = (output / "results.html").read_text(), (output / "results.md").read_text()
    assert "<svg" in page and "contr-cos-all" in page and "<script" not in page
    cost = text.partition("## Cost")[2]
    assert "| none | 0 |" in cost and "| contr-cos-all | 3 |" in cost
    assert "| contr-cos-all | 100% | 2 |" in text and "| contr-cos-all | de | 3 |" in text
    assert {path.name for path in (output / "plots").glob("*.svg")} >= {"retrieval.svg", "asr-wer.svg", "sqa-loss.svg"}


def test_intervals_need_seeds_with_the_same_utterances(finished, tmp_path):
    """Of one text nobody knows the interval, and a run of an earlier version does not tell ranks: the page is still written."""
    cells, output = finished
    shutil.copytree(output, tmp_path, dirs_exist_ok=True)
    results = [tmp_path / f"cells/pretraining/contr-cos-all-seed-{seed}/result.json" for seed in (0, 1)]

    def report(change) -> tuple[dict, str]:
        for path in results:
            result = json.loads(path.read_text())
            change(result["retrieval"])
            path.write_text(json.dumps(result))
        found = Report(SCALE, cells, tmp_path, command="speechllm reproduce").write()
        return found["rows"]["contr-cos-all"]["pretraining"]["retrieval"], (tmp_path / "results.md").read_text()

    def of_one_text(retrieval):
        retrieval["language_of"][0] = "fr"

    retrieval, text = report(of_one_text)
    assert (
        retrieval["by_language"]["fr"]["utterances"] == 1 and "| contr-cos-all | fr | 1 |" in text and "[?, ?]" in text
    )
    results.pop()
    retrieval, text = report(lambda retrieval: [retrieval.pop(name) for name in ("ranks", "text_of", "language_of")])
    assert (
        retrieval["recall@1_intervals"] == retrieval["by_language"] == {} and len(retrieval["recall@1_of_seeds"]) == 2
    )
    assert "| contr-cos-all | 2 |" in text


def test_what_is_there_is_not_run_again(finished, capsys):
    cells, output = finished
    fresh = plan(
        SCALE, Path(cells[0].settings["feature_cache"]).parent / "recipes", ("none", "contr-cos-all"), 2, (100,)
    )

    def refuse(cell, folder):
        raise AssertionError(f"{cell.name} was run again")

    assert Runner(fresh, output, run=refuse).run()
    assert "8 cells, 8 of them there already" in capsys.readouterr().out


def test_changed_settings_run_again_and_only_what_depends_on_them(world, finished, tmp_path, capsys):
    _, output = finished
    shutil.copytree(output, tmp_path / "run")
    rows = tuple(replace(row, settings={"max_steps": 4}) if row.name == "contr-cos-all" else row for row in SCALE.rows)
    ran = []

    def note(cell, folder):
        ran.append(cell.name.removeprefix("cells/"))
        return {}

    assert Runner(cells_of(world, scale=replace(SCALE, rows=rows)), tmp_path / "run", run=note).run()
    assert ran == ["pretraining/contr-cos-all-seed-0", "fine-tuning/contr-cos-all-100-percent-seed-0"]
    assert capsys.readouterr().out.count("its settings or data changed; run again") == 2


def test_a_run_that_was_cut_off_goes_on(world, tmp_path):
    cells = cells_of(world)
    ran = []

    def interrupted(cell, output):
        ran.append(cell.name)
        if len(ran) == 2:
            (output / cell.name / "half").write_text("written")
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        Runner(cells, tmp_path, run=interrupted).run()
    assert Runner(cells, tmp_path, run=interrupted).run()
    assert ran == [cells[0].name, cells[1].name, *(cell.name for cell in cells[1:])]
    assert not (tmp_path / cells[1].name / "half").exists()


def test_failing_cell(world, tmp_path, capsys):
    """Its error is kept, what starts from it is skipped, the others run, and the next run tries again."""
    cells = cells_of(world)
    fails = True

    def sometimes(cell, output):
        if fails and cell.name.endswith("pretraining/contr-cos-all-seed-0"):
            raise RuntimeError("out of luck\nand more")
        return {}

    assert not Runner(cells, tmp_path, run=sometimes).run()
    said = capsys.readouterr().out
    assert "failed: out of luck" in said and "fine-tuning/contr-cos-all-100-percent-seed-0: skipped" in said
    there = {cell.name: read_result(cell, tmp_path) is not None for cell in cells}
    assert list(there.values()) == [True, False, True, False]
    assert "RuntimeError: out of luck" in (tmp_path / cells[1].name / "error.txt").read_text()
    fails = False
    assert Runner(cells, tmp_path, run=sometimes).run()
    assert not (tmp_path / cells[1].name / "error.txt").exists()


def test_a_failed_cell_does_not_keep_its_model(world, tmp_path):
    """The next one needs the memory."""
    cells, models = cells_of(world)[:2], []

    class Model:
        pass

    def run(cell, output):
        if not models:
            model = Model()
            models.append(weakref.ref(model))
            raise MemoryError("too large")
        assert models[0]() is None, "the failed cell's model is still there"
        return {}

    assert not Runner(cells, tmp_path, run=run).run()
    assert read_result(cells[1], tmp_path) is not None
    assert "MemoryError: too large" in (tmp_path / cells[0].name / "error.txt").read_text()


def gpu_seen_beside_another(folder):
    """What a job sees, once another runs as well."""
    (folder / str(os.getpid())).touch()
    while len([*folder.iterdir()]) < 2:
        time.sleep(0.01)
    return os.environ["CUDA_VISIBLE_DEVICES"]


THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def test_each_job_sees_one_gpu_and_keeps_to_its_share_of_the_processors(monkeypatch, tmp_path):
    """One that is told of several GPUs would stop: each needs a process of its own."""
    for name in THREADS:
        monkeypatch.setenv(name, "7")
    monkeypatch.setattr("torch.get_num_threads", lambda: 6)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-7,2")
    assert visible_gpus() == ["5", "GPU-7"]
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "0")
    with executor(2) as workers:
        jobs = [workers.submit(gpu_seen_beside_another, tmp_path) for _ in range(2)]
        assert {job.result() for job in jobs} == {"5", "GPU-7"}
        assert workers.submit(os.getenv, "PYTORCH_NVML_BASED_CUDA_CHECK").result() == "1"
        assert [workers.submit(os.getenv, name).result() for name in THREADS] == ["3"] * 3
    assert isinstance(executor(1), ProcessPoolExecutor)  # this process sees both
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert executor(1).submit(os.getpid).result() == os.getpid()


def test_two_at_a_time(world, finished, tmp_path):
    """In processes of their own, each after the one that it starts from, with the results of one after the other."""
    cells = cells_of(world)
    assert Runner(cells, tmp_path, jobs=2).run()
    for cell in cells:
        two, one = read_result(cell, tmp_path), read_result(cell, finished[1])
        assert two["steps"] == one["steps"] and two["llm_tokens"] == one["llm_tokens"]
        losses = [[log["loss"] for log in result["history"]] for result in (two, one)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def killed_in_pretraining(cell, output):
    if cell.name.endswith("pretraining/contr-cos-all-seed-0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return {}


def test_a_killed_process_costs_its_cells_alone(world, tmp_path, capsys):
    cells = cells_of(world, seeds=2)
    assert not Runner(cells, tmp_path, run=killed_in_pretraining, jobs=2).run()
    assert "failed: a process was killed, perhaps for want of memory" in capsys.readouterr().out
    there = {cell.name.removeprefix("cells/") for cell in cells if read_result(cell, tmp_path)}
    assert "pretraining/contr-cos-all-seed-0" not in there and "fine-tuning/contr-cos-all-100-percent-seed-1" in there


def test_missing_data_fails_one_cell_and_says_so(world, tmp_path):
    scale = replace(SCALE, fraction_settings={100: {"train_data": str(world / "nowhere.jsonl")}})
    cells = cells_of(world, ["none"], scale=scale)
    assert not Runner(cells, tmp_path, run=run_cell).run()
    assert "there is no such manifest" in (tmp_path / cells[1].name / "error.txt").read_text()


def test_a_recording_that_breaks_does_not_cost_the_cell(world, tmp_path):
    """Without a cache, it is found out when the trained model is tested."""
    lines = [json.loads(line) for line in (world / "test.jsonl").read_text().splitlines()]
    for line in lines:
        line["audio"] = str(world / line["audio"])
    (tmp_path / "broken.wav").write_bytes(Path(lines[0]["audio"]).read_bytes()[:60])
    lines[0]["audio"] = str(tmp_path / "broken.wav")
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scale = replace(SCALE, fine_tuning={"eval_data": str(tmp_path / "test.jsonl"), "feature_cache": None})
    cells = cells_of(world, ["none", "oracle"], fractions=(0,), scale=scale)
    assert Runner(cells, tmp_path).run()
    found = {cell.row: read_result(cell, tmp_path) for cell in cells}
    assert [found[row]["test_rows"] for row in ("none", "oracle")] == [7, 8]  # the oracle reads it
    results = Report(scale, cells, tmp_path, "command").results()  # of what both answered, to be paired
    assert results["units"] == {"asr": 1, "st": 2, "sqa": 2, "traits": 2}
    assert "1 test row(s) that not every model answered" in results["notes"][-2]
    assert "Up to 1 row(s) of a run's data could not be used" in results["notes"][-1]
    assert "broken.wav" in results["notes"][-1]


def test_rows_that_are_not_there_are_counted(world, tmp_path):
    lines = (world / "test.jsonl").read_text().replace('"audio": "', f'"audio": "{world}/')
    gone = json.loads(lines.splitlines()[0]) | {"id": "gone", "audio": "gone.wav"}
    (tmp_path / "test.jsonl").write_text(lines + json.dumps(gone) + "\n")
    scale = replace(SCALE, fine_tuning={"eval_data": str(tmp_path / "test.jsonl")})
    cells = cells_of(world, ["none"], fractions=(0,), scale=scale)
    assert Runner(cells, tmp_path).run()
    assert read_result(cells[1], tmp_path)["set_aside"] == 1
    notes = Report(scale, cells, tmp_path, "command").results()["notes"]
    assert "Up to 1 row(s)" in notes[-1] and "gone" in notes[-1]


def test_recordings_are_units_of_their_own(tmp_path):
    """Files of one name in two folders, and the members of a shard; segments of one file are one."""
    rows = tiny_rows(6)
    for row, folder in zip(rows, "ab"):
        (tmp_path / folder).mkdir()
        soundfile.write(tmp_path / folder / "1.wav", row["audio"], 16_000)
        row["audio"] = str(tmp_path / folder / "1.wav")
    shard, files = tmp_path / "shard.tar", [(tmp_path / folder / "1.wav").read_bytes() for folder in "ab"]
    shard.write_bytes(b"".join(files))
    for row, start, file in zip(rows[2:], (0, len(files[0])), files):
        row["audio"] = {"path": str(shard), "byte_offset": start, "byte_length": len(file)}
    for row, offset in zip(rows[4:], (0.0, 0.1)):
        row["audio"] = {"path": str(tmp_path / "a" / "1.wav"), "offset": offset, "duration": 0.1}
    units = [line["speech"] for line in predict(fine_tuning(tmp_path, held_out=rows, max_new_tokens=2))]
    assert len(set(units)) == 4 and units[0] == units[4] == units[5]


def test_a_report_that_fails_does_not_cost_the_cells(world, tmp_path, capsys):
    cells, written = cells_of(world), []

    def report():
        written.append(len(written))
        if len(written) == 2:
            raise ValueError("out of ink")

    assert Runner(cells, tmp_path, report, run=lambda cell, output: {}).run()
    assert len(written) == 4 and "could not be written: ValueError: out of ink" in capsys.readouterr().out

    def dry():
        raise ValueError("out of ink")

    with pytest.raises(ValueError, match="out of ink"):  # the last one is what was asked for
        Runner(cells, tmp_path, dry, run=lambda cell, output: {}).run()


def test_predictions_may_hold_any_line_break(tmp_path):
    lines = [{"id": "a", "prediction": "one\u2028two"}, {"id": "b", "prediction": "three\x85"}]
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    assert read_predictions(path) == lines


def test_a_cell_depends_on_each_of_its_manifests(world, tmp_path):
    one, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    one.write_text("a"), other.write_text("b")
    before = digest([str(one), str(other), {"data": "hub:o/n", "weight": 2}])
    other.write_text("c")
    after = digest([str(one), str(other), {"data": "hub:o/n", "weight": 2}])
    assert before[0] == after[0] and before[1] != after[1] and before[2] == after[2]


def test_a_report_of_nothing_is_not_published(tmp_path):
    with pytest.raises(UsageError, match="holds no result of these rows"):
        reproduce("tiny", tmp_path, report_only=True, publish=tmp_path / "published", recipes=RECIPES)
    assert not (tmp_path / "published").exists()


def test_no_fine_tuning_at_all(world, tmp_path):
    """0%: tested straight after pretraining."""
    cells = cells_of(world, ["none"], fractions=(0,))
    assert Runner(cells, tmp_path).run()
    result = read_result(cells[1], tmp_path)
    assert result["steps"] == 0 and result["test_rows"] == 8


def test_the_oracle_reads(world, tmp_path):
    """It learns from the transcript, not from the audio, and has its own hash."""
    cells = cells_of(world, ["oracle"], fractions=(100,))
    assert names(cells) == ["pretraining/none-seed-0", "fine-tuning/oracle-100-percent-seed-0"]
    heard = replace(cells[1], row="heard", oracle=False)
    assert cells[1].hash != heard.hash
    assert Runner([*cells, heard], tmp_path).run()
    results = [read_result(cell, tmp_path) for cell in (cells[1], heard)]
    assert [result["steps"] for result in results] == [2, 2] and all(result["test_rows"] == 8 for result in results)
    losses = [[log["loss"] for log in result["history"]] for result in results]
    assert losses[0] != losses[1]


def test_probed_row(world, tmp_path):
    """Probes of a pretrained row: their values, and a table with what guessing gives."""
    rows = [
        json.loads(line) for name in ("train", "test") for line in (world / f"{name}.jsonl").read_text().splitlines()
    ]
    rows = [{**row, "gender": ("female", "male")[i % 2]} for i, row in enumerate(rows)]
    data = world / "traits.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    probing = {"data": str(data), "labels": ["gender"], "layers": "0,-1", "bootstrap": 20, "splits": 1}
    scale = replace(SCALE, rows=(Row("none", fractions=(), probed=True),), probing=probing)
    cells = cells_of(world, ["none"], scale=scale)
    assert names(cells) == ["pretraining/none-seed-0", "probing/none-seed-0"]
    report = Report(scale, cells, tmp_path, command="speechllm reproduce", name="study-traits")
    assert Runner(cells, tmp_path, report.write).run(), (tmp_path / cells[1].name / "error.txt").read_text()
    found = read_result(cells[1], tmp_path)["probes"]["gender"]
    assert found["metric"] == "accuracy" and all(0 <= place["value"] <= 1 for place in found["places"].values())
    text = (tmp_path / "study-traits.md").read_text()
    assert text.startswith("# Study traits, scale test\n")
    assert "## Probes: gender" in text and "Told better than by guessing (interval above 0): none: " in text


# ---- scales, studies, publishing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCALES)
def test_scales_can_be_planned(name):
    """From the repository's recipes, with the rows that may not have fewer than three seeds."""
    cells = plan(SCALES[name], RECIPES)
    for row in ("none", "asr-pretraining", "contr-cos-emb", "contr-cos-all", "contr-wasser-all"):
        assert {cell.seed for cell in cells if cell.row == row and cell.percent == 100} == {0, 1, 2}
    assert len({cell.hash for cell in cells}) == len(cells)


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("scale", SCALES)
def test_studies_can_be_planned(scale, name, tmp_path):
    if scale == "paper" and not STUDIES[name].at_paper:
        with pytest.raises(UsageError, match="tiny and small"):
            scale_of(SCALES[scale], name)
        return
    study = scale_of(SCALES[scale], name)
    cells = plan(study, RECIPES)
    tuned = any(cell.stage == "fine-tuning" for cell in cells)
    assert study.fine_tuning_notes == (SCALES[scale].fine_tuning_notes if tuned else ())
    assert len({cell.hash for cell in cells}) == len(cells)  # nothing is compared with itself
    assert {cell.row for cell in cells} >= {*STUDIES[name].rows, *(v.name for v in STUDIES[name].variants)} - {
        variant.name for variant in STUDIES[name].variants if variant.fine_tuning is not None
    }
    grid = {cell.name: cell.hash for cell in plan(SCALES[scale], RECIPES)}
    shared = [cell for cell in cells if cell.name in grid]
    assert all(grid[cell.name] == cell.hash for cell in shared)  # a run of the grid is not run again
    assert shared or not STUDIES[name].rows
    for cell in cells:
        if cell.stage == "probing":
            assert cell.row in STUDIES[name].rows and STUDIES[name].probed
        elif cell.name not in grid:
            recipe = tmp_path / "recipe.yaml"
            start = {"model": "x"} if cell.start else {}
            recipe.write_text(yaml.safe_dump({**cell.settings, **start, "output_dir": "y"}))
            settings = ContrastiveArguments if cell.stage == "pretraining" else FineTuningArguments
            parse_settings(
                [ModelArguments, DataArguments, settings], ["--config", str(recipe), "--use_cpu", "true"], "cell", ""
            )


def test_single_layer_goes_on_from_the_input():
    study = {row.name: row.settings.get("layer_schedule") for row in scale_of(SCALES["tiny"], "layers").rows}
    assert study["contr-cos-all"].endswith(":all")
    assert study["contr-cos-layer-15"] == study["contr-cos-all"].replace(":all", ":15")


@pytest.mark.parametrize("name", SCALES)
def test_claims_compare_what_the_scale_runs(name):
    compared = [comparison for claim in claims_of(SCALES[name]) for comparison in claim.comparisons]
    cells = {(cell.row, cell.percent) for cell in plan(SCALES[name], RECIPES)}
    assert {cell for c in compared for cell in ((c.row, c.percent), (c.other, c.other_percent))} <= cells
    assert {c.task for c in compared} == {*SCALES[name].tasks} or name == "paper"


def test_comet_scores_translations_when_all_is_run(world, finished, tmp_path, comet_python, monkeypatch, capsys):  # noqa: F811
    cells, output = finished[0], shutil.copytree(finished[1], tmp_path / "run")
    monkeypatch.setattr("speechllm.reproduction.command.SCALES", {"test": SCALE})
    (tmp_path / "model.ckpt").touch()
    options = {"report_only": True, "recipes": world / "recipes", "rows": ["none", "contr-cos-all"]}
    with pytest.raises(CometUnavailable, match="there is no .*nowhere"):
        reproduce("test", output, comet={"python": tmp_path / "nowhere"}, **options)
    assert "ST COMET" not in (output / "results.md").read_text()
    comet = {"python": comet_python, "model": str(tmp_path / "model.ckpt"), "gpus": 2}
    assert reproduce("test", output, comet=comet, **options)
    tested = [cell for cell in cells if cell.stage == "fine-tuning"]
    assert f"reads {2 * len(tested)} translations" in capsys.readouterr().out
    report = json.loads((output / "results.json").read_text())
    for row, found in report["rows"].items():
        for percent, cell in found["fine_tuning"].items():
            scores = [
                score
                for one in tested
                if (one.row, str(one.percent)) == (row, percent)
                for score in json.loads((output / one.name / "comet.json").read_text())["scores"].values()
            ]
            assert cell["measures"]["st comet"]["value"] == pytest.approx(100 * sum(scores) / len(scores))
            assert min(scores) >= 2  # the stand-in adds the number of GPUs
    text = (output / "results.md").read_text()
    assert "ST COMET" in text and f"COMET is that of {tmp_path / 'model.ckpt'}." in text
    (tmp_path / "other.ckpt").touch()
    reproduce("test", output, comet={**comet, "model": str(tmp_path / "other.ckpt"), "gpus": 5}, **options)
    again = json.loads((output / "results.json").read_text())["rows"]["none"]["fine_tuning"]["100"]["measures"]
    assert again["st comet"]["value"] > report["rows"]["none"]["fine_tuning"]["100"]["measures"]["st comet"]["value"]
    reproduce("test", output, comet=comet, **options)
    capsys.readouterr()
    reproduce("test", output, comet=comet, **options)
    assert "nothing new to read" in capsys.readouterr().out  # they have their scores
    (output / "results.md").unlink()
    with pytest.raises(CometUnavailable, match="COMET failed with the model 'elsewhere'"):
        reproduce("test", output, comet={**comet, "model": "elsewhere"}, **options)
    assert "ST COMET" in (output / "results.md").read_text()  # a failing COMET costs nothing that is there


def test_publish(finished, tmp_path):
    cells, output = finished
    report = Report(SCALE, cells, output, command="speechllm reproduce")
    publish_report(report, tmp_path, "test")
    text = (tmp_path / "test.md").read_text()
    links = re.findall(r"\]\((.*?)\)", text)
    assert links and all((tmp_path / link).is_file() for link in links)
    assert "**Not run" not in text


def test_report_names_what_is_missing(finished, tmp_path):
    cells, output = finished
    shutil.copytree(output, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / cells[-1].name)
    Report(SCALE, cells, tmp_path / "run", command="speechllm reproduce").write()
    text = (tmp_path / "run" / "results.md").read_text()
    assert f"**Not run, or failed:** {cells[-1].name.removeprefix('cells/')}." in text


def test_tables_of_what_was_never_planned_are_left_out(finished, tmp_path):
    cells, output = finished
    shutil.copytree(output, tmp_path / "run")
    pretraining = [cell for cell in cells if cell.stage == "pretraining"]
    Report(SCALE, pretraining, tmp_path / "run", command="speechllm reproduce").write()
    text = (tmp_path / "run" / "results.md").read_text()
    assert "## Pretrained" in text and "## Fine-tuned" not in text and "Not run yet" not in text
    (tmp_path / "run" / pretraining[0].name).rename(tmp_path / "elsewhere")
    Report(SCALE, pretraining, tmp_path / "run", command="speechllm reproduce").write()
    assert "Not run yet." in (tmp_path / "run" / "results.md").read_text()


def test_no_half_of_a_claim_is_judged():
    """A study has few of the rows that a claim compares; a scale says which claims it has no rows for."""
    reports = {
        name: Report(scale_of(SCALES["tiny"], name), [], Path("nowhere"), "", f"study-{name}") for name in STUDIES
    }
    judged = {name: [claim.name for claim in report._claims()] for name, report in reports.items()}
    assert judged["lora"] == [] and judged["curve"] == ["a tenth of the data"]
    assert judged["data"] == ["more pretraining data"]
    grid = Report(SCALES["tiny"], [], Path("nowhere"), "")
    (note,) = grid._not_judged()
    assert "More pretraining data helps." in note and "GigaSpeech" in note and "Gender" not in note
    (note,) = Report(SCALES["paper"], [], Path("nowhere"), "")._not_judged()
    assert "Gender and noise stay decodable" in note


def test_runs_are_not_started_by_a_launcher(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="Start it once, without a launcher"):
        reproduce("tiny", tmp_path, recipes=RECIPES)


def test_one_process_runs_cells_in_a_folder(world, finished, tmp_path, monkeypatch):
    """Another would remove what this one has not finished."""
    output = shutil.copytree(finished[1], tmp_path / "run")
    monkeypatch.setattr("speechllm.reproduction.command.SCALES", {"test": SCALE})
    options = {"recipes": world / "recipes", "rows": ["none", "contr-cos-all"], "fractions": [100]}
    with FileLock(output / ".running.lock"):
        with pytest.raises(UsageError, match="Another process runs cells in"):
            reproduce("test", output, **options)
        assert reproduce("test", output, report_only=True, **options)
    assert reproduce("test", output, **options)


def test_an_oracle_is_trained_at_no_fraction_but_its_own():
    """Where only the projector is trained, there is nothing of it to train."""
    cells = plan(SCALES["paper"], RECIPES, fractions=(100, 0))
    assert {cell.percent for cell in cells if cell.oracle} == {0}
    assert {cell.percent for cell in cells if cell.row == "none" and cell.stage == "fine-tuning"} == {100, 0}


def test_unknown_study(tmp_path):
    with pytest.raises(UsageError, match="there is no 'nothing'. Choose from layers"):
        reproduce("tiny", tmp_path, study="nothing", recipes=RECIPES)
