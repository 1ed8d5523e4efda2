"""The one door to data: every kind of source, options, what is set aside and counted, strict mode, streams."""

import io
import json
import os
import shutil
import tarfile
from datetime import datetime

import corpora_in_miniature as miniature
import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from speechllm import load_audio
from speechllm.data.checking import check_rows
from speechllm.data.feature_cache import audio_key
from speechllm.data.manifests import write_sources
from speechllm.data.schema import ManifestError, load_rows
from speechllm.data.sources import load_source, open_source, parse_spec, read_specs
from speechllm.data.stream_sources import stream_source


@pytest.fixture
def recordings(tmp_path):
    """Four recordings of 0.3 to 0.6 seconds and a manifest of them."""
    rows = []
    for i in range(4):
        miniature.sound(tmp_path / "wav" / f"{i}.wav", 0.3 + 0.1 * i, seed=i)
        rows.append({"id": f"r{i}", "audio": f"wav/{i}.wav", "text": f"text {i}"})
    write_manifest(tmp_path / "all.jsonl", rows)
    return tmp_path


def write_manifest(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(spec, **options):
    return [row["text"] for row in load_source(spec, **options).rows]


ALL = [f"text {i}" for i in range(4)]


# ---- generic sources -------------------------------------------------------------------------------------------------


def test_parquet_manifests_with_paths_and_with_bytes(recordings):
    rows = [json.loads(line) for line in (recordings / "all.jsonl").read_text().splitlines()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), recordings / "paths.parquet")
    held = [{**row, "audio": {"bytes": (recordings / row["audio"]).read_bytes(), "path": None}} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(held), recordings / "bytes.parquet")
    for name in ("paths", "bytes"):
        loaded = load_source(str(recordings / f"{name}.parquet"))
        assert [row["text"] for row in loaded.rows] == ALL
        assert [len(load_audio(row["audio"])) for row in loaded.rows] == [4_800, 6_400, 8_000, 9_600]
    (recordings / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ManifestError, match="not a Parquet file"):
        load_source(str(recordings / "bad.parquet"))


def test_segments_in_a_manifest(recordings):
    long = miniature.sound(recordings / "long.flac", 3.0)
    (recordings / "a.csv").write_text(
        "audio_filepath,offset,duration,text\nlong.flac,0.5,0.25,first\nlong.flac,1,1.5,second\n"
    )
    rows = load_source(f"{recordings / 'a.csv'}?columns.audio=audio_filepath").rows
    assert [row["audio"] for row in rows] == [
        {"path": str(long), "offset": 0.5, "duration": 0.25},
        {"path": str(long), "offset": 1.0, "duration": 1.5},
    ]
    whole = load_audio(str(long))
    np.testing.assert_array_equal(load_audio(rows[1]["audio"]), whole[16_000:40_000])
    assert len({audio_key(row["audio"]) for row in rows} | {audio_key(str(long))}) == 3
    assert audio_key(rows[0]["audio"]) == audio_key({"path": str(long), "offset": 0.5, "duration": 0.25})


def test_folders_with_transcripts(recordings):
    folder = recordings / "wav"
    for i in range(3):
        (folder / f"{i}.txt").write_text(f"text\n{i}\n")
    loaded = load_source(str(folder))
    assert [(row["id"], row["text"]) for row in loaded.rows] == [(f"{i}.wav", f"text {i}") for i in range(3)]
    assert [item.kind for item in loaded.set_aside] == ["no transcript"] and "3.txt" in loaded.set_aside[0].reason
    (folder / "transcripts.txt").write_text("0 text 0\n1.wav\ttext 1\n2\ttext 2\n3 text 3\n")
    assert texts(str(folder)) == ALL
    (folder / "0.wav").rename(folder / "0 again.wav")
    (folder / "transcripts.txt").write_text("0\ta wrong one\n0 again\ttext 0\n1 text 1\n2 text 2\n3 text 3\n")
    assert texts(str(folder))[1:] == ALL[1:] and texts(str(folder))[0] == "text 0"
    (folder / "0 again.wav").rename(folder / "0.wav")
    (folder / "transcripts.txt").write_bytes(b"0 text 0\n1 text \xff\n2 text 2\ngone text 9\n")
    loaded = load_source(str(folder))
    assert [row["text"] for row in loaded.rows] == ["text 0", "text 2"]
    assert sorted(item.kind for item in loaded.set_aside) == [
        "no transcript", "no transcript", "recording missing", "text that is not UTF-8"]  # fmt: skip
    (folder / "metadata.csv").write_text("file_name,text\n" + "".join(f"{i}.wav,text {i}\n" for i in range(4)))
    assert texts(f"folder:{folder}") == ALL
    (recordings / "empty").mkdir()
    with pytest.raises(ManifestError, match="holds no recordings"):
        load_source(str(recordings / "empty"))


def test_a_transcript_of_several_recordings_is_of_none(recordings):
    folder = recordings / "named"
    for name in ("a", "one/a", "one/b", "two/b", "one/c", "one/d", "one/e"):
        miniature.sound(folder / f"{name}.wav")
    miniature.sound(folder / "one" / "c.flac")  # the same recording in another format
    lines = ["a right", "one/b.wav right", "b whose", "c right", "d one", "d other", "e right", "e right"]
    (folder / "transcripts.txt").write_text("\n".join(lines))
    loaded = load_source(str(folder))
    assert {row["text"] for row in loaded.rows} == {"right"}
    assert [row["id"] for row in loaded.rows] == ["a.wav", "one/b.wav", "one/c.flac", "one/c.wav", "one/e.wav"]
    assert [(item.id, item.kind) for item in loaded.set_aside] == [
        ("one/a.wav", "name of several recordings"),
        ("one/d.wav", "several transcripts"),
        ("two/b.wav", "name of several recordings"),
    ]
    assert "2 recordings are called a. Write folder and name" in loaded.set_aside[0].reason
    assert "has 2 different lines in" in loaded.set_aside[1].reason


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('["s0"]', "00000/sub/0000: its JSON is a list, not an object with columns."),
        ('{"duration": "long"}', "00000/sub/0000: the duration is 'long'. Give seconds, or leave it out."),
    ],
)
def test_the_json_of_a_shard_is_an_object_with_numbers(recordings, content, message):
    with tarfile.open(recordings / "00000.tar", "w") as archive:
        for i, text in enumerate((content, '{"duration": "0.4"}')):
            for ending, data in (("wav", (recordings / f"wav/{i}.wav").read_bytes()), ("json", text.encode())):
                member = tarfile.TarInfo(f"sub/{i:04}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    (aside, row) = open_source(parse_spec(str(recordings / "00000.tar")))
    assert (aside.reason, aside.kind) == (message, "malformed row") and row["duration"] == 0.4
    (aside, row) = stream_source(str(recordings / "00000.tar"), minimum_seconds=0.1)
    assert aside["set_aside"]["reason"] == message and row["duration"] == 0.4


def test_durations_of_the_hub_are_numbers(recordings, monkeypatch, datasets_cache):
    rows = [{"audio": str(recordings / f"wav/{i}.wav"), "text": f"text {i}", "duration": d} for i, d in enumerate("1x")]
    data = datasets.Dataset.from_list(rows)
    (recordings / "hub").mkdir()
    data.to_parquet(recordings / "hub" / "train.parquet")
    loaded = load_source(f"hub:{recordings / 'hub'}", minimum_seconds=0.1)
    assert [row["duration"] for row in loaded.rows] == [1.0]
    (item,) = loaded.set_aside
    assert "row 2: the duration is 'x'. Give seconds" in item.reason and item.kind == "malformed row"
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data.to_iterable_dataset())
    row, aside = stream_source("hub:org/data", minimum_seconds=0.1)
    assert row["duration"] == 1.0 and "the duration is 'x'" in aside["set_aside"]["reason"]


def test_webdataset_shards(recordings):
    folder = miniature.write_shards(recordings / "shards", recordings)
    rows = load_source(f"{folder}?columns.speaker=speaker_id", strict=True).rows
    assert [(row["text"], row["speaker"], row["language"]) for row in rows] == [
        (f"text {i}", f"s{i}", "en") for i in range(4)
    ]
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(load_audio(row["audio"]), load_audio(str(recordings / "wav" / f"{i}.wav")))
        assert audio_key(row["audio"]) == audio_key(str(recordings / "wav" / f"{i}.wav"))  # of the same bytes
    assert texts(str(folder / "00001.tar")) == ALL[2:]
    (folder / "00001.tar").write_bytes((folder / "00000.tar").read_bytes()[:700])
    with pytest.raises(ManifestError, match="00001.tar is not a tar archive"):
        load_source(str(folder))


def test_any_data_set_of_the_hub_by_column_mapping(recordings, datasets_cache):
    rows = [{"speech": str(recordings / "wav" / f"{i}.wav"), "sentence": f"text {i}", "locale": "de"} for i in range(4)]
    data = datasets.Dataset.from_list(rows).cast_column("speech", datasets.Audio(sampling_rate=16_000))
    (recordings / "hub").mkdir()
    data.to_parquet(recordings / "hub" / "train.parquet")  # `load_dataset` reads a folder as it does a repository
    spec = f"hub:{recordings / 'hub'}?split=train&columns.audio=speech&columns.text=sentence&columns.language=locale"
    rows = load_source(spec, strict=True).rows
    assert [(row["text"], row["language"]) for row in rows] == [(text, "de") for text in ALL]
    streamed = list(stream_source(spec))
    assert [row["text"] for row in streamed] == ALL and len(load_audio(streamed[0]["audio"])) == 4_800
    with pytest.raises(ManifestError, match="cannot be read as a data set of the Hub"):
        load_source(f"hub:{recordings / 'nowhere'}")
    datasets.DatasetDict({"dev": data}).save_to_disk(recordings / "saved")
    spec = f"{recordings / 'saved'}?split=dev&columns.audio=speech&columns.text=sentence"
    assert texts(spec, strict=True) == [row["text"] for row in stream_source(spec)] == ALL
    with pytest.raises(ManifestError, match="no split 'train'. Choose from dev"):
        load_source(str(recordings / "saved"))


def test_classes_have_their_names_and_parts_of_columns_can_be_named(recordings, datasets_cache):
    rows = [
        {
            "audio": str(recordings / "wav" / f"{i}.wav"),
            "translation": {"en": f"text {i}", "de": f"Text {i}"},
            "gender": i % 3 - 1,
        }
        for i in range(4)
    ]
    data = datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio(sampling_rate=16_000))
    data = data.cast_column("gender", datasets.ClassLabel(names=["male", "female"]))
    (recordings / "hub").mkdir()
    data.to_parquet(recordings / "hub" / "train.parquet")
    spec = f"hub:{recordings / 'hub'}?split=train&columns.text=translation.en&columns.german=translation.de"
    for found in (load_source(spec).rows, list(stream_source(spec))):
        assert [row["text"] for row in found] == ALL and [row["german"] for row in found] == [
            f"Text {i}" for i in range(4)
        ]
        assert [row["gender"] for row in found] == [None, "male", "female", None]
    (recordings / "parts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert texts(f"{recordings / 'parts.jsonl'}?columns.text=translation.en") == ALL
    assert texts(f"{recordings / 'parts.jsonl'}?columns.text=translation.de") == [f"Text {i}" for i in range(4)]


def test_a_folder_of_manifests(recordings):
    lines = (recordings / "all.jsonl").read_text().splitlines(keepends=True)
    (recordings / "all.jsonl").unlink()
    (recordings / "1.jsonl").write_text("".join(lines[2:]))
    (recordings / "0.jsonl").write_text("".join(lines[:2]))
    assert texts(str(recordings)) == ALL


# ---- options ---------------------------------------------------------------------------------------------------------


def test_options_of_every_source(recordings):
    path = recordings / "all.jsonl"
    (row, *_) = load_source(f"{path}?row.language=de&row.source=mine").rows
    assert (row["language"], row["source"]) == ("de", "mine")
    assert texts({"source": str(path), "row": {"task": "asr"}, "only": {"id": "r1,r3"}}) == ["text 1", "text 3"]
    assert texts(json.dumps({"source": str(path), "only": {"task": "asr"}})) == ALL
    for fraction, less in ((0.5, 0.25), (0.75, 0.5)):
        assert set(texts(f"{path}?fraction={less}", seed=3)) < set(texts(f"{path}?fraction={fraction}", seed=3))
    assert len({tuple(texts(f"{path}?fraction=0.5", seed=seed)) for seed in range(8)}) > 1


def test_limits_on_the_duration_read_headers_where_needed(recordings):
    path = recordings / "all.jsonl"  # 0.3, 0.4, 0.5, 0.6 seconds; the manifest does not say so
    loaded = load_source(str(path), minimum_seconds=0.35, maximum_seconds=0.55)
    assert [row["text"] for row in loaded.rows] == ["text 1", "text 2"] and loaded.left_out == 2
    assert [row["duration"] for row in loaded.rows] == pytest.approx([0.4, 0.5])
    assert texts(f"{path}?maximum_seconds=0.35", maximum_seconds=9.0) == ["text 0"]  # the spec's own limit
    with pytest.raises(ManifestError, match="no row is within the limits"):
        load_source(str(path), minimum_seconds=5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.jsonl", "no such manifest"),
        ("nowhere", "A data set of the Hub is `hub:nowhere`"),
        ("librispech:/x", "no corpus 'librispech'. Choose from must-c"),
        ("{", "is not JSON"),
        ({"split": "train"}, "has no `source`"),
        ("all.jsonl?split=dev", "no option `split`. manifest takes: columns"),
        ("all.jsonl?fraction=2", "fraction is 2"),
        ("all.jsonl?weight=0", "weight is 0"),
        ("all.jsonl?weight=much", "`weight` is 'much'"),
        ("librispeech:.?columns.text=x", "`columns` is for data of your own"),
    ],
)
def test_specs_that_make_no_sense(recordings, monkeypatch, spec, message):
    monkeypatch.chdir(recordings)
    with pytest.raises(ManifestError, match=message.replace("[", r"\[")):
        load_source(spec)


def test_a_list_of_sources_in_a_file(recordings):
    (recordings / "mix.yaml").write_text(
        "- a.jsonl\n- {source: 'must-c:/data', split: dev, weight: 2, target_language: [de, fr]}\n"
    )
    specs = read_specs(["first.csv", str(recordings / "mix.yaml")])
    assert specs[:2] == ["first.csv", "a.jsonl"]
    source = parse_spec(specs[2])
    assert (source.kind, source.place, source.weight) == ("must-c", "/data", 2.0)
    assert source.options == {"split": "dev", "target_language": "de,fr"}
    for content, message in (
        ("a: b", "must hold a list"),
        ("[", "cannot be read as YAML"),
        ("- 5", "must hold a list"),
    ):
        (recordings / "mix.yaml").write_text(content)
        with pytest.raises(ManifestError, match=message):
            read_specs([str(recordings / "mix.yaml")])


# ---- bad input -------------------------------------------------------------------------------------------------------


def damaged(folder):
    """A manifest with one row of each kind of damage among two that are whole."""
    good = {"audio": "wav/0.wav", "text": "text 0"}
    (folder / "wav" / "empty.wav").write_bytes(b"")
    (folder / "wav" / "noise.wav").write_bytes(b"RIFF nothing")
    data = (folder / "wav" / "3.wav").read_bytes()
    (folder / "wav" / "cut.wav").write_bytes(data[: len(data) // 2])
    rows = [
        {**good, "id": "first"},
        {**good, "id": "missing", "audio": "wav/gone.wav"},
        {**good, "id": "empty file", "audio": "wav/empty.wav"},
        {**good, "id": "no transcript", "text": "  "},
        {
            "id": "no reference",
            "audio": "wav/0.wav",
            "text": "text",
            "task": "st",
            "target_language": "de",
            "target": "",
        },
        {"id": "no answer", "audio": "wav/0.wav", "text": "text", "task": "sqa", "question": "What?", "answers": []},
        {"id": "no prompt", "audio": "wav/0.wav", "text": "text", "task": "juggle", "target": "x"},
        {"id": "no language", "audio": "wav/0.wav", "text": "text", "task": "st", "target": "x"},
        {**good, "id": "first"},
        {**good, "id": "not audio", "audio": "wav/noise.wav"},
        {**good, "id": "truncated", "audio": "wav/cut.wav"},
        {**good, "id": "last"},
    ]
    lines = [json.dumps(row).encode() for row in rows]
    lines[1:1] = [
        b'{"audio": "wav/0.wav", "text": "Stra\xdfe"}',
        b'{"audio": ',
        b'{"text": "x"}',
        b'{"audio": "wav/0.wav", "duration": "long"}',
    ]
    (folder / "damaged.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder / "damaged.jsonl"


KINDS = {
    "audio file cannot be found": ["missing"],
    "audio file is empty": ["empty file"],
    "empty transcript": ["no transcript"],
    "reference missing": ["no reference", "no answer"],
    "task 'juggle' without a prompt": ["no prompt"],
    "task 'st' without a prompt": ["no language"],
    "duplicate id": ["first"],
}


def test_what_is_wrong_is_set_aside_and_counted(recordings):
    path = damaged(recordings)
    loaded = load_source(str(path))
    assert [row["id"] for row in loaded.rows] == ["first", "not audio", "truncated", "last"]
    found = {}
    for item in loaded.set_aside:
        found.setdefault(item.kind, []).append(item.id)
        assert item.reason.endswith((".", ").")) and ("/" in item.reason or item.id in item.reason)
    malformed = found.pop("malformed row")
    assert malformed == [f"{path}, line {number}" for number in (2, 3, 4, 5)]
    assert found == KINDS
    report = loaded.report("damaged")
    assert report.startswith("damaged: 4 rows (asr 4)\n  4 set aside: malformed row\n")
    assert "  2 set aside: reference missing\n    no reference: task 'st' needs the reference answer" in report


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"answers": ["forty-two", 42]}, {"answers": ["forty-two", "42"], "target": "forty-two"}),
        ({"answers": ["", "six"]}, {"answers": ["six"], "target": "six"}),
        ({"answers": {"text": "six"}}, {"answers": ["six"], "target": "six"}),
        ({"answers": [""]}, "reference missing"),
        ({"answers": [["six"]]}, "`answers` is [['six']]. Write it as a list of texts."),
        (
            {"task": "traits", "trait": "age", "choices": [20, 30], "target": 20},
            {"choices": ["20", "30"], "target": "20"},
        ),
        ({"target": "six", "choices": "six or seven"}, "`choices` is 'six or seven'"),
        ({"target": "nata", "gender_terms": "nata nato; nuova nuovo;"}, {"target": "nata"}),
        ({"target": "nata", "gender_terms": "nata"}, "The gender terms 'nata' are not pairs."),
        ({"target": "nata", "gender_terms": [1, 2]}, "The gender terms [1, 2] are not pairs."),
    ],
)
def test_answers_have_their_form_or_are_set_aside(recordings, columns, found):
    row = {"id": "a", "audio": str(recordings / "wav/0.wav"), "task": "sqa", "question": "How many?", "text": "six"}
    loaded = check_rows([{**row, "target": "six"}, {**row, "id": "b", **columns}], "rows")
    if isinstance(found, str):
        (item,) = loaded.set_aside
        assert found == item.kind or found in item.reason
    else:
        assert loaded.rows[1] | found == loaded.rows[1]


def test_dates_and_images_do_not_cost_the_manifest(recordings):
    rows = [{"audio": str(recordings / "wav/0.wav"), "text": "text 0", "said": datetime(2024, 5, 1), "picture": b"png"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), recordings / "rich.parquet")
    assert len(list(write_sources([str(recordings / "rich.parquet")], str(recordings / "written.jsonl")))) == 1
    (row,) = [json.loads(line) for line in (recordings / "written.jsonl").read_text().splitlines()]
    assert row["said"] == "2024-05-01 00:00:00" and row["text"] == "text 0" and "picture" not in row


def test_audio_that_is_broken_is_found_by_its_header_or_by_decoding(recordings):
    path = damaged(recordings)
    kinds = [item.id for item in load_source(str(path), maximum_seconds=9).set_aside if "decoded" in item.kind]
    assert kinds == ["not audio"]  # a truncated file's header is whole


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("missing", "gone.wav cannot be found"),
        ("no prompt", "no prompt"),
        ("truncated", "truncated"),
        ("not audio", "decoded"),
    ],
)
def test_strict_mode_stops(recordings, keep, message):
    path = damaged(recordings)
    lines = [
        line
        for line in path.read_bytes().splitlines()
        if b"id" in line and json.loads(line).get("id") in ("last", keep)
    ]
    path.write_bytes(b"\n".join(lines))
    load_source(str(path))
    with pytest.raises(ManifestError, match=rf"(?s){message}.*Strict mode stops"):
        load_source(str(path), strict=True)


def test_nothing_usable_is_an_error_that_names_the_first_reason(recordings):
    write_manifest(recordings / "a.jsonl", [{"audio": "gone.wav", "text": "x"}, {"audio": "wav/0.wav", "text": ""}])
    with pytest.raises(ManifestError, match="no rows that can be used. The first of 2: .*gone.wav cannot be found"):
        load_source(str(recordings / "a.jsonl"))


def test_one_id_may_have_several_tasks(recordings):
    row = {"id": "a", "audio": "wav/0.wav", "text": "x"}
    st = {**row, "task": "st", "target": "y"}
    write_manifest(recordings / "a.jsonl", [row, {**st, "target_language": "de"}, {**st, "target_language": "fr"}])
    loaded = load_source(str(recordings / "a.jsonl"))
    assert [row["id"] for row in loaded.rows] == ["a", "a #2", "a #3"] and not loaded.set_aside


# ---- streams ---------------------------------------------------------------------------------------------------------


def test_streams_of_every_kind(recordings):
    folder = miniature.write_shards(recordings / "shards", recordings)
    stream = stream_source(str(folder))
    assert stream.num_shards == 2 and [row["text"] for row in stream] == ALL
    assert [row["text"] for row in stream_source(f"{recordings / 'all.jsonl'}?only.id=r1,r2")] == ALL[1:3]
    miniature.must_c(recordings / "must-c")
    (recordings / "must-c/en-de/data/train/txt/train.de").write_bytes(b"eins\nStra\xdfe\ndrei\n")
    rows = list(stream_source(f"must-c:{recordings / 'must-c'}?target_language=de&row.license=mine"))
    assert [row.get("target") for row in rows] == ["eins", None, "drei"] and rows[0]["license"] == "mine"
    assert "not UTF-8" in rows[1]["set_aside"]["reason"] and rows[1]["set_aside"]["kind"] == "text that is not UTF-8"
    with pytest.raises(ManifestError, match="Choose from: de, fr"):
        stream_source(f"must-c:{recordings / 'must-c'}?target_language=it")


def test_limits_on_the_duration_of_streams_read_headers_where_needed(recordings):
    path = recordings / "all.jsonl"  # 0.3, 0.4, 0.5, 0.6 seconds; the manifest does not say so
    held = [{"audio": {"bytes": (recordings / "wav" / f"{i}.wav").read_bytes()}, "text": f"text {i}"} for i in range(4)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(held), recordings / "bytes.parquet")
    shards = miniature.write_shards(recordings / "shards", recordings)
    for spec in (path, recordings / "bytes.parquet", shards):
        stream = stream_source(str(spec), minimum_seconds=0.35, maximum_seconds=0.55)
        assert [row["text"] for row in stream] == ["text 1", "text 2"]
    (recordings / "wav" / "1.wav").write_bytes(b"RIFF nothing")  # is for the reader of the stream to set aside
    assert [row["text"] for row in stream_source(str(path), maximum_seconds=0.45)] == ["text 0", "text 1"]


def test_a_manifest_that_is_read_alone_has_texts_for_numbers(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"audio": "a.wav", "text": 42, "answers": "six"}\n')
    (row,) = load_rows(tmp_path / "a.jsonl")
    assert (row["text"], row["answers"], row["target"]) == ("42", ["six"], "six")


def test_names_that_are_not_utf8_are_set_aside(recordings, tmp_path):
    """No manifest could name them."""
    (tmp_path / "named").mkdir()
    for name in (b"caf\xe9", b"tea"):
        stem = os.fsencode(tmp_path / "named") + b"/" + name
        shutil.copy(recordings / "wav/0.wav", stem + b".wav")
        with open(stem + b".txt", "w") as transcript:
            transcript.write("a text")
    (report,) = write_sources([str(tmp_path / "named")], str(tmp_path / "rows.jsonl"))
    assert "1 set aside: name is not UTF-8" in report and "caf\\udce9" in report
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 1
