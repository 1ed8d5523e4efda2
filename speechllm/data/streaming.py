"""Batches from a data set that is read as a stream (`datasets.IterableDataset`): it is never held, or known, as a whole.

1. Each reader (a worker of a process) has its own share of the stream: its own shards if there are enough of them, else
   every n-th row. The order of the shards changes from pass to pass.
2. A reader fills a buffer of rows and makes batches of it as `sampling.py` does: shuffled, of similar length, no key
   twice. Rows that no full batch is left for join the next buffer.
3. Equal keys must not meet in the batches of two processes either, which do not see each other's rows. So keys are
   dealt out by a hash to as many groups as there are processes, and for its k-th batch process p takes rows of group
   (p + k) mod processes: at any step, each group is with one process only.

Every batch says where its reader goes on: the stream's own state at the start of the buffer, the rows that were left
over from earlier ones, and which of the buffer's batches are done. From there come exactly the batches that are still
due, at the cost of reading one buffer again, and the local file or corpus so far (without decoding audio).
"""

import copy
import os
import random
import zlib
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import Dataset

from .checking import malformed
from .items import SpeechCollator, SpeechItems, approximate_length
from .sampling import packed_batches
from .schema import ManifestError, Row, SetAside, unusable, with_target


# Of a reader: `pass` through its share, `window` (buffers filled before, over all passes), `state` of the stream and rows
# `carried` over, as the buffer began; `done`, the buffer's batches that are taken; `batches` made over all passes.
Position = dict[str, Any]
START: Position = {"pass": 0, "window": 0, "state": None, "carried": [], "done": [], "batches": 0}


@dataclass(frozen=True)
class StreamReaders:
    """Who reads: this process, of `processes`, with `workers` readers (at least 1) each."""

    process: int = 0
    processes: int = 1
    workers: int = 1


class StreamBatches(Dataset):
    """Batch `number` of a stream, asked for in order; passes through the data follow each other without end.

    It is indexed, not iterated over, so that `Trainer` knows how many batches there are and skips those that it has had.
    Of several workers, number n mod `workers` reads batch n, as `DataLoader` deals them out.

    Args:
        rows: the stream; media undecoded (`schema.undecoded`), and not shuffled: a shuffle buffer of its own would be
            lost when a run resumes. See `strict`.
        items: an empty data set of the stage, which prepares rows.
        batch_size: rows per batch.
        problem: why a row cannot be used, or `None`.
        key: rows with equal keys never share a batch.
        readers: see `StreamReaders`.
        seed: of the order.
        buffer: rows that are shuffled together, per reader; two batches of each group of keys at least, which could else
            not be filled. As many are carried over at most: of keys that are more frequent than batches, the rest is left
            out.
        window: batches' worth of them that are sorted by length together; 0 turns sorting off.
        apart: whether keys must also differ between the batches that the processes have at the same step.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        items: SpeechItems,
        batch_size: int,
        problem: Callable[[Row], str | None],
        key: Callable[[Row], Hashable],
        readers: StreamReaders,
        seed: int = 0,
        buffer: int = 1000,
        window: int = 4,
        apart: bool = True,
    ):
        self.rows, self.items, self.batch_size, self.problem, self.key = rows, items, batch_size, problem, key
        self.readers, self.seed, self.window = readers, seed, window
        self.groups = readers.processes if apart else 1
        self.buffer = max(buffer, 2 * self.groups * batch_size)
        self.positions: dict[int, Position] = {}  # worker -> where it goes on
        self._batches: Iterator[dict[str, Any]] | None = None
        self._aside: list[SetAside] = []  # since the last batch
        self._strict = getattr(rows, "strict", False)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """A batch, with `position`: its worker, and what has changed of that worker's position."""
        if self._batches is None:
            self._batches = self._read(number % self.readers.workers)
        return next(self._batches)

    def _read(self, worker: int) -> Iterator[dict[str, Any]]:
        """The batches of one reader, without end.

        Raises:
            ValueError: if a whole pass through its share makes no batch, naming the first cause.
            ManifestError: if a row of a `strict` stream cannot be used.
        """
        position = {**START, **self.positions.get(worker, {})}
        made = None if worker in self.positions else 0
        index = self.readers.process * self.readers.workers + worker
        count = self.readers.processes * self.readers.workers
        strategy = "shards" if self.rows.num_shards >= count else "examples"
        share = split_dataset_by_node(self.rows, index, count, strategy=strategy)
        while True:
            share.set_epoch(1 + position["pass"] + 1_000_003 * self.seed)  # decides the order of the shards
            share.load_state_dict(position["state"])
            stream = share.iter(batch_size=1)  # unlike iter(share), it does not deal the share out to workers again
            while new := [
                _plain({name: value[0] for name, value in row.items()}) for row in islice(stream, self.buffer)
            ]:
                state = share.state_dict()
                carried = yield from self._window(position, new, worker, index)
                changes = {"window": position["window"] + 1, "state": state, "carried": carried, "done": []}
                position = {**position, **changes}
            if position["batches"] == made:
                cause = self._aside[0].reason if self._aside else "its transcripts repeat, or are too few."
                raise ValueError(
                    f"One pass through share {index + 1} of {count} of the stream made no batch of {self.batch_size} "
                    f"different transcripts: {cause} Lower per_device_train_batch_size or dataloader_num_workers, or "
                    "give more data."
                )
            made = position["batches"]
            position = {**position, "pass": position["pass"] + 1, "state": None}

    def _window(self, position: Position, new: list[Row], worker: int, reader: int) -> Iterator[dict[str, Any]]:
        """The batches of one buffer that are not done; returns the rows that are left over."""
        rows = list(position["carried"])
        for number, row in enumerate(new, position["window"] * self.buffer):
            row = with_target({**row, "id": _name(row) or f"row {number} of reader {reader}"})
            if found := row.get("set_aside"):  # by `stream_sources.py`
                self._set_aside(SetAside(row["id"], **found))
            elif reason := malformed(row):
                self._set_aside(SetAside(row["id"], reason, "malformed row"))
            elif found := unusable(row := _without_blanks(row), self.problem):
                self._set_aside(found)
            else:
                rows.append(row)
        batches, left = self._plan(rows, random.Random(f"{self.seed} {position['window']} {reader}"))
        queues = [deque() for _ in range(self.groups)]
        for number, (group, _) in enumerate(batches):
            if number not in position["done"]:
                queues[group].append(number)
        changes = dict(position)  # the first batch tells all of it, the others what is new
        done, made = list(position["done"]), position["batches"]
        while queue := queues[(self.readers.process + made) % self.groups]:
            number = queue.popleft()
            done.append(number)
            if (batch := self._batch([rows[i] for i in batches[number][1]])) is None:
                continue
            made += 1
            batch["position"] = (worker, {**changes, "done": list(done), "batches": made})
            changes = {}
            yield batch
        position["batches"] = made
        left += [i for queue in queues for number in queue for i in batches[number][1]]
        return [rows[i] for i in sorted(left)[-self.buffer :]]

    def _plan(self, rows: list[Row], generator: random.Random) -> tuple[list[tuple[int, list[int]]], list[int]]:
        """Batches of places in `rows`, each with its group of keys; and the places that no full batch was left for."""
        keys = [self.key(row) for row in rows]
        lengths = [approximate_length(row) for row in rows]
        order = list(range(len(rows)))
        generator.shuffle(order)
        batches, left = [], []
        for group in range(self.groups):
            members = [i for i in order if zlib.crc32(str(keys[i]).encode()) % self.groups == group]
            packed, rest = packed_batches(members, keys, lengths, self.batch_size, self.window, generator)
            batches += [(group, batch) for batch in packed]
            left += rest
        return batches, left

    def _batch(self, rows: list[Row]) -> dict[str, Any] | None:
        """The collated rows; `None` if none of them can be used. What cannot is listed in the next batch there is."""
        dataset = copy.copy(self.items)
        dataset.rows = rows
        items = [dataset[i] for i in range(len(rows))]
        for item in items:
            if isinstance(item, SetAside):
                self._set_aside(item)
        if not (usable := [item for item in items if not isinstance(item, SetAside)]):
            return None
        batch = SpeechCollator(dataset)(usable)
        batch["set_aside"], self._aside = self._aside, []
        return batch

    def _set_aside(self, item: SetAside) -> None:
        if self._strict:
            raise ManifestError(f"{item.reason} (Strict mode stops here.)")
        if item not in self._aside:  # a short source of a mixture may come round several times
            self._aside.append(item)


def strict(rows: datasets.IterableDataset) -> datasets.IterableDataset:
    """The stream, marked: the first of its rows that would be set aside ends the run with a `ManifestError`. Mark it last:
    what `datasets` makes of it is not marked. (A mark in the rows would change the stream's state, and a run that
    strictness ended could not resume without it.)"""
    rows.strict = True
    return rows


def _name(row: Row) -> str | None:
    """What the row says it is called: its id, or the path of its audio (and where in it the row begins)."""
    audio = row.get("audio")
    path = audio.get("path") if isinstance(audio, dict) else audio if isinstance(audio, str | os.PathLike) else None
    if path is not None and isinstance(audio, dict) and audio.get("offset") is not None:
        path = f"{path} at {audio['offset']:g} s"
    name = path if row.get("id") in (None, "") else row["id"]
    return None if name is None else str(name)


def _without_blanks(row: Row) -> Row:
    """The row without a transcript or an answer of white space alone: nothing is to be learned from it."""
    blank = [name for name in ("text", "target") if isinstance(row.get(name), str) and not row[name].strip()]
    return {name: value for name, value in row.items() if name not in blank}


def _plain(value: Any) -> Any:
    """A row without empty columns, with tensors for arrays and text for dates: checkpoints keep rows, and load no others."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    return value if value is None or isinstance(value, str | int | float | bytes | torch.Tensor) else str(value)
