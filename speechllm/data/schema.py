"""The one data schema. A row is a dict:

    audio     path, bytes, array, tensor, or a dict of `audio_speechllm.py`, e.g.
              {"path", "offset", "duration"}: seconds of a long recording        required
    text      transcript                                                         required for pretraining
    target    what the model is to answer; default: the transcript
    prompt    the instruction beside the audio; default: by task, see `prompts.py`
    task      "asr" (default), "st", "sqa", "traits", or any other with a `prompt`
    question  of "sqa", which may have several acceptable `answers`; `target` is the first
    trait     of "traits", e.g. "gender", with its `choices`; `target` is one of them
    gender_terms  of "st": words whose gender is judged, see `gender_pairs`      optional
    words     times of the transcript's words, see `forced_alignment.py`         required for mixed speech-text pretraining
    id, language, target_language, duration, ... and labels for probes           optional
    source    corpus it is from, and `license` its licence: for the model card   optional

Labels for probes: `speaker`, `gender` ("female", "male"), `rate`, `snr_db` (absent: clean), `reverberation` (RT60 in
seconds, absent: none). Languages are codes ("de"); a `target_language` may also be a name.

Rows come from a manifest (JSON Lines, JSON, CSV, TSV or Parquet) or are made by a corpus function; `sources.py` is the door
to all of them, `stream_sources.py` for those that are not held as a whole.
"""

import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.features.features import require_decoding, require_storage_embed
from pyarrow import ArrowException
from pyarrow.parquet import ParquetFile


Row = dict[str, Any]
GenderTerms = str | Sequence[Sequence[str]]
TEXTS = ("text", "target", "question", "prompt")  # columns
LISTS = ("answers", "choices")  # columns of lists of texts
BROKEN = "broken file"  # kind of what is set aside


class ManifestError(ValueError):
    """A manifest that cannot be read; the message names the file, the line, the cause and the remedy."""


@dataclass(frozen=True)
class SetAside:
    """An utterance that cannot be used. Training goes on without it and lists it at the end.

    Attributes:
        id: of the row, or the place where it stands.
        reason: a sentence that names the item, the cause and the remedy.
        kind: the cause alone, to count by.
    """

    id: str
    reason: str
    kind: str = "unusable"


def with_target(row: Row) -> Row:
    """The row with a list of `answers`, for which one answer or SQuAD's dictionary may stand, and the first as `target`.
    Numbers stand for texts too: JSON has 42 where a transcript or an answer is "42"."""
    row = {**row, **{name: _text(row[name]) for name in TEXTS if name in row}}
    if isinstance(answers := row.get("answers"), dict):
        row["answers"] = answers = answers.get("text")
    if isinstance(answers, str | int | float):
        row["answers"] = [answers]
    for name in LISTS:
        if isinstance(values := row.get(name), list | tuple | np.ndarray):
            row[name] = [text for text in map(_text, values) if text != ""]
    answers = row.get("answers")
    return {**row, "target": answers[0]} if isinstance(answers, list) and answers and not row.get("target") else row


def _text(value: Any) -> Any:
    return str(value) if type(value) in (int, float) else value


def gender_pairs(terms: GenderTerms | None) -> list[tuple[str, str]]:
    """Right and wrong form of each gender-marked word of a reference, lower-cased.

    Args:
        terms: as in MuST-SHE's column GENDERTERMS, "right wrong;right wrong", or pairs.

    Raises:
        ValueError: if they are not pairs.
    """
    split = [part.split() for part in terms.split(";") if part.strip()] if isinstance(terms, str) else terms or []
    pairs = isinstance(split, list | tuple) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in split)
    if not pairs or not all(isinstance(form, str) for pair in split for form in pair):
        raise ValueError(f"The gender terms {terms!r} are not pairs. Write 'right wrong;right wrong'.")
    return [(right.lower(), wrong.lower()) for right, wrong in split]


def unusable(row: Row, problem: Callable[[Row], str | None]) -> SetAside | None:
    """The row, if it has no audio or a stage of training has a `problem` with it."""
    if row.get("audio") is None:
        return SetAside(row["id"], f"{row['id']} has no `audio`. Give it one.", "no audio")
    reason = problem(row)
    return SetAside(row["id"], reason, "lacks what this training needs") if reason else None


def load_rows(path: str | os.PathLike, columns: dict[str, str] | None = None) -> list[Row]:
    """Read a manifest; relative audio paths are relative to its folder.

    Args:
        path: a `.jsonl`, `.json` (a list of rows), `.csv`, `.tsv` or `.parquet` file with at least the column `audio`
            (a path, or a dict of `audio_speechllm.py`). A column `offset` makes it a segment of `duration` seconds.
        columns: the schema's name of a column -> the file's own, where they differ.

    Raises:
        ManifestError: if the file is missing, of another kind, malformed, empty, or lacks the column `audio`.
    """
    rows = []
    for row in manifest_rows(path, columns):
        if isinstance(row, SetAside):
            raise ManifestError(row.reason)
        rows.append(with_target(row))
    return with_ids(rows)


def manifest_rows(
    path: str | os.PathLike,
    columns: dict[str, str] | None = None,
    folder: str | os.PathLike | None = None,
    with_audio: bool = True,
) -> Iterator[Row | SetAside]:
    """As `load_rows`, row by row: one that is malformed comes as a `SetAside`, and the rest follows. Audio paths are
    relative to `folder`; default: the manifest's. `with_audio=False` reads rows of text, which need no audio.

    Raises:
        ManifestError: if the file is missing, of another kind, not to be read to its end, or empty.
    """
    path = Path(path)
    if not path.is_file():
        raise ManifestError(f"{path}: there is no such manifest. Give a .jsonl, .json, .csv, .tsv or .parquet file.")
    readers = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".parquet": _read_parquet,
    }
    if path.suffix.lower() not in readers:
        raise ManifestError(f"{path} is not a manifest: use one of {', '.join(readers)}.")
    empty = True
    try:
        for place, row in readers[path.suffix.lower()](path):
            empty = False
            try:
                here = path.parent if folder is None else folder
                yield (
                    row
                    if isinstance(row, SetAside)
                    else _checked(_filled(renamed(row, columns or {})), path, place, here, with_audio)
                )
            except ManifestError as error:
                yield SetAside(f"{path}, {place}", str(error), "malformed row")
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror or error}. Check its permissions.") from None
    if empty:
        raise ManifestError(f"{path} holds no rows. Add some, or give another manifest.")


def renamed(row: Row, columns: dict[str, str]) -> Row:
    """The row with the schema's names of those columns that it has; what had such a name before gives way. A part of a column
    is named `column.part`, and so on inwards."""
    if not isinstance(row, dict):
        return row
    others = {name: value for name, value in row.items() if name not in columns.values()}
    values = {name: _part(row, their) for name, their in columns.items()}
    return {**others, **{name: value for name, value in values.items() if value is not _MISSING}}


def _filled(row: Any) -> Any:
    """The row without empty columns: after renaming, as what is empty in the column that was meant is in no other."""
    return {name: value for name, value in row.items() if value is not None} if isinstance(row, dict) else row


_MISSING = object()


def _part(row: Any, name: str) -> Any:
    """`row["a.b"]`, or else `row["a"]["b"]`."""
    if not isinstance(row, dict):
        return _MISSING
    if name in row:
        return row[name]
    head, dot, tail = name.partition(".")
    if not dot or head not in row:
        return _MISSING
    return None if row[head] is None else _part(row[head], tail)


def _checked(row: Any, path: Path, place: str, folder: str | os.PathLike, with_audio: bool = True) -> Row:
    audio = row.get("audio") if isinstance(row, dict) else None
    samples = isinstance(audio, list) and audio and isinstance(audio[0], int | float)
    if with_audio and not samples and (not isinstance(audio, str | dict | bytes) or not audio):
        others = ", ".join(map(repr, row)) if isinstance(row, dict) and "audio" not in row else ""
        hint = f" If it is one of {others}, name it: columns.audio=..." if others else ""
        raise ManifestError(f"{path}, {place}: there is no `audio`. Every row needs one (a path).{hint}")
    if not isinstance(row, dict):
        raise ManifestError(f"{path}, {place} is a {type(row).__name__}, not an object with columns.")
    if undecodable := [name for name, value in row.items() if isinstance(value, str) and not_utf8(value)]:
        raise ManifestError(f"{path}, {place}: `{undecodable[0]}` is not UTF-8. Save the file as such.")
    try:
        row = _segmented(_with_lists(row))
    except ManifestError as error:
        raise ManifestError(f"{path}, {place}: {error}") from None
    return {**row, "audio": located_audio(row["audio"], folder)} if audio else row


def _with_lists(row: Row) -> Row:
    """The row with lists for texts with "|" between them, as CSV writes a list."""
    texts = {name: row[name].split("|") for name in LISTS if isinstance(row.get(name), str)}
    return {**row, **texts}


def with_seconds(row: Row, names: Sequence[str] = ("duration",)) -> Row:
    """The row with numbers in these columns.

    Raises:
        ManifestError: if one of them is no number.
    """
    for name in names:
        if row.get(name) is not None:
            try:
                row = {**row, name: float(row[name])}
            except (TypeError, ValueError):
                raise ManifestError(f"the {name} is {row[name]!r}. Give seconds, or leave it out.") from None
    return row


def _segmented(row: Row) -> Row:
    """The row with numbers for `duration` and `offset`, which become part of its audio if it is a part of a recording.

    Raises:
        ManifestError: if one of them is no number.
    """
    row = with_seconds(row, ("duration", "offset"))
    if row.get("offset") is None or not row.get("audio"):
        return row
    audio = row["audio"]
    if isinstance(audio, list):
        raise ManifestError("there is an `offset`, but the audio is samples. Cut them, and leave it out.")
    if not isinstance(audio, dict):
        audio = {"bytes" if isinstance(audio, bytes) else "path": audio}
    audio = {**audio, "offset": row["offset"], "duration": row.get("duration")}
    return {**{name: value for name, value in row.items() if name != "offset"}, "audio": audio}


def located_audio(audio: Any, folder: str | os.PathLike) -> Any:
    """The audio with its paths relative to `folder`."""
    if isinstance(audio, str):
        return os.path.join(folder, audio)
    if isinstance(audio, dict) and audio.get("parts"):
        return {**audio, "parts": [located_audio(part, folder) for part in audio["parts"]]}
    if isinstance(audio, dict) and audio.get("bytes") is None and isinstance(audio.get("path"), str):
        return {**audio, "path": os.path.join(folder, audio["path"])}
    return audio


def audio_paths(audio: Any) -> list[str]:
    """The files that the audio is in; none if it is in memory."""
    if isinstance(audio, str | os.PathLike):
        return [str(audio)]
    if isinstance(audio, dict) and audio.get("parts"):
        return [path for part in audio["parts"] for path in audio_paths(part)]
    held = isinstance(audio, dict) and (audio.get("bytes") is None and audio.get("array") is None)
    return [str(audio["path"])] if held and audio.get("path") else []


def not_utf8(text: str) -> bool:
    """Whether bytes that are not UTF-8 were read as lone surrogates (`errors="surrogateescape"`)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def with_ids(rows: Iterable[Row]) -> list[Row]:
    """The rows as a list, each with an `id` that no other has: its own, its audio's path, or its place, and a number
    behind it where several rows would have the same (one recording with several questions)."""
    named, taken = [], Counter()
    for i, row in enumerate(rows):
        paths = audio_paths(row.get("audio"))
        name = (paths[0] if paths else f"row {i}") if row.get("id") in (None, "") else str(row["id"])
        taken[name] += 1
        while taken[name] > 1:
            name = f"{name} #{taken[name]}"
            taken[name] += 1
        named.append({**row, "id": name})
    return named


def undecoded(rows: Any) -> Any:
    """The rows of a `datasets` data set, whose audio columns give bytes and paths, for the processor to decode (`datasets`
    would want torchcodec and FFmpeg's libraries), and whose classes have their names; anything else as it is."""
    features = getattr(rows, "features", None) or {}
    for name, feature in features.items():
        if isinstance(feature, datasets.Audio) and feature.decode:
            rows = rows.cast_column(name, datasets.Audio(sampling_rate=feature.sampling_rate, decode=False))
    classes = _classes(features)
    if not classes:
        return rows
    if isinstance(rows, datasets.IterableDataset):
        named = datasets.Features({**rows.features, **dict.fromkeys(classes, datasets.Value("string"))})
        return rows.map(partial(_with_class_names, classes=classes), features=named)
    return (_with_class_names(row, classes) for row in rows)


def _classes(features: dict[str, Any]) -> dict[str, datasets.ClassLabel]:
    return {name: feature for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)}


def _with_class_names(row: Row, classes: dict[str, datasets.ClassLabel]) -> Row:
    """-1 is `datasets`' number of what has no class."""
    numbers = {name: row[name] for name in classes}
    return row | {
        name: None if number is None or number < 0 else classes[name].int2str(number)
        for name, number in numbers.items()
    }


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                place = f"line {number}"
                try:
                    yield place, json.loads(line)
                except json.JSONDecodeError as error:
                    reason = f"{path}, {place} is not JSON ({error}). Correct or remove it."
                    yield place, SetAside(f"{path}, {place}", reason, "malformed row")


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}). Save it as such.") from None
    except json.JSONDecodeError as error:
        raise ManifestError(f"{path} is not JSON ({error}). Correct it.") from None
    if not isinstance(rows, list):
        raise ManifestError(f"{path} holds a {type(rows).__name__}, not a list of rows.")
    yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        # Tab-separated files know no quotation marks: one at the start of a transcript is part of it.
        options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix.lower() == ".tsv" else {"strict": True}
        reader = csv.DictReader(file, **options)
        try:
            _ = reader.fieldnames  # reads the first line
        except csv.Error as error:
            raise ManifestError(f"{path}, line 1: {error}. Correct it.") from None
        while True:
            begin = reader.reader.line_num
            try:
                row = next(reader, None)
            except csv.Error as error:
                end = reader.reader.line_num
                if end - begin > 1:  # a quotation mark that nothing closes has taken rows with it
                    reason = f"{path}, lines {begin + 1} to {end}: {error}. Correct the first."
                    raise ManifestError(reason) from None
                place = f"line {end}"
                yield place, SetAside(f"{path}, {place}", f"{path}, {place}: {error}. Correct it.", "malformed row")
                continue
            if row is None:
                return
            place = f"line {reader.line_num}"
            if None in row:
                reason = f"{path}, {place} has more fields than the first line names. Correct the line."
                yield place, SetAside(f"{path}, {place}", reason, "malformed row")
            else:
                yield place, {name: value or None for name, value in row.items()}


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    """Of a file that is broken in the middle, the other groups of rows are read."""
    file = open_parquet(path)
    features = _described(file)
    classes = _classes(features)
    coded = {name: feature for name, feature in features.items() if require_decoding(feature)}
    coded = datasets.Features({name: feature for name, feature in coded.items() if not require_storage_embed(feature)})
    end = 0
    for group in range(file.num_row_groups):
        number, end = end, end + file.metadata.row_group(group).num_rows
        try:
            for batch in file.iter_batches(100, row_groups=[group]):
                for i in range(len(batch)):
                    number += 1
                    place = f"row {number}"
                    try:
                        row = batch.slice(i, 1).to_pylist()[0]
                        row |= coded.decode_example({name: row[name] for name in coded})
                        row = _with_class_names(row, classes)
                    except (ValueError, OverflowError) as error:  # text that is not UTF-8, a class without a name
                        row = SetAside(f"{path}, {place}", f"{path}, {place}: {error}. Correct it.", "malformed row")
                    yield place, row
        except (ArrowException, OSError) as error:
            place = f"rows {number + 1} to {end}"
            reason = f"{path}, {place} cannot be read ({error}). Write the file again."
            yield place, SetAside(f"{path}, {place}", reason, BROKEN)


def open_parquet(path: str | os.PathLike) -> ParquetFile:
    """A Parquet file, to be read a little at a time: rows may hold audio.

    Raises:
        ManifestError: if it is none, or cannot be opened.
    """
    try:
        return ParquetFile(path, pre_buffer=False, buffer_size=2**20)
    except (ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise ManifestError(f"{path} cannot be read: {os.strerror(error.errno)}. Check its permissions.") from None
        raise ManifestError(f"{path} is not a Parquet file that can be read ({error}). Write it again.") from None


def _described(file: ParquetFile) -> dict[str, Any]:
    """The features that `datasets` has noted in a file that it wrote, if it still understands them."""
    try:
        noted = b"huggingface" in (file.schema_arrow.metadata or {})
        return datasets.Features.from_arrow_schema(file.schema_arrow) if noted else {}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
