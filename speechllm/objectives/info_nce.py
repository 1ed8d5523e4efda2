"""InfoNCE (van den Oord et al., arXiv 1807.03748) over a matrix of similarities."""

import torch
from torch.nn import functional as F


def info_nce(similarity: torch.Tensor, *, temperature: float = 0.1, symmetric: bool = False) -> torch.Tensor:
    """Mean over i of -log softmax_j(similarity[i, j] / temperature)[i]: row i belongs with column i.

    Args:
        similarity: (batch, batch), rows = text, columns = speech.
        temperature: tau; the paper's 0.1.
        symmetric: average with the same loss over columns. The paper takes rows only.

    Returns:
        The loss in nats, a scalar. Chance is log(batch).

    Raises:
        ValueError: if the matrix is not square.
    """
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(
            f"The similarity matrix has shape {tuple(similarity.shape)}; it must be square: row i <-> column i."
        )
    logits = similarity / temperature
    target = torch.arange(len(logits), device=logits.device)
    loss = F.cross_entropy(logits, target)
    return (loss + F.cross_entropy(logits.T, target)) / 2 if symmetric else loss
