"""Sources written as one manifest: a corpus read once, to look at, to align (`speechllm align`), to share."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .schema import ManifestError, Row, with_ids
from .sources import Spec, load_source, read_specs


def write_sources(specs: Sequence[Spec], output: str | None, strict: bool = False, **limits: Any) -> Iterator[str]:
    """Read sources one after the other, yielding the report of each, and write their rows to `output`, if it is given.

    Audio that is in memory (of a Parquet file, of the Hub) is written to files in the folder `OUTPUT.audio`; other columns
    that hold bytes, such as images, are left out.

    Args:
        output: path of a manifest, ending in .jsonl.
        specs, strict, limits: see `load_source`.

    Raises:
        ManifestError: see `load_source`, or if `output` has another ending.
    """
    if output is not None and Path(output).suffix != ".jsonl":
        raise ManifestError(f"{output}: rows are written as JSON Lines. Give a path that ends in .jsonl.")
    rows: list[Row] = []
    for spec in read_specs([*specs]):
        loaded = load_source(spec, strict, **limits)
        yield loaded.report(spec if isinstance(spec, str) else spec["source"])
        rows += loaded.rows
    if output is None:
        return
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json_line({**row, "audio": written_audio(row["audio"], row["id"], path)}) for row in with_ids(rows)]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(path)


def json_line(row: Row) -> str:
    """The row as a line of a manifest: dates and numbers of other kinds as text, arrays as lists, without columns of bytes."""
    kept = {name: value for name, value in row.items() if not _holds_bytes(value)}
    other = lambda value: value.tolist() if hasattr(value, "tolist") else str(value)  # noqa: E731
    return json.dumps(kept, ensure_ascii=False, default=other) + "\n"


def _holds_bytes(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_holds_bytes, value.values() if isinstance(value, dict) else value))
    return isinstance(value, bytes | bytearray)


def written_audio(audio: Any, name: str, output: Path) -> Any:
    """The audio of row `name` as a manifest at `output` can hold it: with absolute paths, and bytes as a file.

    Raises:
        ManifestError: if it is in memory in another form.
    """
    if isinstance(audio, str | os.PathLike):
        return os.path.abspath(audio)
    if isinstance(audio, list):  # samples
        return audio
    if isinstance(audio, bytes):
        audio = {"bytes": audio}
    if isinstance(audio, dict) and audio.get("parts"):
        return {"parts": [written_audio(part, name, output) for part in audio["parts"]]}
    if isinstance(audio, dict) and audio.get("bytes"):
        ending = Path(audio.get("path") or "").suffix or ".wav"  # the content decides what it is read as
        path = output.with_suffix(".audio") / f"{hashlib.sha256(audio['bytes']).hexdigest()[:24]}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(audio["bytes"])
        rest = {key: value for key, value in audio.items() if key in ("offset", "duration") and value is not None}
        return {"path": os.path.abspath(path), **rest} if rest else os.path.abspath(path)
    if isinstance(audio, dict) and isinstance(audio.get("path"), str):
        return {
            **{key: value for key, value in audio.items() if value is not None},
            "path": os.path.abspath(audio["path"]),
        }
    raise ManifestError(
        f"{name}: its audio is a {type(audio).__name__}, which a manifest cannot hold. Write it to a file."
    )
