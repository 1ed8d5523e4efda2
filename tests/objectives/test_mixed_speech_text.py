"""Mixed sequences by hand, and what random choices may and may not be."""

import random
from collections import Counter

import pytest

from speechllm.objectives import WordSpan, mixed_sequence, spoken_words


SPEECH = 99
WORDS = [WordSpan(0, 2, (1, 2)), WordSpan(2, 4, (3,)), WordSpan(6, 8, (4, 5)), WordSpan(8, 12, (6,))]


@pytest.mark.parametrize(
    ("spoken", "input_ids", "speech"),
    [
        ((1, 0, 0, 0), [99, 99, 3, 4, 5, 6], [0, 1]),
        ((0, 1, 0, 1), [1, 2, 99, 99, 4, 5, 99, 99, 99, 99], [2, 3, 8, 9, 10, 11]),
        ((0, 1, 1, 0), [1, 2, 99, 99, 99, 99, 99, 99, 6], [2, 3, 4, 5, 6, 7]),  # with the pause 4, 5 between them
        ((0, 0, 1, 0), [1, 2, 3, 99, 99, 6], [6, 7]),  # without it
        ((0, 0, 0, 0), [1, 2, 3, 4, 5, 6], []),
        ((1, 1, 1, 1), [99] * 12, list(range(12))),
    ],
)
def test_by_hand(spoken, input_ids, speech):
    sequence = mixed_sequence(WORDS, [bool(x) for x in spoken], SPEECH)
    assert sequence.input_ids == input_ids
    assert sequence.speech == speech
    assert sequence.labels == [-100 if token == SPEECH else token for token in input_ids]


def test_shared_windows_are_given_once():
    words = [WordSpan(0, 4, (1,)), WordSpan(2, 4, (2,)), WordSpan(2, 6, (3,)), WordSpan(4, 6, (4,))]
    assert mixed_sequence(words, [True, True, False, False], SPEECH).speech == [0, 1, 2, 3]
    sequence = mixed_sequence(words, [True, False, True, False], SPEECH)
    assert sequence.speech == [0, 1, 2, 3, 4, 5] and sequence.input_ids == [99] * 4 + [2] + [99] * 2 + [4]
    assert mixed_sequence(words, [False, False, True, True], SPEECH).speech == [2, 3, 4, 5]
    for seed in range(50):
        spoken = spoken_words(4, 0.5, random.Random(seed))
        sequence = mixed_sequence(words, spoken, SPEECH)
        assert sequence.speech == sorted(set(sequence.speech))
        assert sequence.input_ids.count(SPEECH) == len(sequence.speech)


def test_choices_are_random_reproducible_and_worth_learning_from():
    draws = [tuple(spoken_words(3, 0.5, random.Random(seed))) for seed in range(2000)]
    assert draws == [tuple(spoken_words(3, 0.5, random.Random(seed))) for seed in range(2000)]
    counts = Counter(draws)
    # A written word follows a spoken one: 4 of the 8 choices, equally often.
    assert set(counts) == {(True, False, False), (True, True, False), (True, False, True), (False, True, False)}
    assert all(400 < count < 600 for count in counts.values())
    many = [spoken_words(200, 0.3, random.Random(seed)) for seed in range(50)]
    assert 0.27 < sum(map(sum, many)) / 10_000 < 0.33
    assert spoken_words(1, 0.5, random.Random(0)) == [True] and spoken_words(0, 0.5, random.Random(0)) == []


def test_what_cannot_be():
    for probability in (0.0, 1.0, -1):
        with pytest.raises(ValueError, match=r"must be in \(0, 1\)"):
            spoken_words(3, probability, random.Random(0))
    with pytest.raises(ValueError, match="4 words, but 2 choices"):
        mixed_sequence(WORDS, [True, False], SPEECH)
