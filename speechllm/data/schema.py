"""The one data schema. A row is a dict:

    audio     path, bytes, array, tensor, or {"array", "sampling_rate"}          required
    text      transcript                                                         required for pretraining
    target    what the model is to answer; default: the transcript
    prompt    the instruction beside the audio; default: by task, see `prompts.py`
    task      "asr" by default
    words     times of the transcript's words, see `forced_alignment.py`         required for mixed speech-text pretraining
    id, language, target_language, duration, ... and labels for probes           optional
    source    corpus it is from, and `license` its licence: for the model card   optional

Rows come from a manifest (JSON Lines, JSON, CSV or TSV), from a stream (Parquet or JSON Lines files, a data set of the Hub),
or are made by a corpus function.
"""

import csv
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets


Row = dict[str, Any]


class ManifestError(ValueError):
    """A manifest that cannot be read; the message names the file, the line, the cause and the remedy."""


@dataclass(frozen=True)
class SetAside:
    """An utterance that cannot be used. Training goes on without it and lists it at the end."""

    id: str
    reason: str


def load_rows(path: str | os.PathLike, columns: dict[str, str] | None = None) -> list[Row]:
    """Read a manifest; relative audio paths are relative to its folder.

    Args:
        path: a `.jsonl`, `.json` (a list of rows), `.csv` or `.tsv` file with at least the column `audio`.
        columns: the schema's name of a column -> the file's own, where they differ.

    Raises:
        ManifestError: if the file is missing, of another kind, malformed, empty, or lacks the column `audio`.
    """
    path = Path(path)
    if not path.is_file():
        raise ManifestError(f"{path}: there is no such manifest. Give a .jsonl, .json, .csv or .tsv file.")
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv}
    if path.suffix.lower() not in readers:
        raise ManifestError(f"{path} is not a manifest: use one of {', '.join(readers)}.")
    rows = []
    try:
        for place, row in readers[path.suffix.lower()](path):
            rows.append(_checked(_renamed(row, columns or {}), path, place))
    except UnicodeDecodeError as error:
        raise ManifestError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). Save it as such."
        ) from None
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from None
    if not rows:
        raise ManifestError(f"{path} holds no rows. Add some, or give another manifest.")
    return with_ids(rows)


def load_stream(
    source: str, columns: dict[str, str] | None = None, name: str | None = None, split: str = "train"
) -> datasets.IterableDataset:
    """Rows that are read as they are needed, again and again.

    Args:
        source: a Parquet or JSON Lines file, a folder of such files (its shards), or the id of a data set on the Hub.
            Relative audio paths are relative to the folder.
        columns: the schema's name of a column -> the data's own, where they differ.
        name, split: configuration and split of the Hub's data set.

    Raises:
        ManifestError: if there is no such source, it is of another kind, it is empty, or it lacks the column `audio`.
    """
    path = Path(source)
    try:
        if path.exists():
            kind, files = _shards(path)
            rows = datasets.load_dataset(kind, data_files=files, split="train", streaming=True)
        else:
            rows = datasets.load_dataset(source, name, split=split, streaming=True)
        rows = undecoded(rows)
        if columns:
            rows = rows.map(partial(_renamed, columns=columns), remove_columns=list(columns.values()))
        if path.exists():
            rows = rows.map(partial(_located, folder=str(path if path.is_dir() else path.parent)))
        first = next(iter(rows.take(1)), None)
    except ManifestError:
        raise
    except Exception as error:  # of many kinds: the network's, the file system's, Arrow's
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = "" if path.exists() else "is no file or folder here, and as a data set of the Hub "
        raise ManifestError(f"{source} {where}cannot be read: {cause}") from error
    if first is None:
        raise ManifestError(f"{source} holds no rows. Give another.")
    if first.get("audio") is None:
        raise ManifestError(
            f"{source} has no column `audio`, but {', '.join(map(repr, first))}. Name it: "
            '--columns \'{"audio": "..."}\'.'
        )
    return rows


def _shards(path: Path) -> tuple[str, list[str]]:
    """The kind of the data files at `path`, and the files."""
    builders = {".parquet": "parquet", ".jsonl": "json"}
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in builders)
    kinds = {builders.get(file.suffix) for file in files}
    if len(kinds) != 1 or None in kinds:
        raise ManifestError(f"{path} must be, or hold, .parquet files or .jsonl files, and not both, to be a stream.")
    return kinds.pop(), [str(file) for file in files]


def _located(row: Row, folder: str) -> Row:
    """The row with the path of its audio (where it has no bytes) relative to `folder`."""
    audio = row.get("audio")
    if isinstance(audio, str):
        return {**row, "audio": os.path.join(folder, audio)}
    if isinstance(audio, dict) and audio.get("bytes") is None and isinstance(audio.get("path"), str):
        return {**row, "audio": {**audio, "path": os.path.join(folder, audio["path"])}}
    return row


def _renamed(row: Row, columns: dict[str, str]) -> Row:
    """The row with the schema's names of those columns that it has; what had such a name before gives way."""
    if not isinstance(row, dict):
        return row
    others = {name: value for name, value in row.items() if name not in columns.values()}
    return {**others, **{name: row[their] for name, their in columns.items() if their in row}}


def _checked(row: Any, path: Path, place: str) -> Row:
    if not isinstance(row, dict) or not isinstance(row.get("audio"), str) or not row["audio"]:
        raise ManifestError(f"{path}, {place}: there is no `audio`. Every row needs one (a path).")
    if row.get("duration") is not None:
        try:
            row["duration"] = float(row["duration"])
        except (TypeError, ValueError):
            raise ManifestError(
                f"{path}, {place}: the duration is {row['duration']!r}. Give seconds, or leave it out."
            ) from None
    return {**row, "audio": str(path.parent / row["audio"])}


def with_ids(rows: Iterable[Row]) -> list[Row]:
    """The rows as a list, each with an `id` that no other has: its own, its audio's path, or its place, and a number
    behind it where several rows would have the same (one recording with several questions)."""
    named, taken = [], Counter()
    for i, row in enumerate(rows):
        audio = row.get("audio")
        name = str(audio) if isinstance(audio, str | os.PathLike) else f"row {i}"
        name = name if row.get("id") in (None, "") else str(row["id"])
        taken[name] += 1
        while taken[name] > 1:
            name = f"{name} #{taken[name]}"
            taken[name] += 1
        named.append({**row, "id": name})
    return named


def undecoded(rows: Any) -> Any:
    """A `datasets` data set whose audio columns give bytes and paths, for the processor to decode (`datasets` would want
    torchcodec and FFmpeg's libraries); anything else as it is."""
    for name, feature in (getattr(rows, "features", None) or {}).items():
        if isinstance(feature, datasets.Audio) and feature.decode:
            rows = rows.cast_column(name, datasets.Audio(sampling_rate=feature.sampling_rate, decode=False))
    return rows


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except json.JSONDecodeError as error:
                    raise ManifestError(f"{path}, line {number} is not JSON ({error}). Correct or remove it.") from None


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ManifestError(f"{path} is not JSON ({error}). Correct it.") from None
    if not isinstance(rows, list):
        raise ManifestError(f"{path} holds a {type(rows).__name__}, not a list of rows.")
    yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        # Tab-separated files know no quotation marks: one at the start of a transcript is part of it.
        options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix.lower() == ".tsv" else {"strict": True}
        reader = csv.DictReader(file, **options)
        try:
            for row in reader:
                place = f"line {reader.line_num}"
                if None in row:
                    raise ManifestError(f"{path}, {place} has more fields than the first line names. Correct the line.")
                yield place, {name: value for name, value in row.items() if value not in (None, "")}
        except csv.Error as error:
            raise ManifestError(f"{path}, near line {reader.line_num}: {error}. Correct the line.") from None
