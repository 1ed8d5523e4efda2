"""`speechllm evaluate`: from settings to a model, its data, and the evaluation."""

import json
from dataclasses import dataclass, field, fields
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoProcessor

from ..data.checking import counted
from ..data.schema import SetAside
from ..data.sources import load_source, read_specs
from ..modeling_speechllm import SpeechLLMForConditionalGeneration
from ..recipes import UsageError
from ..trainers.frozen_states import fill_frame_cache, frame_cache
from .evaluate import evaluate_model
from .metrics.comet import MODEL, create_environment
from .metrics.normalisation import normaliser


# What says nothing without another option.
NEEDED = {
    **dict.fromkeys(("alignment_layers", "prefix"), "alignment"),
    **dict.fromkeys(("comet_python", "comet_model", "comet_gpus"), "comet"),
}


@dataclass
class EvaluationArguments:
    """What to evaluate, on what, and how."""

    model: str = field(metadata={"help": "SpeechLLM checkpoint (folder or Hub id)."})
    data: list[str] = field(metadata={"help": "Sources, as in training (docs/data.md); several are joined."})
    output: str = field(metadata={"help": "Folder for predictions.jsonl, metrics.json and report.html."})
    tasks: str | None = field(default=None, metadata={"help": "Tasks, as in asr,st; default: all that the data has."})
    prompts: str | None = field(  # once parsed, a dict
        default=None,
        metadata={
            "help": 'Prompts in place of the data\'s, by task, as JSON: \'{"st": "In {target_language}, please."}\'.'
        },
    )
    oracle: bool = field(
        default=False,
        metadata={"help": "Give the LLM each transcript in the place of the audio, which is not needed: the ceiling."},
    )
    batch_size: int = field(default=16, metadata={"help": "Utterances per device."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer."})
    num_beams: int = field(default=1, metadata={"help": "Beams; 1 is greedy."})
    bootstrap: int = field(default=1000, metadata={"help": "Resamples for the intervals; 0: none."})
    seed: int = field(default=0, metadata={"help": "Of the resamples and the paired test."})
    normalisation: str = field(default="basic", metadata={"help": "basic, whisper-basic, whisper-english or none."})
    error_alignment: str = field(
        default="levenshtein",
        metadata={"help": "How errors of recognition are found: levenshtein (the fewest) or sclite (NIST's)."},
    )
    cluster: str | None = field(
        default=None, metadata={"help": "Column of what belongs together in intervals and tests, e.g. passage_id."}
    )
    baseline: str | None = field(
        default=None, metadata={"help": "Output folder of another evaluation, for paired tests."}
    )
    strict: bool = field(
        default=False, metadata={"help": "Stop at the first row that cannot be used or scored, or an id used twice."}
    )
    alignment: bool = field(
        default=False, metadata={"help": "Measure how speech and transcripts meet at each layer of the LLM."}
    )
    alignment_layers: str | None = field(
        default=None,
        metadata={
            "help": "Of --alignment, as in pretraining: 'all' (every fifth and the last; the default), 'emb' (the LLM's "
            "input), or indices such as 0,5,-1."
        },
    )
    prefix: str = field(
        default="auto", metadata={"help": "Of --alignment: what both sides stand behind, as in pretraining."}
    )
    comet: bool = field(default=False, metadata={"help": "Score translations by COMET too, in its own environment."})
    comet_install: bool = field(default=False, metadata={"help": "Make that environment first (about 5 GB)."})
    comet_python: str | None = field(default=None, metadata={"help": "Python of an environment that has COMET."})
    comet_model: str = field(default=MODEL, metadata={"help": "COMET's model: a name on the Hub, or a .ckpt file."})
    comet_gpus: int = field(default=0, metadata={"help": "GPUs for COMET; 0: the CPU."})
    text_abilities: bool = field(
        default=False,
        metadata={"help": "Compare the LLM's answers to text with those of the base LLM, token by token."},
    )
    dtype: str | None = field(default=None, metadata={"help": "dtype of the frozen parts, e.g. bfloat16."})
    device: str | None = field(default=None, metadata={"help": "cpu, or a GPU if there is one (the default)."})
    feature_cache: str | None = field(default=None, metadata={"help": "Folder to keep the encoder's features in."})
    workers: int = field(default=0, metadata={"help": "Processes that prepare batches."})

    def __post_init__(self):
        if self.tasks is not None:
            self.tasks = [task.strip() for task in self.tasks.split(",") if task.strip()]
        if isinstance(self.prompts, str):
            try:
                self.prompts = json.loads(self.prompts)
            except json.JSONDecodeError as error:
                raise UsageError(f'--prompts is not JSON: {error}. Write it as \'{{"asr": "..."}}\'.') from None
            if not isinstance(self.prompts, dict) or not all(isinstance(text, str) for text in self.prompts.values()):
                raise UsageError(f"--prompts is {self.prompts!r}; it must map tasks to prompts.")
        for name, least in (("batch_size", 1), ("max_new_tokens", 1), ("num_beams", 1), ("bootstrap", 0),
                            ("comet_gpus", 0)):  # fmt: skip
            if getattr(self, name) < least:
                raise UsageError(f"--{name} is {getattr(self, name)}; it must be at least {least}.")
        if self.error_alignment not in ("levenshtein", "sclite"):
            raise UsageError(f"--error_alignment is {self.error_alignment!r}; use levenshtein or sclite.")
        try:
            normaliser(self.normalisation)
        except ValueError as error:
            raise UsageError(f"--normalisation: {error}") from None
        if self.dtype is not None and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise UsageError(f"--dtype is {self.dtype!r}; use float32, bfloat16 or float16.")
        defaults = {option.name: option.default for option in fields(self)}
        for name, needed in NEEDED.items():
            if getattr(self, name) != defaults[name] and not getattr(self, needed):
                raise UsageError(f"--{name} says how --{needed} is done. Add --{needed}, or leave it out.")
        if self.feature_cache and self.oracle:
            raise UsageError("--feature_cache is for audio, --oracle reads transcripts. Leave one out.")


def run_evaluation(settings: EvaluationArguments) -> dict[str, Any]:
    """Load, evaluate, and print a summary on the main process; returns the content of `metrics.json`."""
    # The main process scores alone, and COMET on a CPU takes its time.
    state = PartialState(cpu=settings.device == "cpu", timeout=timedelta(days=1))
    device = settings.device or state.device
    if settings.comet_install and state.is_main_process:
        create_environment()
    state.wait_for_everyone()
    comet = None
    if settings.comet:
        comet = {"python": settings.comet_python, "model": settings.comet_model, "gpus": settings.comet_gpus}
    rows, set_aside = [], []
    with_audio = settings.alignment or not settings.oracle
    for source in read_specs(settings.data):
        loaded = load_source(source, settings.strict, for_training=False, with_audio=with_audio)
        rows += loaded.rows
        set_aside += loaded.set_aside
    options = {"dtype": getattr(torch, settings.dtype)} if settings.dtype else {}
    model = SpeechLLMForConditionalGeneration.from_pretrained(settings.model, **options).to(device).eval()
    processor = AutoProcessor.from_pretrained(settings.model)
    frames = None
    if settings.feature_cache:
        frames = frame_cache(settings.feature_cache, model.model, processor)
        fill_frame_cache(frames, rows, model.model, processor)  # what cannot be heard is found again below
    metrics = evaluate_model(
        model,
        processor,
        rows,
        settings.output,
        tasks=settings.tasks,
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        num_beams=settings.num_beams,
        prompts=settings.prompts,
        oracle=settings.oracle,
        bootstrap=settings.bootstrap,
        seed=settings.seed,
        normalisation=settings.normalisation,
        error_alignment=settings.error_alignment,
        cluster=settings.cluster,
        baseline=settings.baseline,
        strict=settings.strict,
        set_aside=set_aside,
        frames=frames,
        workers=settings.workers,
        text_abilities=settings.text_abilities,
        alignment=settings.alignment and (settings.alignment_layers or True),
        prefix=settings.prefix,
        comet=comet,
        description={"sources": settings.data},
    )
    if state.is_main_process:
        print("\n".join(summary(metrics, settings.output)), flush=True)
    return metrics


def summary(metrics: dict[str, Any], output: str) -> list[str]:
    """The lines that the command prints."""
    lines = []
    for task, found in metrics["tasks"].items():
        values = found.get("metrics") or {}
        counts = [f"{found['scored']} of {found['utterances']} scored"]
        counts += [f"{found[name]} {text}" for name, text in COUNTS.items() if found[name]]
        lines.append(f"{task}: {', '.join(counts)}")
        if found.get("reason"):
            lines.append(f"  no metrics: {found['reason']}")
        for name, value in values.items():
            if isinstance(value, float):
                low, high = values.get(f"{name}_interval") or (None, None)
                interval = "" if low is None else f"  [{low:.4f}, {high:.4f}]"
                lines.append(f"  {name:<22}{value:.4f}{interval}")
        if against := found.get("against_baseline"):
            lines.append(f"  against the baseline, {against['utterances']} common utterance(s):")
            if others := against["other_references"]:
                lines.append(f"    left out: {others} with other references there")
            for name, test in against["tests"].items():
                known = test["difference"] is not None
                said = f"{test['difference']:+.4f}  p = {test['p']:.4g}" if known else "cannot be compared"
                lines.append(f"    {name:<20}{said}")
    if alignment := metrics["alignment"]:
        recalls = [values["recall@1"] for values in alignment["layers"].values()]
        mean = sum(recalls) / len(recalls)
        layers = ", ".join(alignment["layers"])
        lines.append(
            f"alignment: recall@1 {mean:.4f}, mean over the layer(s) {layers} (chance {alignment['chance']:.4f})"
        )
        if alignment["transport_left_out"]:
            lines.append(f"alignment: no transport plans: {alignment['transport_left_out']}")
    if abilities := metrics["text_abilities"]:
        verdicts = {True: "identical to the base LLM's", False: "different from the base LLM's", None: "not compared"}
        lines.append(f"answers to text: {verdicts[abilities['identical']]}")
    if names := metrics["data"]["duplicate_ids"]:
        lines.append(f"{len(names)} id(s) used by several rows, e.g. {names[0]}; each further row got a number")
    lines += counted(SetAside(**item) for item in metrics["set_aside"])
    return [*lines, f"Saved to {output}"]


COUNTS = {
    "without_reference": "without a reference",
    "empty_predictions": "answered with nothing",
    "cut_off": "cut off at the limit on tokens",
}
