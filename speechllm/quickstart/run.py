"""The quick start, from download to report.

1. Fetch a small speech encoder, a small LLM and half an hour of recorded speech; split by near-duplicate cluster.
2. Contrastive pretraining: the LLM's input first, then every fifth layer; held-out retrieval before, between and after.
3. Fine-tuning for recognition, the projector and LoRA on the LLM, from the pretrained projector and, to see what
   pretraining is worth, from scratch: at equal steps, and at equal compute (counted in tokens that pass through the LLM).
4. Save the best model. The report is rewritten after every stage.
"""

import logging
import os
import platform
import resource
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback, TrainerCallback, TrainerControl, set_seed

from ..data.joining import joined_rows
from ..data.schema import Row
from ..data.splits import split_by_cluster, without_near_duplicates
from ..downloads import cache_directory
from ..evaluation.metrics.error_rates import recognition_metrics
from ..evaluation.nearest_tokens import nearest_tokens
from ..modeling_speechllm import SpeechLLMForConditionalGeneration
from ..processing_speechllm import SpeechLLMProcessor
from ..saving import explained_saving
from ..trainers import (
    ContrastiveArguments,
    ContrastiveTrainer,
    FineTuningArguments,
    FineTuningTrainer,
    SpeechLLMTrainer,
    add_lora,
)
from ..trainers.memory import GiveMemoryBack
from .report import write_report
from .settings import QuickstartArguments
from .sources import Source, load_source


logger = logging.getLogger(__name__)

# A handful of long prompts would cost pretraining as much as hundreds of the others. Fine-tuning hears them up to a length:
# they hold a quarter of the words.
LONGEST_UTTERANCE, LONGEST_FINE_TUNED = 8.0, 20.0  # seconds
PRETRAINING_BATCH, FINE_TUNING_BATCH = 32, 8
# One speech token per third of a second: per token that the LLM reads, it learns more than two or four.
PROJECTOR = dict(num_queries=1, hidden_size=384, num_hidden_layers=2, num_attention_heads=6, intermediate_size=1536)
# Half of the prompts are single words: fine-tuning hears random ones in a row (see `data/joining.py`).
JOINED_ROWS, JOINED_SECONDS = 2000, 6.0
LORA_ALPHA = 16
SHOWN_UTTERANCES = 12  # held-out utterances with transcripts and audio in the report
SHOWN_SIMILARITIES = 24  # rows and columns of the similarity matrices


@dataclass(frozen=True)
class Trunk:
    """The beginning that two fine-tuning runs share: a checkpoint, and what it cost."""

    checkpoint: str | None = None
    seconds: float = 0.0
    llm_tokens: int = 0


class Quickstart:
    """One run; its stages fill `report`, which is written after each."""

    def __init__(self, settings: QuickstartArguments):
        self.settings = settings
        self.output = Path(settings.output)
        self.start = time.monotonic()
        self.adapter: dict[str, torch.Tensor] = {}  # LoRA as it begins in every arm
        self.report: dict[str, Any] = {
            "status": "running",
            "command": shlex.join(["speechllm", *sys.argv[1:]]),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": settings.seed,
            "versions": {name: version(name) for name in ("speechllm", "torch", "transformers", "accelerate", "peft")}
            | {"python": platform.python_version()},
            "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
            "seconds": {},
            "fine_tuning": {"lora_rank": settings.lora_rank, "arms": []},
        }

    def run(self) -> dict[str, Any]:
        """All stages; returns the report."""
        steps = self.settings.steps
        with self.stage("fetching models and speech", "contrastive pretraining"):
            source = load_source(self.settings.source)
            self.prepare_data(source)
        with self.stage("assembling the model", "contrastive pretraining"):
            self.assemble(source)
        with self.stage("contrastive pretraining", "fine-tuning from the pretrained projector"):
            self.pretrain(steps[0], steps[1])
        with self.stage("fine-tuning from the pretrained projector", "fine-tuning from scratch"):
            self.fine_tune("pretrained", "from the pretrained projector", self.pretrained, steps[2])
        if self.settings.compute_arms:
            with self.stage("fine-tuning from scratch, equal steps", "fine-tuning from scratch, equal compute"):
                self.fine_tune("scratch_equal_steps", "from scratch, equal steps", self.untrained, steps[2])
            with self.stage("fine-tuning from scratch, equal compute", "saving"):
                # Until its learning rate falls, the run of equal steps is this one: it goes on from there.
                self.fine_tune(
                    "scratch_equal_compute",
                    "from scratch, equal compute",
                    self.untrained,
                    self.equal_compute_steps(),
                    trunk=self.trunk,
                )
        with self.stage("saving the best model", ""):
            self.save_best()
        self.report.update(status="complete", stage="everything", next="")
        self.write()
        return self.report

    @contextmanager
    def stage(self, name: str, following: str):
        """Time a stage, tell what it is, and write the report after it."""
        minutes, seconds = divmod(int(time.monotonic() - self.start), 60)
        print(f"[{minutes:2d}:{seconds:02d}] {name} ...", flush=True)
        begin = time.monotonic()
        yield
        self.report["seconds"][name] = round(time.monotonic() - begin, 1)
        self.report.update(stage=name, next=following)
        self.write()

    def write(self) -> None:
        # Kilobytes on Linux, bytes on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        self.report["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        write_report(self.report, self.output)

    # ---- data and model --------------------------------------------------------------------------------------------

    def prepare_data(self, source: Source) -> None:
        rows = [row for row in source.rows if row["duration"] <= LONGEST_UTTERANCE]
        long = [row for row in source.rows if LONGEST_UTTERANCE < row["duration"] <= LONGEST_FINE_TUNED]
        self.train_rows, self.test_rows = split_by_cluster(
            rows, test_texts=self.settings.test_utterances, seed=self.settings.seed
        )
        self.long_rows = without_near_duplicates(long, self.test_rows)
        train = self.train_rows + self.long_rows
        self.report.update(source=source.name, credits=source.credits)
        self.report["data"] = {
            "train_utterances": len(train),
            "test_utterances": len(self.test_rows),
            "train_minutes": round(minutes_of(train), 2),
            "test_minutes": round(minutes_of(self.test_rows), 2),
            "dropped_long": len(source.rows) - len(rows) - len(long),
            "dropped_near_duplicates": len(rows) + len(long) - len(train) - len(self.test_rows),
            "set_aside": [],
        }

    def assemble(self, source: Source) -> None:
        set_seed(self.settings.seed)
        self.model = SpeechLLMForConditionalGeneration.from_speech_text_pretrained(
            source.speech_model,
            source.text_model,
            speech_revision=source.speech_revision,
            text_revision=source.text_revision,
            dtype=torch.bfloat16,  # on a CPU, the backward pass of bf16 eager attention is the fastest
            attn_implementation="eager",
            **PROJECTOR,
        )
        # An LLM that hears little falls into loops; transcripts rarely say the same three words twice.
        self.model.generation_config.no_repeat_ngram_size = 3
        self.processor = SpeechLLMProcessor.from_config(self.model.config)
        self.untrained = self.trained_state()
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        rule = self.model.config.speech_token_rule
        self.report["model"] = {
            "speech_encoder": "Whisper tiny.en (encoder)",
            "language_model": "SmolLM2-135M-Instruct",
            "trainable_parameters": trainable,
            "total_parameters": sum(p.numel() for p in self.model.parameters()),
            "speech_tokens_per_second": round(rule.frames_per_second / rule.window * rule.tokens_per_window, 2),
        }

    def trained_state(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    def load_trained(self, state: dict[str, torch.Tensor]) -> None:
        parameters = dict(self.model.named_parameters())
        for name, value in state.items():
            parameters[name].data.copy_(value)

    def common_arguments(self, name: str, steps: int) -> dict[str, Any]:
        return dict(
            output_dir=str(self.output / "training" / name),
            max_steps=steps,
            seed=self.settings.seed,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_steps=5,
            lr_scheduler_type="warmup_stable_decay",
            length_window=100,  # all rows of pretraining: with so little data, the least padding
            feature_cache=str(cache_directory() / "features"),
            per_device_eval_batch_size=28,
            dataloader_pin_memory=torch.cuda.is_available(),
        )

    # ---- pretraining -----------------------------------------------------------------------------------------------

    def pretrain(self, embedding_steps: int, all_steps: int) -> None:
        steps = embedding_steps + all_steps
        schedule = f"0:emb {embedding_steps}:all"
        arguments = ContrastiveArguments(
            **self.common_arguments("pretraining", steps),
            layer_schedule=schedule,
            per_device_train_batch_size=PRETRAINING_BATCH,
            learning_rate=1e-3,
            warmup_steps=20,
            lr_scheduler_kwargs={"num_decay_steps": all_steps // 2},
            text_state_cache=str(cache_directory() / "features"),
        )
        trainer = ContrastiveTrainer(self.model, arguments, self.train_rows, self.test_rows, self.processor)
        found: dict[str, Any] = {"recall_at_1": {}, "recall_at_5": {}, "similarity": {}}
        self.report["pretraining"] = {
            "layers": trainer.all_layers,
            "steps": steps,
            "schedule": schedule,
            "chance": 1 / len(self.test_rows),
            **found,
        }
        prepare_trainer(trainer)
        tokens = {"before": self.measure(trainer, "before")}
        trainer.add_callback(AtStep(embedding_steps, lambda _: self.measure(trainer, "after_embedding")))
        begin = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - begin
        tokens["after"] = self.measure(trainer, "after")
        self.pretrained = self.trained_state()
        self.save("pretrained", kind="projector")
        self.report["data"]["set_aside"] = [
            {"id": item.id, "reason": item.reason} for item in trainer.set_aside.values()
        ]
        self.report["pretraining"].update(
            seconds=round(seconds, 1),
            history=[log for log in trainer.state.log_history if "loss" in log],
            nearest_tokens=[
                {"id": row["id"], "text": row["text"], "before": before, "after": after}
                for row, before, after in zip(self.shown_rows(), tokens["before"], tokens["after"])
            ],
            llm_tokens=trainer.llm_tokens,
        )

    def measure(self, trainer: ContrastiveTrainer, moment: str) -> list[list[str]]:
        """Held-out retrieval and similarities into the report; the nearest LLM tokens of a few utterances."""
        metrics = trainer.evaluate(metric_key_prefix=moment)
        part = self.report["pretraining"]
        for k in (1, 5):
            part[f"recall_at_{k}"][moment] = {
                str(layer): metrics[f"{moment}_recall@{k}_layer_{layer}"] for layer in trainer.all_layers
            }
        print(f"        held-out recall@1, mean over layers, {moment.replace('_', ' ')}: "
              f"{metrics[f'{moment}_recall@1_mean']:.1%}", flush=True)  # fmt: skip
        if moment == "after_embedding":
            self.report.update(stage="pretraining at the LLM's input", next="pretraining at all layers")
            self.write()
            return []
        rows, states = trainer.held_out_states()
        matrices = trainer.similarity_matrices(states)
        layers = trainer.all_layers
        shown = sorted({layers[0], layers[len(layers) // 2], layers[-1]})
        part["similarity"]["layers"] = shown
        part["similarity"]["texts"] = [row["text"] for row in rows[:SHOWN_SIMILARITIES]]
        part["similarity"][moment] = {
            str(layer): rounded(matrices[layer][:SHOWN_SIMILARITIES, :SHOWN_SIMILARITIES]) for layer in shown
        }
        return nearest_tokens(self.model, self.processor, self.shown_rows())

    def shown_rows(self) -> list[Row]:
        return self.test_rows[:SHOWN_UTTERANCES]

    # ---- fine-tuning -----------------------------------------------------------------------------------------------

    def fine_tune(
        self, name: str, label: str, projector: dict[str, torch.Tensor], steps: int, trunk: Trunk | None = None
    ) -> None:
        """One arm: from the given projector, or where `trunk` ends, to step `steps`; its scores and answers into the
        report, and its own trunk into `self.trunk`."""
        set_seed(self.settings.seed)
        if self.settings.lora_rank and not self.adapter:
            add_lora(self.model, self.settings.lora_rank, LORA_ALPHA, self.settings.seed)
            self.adapter = {name: value for name, value in self.trained_state().items() if name not in projector}
        self.load_trained({**projector, **self.adapter})
        arguments = FineTuningArguments(
            **self.common_arguments(name, steps),
            per_device_train_batch_size=FINE_TUNING_BATCH,
            learning_rate=1e-3,
            bf16=True,
            warmup_steps=10,
            lr_scheduler_kwargs={"num_decay_steps": steps // 3},
            answer_noise=0.3,  # else the LLM goes on from its own words, which in minutes of speech it knows by heart
            max_new_tokens=48,
        )
        rows = joined_rows(self.train_rows + self.long_rows, JOINED_ROWS, JOINED_SECONDS, self.settings.seed)
        trainer = FineTuningTrainer(self.model, arguments, rows, self.test_rows, self.processor)
        prepare_trainer(trainer)
        spent = trunk or Trunk()
        begin, constant = time.monotonic(), steps - steps // 3

        def branch(control: TrainerControl) -> None:
            control.should_save = True
            folder = Path(arguments.output_dir) / f"checkpoint-{constant}"
            seconds = spent.seconds + time.monotonic() - begin
            self.trunk = Trunk(str(folder), seconds, spent.llm_tokens + trainer.llm_tokens)

        if trunk is None:
            trainer.add_callback(AtStep(constant, branch))
        trainer.train(resume_from_checkpoint=spent.checkpoint)
        seconds = spent.seconds + time.monotonic() - begin
        metrics = trainer.evaluate()
        llm_tokens = spent.llm_tokens + trainer.llm_tokens
        pretraining_tokens = self.report["pretraining"]["llm_tokens"] if projector is self.pretrained else 0
        arm = {
            "name": name,
            "label": label,
            "steps": steps,
            "seconds": round(seconds, 1),
            "trainable_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "loss": metrics["eval_loss"],
            "wer": metrics["eval_wer"],
            "cer": metrics["eval_cer"],
            "llm_tokens": llm_tokens,
            "llm_tokens_total": llm_tokens + pretraining_tokens,
            "history": [
                {"step": log["step"], "loss": log["loss"]} for log in trainer.state.log_history if "loss" in log
            ],
        }
        print(f"        {label}: WER {arm['wer']:.1%}, loss {arm['loss']:.3f}", flush=True)
        arms = self.report["fine_tuning"]["arms"]
        if not arms or arm["wer"] < min(other["wer"] for other in arms):
            self.best = (name, self.trained_state())
        arms.append(arm)
        self.add_samples(name, trainer.predictions)
        self.report["fine_tuning"]["verdict"] = verdict({arm["name"]: arm for arm in arms})

    def equal_compute_steps(self) -> int:
        """Fine-tuning steps that pass as many tokens through the LLM as pretraining and fine-tuning together did."""
        arm = self.report["fine_tuning"]["arms"][0]
        return max(arm["steps"], round(arm["steps"] * arm["llm_tokens_total"] / arm["llm_tokens"]))

    def add_samples(self, arm: str, predictions: dict[str, str]) -> None:
        samples = self.report.setdefault(
            "samples",
            [
                {"id": row["id"], "audio": row["audio"], "reference": row["text"], "hypotheses": {}, "wer": {}}
                for row in self.shown_rows()
            ],
        )
        for sample in samples:
            hypothesis = predictions.get(sample["id"], "")
            sample["hypotheses"][arm] = hypothesis
            sample["wer"][arm] = recognition_metrics([sample["reference"]], [hypothesis])["wer"]

    def save_best(self) -> None:
        """The best arm as a full checkpoint in `model/`."""
        name, trained = self.best
        self.load_trained(trained)
        self.save("model", kind="full")
        self.report["fine_tuning"]["best"] = name

    def save(self, name: str, kind: str) -> None:
        with explained_saving(self.output / name):
            self.model.save_pretrained(self.output / name, kind=kind)
            self.processor.save_pretrained(self.output / name)


class ProgressBar(ProgressCallback):
    """A progress bar without the logs, which are in the report."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass


class AtStep(TrainerCallback):
    """Calls `action` once, after optimiser step `step`."""

    def __init__(self, step: int, action: Callable[[TrainerControl], Any]):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action(control)


def prepare_trainer(trainer: SpeechLLMTrainer) -> None:
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressBar)
    trainer.add_callback(GiveMemoryBack)


def verdict(arms: dict[str, dict[str, Any]]) -> str:
    """What the arms say about pretraining, in words: at equal steps, and at equal compute."""
    pretrained, sentences = arms["pretrained"], []
    for name, condition in (("scratch_equal_steps", "equal steps"), ("scratch_equal_compute", "equal compute")):
        if (scratch := arms.get(name)) is None:
            continue
        better = [measure for measure in ("loss", "wer") if pretrained[measure] < scratch[measure]]
        outcome = {2: "wins", 1: f"wins in {' '.join(better)} only", 0: "loses"}[len(better)]
        sentences.append(
            f"At {condition} the pretrained projector {outcome}: WER {pretrained['wer']:.1%} against {scratch['wer']:.1%}, "
            f"loss {pretrained['loss']:.3f} against {scratch['loss']:.3f}."
        )
    if sentences:
        sentences.append("One seed on minutes of speech: a direction, not a measurement.")
    return " ".join(sentences)


def minutes_of(rows: list[Row]) -> float:
    return sum(row["duration"] for row in rows) / 60


def rounded(matrix: torch.Tensor) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in matrix.tolist()]
