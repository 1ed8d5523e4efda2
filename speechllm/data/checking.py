"""Rows that can be used, and what was wrong with the others.

Corpora are never as clean as their papers say. A row is set aside, with the reason, where

* its audio is missing, empty, or (where the audio is looked into) cannot be decoded,
* its transcript is empty, or what its task needs as the answer is missing or not in its form,
* its task has no instruction and neither has the row,
* a row of the same source has the same id, audio, task and answer already (a duplicate).

`Loaded.report` counts them by cause; in strict mode the first is an error.
"""

import io
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import soundfile

from ..audio_speechllm import AudioError, load_audio, read_bytes
from .prompts import prompt_of
from .schema import (
    LISTS,
    TEXTS,
    ManifestError,
    Row,
    SetAside,
    audio_paths,
    gender_pairs,
    not_utf8,
    with_ids,
    with_target,
)


THREADS = 8  # that read headers and decode audio; soundfile does both outside of Python's lock
EXAMPLES = 1  # that a report shows of each cause


@dataclass
class Loaded:
    """What a source gave.

    Attributes:
        rows: of the schema, with ids that no two share.
        set_aside: what cannot be used.
        left_out: rows that a limit on the duration left out; there is nothing wrong with them.
    """

    rows: list[Row] = field(default_factory=list)
    set_aside: list[SetAside] = field(default_factory=list)
    left_out: int = 0

    def report(self, name: str) -> str:
        """A few lines for people: rows by task, hours as far as they are known, and what was set aside by cause."""
        tasks = Counter(row.get("task") or "asr" for row in self.rows)
        seconds = [row["duration"] for row in self.rows if row.get("duration")]
        hours = f", {sum(seconds) / 3600:.2f} hours" if len(seconds) == len(self.rows) else ""
        by_task = f" ({', '.join(f'{task} {count:,}' for task, count in sorted(tasks.items()))})" if tasks else ""
        lines = [f"{name}: {len(self.rows):,} rows{hours}{by_task}"]
        if self.left_out:
            lines.append(f"  {self.left_out:,} left out by the limits on their duration")
        for kind, items in by_cause(self.set_aside):
            lines.append(f"  {len(items):,} set aside: {kind}")
            lines += [f"    {item.reason}" for item in items[:EXAMPLES]]
        return "\n".join(lines)


def by_cause(set_aside: Iterable[SetAside]) -> list[tuple[str, list[SetAside]]]:
    """The causes and what was set aside for each, the most frequent first."""
    causes: dict[str, list[SetAside]] = defaultdict(list)
    for item in set_aside:
        causes[item.kind].append(item)
    return sorted(causes.items(), key=lambda cause: -len(cause[1]))


def counted(set_aside: Iterable[SetAside]) -> list[str]:
    """A line for each cause: how often, and an example."""
    return [
        f"{len(items):,} utterance(s) set aside: {kind}; e.g. {items[0].reason}" for kind, items in by_cause(set_aside)
    ]


def check_rows(
    rows: Iterable[Row | SetAside],
    name: str,
    strict: bool = False,
    for_training: bool = True,
    with_audio: bool = True,
) -> Loaded:
    """The usable rows and the rest.

    Args:
        rows: as a corpus function gives them.
        name: of the source, for messages.
        strict: stop at what cannot be used.
        for_training: whether a row needs a prompt and an answer to be used.
        with_audio: whether it needs audio.

    Raises:
        ManifestError: if nothing can be used; in strict mode, if anything cannot.
    """
    loaded, known, taken = Loaded(), {}, set()
    for number, row in enumerate(rows, 1):
        item = (
            row
            if isinstance(row, SetAside)
            else problem(row := with_target(row), f"{name}, row {number}", known, for_training, with_audio)
        )
        if item is None and row.get("id") not in (None, ""):
            key = (str(row["id"]), *(str(row.get(part)) for part in ("task", "target_language", "question", "trait")))
            if key in taken:
                reason = f"{row['id']} is there twice in {name}. Give every row an id of its own."
                item = SetAside(str(row["id"]), reason, "duplicate id")
            taken.add(key)
        if item is None:
            loaded.rows.append(row)
        elif strict:
            raise ManifestError(f"{item.reason} (Strict mode stops here.)")
        else:
            loaded.set_aside.append(item)
    if not loaded.rows:
        first = f" The first of {len(loaded.set_aside)}: {loaded.set_aside[0].reason}" if loaded.set_aside else ""
        raise ManifestError(f"{name} holds no rows that can be used.{first}")
    return Loaded(with_ids(loaded.rows), loaded.set_aside)


def problem(
    row: Row, name: str, known: dict[str, str | None], for_training: bool = True, with_audio: bool = True
) -> SetAside | None:
    """Why a row cannot be used as far as can be said without decoding its audio.

    Args:
        name: of a row that has no id.
        known: file -> what is wrong with it, filled here: long recordings have many rows.
        for_training: whether the row needs a prompt and an answer.
        with_audio: whether it needs audio.
    """
    name = str(row.get("id") or name)
    audio = row.get("audio")
    if any(map(not_utf8, [name, *audio_paths(audio)])):  # which no manifest could name
        return SetAside(repr(name), f"{name!r} has a name that is not UTF-8. Rename the file.", "name is not UTF-8")
    if with_audio and (audio is None or (isinstance(audio, str | dict) and not audio)):
        return SetAside(name, f"{name} has no `audio`. Give it one.", "no audio")
    for path in audio_paths(audio) if with_audio else ():
        if path not in known:
            known[path] = _file_problem(path)
        if known[path]:
            return SetAside(name, f"{name}: {path} {known[path]}", f"audio file {known[path].partition('.')[0]}")
    if reason := malformed({**row, "id": name}):
        return SetAside(name, reason, "malformed row")
    if not for_training:
        return None
    task = row.get("task") or "asr"
    if task == "asr" and not _filled(row.get("target")) and not _filled(row.get("text")):
        return SetAside(name, f"{name} has an empty transcript. Write what is said, or remove it.", "empty transcript")
    if task != "asr" and not _filled(row.get("target")):
        reason = f"{name}: task {task!r} needs the reference answer as `target`. Add it, or remove the row."
        return SetAside(name, reason, "reference missing")
    try:
        prompt_of({**row, "id": name})
    except ValueError as error:
        return SetAside(name, str(error), f"task {task!r} without a prompt")
    return None


def malformed(row: Row) -> str | None:
    """What is wrong with the form of a row's columns, if anything."""
    for column in LISTS:
        values = row.get(column)
        if values is not None and not (isinstance(values, list) and all(isinstance(text, str) for text in values)):
            return f"{row['id']}: `{column}` is {values!r:.80}. Write it as a list of texts."
    for column in TEXTS:
        if not isinstance(row.get(column), str | None):
            return f"{row['id']}: `{column}` is a {type(row[column]).__name__}. Write it as a text."
    try:
        gender_pairs(row.get("gender_terms"))
    except ValueError as error:
        return f"{row['id']}: {error}"
    return None


def _filled(text: Any) -> bool:
    return text is not None and bool(str(text).strip())


def _file_problem(path: str) -> str | None:
    try:
        size = os.stat(path).st_size
    except OSError as error:
        return f"cannot be found. Check the path ({error.strerror})."
    return None if size else "is empty. Copy or download it again."


def duration_of(audio: Any, sampling_rate: int | None = None) -> float:
    """Seconds, from the header alone where the audio is a file.

    Raises:
        AudioError: if the header cannot be read.
    """
    if isinstance(audio, dict):
        if audio.get("parts"):
            return sum(duration_of(part) for part in audio["parts"])
        if audio.get("duration") is not None:
            return float(audio["duration"])
        if audio.get("array") is not None:
            return duration_of(audio["array"], audio.get("sampling_rate", sampling_rate))
        if not any(audio.get(name) for name in ("bytes", "path")):
            raise AudioError("The audio is a dict without `array`, `bytes` or `path`. Give one of them.")
        inner = audio.get("bytes") or (read_bytes(audio) if audio.get("byte_length") else audio.get("path"))
        return duration_of(inner) - float(audio.get("offset") or 0)
    if not isinstance(audio, str | os.PathLike | bytes):
        return max(getattr(audio, "shape", (len(audio),))) / (sampling_rate or 16_000)
    try:
        return soundfile.info(io.BytesIO(audio) if isinstance(audio, bytes) else str(audio)).duration
    except (soundfile.SoundFileError, RuntimeError, OSError) as error:
        shown = "the audio" if isinstance(audio, bytes) else audio
        raise AudioError(
            f"{shown} is not audio that can be decoded ({error}). Convert it or download it again."
        ) from None


def with_durations(rows: list[Row]) -> Iterator[Row | SetAside]:
    """The rows with `duration` in seconds, or why a row's audio has none."""

    def measured(row: Row) -> Row | SetAside:
        if row.get("duration"):
            return row
        try:
            return {**row, "duration": duration_of(row["audio"], row.get("sampling_rate"))}
        except AudioError as error:
            return SetAside(row["id"], str(error), "audio cannot be decoded")

    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(measured, rows)


def decodable(rows: list[Row]) -> Iterator[Row | SetAside]:
    """The rows whose audio can be decoded to its end and holds something; why not, of the others."""

    def tried(row: Row) -> Row | SetAside:
        try:
            load_audio(row["audio"], row.get("sampling_rate"), name=row["id"])
        except AudioError as error:
            return SetAside(row["id"], str(error), "audio cannot be decoded")
        return row

    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(tried, rows)
