"""Texts x voices x rates -> a folder of speech, in parallel, that an interrupted run continues.

    output/
      audio/3f/3f9c...d2.flac    mono, 16 kHz, 16 bit; named by a hash of text, engine, voice and rate
      manifest.jsonl             the rows, written when all is spoken
      set_aside.jsonl            texts that could not be spoken, each with its reason (if there are any)

A recording appears under its name complete or not at all (written beside it, then renamed), so a second run finds what
the first one finished and speaks the rest; a changed text, voice or rate has another name. The work is done by the
engines' processes; threads wait for them, one per core.
"""

import hashlib
import json
import os
import random
import tempfile
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import soundfile
from tqdm.auto import tqdm

from ..audio_speechllm import AudioError, load_audio
from ..configuration_speechllm import SAMPLING_RATE
from ..data.schema import Row, SetAside, with_ids
from .engines import Engine, SynthesisError, Voice, check_rates, default_engine, default_voices, find_engine


LONGEST_TEXT = 1000  # characters: over a minute of speech, beyond the 30 s of the encoders' segments
FASTEST = 60.0  # characters per second at rate 1; speech is at 10 to 25, so less sound than this lost words
GIVE_UP_AFTER = 20  # failures in a row from the start: then it is the engine, not the texts
_PLAIN = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "\u00a0": " "})


@dataclass(frozen=True)
class Spoken:
    """What came of a run.

    Attributes:
        rows: the spoken rows; `audio` is an absolute path.
        set_aside: the texts without speech, and why.
        reused: how many recordings an earlier run had made.
    """

    rows: list[Row]
    set_aside: list[SetAside]
    reused: int


@dataclass(frozen=True)
class _Take:
    """One text in one voice at one rate, and where its recording goes."""

    row: Row
    voice: Voice
    rate: float
    path: Path


def synthesise(
    texts: Sequence[str | Row],
    output: str | os.PathLike,
    voices: Sequence[Voice] | None = None,
    rates: Sequence[float] = (1.0,),
    *,
    engine: Engine | None = None,
    takes: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    strict: bool = False,
    progress: bool = True,
) -> Spoken:
    """Speak texts and write `output` (module docstring).

    Args:
        texts: strings, or rows with `text`, whose other columns are kept.
        output: folder; made if it is missing, continued if it is there.
        voices: default: some of the engine that is installed, or of flite from Debian's archives.
        rates: 1.25 is a quarter faster than a voice's own pace.
        engine: a command of one's own, for voices whose engine is "command".
        takes: how many of the voices x rates each text gets, drawn by `seed` and text; all of them if not given.
        seed: of that draw.
        workers: engines that run at once; default: one per core.
        strict: stop at the first text that cannot be spoken.
        progress: show a bar.

    Returns:
        Rows with `id` (the text's, the voice and the rate), `audio`, `text`, `duration` (seconds), `speaker` (the
        voice), `gender` (where known) and `rate`, in the order texts, voices, rates.

    Raises:
        SynthesisError: a rate is out of bounds (`check_rates`), no text could be spoken, or (`strict`) one could not.
        DownloadError: an engine is not installed, and Debian's archives cannot be had.
    """
    output = Path(output)
    voices = list(voices or default_voices(default_engine()))
    check_rates(rates, voices)
    if takes is not None and not 1 <= takes <= len(voices) * len(rates):
        raise SynthesisError(
            f"{takes} takes of each text were asked for, but {len(voices)} voice(s) at {len(rates)} rate(s) "
            f"give from 1 to {len(voices) * len(rates)}."
        )
    engines = {name: engine if name == "command" else find_engine(name) for name in {voice.engine for voice in voices}}
    if "command" in engines and engine is None:
        raise SynthesisError("A voice belongs to a command, but no command is given. Give one as `engine`.")

    aside: list[SetAside] = []
    rows = with_ids({"text": text} if isinstance(text, str) else text for text in texts)
    usable = [row for row in rows if _is_usable(row, voices, aside)]
    planned = list(_plan(usable, voices, rates, takes, seed, engines, output))
    if strict and aside:
        raise SynthesisError(f"{aside[0].id}: {aside[0].reason}. Correct it, or leave out `--strict`.")
    # The same text twice in the same voice is one recording.
    missing = list({take.path: take for take in planned if not take.path.exists()}.values())
    failures = _speak_all(missing, engines, output, workers, strict, progress)
    rows = []
    for take in planned:
        name = f"{take.row['id']} {take.voice.name} {take.rate:g}"
        if take.path in failures:
            aside.append(SetAside(name, failures[take.path], "not spoken by the engine"))
            continue
        labels = {"speaker": str(take.voice), "gender": take.voice.gender, "rate": take.rate}
        labels = {key: value for key, value in labels.items() if value is not None}
        duration = soundfile.info(take.path).duration
        rows.append({**take.row, "id": name, "audio": str(take.path.absolute()), "duration": duration, **labels})
    if not rows:
        raise SynthesisError(
            f"None of {len(aside)} text(s) could be spoken; the first, {aside[0].id}: {aside[0].reason}."
            if aside
            else "There is no text to speak."
        )
    write_jsonl(output / "manifest.jsonl", [{**row, "audio": os.path.relpath(row["audio"], output)} for row in rows])
    if aside:
        write_jsonl(output / "set_aside.jsonl", [vars(item) for item in aside])
    else:
        (output / "set_aside.jsonl").unlink(missing_ok=True)
    return Spoken(rows, aside, len({take.path for take in planned}) - len(missing))


def _is_usable(row: Row, voices: Sequence[Voice], aside: list[SetAside]) -> bool:
    """Whether a row's text can be spoken; otherwise it is added to those set aside."""
    text = row.get("text")
    letters = [c for c in text if unicodedata.category(c)[0] in "LN"] if isinstance(text, str) else []
    reason = None
    if not isinstance(text, str) or not text.strip():
        reason = "there is no text"
    elif not letters:
        reason = "the text has no letter or digit"
    elif any(unicodedata.category(c) in ("Cc", "Cs", "Co", "Cn") and c not in "\t\n\r" for c in text):
        reason = "the text has control characters, or is in a wrong encoding"
    elif "\ufffd" in text:
        reason = "the text has replacement characters: it was read in a wrong encoding"
    elif len(text) > LONGEST_TEXT:
        reason = f"the text has {len(text)} characters; {LONGEST_TEXT} is the most (divide it)"
    elif not all(c.isascii() for c in letters) and any(voice.engine == "flite" for voice in voices):
        reason = "flite speaks English in ASCII letters only (use espeak-ng)"
    if reason:
        aside.append(SetAside(row["id"], reason))
    return reason is None


def _plan(rows, voices, rates, takes, seed, engines, output):
    """Every take, in the order texts, voices, rates."""
    cells = [(voice, float(rate)) for voice in voices for rate in rates]
    for row in rows:
        chosen = range(len(cells))
        if takes is not None:
            chosen = sorted(random.Random(f"{seed} {row['id']} {row['text']}").sample(chosen, takes))
        for voice, rate in (cells[i] for i in chosen):
            what = [row["text"], engines[voice.engine].version, voice.name, rate]
            name = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24]
            yield _Take(row, voice, rate, output / "audio" / name[:2] / f"{name}.flac")


def _speak_all(
    takes: list[_Take], engines: dict[str, Engine], output: Path, workers: int | None, strict: bool, progress: bool
) -> dict[Path, str]:
    """Make the recordings; returns those that failed, and why."""
    failures: dict[Path, str] = {}
    output.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".speaking-", dir=output) as temporary,
        ThreadPoolExecutor(workers or os.cpu_count()) as pool,
        tqdm(total=len(takes), desc="Speaking", unit="utt", disable=not progress) as bar,
    ):
        futures = {pool.submit(_speak, take, engines[take.voice.engine], Path(temporary)): take for take in takes}
        try:
            for count, future in enumerate(as_completed(futures), 1):
                take, error = futures[future], future.exception()
                bar.update()
                if error is None:
                    continue
                if not isinstance(error, SynthesisError | AudioError):
                    raise error
                if strict:
                    raise SynthesisError(f"{take.row['id']} in voice {take.voice}: {error}. Correct it.")
                failures[take.path] = f"{take.voice}: {error}"
                if len(failures) == count == GIVE_UP_AFTER:
                    raise SynthesisError(f"The first {count} texts all failed, the last with: {failures[take.path]}.")
                bar.set_postfix_str(f"{len(failures)} set aside")
        except BaseException:  # also Ctrl-C: what is being spoken is finished, the rest is dropped
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return failures


def _speak(take: _Take, engine: Engine, temporary: Path) -> None:
    wav = temporary / f"{take.path.stem}.wav"
    engine.speak(" ".join(take.row["text"].translate(_PLAIN).split()), take.voice.name, take.rate, wav)
    samples = load_audio(wav, name=f"the speech of {take.row['text'][:40]!r}")
    wav.unlink()
    seconds, least = len(samples) / SAMPLING_RATE, len(take.row["text"]) / FASTEST / take.rate
    if seconds < least:
        raise SynthesisError(
            f"only {seconds:.2f} s of speech for {len(take.row['text'])} characters: the engine left out words"
        )
    write_flac(take.path, samples)


def write_flac(path: Path, samples) -> None:
    """Write (samples,) at 16 kHz as 16-bit FLAC, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    soundfile.write(partial, samples, SAMPLING_RATE, subtype="PCM_16", format="FLAC")
    os.replace(partial, path)


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Write rows as JSON Lines, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(partial, path)
