"""Texts to speak: lines of a text file, the rows of a manifest, or WordNet's example sentences."""

import os
import random
import re
from pathlib import Path

from ..data.schema import ManifestError, Row, SetAside, manifest_rows
from ..downloads import fetch, read_debian_members
from .debian import WORDNET


_EXAMPLE = re.compile(r'"([^"]+)"')


def read_texts(path: str | os.PathLike) -> tuple[list[Row], list[SetAside]]:
    """The rows of a manifest (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`, with a column `text`; audio is not needed),
    or the lines of any other file, and the rows that are malformed.

    Raises:
        ManifestError: the file is missing, cannot be read, is not UTF-8, or has no text.
    """
    path = Path(path)
    if path.suffix.lower() in (".jsonl", ".json", ".csv", ".tsv", ".parquet"):
        found = list(manifest_rows(path, with_audio=False))
        rows, aside = (
            [row for row in found if not isinstance(row, SetAside)],
            [row for row in found if isinstance(row, SetAside)],
        )
        if not any(row.get("text") for row in rows):
            raise ManifestError(f"{path} has no column `text`. Name the texts so.")
        return rows, aside
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise ManifestError(f"{path}: there is no such file. Give a text file or a manifest.") from None
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}). Save it as such.") from None
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from None
    rows = [{"id": f"line {number}", "text": line.strip()} for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ManifestError(f"{path} has no text. Write one on each line.")
    return rows, []


def wordnet_examples(count: int | None = None, seed: int = 0, shortest: int = 3, longest: int = 12) -> list[Row]:
    """WordNet 3.0's example sentences and phrases of `shortest` to `longest` words, without duplicates.

    Args:
        count: how many, drawn by seed; all of them (some 39,000) in the order of the data base if not given.
        seed: of the draw.

    Returns:
        Rows with `id`, `text`, `language`, `source` and `license`.

    Raises:
        DownloadError: the archive cannot be fetched.
        ValueError: there are not so many.
    """
    found: dict[str, None] = {}
    members = read_debian_members(
        fetch(WORDNET), lambda name: re.search(r"/data\.(noun|verb|adj|adv)$", name) is not None
    )
    for _, content in sorted(members):
        for line in content.decode("ascii").splitlines():
            for example in _EXAMPLE.findall(line.partition(" | ")[2]):
                text = " ".join(example.split())
                # Examples with signs are formulas, quotations with their authors' names, or gaps to fill.
                if shortest <= len(text.split()) <= longest and re.fullmatch(r"[A-Za-z][A-Za-z ,;:'.?!-]*", text):
                    found.setdefault(text)
    texts = list(found)
    if count is not None:
        if count > len(texts):
            raise ValueError(f"{count} sentences were asked for, but WordNet has {len(texts)} such. Ask for fewer.")
        texts = random.Random(f"wordnet {seed}").sample(texts, count)
    credit = {"language": "en", "source": "WordNet 3.0", "license": "wordnet"}
    return [{"id": f"wordnet {number}", "text": text, **credit} for number, text in enumerate(texts)]
