"""Train and test sets that share no sentence, not even a slightly reworded one.

Prompts, commands and read sentences come in variants ("Press 4 to exit the menu", "Press star to exit the menu"). Split
at random, or by exact text, a variant of almost every test sentence is in the training set, and the test measures
memory. Here near-duplicates are put into clusters first, and a cluster goes to one side as a whole.

Two texts a, b are near-duplicates (texts as multisets of lower-case words, or of neighbouring word pairs) if

* |words(a) & words(b)| / |words(a) | words(b)| >= `threshold`, 0.6 (Jaccard: mostly the same words), or
* |pairs(a) & pairs(b)| / min(|pairs(a)|, |pairs(b)|) >= `containment`, 0.8, and the shorter text has at least 4 words
  (the shorter text is a piece of the longer one).

Clusters are the connected components of that relation (union-find), so they chain, and low thresholds grow giants.
On the English prompts of the quick start (509 distinct texts) there are 452 clusters, the largest of 11 texts.

Not every pair is compared. If two sets overlap by a fraction t of a set with n elements, they share at least one of its
n - ceil(t n) + 1 rarest elements (the others are too few to reach t), so only texts that share a *rare* word or pair
are candidates. The result is exactly that of all pairs; 5,000 sentences take about a second.
"""

from __future__ import annotations

import logging
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any


logger = logging.getLogger(__name__)

THRESHOLD = 0.6
CONTAINMENT = 0.8
CONTAINMENT_MINIMUM_WORDS = 4
_IDEOGRAPHS = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # written without spaces: each character counts as a word
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W{_IDEOGRAPHS}]+(?:'[^\W{_IDEOGRAPHS}]+)*")

Element = tuple[Hashable, int]  # a word or word pair and its how-manieth occurrence: makes a multiset a set


def words_of(text: str) -> tuple[str, ...]:
    """Lower-case words without punctuation; apostrophes inside a word stay, CJK characters are words of their own."""
    return tuple(_WORD.findall(text.casefold().replace("’", "'")))


def near_duplicate_clusters(
    texts: Sequence[str], threshold: float = THRESHOLD, containment: float = CONTAINMENT
) -> list[int]:
    """Cluster number of each text; near-duplicates (module docstring) have the same one.

    Args:
        texts: any number of texts; the clusters do not depend on their order, only the numbering does.
        threshold: least Jaccard similarity of the words, in (0, 1].
        containment: least part of the shorter text's word pairs that the longer one has, in (0, 1].

    Returns:
        One number per text, from 0, in the order in which clusters first appear.

    Raises:
        ValueError: `threshold` or `containment` is outside (0, 1].
    """
    for name, value in (("threshold", threshold), ("containment", containment)):
        if not 0 < value <= 1:
            raise ValueError(f"The near-duplicate {name} is {value}; it must be above 0 and at most 1.")
    normalised = [words_of(text) for text in texts]
    distinct = list(dict.fromkeys(normalised))
    parent = list(range(len(distinct)))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    words = [_as_set(text) for text in distinct]
    for a, b in _candidates(words, threshold):
        if root(a) != root(b):
            shared = len(words[a] & words[b])
            if shared >= threshold * (len(words[a]) + len(words[b]) - shared):
                parent[root(a)] = root(b)
    long = [text if len(text) >= CONTAINMENT_MINIMUM_WORDS else () for text in distinct]
    pairs = [_as_set(pairwise(text)) for text in long]
    for a, b in _candidates(pairs, containment):
        if root(a) != root(b):
            shared = len(pairs[a] & pairs[b])
            if shared >= containment * min(len(pairs[a]), len(pairs[b])):
                parent[root(a)] = root(b)
    component = {text: root(number) for number, text in enumerate(distinct)}
    numbers: dict[int, int] = {}
    return [numbers.setdefault(component[text], len(numbers)) for text in normalised]


def _as_set(items: Iterable[Hashable]) -> set[Element]:
    """A multiset as a set: each item with its how-manieth occurrence."""
    seen: Counter[Hashable] = Counter()
    elements = set()
    for item in items:
        elements.add((item, seen[item]))
        seen[item] += 1
    return elements


def _candidates(sets: Sequence[set[Element]], threshold: float) -> Iterator[tuple[int, int]]:
    """Pairs (a, b) of which b contains one of the rarest elements of a: all that can overlap by the threshold."""
    holders: dict[Element, list[int]] = defaultdict(list)
    for number, elements in enumerate(sets):
        for element in elements:
            holders[element].append(number)
    for a, elements in enumerate(sets):
        rarest = sorted(elements, key=lambda element: (len(holders[element]), str(element)))
        needed = math.ceil(threshold * len(elements) - 1e-9)  # without rounding errors such as 0.6 * 5 > 3
        prefix = rarest[: len(elements) - needed + 1]
        for b in set().union(*(holders[element] for element in prefix)) - {a}:
            yield a, b


def split_by_cluster(
    rows: Sequence[dict[str, Any]],
    *,
    test_texts: int,
    seed: int,
    minimum_words: int = 3,
    threshold: float = THRESHOLD,
    containment: float = CONTAINMENT,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split rows into training and test rows without a near-duplicate across the two.

    Clusters are visited in a random order that depends only on the texts and the seed. A cluster goes to the test set
    if its distinct texts of at least `minimum_words` words still fit; of each such text the first row is taken. What
    else is in that cluster (repeated recordings, shorter texts) is in neither set: `len(rows) - len(train) -
    len(test)` rows, logged.

    Args:
        rows: dicts with `text`.
        test_texts: number of test rows; their texts are distinct up to case and punctuation.
        seed: of the random order.
        minimum_words: shorter texts are never tested.
        threshold: of `near_duplicate_clusters`.
        containment: of `near_duplicate_clusters`.

    Returns:
        Training rows and test rows, both in the order of `rows`.

    Raises:
        ValueError: there are not enough texts, or no choice of whole clusters gives exactly `test_texts`.
    """
    clusters = near_duplicate_clusters([row["text"] for row in rows], threshold, containment)
    first_rows: dict[int, dict[tuple[str, ...], int]] = defaultdict(dict)  # cluster -> text -> its first row
    for number, (row, cluster) in enumerate(zip(rows, clusters, strict=True)):
        words = words_of(row["text"])
        if len(words) >= minimum_words:
            first_rows[cluster].setdefault(words, number)
    available = sum(len(texts) for texts in first_rows.values())
    if not 0 <= test_texts <= available:
        raise ValueError(
            f"{test_texts} test texts were asked for, but the rows hold {available} distinct texts of at least "
            f"{minimum_words} words. Ask for fewer."
        )
    order = sorted(first_rows, key=lambda cluster: min(first_rows[cluster]))
    random.Random(seed).shuffle(order)
    test_clusters: set[int] = set()
    chosen: set[int] = set()
    for cluster in order:
        if len(chosen) + len(first_rows[cluster]) <= test_texts:
            test_clusters.add(cluster)
            chosen.update(first_rows[cluster].values())
    if len(chosen) != test_texts:
        raise ValueError(
            f"Whole clusters of near-duplicates give {len(chosen)} test texts in this order, not {test_texts}. Ask for "
            f"{len(chosen) or 'more'}."
        )
    train = [row for row, cluster in zip(rows, clusters, strict=True) if cluster not in test_clusters]
    test = [row for number, row in enumerate(rows) if number in chosen]
    logger.info(
        "%d rows: %d for training, %d for testing, %d left out (repeated or short texts in test clusters).",
        len(rows),
        len(train),
        len(test),
        len(rows) - len(train) - len(test),
    )
    return train, test


def without_near_duplicates(rows: list[dict[str, Any]], of: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows whose text has no near-duplicate, directly or through other rows, among the texts of `of`."""
    clusters = near_duplicate_clusters([row["text"] for row in [*rows, *of]])
    taken = set(clusters[len(rows) :])
    return [row for row, cluster in zip(rows, clusters) if cluster not in taken]
