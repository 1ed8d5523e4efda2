"""Batches without false negatives and with little padding.

In a contrastive batch, two utterances of the same sentence would be each other's negatives. `DistinctBatchSampler` puts
a key (the transcript) into a batch at most once, also across the processes that share a global batch, and draws the
items of a batch from a few batches' worth of shuffled items sorted by length.

Padding is bounded. Within such a window, batches are consecutive runs of the items sorted by length, so the ranges of
their lengths add up to at most longest - shortest: a window's batches of B items have at most B * (longest - shortest)
positions of padding, however many batches there are. Two things loosen that:

- Where one window holds all items, lengths are blurred by r = 0.2, or every epoch would have the same batches. With
  q = (1 + r) / (1 - r) = 1.5 and the sum V of all lengths, its batches have at most q V + B * (q longest - shortest)
  positions: at most a third is padding, but for a batch and a half of the longest items.
- Items held back for their key join a later batch, of shorter items. Such a batch is only known to have at most
  B * longest positions.
"""

import random
from collections import deque
from collections.abc import Hashable, Iterator, Sequence

from torch.utils.data import Sampler


LENGTH_BLUR = 0.2  # of one window that holds all items: their lengths are compared up to so much


class DistinctBatchSampler(Sampler[list[int]]):
    """Full batches of indices whose keys differ; a new shuffle in every epoch.

    Args:
        keys: one per item; items with equal keys never share a global batch.
        lengths: one per item, in any unit; items of similar length share a batch.
        batch_size: items per batch and process.
        processes: consecutive batches that form one global batch (Accelerate deals them out to its processes).
        seed: of the shuffle, together with the epoch.
        window: global batches' worth of items that are sorted by length together, hence the bound on padding above;
            0 turns sorting off.

    Raises:
        ValueError: if there are fewer distinct keys than a global batch needs.
    """

    drop_last = True

    def __init__(
        self,
        keys: Sequence[Hashable],
        lengths: Sequence[float],
        batch_size: int,
        processes: int = 1,
        seed: int = 0,
        window: int = 4,
    ):
        self.keys, self.lengths = list(keys), list(lengths)
        self.batch_size, self.processes, self.seed, self.window = batch_size, processes, seed, window
        self.epoch = 0
        distinct = len(set(self.keys))
        if distinct < batch_size * processes:
            raise ValueError(
                f"A global batch of {batch_size} x {processes} needs as many distinct transcripts, but the data has "
                f"{distinct}. Lower per_device_train_batch_size or give more data."
            )
        self._length = len(self._global_batches(epoch=0)) * processes

    @property
    def sampler(self) -> "DistinctBatchSampler":
        """Accelerate looks here for `set_epoch` when it deals batches out to several processes."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches per epoch, over all processes; the same in every epoch."""
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        wanted = self._length // self.processes
        batches = self._global_batches(self.epoch)[:wanted]
        # A shuffle may pack a batch or two less than the first epoch's did: take those from a further shuffle.
        extra = 1
        while len(batches) < wanted:
            batches += self._global_batches(self.epoch + 1_000_003 * extra)[: wanted - len(batches)]
            extra += 1
        for batch in batches:
            for start in range(0, len(batch), self.batch_size):
                yield batch[start : start + self.batch_size]

    def _global_batches(self, epoch: int) -> list[list[int]]:
        generator = random.Random(f"{self.seed} {epoch}")
        size = self.batch_size * self.processes
        order = list(range(len(self.keys)))
        generator.shuffle(order)
        kept = order[: len(order) - len(order) % size]  # what no full batch is left for is random, not the longest
        order = kept if len({self.keys[i] for i in kept}) >= size else order  # there is always one batch
        batches, _ = packed_batches(order, self.keys, self.lengths, size, self.window, generator)
        return batches


def packed_batches(
    order: Sequence[int],
    keys: Sequence[Hashable],
    lengths: Sequence[float],
    size: int,
    window: int,
    generator: random.Random,
) -> tuple[list[list[int]], list[int]]:
    """Items in random order -> full batches in random order, each of distinct keys and similar lengths, and the items
    that no full batch was left for.

    order: indices of items; keys, lengths: by index; size: of a batch; window: batches' worth of consecutive items that
    are sorted by length together, 0 turns sorting off.
    """
    if window:
        windows = [order[start : start + size * window] for start in range(0, len(order), size * window)]
        if len(windows) == 1:  # several differ from shuffle to shuffle, and their batches with them
            lengths = [length * generator.uniform(1 - LENGTH_BLUR, 1 + LENGTH_BLUR) for length in lengths]
        # Longest first: what cannot be packed at the end are then short texts, which repeat the most.
        order = [i for items in windows for i in sorted(items, key=lengths.__getitem__, reverse=True)]
    batches, waiting, stream = [], deque(), iter(order)
    while True:
        batch, taken, passed = [], set(), deque()
        while len(batch) < size:
            item = waiting.popleft() if waiting else next(stream, None)
            if item is None:
                generator.shuffle(batches)
                return batches, [*batch, *passed]
            if keys[item] in taken:
                passed.append(item)
            else:
                taken.add(keys[item])
                batch.append(item)
        batches.append(batch)
        waiting.extend(passed)
