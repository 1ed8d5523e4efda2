"""Confidence intervals and paired tests for any metric that is a function of summed statistics of the utterances.

Word error rate, BLEU, F1 and the others are all `value(sum of rows)` of a table with a row per utterance (edits and words;
matched and possible n-grams; F1 and 1; ...). A resample is then a product of counts with that table: 1,000 resamples of
10,000 utterances take a second and no utterance is scored twice.

* Interval: percentiles of the metric over samples of utterances drawn with replacement (Efron & Tibshirani, 1993; for
  BLEU Koehn, 2004; for word error rates Bisani & Ney, 2004).
* Paired bootstrap: both systems on the same draws. The null hypothesis is the distribution of the differences moved to 0
  (two-sided): p = P(|d* - d| >= |d|).
* Approximate randomisation (Noreen, 1989; for BLEU Riezler & Maxwell, 2005): the systems' outputs of each utterance are
  exchanged with probability 1/2; p = P(|d*| >= |d|).

Both p-values count the observed data as one more sample, (count + 1) / (samples + 1), so they are never 0.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np


SAMPLES_AT_ONCE = 100  # bounds memory: this many rows of counts


@dataclass(frozen=True)
class CorpusMetric:
    """
    statistics: (utterances, k) float64.
    value: the sum of some utterances' statistics, (k,), -> the metric; NaN where it is undefined.
    """

    statistics: np.ndarray
    value: Callable[[np.ndarray], float]

    @property
    def score(self) -> float:
        return float(self.value(self.statistics.sum(0)))

    def grouped(self, groups: Sequence[Any]) -> "CorpusMetric":
        """The same metric with all utterances of a group (one speaker, one passage) as one unit of resampling."""
        number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
        sums = np.zeros((len(number), self.statistics.shape[1]))
        np.add.at(sums, [number[group] for group in groups], self.statistics)
        return CorpusMetric(sums, self.value)

    def values(self, counts: np.ndarray) -> np.ndarray:
        """The metric on several samples. counts: (samples, utterances), how often a sample holds an utterance."""
        return np.array([self.value(sums) for sums in counts @ self.statistics])


def bootstrap_values(metrics: Sequence[CorpusMetric], samples: int, seed: int) -> np.ndarray:
    """The metrics on the same `samples` draws of the utterances with replacement: (metrics, samples)."""
    draws = _draws(len(metrics[0].statistics), samples, np.random.default_rng(seed))
    return np.concatenate([np.array([metric.values(counts) for metric in metrics]) for counts in draws], axis=1)


def _draws(utterances: int, samples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Counts of the utterances in samples with replacement, (at most SAMPLES_AT_ONCE, utterances) at a time."""
    for start in range(0, samples, SAMPLES_AT_ONCE):
        some = min(SAMPLES_AT_ONCE, samples - start)
        drawn = rng.integers(utterances, size=(some, utterances)) + utterances * np.arange(some)[:, None]
        yield np.bincount(drawn.ravel(), minlength=some * utterances).reshape(some, utterances).astype(float)


def interval(values: np.ndarray) -> list[float]:
    """The central 95% of bootstrap values, [low, high]; those where the metric is undefined are left out."""
    values = np.sort(values[~np.isnan(values)])
    if len(values) == 0:
        return [float("nan")] * 2
    cut = len(values) // 40
    return [float(values[cut]), float(values[-1 - cut])]


def paired_bootstrap(a: CorpusMetric, b: CorpusMetric, samples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """`difference` (a - b), its `interval`, and the two-sided `p` that there is none."""
    difference = a.score - b.score
    values = bootstrap_values([a, b], samples, seed)
    differences = values[0] - values[1]
    return {
        "difference": difference,
        "interval": interval(differences),
        "p": _p(np.abs(differences - difference), difference),
    }


def approximate_randomisation(a: CorpusMetric, b: CorpusMetric, samples: int = 10_000, seed: int = 0) -> float:
    """The two-sided p of the difference between two systems, exchanging their outputs at random."""
    rng, differences = np.random.default_rng(seed), []
    both, only_b = (a.statistics + b.statistics).sum(0), b.statistics.sum(0)
    for start in range(0, samples, SAMPLES_AT_ONCE):
        size = (min(SAMPLES_AT_ONCE, samples - start), len(a.statistics))
        from_a = rng.integers(2, size=size, dtype=bool).astype(float)
        first = only_b + from_a @ (a.statistics - b.statistics)
        differences.extend(a.value(sums) - a.value(both - sums) for sums in first)
    return _p(np.abs(differences), a.score - b.score)


def compared(
    a: CorpusMetric, b: CorpusMetric, seed: int = 0, test: Literal["randomisation", "bootstrap"] = "randomisation"
) -> dict[str, Any]:
    """`difference` (a - b), its `interval` (95%, paired bootstrap), the two-sided `p`, and the `test` that it is from."""
    found = paired_bootstrap(a, b, seed=seed)
    if test == "randomisation":
        found["p"] = approximate_randomisation(a, b, seed=seed)
    return {**found, "test": test}


def _p(null: np.ndarray, difference: float) -> float:
    if np.isnan(difference):
        return float("nan")
    null = null[~np.isnan(null)]
    at_least = int(np.count_nonzero(null >= abs(difference) - 1e-9))  # sums in another order differ in the last digits
    return (at_least + 1) / (len(null) + 1)
