"""Similarity of every text with every utterance of a batch.

A similarity is a function `(text, text_mask, speech, speech_mask) -> (B_text, B_speech)`; write your own and pass it to
`layerwise_contrastive_loss` or `ContrastiveTrainer`. Cosine (arXiv 2412.15712, Section 3.1): the mean of each
sequence's valid tokens, then the cosine of the means.
"""

import torch
from torch.nn import functional as F


class _WeightedSum(torch.autograd.Function):
    """(batch, length) weights and (batch, length, dim) states -> (batch, dim). The gradient at the states is a scaled copy
    of the incoming one for every token; taken as the matrix product that autograd makes of it, it costs three times as
    much. The weights have none."""

    @staticmethod
    def forward(ctx, weights: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weights)
        with torch.autocast(states.device.type, enabled=False):  # it would take the product in bfloat16
            return torch.bmm(weights[:, None], states)[:, 0]

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:
        (weights,) = ctx.saved_tensors
        return None, weights[:, :, None] * gradient[:, None]


def masked_mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over valid tokens, accumulated in float32 (float64 stays float64).

    Args:
        states: (batch, length, dim).
        mask: (batch, length), `True` = valid.

    Returns:
        (batch, dim); zeros for a sequence without valid tokens.
    """
    dtype = torch.promote_types(states.dtype, torch.float32)
    mask, states = mask.bool(), states.to(dtype)
    weights = mask.to(dtype) / mask.sum(-1, keepdim=True).clamp(min=1)
    mean = _WeightedSum.apply(weights, states)
    # The padding may hold 0 x NaN: only then is a copy without it worth its time.
    if not mean.detach().sum().isfinite():
        mean = _WeightedSum.apply(weights, states.masked_fill(~mask[:, :, None], 0))
    return mean


def cosine_similarity_matrix(
    text: torch.Tensor, text_mask: torch.Tensor, speech: torch.Tensor, speech_mask: torch.Tensor
) -> torch.Tensor:
    """Cosine similarity of mean-pooled sequences.

    Args:
        text: (B_text, length, dim); text_mask: (B_text, length), `True` = valid.
        speech: (B_speech, length, dim); speech_mask: (B_speech, length).

    Returns:
        (B_text, B_speech) in [-1, 1], float32 (float64 for float64 inputs).
    """
    pooled_text = F.normalize(masked_mean(text, text_mask), dim=-1)
    pooled_speech = F.normalize(masked_mean(speech, speech_mask), dim=-1)
    with torch.autocast(pooled_text.device.type, enabled=False):
        return pooled_text @ pooled_speech.T
