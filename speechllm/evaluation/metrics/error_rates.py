"""Word and character error rates: (substitutions + deletions + insertions) / units of the reference.

* `wer` and `cer` are of the corpus: all edits over all words or characters (spaces count), as the field reports them.
* `mean_utterance_wer` averages the utterances' own rates, as the paper's published code does; an utterance whose
  reference has no word has no rate and is left out of this mean.
* An empty hypothesis is all deletions; for a reference without words every word is an insertion.

Two alignments. `levenshtein` (jiwer, the default): the fewest edits. `sclite` (NIST SCTK): the cheapest edits when a
substitution costs 4 and a deletion or insertion 3. They give the same number of errors except where one word more found
right costs an error more, so `sclite` is never lower; the split into kinds differs more often.
"""

from collections.abc import Sequence
from typing import Literal

import jiwer
import numpy as np

from .normalisation import Normaliser, normalise
from .resampling import CorpusMetric


Alignment = Literal["levenshtein", "sclite"]
EDITS = ("substitutions", "deletions", "insertions")
WORD_COUNTS = (*EDITS, "reference_words")
CHARACTER_COUNTS = (*(f"character_{edits}" for edits in EDITS), "reference_characters")


def edit_counts(
    references: Sequence[str],
    hypotheses: Sequence[str],
    unit: Literal["word", "character"] = "word",
    alignment: Alignment = "levenshtein",
) -> np.ndarray:
    """(utterances, 4): substitutions, deletions, insertions, and units of the reference. Texts are normalised already.

    Raises:
        ValueError: if there is no such alignment.
    """
    ways = {"levenshtein": _levenshtein_edits, "sclite": _sclite_edits}
    if alignment not in ways:
        raise ValueError(f"There is no alignment {alignment!r}. Use {' or '.join(ways)}.")
    count = ways[alignment]
    split = str.split if unit == "word" else list
    counts = np.zeros((len(references), 4))
    for row, reference, hypothesis in zip(counts, references, hypotheses):
        left, right = split(reference), split(hypothesis)
        row[:] = *count(left, right), len(left)
    return counts


def _split_already(words: list[list[str]]) -> list[list[str]]:
    return words


def _levenshtein_edits(reference: list[str], hypothesis: list[str]) -> tuple[int, int, int]:
    output = jiwer.process_words([reference], [hypothesis], _split_already, _split_already)
    return output.substitutions, output.deletions, output.insertions


def _sclite_edits(reference: list[str], hypothesis: list[str]) -> tuple[int, int, int]:
    """Of alignments that cost the same, sclite's: going backwards it prefers a substitution, then an insertion."""
    row = [(3 * i, 0, 0, i) for i in range(len(hypothesis) + 1)]  # cost, substitutions, deletions, insertions
    for deleted, word in enumerate(reference, 1):
        diagonal, row[0] = row[0], (3 * deleted, 0, deleted, 0)
        for i, other in enumerate(hypothesis, 1):
            wrong = word != other
            substitution, deletion, insertion = diagonal[0] + 4 * wrong, row[i][0] + 3, row[i - 1][0] + 3
            if substitution <= deletion and substitution <= insertion:
                _, s, d, n = diagonal
                best = (substitution, s + wrong, d, n)
            elif deletion < insertion:
                _, s, d, n = row[i]
                best = (deletion, s, d + 1, n)
            else:
                _, s, d, n = row[i - 1]
                best = (insertion, s, d, n + 1)
            diagonal, row[i] = row[i], best
    return row[-1][1:]


def error_rate(counts: np.ndarray) -> CorpusMetric:
    """All edits over all units of the references. counts: see `edit_counts`."""
    return CorpusMetric(counts, lambda sums: sums[:3].sum() / sums[3] if sums[3] else np.nan)


def mean_utterance_rate(counts: np.ndarray) -> CorpusMetric:
    """The mean of the utterances' own error rates."""
    rated = counts[:, 3] > 0
    rates = np.where(rated, counts[:, :3].sum(1) / np.maximum(counts[:, 3], 1), 0)
    return CorpusMetric(
        np.stack([rates, rated], 1).astype(float), lambda sums: sums[0] / sums[1] if sums[1] else np.nan
    )


def recognition(
    references: Sequence[str],
    hypotheses: Sequence[str],
    normaliser: Normaliser = normalise,
    alignment: Alignment = "levenshtein",
) -> tuple[dict[str, CorpusMetric], dict[str, int]]:
    """The metrics `wer`, `cer` and `mean_utterance_wer`, all fractions (they can exceed 1), and the counts behind the first
    two: `substitutions`, `deletions`, `insertions`, `reference_words`, and those of characters with `character_` before.

    Raises:
        ValueError: if the lists differ in length, no reference has a word, or there is no such alignment.
    """
    if len(references) != len(hypotheses):
        raise ValueError(
            f"There are {len(references)} references, but {len(hypotheses)} hypotheses. Give one for each."
        )
    left, right = [normaliser(text) for text in references], [normaliser(text) for text in hypotheses]
    if not any(left):
        raise ValueError("No reference has a word to score against.")
    words = edit_counts(left, right, "word", alignment)
    characters = edit_counts(left, right, "character", alignment)
    metrics = {
        "wer": error_rate(words),
        "cer": error_rate(characters),
        "mean_utterance_wer": mean_utterance_rate(words),
    }
    return metrics, dict(zip((*WORD_COUNTS, *CHARACTER_COUNTS), (*_totals(words), *_totals(characters))))


def _totals(counts: np.ndarray) -> list[int]:
    return counts.sum(0).astype(int).tolist()


def recognition_metrics(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, float]:
    """Corpus `wer` and `cer` as fractions, both sides normalised as in the paper.

    Raises:
        ValueError: if the lists differ in length or no reference has a word.
    """
    metrics, _ = recognition(references, hypotheses)
    return {name: metrics[name].score for name in ("wer", "cer")}
