"""Fractions, mixtures and test rows of the reproduction's data, on rows without recordings behind them."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from speechllm.recipes import UsageError
from speechllm.reproduction import data
from speechllm.reproduction.data import PROBED_VOICES, TURNS, by_turns, fraction, mixture, passages, test_rows
from speechllm.synthesis import spoken_questions
from speechllm.synthesis.engines import parse_voices


def rows(count):
    """Two rows, of recognition and translation, of each recording, and one question of every third."""
    found = []
    for i in range(count):
        words = [{"word": "text", "start": 0.0, "end": 1.0}]
        common = {"audio": f"folder/{i}.flac", "text": f"text {i}", "duration": 1.0 + i % 5, "words": words}
        found += [{**common, "id": f"{i} asr", "task": "asr"}, {**common, "id": f"{i} st", "task": "st", "target": "x"}]
        if i % 3 == 0:
            found.append({**common, "id": f"{i} sqa", "task": "sqa", "question": "?", "target": "x"})
    return found


def test_a_smaller_fraction_lies_in_a_larger_one():
    """And a recording comes with all of its rows."""
    all_rows = rows(200)
    kept = {percent: {row["id"] for row in fraction(all_rows, percent)} for percent in (1, 5, 10, 25, 100)}
    assert kept[1] < kept[5] < kept[10] < kept[25] < kept[100] == {row["id"] for row in all_rows}
    recordings = {name.split()[0] for name in kept[10]}
    assert len(recordings) == 20
    assert kept[10] == {row["id"] for row in all_rows if row["id"].split()[0] in recordings}
    elsewhere = [{**row, "audio": f"other/place/{row['audio']}"} for row in reversed(all_rows)]
    assert {row["id"] for row in fraction(elsewhere, 10)} == kept[10]  # neither place nor order decides


def test_mixture_has_the_rows_asked_for():
    """Little data comes round more often, each row as often as the others; ids stay distinct."""
    counts = {"asr": 80, "sqa": 40}
    mixed = mixture(fraction(rows(30), 50), counts)
    assert Counter(row["task"] for row in mixed) == counts
    assert len({row["id"] for row in mixed}) == 120
    times = Counter(row["id"].rpartition(" (")[0] for row in mixed if row["task"] == "sqa")
    assert max(times.values()) - min(times.values()) <= 1
    assert not any("words" in row for row in mixed)
    assert mixture(fraction(rows(30), 50), counts) == mixed
    with pytest.raises(UsageError, match="Of the task 'traits' there is no row to fine-tune on"):
        mixture(rows(30), {**counts, "traits": 3})


def test_rows_of_the_test_are_drawn_once_for_all():
    chosen = test_rows(rows(60), {"asr": 10, "st": 100, "sqa": 5})
    assert Counter(row["task"] for row in chosen) == {"asr": 10, "st": 60, "sqa": 5}
    assert chosen == test_rows(rows(60), {"sqa": 5, "st": 100, "asr": 10})


@pytest.mark.parametrize("turns", [2, 4])
def test_voices_take_turns(turns):
    """Each voice speaks of as many texts, and each text is spoken by as many of both genders."""
    voices = [("female", name) for name in "abcd"] + [("male", name) for name in "efgh"]
    recordings = [
        {"text": f"text {i}", "gender": gender, "speaker": speaker, "rate": rate}
        for i in range(6)
        for gender, speaker in voices
        for rate in (0.7, 1.0)
    ]
    chosen = by_turns(recordings, 4, turns)
    assert Counter(row["speaker"] for row in chosen) == dict.fromkeys("abcdefgh", 8 // turns)
    counts = Counter((row["text"], row["gender"]) for row in chosen)
    assert counts == {(f"text {i}", gender): 8 // turns for i in range(4) for gender in ("female", "male")}


def test_as_many_probed_voices_of_each_gender_take_equal_turns():
    genders = Counter(voice.gender for voice in parse_voices(PROBED_VOICES))
    assert genders == {"female": 12, "male": 12} and 12 % TURNS == 0


test_rows.__test__ = False  # the function under test is not a test


def test_what_is_tested_is_not_heard_in_training(monkeypatch, tmp_path):
    """No two facts that stand together in a passage of a test do so in one that is trained on, with questions or without."""
    asked = {}

    def answerable(count, split, passages, *rest):  # the last ones of a test: the LLM may answer any
        asked[split] = passages if split == "train" else passages[-count:]
        return asked[split], []

    def speak(rows, voices, folder, *rest):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.jsonl").write_text(json.dumps({"audio": "a.wav", "text": "a"}) + "\n")

    monkeypatch.setenv("SPEECHLLM_CACHE", str(tmp_path))
    for name, stand_in in (("_answerable", answerable), ("_speak", speak), ("Answerer", str),
                           ("smollm2_135m_instruct", lambda: "an LLM")):  # fmt: skip
        monkeypatch.setattr(spoken_questions, name, stand_in)
    read = passages()
    data.questions()
    tested = frozenset().union(*(passage.pairs for passage in [*read["test"], *asked["test"]]))
    assert (len(read["train"]), len(read["test"]), len(asked["test"])) == (600, 80, 60)
    assert not [passage for passage in [*read["train"], *asked["train"]] if passage.pairs & tested]


def test_recordings_of_one_name_are_drawn_by_their_place_in_the_data():
    """Not by the order of a set of strings, which is another in every process."""
    twins = [{"id": f"{i} {side}", "audio": f"{side}/{i}.flac"} for i in range(40) for side in ("one", "other")]
    script = "import json, sys; from speechllm.reproduction.data import fraction; " \
             "print([row['id'] for row in fraction(json.load(sys.stdin), 40)])"  # fmt: skip
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # not this process's, which is random by default
    drawn = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(twins),
        env=os.environ | {"PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert drawn == f"{[row['id'] for row in fraction(twins, 40)]}\n"


def test_data_that_was_made_otherwise_is_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "spoken_passages", lambda: {"train": [], "test": []})
    (tmp_path / data.SMALL).mkdir(parents=True)
    for name in ("train", "test", "train-tasks"):
        (tmp_path / data.SMALL / f"{name}.jsonl").write_text(json.dumps({"audio": "a.wav", "text": "a"}) + "\n")
    data.prepare_pretraining()
    data.prepare_pretraining()  # as it is there
    monkeypatch.setattr(data, "FORMAT", data.FORMAT + 1)
    with pytest.raises(UsageError, match="data/reproduction was made by another version of this package. Remove it"):
        data.prepare_pretraining()
    data.PROVENANCE.unlink()  # as of the first version
    with pytest.raises(UsageError, match="another version"):
        data.prepare_pretraining()
