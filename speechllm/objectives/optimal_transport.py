"""Transport costs without debiasing: the exact Wasserstein distance, and the Sinkhorn plan's cost, an upper bound.

Tokens are L2-normalised, each sequence is the uniform measure on its tokens, the cost is C_ij = |x_i - y_j|^2 / 2 =
1 - cos. Both are <P, C> for a plan P that moves one sequence onto the other: the best plan, found by the network
simplex of POT (Flamary et al., 2021), or the entropic plan, rounded so that its marginals are exact (Altschuler et al.,
arXiv 1705.09634, Algorithm 2). The gradient takes P as a constant; for the best plan that is the exact (sub)gradient.
"""

import torch
from torch.nn import functional as F

from .pairwise_transport import (
    by_autograd,
    check_schedule,
    check_sequences,
    fill_empty,
    half_squared_distances,
    pair_problems,
    softmin,
)


def exact_wasserstein_distance_matrix(
    text: torch.Tensor, text_mask: torch.Tensor, speech: torch.Tensor, speech_mask: torch.Tensor
) -> torch.Tensor:
    """Exact optimal transport cost between L2-normalised tokens of every text and every utterance.

    Solved pair by pair on the CPU in float64. Needs the package POT.

    Args:
        text: (B_text, length, dim), any float dtype; text_mask: (B_text, length), `True` = valid.
        speech: (B_speech, length, dim); speech_mask: (B_speech, length).

    Returns:
        (B_text, B_speech), float32 (float64 for float64 inputs), in [0, 2] to within rounding; 1 for a sequence
        without valid tokens. NaN or infinity in a valid token makes its distances NaN.

    Raises:
        ImportError: if POT is not installed.
        ValueError: if shapes do not fit.
    """
    try:
        import ot
    except ImportError as error:
        raise ImportError("Exact optimal transport needs POT: pip install 'speechllm[transport]'.") from error
    check_sequences(text, text_mask, speech, speech_mask)
    layers = zip(text, speech) if text.ndim == 4 else [(text, speech)]
    matrices = [by_autograd(_exact, x, text_mask, y, speech_mask, emd2=ot.emd2) for x, y in layers]
    return torch.stack(matrices) if text.ndim == 4 else matrices[0]


def _exact(text, text_mask, speech, speech_mask, emd2) -> torch.Tensor:
    text_lengths = [length for length in text_mask.bool().sum(-1).tolist() if length]
    speech_lengths = [length for length in speech_mask.bool().sum(-1).tolist() if length]
    dtype = torch.promote_types(torch.promote_types(text.dtype, speech.dtype), torch.float32)
    x = F.normalize(text[text_mask.bool()].to(dtype), dim=-1)
    y = F.normalize(speech[speech_mask.bool()].to(dtype), dim=-1)
    cost = half_squared_distances(x, y)  # (tokens of all texts, tokens of all utterances)
    rows = []
    for strip in cost.split(text_lengths) if text_lengths else ():
        row = []
        for block in strip.split(speech_lengths, dim=1) if speech_lengths else ():
            if block.isfinite().all():
                _, log = emd2([], [], block.detach().double().cpu().numpy(), return_matrix=True)
                row.append((torch.from_numpy(log["G"]).to(block) * block).sum())
            else:
                row.append(block.sum() * torch.nan)
        if row:
            rows.append(torch.stack(row))
    return fill_empty(rows, text, text_mask, speech, speech_mask)


def transport_cost_matrix(
    text: torch.Tensor,
    text_mask: torch.Tensor,
    speech: torch.Tensor,
    speech_mask: torch.Tensor,
    *,
    blur: float = 0.05,
    scaling: float = 0.5,
    diameter: float | None = 2.0,
) -> torch.Tensor:
    """Cost of the entropic plan between L2-normalised tokens of every text and every utterance.

    At least the exact cost, which it approaches as blur falls and scaling rises; not 0 for identical sequences.

    Args, Returns, Raises: as `wasserstein_distance_matrix`.
    """
    check_sequences(text, text_mask, speech, speech_mask)
    check_schedule(blur, scaling, diameter)
    options = dict(blur=blur, scaling=scaling, diameter=diameter)
    layers = zip(text, speech) if text.ndim == 4 else [(text, speech)]
    matrices = [by_autograd(_plan_cost, x, text_mask, y, speech_mask, **options) for x, y in layers]
    return torch.stack(matrices) if text.ndim == 4 else matrices[0]


def _plan_cost(text, text_mask, speech, speech_mask, blur, scaling, diameter) -> torch.Tensor:
    rows = []
    for problem in pair_problems(text, text_mask, speech, speech_mask, blur, scaling, diameter):
        cost, log_a, log_b = half_squared_distances(problem.x, problem.y), problem.log_a, problem.log_b
        eps = problem.epsilons[-1][0]
        with torch.no_grad():
            f, _ = problem.potentials(cost, log_a, log_b)
            g = softmin(eps, cost.mT, log_a + f / eps)
            logits = (f / eps + log_a).unsqueeze(-1) + (g / eps + log_b).unsqueeze(-2) - cost / eps.unsqueeze(-1)
            plan = _round_to_marginals(logits.exp(), log_a.exp(), log_b.exp())
        rows.append((plan * cost).sum((-1, -2)))
    return fill_empty(rows, text, text_mask, speech, speech_mask)


def _round_to_marginals(plan: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The nearby plan (batch, rows, columns) whose sums are a (batch, rows) and b (batch, columns)."""
    smallest = torch.finfo(plan.dtype).tiny
    plan = plan * (a / plan.sum(-1).clamp(min=smallest)).clamp(max=1).unsqueeze(-1)
    plan = plan * (b / plan.sum(-2).clamp(min=smallest)).clamp(max=1).unsqueeze(-2)
    missing_a, missing_b = a - plan.sum(-1), b - plan.sum(-2)
    total = missing_a.abs().sum(-1).clamp(min=smallest)
    return plan + missing_a.unsqueeze(-1) * missing_b.unsqueeze(-2) / total[:, None, None]
