"""LibriSpeech (https://www.openslr.org/12) and Multilingual LibriSpeech (https://www.openslr.org/94): read books.

LibriSpeech/SPEAKERS.TXT                                ID | SEX | SUBSET | MINUTES | NAME
LibriSpeech/train-clean-100/19/198/19-198.trans.txt     "19-198-0000 NORTHANGER ABBEY"
LibriSpeech/train-clean-100/19/198/19-198-0000.flac

mls_german/metainfo.txt                                 SPEAKER | GENDER | PARTITION | MINUTES | BOOK ID | ...
mls_german/train/transcripts.txt                        "10087_10388_000000<tab>und da ..."
mls_german/train/segments.txt                           the same id, address of the recording, start, end
mls_german/train/audio/10087/10388/10087_10388_000000.flac (or .opus)
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..schema import ManifestError, Row, SetAside, not_utf8
from .reading import (
    MALFORMED,
    Line,
    choice,
    comma_table,
    line_not_utf8,
    malformed,
    need_folder,
    several,
    table,
    text_lines,
)


MLS_LANGUAGES = {
    "dutch": "nl", "english": "en", "french": "fr", "german": "de", "italian": "it", "polish": "pl", "portuguese": "pt",
    "spanish": "es",
}  # fmt: skip
GENDERS = {"F": "female", "M": "male"}

# Trait -> its column in the speaker descriptions of Parler-TTS.
TRAITS = {
    "gender": "gender",
    "rate": "speaking_rate",
    "noise": "noise",
    "reverberation": "reverberation",
    "monotony": "speech_monotony",
    "quality": "pesq_speech_quality",
    "sdr_noise": "sdr_noise",
    "pitch": "pitch",
}


def librispeech(folder: Path, split: str = "train-clean-100", case: str = "lower") -> Iterator[Row | SetAside]:
    """Rows of LibriSpeech.

    Args:
        folder: `LibriSpeech`, or what holds it.
        split: folders of it, "dev-clean,dev-other".
        case: "lower" for transcripts in lower case (LLMs know few words in capitals), "upper" as they are.
    """
    folder = folder / "LibriSpeech" if (folder / "LibriSpeech").is_dir() else folder
    choice(case, "case", ["lower", "upper"])
    speakers = folder / "SPEAKERS.TXT"
    genders = _genders(text_lines(speakers)) if speakers.is_file() else {}
    for name in several(split):
        found = sorted(need_folder(folder / name, f"split {name!r} of LibriSpeech").rglob("*.trans.txt"))
        if not found:
            raise ManifestError(f"{folder / name} holds no *.trans.txt. Unpack the split again.")
        listed: set[str] = set()
        for transcript in found:
            for line in text_lines(transcript, escaped=True):
                utterance, _, text = line.partition(" ")
                listed.add(utterance)
                if not_utf8(line):
                    yield line_not_utf8(utterance, transcript)
                elif line:
                    speaker = utterance.partition("-")[0]
                    yield {
                        "id": utterance,
                        "audio": str(transcript.parent / f"{utterance}.flac"),
                        "text": text.lower() if case == "lower" else text,
                        "task": "asr",
                        "language": "en",
                        "speaker": speaker,
                        **({"gender": genders[speaker]} if speaker in genders else {}),
                        "source": "LibriSpeech",
                        "license": "cc-by-4.0",
                    }
        yield from _unlisted(folder / name, listed, "*.trans.txt")


def _unlisted(folder: Path, listed: set[str], transcripts: str) -> Iterator[SetAside]:
    """The recordings below `folder` that no line of the transcripts names."""
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".flac", ".opus")):
        if path.stem not in listed:
            reason = f"{path} has no line that can be read in {transcripts}. Unpack the transcripts again, or remove the recording."
            yield SetAside(path.stem, reason, "no transcript")


def _genders(lines: list[Line]) -> dict[str, str]:
    """Speaker -> gender, of lines "14 | F | train-clean-360 | ..."."""
    fields = [[part.strip() for part in line.split("|")] for line in lines if isinstance(line, str) and "|" in line]
    return {parts[0]: GENDERS[parts[1]] for parts in fields if parts[1] in GENDERS}


def mls(folder: Path, split: str = "train", language: str = "") -> Iterator[Row | SetAside]:
    """Rows of Multilingual LibriSpeech.

    Args:
        folder: `mls_german` (or `mls_german_opus`), or what holds several of these.
        split: "train", "dev" or "test".
        language: codes, "de,fr"; default: every one that is there.
    """
    for code, language_folder in _mls_folders(folder, language).items():
        for line, row in _mls_rows(language_folder, split, code):
            yield line if row is None else row


def _mls_folders(folder: Path, language: str) -> dict[str, Path]:
    """Code of a language -> its folder."""
    need_folder(folder, "Multilingual LibriSpeech")
    found = {}
    for path in sorted([folder, *folder.iterdir()]):
        parts = path.name.split("_")
        if parts[0] == "mls" and "lm" not in parts and len(parts) > 1 and parts[1] in MLS_LANGUAGES:
            found.setdefault(MLS_LANGUAGES[parts[1]], path)
    wanted = [choice(code, f"{folder}: language", [*found]) for code in several(language)] or [*found]
    if not wanted:
        raise ManifestError(f"{folder} holds no `mls_LANGUAGE`. Give the folder that it was unpacked to.")
    return {code: found[code] for code in wanted}


def _mls_rows(folder: Path, split: str, code: str) -> Iterator[tuple[SetAside | None, Row | None]]:
    here = need_folder(folder / split, f"split {split!r} of Multilingual LibriSpeech")
    speakers = folder / "metainfo.txt"
    genders = _genders(text_lines(speakers)) if speakers.is_file() else {}
    listed: set[str] = set()
    for line in table(here / "transcripts.txt", ("id", "text"), escaped=True):
        if isinstance(line, SetAside):
            yield line, None
            continue
        listed.add(line["id"])
        if not_utf8(line["text"]):
            yield line_not_utf8(line["id"], here / "transcripts.txt"), None
            continue
        speaker, book, *_ = [*line["id"].split("_"), ""]
        stem = here / "audio" / speaker / book / line["id"]
        opus = stem.with_suffix(".opus")
        yield (
            None,
            {
                "id": line["id"],
                "audio": str(opus if opus.is_file() else stem.with_suffix(".flac")),
                "text": line["text"].strip(),
                "task": "asr",
                "language": code,
                "speaker": speaker,
                **({"gender": genders[speaker]} if speaker in genders else {}),
                "source": "Multilingual LibriSpeech",
                "license": "cc-by-4.0",
            },
        )
    for lost in _unlisted(here, listed, "transcripts.txt"):
        yield lost, None


def mls_traits(
    folder: Path,
    descriptions: str,
    split: str = "train",
    traits: str = "gender,rate,noise,reverberation,monotony,quality",
) -> Iterator[Row | SetAside]:
    """Traits of English MLS utterances from the speaker descriptions `parler-tts/mls-eng-speaker-descriptions`: one row
    per utterance and trait, whose `choices` are all the values that the descriptions have for it.

    The descriptions name an utterance by its recording's address, start and end, as `segments.txt` does.

    Args:
        folder: as for `mls`, with English.
        descriptions: a Parquet or CSV file of them, or a folder of such files.
        split: "train", "dev" or "test".
        traits: "gender", "rate", "noise", "reverberation", "monotony", "quality", "sdr_noise", "pitch".
    """
    wanted = {name: TRAITS[choice(name, "trait", [*TRAITS])] for name in several(traits)}
    described = {}
    for number, row in enumerate(_descriptions(descriptions), 1):
        try:
            described[_place(row, ("original_path", "begin_time", "end_time"))] = row
        except MALFORMED as error:
            yield malformed(f"description {number}", Path(descriptions), error)
    choices = {
        name: sorted({str(row[column]).strip() for row in described.values() if row.get(column) not in (None, "")})
        for name, column in wanted.items()
    }
    if missing := [name for name, values in choices.items() if not values]:
        column = wanted[missing[0]]
        raise ManifestError(f"{descriptions} has no column {column!r} with the trait {missing[0]!r}. Leave it out.")
    english = _mls_folders(folder, "en")["en"]
    places = {}
    for line in table(segments := english / split / "segments.txt", ("id", "address", "start", "end")):
        try:
            if isinstance(line, SetAside):
                yield line
            else:
                places[line["id"]] = _place(line, ("address", "start", "end"))
        except MALFORMED as error:
            yield malformed(line["id"], segments, error)
    for line, row in _mls_rows(english, split, "en"):
        if row is None:
            yield line
            continue
        description = described.get(places.get(row["id"]))
        if description is None:
            continue  # the descriptions cover a part of the corpus
        labels = {name: str(description[column]).strip() for name, column in wanted.items() if description.get(column)}
        for name, label in labels.items():
            answer = {"trait": name, "choices": choices[name], "target": label}
            yield {**row, **labels, "id": f"{row['id']} {name}", "task": "traits", **answer}


def _place(row: dict[str, Any], columns: tuple[str, str, str]) -> tuple[str, float, float]:
    """A recording's address, and the start and end of an utterance in it to a hundredth of a second."""
    address, start, end = (row[column] for column in columns)
    return str(address), round(float(start), 2), round(float(end), 2)


def _descriptions(path: str) -> Iterator[dict[str, Any]]:
    files = sorted(Path(path).rglob("*")) if Path(path).is_dir() else [Path(path)]
    files = [file for file in files if file.suffix in (".parquet", ".csv")]
    if not files or not all(file.is_file() for file in files):
        raise ManifestError(
            f"{path}: there are no descriptions. Give a Parquet or CSV file, or a folder of such files."
        )
    for file in files:
        if file.suffix == ".csv":
            yield from comma_table(file)
        else:
            from pyarrow.parquet import read_table

            yield from read_table(file).to_pylist()
