"""Wasserstein distance of token sequences: the debiased Sinkhorn divergence, all pairs of a batch at once.

Tokens are L2-normalised, each sequence is the uniform measure on its tokens, the cost is |x - y|^2 / 2 = 1 - cos. With
entropic transport OT_eps, eps = blur^2,

    S(a, b) = OT_eps(a, b) - OT_eps(a, a) / 2 - OT_eps(b, b) / 2     (Feydy et al., arXiv 1810.08278)

is computed as GeomLoss 0.3.1 does (`SamplesLoss("sinkhorn", p=2, blur, scaling, diameter)`), so that the values agree:

1. eps falls from diameter^2 to blur^2 by scaling^2 a step. At each eps, both potentials f, g are updated from the old
   pair, f~_i = -eps log sum_j b_j exp((g_j - C_ij) / eps), and averaged with it.
2. One last update at blur^2 is not averaged; S = <a, f - f_self> + <b, g - g_self>.
3. The gradient flows through the last update alone, the potentials that enter it being constants: a row-softmax plan
   for x, a column-softmax plan for y. Backward is matrix products only, and no iteration is kept.

How it is made fast. With F = f - |x|^2 / 2 and G = g - |y|^2 / 2 the exponent is (F_i + G_j + <x_i, y_j>) / eps: no cost
matrix is formed. The exponential that holds both potentials serves both updates: its row sums correct F, its column
sums G. Tokens are packed, without padding; rows of a block are the tokens of some texts, columns those of some
utterances, so sums over sequences, and potentials spread over pairs, are matrix products with 0/1 indicators. Blocks
fit the processor's cache. Base 2, because `exp2` is two to three times faster than `exp` on CPUs.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence


EMPTY_DISTANCE = 1.0  # the cost between orthogonal tokens, as an empty sequence has cosine similarity 0

# exp2 is cut off here: results below the normal range slow CPUs down. Sums whose log2 is above SMALLEST_LOG_SUM do not notice.
LOWEST_EXPONENT = {torch.float32: -72.0, torch.float64: -700.0}
SMALLEST_LOG_SUM = -48.0


def wasserstein_distance_matrix(
    text: torch.Tensor,
    text_mask: torch.Tensor,
    speech: torch.Tensor,
    speech_mask: torch.Tensor,
    *,
    blur: float = 0.05,
    scaling: float = 0.5,
    diameter: float | None = 2.0,
) -> torch.Tensor:
    """Debiased Sinkhorn divergence between L2-normalised tokens of every text and every utterance.

    Args:
        text: (B_text, length, dim), or (layers, B_text, length, dim) for several layers in one call; any float dtype.
        text_mask: (B_text, length), `True` = valid, shared by the layers. Padding may hold anything, also NaN.
        speech: (B_speech, length, dim) or (layers, B_speech, length, dim).
        speech_mask: (B_speech, length).
        blur: square root of the last eps, in units of |x - y|.
        scaling: ratio of successive square roots of eps, in (0, 1). Nearer 1 is slower and nearer to convergence.
        diameter: where eps begins; 2 bounds the distance of unit vectors. `None`: the diagonal of the bounding box
            of each pair's tokens, GeomLoss's default (the paper's code). Schedules then differ, and so the
            self terms must be computed for each pair: far slower, in float64, and autograd keeps the last step.

    Returns:
        (B_text, B_speech) or (layers, B_text, B_speech), float32 (float64 for float64 inputs). 0 for identical
        sequences and at least 0 otherwise, each to within 1e-6 in float32. The distance to a sequence without valid
        tokens is 1, the cost between orthogonal tokens, with zero gradient. NaN or infinity in a valid token makes its
        distances NaN, and may spread to those of others. Not differentiable twice.

    Raises:
        ValueError: if shapes do not fit, blur or diameter are not positive, or scaling is not in (0, 1).
    """
    check_sequences(text, text_mask, speech, speech_mask)
    check_schedule(blur, scaling, diameter)
    with exact_matmuls(text.device):
        if diameter is not None:
            epsilons = epsilon_schedule(diameter, blur, scaling)
            distances, stable = _SinkhornDivergence.apply(text, text_mask, speech, speech_mask, epsilons)
            if stable:
                return distances
        layers = zip(text, speech) if text.ndim == 4 else [(text, speech)]
        options = dict(blur=blur, scaling=scaling, diameter=diameter)
        matrices = [by_autograd(_pairwise, x, text_mask, y, speech_mask, **options) for x, y in layers]
        return torch.stack(matrices) if text.ndim == 4 else matrices[0]


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


class _Packed:
    """The valid tokens of a batch of sequences, L2-normalised, one sequence after the other, without padding."""

    def __init__(self, states: torch.Tensor, mask: torch.Tensor, dtype: torch.dtype):
        self.shape, self.state_dtype = states.shape, states.dtype
        mask = mask.bool()
        lengths = mask.sum(-1).tolist()
        self.kept = [item for item, length in enumerate(lengths) if length]  # sequences that have tokens
        self.lengths = [lengths[item] for item in self.kept]
        self.starts = [0, *np.cumsum(self.lengths).tolist()]
        self.positions = mask.flatten().nonzero().squeeze(1)
        self.sequence_of_token = torch.repeat_interleave(
            torch.tensor(self.lengths, device=states.device, dtype=torch.long)
        )
        self.weights = (1 / torch.tensor(self.lengths, device=states.device, dtype=dtype))[self.sequence_of_token]
        flat = states.reshape(-1, mask.numel(), states.shape[-1])
        self.units = flat.index_select(1, self.positions).to(dtype)  # (layers, tokens, dim), a copy
        self.norms = torch.linalg.vector_norm(self.units, dim=-1, keepdim=True).clamp_min_(1e-12)
        self.units.div_(self.norms)

    def move_origin(self, origin: torch.Tensor) -> None:
        """Distances stay as they are, but products lose fewer digits when all tokens point to one side."""
        self.origin = origin  # (layers, 1, dim)
        self.units.sub_(origin)
        self.half_squares = self.units.square().sum(-1).mul_(0.5)  # (layers, tokens)

    def tokens(self, first: int, last: int) -> slice:
        """Where the tokens of sequences first, ..., last - 1 are."""
        return slice(self.starts[first], self.starts[last])

    def indicator(self, first: int, last: int) -> torch.Tensor:
        """(tokens, sequences), 1 where the token belongs to the sequence."""
        sequences = torch.arange(first, last, device=self.units.device)
        return (self.sequence_of_token[self.tokens(first, last), None] == sequences).to(self.units.dtype)

    def gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """Gradient at the unit vectors (overwritten) -> gradient at the states; 0 at padding."""
        units = self.units + self.origin
        radial = torch.linalg.vecdot(gradient, units).unsqueeze(-1)
        gradient.addcmul_(units, radial, value=-1).div_(self.norms)
        at_states = gradient.new_zeros(self.shape, dtype=self.state_dtype)
        flat = at_states.view(-1, math.prod(self.shape[-3:-1]), self.shape[-1])
        return flat.index_copy_(1, self.positions, gradient.to(self.state_dtype)).view(self.shape)


class _SinkhornDivergence(torch.autograd.Function):
    """(layers, B_text, B_speech) divergences, and whether no sum came near the cut-off of the exponent."""

    @staticmethod
    def forward(ctx, text, text_mask, speech, speech_mask, epsilons):
        dtype = torch.promote_types(torch.promote_types(text.dtype, speech.dtype), torch.float32)
        x, y = _Packed(text, text_mask, dtype), _Packed(speech, speech_mask, dtype)
        origin = x.units.mean(1, keepdim=True)
        x.move_origin(origin), y.move_origin(origin)
        needs_text, needs_speech = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        self_x, barycentres_x, stable_x = _self_terms(x, epsilons, needs_text)
        self_y, barycentres_y, stable_y = _self_terms(y, epsilons, needs_speech)
        values = -self_x.unsqueeze(2) - self_y.unsqueeze(1)
        stable = stable_x & stable_y
        ctx.blocks = []
        for layers, texts, utterances in _blocks(x, y):
            block = _Block(x, y, layers, texts, utterances)
            cross, stable_block = block.solve(epsilons)
            values[layers, slice(*texts), slice(*utterances)] += cross
            stable &= stable_block
            if needs_text or needs_speech:
                ctx.blocks.append(block)
        stable &= values.isfinite().all()
        ctx.x, ctx.y, ctx.barycentres_x, ctx.barycentres_y = x, y, barycentres_x, barycentres_y
        ctx.mark_non_differentiable(stable)
        return _fill_empty(values, text_mask, speech_mask).view(
            *text.shape[:-3], len(text_mask), len(speech_mask)
        ), stable

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, _):
        x, y = ctx.x, ctx.y
        gradient = gradient.reshape(-1, *gradient.shape[-2:])[:, x.kept][:, :, y.kept].to(x.units.dtype)
        with exact_matmuls(gradient.device):
            # of the self terms, whose second argument is a constant, as it is in the cross terms
            gradient_x = gradient_y = None
            if ctx.needs_input_grad[0]:
                scale = gradient.sum(2)[:, x.sequence_of_token] * x.weights
                gradient_x = ctx.barycentres_x * scale.unsqueeze(-1)
            if ctx.needs_input_grad[2]:
                scale = gradient.sum(1)[:, y.sequence_of_token] * y.weights
                gradient_y = ctx.barycentres_y * scale.unsqueeze(-1)
            for block in ctx.blocks:
                block.add_gradients(gradient, gradient_x, gradient_y)
            return (
                None if gradient_x is None else x.gradient(gradient_x),
                None,
                None if gradient_y is None else y.gradient(gradient_y),
                None,
                None,
            )


def _steps(epsilons: Sequence[float]) -> list[tuple[float, float]]:
    """(eps, how far to go to the new potentials): the start from f = g = 0, the averaged updates, the last one."""
    return [(epsilons[0], 1.0), *((eps, 0.5) for eps in epsilons), (epsilons[-1], 1.0)]


def _blocks(x: _Packed, y: _Packed) -> list[tuple[slice, tuple[int, int], tuple[int, int]]]:
    """(layers, first and last text, first and last utterance) of blocks that cover all pairs.

    On a CPU a block and its exponential stay in the cache, and 16 columns is what sums over utterances
    cost at least. On a GPU few and large blocks save kernel launches.
    """
    layers, on_cpu = len(x.units), x.units.device.type == "cpu"
    width, most_texts, most_elements = (16, 4, 240_000) if on_cpu else (32, 32, 2**24)
    groups = -(-len(y.kept) // width)
    bounds = [len(y.kept) * group // groups for group in range(groups + 1)] if groups else []
    blocks = []
    for utterances in pairwise(bounds):
        columns = y.starts[utterances[1]] - y.starts[utterances[0]]
        first = 0
        while first < len(x.kept):
            last = first + 1
            while (
                last < len(x.kept)
                and last - first < most_texts
                and (x.starts[last + 1] - x.starts[first]) * columns <= most_elements
            ):
                last += 1
            blocks.append(((first, last), utterances))
            first = last
    layer_slices = [slice(layer, layer + 1) for layer in range(layers)] if on_cpu else [slice(0, layers)]
    return [(layer, *block) for layer in layer_slices for block in blocks]


class _Block:
    """The cross problems of some texts (rows: their tokens) with some utterances (columns: their tokens)."""

    def __init__(self, x: _Packed, y: _Packed, layers: slice, texts: tuple[int, int], utterances: tuple[int, int]):
        self.x, self.y, self.layers, self.texts, self.utterances = x, y, layers, texts, utterances
        self.rows, self.columns = x.tokens(*texts), y.tokens(*utterances)

    def solve(self, epsilons: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
        """<a, F> + <b, G> after the last update, (layers, texts, utterances), and whether it is stable."""
        x, y = self.x, self.y
        units_x, units_y = x.units[self.layers, self.rows], y.units[self.layers, self.columns]
        layers, texts, utterances = len(units_x), self.texts[1] - self.texts[0], self.utterances[1] - self.utterances[0]
        in_text, in_utterance = x.indicator(*self.texts), y.indicator(*self.utterances)
        # [F | in_text] @ [in_utterance^T ; G] = F_i + G_j, for the pair that i and j belong to
        left = units_x.new_empty(layers, len(in_text), utterances + texts)
        right = units_x.new_empty(layers, utterances + texts, len(in_utterance))
        left[:, :, utterances:], right[:, :utterances] = in_text, in_utterance.T
        potential_x, potential_y = left[:, :, :utterances], right[:, utterances:]
        potential_x.copy_(-x.half_squares[self.layers, self.rows, None])
        potential_y.copy_(-y.half_squares[self.layers, None, self.columns])

        mean_x = (in_text * x.weights[self.rows, None]).T.expand(layers, -1, -1)  # (layers, texts, rows)
        mean_y = in_utterance * y.weights[self.columns, None]  # (columns, utterances)
        mean_y = F.pad(mean_y, (0, max(0, 16 - utterances)))  # narrower products are slower on CPUs
        mean_y = mean_y.expand(layers, -1, -1)

        gram = torch.bmm(units_x, units_y.mT)
        kernel = torch.empty_like(gram)
        floor = LOWEST_EXPONENT[gram.dtype]
        lowest_row, lowest_column = gram.new_full((), math.inf), gram.new_full((), math.inf)
        for eps, step in _steps(epsilons):
            to_bits = 1 / (eps * math.log(2))
            torch.baddbmm(gram, left, right, beta=to_bits, alpha=to_bits, out=kernel)
            kernel.clamp_(min=floor).exp2_()
            row_sums = torch.bmm(kernel, mean_y)[:, :, :utterances]
            column_sums = torch.bmm(mean_x, kernel)
            row_logs, column_logs = row_sums.log2(), column_sums.log2()
            lowest_row, lowest_column = torch.minimum(lowest_row, row_logs), torch.minimum(lowest_column, column_logs)
            potential_x.add_(row_logs, alpha=-step / to_bits)
            potential_y.add_(column_logs, alpha=-step / to_bits)
        self.kernel, self.row_sums, self.column_sums = kernel, row_sums, column_sums
        value = torch.bmm(mean_x, potential_x) + torch.bmm(potential_y, mean_y)[:, :, :utterances]
        return value, torch.minimum(lowest_row.amin(), lowest_column.amin()) > SMALLEST_LOG_SUM

    def add_gradients(self, gradient, gradient_x, gradient_y):
        """Subtract from each token's gradient the barycentre of the other side's tokens under its plan."""
        x, y = self.x, self.y
        gradient = gradient[self.layers, slice(*self.texts), slice(*self.utterances)]
        weights_x, weights_y = x.weights[self.rows, None], y.weights[self.columns]
        in_text, in_utterance = x.indicator(*self.texts), y.indicator(*self.utterances)
        if gradient_x is not None:
            scale = gradient[:, x.sequence_of_token[self.rows] - self.texts[0]] * weights_x / self.row_sums
            plan = torch.matmul(scale, in_utterance.T * weights_y).mul_(self.kernel)
            gradient_x[self.layers, self.rows].baddbmm_(plan, y.units[self.layers, self.columns], alpha=-1)
        if gradient_y is not None:
            scale = gradient[:, :, y.sequence_of_token[self.columns] - self.utterances[0]] * weights_y
            plan = torch.matmul(in_text * weights_x, scale / self.column_sums).mul_(self.kernel)
            gradient_y[self.layers, self.columns].baddbmm_(plan.mT, x.units[self.layers, self.rows], alpha=-1)


def _self_terms(packed: _Packed, epsilons: Sequence[float], needs_gradient: bool):
    """The problems of each sequence with itself, once per sequence; one potential, as they are symmetric.

    Sequences of similar length are padded to one batch, but for the matrix products.

    Returns:
        <a, F> (layers, sequences), the barycentres (layers, tokens, dim) of each token's plan if needed, and whether
        all is stable.
    """
    units = packed.units
    values = units.new_empty(len(units), len(packed.lengths))
    barycentres = torch.empty_like(units) if needs_gradient else None
    stable = torch.ones((), dtype=torch.bool, device=units.device)
    for items in _similar_lengths(packed.lengths, on_cpu=units.device.type == "cpu"):
        lengths, longest = [packed.lengths[item] for item in items], packed.lengths[items[0]]
        gram = units.new_full((len(units), len(items), longest, longest), -1e6)  # padding weighs nothing
        potential = units.new_zeros(len(units), len(items), longest)
        for i, (item, length) in enumerate(zip(items, lengths)):
            tokens = packed.tokens(item, item + 1)
            gram[:, i, :length, :length] = torch.bmm(units[:, tokens], units[:, tokens].mT)
            potential[:, i, :length] = -packed.half_squares[:, tokens]
        log_weights = -units.new_tensor(lengths).log2()[:, None]
        kernel = torch.empty_like(gram)
        lowest = gram.new_full((), math.inf)
        for eps, step in _steps(epsilons):
            to_bits = 1 / (eps * math.log(2))
            torch.add(gram, potential.unsqueeze(-1), out=kernel).add_(potential.unsqueeze(-2)).mul_(to_bits)
            sums = kernel.clamp_(min=LOWEST_EXPONENT[gram.dtype]).exp2_().sum(-1)
            logs = sums.log2().add_(log_weights)
            lowest = torch.minimum(lowest, logs)
            potential.add_(logs, alpha=-step / to_bits)
        stable &= (
            torch.stack([lowest[:, i, :length].amin() for i, length in enumerate(lengths)]).amin() > SMALLEST_LOG_SUM
        )
        kernel.div_(sums.unsqueeze(-1))
        for i, (item, length) in enumerate(zip(items, lengths)):
            values[:, item] = potential[:, i, :length].mean(-1)
            if needs_gradient:
                tokens = packed.tokens(item, item + 1)
                barycentres[:, tokens] = torch.bmm(kernel[:, i, :length, :length], units[:, tokens])
    return values, barycentres, stable


def _similar_lengths(lengths: Sequence[int], on_cpu: bool) -> list[list[int]]:
    """Items in batches, longest first; in a batch none is shorter than 0.6 times the longest."""
    batches: list[list[int]] = []
    most_elements = 120_000 if on_cpu else 2**24
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        longest = lengths[batches[-1][0]] if batches else 0
        if batches and lengths[item] >= 0.6 * longest and (len(batches[-1]) + 1) * longest**2 <= most_elements:
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches


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
    origin = torch.cat(texts).mean(0).detach()  # as in `_Packed.move_origin`
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
    return _fill_empty((torch.stack(rows) if rows else nothing).to(dtype), text_mask, speech_mask)


def _fill_empty(values: torch.Tensor, text_mask: torch.Tensor, speech_mask: torch.Tensor) -> torch.Tensor:
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


def _pairwise(text, text_mask, speech, speech_mask, blur, scaling, diameter) -> torch.Tensor:
    """The same divergences by log-sum-exp, pair by pair: a schedule of its own for each, and any range of exponents."""
    rows = []
    for problem in pair_problems(text, text_mask, speech, speech_mask, blur, scaling, diameter):
        x, y, log_a, log_b = problem.x.expand(len(problem.y), -1, -1), problem.y, problem.log_a, problem.log_b
        eps = problem.epsilons[-1][0]
        cost_xy, cost_yx = half_squared_distances(x, y.detach()), half_squared_distances(y, x.detach())
        cost_xx, cost_yy = half_squared_distances(x, x.detach()), half_squared_distances(y, y.detach())
        f, g = problem.potentials(cost_xy, log_a, log_b)
        f_self, g_self = problem.potentials(cost_xx, log_a, log_a)[0], problem.potentials(cost_yy, log_b, log_b)[0]
        f, g = softmin(eps, cost_xy, log_b + g / eps), softmin(eps, cost_yx, log_a + f / eps)
        f_self, g_self = softmin(eps, cost_xx, log_a + f_self / eps), softmin(eps, cost_yy, log_b + g_self / eps)
        rows.append((log_a.exp() * (f - f_self)).sum(-1) + (log_b.exp() * (g - g_self)).sum(-1))
    return fill_empty(rows, text, text_mask, speech, speech_mask)
