"""The one data schema. A row is a dict:

    audio     path, bytes, array, tensor, or {"array", "sampling_rate"}          required
    text      transcript                                                         required for pretraining
    target    what the model is to answer; default: the transcript
    prompt    the instruction beside the audio; default: by task, see `prompts.py`
    task      "asr" by default
    id, language, target_language, duration, ... and labels for probes           optional

Rows come from a manifest (JSON Lines, JSON, CSV or TSV) or are made by a corpus function.
"""

import csv
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


Row = dict[str, Any]


class ManifestError(ValueError):
    """A manifest that cannot be read; the message names the file, the line, the cause and the remedy."""


@dataclass(frozen=True)
class SetAside:
    """An utterance that cannot be used. Training goes on without it and lists it at the end."""

    id: str
    reason: str


def load_rows(path: str | os.PathLike) -> list[Row]:
    """Read a manifest; relative audio paths are relative to its folder.

    Args:
        path: a `.jsonl`, `.json` (a list of rows), `.csv` or `.tsv` file with at least the column `audio`.

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
            rows.append(_checked(row, path, place))
    except UnicodeDecodeError as error:
        raise ManifestError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). Save it as such."
        ) from None
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from None
    if not rows:
        raise ManifestError(f"{path} holds no rows. Add some, or give another manifest.")
    return with_ids(rows)


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
