"""Splits of labelled utterances for linear probes, whose sides share no text and, where possible, no speaker.

A text here is a cluster of near-duplicates (`data/splits.py`). Test rows are those of a share of the speakers; a text of
both test and other speakers goes to one side, by chance, and its rows on the other side are left out. So speakers with
texts of their own lose no rows, and voices that all speak the same texts are still tested on new ones. Where no such split
has every class on both sides (each class has a speaker of its own, say), the split is by text alone.
"""

from collections.abc import Sequence

import numpy as np

from ..data.schema import Row
from ..data.splits import near_duplicate_clusters
from .probe_labels import MINIMUM, Label, ProbeError, read_labels


ATTEMPTS = 60  # at a split with every class on both sides
Split = tuple[np.ndarray, np.ndarray]  # indices of training rows and test rows, among those that have the label


def plan_probes(
    rows: Sequence[Row],
    labels: Sequence[str],
    seeds: int = 3,
    test_share: float = 0.3,
    by_speaker: bool = True,
    minimum: int = MINIMUM,
) -> list[tuple[Label, list[Split], list[str]]]:
    """Each label, its splits, and what their sides do not share ("text", "speaker").

    Raises:
        ProbeError: see `probe_states`.
    """
    clusters, planned = text_clusters(rows), []
    for label in read_labels(rows, labels, minimum):
        chosen = [rows[i] for i in label.index]
        planned.append((label, *_splits(label, chosen, clusters[label.index], seeds, test_share, by_speaker)))
    return planned


def text_clusters(rows: Sequence[Row]) -> np.ndarray:
    """(rows,) numbers, the same for near-duplicate texts; a row without text is alone."""
    clusters = near_duplicate_clusters([str(row.get("text") or "") for row in rows])
    return np.array([cluster if row.get("text") else -1 - i for i, (row, cluster) in enumerate(zip(rows, clusters))])


def _splits(
    label: Label, rows: list[Row], clusters: np.ndarray, seeds: int, share: float, by_speaker: bool
) -> tuple[list[Split], list[str]]:
    speakers = None
    if by_speaker and label.name != "speaker" and all(row.get("speaker") not in (None, "") for row in rows):
        speakers = np.unique([str(row["speaker"]) for row in rows], return_inverse=True)[1]
        if len(set(speakers)) > 1:
            splits = [_split(label, clusters, speakers, seed, share) for seed in range(seeds)]
            if all(split is not None for split in splits):
                return splits, ["text", "speaker"]
    splits = [_split(label, clusters, None, seed, share) for seed in range(seeds)]
    if any(split is None for split in splits):
        raise ProbeError(
            f"{label.name}: no split by text leaves every class on both sides ({len(set(clusters))} groups of similar "
            "texts). Give utterances of more different texts, or leave the label out."
        )
    return splits, ["text"]


def _split(label: Label, clusters: np.ndarray, speakers: np.ndarray | None, seed: int, share: float):
    """Training and test rows, or `None` if no attempt has every class on both sides."""
    rng = np.random.default_rng(seed)
    for attempt in range(ATTEMPTS):
        test = np.isin(clusters, some_of(clusters, share, rng))
        train = ~test
        if speakers is not None:
            more = 1 + attempt / ATTEMPTS  # with few speakers a share of them may be too few for all classes
            theirs = np.isin(speakers, some_of(speakers, min(0.5, share * more), rng))
            shared = np.isin(clusters, clusters[theirs]) & np.isin(clusters, clusters[~theirs])
            test, train = theirs & (test | ~shared), ~theirs & (train | ~shared)
        if _suffices(label, train, test):
            return np.flatnonzero(train), np.flatnonzero(test)
    return None


def some_of(groups: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    distinct = np.unique(groups)
    return rng.permutation(distinct)[: max(1, round(share * len(distinct)))]


def _suffices(label: Label, train: np.ndarray, test: np.ndarray) -> bool:
    if label.kind == "number":
        return (
            train.sum() >= 10 and test.sum() >= 5 and np.ptp(label.values[train]) > 0 and np.ptp(label.values[test]) > 0
        )
    if label.kind == "words":
        return testable(label, train, test).mean() >= 0.5
    classes = range(len(label.names))
    return all((label.values[train] == c).sum() >= 4 and (label.values[test] == c).sum() >= 2 for c in classes)


def testable(label: Label, train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """(words,) which words are there, and not everywhere, on both sides."""
    sides = [label.values[train], label.values[test]]
    return np.all([(side.sum(0) >= least) & (~side).any(0) for side, least in zip(sides, (2, 1))], axis=0)
