"""Checkpoints of a training: the trained weights, with a summary for the model card, and what exact resumption needs."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpoint_speechllm import ADAPTER_CONFIG, ADAPTER_FOLDER, PROJECTOR_WEIGHTS, CheckpointError
from ..saving import explained_saving
from .zero import ZeroTrainer


class CheckpointingTrainer(ZeroTrainer):
    """`Trainer` that saves and loads checkpoints of a SpeechLLM (`speechllm`), and where its `stream`, if it has one, was."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        if state_dict is not None and self.model is not self.speechllm:
            # The head is no part of what is trained. A tied one is the embedding table: of split weights, a part.
            tied = self.speechllm.all_tied_weights_keys
            head = {
                k: v for k, v in self.speechllm.state_dict().items() if not k.startswith("model.") and k not in tied
            }
            state_dict = head | {f"model.{k}": v for k, v in state_dict.items()}
        values = {name: str(value) for name, value in asdict(self.args).items() if not name.endswith("_token")}
        with explained_saving(folder):
            self.speechllm.save_pretrained(folder, state_dict=state_dict)
            self.processing_class.save_pretrained(folder)
            (folder / "training_args.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
            self.save_summary(folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            with explained_saving(folder):
                super()._save_checkpoint(model, trial)
        except CheckpointError:
            if not (folder / TRAINER_STATE_NAME).is_file():  # written last: whole, if it was the upload that failed
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self.accelerator.scaler is not None:  # none where the run goes on without fp16
            super()._load_scaler(checkpoint)

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        for callback in self.callback_handler.callbacks:  # `Trainer` would save only those that the checkpoint knows
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())

    def _positions_file(self, folder: str | Path) -> Path:
        return Path(folder) / f"stream_{self.args.process_index}.pt"

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # Each process has its own, as with the states of the generators; the rows in it hold tensors, bytes and numbers,
        # so it is a PyTorch file as theirs are, and read as theirs: with `weights_only=True`.
        if self.stream is not None:
            state = {"readers": asdict(self._stream_readers()), "plan": self._stream_plan, "positions": self._positions}
            torch.save(state, self._positions_file(output_dir))

    @property
    def _stream_plan(self) -> dict[str, int]:
        """Settings on which it depends what batch is which."""
        args = self.args
        return {
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "data_seed": self._seed,
            "stream_buffer": args.stream_buffer,
            "length_window": args.length_window,
        }

    def _load_positions(self, folder: str | Path) -> None:
        path = self._positions_file(folder)
        if not path.is_file():
            raise CheckpointError(
                f"{folder} does not say where the stream was ({path.name} is missing): it was saved by a run without a "
                "stream, or on fewer processes. Resume as it was started, or start anew with its weights as --model."
            )
        state = torch.load(path, weights_only=True)
        if state["readers"] != asdict(self._stream_readers()):
            raise CheckpointError(
                f"{folder} is from a run with {state['readers']['processes']} process(es) of "
                f"{state['readers']['workers']} data worker(s), each with its share of the stream. Resume with as many."
            )
        plan = self._stream_plan
        if changed := [f"{name} was {was}" for name, was in state["plan"].items() if was != plan[name]]:
            raise CheckpointError(
                f"{folder} is from a run whose stream was dealt out otherwise: {', '.join(changed)}. Resume with the same, or "
                "start anew with its weights as --model."
            )
        self._positions = state["positions"]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:  # by now the weights are split; Accelerate has saved them in a file of its own
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        folder = Path(resume_from_checkpoint)
        if (folder / PROJECTOR_WEIGHTS).is_file():
            self.speechllm.load_trained_weights(folder)
            return
        if not (files := sorted(folder.glob("model*.safetensors"))):
            raise CheckpointError(
                f"{folder} holds neither {PROJECTOR_WEIGHTS} nor model.safetensors; resume elsewhere."
            )
        saved = {name: tensor for file in files for name, tensor in load_file(file).items()}
        own = {name.replace(".base_layer.", "."): name for name in self.speechllm.state_dict()}  # beside LoRA
        weights = {own.get(name, name): tensor for name, tensor in saved.items()}
        self.speechllm.load_state_dict(weights, strict=False)
        trained = {n for n, p in self.speechllm.named_parameters() if p.requires_grad and "lora_" not in n}
        if missing := sorted(trained - weights.keys()):
            raise CheckpointError(f"{folder} lacks the trained weights {missing[:5]}; resume elsewhere.")
        if (folder / ADAPTER_FOLDER / ADAPTER_CONFIG).is_file():
            self.speechllm.load_trained_adapter(folder / ADAPTER_FOLDER)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:  # which has the weights in float32 to restore too
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint, self.model)
