"""From the settings of `pretrain` and `finetune` to training rows."""

import json
from collections import Counter

import corpora_in_miniature as miniature
import datasets
import pytest
from tiny_training import fine_tuning

from speechllm.cli import main
from speechllm.data.prompts import WORDINGS
from speechllm.data.schema import ManifestError
from speechllm.recipes import UsageError, parse_settings
from speechllm.training import DataArguments


@pytest.fixture
def corpora(tmp_path, monkeypatch):
    """A manifest of 20 rows, MuST-C with 3 segments, and a recording that is missing."""
    rows = []
    for i in range(20):
        miniature.sound(tmp_path / "wav" / f"{i}.wav", 0.3, seed=i)
        rows.append({"id": f"r{i}", "audio": f"wav/{i}.wav", "text": f"number {i}", "duration": 0.3})
    rows.append({"id": "gone", "audio": "wav/gone.wav", "text": "gone"})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    miniature.must_c(tmp_path / "must-c")
    monkeypatch.chdir(tmp_path)
    return tmp_path


MUST_C = "must-c:must-c?target_language=de"


def load(*arguments):
    (data,) = parse_settings([DataArguments], arguments, "test", "")
    train, held_out = data.load()
    return data, train, held_out


def test_several_sources_on_the_command_line(corpora):
    data, train, held_out = load("--train_data", "a.jsonl", MUST_C, "--eval_data", f"{MUST_C}&task=asr")
    assert [row["id"] for row in train] == [*(f"r{i}" for i in range(20)), "ted_1_0-de", "ted_1_1-de", "ted_2_0-de"]
    assert [row["task"] for row in held_out] == ["asr"] * 3
    assert [item.id for item in data.set_aside] == ["gone"]
    assert [report.splitlines()[0] for report in data.reports] == [
        f"{MUST_C}&task=asr: 3 rows, 0.00 hours (asr 3)",
        "a.jsonl: 20 rows, 0.00 hours (asr 20)",
        f"{MUST_C}: 3 rows, 0.00 hours (st 3)",
    ]
    assert "1 set aside: audio file cannot be found" in data.reports[1]


def test_a_list_in_a_recipe(corpora):
    recipe = corpora / "r.yaml"
    recipe.write_text(
        "train_data:\n- a.jsonl\n- {source: 'must-c:must-c', target_language: [de, fr], weight: 2}\nmixture_temperature: 1\n"
    )
    _, train, _ = load("--config", str(recipe))
    counts = Counter(row.get("target_language", "asr") for row in train)
    assert counts == {"asr": 20, "de": 6, "fr": 6}
    _, train, _ = load("--config", str(recipe), "--train_data", "a.jsonl")  # the command line wins
    assert len(train) == 20


def test_parts_limits_and_mixtures(corpora):
    sources = ("--train_data", "a.jsonl", "must-c:must-c?target_language=de,fr")
    _, half, _ = load(*sources, "--train_fraction", "0.5")
    assert Counter("task" in row for row in half) == {False: 10, True: 3}  # of every source
    others = {
        tuple(r["id"] for r in load(*sources, "--train_fraction", "0.5", "--subset_seed", str(s))[1]) for s in range(4)
    }
    assert len(others) > 1
    _, short, _ = load("--train_data", sources[2], "--minimum_seconds", "0.4", "--maximum_seconds", "0.8")
    assert {row["duration"] for row in short} == {0.5, 0.7}
    _, even, _ = load(*sources, "--mixture_temperature", "1e9")
    assert Counter("task" in row for row in even) == {False: 20, True: 20}


def test_limits_on_what_a_source_lacks_are_an_error(corpora):
    with pytest.raises(ManifestError, match="a.jsonl: no row is within the limits"):
        load("--train_data", "a.jsonl", MUST_C, "--minimum_seconds", "0.4")


def test_held_out_texts_are_in_no_source(corpora):
    _, train, held_out = load(
        "--train_data", "a.jsonl", "must-c:must-c?task=asr,st&target_language=de", "--held_out", "1"
    )
    (row,) = held_out
    assert row["text"] not in {other["text"] for other in train}


def test_texts_are_held_out_where_there_are_texts(corpora):
    (corpora / "silent.jsonl").write_text(
        '{"audio": "wav/0.wav", "task": "st", "target_language": "de", "target": "ja"}'
    )
    with pytest.raises(UsageError, match="1 of 21 rows have no `text`"):
        load("--train_data", "a.jsonl", "silent.jsonl", "--held_out", "1")


def test_drawn_instructions(corpora):
    sources = ("--train_data", "a.jsonl", MUST_C, "--eval_data", "a.jsonl")
    _, train, _ = load(*sources)
    assert not any("prompt" in row for row in train)
    _, train, held_out = load(*sources, "--prompts", "drawn", "--prompt_languages", "en", "answer")
    assert len({row["prompt"] for row in train if row["id"].startswith("r")}) > 2
    english = [wording.format(target_language="German") for wording in WORDINGS["st"]["en"]]
    assert {row["prompt"] for row in train if row.get("task") == "st"} <= {*english, *WORDINGS["st"]["de"]}
    assert not any("prompt" in row for row in held_out)


def test_strict_stops_before_training(corpora):
    with pytest.raises(ManifestError, match=r"gone.wav cannot be found.*\(Strict mode stops here.\)"):
        load("--train_data", "a.jsonl", "--strict")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompts", "all"), "use 'first' or 'drawn'"),
        (("--mixture_temperature", "0"), "must be above 0"),
        (
            ("--streaming", "true", "--held_out", "2"),
            "--held_out needs all rows at once.*Give held-out rows as --eval_data",
        ),
    ],
)
def test_settings_that_make_no_sense(corpora, arguments, message):
    with pytest.raises(UsageError, match=message):
        load("--train_data", "a.jsonl", *arguments)


@pytest.fixture
def hub(corpora, datasets_cache):
    """A data set with two configurations of two splits, in the form of a repository."""
    folder = corpora / "org" / "data"
    folder.mkdir(parents=True)
    for name in ("en", "de"):
        for split in ("train", "dev"):
            rows = [{"audio": str(corpora / "wav" / f"{i}.wav"), "text": f"{name} {split}"} for i in range(2)]
            datasets.Dataset.from_list(rows).to_parquet(folder / f"{name}-{split}.parquet")
    files = "".join(
        f"- config_name: {name}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {name}-{split}.parquet\n" for split in ("train", "dev"))
        for name in ("en", "de")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    return "hub:org/data"


def test_split_and_configuration_of_the_hub_hold_where_a_source_has_none(hub):
    options = ("--data_config", "de", "--data_split", "dev")
    sources = (hub, f"{hub}?row.language=de", f"{hub}?name=en", f"{hub}?split=train")
    _, train, held_out = load("--train_data", *sources, "a.jsonl", "--eval_data", f"{hub}?split=train", *options)
    texts = [row["text"] for row in train]
    assert texts[:8:2] == ["de dev", "de dev", "en dev", "de train"] and texts[8:] == [f"number {i}" for i in range(20)]
    assert train[2]["language"] == "de" and [row["text"] for row in held_out] == ["de train"] * 2
    for spec in ({"source": hub}, '{"source": "hub:org/data"}'):
        rows, _ = DataArguments([spec], data_config="en", data_split="dev").load()
        assert {row["text"] for row in rows} == {"en dev"}
    assert {row["text"] for row in load("--train_data", f"{hub}?name=de")[1]} == {"de train"}


def test_split_and_configuration_hold_for_streams_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((*arguments, options["split"]))
        return datasets.Dataset.from_list([{"audio": "a.wav", "text": "a"}]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options = ("--data_config", "de", "--data_split", "dev", "--streaming", "true")
    load("--train_data", "org/one", "hub:org/two", "hub:org/three?name=en&split=test", *options)
    load("--train_data", "org/four", "--streaming", "true")
    assert asked == [
        ("org/one", "de", "dev"), ("org/two", "de", "dev"), ("org/three", "en", "test"), ("org/four", None, "train")
    ]  # fmt: skip


@pytest.mark.parametrize("option", ["--data_config", "--data_split"])
def test_options_of_the_hub_without_a_data_set_of_the_hub_are_refused(corpora, option):
    with pytest.raises(UsageError, match="no source is one. Name it hub:OWNER/NAME"):
        load("--train_data", "a.jsonl", option, "dev")


def test_a_stream_of_several_sources_trains(corpora):
    (corpora / "a.jsonl").write_text("".join((corpora / "a.jsonl").read_text().splitlines(keepends=True)[:20]))
    stream, _ = load("--train_data", "a.jsonl", f"{MUST_C}&weight=3", "--streaming", "true", "--prompts", "drawn",
                     "--maximum_seconds", "0.8")[1:]  # fmt: skip
    rows = list(stream)
    assert all(row["prompt"] for row in rows) and max(row["duration"] for row in rows) == pytest.approx(0.7)
    assert {row["id"] for row in rows} == {*(f"r{i}" for i in range(20)), "ted_1_0-de", "ted_1_1-de"}
    trainer = fine_tuning(corpora / "run", train=stream, max_steps=3, stream_buffer=8)
    trainer.train()
    assert trainer.state.global_step == 3 and not trainer.set_aside


def test_a_strict_stream_ends_the_run_at_a_bad_row(corpora):
    stream, _ = load("--train_data", "a.jsonl", "--streaming", "true", "--strict")[1:]
    trainer = fine_tuning(corpora / "run", train=stream, max_steps=20, stream_buffer=30)
    with pytest.raises(ManifestError, match=r"gone.*\(Strict mode stops here.\)"):
        trainer.train()


def test_a_mixture_of_segments_passages_and_files_trains(corpora):
    miniature.spoken_squad(corpora / "squad")
    _, train, _ = load("--train_data", "a.jsonl", MUST_C, "spoken-squad:squad")
    trainer = fine_tuning(corpora / "run", train=train, max_steps=7, feature_cache=str(corpora / "cache"))
    trainer.train()
    assert len(trainer.train_rows) == 26 and not trainer.set_aside


def test_the_command_data(corpora, capsys):
    assert main(["data", "a.jsonl", MUST_C, "--output", "out/all.jsonl"]) == 0
    printed = capsys.readouterr().out
    assert "a.jsonl: 20 rows" in printed and "1 set aside: audio file cannot be found" in printed
    again = DataArguments("out/all.jsonl").load()[0]
    assert [row["id"] for row in again] == [*(f"r{i}" for i in range(20)), "ted_1_0-de", "ted_1_1-de", "ted_2_0-de"]
    assert again[20]["audio"]["offset"] == 0.1
    assert main(["data", "a.jsonl", "--strict"]) == 1
    assert "gone.wav cannot be found" in capsys.readouterr().err
    assert main(["data", "a.jsonl", "--output", "all.csv"]) == 1


def test_audio_in_memory_becomes_files(corpora):
    miniature.write_shards(corpora / "shards", corpora)
    rows = [{"audio": {"bytes": (corpora / "wav" / "0.wav").read_bytes(), "path": "x.wav"}, "text": "zero"}]
    datasets.Dataset.from_list(rows).to_parquet(corpora / "held.parquet")
    assert main(["data", "held.parquet", "shards", "--output", "all.jsonl"]) == 0
    again = DataArguments("all.jsonl", strict=True).load()[0]
    assert len(again) == 5 and again[0]["audio"].startswith(str(corpora / "all.audio"))


def test_segments_of_a_corpus_can_be_aligned(corpora):
    assert main(["data", MUST_C, "--output", "must-c.jsonl"]) == 0
    assert main(["align", "--data", "must-c.jsonl", "--output", "aligned.jsonl"]) == 0
    rows = DataArguments("aligned.jsonl").load()[0]
    assert rows[1]["audio"]["offset"] == 0.8 and rows[1]["words"][-1] == {"word": "honor.", "start": 0.442, "end": 0.7}
