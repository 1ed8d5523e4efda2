"""What training saw, in `training_summary.json` beside every checkpoint: the model card is written from it.

    base_models   the frozen parts and the revisions they are pinned to
    stages        one entry per training run that led to the checkpoint, the last one last:
                  objective, settings, data with hours, hardware, time, emissions, versions, results

It holds no paths, no names of machines and no tokens, so it may be published.
"""

import csv
import inspect
import json
import math
import os
import platform
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from ..base_models_speechllm import optional_file
from ..pushing_speechllm import SUMMARY


LIBRARIES = ("speechllm", "torch", "transformers", "accelerate", "peft", "datasets")
# Settings that are always listed; others of this package's own are where they differ from the default.
SETTINGS = (
    "layers", "layer_schedule", "similarity", "temperature", "lora_rank", "learning_rate", "lr_scheduler_type",
    "warmup_steps", "weight_decay", "optim", "per_device_train_batch_size", "gradient_accumulation_steps",
    "max_grad_norm", "bf16", "fp16", "gradient_checkpointing", "seed",
)  # fmt: skip
NOT_SETTINGS = {"logging_steps", "per_device_eval_batch_size", "remove_unused_columns", "report_to"}
PRIVATE = ("_cache", "_dir", "_path", "_file", "_token")  # endings of names of paths and secrets
SPEED = ("runtime", "samples_per_second", "steps_per_second", "jit_compilation_time")


def read_summary(checkpoint: str | os.PathLike, **place: str) -> dict[str, Any]:
    """The summary beside a checkpoint (folder or Hub id, with `revision` and `subfolder`), `{}` if it has none.

    Raises:
        CheckpointError: if the Hub cannot be asked for it.
    """
    if not str(checkpoint):
        return {}
    try:
        path = optional_file(checkpoint, SUMMARY, **place)
    except (HFValidationError, RepositoryNotFoundError):  # neither a folder nor a repository
        return {}
    return json.loads(Path(path).read_text(encoding="utf-8")) if path else {}


def training_summary(trainer: Any, earlier_stages: list[dict], seconds: float) -> dict[str, Any]:
    """The summary of a `SpeechLLMTrainer`'s run, `seconds` old, and of the stages before it."""
    return {
        "base_models": published_base_models(trainer.headless.config.base_models or {}),
        "stages": [*earlier_stages, _stage(trainer, seconds)],
    }


def write_summary(folder: str | os.PathLike, summary: dict[str, Any]) -> None:
    """Write it beside a checkpoint."""
    (Path(folder) / SUMMARY).write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def published_base_models(base_models: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The configuration's `base_models`, without the paths of folders."""
    return {
        part: {**base, "id": Path(base["id"]).name if os.path.isdir(base["id"]) else base["id"]}
        for part, base in base_models.items()
    }


def _stage(trainer: Any, seconds: float) -> dict[str, Any]:
    arguments, state = trainer.args, trainer.state
    return {
        "trainer": type(trainer).__name__,
        "objective": (type(trainer).__doc__ or "").strip().splitlines()[0],
        "settings": stage_settings(arguments),
        "steps": state.global_step,
        "epochs": round(state.epoch or 0, 2),
        "trained_parameters": sum(p.numel() for p in trainer.speechllm.parameters() if p.requires_grad),
        "data": [*_training_data(trainer), *_sources(trainer.eval_rows, "held-out")],
        "set_aside": len(trainer.set_aside),
        "hardware": _hardware(arguments),
        "seconds": round(seconds, 1),
        "emissions_grams": _emissions(arguments.output_dir),
        "versions": {"python": platform.python_version(), **library_versions()},
        "first_results": _results(state.log_history[:1]),
        "results": _results(state.log_history),
    }


def stage_settings(arguments: Any) -> dict[str, Any]:
    """Settings of a stage that are worth a line: `SETTINGS`, and those of this package that differ from their default."""
    own = {
        name
        for kind in type(arguments).__mro__
        if kind.__module__.startswith("speechllm.")
        for name in inspect.get_annotations(kind)
    }
    changed = {f.name for f in fields(arguments) if f.name in own and getattr(arguments, f.name) != f.default}
    names = sorted({*SETTINGS, *changed} - NOT_SETTINGS)
    values = {name: getattr(arguments, name, None) for name in names if not name.endswith(PRIVATE)}
    plain = {name: getattr(value, "value", value) for name, value in values.items()}  # of enumerations
    return {name: value for name, value in plain.items() if isinstance(value, bool | int | float | str)}


def _training_data(trainer: Any) -> list[dict[str, Any]]:
    if trainer.stream is None:
        return _sources(trainer.train_rows, "train")
    source = getattr(trainer.stream.info, "dataset_name", None)
    unknown = dict.fromkeys(("license", "language", "utterances", "hours"))
    return [unknown | {"split": "train", "source": source, "streamed": True}]


def _sources(rows: list[dict], split: str) -> list[dict[str, Any]]:
    """Rows by where they come from (their `source`, `license` and `language`), with counts and hours."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in ("source", "license", "language")), []).append(row)
    return [
        {
            "split": split,
            "source": source,
            "license": licence,
            "language": language,
            "utterances": len(group),
            "hours": round(sum(map(_seconds, group)) / 3600, 4) if all(map(_seconds, group)) else None,
        }
        for (source, licence, language), group in groups.items()
    ]


def _seconds(row: dict) -> float:
    """A row's duration, 0 if it is not known."""
    if row.get("duration"):
        return float(row["duration"])
    audio = row["audio"]
    if isinstance(audio, dict) and audio.get("array") is not None and audio.get("sampling_rate"):
        return len(audio["array"]) / audio["sampling_rate"]
    return 0.0


def _hardware(arguments: Any) -> str:
    if arguments.device.type == "cuda":
        device = torch.cuda.get_device_name(arguments.device)
    elif arguments.device.type == "cpu":
        device = f"{platform.machine()} CPU with {os.cpu_count()} cores"
    else:
        device = arguments.device.type
    return f"{arguments.world_size} x {device}" if arguments.world_size > 1 else device


def _emissions(output_dir: str) -> float | None:
    """Grams of CO2 that codecarbon (`--report_to codecarbon`) measured, `None` without it."""
    path = Path(output_dir) / "emissions.csv"
    if not path.is_file():
        return None
    with open(path, newline="") as file:
        return round(sum(1000 * float(row["emissions"]) for row in csv.DictReader(file)), 3)


def library_versions() -> dict[str, str]:
    """Installed versions of what results depend on."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _results(logs: list[dict[str, Any]]) -> dict[str, float]:
    """The last value of every finite number that evaluation logged."""
    values = {
        name.removeprefix("eval_"): value
        for log in logs
        for name, value in log.items()
        if name.startswith("eval_") and isinstance(value, int | float) and math.isfinite(value)
    }
    return {name: value for name, value in values.items() if name not in SPEED}
