"""A term that ties the scale of the speech tokens to that of the LLM's text embeddings.

    L = mean over utterances of  ( log mean-square(its speech tokens) - log mean-square(text embeddings) )^2

Cosine and the normalised Wasserstein distance leave the scale of the speech tokens free, while the LLM has only ever read
embeddings of one scale. One number of each utterance is tied, and its tokens may still differ in norm, as those of text do.
(One number of each batch would be enough, but then the gradient would depend on how a global batch is split.) Logarithms
make tokens of twice and of half the scale equally wrong, (ln 4)^2 = 1.92, whatever the LLM's width.
"""

import torch
from torch import nn


def scale_penalty(
    speech_tokens: torch.Tensor, lengths: list[int], text_mean_square: torch.Tensor | float
) -> dict[str, torch.Tensor]:
    """See the module's formula.

    Args:
        speech_tokens: (tokens, dim), of one utterance after the other.
        lengths: tokens of each utterance, at least one.
        text_mean_square: mean square of the entries of text embeddings, see `embedding_mean_square`.

    Returns:
        `loss`, the square, and `ratio`, the root mean square of the speech tokens over that of text, 1 where the loss is
        0; both (utterances,).
    """
    squares = speech_tokens.to(torch.promote_types(speech_tokens.dtype, torch.float32)).square().mean(-1)
    speech = torch.stack([part.mean() for part in squares.split(lengths)])
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
