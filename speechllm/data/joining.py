"""More training data from little: utterances heard one after the other.

Where most utterances are a word or two, a model learns to guess whole sentences from their gist. Random utterances, one
after the other, have to be written down in order, and no two of them are the same.
"""

import random
from typing import Any

from .schema import Row


def joined_rows(rows: list[Row], count: int, maximum_seconds: float, seed: int = 0, most: int = 4) -> list[Row]:
    """Rows that play two to `most` random utterances in a row; their text is the texts, in order.

    Args:
        rows: with `id`, `audio`, `text` and `duration` in seconds.
        count: how many to make.
        maximum_seconds: longest sum of durations.
        seed: of the choice.

    Returns:
        Rows whose `parts` are the rows that they play.

    Raises:
        ValueError: if no two utterances are short enough together.
    """
    generator = random.Random(f"joined {seed}")
    shortest = sorted(row["duration"] for row in rows)[:2]
    if len(shortest) < 2 or sum(shortest) > maximum_seconds:
        raise ValueError(f"No two of the {len(rows)} utterances fit into {maximum_seconds} s; raise maximum_seconds.")
    joined = []
    while len(joined) < count:
        parts, seconds = [], 0.0
        for row in generator.sample(rows, min(most, len(rows))):
            if seconds + row["duration"] <= maximum_seconds:
                parts.append(row)
                seconds += row["duration"]
        if len(parts) > 1:
            row = {
                "id": " + ".join(row["id"] for row in parts),
                "audio": parts[0]["audio"],
                "parts": parts,
                "text": " ".join(row["text"] for row in parts),
                "duration": seconds,
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
