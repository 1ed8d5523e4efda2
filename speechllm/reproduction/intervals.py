"""How sure a mean over seeds is, and a difference of two rows.

Two things could have come out otherwise: the seed (initial projector, order of the data) and the test set. With n seeds
whose values are v_s, and the mean over seeds m* on bootstrap samples of the test set,

    SE^2 = Var(v_s) / n  +  Var(m*)
    interval = mean +- t * SE,     t: Student's, with Welch-Satterthwaite's degrees of freedom

    df = SE^4 / ( (Var(v_s) / n)^2 / (n - 1)  +  Var(m*)^2 / (units - 1) )

Where seeds differ more than test sets do, this is Student's interval of n values, wide for three; where they do not, it is
the bootstrap's normal one. What both share (a seed that is good at some utterances) is counted twice: the interval is
rather too wide. Units of the bootstrap are recordings or passages, with all rows made from them; both rows of a difference
are tested on the same ones, and their seeds are paired (the same initial projector where neither is pretrained, the same
adapters and order of the data in fine-tuning). With one seed, the interval knows the test set alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ..evaluation.metrics.resampling import CorpusMetric, bootstrap_values


SAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """
    value: the mean over seeds.
    interval: [low, high], 95%.
    p: two-sided, that the value is 0; of use for differences.
    seeds: the value of each seed.
    error_of_seeds, error_of_test: the two parts of the standard error; the first is NaN for one seed.
    """

    value: float
    interval: tuple[float, float]
    p: float
    seeds: tuple[float, ...]
    error_of_seeds: float
    error_of_test: float


def estimate(values: Sequence[float], samples: np.ndarray, units: int, level: float = 0.95) -> Estimate:
    """From the values of the seeds and the mean over seeds on bootstrap samples of the `units` of the test set. Of one unit
    nobody knows what another would give: the interval is NaN and p is 1."""
    values = np.asarray(values, dtype=float)
    count, mean = len(values), float(np.mean(values))
    of_test = float(np.var(samples, ddof=1))
    of_seeds = float(np.var(values, ddof=1)) / count if count > 1 else 0.0
    error = np.sqrt(of_seeds + of_test)
    if units < 2:
        interval, p = (float("nan"), float("nan")), 1.0
    elif error == 0:
        interval, p = (mean, mean), 1.0 if mean == 0 else 0.0
    else:
        spread = of_test**2 / max(units - 1, 1) + (of_seeds**2 / (count - 1) if count > 1 else 0.0)
        distribution = stats.t(float(error**4 / spread))
        half = float(distribution.ppf(0.5 + level / 2) * error)
        interval, p = (mean - half, mean + half), float(2 * distribution.sf(abs(mean) / error))
    return Estimate(
        value=mean,
        interval=interval,
        p=p,
        seeds=tuple(map(float, values)),
        error_of_seeds=float(np.sqrt(of_seeds)) if count > 1 else float("nan"),
        error_of_test=float(np.sqrt(of_test)),
    )


def mean_over_seeds(metrics: Sequence[CorpusMetric], samples: int = SAMPLES) -> Estimate:
    """One row's metric: one `CorpusMetric` per seed, all over the same units in the same order."""
    drawn = bootstrap_values(metrics, samples, seed=0).mean(0)
    return estimate([metric.score for metric in metrics], drawn, len(metrics[0].statistics))


def difference(
    a: Sequence[CorpusMetric], b: Sequence[CorpusMetric], samples: int = SAMPLES, offset: float = 0.0
) -> Estimate:
    """a - b + offset: of each seed, and on the same samples of the test set. The seeds of both are in the same order.

    Raises:
        ValueError: if the numbers of seeds differ, or there are none.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"{len(a)} and {len(b)} seeds cannot be paired.")
    drawn = bootstrap_values([*a, *b], samples, seed=0)
    values = [left.score - right.score + offset for left, right in zip(a, b)]
    return estimate(values, drawn[: len(a)].mean(0) - drawn[len(a) :].mean(0) + offset, len(a[0].statistics))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of a family of tests, adjusted so that the chance of any false one is bounded (Holm, 1979)."""
    order = np.argsort(p_values)
    adjusted, highest = np.zeros(len(p_values)), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted.tolist()
