"""Sources as streams: `stream_source(spec)` takes what `sources.load_source` takes, and never holds it as a whole.

What needs to know all rows is decided row by row instead:

* a fraction: by a hash of the seed and of what the row is called, its id or else its audio, so a row is in or out
  whatever its place, its shard, and who reads it; 10% lie in 20%. The share is kept on average: of n rows, fraction f
  takes f n, give or take sqrt(f (1 - f) n).
* whether a row can be used: when its turn comes (`streaming.py`).

How many rows there are, which a mixture's temperature asks, is read from Parquet footers or the Hub's description, or
counted; see `stream_size`.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets

from ..audio_speechllm import AudioError
from .checking import duration_of
from .corpora.generic import described_size, hub_stream, is_saved, shards
from .feature_cache import audio_key
from .mixtures import PACKED, pack
from .schema import BROKEN, ManifestError, Row, SetAside, audio_paths, manifest_rows, open_parquet
from .sources import Source, Spec, manifest_files, open_source, parse_spec, wanted, within_limits


LOOKED_AT = 100  # rows of a file of a manifest, before it is read as a stream


def stream_source(
    spec: Spec,
    columns: dict[str, str] | None = None,
    minimum_seconds: float | None = None,
    maximum_seconds: float | None = None,
    packed: bool = False,
    fraction: float = 1.0,
    seed: int = 0,
) -> datasets.IterableDataset:
    """The rows of a source as a stream, checked when they are read (`data/streaming.py`). Parquet and JSON Lines files,
    WebDataset shards and data sets of the Hub have a shard per file; anything else is one.

    Args:
        spec, columns, minimum_seconds, maximum_seconds: see `load_source`.
        packed: as `mixtures.interleaved` takes them.
        fraction: of the source, or of the fraction of it that the spec names.
        seed: of the fraction.

    Raises:
        ManifestError: if there is no such source, or it has no row.
    """
    source = parse_spec(spec, columns, minimum_seconds, maximum_seconds)
    source.fraction *= fraction
    folder = source.place if os.path.isdir(source.place) else os.path.dirname(source.place)
    folder = folder if os.path.exists(source.place) else None
    if source.kind == "hub" and not is_saved(source.place):
        rows = hub_stream(source.place, columns=source.columns or None, **source.options)
        rows = rows.map(partial(_with_columns, added=source.row)) if source.row else rows
        names = [*next(iter(rows.take(1)), {})] if packed else []  # of a typed file: all rows have them
        if source.only or source.fraction < 1 or (source.minimum_seconds, source.maximum_seconds) != (None, None):
            rows = rows.filter(partial(_kept, source=source, folder=folder, seed=seed))
        return rows.map(pack, remove_columns=names, features=PACKED) if packed else rows
    # `datasets` would give all files the columns of the first, and end at the first row that is malformed.
    sources = [json.dumps({**asdict(source), "place": str(path)}, default=str) for path in _files(source)]
    if source.kind in ("manifest", "manifests"):
        _look_into(sources, folder)
    else:  # errors of the source as a whole, now and not in a worker
        next(_opened(Source(**json.loads(sources[0])), folder), None)
    return datasets.IterableDataset.from_generator(
        _generated,
        features=PACKED if packed else None,
        gen_kwargs={"sources": sources, "folder": folder, "seed": seed, "packed": packed},
    )


def _files(source: Source) -> list[Path]:
    """What are shards of the stream: the files of a folder of manifests or of WebDataset shards, or the place itself."""
    place = Path(source.place)
    if source.kind == "manifests":
        return manifest_files(place)
    return (source.kind == "webdataset" and shards(place)) or [place]


def _opened(source: Source, folder: str | None) -> Iterator[Row | SetAside]:
    """The rows of a source, or of one file of a folder of manifests."""
    if source.kind == "manifests":
        return manifest_rows(source.place, source.columns, folder)
    return manifest_rows(source.place, source.columns) if source.kind == "manifest" else open_source(source)


def _look_into(sources: list[str], folder: str | None) -> None:
    """
    Raises:
        ManifestError: if a file cannot be read or is empty, or no row that stands early in one of them can be used.
    """
    aside, usable = [], False
    for text in sources:
        source = Source(**json.loads(text))
        if usable and source.place.endswith(".parquet"):  # its footer is read, and its first rows may be long
            continue
        for row in islice(_opened(source, folder), 1 if usable else LOOKED_AT):
            usable = usable or not isinstance(row, SetAside)
            if usable:
                break
            aside.append(row)
    if not usable:
        raise ManifestError(f"None of the first {len(aside)} row(s) can be used. {aside[0].reason}")


def _generated(sources: list[str], folder: str | None, seed: int, packed: bool = False) -> Iterator[Row]:
    for text in sources:
        source = Source(**json.loads(text))
        for row in _until_broken(source, folder):
            if isinstance(row, SetAside):
                row = {"id": row.id, "set_aside": {"reason": row.reason, "kind": row.kind}}
            else:
                row = _with_columns(row, source.row)
            if _kept(row, source, folder, seed):
                yield pack(row) if packed else row


def _until_broken(source: Source, folder: str | None) -> Iterator[Row | SetAside]:
    """The rows of a file, and what prevents reading it further: a file that breaks must not end a run of many hours.

    Raises:
        ManifestError: if a part of a corpus is not there.
    """
    try:
        yield from _opened(source, folder)
    except ManifestError as error:
        if source.kind not in ("manifest", "manifests", "webdataset"):
            raise
        yield SetAside(source.place, str(error), BROKEN)


def _with_columns(row: Row, added: dict[str, Any]) -> Row:
    return {**row, **added}


def _kept(row: Row, source: Source, folder: str | None, seed: int) -> bool:
    """Whether the source's options leave the row in. What is set aside has no columns to choose it by, and a part that
    is broken is in every fraction."""
    if (row.get("set_aside") or {}).get("kind") == BROKEN:
        return True
    if source.fraction < 1 and not in_part(row_name(row, folder), source.fraction, seed):
        return False
    limits = (source.minimum_seconds, source.maximum_seconds)
    return "set_aside" in row or (wanted(row, source.only) and _within_limits_by_its_audio(row, *limits))


def in_part(name: str, fraction: float, seed: int = 0) -> bool:
    """Whether a row of this name is in this fraction: 64 bits of a hash of name and seed, as a number from 0 to 1, are
    below it."""
    digest = hashlib.blake2b(f"fraction {seed} {name}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def row_name(row: Row, folder: str | None = None) -> str:
    """What a row is told from others by: its id; else its audio, a file (as seen from `folder`, so that the data may be
    moved) with the segment of it, or the content of what is in memory; else its text."""
    if row.get("id") not in (None, ""):
        return str(row["id"])
    audio = row.get("audio")
    parts = audio["parts"] if isinstance(audio, dict) and audio.get("parts") else [audio]
    with suppress(AudioError):  # it is for the reader of the stream to set aside
        if audio is not None:
            return " + ".join(_audio_name(part, folder) for part in parts)
    return str(row.get("text"))


def _audio_name(audio: Any, folder: str | None) -> str:
    paths = audio_paths(audio)
    if not paths:
        return audio_key(audio)
    place = paths[0] if folder is None else os.path.relpath(paths[0], folder or ".")
    segment = [audio.get(name) for name in ("offset", "duration", "byte_offset")] if isinstance(audio, dict) else []
    return " ".join(str(part) for part in [place, *segment] if part is not None)


def _within_limits_by_its_audio(row: Row, minimum_seconds: float | None, maximum_seconds: float | None) -> bool:
    """As `within_limits`, with the duration of the audio's header where there are limits and the row tells none."""
    limits = (minimum_seconds, maximum_seconds)
    if limits != (None, None) and not row.get("duration") and row.get("audio") is not None:
        with suppress(AudioError):  # the reader of the stream sets such a row aside, and says why
            row = {**row, "duration": duration_of(row["audio"], row.get("sampling_rate"))}
    return within_limits(row, *limits)


def stream_size(spec: Spec, columns: dict[str, str] | None = None) -> float:
    """How many rows a source has, limits on the duration aside: its `size`, or what Parquet footers or the description of
    a data set of the Hub say, or as many as tables (JSON Lines, CSV, corpora) are found to have; times its fraction.

    Raises:
        ManifestError: if nobody can tell without reading the audio too.
    """
    source = parse_spec(spec, columns)
    size = source.size or _known_size(source)
    if not size:
        raise ManifestError(
            f"{source.spec}: how many rows it has cannot be told without reading all of it, and mixture_temperature "
            "depends on it. Give the number as the source's option `size`, or leave out mixture_temperature and give "
            "each source its share as `weight`."
        )
    return size * source.fraction


def _known_size(source: Source) -> int | None:
    files = _files(source)
    if all(path.suffix == ".parquet" for path in files):
        return None if source.only else sum(open_parquet(path).metadata.num_rows for path in files)
    if source.kind == "hub":
        return None if source.only else described_size(source.place, **source.options)
    if source.kind == "webdataset":
        return None
    return sum(not isinstance(row, SetAside) for row in open_source(source))
