"""Batches without equal keys, the same for a seed, another in each epoch, dealt out to processes."""

import random

import pytest
from accelerate.data_loader import BatchSamplerShard

from speechllm.data.sampling import DistinctBatchSampler, packed_batches


KEYS = [f"text {i % 40}" if i % 3 else "yes" for i in range(150)]
LENGTHS = [random.Random(i).uniform(1, 20) for i in range(150)]


def sampler(**options):
    return DistinctBatchSampler(KEYS, LENGTHS, **{"batch_size": 4, "processes": 2, "seed": 1, **options})


@pytest.mark.parametrize("window", [0, 1, 4])
def test_a_global_batch_has_no_key_twice(window):
    batches = sampler(window=window)
    for epoch in range(4):
        batches.set_epoch(epoch)
        found = list(batches)
        assert len(found) == len(batches) > 4
        assert {len(batch) for batch in found} == {4}
        for first, second in zip(found[::2], found[1::2]):
            assert len({KEYS[i] for i in first + second}) == 8
        items = [i for batch in found for i in batch]
        assert len(set(items)) >= 0.6 * len(items)


def test_an_epoch_without_repeats_uses_each_item_once():
    found = [i for batch in DistinctBatchSampler(range(40), [1.0] * 40, batch_size=4, processes=2) for i in batch]
    assert sorted(found) == list(range(40))


def test_seed_and_epoch_decide():
    def epoch(number, **options):
        batches = sampler(**options)
        batches.set_epoch(number)
        return list(batches)

    assert epoch(1) == epoch(1)
    assert epoch(1) != epoch(2)
    assert epoch(1) != epoch(1, seed=2)
    batches = sampler()
    first = list(batches)
    assert list(batches) == first  # iterating does not change what comes next


def test_similar_lengths_share_a_batch():
    def spread(window):
        batches = DistinctBatchSampler(range(150), LENGTHS, batch_size=8, window=window)
        spreads = [max(LENGTHS[i] for i in b) - min(LENGTHS[i] for i in b) for b in batches]
        return sum(spreads) / len(spreads)

    assert spread(10) < 0.6 * spread(0)


def drawn_batches(seed, repeats=0.0):
    """Random items in random order, packed: lengths, windows, and the processes' batches with the size of each."""
    draw = random.Random(seed)
    count, size, processes = draw.randrange(80, 1500), draw.randrange(2, 9), draw.randrange(1, 4)
    window = draw.choice([1, 4, 40, 1000])
    length = draw.choice([lambda: draw.lognormvariate(2, 1), lambda: draw.uniform(5, 15), lambda: draw.choice([1, 30])])
    lengths = [length() for _ in range(count)]
    keys = [f"again {i % 7}" if draw.random() < repeats else i for i in range(count)]
    order = draw.sample(range(count), count)
    windows = [order[start : start + size * processes * window] for start in range(0, count, size * processes * window)]
    packed, _ = packed_batches(order, keys, lengths, size * processes, window, draw)
    batches = [batch[start : start + size] for batch in packed for start in range(0, len(batch), size)]
    return keys, lengths, windows, batches, size


@pytest.mark.parametrize("seed", range(30))
def test_padding_of_a_window_is_at_most_a_batch_of_its_range(seed):
    _, lengths, windows, batches, size = drawn_batches(seed)
    for window in windows:
        found = [batch for batch in batches if not set(window).isdisjoint(batch)]
        assert all(set(batch) <= set(window) for batch in found)
        used = [lengths[i] for batch in found for i in batch]
        if not used:
            continue  # the last items, too few for a batch
        positions = sum(size * max(lengths[i] for i in batch) for batch in found)
        if len(windows) > 1:
            assert positions - sum(used) <= size * (max(used) - min(used)) + 1e-6
        else:  # lengths are blurred
            assert positions <= 1.5 * sum(used) + size * (1.5 * max(used) - min(used)) + 1e-6


@pytest.mark.parametrize("seed", range(30))
def test_items_held_back_loosen_the_bound_by_their_batches_only(seed):
    keys, lengths, windows, batches, size = drawn_batches(seed, repeats=0.05)
    blur = 1.0 if len(windows) > 1 else 1.5
    positions = sum(size * max(lengths[i] for i in batch) for batch in batches)
    ranges = sum(size * (blur * max(of) - min(of)) for of in ([lengths[i] for i in window] for window in windows))
    loose = sum(any(keys.count(keys[i]) > 1 for i in batch) for batch in batches)
    loose += len(windows) - 1  # held-back items shift the others: a batch may take from two windows
    used = sum(lengths[i] for batch in batches for i in batch)
    assert positions <= blur * used + ranges + loose * size * max(lengths)


def test_batches_differ_from_epoch_to_epoch_also_where_one_window_holds_all():
    for window in (2, 1000):
        batches = DistinctBatchSampler(range(144), LENGTHS[:144], batch_size=8, window=window)  # none left over
        first = {frozenset(batch) for batch in batches}
        batches.set_epoch(1)
        assert len(first & {frozenset(batch) for batch in batches}) < len(first) / 2


def test_shards_form_the_global_batches():
    whole = sampler()
    shards = [BatchSamplerShard(sampler(), 2, rank) for rank in range(2)]
    for epoch in (0, 1):
        whole.set_epoch(epoch)
        for shard in shards:
            shard.batch_sampler.sampler.set_epoch(epoch)  # as Accelerate's loader does
        first, second = map(list, shards)
        assert len(first) == len(second) == len(shards[0])
        assert [batch for pair in zip(first, second) for batch in pair] == list(whole)


def test_a_key_that_is_nearly_everywhere_still_leaves_a_batch():
    keys = ["yes"] * 50 + ["a", "b", "c"]
    batches = DistinctBatchSampler(keys, [1.0] * 53, batch_size=4)
    assert len(batches) == 1
    assert len({keys[i] for i in next(iter(batches))}) == 4
    with pytest.raises(ValueError, match=r"4 x 2 needs .* has 4"):
        DistinctBatchSampler(keys, [1.0] * 53, batch_size=4, processes=2)
