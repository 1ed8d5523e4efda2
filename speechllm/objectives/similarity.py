"""Similarity of every text with every utterance of a batch.

A similarity is a function `(text, text_mask, speech, speech_mask) -> (B_text, B_speech)`; write your own and pass it to
`layerwise_contrastive_loss` or `ContrastiveTrainer`. Cosine (arXiv 2412.15712, Section 3.1): the mean of each
sequence's valid tokens, then the cosine of the means.
"""

import torch
from torch.nn import functional as F


class _MaskedMean(torch.autograd.Function):
    """`masked_mean`. Forward, the rows of each sequence are a bag of an embedding table: the padding is never read. The
    gradient at the states is a scaled copy of the incoming one for every token; taken as `embedding_bag`'s own, it is
    gathered row by row."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        lengths = mask.sum(1)
        ctx.save_for_backward(mask, lengths)
        valid = mask.flatten().nonzero()[:, 0]
        sums = F.embedding_bag(valid, states.flatten(0, 1), lengths.cumsum(0) - lengths, mode="sum")
        return sums / lengths.clamp(min=1)[:, None]

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        mask, lengths = ctx.saved_tensors
        weights = mask.to(gradient.dtype) / lengths.clamp(min=1)[:, None]
        return weights[:, :, None] * gradient[:, None], None


def masked_mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over valid tokens, accumulated in float32 (float64 stays float64).

    Args:
        states: (batch, length, dim).
        mask: (batch, length), `True` = valid.

    Returns:
        (batch, dim); zeros for a sequence without valid tokens.
    """
    return _MaskedMean.apply(states.to(torch.promote_types(states.dtype, torch.float32)), mask.bool())


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
