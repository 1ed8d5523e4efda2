"""LoRA matrices folded into the weights that they change: W <- W + (alpha / r) B A, in float32, rounded once."""

import torch


def merge_adapter(model, dtype: torch.dtype) -> None:
    """Fold a model's PEFT adapter into its weights, in place, and cast all but the projector to `dtype`.

    Raises:
        ValueError: if the model has no adapter.
    """
    if not getattr(model, "peft_config", None):
        raise ValueError(
            f"{model.name_or_path} has no adapter to merge. Leave out --merge-lora; --full is what is left."
        )
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            base = layer.get_base_layer().float()
            layer.merge(safe_merge=True)  # which refuses weights that are not finite
            model.set_submodule(name, base)
        elif isinstance(layer, ModulesToSaveWrapper):
            model.set_submodule(name, layer.modules_to_save[layer.active_adapters[0]])
    del model.peft_config
    model._hf_peft_config_loaded = False
    model.config.base_models = None  # their weights are no longer this model's
    cast_frozen(model, dtype)


def cast_frozen(model, dtype: torch.dtype) -> None:
    """Cast the encoder's and the LLM's parameters; the projector stays in float32, as it was trained."""
    for name, parameter in model.named_parameters():
        if "projector." not in name and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
