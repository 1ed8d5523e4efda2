"""A term that ties the scale of the speech tokens to that of the LLM's text embeddings.

    L = ( log mean-square(speech tokens) - log mean-square(text embeddings) )^2

Cosine and the normalised Wasserstein distance leave the scale of the speech tokens free, while the LLM has only ever read
embeddings of one scale. One number was left free, so one number is tied: the mean runs over all the speech tokens of the
batch, and tokens may still differ in norm, as those of text do. Logarithms make tokens of twice and of half the scale
equally wrong, (ln 4)^2 = 1.92, whatever the LLM's width.
"""

import torch
from torch import nn


def scale_penalty(speech_tokens: torch.Tensor, text_mean_square: torch.Tensor | float) -> dict[str, torch.Tensor]:
    """See the module's formula.

    Args:
        speech_tokens: (tokens, dim), at least one.
        text_mean_square: mean square of the entries of text embeddings, see `embedding_mean_square`.

    Returns:
        `loss`, and `ratio`: root mean square of the speech tokens over that of text, 1 when the loss is 0.
    """
    speech = speech_tokens.to(torch.promote_types(speech_tokens.dtype, torch.float32)).square().mean()
    text = torch.as_tensor(text_mean_square, dtype=speech.dtype, device=speech.device)
    difference = speech.clamp(min=torch.finfo(speech.dtype).tiny).log() - text.log()
    return {"loss": difference.square(), "ratio": (difference.detach() / 2).exp()}


@torch.no_grad()
def embedding_mean_square(embeddings: nn.Module, size: int, chunk: int = 8192) -> float:
    """Mean square of the entries of a table of `size` embeddings, as the LLM reads them: looked up through its own
    module, since some scale them."""
    device = next(embeddings.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for ids in torch.arange(size, device=device).split(chunk):
        rows = embeddings(ids)
        total += rows.double().square().mean(-1).sum()
    return (total / size).item()
