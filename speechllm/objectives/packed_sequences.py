"""Sequences without padding, for products with their vectors, and in padded groups of similar length, for what is iterated."""

import math
from collections.abc import Iterator

import numpy as np
import torch


CHUNK = 2**17  # elements of states that stay in a CPU's cache of about 1 MB
PADDING = -1e6  # potential of what stands in the place of padding: it weighs nothing


def in_large_blocks(device: torch.device) -> bool:
    """Whether few large operations are faster there than many that fit the cache: each costs a launch on a GPU."""
    return device.type != "cpu"


class PackedSequences:
    """The valid tokens of a batch of sequences, L2-normalised, one sequence after the other, without padding, the shortest
    sequence first.

    Args:
        states: (..., batch, length, dim), (...) being layers, if any.
        mask: (batch, length), `True` = valid.
        dtype: of the unit vectors.
        most_tokens, price: how sequences are grouped, see `_groups`.
        origin: see below.

    Distances do not depend on the origin, but products lose fewer digits where all tokens point to one side if it is moved
    there: to the mean of the tokens, or to that of another side, as both must agree.
    """

    def __init__(
        self,
        states: torch.Tensor,
        mask: torch.Tensor,
        dtype: torch.dtype,
        most_tokens: int,
        price: float,
        origin: torch.Tensor | None = None,
    ):
        self.shape, self.state_dtype = states.shape, states.dtype
        valid = mask.bool()
        lengths = valid.sum(-1).tolist()
        self.kept = sorted((item for item, length in enumerate(lengths) if length), key=lengths.__getitem__)
        self.lengths = [lengths[item] for item in self.kept]
        self.starts = [0, *np.cumsum(self.lengths).tolist()]
        of_items = valid.flatten().nonzero().squeeze(1).split(lengths)
        positions = torch.cat([of_items[item] for item in self.kept] or [valid.new_empty(0, dtype=torch.long)])
        self.place = positions.new_full((mask.numel(),), len(positions))  # of each token; padding: after the last one
        self.place[positions] = torch.arange(len(positions), device=mask.device)

        flat = states.reshape(math.prod(states.shape[:-3]), mask.numel(), states.shape[-1])
        self.units = flat.new_empty(len(flat), len(positions), flat.shape[-1], dtype=dtype)  # from the origin
        self.norms = self.units.new_empty(*self.units.shape[:2], 1)
        self.half_squares = self.units.new_empty(self.units.shape[:2])
        for chunk in self._chunks():
            self.units[:, chunk] = flat.index_select(1, positions[chunk])
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
        self.groups = self._groups(most_tokens, price)

    def _chunks(self) -> Iterator[slice]:
        """Tokens that pass through several operations while they are in the cache; all at once on a GPU."""
        layers, count, dim = self.units.shape
        tokens = max(1, count if in_large_blocks(self.units.device) else CHUNK // (layers * dim))
        return (slice(first, first + tokens) for first in range(0, count, tokens))

    def _move_origin(self, chunk: slice, origin: torch.Tensor) -> None:
        units = self.units[:, chunk].sub_(origin)
        self.half_squares[:, chunk] = torch.linalg.vecdot(units, units).mul_(0.5)

    def _groups(self, most_tokens: int, price: float) -> list["Group"]:
        """All sequences in groups of similar length: of at most so many tokens, padding included, or of one sequence. A
        further group must save that many (`price`) tokens of padding."""
        costs, firsts = [0.0], [0]  # of the best groups of the first n sequences
        for last, length in enumerate(self.lengths, 1):
            starts = range(max(0, min(last - 1, last - most_tokens // length)), last)
            costs.append(min(costs[first] + (last - first) * length for first in starts) + price)
            firsts.append(min(starts, key=lambda first: costs[first] + (last - first) * length))
        groups, last = [], len(self.lengths)
        while last:
            groups.append(Group(self, firsts[last], last))
            last = firsts[last]
        return groups[::-1]

    def gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """Gradient at the unit vectors, a row of zeros after the last (overwritten) -> gradient at the states; 0 at
        padding."""
        for chunk in self._chunks():
            units, at_units = self.units[:, chunk] + self.origin, gradient[:, :-1][:, chunk]
            radial = torch.linalg.vecdot(at_units, units).unsqueeze(-1)
            at_units.addcmul_(units, radial, value=-1).div_(self.norms[:, chunk])
        return gradient.to(self.state_dtype).index_select(1, self.place).view(self.shape)


class Group:
    """Sequences first, ..., last - 1, each padded to the length of the last. In the place of padding are tokens of the
    sequences that follow, so that to pad is to take slices; `potentials` keeps them from weighing anything."""

    def __init__(self, packed: PackedSequences, first: int, last: int):
        self.sequences = slice(first, last)
        self.tokens = slice(packed.starts[first], packed.starts[last])
        self.lengths = packed.lengths[first:last]
        self.starts = [start - packed.starts[first] for start in packed.starts[first:last]]
        lengths = torch.tensor(self.lengths, device=packed.units.device)
        self.padding = torch.arange(self.lengths[-1], device=lengths.device) >= lengths[:, None]  # (sequences, length)
        self.weights = 1 / lengths.to(packed.units.dtype)  # of a token, by sequence
        self.potentials = self.padded(-packed.half_squares[:, self.tokens], 1).masked_fill_(self.padding, PADDING)

    def tokens_of_sequences(self) -> Iterator[slice]:
        for start, length in zip(self.starts, self.lengths):
            yield slice(self.tokens.start + start, self.tokens.start + start + length)

    def padded(self, values: torch.Tensor, dim: int) -> torch.Tensor:
        """The group's tokens along `dim` -> sequences, length."""
        length = self.lengths[-1]
        return torch.stack([values.narrow(dim, start, length) for start in self.starts], dim)

    def unpadded(self, values: torch.Tensor, dim: int) -> torch.Tensor:
        """Sequences, length along `dim` and the one after it -> the group's tokens."""
        parts = [part.narrow(dim, 0, length) for part, length in zip(values.unbind(dim), self.lengths)]
        return torch.cat(parts, dim)
