"""Plots of retrieval, losses, similarity matrices and error rates: numbers in, one matplotlib `Figure` out.

1. Every plot is a pure function. Figures are built with matplotlib's object API and never touch pyplot, so there is no
   global figure list, no display is needed, and matplotlib's settings are left as they were.
2. Every figure is narrow (`WIDTH` or `NARROW` inches) and holds one idea, so that its text stays readable on a phone. Pages place
   several side by side.
3. Numbers may be missing: `None`, NaN and infinities are left out of lines and written as "not measured" on bars.
   Lines of more than `MAXIMUM_POINTS` points are drawn as means of neighbouring points.
4. Labels are plain text (a `$` is a dollar sign, not mathematics), cut after `MAXIMUM_LABEL` characters.
5. Colours come from `COLOURS`, each with a version for light and for dark pages. `svg_document` and `png_bytes` give
   files on white; `inline_svg` turns the colours of an SVG file into CSS variables (`colour_variables` has their
   values), so that a plot inside a page follows the reader's choice. The same numbers give the same bytes.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter


Number = float | int | None
Curve = tuple[str, Sequence[Number], Sequence[Number]]  # label, x values, y values

WIDTH = 4.2  # inches
NARROW = 3.5  # inches, for plots of which three fit beside each other
MAXIMUM_POINTS = 300
MAXIMUM_LABEL = 48  # characters
LAYER_SHADES = 10
_WHITE = "#fffffd"  # the paper of SVG files, told apart from any other white

COLOURS = {  # name: (on light pages, on dark pages)
    "ink": ("#1c2126", "#e9ecef"),
    "faint": ("#59626c", "#a4adb7"),
    "grid": ("#dde2e7", "#353c44"),
    "blue": ("#0a5fc2", "#72b4ff"),
    "orange": ("#b55a00", "#f2a24f"),
    "grey": ("#737c86", "#99a2ac"),
    "purple": ("#7d3cb5", "#c79bf2"),
    "green": ("#0d7a4f", "#5bc998"),
    "red": ("#c02a37", "#ff8b8b"),
    **{  # a perceptually ordered scale for layers, first to last, without the end that vanishes in the page's colour
        f"layer{shade}": tuple(
            to_hex(matplotlib.colormaps["plasma"](low + (high - low) * shade / (LAYER_SHADES - 1)))
            for low, high in ((0.0, 0.62), (0.42, 1.0))
        )
        for shade in range(LAYER_SHADES)
    },
}
SERIES = ("blue", "orange", "purple", "green", "red", "grey")
MARKERS = ("o", "s", "^", "D", "v", "P")
STYLE = {
    **dict.fromkeys(("axes.labelcolor", "axes.titlecolor", "legend.labelcolor", "text.color"), COLOURS["ink"][0]),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), COLOURS["faint"][0]),
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9.5,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "grid.color": COLOURS["grid"][0],
    "grid.linewidth": 0.8,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    "svg.hashsalt": "speechllm",
    "text.parse_math": False,
}


def recall_per_layer(
    recall_at_1: Mapping[str, Mapping[Any, Number]],
    *,
    chance: Number = None,
    recall_at_5: Mapping[str, Mapping[Any, Number]] | None = None,
) -> Figure:
    """How many of 100 utterances find their own transcript, at each layer of the LLM.

    Args:
        recall_at_1: label of a moment in training -> layer -> fraction in [0, 1]; the last label is the result and
            carries its numbers.
        chance: fraction that guessing finds; a dashed line.
        recall_at_5: fractions that find it among the best five, same labels; dotted.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(3.3)
        colours = ["grey", "orange", "blue"] if len(recall_at_1) <= 3 else list(SERIES)
        if len(recall_at_1) == 2:
            colours.pop(1)
        layers: set[int] = set()
        others: list[tuple[float, float]] = []  # points of earlier moments, which numbers must not cover
        for number, (label, values) in enumerate(recall_at_1.items()):
            colour = COLOURS[colours[number % len(colours)]][0]
            top = (recall_at_5 or {}).get(label)
            if top:
                axes.plot(*_layers_and_percent(top), ":", color=colour, linewidth=1.3, alpha=0.75)
            x, y = _layers_and_percent(values)
            layers.update(int(layer) for layer in x)
            marker = MARKERS[number % len(MARKERS)]
            axes.plot(x, y, marker=marker, markersize=5, color=colour, label=label, clip_on=False, zorder=3)
            points = dict(zip(x, y, strict=True))
            if number < len(recall_at_1) - 1:
                others.extend(points.items())
        for layer, percent in points.items() if recall_at_1 else ():
            text = f"{percent:.0f}" if percent >= 1 or percent == 0 else f"{percent:.1f}"
            above = max((y for x, y in others if x == layer and 0 < y - percent < 12), default=percent)
            below = above > percent > 12  # an earlier moment's point is where the number would stand
            place = dict(xytext=(0, -14 if below else 7), textcoords="offset points", ha="center", color=colour)
            position = (layer, percent if below else above)
            axes.annotate(text, position, fontsize=9, fontweight="bold", zorder=4, **place)
        if chance is not None and math.isfinite(chance):
            axes.axhline(100 * chance, color=COLOURS["red"][0], linestyle="--", linewidth=1.2, zorder=2)
            axes.plot([], [], "--", color=COLOURS["red"][0], linewidth=1.2, label=f"guessing ({100 * chance:.1f})")
        if recall_at_5:
            axes.plot([], [], ":", color=COLOURS["faint"][0], label="dotted: in the best five")
        axes.set_ylim(0, 100)
        axes.set_xticks(sorted(layers))
        axes.set_xlabel("layer of the LLM (0 = its input)")
        axes.set_ylabel("utterances found, of 100")
        axes.grid(axis="x", visible=False)
        _legend_above(axes, columns=2)
    return figure


def loss_curve(history: Sequence[Mapping[str, Any]], *, switches: Sequence[tuple[float, str]] = ()) -> Figure:
    """The total loss over the steps of training.

    Args:
        history: entries with `step` and `loss`.
        switches: (step, what begins there), a vertical line each, as `schedule_switches` gives them.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(2.9)
        x, y = _finite([entry.get("step") for entry in history], [entry.get("loss") for entry in history])
        axes.plot(x, y, color=COLOURS["blue"][0], marker="o" if len(x) == 1 else None)
        _finish_loss_axes(axes, "loss (nats, sum of the layers)", switches)
    return figure


def loss_per_layer(history: Sequence[Mapping[str, Any]], *, switches: Sequence[tuple[float, str]] = ()) -> Figure:
    """The loss of each layer over the steps of training; entries hold `step` and `loss_layer_<number>`."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(2.9)
        steps = [entry.get("step") for entry in history]
        layers = layers_of(history)
        for number, layer in enumerate(layers):
            x, y = _finite(steps, [entry.get(f"loss_layer_{layer}") for entry in history])
            shade = round(number / max(1, len(layers) - 1) * (LAYER_SHADES - 1))
            marker = "o" if len(x) == 1 else None
            axes.plot(x, y, color=COLOURS[f"layer{shade}"][0], linewidth=1.5, marker=marker, label=str(layer))
        _finish_loss_axes(axes, "loss of one layer (nats)", switches)
        if layers:
            place = dict(loc="upper left", bbox_to_anchor=(1.0, 1.03), handlelength=1.2, labelspacing=0.35)
            axes.legend(title="layer", title_fontsize=9, alignment="left", **place)
    return figure


def loss_of_runs(curves: Sequence[Curve], *, colours: Sequence[str] = SERIES) -> Figure:
    """Training losses of several runs over their steps; `colours` names one entry of `COLOURS` per curve."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(3.3)
        for number, (label, steps, losses) in enumerate(curves):
            x, y = _finite(steps, losses)
            style = ("-", "--", "-.", ":")[number % 4]
            axes.plot(x, y, style, color=COLOURS[colours[number % len(colours)]][0], label=_short(label), linewidth=1.6)
        _finish_loss_axes(axes, "loss (nats per token)", ())
        _legend_above(axes, columns=1)
    return figure


def similarity_matrices(
    matrices: Mapping[str, Sequence[Sequence[Number]]], *, label: str = "cosine similarity"
) -> Figure:
    """Similarity of every transcript (row) with every recording (column), on one colour scale.

    A dot marks a recording whose most similar transcript is its own (it lies on the diagonal), a cross marks the
    wrong transcript that won.

    Args:
        matrices: name, such as "before", -> (texts, utterances) similarities, matching pairs on the diagonal.
        label: of the colour scale.
    """
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(NARROW, 2.6), layout="compressed")
        panels = figure.subplots(1, max(2, len(matrices)), squeeze=False)[0]
        arrays = {name: _matrix(rows) for name, rows in matrices.items()}
        values = np.concatenate([array[np.isfinite(array)].ravel() for array in arrays.values()] or [np.zeros(1)])
        low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
        image = None
        for axes, (name, array) in zip(panels, arrays.items(), strict=False):
            image = axes.imshow(array, vmin=low, vmax=high, cmap="viridis", interpolation="none")
            found, best = diagonal_hits(array)
            _mark_winners(axes, best)
            axes.set_title(f"{name}: {found} of {array.shape[1]}")
            axes.set_xlabel("recordings")
            axes.set_xticks([])
            axes.set_yticks([])
        panels[0].set_ylabel("transcripts")
        for axes in panels[len(arrays) :]:
            axes.axis("off")
        if image is not None:
            bar = figure.colorbar(image, ax=panels[: len(arrays)], location="bottom", aspect=40, shrink=0.8, pad=0.03)
            bar.set_label(label, fontsize=8.5)
            bar.outline.set_visible(False)
            bar.ax.tick_params(labelsize=8)
    return figure


def error_rate_bars(
    runs: Sequence[Mapping[str, Any]], *, colours: Sequence[str] = SERIES, scale: float | None = None
) -> Figure:
    """Word and character error rates of several runs, one group of two bars each; shorter is better.

    Args:
        runs: entries with `label`, `wer` and `cer` (fractions; may exceed 1).
        colours: one entry of `COLOURS` per run.
        scale: error rate at the right end, so that several figures can be compared; by default the largest.
    """
    rates = [value for run in runs for value in (_number(run.get("wer")), _number(run.get("cer")))]
    scale = scale or max((value for value in rates if math.isfinite(value)), default=1.0) or 1.0
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(0.45 + 0.8 * max(1, len(runs)), width=NARROW)
        for row, run in enumerate(runs):
            colour = COLOURS[colours[row % len(colours)]][0]
            label = dict(xytext=(3, 0), textcoords="offset points", va="center")
            axes.annotate(_short(run.get("label", "")), (0, row - 0.36), fontsize=9, **label)
            for offset, height, name, alpha in ((-0.07, 0.26, "wer", 1.0), (0.2, 0.15, "cer", 0.55)):
                value = _number(run.get(name))
                if math.isfinite(value):
                    axes.barh(row + offset, 100 * value, height, color=colour, alpha=alpha)
                text = f"{100 * value:.0f}% {name.upper()}" if math.isfinite(value) else f"{name.upper()} not measured"
                place = dict(xytext=(4, 0), textcoords="offset points", va="center")
                bold = "bold" if name == "wer" else "normal"
                start = 100 * value if math.isfinite(value) else 0
                axes.annotate(text, (start, row + offset), fontsize=8.5, fontweight=bold, **place)
        axes.set_xlim(0, 100 * scale * 1.35)
        axes.set_ylim(len(runs) - 0.6, -0.55)
        axes.set_yticks([])
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(PercentFormatter(decimals=0))
        axes.tick_params(axis="x", length=0, labelsize=8.5)
        axes.spines[["bottom", "left"]].set_visible(False)
    return figure


def lines_per_place(
    curves: Mapping[str, Mapping[str, Number | Sequence[Number]]],
    measure: str,
    *,
    references: Mapping[str, Number] | None = None,
    limits: tuple[Number, Number] = (None, None),
    places: str = "layer of the LLM (0 = its input)",
) -> Figure:
    """One measure at several places of the model, in the order of the first curve, evenly spaced.

    Args:
        curves: label -> place -> value, or (value, low, high), whose interval is drawn as a band.
        measure: what the values are, for the axis.
        references: label -> value, such as what guessing gives; dashed lines.
        limits: lowest and highest value of the axis; by default those of the data.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(3.0 + 0.2 * max(0, len(curves) - len(SERIES)))  # room for the legend
        names = [str(place) for place in dict.fromkeys(place for values in curves.values() for place in values)]
        for number, (label, values) in enumerate(curves.items()):
            colour, marker = (series[number % len(series)] for series in (SERIES, MARKERS))
            dashes = "-" if number < len(SERIES) else "--"
            triples = [
                (*value, None, None)[:3] if isinstance(value, Sequence) else (value, None, None)
                for value in values.values()
            ]
            at = [names.index(str(place)) for place in values]
            table = np.array([[_number(entry) for entry in triple] for triple in triples], dtype=float).reshape(-1, 3)
            style = {"marker": marker, "markersize": 4.5, "linestyle": dashes, "color": COLOURS[colour][0]}
            axes.plot(at, table[:, 0], label=_short(label), **style)
            axes.fill_between(at, table[:, 1], table[:, 2], color=COLOURS[colour][0], alpha=0.16, linewidth=0)
        for label, value in (references or {}).items():
            if math.isfinite(_number(value)):
                axes.axhline(value, color=COLOURS["red"][0], linestyle="--", linewidth=1.2, label=_short(label))
        axes.set_ylim(*limits)
        axes.set_xticks(range(len(names)), names)
        axes.set_xlabel(places)
        axes.set_ylabel(measure)
        axes.grid(axis="x", visible=False)
        _legend_above(axes, columns=1)
    return figure


def value_map(values: Mapping[str, Mapping[str, tuple[Number, str]]], measure: str) -> Figure:
    """A table in colours: rows and columns by name, a number in [0, 1] as the colour of a cell, a text in it.

    Args:
        values: row -> column -> (colour's number, text); the first row has all columns.
        measure: what the colours say.
    """
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        columns = list(next(iter(values.values()), {}))
        figure, axes = _panel(1.25 + 0.33 * max(1, len(values)), width=max(WIDTH, 1.2 + 0.5 * len(columns)))
        shades = LinearSegmentedColormap.from_list("from_clear", [f"{COLOURS['blue'][0]}00", COLOURS["blue"][0]])
        table = _matrix([[row.get(column, (None, ""))[0] for column in columns] for row in values.values()])
        if table.size:
            edges = np.arange(max(table.shape) + 1) - 0.5
            mesh = axes.pcolormesh(
                edges[: table.shape[1] + 1], edges[: table.shape[0] + 1], table, cmap=shades, vmin=0, vmax=1.6
            )
            mesh.set_edgecolor("face")
        for y, row in enumerate(values.values()):
            for x, column in enumerate(columns):
                axes.annotate(row.get(column, (None, ""))[1], (x, y), ha="center", va="center", fontsize=8.5)
        axes.set_ylim(len(values) - 0.5, -0.5)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(values)), [_short(label) for label in values])
        axes.tick_params(length=0)
        axes.set_xlabel(measure)
        axes.spines[["left", "bottom"]].set_visible(False)
    return figure


def layers_of(history: Sequence[Mapping[str, Any]]) -> list[int]:
    """Layers with a loss `loss_layer_<number>` in any entry, ascending."""
    keys = {key for entry in history for key in entry}
    return sorted(int(match[1]) for key in keys if (match := re.fullmatch(r"loss_layer_(\d+)", key)))


def schedule_switches(schedule: str) -> list[tuple[float, str]]:
    """Steps at which a layer schedule such as "0:emb 300:all" changes, with what begins there; the start is none."""
    parts = [part.partition(":") for part in schedule.split()]
    switches = [(_number(step), layers) for step, _, layers in parts if _number(step) > 0]
    words = {"emb": "layer 0 only", "all": "all layers"}
    return [(step, words.get(layers, f"layers {layers}")) for step, layers in switches if math.isfinite(step)]


def diagonal_hits(matrix: Sequence[Sequence[Number]] | np.ndarray) -> tuple[int, list[int | None]]:
    """How many columns (recordings) have their largest value on the diagonal, and each column's winning row.

    A column without any finite value has the winner `None` and counts as a miss.
    """
    array = _matrix(matrix)
    best: list[int | None] = [
        int(np.nanargmax(column)) if np.isfinite(column).any() else None
        for column in np.where(np.isfinite(array), array, np.nan).T
    ]
    return sum(row == column for column, row in enumerate(best)), best


def svg_document(figure: Figure) -> str:
    """The figure as a complete SVG file on white, the same text for the same numbers."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", facecolor=_WHITE, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def png_bytes(figure: Figure, dots_per_inch: int = 200) -> bytes:
    """The figure as a PNG file on white."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="png", facecolor="white", dpi=dots_per_inch, metadata={"Software": None})
    return buffer.getvalue()


def inline_svg(document: str, name: str, description: str) -> str:
    """An SVG file of this module as one `<svg>` element for a web page: transparent, in the page's font and colours.

    Args:
        document: from `svg_document`.
        name: unique within the page; prefixes all ids inside.
        description: text alternative for readers who do not see the plot.
    """
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", document[document.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(\sid="|url\(#|href="#)', lambda match: f"{match[1]}{name}-", text)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--plot-font, sans-serif)", text)
    text = text.replace(f"fill: {_WHITE}", "fill: none")
    for colour, (light, _) in COLOURS.items():
        text = text.replace(light, f"var(--plot-{colour}, {light})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(description)}" ', 1)


def colour_variables(*, dark: bool) -> str:
    """CSS declarations of the variables that `inline_svg` uses, for light or dark pages."""
    return " ".join(f"--plot-{name}: {pair[dark]};" for name, pair in COLOURS.items())


def _panel(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("none")
    return figure, axes


def _legend_above(axes: Axes, columns: int) -> None:
    """A legend over the axes, from their left edge."""
    if axes.get_legend_handles_labels()[0]:
        place = dict(loc="lower left", bbox_to_anchor=(-0.02, 1.0), borderaxespad=0.2)
        axes.legend(ncols=columns, columnspacing=1.2, handlelength=1.9, **place)


def _finish_loss_axes(axes: Axes, label: str, switches: Sequence[tuple[float, str]]) -> None:
    """Axis labels, a scale from zero and the marks of a curriculum."""
    axes.set_xlabel("training step")
    axes.set_ylabel(label)
    axes.set_xlim(left=0)
    axes.set_ylim(0, axes.dataLim.y1 * 1.15 if math.isfinite(axes.dataLim.y1) and axes.dataLim.y1 > 0 else 1)
    right = axes.get_xlim()[1]
    for step, begins in switches:
        if step < right:
            axes.axvline(step, color=COLOURS["faint"][0], linestyle="--", linewidth=1)
            toward_left = step > 0.6 * right
            place = dict(xytext=(-4 if toward_left else 4, -2), textcoords="offset points", va="top")
            place |= dict(xycoords=("data", "axes fraction"), ha="right" if toward_left else "left")
            axes.annotate(f"from {step:g}: {begins}", (step, 1.0), fontsize=8.5, color=COLOURS["faint"][0], **place)


def _mark_winners(axes: Axes, best: Sequence[int | None]) -> None:
    """A dot on each column's winner if it is on the diagonal, else a cross; outlined to show on any colour."""
    hits = [column for column, row in enumerate(best) if row == column]
    misses = [(column, row) for column, row in enumerate(best) if row is not None and row != column]
    size = max(1.5, 60 / max(1, len(best)))
    outline = [patheffects.withStroke(linewidth=2.0, foreground="#000001")]
    axes.plot(hits, hits, "o", markersize=size, color="#fffffe", markeredgecolor="#000001", markeredgewidth=0.7)
    x, y = zip(*misses, strict=True) if misses else ((), ())
    axes.plot(x, y, "x", markersize=size, markeredgewidth=0.9, color="#fffffe", path_effects=outline)


def _short(label: Any) -> str:
    """A label on one line that fits a figure."""
    text = " ".join(str(label).split())
    return text if len(text) <= MAXIMUM_LABEL else f"{text[: MAXIMUM_LABEL - 1]}…"


def _number(value: Any) -> float:
    """A float; NaN for what is not a number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _matrix(rows: Sequence[Sequence[Number]] | np.ndarray) -> np.ndarray:
    """A float array with NaN where numbers are missing."""
    return np.array([[_number(value) for value in row] for row in rows], dtype=float)


def _layers_and_percent(values: Mapping[Any, Number]) -> tuple[np.ndarray, np.ndarray]:
    """Layers in ascending order and their fractions in percent."""
    layers = sorted(values, key=int)
    x, y = _finite([int(layer) for layer in layers], [values[layer] for layer in layers])
    return x, 100 * y


def _finite(x: Sequence[Number], y: Sequence[Number]) -> tuple[np.ndarray, np.ndarray]:
    """Points whose two numbers are finite; more than `MAXIMUM_POINTS` become means of neighbours."""
    points = np.array([(_number(a), _number(b)) for a, b in zip(x, y, strict=True)], dtype=float).reshape(-1, 2)
    points = points[np.isfinite(points).all(axis=1)]
    if len(points) > MAXIMUM_POINTS:
        points = np.array([block.mean(axis=0) for block in np.array_split(points, MAXIMUM_POINTS)])
    return points[:, 0], points[:, 1]
