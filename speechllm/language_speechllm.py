"""What a SpeechLLM needs of a causal language model besides running it, whatever its architecture:

1. its body and its head apart (`split_causal_lm`), since training on hidden states needs no head;
2. its hidden states at some layers, and no layer beyond the last of them run (`layer_states`).
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast


@dataclass
class GivenBodyOutput(BaseModelOutputWithPast):
    """With all that some LLM's head looks for in its body's output."""

    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None


class GivenBody(nn.Module):
    """Stands in for a causal LM's body, so that the LM maps given hidden states to logits exactly as it would its own
    (bias, soft-capping, scaling included), whatever its architecture."""

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **kwargs):
        return GivenBodyOutput(last_hidden_state=inputs_embeds)

    @property
    def decoder(self) -> "GivenBody":  # which some LLMs (OPT) run instead of the body around it
        return self

    def get_input_embeddings(self):
        raise NotImplementedError("A head has no embedding table.")  # as Transformers has it where there is none


def split_causal_lm(causal_lm: PreTrainedModel, tie: bool) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A causal LM -> its body, and what remains of it: a head that takes hidden states as `inputs_embeds`. The tie
    between the two, if any, is for the caller to keep."""
    body, prefix, output = causal_lm.base_model, causal_lm.base_model_prefix, causal_lm.get_output_embeddings()
    setattr(causal_lm, prefix, GivenBody())
    causal_lm._tied_weights_keys, causal_lm.all_tied_weights_keys = None, {}
    causal_lm._tp_plan = {k: v for k, v in (causal_lm._tp_plan or {}).items() if not k.startswith(f"{prefix}.")}
    if not tie and output.weight is body.get_input_embeddings().weight:
        output.weight = nn.Parameter(output.weight.detach().clone())
    return body, causal_lm


def layer_states(
    language_model: PreTrainedModel, layers: list[int], inputs_embeds: torch.Tensor, **kwargs
) -> dict[int, torch.Tensor]:
    """Hidden states (batch, length, hidden size) of an LLM's body at the given indices, counted as in Transformers'
    `output_hidden_states`: 0 is the LLM's input, k is after layer k, the last is after the final norm.

    With `[0]`, or none, the LLM does not run; where it adds learned positions to its input, as GPT-2 and OPT do, state 0 lacks
    them.

    inputs_embeds: (batch, length, hidden size); kwargs: for the LLM, e.g. `attention_mask`.
    """
    owner, name, stack = layer_stack(language_model)
    last, depth = max(layers, default=0), len(stack)
    if min(layers, default=0) < 0 or last > depth:
        raise ValueError(f"layers {layers}: this LLM has hidden states 0 (its input) to {depth} (its output).")
    states = {0: inputs_embeds} if 0 in layers else {}
    if last == 0:
        return states

    def keep(index):
        def hook(module, args, output):
            states[index] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [stack[index - 1].register_forward_hook(keep(index)) for index in layers if 0 < index < depth]
    setattr(owner, name, stack[:last])
    try:
        output = language_model(inputs_embeds=inputs_embeds, use_cache=False, return_dict=True, **kwargs)
    finally:
        setattr(owner, name, stack)
        for hook in hooks:
            hook.remove()
    if last == depth:
        states[depth] = output.last_hidden_state
    return {index: states[index] for index in layers}


def layer_stack(language_model: PreTrainedModel) -> tuple[nn.Module, str, nn.ModuleList]:
    """The module that holds an LLM's list of layers (some have a decoder around it), its name there, and the list."""
    count = language_model.config.num_hidden_layers
    for owner in (language_model, *language_model.children()):
        for name, child in owner.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return owner, name, child
    raise ValueError(f"{type(language_model).__name__} has no list of {count} layers; per-layer states need one.")
