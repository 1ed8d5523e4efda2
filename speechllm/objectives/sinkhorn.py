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
sums G. Products with the tokens' vectors, where most of the time goes, are of packed tokens, without padding. What is
iterated is a block of a few texts and utterances of similar length, padded, that fits the processor's cache. Base 2,
because `exp2` is two to three times faster than `exp` on CPUs.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch.autograd.function import once_differentiable

from .packed_sequences import PADDING, Group, PackedSequences, in_large_blocks
from .pairwise_transport import (
    EMPTY_DISTANCE,
    by_autograd,
    check_schedule,
    check_sequences,
    epsilon_schedule,
    exact_matmuls,
    pairwise_sinkhorn_divergence,
)


# exp2 is cut off here: results below the normal range slow CPUs down. Sums whose log2 is above SMALLEST_LOG_SUM do not notice.
LOWEST_EXPONENT = {torch.float32: -72.0, torch.float64: -700.0}
SMALLEST_LOG_SUM = -48.0
# Sizes for CPUs: what is iterated stays in the cache. A further group must save a sixth of a block's side in padding.
ROWS, COLUMNS = 384, 768  # tokens of a block
PANEL = 2**20  # pairs of tokens of a panel
# On a GPU, few and large blocks, of all layers at once, save kernel launches.
LARGE_ROWS, LARGE_BLOCK = 1024, 2**25  # tokens; pairs of tokens over all layers, 128 MB in float32


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


class _SinkhornDivergence(torch.autograd.Function):
    """(layers, B_text, B_speech) divergences, and whether no sum came near the cut-off of the exponent."""

    @staticmethod
    def forward(ctx, text, text_mask, speech, speech_mask, epsilons):
        dtype = torch.promote_types(torch.promote_types(text.dtype, speech.dtype), torch.float32)
        most_rows, most_columns = _most_tokens(math.prod(text.shape[:-3]), text.device)
        price = 1 if in_large_blocks(text.device) else 1 / 6  # of a further group, in its tokens
        x = PackedSequences(text, text_mask, dtype, most_rows, price * most_rows)
        y = PackedSequences(
            speech, speech_mask, dtype, most_columns, price * most_columns, x.origin if x.kept else None
        )
        values = x.units.new_zeros(len(x.units), len(x.kept), len(y.kept))
        stable = torch.ones((), dtype=torch.bool, device=values.device)
        ctx.x, ctx.y, ctx.panels = x, y, []
        self_x, self_y = (_self_problems(side) if x.kept and y.kept else [] for side in (x, y))
        few = [*self_x, *self_y]  # solved with the first panel
        for texts, utterances in _panels(x, y):
            panel = _Panel(x, y, texts, utterances)
            stable &= _solve([*panel.blocks, *few], epsilons)
            for block in panel.blocks:
                values[:, block.x.sequences, block.y.sequences] += block.value
            few = []
            if any(ctx.needs_input_grad):
                ctx.panels.append(panel)
        for block in self_x:
            values[:, block.x.sequences] -= block.value / 2
        for block in self_y:
            values[:, :, block.x.sequences] -= block.value.mT / 2
        ctx.self_x, ctx.self_y = self_x if ctx.needs_input_grad[0] else [], self_y if ctx.needs_input_grad[2] else []
        stable &= values.isfinite().all()
        ctx.mark_non_differentiable(stable)
        matrix = values.new_full((len(values), len(text_mask), len(speech_mask)), EMPTY_DISTANCE)
        matrix[:, torch.tensor(x.kept, dtype=torch.long)[:, None], torch.tensor(y.kept, dtype=torch.long)] = values
        return matrix.view(*text.shape[:-3], *matrix.shape[1:]), stable

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, _):
        x, y = ctx.x, ctx.y
        gradient = gradient.reshape(len(x.units), *gradient.shape[-2:])[:, x.kept][:, :, y.kept].to(x.units.dtype)
        with exact_matmuls(gradient.device):
            gradient_x = gradient_y = None
            if ctx.needs_input_grad[0]:
                gradient_x = _self_gradients(x, ctx.self_x, gradient.sum(2))
            if ctx.needs_input_grad[2]:
                gradient_y = _self_gradients(y, ctx.self_y, gradient.sum(1))
            for panel in ctx.panels:
                panel.add_gradients(x, y, gradient, gradient_x, gradient_y)
            return (
                None if gradient_x is None else x.gradient(gradient_x),
                None,
                None if gradient_y is None else y.gradient(gradient_y),
                None,
                None,
            )


class _Block:
    """Transport problems between sequences of similar length, padded, for some layers.

    Args:
        gram: (layers, sequences of x, tokens, sequences of y, tokens), inner products.
        x, y: the sequences; `y` None: each of `x` with itself, so that the sequences of columns are one.

    Solved, `kernel` (in the place of `gram`) holds exp((f_i + g_j - C_ij) / eps) before the last update, and `row_sums`
    (layers, sequences of x, tokens, sequences of y) and `column_sums` its sums over the other side's tokens, weighted.
    `value` is <a, F> + <b, G>, (layers, sequences of x, sequences of y).
    """

    def __init__(self, gram: torch.Tensor, x: Group, y: Group | None):
        self.kernel, self.x, self.y = gram, x, y
        self.row_shape, self.column_shape = gram.shape[:4], (*gram.shape[:2], *gram.shape[3:])
        self.weights_x = x.weights[:, None]
        self.weights_y = self.weights_x if y is None else y.weights
        self.row_potentials = x.potentials.unsqueeze(3).expand(self.row_shape)
        columns = x.potentials.unsqueeze(2) if y is None else y.potentials.unsqueeze(1)
        self.column_potentials = columns.expand(self.column_shape)
        self.row_weights = (self.weights_x.unsqueeze(2) if y is None else y.weights).expand(self.row_shape)
        self.column_weights = self.weights_x.unsqueeze(2).expand(self.column_shape)

    def plan_of_rows(self, gradient: torch.Tensor) -> torch.Tensor:
        """The transport plans whose rows sum to the weights of x, each pair's times its (layers, x, y) gradient."""
        return self.kernel * (self._scale(gradient).unsqueeze(2) / self.row_sums).unsqueeze(4)

    def plan_of_columns(self, gradient: torch.Tensor) -> torch.Tensor:
        """The same with columns that sum to the weights of y."""
        return self.kernel * (self._scale(gradient).unsqueeze(3) / self.column_sums).unsqueeze(2)

    def _scale(self, gradient: torch.Tensor) -> torch.Tensor:
        columns = slice(None) if self.y is None else self.y.sequences
        return gradient[:, self.x.sequences, columns] * self.weights_x * self.weights_y

    def unpadded(self, values: torch.Tensor) -> torch.Tensor:
        """(layers, tokens of x, tokens of y)"""
        return self.x.unpadded(self.y.unpadded(values, 3), 1)


def _solve(blocks: list[_Block], epsilons: Sequence[float]) -> torch.Tensor:
    """Solves the problems of some blocks, step by step; returns whether all are stable.

    Operations on potentials cost their calls: all blocks' are in one tensor. Those on kernels cost their elements: a
    kernel is in the cache until its sums are taken.
    """
    shapes = [shape for block in blocks for shape in (block.row_shape, block.column_shape)]
    potentials = _joined([side for block in blocks for side in (block.row_potentials, block.column_potentials)])
    weights = _joined([side for block in blocks for side in (block.row_weights, block.column_weights)])
    padding = potentials == PADDING
    bits, sums, lowest = torch.empty_like(potentials), torch.empty_like(potentials), torch.zeros_like(potentials)
    bits_of, sums_of = _split(bits, shapes), _split(sums, shapes)
    scratch = bits.new_empty(max(block.kernel.numel() for block in blocks))
    work = [
        (
            block.kernel,
            scratch[: block.kernel.numel()].view(block.kernel.shape),
            *(rows.unsqueeze(4), columns.unsqueeze(2)),
            *(row_sums, column_sums),
        )
        for block, rows, columns, row_sums, column_sums in zip(
            blocks, bits_of[::2], bits_of[1::2], sums_of[::2], sums_of[1::2]
        )
    ]
    lowest_bits, steps = LOWEST_EXPONENT[bits.dtype], _steps(epsilons)
    for number, (eps, step) in enumerate(steps, 1):
        to_bits = 1 / (eps * math.log(2))
        torch.mul(potentials, to_bits, out=bits)
        for gram, kernel, rows, columns, row_sums, column_sums in work:
            if number == len(steps):
                kernel = gram
            torch.add(rows, gram, alpha=to_bits, out=kernel).add_(columns)
            if -4 * to_bits < lowest_bits:  # as 0 <= C <= 2, f_i + g_j - C_ij is at least -4
                kernel.clamp_(min=lowest_bits)
            kernel.exp2_()
            torch.sum(kernel, 4, out=row_sums)
            torch.sum(kernel, 2, out=column_sums)
        logs = sums.mul_(weights).log2().masked_fill_(padding, 0)
        torch.minimum(lowest, logs, out=lowest)
        potentials.sub_(logs, alpha=step / to_bits)
    values = _split(potentials.masked_fill_(padding, 0), shapes)
    for i, block in enumerate(blocks):
        block.row_sums, block.column_sums = sums_of[2 * i], sums_of[2 * i + 1]
        block.value = values[2 * i].sum(2) * block.weights_x + values[2 * i + 1].sum(3) * block.weights_y
        del block.row_potentials, block.column_potentials, block.row_weights, block.column_weights
    return lowest.amin() > SMALLEST_LOG_SUM


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.flatten() for part in parts])


def _split(joined: torch.Tensor, shapes: list[Sequence[int]]) -> list[torch.Tensor]:
    return [part.view(shape) for part, shape in zip(joined.split([math.prod(shape) for shape in shapes]), shapes)]


def _most_tokens(layers: int, device: torch.device) -> tuple[int, int]:
    """Rows and columns of a block."""
    if in_large_blocks(device):
        return LARGE_ROWS, LARGE_BLOCK // (LARGE_ROWS * max(1, layers))
    return tuple(round(tokens / math.sqrt(max(1, layers))) for tokens in (ROWS, COLUMNS))


def _steps(epsilons: Sequence[float]) -> list[tuple[float, float]]:
    """(eps, how far to go to the new potentials): the start from f = g = 0, the averaged updates, the last one."""
    return [(epsilons[0], 1.0), *((eps, 0.5) for eps in epsilons), (epsilons[-1], 1.0)]


def _panels(x: PackedSequences, y: PackedSequences) -> Iterator[tuple[list[Group], list[Group]]]:
    """Texts and utterances of panels, which cover all pairs."""
    if in_large_blocks(x.units.device):
        yield from (([rows], [columns]) for rows in x.groups for columns in y.groups)
    elif x.groups:
        most_tokens, some = PANEL // max(1, len(x.units) * x.starts[-1]), []
        for columns in y.groups:
            if some and columns.tokens.stop - some[0].tokens.start > most_tokens:
                yield x.groups, some
                some = []
            some.append(columns)
        if some:
            yield x.groups, some


class _Panel:
    """The cross problems of some texts (rows) and utterances (columns), which are solved together."""

    def __init__(self, x: PackedSequences, y: PackedSequences, texts: list[Group], utterances: list[Group]):
        self.rows = slice(texts[0].tokens.start, texts[-1].tokens.stop)
        self.utterances, self.blocks = utterances, []
        for columns in utterances:
            gram = torch.bmm(x.units[:, self.rows], y.units[:, columns.tokens].mT)
            for rows in texts:
                part = gram[:, rows.tokens.start - self.rows.start : rows.tokens.stop - self.rows.start]
                self.blocks.append(_Block(columns.padded(rows.padded(part, 1), 3), rows, columns))

    def add_gradients(self, x: PackedSequences, y: PackedSequences, gradient, gradient_x, gradient_y) -> None:
        """Subtract from each token's gradient the barycentre of the other side's tokens under its plan."""
        rows = x.units[:, self.rows]
        for utterances in self.utterances:
            blocks = [block for block in self.blocks if block.y is utterances]
            columns = y.units[:, utterances.tokens]
            if gradient_x is not None:
                plan = torch.cat([block.unpadded(block.plan_of_rows(gradient)) for block in blocks], 1)
                gradient_x[:, self.rows].baddbmm_(plan, columns, alpha=-1)
            if gradient_y is not None:
                plan = torch.cat([block.unpadded(block.plan_of_columns(gradient)) for block in blocks], 1)
                gradient_y[:, utterances.tokens].baddbmm_(plan.mT, rows, alpha=-1)


def _self_problems(packed: PackedSequences) -> list[_Block]:
    """The problems of each sequence with itself."""
    units, blocks = packed.units, []
    for group in packed.groups:
        longest = group.lengths[-1]
        gram = units.new_zeros(len(units), len(group.lengths), longest, 1, longest)
        for i, (tokens, length) in enumerate(zip(group.tokens_of_sequences(), group.lengths)):
            gram[:, i, :length, 0, :length] = torch.bmm(units[:, tokens], units[:, tokens].mT)
        blocks.append(_Block(gram, group, None))
    return blocks


def _self_gradients(packed: PackedSequences, blocks: list[_Block], gradient: torch.Tensor) -> torch.Tensor:
    """The part of the self terms, whose second argument is a constant, as it is in the cross terms: each token's barycentre
    under its plan times its weight and its sequence's (layers, sequences) gradient. (layers, tokens + 1, dim), the last
    row 0."""
    layers, count, dim = packed.units.shape
    if not blocks:  # the other side has no tokens
        return packed.units.new_zeros(layers, count + 1, dim)
    found = packed.units.new_empty(layers, count + 1, dim)
    found[:, -1] = 0
    for block in blocks:
        plans = block.plan_of_rows(gradient.unsqueeze(2))
        for i, (tokens, length) in enumerate(zip(block.x.tokens_of_sequences(), block.x.lengths)):
            torch.bmm(plans[:, i, :length, 0, :length], packed.units[:, tokens], out=found[:, tokens])
    return found
