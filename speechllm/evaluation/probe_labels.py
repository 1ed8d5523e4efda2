"""What linear probes are to read off the states: the labels of rows, as numbers.

| label | column | as |
|---|---|---|
| speaker, gender, and any other column of texts | its own | classes |
| rate | `rate`: words per second, or a level; without the column, words of `text` over `duration` | number, or classes |
| noise | `snr_db`; a row without it is clean | classes: clean and the levels, or thirds where there are many levels |
| reverberation | `reverberation`: seconds (RT60); a row without it has none | the same |
| words | `text` | which of the most frequent words it holds |
| any other column of more than ten numbers | its own | number |

A label that no probe can learn is an error, told before any model runs; single rows without a value and classes of too
few rows are set aside and counted.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..data.schema import Row
from ..data.splits import words_of


LEVELS = {"noise": ("snr_db", "clean", "{:g} dB"), "reverberation": ("reverberation", "none", "{:g} s")}
MOST_LEVELS = 6
NUMBERS = 10  # a column of more distinct numbers is a quantity, of fewer a set of classes
WORDS = 20
MINIMUM = 10  # utterances of a class or with a word


class ProbeError(ValueError):
    """A label that cannot be probed; the message names it, the cause and the remedy."""


@dataclass
class Label:
    """
    kind: "classes", "number" or "words". index: (n,) the rows that have a value. values: (n,) class numbers, (n,)
    floats, or (n, words) bool. names: of the classes or words. set_aside: reason -> number of rows.
    """

    name: str
    kind: str
    index: np.ndarray
    values: np.ndarray
    names: list[str] = field(default_factory=list)
    set_aside: dict[str, int] = field(default_factory=dict)


def read_labels(rows: Sequence[Row], names: Sequence[str], minimum: int = MINIMUM) -> list[Label]:
    """The labels of rows.

    Raises:
        ProbeError: if a label cannot be probed, naming every such label and why.
    """
    labels, problems = [], []
    for name in dict.fromkeys(names):
        try:
            labels.append(_words(rows, minimum) if name == "words" else _column(name, rows, minimum))
        except ProbeError as error:
            problems.append(str(error))
    if problems or not labels:
        raise ProbeError(" ".join(problems) or "There is no label to probe. Name some, such as speaker or words.")
    return labels


def _column(name: str, rows: Sequence[Row], minimum: int) -> Label:
    column = LEVELS.get(name, (name,))[0]
    values = [row.get(column) for row in rows]
    if all(_absent(value) for value in values):
        if name == "rate" and any(row.get("text") and row.get("duration") for row in rows):
            values = [_words_per_second(row) for row in rows]
        else:
            known = sorted({key for row in rows for key in row} - {"audio", "id", "text"})
            raise ProbeError(
                f"{name}: no row has a value in the column `{column}` (there are {', '.join(known) or 'no others'}). "
                "Add the column, or leave the label out."
            )
    if name in LEVELS:
        return _classes(name, _levels(name, values), minimum, "neither a number nor absent")
    numbers = [_as_number(value) for value in values if not _absent(value)]
    if name not in ("speaker", "gender") and None not in numbers and (name == "rate" or len(set(numbers)) > NUMBERS):
        return _quantity(name, values, minimum)
    texts = [str(v).strip() if isinstance(v, str | int | float) and not _absent(v) else None for v in values]
    return _classes(name, texts, minimum, "without a text or number")


def _classes(name: str, texts: list[str | None], minimum: int, missing: str) -> Label:
    """texts: the class of each row; `None` where it has none, for the reason `missing`."""
    counts = Counter(text for text in texts if text is not None)
    set_aside = {missing: texts.count(None)} if None in texts else {}
    for text, count in counts.items():
        if count < minimum:
            set_aside[f"class {text!r} has fewer than {minimum} utterances"] = count
    kept = sorted((text for text, count in counts.items() if count >= minimum), key=_in_order)
    if len(kept) < 2:
        found = ", ".join(f"{text!r} {count} times" for text, count in counts.most_common(5)) or "no value"
        raise ProbeError(
            f"{name}: a probe tells at least two classes of {minimum} utterances apart, but there is {found}. "
            "Give more data, or leave the label out."
        )
    index = np.array([i for i, text in enumerate(texts) if text in kept])
    return Label(name, "classes", index, np.array([kept.index(texts[i]) for i in index]), kept, set_aside)


def _quantity(name: str, values: list[Any], minimum: int) -> Label:
    numbers = [_as_number(value) for value in values]
    index = np.array([i for i, number in enumerate(numbers) if number is not None], dtype=int)
    kept = np.array([numbers[i] for i in index])
    if len(index) < 2 * minimum or np.ptp(kept) == 0:
        found = "all are the same" if len(index) >= 2 * minimum else f"there are {len(index)}"
        raise ProbeError(
            f"{name}: a probe needs at least {2 * minimum} utterances with different numbers, but {found}. "
            "Give more data, or leave the label out."
        )
    missing = len(values) - len(index)
    return Label(name, "number", index, kept, set_aside={"without a finite number": missing} if missing else {})


def _levels(name: str, values: list[Any]) -> list[str | None]:
    """Class names of levels in dB or seconds; a row without a level is of the undisturbed class."""
    _, undisturbed, form = LEVELS[name]
    numbers = [math.inf if _absent(value) else _as_number(value) for value in values]
    given = [number for number in numbers if number is not None and math.isfinite(number)]
    levels = sorted(set(given))
    if len(levels) <= MOST_LEVELS:
        names = {level: form.format(level) for level in levels}
    else:
        edges = np.quantile(given, [1 / 3, 2 / 3])
        low, high = (form.format(round(float(edge), 2)) for edge in edges)
        thirds = [f"up to {low}", f"{low} to {high}", f"above {high}"]
        names = {level: thirds[int(np.searchsorted(edges, level))] for level in levels}
    return [None if number is None else names.get(number, undisturbed) for number in numbers]


def _words(rows: Sequence[Row], minimum: int) -> Label:
    """The `WORDS` words that occur in the most distinct texts, but in no more than half of the rows."""
    sets = [frozenset(words_of(row["text"])) if isinstance(row.get("text"), str) else None for row in rows]
    index = np.array([i for i, words in enumerate(sets) if words], dtype=int)
    in_rows = Counter(word for i in index for word in sets[i])
    in_texts = Counter(word for words in {sets[i] for i in index} for word in words)
    usable = [word for word, count in in_rows.items() if minimum <= count <= len(index) / 2 and in_texts[word] >= 4]
    names = sorted(usable, key=lambda word: (-in_texts[word], word))[:WORDS]
    if not names:
        raise ProbeError(
            f"words: no word occurs in {minimum} to half of the {len(index)} utterances with `text` and in 4 different "
            "texts. Give more data, or leave the label out."
        )
    values = np.array([[word in sets[i] for word in names] for i in index])
    missing = len(rows) - len(index)
    return Label("words", "words", index, values, names, {"without a text": missing} if missing else {})


def _words_per_second(row: Row) -> float | None:
    words = len(words_of(row["text"])) if isinstance(row.get("text"), str) else 0
    seconds = row.get("duration")
    return words / seconds if words and isinstance(seconds, int | float) and seconds > 0 else None


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or value != value  # NaN


def _as_number(value: Any) -> float | None:
    """A number, also from text (CSV files have nothing else); `None` for anything else."""
    try:
        number = float(value) if isinstance(value, str | int | float) else None
    except ValueError:
        return None
    return number if number is not None and math.isfinite(number) else None


def _in_order(text: str) -> tuple[int, float, Hashable]:
    """Numbers by size, then texts by letter."""
    number = _as_number(text.split()[0]) if text else None
    return (0, number, text) if number is not None else (1, 0.0, text)
