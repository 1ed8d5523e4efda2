"""Retrieval between utterances and transcripts: does an utterance's nearest text say what was said?

An utterance looks among the distinct texts: a wrong one that many say is still one wrong answer. A transcript looks
among all utterances. `chance_of` has what guessing gives in each direction.
"""

from collections import Counter

import numpy as np
import torch

from .metrics.resampling import CorpusMetric, bootstrap_values, interval


def retrieval_ranks(similarity: torch.Tensor, texts: list[str]) -> dict[str, torch.Tensor]:
    """The rank of the right one for every query, best is 1.

    Args:
        similarity: (texts, utterances); text i is the transcript of utterance i.
        texts: the transcripts; equal ones are all right answers for each other's utterances.

    Returns:
        (n,) int64 from utterance to transcript, among distinct texts, under "", and of the other direction, among all
        utterances, under "text_to_speech_".
        Ties count against us: an item's rank is the number of wrong ones at least as similar, plus 1.
    """
    ids = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    label = torch.tensor([ids[text] for text in texts], device=similarity.device)
    best = similarity.new_full((len(ids), len(texts)), -torch.inf)  # of each distinct text: (distinct, utterances)
    best = best.scatter_reduce(0, label[:, None].expand_as(similarity), similarity, "amax")  # NaN stays NaN
    right = label[:, None] == label[None, :]
    own = similarity.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return {  # NaN counts against us too
        "": (~(best < best.gather(0, label[None]))).sum(0),  # the right text is not below itself: the "plus 1"
        "text_to_speech_": 1 + (~(similarity < own) & ~right).sum(1),
    }


def chance_of(texts: list[str]) -> dict[str, float]:
    """`chance` (of recall@1) and `chance_mean_rank`, what guessing gives, and both with `text_to_speech_` before."""
    n, times = len(texts), Counter(texts)
    return {
        "chance": 1 / len(times),
        "chance_mean_rank": (len(times) + 1) / 2,
        "text_to_speech_chance": sum(right**2 for right in times.values()) / n**2,
        "text_to_speech_chance_mean_rank": sum(right * (1 + (n - right) / (right + 1)) for right in times.values()) / n,
    }


def retrieval_metrics(similarity: torch.Tensor, texts: list[str], ks: tuple[int, ...] = (1, 5)) -> dict[str, float]:
    """Recall@k and the mean rank of the right one, in both directions.

    Args:
        similarity, texts: see `retrieval_ranks`.
        ks: how many of the nearest may hold the right one.

    Returns:
        `recall@k` (as fractions) and `mean_rank` (best is 1) from utterance to transcript, and both of these with
        `text_to_speech_` before for the other direction.
    """
    return {
        name: value.double().mean().item()
        for prefix, rank in retrieval_ranks(similarity, texts).items()
        for name, value in _of_queries(prefix, rank, ks).items()
    }


def retrieval_intervals(
    similarity: torch.Tensor, texts: list[str], ks: tuple[int, ...] = (1, 5), samples: int = 1000
) -> dict[str, list[float]]:
    """95% bootstrap intervals of `retrieval_metrics`, by the same names: of other queries among the same candidates.

    Texts are drawn with replacement, each with all of its utterances.
    """
    metrics = {
        name: mean_of_queries(value.double().cpu().numpy(), texts)
        for prefix, rank in retrieval_ranks(similarity, texts).items()
        for name, value in _of_queries(prefix, rank, ks).items()
    }
    drawn = bootstrap_values(list(metrics.values()), samples, seed=0)
    return {name: interval(values) for name, values in zip(metrics, drawn, strict=True)}


def mean_of_queries(values: np.ndarray, texts: list[str] | list[int]) -> CorpusMetric:
    """The mean of (n,) values as a metric whose units are the distinct texts."""
    return CorpusMetric(np.stack([values, np.ones_like(values)], 1), _mean).grouped(texts)


def _of_queries(prefix: str, rank: torch.Tensor, ks: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """What the metrics are means of."""
    return {f"{prefix}recall@{k}": rank <= k for k in ks} | {f"{prefix}mean_rank": rank}


def _mean(sums: np.ndarray) -> float:
    return float(sums[0] / sums[1])
