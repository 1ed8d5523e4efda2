"""Accuracy and macro-F1 of labels named in answers: who speaks, how fast, in what noise.

A generated answer counts as the label that it names: the one choice whose words occur in it ("The speaker is female." is
"female"). An answer that names none, or several, is wrong and belongs to no class. Symbols count only where labels
differ in nothing else ("5 dB", "-5 dB").
Macro-F1 is the unweighted mean of F1 over the labels that occur in the references.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

from .normalisation import UNSPACED, normalise
from .resampling import CorpusMetric


def named_choice(answer: str, choices: Sequence[str]) -> str | None:
    """The choice that `answer` is, or the one that it names by whole words; "very slow" is not also "slow".

    In scripts without spaces any place is a word's. None: no choice, or several.
    """
    spelt = {choice: (normalise(choice), _with_symbols(choice)) for choice in choices}
    rests, named = [normalise(answer), _with_symbols(answer)], []
    for choice, (_, exact) in spelt.items():
        if exact == rests[1]:
            return choice
    alike = Counter(words for words, _ in spelt.values())
    for choice, forms in sorted(spelt.items(), key=lambda item: [-len(form) for form in item[1]]):  # longest first
        decides = 0 if forms[0] and alike[forms[0]] == 1 else 1
        for i, (words, more) in enumerate(zip(forms, (rf"[^\s{UNSPACED}]", rf"[^\W{UNSPACED}]"))):
            if words and words in rests[i]:
                rests[i], count = re.subn(_whole(words, more), " | ", rests[i])
                if count and i == decides:
                    named.append(choice)
    return named[0] if len(named) == 1 else None


def _with_symbols(text: str) -> str:
    """Lower case, single spaces; all symbols stay."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().replace("\u2212", "-").split())


def _whole(words: str, more: str) -> str:
    """A pattern of whole `words`. more: what a word goes on with, which may not stand beside them."""
    # At a character of a script without spaces any place may begin or end a word.
    before = "" if re.match(f"[{UNSPACED}]", words[0]) else f"(?<!{more})"
    after = "" if re.match(f"[{UNSPACED}]", words[-1]) else f"(?!{more})"
    return before + re.escape(words) + after


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
