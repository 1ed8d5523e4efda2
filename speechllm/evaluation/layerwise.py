"""How far speech and text have come together inside the LLM, layer by layer.

Each utterance and each transcript runs through the LLM by itself, behind the prefix of pretraining; its states at a
layer are averaged over its tokens. With n pairs (t_i, s_i) of text and speech vectors at a layer, the report has:

- retrieval: how often the transcript of an utterance is its nearest by cosine (`retrieval.py`), both directions, each
  beside its own chance; equal texts are one candidate;
- loss: InfoNCE over all n pairs as one batch (`layerwise_contrastive_loss`), ln n for states that say nothing;
- modality gap (Liang et al., 2022, "Mind the Gap"): | mean of t_i / |t_i|  -  mean of s_i / |s_i| |, the
  distance of the two centroids on the unit sphere, 0 to 2; beside it the mean cosine of pairs, and of unlike texts
  within text, within speech, and between them, which tell a gap apart from a narrow cone;
- linear CKA (Kornblith et al., 2019): HSIC(T, S) / sqrt(HSIC(T, T) HSIC(S, S)), with the unbiased HSIC_1 of Song et
  al. (2012), so that many dimensions and few utterances do not look alike by themselves: 0 in the mean for unrelated
  states (single values may be below), 1 for states equal up to rotation, shift and scale. It asks for the same
  geometry, not the same place: states can have a gap and a CKA of 1;
- for single utterances the exact optimal-transport plan between their tokens and the transcript's (`alignment.py`).

Cost: one pass through the LLM per utterance and distinct text, then n^2 dim operations per layer.
"""

import json
import math
import random
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from ..audio_speechllm import load_audio
from ..data.feature_cache import FeatureCache
from ..data.prompts import shared_prefix
from ..data.schema import Row, SetAside, with_ids
from ..data.splits import words_of
from ..modeling_speechllm import SpeechLLMForConditionalGeneration
from ..objectives import layerwise_contrastive_loss, parse_layers
from ..processing_speechllm import SpeechLLMProcessor
from . import plots
from .page import inline_plot, render, strict_json, write_whole
from .pooled_states import pooled_speech, pooled_text
from .retrieval import chance_of, retrieval_intervals, retrieval_metrics


FEWEST = 4  # HSIC_1 needs so many pairs
INSTALL_POT = "Run `pip install 'speechllm[transport]'`."
PLAN_TOKENS = (3, 40)  # texts of fewer tokens have little to align, those of more make no readable plot


def alignment_report(
    model: SpeechLLMForConditionalGeneration,
    processor: SpeechLLMProcessor,
    rows: list[Row],
    layers: str | Sequence[int] = "all",
    *,
    output: Path | None = None,
    prefix: str = "auto",
    temperature: float = 0.1,
    maximum_rows: int = 2000,
    plans: int | None = None,
    batch_size: int = 16,
    frames: FeatureCache | None = None,
) -> dict[str, Any]:
    """Measure the alignment of speech and text at `layers`.

    Args:
        rows: utterances with their transcripts (`audio`, `text`).
        layers: "emb", "all" (the paper's), or hidden-state indices.
        output: folder for `alignment.json`, `alignment.html` (one file, loads nothing) and `plots/`.
        prefix: what both sides begin with, as in pretraining (`ContrastiveArguments.prefix`).
        temperature: of the loss.
        maximum_rows: of more, so many are drawn (always the same ones): similarities are of all with all.
        plans: utterances to draw transport plans of; default: 3, or none without POT, which the report then says.
        frames: cache of the encoder's frames (`trainers/frozen_states.py`).

    Returns:
        `layers`: layer (as text) -> `recall@1`, `recall@5`, `mean_rank` and `text_to_speech_` of these, their
        `intervals` (95%, bootstrap over texts), `loss` (nats, of one utterance per distinct text), `modality_gap`,
        `cosine_pairs`, `cosine_within_text`, `cosine_within_speech`, `cosine_between`, `cka`; and `utterances`,
        `distinct_texts`, `chance` (of recall@1) and `chance_mean_rank` (of speech to text, among distinct texts), both
        with `text_to_speech_` (among utterances), `chance_loss`, `transport`, `transport_left_out` (why, or `None`),
        `set_aside`. What cannot be measured is `None`.

    Raises:
        ValueError: if fewer than 4 rows can be used, the layers or the prefix do not exist, or states are not finite.
        ModuleNotFoundError: if `plans` is above 0 and POT is not installed.
    """
    indices = layer_indices(layers, len(model.model.llm_layers))
    prefix_ids = shared_prefix(prefix, processor)
    rows, set_aside = _with_text(with_ids(rows))
    if len(rows) > maximum_rows:
        chosen = random.Random("alignment_report").sample(range(len(rows)), maximum_rows)
        rows = [rows[i] for i in sorted(chosen)]
    options = {"prefix": prefix_ids, "batch_size": batch_size}
    speech = pooled_speech(model, processor, rows, indices, **options, frames=frames) if rows else None
    set_aside += speech.set_aside if speech else []
    if speech is None or len(speech.rows) < FEWEST:
        first = f"; the first set aside: {set_aside[0].reason}" if set_aside else ""
        raise ValueError(f"Alignment needs {FEWEST} utterances with `audio` and `text` that can be used{first}")
    texts = [row["text"] for row in speech.rows]
    text = pooled_text(model, processor, texts, indices, **options)
    names = [" ".join(words_of(said)) or said for said in texts]  # as in pretraining: equal up to case and punctuation
    measured = {place: layer_alignment(text[place], speech.states[place], names, temperature) for place in text}
    report = {
        "utterances": len(names),
        "distinct_texts": len(set(names)),
        **chance_of(names),
        "chance_loss": math.log(len(set(names))),
        "prefix": processor.tokenizer.decode(prefix_ids),
        "temperature": temperature,
        "layers": measured,
        "set_aside": [{"id": item.id, "reason": item.reason} for item in set_aside],
    }
    without_pot = plans is None and find_spec("ot") is None
    report["transport_left_out"] = f"POT is not installed. {INSTALL_POT}" if without_pot else None
    plans = (0 if without_pot else 3) if plans is None else plans
    report["transport"], figures = _transport(model, processor, speech.rows, indices, prefix_ids, plans)
    report = strict_json(report)
    if output is not None:
        write_alignment(report, figures, Path(output))
    return report


def layer_alignment(
    text: torch.Tensor, speech: torch.Tensor, names: list[str], temperature: float = 0.1
) -> dict[str, Any]:
    """All measures of one layer, and the `intervals` of those of retrieval.

    Args:
        text, speech: (n, dim), pooled states of n pairs.
        names: what each pair says; pairs of the same name are right answers for each other.
    """
    x, y = F.normalize(text.double(), dim=-1), F.normalize(speech.double(), dim=-1)
    number: dict[str, int] = {}
    ids = torch.tensor([number.setdefault(name, i) for i, name in enumerate(names)])
    first = list(number.values())  # equal texts would be false negatives
    one = torch.ones(len(first), 1, dtype=torch.bool)
    terms = layerwise_contrastive_loss(
        {0: text[first, None]}, one, {0: speech[first, None]}, one, temperature=temperature
    )
    unlike = ids[:, None] != ids[None]
    similarity = x @ y.T
    return {
        **retrieval_metrics(similarity, names),
        "intervals": retrieval_intervals(similarity, names),
        "loss": terms["loss"].item(),
        "modality_gap": modality_gap(text, speech),
        "cosine_pairs": similarity.diagonal().mean().item(),
        "cosine_within_text": (x @ x.T)[unlike].mean().item(),
        "cosine_within_speech": (y @ y.T)[unlike].mean().item(),
        "cosine_between": similarity[unlike].mean().item(),
        "cka": linear_cka(text, speech),
    }


def modality_gap(x: torch.Tensor, y: torch.Tensor) -> float:
    """Distance of the centroids of the normalised rows (Liang et al., 2022), from 0 to 2.

    x: (n, dim), y: (m, dim)
    """
    return (F.normalize(x.double(), dim=-1).mean(0) - F.normalize(y.double(), dim=-1).mean(0)).norm().item()


def linear_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """Linear CKA of paired states (Kornblith et al., 2019) with unbiased HSIC (Song et al., 2012).

    Args:
        x, y: (n, dim) and (n, other dim), n >= 4.

    Returns:
        At most about 1; NaN where a side is the same for all pairs.

    Raises:
        ValueError: if there are fewer than 4 pairs, or not as many of one side as of the other.
    """
    if len(x) != len(y) or len(x) < FEWEST:
        raise ValueError(f"CKA compares at least {FEWEST} pairs of states, but got {len(x)} and {len(y)}.")
    grams = []
    for states in (x.double(), y.double()):
        centred = states - states.mean(0)  # changes nothing but rounding errors
        grams.append(centred @ centred.T)
    (xx, yy), xy = (unbiased_hsic(gram, gram) for gram in grams), unbiased_hsic(*grams)
    return (xy / (xx * yy).clamp(min=0).sqrt()).item() if xx > 0 and yy > 0 else math.nan


def unbiased_hsic(k: torch.Tensor, l: torch.Tensor) -> torch.Tensor:  # noqa: E741 (the paper's letters)
    """HSIC_1 = [tr(KL) + 1'K1 1'L1 / ((n-1)(n-2)) - 2 1'KL1 / (n-2)] / (n(n-3)), diagonals of K and L set to zero.

    k, l: (n, n) Gram matrices.
    """
    n = len(k)
    k, l = (gram - gram.diagonal().diag() for gram in (k, l))  # noqa: E741
    trace = (k * l).sum()  # both are symmetric
    sums = k.sum() * l.sum() / ((n - 1) * (n - 2))
    return (trace + sums - 2 * (k.sum(0) @ l.sum(0)) / (n - 2)) / (n * (n - 3))


# ---- transport plans -------------------------------------------------------------------------------------------------


def _transport(model, processor, rows: list[Row], layers: list[int], prefix: list[int], count: int):
    """Per utterance the cost of its plan at each layer, beside that of another's transcript; figures of three layers."""
    if not count:
        return [], {}
    try:
        from .alignment import align, plan_figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"Transport plans need {error.name}. {INSTALL_POT} Or ask for no plans.") from error
    examples = _examples(processor, rows, count)
    shown = sorted({layers[0], layers[len(layers) // 2], layers[-1]})
    costs, figures = [], {}
    for number, row in enumerate(examples):
        samples = load_audio(row["audio"], row.get("sampling_rate"), name=row["id"])
        own = align(model, processor, samples, row["text"], prefix)
        entry = {"id": row["id"], "text": row["text"], "cost": {l: own.transport_cost(l) for l in layers}}  # noqa: E741
        other = examples[(number + 1) % len(examples)]["text"]
        if other != row["text"]:
            wrong = align(model, processor, samples, other, prefix)
            entry |= {"other_text": other, "other_cost": {l: wrong.transport_cost(l) for l in layers}}  # noqa: E741
        costs.append(entry)
        for layer in shown:
            figures[f"plan_{number}_layer_{layer}"] = plan_figure(own, layer)
    return costs, figures


def _examples(processor: SpeechLLMProcessor, rows: list[Row], count: int) -> list[Row]:
    """The first rows, each of another text, whose plans can be read."""
    found: dict[str, Row] = {}
    for row in rows:
        tokens = len(processor.tokenizer(row["text"], add_special_tokens=False).input_ids)
        if PLAN_TOKENS[0] <= tokens <= PLAN_TOKENS[1] and "parts" not in row:
            found.setdefault(row["text"], row)
        if len(found) == count:
            break
    return list(found.values())


# ---- the page --------------------------------------------------------------------------------------------------------


def write_alignment(report: Mapping[str, Any], plans: Mapping[str, Any], folder: Path) -> None:
    """`alignment.json`, `alignment.html` and `plots/` in `folder`.

    plans: name -> figure of a transport plan.
    """
    write_whole(folder / "alignment.json", json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    figures = {**alignment_figures(report), **{name: (figure, "A transport plan.") for name, figure in plans.items()}}
    drawn = {name: inline_plot(figure, name, text, folder / "plots") for name, (figure, text) in figures.items()}
    measures = [name for name in next(iter(report["layers"].values())) if name != "intervals"]
    template = Path(__file__).with_name("alignment.html.jinja")
    write_whole(folder / "alignment.html", render(template, report=report, figures=drawn, measures=measures))


def alignment_figures(report: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Name -> (figure, text alternative) of the measures over the layers."""

    def curves(names: dict[str, str]) -> dict[str, dict[str, Any]]:
        return {label: {l: report["layers"][l][name] for l in report["layers"]} for name, label in names.items()}  # noqa: E741

    both = {"speech to text": "recall@", "text to speech": "text_to_speech_recall@"}
    at = {k: curves({f"{name}{k}": label for label, name in both.items()}) for k in (1, 5)}
    ends = {"no better than guessing": report["chance_loss"]}
    ranks = {"speech to text": report["chance_mean_rank"], "text to speech": report["text_to_speech_chance_mean_rank"]}
    if len(set(ranks.values())) == 1:
        guessing = {"guessing": report["chance_mean_rank"]}
    else:  # the lines look alike: their heights tell them apart
        guessing = {f"guessing, {label} ({rank:.1f})": rank for label, rank in ranks.items()}
    cosines = {
        "cosine_pairs": "an utterance and its text",
        "cosine_between": "an utterance and another text",
        "cosine_within_text": "two texts",
        "cosine_within_speech": "two utterances of other texts",
    }
    figures = {
        "recall": plots.recall_per_layer(at[1], chance=report["chance"], recall_at_5=at[5]),
        "mean_rank": plots.lines_per_place(
            curves({"mean_rank": "speech to text", "text_to_speech_mean_rank": "text to speech"}),
            "mean rank (1 is best)",
            references=guessing,
        ),
        "loss": plots.lines_per_place(curves({"loss": "contrastive loss"}), "loss (nats)", references=ends),
        "modality_gap": plots.lines_per_place(
            curves({"modality_gap": "between the centroids"}), "distance (0 to 2)", limits=(0, None)
        ),
        "cosines": plots.lines_per_place(curves(cosines), "mean cosine"),
        "cka": plots.lines_per_place(curves({"cka": "linear CKA"}), "CKA (1: same geometry)", limits=(None, 1)),
    }
    return {name: (figure, "Lines over the layers; the table gives all values.") for name, figure in figures.items()}


def layer_indices(layers: str | Sequence[int], depth: int) -> list[int]:
    """See `parse_layers`, which this calls; also takes the indices themselves."""
    return parse_layers(layers if isinstance(layers, str) else ",".join(map(str, layers)), depth)


def _with_text(rows: list[Row]) -> tuple[list[Row], list[SetAside]]:
    kept, set_aside = [], []
    for row in rows:
        if isinstance(row.get("text"), str) and row["text"].strip():
            kept.append(row)
        else:
            set_aside.append(
                SetAside(row["id"], f"{row['id']} has no `text`. Give its transcript.", "empty transcript")
            )
    return kept, set_aside
