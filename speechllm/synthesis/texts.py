"""Texts to speak: the rows of any source of data, lines of a text file, or WordNet's example sentences."""

import json
import os
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.mixtures import fraction_of
from ..data.schema import ManifestError, Row, SetAside, with_ids
from ..data.sources import MANIFESTS, Spec, open_source, parse_spec, read_specs
from ..downloads import fetch, read_debian_members
from .debian import WORDNET


_EXAMPLE = re.compile(r'"([^"]+)"')
_OF_A_RECORDING = ("audio", "sampling_rate", "duration", "words", "alignment", "speaker", "gender", "rate", "snr_db",
                   "reverberation")  # fmt: skip


def read_texts(
    specs: Sequence[Spec | os.PathLike], columns: dict[str, str] | None = None, seed: int = 0
) -> tuple[list[Row], list[SetAside]]:
    """The rows of sources (`data/sources.py`) with a column `text`, or the lines of text files; and what is malformed.

    Args:
        specs: of sources, which need no audio here; any existing file that is no manifest, shard or list of sources is
            one of lines.
        columns: the schema's name of a column -> the data's own, where they differ and the spec does not say so.
        seed: of a source's fraction.

    Returns:
        Rows with ids, without what told of a recording that they had, and without what JSON cannot hold (images, dates).

    Raises:
        ManifestError: a source is missing, cannot be read, is not UTF-8, or has no text.
    """
    rows, aside = [], []
    for spec in read_specs([str(spec) if isinstance(spec, os.PathLike) else spec for spec in specs]):
        lines = isinstance(spec, str) and Path(spec).is_file() and Path(spec).suffix.lower() not in (*MANIFESTS, ".tar")
        found, malformed = (_lines(Path(spec)), []) if lines else _texts_of_source(spec, columns, seed)
        rows += found
        aside += malformed
    return with_ids(rows), aside


def _texts_of_source(spec: Spec, columns: dict[str, str] | None, seed: int) -> tuple[list[Row], list[SetAside]]:
    source = parse_spec(spec, columns)
    if source.minimum_seconds is not None or source.maximum_seconds is not None:
        raise ManifestError(f"{source.spec}: limits on the duration are for speech; a text has none yet. Remove them.")
    rows, aside = [], []
    for row in open_source(source, with_audio=False):
        if isinstance(row, SetAside):
            aside.append(row)
        else:
            rows.append({name: value for name, value in row.items() if name not in _OF_A_RECORDING and _is_json(value)})
    if not any(row.get("text") for row in rows):
        has = f", but {', '.join(map(repr, rows[0]))}" if rows else ""
        raise ManifestError(
            f'{source.spec} has no column `text`{has}. Name the column of the texts: --columns \'{{"text": "..."}}\'.'
        )
    return fraction_of(rows, source.fraction, seed), aside


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _lines(path: Path) -> list[Row]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # texts may hold other line breaks
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}). Save it as such.") from None
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from None
    rows = [{"id": f"line {number}", "text": line.strip()} for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ManifestError(f"{path} has no text. Write one on each line.")
    return rows


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
