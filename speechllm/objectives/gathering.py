"""Rows of all processes on every process, with gradients.

Contrastive losses need what other processes hold. `gather_rows` concatenates; its backward sums, over processes, the
gradients with respect to a process's own rows. If every process then computes the same loss of the gathered rows, that
sum is (number of processes) x the loss's gradient, and the average over processes that DDP and FSDP take of parameters'
gradients makes it the gradient of the loss of the whole global batch, however it is split.
"""

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from torch.nn import functional as F


def several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_integers(values: list[int], device: torch.device) -> list[list[int]]:
    """Every process's `values`, in the order of processes."""
    mine = torch.tensor(values, device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return torch.stack(everyone).tolist()


def gather_rows(rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """(own rows, ...) -> (rows of all processes, ...), in the order of processes.

    Args:
        rows: equal in every dimension but the first.
        counts: each process's number of rows; it may be 0.
    """
    padded = F.pad(rows, (0, 0) * (rows.ndim - 1) + (0, max(counts) - len(rows)))
    return torch.cat([part[:count] for part, count in zip(differentiable.all_gather(padded), counts, strict=True)])
