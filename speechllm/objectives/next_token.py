"""The loss that LLMs are trained on, of the answers to speech: recognition as a term of pretraining."""

from collections.abc import Callable

import torch
from torch.nn import functional as F


def next_token_loss(
    states: torch.Tensor,
    labels: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    *,
    reduction: str = "mean",
) -> torch.Tensor:
    """Cross-entropy of the answer's tokens, in nats.

    Args:
        states: (positions, dim), final hidden states that predict the answer's tokens.
        labels: (positions,), these tokens.
        head: the LM head, (positions, dim) -> logits (positions, vocabulary).
        reduction: `"mean"` over positions (NaN if there are none), or `"sum"`.

    Returns:
        A scalar in float32 (float64 for float64 logits).

    Raises:
        ValueError: if states and labels do not fit.
    """
    if states.ndim != 2 or labels.shape != states.shape[:1]:
        raise ValueError(
            f"States have shape {tuple(states.shape)} and labels {tuple(labels.shape)}; they must be (positions, dim) and "
            "(positions,)."
        )
    logits = head(states)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction=reduction)
