"""Real speech that Debian ships: the voice prompts of the Asterisk telephone exchange, in five languages.

Each language is one studio voice, 23 to 29 minutes, 16 kHz (G.722), with a transcript file of lines `name: text`. The
names are shared, so the same `id` in two languages is the same sentence: a parallel corpus for speech translation.

| language | voice | licence |
|---|---|---|
| en, es | Allison Smith | CC-BY-SA-3.0 |
| fr | June Wallack | CC-BY-SA-3.0 |
| it | Carlo Flora | CC-BY-3.0 |
| ru | Maxim Topal (provider) | CC-BY-3.0 |

The transcripts were written for people, so `parse_transcript` turns them into what is spoken, by rules that were
checked against the recordings:

* a byte-order mark, comment lines (`;`) and blank lines are skipped; of a repeated name the first line counts;
* a second `name:` inside a line starts a line of its own: a missing line break (Italian `confbridge-only-one`) or the
  line's own name once more (Russian `conf-adminmenu`);
* what stands in square or angle brackets is not spoken, neither alone (`[ascending tones]`) nor inside a sentence
  (`at [@]`, `Spiacente, [quello] non è ...`);
* what stands in round brackets is a note when it ends the line (`(simple tone sound plays)`) or is a direction to the
  speaker (`(enfatico)`); elsewhere it is spoken and only the brackets go;
* the dots that mark a fragment (`...to exit the menu.`) and quotation marks around a line go, `*` and `#` are written
  as English speaks them, and the accented letters that the Italian file lost to `?` are put back (`pu?` is `può`; real
  questions stay);
* beeps, tones, silence and the famous monkeys are not speech under any transcript (`NOT_SPEECH`);
* a line without text or without a recording, and a recording without a line, is left out. Names that differ only in
  upper and lower case belong together, and the recording's spelling is kept.

`asterisk_prompts(language)` fetches both archives, decodes G.722 once to 16-bit FLAC in the cache (3 s and about 28 MB
per language) and returns rows of the package's one schema.
"""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from speechllm.downloads import (
    Archive,
    DownloadError,
    build_once,
    cache_directory,
    fetch,
    read_debian_members,
)


FORMAT = 1  # raise when parsing or decoding changes, so that cached corpora are built again
SAMPLING_RATE = 16_000  # Hz
G722_BIT_RATE = 64_000  # bits per second

NOT_SPEECH = frozenset(
    {"ascending-2tone", "beep", "beeperr", "confbridge-join", "confbridge-leave", "descending-2tone", "tt-monkeys"}
    | {f"silence/{seconds}" for seconds in range(1, 11)}
)
_DIRECTIONS = {"enfatico"}  # notes to the speaker inside a sentence
_SPOKEN_SYMBOLS = {"en": {"*": "star", "#": "pound"}}
_LOST_ACCENTS = {"it": {"?": "è", "cos?": "così", "pi?": "più", "pu?": "può", "sar?": "sarà"}}

_VERSION = "1.6.1-1"
_CREDITS = {
    "en": ("CC-BY-SA-3.0", "Asterisk core sounds (English), voice of Allison Smith, funded by Digium"),
    "es": ("CC-BY-SA-3.0", "Asterisk core sounds (Spanish), voice of Allison Smith, funded by Digium"),
    "fr": ("CC-BY-SA-3.0", "Asterisk core sounds (French), voice of June Wallack, funded by Digium, Unlimitel and BGM"),
    "it": ("CC-BY-3.0", "Asterisk core sounds (Italian), voice of Carlo Flora, translated by Silvia Petrin"),
    "ru": ("CC-BY-3.0", "Asterisk core sounds (Russian), provided by Maxim Topal, ivrvoice.ru"),
}
_HASHES = {  # language: (archive with the transcript, archive with the recordings)
    "en": (
        "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
        "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806",
    ),
    "es": (
        "9afdab7f559f036649fb406e625899306ca1004df8ebe39c30bfbd5912d66f74",
        "e4e3b4281057d3b81b779298fd6be705f57411513955c518eed1bcaabbd615b8",
    ),
    "fr": (
        "04c82c78c570c43a7136cbc5e2488d0c470b775468dff9fbce4a131b18cf1056",
        "7add61d5e42279ecff1bbdf842a5a946ac3644fac9a0fe44384731aa7270c8e0",
    ),
    "it": (
        "3884d9457e12f21caa018c18f0d587df5d53ebea14b673d8453a134c5941ab3b",
        "46b4cf7afc508a5fcfc051b7ea233251c0d195dd4ef83cc4b7facb4c6429b016",
    ),
    "ru": (
        "28a61616bb0cd3345a7ea532dec4df9f071e5d0fa9f8c1a563ea9669002f39ab",
        "673b4238a6b8269960f055d868c6a11083f7a0d00979167cb01554046b48ed9b",
    ),
}
LANGUAGES = tuple(_HASHES)


def archives(language: str) -> tuple[Archive, Archive]:
    """The two pinned Debian archives of a language: transcript, recordings.

    Raises:
        ValueError: no such language.
    """
    if language not in _HASHES:
        raise ValueError(f"There are no prompts in {language!r}. Choose one of {', '.join(LANGUAGES)}.")
    licence, credit = _CREDITS[language]
    names = (f"asterisk-core-sounds-{language}", f"asterisk-core-sounds-{language}-g722")
    text, audio = (
        Archive(name, _VERSION, sha256, "debian", licence, credit, megabytes)
        for name, sha256, megabytes in zip(names, _HASHES[language], (0.02, 11.0), strict=True)
    )
    return text, audio


def asterisk_prompts(language: str = "en") -> list[dict[str, Any]]:
    """The prompts of one language with their recordings, in the order of the transcript file.

    Args:
        language: "en", "es", "fr", "it" or "ru".

    Returns:
        Rows with `id` (prompt name, shared across languages), `audio` (path of a mono 16 kHz FLAC file), `text` (what
        is spoken), `language`, `task` ("asr") and `duration` (seconds).

    Raises:
        ValueError: no such language.
        DownloadError: the archives cannot be fetched or read.
        ImportError: the G.722 decoder is not installed (only when the audio has not been decoded before).
    """
    text, audio = archives(language)
    provenance = {"format": FORMAT, "language": language, "text": text.sha256, "audio": audio.sha256}
    folder = cache_directory() / "speech" / f"asterisk-{language}"
    build_once(folder, provenance, lambda partial: _build(language, partial))
    rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    return [{**row, "audio": str(folder / row["audio"])} for row in rows]


def prompt_texts(language: str) -> dict[str, str]:
    """Prompt name -> what is spoken; of the archives, only the small one with the transcript is fetched.

    Raises:
        ValueError: no such language.
        DownloadError: the archive cannot be fetched or read.
    """
    text, _ = archives(language)
    transcripts = [data for _, data in read_debian_members(fetch(text), lambda name: name.endswith(".txt.gz"))]
    if len(transcripts) != 1:
        raise DownloadError(f"The {text} holds {len(transcripts)} transcript files; one is expected.")
    return parse_transcript(gzip.decompress(transcripts[0]).decode("utf-8-sig"), language)


def _build(language: str, folder: Path) -> None:
    """Decode one language into `folder`: FLAC files and `rows.json` with paths relative to it."""
    decode = _g722_decoder()
    _, audio = archives(language)
    texts = prompt_texts(language)
    recordings = {
        prompt_name(name): data for name, data in read_debian_members(fetch(audio), lambda name: name.endswith(".g722"))
    }
    rows = []
    for name, spoken in match_recordings(texts, recordings).items():
        samples = decode(recordings[name])
        path = folder / f"{name}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, samples, SAMPLING_RATE, subtype="PCM_16", format="FLAC")
        rows.append(
            {
                "id": name,
                "audio": f"{name}.flac",
                "text": spoken,
                "language": language,
                "task": "asr",
                "duration": len(samples) / SAMPLING_RATE,
            }
        )
    (folder / "rows.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _g722_decoder() -> Any:
    """A function from G.722 bytes to int16 samples at 16 kHz.

    Raises:
        ImportError: the package `G722` is not installed.
    """
    try:
        from G722 import G722
    except ImportError as error:
        raise ImportError(
            "Decoding the prompts needs the package G722. Install it with `pip install 'speechllm[quickstart]'`."
        ) from error

    return lambda data: np.asarray(G722(SAMPLING_RATE, G722_BIT_RATE).decode(data), dtype=np.int16)


def prompt_name(member: str) -> str:
    """The prompt's name from the path of its recording: `.../sounds/en_US_f_Allison/digits/1.g722` -> `digits/1`.

    Raises:
        DownloadError: the path has another form (nothing else may become a file name in the cache).
    """
    match = re.fullmatch(r"usr/share/asterisk/sounds/\w+/((?:[\w-]+/)?[\w-]+)\.g722", member, flags=re.ASCII)
    if match is None:
        raise DownloadError(f"Unexpected recording {member!r} in an Asterisk archive.")
    return match[1]


def parse_transcript(content: str, language: str) -> dict[str, str]:
    """Prompt name -> what is spoken, for every line of a transcript file that is speech (rules: module docstring).

    Args:
        content: the transcript file.
        language: selects the repairs that only one language needs.
    """
    prompts: dict[str, str] = {}
    for line in content.removeprefix("\ufeff").splitlines():
        if line.startswith(";"):
            continue
        for entry in re.split(r"\s(?=[a-z]+(?:-[a-z]+)+:\s)", line):
            name, _, text = entry.partition(":")
            spoken = spoken_text(text, language)
            if spoken and name not in NOT_SPEECH:
                prompts.setdefault(name.strip(), spoken)
    return prompts


def spoken_text(text: str, language: str) -> str:
    """The words of one transcript line without notes, marks of fragments and lost letters; empty if it is not speech.

    >>> spoken_text("... letters of your party's last name.", "en")
    "letters of your party's last name."
    """
    text = re.sub(r"\[[^\]]*\]|<[^>]*>", " ", text)
    text = re.sub(r"\([^()]*\)[\s.]*$", " ", text)
    text = re.sub(r"\(([^()]*)\)", lambda note: " " if note[1] in _DIRECTIONS else note[1], text)
    text = re.sub(r"^[\s.…]*(?:\.\.|…)|[\s,]*(?:\.\.|…)[\s.…]*$", " ", text.strip(' "“”'))
    words = text.split()
    for repairs in (_LOST_ACCENTS.get(language, {}), _SPOKEN_SYMBOLS.get(language, {})):
        words = [repairs.get(word, word) for word in words]
    return " ".join(words)


def match_recordings(prompts: dict[str, str], recordings: dict[str, Any]) -> dict[str, str]:
    """Prompts that have a recording, under the recording's name.

    A name is matched exactly or, failing that, without regard to case (`letters/O` and `letters/o`).
    """
    folded = {name.lower(): name for name in recordings}
    named = ((name if name in recordings else folded.get(name.lower()), text) for name, text in prompts.items())
    return {name: text for name, text in named if name is not None}
