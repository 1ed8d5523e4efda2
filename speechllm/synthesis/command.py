"""`speechllm synthesize`: arguments, runs, and what is printed."""

import argparse
import json
from pathlib import Path

from ..data.schema import Row
from ..recipes import UsageError
from .engines import default_engine, default_voices, own_engine, parse_voices
from .speaking import Spoken, synthesise, write_jsonl
from .spoken_questions import spoken_question_answering
from .texts import read_texts, wordnet_examples
from .variants import spoken_traits, trait_rows, variants


EPILOG = """\
examples:
  speechllm synthesize --data sentences.txt --output speech
      every line in the default voices of flite or espeak-ng: the one that is installed, else
      flite from Debian's archives, fetched into the cache
  speechllm synthesize --data 'hub:owner/name?split=train&fraction=0.1' --columns '{"text": "sentence"}' --output speech
      a tenth of a data set of the Hub, whose texts are in its column `sentence`
  speechllm synthesize --wordnet 2000 --takes 1 --output speech --voices flite:slt espeak-ng:en-gb+m1 --rates 0.9 1.1
      2,000 of WordNet's example sentences, each in one voice at one rate
  speechllm synthesize --data qa.jsonl --output speech --command 'my-tts --voice {voice} --out {wav} {text}' \\
      --voices anna=female bob=male
      another engine; the columns of the manifest (question, answers, target ...) are kept
  speechllm synthesize --data sentences.txt --output speech --snr clean 15 0 --reverberation none 0.8
      also with noise and in a room, every recording in each of the six conditions
  speechllm synthesize --questions 400 100 --output questions
      spoken question answering: 400 passages to train on and 100 to test, with questions that SmolLM2-135M answers
  speechllm synthesize --traits 60 20 --output traits
      gender, rate, noise and reverberation to tell in 60 sentences to train on and 20 to test

An interrupted command goes on where it stopped when it is run again."""


def run(arguments: list[str], description: str) -> None:
    """Parse and do what was asked.

    Raises:
        UsageError, SynthesisError, ManifestError, DownloadError: with one sentence for the user.
    """
    parser = argparse.ArgumentParser(
        prog="speechllm synthesize",
        description=description,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument(
        "--data",
        nargs="+",
        metavar="SOURCE",
        help="texts: files of lines, or sources as in training with a column `text`, which need no audio: manifests "
        "(.jsonl, .csv, ...), folders, data sets of the Hub (hub:owner/name?split=test), see docs/data.md",
    )
    texts.add_argument("--wordnet", type=int, metavar="COUNT", help="so many of WordNet's example sentences")
    pair = {"nargs": 2, "type": int, "metavar": ("TRAIN", "TEST")}
    texts.add_argument("--questions", **pair, help="spoken question answering: passages of each split")
    texts.add_argument("--traits", **pair, help="questions about voice, rate, noise and room: texts of each split")
    parser.add_argument(
        "--output", required=True, help="folder for manifest.jsonl and audio (continued if it is there)"
    )
    parser.add_argument(
        "--columns", type=_columns, help='of --data: its own names of columns as JSON, e.g. \'{"text": "sentence"}\''
    )
    parser.add_argument(
        "--voices", nargs="+", help="engine:name, e.g. flite:slt espeak-ng:en-us+f3; =female or =male says the gender"
    )
    parser.add_argument("--rates", nargs="+", type=float, help="1.25 is a quarter faster than a voice's own pace")
    parser.add_argument("--takes", type=int, help="voices x rates of each text, drawn by --seed (default: all)")
    parser.add_argument("--command", metavar="TEMPLATE", help="another engine; fills in {voice} {rate} {wav} {text}")
    parser.add_argument("--snr", nargs="+", type=_level("clean"), metavar="DB", help="add pink noise; `clean` for none")
    parser.add_argument(
        "--reverberation", nargs="+", type=_level("none"), metavar="RT60", help="rooms, in seconds; `none` for none"
    )
    parser.add_argument("--workers", type=int, help="engines at once (default: one per core)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    parser.add_argument(
        "--strict",
        action="store_true",
        help="stop at the first text that cannot be spoken (--questions and --traits always do)",
    )
    options = parser.parse_args(arguments)
    counts = [options.wordnet, options.workers, options.takes, *(options.questions or []), *(options.traits or [])]
    if any(count is not None and count < 1 for count in counts):
        parser.error("--wordnet, --questions, --traits, --takes and --workers are whole numbers above 0")
    if options.columns is not None and options.data is None:
        parser.error("--columns names the columns of --data")
    if options.questions or options.traits:
        _ready_made(options)
    else:
        _speak_texts(options)


def _level(nothing: str):
    def parse(text: str) -> float | None:
        try:
            return None if text == nothing else float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor `{nothing}`") from None

    return parse


def _columns(text: str) -> dict[str, str]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise argparse.ArgumentTypeError(f'{text} is not JSON such as \'{{"text": "sentence"}}\'')
    return found


def _speak_texts(options: argparse.Namespace) -> None:
    if options.data is None:
        rows, malformed = wordnet_examples(options.wordnet, options.seed), []
    else:
        rows, malformed = read_texts(options.data, options.columns, options.seed)
    if options.strict and malformed:
        raise UsageError(malformed[0].reason)
    engine = own_engine(options.command) if options.command else None
    if engine or options.voices:
        voices = parse_voices(options.voices or [], own=engine is not None)
    else:
        voices = default_voices(default_engine())
    output = Path(options.output)
    with_conditions = bool(options.snr or options.reverberation)
    spoken = synthesise(
        rows,
        output / "speech" if with_conditions else output,
        voices,
        options.rates or (1.0,),
        engine=engine,
        takes=options.takes,
        seed=options.seed,
        workers=options.workers,
        strict=options.strict,
    )
    aside = [*malformed, *spoken.set_aside]
    if with_conditions:
        made = variants(
            spoken.rows, output, options.snr or (None,), options.reverberation or (None,), seed=options.seed
        )
        spoken = Spoken(made.rows, made.set_aside, made.reused)
        aside += made.set_aside
    if aside:
        write_jsonl(output / "set_aside.jsonl", [vars(item) for item in aside])
    minutes = sum(row["duration"] for row in spoken.rows) / 60
    print(f"{len(spoken.rows)} recording(s), {minutes:.1f} minutes, {spoken.reused} of them from an earlier run")
    if aside:
        print(f"{len(aside)} set aside, see {output / 'set_aside.jsonl'}; the first: {aside[0].id}: {aside[0].reason}")
    print(f"Saved to {output / 'manifest.jsonl'}")


def _ready_made(options: argparse.Namespace) -> None:
    """The sets that are made in the cache; `--output` gets their manifests."""
    for name in ("takes", "command", "snr", "reverberation", *(["rates"] if options.questions else [])):
        if getattr(options, name) is not None:
            raise UsageError(f"--{name} does not go with --questions or --traits, whose conditions are fixed.")
    voices = parse_voices(options.voices) if options.voices else None
    unknown = [str(voice) for voice in voices or [] if voice.gender is None]
    if options.traits and unknown:
        raise UsageError(
            f"--traits asks for the gender of {', '.join(unknown)}, which is not known. "
            f"Name it, e.g. {unknown[0]}=female, or leave the voice out."
        )
    if options.questions:
        splits = spoken_question_answering(*options.questions, voices, seed=options.seed, workers=options.workers)
    else:
        rates = {"rates": options.rates} if options.rates else {}
        splits = spoken_traits(*options.traits, voices, seed=options.seed, workers=options.workers, **rates)
        splits = {name: trait_rows(rows) for name, rows in splits.items()}
    for name, rows in splits.items():
        path = Path(options.output) / f"{name}.jsonl"
        write_jsonl(path, rows)
        print(f"{path}: {len(rows)} rows, {_minutes(rows):.1f} minutes of speech")


def _minutes(rows: list[Row]) -> float:
    return sum({row["audio"]: row["duration"] for row in rows}.values()) / 60
