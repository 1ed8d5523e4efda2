"""Transport problems pair by pair, in float64, differentiated by autograd: slow, and right at any blur and schedule.

For what `sinkhorn.py` does not batch: a schedule of its own for each pair (GeomLoss's default, `diameter=None`), exponents
beyond the range of float32, and the plan itself, which `optimal_transport.py` needs. Also what all transport distances
share: the checks of their arguments, the schedule of eps, exact matrix products, and the distance to an empty sequence.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence


EMPTY_DISTANCE = 1.0  # the cost between orthogonal tokens, as an empty sequence has cosine similarity 0


def epsilon_schedule(diameter: float, blur: float, scaling: float) -> list[float]:
    """Temperatures, first to last: diameter^2, then from diameter^2 down by scaling^2, then blur^2 (as GeomLoss)."""
    falling = np.exp(np.arange(2 * np.log(diameter), 2 * np.log(blur), 2 * np.log(scaling)))
    return [diameter**2, *falling.tolist(), blur**2]


def check_schedule(blur: float, scaling: float, diameter: float | None) -> None:
    if not 0 < blur < math.inf:
        raise ValueError(f"blur is {blur}; it must be positive, e.g. 0.05.")
    if not 0 < scaling < 1:
        raise ValueError(f"scaling is {scaling}; it must lie between 0 and 1, e.g. 0.5.")
    if diameter is not None and not 0 < diameter < math.inf:
        raise ValueError(f"diameter is {diameter}; it must be positive, e.g. 2.0, or None for each pair's own.")


def check_sequences(text: torch.Tensor, text_mask: torch.Tensor, speech: torch.Tensor, speech_mask: torch.Tensor):
    """Raise ValueError unless the states and masks of both sides fit together."""
    for side, states, mask in (("text", text, text_mask), ("speech", speech, speech_mask)):
        if states.ndim not in (3, 4) or mask.shape != states.shape[-3:-1]:
            raise ValueError(
                f"{side} has shape {tuple(states.shape)} and {side}_mask {tuple(mask.shape)}; "
                "they must be (batch, length, dim), or (layers, batch, length, dim), and (batch, length)."
            )
        if not states.is_floating_point():
            raise ValueError(f"{side} has dtype {states.dtype}; states must be floating point.")
    if text.shape[-1] != speech.shape[-1] or text.shape[:-3] != speech.shape[:-3]:
        raise ValueError(
            f"text has shape {tuple(text.shape)}, speech {tuple(speech.shape)}; dim, and layers if given, must agree."
        )


@contextmanager
def exact_matmuls(device: torch.device) -> Iterator[None]:
    """Full float32 products: bfloat16 autocast or TF32 errors of 1e-3 would be divided by eps = 0.0025."""
    backends = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    saved = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, saved):
            backend.fp32_precision = precision


class _PreciseGradient(torch.autograd.Function):
    """A function whose backward, autograd's own, also runs with exact products; once differentiable."""

    @staticmethod
    def forward(ctx, function, text, speech):
        ctx.inputs = [
            side.detach().requires_grad_(ctx.needs_input_grad[i + 1]) for i, side in enumerate((text, speech))
        ]
        with torch.set_grad_enabled(any(ctx.needs_input_grad)):
            ctx.matrix = function(*ctx.inputs)
        return ctx.matrix.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        wanted = [side for side in ctx.inputs if side.requires_grad]
        with exact_matmuls(gradient.device):
            found = iter(torch.autograd.grad(ctx.matrix, wanted, gradient, retain_graph=True))
        return None, *(next(found) if side.requires_grad else None for side in ctx.inputs)


def by_autograd(function, text, text_mask, speech, speech_mask, **options) -> torch.Tensor:
    """`function(text, text_mask, speech, speech_mask, **options)`, exact products in forward and backward."""
    with exact_matmuls(text.device):
        return _PreciseGradient.apply(lambda x, y: function(x, text_mask, y, speech_mask, **options), text, speech)


@dataclass
class PairProblems:
    """One text with every utterance, padded, as a batch of transport problems in float64: differentiable, but slow."""

    x: torch.Tensor  # (length_x, dim), unit vectors from a common origin
    y: torch.Tensor  # (batch, length_y, dim), the same, anything finite at padding
    log_a: torch.Tensor  # (batch, length_x), log-weights
    log_b: torch.Tensor  # (batch, length_y), -inf at padding
    epsilons: list[tuple[torch.Tensor, torch.Tensor]]  # (batch, 1) each: eps, and whether the pair's schedule goes on

    def potentials(self, cost: torch.Tensor, log_a: torch.Tensor, log_b: torch.Tensor):
        """f (batch, rows) and g (batch, columns) after the averaged updates, for cost (batch, rows, columns)."""
        with torch.no_grad():
            first = self.epsilons[0][0]
            f, g = softmin(first, cost, log_b), softmin(first, cost.mT, log_a)
            for eps, active in self.epsilons:
                new_f, new_g = softmin(eps, cost, log_b + g / eps), softmin(eps, cost.mT, log_a + f / eps)
                f, g = torch.where(active, (f + new_f) / 2, f), torch.where(active, (g + new_g) / 2, g)
            return f, g


def pair_problems(text, text_mask, speech, speech_mask, blur, scaling, diameter) -> Iterator[PairProblems]:
    """The problems of each text that has tokens, with all utterances that have some."""
    texts, utterances = _unit_sequences(text, text_mask), _unit_sequences(speech, speech_mask)
    if not texts or not utterances:
        return
    origin = torch.cat(texts).mean(0).detach()  # shorter vectors lose fewer digits in products
    y = pad_sequence(utterances, batch_first=True) - origin
    lengths = torch.tensor([len(utterance) for utterance in utterances], device=y.device)
    log_b = -lengths.double().log()[:, None].expand(-1, y.shape[1])
    log_b = log_b.masked_fill(torch.arange(y.shape[1], device=y.device) >= lengths[:, None], -math.inf)
    for x in texts:
        if diameter is None:
            schedules = [epsilon_schedule(d, blur, scaling) for d in _bounding_box_diagonals(x, utterances)]
        else:
            schedules = [epsilon_schedule(diameter, blur, scaling)] * len(utterances)
        epsilons = []
        for step in range(max(map(len, schedules))):
            eps = [schedule[min(step, len(schedule) - 1)] for schedule in schedules]
            active = [step < len(schedule) for schedule in schedules]
            epsilons.append((y.new_tensor(eps)[:, None], torch.tensor(active, device=y.device)[:, None]))
        log_a = y.new_full((len(y), len(x)), -math.log(len(x)))
        yield PairProblems(x - origin, y, log_a, log_b, epsilons)


def softmin(eps: torch.Tensor, cost: torch.Tensor, log_weights: torch.Tensor) -> torch.Tensor:
    """-eps log sum_j exp(log_weights_j - cost_ij / eps); eps (batch, 1), cost (batch, rows, columns)."""
    return -eps * torch.logsumexp(log_weights.unsqueeze(-2) - cost / eps.unsqueeze(-1), -1)


def half_squared_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """|x_i - y_j|^2 / 2."""
    return (x.square().sum(-1).unsqueeze(-1) + y.square().sum(-1).unsqueeze(-2)) / 2 - x @ y.mT


def fill_empty(rows: list[torch.Tensor], text, text_mask, speech, speech_mask) -> torch.Tensor:
    """Rows of distances between sequences that have tokens -> (B_text, B_speech), `EMPTY_DISTANCE` for the others."""
    nothing = (text[..., :0].sum() + speech[..., :0].sum()).expand(0, 0)  # with a gradient, of zeros
    dtype = torch.promote_types(torch.promote_types(text.dtype, speech.dtype), torch.float32)
    return with_empty((torch.stack(rows) if rows else nothing).to(dtype), text_mask, speech_mask)


def with_empty(values: torch.Tensor, text_mask: torch.Tensor, speech_mask: torch.Tensor) -> torch.Tensor:
    rows, columns = text_mask.bool().any(-1), speech_mask.bool().any(-1)
    matrix = values.new_full((*values.shape[:-2], len(rows), len(columns)), EMPTY_DISTANCE)
    return matrix.masked_scatter(rows[:, None] & columns, values)


def _unit_sequences(states: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    mask = mask.bool()
    lengths = [length for length in mask.sum(-1).tolist() if length]
    return list(F.normalize(states[mask].double(), dim=-1).split(lengths)) if lengths else []


def _bounding_box_diagonals(x: torch.Tensor, utterances: list[torch.Tensor]) -> list[float]:
    lowest = torch.stack([torch.minimum(x.amin(0), y.amin(0)) for y in utterances])
    highest = torch.stack([torch.maximum(x.amax(0), y.amax(0)) for y in utterances])
    return (highest - lowest).norm(dim=-1).clamp(min=1e-6).nan_to_num(1.0).tolist()  # 0 if all tokens are the same


def pairwise_sinkhorn_divergence(text, text_mask, speech, speech_mask, blur, scaling, diameter) -> torch.Tensor:
    """The same divergences by log-sum-exp, pair by pair: a schedule of its own for each, and any range of exponents."""
    rows, cost_yy = [], None
    for problem in pair_problems(text, text_mask, speech, speech_mask, blur, scaling, diameter):
        x, y, log_a, log_b = problem.x, problem.y, problem.log_a, problem.log_b
        eps = problem.epsilons[-1][0]
        cost_xy, cost_yx = half_squared_distances(x, y.detach()), half_squared_distances(y, x.detach())
        cost_xx = half_squared_distances(x, x.detach()).expand(len(y), -1, -1)
        if cost_yy is None:  # the utterances are the same for every text
            cost_yy = half_squared_distances(y, y.detach())
        f, g = problem.potentials(cost_xy, log_a, log_b)
        f_self, g_self = problem.potentials(cost_xx, log_a, log_a)[0], problem.potentials(cost_yy, log_b, log_b)[0]
        f, g = softmin(eps, cost_xy, log_b + g / eps), softmin(eps, cost_yx, log_a + f / eps)
        f_self, g_self = softmin(eps, cost_xx, log_a + f_self / eps), softmin(eps, cost_yy, log_b + g_self / eps)
        rows.append((log_a.exp() * (f - f_self)).sum(-1) + (log_b.exp() * (g - g_self)).sum(-1))
    return fill_empty(rows, text, text_mask, speech, speech_mask)
