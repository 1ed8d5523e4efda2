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
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .pairwise_transport import (
    by_autograd,
    check_schedule,
    check_sequences,
    epsilon_schedule,
    exact_matmuls,
    pairwise_sinkhorn_divergence,
    with_empty,
)


# exp2 is cut off here: results below the normal range slow CPUs down. Sums whose log2 is above SMALLEST_LOG_SUM do not notice.
LOWEST_EXPONENT = {torch.float32: -72.0, torch.float64: -700.0}
SMALLEST_LOG_SUM = -48.0
LARGE_BLOCK = 2**24  # pairs of tokens, over all layers, in one block on a GPU: 64 MB in float32


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
        options = dict(blur=blur, scaling=scaling, diameter=diameter)
        if text.ndim == 4:  # perhaps only one of the layers is not stable
            layers = [
                wasserstein_distance_matrix(x, text_mask, y, speech_mask, **options) for x, y in zip(text, speech)
            ]
            return torch.stack(layers)
        return by_autograd(pairwise_sinkhorn_divergence, text, text_mask, speech, speech_mask, **options)


def in_large_blocks(device: torch.device) -> bool:
    """Whether few large operations are faster there than many that fit the cache: each costs a launch on a GPU."""
    return device.type != "cpu"


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
        return with_empty(values, text_mask, speech_mask).view(
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
    cost at least. On a GPU few and large blocks, of all layers, save kernel launches.
    """
    layers, large = len(x.units), in_large_blocks(x.units.device)
    # of all layers together: several in one call take no more memory than one
    width, most_texts, most_elements = (32, 32, LARGE_BLOCK // max(1, layers)) if large else (16, 4, 240_000)
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
    layer_slices = [slice(0, layers)] if large else [slice(layer, layer + 1) for layer in range(layers)]
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
    most_elements = LARGE_BLOCK // max(1, len(units)) if in_large_blocks(units.device) else 120_000
    for items in _similar_lengths(packed.lengths, most_elements):
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


def _similar_lengths(lengths: Sequence[int], most_elements: int) -> list[list[int]]:
    """Items in batches, longest first; in a batch none is shorter than 0.6 times the longest."""
    batches: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        longest = lengths[batches[-1][0]] if batches else 0
        if batches and lengths[item] >= 0.6 * longest and (len(batches[-1]) + 1) * longest**2 <= most_elements:
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches
