"""The quickstart's report: `report.json` for programs, one self-contained `report.html` for people, `plots/` for pages.

`write_report(report, folder)` is called after every stage with what is known so far, so each part of the report may be
missing; the page then says that it has not run yet. What it does:

1. makes the dictionary strict JSON (`strict_json`: NaN and infinities become null, keys become text) and writes
   `report.json`;
2. draws every plot whose numbers are there (`speechllm.evaluation.plots`), saves it under `plots/` as PNG and SVG, and
   puts the SVG into the page;
3. encodes the samples' audio as MP3 (FLAC where libsndfile has no MP3) until `AUDIO_BUDGET` is used up;
4. renders `report.html.jinja` with everything escaped. The page loads nothing: no scripts, fonts, images or styles from
   elsewhere, and a content security policy that would forbid it. It stays below about 3 MB.

Files appear under their names only when complete, so a page reloaded during a run is never half a page. One call takes
about three seconds.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import soundfile
from matplotlib.figure import Figure

from speechllm.evaluation import plots
from speechllm.evaluation.page import audio_address, inline_plot, render, strict_json, word_diff, write_whole
from speechllm.quickstart import takeaways


logger = logging.getLogger(__name__)

AUDIO_BUDGET = 1_500_000  # characters of base64 in the page
MOMENTS = {"before": "before", "after_embedding": "after layer 0 only", "after": "after all layers"}
ARM_COLOURS = {
    "pretrained": "blue",
    "scratch_equal_steps": "orange",
    "scratch_equal_compute": "purple",
}
_RECALLS = ("recall_at_1", "recall_at_5")
SPARE_COLOURS = ("green", "red", "grey")  # for arms with other names


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write `report.json`, `report.html` and `plots/` into `folder` (created if missing).

    Args:
        report: what is known so far; every part may be missing (tests/quickstart/test_report.py shows a full one).
        folder: the run's output folder.

    Raises:
        TypeError: the report holds something that JSON cannot say; the message names the place.
        OSError: a file cannot be written.
    """
    folder = Path(folder)
    report = strict_json(report)
    write_whole(folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    write_whole(folder / "report.html", render_html(report, folder / "plots"))


def render_html(report: dict[str, Any], plot_folder: Path) -> str:
    """The page for a report that is already strict JSON; its plots are saved in `plot_folder` on the way."""
    pretraining, fine_tuning = report.get("pretraining") or {}, report.get("fine_tuning") or {}
    texts = (report.get("data") or {}).get("test_utterances")
    tuned = _comparisons(fine_tuning)
    figures = _pretraining_figures(pretraining, texts) | _fine_tuning_figures(fine_tuning, tuned)
    drawn = {name: inline_plot(figure, name, text, plot_folder) for name, (figure, text) in figures.items()}
    return render(
        Path(__file__).with_name("report.html.jinja"),
        filters={"duration": takeaways.duration, "percent": takeaways.percent},
        report=report,
        figures=drawn,
        comparisons=tuned,
        say=takeaways,
        moments=MOMENTS,
        texts=texts,
        samples=_sample_views(report.get("samples") or [], fine_tuning),
        tokens=[_token_view(row) for row in pretraining.get("nearest_tokens") or []],
    )


def _pretraining_figures(pretraining: Mapping[str, Any], texts: int | None) -> dict[str, tuple[Figure, str]]:
    """Name -> (figure, text alternative) of what stage 1 has measured so far."""
    figures: dict[str, tuple[Figure, str]] = {}
    recalls = {k: {MOMENTS[m]: v for m in MOMENTS if (v := (pretraining.get(k) or {}).get(m))} for k in _RECALLS}
    if recalls["recall_at_1"]:
        chance, at_5 = pretraining.get("chance"), recalls["recall_at_5"]
        figure = plots.recall_per_layer(recalls["recall_at_1"], chance=chance, recall_at_5=at_5)
        text = f"Lines over the layers of the LLM. {takeaways.recall(pretraining, texts)} The table gives all values."
        figures["recall_per_layer"] = (figure, text)
    history = pretraining.get("history") or []
    switches = plots.schedule_switches(pretraining.get("schedule") or "")
    text = f"Lines over the training steps. {takeaways.losses(pretraining) or ''}"
    if plots.layers_of(history):
        figures["loss_per_layer"] = (plots.loss_per_layer(history, switches=switches), text)
    if any(entry.get("loss") is not None for entry in history):
        figures["loss_total"] = (plots.loss_curve(history, switches=switches), text)
    matrices = pretraining.get("similarity") or {}
    for layer in similarity_layers(pretraining):
        sides = {side: matrices[side][layer] for side in ("before", "after") if (matrices.get(side) or {}).get(layer)}
        text = f"Heat maps, transcripts against recordings. {takeaways.similarity(sides.get('before'), sides.get('after'))}"
        figures[f"similarity_layer_{layer}"] = (plots.similarity_matrices(sides), text)
    return figures


def similarity_layers(pretraining: Mapping[str, Any]) -> list[str]:
    """Layers (as text) with at least one similarity matrix, in ascending order."""
    sides = [(pretraining.get("similarity") or {}).get(side) or {} for side in ("before", "after")]
    return sorted({layer for side in sides for layer, matrix in side.items() if matrix}, key=int)


def _comparisons(fine_tuning: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The groups of arms that are set side by side: equal steps, equal compute, and whatever else was tried."""
    arms = fine_tuning.get("arms") or []
    groups = []
    for name, title in ((takeaways.EQUAL_STEPS, "Equal steps"), (takeaways.EQUAL_COMPUTE, "Equal compute")):
        pair = [arm for wanted in ("pretrained", name) if (arm := takeaways.arm_named(fine_tuning, wanted))]
        if len(pair) == 2:
            sentence = takeaways.comparison(fine_tuning, name)
            groups.append({"name": f"error_rates_{title.split()[1]}", "title": title, "arms": pair, "says": sentence})
    shown = {arm.get("name") for group in groups for arm in group["arms"]}
    rest = [arm for arm in arms if arm.get("name") not in shown]
    if rest:
        sentence = takeaways.other_arms(fine_tuning, rest)
        title = "Also tried" if groups else "So far"
        groups.append({"name": "error_rates_other", "title": title, "arms": rest, "says": sentence})
    return groups


def _fine_tuning_figures(
    fine_tuning: Mapping[str, Any], comparisons: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[Figure, str]]:
    """Name -> (figure, text alternative) of what stage 2 has measured so far."""
    arms = [{**arm, "label": arm.get("label") or arm.get("name") or ""} for arm in fine_tuning.get("arms") or []]
    spare = [arm.get("name") for arm in arms if arm.get("name") not in ARM_COLOURS]
    colours = {name: SPARE_COLOURS[number % len(SPARE_COLOURS)] for number, name in enumerate(spare)} | ARM_COLOURS
    labelled = {arm.get("name"): arm for arm in arms}
    rates = [rate for arm in arms for rate in (arm.get("wer"), arm.get("cer")) if rate is not None]
    figures: dict[str, tuple[Figure, str]] = {}
    groups = [(group["name"], group["arms"], group["says"]) for group in comparisons]
    if arms:
        groups.append(("error_rates", arms, "All runs."))
    for name, members, sentence in groups:
        runs = [labelled[arm.get("name")] for arm in members]
        shades = [colours[run.get("name")] for run in runs]
        bars = plots.error_rate_bars(runs, colours=shades, scale=max(rates, default=None))
        figures[name] = (bars, f"Bars of the error rates. {sentence or ''}")
    curves = [
        (arm["label"], [entry.get("step") for entry in history], [entry.get("loss") for entry in history])
        for arm in arms
        if (history := arm.get("history"))
    ]
    if curves:
        shades = [colours[arm.get("name")] for arm in arms if arm.get("history")]
        text = f"Lines over the training steps. {takeaways.fine_tuning_losses(fine_tuning) or ''}"
        figures["fine_tuning_loss"] = (plots.loss_of_runs(curves, colours=shades), text)
    return figures


def _sample_views(samples: Sequence[Mapping[str, Any]], fine_tuning: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per sample: audio as a data address (or why not), the reference, and each arm's words against it."""
    labels = {arm.get("name"): arm.get("label") or arm.get("name") for arm in fine_tuning.get("arms") or []}
    views, used = [], 0
    for sample in samples:
        hypotheses, rates = sample.get("hypotheses") or {}, sample.get("wer") or {}
        reference = sample.get("reference") or ""
        order = [name for name in labels if name in hypotheses] + [name for name in hypotheses if name not in labels]
        arms = [
            {"label": labels.get(name, name), "wer": rates.get(name), "words": word_diff(reference, hypotheses[name])}
            for name in order
            if hypotheses[name] is not None
        ]
        audio, note = None, "No audio."
        if sample.get("audio"):
            try:
                audio = audio_address(Path(sample["audio"]))
            except (OSError, soundfile.SoundFileError) as error:
                note = f"The audio could not be read: {error}"
                logger.warning("Sample %s has no audio in the report: %s", sample.get("id"), error)
        if audio is not None and used + len(audio) > AUDIO_BUDGET:
            audio, note = None, "Audio left out to keep this page small."
        used += len(audio or "")
        views.append({"id": sample.get("id"), "reference": reference, "audio": audio, "note": note, "arms": arms})
    return views


def _token_view(row: Mapping[str, Any]) -> dict[str, Any]:
    """One utterance's nearest tokens: repeated neighbours as one with a count, words of the transcript marked."""
    text = row.get("text") or ""
    view: dict[str, Any] = {"id": row.get("id"), "text": text}
    for side in ("before", "after"):
        runs = [(token, len(list(group))) for token, group in groupby(row.get(side) or [])]
        view[side] = [
            {"text": _visible(token), "count": count, "hit": takeaways.is_piece(token, text)} for token, count in runs
        ]
    return view


def _visible(token: str) -> str:
    """A token without its leading-space mark; white space and line ends as signs that can be seen."""
    plain = token.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n")
    return plain.strip() or plain.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣") or "∅"
