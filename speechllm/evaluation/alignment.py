"""How one utterance and one sentence meet inside the LLM: similarities and transport plans of their tokens, per layer.

1. The LLM reads the utterance's speech tokens and the sentence's tokens apart, each behind the same short prefix, as in
   contrastive pretraining; the prefix is left out of what follows.
2. At each layer, S_ij is the cosine similarity of speech token i's state and sentence token j's.
3. The plan P moves the uniform measure on the speech tokens onto that on the sentence's tokens at the least cost
   <P, C>, C = 1 - S: exact optimal transport, solved by POT (Flamary et al., 2021).

One pass through the LLM for each side gives all layers; drawing another layer runs no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import ot
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from torch.nn import functional as F

from ..audio_speechllm import SAMPLING_RATE
from ..modeling_speechllm import SpeechLLMForConditionalGeneration
from ..processing_speechllm import SpeechLLMProcessor
from .plots import STYLE


WIDTH = 4.2  # inches
FROM_CLEAR = LinearSegmentedColormap.from_list("from_clear", ["#2f7de100", "#2f7de1ff"])  # over light and dark pages


@dataclass
class Alignment:
    """
    tokens: the sentence's tokens as text.
    edges: (speech tokens + 1,), the times in seconds between which each speech token lies, ascending from 0.
    similarity: (layers, speech tokens, sentence tokens), cosines; layer 0 is the LLM's input.
    plan: (layers, speech tokens, sentence tokens), transported mass; the sum of each layer is 1.
    """

    tokens: list[str]
    edges: np.ndarray
    similarity: np.ndarray
    plan: np.ndarray

    def transport_cost(self, layer: int) -> float:
        """<P, 1 - S>: 0 for states of the same directions, 1 for unrelated ones."""
        return float((self.plan[layer] * (1 - self.similarity[layer])).sum())


@torch.no_grad()
def align(
    model: SpeechLLMForConditionalGeneration,
    processor: SpeechLLMProcessor,
    samples: np.ndarray,
    sentence: str,
    prefix: Sequence[int] = (),
) -> Alignment:
    """Compare an utterance with a sentence at all layers of the LLM.

    Args:
        samples: (samples,) float32 at 16 kHz.
        prefix: token ids that both sides begin with, as in training.

    Raises:
        AudioError: if the audio cannot be used.
        ValueError: if the sentence has no tokens.
    """
    text_ids = processor.tokenizer(sentence, add_special_tokens=False).input_ids
    if not text_ids:
        raise ValueError("The sentence is empty. Type at least one word.")
    speech_ids = [processor.audio_token_id] * processor.count_speech_tokens(len(samples))
    features = processor.pad_features(processor.extract_features(samples))
    speech = F.normalize(_states(model, [*prefix, *speech_ids], len(prefix), **features), dim=-1)
    text = F.normalize(_states(model, [*prefix, *text_ids], len(prefix)), dim=-1)
    similarity = (speech @ text.mT).cpu().numpy()
    return Alignment(
        tokens=[processor.tokenizer.decode([token]) for token in text_ids],
        edges=speech_token_edges(processor, len(samples)),
        similarity=similarity,
        plan=np.stack([transport_plan(1 - layer) for layer in similarity]),
    )


def _states(model: SpeechLLMForConditionalGeneration, ids: list[int], skip: int, **features) -> torch.Tensor:
    """(layers, tokens, dim) in float32, without the first `skip` tokens."""
    layers = list(range(len(model.model.llm_layers) + 1))
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long), **features}
    states = model.model(**{name: value.to(model.device) for name, value in inputs.items()}, layers=layers).layer_states
    return torch.stack([states[layer][0, skip:].float() for layer in layers])


def transport_plan(cost: np.ndarray) -> np.ndarray:
    """The cheapest plan between uniform measures: (rows, columns) >= 0 of sum 1, equal row sums, equal column sums."""
    return ot.emd([], [], cost.astype(np.float64)).astype(np.float32)


def speech_token_edges(processor: SpeechLLMProcessor, samples: int) -> np.ndarray:
    """Times in seconds between the speech tokens of an audio of `samples` samples: (speech tokens + 1,).

    A window's tokens hear all of the window; they share its time equally here, in the order of the queries.
    """
    rule, offset, edges = processor.rule, 0.0, []
    shares = np.arange(rule.tokens_per_window) / rule.tokens_per_window
    for length in processor.segment_lengths(samples):
        seconds = length / SAMPLING_RATE
        windows = rule.tokens(rule.frames(rule.steps(length))) // rule.tokens_per_window
        starts = np.arange(windows) * rule.window / rule.frames_per_second
        spans = np.diff(starts, append=seconds)  # the last window may be partly filled
        edges.append(offset + (starts[:, None] + spans[:, None] * shares).ravel())
        offset += seconds
    return np.append(np.concatenate(edges), offset)


# ---- figures ---------------------------------------------------------------------------------------------------------


def similarity_figure(alignment: Alignment, layer: int) -> Figure:
    """Heat map of one layer's cosines: the utterance's seconds from left to right, the sentence from top to bottom."""
    return _heat_map(
        alignment, alignment.similarity[layer], "cosine similarity", matplotlib.colormaps["viridis"], lowest=None
    )


def plan_figure(alignment: Alignment, layer: int) -> Figure:
    """One layer's transport plan: how much of each sentence token's mass comes from where in the utterance."""
    shares = 100 * alignment.plan[layer] * len(alignment.tokens)
    return _heat_map(alignment, shares, "% of the sentence token's mass", FROM_CLEAR, lowest=0.0)


def _heat_map(alignment: Alignment, values: np.ndarray, label: str, colours: Colormap, lowest: float | None) -> Figure:
    """values: (speech tokens, sentence tokens)."""
    count = len(alignment.tokens)
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(WIDTH, 1.3 + 0.17 * count), layout="constrained")
        axes: Axes = figure.subplots()
        axes.set_facecolor("none")
        rows = np.arange(count + 1) - 0.5
        mesh = axes.pcolormesh(alignment.edges, rows, values.T, cmap=colours, vmin=lowest, rasterized=True)
        axes.set_ylim(count - 0.5, -0.5)
        axes.set_yticks(range(count), [token.strip() or "\N{OPEN BOX}" for token in alignment.tokens])
        axes.tick_params(axis="y", length=0, labelsize=8.5)
        axes.set_xlabel("speech (seconds)")
        axes.spines[["left", "bottom"]].set_visible(False)
        bar = figure.colorbar(mesh, ax=axes, location="top", aspect=40, pad=0.02)
        bar.set_label(label, fontsize=8.5)
        bar.outline.set_visible(False)
        bar.ax.set_facecolor("none")
        bar.ax.tick_params(labelsize=8, length=2)
    return figure
