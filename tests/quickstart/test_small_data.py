"""What `speechllm fetch` writes, from a source made here."""

import json

import pytest

from speechllm.cli import main
from speechllm.data.schema import load_rows
from speechllm.quickstart import small_data
from speechllm.quickstart.sources import Source


@pytest.fixture
def source(tmp_path, monkeypatch):
    """200 prompts, one of them long, two of them in the Spanish prompts too; models that are folders of one file."""
    for name in ("speech", "text"):
        (tmp_path / "cache" / name).mkdir(parents=True)
        (tmp_path / "cache" / name / "config.json").write_text(f'"{name}"')
    rows = [
        {"id": f"p{i}", "audio": str(tmp_path / f"{i}.flac"), "text": f"one{i} two{i} three{i}", "language": "en",
         "task": "asr", "duration": 9.0 if i == 0 else 2.0}
        for i in range(200)
    ]  # fmt: skip
    credits = [{"name": "a model", "licence": "MIT"}, {"name": "prompts", "licence": "CC-BY-SA-3.0"}]
    models = [str(tmp_path / "cache" / name) for name in ("speech", "text")]
    found = Source("packages", models[0], None, models[1], None, rows, credits)
    monkeypatch.setattr(small_data, "load_source", lambda name: found)
    monkeypatch.setattr(small_data, "prompt_texts", lambda code: {"p3": "tres", "p4": "cuatro"} if code == "es" else {})
    return found


def test_fetch(source, tmp_path, capsys):
    folder = tmp_path / "small"
    for _ in range(2):  # a second time replaces the first
        assert main(["fetch", "--output", str(folder)]) == 0
    assert f"{folder / 'test.jsonl'}: 84 rows" in capsys.readouterr().out
    for name in ("speech", "text"):
        assert json.loads((folder / f"{name}_model" / "config.json").read_text()) == name
    train, test, more, tests = (
        load_rows(folder / f"{name}.jsonl") for name in ("train", "test", "train-tasks", "test-tasks")
    )
    assert len(test) == 84 and len(train) == 199 - 84
    assert {row["id"] for row in train} | {row["id"] for row in test} == {f"p{i}" for i in range(1, 200)}
    row = next(row for row in train + test if row["id"] == "p3")
    assert row["audio"] == source.rows[3]["audio"] and row["license"] == "cc-by-sa-3.0" and row["source"] == "prompts"
    assert [word["word"] for word in row["words"]] == ["one3", "two3", "three3"] and row["alignment"] == "proportional"
    assert row["words"][0]["start"] == 0 and row["words"][-1]["end"] == 2.0
    added = [row for row in more + tests if row["task"] == "st"]
    assert {(row["id"], row["target_language"], row["target"]) for row in added} == {
        ("p3 es", "es", "tres"),
        ("p4 es", "es", "cuatro"),
    }
    for rows, all_tasks in ((train, more), (test, tests)):  # a translation is on its utterance's side of the split
        assert {row["audio"] for row in all_tasks} == {row["audio"] for row in rows}
    assert len(more) + len(tests) == len(train) + len(test) + 2


def prompts_in(code, texts, seconds=2.0):
    return [
        {
            "id": name,
            "audio": f"/{code}/{name}.flac",
            "text": text,
            "language": code,
            "task": "asr",
            "duration": seconds,
        }
        for name, text in texts.items()
    ]


def test_prompts_of_several_languages(source, tmp_path, monkeypatch, capsys):
    """p1 is tested; p2 is like it in Spanish alone, p3 like p2 in English alone, p5 has no Spanish version."""
    english = {"p1": "the sky is blue today", "p2": "wait for the beep please", "p3": "wait for the beep", "p4": "goodbye",
               "p5": "press the pound key"}  # fmt: skip
    spanish = {"p1": "el cielo es azul hoy", "p2": "el cielo es muy azul hoy", "p3": "espere", "p4": "adiós"}
    prompts = {"en": prompts_in("en", english), "es": prompts_in("es", spanish)}
    train, test = small_data.parallel_prompts(prompts, {"p1"})
    assert [(row["id"], row["task"], row.get("target")) for row in test] == [
        ("en/p1", "asr", None),
        ("en/p1-es", "st", spanish["p1"]),
        ("es/p1", "asr", None),
        ("es/p1-en", "st", english["p1"]),
    ]
    assert [row["id"] for row in train] == [
        *("en/p3", "en/p3-es", "en/p4", "en/p4-es", "en/p5"),
        *("es/p3", "es/p3-en", "es/p4", "es/p4-en"),
    ]
    assert train[1]["target_language"] == "es" and train[1]["source"] == "asterisk-core-sounds-en-g722"
    monkeypatch.setattr(small_data, "asterisk_prompts", prompts.__getitem__)
    folder = tmp_path / "small"
    assert main(["fetch", "--output", str(folder), "--languages", "en", "es"]) == 0
    assert "train-languages.jsonl: " in capsys.readouterr().out
    assert {row["id"][:3] for row in load_rows(folder / "test-languages.jsonl")} <= {"en/", "es/"}
    assert main(["fetch", "--output", str(folder), "--languages", "xx"]) == 1
    assert "no prompts in 'xx'" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(source, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["fetch", "--output", str(tmp_path / "file")]) == 1
    assert "file" in capsys.readouterr().err
