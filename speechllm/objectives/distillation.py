"""Distillation of the LLM's own next-token distributions: what it predicts after hearing equals what it predicts after
reading.

    L = mean over answer positions of  T^2 * KL( p_T(. | transcript, answer so far) || p_T(. | speech, answer so far) )

with p_T the softmax of the logits over T. The teacher is the LLM given the transcript, the student the same LLM given
the speech. Ultravox (https://github.com/fixie-ai/ultravox, `_compute_kl_loss`) trains on this term alone, with T = 2 and
without the factor T^2; SALAD (arXiv 2510.13632) is a later study of such cross-modal distillation. T^2 keeps the size of
the gradient independent of T (Hinton et al., arXiv 1503.02531, Section 2).

Logits over the whole vocabulary are what costs memory: 1,000 positions of a vocabulary of 128,000 are 0.5 GB in float32,
several times over. They are made for `chunk` positions at a time and made again in the backward pass.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


DIRECTIONS = ("forward", "reverse")


def next_token_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    *,
    temperature: float = 1.0,
    direction: str = "forward",
    chunk: int = 256,
    reduction: str = "mean",
) -> torch.Tensor:
    """KL divergence between next-token distributions, in nats times `temperature` squared.

    Args:
        student: (positions, dim), final hidden states that predict the answer's tokens after speech.
        teacher: (positions, dim), those of the same tokens after text; gets no gradient.
        head: the LM head, (positions, dim) -> logits (positions, vocabulary). Gradients reach what it is made of too.
        temperature: both logits are divided by it.
        direction: `"forward"`, KL(teacher || student): the student covers all that the teacher considers likely;
            `"reverse"`, KL(student || teacher): it may settle for a part.
        chunk: positions whose logits are in memory at once; it does not change the result.
        reduction: `"mean"` over positions, or `"sum"`.

    Returns:
        A scalar in float32 (float64 for float64 logits); 0 if there are no positions.

    Raises:
        ValueError: if the shapes differ, or the direction or the reduction is unknown.
    """
    if student.shape != teacher.shape or student.ndim != 2:
        raise ValueError(
            f"Student and teacher states have shapes {tuple(student.shape)} and {tuple(teacher.shape)}; both must be "
            "(positions, dim), for the same answer tokens."
        )
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is {direction!r}; use one of {DIRECTIONS}.")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; use 'mean' or 'sum'.")

    def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = _log_probabilities(head(teacher), temperature)
        found = _log_probabilities(head(student), temperature)
        p, q = (target, found) if direction == "forward" else (found, target)
        return F.kl_div(q, p, reduction="sum", log_target=True)

    total = student[:0].sum().float()  # without positions the loss still belongs to the graph
    for start in range(0, len(student), chunk):
        part = slice(start, start + chunk)
        states = student[part], teacher[part].detach()
        total = total + checkpoint(divergence, *states, use_reentrant=False, preserve_rng_state=False)
    return total * temperature**2 / (max(1, len(student)) if reduction == "mean" else 1)


def _log_probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=-1)
