"""From settings to a training run: what `speechllm pretrain` and `speechllm finetune` share."""

import json
import os
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import IterableDataset
from transformers import AutoProcessor, set_seed
from transformers.trainer_utils import get_last_checkpoint

from .configuration_speechllm import SpeechLLMProjectorConfig
from .data.schema import Row, load_rows, load_stream
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
    """Which data: manifests of rows with `audio` and `text`, or a stream of such rows."""

    train_data: str = field(
        metadata={
            "help": "Manifest to train on: .jsonl, .json, .csv or .tsv. With --streaming: a folder of Parquet or JSON "
            "Lines files, one such file, or the id of a data set on the Hub."
        }
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the training data as a stream, never as a whole; needs --max_steps."},
    )
    data_config: str | None = field(default=None, metadata={"help": "Configuration of the Hub's data set."})
    data_split: str = field(default="train", metadata={"help": "Split of the Hub's data set."})
    columns: str | None = field(  # once parsed, a dict
        default=None,
        metadata={"help": 'The data\'s own names of columns as JSON, e.g. \'{"text": "sentence"}\'.'},
    )
    eval_data: str | None = field(default=None, metadata={"help": "Manifest of held-out rows."})
    held_out: int = field(
        default=0, metadata={"help": "Without --eval_data: hold out so many texts, with their near-duplicates."}
    )
    maximum_seconds: float | None = field(
        default=None, metadata={"help": "Leave out longer rows (where the manifest has a `duration`)."}
    )
    train_fraction: float = field(
        default=1.0,
        metadata={"help": "Train on this part of the rows, drawn once for all: a smaller part lies in a larger one."},
    )

    def __post_init__(self):
        if isinstance(self.columns, str):
            try:
                self.columns = json.loads(self.columns)
            except json.JSONDecodeError as error:
                raise UsageError(f'--columns is not JSON: {error}. Write it as \'{{"text": "sentence"}}\'.') from None
        if self.columns is not None and not (
            isinstance(self.columns, dict) and all(isinstance(name, str) for name in self.columns.values())
        ):
            raise UsageError(f"--columns is {self.columns!r}; it must map our names of columns to the data's.")
        if not 0 < self.train_fraction <= 1:
            raise UsageError(f"--train_fraction is {self.train_fraction}; it must be above 0 and at most 1.")
        if self.streaming and self.train_fraction < 1:
            raise UsageError("--train_fraction needs all rows at once, --streaming never has them; give fewer rows.")
        if self.streaming and self.held_out:
            raise UsageError("--held_out needs all rows at once, --streaming never has them; give --eval_data instead.")

    def load(self) -> tuple[list[Row] | IterableDataset, list[Row]]:
        """Training rows, or a stream of them, and held-out rows."""
        if self.streaming:
            train = load_stream(self.train_data, self.columns, self.data_config, self.data_split)
            if self.maximum_seconds is not None:
                train = train.filter(self._is_short)
        else:
            train = list(filter(self._is_short, load_rows(self.train_data, self.columns)))
        if self.eval_data:
            held_out = load_rows(self.eval_data, self.columns)
        else:
            train, held_out = (
                split_by_cluster(train, test_texts=self.held_out, seed=0) if self.held_out else (train, [])
            )
        return (self._fraction(train) if self.train_fraction < 1 else train), held_out

    def _fraction(self, rows: list[Row]) -> list[Row]:
        order = random.Random("train_fraction").sample(range(len(rows)), len(rows))
        return [rows[i] for i in sorted(order[: max(1, round(self.train_fraction * len(rows)))])]

    def _is_short(self, row: Row) -> bool:
        return self.maximum_seconds is None or (row.get("duration") or 0) <= self.maximum_seconds


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


def run_training(trainer: SpeechLLMTrainer) -> None:
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
