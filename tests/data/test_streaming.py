"""Batches of a stream: each row once a pass, no key twice in a global batch, and exact resumption, on any readers."""

import datetime
import json
from collections import Counter
from itertools import chain

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
import torch
from tiny import tiny_config, tiny_processor, tone
from torch.utils.data import DataLoader

from speechllm.cli import _run
from speechllm.data.checking import with_target
from speechllm.data.items import AlignmentItems
from speechllm.data.schema import ManifestError, load_rows, undecoded
from speechllm.data.stream_sources import stream_source
from speechllm.data.streaming import StreamBatches, StreamReaders, strict
from speechllm.training import DataArguments


ROWS = 48
SECONDS = [0.1 + 0.02 * (i % 7) for i in range(ROWS)]
PROCESSOR = tiny_processor(tiny_config("hubert-layer"))


def row(i, texts=ROWS):
    return {"id": f"row {i}", "audio": tone(SECONDS[i], seed=i), "text": f"text {i % texts}", "duration": SECONDS[i]}


def generated(shards, texts):
    for shard in shards:
        for i in range(shard, ROWS, 8):
            yield row(i, texts)


def from_generator(texts=ROWS):
    return datasets.IterableDataset.from_generator(generated, gen_kwargs={"shards": list(range(8)), "texts": texts})


def problem(row):
    return None if row.get("text") else f"{row['id']} has no text"


def key(row):
    return row["text"]


def reader(stream, process=0, processes=1, workers=1, **options):
    options = {"batch_size": 4, "buffer": 10, "window": 2, "seed": 3, **options}
    items = AlignmentItems([], PROCESSOR, prefix=[])
    return StreamBatches(
        stream, items, problem=problem, key=key, readers=StreamReaders(process, processes, workers), **options
    )


def texts_of(batch):
    """The texts of a batch's rows."""
    ids = batch["text_input_ids"]
    return [PROCESSOR.tokenizer.decode(i[m.bool()]) for i, m in zip(ids, batch["text_attention_mask"])]


def take(batches, count, first=0):
    """As a `DataLoader` without workers does, but for the positions: those of all batches so far, merged."""
    taken = []
    for number in range(first, first + count):
        batch = batches[number]
        worker, changes = batch.pop("position")
        batches.positions[worker] = {**batches.positions.get(worker, {}), **changes}
        taken.append(texts_of(batch))
    return taken


def recorded(folder):
    """Rows of recordings in the folder."""
    for i in range(ROWS):
        soundfile.write(folder / f"{i}.wav", row(i)["audio"], 16_000)
    return [{**row(i), "audio": f"{i}.wav"} for i in range(ROWS)]


@pytest.fixture(params=["generator", "jsonl", "parquet", "one file"])
def stream(request, tmp_path):
    if request.param == "generator":
        return from_generator()
    rows = recorded(tmp_path)
    if request.param == "parquet":
        for shard in range(8):
            part = [
                {**r, "audio": {"bytes": (tmp_path / r["audio"]).read_bytes(), "path": None}} for r in rows[shard::8]
            ]
            table = datasets.Dataset.from_list(part).cast_column("audio", datasets.Audio(sampling_rate=16_000))
            table.to_parquet(tmp_path / f"{shard}.parquet")
        return stream_source(str(tmp_path))
    shards = 8 if request.param == "jsonl" else 1
    for shard in range(shards):
        (tmp_path / f"{shard}.jsonl").write_text("\n".join(map(json.dumps, rows[shard::shards])))
    return stream_source(str(tmp_path) if shards > 1 else str(tmp_path / "0.jsonl"))


@pytest.mark.parametrize(("processes", "workers"), [(1, 1), (2, 1), (2, 2), (3, 1)])
def test_each_row_is_there_once_a_pass(stream, processes, workers):
    assert a_pass(stream, processes, workers) == Counter({f"text {i}": 1 for i in range(ROWS)})


def a_pass(stream, processes, workers):
    """How often each text comes, over all readers."""
    found = Counter()
    for process in range(processes):
        for worker in range(workers):
            batches = reader(stream, process, processes, workers, batch_size=2, buffer=ROWS, apart=False)
            for number in range(worker, ROWS, workers):
                batch = batches[number]
                if batch["position"][1].get("pass"):  # another pass begins
                    break
                found.update(texts_of(batch))
    return found


def test_the_order_depends_on_seed_and_pass():
    def order(seed):
        return take(reader(from_generator(), seed=seed, batch_size=4, buffer=ROWS), 24)

    assert order(0) == order(0) != order(1)
    assert order(0)[:12] != order(0)[12:]
    assert sorted(chain(*order(0)[:12])) == sorted(chain(*order(0)[12:]))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_no_key_is_twice_in_a_global_batch(processes):
    stream = from_generator(texts=30)
    shares = [take(reader(stream, process, processes, batch_size=2, buffer=24), 12) for process in range(processes)]
    for parts in zip(*shares):
        assert len(set(chain(*parts))) == 2 * processes


def test_similar_lengths_share_a_batch():
    def padding(window):
        batches = reader(from_generator(), batch_size=4, buffer=ROWS, window=window)
        masks = [batches[n]["attention_mask"].float() for n in range(12)]
        return 1 - sum(m.sum() for m in masks) / sum(m.numel() for m in masks)

    assert padding(12) < 0.6 * padding(0)


@pytest.mark.parametrize("stop", [1, 3, 5, 12, 13, 20])
def test_a_resumed_reader_goes_on_exactly(stream, stop, tmp_path):
    whole = take(reader(stream), 26)
    first = reader(stream)
    assert take(first, stop) == whole[:stop]
    second = reader(stream)
    torch.save(first.positions, tmp_path / "positions.pt")
    second.positions = torch.load(tmp_path / "positions.pt", weights_only=True)
    assert take(second, 26 - stop, first=stop) == whole[stop:]


def test_a_resumed_reader_goes_on_exactly_on_two_processes():
    stream = from_generator(texts=20)
    for process in range(2):
        options = dict(process=process, processes=2, batch_size=3, buffer=20)
        whole = take(reader(stream, **options), 20)
        for stop in (2, 7):
            first = reader(stream, **options)
            take(first, stop)
            second = reader(stream, **options)
            second.positions = first.positions
            assert take(second, 20 - stop, first=stop) == whole[stop:]


def with_bad_rows(bad):
    def rows():
        for i in range(24):
            yield {**row(i), **bad.get(i, {})}

    return datasets.IterableDataset.from_generator(rows)


def test_bad_rows_in_mid_stream_are_set_aside():
    bad = {3: {"text": None}, 9: {"audio": b"noise"}, 10: {"audio": None}}
    batches = reader(with_bad_rows(bad), buffer=6, batch_size=3)
    aside = {item.id: item.reason for n in range(7) for item in batches[n]["set_aside"]}
    assert aside.keys() == {"row 3", "row 9", "row 10"}
    assert "no text" in aside["row 3"] and "no `audio`" in aside["row 10"]


def test_rows_of_a_stream_have_their_form_or_are_set_aside(tmp_path):
    """As those of a list: what has no transcript but white space, or lists that are none."""
    forms = {1: {"choices": 5}, 2: {"text": {"en": "two"}}, 4: {"text": "  "}, 5: {"gender_terms": "nata"}}
    batches = reader(with_bad_rows(forms), buffer=24, batch_size=20)
    aside = {item.id: item.reason for item in batches[0]["set_aside"]}
    assert aside == {
        "row 1": "row 1: `choices` is 5. Write it as a list of texts.",
        "row 2": "row 2: `text` is a dict. Write it as a text.",
        "row 4": "row 4 has no text",
        "row 5": "row 5: The gender terms 'nata' are not pairs. Write 'right wrong;right wrong'.",
    }
    rows = [{"audio": "a.wav", "text": "a", "answers": "six|6", "choices": "six"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    (row,) = stream_source(str(tmp_path / "a.parquet"))
    assert (row["answers"], row["choices"]) == (["six", "6"], ["six"])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"text": None}, "row 9 has no text"),
        ({"audio": b"noise"}, "row 9.* is not audio"),
        ({"audio": None}, "row 9 has no `audio`"),
        ({"set_aside": {"reason": "line 9 is not UTF-8", "kind": "x"}}, "line 9 is not UTF-8"),
    ],
)
def test_a_strict_stream_stops_at_a_bad_row(bad, message):
    batches = reader(strict(with_bad_rows({9: bad})), buffer=6, batch_size=3)
    assert len(take(batches, 2)) == 2  # of the first six rows
    with pytest.raises(ManifestError, match=rf"{message}.*\(Strict mode stops here.\)"):
        take(batches, 4, first=2)


def test_a_worker_that_stops_says_why_in_one_sentence(capsys):
    batches = reader(strict(with_bad_rows({3: {"text": None}})), buffer=6, batch_size=3)
    loader = DataLoader(batches, sampler=range(6), batch_size=None, num_workers=1)
    assert _run(lambda _: print(len([*loader])), []) == 1
    error = capsys.readouterr().err
    assert (
        error.endswith("speechllm: error: row 3 has no text (Strict mode stops here.)\n") and "Traceback" not in error
    )


@pytest.mark.parametrize("number", range(7, 14))  # some of them wait for a later batch
def test_a_run_that_strictness_ended_resumes_without_it(number):
    bad, options = {number: {"audio": b"noise"}}, dict(buffer=7, batch_size=5)
    whole = take(reader(with_bad_rows(bad), **options), 6)
    first, taken = reader(strict(with_bad_rows(bad)), **options), []
    with pytest.raises(ManifestError, match=f"row {number}.* is not audio"):
        while len(taken) < 6:
            taken += take(first, 1, first=len(taken))
    second = reader(with_bad_rows(bad), **options)
    second.positions = first.positions
    assert taken + take(second, 6 - len(taken), first=len(taken)) == whole


@pytest.mark.parametrize(("processes", "workers"), [(1, 1), (2, 2), (3, 1)])
def test_a_part_is_dealt_out_to_the_readers_whole(tmp_path, processes, workers):
    rows = recorded(tmp_path)
    for shard in range(3):
        (tmp_path / f"{shard}.jsonl").write_text("\n".join(map(json.dumps, rows[shard::3])))
    part = stream_source(str(tmp_path), fraction=0.5, seed=1)
    expected = Counter(row["text"] for row in part)
    assert 12 < len(expected) < 36
    found = a_pass(part, processes, workers)
    assert found <= expected and (expected - found).total() < 2 * processes * workers  # what fills no batch of two


@pytest.mark.parametrize("names", [["a"], ["a", "b"]])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_resumed_reader_of_a_part_or_of_a_mixture_goes_on_exactly(tmp_path, names, kind):
    """Also over a Parquet file that is broken in the middle."""
    rows = recorded(tmp_path)
    for i, name in enumerate(names):
        (tmp_path / name).mkdir()
        for shard in range(3):
            lines = [{**row, "audio": str(tmp_path / row["audio"])} for row in rows[i * 32 : i * 32 + 32][shard::3]]
            path = tmp_path / name / f"{shard}.{kind}"
            if kind == "jsonl":
                path.write_text("\n".join(map(json.dumps, lines)))
                continue
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), path, row_group_size=3)
            if shard == 1:
                column = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(1)
                data = path.read_bytes()
                begin, length = column.dictionary_page_offset, column.total_compressed_size
                path.write_bytes(data[:begin] + b"\xff" * length + data[begin + length :])
    options = dict(streaming=True, train_fraction=0.7, mixture_temperature=2.0, strict=kind == "jsonl")

    def batches():
        return reader(DataArguments([str(tmp_path / name) for name in names], **options).load()[0], batch_size=3)

    whole, reading = take(batches(), 16), batches()
    aside = {item.kind for number in range(16) for item in reading[number]["set_aside"]}
    assert aside == ({"broken file"} if kind == "parquet" else set())
    for stop in (1, 5, 11):
        first = batches()
        assert take(first, stop) == whole[:stop]
        torch.save(first.positions, tmp_path / "positions.pt")
        second = batches()
        second.positions = torch.load(tmp_path / "positions.pt", weights_only=True)
        assert take(second, 16 - stop, first=stop) == whole[stop:]


def test_a_stream_that_makes_no_batch_says_why():
    with pytest.raises(ValueError, match=r"no batch of 4 different transcripts: its transcripts repeat"):
        reader(from_generator(texts=3))[0]

    def broken():
        for i in range(8):
            yield {"id": str(i), "audio": b"noise", "text": f"text {i}"}

    with pytest.raises(ValueError, match="no batch of 4 .* is not audio"):
        reader(datasets.IterableDataset.from_generator(broken))[0]


def test_workers_of_a_loader_read_the_same_batches():
    stream = from_generator()

    def epoch(workers, skip=0):
        loader = DataLoader(
            reader(stream, workers=2),
            sampler=range(skip, 10),
            batch_size=1,
            collate_fn=lambda batches: batches[0],
            num_workers=workers,
        )
        return [texts_of(batch) for batch in loader]

    readers = [reader(stream, workers=2) for _ in range(2)]
    assert epoch(2) == [texts_of(readers[n % 2][n]) for n in range(10)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_segments_are_those_of_a_manifest(tmp_path, kind):
    soundfile.write(tmp_path / "long.wav", tone(1.5, seed=1), 16_000)
    rows = [{"audio": "long.wav", "offset": i / 2, "duration": 0.25, "text": f"text {i}"} for i in range(3)]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    assert [row["audio"] for row in stream_source(str(path))] == [row["audio"] for row in load_rows(path)]
    batch = reader(stream_source(str(path)), batch_size=3)[0]
    assert batch["input_values_mask"].sum(-1).tolist() == [4000, 4000, 4000]


def test_a_bad_offset_is_set_aside(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({**row, "audio": "0.wav", "offset": "now"}) + "\n" for row in recorded(tmp_path))
    )
    with pytest.raises(ValueError, match="the offset is 'now'. Give seconds"):
        reader(stream_source(str(path)))[0]


def test_buffers_hold_enough_for_all_processes():
    """Keys are dealt out to the processes; of a small buffer, hardly any would have enough for a batch."""
    stream = from_generator()
    taken = [take(reader(stream, process, 4, batch_size=3, buffer=2), 2) for process in range(2)]
    assert all(len(batch) == 3 for batches in taken for batch in batches)


def test_dates_do_not_prevent_resumption(tmp_path):
    def dated():
        for i in range(ROWS):
            yield {**row(i), "recorded": datetime.date(2026, 1, 1), "tags": [datetime.date(2026, 1, 1)]}

    batches = reader(datasets.IterableDataset.from_generator(dated))
    take(batches, 3)
    torch.save(batches.positions, tmp_path / "positions.pt")
    found = torch.load(tmp_path / "positions.pt", weights_only=True)
    assert {row["recorded"] for row in found[0]["carried"]} == {"2026-01-01"}


def test_answers_of_every_form_have_a_target():
    """A list, a text, and SQuAD's dictionary."""
    for answers in (["Paris", "in Paris"], "Paris", {"text": ["Paris"], "answer_start": [3]}):
        found = with_target({"answers": answers})
        assert found["target"] == "Paris" and isinstance(found["answers"], list)
    assert with_target({"answers": ["a"], "target": "b"})["target"] == "b"
    assert with_target({"answers": 5}) == {"answers": ["5"], "target": "5"}
    assert with_target({"text": "a"}) == {"text": "a"}
    assert with_target({"text": 7, "target": 1.5}) == {"text": "7", "target": "1.5"}


def test_audio_stays_undecoded():
    table = datasets.Dataset.from_list([{"audio": {"bytes": b"x", "path": "a.wav"}, "text": "a"}])
    table = table.cast_column("audio", datasets.Audio(sampling_rate=16_000))
    for rows in (table, table.to_iterable_dataset()):
        assert next(iter(undecoded(rows)))["audio"]["bytes"] == b"x"
    assert undecoded([1]) == [1]


def test_columns_are_renamed(tmp_path):
    lines = [{"path": "a.wav", "sentence": "hello", "text": "other", "duration": 1.0}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    columns = {"audio": "path", "text": "sentence"}
    expected = {"audio": str(tmp_path / "a.wav"), "text": "hello", "duration": 1.0}
    assert list(stream_source(str(tmp_path), columns)) == [expected]
    assert load_rows(tmp_path / "a.jsonl", columns) == [{**expected, "id": expected["audio"]}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "hello", "a.txt is not a manifest"),
        ("a.jsonl", '{"text": "a"}', "no `audio`.*one of 'text', name it"),
        ("a.jsonl", "", "a.jsonl holds no rows"),
        ("a.parquet", "this is no Parquet", "a.parquet is not a Parquet file that can be read"),
        (None, None, "there is no such manifest or folder"),
    ],
)
def test_what_is_wrong_with_a_source(tmp_path, name, content, message):
    if name:
        (tmp_path / name).write_text(content)
    with pytest.raises(ManifestError, match=message):
        stream_source(str(tmp_path / name) if name else "nobody/nothing")
