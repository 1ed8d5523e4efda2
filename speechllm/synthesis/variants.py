"""The same speech under several conditions: voices and rates (`speaking.py`), noise and reverberation (`acoustics.py`).

A model that is to tell a condition must hear it. So the words say nothing about it here:

* every text is there in every condition of a trait, equally often, so a text does not predict the condition;
* training and test share no text (near-duplicates included);
* loudness and length do not tell either: all recordings have one level, and noise and rooms leave the length as it is.

Conditions are crossed: within each text, noise levels and rooms are dealt out evenly over its voices and rates, by seed.
**The voices are the same in training and test**: there are only a few. What is measured is whether voice, rate, noise
and room can be told in new sentences, not for new speakers.

| trait | label column | choices |
|---|---|---|
| gender | `gender` | female, male |
| rate | `rate`, relative to the voice's own pace | slow (below 1), normal, fast (above 1) |
| noise | `snr_db` in dB; no such column: clean | clean, some noise (10 dB and more), much noise |
| reverberation | `reverberation`, RT60 in seconds; no such column: none | dry, echoing |
"""

import hashlib
import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..audio_speechllm import AudioError, load_audio
from ..data.schema import Row, SetAside, load_rows
from ..data.splits import split_by_cluster
from ..downloads import build_once, cache_directory
from .acoustics import at_common_level, with_noise, with_reverberation
from .engines import Voice, check_rates, parse_voices
from .speaking import Spoken, synthesise, write_flac, write_jsonl
from .texts import wordnet_examples


RATES = (0.7, 1.0, 1.4)
SNRS = (None, 15.0, 0.0)
REVERBERATIONS = (None, 0.8)
VOICES = (
    "flite:slt", "espeak-ng:en-us+f2", "espeak-ng:en-us+f3", "espeak-ng:en-gb+f4",
    "flite:rms", "flite:awb", "espeak-ng:en-us+m3", "espeak-ng:en-gb+m1",
)  # fmt: skip
FORMAT = 1  # raise when the data set changes, so that cached ones are built again


def _level_of_noise(row: Row) -> str:
    snr = row.get("snr_db")
    return "clean" if snr is None else "some noise" if snr >= 10 else "much noise"


def _level_of_rate(row: Row) -> str:
    return "slow" if row["rate"] < 1 else "fast" if row["rate"] > 1 else "normal"


TRAITS: dict[str, tuple[list[str], Callable[[Row], str]]] = {
    "gender": (["female", "male"], lambda row: row["gender"]),
    "rate": (["slow", "normal", "fast"], _level_of_rate),
    "noise": (["clean", "some noise", "much noise"], _level_of_noise),
    "reverberation": (["dry", "echoing"], lambda row: "dry" if row.get("reverberation") is None else "echoing"),
}


def variants(
    rows: Sequence[Row],
    output: str | os.PathLike,
    snrs: Sequence[float | None] = SNRS,
    reverberations: Sequence[float | None] = REVERBERATIONS,
    *,
    crossed: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Spoken:
    """Real or synthetic speech with noise and in rooms, in a folder like `synthesise`'s, continued if it is there.

    Args:
        rows: with `audio`; those of one `text` are the ones among which conditions are dealt out.
        output: folder.
        snrs: signal-to-noise ratios in dB; None is clean.
        reverberations: RT60 in seconds; None is no room.
        crossed: every row in every condition; otherwise every row once, the conditions dealt out evenly within each
            text.
        seed: of noise, rooms and dealing.
        progress: show a bar.

    Returns:
        The rows with their new `id` and `audio`, `snr_db` and `reverberation` (absent: clean, none), and those set
        aside because their audio cannot be used. First the room, then the noise.

    Raises:
        ValueError: if a level is out of bounds, or no row has usable audio.
    """
    conditions = [(snr, time) for snr in snrs for time in reverberations]
    if not conditions or any(snr is not None and not -40 <= snr <= 100 for snr in snrs):
        raise ValueError(f"The SNRs are {list(snrs)}. Give at least one, from -40 to 100 dB (or None for clean).")
    output = Path(output)
    dealt = (
        [(row, condition) for row in rows for condition in conditions] if crossed else _dealt(rows, conditions, seed)
    )
    made, aside, reused = [], [], 0
    for row, (snr, time) in tqdm(dealt, desc="Noise and rooms", unit="utt", disable=not progress):
        marks = [f"{level:g} {unit}" for level, unit in ((time, "s RT60"), (snr, "dB")) if level is not None]
        name = " ".join([str(row["id"]), *marks])
        what = hashlib.sha256(json.dumps([str(row["audio"]), name, snr, time, seed]).encode()).hexdigest()[:24]
        path = output / "audio" / what[:2] / f"{what}.flac"
        if path.exists():
            reused += 1
        else:
            try:
                speech = torch.from_numpy(load_audio(row["audio"], name=str(row["id"])))
            except AudioError as error:
                aside.append(SetAside(name, str(error), "audio cannot be decoded"))
                continue
            draw = int(what[:15], 16)
            speech = speech if time is None else with_reverberation(speech, time, draw)
            speech = speech if snr is None else with_noise(speech, snr, draw + 1)
            write_flac(path, at_common_level(speech).numpy())
        labels = {key: value for key, value in (("snr_db", snr), ("reverberation", time)) if value is not None}
        made.append({**row, "id": name, "audio": str(path.absolute()), **labels})
    if not made:
        raise ValueError(f"None of {len(rows)} recording(s) can be used{f': {aside[0].reason}' if aside else '.'}")
    write_jsonl(output / "manifest.jsonl", [{**row, "audio": os.path.relpath(row["audio"], output)} for row in made])
    if aside:
        write_jsonl(output / "set_aside.jsonl", [vars(item) for item in aside])
    return Spoken(made, aside, reused)


def _dealt(rows: Sequence[Row], conditions: list, seed: int) -> list[tuple[Row, tuple]]:
    """Each row with one condition; among the rows of one text every condition as often as any other, or once more."""
    by_text: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        by_text.setdefault(str(row.get("text")), []).append(number)
    chosen = {}
    for text, numbers in by_text.items():
        draw = random.Random(f"conditions {seed} {text}")
        deck: list = []
        while len(deck) < len(numbers):
            deck += draw.sample(conditions, len(conditions))
        draw.shuffle(numbers)
        chosen.update(zip(numbers, deck))
    return [(row, chosen[number]) for number, row in enumerate(rows)]


def trait_rows(rows: Sequence[Row], traits: Sequence[str] = tuple(TRAITS)) -> list[Row]:
    """Rows of the task `traits`: for each recording and trait one with `trait`, `choices` and `target`.

    Raises:
        ValueError: if there is no such trait, or a row lacks its label.
    """
    questions = []
    for trait in traits:
        if trait not in TRAITS:
            raise ValueError(f"There is no trait {trait!r}. Use some of {', '.join(TRAITS)}.")
    for row in rows:
        for trait in traits:
            choices, label = TRAITS[trait]
            try:
                target = label(row)
            except KeyError as error:
                raise ValueError(f"{row['id']}: the trait {trait} needs the column {error}.") from None
            own = {"id": f"{row['id']} {trait}", "task": "traits", "trait": trait, "choices": choices, "target": target}
            questions.append({**row, **own})
    return questions


def spoken_traits(
    train_texts: int = 60,
    test_texts: int = 20,
    voices: Sequence[Voice] | None = None,
    rates: Sequence[float] = RATES,
    snrs: Sequence[float | None] = SNRS,
    reverberations: Sequence[float | None] = REVERBERATIONS,
    *,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, list[Row]]:
    """A data set of paralinguistic variants, made once (an interrupted call is gone on with) and kept in the cache:
    WordNet's example sentences of 4 to 8 words in every voice at every rate, each recording in one condition of noise and
    room (module docstring). `workers` engines run at once (default: one per core).

    Returns:
        "train" and "test": one row per recording with the label columns; `trait_rows` asks about them. 24 recordings
        per text by default, of about 2 s.

    Raises:
        SynthesisError: a rate is out of bounds (`check_rates`), or a text cannot be spoken.
        DownloadError: the engines or the sentences are not here and cannot be fetched.
    """
    voices = list(voices or parse_voices(VOICES))
    check_rates(rates, voices)
    provenance = {"format": FORMAT, "voices": [v.with_gender for v in voices], "rates": list(rates), "seed": seed,
                  "snrs": list(snrs), "reverberations": list(reverberations), "texts": [train_texts, test_texts]}  # fmt: skip

    def build(folder: Path) -> None:
        sentences = [row for row in wordnet_examples() if 4 <= len(row["text"].split()) <= 8]
        # A margin, for texts that the split leaves out or an engine cannot speak.
        sample = random.Random(f"traits {seed}").sample(sentences, 2 * (train_texts + test_texts) + 20)
        train, test = split_by_cluster(sample, test_texts=test_texts, seed=seed, minimum_words=4)
        for name, texts in (("train", train[:train_texts]), ("test", test)):
            speech = folder / "speech"
            spoken = synthesise(texts, speech, voices, rates, workers=workers, strict=True, progress=progress)
            variants(spoken.rows, folder / name, snrs, reverberations, crossed=False, seed=seed, progress=progress)

    key = hashlib.sha256(json.dumps(provenance).encode()).hexdigest()[:12]
    folder = build_once(cache_directory() / "synthesis" / f"traits-{key}", provenance, build, resume=True)
    return {name: load_rows(folder / name / "manifest.jsonl") for name in ("train", "test")}
