"""What both training stages share, on top of `transformers.Trainer`.

- Batches of similar length, without equal keys: of rows in memory (`data/sampling.py`), the same for a given seed on any
  number of workers, or of a stream (`data/streaming.py`). The share of padding is logged.
- Frozen encoder features from a cache on disk, where one is asked for.
- Every loss term by name in the logs, averaged over the steps since the last log and over processes.
- Checkpoints of trained weights only (`checkpointing.py`), from which runs resume exactly.
- Utterances that cannot be used are set aside, counted, and listed in `set_aside.jsonl`; the run goes on.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import IterableDataset
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments

from ..data.checking import counted
from ..data.feature_cache import FeatureCache
from ..data.items import SpeechCollator, SpeechItems, approximate_length
from ..data.sampling import DistinctBatchSampler
from ..data.schema import Row, SetAside, undecoded, unusable, with_ids
from ..data.streaming import Position, StreamBatches, StreamReaders
from ..modeling_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMModel
from ..processing_speechllm import SpeechLLMProcessor
from ..saving import explained_saving
from .checkpointing import CheckpointingTrainer
from .dashboards import use_dashboards
from .frozen_states import fill_frame_cache, frame_cache
from .resuming import checkpoint_to_resume, refuse_weights_alone


logger = logging.getLogger(__name__)

SET_ASIDE = "set_aside.jsonl"  # in the output folder
# What `Trainer` offers and a SpeechLLM has otherwise or not at all.
NOT_HERE = {
    "compute_metrics": "`FineTuningTrainer` scores each task (predict_with_generate), `ContrastiveTrainer` retrieval",
    "compute_loss_func": "give `ContrastiveTrainer` `objectives` of your own, or override `compute_loss`",
    "preprocess_logits_for_metrics": "the metrics are those of generated answers",
}


@dataclass
class SpeechLLMTrainingArguments(TrainingArguments):
    """Settings of both stages; the defaults of the optimiser are the paper's (AdamW, 1e-4, no decay, cosine, 3%)."""

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule after the warm-up."})
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Steps of linear warm-up; below 1, a fraction of all steps."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log the losses every so many steps."})
    feature_cache: str | None = field(
        default=None, metadata={"help": "Folder to keep the frozen encoder's features in; they are computed once."}
    )
    length_window: int = field(
        default=4, metadata={"help": "Global batches that are sorted by length together; 0 turns sorting off."}
    )
    stream_buffer: int = field(
        default=1000, metadata={"help": "Rows of a stream that are shuffled together, per process and worker."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Rows are prepared here, not by column."})
    report_to: None | str | list[str] = field(  # noqa: RUF036 (in another order the parser gives [None])
        default="none", metadata={"help": "tensorboard, wandb, trackio, ... or none."}
    )

    def __post_init__(self):
        # `accelerate launch` has told DeepSpeed its precision, which refuses arguments that do not repeat it.
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION")
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and not (self.bf16 or self.fp16):
            self.bf16, self.fp16 = launched == "bf16", launched == "fp16"
        super().__post_init__()
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must stay False: the data's columns are not the model's inputs.")
        if self.stream_buffer < 1:
            raise ValueError(f"stream_buffer is {self.stream_buffer}; it must be at least 1.")
        without_effect = ("label_smoothing_factor", "neftune_noise_alpha", "bf16_full_eval", "fp16_full_eval")
        if found := [name for name in without_effect if getattr(self, name)]:
            raise ValueError(f"{' and '.join(found)}: nothing changes by that here. Leave it out.")


class EpochOfSampler(TrainerCallback):
    """Tells the batch sampler the epoch. (Resumed in mid-epoch on several processes, `Trainer` does not reach it.)"""

    def __init__(self, trainer: "SpeechLLMTrainer"):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer.stream is None:
            self.trainer.batch_sampler.set_epoch(int(state.epoch or 0))


class SpeechLLMTrainer(CheckpointingTrainer):
    """Base of `ContrastiveTrainer` and `FineTuningTrainer`.

    Args:
        model: a SpeechLLM.
        args: settings.
        train_dataset: rows of the data schema (a list of dicts, a `datasets.Dataset`, or a stream, that is a
            `datasets.IterableDataset`, which is read again and again for `max_steps` steps).
        eval_dataset: likewise, but no stream.
        processing_class: the model's processor.
    """

    keys_differ_between_processes = True  # whether equal keys must not meet in one step of several processes either

    def __init__(
        self,
        model: SpeechLLMForConditionalGeneration | SpeechLLMModel,
        args: SpeechLLMTrainingArguments,
        train_dataset: list[Row] | IterableDataset | None = None,
        eval_dataset: list[Row] | None = None,
        processing_class: SpeechLLMProcessor | None = None,
        **kwargs: Any,
    ):
        self.stream = undecoded(train_dataset) if isinstance(train_dataset, IterableDataset) else None
        if self.stream is not None:
            _check_stream_settings(args)
        if isinstance(eval_dataset, IterableDataset):
            raise ValueError("`eval_dataset` is a stream; give its rows as a list, e.g. list(stream.take(200)).")
        if args.eval_strategy != "no" and (eval_dataset is None or not len(eval_dataset)):
            raise ValueError(
                f"eval_strategy is {args.eval_strategy.value!r}, and there is nothing to evaluate on. Give `eval_dataset` "
                "(--eval_data or --held_out), or leave eval_strategy at 'no'."
            )
        for name, instead in NOT_HERE.items():
            if kwargs.get(name) is not None:
                raise ValueError(f"`{name}` has no effect here: {instead}.")
        if processing_class is None:
            raise ValueError("Give the model's processor as `processing_class`.")
        if args.n_gpu > 1:
            raise ValueError(
                f"One process sees {args.n_gpu} GPUs. Start one process per GPU (`accelerate launch -m speechllm ...`), "
                "or show it one (CUDA_VISIBLE_DEVICES=0)."
            )
        self.speechllm = model
        self.set_aside: dict[Hashable, SetAside] = {}  # see `note_set_aside`
        self.llm_tokens = 0  # tokens, without padding, that passed through the LLM in this process, to train
        self._terms: dict[str, torch.Tensor] = {}  # name -> sums of weighted values and of weights since the last log
        self._listed = 0  # utterances in `set_aside.jsonl`
        self._padding = torch.zeros(2, device=args.device)  # sum over batches of the share of padding, batches
        self._positions: dict[int, Position] = {}  # where each worker of this process goes on in the stream
        super().__init__(
            model=self.trained_module(model),
            args=args,
            train_dataset=train_dataset,  # these two and the collator are replaced below
            eval_dataset=eval_dataset,
            data_collator=list,
            processing_class=processing_class,
            **kwargs,
        )
        self.check_processes()
        use_dashboards(self.callback_handler)
        self.add_callback(EpochOfSampler(self))
        self.frames = self._frame_cache() if args.feature_cache else None
        self.train_rows = self._usable(train_dataset if self.stream is None else None)
        before = set(self.set_aside)
        self.eval_rows = self._usable(eval_dataset)
        if eval_dataset is not None and len(eval_dataset) and not self.eval_rows:
            first = next((item.reason for key, item in self.set_aside.items() if key not in before), "see the log.")
            raise ValueError(f"None of the {len(eval_dataset)} row(s) of `eval_dataset` can be used: {first}")
        self.train_dataset = self.items(self.train_rows) if self.train_rows else None
        self.eval_dataset = self.items(self.eval_rows) if self.eval_rows else None

    # ---- what a stage defines --------------------------------------------------------------------------------------

    def trained_module(self, model):
        """The module whose forward pass is trained; what is saved is the whole model."""
        return model

    def check_processes(self) -> None:
        """Before any data is read: refuse what cannot work with the processes and devices there are.

        Raises:
            ValueError: if a setting does not go with them.
        """
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and plugin.cpu_ram_efficient_loading:
            raise ValueError(
                "fsdp_cpu_ram_efficient_loading leaves all processes but the first without weights, which are read before "
                "they are split (caches, the LM head). Set it to false, as in recipes/accelerate/fsdp2.yaml."
            )

    def items(self, rows: list[Row]) -> SpeechItems:
        """The stage's data set of `rows`."""
        raise NotImplementedError

    def problem(self, row: Row) -> str | None:
        """Why the row, whatever its audio, cannot be used; `None` if it can."""
        return None

    def batch_key(self, row: Row) -> Hashable:
        """Rows with equal keys never share a batch."""
        return row["id"]

    # ---- data ------------------------------------------------------------------------------------------------------

    @property
    def headless(self) -> SpeechLLMModel:
        """The bare model without its head, unwrapped."""
        return getattr(self.speechllm, "model", self.speechllm)

    @contextmanager
    def computing(self, frozen: nn.Module) -> Iterator[None]:
        """Have a frozen part on the device while it fills a cache: under FSDP2 and DeepSpeed, `Trainer` leaves the model
        where it is until training begins."""
        weight = next(frozen.parameters())
        waiting = (self.is_fsdp_enabled or self.is_deepspeed_enabled) and weight.device.type == "cpu"
        waiting = waiting and not isinstance(weight, DTensor)  # split already, and not to be moved
        if waiting:
            frozen.to(self.args.device)
        try:
            yield
        finally:
            if waiting:
                frozen.to("cpu")

    def _frame_cache(self) -> FeatureCache:
        if not self.headless.config.freeze_speech_encoder or self.headless.config.frozen_in_train_mode:
            raise ValueError("feature_cache needs a speech encoder that is frozen and in evaluation mode.")
        precision = self.args.mixed_precision
        return frame_cache(self.args.feature_cache, self.headless, self.processing_class, precision)

    def _usable(self, rows: list[Row] | None) -> list[Row]:
        """The rows with ids, their frames cached, without those that cannot be used.

        Raises:
            ValueError: if several sets of rows are given.
        """
        if isinstance(rows, dict):
            raise ValueError(
                f"There are {len(rows)} sets of rows; give one. Evaluate the others with `evaluate(rows, "
                "metric_key_prefix='eval_other')`."
            )
        rows = with_ids(undecoded(rows) if rows is not None else [])
        aside = [found for row in rows if (found := unusable(row, self.problem))]
        names = {item.id for item in aside}
        rows = [row for row in rows if row["id"] not in names]
        if self.frames is not None and rows:
            precision = self.args.mixed_precision
            with self.computing(self.headless.speech_encoder):
                unhearable = fill_frame_cache(self.frames, rows, self.headless, self.processing_class, precision)
            aside += unhearable
            names = {item.id for item in unhearable}
            rows = [row for row in rows if row["id"] not in names]
        self._note(aside)
        return rows

    def _loader(self, dataset: SpeechItems, padding_side: str = "right", **sampling: Any) -> DataLoader:
        workers = self.args.dataloader_num_workers
        return DataLoader(
            dataset,
            collate_fn=SpeechCollator(dataset, padding_side),
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            **sampling,
        )

    @property
    def _seed(self) -> int:
        return self.args.data_seed if self.args.data_seed is not None else self.args.seed

    def _stream_readers(self) -> StreamReaders:
        arguments = self.args
        return StreamReaders(arguments.process_index, arguments.world_size, max(1, arguments.dataloader_num_workers))

    def _stream_loader(self) -> DataLoader:
        batches = StreamBatches(
            self.stream,
            self.items([]),
            batch_size=self._train_batch_size,
            problem=self.problem,
            key=self.batch_key,
            readers=self._stream_readers(),
            seed=self._seed,
            buffer=self.args.stream_buffer,
            window=self.args.length_window,
            apart=self.keys_differ_between_processes,
        )
        batches.positions = self._positions
        return DataLoader(
            batches,
            sampler=range(self.args.max_steps * self.args.gradient_accumulation_steps),
            batch_size=1,  # of batches
            collate_fn=itemgetter(0),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor if self.args.dataloader_num_workers else None,
        )

    def get_train_dataloader(self) -> DataLoader:
        if self.stream is not None:
            return self._stream_loader()
        if self.train_dataset is None:
            first = next((item.reason for item in self.set_aside.values()), "there is no `train_dataset`.")
            raise ValueError(f"There is nothing to train on: {first}")
        self.batch_sampler = DistinctBatchSampler(
            [self.batch_key(row) for row in self.train_rows],
            [approximate_length(row) for row in self.train_rows],
            batch_size=self._train_batch_size,
            processes=self.args.world_size,
            seed=self._seed,
            window=self.args.length_window,
        )
        return self.accelerator.prepare(self._loader(self.train_dataset, batch_sampler=self.batch_sampler))

    def eval_batches(self, dataset: SpeechItems, padding_side: str = "right") -> DataLoader:
        """This process's share of `dataset`, in batches of similar length; each item's place is in `batch["rows"]`."""
        order = sorted(range(len(dataset)), key=lambda i: -approximate_length(dataset.rows[i]))
        size, processes = self.args.per_device_eval_batch_size, self.args.world_size
        if self.is_fsdp_enabled:  # processes hand each other their weights: each must run the model equally often
            count = -(-len(order) // (size * processes)) * processes
            bounds = [len(order) * batch // count for batch in range(count + 1)]  # an empty batch gets a stand-in
        else:
            bounds = [*range(0, len(order), size), len(order)]
        batches = [order[first:last] for first, last in pairwise(bounds)]
        return self._loader(
            dataset, padding_side, batch_sampler=batches[self.args.process_index :: self.args.world_size]
        )

    def get_batch_samples(self, *args: Any):
        """The batches of one optimiser step: their padding is noted, and where a stream goes on after them."""
        batches, items = super().get_batch_samples(*args)
        for batch in batches:
            share = 1 - batch["attention_mask"].to(self.args.device).float().mean()
            self._padding += torch.stack([share, torch.ones_like(share)])
            self.record({"padding_share": share})
            if "position" in batch:
                worker, changes = batch.pop("position")
                self._positions.setdefault(worker, {}).update(changes)
        return batches, items

    def on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch's tensors on this process's device; its set-aside utterances noted, the rest of it unchanged."""
        self._note(batch.pop("set_aside", []))
        return self._prepare_inputs(batch)

    # ---- utterances set aside --------------------------------------------------------------------------------------

    def note_set_aside(self, items: Iterable[SetAside]) -> list[SetAside]:
        """List these in `set_aside.jsonl` too; returns those that were not listed before. Equal ones of one call are
        several rows (of manifests that share ids, say), those of another call the same rows again."""
        times, new = Counter(), []
        for item in items:
            times[item] += 1
            key = (item.id, item.reason, times[item])
            if key not in self.set_aside:
                self.set_aside[key] = item
                new.append(item)
        return new

    def _note(self, items: list[SetAside]) -> None:
        for item in self.note_set_aside(items):
            logger.warning("Set aside: %s", item.reason)

    def write_set_aside(self) -> None:
        """List what was set aside, over all processes, in `set_aside.jsonl`, and count it by cause in the log."""
        if self.args.world_size > 1:
            self.set_aside = dict(gather_object(list(self.set_aside.items())))
        found = self.set_aside
        if len(found) == self._listed or not self.args.should_save:
            return
        self._listed = len(found)
        path = Path(self.args.output_dir) / SET_ASIDE
        lines = [json.dumps(asdict(item)) for item in found.values()]
        with explained_saving(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = path.with_name(f".{SET_ASIDE}.{os.getpid()}")
            whole.write_text("\n".join(lines) + "\n", encoding="utf-8")
            whole.replace(path)
        for line in counted(found.values()):
            logger.warning("%s", line)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        self._positions = {}
        self._padding.zero_()
        if resume_from_checkpoint:
            resume_from_checkpoint = checkpoint_to_resume(self.args.output_dir, resume_from_checkpoint)
            self._go_on_from(Path(resume_from_checkpoint))
        output = super().train(resume_from_checkpoint, **kwargs)
        self.write_set_aside()
        self.note_training()
        return output

    def _go_on_from(self, checkpoint: Path) -> None:
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # whose files have other names
            refuse_weights_alone(checkpoint, self.args)
        if self.stream is not None:
            self._load_positions(checkpoint)
        listed = Path(self.args.output_dir) / SET_ASIDE
        if listed.is_file():  # by the part of the run before this one
            lines = listed.read_text(encoding="utf-8").split("\n")
            known, self.set_aside = self.set_aside, {}
            self.note_set_aside(SetAside(**json.loads(line)) for line in lines if line)
            self.note_set_aside(known.values())

    @property
    def _has_ended(self) -> bool:
        return self.state.global_step >= self.state.max_steps

    def _run_epoch(self, *positional: Any, **loop: Any) -> None:
        """An epoch of `Trainer`, which would take one step more where a resumed run has ended already."""
        if self._has_ended:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*positional, **loop)

    # ---- losses and logs -------------------------------------------------------------------------------------------

    def record(self, terms: dict[str, torch.Tensor | float], weight: float = 1.0) -> None:
        """Remember the values of loss terms until they are logged; weight 0: they do not count, but keep step."""
        for name, value in terms.items():
            value = torch.as_tensor(value, device=self.args.device).detach().float()
            term = torch.stack([value if weight else torch.zeros_like(value), value.new_tensor(weight)])
            self._terms[name] = self._terms[name] + term if name in self._terms else term

    def predict(self, *positional: Any, **named: Any):
        """
        Raises:
            NotImplementedError: always; the message says what there is instead.
        """
        raise NotImplementedError(
            "`FineTuningTrainer.answers(rows)` gives a model's answers, `evaluate(rows)` the metrics."
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            # A term may be recorded on some processes only; all of them must gather the same ones, in the same order.
            names = gather_object(list(self._terms)) if self.args.world_size > 1 else self._terms
            for name in sorted(set(names)):
                total = self._terms.get(name, torch.zeros(2, device=self.args.device))
                value, weight = self.accelerator.gather(total[None]).sum(0).tolist()
                if weight:
                    logs[name] = round(value / weight, 6)
            self._terms.clear()
        if "train_loss" in logs:  # the summary at the end
            if self.state.global_step == self._initial_global_step:  # of nothing: the run had ended before
                return
            share, batches = self.accelerator.gather(self._padding[None]).sum(0).tolist()
            logs["padding_share"] = round(share / max(batches, 1), 6)
        super().log(logs, start_time)


def _check_stream_settings(args: SpeechLLMTrainingArguments) -> None:
    """
    Raises:
        ValueError: if the settings need what nobody knows of a stream.
    """
    if args.max_steps <= 0:
        raise ValueError("The training data is a stream, which has no end; say how long to train: max_steps.")
    for name in ("feature_cache", "text_state_cache"):
        if getattr(args, name, None):
            raise ValueError(
                f"{name} needs all the training data before training starts, and a stream never has it. Leave it out, "
                "or give the data as a manifest."
            )
