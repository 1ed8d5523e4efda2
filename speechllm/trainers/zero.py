"""DeepSpeed's ZeRO stages 1 and 2, which leave weights whole: what is saved is what other trainers save.

Their checkpoints hold the trained weights only, and `save_model` writes the projector and LoRA in float32, which DeepSpeed
keeps beside the 16 bits of the forward pass.
"""

from functools import partial
from typing import Any

import torch

from .pushing import PushingTrainer


class ZeroTrainer(PushingTrainer):
    """`Trainer` that saves under ZeRO stages 1 and 2 as without DeepSpeed."""

    @property
    def _zero_leaves_weights_whole(self) -> bool:
        return self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage < 3

    def create_scheduler(self, *args: Any, **kwargs: Any):
        """The first step after DeepSpeed has wrapped the model, and before it loads a checkpoint."""
        if self._zero_leaves_weights_whole:
            _leave_out_frozen_weights(self.accelerator.deepspeed_engine_wrapped.engine)
        return super().create_scheduler(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self._zero_leaves_weights_whole:
            super().save_model(output_dir, _internal_call)
            return
        # `Trainer` would have every process copy the whole model, an LLM's tied head as a further matrix, and save the
        # trained weights in the 16 bits of the forward pass.
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        state_dict = {name: value for name, value in self.model.state_dict().items() if name not in tied}
        self._save(output_dir, state_dict | self._weights_in_float32())
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _weights_in_float32(self) -> dict[str, torch.Tensor]:
        """DeepSpeed's float32 weights of what is float32 whatever the LLM's dtype, where it has made them 16-bit. All
        processes must ask, as each has a part."""
        if self.deepspeed is None:  # nothing has been trained
            return {}
        from deepspeed.utils import safe_get_full_fp32_param

        return {
            name: safe_get_full_fp32_param(parameter).cpu()
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
            and parameter.dtype != torch.float32
            and ("projector." in name or "lora_" in name)
        }


def _leave_out_frozen_weights(engine: Any) -> None:
    """Have DeepSpeed's part of checkpoints hold trained weights only."""
    if not isinstance(engine.save_checkpoint, partial):
        load = engine.load_checkpoint
        engine.save_checkpoint = partial(engine.save_checkpoint, exclude_frozen_parameters=True)
        engine.load_checkpoint = lambda folder, **options: load(folder, **{**options, "load_module_strict": False})
