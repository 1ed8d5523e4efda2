"""The layerwise contrastive loss of arXiv 2412.15712 (Section 3.2): InfoNCE at several of the LLM's hidden states.

L = sum over layers l of  w_l * InfoNCE( similarity(text states at l, speech states at l) / tau )
"""

from collections.abc import Callable

import torch

from .info_nce import info_nce
from .similarity import cosine_similarity_matrix


Similarity = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
SIMILARITIES: dict[str, Similarity] = {"cosine": cosine_similarity_matrix}


def parse_layers(layers: str, depth: int) -> list[int]:
    """Names of layer sets -> hidden-state indices.

    Args:
        layers: `"emb"`: [0], the LLM's input embeddings; `"all"`: every fifth and the last, as in the paper; or
            indices, e.g. `"0,4,8"` (negative ones count from the last: -1).
        depth: number of the LLM's layers, hence index of its last hidden state.

    Raises:
        ValueError: if the text is none of these or an index does not exist.
    """
    if layers == "emb":
        return [0]
    if layers == "all":
        return sorted({*range(0, depth, 5), depth})
    try:
        indices = [int(part) for part in layers.replace(",", " ").split()]
    except ValueError:
        indices = []
    resolved = sorted({index + depth + 1 if index < 0 else index for index in indices})
    if not resolved or resolved[0] < 0 or resolved[-1] > depth:
        raise ValueError(f"layers is {layers!r}; use 'emb', 'all', or indices from 0 to {depth} such as '0,5,{depth}'.")
    return resolved


def parse_layer_schedule(schedule: str, depth: int) -> list[tuple[int, list[int]]]:
    """`"0:emb 300:all"` -> [(first step, layers), ...], in order.

    Raises:
        ValueError: if a part is not `step:layers`, or the first does not begin at step 0.
    """
    stages = []
    for part in schedule.split():
        step, separator, layers = part.partition(":")
        if not separator or not step.isdigit():
            raise ValueError(f"layer_schedule is {schedule!r}; write it as 'step:layers ...', e.g. '0:emb 300:all'.")
        stages.append((int(step), parse_layers(layers, depth)))
    stages.sort(key=lambda stage: stage[0])
    if not stages or stages[0][0] != 0:
        raise ValueError(f"layer_schedule is {schedule!r}; its first part must begin at step 0, e.g. '0:emb 300:all'.")
    if len({step for step, _ in stages}) < len(stages):
        raise ValueError(f"layer_schedule is {schedule!r}; two of its parts begin at the same step. Remove one.")
    return stages


def layerwise_contrastive_loss(
    text_states: dict[int, torch.Tensor],
    text_mask: torch.Tensor,
    speech_states: dict[int, torch.Tensor],
    speech_mask: torch.Tensor,
    *,
    similarity: str | Similarity = "cosine",
    temperature: float = 0.1,
    layer_weights: dict[int, float] | None = None,
    symmetric: bool = False,
) -> dict[str, torch.Tensor]:
    """Sum over layers of InfoNCE between texts and utterances of a batch; text i belongs with utterance i.

    Args:
        text_states, speech_states: layer -> (batch, length, dim).
        text_mask, speech_mask: (batch, length), `True` = valid; shared by all layers.
        similarity: `"cosine"` or any function `(text, text_mask, speech, speech_mask) -> (batch, batch)`.
        temperature, symmetric: see `info_nce`.
        layer_weights: layer -> weight, 1 where absent.

    Returns:
        `loss`, the weighted sum, and `layer_<l>`, the unweighted loss of each layer, in nats.

    Raises:
        ValueError: if a state holds NaN or infinity, naming layer, side and batch items; if the layers differ.
    """
    if text_states.keys() != speech_states.keys():
        raise ValueError(f"Text has states of layers {sorted(text_states)}, speech of {sorted(speech_states)}.")
    measure = SIMILARITIES[similarity] if isinstance(similarity, str) else similarity
    losses = {}
    for layer, text in text_states.items():
        matrix = measure(text, text_mask, speech_states[layer], speech_mask)
        if not matrix.isfinite().all():
            raise ValueError(
                f"The similarities at layer {layer} are not finite: "
                f"{_not_finite('text', text, text_mask)}{_not_finite('speech', speech_states[layer], speech_mask)}"
                "check these items' audio and text, or lower the learning rate."
            )
        losses[layer] = info_nce(matrix, temperature=temperature, symmetric=symmetric)
    weights = layer_weights or {}
    total = sum(weights.get(layer, 1.0) * loss for layer, loss in losses.items())
    return {"loss": total, **{f"layer_{layer}": loss for layer, loss in losses.items()}}


def _not_finite(side: str, states: torch.Tensor, mask: torch.Tensor) -> str:
    valid = states.masked_fill(~mask.bool()[:, :, None], 0)
    items = torch.nonzero(~valid.isfinite().flatten(1).all(1)).flatten().tolist()
    return f"{side} items {items} of the batch hold NaN or infinity; " if items else ""
