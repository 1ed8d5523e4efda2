"""Mixed speech-text next-word prediction (the baseline "mixed" of arXiv 2412.15712).

1. Each word of an utterance is given as speech or as text, at random.
2. Words in a row that are given as speech are one stretch of speech tokens, with the pauses between them.
3. The LLM predicts the next token at the text tokens only: a written word from the words before it, heard or read.

A speech token stands for a window of a third of a second, longer than many words. A stretch takes every window that its
words touch, so a word given as speech is heard in full, and a window at the edge may hold a part of the neighbouring word.
A window is given once: where two spoken words with a written one between them share it, it comes with the first.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass


IGNORED = -100  # label of a position without loss


@dataclass(frozen=True)
class WordSpan:
    """A word as both: its speech tokens `first` to `last` (exclusive) of the utterance, and its text's token ids."""

    first: int
    last: int
    text_ids: tuple[int, ...]


@dataclass(frozen=True)
class MixedSequence:
    """input_ids: text tokens, and placeholders for speech tokens; labels: the text tokens, -100 at speech;
    speech: which of the utterance's speech tokens fill the placeholders, in order."""

    input_ids: list[int]
    labels: list[int]
    speech: list[int]


def spoken_words(count: int, probability: float, generator: random.Random) -> list[bool]:
    """Which of `count` words are given as speech: each with `probability`, on condition that a written word follows a
    spoken one, as there is nothing to learn otherwise. A single word is spoken.

    Raises:
        ValueError: if the probability is not between 0 and 1.
    """
    if not 0 < probability < 1:
        raise ValueError(f"The probability of a word to be given as speech is {probability}; it must be in (0, 1).")
    if count < 2:
        return [True] * count
    while True:
        spoken = [generator.random() < probability for _ in range(count)]
        if True in spoken and False in spoken[spoken.index(True) :]:
            return spoken


def mixed_sequence(words: Sequence[WordSpan], spoken: Sequence[bool], placeholder: int) -> MixedSequence:
    """One utterance's words in order, each as speech or as text.

    Args:
        words: with spans that do not go backwards.
        spoken: one per word, `True` = as speech.
        placeholder: id of the audio placeholder.

    Returns:
        The sequence; no speech token occurs twice in it.

    Raises:
        ValueError: if the lengths differ.
    """
    if len(words) != len(spoken):
        raise ValueError(f"There are {len(words)} words, but {len(spoken)} choices of speech or text.")
    input_ids: list[int] = []
    labels: list[int] = []
    speech: list[int] = []
    previous = False
    for word, is_spoken in zip(words, spoken):
        if is_spoken:
            heard = speech[-1] + 1 if speech else 0
            # Inside a stretch of speech the pause before the word belongs to it too.
            span = range(heard if previous else max(heard, word.first), word.last)
            speech += span
            input_ids += [placeholder] * len(span)
            labels += [IGNORED] * len(span)
        else:
            input_ids += word.text_ids
            labels += word.text_ids
        previous = is_spoken
    return MixedSequence(input_ids, labels, speech)
