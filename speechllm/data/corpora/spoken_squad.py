"""Spoken-SQuAD (https://github.com/Chia-Hsuan-Lee/Spoken-SQuAD): questions in writing about passages in speech.

    spoken_train-v1.1.json, spoken_test-v1.1.json     SQuAD's JSON; the contexts are what a recogniser heard
    train_wav/12_3_0.wav                              TOPIC_PARAGRAPH_SENTENCE.wav, counted from 0 as in SQuAD's JSON

A passage is one file per sentence: its audio is {"parts": [...]}, played one after the other. SQuAD's own JSON files
(train-v1.1.json, dev-v1.1.json) may lie beside the spoken ones: then topics and paragraphs are counted in those, found by
the questions' ids, which is safe against passages that the spoken files lack; without them, in the spoken files.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from ..schema import ManifestError, Row, SetAside
from .reading import MALFORMED, choice, malformed, need_folder


# Split -> its file, SQuAD's file, and how the folder of its audio may begin.
SPLITS = {
    "train": ("spoken_train-v1.1.json", "train-v1.1.json", ("train",)),
    "test": ("spoken_test-v1.1.json", "dev-v1.1.json", ("test", "dev")),
    "test-wer44": ("spoken_test-v1.1_WER44.json", "dev-v1.1.json", ("test", "dev")),
    "test-wer54": ("spoken_test-v1.1_WER54.json", "dev-v1.1.json", ("test", "dev")),
}


def spoken_squad(folder: Path, split: str = "train", audio: str = "") -> Iterator[Row | SetAside]:
    """Rows of Spoken-SQuAD, one per question.

    Args:
        folder: what holds the JSON files.
        split: "train", "test", or "test-wer44" and "test-wer54" (give the noisy recordings as `audio`).
        audio: folder of the split's WAV files, relative to `folder`; default: the one whose name begins with "train", or
            with "test" or "dev".

    Raises:
        ManifestError: if a JSON file is missing or malformed, or it is not clear where the audio is.
    """
    choice(split, "split", [*SPLITS])
    spoken, original, beginnings = SPLITS[split]
    questions = _questions(folder / spoken)
    numbered = _questions(folder / original) if (folder / original).is_file() else questions
    places = {question["id"]: place for place, _, question in numbered if "id" in question}
    sentences = _sentences(_audio_folder(folder, audio, beginnings))
    for number, (_, context, question) in enumerate(questions, 1):
        try:
            name = question["id"]
            asked = {
                "question": question["question"].strip(),
                "answers": [answer["text"] for answer in question["answers"] if answer["text"].strip()],
            }
        except MALFORMED as error:
            yield malformed(str(question.get("id", f"question {number}")), folder / spoken, error)
            continue
        place = places.get(name)
        files = sentences.get(place, {})
        if place is None or not files or [*files] != list(range(len(files))):
            passage = f"{place[0]}_{place[1]}" if place else "its passage"
            reason = (
                f"question {name}: sentences of {passage} are missing ({[*files]} are there). Unpack the audio again."
            )
            yield SetAside(name, reason, "audio of the passage missing")
            continue
        yield {
            "id": name,
            "audio": {"parts": [str(path) for path in files.values()]},
            "text": context.strip(),
            "task": "sqa",
            **asked,
            "passage_id": f"{place[0]}_{place[1]}",
            "language": "en",
            "source": "Spoken-SQuAD",
            "license": "cc-by-sa-4.0",
        }


def _questions(path: Path) -> list[tuple[tuple[int, int], str, dict]]:
    """(topic, paragraph), the paragraph's context, and a question of it."""
    try:
        return [
            ((i, j), str(paragraph["context"]), dict(question))
            for i, topic in enumerate(json.loads(path.read_text(encoding="utf-8"))["data"])
            for j, paragraph in enumerate(topic["paragraphs"])
            for question in paragraph["qas"]
        ]
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror}. Give the folder that holds it.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ManifestError(f"{path} is not SQuAD's JSON ({error}). Download it again.") from None


def _audio_folder(folder: Path, audio: str, beginnings: tuple[str, ...]) -> Path:
    if audio:
        return need_folder(folder / audio, "the split's WAV files")
    found = [path for path in sorted(folder.rglob("*")) if path.is_dir() and path.name.lower().startswith(beginnings)]
    found = [path for path in found if next(path.glob("*.wav"), None)]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ManifestError(
            f"{folder}: the folder of WAV files should begin with {' or '.join(beginnings)}; found: {names}. Name it: audio=..."
        )
    return found[0]


def _sentences(folder: Path) -> dict[tuple[int, int], dict[int, Path]]:
    """(topic, paragraph) -> the files of its sentences, in order."""
    found: dict[tuple[int, int], dict[int, Path]] = defaultdict(dict)
    for path in folder.glob("*.wav"):
        numbers = path.stem.split("_")
        if len(numbers) == 3 and all(number.isdigit() for number in numbers):
            topic, paragraph, sentence = map(int, numbers)
            found[topic, paragraph][sentence] = path
    return {place: dict(sorted(files.items())) for place, files in found.items()}
