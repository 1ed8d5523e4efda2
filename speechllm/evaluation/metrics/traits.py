"""Accuracy and macro-F1 of labels named in answers: who speaks, how fast, in what noise.

A generated answer counts as the label that it names: the one choice whose words occur in it ("The speaker is female." is
"female"). An answer that names none, or several, is wrong and belongs to no class.
Macro-F1 is the unweighted mean of F1 over the labels that occur in the references.
"""

from collections.abc import Sequence

import numpy as np

from .normalisation import normalise
from .resampling import CorpusMetric


def named_choice(answer: str, choices: Sequence[str]) -> str | None:
    """The choice that `answer` names, by whole words; "very slow" is not also "slow". None: no choice, or several."""
    rest, named = f" {normalise(answer)} ", []
    for choice in sorted(choices, key=lambda choice: -len(normalise(choice))):
        words = f" {normalise(choice)} "
        if words in rest:
            named.append(choice)
            rest = rest.replace(words, " | ")
    return named[0] if len(named) == 1 else None


def classification(labels: Sequence[str], predicted: Sequence[str | None]) -> dict[str, CorpusMetric]:
    """The metrics `accuracy` and `macro_f1`, 0 to 1. predicted: None where an answer names no label."""
    classes = sorted(set(labels))
    truth = np.array([[label == name for name in classes] for label in labels], dtype=float)
    guess = np.array([[label == name for name in classes] for label in predicted], dtype=float)
    right = truth * guess
    return {
        "accuracy": CorpusMetric(np.stack([right.sum(1), np.ones(len(right))], 1), lambda sums: sums[0] / sums[1]),
        "macro_f1": CorpusMetric(np.concatenate([right, truth + guess], axis=1), _macro_f1),
    }


def _macro_f1(sums: np.ndarray) -> float:
    """sums: right answers of each class, then its references and predictions together; a resample may lack a class."""
    right, both = np.split(sums, 2)
    return float(np.mean(2 * right[both > 0] / both[both > 0]))
