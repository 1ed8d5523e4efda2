"""What the objectives of stage 1 see: both sides' hidden states of a batch, behind a prefix that both share."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..objectives.layers import mean_pooled


@dataclass(frozen=True)
class AlignedStates:
    """What an objective sees of a batch.

    text, speech: layer -> (batch, length, dim); text_mask, speech_mask: (batch, length), `True` = counts (the shared
    prefix and padding do not). speech_tokens: (all speech tokens of the batch, dim), the projector's output. batch: as
    the collator made it. model: the module under training, for objectives that need a pass of their own.
    """

    text: dict[int, torch.Tensor]
    text_mask: torch.Tensor
    speech: dict[int, torch.Tensor]
    speech_mask: torch.Tensor
    speech_tokens: torch.Tensor
    batch: dict[str, Any]
    model: torch.nn.Module


# An objective returns `loss` and any named parts of it: means over a batch, which are averaged over accumulated batches,
# processes and chunks. (Exact for means over utterances; the terms of `ObjectiveTerms` are exact whatever they count.)
Objective = Callable[[AlignedStates], dict[str, torch.Tensor]]


def pool(states: AlignedStates) -> AlignedStates:
    """Each side's valid tokens replaced by their mean: lengths become 1."""
    text, text_mask = mean_pooled(states.text, states.text_mask)
    speech, speech_mask = mean_pooled(states.speech, states.speech_mask)
    return replace(states, text=text, text_mask=text_mask, speech=speech, speech_mask=speech_mask)


def first_items(states: AlignedStates, count: int) -> AlignedStates:
    """The states of the first `count` utterances, still in the graph."""

    def first(values: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        return {layer: state[:count] for layer, state in values.items()}

    return replace(
        states,
        text=first(states.text),
        text_mask=states.text_mask[:count],
        speech=first(states.speech),
        speech_mask=states.speech_mask[:count],
    )
