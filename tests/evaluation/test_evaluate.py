"""Evaluation: every answer is `generate`'s, nothing is answered twice, bad rows are counted, the page stands by itself."""

import json
import re
import sys

import numpy as np
import pytest
import soundfile
import torch
from tiny import tiny_processor, tone
from tiny_training import tiny_rows, tiny_trainable

from speechllm.data.schema import SetAside
from speechllm.evaluation import evaluate as module
from speechllm.evaluation import generation
from speechllm.evaluation.command import summary
from speechllm.evaluation.evaluate import EvaluationError, evaluate_model
from speechllm.evaluation.metrics import score, translation
from speechllm.evaluation.scoring import Baseline, compare_comet


@pytest.fixture(scope="module")
def model():
    return tiny_trainable()


@pytest.fixture(scope="module")
def processor(model):
    return tiny_processor(model.config)


def task_rows():
    """Two rows and more of each task, of different lengths."""
    rows = tiny_rows(10, seconds=0.2)
    for row, task in zip(rows, ["asr", "st", "sqa", "traits", "asr", "st", "sqa", "traits", "asr", "asr"]):
        row["task"] = task
    for row in rows:
        if row["task"] == "st":
            row.update(target="ein Apfel", target_language="German", language="English")
        elif row["task"] == "sqa":
            row.update(question="What is it?", answers=["an apple", "apple"], target="an apple")
        elif row["task"] == "traits":
            row.update(trait="gender", choices=["female", "male"], target="female", prompt="female or male?")
    rows[8]["language"], rows[9]["language"] = "English", "German"
    return rows


def run(model, processor, rows, output, **options):
    options = {"max_new_tokens": 5, "batch_size": 3, "bootstrap": 0, **options}
    return evaluate_model(model, processor, rows, output, **options)


def predictions_in(folder):
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return {line["id"]: line for line in lines}


def test_answers_are_those_of_generate_and_metrics_those_of_score(model, processor, tmp_path):
    rows = task_rows()
    metrics = run(model, processor, rows, tmp_path, bootstrap=50)
    found = predictions_in(tmp_path)
    assert list(found) == [row["id"] for row in rows]  # in the order of the data, though answered by length
    for row, words in zip(
        rows, ["Transcribe the speech.", "Translate the speech into German.", "What is it?", "female or male?"]
    ):
        chat = [
            {"role": "user", "content": [{"type": "audio", "audio": row["audio"]}, {"type": "text", "text": words}]}
        ]
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        expected = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert found[row["id"]]["prediction"] == expected
        assert found[row["id"]]["prompt"] == words
    predictions = {name: line["prediction"] for name, line in found.items()}
    assert set(metrics["tasks"]) == {"asr", "st", "sqa", "traits"}
    for task, values in metrics["tasks"].items():
        members = [row for row in rows if row["task"] == task]
        assert values["metrics"] == score(task, members, predictions, bootstrap=50)
        assert values["utterances"] == values["answered"] == values["scored"] == len(members)
    assert "wer_interval" in metrics["tasks"]["asr"]["metrics"]
    assert {name: group["utterances"] for name, group in metrics["tasks"]["asr"]["groups"].items()} == {
        "English": 1,
        "German": 1,
        "other": 2,
    }
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["generation"]["max_new_tokens"] == 5


def test_tasks_prompts_and_beams_are_chosen(model, processor, tmp_path):
    metrics = run(
        model, processor, task_rows(), tmp_path, tasks=["sqa", "st"], num_beams=2, prompts={"sqa": "{question} Brief."}
    )
    found = predictions_in(tmp_path)
    assert {line["task"] for line in found.values()} == {"st", "sqa"} == set(metrics["tasks"])
    assert found["utterance 2"]["prompt"] == "What is it? Brief."
    with pytest.raises(EvaluationError, match="'emotion'.*the data has asr, st"):
        run(model, processor, task_rows(), tmp_path / "b", tasks=["emotion"])


def test_an_interrupted_run_goes_on_where_it_stopped(model, processor, tmp_path, monkeypatch):
    rows = task_rows()
    run(model, processor, rows, tmp_path / "whole")
    real, calls = generation.generate_texts, []

    def fail_at_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(generation, "generate_texts", fail_at_third)
    with pytest.raises(KeyboardInterrupt):
        run(model, processor, rows, tmp_path / "again")
    path = tmp_path / "again" / "predictions.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 6  # two batches of three
    path.write_bytes(b"".join(lines)[:-20])  # the last line is torn
    monkeypatch.setattr(generation, "generate_texts", real)
    seen = []
    monkeypatch.setattr(generation, "generate_texts", lambda *a: seen.append(len(a[2]["rows"])) or real(*a))
    metrics = run(model, processor, rows, tmp_path / "again")
    assert metrics["run"]["answers_kept_from_before"] == 5
    assert seen == [3, 3, 1]  # the second batch once more, for its last row; then the rest
    assert path.read_bytes() == (tmp_path / "whole" / "predictions.jsonl").read_bytes()
    for name in ("tasks", "data", "set_aside"):
        assert metrics[name] == json.loads((tmp_path / "whole" / "metrics.json").read_text())[name]
    run(model, processor, rows, tmp_path / "again")
    assert seen == [3, 3, 1]  # nothing is left to do


def test_answers_of_another_model_or_setting_are_not_mixed_in(model, processor, tmp_path):
    rows = task_rows()[:3]
    run(model, processor, rows, tmp_path)
    with pytest.raises(EvaluationError, match="max_new_tokens: 5, now 6"):
        run(model, processor, rows, tmp_path, max_new_tokens=6)
    other = tiny_trainable()
    with torch.no_grad():
        next(other.model.projector.parameters()).view(-1)[0] += 1
    with pytest.raises(EvaluationError, match="model weights"):
        run(other, processor, rows, tmp_path)
    before = predictions_in(tmp_path)
    run(model, processor, rows, tmp_path, prompts={"asr": "What?"}, batch_size=2)  # other prompts: those anew
    after = predictions_in(tmp_path)
    with pytest.raises(EvaluationError, match=r"tasks: \['asr', 'sqa', 'st'\], now \['asr'\]"):
        run(model, processor, rows, tmp_path, tasks=["asr"])  # would throw the other answers away
    assert after["utterance 0"]["prompt"] == "What?" != before["utterance 0"]["prompt"]
    assert after["utterance 1"] == before["utterance 1"]


def test_another_recording_of_the_same_id_is_answered_anew(model, processor, tmp_path):
    rows = tiny_rows(3)
    soundfile.write(tmp_path / "0.wav", rows[0]["audio"], 16_000)
    rows[0]["audio"] = str(tmp_path / "0.wav")
    metrics = run(model, processor, rows, tmp_path / "out")
    first = predictions_in(tmp_path / "out")
    soundfile.write(tmp_path / "0.wav", tone(0.9, seed=7), 16_000)
    rows[1]["audio"] = tone(0.9, seed=8)
    metrics = run(model, processor, rows, tmp_path / "out")
    assert metrics["run"]["answers_kept_from_before"] == 1
    again = predictions_in(tmp_path / "out")
    assert first["utterance 2"] == again["utterance 2"]
    for i in range(2):
        expected = run(model, processor, [rows[i]], tmp_path / f"alone {i}")
        assert expected and again[f"utterance {i}"] == predictions_in(tmp_path / f"alone {i}")[f"utterance {i}"]
        assert first[f"utterance {i}"]["input"] != again[f"utterance {i}"]["input"]
    rows[0]["audio"] = tone(0.3) * 0  # its earlier answer does not stand in for what cannot be heard
    assert run(model, processor, rows, tmp_path / "out")["tasks"]["asr"]["answered"] == 2


def test_clusters_must_be_there(model, processor, tmp_path):
    rows = task_rows()
    with pytest.raises(EvaluationError, match="'passageid', but no row has"):
        run(model, processor, rows, tmp_path, cluster="passageid")
    rows[2]["passage_id"] = "a"
    with pytest.raises(EvaluationError, match="1 row.s. of the task 'sqa' have no such column"):
        run(model, processor, rows, tmp_path, cluster="passage_id")
    rows[6]["passage_id"] = "a"
    assert run(model, processor, rows, tmp_path, cluster="passage_id")["tasks"]["sqa"]["scored"] == 2


def test_what_fails_at_the_end_does_not_cost_the_rest(model, processor, tmp_path, monkeypatch):
    rows = task_rows()
    for row in rows:
        if row["task"] == "asr":
            row["text"] = row["target"] = "..."  # no word to be scored by

    def fails(*args, **kwargs):
        raise ValueError("the states are not finite")

    monkeypatch.setattr(module, "alignment_report", fails)
    with pytest.raises(ValueError, match="not finite"):
        run(model, processor, rows, tmp_path, alignment=True)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["alignment"] is None and metrics["tasks"]["sqa"]["metrics"]["f1"] >= 0
    assert metrics["tasks"]["asr"]["metrics"] == {} and "word" in metrics["tasks"]["asr"]["reason"]


def test_bad_rows_are_counted_and_the_rest_is_evaluated(model, processor, tmp_path):
    rows = task_rows()
    soundfile.write(tmp_path / "broken.wav", tone(0.3), 16_000)
    (tmp_path / "broken.wav").write_bytes((tmp_path / "broken.wav").read_bytes()[:30])
    rows[4]["audio"] = str(tmp_path / "broken.wav")
    rows[5].pop("target")  # no reference; the transcript is none for a translation
    rows[6].pop("question")
    rows[7]["audio"] = None
    rows[8]["id"] = rows[9]["id"] = rows[0]["id"]
    rows.append({**rows[2], "id": "utterance 10", "answers": [["of another form"]]})
    out = tmp_path / "out"
    metrics = run(model, processor, rows, out, set_aside=[SetAside("earlier", "earlier: gone.")])
    aside = {item["id"]: item["reason"] for item in metrics["set_aside"]}
    assert list(aside) == ["earlier", "utterance 6", "utterance 7", "utterance 10", "utterance 4"]
    assert "`answers` is" in aside["utterance 10"]
    assert "broken.wav" in aside["utterance 4"] and "question" in aside["utterance 6"]
    assert metrics["data"]["duplicate_ids"] == ["utterance 0"]
    assert {"utterance 0", "utterance 0 #2", "utterance 0 #3"} <= set(predictions_in(out))
    assert metrics["tasks"]["st"]["without_reference"] == 1 and metrics["tasks"]["st"]["scored"] == 1
    assert metrics["tasks"]["asr"] | {"answered": 3, "scored": 3, "utterances": 4} == metrics["tasks"]["asr"]
    again = run(model, processor, rows, out)  # what is set aside stays, and costs nothing
    assert [item["id"] for item in again["set_aside"]] == [*aside][1:]
    rows[4]["audio"] = tone(0.3, seed=4)  # mended
    assert run(model, processor, rows, out)["tasks"]["asr"]["scored"] == 4


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"audio": None}, "has no `audio`"),
        ({"id": "utterance 1"}, "used by several rows: utterance 1"),
        ({"text": ""}, "no reference"),
        ({"audio": np.zeros(3200, dtype=np.float32)}, "silent.*--strict stops here"),
    ],
)
def test_strict_stops(model, processor, tmp_path, change, match):
    rows = tiny_rows(3)
    rows[0].update(change)
    with pytest.raises(ValueError, match=match):
        run(model, processor, rows, tmp_path, strict=True)


def test_strict_stops_at_what_was_set_aside_before(model, processor, tmp_path):
    rows = tiny_rows(4)
    rows[2]["audio"] = np.zeros(3200, dtype=np.float32)
    run(model, processor, rows, tmp_path)
    with pytest.raises(ValueError, match="utterance 2.*silent.*--strict stops here"):
        run(model, processor, rows, tmp_path, strict=True)


def test_strict_oracles_stop_at_a_missing_transcript_before_the_answers(model, processor, tmp_path):
    rows = tiny_rows(3)
    rows[2] = {**rows[2], "text": None, "target": "nothing"}
    with pytest.raises(EvaluationError, match="utterance 2 has no transcript.*--strict stops here"):
        run(model, processor, rows, tmp_path, oracle=True, strict=True)
    assert not (tmp_path / "predictions.jsonl").exists()
    metrics = run(model, processor, rows, tmp_path, oracle=True)
    assert [item["kind"] for item in metrics["set_aside"]] == ["empty transcript"]


def test_answers_to_other_data_are_not_thrown_away(model, processor, tmp_path):
    rows = tiny_rows(6)
    run(model, processor, rows[:4], tmp_path)
    before = (tmp_path / "predictions.jsonl").read_bytes()
    with pytest.raises(EvaluationError, match="answers to 3 utterance.s. .*first: utterance 0.*another --output"):
        run(model, processor, rows[3:], tmp_path)
    assert (tmp_path / "predictions.jsonl").read_bytes() == before
    assert run(model, processor, rows[:4], tmp_path)["run"]["answers_kept_from_before"] == 4
    assert run(model, processor, rows, tmp_path)["run"]["answers_kept_from_before"] == 4  # more rows
    rows[0]["audio"] = None  # lost since, but still in the data
    assert run(model, processor, rows, tmp_path)["run"]["answers_kept_from_before"] == 5
    gone = SetAside("utterance 5", "utterance 5: its file cannot be found.")
    assert run(model, processor, rows[:5], tmp_path, set_aside=[gone])["run"]["answers_kept_from_before"] == 4


def test_nothing_to_evaluate_is_an_error(model, processor, tmp_path):
    with pytest.raises(EvaluationError, match="there are no rows"):
        run(model, processor, [], tmp_path)
    with pytest.raises(EvaluationError, match="has no `audio`"):
        run(model, processor, [{"id": "mute", "text": "a"}], tmp_path)


def test_empty_answers_and_answers_cut_off_are_counted(model, processor, tmp_path, monkeypatch):
    answers = iter([("", True), ("one apple", True), ("one", False)])
    monkeypatch.setattr(generation, "generate_texts", lambda *a: [next(answers) for _ in a[2]["rows"]])
    metrics = run(model, processor, tiny_rows(3), tmp_path)["tasks"]["asr"]
    assert (metrics["empty_predictions"], metrics["cut_off"]) == (1, 1)
    assert metrics["metrics"]["deletions"] >= 2  # an empty answer counts as all wrong


def test_an_answer_ends_with_the_end_of_turn(model, processor):
    rows = tiny_rows(2)
    batch = generation.PromptCollator(generation.AnswerItems(rows, processor, None, with_answer=False))
    batch = batch([generation.AnswerItems(rows, processor, None, with_answer=False)[i] for i in range(2)])
    assert [end for _, end in generation.generate_texts(model, processor, batch, 4)] == [False, False]
    eos = processor.tokenizer.eos_token_id
    with torch.no_grad():
        kept = model.generation_config.eos_token_id, model.generation_config.suppress_tokens
        model.generation_config.eos_token_id = eos
        model.generation_config.forced_eos_token_id = eos
        try:
            assert [end for _, end in generation.generate_texts(model, processor, batch, 4)] == [True, True]
        finally:
            model.generation_config.eos_token_id, model.generation_config.suppress_tokens = kept
            model.generation_config.forced_eos_token_id = None


def test_the_oracle_reads_the_transcript_in_place_of_the_audio(model, processor, tmp_path):
    rows = tiny_rows(3)
    rows[2].pop("text")
    rows[2]["target"] = "nothing"
    for row in rows:
        row.pop("audio")  # not needed
    metrics = run(model, processor, rows, tmp_path, oracle=True)
    found = predictions_in(tmp_path)
    assert [item["id"] for item in metrics["set_aside"]] == ["utterance 2"]
    for row in rows[:2]:
        prompt = f"{row['text']}\nTranscribe the speech."
        text = processor.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        ids = torch.tensor([processor.tokenizer(text, add_special_tokens=False).input_ids])
        with torch.no_grad():
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False
            )
        expected = processor.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert found[row["id"]]["prediction"] == expected


def test_a_baseline_gives_a_paired_test_of_every_metric(model, processor, tmp_path):
    rows = tiny_rows(6)
    run(model, processor, rows[:5], tmp_path / "a")
    other = tiny_trainable()
    torch.manual_seed(3)
    for parameter in other.model.projector.parameters():
        torch.nn.init.normal_(parameter)
    metrics = run(other, processor, rows, tmp_path / "b", baseline=tmp_path / "a")
    against = metrics["tasks"]["asr"]["against_baseline"]
    assert against["utterances"] == 5 and [*against["tests"]] == ["wer", "cer", "mean_utterance_wer"]
    mine = {name: line["prediction"] for name, line in predictions_in(tmp_path / "b").items()}
    theirs = {name: line["prediction"] for name, line in predictions_in(tmp_path / "a").items()}
    ours, others = (score("asr", rows[:5], answers) for answers in (mine, theirs))
    for name, test in against["tests"].items():
        assert test["difference"] == pytest.approx(ours[name] - others[name])
        assert 0 < test["p"] <= 1 and test["interval"][0] <= test["difference"] <= test["interval"][1]
    page = (tmp_path / "b" / "report.html").read_text()
    assert "on 5 common utterances" in page and '<td data-label="Metric">cer</td>' in page
    with pytest.raises(EvaluationError, match="no such file of predictions"):
        run(other, processor, rows, tmp_path / "c", baseline=tmp_path / "nowhere")
    assert not (tmp_path / "c" / "predictions.jsonl").exists()


def test_a_baseline_is_compared_task_by_task(model, processor, tmp_path):
    """An id may be another task's there, where it was left out here."""
    asked = {"task": "sqa", "question": "What is it?", "answers": ["an apple"]}
    rows = tiny_rows(2)
    run(model, processor, rows, tmp_path / "a")
    metrics = run(model, processor, [{**row, **asked} for row in rows], tmp_path / "b", baseline=tmp_path / "a")
    assert metrics["tasks"]["sqa"]["against_baseline"] == {"utterances": 0, "other_references": 0, "tests": {}}


def test_a_baseline_that_names_no_tasks_is_paired_by_id(model, processor, tmp_path):
    """As a file of one's own, and a run that was cut off."""
    rows = tiny_rows(3)
    lines = [{"id": row["id"], "prediction": "an apple"} for row in rows]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = [{**row, "task": "sqa", "question": "What is it?", "answers": ["an apple"]} for row in rows]
    metrics = run(model, processor, asked, tmp_path / "b", baseline=tmp_path / "mine.jsonl")
    assert metrics["tasks"]["sqa"]["against_baseline"]["utterances"] == 3


def test_a_baselines_other_utterances_of_the_same_id_are_left_out(model, processor, tmp_path):
    rows = tiny_rows(4)
    run(model, processor, rows, tmp_path / "a")
    others = [rows[0], {**rows[1], "text": "of another subset"}, *rows[2:]]
    metrics = run(model, processor, others, tmp_path / "b", baseline=tmp_path / "a")
    against = metrics["tasks"]["asr"]["against_baseline"]
    assert (against["utterances"], against["other_references"]) == (3, 1) and against["tests"]
    assert "    left out: 1 with other references there" in summary(metrics, "out")
    others = [{**row, "text": f"{i} of another subset"} for i, row in enumerate(rows)]
    metrics = run(model, processor, others, tmp_path / "c", baseline=tmp_path / "a")
    assert metrics["tasks"]["asr"]["against_baseline"] == {"utterances": 0, "other_references": 4, "tests": {}}


def test_comet_is_compared_over_the_same_references():
    rows = [{"id": f"row {i}", "task": "st", "target": "ein Apfel"} for i in range(3)]
    references = {"st": {"row 0": {"ein Apfel"}, "row 1": {"ein Fluss"}}}  # of the last it tells none
    baseline = Baseline({}, {row["id"]: 0.5 for row in rows}, "model", references)
    assert compare_comet(rows, {row["id"]: 1.0 for row in rows}, "model", baseline)["comet"]["utterances"] == 2


def test_a_baselines_predictions_must_be_texts(model, processor, tmp_path):
    lines = [{"id": "utterance 0", "prediction": "an apple"}, {"id": "utterance 1", "prediction": None}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(EvaluationError, match="prediction of utterance 1 is None, not a text"):
        run(model, processor, tiny_rows(2), tmp_path / "b", baseline=tmp_path / "mine.jsonl")
    assert not (tmp_path / "b").exists()


def test_a_missing_package_of_the_metrics_is_found_before_the_answers(model, processor, tmp_path, monkeypatch):
    rows = task_rows()
    rows[5]["target_language"] = "Japanese"  # one row alone
    tokenizer = translation.bleu_tokenizer

    def without_mecab(language):
        if language == "Japanese":
            raise ModuleNotFoundError("BLEU for Japanese needs a tokenizer")
        return tokenizer(language)

    with monkeypatch.context() as patch:
        patch.setattr(translation, "bleu_tokenizer", without_mecab)
        with pytest.raises(ModuleNotFoundError, match="BLEU for Japanese"):
            run(model, processor, rows, tmp_path)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ModuleNotFoundError, match="BLEU and chrF.. need sacreBLEU"):
        run(model, processor, rows, tmp_path)
    assert not (tmp_path / "predictions.jsonl").exists()
    run(model, processor, rows, tmp_path, tasks=["asr", "sqa", "traits"])  # which do not need it


def test_a_package_that_fails_after_the_answers_costs_its_task_alone(model, processor, tmp_path, monkeypatch):
    rows = task_rows()
    run(model, processor, rows, tmp_path / "a")
    real = generation.generate_texts

    def then_gone(*arguments):
        monkeypatch.setitem(sys.modules, "sacrebleu", None)
        return real(*arguments)

    monkeypatch.setattr(generation, "generate_texts", then_gone)
    tasks = run(model, processor, rows, tmp_path / "b", baseline=tmp_path / "a")["tasks"]
    assert tasks["st"]["metrics"] == {} and "need sacreBLEU" in tasks["st"]["reason"]
    assert tasks["st"]["against_baseline"]["tests"] == {} != tasks["asr"]["against_baseline"]["tests"]
    assert tasks["asr"]["metrics"]["wer"] >= 0 and predictions_in(tmp_path / "b")["utterance 0"]["score"] >= 0


def test_what_would_have_no_effect_is_refused_before_the_answers(model, processor, tmp_path):
    rows = task_rows()
    with pytest.raises(EvaluationError, match="There is a prompt for 'st', which is not among the tasks asr"):
        run(model, processor, rows, tmp_path, tasks=["asr"], prompts={"st": "In Welsh, please."})
    with pytest.raises(EvaluationError, match="COMET needs translations .* the data has none"):
        run(model, processor, tiny_rows(2), tmp_path, comet={})
    assert not (tmp_path / "predictions.jsonl").exists()


def test_an_unknown_normaliser_is_found_before_the_answers(model, processor, tmp_path):
    with pytest.raises(EvaluationError, match="no normaliser 'whisper'. Use basic"):
        run(model, processor, tiny_rows(2), tmp_path, normalisation="whisper")
    assert not (tmp_path / "predictions.jsonl").exists()


def test_a_task_without_metrics_says_why(model, processor, tmp_path):
    rows = [{**row, "text": "..."} for row in tiny_rows(2)]
    metrics = run(model, processor, rows, tmp_path)
    reason = "No reference has a word"
    assert reason in metrics["tasks"]["asr"]["reason"] and reason in (tmp_path / "report.html").read_text()
    assert any(reason in line for line in summary(metrics, "out"))


def test_segments_are_recordings_of_their_own_whatever_asks_about_them():
    segment = {"path": "talk.wav", "offset": 1.5, "duration": 2.0}
    rows = [{"audio": dict(segment), "text": "one", "task": task} for task in ("asr", "st")]
    rows += [{"audio": {**segment, "offset": 4.0}, "text": "two"}, {"audio": "talk.wav", "text": "all"}]
    assert [row["text"] for row in module._distinct_recordings(rows)] == ["one", "two", "all"]


def test_names_that_are_not_utf8_can_be_shown(model, processor, tmp_path):
    run(model, processor, [{**row, "id": f"caf\udce9 {i}"} for i, row in enumerate(tiny_rows(2))], tmp_path)
    assert "caf? 0" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_cached_frames_give_the_same_answers(model, processor, tmp_path):
    from speechllm.trainers.frozen_states import fill_frame_cache, frame_cache

    rows = tiny_rows(4)
    frames = frame_cache(str(tmp_path / "cache"), model.model, processor)
    fill_frame_cache(frames, rows, model.model, processor)
    run(model, processor, rows, tmp_path / "a")
    run(model, processor, rows, tmp_path / "b", frames=frames)
    names = ("id", "prediction")
    found = [[{n: line[n] for n in names} for line in predictions_in(tmp_path / f).values()] for f in ("a", "b")]
    assert found[0] == found[1]


def test_the_report_stands_by_itself_and_shows_the_worst(model, processor, tmp_path, monkeypatch):
    rows = task_rows()
    rows[0]["text"] = "<script>alert(1)</script> & more"
    answers = {0: "completely something else", 4: rows[4]["text"], 8: rows[8]["text"], 9: rows[9]["text"]}
    monkeypatch.setattr(
        generation, "generate_texts", lambda *a: [(answers.get(row, "apple"), True) for row in a[2]["rows"]]
    )
    run(model, processor, rows, tmp_path, bootstrap=20, worst=2)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page)
    assert page.count('<audio controls="controls"') == 8  # two worst of each of four tasks
    recognition = page[page.index('id="asr"') : page.index('id="st"')]
    assert recognition.index("utterance 0") < recognition.index("utterance 4")  # the worst comes first
    assert "utterance 9" not in recognition
    assert "WER".lower() in page and " to " in recognition
    assert (tmp_path / "plots" / "distribution_asr.svg").is_file()


def test_the_identity_of_a_model_is_that_of_its_weights(model):
    other = tiny_trainable()
    assert module.model_identity(model) == module.model_identity(other)
    with torch.no_grad():
        other.model.language_model.layers[0].mlp.up_proj.weight[0, 0] += 1
    assert module.model_identity(model)["weights"] != module.model_identity(other)["weights"]
