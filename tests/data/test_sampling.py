"""Batches without equal keys, the same for a seed, another in each epoch, dealt out to processes."""

import random

import pytest
from accelerate.data_loader import BatchSamplerShard

from speechllm.data.sampling import DistinctBatchSampler


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
