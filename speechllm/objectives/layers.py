"""The layerwise contrastive loss of arXiv 2412.15712 (Section 3.2): InfoNCE at several of the LLM's hidden states.

L = sum over layers l of  w_l * InfoNCE( similarity(text states at l, speech states at l) / tau )
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn import functional as F

from .gathering import gather_integers, gather_rows, several_processes
from .info_nce import info_nce
from .optimal_transport import exact_wasserstein_distance_matrix, transport_cost_matrix
from .similarity import cosine_similarity_matrix, masked_mean
from .sinkhorn import wasserstein_distance_matrix


def negative_wasserstein(text, text_mask, speech, speech_mask) -> torch.Tensor:
    """Minus `wasserstein_distance_matrix`, of its shape: a similarity."""
    return -wasserstein_distance_matrix(text, text_mask, speech, speech_mask)


Similarity = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
SIMILARITIES: dict[str, Similarity] = {
    "cosine": cosine_similarity_matrix,
    "wasserstein": negative_wasserstein,
    "wasserstein_geomloss": lambda *sequences: -wasserstein_distance_matrix(*sequences, diameter=None),
    "exact_wasserstein": lambda *sequences: -exact_wasserstein_distance_matrix(*sequences),
    "transport_cost": lambda *sequences: -transport_cost_matrix(*sequences),
}


def parse_layers(layers: str, depth: int) -> list[int]:
    """Names of layer sets -> hidden-state indices.

    Args:
        layers: `"emb"`: [0], the LLM's input embeddings; `"all"`: every fifth and the last (the paper leaves out the
            30th of 32); or indices, e.g. `"0,4,8"` (negative ones count from the last: -1).
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


def parse_layer_weights(weights: str, depth: int) -> dict[int, float]:
    """`"0:1 5:0.5"` -> {layer: weight}.

    Raises:
        ValueError: if a part is not `layer:weight`, the layer does not exist, or the weight is negative or infinite.
    """
    parsed = {}
    for part in weights.replace(",", " ").split():
        layer, _, weight = part.partition(":")
        try:
            (index,) = parse_layers(layer, depth)
            parsed[index] = float(weight)
        except ValueError:
            parsed[-1] = -1.0
    if not parsed or not all(0 <= weight < float("inf") for weight in parsed.values()):
        raise ValueError(
            f"layer_weights is {weights!r}; write 'layer:weight ...', e.g. '0:1 5:0.5', with weights of 0 or above and "
            f"layers from 0 to {depth}."
        )
    return parsed


@dataclass(frozen=True)
class ExtraTexts:
    """Texts without speech, as further negatives of utterances.

    They have a say only where utterances are the queries (`symmetric`): the text-to-speech direction asks which of the
    *utterances* belongs to a text, and an extra text brings none; nor is it a query, as it has no positive.

    states: layer -> (texts, length, dim); mask: (texts, length), `True` = valid. allowed: (texts, batch), `True` where
    the text may be a negative of that utterance. With `gather`, every process gives equally many.
    """

    states: dict[int, torch.Tensor]
    mask: torch.Tensor
    allowed: torch.Tensor


def layerwise_contrastive_loss(
    text_states: dict[int, torch.Tensor],
    text_mask: torch.Tensor,
    speech_states: dict[int, torch.Tensor],
    speech_mask: torch.Tensor,
    *,
    similarity: str | Similarity = "cosine",
    temperature: float | torch.Tensor = 0.1,
    layer_weights: dict[int, float | torch.Tensor] | None = None,
    symmetric: bool = False,
    gather: bool = False,
    extra_texts: ExtraTexts | None = None,
) -> dict[str, torch.Tensor]:
    """Sum over layers of InfoNCE between texts and utterances of a batch; text i belongs with utterance i.

    Args:
        text_states, speech_states: layer -> (batch, length, dim).
        text_mask, speech_mask: (batch, length), `True` = valid; shared by all layers.
        similarity: a name, such as `"cosine"`, or any function `(text, text_mask, speech, speech_mask) -> (texts,
            utterances)` of which entry [i, j] depends on text i and utterance j alone.
        temperature, symmetric: see `info_nce`.
        layer_weights: layer -> weight, 1 where absent.
        gather: the batch is that of all processes together; each must call, with batches of any size, 0 included. The
            texts travel (pooled to one vector, for cosine), each process compares all of them with its own utterances,
            and the matrices' columns are put together: every process returns the same loss, and the gradient of
            averaged parameters is that of one process with the whole batch.
        extra_texts: further negatives; need `symmetric`.

    Returns:
        `loss`, the weighted sum, and `layer_<l>`, the unweighted loss of each layer, in nats.

    Raises:
        ValueError: if a state holds NaN or infinity, naming layer, side and batch items (with `gather` on every process,
            naming the one that holds it); if layers or batch sizes differ; if `extra_texts` come without `symmetric`.
    """
    if text_states.keys() != speech_states.keys():
        raise ValueError(f"Text has states of layers {sorted(text_states)}, speech of {sorted(speech_states)}.")
    if len(text_mask) != len(speech_mask):
        raise ValueError(f"There are {len(text_mask)} texts and {len(speech_mask)} utterances; give pairs.")
    if extra_texts is not None and not symmetric:
        raise ValueError("Extra texts are negatives of utterances only, which `symmetric` compares with texts; set it.")
    measure = SIMILARITIES[similarity] if isinstance(similarity, str) else similarity
    sides = {"text": (text_states, text_mask), "speech": (speech_states, speech_mask)}
    if extra_texts is not None:
        sides["extra text"] = ({layer: extra_texts.states[layer] for layer in text_states}, extra_texts.mask)
    if measure is cosine_similarity_matrix:  # the means say all that cosine needs to know
        sides = {name: mean_pooled(*side) for name, side in sides.items()}
    problem = _not_finite(sides)
    if gather := gather and several_processes():
        problem = _problems_of_all(problem, speech_mask.device)
    if problem:
        raise ValueError(f"{problem}. Check these items' audio and text, or lower the learning rate.")
    if gather:
        sides["text"], counts = _gather_texts(sides)

    matrices = layer_similarities(measure, sides["text"], sides["speech"])
    if extra_texts is not None:
        extra = layer_similarities(measure, sides["extra text"], sides["speech"])
        matrices = torch.cat([matrices, extra.masked_fill(~extra_texts.allowed.bool(), -torch.inf)], 1)
    if gather:
        columns = gather_rows(matrices.movedim(2, 0), counts)  # (utterances of all processes, layers, texts)
        matrices = [matrix.T for matrix in columns.unbind(1)]
    losses = {
        layer: info_nce(matrix, temperature=temperature, symmetric=symmetric, offset=0)
        for layer, matrix in zip(text_states, matrices)
    }
    if not torch.stack(list(losses.values())).isfinite().all():
        broken = [layer for layer, loss in losses.items() if not loss.isfinite()]
        raise ValueError(
            f"The states are finite, but their similarities at layers {broken} are not. Check the similarity function."
        )
    weights = layer_weights or {}
    total = sum(weights.get(layer, 1.0) * loss for layer, loss in losses.items())
    return {"loss": total, **{f"layer_{layer}": loss for layer, loss in losses.items()}}


Side = tuple[dict[int, torch.Tensor], torch.Tensor]  # layer -> (batch, length, dim), and the mask (batch, length)


def mean_pooled(states: dict[int, torch.Tensor], mask: torch.Tensor) -> Side:
    """Sequences of one token each, the mean of the valid ones (zero where there is none), and their mask."""
    one = torch.ones(len(mask), 1, dtype=torch.bool, device=mask.device)
    return {layer: masked_mean(state, mask)[:, None] for layer, state in states.items()}, one


def layer_similarities(measure: Similarity, text: Side, speech: Side) -> torch.Tensor:
    """(layers, texts, utterances). The Wasserstein distances of all layers come from one call: on a GPU seven times fewer
    kernel launches for seven layers, on a CPU blocks that need less padding.
    """
    (texts, text_mask), (utterances, speech_mask) = text, speech
    pairs = [(texts[layer], utterances[layer]) for layer in texts]
    if not (len(text_mask) and len(speech_mask)):
        # Nothing to compare, but tied to the graph: other processes wait for this one's part in the backward pass.
        dtype = torch.promote_types(pairs[0][1].dtype, torch.float32)
        nothing = torch.zeros(len(text_mask), len(speech_mask), dtype=dtype, device=speech_mask.device)
        return torch.stack([nothing + 0 * (x.sum() + y.sum()) for x, y in pairs])
    of_one_shape = len({(x.shape, y.shape) for x, y in pairs}) == 1
    if measure is negative_wasserstein and of_one_shape:
        x, y = map(torch.stack, zip(*pairs))
        return measure(x, text_mask, y, speech_mask)
    return torch.stack([measure(x, text_mask, y, speech_mask) for x, y in pairs])


def _gather_texts(sides: dict[str, Side]) -> tuple[Side, list[int]]:
    """The texts of all processes, padded to a common length (all layers travel together), and how many each has.

    Raises:
        ValueError: if the processes differ in their number of extra texts.
    """
    states, mask = sides["text"]
    extra = len(sides["extra text"][1]) if "extra text" in sides else 0
    counts, lengths, extras = map(list, zip(*gather_integers([*mask.shape, extra], mask.device)))
    if len(set(extras)) > 1:
        raise ValueError(f"The processes give {extras} extra texts; all must give equally many.")
    padding = max(lengths) - mask.shape[1]
    stacked = F.pad(torch.stack(list(states.values()), 1), (0, 0, 0, padding))  # (batch, layers, length, dim)
    gathered = dict(zip(states, gather_rows(stacked, counts).unbind(1)))
    return (gathered, gather_rows(F.pad(mask.byte(), (0, padding)), counts).bool()), counts


def _problems_of_all(problem: str, device: torch.device) -> str:
    """Every process's problem, by process; "" if there is none. So that all of them stop, and none waits for the others."""
    if not any(count for (count,) in gather_integers([len(problem)], device)):
        return ""
    found: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(found, problem)
    return "; ".join(f"on process {rank}: {text}" for rank, text in enumerate(found) if text)


def _not_finite(sides: dict[str, Side]) -> str:
    """Which valid states are not finite; "" if all are. (A mean over valid tokens is finite only if they all are.)"""
    broken = {  # side -> (layers, batch)
        name: torch.stack([~masked_mean(state, mask).isfinite().all(-1) for state in states.values()])
        for name, (states, mask) in sides.items()
    }
    if not torch.cat([side.flatten() for side in broken.values()]).any():
        return ""
    problems = []
    for i, layer in enumerate(sides["text"][0]):
        items = {name: torch.nonzero(side[i]).flatten().tolist() for name, side in broken.items()}
        found = " and ".join(f"{name} items {which}" for name, which in items.items() if which)
        if found:
            problems.append(
                f"the similarities at layer {layer} are not finite: {found} of the batch hold NaN or infinity"
            )
    return "; ".join(problems)
