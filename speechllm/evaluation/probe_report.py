"""The page of the probes: what survives, where."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from . import plots
from .page import inline_plot, render, write_whole


PLACES = "place (0 = the LLM's input, then its layers)"
UNITS = {"accuracy": "accuracy", "R^2": "explained variance (R^2)", "AUC": "area under the ROC curve"}


def write_probes(report: Mapping[str, Any], folder: Path) -> None:
    """`probes.json`, `probes.html` and `plots/` in `folder`, of a report of `probe_layers`."""
    write_whole(folder / "probes.json", json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    figures = probe_figures(report)
    drawn = {name: inline_plot(figure, name, text, folder / "plots") for name, (figure, text) in figures.items()}
    sentences = {name: sentence(entry, report["places"]) for name, entry in report["labels"].items()}
    template = Path(__file__).with_name("probes.html.jinja")
    page = render(template, report=report, figures=drawn, sentences=sentences, units=UNITS)
    write_whole(folder / "probes.html", page)


def probe_figures(report: Mapping[str, Any]) -> dict[str, tuple[Figure, str]]:
    """Name -> (figure, text alternative): one map per model, and the lines of each label."""
    figures = {}
    for number, model in enumerate(report["models"]):
        cells = {
            name: {place: _cell(entry, model, place) for place in report["places"]}
            for name, entry in report["labels"].items()
        }
        figures[f"map_{number}"] = (
            plots.value_map(cells, PLACES),
            f"Table in colours of the model {model}; the tables further down give all values.",
        )
    for number, entry in enumerate(report["labels"].values()):
        curves = {
            model: {place: (at["value"], *at["interval"]) for place, at in places.items()}
            for model, places in entry["models"].items()
        }
        figure = plots.lines_per_place(
            curves, UNITS[entry["metric"]], references={"guessing": entry["guessing"]["value"]}, places=PLACES
        )
        figures[f"label_{number}"] = (figure, f"Lines over the places. {sentence(entry, report['places'])}")
    return figures


def _cell(entry: Mapping[str, Any], model: str, place: str) -> tuple[float | None, str]:
    """How far the value is on the way from guessing (0) to perfect (1), and the value."""
    value, guessing = entry["models"][model][place]["value"], entry["guessing"]["value"]
    if value is None or guessing is None:
        return None, "?"
    return min(1.0, max(0.0, (value - guessing) / (1 - guessing))) if guessing < 1 else 0.0, f"{value:.2f}"


def sentence(entry: Mapping[str, Any], places: list[str]) -> str:
    """The first model's values at the first, the second and the last place, and where it is no better than guessing."""
    of_model = next(iter(entry["models"].values()))
    shown = dict.fromkeys([*places[:2], places[-1]])
    values = ", ".join(f"{_value(of_model[place])} at {_place(place)}" for place in shown)
    lost = [_place(place) for place in places if not (of_model[place]["above_guessing"]["interval"][0] or 0) > 0]
    where = "above guessing everywhere" if not lost else f"not reliably above guessing at {', '.join(lost)}"
    return f"{values}; guessing gives {_value(entry['guessing'])}: {where}."


def _value(at: Mapping[str, Any]) -> str:
    return "not measured" if at["value"] is None else f"{at['value']:.2f}"


def _place(place: str) -> str:
    return {"encoder": "the encoder", "0": "the LLM's input"}.get(place, f"layer {place}")
