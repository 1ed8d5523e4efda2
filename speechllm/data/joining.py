"""More training data from little: utterances heard one after the other.

Where most utterances are a word or two, a model learns to guess whole sentences from their gist. Random utterances, one
after the other, have to be written down in order, and hardly two such rows are the same. Utterances are drawn in
proportion to their words, so that each word of the data is heard as often as any other, in whatever company it comes.
"""

import random
from typing import Any

from .schema import Row


def joined_rows(rows: list[Row], count: int, maximum_seconds: float, seed: int = 0, most: int = 4) -> list[Row]:
    """Rows that play one to `most` random utterances in a row; their text is the texts, in order.

    Args:
        rows: with `id`, `audio`, `text` and `duration` in seconds.
        count: how many to make.
        maximum_seconds: longest sum of durations; an utterance that is longer comes alone.
        seed: of the choice.

    Returns:
        Rows whose `parts` are the rows that they play, all different.

    Raises:
        ValueError: if there are no rows.
    """
    if not rows:
        raise ValueError("There are no rows to join. Give some.")
    generator = random.Random(f"joined {seed}")
    words = [len(row["text"].split()) for row in rows]
    joined = []
    for number in range(count):
        parts: list[Row] = []
        for row in generator.choices(rows, weights=words, k=most):
            seconds = sum(part["duration"] for part in parts) + row["duration"]
            if not parts or (seconds <= maximum_seconds and row["id"] not in [part["id"] for part in parts]):
                parts.append(row)
        row = {
            "id": f"{number}: " + " + ".join(part["id"] for part in parts),
            "audio": parts[0]["audio"],
            "parts": parts,
            "text": " ".join(part["text"] for part in parts),
            "duration": sum(part["duration"] for part in parts),
        }
        joined.append({**row, **_joined_words(parts)})
    return joined


def _joined_words(parts: list[Row]) -> dict[str, Any]:
    """The word times of aligned rows (`forced_alignment.py`), each part's moved behind the parts before it."""
    if any("words" not in row for row in parts):
        return {}
    words, start = [], 0.0
    for row in parts:
        words += [{**word, "start": start + word["start"], "end": start + word["end"]} for word in row["words"]]
        start += row["duration"]
    forced = all(row.get("alignment") == "forced" for row in parts)
    return {"words": words, "alignment": "forced" if forced else "proportional"}
