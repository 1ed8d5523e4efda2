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
utterances, so sums over sequences, and potentials spread over pairs, are matrix products with 0/1 indicators. What is
iterated, or passes through several operations, fits the processor's cache. Base 2, because `exp2` is two to three times
faster than `exp` on CPUs.
"""

import math
import sys
from collections.abc import Iterator, Sequence
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
# Sizes for CPUs, in elements: what passes through several operations, or iterations, stays in a cache of about 1 MB.
CHUNK = 2**17
BLOCK = 240_000
PANEL = 2**20
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
    """The valid tokens of a batch of sequences, L2-normalised, one sequence after the other, without padding.

    Distances do not depend on the origin, but products lose fewer digits where all tokens point to one side if it is moved
    there: to the mean of the tokens, or to that of another side, as both must agree.
    """

    def __init__(
        self, states: torch.Tensor, mask: torch.Tensor, dtype: torch.dtype, origin: torch.Tensor | None = None
    ):
        self.shape, self.state_dtype = states.shape, states.dtype
        mask = mask.bool()
        lengths = mask.sum(-1).tolist()
        self.kept = [item for item, length in enumerate(lengths) if length]  # sequences that have tokens
        self.lengths = [lengths[item] for item in self.kept]
        self.starts = [0, *np.cumsum(self.lengths).tolist()]
        self.positions = mask.flatten().nonzero().squeeze(1)
        self.padding = (~mask).flatten().nonzero().squeeze(1)
        self.sequence_of_token = torch.repeat_interleave(
            torch.tensor(self.lengths, device=states.device, dtype=torch.long)
        )
        self.weights = (1 / torch.tensor(self.lengths, device=states.device, dtype=dtype))[self.sequence_of_token]

        flat = states.reshape(-1, mask.numel(), states.shape[-1])
        self.units = flat.new_empty(len(flat), len(self.positions), flat.shape[-1], dtype=dtype)  # from the origin
        self.norms = self.units.new_empty(*self.units.shape[:2], 1)
        self.half_squares = self.units.new_empty(self.units.shape[:2])
        for chunk in self._chunks():
            self.units[:, chunk] = flat.index_select(1, self.positions[chunk])
            units, norms = self.units[:, chunk], self.norms[:, chunk]
            torch.linalg.vector_norm(units, dim=-1, keepdim=True, out=norms)
            units.div_(norms.clamp_(min=1e-12))
            if origin is not None:
                self._move_origin(chunk, origin)
        if origin is None:
            origin = self.units.mean(1, keepdim=True)
            for chunk in self._chunks():
                self._move_origin(chunk, origin)
        self.origin = origin  # (layers, 1, dim)

    def _chunks(self) -> Iterator[slice]:
        """Tokens that pass through several operations while they are in the cache; all at once on a GPU."""
        tokens = max(1, len(self.positions))
        if not in_large_blocks(self.units.device):
            tokens = max(1, CHUNK // (len(self.units) * self.units.shape[-1]))
        return (slice(first, first + tokens) for first in range(0, len(self.positions), tokens))

    def _move_origin(self, chunk: slice, origin: torch.Tensor) -> None:
        units = self.units[:, chunk].sub_(origin)
        self.half_squares[:, chunk] = torch.linalg.vecdot(units, units).mul_(0.5)

    def tokens(self, first: int, last: int) -> slice:
        """Where the tokens of sequences first, ..., last - 1 are."""
        return slice(self.starts[first], self.starts[last])

    def indicator(self, first: int, last: int) -> torch.Tensor:
        """(tokens, sequences), 1 where the token belongs to the sequence."""
        sequences = torch.arange(first, last, device=self.units.device)
        return (self.sequence_of_token[self.tokens(first, last), None] == sequences).to(self.units.dtype)

    def ranges(self, first: int, last: int, most_sequences: int, most_tokens: int) -> Iterator[tuple[int, int]]:
        """Divides sequences first, ..., last - 1 into ranges of at most so many of them, and of at most so many tokens if
        they are more than one."""
        while first < last:
            end = first + 1
            while end < min(last, first + most_sequences) and self.starts[end + 1] - self.starts[first] <= most_tokens:
                end += 1
            yield first, end
            first = end

    def gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """Gradient at the unit vectors (overwritten) -> gradient at the states; 0 at padding."""
        at_states = torch.empty(self.shape, dtype=self.state_dtype, device=gradient.device)
        flat = at_states.view(-1, math.prod(self.shape[-3:-1]), self.shape[-1])
        flat.index_fill_(1, self.padding, 0)
        for chunk in self._chunks():
            units, at_units = self.units[:, chunk] + self.origin, gradient[:, chunk]
            radial = torch.linalg.vecdot(at_units, units).unsqueeze(-1)
            at_units.addcmul_(units, radial, value=-1).div_(self.norms[:, chunk])
            flat.index_copy_(1, self.positions[chunk], at_units.to(self.state_dtype))
        return at_states


class _SinkhornDivergence(torch.autograd.Function):
    """(layers, B_text, B_speech) divergences, and whether no sum came near the cut-off of the exponent."""

    @staticmethod
    def forward(ctx, text, text_mask, speech, speech_mask, epsilons):
        dtype = torch.promote_types(torch.promote_types(text.dtype, speech.dtype), torch.float32)
        x = _Packed(text, text_mask, dtype)
        y = _Packed(speech, speech_mask, dtype, x.origin if x.kept else None)
        needs_text, needs_speech = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        self_x, ctx.plans_x, stable_x = _self_terms(x, epsilons, needs_text)
        self_y, ctx.plans_y, stable_y = _self_terms(y, epsilons, needs_speech)
        values = -self_x.unsqueeze(2) - self_y.unsqueeze(1)
        stable = stable_x & stable_y
        ctx.panels = []
        for layers, texts, utterances in _panels(x, y):
            panel = _Panel(x, y, layers, texts, utterances)
            cross, stable_panel = panel.solve(epsilons)
            values[layers, slice(*texts), slice(*utterances)] += cross
            stable &= stable_panel
            if needs_text or needs_speech:
                ctx.panels.append(panel)
        stable &= values.isfinite().all()
        ctx.x, ctx.y = x, y
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
            gradient_x = gradient_y = None
            if ctx.needs_input_grad[0]:
                gradient_x = _self_gradients(x, ctx.plans_x, gradient.sum(2))
            if ctx.needs_input_grad[2]:
                gradient_y = _self_gradients(y, ctx.plans_y, gradient.sum(1))
            for panel in ctx.panels:
                panel.add_gradients(gradient, gradient_x, gradient_y)
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


def _panels(x: _Packed, y: _Packed) -> list[tuple[slice, tuple[int, int], tuple[int, int]]]:
    """(layers, first and last text, first and last utterance) of panels that cover all pairs.

    16 columns is what sums over utterances cost at least on a CPU. On a GPU few and large panels, of all layers, save
    kernel launches.
    """
    layers, large = len(x.units), in_large_blocks(x.units.device)
    # of all layers together: several in one call take no more memory than one
    width, most_texts, most_elements = (32, 32, LARGE_BLOCK // max(1, layers)) if large else (16, len(x.kept), PANEL)
    groups = -(-len(y.kept) // width)
    bounds = [len(y.kept) * group // groups for group in range(groups + 1)] if groups else []
    layer_slices = [slice(0, layers)] if large else [slice(layer, layer + 1) for layer in range(layers)]
    return [
        (layer, texts, utterances)
        for layer in layer_slices
        for utterances in pairwise(bounds)
        for texts in x.ranges(
            0, len(x.kept), most_texts, most_elements // (y.starts[utterances[1]] - y.starts[utterances[0]])
        )
    ]


class _Panel:
    """The cross problems of some texts (rows: their tokens) with some utterances (columns: their tokens).

    Products with the tokens' vectors are of the whole panel. What is iterated stays in the cache of a CPU: blocks of a few
    texts each.
    """

    def __init__(self, x: _Packed, y: _Packed, layers: slice, texts: tuple[int, int], utterances: tuple[int, int]):
        self.x, self.y, self.layers, self.texts, self.utterances = x, y, layers, texts, utterances
        self.rows, self.columns = x.tokens(*texts), y.tokens(*utterances)

    def solve(self, epsilons: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
        """<a, F> + <b, G> after the last update, (layers, texts, utterances), and whether it is stable."""
        gram = torch.bmm(self.x.units[self.layers, self.rows], self.y.units[self.layers, self.columns].mT)
        self.kernel = gram  # each block overwrites its own part
        limits = (self.texts[1], sys.maxsize)
        if not in_large_blocks(gram.device):
            limits = (4, BLOCK // max(1, gram.shape[2]))
        self.blocks = [_Block(self, texts) for texts in self.x.ranges(*self.texts, *limits)]
        values, stable = zip(*(block.solve(epsilons) for block in self.blocks))
        return torch.cat(values, 1), torch.stack(stable).all()

    def add_gradients(self, gradient, gradient_x, gradient_y):
        """Subtract from each token's gradient the barycentre of the other side's tokens under its plan."""
        gradient = gradient[self.layers, slice(*self.texts), slice(*self.utterances)]
        plan = torch.empty_like(self.kernel)
        if gradient_x is not None:
            for block in self.blocks:
                block.plan_of_rows(gradient, out=plan[:, block.rows])
            gradient_x[self.layers, self.rows].baddbmm_(plan, self.y.units[self.layers, self.columns], alpha=-1)
        if gradient_y is not None:
            for block in self.blocks:
                block.plan_of_columns(gradient, out=plan[:, block.rows])
            gradient_y[self.layers, self.columns].baddbmm_(plan.mT, self.x.units[self.layers, self.rows], alpha=-1)


class _Block:
    """Some texts of a panel, with all its utterances."""

    def __init__(self, panel: _Panel, texts: tuple[int, int]):
        x, y, layers, tokens = panel.x, panel.y, panel.layers, panel.x.tokens(*texts)
        self.texts = slice(texts[0] - panel.texts[0], texts[1] - panel.texts[0])  # of the panel's
        self.rows = slice(tokens.start - panel.rows.start, tokens.stop - panel.rows.start)
        self.kernel = panel.kernel[:, self.rows]  # <x_i, y_j> until it is solved
        self.half_squares = x.half_squares[layers, tokens], y.half_squares[layers, panel.columns]
        self.weights_x, self.weights_y = x.weights[tokens, None], y.weights[panel.columns]
        self.in_text, self.in_utterance = x.indicator(*texts), y.indicator(*panel.utterances)
        self.text_of_row = x.sequence_of_token[tokens] - panel.texts[0]
        self.utterance_of_column = y.sequence_of_token[panel.columns] - panel.utterances[0]

    def solve(self, epsilons: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
        in_text, in_utterance, gram = self.in_text, self.in_utterance, self.kernel
        layers, texts, utterances = len(gram), in_text.shape[1], in_utterance.shape[1]
        # [F | in_text] @ [in_utterance^T ; G] = F_i + G_j, for the pair that i and j belong to
        left = gram.new_empty(layers, len(in_text), utterances + texts)
        right = gram.new_empty(layers, utterances + texts, len(in_utterance))
        left[:, :, utterances:], right[:, :utterances] = in_text, in_utterance.T
        potential_x, potential_y = left[:, :, :utterances], right[:, utterances:]
        potential_x.copy_(-self.half_squares[0].unsqueeze(2))
        potential_y.copy_(-self.half_squares[1].unsqueeze(1))

        mean_x = (in_text * self.weights_x).T.expand(layers, -1, -1)  # (layers, texts, rows)
        mean_y = in_utterance * self.weights_y[:, None]  # (columns, utterances)
        mean_y = F.pad(mean_y, (0, max(0, 16 - utterances)))  # narrower products are slower on CPUs
        mean_y = mean_y.expand(layers, -1, -1)

        kernel = torch.empty_like(gram)
        lowest_row, lowest_column = gram.new_full((), math.inf), gram.new_full((), math.inf)
        for eps, step in _steps(epsilons):
            to_bits = 1 / (eps * math.log(2))
            torch.baddbmm(gram, left, right, beta=to_bits, alpha=to_bits, out=kernel)
            _exp2_(kernel, eps)
            row_sums = torch.bmm(kernel, mean_y)[:, :, :utterances]
            column_sums = torch.bmm(mean_x, kernel)
            row_logs, column_logs = row_sums.log2(), column_sums.log2()
            lowest_row, lowest_column = torch.minimum(lowest_row, row_logs), torch.minimum(lowest_column, column_logs)
            potential_x.add_(row_logs, alpha=-step / to_bits)
            potential_y.add_(column_logs, alpha=-step / to_bits)
        self.kernel.copy_(kernel)
        self.row_sums, self.column_sums = row_sums, column_sums
        value = torch.bmm(mean_x, potential_x) + torch.bmm(potential_y, mean_y)[:, :, :utterances]
        return value, torch.minimum(lowest_row.amin(), lowest_column.amin()) > SMALLEST_LOG_SUM

    def plan_of_rows(self, gradient: torch.Tensor, out: torch.Tensor) -> None:
        """The transport plan whose rows sum to the texts' weights, each pair's times its gradient."""
        scale = gradient[:, self.text_of_row] * self.weights_x / self.row_sums  # (layers, rows, utterances)
        spread = (self.in_utterance.T * self.weights_y).expand(len(scale), -1, -1)
        torch.bmm(scale, spread, out=out).mul_(self.kernel)

    def plan_of_columns(self, gradient: torch.Tensor, out: torch.Tensor) -> None:
        """The same with columns that sum to the utterances' weights."""
        scale = gradient[:, self.texts, self.utterance_of_column]  # (layers, texts, columns)
        scale = scale * self.weights_y / self.column_sums
        spread = (self.in_text * self.weights_x).expand(len(scale), -1, -1)
        torch.bmm(spread, scale, out=out).mul_(self.kernel)


def _exp2_(bits: torch.Tensor, eps: float) -> torch.Tensor:
    """2 to the power of exponents at this eps, in place, cut off below.

    As 0 <= C <= 2, potentials vary by at most 2 and f_i + g_j >= -2: no exponent is below -4 / eps nats.
    """
    floor = LOWEST_EXPONENT[bits.dtype]
    if -4 / (eps * math.log(2)) < floor:
        bits.clamp_(min=floor)
    return bits.exp2_()


def _self_terms(packed: _Packed, epsilons: Sequence[float], needs_gradient: bool):
    """The problems of each sequence with itself, once per sequence; one potential, as they are symmetric.

    Sequences of similar length are padded to one batch, but for the matrix products.

    Returns:
        <a, F> (layers, sequences), the sequences' plans if needed (item -> (layers, length, length), rows sum to 1), and
        whether all is stable.
    """
    units = packed.units
    values = units.new_empty(len(units), len(packed.lengths))
    plans = {}
    stable = torch.ones((), dtype=torch.bool, device=units.device)
    most_elements = LARGE_BLOCK // max(1, len(units)) if in_large_blocks(units.device) else BLOCK // 2
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
                plans[item] = kernel[:, i, :length, :length]
    return values, plans, stable


def _self_gradients(packed: _Packed, plans: dict[int, torch.Tensor], gradient: torch.Tensor) -> torch.Tensor:
    """The part of the self terms, whose second argument is a constant, as it is in the cross terms: (layers, tokens, dim),
    each token's barycentre under its plan times its weight and its sequence's (layers, sequences) gradient."""
    found = torch.empty_like(packed.units)
    for item, plan in plans.items():
        tokens = packed.tokens(item, item + 1)
        scaled = plan * (gradient[:, item] / packed.lengths[item])[:, None, None]
        torch.bmm(scaled, packed.units[:, tokens], out=found[:, tokens])
    return found


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
