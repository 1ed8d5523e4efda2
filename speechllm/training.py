"""From settings to a training run: what `speechllm pretrain` and `speechllm finetune` share."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoProcessor, set_seed
from transformers.trainer_utils import get_last_checkpoint

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
    projector: dict | None = field(
        default=None, metadata={"help": "Settings of a new projector as JSON, e.g. '{\"num_queries\": 2}'."}
    )
    dtype: str | None = field(default=None, metadata={"help": "dtype of the frozen parts, e.g. bfloat16."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention: 'sdpa', 'eager' (faster to train on a CPU), 'flash_attention_2'."}
    )

    def __post_init__(self):
        if isinstance(self.projector, str):
            import json

            self.projector = json.loads(self.projector)
        new = self.speech_model and self.text_model
        if bool(self.model) == bool(new) or (self.model and (self.speech_model or self.text_model)):
            raise UsageError("Give either --model, or both --speech_model and --text_model.")


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
            train = [row for row in train if float(row.get("duration", 0)) <= self.maximum_seconds]
        if self.eval_data:
            return train, load_rows(self.eval_data)
        return split_by_cluster(train, test_texts=self.held_out, seed=0) if self.held_out else (train, [])


def load_model(
    settings: ModelArguments, training: SpeechLLMTrainingArguments
) -> tuple[SpeechLLMForConditionalGeneration, SpeechLLMProcessor]:
    """The model to train and its processor."""
    set_seed(training.seed)
    options = {"attn_implementation": settings.attn_implementation} if settings.attn_implementation else {}
    dtype = getattr(torch, settings.dtype) if settings.dtype else None
    if settings.model:
        model = SpeechLLMForConditionalGeneration.from_pretrained(settings.model, dtype=dtype or "auto", **options)
        return model, AutoProcessor.from_pretrained(settings.model)
    model = SpeechLLMForConditionalGeneration.from_speech_text_pretrained(
        settings.speech_model,
        settings.text_model,
        speech_revision=settings.speech_revision,
        text_revision=settings.text_revision,
        speech_layer=settings.speech_layer,
        dtype=dtype,
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
        trainer.save_metrics("eval", metrics)
        for name, value in sorted(metrics.items()):
            if isinstance(value, float) and ("_mean" in name or name in ("eval_loss", "eval_wer", "eval_cer")):
                print(f"{name.removeprefix('eval_'):<16}{value:.4f}")
        if trainer.set_aside:
            print(f"{len(trainer.set_aside)} utterance(s) set aside, see {folder / 'set_aside.jsonl'}")
        print(f"Saved to {folder}")
