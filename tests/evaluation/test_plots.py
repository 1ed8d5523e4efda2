import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest

from speechllm.evaluation import plots


HISTORY = [
    {"step": 10, "loss": 3.4, "loss_layer_0": 3.4},
    {"step": 20, "loss": math.nan, "loss_layer_0": None},
    {"step": 30, "loss": 6.0, "loss_layer_0": 2.0, "loss_layer_10": 4.0},
    {"step": 40, "loss": 4.0, "loss_layer_0": 1.5, "loss_layer_10": 2.5},
]
EYE = np.eye(6)
FIGURES = {
    "recall": lambda: plots.recall_per_layer(
        {"before": {"0": 0.01, "10": 0.0, "5": None}, "after": {"0": 0.5, "5": math.nan, "10": 0.6}},
        chance=0.0093,
        recall_at_5={"after": {"0": 0.8, "10": 0.9}},
    ),
    "loss": lambda: plots.loss_curve(HISTORY, switches=[(25, "all layers")]),
    "layers": lambda: plots.loss_per_layer(HISTORY, switches=[(25, "all layers")]),
    "runs": lambda: plots.loss_of_runs([("a", [1, 2], [3.0, 2.0]), ("b", [1, 2], [None, 2.5])]),
    "similarity": lambda: plots.similarity_matrices({"before": EYE[::-1], "after": EYE}),
    "bars": lambda: plots.error_rate_bars([{"label": "a", "wer": 1.21, "cer": None}, {"label": "b", "wer": 0.5}]),
    "places": lambda: plots.lines_per_place(
        {"a": {"encoder": (0.9, 0.8, 0.95), "0": (0.5, None, None)}, "b": {"encoder": 0.7, "0": None}},
        "accuracy",
        references={"guessing": 0.3, "unknown": None},
    ),
    "map": lambda: plots.value_map(
        {"words": {"0": (0.4, "0.70"), "5": (None, "?")}, "noise": {"0": (1.0, "1")}}, "place"
    ),
}
EMPTY = {
    "recall": lambda: plots.recall_per_layer({}),
    "recall without numbers": lambda: plots.recall_per_layer({"before": {"0": None}}, chance=math.nan),
    "loss": lambda: plots.loss_curve([]),
    "layers": lambda: plots.loss_per_layer([{"step": 1}]),
    "runs": lambda: plots.loss_of_runs([("a", [], [])]),
    "similarity": lambda: plots.similarity_matrices({"before": [[math.nan, None], [None, None]]}),
    "no similarity": lambda: plots.similarity_matrices({}),
    "bars": lambda: plots.error_rate_bars([]),
    "places": lambda: plots.lines_per_place({}, "accuracy"),
    "map": lambda: plots.value_map({}, "place"),
    "bars without numbers": lambda: plots.error_rate_bars([{"label": "a", "wer": math.nan}]),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_plot_becomes_the_same_files_every_time(name):
    document = plots.svg_document(FIGURES[name]())
    ElementTree.fromstring(document)
    assert document == plots.svg_document(FIGURES[name]())
    assert plots.png_bytes(FIGURES[name](), 60).startswith(b"\x89PNG")


@pytest.mark.parametrize("name", EMPTY)
def test_missing_numbers_leave_an_empty_plot(name):
    ElementTree.fromstring(plots.svg_document(EMPTY[name]()))


def test_an_inline_plot_follows_the_page():
    document = plots.svg_document(FIGURES["similarity"]())
    svg = plots.inline_svg(document, "first", 'a "b" <c>')
    root = ElementTree.fromstring(svg)
    assert root.attrib["aria-label"] == 'a "b" <c>' and root.attrib["role"] == "img"
    ids = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    assert ids and all(name.startswith("first-") for name in ids) and len(set(ids)) == len(ids)
    targets = {value[1:] for element in root.iter() for key, value in element.attrib.items() if value.startswith("#")}
    assert targets <= set(ids)
    assert "var(--plot-ink, #1c2126)" in svg and "DejaVu" not in svg and "metadata" not in svg
    assert "#fffffd" not in svg  # no paper
    for dark in (False, True):
        assert all(f"--plot-{name}: {pair[dark]};" in plots.colour_variables(dark=dark) for name, pair in _used(svg))


def _used(svg):
    return [(name, pair) for name, pair in plots.COLOURS.items() if f"--plot-{name}," in svg]


def test_colours_are_told_apart_and_readable():
    def luminance(colour):
        channels = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
        return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def contrast(one, other):
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    assert len({light for light, _ in plots.COLOURS.values()}) == len(plots.COLOURS)
    for name, (light, dark) in plots.COLOURS.items():
        wanted = 4.5 if name in ("ink", "faint", *plots.SERIES[:5]) else 1.2 if name == "grid" else 3
        assert contrast(light, "#ffffff") >= wanted, name
        assert contrast(dark, "#14171a") >= wanted, name


def test_global_settings_and_pyplot_are_left_alone():
    before = dict(matplotlib.rcParams)
    for figure in FIGURES.values():
        plots.svg_document(figure())
    assert dict(matplotlib.rcParams) == before
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, plots.__file__]).returncode == 0


def test_labels_are_plain_text():
    hostile = "5$ and </svg><script>alert(1)</script> $\\frac{"
    svg = plots.svg_document(plots.loss_of_runs([(hostile, [1, 2], [3.0, 2.0])]))
    assert "<script" not in svg
    assert hostile in "".join(ElementTree.fromstring(svg).itertext())


def test_diagonal_hits():
    matrix = [[0.9, 0.1, 0.1], [0.2, 0.3, 0.8], [0.1, 0.2, math.nan]]
    assert plots.diagonal_hits(matrix) == (2, [0, 1, 1])
    assert plots.diagonal_hits([[None, 1.0], [None, 2.0]]) == (1, [None, 1])


def test_similarity_panels_share_one_scale_and_mark_winners():
    figure = plots.similarity_matrices({"before": 0.5 * EYE[::-1], "after": EYE})
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in panels] == ["before: 0 of 6", "after: 6 of 6"]
    assert {image.get_clim() for axes in panels for image in axes.images} == {(0.0, 1.0)}


def test_schedule_switches():
    assert plots.schedule_switches("0:emb 300:all") == [(300.0, "all layers")]
    assert plots.schedule_switches("0:emb 100:0,5 200:all") == [(100.0, "layers 0,5"), (200.0, "all layers")]
    assert plots.schedule_switches("") == plots.schedule_switches("all") == []


def test_layers_of_a_history():
    assert plots.layers_of(HISTORY) == [0, 10]
    assert plots.layers_of([]) == []


def test_long_curves_are_thinned_to_means():
    steps = list(range(10_000))
    figure = plots.loss_of_runs([("long", steps, [2.0] * 10_000)])
    x, y = figure.axes[0].lines[0].get_data()
    assert len(x) == plots.MAXIMUM_POINTS and set(y) == {2.0}


def test_missing_error_rates_are_named():
    figure = plots.error_rate_bars([{"label": "run", "wer": None, "cer": 0.25}])
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["run", "WER not measured", "25% CER"]
