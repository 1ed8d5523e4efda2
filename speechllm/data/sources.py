"""The one door to data: `load_source(spec)` gives the rows of any source that can be named in a line or a dict
(`stream_sources.py`: the same as a stream).

    train.jsonl                                     a manifest: .jsonl, .json, .csv, .tsv, .parquet
    recordings                                      a folder: of WebDataset shards (.tar), of manifests (.jsonl or
                                                    .parquet, read one after the other), or of recordings with transcripts
    must-c:/data/MUSTC?split=dev&target_language=de a corpus in its own layout (`corpora/`), with the corpus's options
    hub:owner/name?name=en&split=train              a data set of the Hub

Options after the question mark, or further keys of the dict, are the corpus's own and these, which every source takes:

    columns.text=sentence     the data's own name of a column (dict: "columns": {"text": "sentence"})
    row.language=de           a column that all rows get (dict: "row": {"language": "de"})
    only.task=asr,st          rows whose column has one of these values (dict: "only": {"task": "asr,st"})
    fraction=0.1              a part of the rows, drawn by seed: a smaller one lies in a larger one
    minimum_seconds, maximum_seconds
    weight=2                  in a mixture, see `mixtures.py`
    size=120000               rows of a stream, for a mixture's temperature, where nobody can tell without reading it

A JSON text is a dict too. `docs/data.md` has a table of all corpora and their options.
"""

import inspect
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import yaml

from .checking import Loaded, check_rows, decodable, with_durations
from .corpora.covost import covost, fleurs
from .corpora.generic import METADATA, SAVED, hub, transcribed_folder, webdataset
from .corpora.gigaspeech import gigaspeech
from .corpora.librispeech import librispeech, mls, mls_traits
from .corpora.must_c import must_c, must_she
from .corpora.reading import several
from .corpora.spoken_squad import spoken_squad
from .mixtures import fraction_of
from .schema import ManifestError, Row, SetAside, manifest_rows, open_parquet


Spec = str | dict[str, Any]
CORPORA: dict[str, Callable[..., Iterator[Row | SetAside]]] = {
    "must-c": must_c,
    "must-she": must_she,
    "gigaspeech": gigaspeech,
    "librispeech": librispeech,
    "mls": mls,
    "mls-traits": mls_traits,
    "covost": covost,
    "fleurs": fleurs,
    "spoken-squad": spoken_squad,
    "folder": transcribed_folder,
    "webdataset": webdataset,
    "hub": hub,
}
MANIFESTS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


@dataclass
class Source:
    """A spec, understood. `kind` is a key of `CORPORA` or "manifest"; `options` are the corpus's own."""

    spec: str
    kind: str
    place: str
    options: dict[str, str] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    row: dict[str, Any] = field(default_factory=dict)
    only: dict[str, str] = field(default_factory=dict)
    fraction: float = 1.0
    minimum_seconds: float | None = None
    maximum_seconds: float | None = None
    weight: float = 1.0
    size: float | None = None


def load_source(
    spec: Spec,
    strict: bool = False,
    *,
    columns: dict[str, str] | None = None,
    minimum_seconds: float | None = None,
    maximum_seconds: float | None = None,
    seed: int = 0,
    for_training: bool = True,
    with_audio: bool = True,
) -> Loaded:
    """The rows of a source, and what of it cannot be used.

    Args:
        spec: module docstring.
        strict: decode all audio, and stop at the first thing that cannot be used.
        columns, minimum_seconds, maximum_seconds: where the spec does not say otherwise. With a limit, durations that
            the corpus does not tell are read from the headers of the audio files.
        seed: of the fraction.
        for_training: whether rows without a prompt, or without an answer to learn, are set aside.
        with_audio: whether rows need audio. (With a limit on the duration they do.)

    Raises:
        ManifestError: if there is no such source, it is malformed as a whole, or nothing of it can be used; in strict
            mode, if anything cannot.
    """
    source = parse_spec(spec, columns, minimum_seconds, maximum_seconds)
    limited = source.minimum_seconds is not None or source.maximum_seconds is not None
    with_audio = with_audio or limited
    loaded = check_rows(open_source(source, with_audio), source.spec, strict, for_training, with_audio)
    for look in [with_durations] * limited + [decodable] * (strict and with_audio):
        again = check_rows(look(loaded.rows), source.spec, strict, for_training)
        loaded = Loaded(again.rows, loaded.set_aside + again.set_aside)
    rows = [row for row in loaded.rows if within_limits(row, source.minimum_seconds, source.maximum_seconds)]
    if not rows:
        raise ManifestError(f"{source.spec}: no row is within the limits on the duration. Widen them.")
    loaded.left_out, loaded.rows = len(loaded.rows) - len(rows), fraction_of(rows, source.fraction, seed)
    return loaded


def within_limits(row: Row, minimum_seconds: float | None, maximum_seconds: float | None) -> bool:
    """Whether the row's duration, where it is known, is within the limits."""
    seconds = row.get("duration")
    return not seconds or (minimum_seconds or 0) <= seconds <= (maximum_seconds or float("inf"))


def open_source(source: Source, with_audio: bool = True) -> Iterator[Row | SetAside]:
    """The rows of a source, unchecked, as they are read. `with_audio=False` reads rows of text, which need no audio.

    Raises:
        ManifestError: see `load_source`.
    """
    if source.kind == "manifest":
        rows = manifest_rows(source.place, source.columns, with_audio=with_audio)
    elif source.kind == "manifests":
        files = manifest_files(Path(source.place))
        rows = (row for file in files for row in manifest_rows(file, source.columns, source.place, with_audio))
    else:
        named = {"columns": source.columns} if source.columns else {}
        place = source.place if source.kind == "hub" else Path(source.place)
        rows = CORPORA[source.kind](place, **source.options, **named)
    for row in rows:
        if isinstance(row, SetAside) or wanted(row := {**row, **source.row}, source.only):
            yield row


def manifest_files(folder: Path) -> list[Path]:
    """The manifests in a folder. Of Parquet files, programs that write in parallel leave some without rows, which are left
    out unless there are no others.

    Raises:
        ManifestError: if a Parquet file is none.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".jsonl", ".parquet"))
    return [path for path in files if path.suffix != ".parquet" or open_parquet(path).metadata.num_rows] or files


def wanted(row: Row, only: dict[str, str]) -> bool:
    """Whether the row's columns have the values asked for."""
    return all(
        str(row.get(name) or ("asr" if name == "task" else "")) in several(values) for name, values in only.items()
    )


def parse_spec(
    spec: Spec,
    columns: dict[str, str] | None = None,
    minimum_seconds: float | None = None,
    maximum_seconds: float | None = None,
) -> Source:
    """A spec as a `Source`; the further arguments hold where it does not say otherwise.

    Raises:
        ManifestError: if there is no such source, or it has no such option.
    """
    given = _as_dict(spec)
    text = given.pop("source", None)
    if not isinstance(text, str) or not text:
        raise ManifestError(f"{spec!r} has no `source`. Give a path, `NAME:FOLDER`, or a dict with `source`.")
    shown = text if isinstance(spec, dict) or spec.lstrip().startswith("{") else spec
    kind, place = _kind_and_place(text)
    known = [*inspect.signature(CORPORA[kind]).parameters][1:] if kind in CORPORA else ["columns"]
    found = Source(shown, kind, place, columns=dict(columns or {}) if "columns" in known else {})
    found.minimum_seconds, found.maximum_seconds = minimum_seconds, maximum_seconds
    for name, value in given.items():
        head, _, tail = name.partition(".")
        if name in ("columns", "row", "only") and isinstance(value, dict):
            getattr(found, name).update(value)
        elif head in ("columns", "row", "only"):
            if not tail:
                raise ManifestError(f"{shown}: `{head}` is {value!r}. Name a column: {head}.text=..., or give a dict.")
            getattr(found, head)[tail] = value
        elif name in ("fraction", "weight", "size", "minimum_seconds", "maximum_seconds"):
            setattr(found, name, _number(value, name, shown))
        else:
            found.options[name] = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    if not 0 < found.fraction <= 1:
        raise ManifestError(f"{shown}: the fraction is {found.fraction:g}; it must be above 0 and at most 1.")
    for name in ("weight", "size"):
        if (value := getattr(found, name)) is not None and not 0 < value < float("inf"):
            raise ManifestError(f"{shown}: the {name} is {value:g}; it must be above 0.")
    if unknown := [name for name in found.options if name not in known]:
        raise ManifestError(f"{shown}: there is no option `{unknown[0]}`. {kind} takes: {', '.join(known) or 'none'}.")
    if found.columns and "columns" not in known:
        raise ManifestError(f"{shown}: `columns` is for data of your own; {kind} has its own names. Leave it out.")
    if required := [
        name
        for name, parameter in inspect.signature(CORPORA.get(kind, hub)).parameters.items()
        if parameter.default is parameter.empty and name not in ("folder", "place") and name not in found.options
    ]:
        raise ManifestError(f"{shown}: {kind} needs the option `{required[0]}`.")
    return found


def _as_dict(spec: Spec) -> dict[str, Any]:
    if isinstance(spec, dict):
        return dict(spec)
    if spec.lstrip().startswith("{"):
        try:
            return dict(json.loads(spec))
        except ValueError as error:
            raise ManifestError(f"{spec} is not JSON: {error}. Correct it.") from None
    if Path(spec).exists():  # a question mark may be part of a name
        return {"source": spec}
    text, _, options = spec.partition("?")
    return {"source": text, **dict(parse_qsl(options, keep_blank_values=True))}


def _kind_and_place(text: str) -> tuple[str, str]:
    path = Path(text)
    if path.is_file():
        return ("webdataset" if path.suffix == ".tar" else "manifest"), text
    if path.is_dir():
        if any((path / name).is_file() for name in METADATA):
            return "folder", text
        if any((path / name).is_file() for name in SAVED):
            return "hub", text
        inside = {file.suffix for file in path.rglob("*")}
        kind = "webdataset" if ".tar" in inside else "manifests" if inside & {".jsonl", ".parquet"} else "folder"
        return kind, text
    name, colon, place = text.partition(":")
    if colon and name in CORPORA:
        return name, place
    if colon and not os.path.dirname(name):
        raise ManifestError(f"{text}: there is no corpus {name!r}. Choose from {', '.join(CORPORA)}.")
    if path.suffix.lower() in MANIFESTS:
        return "manifest", text  # which says what is missing
    raise ManifestError(f"{text}: there is no such manifest or folder. A data set of the Hub is `hub:{text}`.")


def _number(value: Any, name: str, spec: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ManifestError(f"{spec}: `{name}` is {value!r}; it must be a number.") from None


def read_specs(values: list[Spec]) -> list[Spec]:
    """The specs, with those of YAML files (`mixture.yaml`, a list of specs) in the files' places.

    Raises:
        ManifestError: if a file is not such a list.
    """
    specs: list[Spec] = []
    for value in values:
        if not isinstance(value, str) or not value.endswith((".yaml", ".yml")):
            specs.append(value)
            continue
        try:
            found = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ManifestError(f"{value} cannot be read as YAML: {' '.join(str(error).split())}") from None
        if not isinstance(found, list) or not all(isinstance(spec, str | dict) for spec in found) or not found:
            raise ManifestError(f"{value} must hold a list of sources, each a line or a mapping with `source`.")
        specs += found
    return specs


__all__ = [
    "CORPORA",
    "Loaded",
    "Source",
    "Spec",
    "load_source",
    "open_source",
    "parse_spec",
    "read_specs",
]
