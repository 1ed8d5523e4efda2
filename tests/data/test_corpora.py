"""Corpora in their real layouts -> rows: what they hold, that their audio can be read, and what is set aside."""

import csv
import json
import shutil

import corpora_in_miniature as miniature
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile

from speechllm import load_audio
from speechllm.data.prompts import chat_of
from speechllm.data.schema import ManifestError, SetAside
from speechllm.data.sources import load_source


def rows_of(spec, expected_aside=0):
    """The rows of a spec; each can be heard and made a chat of."""
    loaded = load_source(spec)
    assert len(loaded.set_aside) == expected_aside, loaded.set_aside
    for row in loaded.rows:
        assert load_audio(row["audio"], name=row["id"]).dtype == np.float32
        chat_of(row)
    return loaded.rows


def set_aside(spec):
    return [(item.id, item.kind, item.reason) for item in load_source(spec).set_aside]


def edited(path, old, new):
    """The file with `old`, which is there once, replaced."""
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))


def columns(rows, *names):
    return [tuple(row.get(name) for name in names) for row in rows]


# ---- MuST-C, MuST-SHE ----------------------------------------------------------------------------------------------


def test_must_c_translation(tmp_path):
    rows = rows_of(f"must-c:{miniature.must_c(tmp_path)}?target_language=de")
    assert columns(rows, "id", "text", "target", "target_language", "speaker", "task") == [
        ("ted_1_0-de", "Thank you so much, Chris.", "Vielen Dank, Chris.", "de", "spk.1", "st"),
        ("ted_1_1-de", "And it's an honor.", "Es ist mir eine Ehre.", "de", "spk.1", "st"),
        ("ted_2_0-de", "(Laughter)", "(Lachen)", "de", "spk.2", "st"),
    ]
    assert chat_of(rows[0])[0]["content"][1]["text"] == "Translate the speech into German."
    whole, _ = soundfile.read(tmp_path / "en-de" / "data" / "train" / "wav" / "ted_1.wav", dtype="float32")
    np.testing.assert_array_equal(load_audio(rows[1]["audio"]), whole[12_800:24_000])  # 0.8 to 1.5 seconds


def test_must_c_tasks_and_pairs(tmp_path):
    miniature.must_c(tmp_path)
    both = rows_of(f"must-c:{tmp_path}?task=asr,st")
    assert [row["id"] for row in both if row["task"] == "asr"] == [
        "ted_1_0",
        "ted_1_1",
        "ted_2_0",
    ]  # once, not per pair
    assert [row["target_language"] for row in both if row["task"] == "st"] == ["de"] * 3 + ["fr"] * 3
    assert len(rows_of(f"must-c:{tmp_path / 'en-fr'}?task=st")) == 3  # the folder of one pair
    for wrong, message in (
        ("target_language=it", "'it' is not there. Choose from: de, fr"),
        ("split=dev", "no such folder; split 'dev'"),
        ("task=sqa", "Choose from: asr, st"),
        ("langs=de", "no option `langs`. must-c takes: split, task, target_language"),
    ):
        with pytest.raises(ManifestError, match=message):
            load_source(f"must-c:{tmp_path}?{wrong}")


def test_must_c_that_is_damaged(tmp_path):
    text = miniature.must_c(tmp_path) / "en-de" / "data" / "train" / "txt"
    lines = (text / "train.de").read_bytes().split(b"\n")
    (text / "train.de").write_bytes(b"\n".join([lines[0], b"Stra\xdfe", *lines[2:]]))  # Latin-1
    loaded = load_source(f"must-c:{tmp_path}?target_language=de")
    assert [row["id"] for row in loaded.rows] == ["ted_1_0-de", "ted_2_0-de"]  # the others stay with their lines
    assert [item.kind for item in loaded.set_aside] == ["text that is not UTF-8"]
    assert "line 2" in loaded.set_aside[0].reason
    (text / "train.de").write_text("Nur eine Zeile.\n")
    loaded = load_source(f"must-c:{tmp_path}")
    assert [row["target_language"] for row in loaded.rows] == ["fr"] * 3
    assert "3 set aside: line counts that differ" in loaded.report("MuST-C")  # every row, not the pair as one
    assert "train.yaml 3, train.en 3, train.de 1" in loaded.set_aside[0].reason
    with pytest.raises(ManifestError, match="same number of lines"):
        load_source(f"must-c:{tmp_path}", strict=True)
    with pytest.raises(ManifestError, match="no rows that can be used.*same number of lines"):
        load_source(f"must-c:{tmp_path}?target_language=de")
    (tmp_path / "en-fr/data/train/wav/ted_1.wav").unlink()
    loaded = load_source(f"must-c:{tmp_path}?target_language=fr")
    assert len(loaded.rows) == 1 and {item.kind for item in loaded.set_aside} == {"audio file cannot be found"}
    (tmp_path / "en-fr/data/train/txt/train.en").unlink()
    with pytest.raises(ManifestError, match="train.en cannot be read"):
        load_source(f"must-c:{tmp_path}?target_language=fr")


def test_must_she(tmp_path):
    rows = rows_of(f"must-she:{miniature.must_she(tmp_path)}?target_language=it")
    assert columns(rows, "id", "gender", "category", "wrong_target", "gender_terms") == [
        ("it-0001", "female", "1F", "Sono nato a Roma.", [["nata", "nato"]]),
        (
            "it-0002",
            "male",
            "2M",
            "Una buona amica e una maestra.",
            [["Un", "Una"], ["buon", "buona"], ["amico", "amica"]],
        ),
    ]
    assert rows[1]["text"] == 'A good friend and a "teacher".' and rows[1]["target"] == "Un buon amico e un maestro."
    assert len(rows_of(f"must-she:{tmp_path}?target_language=it&category=1")) == 1
    with pytest.raises(ManifestError, match="0 files MONOLINGUAL.fr"):
        load_source(f"must-she:{tmp_path}?target_language=fr")
    edited(tmp_path / "tsv" / "MONOLINGUAL.it_v1.2.tsv", b"CATEGORY", b"KIND")
    with pytest.raises(ManifestError, match="MONOLINGUAL.it_v1.2.tsv has no column 'CATEGORY', but ID, LANG"):
        load_source(f"must-she:{tmp_path}?target_language=it")


# ---- GigaSpeech, LibriSpeech, MLS ------------------------------------------------------------------------------------


def test_gigaspeech(tmp_path):
    rows = rows_of(f"gigaspeech:{miniature.gigaspeech(tmp_path)}?subset=M")
    assert columns(rows, "id", "text", "duration") == [
        ("POD1_S0000001", "as they're leaving, can we go?", 0.5),
        ("POD1_S0000003", "yes.", 0.5),
    ]
    assert [len(load_audio(row["audio"])) for row in rows] == [8_000, 8_000]
    assert len(rows_of(f"gigaspeech:{tmp_path}?subset=XL")) == 3
    with pytest.raises(ManifestError, match="subset 'XXL' is not there"):
        load_source(f"gigaspeech:{tmp_path}?subset=XXL")
    (tmp_path / "GigaSpeech.json").write_text("{")
    with pytest.raises(ManifestError, match="not GigaSpeech's JSON"):
        load_source(f"gigaspeech:{tmp_path}")


def test_gigaspeech_segments_that_are_malformed(tmp_path):
    path = miniature.gigaspeech(tmp_path) / "GigaSpeech.json"
    content = json.loads(path.read_text())
    first, _, third, _ = content["audios"][0]["segments"]
    del first["text_tn"]
    third["end_time"] = "late"
    content["audios"] += [{"aid": "POD2", "path": "audio/POD2.opus"}]
    path.write_text(json.dumps(content))
    with pytest.raises(ManifestError, match="no rows that can be used. The first of 3: .*`text_tn` is missing"):
        load_source(f"gigaspeech:{tmp_path}?subset=M")
    assert columns(load_source(f"gigaspeech:{tmp_path}?subset=XL").rows, "id") == [("POD1_S0000004",)]
    names, kinds, reasons = zip(*set_aside(f"gigaspeech:{tmp_path}?subset=XL"))
    assert names == ("POD1_S0000001", "POD1_S0000003", "recording 2") and {*kinds} == {"malformed row"}
    assert "POD1_S0000001 is malformed (`text_tn` is missing)" in reasons[0] and "`segments`" in reasons[2]


def test_librispeech(tmp_path):
    rows = rows_of(f"librispeech:{miniature.librispeech(tmp_path)}?split=dev-clean")
    assert columns(rows, "id", "text", "speaker", "gender") == [
        ("19-198-0000", "chapter one", "19", "female"),
        ("19-198-0001", "chapter two", "19", "female"),
        ("20-198-0000", "chapter one", "20", "male"),
        ("20-198-0001", "chapter two", "20", "male"),
    ]
    assert rows_of(f"librispeech:{tmp_path / 'LibriSpeech'}?split=dev-clean&case=upper")[0]["text"] == "CHAPTER ONE"
    with pytest.raises(ManifestError, match="split 'dev-other' of LibriSpeech"):
        load_source(f"librispeech:{tmp_path}?split=dev-clean,dev-other")


def test_librispeech_recordings_without_a_transcript(tmp_path):
    here = miniature.librispeech(tmp_path) / "LibriSpeech" / "dev-clean"
    edited(here / "19" / "198" / "19-198.trans.txt", b"19-198-0001 CHAPTER TWO\n", b"")
    edited(here / "20" / "198" / "20-198.trans.txt", b"20-198-0000 CHAPTER", b"20-198-0000 CH\xc3PTER")
    shutil.copytree(here / "19", here / "21")  # a chapter that lost its file of transcripts
    (here / "21" / "198" / "19-198.trans.txt").unlink()
    (here / "21" / "198" / "19-198-0001.flac").unlink()
    (here / "21" / "198" / "19-198-0000.flac").rename(here / "21" / "198" / "21-198-0000.flac")
    spec = f"librispeech:{tmp_path}?split=dev-clean"
    assert columns(load_source(spec).rows, "id") == [("19-198-0000",), ("20-198-0001",)]
    assert [(name, kind) for name, kind, _ in set_aside(spec)] == [
        ("20-198-0000", "text that is not UTF-8"),
        ("19-198-0001", "no transcript"),
        ("21-198-0000", "no transcript"),
    ]


def test_mls_recordings_without_a_transcript(tmp_path):
    root = miniature.mls(tmp_path, text=("one", "two", "three")) / "mls_english" / "train"
    edited(root / "transcripts.txt", b"7_8_000000\tone\n", b"")
    edited(root / "transcripts.txt", b"two", b"tw\xf6")
    assert columns(load_source(f"mls:{tmp_path}").rows, "id") == [("7_8_000002",)]
    assert [(name, kind) for name, kind, _ in set_aside(f"mls:{tmp_path}")] == [
        ("7_8_000001", "text that is not UTF-8"),
        ("7_8_000000", "no transcript"),
    ]


@pytest.mark.parametrize("ending", ["flac", "opus"])
def test_mls(tmp_path, ending):
    miniature.mls(tmp_path, ending=ending)
    miniature.mls(tmp_path, "german", ("die erste Zeile",), speaker=9)
    rows = rows_of(f"mls:{tmp_path}")
    assert columns(rows, "id", "text", "language", "speaker", "gender") == [
        ("7_8_000000", "the first line", "en", "7", "male"),
        ("7_8_000001", "the second line", "en", "7", "male"),
        ("9_8_000000", "die erste Zeile", "de", "9", "male"),
    ]
    assert [row["text"] for row in rows_of(f"mls:{tmp_path}?language=de")] == ["die erste Zeile"]


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_mls_traits(tmp_path, kind):
    miniature.mls(tmp_path, text=("one", "two", "three"))  # the third is not described
    path = tmp_path / f"descriptions.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(miniature.DESCRIPTIONS), path)
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, miniature.DESCRIPTIONS[0])
            writer.writeheader()
            writer.writerows(miniature.DESCRIPTIONS)
    rows = rows_of(f"mls-traits:{tmp_path}?descriptions={path}&traits=gender,rate,quality")
    assert columns(rows, "id", "trait", "target", "choices") == [
        ("7_8_000000 gender", "gender", "male", ["male"]),
        ("7_8_000000 rate", "rate", "slightly slowly", ["slightly slowly", "very fast"]),
        ("7_8_000000 quality", "quality", "great speech quality", ["great speech quality"]),
        ("7_8_000001 gender", "gender", "male", ["male"]),
        ("7_8_000001 rate", "rate", "very fast", ["slightly slowly", "very fast"]),
        ("7_8_000001 quality", "quality", "great speech quality", ["great speech quality"]),
    ]
    assert rows[0]["rate"] == "slightly slowly" and rows[0]["text"] == "one"
    prompt = "What is the speaking rate? Answer with one of: slightly slowly, very fast."
    assert chat_of(rows[1])[0]["content"][1]["text"] == prompt
    edited(tmp_path / "mls_english" / "train" / "segments.txt", b"\t10.00\t", b"\tten\t")
    spec = f"mls-traits:{tmp_path}?descriptions={path}&traits=gender"
    assert columns(load_source(spec).rows, "id") == [("7_8_000000 gender",)]
    assert [(name, kind) for name, kind, _ in set_aside(spec)] == [("7_8_000001", "malformed row")]
    for options, message in (
        ("", "needs the option `descriptions`"),
        (f"?descriptions={path}&traits=age", "trait 'age' is not there"),
        ("?descriptions=nowhere.csv", "there are no descriptions"),
    ):
        with pytest.raises(ManifestError, match=message):
            load_source(f"mls-traits:{tmp_path}{options}")


# ---- CoVoST 2, FLEURS ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_script", [False, True])
def test_covost(tmp_path, own_script):
    folder = miniature.covost(tmp_path, own_script)
    rows = rows_of(f"covost:{folder}?split=train&target_language=de")
    assert columns(rows, "id", "text", "target", "speaker") == [
        ("common_voice_en_a-de", 'Say "hello".', "Sag „hallo“.", "client a"),
        ("common_voice_en_b-de", "Wait.", "Warte.", "client b"),
    ]
    if not own_script:
        rows = rows_of(f"covost:{folder}?split=test&task=asr,st")
        assert columns(rows, "id", "task", "gender") == [
            ("common_voice_en_c", "asr", "male"),
            ("common_voice_en_c-de", "st", "male"),
        ]
    with pytest.raises(ManifestError, match="holds neither covost_v2.en_fr.train.tsv nor covost_v2.en_fr.tsv"):
        load_source(f"covost:{folder}?target_language=fr")


def test_covost_beside_another_common_voice(tmp_path):
    folder = miniature.covost(tmp_path)
    lines = (folder / "validated.tsv").read_text().splitlines()
    (folder / "validated.tsv").write_text("\n".join([lines[0], lines[1] + "\n"]))
    loaded = load_source(f"covost:{folder}")
    assert len(loaded.rows) == 1 and loaded.set_aside[0].kind == "no transcript in Common Voice"


def test_covost_that_is_damaged(tmp_path):
    folder = miniature.covost(tmp_path)
    edited(folder / "validated.tsv", b"Wait.", b"Wa\xeft.")
    (item,) = set_aside(f"covost:{folder}")  # of the split alone
    assert item[:2] == ("common_voice_en_b", "text that is not UTF-8") and "validated.tsv" in item[2]
    edited(folder / "validated.tsv", b"\tsentence\t", b"\ttext\t")
    with pytest.raises(ManifestError, match="validated.tsv has no column 'sentence', but client_id, path, text"):
        load_source(f"covost:{folder}")
    edited(folder / "covost_v2.en_de.tsv", b"\tsplit\n", b"\tpart\n")
    edited(folder / "validated.tsv", b"\ttext\t", b"\tsentence\t")
    with pytest.raises(ManifestError, match="covost_v2.en_de.tsv has no column 'split', but path, translation, part"):
        load_source(f"covost:{folder}")


def test_fleurs(tmp_path):
    folder = miniature.fleurs(tmp_path)
    rows = rows_of(f"fleurs:{folder}?language=en_us")
    assert columns(rows, "id", "text", "language", "gender", "duration") == [
        ("en_us 15", "A Tornado.", "en", "female", 0.3),
        ("en_us 16", "Only in English.", "en", "female", 0.3),
    ]
    (row,) = rows_of(f"fleurs:{folder}?language=de_de&target_language=en_us&text=normalised")
    assert (row["text"], row["target"], row["language"], row["target_language"]) == (
        "ein tornado",
        "a tornado",
        "de",
        "en",
    )
    shutil.move(folder / "de_de" / "audio" / "train", folder / "de_de" / "train")  # as other tools unpack it
    assert len(rows_of(f"fleurs:{folder}?language=de_de")) == 2
    with pytest.raises(ManifestError, match="FLEURS in 'fr_fr'"):
        load_source(f"fleurs:{folder}?language=fr_fr")


def test_fleurs_that_is_damaged(tmp_path):
    folder = miniature.fleurs(tmp_path)
    lines = (folder / "en_us" / "train.tsv").read_bytes().split(b"\n")
    lines[1] = lines[1].replace(b"\t4800\t", b"\tmany\t")
    (folder / "en_us" / "train.tsv").write_bytes(b"\n".join(lines))
    assert columns(load_source(f"fleurs:{folder}?language=en_us").rows, "id") == [("en_us 15",)]
    (item,) = set_aside(f"fleurs:{folder}?language=en_us")
    assert item[:2] == ("en_us 16", "malformed row") and "'many'" in item[2]
    (folder / "en_us" / "train.tsv").write_bytes(b"\n".join([lines[0], b"9\tcut short"]))
    spec = f"fleurs:{folder}?language=de_de&target_language=en_us"
    assert [kind for _, kind, _ in set_aside(spec)] == ["malformed row"]  # of the translations


# ---- Spoken-SQuAD ----------------------------------------------------------------------------------------------------


def test_spoken_squad(tmp_path):
    rows = rows_of(f"spoken-squad:{miniature.spoken_squad(tmp_path)}?split=train")
    assert columns(rows, "id", "question", "answers", "target", "passage_id") == [
        ("q1", "Who won?", ["broncos", "the broncos"], "broncos", "0_0"),
        ("q2", "Who lost?", ["panthers"], "panthers", "0_0"),
        ("q4", "When?", ["february"], "february", "0_2"),  # the third passage of SQuAD, the second of the spoken file
    ]
    parts = [load_audio(str(tmp_path / "train_wav" / f"0_0_{i}.wav")) for i in range(2)]
    np.testing.assert_array_equal(load_audio(rows[0]["audio"]), np.concatenate(parts))
    assert rows[2]["audio"]["parts"] == [str(tmp_path / "train_wav" / "0_2_0.wav")]


def test_spoken_squad_without_squad_counts_its_own_passages(tmp_path):
    rows = rows_of(f"spoken-squad:{miniature.spoken_squad(tmp_path, original=False)}")
    assert [row["passage_id"] for row in rows] == ["0_0", "0_0", "0_1"]


def test_spoken_squad_with_sentences_missing(tmp_path):
    miniature.spoken_squad(tmp_path)
    (tmp_path / "train_wav" / "0_0_0.wav").unlink()
    loaded = load_source(f"spoken-squad:{tmp_path}")
    assert [row["id"] for row in loaded.rows] == ["q4"]
    assert [item.id for item in loaded.set_aside] == ["q1", "q2"] and "[1] are there" in loaded.set_aside[0].reason
    (tmp_path / "train_wav").rename(tmp_path / "recordings")
    with pytest.raises(ManifestError, match="should begin with train; found: none. Name it: audio="):
        load_source(f"spoken-squad:{tmp_path}")
    assert len(load_source(f"spoken-squad:{tmp_path}?audio=recordings").rows) == 1


def test_spoken_squad_questions_that_are_malformed(tmp_path):
    path = miniature.spoken_squad(tmp_path) / "spoken_train-v1.1.json"
    content = json.loads(path.read_text())
    first, second = content["data"][0]["paragraphs"][0]["qas"]
    del first["answers"]
    second["answers"] = ["panthers"]
    path.write_text(json.dumps(content))
    assert columns(load_source(f"spoken-squad:{tmp_path}").rows, "id") == [("q4",)]
    names, kinds, reasons = zip(*set_aside(f"spoken-squad:{tmp_path}"))
    assert names == ("q1", "q2") and {*kinds} == {"malformed row"} and "`answers` is missing" in reasons[0]
    del content["data"][0]["paragraphs"]
    path.write_text(json.dumps(content))
    with pytest.raises(ManifestError, match="spoken_train-v1.1.json is not SQuAD's JSON .'paragraphs'"):
        load_source(f"spoken-squad:{tmp_path}")


def test_what_a_corpus_function_yields_is_set_aside_or_a_row(tmp_path):
    """The functions themselves, without the checks of `load_source`."""
    from speechllm.data.corpora.must_c import must_c

    found = list(must_c(miniature.must_c(tmp_path), target_language="de"))
    assert len(found) == 3 and not any(isinstance(row, SetAside) for row in found)
