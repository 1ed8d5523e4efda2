"""Sources as streams: parts that lie in each other wherever their rows stand, and what is known of sizes."""

import itertools
import json
import math
import random
import tarfile
from collections import Counter

import corpora_in_miniature as miniature
import datasets
import pyarrow
import pyarrow.parquet
import pytest

from speechllm.audio_speechllm import load_audio
from speechllm.data.forced_alignment import align_manifest
from speechllm.data.manifests import write_sources
from speechllm.data.schema import ManifestError, load_rows, manifest_rows
from speechllm.data.sources import load_source
from speechllm.data.stream_sources import row_name, stream_size, stream_source
from speechllm.training import DataArguments


def rows(count, name=""):
    return [{"audio": f"{name}{i}.wav", "text": f"{name}{i}"} for i in range(count)]


def written(folder, rows, shards=1):
    folder.mkdir(parents=True)
    for shard in range(shards):
        lines = [json.dumps(row) + "\n" for row in rows[shard::shards]]
        (folder / f"{shard}.jsonl").write_text("".join(lines))
    return folder


def texts(spec, **options):
    return {row["text"] for row in stream_source(str(spec), **options)}


def test_parts_are_nested_whatever_the_order_the_shards_and_the_place(tmp_path):
    data = rows(1000)
    here = written(tmp_path / "here", data)
    fractions = (0.1, 0.2, 0.5, 1.0)
    parts = [texts(here, fraction=fraction, seed=1) for fraction in fractions]
    for fraction, part in zip(fractions, parts):
        assert abs(len(part) - 1000 * fraction) <= 3 * math.sqrt(1000 * fraction * (1 - fraction))
    assert all(less < more for less, more in itertools.pairwise(parts))
    there = written(tmp_path / "elsewhere" / "there", random.Random(0).sample(data, 1000), shards=3)
    assert texts(there, fraction=0.2, seed=1) == parts[1] != texts(here, fraction=0.2, seed=2)
    assert texts(f"{here}?fraction=0.5", fraction=0.4, seed=1) == parts[1]  # of what the source leaves


def test_an_id_decides_whatever_the_kind_of_the_source(tmp_path):
    data = [{"id": f"r{i}", **row} for i, row in enumerate(rows(60))]
    written(tmp_path / "shards", data, shards=2)
    (tmp_path / "a.csv").write_text("id,audio,text\n" + "".join(f"{r['id']},x{r['audio']},{r['text']}\n" for r in data))
    held = [{**row, "audio": {"bytes": row["text"].encode(), "path": None}} for row in data]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(held), tmp_path / "a.parquet")
    part = texts(tmp_path / "shards", fraction=0.3)
    assert 0 < len(part) < 60
    for name in ("a.csv", "a.parquet"):
        assert texts(tmp_path / name, fraction=0.3) == part


def test_without_an_id_a_row_is_told_by_its_recording(tmp_path):
    segment = {"path": "/data/talks/a.wav", "offset": 1.0, "duration": 2.0}
    assert row_name({"audio": "/data/talks/a.wav"}, "/data") == row_name({"audio": "talks/a.wav"}, "")
    names = [
        row_name({"audio": audio}, "/data")
        for audio in (
            segment["path"], segment, {**segment, "offset": 3.0}, {"parts": [segment, segment]},
            {"bytes": b"one", "path": "x.wav"}, {"bytes": b"two", "path": "x.wav"},
        )
    ]  # fmt: skip
    assert len(set(names)) == len(names)
    assert row_name({"audio": {"bytes": b"one", "path": None}}) == names[4]  # its content, not what it is called
    assert row_name({"audio": None, "text": "silence"}) == row_name({"audio": {}, "text": "silence"}) == "silence"


def test_a_part_that_is_empty_does_not_end_in_an_endless_search(tmp_path):
    assert texts(written(tmp_path / "a", rows(5)), fraction=1e-9) == set()


def test_json_lines_may_differ_in_columns_and_some_may_be_malformed(tmp_path):
    """Of a stream, `datasets` would end at the first line that is not as those before."""
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    lines = ["{", *map(json.dumps, rows(3))]
    (folder / "0.jsonl").write_text("\n".join(lines))
    odd = [{"audio": "0.wav", "text": 7, "answers": ["a"]}, {"audio": {"path": "1.wav"}, "words": [{"word": "b"}]}, {}]
    (folder / "sub" / "1.jsonl").write_text("\n".join(map(json.dumps, odd)))
    stream = stream_source(f"{folder}?row.language=de")
    assert stream.num_shards == 2
    found = list(stream)
    assert [row["audio"] for row in found if "audio" in row] == [
        *(str(folder / f"{i}.wav") for i in range(3)), str(folder / "0.wav"), {"path": str(folder / "1.wav")}
    ]  # fmt: skip
    assert {row["language"] for row in found if "audio" in row} == {"de"}
    aside = [row["set_aside"]["reason"] for row in found if "set_aside" in row]
    assert "0.jsonl, line 1 is not JSON" in aside[0] and "1.jsonl, line 3: there is no `audio`" in aside[1]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(2)), folder / "2.parquet")
    assert len(list(stream_source(str(folder)))) == len(found) + 2  # in one folder, as of lists


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}', r"None of the first 1 row.*no `audio`.*one of 'text', name it: columns.audio="),
        ("", "0.jsonl holds no rows"),
        ("{\n" * 200, "None of the first 100 row.*line 1 is not JSON"),
    ],
)
def test_json_lines_that_cannot_be_used_are_an_error_before_training(tmp_path, content, message):
    (tmp_path / "0.jsonl").write_text(content)
    for spec in (tmp_path, tmp_path / "0.jsonl"):
        with pytest.raises(ManifestError, match=message):
            stream_source(str(spec), fraction=0.01)


# ---- files that are broken -------------------------------------------------------------------------------------------


def overwritten(path, begin, content):
    data = bytearray(path.read_bytes())
    data[begin : begin + len(content)] = content
    path.write_bytes(data)


def told(stream):
    """Texts, and causes of what is set aside."""
    found = list(stream)
    texts = [row["text"] for row in found if not row.get("set_aside")]
    return texts, [row["set_aside"] for row in found if row.get("set_aside")]


def test_parquet_with_a_broken_part_keeps_the_rest(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(30)), path, row_group_size=10, compression="snappy")
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(1)
    overwritten(path, column.dictionary_page_offset, b"\xff" * column.total_compressed_size)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(2, "other")), tmp_path / "b.parquet")
    expected = [*(f"{i}" for i in (*range(10), *range(20, 30))), "other0", "other1"]
    found, (aside,) = told(stream_source(str(tmp_path)))
    assert found == expected and aside["kind"] == "broken file"
    assert "a.parquet, rows 11 to 20 cannot be read" in aside["reason"]
    assert [row["text"] for row in manifest_rows(path) if isinstance(row, dict)] == expected[:20]
    assert told(stream_source(str(tmp_path), fraction=1e-9)) == ([], [aside])  # whatever the fraction


def test_a_value_that_cannot_be_read_costs_its_row_alone(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(3)), path, use_dictionary=False, compression="none")
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(1)  # the last byte of "2"
    overwritten(path, column.data_page_offset + column.total_compressed_size - 1, b"\xff")
    found, (aside,) = told(stream_source(str(path)))
    assert found == ["0", "1"] and aside["kind"] == "malformed row" and "a.parquet, row 3: 'utf-8'" in aside["reason"]


def test_a_class_without_a_name_costs_its_row_alone(tmp_path):
    features = datasets.Features(audio=datasets.Value("string"), gender=datasets.ClassLabel(names=["male"]))
    schema = features.arrow_schema
    table = pyarrow.table({"audio": ["0.wav", "1.wav"], "gender": [0, 3]}, schema=schema)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    named, aside = stream_source(str(tmp_path / "a.parquet"))
    assert named["gender"] == "male" and "row 2: " in aside["set_aside"]["reason"]


@pytest.mark.parametrize(
    "note", ['{"info": {"features": {"text": {"_type": "Unheard"}}}}', '{"info": {"features": {"text": "x"}}}', "{"]
)
def test_a_description_that_nobody_understands_is_passed_over(tmp_path, note):
    table = pyarrow.Table.from_pylist(rows(2)).replace_schema_metadata({"huggingface": note})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert told(stream_source(str(tmp_path))) == (["0", "1"], [])


def test_a_shard_that_breaks_off_keeps_what_is_before_it_and_the_other_shards(tmp_path):
    for i in range(4):
        miniature.sound(tmp_path / "wav" / f"{i}.wav", 0.3, seed=i)
    folder = miniature.write_shards(tmp_path / "shards", tmp_path)
    with tarfile.open(folder / "00000.tar") as archive:
        member = archive.getmembers()[-1]
    (folder / "00000.tar").write_bytes((folder / "00000.tar").read_bytes()[: member.offset_data + member.size // 2])
    found, (aside,) = told(stream_source(str(folder)))
    assert found == ["text 0", "text 2", "text 3"]
    assert (aside["kind"], "00000.tar is not a tar archive" in aside["reason"]) == ("broken file", True)
    with pytest.raises(ManifestError, match="00000.tar is not a tar archive"):
        load_source(str(folder))


def test_a_header_of_a_shard_that_is_broken_is_not_its_end(tmp_path):
    for i in range(4):
        miniature.sound(tmp_path / "wav" / f"{i}.wav", 0.3, seed=i)
    folder = miniature.write_shards(tmp_path / "shards", tmp_path)
    with tarfile.open(folder / "00001.tar") as archive:
        member = archive.getmembers()[3]
    overwritten(folder / "00001.tar", member.offset, b"\xff" * 512)
    found, (aside,) = told(stream_source(str(folder)))
    assert found == ["text 0", "text 1", "text 2"] and "00001.tar is not a tar archive" in aside["reason"]
    (folder / "00001.tar").write_bytes((folder / "00001.tar").read_bytes()[: member.offset + 100])
    assert told(stream_source(str(folder)))[0] == found


def test_rows_of_a_shard_that_breaks_off_need_not_have_all_parts(tmp_path):
    """The last may lack one; those before are as they were written."""
    miniature.sound(tmp_path / "a.wav", 0.3)
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as archive:
        for i in range(3):
            archive.add(tmp_path / "a.wav", f"{i}.wav")
            (tmp_path / "text").write_text(f"text {i}")
            archive.add(tmp_path / "text", f"{i}.txt")
            if i == 0:
                (tmp_path / "json").write_text('{"language": "en"}')
                archive.add(tmp_path / "json", f"{i}.json")
        end = archive.offset
    whole = shard.read_bytes()
    shard.write_bytes(whole[: end - 700])  # in the text of the last
    found, (aside,) = told(stream_source(str(shard)))
    assert found == ["text 0", "text 1"] and aside["kind"] == "broken file"
    shard.write_bytes(whole[:end])  # as programs write it that leave out the empty blocks at the end
    assert told(stream_source(str(shard))) == (["text 0", "text 1", "text 2"], [])


def test_a_line_of_a_table_that_cannot_be_read_costs_its_row_alone(tmp_path):
    (tmp_path / "a.csv").write_text('audio,text\n0.wav,zero\n1.wav,"one"x\n2.wav,two\n')
    found, (aside,) = told(stream_source(str(tmp_path / "a.csv")))
    assert found == ["zero", "two"] and "a.csv, line 3: " in aside["reason"]


def test_a_quotation_mark_that_nothing_closes_breaks_a_table(tmp_path):
    (tmp_path / "a.csv").write_text('audio,text\n0.wav,zero\n1.wav,"one\n2.wav,two\n3.wav,three\n')
    found, (aside,) = told(stream_source(str(tmp_path / "a.csv")))
    assert found == ["zero"] and aside["kind"] == "broken file" and "a.csv, lines 3 to 5: " in aside["reason"]
    with pytest.raises(ManifestError, match="lines 3 to 5"):
        load_source(str(tmp_path / "a.csv"))


def test_a_part_of_a_corpus_that_is_not_there_is_no_broken_file(tmp_path):
    miniature.librispeech(tmp_path)
    stream = stream_source(f"librispeech:{tmp_path}?split=dev-clean,dev-misspelt")
    with pytest.raises(ManifestError, match="dev-misspelt: there is no such folder"):
        list(stream)


def test_parquet_files_may_differ_in_columns_and_their_classes_have_names(tmp_path):
    for name in ("0", "b0"):
        miniature.sound(tmp_path / f"{name}.wav", 0.3)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(1)), tmp_path / "a.parquet")
    voiced = datasets.Dataset.from_list([{**rows(1, "b")[0], "gender": label, "extra": 1.5} for label in (1, 0, -1)])
    voiced = voiced.cast_column("gender", datasets.ClassLabel(names=["male", "female"]))
    voiced.to_parquet(tmp_path / "b.parquet")
    for found in (list(stream_source(str(tmp_path))), load_source(str(tmp_path)).rows):
        assert [row.get("gender") for row in found] == [None, "female", "male", None]
        assert [row.get("extra") for row in found] == [None, 1.5, 1.5, 1.5]


def test_files_without_rows_are_passed_over(tmp_path):
    table = pyarrow.Table.from_pylist(rows(2))
    pyarrow.parquet.write_table(table.slice(0, 0), tmp_path / "a.parquet")
    with pytest.raises(ManifestError, match="a.parquet holds no rows"):
        stream_source(str(tmp_path))
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    assert told(stream_source(str(tmp_path))) == (["0", "1"], [])
    assert len(load_source(str(tmp_path), for_training=False, with_audio=False).rows) == 2
    assert stream_size(str(tmp_path)) == 2
    (tmp_path / "c.parquet").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ManifestError, match="c.parquet cannot be read: No such file"):
        stream_source(str(tmp_path))


def test_what_is_empty_in_the_column_that_was_meant_is_in_no_other(tmp_path):
    data = [{"audio": "0.wav", "text": "zero", "sentence": "null"}, {"audio": "1.wav", "text": "one", "sentence": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(data), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, data)))
    (tmp_path / "a.csv").write_text("audio,text,sentence\n0.wav,zero,null\n1.wav,one,\n")
    for name in ("a.parquet", "a.jsonl", "a.csv"):
        found = list(stream_source(f"{tmp_path / name}?columns.text=sentence"))
        assert [row.get("text") for row in found] == ["null", None], name
    inner = {"audio": "0.wav", "text": "own", "translation": None}
    (tmp_path / "b.jsonl").write_text(json.dumps(inner))
    (row,) = stream_source(f"{tmp_path / 'b.jsonl'}?columns.text=translation.en")
    assert "text" not in row


def test_audio_in_the_columns_of_parquet(tmp_path):
    """Bytes, samples, and a part of a recording in bytes."""
    miniature.sound(tmp_path / "a.wav", 0.3)
    held = (tmp_path / "a.wav").read_bytes()
    for name, audio in (("bytes", held), ("samples", [0.0, 0.5]), ("inner", {"bytes": held})):
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist([{"audio": audio, "text": "a"}]), tmp_path / f"{name}.parquet"
        )
        (row,) = stream_source(str(tmp_path / f"{name}.parquet"))
        assert row["audio"] == audio
    (row,) = stream_source(f"{tmp_path / 'inner.parquet'}?columns.audio=audio.bytes")
    assert row["audio"] == held
    part = [{"audio": held, "text": "a", "offset": 0.1, "duration": 0.1}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), tmp_path / "part.parquet")
    (row,) = stream_source(str(tmp_path / "part.parquet"))
    assert len(load_audio(row["audio"])) == 1600
    (tmp_path / "a.jsonl").write_text(json.dumps({"audio": [0.0, 0.5], "text": "a", "offset": 0.1}))
    with pytest.raises(ManifestError, match="line 1: there is an `offset`, but the audio is samples"):
        stream_source(str(tmp_path / "a.jsonl"))


def test_audio_in_memory_becomes_a_manifest(tmp_path):
    miniature.sound(tmp_path / "a.wav", 0.3)
    held = (tmp_path / "a.wav").read_bytes()
    for name, audio in (("bytes", held), ("samples", load_audio(held).tolist())):
        source, output = str(tmp_path / f"{name}.parquet"), tmp_path / name
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"audio": audio, "text": "one"}]), source)
        list(write_sources([source], f"{output}.jsonl"))
        align_manifest(source, f"{output}-timed.jsonl")
        for path in (f"{output}.jsonl", f"{output}-timed.jsonl"):
            (row,) = load_rows(path)
            assert (load_audio(row["audio"]) == load_audio(held)).all()


def test_values_that_were_written_as_json_are_read_as_such(tmp_path):
    data = datasets.Dataset.from_list(
        [{"audio": "a.wav", "answers": [6, "six"], "extra": {"a": [1, "b"]}}], on_mixed_types="use_json"
    )
    data.to_parquet(tmp_path / "a.parquet")
    (row,) = stream_source(str(tmp_path / "a.parquet"))
    assert row["answers"] == [6, "six"] and row["extra"] == {"a": [1, "b"]}


def test_options_that_name_no_column(tmp_path):
    with pytest.raises(ManifestError, match="`columns` is 'x'. Name a column: columns.text="):
        stream_source("hub:a/b?columns=x")


# ---- mixtures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({}, 1 / 2),  # weights alone
        ({"mixture_temperature": 1.0}, 4 / 5),  # as the sources are
        ({"mixture_temperature": 2.0}, 2 / 3),  # 400^(1/2) / (400^(1/2) + 100^(1/2))
        ({"mixture_temperature": 1.0, "train_fraction": 0.5}, 4 / 5),
    ],
)
def test_streams_are_mixed_by_their_sizes_where_a_temperature_is_given(tmp_path, options, share):
    specs = [str(written(tmp_path / name, rows(count, name), shards=2)) for name, count in (("a", 400), ("b", 100))]
    stream, _ = DataArguments(specs, streaming=True, **options).load()
    found = Counter(row["text"][0] for row in itertools.islice(stream, 200))
    assert found["a"] / 200 == pytest.approx(share, abs=3 * math.sqrt(share * (1 - share) / 200))


CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: train.parquet
dataset_info:
  splits:
  - name: train
    num_examples: 12
    num_bytes: 1
---
"""


def test_sizes_that_can_be_told(tmp_path, datasets_cache):
    data = [{**row, "language": "de" if i % 3 else "en"} for i, row in enumerate(rows(12))]
    folder = written(tmp_path / "lines", data, shards=2)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(data), tmp_path / "a.parquet")
    datasets.DatasetDict({"dev": datasets.Dataset.from_list(data[:7])}).save_to_disk(tmp_path / "saved")
    (tmp_path / "described").mkdir()
    datasets.Dataset.from_list(data).to_parquet(tmp_path / "described" / "train.parquet")
    (tmp_path / "described" / "README.md").write_text(CARD)
    for spec, size in (
        (f"{folder}?fraction=0.5", 6),
        (f"{folder}?only.language=en", 4),
        (f"{tmp_path / 'a.parquet'}", 12),
        (f"{tmp_path / 'a.parquet'}?only.language=en&size=4", 4),
        (f"{tmp_path / 'saved'}?split=dev", 7),
        (f"hub:{tmp_path / 'described'}", 12),
    ):
        assert stream_size(spec) == size


def test_sizes_that_cannot_be_told_name_the_remedy(tmp_path):
    for i in range(4):
        miniature.sound(tmp_path / "wav" / f"{i}.wav", 0.3)
    shards = miniature.write_shards(tmp_path / "shards", tmp_path)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(3)), tmp_path / "a.parquet")
    for spec in (str(shards), f"{tmp_path / 'a.parquet'}?only.text=1"):
        with pytest.raises(ManifestError, match="cannot be told.*`size`, or leave out mixture_temperature.*`weight`"):
            stream_size(spec)
    data = DataArguments([str(shards), str(tmp_path / "a.parquet")], streaming=True, mixture_temperature=3)
    with pytest.raises(ManifestError, match=r"shards: how many rows it has cannot be told"):
        data.load()
    with pytest.raises(ManifestError, match="the size is 0; it must be above 0"):
        stream_size(f"{shards}?size=0")
