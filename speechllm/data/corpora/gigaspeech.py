"""GigaSpeech (https://github.com/SpeechColab/GigaSpeech): English audiobooks, podcasts and videos.

    GigaSpeech.json     {"audios": [{"aid", "path", "segments": [{"sid", "begin_time", "end_time", "text_tn", "speaker",
                        "subsets": ["{XL}", "{M}"]}, ...]}, ...]}
    audio/podcast/P0001/POD1000000004.opus

The transcripts are in capitals with words for punctuation marks; segments without speech have a tag for a transcript.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from ..schema import ManifestError, Row, SetAside
from .reading import MALFORMED, choice, malformed


SUBSETS = ["XL", "L", "M", "S", "XS", "DEV", "TEST"]
PUNCTUATION = {" <COMMA>": ",", " <PERIOD>": ".", " <QUESTIONMARK>": "?", " <EXCLAMATIONPOINT>": "!"}
NO_SPEECH = {"<SIL>", "<NOISE>", "<MUSIC>", "<OTHER>"}


def gigaspeech(folder: Path, subset: str = "M") -> Iterator[Row | SetAside]:
    """Rows of GigaSpeech; transcripts in lower case with punctuation. Segments without speech are passed over.

    Args:
        folder: what holds GigaSpeech.json.
        subset: "XL" (10,000 hours), "L" (2,500), "M" (1,000), "S" (250), "XS" (10), "DEV" or "TEST".

    Raises:
        ManifestError: if GigaSpeech.json is missing or not what it should be.
    """
    choice(subset, "subset", SUBSETS)
    path = folder / "GigaSpeech.json"
    try:
        recordings = json.loads(path.read_text(encoding="utf-8"))["audios"]
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror}. Give the folder that holds it.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ManifestError(f"{path} is not GigaSpeech's JSON ({error}). Download it again.") from None
    for number, recording in enumerate(recordings, 1):
        if not isinstance(recording, dict) or not isinstance(recording.get("segments"), list):
            yield malformed(f"recording {number}", path, KeyError("segments"))
            continue
        for place, segment in enumerate(recording["segments"], 1):
            try:
                if (found := _segment(folder, recording, segment, subset)) is not None:
                    yield found
            except MALFORMED as error:
                name = segment.get("sid") if isinstance(segment, dict) else None
                yield malformed(str(name or f"recording {number}, segment {place}"), path, error)


def _segment(folder: Path, recording: dict, segment: dict, subset: str) -> Row | SetAside | None:
    """A segment's row; `None` if it is of another subset or without speech."""
    if f"{{{subset}}}" not in segment["subsets"] or segment["text_tn"].strip() in NO_SPEECH:
        return None
    start, seconds = segment["begin_time"], segment["end_time"] - segment["begin_time"]
    if seconds <= 0:
        reason = (
            f"{segment['sid']} begins at {start} and ends at {segment['end_time']}. Download GigaSpeech.json again."
        )
        return SetAside(segment["sid"], reason, "impossible times")
    return {
        "id": segment["sid"],
        "audio": {"path": str(folder / recording["path"]), "offset": start, "duration": round(seconds, 3)},
        "text": spoken_text(segment["text_tn"]),
        "duration": round(seconds, 3),
        "task": "asr",
        "language": "en",
        "speaker": None if segment.get("speaker") in (None, "N/A") else segment["speaker"],
        "source": "GigaSpeech",
        "license": "apache-2.0",
    }


def spoken_text(transcript: str) -> str:
    """
    >>> spoken_text("AS THEY'RE LEAVING <COMMA> CAN KASH PULL ZAHRA ASIDE <QUESTIONMARK>")
    "as they're leaving, can kash pull zahra aside?"
    """
    for tag, mark in PUNCTUATION.items():
        transcript = transcript.replace(tag, mark)
    return transcript.lower().strip()
