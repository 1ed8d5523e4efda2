"""Gender in translation on MuST-SHE (Bentivogli et al., ACL 2020), scored as by its script (Gaido et al., COLING 2020).

Each reference has gender-marked terms, each in its right form and in the other gender's form ("nata" / "nato").

* term coverage: terms of which either form occurs in the output, over all terms: can gender be judged at all?
* gender accuracy: right forms over right and wrong forms in the output.

A word of the output serves one term only. The output is lower-cased and split into words as the Moses tokenizer of French
and Italian does, elided articles by themselves (dell' amica). Categories: 1F and 1M (the speaker's own gender decides; only
the voice tells), 2F and 2M (the words tell).
"""

import re
from collections.abc import Sequence

import numpy as np

from ...data.schema import GenderTerms, gender_pairs
from .resampling import CorpusMetric


def gender_terms(
    terms: Sequence[GenderTerms | None], categories: Sequence[str | None], hypotheses: Sequence[str]
) -> dict[str, CorpusMetric]:
    """The metrics `term_coverage` and `gender_accuracy`, 0 to 1, and both by category, e.g. `gender_accuracy_1F`.

    Args:
        terms: as in MuST-SHE's column GENDERTERMS, "right wrong;right wrong", or pairs; None: not judged.

    Raises:
        ValueError: if a term is no pair of words.
    """
    counts = np.array(
        [_counts(gender_pairs(these), words(text)) for these, text in zip(terms, hypotheses)], dtype=float
    )
    metrics = {}
    for category in (None, *sorted({category for category in categories if category})):
        chosen = np.array([category in (None, other) for other in categories])
        suffix = "" if category is None else f"_{category}"
        table = counts * chosen[:, None]
        metrics[f"term_coverage{suffix}"] = CorpusMetric(table[:, :2], _share)
        metrics[f"gender_accuracy{suffix}"] = CorpusMetric(table[:, 2:], _share)
    return metrics


def _counts(terms: list[tuple[str, str]], words: list[str]) -> tuple[int, int, int, int]:
    """Terms found and all terms; right forms, and right and wrong forms together."""
    found = right = wrong = 0
    for forms in terms:
        hits = []
        for form in forms:
            hits.append(form in words)
            if hits[-1]:
                words.remove(form)
        found, right, wrong = found + any(hits), right + hits[0], wrong + hits[1]
    return found, len(terms), right, right + wrong


def _share(sums: np.ndarray) -> float:
    return sums[0] / sums[1] if sums[1] else 0.0  # nothing found: 0, as the script says


def words(text: str) -> list[str]:
    """Lower-cased words and punctuation marks; an apostrophe stays with the letters before it."""
    return re.findall(r"\w+(?:-\w+)*'?|[^\w\s]", text.lower().replace("’", "'"))
