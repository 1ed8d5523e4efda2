"""Predictions on disk, one JSON object per line, written as they come and never lost but for the line being written.

While a run goes on, process 0 appends to `predictions.jsonl` and process n to `predictions.<n>.jsonl`:

    {"id", "prompt", "input", "prediction", "ended"}    an answer, to what; `ended`: by the model, not by the limit on tokens
    {"id", "set_aside"}                                 why the utterance could not be used

At the end they become one `predictions.jsonl` in the order of the data. A run that was killed leaves a torn last line at
worst, which is cut off before anything is appended.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.schema import Row
from .page import write_whole


logger = logging.getLogger(__name__)


class PredictionFiles:
    """What is in the prediction files of a folder, and this process's own to append to.

    Args:
        folder: the run's output, on a disk that all processes share.
        process: index of this process.
        inputs: (id, prompt) -> what the answer is to be made of, see `input_key`; answers to anything else do not count.
    """

    def __init__(self, folder: Path, process: int = 0, inputs: dict[tuple[str, str], str] | None = None):
        self.folder, self.process, self.inputs = folder, process, inputs or {}
        self.answers: dict[tuple[str, str], dict[str, Any]] = {}  # (id, prompt) -> line
        self.unusable: dict[str, str] = {}  # id -> why
        self.read()

    def read(self) -> None:
        """Read all files anew; of several lines for one prompt, the last counts."""
        self.answers.clear()
        self.unusable.clear()
        for path in sorted(self.folder.glob("predictions*.jsonl")):
            for line in read_lines(path):
                if "set_aside" in line:
                    self.unusable[line["id"]] = line["set_aside"]
                elif "prediction" in line:
                    key = line["id"], line.get("prompt", "")
                    if line.get("input") in (None, self.inputs.get(key, line.get("input"))):
                        self.answers[key] = line

    @contextmanager
    def appending(self) -> Iterator[Callable[[dict[str, Any]], None]]:
        """A function that adds one line, and has handed it to the operating system when it returns.

        Raises:
            OSError: if the file cannot be written.
        """
        name = f"predictions.{self.process}.jsonl" if self.process else "predictions.jsonl"
        path = self.folder / name
        with open(path, "ab") as file:
            file.truncate(_whole_lines(path))

            def append(line: dict[str, Any]) -> None:
                file.write(_encoded(line))
                file.flush()

            yield append

    def replace(self, lines: list[dict[str, Any]]) -> None:
        """Make `lines` the only prediction file."""
        write_whole(self.folder / "predictions.jsonl", b"".join(map(_encoded, lines)))
        for path in self.folder.glob("predictions.*.jsonl"):
            path.unlink()


def input_key(row: Row, oracle: bool) -> str:
    """What tells a row's audio (with `oracle` its transcript) from another of the same id, without reading files: their
    size and time of change."""
    if oracle:
        return hashlib.sha256(str(row.get("text")).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return hashlib.sha256(repr(_told_apart(row.get("audio"))).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _told_apart(audio: Any) -> Any:
    if isinstance(audio, dict):
        return [(name, _told_apart(value)) for name, value in sorted(audio.items()) if value is not None]
    if isinstance(audio, list | tuple):
        return [_told_apart(part) for part in audio]
    if isinstance(audio, np.ndarray | torch.Tensor | bytes | bytearray | memoryview):
        return hashlib.sha256(np.ascontiguousarray(audio).tobytes()).hexdigest()
    if isinstance(audio, str | os.PathLike):
        try:
            found = os.stat(audio)
        except (OSError, ValueError):
            return os.fspath(audio)
        return found.st_size, found.st_mtime_ns
    return audio


def read_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a prediction file; those that a crash left torn are passed over, and said."""
    lines, damaged = [], 0
    for text in Path(path).read_bytes().split(b"\n"):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("id"), str):
            lines.append(line)
        else:
            damaged += 1
    if damaged:
        logger.warning("%s: %d damaged line(s) passed over.", path, damaged)
    return lines


def answered_ids(folder: Path) -> set[str]:
    """The utterances that a folder's prediction files hold answers to."""
    paths = folder.glob("predictions*.jsonl")
    return {line["id"] for path in paths for line in read_lines(path) if "prediction" in line}


def _encoded(line: dict[str, Any]) -> bytes:
    try:
        return json.dumps(line, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, as in names of files that are not UTF-8
        return json.dumps(line).encode() + b"\n"


def _whole_lines(path: Path) -> int:
    """Bytes up to the end of the last line that is whole."""
    return path.read_bytes().rfind(b"\n") + 1
