"""Scalars of the loss that are learned along with the projector: the temperature, and the weights of layers.

- Temperature (CLIP, arXiv 2103.00020): tau = exp(t), t learned, tau kept at or above 0.01.
- Weights of layers (Kendall et al., arXiv 1705.07115, for likelihoods of classes): layer l contributes
  exp(-s_l) L_l + s_l / 2. Learned convex weights would all go to the layer whose loss is smallest; here a layer's weight
  is 1 / (2 L_l) at the optimum, whatever the others do, and s_l / 2 is the price of turning a layer down. Weights are kept
  within 0.1 and 10, so that a layer with hardly any loss left does not take over.

They belong to the loss and not to the model: they have an optimiser of their own (AdamW without decay, at the model's
learning rate), which works whatever DDP, FSDP or DeepSpeed make of the model's, and a file of their own in checkpoints.
"""

import math
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback

from ..checkpoint_speechllm import CheckpointError
from ..objectives.gathering import several_processes


FILE = "loss_scalars.safetensors"
LOWEST_TEMPERATURE = 0.01
LARGEST_WEIGHT = 10.0


class LearnedScalars(TrainerCallback):
    """The scalars and their optimiser, which steps along with the trainer's.

    Args:
        temperature: where to start; `None`: it is not learned.
        layers: those whose weights are learned.
        trainer: whose loss it is.
    """

    def __init__(self, temperature: float | None, layers: list[int], trainer: Trainer):
        self.trainer = trainer
        device = trainer.args.device
        self.log_variances = {layer: nn.Parameter(torch.zeros((), device=device)) for layer in layers}
        self.log_temperature = None
        if temperature is not None:
            self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature), device=device))
        self.parameters = {f"log_variance_{layer}": value for layer, value in self.log_variances.items()}
        if self.log_temperature is not None:
            self.parameters["log_temperature"] = self.log_temperature
        args = trainer.args
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=0.0,
        )

    def weights(self, layers: list[int]) -> dict[int, torch.Tensor]:
        """Of those of `layers` that are learned."""
        return {layer: torch.exp(-self.log_variances[layer]) for layer in layers if layer in self.log_variances}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters.values()]
        gradient = torch.stack(gradients)
        if several_processes():
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
        accelerator, skipped = self.trainer.accelerator, False
        if accelerator.scaler is not None:  # float16: losses are scaled
            gradient /= accelerator.scaler.get_scale()
        elif self.trainer.is_deepspeed_enabled:  # which scales losses itself, and has made its step by now
            gradient /= getattr(self.trainer.deepspeed.optimizer, "cur_scale", 1.0)
            skipped = accelerator.optimizer_step_was_skipped
        if gradient.isfinite().all() and not skipped:  # as the model's optimiser, which skips a step that overflowed
            for parameter, value in zip(self.parameters.values(), gradient):
                parameter.grad = value.clone()
            self.optimizer.param_groups[0]["lr"] = self.trainer._get_learning_rate()
            self.optimizer.step()
            with torch.no_grad():
                for log_variance in self.log_variances.values():
                    log_variance.clamp_(-math.log(LARGEST_WEIGHT), math.log(LARGEST_WEIGHT))
                if self.log_temperature is not None:
                    self.log_temperature.clamp_(min=math.log(LOWEST_TEMPERATURE))
        self.optimizer.zero_grad()

    def save(self, folder: str) -> None:
        """The scalars under their names, and under `name.` each one's tensors in the optimiser."""
        tensors = {name: parameter.detach() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            tensors |= {f"{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        save_file(tensors, Path(folder) / FILE)

    def load(self, folder: str) -> None:
        path = Path(folder) / FILE
        saved = load_file(path) if path.is_file() else {}
        found = {name for name in saved if "." not in name}
        if found != self.parameters.keys():
            raise CheckpointError(
                f"{folder} holds the learned scalars {sorted(found)}, but the settings ask for "
                f"{sorted(self.parameters)}. Resume with the settings of that run, or begin a new one."
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(saved[name])
        state = self.optimizer.state_dict()
        for number, name in enumerate(self.parameters):
            own = {key.removeprefix(f"{name}."): value for key, value in saved.items() if key.startswith(f"{name}.")}
            state["state"] |= {number: own} if own else {}
        self.optimizer.load_state_dict(state)
