"""The data of `tiny` and `small`: speech to pretrain on, a multi-task fine-tuning at every fraction, and its test.

| task     | from                                                                                                  |
|----------|-------------------------------------------------------------------------------------------------------|
| `asr`    | recorded English prompts and spoken passages; random prompts one after the other, as half of them are |
|          | single words (`data/joining.py`)                                                                      |
| `st`     | the prompts' Spanish, French and Italian versions, written by people                                  |
| `sqa`    | questions about the passages, all of which the LLM answers from the text (`synthesis`)                |
| `traits` | who speaks, how fast, in what noise and room (`synthesis`)                                            |

Pretraining hears prompts and passages with their transcripts, all of them: transcribed speech is what there is plenty of.
What is written is not written again: remove `data/reproduction` to have it made anew. Data of another version of this module
is refused.

A fraction of the fine-tuning data is one of the *recordings*, and so of all rows made from them; the recordings of a
smaller fraction are among those of a larger one. The manifests of a scale have the same numbers of rows (`Scale.tasks`),
drawn from what the fraction has: with little data they come round more often, with all of it some are left out. Training
and test share no near-duplicate prompt, and no two facts that stand together in a passage.
"""

import json
import random
from collections.abc import Iterable, Mapping
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from ..data.forced_alignment import proportional_words
from ..data.joining import joined_rows
from ..data.schema import Row, load_rows
from ..downloads import cache_directory
from ..evaluation.page import write_whole
from ..evaluation.scoring import task_of
from ..quickstart.asterisk_prompts import LANGUAGES
from ..quickstart.small_data import write_small_data
from ..recipes import UsageError
from ..synthesis.engines import parse_voices
from ..synthesis.passages import Passage, generate_passages
from ..synthesis.speaking import synthesise
from ..synthesis.spoken_questions import candidates, spoken_question_answering
from ..synthesis.variants import spoken_traits, trait_rows


SMALL = Path("data/small")  # where the recipes look
DATA = Path("data/reproduction")
PRETRAINING, PRETRAINING_TEST = DATA / "pretraining.jsonl", DATA / "pretraining-test.jsonl"
TRAITS = DATA / "traits-of-24-voices.jsonl"  # to probe for
PROBED_TEXTS = 40
# Of each gender two speak in every text, by turns: enough speakers to ask whether gender is told of ones never heard.
PROBED_VOICES = (
    *("flite:slt", "espeak-ng:en-us+f1", "espeak-ng:en-gb+f2", "espeak-ng:en-us+f3", "espeak-ng:en-gb+f4"),
    *("espeak-ng:en-us+f5", "espeak-ng:en-gb+Alicia", "espeak-ng:en-us+Annie", "espeak-ng:en-gb+anika"),
    *("espeak-ng:en-us+aunty", "espeak-ng:en-gb+belinda", "espeak-ng:en-us+grandma"),
    *("flite:rms", "flite:awb", "espeak-ng:en-us+m1", "espeak-ng:en-gb+m2", "espeak-ng:en-us+m3", "espeak-ng:en-gb+m4"),
    *("espeak-ng:en-us+m7", "espeak-ng:en-gb+m8", "espeak-ng:en-us+Andy", "espeak-ng:en-gb+Denis"),
    *("espeak-ng:en-us+antonio", "espeak-ng:en-gb+miguel"),
)
TURNS = 6
LANGUAGES_OWN, LANGUAGES_ENGLISH = DATA / "languages-own.jsonl", DATA / "languages-english.jsonl"
PASSAGES = {"train": 600, "test": 80}
QUESTIONS = {"train": 240, "test": 60}  # passages with questions
VOICES = ("flite:slt", "flite:rms")
LONGEST, LONGEST_JOINED = 8.0, 6.0  # seconds of a fine-tuning row
PROVENANCE = DATA / "made_by.json"
FORMAT = 2  # raise when other data comes out; 1 had test passages whose facts were heard in pretraining


def train_manifest(scale: str, percent: int) -> Path:
    return DATA / scale / f"train-{percent}-percent.jsonl"


def test_manifest(scale: str) -> Path:
    return DATA / scale / "test.jsonl"


def prepare_pretraining(source: str = "auto") -> None:
    """Fetch, speak and write what pretraining hears, unless it is there.

    Raises:
        UsageError: if what is there was made otherwise.
    """
    made_by = {"format": FORMAT, "passages": PASSAGES, "questions": QUESTIONS}
    if DATA.is_dir() and any(DATA.iterdir()):
        if not PROVENANCE.is_file() or json.loads(PROVENANCE.read_text(encoding="utf-8")) != made_by:
            raise UsageError(f"{DATA} was made by another version of this package. Remove it to have it made anew.")
    else:
        write_whole(PROVENANCE, json.dumps(made_by) + "\n")
    if PRETRAINING.is_file() and PRETRAINING_TEST.is_file():
        return
    if not (SMALL / "train-tasks.jsonl").is_file():
        write_small_data(SMALL, source)
    spoken = spoken_passages()
    for part, path in (("test", PRETRAINING_TEST), ("train", PRETRAINING)):
        _write(path, [*load_rows(SMALL / f"{part}.jsonl"), *spoken[part]])


def spoken_passages() -> dict[str, list[Row]]:
    """Passages of the kind that questions are asked about, each in one voice."""
    spoken = {}
    for part, some in passages().items():
        rows = [{"id": f"passage {part} {i}", "text": passage.text} for i, passage in enumerate(some)]
        folder = cache_directory() / "synthesis" / f"tiny-passages-{part}"
        made = synthesise(rows, folder, parse_voices(VOICES), takes=1).rows
        spoken[part] = [
            {
                **row,
                "task": "asr",
                "language": "en",
                "words": proportional_words(row["text"], row["duration"]),
                "alignment": "proportional",
            }
            for row in made
            if row["duration"] <= LONGEST
        ]
    return spoken


def passages() -> dict[str, list[Passage]]:
    """Those without questions; "train" apart from all that recognition or answers may be tested on."""
    test = generate_passages(PASSAGES["test"], "pretraining test")
    tested = [*test, *candidates(QUESTIONS["test"], "test")]
    return {"train": generate_passages(PASSAGES["train"], "pretraining", apart_from=tested), "test": test}


def questions() -> dict[str, list[Row]]:
    """The questions and the passages that they are about, spoken; "train" apart from both tests' passages."""
    return spoken_question_answering(**QUESTIONS, apart_from=passages()["test"])


def prepare_fine_tuning(scale: str, tasks: Mapping[str, tuple[int, int]], fractions: Iterable[int]) -> None:
    """Write what is missing of a scale's manifests of fine-tuning.

    Args:
        tasks: task -> rows to train on, in the manifest of every fraction, and rows to test on.
    """
    missing = [percent for percent in fractions if not train_manifest(scale, percent).is_file()]
    if not missing and test_manifest(scale).is_file():
        return
    rows, asked, traits = {}, questions(), spoken_traits()
    for part, transcribed in (("train", PRETRAINING), ("test", PRETRAINING_TEST)):
        translated = [row for row in load_rows(SMALL / f"{part}-tasks.jsonl") if row["task"] == "st"]
        rows[part] = [*load_rows(transcribed), *translated, *asked[part], *trait_rows(traits[part])]
    to_train, to_test = ({task: counts[i] for task, counts in tasks.items()} for i in range(2))
    for percent in missing:
        _write(train_manifest(scale, percent), mixture(fraction(rows["train"], percent), to_train))
    if not test_manifest(scale).is_file():
        _write(test_manifest(scale), test_rows(rows["test"], to_test))


def languages_test(manifest: Path) -> Path:
    return manifest.with_name(f"{manifest.stem}-test.jsonl")


def prepare_languages(source: str = "auto") -> None:
    """Write the recorded prompts in five languages, once with their own texts and once with the English ones. (The English
    recordings are in both.)"""
    if not languages_test(LANGUAGES_ENGLISH).is_file():
        write_small_data(SMALL, source, languages=tuple(LANGUAGES))
        for part, place in (("train", lambda path: path), ("test", languages_test)):
            rows = load_rows(SMALL / f"{part}-languages.jsonl")
            own = [row for row in rows if task_of(row) == "asr"]
            english = [
                {**_without_words(row), "text": row["target"]} | {"task": "asr", "target": None}
                for row in rows
                if row.get("target_language") == "en"
            ]
            english = [{name: value for name, value in row.items() if value is not None} for row in english]
            _write(place(LANGUAGES_OWN), own)
            _write(place(LANGUAGES_ENGLISH), [row for row in own if row.get("language") == "en"] + english)


def prepare_probing() -> None:
    """Write the recordings that are probed, with the labels' columns."""
    if not TRAITS.is_file():
        traits = spoken_traits(PROBED_TEXTS - 10, 10, parse_voices(PROBED_VOICES))
        rows = [*traits["test"], *sorted(traits["train"], key=itemgetter("text"))]
        _write(TRAITS, by_turns(rows, PROBED_TEXTS, TURNS))


def by_turns(rows: list[Row], texts: int, turns: int) -> list[Row]:
    """Of so many texts, the recordings by every `turns`-th voice of each gender, by turns: of equally many recordings, more
    texts for the words and more voices for what is said of them."""
    by_text: dict[str, list[Row]] = {}
    for row in rows:
        by_text.setdefault(row["text"], []).append(row)
    voices = sorted({(row["gender"], row["speaker"]) for row in rows})
    places = {
        speaker: place
        for _, of_gender in groupby(voices, itemgetter(0))
        for place, (_, speaker) in enumerate(of_gender)
    }
    return [
        row
        for number, of_text in enumerate(list(by_text.values())[:texts])
        for row in sorted(of_text, key=itemgetter("gender"))
        if places[row["speaker"]] % turns == number % turns
    ]


def fraction(rows: list[Row], percent: int) -> list[Row]:
    """The rows of so many per cent of the recordings, drawn once for all: a smaller part lies in a larger one."""
    recordings = sorted(dict.fromkeys(row["audio"] for row in rows), key=lambda audio: Path(audio).name)
    order = random.Random("fraction").sample(recordings, len(recordings))
    kept = set(order[: max(1, round(len(order) * percent / 100))])
    return [row for row in rows if row["audio"] in kept]


def mixture(rows: list[Row], counts: Mapping[str, int]) -> list[Row]:
    """So many rows of every task, each as often as the others of its task.

    Raises:
        UsageError: if there is none of a task.
    """
    mixed = []
    for task, count in sorted(counts.items()):
        pool = [row for row in rows if row["task"] == task and row["duration"] <= LONGEST]
        if not pool:
            raise UsageError(
                f"Of the task {task!r} there is no row to fine-tune on (up to {LONGEST:g} s long, in this part of the data). "
                "Give larger --fractions, or data that has the task."
            )
        if task == "asr":
            mixed += [
                {**row, "id": f"asr {row['id']}", "task": "asr"} for row in joined_rows(pool, count, LONGEST_JOINED)
            ]
            continue
        shuffled = random.Random(task).sample(pool, len(pool))
        rounds = shuffled * -(-count // len(pool))
        mixed += [{**row, "id": f"{row['id']} ({i // len(pool) + 1})"} for i, row in enumerate(rounds[:count])]
    return [_without_words(row) for row in mixed]


def test_rows(rows: list[Row], counts: Mapping[str, int]) -> list[Row]:
    """At most so many rows of every task, drawn once for all, in the order of `rows`."""
    chosen: set[int] = set()
    for task, count in counts.items():
        of_task = [i for i, row in enumerate(rows) if row["task"] == task]
        chosen.update(random.Random(f"test {task}").sample(of_task, min(count, len(of_task))))
    return [_without_words(rows[i]) for i in sorted(chosen)]


def _without_words(row: Row) -> Row:
    parts = {"parts": [_without_words(part) for part in row["parts"]]} if "parts" in row else {}
    return {name: value for name, value in row.items() if name != "words"} | parts


def _write(path: Path, rows: list[Row]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_whole(path, "".join(lines))
