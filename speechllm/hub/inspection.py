"""What is in a checkpoint, without loading its weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..base_models_speechllm import optional_file
from ..checkpoint_speechllm import ADAPTER_FOLDER, ADAPTER_WEIGHTS, PROJECTOR_WEIGHTS, CheckpointError
from ..configuration_speechllm import SpeechLLMConfig
from ..modeling_speechllm import SpeechLLMForConditionalGeneration


def describe_checkpoint(model: str) -> dict[str, Any]:
    """Kind, parts with their parameters, what is trained, base models and their revisions.

    Raises:
        CheckpointError: if it is not a SpeechLLM checkpoint or its weights cannot be read.
    """
    try:
        config = SpeechLLMConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model} is not a checkpoint that can be read: {str(error).splitlines()[0]}") from error
    if config.model_type != "speechllm":
        raise CheckpointError(f"{model} holds a model of type {config.model_type!r}, not a SpeechLLM.")
    with torch.device("meta"):
        whole = SpeechLLMForConditionalGeneration(config)
    body, rule = whole.model, config.speech_token_rule
    parts = {
        "speech encoder": (config.speech_config.model_type, body.speech_encoder, config.freeze_speech_encoder),
        "projector": (config.projector_config.projector_type, body.projector, False),
        "language model": (config.text_config.model_type, body.language_model, config.freeze_language_model),
    }
    weights = optional_file(model, PROJECTOR_WEIGHTS)
    adapter = optional_file(model, ADAPTER_WEIGHTS, subfolder=ADAPTER_FOLDER)
    kind = "projector-only" if weights else "full"
    index = optional_file(model, "model.safetensors.index.json")
    weights = weights or optional_file(model, "model.safetensors")
    if not weights and not index:
        raise CheckpointError(f"{model} holds neither {PROJECTOR_WEIGHTS} nor model.safetensors. Save it again.")
    return {
        "checkpoint": str(model),
        "kind": kind,
        "dtype": str(config.dtype).removeprefix("torch."),
        "parts": {
            name: {"type": kind_of, "parameters": sum(p.numel() for p in part.parameters()), "trained": not frozen}
            for name, (kind_of, part, frozen) in parts.items()
        },
        "adapter_parameters": _count(adapter) if adapter else 0,
        "stored_tensors": _count(weights, tensors=True) if weights else len(_read_index(index)),
        "speech_tokens_per_second": round(rule.frames_per_second / rule.window * rule.tokens_per_window, 2),
        "base_models": config.base_models,
    }


def _read_index(path: str) -> dict[str, str]:
    """Tensor -> file, of weights in several files."""
    return json.loads(Path(path).read_text())["weight_map"]


def _count(path: str, tensors: bool = False) -> int:
    """Tensors in a safetensors file, or their elements."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if tensors:
                return len(names)
            return sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in names)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{Path(path)} cannot be read: {error}. Download or save it again.") from error


def format_description(description: dict[str, Any]) -> str:
    """The description as a table for people."""
    lines = [f"{description['checkpoint']}: {description['kind']} checkpoint, {description['dtype']}", ""]
    for name, part in description["parts"].items():
        state = "trained" if part["trained"] else "frozen"
        lines.append(f"  {name:<16}{part['type']:<12}{part['parameters'] / 1e6:>10.2f} M  {state}")
    if description["adapter_parameters"]:
        lines.append(f"  {'adapter':<16}{'peft':<12}{description['adapter_parameters'] / 1e6:>10.2f} M  trained")
    lines += ["", f"  {description['speech_tokens_per_second']} speech tokens per second of audio"]
    for name, base in (description["base_models"] or {}).items():
        lines.append(f"  {name} base: {base['id']} @ {base['revision']}")
    return "\n".join(lines)
