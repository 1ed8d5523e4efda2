"""Parts and mixtures of data, decided by seed alone.

A part: `fraction_of(rows, 0.1)` lies in `fraction_of(rows, 0.2)`, in the order of the rows.

A mixture: of sources i with n_i rows, weights w_i and a temperature T, a row drawn at random should be of source i with

    p_i  proportional to  w_i * n_i ** (1 / T)

(T = 1: as the sources are, each row as often as any other; T above 1 evens out, as in multilingual training, e.g. Arivazhagan
et al. 2019, arXiv 1907.05019). Rows are repeated for that, never dropped: the source whose rows are worth the least has
each of them once in a pass, the others have theirs p_i / n_i, relative to it, times; of what is left of such a number, rows
are drawn. To see less of a source, take a fraction of it.

Of streams, whose sizes are not known as a rule, rows are drawn in proportion to w_i alone; with a temperature, and sizes that
`stream_sources.stream_size` can tell, in proportion to the p_i above.
"""

import pickle
import random
from collections.abc import Sequence

import datasets

from .schema import Row, with_ids


def fraction_of(rows: Sequence[Row], fraction: float, seed: int = 0) -> list[Row]:
    """At least one row; the same seed gives nested parts.

    Raises:
        ValueError: if the fraction is not above 0 and at most 1.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"The fraction is {fraction}; it must be above 0 and at most 1.")
    if fraction == 1:
        return list(rows)
    return [rows[i] for i in sorted(_order(len(rows), f"fraction {seed}")[: max(1, round(fraction * len(rows)))])]


def repetitions(sizes: Sequence[int], weights: Sequence[float], temperature: float = 1.0) -> list[float]:
    """How often a row of each source comes in one pass over the mixture: at least once, on average.

    Raises:
        ValueError: if the temperature, a weight or a size is not above 0.
    """
    if not temperature > 0 or not all(weight > 0 for weight in weights) or not all(size > 0 for size in sizes):
        raise ValueError(f"Sizes {sizes}, weights {weights} and the temperature {temperature} must be above 0.")
    worth = [share / size for share, size in zip(shares(sizes, weights, temperature), sizes)]
    return [value / min(worth) for value in worth]


def shares(sizes: Sequence[float], weights: Sequence[float], temperature: float = 1.0) -> list[float]:
    """What p_i of the module docstring is in proportion to."""
    return [weight * size ** (1 / temperature) for size, weight in zip(sizes, weights, strict=True)]


def mixture(
    sources: Sequence[Sequence[Row]], weights: Sequence[float] | None = None, temperature: float = 1.0, seed: int = 0
) -> list[Row]:
    """The rows of all sources, source after source, repeated as the module docstring says; ids are made unique.

    Raises:
        ValueError: see `repetitions`.
    """
    weights = [1.0] * len(sources) if weights is None else weights
    mixed: list[Row] = []
    for number, (rows, times) in enumerate(zip(sources, repetitions([*map(len, sources)], weights, temperature))):
        whole, rest = divmod(round(times * len(rows)), len(rows))
        drawn = sorted(_order(len(rows), f"mixture {seed} {number}")[:rest])
        mixed += [*rows] * whole + [rows[i] for i in drawn]
    return with_ids(mixed)


def interleaved(
    streams: Sequence[datasets.IterableDataset], weights: Sequence[float], seed: int = 0
) -> datasets.IterableDataset:
    """Packed streams as one, each row from a stream drawn in proportion to the weights, until all have been read to
    their end once; those that end before begin anew."""
    shares = [weight / sum(weights) for weight in weights]
    mixed = datasets.interleave_datasets([*streams], probabilities=shares, seed=seed, stopping_strategy="all_exhausted")
    return mixed.map(unpack, remove_columns=["packed"])


# `datasets` gives all rows of streams that it interleaves the same typed columns, which ours do not have.
PACKED = datasets.Features({"packed": datasets.Value("binary")})


def pack(row: Row) -> Row:
    return {"packed": pickle.dumps(row)}


def unpack(row: Row) -> Row:
    return pickle.loads(row["packed"])


def _order(count: int, seed: str) -> list[int]:
    return random.Random(seed).sample(range(count), count)
