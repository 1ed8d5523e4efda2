"""InfoNCE (van den Oord et al., arXiv 1807.03748) over a matrix of similarities."""

import torch
from torch.nn import functional as F


def info_nce(
    similarity: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 0.1,
    symmetric: bool = False,
    offset: int | None = None,
) -> torch.Tensor:
    """Mean over i of -log softmax_j(similarity[i, j] / temperature)[i]: row i belongs with column i.

    Args:
        similarity: (rows, columns), rows = text, columns = speech.
        temperature: tau; the paper's 0.1. A tensor gets a gradient.
        symmetric: average with the same loss over columns. The paper takes rows only.
        offset: for matrices that are not square: row i belongs with column i + offset. Rows or columns that are left
            without a partner ask for nothing, but are negatives for those that have one.

    Returns:
        The loss in nats, a scalar in float32 (float64 for float64 similarities); 0 if there is no pair. Chance is log(columns), and log(rows) for columns.

    Raises:
        ValueError: if the matrix is not square and no `offset` is given.
    """
    if similarity.ndim != 2 or (offset is None and similarity.shape[0] != similarity.shape[1]):
        raise ValueError(
            f"The similarity matrix has shape {tuple(similarity.shape)}; it must be square, row i <-> column i, unless "
            "`offset` says which column belongs with row 0."
        )
    similarity = similarity.to(torch.promote_types(similarity.dtype, torch.float32))
    logits, offset = similarity / temperature, offset or 0
    rows = torch.arange(max(0, min(logits.shape[0], logits.shape[1] - offset)), device=logits.device)
    columns = rows + offset
    loss = F.cross_entropy(logits[rows], columns, reduction="sum")
    if symmetric:
        loss = (loss + F.cross_entropy(logits.T[columns], rows, reduction="sum")) / 2
    return loss / max(1, len(rows))
