"""Words as both: where a transcript's words lie among the speech tokens, and which token ids their text has.

Word times come from `forced_alignment.py`, in a row's `words`: [{"word", "start", "end"}, ...] in seconds.
"""

import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from ..configuration_speechllm import SpeechTokenRule
from ..objectives.mixed_speech_text import WordSpan
from .schema import Row


def has_word_times(row: Row) -> bool:
    """Whether the row's `words` are what `forced_alignment.py` makes of a transcript."""
    words = row.get("words")
    return isinstance(words, list) and all(
        isinstance(word, dict)
        and isinstance(word.get("word"), str)
        and all(isinstance(word.get(name), int | float) for name in ("start", "end"))
        for word in words
    )


def word_spans(
    row: Row, segment_frames: list[int], rule: SpeechTokenRule, tokenizer: Any, punctuation: bool = True
) -> list[WordSpan]:
    """The spans of a row's `words` in speech tokens, with the token ids of their text.

    Args:
        segment_frames: encoder frames of each segment of the row's audio.
        rule: the model's, from frames to speech tokens.
        tokenizer: of the LLM, a fast one.
        punctuation: `False` strips it; words of nothing else then drop out.
    """
    words = [(word["word"], word["start"], word["end"]) for word in row["words"]]
    if not punctuation:
        words = [(text, *times) for word, *times in words if (text := without_punctuation(word))]
    ids = ids_by_word([word for word, *_ in words], tokenizer)
    return [
        WordSpan(*speech_token_span(start, end, segment_frames, rule), text_ids)
        for (_, start, end), text_ids in zip(words, ids)
    ]


def speech_token_span(start: float, end: float, segment_frames: list[int], rule: SpeechTokenRule) -> tuple[int, int]:
    """First and last (exclusive) speech token of the windows that a stretch of `start` to `end` seconds touches; at
    least one window. Segments last as long as their frames: right to a frame or two (20 ms each) per segment.
    """
    beginnings = [0, *accumulate(segment_frames)]
    tokens = [0, *accumulate(rule.tokens(frames) for frames in segment_frames)]

    def window(seconds: float) -> int:
        """The first token of the window that is heard at `seconds`."""
        frame = min(max(int(seconds * rule.frames_per_second + 1e-6), 0), beginnings[-1] - 1)
        segment = bisect_right(beginnings, frame) - 1
        return tokens[segment] + (frame - beginnings[segment]) // rule.window * rule.tokens_per_window

    last_instant = max(end - 1e-3, start)  # a word that ends where a window begins does not touch it
    return window(start), window(last_instant) + rule.tokens_per_window


def without_punctuation(word: str) -> str:
    """A word without punctuation around it; what is inside it (don't, U.S, 3.5) stays. May be empty."""
    kept = [i for i, character in enumerate(word) if unicodedata.category(character)[0] not in "PS"]
    return word[kept[0] : kept[-1] + 1] if kept else ""


def ids_by_word(words: Sequence[str], tokenizer: Any) -> list[tuple[int, ...]]:
    """The token ids of the words joined by spaces, dealt out to the words: together exactly the text's tokens.

    Args:
        tokenizer: a fast tokenizer of Transformers, which knows where its tokens lie in the text.
    """
    ends = list(accumulate((len(word) + 1 for word in words), initial=-1))[1:]
    encoded = tokenizer(" ".join(words), add_special_tokens=False, return_offsets_mapping=True)
    ids: list[list[int]] = [[] for _ in words]
    for token, (_, end) in zip(encoded["input_ids"], encoded["offset_mapping"]):
        ids[bisect_left(ends, end)].append(token)
    return [tuple(word) for word in ids]
