"""The quick start's models and speech as a folder that recipes can name (`speechllm fetch`, `recipes/small/`).

| file | rows |
|---|---|
| `speech_model`, `text_model` | links to the folders of Whisper tiny.en and SmolLM2-135M-Instruct |
| `train.jsonl`, `test.jsonl` | English utterances of up to 8 s, split as the quick start's, with word times |
| `train-tasks.jsonl`, `test-tasks.jsonl` | the same, and each once more per language that has its translation (`st`) |

The word times are proportional, by the words' lengths: no CTC recogniser is among the models. The translations are the
same prompts in Spanish, French and Italian, written by people; LibriSpeech, from the Hub, has none.
"""

import json
from pathlib import Path

from ..data.forced_alignment import proportional_words
from ..data.schema import Row
from ..data.splits import split_by_cluster
from .asterisk_prompts import prompt_texts
from .hub import hub_model
from .run import LONGEST_UTTERANCE
from .settings import QuickstartArguments
from .sources import load_source


TRANSLATIONS = {"es": "Spanish", "fr": "French", "it": "Italian"}


def write_small_data(folder: Path, source: str = "auto") -> dict[str, int]:
    """Fetch models and speech, and write `folder` (module docstring); what it holds under the same names is replaced.

    Returns:
        The manifests and how many rows each has.

    Raises:
        DownloadError: the source cannot deliver.
        OSError: the folder cannot be written.
    """
    found = load_source(source)
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("speech", "text"):
        model, revision = getattr(found, f"{part}_model"), getattr(found, f"{part}_revision")
        target = hub_model(model, revision).folder if revision else Path(model)
        link = folder / f"{part}_model"
        link.unlink(missing_ok=True)
        link.symlink_to(target.resolve(), target_is_directory=True)
    credit = found.credits[-1]
    rows = [
        {
            **row,
            "audio": str(Path(row["audio"]).resolve()),
            "words": proportional_words(row["text"], row["duration"]),
            "alignment": "proportional",
            "source": credit["name"],
            "license": credit["licence"].lower(),
        }
        for row in found.rows
        if row["duration"] <= LONGEST_UTTERANCE
    ]
    train, test = split_by_cluster(rows, test_texts=QuickstartArguments().test_utterances, seed=0)
    translations = {code: prompt_texts(code) for code in TRANSLATIONS} if found.name == "packages" else {}
    manifests = {
        "train.jsonl": train,
        "test.jsonl": test,
        "train-tasks.jsonl": [*train, *translated(train, translations)],
        "test-tasks.jsonl": [*test, *translated(test, translations)],
    }
    for name, content in manifests.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in content]
        (folder / name).write_text("".join(lines), encoding="utf-8")
    return {name: len(content) for name, content in manifests.items()}


def translated(rows: list[Row], translations: dict[str, dict[str, str]]) -> list[Row]:
    """A row of speech translation for every row and language whose texts (id -> text) have it."""
    return [
        {
            **row,
            "id": f"{row['id']} {code}",
            "task": "st",
            "target_language": TRANSLATIONS[code],
            "target": texts[row["id"]],
        }
        for code, texts in translations.items()
        for row in rows
        if row["id"] in texts
    ]
