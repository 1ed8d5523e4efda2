"""Parts that lie in each other, and mixtures whose shares are what weights and temperature say."""

import itertools
from collections import Counter

import datasets
import pytest

from speechllm.data.mixtures import PACKED, fraction_of, interleaved, mixture, pack, repetitions


def rows(name, count):
    return [{"id": f"{name}{i}", "audio": f"{name}{i}.wav", "text": f"{name} {i}"} for i in range(count)]


def test_parts_are_nested_and_decided_by_the_seed():
    data = rows("a", 200)
    parts = [fraction_of(data, fraction, seed=1) for fraction in (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)]
    assert [len(part) for part in parts] == [2, 10, 20, 40, 100, 200]
    for less, more in itertools.pairwise(parts):
        assert {row["id"] for row in less} < {row["id"] for row in more}
    assert fraction_of(data, 0.1, seed=1) == parts[2] != fraction_of(data, 0.1, seed=2)
    places = [data.index(row) for row in parts[2]]
    assert places == sorted(places)
    for wrong in (0, -1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            fraction_of(data, wrong)


def shares(mixed):
    counts = Counter(row["id"][0] for row in mixed)
    return {name: count / len(mixed) for name, count in counts.items()}


def test_sources_alone_and_as_they_are():
    sources = [rows("a", 6), rows("b", 3)]
    assert mixture(sources) == [*sources[0], *sources[1]]
    assert mixture(sources[:1], weights=[7.0], temperature=3.0) == sources[0]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0, 1e9])
@pytest.mark.parametrize("weights", [[1, 1, 1], [3, 1, 0.5]])
def test_shares_are_those_of_the_formula(weights, temperature):
    sizes = [900, 90, 10]
    mixed = mixture([rows(name, size) for name, size in zip("abc", sizes)], weights, temperature)
    expected = [weight * size ** (1 / temperature) for weight, size in zip(weights, sizes)]
    found = shares(mixed)
    for name, value in zip("abc", expected):
        assert found[name] == pytest.approx(value / sum(expected), rel=0.06)  # whole rows, of as few as 10
    assert {row["text"] for row in mixed} == {
        row["text"] for s in zip("abc", sizes) for row in rows(*s)
    }  # none is lost
    assert len({row["id"] for row in mixed}) == len(mixed)


def test_a_mixture_is_decided_by_the_seed():
    sources = [rows("a", 50), rows("b", 20)]
    first = mixture(sources, [1, 1.5], seed=1)
    assert first == mixture(sources, [1, 1.5], seed=1) != mixture(sources, [1, 1.5], seed=2)
    assert Counter(row["id"][0] for row in first) == {"a": 50, "b": 30}


def test_what_makes_no_sense():
    for sizes, weights, temperature in (([3], [0], 1), ([3], [1], 0), ([0], [1], 1), ([3], [-1], 1)):
        with pytest.raises(ValueError, match="must be above 0"):
            repetitions(sizes, weights, temperature)


def stream(name, count, **columns):
    def generate(shards):
        for shard in shards:
            for row in rows(name, count)[shard::2]:
                yield pack({**row, **columns})

    return datasets.IterableDataset.from_generator(generate, features=PACKED, gen_kwargs={"shards": [0, 1]})


def test_streams_are_interleaved_by_weight_whatever_their_columns():
    both = interleaved([stream("a", 300), stream("b", 300, audio={"path": "b.wav", "offset": 1.0})], [3.0, 1.0], seed=4)
    first = [row["id"] for row in both.take(200)]
    assert 0.65 < sum(name.startswith("a") for name in first) / 200 < 0.85
    assert first == [row["id"] for row in both.take(200)]
    found = {row["id"]: row for row in both}
    assert (
        len(found) == 600 and found["b7"]["audio"] == {"path": "b.wav", "offset": 1.0} and "packed" not in found["a1"]
    )


def test_a_mixture_of_streams_goes_on_where_it_was():
    def both():
        return interleaved([stream("a", 20), stream("b", 10)], [1.0, 1.0], seed=4)

    whole = [row["id"] for row in both()]
    begun = both()
    taken = [row["id"] for _, row in zip(range(13), begun)]
    resumed = both()
    resumed.load_state_dict(begun.state_dict())
    assert taken + [row["id"] for row in resumed] == whole
