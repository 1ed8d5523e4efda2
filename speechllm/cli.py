"""The command `speechllm`: a thin layer over the package.

Exit codes: 0 success, 1 failure (bad data, a broken checkpoint, no space), 2 usage. Errors are one sentence that names
the item, the cause and the remedy; `SPEECHLLM_TRACEBACK=1` shows where they come from.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from .recipes import UsageError, parse_settings


def quickstart(arguments: list[str]) -> None:
    """real small models, real speech: pretrain, fine-tune, report (about 15 minutes on two cores)"""
    from .quickstart.run import Quickstart
    from .quickstart.settings import QuickstartArguments

    (settings,) = parse_settings([QuickstartArguments], arguments, "speechllm quickstart", quickstart.__doc__)
    report = Quickstart(settings).run()
    arms = {arm["name"]: arm for arm in report["fine_tuning"]["arms"]}
    best = arms[report["fine_tuning"]["best"]]
    folder = Path(settings.output)
    print(
        f"\n{report['fine_tuning']['verdict']}\nBest: {best['label']}, {best['wer']:.1%} word errors on held-out speech."
    )
    print(f"\nReport: {folder / 'report.html'}\nModel:  {folder / 'model'}")
    print(f"Try:    speechllm transcribe --model {folder / 'model'} some.wav")


def pretrain(arguments: list[str]) -> None:
    """contrastive pretraining of a projector on (audio, text) pairs"""
    from .data.schema import load_rows
    from .trainers import ContrastiveArguments, ContrastiveTrainer
    from .training import DataArguments, ModelArguments, load_model, run_training

    model_settings, data_settings, settings = parse_settings(
        [ModelArguments, DataArguments, ContrastiveArguments], arguments, "speechllm pretrain", pretrain.__doc__
    )
    train, held_out = data_settings.load(load_rows)
    model, processor = load_model(model_settings, settings)
    run_training(ContrastiveTrainer(model, settings, train, held_out, processor), data_settings)


def finetune(arguments: list[str]) -> None:
    """fine-tuning on rows with answers, from a pretrained projector or a new one"""
    from .data.schema import load_rows
    from .trainers import FineTuningArguments, FineTuningTrainer
    from .training import DataArguments, ModelArguments, load_model, run_training

    model_settings, data_settings, settings = parse_settings(
        [ModelArguments, DataArguments, FineTuningArguments], arguments, "speechllm finetune", finetune.__doc__
    )
    train, held_out = data_settings.load(load_rows)
    model, processor = load_model(model_settings, settings)
    run_training(FineTuningTrainer(model, settings, train, held_out, processor), data_settings)


def transcribe(arguments: list[str]) -> None:
    """print what a model hears in audio files"""
    parser = _parser("transcribe", transcribe)
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub id")
    parser.add_argument("--prompt", help="instruction beside the audio (default: the one of speech recognition)")
    parser.add_argument("--max-new-tokens", type=_positive, default=256, help="longest answer, in tokens")
    parser.add_argument("--device", default=None, help="e.g. cuda:0 (default: a GPU if there is one, else the CPU)")
    parser.add_argument("audio", nargs="+", help="audio files: WAV, FLAC, Ogg, MP3")
    options = parser.parse_args(arguments)
    from .evaluation.transcription import Transcriber

    transcriber = Transcriber(options.model, device=options.device)
    failed = 0
    for path in options.audio:
        try:
            text = transcriber(path, prompt=options.prompt, max_new_tokens=options.max_new_tokens)
        except ValueError as error:  # one bad file must not cost the others
            failed += 1
            print(f"speechllm: error: {error}", file=sys.stderr)
            continue
        print(text if len(options.audio) == 1 else f"{path}\t{text}", flush=True)
    if failed:
        raise SystemExit(1)


def info(arguments: list[str]) -> None:
    """what is in a checkpoint: parts, parameters, what is trained, base models"""
    parser = _parser("info", info)
    parser.add_argument("model", help="checkpoint folder or Hub id")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    options = parser.parse_args(arguments)
    from .hub.inspection import describe_checkpoint, format_description

    description = describe_checkpoint(options.model)
    print(json.dumps(description, indent=2) if options.json else format_description(description))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    function.__name__: function for function in (quickstart, pretrain, finetune, transcribe, info)
}


def _parser(name: str, function: Callable) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"speechllm {name}", description=function.__doc__)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="speechllm",
        description="Give a text LLM ears, cheaply.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<12}{function.__doc__}" for name, function in COMMANDS.items())
        + "\n\n`speechllm COMMAND --help` lists a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help=", ".join(COMMANDS))
    first = arguments[:1]
    if first and first[0] in COMMANDS:
        return _run(COMMANDS[first[0]], arguments[1:])
    options = parser.parse_args(first)
    if options.version:
        from . import __version__

        print(__version__)
        return 0
    if options.command:
        parser.error(f"there is no command {options.command!r}; choose from {', '.join(COMMANDS)}")
    parser.print_help()
    return 2


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _run(command: Callable[[list[str]], None], arguments: list[str]) -> int:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        command(arguments)
    except KeyboardInterrupt:
        print("speechllm: interrupted", file=sys.stderr)
        return 130
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except Exception as error:
        if os.environ.get("SPEECHLLM_TRACEBACK"):
            raise
        message = str(error).strip() or "no message"
        # Our own errors explain themselves; of others, the type and the first line are shown.
        if type(error).__module__.split(".")[0] != "speechllm" and not isinstance(error, ValueError | OSError):
            message = f"{type(error).__name__}: {message.splitlines()[0]} (SPEECHLLM_TRACEBACK=1 shows where)"
        print(f"speechllm: error: {message}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0
