"""The page of an evaluation: per task the metrics with their intervals, how the utterances are distributed, and the worst
of them with reference, hypothesis and audio."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from ..audio_speechllm import SAMPLING_RATE, AudioError, load_audio
from ..data.schema import Row
from .page import inline_plot, render, samples_address, word_diff, write_whole
from .plots import COLOURS, NARROW, STYLE
from .scoring import GROUPS, UTTERANCE_METRIC, worst_first


logger = logging.getLogger(__name__)

AUDIO_BUDGET = 3_000_000  # characters of base64 in the page
TITLES = {"asr": "Recognition", "st": "Translation", "sqa": "Spoken question answering", "traits": "Speaker traits"}
UTTERANCE_TITLES = {"wer": "word error rate", "chrf++": "chrF++", "f1": "F1", "accuracy": "correct"}
FRACTIONS = ("wer", "cer", "mean_utterance_wer", "accuracy", "macro_f1")  # shown in percent


def write_report(
    folder: Path,
    metrics: Mapping[str, Any],
    rows: Sequence[Row],
    answers: Sequence[Mapping[str, Any]],
    scores: Mapping[str, Mapping[str, float]],
    worst: int = 10,
) -> None:
    """Write `report.html` into `folder`, and its plots into `plots/`.

    Args:
        metrics: as in `metrics.json`.
        rows: all that were asked, for their audio.
        answers: lines of `predictions.jsonl`.
        scores: by task, id -> the utterance's score.
        worst: utterances to show of each task.
    """
    by_id = {row["id"]: row for row in rows}
    answers_of = {answer["id"]: answer for answer in answers}
    budget, views = AUDIO_BUDGET, []
    for task, found in metrics["tasks"].items():
        shown = worst_first(task, scores[task])[:worst] if scores.get(task) else []
        unscored = [answer["id"] for answer in answers if answer["task"] == task][: 0 if shown else worst]
        cases = []
        for name in [*shown, *unscored]:
            case = _case(answers_of[name], by_id[name], budget, scores[task].get(name), task)
            budget -= len(case["audio"] or "")
            cases.append(case)
        values = list(scores[task].values())
        text = f"Histogram of the {len(values)} utterances' scores. The table of metrics has their summary."
        plot = (
            inline_plot(distribution(task, values), f"distribution_{task}", text, folder / "plots") if values else None
        )
        views.append(
            {
                "name": task,
                "title": TITLES.get(task, task),
                "found": found,
                "tables": _tables(found),
                "grouped_by": GROUPS.get(task, ""),
                "plot": plot,
                "cases": cases,
            }
        )
    page = render(Path(__file__).with_name("report.html.jinja"), {"number": number}, metrics=metrics, tasks=views)
    write_whole(folder / "report.html", page)


def _tables(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Metrics as rows of name, value and interval: of all utterances, then of each group."""
    groups = {"all": {"utterances": found["scored"], "metrics": found.get("metrics")}, **(found.get("groups") or {})}
    tables = []
    for title, group in groups.items():
        values = group["metrics"] or {}
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        rows = [
            {"name": name, "value": shown(name, value), "interval": interval_of(name, values.get(f"{name}_interval"))}
            for name, value in numbers.items()
        ]
        signatures = [value for value in values.values() if isinstance(value, str)]
        tables.append({"title": title, "utterances": group["utterances"], "rows": rows, "signatures": signatures})
    return tables


def _case(answer: Mapping[str, Any], row: Row, budget: int, score: float | None, task: str) -> dict[str, Any]:
    """One utterance as the page shows it; its audio as a data address, or why there is none."""
    references = answer["references"]
    audio, note = None, "No audio."
    if row.get("audio") is not None:
        try:
            audio = samples_address(load_audio(row["audio"], row.get("sampling_rate"), row["id"]), SAMPLING_RATE)
        except AudioError as error:
            note = str(error)
    if audio is not None and len(audio) > budget:
        audio, note = None, "Audio left out to keep this page small."
    name = UTTERANCE_METRIC[task][0] if task in UTTERANCE_METRIC else ""
    return {
        **answer,
        "audio": audio,
        "note": note,
        "said": row.get("text") if row.get("text") not in references else None,
        "score": None if score is None else f"{UTTERANCE_TITLES[name]} {shown(name, score)}",
        "words": word_diff(references[0], answer["prediction"]) if references else None,
    }


def distribution(task: str, scores: Sequence[float]) -> Figure:
    """How many utterances have which score; error rates above 1 count in the last bar."""
    metric, _ = UTTERANCE_METRIC[task]
    scale = 100 if metric in FRACTIONS else 1
    values = [min(scale * value, 100.0) for value in scores]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(NARROW, 2.3), layout="constrained")
        axes = figure.subplots()
        axes.set_facecolor("none")
        axes.hist(values, bins=20, range=(0, 100), color=COLOURS["blue"][0])
        unit = ", % (the last bar: 95 and above)" if metric == "wer" else ", %" if scale == 100 else ""
        axes.set_xlabel(f"{UTTERANCE_TITLES[metric]} of an utterance{unit}")
        axes.set_ylabel("utterances")
        axes.grid(axis="x", visible=False)
    return figure


def shown(name: str, value: float) -> str:
    """A metric as people read it: fractions in percent, counts whole, scores with two decimals."""
    if re.sub(r"^.*\.", "", name) in FRACTIONS:
        return f"{100 * value:.2f}%"
    return f"{value:,}" if isinstance(value, int) else number(value)


def interval_of(name: str, interval: Sequence[float] | None) -> str:
    return " to ".join(shown(name, float(end)) for end in interval) if interval else ""


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.2f}" if abs(value) >= 0.01 or value == 0 else f"{value:.1e}"
