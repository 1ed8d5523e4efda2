"""MuST-C (https://mt.fbk.eu/must-c/): TED talks with transcripts and translations, and MuST-SHE, its test of gender.

    en-de/data/train/txt/train.yaml    one line per segment: {duration, offset, speaker_id, wav}, seconds
    en-de/data/train/txt/train.en      its transcript, on the same line
    en-de/data/train/txt/train.de      its translation
    en-de/data/train/wav/ted_1.wav     the whole talk

A row's audio is its segment of the talk, {"path", "offset", "duration"}: no more is decoded.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import yaml

from ..schema import ManifestError, Row, SetAside
from .reading import choice, need_folder, several, table, text_lines


SOURCE = {"source": "MuST-C", "license": "cc-by-nc-nd-4.0", "language": "en"}
MUST_SHE_COLUMNS = ("ID", "SRC", "REF", "WRONG-REF", "GENDER", "CATEGORY", "GENDERTERMS")
LOADER = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # in C, ten times as fast


def must_c(folder: Path, split: str = "train", task: str = "st", target_language: str = "") -> Iterator[Row | SetAside]:
    """Rows of MuST-C v1, or of later versions, which have the same layout.

    Args:
        folder: what holds `en-de`, `en-fr`, ...; or one of these itself.
        split: "train", "dev", "tst-COMMON" or "tst-HE".
        task: "st", "asr" (of one language pair: the pairs share most talks), or "asr,st".
        target_language: codes, "de,fr"; default: every pair that is there.

    Raises:
        ManifestError: if a pair, a split or a file of it is missing.
    """
    tasks = [choice(name, "task", ["asr", "st"]) for name in several(task)]
    folder = need_folder(folder, "MuST-C, that is `en-de` and the like,")
    named = [path for path in sorted([folder, *folder.iterdir()]) if path.name.startswith("en-")]
    pairs = {path.name[3:]: path for path in named if (path / "data").is_dir()}
    wanted = [choice(code, f"{folder}: target language", [*pairs]) for code in several(target_language)] or [*pairs]
    if not wanted:
        raise ManifestError(f"{folder} holds no `en-xx/data`. Give the folder that MuST-C was unpacked to.")
    for number, code in enumerate(wanted):
        here = [name for name in tasks if name == "st" or number == 0]
        yield from _pair(pairs[code] / "data" / split, split, code, here)


def _pair(folder: Path, split: str, code: str, tasks: list[str]) -> Iterator[Row | SetAside]:
    text = need_folder(folder / "txt", f"split {split!r} of MuST-C")
    try:
        segments = yaml.load((text / f"{split}.yaml").read_bytes(), Loader=LOADER) or []
    except OSError as error:
        raise ManifestError(f"{text / split}.yaml cannot be read: {error.strerror}. Unpack it again.") from None
    except yaml.YAMLError as error:
        raise ManifestError(f"{text / split}.yaml is not YAML: {' '.join(str(error).split())}") from None
    sides = {"en": text_lines(text / f"{split}.en"), code: text_lines(text / f"{split}.{code}")}
    counts = {f"{split}.yaml": len(segments), **{f"{split}.{name}": len(lines) for name, lines in sides.items()}}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        reason = f"{text}: the files do not have the same number of lines ({shown}), so no line can be trusted. Unpack it again."
        for number in range(1, max(counts.values()) + 1):
            yield SetAside(f"en-{code} {split}, line {number}", reason, "line counts that differ")
        return
    seen: Counter[str] = Counter()
    for number, (segment, english, translation) in enumerate(zip(segments, *sides.values()), 1):
        try:
            wav, offset, seconds = segment["wav"], float(segment["offset"]), float(segment["duration"])
        except (KeyError, TypeError, ValueError):
            reason = (
                f"{text / split}.yaml: {segment} has no `wav`, `offset` and `duration` in seconds. Unpack it again."
            )
            yield SetAside(f"en-{code} {split}, line {number}", reason, "malformed row")
            continue
        seen[wav] += 1
        name = f"{Path(wav).stem}_{seen[wav] - 1}"
        if broken := next((line for line in (english, translation) if isinstance(line, SetAside)), None):
            yield broken
            continue
        row = {
            **SOURCE,
            "audio": {"path": str(folder / "wav" / wav), "offset": offset, "duration": seconds},
            "text": english.strip(),
            "duration": seconds,
            "speaker": segment.get("speaker_id"),
        }
        if "asr" in tasks:
            yield {**row, "id": name, "task": "asr"}
        if "st" in tasks:
            answer = {"target_language": code, "target": translation.strip()}
            yield {**row, "id": f"{name}-{code}", "task": "st", **answer}


def must_she(folder: Path, target_language: str = "it", category: str = "") -> Iterator[Row | SetAside]:
    """Rows of MuST-SHE (Bentivogli et al. 2020), whose translations show the gender of a person that is spoken of:
    speech translation with `wrong_target` (the other gender's forms) and `gender_terms`, [[right, wrong], ...].

    Args:
        folder: what holds `tsv` (with MONOLINGUAL.it_v1.x.tsv) and `wav`, at any depth.
        target_language: "it", "fr" or "es".
        category: e.g. "1F,1M" (the speaker of herself, of himself) or "1,2"; default: all.

    Raises:
        ManifestError: if there is not one table for the language, or it lacks a column.
    """
    need_folder(folder, "MuST-SHE")
    tables = sorted(folder.rglob(f"MONOLINGUAL.{target_language}*.tsv"))
    if len(tables) != 1:
        raise ManifestError(f"{folder} holds {len(tables)} files MONOLINGUAL.{target_language}*.tsv. Give one version.")
    recordings = {path.stem: path for path in sorted(folder.rglob("*.wav"))}
    wanted = several(category)
    for line in table(tables[0], needed=MUST_SHE_COLUMNS):
        if isinstance(line, SetAside):
            yield line
            continue
        if wanted and not any(line["CATEGORY"].startswith(start) for start in wanted):
            continue
        terms = [pair.split() for pair in line["GENDERTERMS"].split(";") if pair.strip()]
        path = recordings.get(line["ID"], folder / "wav" / f"{line['ID']}.wav")
        yield {
            **SOURCE,
            "source": "MuST-SHE",
            "id": line["ID"],
            "audio": str(path),
            "task": "st",
            "text": line["SRC"].strip(),
            "target": line["REF"].strip(),
            "target_language": target_language,
            "wrong_target": line["WRONG-REF"].strip(),
            "gender_terms": terms,
            "gender": {"She": "female", "He": "male"}.get(line["GENDER"].strip()),
            "category": line["CATEGORY"].strip(),
            "speaker": line.get("SPEAKER", "").strip() or None,
        }
