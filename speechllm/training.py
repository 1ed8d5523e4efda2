"""From settings to a training run: what `speechllm pretrain` and `speechllm finetune` share."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode

import torch
from datasets import IterableDataset
from transformers import AutoProcessor, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from .configuration_speechllm import SpeechLLMProjectorConfig
from .data.checking import counted
from .data.mixtures import fraction_of, interleaved, mixture, shares
from .data.prompts import PROMPTS, with_drawn_prompt
from .data.schema import Row, SetAside, with_ids
from .data.sources import MANIFESTS, Spec, load_source, parse_spec, read_specs
from .data.splits import split_by_cluster
from .data.stream_sources import stream_size, stream_source
from .data.streaming import strict
from .modeling_speechllm import SpeechLLMForConditionalGeneration
from .processing_speechllm import SpeechLLMProcessor
from .recipes import UsageError
from .saving import explained_saving
from .trainers import SpeechLLMTrainer, SpeechLLMTrainingArguments
from .trainers.resuming import checkpoint_to_resume, last_checkpoint, refuse_other_run


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
    frozen_in_train_mode: bool = field(
        default=False,
        metadata={
            "help": "Train with dropout, SpecAugment and layer drop in the frozen parts, as the published code probably "
            "did; the checkpoint keeps this."
        },
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
    """Which data: sources of rows (`data/sources.py`), mixed; or streams of such rows."""

    train_data: list[str] = field(  # of specs; from Python, also one, or dicts
        metadata={
            "help": "Sources to train on: manifests (.jsonl, .json, .csv, .tsv, .parquet), folders, corpora "
            "(must-c:FOLDER?split=train), data sets of the Hub (hub:owner/name), or a .yaml file with a list of them; "
            "see docs/data.md."
        }
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the training data as a stream, never as a whole; needs --max_steps."},
    )
    data_config: str | None = field(
        default=None, metadata={"help": "Configuration of the Hub's data sets whose source has no `name`."}
    )
    data_split: str | None = field(
        default=None, metadata={"help": "Split of the Hub's data sets whose source has no `split`; default: train."}
    )
    columns: str | None = field(  # once parsed, a dict
        default=None,
        metadata={"help": 'The data\'s own names of columns as JSON, e.g. \'{"text": "sentence"}\'.'},
    )
    eval_data: list[str] | None = field(default=None, metadata={"help": "Sources of held-out rows."})
    held_out: int = field(
        default=0, metadata={"help": "Without --eval_data: hold out so many texts, with their near-duplicates."}
    )
    minimum_seconds: float | None = field(default=None, metadata={"help": "Leave out shorter training rows."})
    maximum_seconds: float | None = field(default=None, metadata={"help": "Leave out longer training rows."})
    train_fraction: float = field(
        default=1.0,
        metadata={
            "help": "Train on this part of every source, drawn by --subset_seed: a smaller part lies in a larger one. Of "
            "a stream, each row is in or out by a hash of its id or audio: the share is about that."
        },
    )
    mixture_temperature: float | None = field(
        default=None,
        metadata={
            "help": "Above 1: small sources come more often than their size says (see data/mixtures.py). Default: 1; of "
            "streams: weights alone, whatever the sizes. Sizes that a stream does not tell are given by SOURCE?size=ROWS."
        },
    )
    prompts: str = field(
        default="first",
        metadata={
            "help": "Instructions of training rows without one: the task's 'first' wording, or one that is 'drawn'."
        },
    )
    prompt_languages: list[str] = field(
        default_factory=lambda: ["en"],
        metadata={"help": "Of drawn instructions: codes, or 'answer' for the language of the answer."},
    )
    subset_seed: int = field(
        default=0, metadata={"help": "Of fractions, mixtures and drawn instructions (not of the order in training)."}
    )
    strict: bool = field(
        default=False,
        metadata={
            "help": "Decode all audio first, and stop at the first row that cannot be used, instead of setting it aside. A "
            "stream is not read ahead: it ends the run where it comes to such a row."
        },
    )
    set_aside: list[SetAside] = field(default_factory=list, init=False)  # by `load`
    reports: list[str] = field(default_factory=list, init=False)  # one per source, by `load`

    def __post_init__(self):
        self.train_data = [self.train_data] if isinstance(self.train_data, str | dict) else list(self.train_data)
        if isinstance(self.eval_data, str | dict):
            self.eval_data = [self.eval_data]
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
        if self.mixture_temperature is not None and not self.mixture_temperature > 0:
            raise UsageError(f"--mixture_temperature is {self.mixture_temperature}; it must be above 0.")
        if self.prompts not in ("first", "drawn"):
            raise UsageError(f"--prompts is {self.prompts!r}; use 'first' or 'drawn'.")
        if self.streaming and self.held_out:
            raise UsageError(
                "--held_out needs all rows at once, to find what is nearly the same as the texts it takes away from "
                "training; --streaming never has them. Give held-out rows as --eval_data."
            )

    def load(self) -> tuple[list[Row] | IterableDataset, list[Row]]:
        """Training rows, or a stream of them, and held-out rows. What cannot be used is in `set_aside` afterwards, and
        counted in `reports`.

        Raises:
            ManifestError: if a source cannot be used; with `strict`, if a row cannot.
            UsageError: if settings do not go with the sources.
        """
        self.set_aside, self.reports = [], []
        specs, held_out_specs = read_specs(self.train_data), read_specs(self.eval_data or [])
        specs = [_named(spec) for spec in specs] if self.streaming else specs
        if options := self._hub_options():
            if not any(parse_spec(spec).kind == "hub" for spec in specs + held_out_specs):
                raise UsageError(
                    "--data_split and --data_config are for data sets of the Hub, and no source is one. Name it "
                    "hub:OWNER/NAME, or leave them out."
                )
            specs, held_out_specs = ([_on_the_hub(spec, options) for spec in some] for some in (specs, held_out_specs))
        held_out = [row for spec in held_out_specs for row in self._loaded(spec)]
        if self.streaming:
            return self._stream(specs), with_ids(held_out)
        limits = {"minimum_seconds": self.minimum_seconds, "maximum_seconds": self.maximum_seconds}
        parts = [self._loaded(spec, **limits) for spec in specs]
        if self.held_out and not self.eval_data:
            together = [row for part in parts for row in part]
            if silent := [row["id"] for row in together if not row.get("text")]:
                raise UsageError(
                    f"--held_out compares transcripts, and {len(silent):,} of {len(together):,} rows have no `text` (the "
                    f"first: {silent[0]}). Give held-out rows as --eval_data, or transcripts."
                )
            train, held_out = split_by_cluster(together, test_texts=self.held_out, seed=0)
            kept = {id(row) for row in train}
            parts = [[row for row in part if id(row) in kept] for part in parts]
            if not all(parts):
                raise UsageError(
                    "--held_out leaves nothing of a source to train on; hold out less, or give --eval_data."
                )
        parts = [fraction_of(part, self.train_fraction, self.subset_seed) for part in parts]
        weights = [parse_spec(spec).weight for spec in specs]
        train = mixture(parts, weights, self.mixture_temperature or 1.0, self.subset_seed)
        return (list(map(self._prompted, train)) if self.prompts == "drawn" else train), with_ids(held_out)

    def _loaded(self, spec: Spec, **limits: float | None) -> list[Row]:
        loaded = load_source(spec, self.strict, columns=self.columns, seed=self.subset_seed, **limits)
        self.set_aside += loaded.set_aside
        self.reports.append(loaded.report(spec if isinstance(spec, str) else spec["source"]))
        return loaded.rows

    def _stream(self, specs: list[Spec]) -> IterableDataset:
        options = {"minimum_seconds": self.minimum_seconds, "maximum_seconds": self.maximum_seconds}
        options |= {"fraction": self.train_fraction, "seed": self.subset_seed, "packed": len(specs) > 1}
        streams = [stream_source(spec, self.columns, **options) for spec in specs]
        stream = interleaved(streams, self._weights(specs), self.subset_seed) if len(specs) > 1 else streams[0]
        stream = stream.map(self._prompted) if self.prompts == "drawn" else stream
        return strict(stream) if self.strict else stream

    def _weights(self, specs: list[Spec]) -> list[float]:
        """What the shares of streams in their mixture are in proportion to."""
        weights = [parse_spec(spec).weight for spec in specs]
        if self.mixture_temperature is None:
            return weights
        return shares([stream_size(spec, self.columns) for spec in specs], weights, self.mixture_temperature)

    def _hub_options(self) -> dict[str, str]:
        options = {"name": self.data_config, "split": self.data_split}
        return {name: value for name, value in options.items() if value is not None}

    def _prompted(self, row: Row) -> Row:
        return with_drawn_prompt(row, self.subset_seed, self.prompt_languages)


def _named(spec: Spec) -> Spec:
    """A line that names nothing here is a data set of the Hub."""
    here = not isinstance(spec, str) or os.path.exists(spec) or Path(spec).suffix in MANIFESTS
    return spec if here or ":" in spec or "{" in spec else f"hub:{spec}"


def _on_the_hub(spec: Spec, options: dict[str, str]) -> Spec:
    """A data set of the Hub with those options that it does not have itself; another source as it is."""
    source = parse_spec(spec)
    options = {name: value for name, value in options.items() if name not in source.options}
    if source.kind != "hub" or not options:
        return spec
    if isinstance(spec, str) and not spec.lstrip().startswith("{"):
        return f"{spec}{'&' if '?' in spec else '?'}{urlencode(options)}"
    return {**(json.loads(spec) if isinstance(spec, str) else spec), **options}


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
        processor = AutoProcessor.from_pretrained(settings.model)
    else:
        model = SpeechLLMForConditionalGeneration.from_speech_text_pretrained(
            settings.speech_model,
            settings.text_model,
            speech_revision=settings.speech_revision,
            text_revision=settings.text_revision,
            speech_layer=settings.speech_layer,
            **options,
            **(settings.projector or {}),
        )
        processor = SpeechLLMProcessor.from_config(model.config)
    model.config.frozen_in_train_mode |= settings.frozen_in_train_mode
    return model, processor


def run_training(trainer: SpeechLLMTrainer) -> None:
    """Train (resuming from the last checkpoint in the output folder), evaluate, save, and say what happened."""
    arguments = trainer.args
    folder = Path(arguments.output_dir)
    if resume := arguments.resume_from_checkpoint:
        resume = checkpoint_to_resume(folder, resume)
    elif resume := last_checkpoint(folder):
        refuse_other_run(resume, trainer)
    done = None
    if resume:
        done = TrainerState.load_from_json(str(Path(resume) / TRAINER_STATE_NAME)).global_step
        if arguments.should_save:
            print(f"Resuming from {resume}", flush=True)
    trainer.train(resume_from_checkpoint=resume)
    nothing_trained = done == trainer.state.global_step
    if arguments.should_save and nothing_trained:
        print(f"It ended after {done} steps; nothing was left to train.", flush=True)
    metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
    with explained_saving(folder):
        trainer.save_model()
        if not (nothing_trained and (folder / TRAINER_STATE_NAME).is_file()):  # which tells of the training
            trainer.save_state()
        if metrics and arguments.should_save:
            trainer.save_metrics("eval", metrics)
    if arguments.should_save:
        for name, value in sorted(metrics.items()):
            if isinstance(value, float) and (
                "_mean" in name or name == "eval_loss" or name.removeprefix("eval_").split("_")[0] in PROMPTS
            ):
                print(f"{name.removeprefix('eval_'):<20}{value:.4f}")
        if trainer.set_aside:
            print("\n".join(counted(trainer.set_aside.values())))
            print(f"{len(trainer.set_aside)} utterance(s) set aside in all, see {folder / 'set_aside.jsonl'}")
        print(f"Saved to {folder}")
