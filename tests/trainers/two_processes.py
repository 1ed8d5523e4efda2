"""Short training runs, for one process or for two."""

import os
import re
import socket

import torch
import torch.multiprocessing
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from tiny import tone
from tiny_training import contrastive, fine_tuning, gradient_of, tiny_rows, tiny_trainable, uneven_rows, weights_of
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
    "own caches": {"own": "feature_cache"},  # as on two machines that share no folder
    "own text caches": {"own": "text_state_cache"},
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
    if own := options.pop("own", None):
        options[own] = str(folder / f"cache of {PartialState().process_index}")
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
    try:
        trainer = contrastive(folder / "run", model, rows, per_device_train_batch_size=8 // processes, **options)
        watch = Watch(trainer)
        trainer.add_callback(watch)
        trainer.train()
    except (ValueError, OSError) as error:
        return {"error": str(error)}
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {
        "logs": [{k: v for k, v in log.items() if k.startswith(("loss", "temp", "weight", "extra"))} for log in logs],
        "gradients": watch.gradients,
        "weights": weights_of(trainer.speechllm.model.projector),
    }


def with_silence(count):
    """Rows of which some cannot be used, so that one process has fewer chunks of a batch than the other."""
    rows = uneven_rows(count)
    for row in rows[::5]:
        row["audio"] = row["audio"] * 0
    return rows


def split_weights():
    """Have Accelerate split weights over the processes (FSDP2), as `recipes/accelerate/fsdp2.yaml` does.

    It does so on accelerators only, so that gloo's processes on CPUs pass for GPUs here.
    """
    os.environ.update(
        ACCELERATE_USE_FSDP="true",
        FSDP_VERSION="2",
        FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
        FSDP_RESHARD_AFTER_FORWARD="true",
        FSDP_CPU_RAM_EFFICIENT_LOADING="false",
        FSDP_STATE_DICT_TYPE="FULL_STATE_DICT",
    )
    init = PartialState.__init__

    def as_gpus(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if self._shared_state["distributed_type"] == DistributedType.MULTI_CPU:  # not where it is FSDP already
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = as_gpus


def run_sharded(folder, processes=1):
    """Pretraining and fine-tuning, each at once and resumed from half-way; losses, weights, and what evaluation says."""
    if processes > 1:
        split_weights()
    common = {"learning_rate": 1e-3, "warmup_steps": 0, "length_window": 0, "max_steps": 4, "lr_scheduler_type": "constant",
              "per_device_train_batch_size": 8 // processes, "per_device_eval_batch_size": 1}  # fmt: skip

    def train(kind, make, part="whole", resume=None, rows=tiny_rows, **options):
        torch.manual_seed(0)
        model = tiny_trainable()
        vocabulary = range(model.config.text_config.vocab_size)
        model.generation_config.eos_token_id = [*vocabulary[::5]]  # answers of any length
        trainer = make(folder / kind / part, model, rows(24), rows(32)[28:], **common, **options)
        trainer.train(resume_from_checkpoint=resume)
        if processes > 1:
            assert trainer.is_fsdp_enabled
            assert sum(p.to_local().numel() for p in trainer.model.parameters()) < 0.6 * trainer.model.num_parameters()
        return trainer

    found = {}
    for kind, make, options in (
        ("pretraining", contrastive, {"layers": "0,2", "symmetric": True}),
        ("terms", contrastive, {"layers": "0,2", "gradcache_chunk": 3, "rows": with_silence, **TERMS}),
        ("fine-tuning", fine_tuning, {"predict_with_generate": True, "max_new_tokens": 12, "rows": with_silence}),
    ):
        whole = train(kind, make, save_strategy="steps", save_steps=2, **options)
        evaluation = whole.evaluate()
        halfway = folder / kind / "whole" / "checkpoint-2"
        resumed = train(kind, make, "resumed", resume=str(halfway), **options)
        whole.save_model(str(folder / kind / f"saved by {processes}"))
        found[kind] = {
            "losses": [log["loss"] for log in whole.state.log_history if "loss" in log],
            "resumed": [log["loss"] for log in resumed.state.log_history if "loss" in log],
            "evaluation": {name: value for name, value in evaluation.items() if re.search("loss|rank|wer", name)},
        }
    return found


def run_zero(folder, processes=1):
    """Both stages by DeepSpeed's ZeRO-2, at once and resumed from half-way: losses, and where `save_model` saved."""
    common = {"learning_rate": 1e-3, "warmup_steps": 1, "length_window": 0, "max_steps": 4, "max_grad_norm": 0.5,
              "per_device_train_batch_size": 8 // processes, "per_device_eval_batch_size": 1}  # fmt: skip
    pretraining = {"layers": "0,2", "symmetric": True}

    def train(name, make, part, resume=None, rows=tiny_rows, **options):
        if processes > 1:
            options["deepspeed"] = {
                "zero_optimization": {"stage": 2},
                "bf16": {"enabled": "auto"},
                **dict.fromkeys(("train_micro_batch_size_per_gpu", "train_batch_size"), "auto"),
                **dict.fromkeys(("gradient_accumulation_steps", "gradient_clipping"), "auto"),
            }
        torch.manual_seed(0)
        model = tiny_trainable("llama-untied" if name == "head" else "llama-tied")
        trainer = make(folder / name / part, model, rows(24), rows(32)[28:], **{**common, **options})
        trainer.train(resume_from_checkpoint=resume)
        assert processes == 1 or type(trainer.model_wrapped).__name__ == "DeepSpeedEngine"
        return trainer

    found = {}
    for name, make, options in (
        ("learned", contrastive, {**pretraining, "temperature_learned": True, "layer_weights": "learned"}),
        ("accumulated", contrastive, {**pretraining, "gradient_accumulation_steps": 2}),
        ("terms", contrastive, {**pretraining, "rows": with_silence, **TERMS}),
        ("lora", fine_tuning, {"lora_rank": 4, "rows": with_silence}),
        ("llm", fine_tuning, {"train_llm": True, "rows": with_silence}),
        ("head", contrastive, {**pretraining, "rows": uneven_rows, "bf16": True, **TERMS}),
        ("bf16", fine_tuning, {"lora_rank": 4, "rows": with_silence, "bf16": True}),
    ):
        whole = train(name, make, "whole", save_strategy="steps", save_steps=2, **options)
        evaluation = whole.evaluate()
        whole.save_model(str(folder / name / "saved"))
        resumed = train(name, make, "resumed", str(folder / name / "whole" / "checkpoint-2"), **options)
        found[name] = {
            "losses": [log["loss"] for log in whole.state.log_history if "loss" in log],
            "resumed": [log["loss"] for log in resumed.state.log_history if "loss" in log],
            "evaluation": {metric: value for metric, value in evaluation.items() if re.search("loss|rank", metric)},
        }
    return found


def start(rank, folder, names, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process that this one is a copy of
    groups = {"sharded": run_sharded, "zero": run_zero}
    found = {name: groups[name](folder, 2) if name in groups else run(name, folder, 2) for name in names}
    torch.save(found, folder / f"{rank}.pt")


def run_twice(folder, names):
    """`run` all `names` on two processes; what each of them returned. (Copies of this one: new ones import for seconds.)"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(start, (folder, names, port), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
