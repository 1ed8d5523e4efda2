"""A speech synthesiser is a command that writes a WAV file.

flite, espeak-ng and whatever else there is are described in one way, by a template of arguments:

    flite --setf duration_stretch={stretch} -voice {voice} -o {wav} -t {text}
    espeak-ng -v {voice} -s {words_per_minute} -w {wav} -- {text}

`{voice}`, `{wav}` and `{text}` are names of a voice, of the file to write, and the text; of `{rate}` (1.25: a quarter
faster than the voice's own pace), `{stretch}` (1 / rate) and `{words_per_minute}` (175 rate) a command takes the one it
understands. A template without `{text}` gets the text on its standard input. It is split into arguments once, before
anything is filled in, and no shell ever sees it: a text of quotation marks, semicolons and dollar signs is spoken.

A voice is written `engine:name`, e.g. `flite:slt` or `espeak-ng:en-us+f3`; those of a command of one's own, `name`.
Any may say its gender: `anna=female`, `espeak-ng:en-us=male`.
"""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .debian import unpacked


PLACEHOLDERS = ("voice", "rate", "stretch", "words_per_minute", "wav", "text")
TEMPLATES = {
    "flite": "flite --setf duration_stretch={stretch} -voice {voice} -o {wav} -t {text}",
    "espeak-ng": "espeak-ng -v {voice} -s {words_per_minute} -w {wav} -- {text}",
}
FLITE_GENDERS = {"slt": "female", "rms": "male", "awb": "male", "kal16": "male", "kal": "male"}
# As the variants' own files say; beside these `f1`, ..., `m8`.
ESPEAK_VARIANTS = {
    **dict.fromkeys(("Alicia", "Andrea", "Annie", "anika", "aunty", "belinda", "grandma", "linda", "steph"), "female"),
    **dict.fromkeys(
        ("Andy", "Denis", "Diogo", "Henrique", "Hugo", "Lee", "antonio", "michel", "miguel", "sandro"), "male"
    ),
}
DEFAULT_VOICES = {"flite": ("slt", "rms", "awb"), "espeak-ng": ("en-us+f3", "en-us+m3", "en-gb+f2", "en-gb+m1")}
NORMAL_PACE = 175  # words per minute, espeak-ng's
ESPEAK_SLOWEST = 0.48  # 84 words per minute; espeak-ng 1.51 speaks every slower rate as it speaks this one
TIME_LIMIT = 120  # seconds for one text


class SynthesisError(ValueError):
    """A voice, an engine or a text that cannot be used; the message names it, the cause and the remedy."""


@dataclass(frozen=True)
class Voice:
    """A voice of an engine, and its gender ("female", "male", or None where nobody said)."""

    engine: str
    name: str
    gender: str | None = None

    def __str__(self) -> str:
        return f"{self.engine}:{self.name}"

    @property
    def with_gender(self) -> str:
        """As `parse_voices` reads it: with the gender, if the name does not tell it."""
        return str(self) if self.gender == _known_gender(self.engine, self.name) else f"{self}={self.gender}"


@dataclass(frozen=True)
class Engine:
    """A command that speaks.

    Attributes:
        name: "flite", "espeak-ng" or "command".
        template: its arguments, with placeholders.
        environment: variables that it needs beside ours.
        version: what tells apart two engines whose speech differs.
    """

    name: str
    template: tuple[str, ...]
    version: str
    environment: dict[str, str] = field(default_factory=dict)

    def speak(self, text: str, voice: str, rate: float, wav: Path) -> None:
        """Write `text` to `wav`.

        Raises:
            SynthesisError: the command fails, takes longer than two minutes, or writes nothing.
        """
        values = {
            "voice": voice,
            "rate": f"{rate:g}",
            "stretch": f"{1 / rate:.4f}",
            "words_per_minute": str(round(NORMAL_PACE * rate)),
            "wav": str(wav),
            "text": text,
        }
        arguments = [_fill(argument, values) for argument in self.template]
        spoken = any("{text}" in argument for argument in self.template)
        try:
            result = subprocess.run(
                arguments,
                input=None if spoken else text.encode(),
                stdin=subprocess.DEVNULL if spoken else None,
                capture_output=True,
                env={**os.environ, **self.environment},
                timeout=TIME_LIMIT,
            )
        except subprocess.TimeoutExpired:
            raise SynthesisError(f"{arguments[0]} did not finish in {TIME_LIMIT} s") from None
        except OSError as error:
            raise SynthesisError(f"{arguments[0]} cannot be run: {error.strerror}") from None
        said = " ".join(result.stderr.decode(errors="replace").split())[-200:] or "nothing"
        if result.returncode != 0:
            raise SynthesisError(f"{arguments[0]} ended with status {result.returncode} and said {said}")
        if not wav.exists():
            raise SynthesisError(f"{arguments[0]} wrote no {wav.suffix} file and said {said}")


def _fill(argument: str, values: dict[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], argument)


def own_engine(template: str) -> Engine:
    """The engine of a command template.

    Raises:
        SynthesisError: the template is not a command line, has no `{wav}`, or a placeholder that there is not.
    """
    try:
        arguments = tuple(shlex.split(template))
    except ValueError as error:
        raise SynthesisError(
            f"The command {template!r} cannot be read: {error}. Correct its quotation marks."
        ) from None
    unknown = {name for argument in arguments for name in re.findall(r"\{(\w+)\}", argument)} - {*PLACEHOLDERS}
    known = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
    if unknown or not any("{wav}" in argument for argument in arguments):
        cause = f"has no meaning for {{{min(unknown)}}}" if unknown else "does not say where {wav} goes"
        raise SynthesisError(f"The command {template!r} {cause}. The placeholders are {known}.")
    if shutil.which(arguments[0]) is None:
        raise SynthesisError(f"There is no program {arguments[0]!r} for the command. Install it, or give its path.")
    return Engine("command", arguments, template)


def find_engine(name: str) -> Engine:
    """flite or espeak-ng: the one that is installed, else the one of Debian's archives.

    Raises:
        SynthesisError: there is no such engine.
        DownloadError: it is not installed, and the archives cannot be had.
    """
    if name not in TEMPLATES:
        raise SynthesisError(f"There is no engine {name!r}. Use {' or '.join(TEMPLATES)}, or give a `--command`.")
    program, environment = (name, {}) if shutil.which(name) else unpacked(name)
    version = subprocess.run(
        [program, "--version"], env={**os.environ, **environment}, capture_output=True, text=True, errors="replace"
    ).stdout
    found = re.search(r"\d+\.\d+(\.\d+)?", version.partition("version")[2] or version)
    template = (program, *TEMPLATES[name].split()[1:])
    return Engine(name, template, f"{name} {found[0] if found else '(unknown version)'}", environment)


def default_engine() -> str:
    """The engine for someone who named none: one that is installed, or flite, whose archives are fetched."""
    return next((name for name in TEMPLATES if shutil.which(name)), "flite")


def check_rates(rates: Sequence[float], voices: Sequence[Voice]) -> None:
    """Refuse rates that would give recordings labelled with a pace that they do not have.

    Raises:
        SynthesisError: a rate is out of bounds, or slower than a voice's engine can speak.
    """
    if not rates or not all(0.1 <= rate <= 10 for rate in rates):
        raise SynthesisError(f"The rates are {list(rates)}. Give numbers from 0.1 to 10; 1 is a voice's own pace.")
    # Beyond its 450 words per minute, espeak-ng shortens what it has spoken (by libsonic) to the rate that is asked for.
    if min(rates) < ESPEAK_SLOWEST and any(voice.engine == "espeak-ng" for voice in voices):
        raise SynthesisError(
            f"The rates are {list(rates)}, but espeak-ng speaks no slower than {ESPEAK_SLOWEST}, "
            f"{NORMAL_PACE * ESPEAK_SLOWEST:g} words per minute. "
            "Give no lower rate, or voices of flite."
        )


def parse_voices(names: Sequence[str], own: bool = False) -> list[Voice]:
    """Voices from their names, `engine:name` or, for a command of one's own, `name`; with `=gender` or without.

    flite's voices and espeak-ng's variants (`+f1` to `+f5`, `+m1` to `+m8`, `+Annie`, ...) have a known gender.

    Raises:
        SynthesisError: a name is malformed, given twice, or a gender is neither "female" nor "male".
    """
    voices = []
    for name in names or ["default"] if own else names:
        voice, _, gender = name.partition("=")
        engine, colon, rest = ("command", ":", voice) if own else voice.partition(":")
        if not colon or not rest or (not own and engine not in TEMPLATES):
            examples = [f"{engine}:{found}" for engine, found in ((key, DEFAULT_VOICES[key][0]) for key in TEMPLATES)]
            raise SynthesisError(f"{name!r} is not a voice. Write engine:name, e.g. {' or '.join(examples)}.")
        if gender not in ("", "female", "male"):
            raise SynthesisError(f"The voice {name!r} says gender {gender!r}. Use female or male, or leave it out.")
        voices.append(Voice(engine, rest, gender or _known_gender(engine, rest)))
    doubles = {str(voice) for voice in voices if sum(str(other) == str(voice) for other in voices) > 1}
    if doubles:
        raise SynthesisError(f"The voice {min(doubles)!r} is given twice. Name each once.")
    return voices


def _known_gender(engine: str, name: str) -> str | None:
    if engine == "flite":
        return FLITE_GENDERS.get(name)
    if engine != "espeak-ng":
        return None
    variant = name.partition("+")[2]
    numbered = re.fullmatch(r"([fm])\d", variant)
    return {"f": "female", "m": "male"}[numbered[1]] if numbered else ESPEAK_VARIANTS.get(variant)


def default_voices(engine: str) -> list[Voice]:
    """The voices that are taken when none is named: three of flite, or four of espeak-ng."""
    return parse_voices([f"{engine}:{name}" for name in DEFAULT_VOICES[engine]])
