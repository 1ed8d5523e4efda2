"""Exact match and F1 of SQuAD v1.1 (Rajpurkar et al., 2016), as its official script `evaluate-v1.1.py` computes them.

Texts are lower-cased and lose ASCII punctuation, the articles a, an, the, and surplus spaces. F1 is between the bags of
words of prediction and answer. Of several acceptable answers the best counts, for each metric by itself.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from .resampling import CorpusMetric


def question_answering(answers: Sequence[Sequence[str]], predictions: Sequence[str]) -> dict[str, CorpusMetric]:
    """The metrics `exact_match` and `f1`, 0 to 100. answers: the acceptable ones of each question, at least one."""
    matches = [max(map(exact_match, [text] * len(right), right)) for text, right in zip(predictions, answers)]
    overlaps = [max(map(f1, [text] * len(right), right)) for text, right in zip(predictions, answers)]
    return {"exact_match": mean_percent(matches), "f1": mean_percent(overlaps)}


def normalise_answer(text: str) -> str:
    """SQuAD v1.1's normalisation: lower case, without ASCII punctuation and articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, answer: str) -> bool:
    """Whether both are equal after normalisation."""
    return normalise_answer(prediction) == normalise_answer(answer)


def f1(prediction: str, answer: str) -> float:
    """0 to 1; 0 if both are empty after normalisation, as in the official script."""
    left, right = normalise_answer(prediction).split(), normalise_answer(answer).split()
    common = (Counter(left) & Counter(right)).total()
    return 2 * common / (len(left) + len(right)) if common else 0.0


def mean_percent(values: Sequence[float]) -> CorpusMetric:
    """The mean over utterances, times 100."""
    return CorpusMetric(np.array([[value, 1.0] for value in values]), lambda sums: 100 * sums[0] / sums[1])
