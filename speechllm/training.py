"""From settings to a training run: what `speechllm pretrain` and `speechllm finetune` share."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoProcessor, set_seed
from transformers.trainer_utils import get_last_checkpoint

from .configuration_speechllm import SpeechLLMProjectorConfig
from .data.schema import Row
from .data.splits import split_by_cluster
from .modeling_speechllm import SpeechLLMForConditionalGeneration
from .processing_speechllm import SpeechLLMProcessor
from .recipes import UsageError
from .trainers import SpeechLLMTrainer, SpeechLLMTrainingArguments


@dataclass
class ModelArguments:
    """Which model: a checkpoint to go on with (`model`), or a speech encoder and an LLM to assemble a new one from."""

    model: str | None = field(default=None, metadata={"help": "SpeechLLM checkpoint (folder or Hub id) to start from."})
    speech_model: str | None = field(
        default=None, metadata={"help": "Speech encoder of a new model (folder or Hub id)."}
    )
    text_model: str | None = field(default=None, metadata={"help": "LLM of a new model (folder or Hub id)."})
    speech_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the speech encoder."})
    text_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the LLM."})
    speech_layer: int | None = field(
        default=None, metadata={"help": "Hidden state of the encoder that feeds the projector; default: its output."}
    )
    projector: str | None = field(  # once parsed, a dict
        default=None, metadata={"help": "Settings of a new projector as JSON, e.g. '{\"num_queries\": 2}'."}
    )
    dtype: str | None = field(default=None, metadata={"help": "dtype of the frozen parts, e.g. bfloat16."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention: 'sdpa', 'eager' (faster to train on a CPU), 'flash_attention_2'."}
    )

    def __post_init__(self):
        if isinstance(self.projector, str):
            try:
                self.projector = json.loads(self.projector)
            except json.JSONDecodeError as error:
                raise UsageError(f"--projector is not JSON: {error}. Write it as '{{\"num_queries\": 2}}'.") from None
        if self.projector is not None:
            known = [name for name in SpeechLLMProjectorConfig.__annotations__ if name != "model_type"]
            if not isinstance(self.projector, dict) or not set(self.projector) <= set(known):
                raise UsageError(f"--projector is {self.projector!r}; it may set {', '.join(known)}.")
        if self.dtype is not None and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise UsageError(f"--dtype is {self.dtype!r}; use float32, bfloat16 or float16.")
        new = self.speech_model and self.text_model
        if bool(self.model) == bool(new) or (self.model and (self.speech_model or self.text_model)):
            raise UsageError("Give either --model, or both --speech_model and --text_model.")
        for name in ("speech_revision", "text_revision", "speech_layer", "projector"):
            if self.model and getattr(self, name) is not None:
                raise UsageError(f"--{name} is for a new model; the one of --model has its own.")


@dataclass
class DataArguments:
    """Which data: manifests of rows with `audio` and `text`."""

    train_data: str = field(metadata={"help": "Manifest to train on: .jsonl, .json, .csv or .tsv."})
    eval_data: str | None = field(default=None, metadata={"help": "Manifest of held-out rows."})
    held_out: int = field(
        default=0, metadata={"help": "Without --eval_data: hold out so many texts, with their near-duplicates."}
    )
    maximum_seconds: float | None = field(
        default=None, metadata={"help": "Leave out longer rows (where the manifest has a `duration`)."}
    )

    def load(self, load_rows: Callable[[str], list[Row]]) -> tuple[list[Row], list[Row]]:
        """Training rows and held-out rows."""
        train = load_rows(self.train_data)
        if self.maximum_seconds is not None:
            train = [row for row in train if row.get("duration", 0) <= self.maximum_seconds]
        if self.eval_data:
            return train, load_rows(self.eval_data)
        return split_by_cluster(train, test_texts=self.held_out, seed=0) if self.held_out else (train, [])


def load_model(
    settings: ModelArguments, training: SpeechLLMTrainingArguments
) -> tuple[SpeechLLMForConditionalGeneration, SpeechLLMProcessor]:
    """The model to train and its processor."""
    set_seed(training.seed)
    options = {"attn_implementation": settings.attn_implementation} if settings.attn_implementation else {}
    if settings.dtype:
        options["dtype"] = getattr(torch, settings.dtype)
    if settings.model:
        model = SpeechLLMForConditionalGeneration.from_pretrained(settings.model, **options)
        return model, AutoProcessor.from_pretrained(settings.model)
    model = SpeechLLMForConditionalGeneration.from_speech_text_pretrained(
        settings.speech_model,
        settings.text_model,
        speech_revision=settings.speech_revision,
        text_revision=settings.text_revision,
        speech_layer=settings.speech_layer,
        **options,
        **(settings.projector or {}),
    )
    return model, SpeechLLMProcessor.from_config(model.config)


def run_training(trainer: SpeechLLMTrainer, data: DataArguments) -> None:
    """Train (resuming from the last checkpoint in the output folder), evaluate, save, and say what happened."""
    arguments = trainer.args
    folder = Path(arguments.output_dir)
    resume = arguments.resume_from_checkpoint or (get_last_checkpoint(folder) if os.path.isdir(folder) else None)
    if resume and arguments.should_save:
        print(f"Resuming from {resume}", flush=True)
    trainer.train(resume_from_checkpoint=resume)
    metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
    trainer.save_model()
    trainer.save_state()
    if arguments.should_save:
        if metrics:
            trainer.save_metrics("eval", metrics)
        for name, value in sorted(metrics.items()):
            if isinstance(value, float) and ("_mean" in name or name in ("eval_loss", "eval_wer", "eval_cer")):
                print(f"{name.removeprefix('eval_'):<20}{value:.4f}")
        if trainer.set_aside:
            print(f"{len(trainer.set_aside)} utterance(s) set aside, see {folder / 'set_aside.jsonl'}")
        print(f"Saved to {folder}")
