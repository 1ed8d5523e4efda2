"""Data without a name: a folder of recordings with transcripts, WebDataset shards, a data set of the Hub."""

import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from ..schema import ManifestError, Row, SetAside, manifest_rows, not_utf8, renamed, undecoded, with_seconds
from .reading import need_folder, text_lines


AUDIO = (".wav", ".flac", ".ogg", ".opus", ".mp3")
TEXT = (".txt", ".lab")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SAVED = ("dataset_dict.json", "state.json")  # in a folder written by `datasets`' `save_to_disk`


def transcribed_folder(folder: Path, columns: dict[str, str] | None = None) -> Iterator[Row | SetAside]:
    """Recordings, at any depth, whose transcripts are in one of these:

    * `metadata.csv` (or .jsonl, .parquet) with `file_name`, the form of the Hub's audio folders;
    * `transcripts.txt` with lines "NAME<tab or space>TEXT", NAME without or with the recording's ending, and without its
      folder if no other recording has that name;
    * a text file beside each recording, `a.wav` and `a.txt`.

    Raises:
        ManifestError: if there is none of these, or no recording.
    """
    for name in METADATA:
        if (need_folder(folder, "recordings with transcripts") / name).is_file():
            yield from manifest_rows(folder / name, {"audio": "file_name", **(columns or {})})
            return
    recordings = sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO)
    if not recordings:
        raise ManifestError(
            f"{folder} holds no recordings ({', '.join(AUDIO)}), and no manifest, shards or {METADATA[1]}."
        )
    listed, transcripts = None, folder / "transcripts.txt"
    if transcripts.is_file():
        lines = text_lines(transcripts)
        yield from (line for line in lines if isinstance(line, SetAside))
        listed = _by_name(line for line in lines if isinstance(line, str))
    unused = set(listed or ())
    # Under how many paths a bare name, or a stem, is found; one recording in two formats counts once.
    shared = Counter(
        key for _, key in {(path.with_suffix(""), key) for path in recordings for key in (path.name, path.stem)}
    )
    for path in recordings:
        name = path.relative_to(folder).as_posix()
        if listed is not None:
            stem = name.removesuffix(path.suffix)
            key = next((key for key in (name, stem, path.name, path.stem) if key in listed), None)
            if key is None:
                yield SetAside(name, f"{path} has no line in {transcripts}. Write it, or remove it.", "no transcript")
                continue
            unused.discard(key)
            if key not in (name, stem) and shared[key] > 1:
                reason = f"{path}: {shared[key]} recordings are called {key}. Write folder and name into {transcripts}."
                yield SetAside(name, reason, "name of several recordings")
                continue
            if len(texts := listed[key]) > 1:
                reason = f"{path} has {len(texts)} different lines in {transcripts}. Leave one."
                yield SetAside(name, reason, "several transcripts")
                continue
            (line,) = texts
        else:
            beside = next((path.with_suffix(end) for end in TEXT if path.with_suffix(end).is_file()), None)
            if beside is None:
                reason = f"{path} has no transcript: there is no {path.stem}.txt beside it. Write it, or remove it."
                yield SetAside(name, reason, "no transcript")
                continue
            lines = text_lines(beside)
            broken = next((line for line in lines if isinstance(line, SetAside)), None)
            line = broken or " ".join(" ".join(lines).split())
        yield line if isinstance(line, SetAside) else {"id": name, "audio": str(path), "text": line}
    for name in sorted(unused):
        yield SetAside(name, f"{transcripts} has {name}, of which there is no recording.", "recording missing")


def _by_name(lines: Iterable[str]) -> dict[str, set[str]]:
    """Lines of "NAME<tab or space>TEXT" -> name -> its texts."""
    lines = [line.strip() for line in lines if line.strip()]
    parts = [line.split("\t" if "\t" in line else None, maxsplit=1) for line in lines]  # names may hold spaces
    texts: dict[str, set[str]] = {}
    for name, *text in parts:
        texts.setdefault(name.strip(), set()).add(text[0].strip() if text else "")
    return texts


def shards(folder: Path) -> list[Path]:
    """The tar archives in a folder, or the one that is given."""
    return [folder] if folder.is_file() else sorted(folder.rglob("*.tar"))


def webdataset(folder: Path, columns: dict[str, str] | None = None) -> Iterator[Row | SetAside]:
    """Rows of WebDataset shards, tar archives whose members that share a name up to the first dot are a row:
    `0001.flac`, `0001.txt` (the transcript) and, optionally, `0001.json` (further columns).

    The audio stays in the archive: a row says where, {"path", "byte_offset", "byte_length"}.

    Args:
        folder: of `.tar` files, or one of them.
        columns: the schema's name of a column -> its name in the JSON.

    Raises:
        ManifestError: if there are none, or one of them is compressed or broken.
    """
    found = shards(folder)
    if not found:
        raise ManifestError(f"{folder} holds no .tar files. Give the folder of the shards.")
    for shard in found:
        members: dict[str, dict[str, Any]] = {}
        broken = None
        try:
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    if not member.isfile():
                        continue
                    base, _, ending = Path(member.name).name.partition(".")
                    row = members.setdefault((Path(member.name).parent / base).as_posix(), {})
                    if f".{ending.lower()}" in AUDIO:
                        row["audio"] = {
                            "path": str(shard),
                            "byte_offset": member.offset_data,
                            "byte_length": member.size,
                        }
                    elif ending.lower() in ("txt", "json"):
                        row[ending.lower()] = archive.extractfile(member).read().decode("utf-8", "surrogateescape")
                archive.fileobj.seek(archive.offset)  # `tarfile` takes a header that is broken for the end
                end = archive.fileobj.read(tarfile.BLOCKSIZE)  # nothing at all in archives of some programs
                if end and (len(end) < tarfile.BLOCKSIZE or any(end)):
                    raise tarfile.ReadError("it breaks off")
        except (tarfile.TarError, OSError) as error:  # raised below, after the rows that are whole
            most = max(map(len, members.values()), default=0)
            if members and len(members[last := next(reversed(members))]) < most:
                del members[last]
            broken = f"{shard} is not a tar archive that can be read ({error}). Write it again, not compressed."
        for name, row in members.items():
            yield _shard_row(row, f"{shard.stem}/{name}", columns or {})
        if broken:
            raise ManifestError(broken)


def _shard_row(parts: dict[str, Any], name: str, columns: dict[str, str]) -> Row | SetAside:
    try:
        further = json.loads(parts.get("json", "{}"))
        if any(not_utf8(parts.get(part, "")) for part in ("txt", "json")):
            raise ValueError("not UTF-8")
    except ValueError as error:
        return SetAside(name, f"{name} has text that cannot be read ({error}). Write the shard again.", "malformed row")
    try:
        if not isinstance(further, dict):
            raise ManifestError(f"its JSON is a {type(further).__name__}, not an object with columns.")
        further = with_seconds(renamed(further, columns))
    except ManifestError as error:
        return SetAside(name, f"{name}: {error}", "malformed row")
    text = {"text": parts["txt"].strip()} if "txt" in parts else {}
    return {**text, **further, "id": str(further.get("id", name)), "audio": parts.get("audio")}


def hub(
    place: str, name: str = "", split: str = "train", columns: dict[str, str] | None = None
) -> Iterator[Row | SetAside]:
    """Rows of a data set of the Hub. Its audio is held in memory; stream what is large.

    Args:
        place: id on the Hub, "owner/name"; or a folder that `datasets` can load, or has saved (`save_to_disk`).
        name: of its configuration.
        split: of it; "train[:10%]" is possible.
        columns: the schema's name of a column -> the data set's.

    Raises:
        ManifestError: if it cannot be had.
    """
    with _explained(place):
        rows = _saved(place, split) if is_saved(place) else datasets.load_dataset(place, name or None, split=split)
    for number, row in enumerate(undecoded(rows), 1):
        row = renamed(row, columns or {})
        try:
            yield with_seconds(row)
        except ManifestError as error:
            row_name = str(row.get("id") or f"{place}, row {number}")
            yield SetAside(row_name, f"{row_name}: {error}", "malformed row")


def hub_stream(
    place: str, name: str = "", split: str = "train", columns: dict[str, str] | None = None
) -> datasets.IterableDataset:
    """As `hub`, with a shard per file, and rows that are read as they are needed, again and again. What is wrong with a
    row stands in its `set_aside`.

    Raises:
        ManifestError: if it cannot be had, is empty, or lacks the column `audio`.
    """
    with _explained(place):
        rows = undecoded(datasets.load_dataset(place, name or None, split=split, streaming=True))
        if columns:
            known = rows.column_names or list(next(iter(rows.take(1)), {}))
            given = [name for name in columns.values() if name in known]  # not parts of columns
            rows = rows.map(partial(renamed, columns=columns), remove_columns=given)
        rows = rows.map(_with_seconds)
        first = next(iter(rows.take(1)), None)
    if first is None:
        raise ManifestError(f"{place} holds no rows. Give another.")
    if first.get("audio") is None:
        raise ManifestError(
            f"{place} has no column `audio`, but {', '.join(map(repr, first))}. Name it: "
            '--columns \'{"audio": "..."}\'.'
        )
    return rows


def _with_seconds(row: Row) -> Row:
    try:
        return with_seconds(row)
    except ManifestError as error:
        audio = row.get("audio")
        name = row.get("id") or (audio.get("path") if isinstance(audio, dict) else audio)  # its bytes are no name
        return {**row, "set_aside": {"reason": f"{name}: {error}", "kind": "malformed row"}}


def is_saved(place: str) -> bool:
    """Whether `datasets` has saved a data set in this folder, with `save_to_disk`."""
    return any((Path(place) / name).is_file() for name in SAVED)


def _saved(place: str, split: str) -> datasets.Dataset:
    rows = datasets.load_from_disk(place)
    if isinstance(rows, datasets.Dataset):
        return rows
    if split not in rows:
        raise ValueError(f"it has no split {split!r}. Choose from {', '.join(rows)}: `split=...`.")
    return rows[split]


def described_size(place: str, name: str = "", split: str = "train") -> int | None:
    """Rows of a data set of the Hub, as its description says (`None` if it does not), or of a saved one.

    Raises:
        ManifestError: see `hub`.
    """
    with _explained(place):
        if is_saved(place):
            return len(_saved(place, split))
        splits = datasets.load_dataset_builder(place, name or None).info.splits or {}
        return splits[split].num_examples if split in splits else None


@contextmanager
def _explained(place: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of many kinds: the network's, the file system's, Arrow's
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ManifestError(f"{place} cannot be read as a data set of the Hub: {cause}") from error
