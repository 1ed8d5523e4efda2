"""Short training runs, for one process or for two."""

import os
import socket

import torch
import torch.multiprocessing
from accelerate.state import AcceleratorState
from tiny import tone
from tiny_training import contrastive, gradient_of, tiny_rows, tiny_trainable, uneven_rows, weights_of
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import TrainerCallback

from speechllm.objectives import masked_mean
from speechllm.objectives.layers import SIMILARITIES


def late_interaction(text, text_mask, speech, speech_mask):
    """A similarity of tokens: each text token's best match, averaged."""
    products = torch.einsum("ild,jmd->ijlm", text.float(), speech.float()).masked_fill(
        ~speech_mask[None, :, None], -1e4
    )
    weights = text_mask / text_mask.sum(-1, keepdim=True).clamp(min=1)
    return (products.amax(-1) * weights[:, None]).sum(-1) / 100


def scale(states):
    """A further term, a mean over utterances."""
    return {"loss": masked_mean(states.speech[0], states.speech_mask).square().mean()}


class Watch(TrainerCallback):
    """Keeps the projector's gradient, averaged over processes, before each step of the optimiser."""

    def __init__(self, trainer):
        self.trainer, self.gradients = trainer, []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.gradients.append(gradient_of(self.trainer.speechllm).clone())


TERMS = {"next_token_weight": 0.5, "mixed_weight": 0.25, "distillation_weight": 2.0, "norm_weight": 0.1}
RUNS = {
    "cosine": {"symmetric": True},
    "tokens": {"similarity": late_interaction},
    "wasserstein": {"similarity": SIMILARITIES["wasserstein"], "symmetric": True},
    "accumulated": {"gradient_accumulation_steps": 2},
    "gradcache": {"gradcache_chunk": 3, "symmetric": True, "objectives": {"scale": (0.1, scale)}},
    "gradcache tokens": {"gradcache_chunk": 3, "similarity": late_interaction, "gradient_accumulation_steps": 2},
    "unusable": {"unusable": [4, 5, 6, 7]},  # all that the second of two processes has
    "unusable gradcache": {"unusable": [1, 4, 5, 6, 7], "gradcache_chunk": 2},
    "learned": {"temperature_learned": True, "layer_weights": "learned", "learning_rate": 1e-3, "max_steps": 3},
    "negatives": {"symmetric": True, "text_bank": 3, "hard_negatives": 2, "hard_negatives_refresh": 2, "max_steps": 3},
    "negatives of tokens": {"symmetric": True, "text_bank": 3, "hard_negatives": 1, "similarity": late_interaction},
    "terms": {"rows": uneven_rows, **TERMS},
    "terms gradcache": {"rows": uneven_rows, "gradcache_chunk": 3, **TERMS},
    "terms unusable": {"rows": uneven_rows, "unusable": [1, 4, 5, 6, 7], "contrastive_weight": 0.0, **TERMS},
    "per device": {"gather_negatives": False},
    "not finite": {"not_finite": [5]},
}


def run(name, folder, processes=1):
    """Train on global batches of eight; returns losses, gradients and weights, or the error."""
    options = {
        "max_steps": 2,
        "layers": "0,2",
        "max_grad_norm": 0.0,
        "warmup_steps": 0,
        "length_window": 0,
        **RUNS[name],
    }
    unusable, not_finite = options.pop("unusable", []), options.pop("not_finite", [])
    rows = options.pop("rows", tiny_rows)(8 if unusable or not_finite else 24)
    if unusable or not_finite:
        probe = contrastive(folder, train=rows, per_device_train_batch_size=8 // processes, **options)
        probe.get_train_dataloader()
        order = [row for batch in probe.batch_sampler for row in batch]
        for place in unusable:
            rows[order[place]]["audio"] = tone(0.2) * 0
    if "text_bank" in options:
        options["text_state_cache"] = str(folder / "cache")
    model = tiny_trainable()
    if not_finite:
        text = rows[order[not_finite[0]]]["text"]

        def break_states(module, args, kwargs, output):
            ids = kwargs.get("input_ids")
            for i, row in enumerate(ids if kwargs.get("layers") and ids is not None else []):
                if probe.processing_class.tokenizer.decode(row, skip_special_tokens=True).endswith(text):
                    output.layer_states[2][i] = torch.nan
            return output

        model.model.register_forward_hook(break_states, with_kwargs=True)
    trainer = contrastive(folder / "run", model, rows, per_device_train_batch_size=8 // processes, **options)
    watch = Watch(trainer)
    trainer.add_callback(watch)
    try:
        trainer.train()
    except ValueError as error:
        return {"error": str(error)}
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {
        "logs": [{k: v for k, v in log.items() if k.startswith(("loss", "temp", "weight", "extra"))} for log in logs],
        "gradients": watch.gradients,
        "weights": weights_of(trainer.speechllm.model.projector),
    }


def run_sharded(folder, processes):
    """Two steps by hand, the weights split over processes by FSDP2 (if there are several); losses and the weights after.

    Accelerate takes its FSDP plugin on accelerators only; this is what it does there.
    """
    options = {"layers": "0,2", "symmetric": True, "length_window": 0, "learning_rate": 1e-3}
    trainer = contrastive(
        folder, tiny_trainable(), tiny_rows(24), per_device_train_batch_size=8 // processes, **options
    )
    if processes > 1:
        mesh = init_device_mesh("cpu", (processes,))
        for layer in trainer.model.llm_layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(trainer.model, mesh=mesh)
        assert sum(p.to_local().numel() for p in trainer.model.parameters()) < 0.6 * trainer.model.num_parameters()
    optimizer = torch.optim.AdamW([p for p in trainer.model.parameters() if p.requires_grad], lr=1e-3)
    trainer.model.train()
    losses = []
    for batch, _ in zip(trainer.get_train_dataloader(), range(3)):
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    weights = get_model_state_dict(trainer.model, options=StateDictOptions(full_state_dict=True))
    return {"losses": losses, "weights": {k: v for k, v in weights.items() if k.startswith("projector")}}


def start(rank, folder, names, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process that this one is a copy of
    found = {name: run_sharded(folder, 2) if name == "sharded" else run(name, folder, 2) for name in names}
    torch.save(found, folder / f"{rank}.pt")


def run_twice(folder, names):
    """`run` all `names` on two processes; what each of them returned. (Copies of this one: new ones import for seconds.)"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(start, (folder, names, port), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
