"""The report of a run, from what is there of its cells: results.json, results.md, results.html and plots.

Everything is computed from the cells' files, so that it can be written again at any time (`speechllm reproduce` does so
after every cell). Rows and fractions that were not run are left out, and the report says how much is there.
"""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..evaluation import plots
from ..evaluation.metrics.resampling import CorpusMetric
from ..evaluation.page import inline_plot, render, strict_json, write_whole
from .claims import CLAIMS, DECODABLE, Cells, Claim, claims_of, decodability, verdicts
from .comet import comet_models, comet_scores
from .intervals import Estimate, difference, mean_over_seeds
from .measures import MEASURES, Measure, Prediction, metrics_of, read_predictions, recall_of
from .plan import Cell, Scale, with_starts
from .run import read_result
from .scales import SCALES
from .stages import PREDICTIONS
from .tables import about, markdown, tables_of


TEMPLATE = Path(__file__).with_name("results.html.jinja")
BASELINES = ("none", "asr-pretraining")
MOST_LINES = 12
DRAWN = ("none", "asr-pretraining", "contr-cos-emb", "contr-cos-all", "contr-wasser-all")  # rows in the plots


class Report:
    """Reads cells as they come, and writes the report; a cell's predictions are scored once.

    Args:
        command: that runs these cells.
        name: of the files.
    """

    def __init__(self, scale: Scale, cells: list[Cell], output: Path, command: str, name: str = "results"):
        self.scale, self.cells, self.output, self.name = scale, cells, output, name
        self.plots = "plots" if name == "results" else f"plots-{name}"
        self.command = command
        study = "" if name == "results" else f"Study {name.removeprefix('study-')}, "
        self.title = f"{study}{'s' if study else 'S'}cale {scale.name}"
        self._predictions: dict[str, list[Prediction]] = {}  # by the cell's hash
        self._scored: dict[tuple[str, frozenset, frozenset[str]], dict[tuple[str, str], CorpusMetric]] = {}

    def write(self) -> dict[str, Any]:
        results = strict_json(self.results())
        write_whole(self.output / f"{self.name}.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        drawn = {
            name: inline_plot(figure, name, text, self.output / self.plots)
            for name, figure, text in figures_of(results)
        }
        tables = tables_of(results)
        page = render(TEMPLATE, results=results, tables=tables, figures=drawn, about=about(results))
        write_whole(self.output / f"{self.name}.html", page)
        write_whole(self.output / f"{self.name}.md", markdown(results, tables, list(drawn), self.plots))
        return results

    def results(self) -> dict[str, Any]:
        found = {cell: result for cell in self.cells if (result := read_result(cell, self.output))}
        tested, left_out = self._tested_cells([cell for cell in found if cell.stage == "fine-tuning"])
        rows = list(dict.fromkeys(cell.row for cell in self.cells))
        scored_by = [f"COMET is that of {name}." for name in comet_models(self.output / cell.name for cell in found)]
        return {
            "scale": self.scale.name,
            "title": self.title,
            "command": self.command,
            "notes": [
                *(*self.scale.notes, *self.scale.fine_tuning_notes, *self._not_judged()),
                *(*left_out, *_unusable(found), *scored_by),
            ],
            "cells": {"planned": len(self.cells), "there": len(found)},
            "missing": [cell.name.removeprefix("cells/") for cell in self.cells if cell not in found],
            "seeds": sorted({cell.seed for cell in found}),
            "created": max((result["created"] for result in found.values()), default=None),
            "environments": _distinct(result["environment"] for result in found.values()),
            "claims": verdicts(tested, self._claims()) + self._decodability(found),
            "rows": {row: self._row(row, found, tested) for row in rows},
            "units": {task: len(metric.statistics) for (task, _), metric in _any(tested).items()},
        }

    def _claims(self) -> list[Claim]:
        """With all the comparisons of the scale's grid, and those of further fractions that were asked for: half of a claim is
        not the claim. Of a study, those that it has all of."""
        grid, asked = (
            {claim.name: claim.comparisons for claim in claims_of(scale)}
            for scale in (SCALES.get(self.scale.name, self.scale), self.scale)
        )
        found = []
        for claim in CLAIMS:
            of_grid, comparisons = (some.get(claim.name, ()) for some in (grid, asked))
            if self.name == "results":
                comparisons = tuple(dict.fromkeys((*of_grid, *comparisons)))
            elif not {*of_grid} <= {*comparisons}:
                comparisons = ()
            found += [replace(claim, comparisons=comparisons)] if comparisons else []
        return found

    def _not_judged(self) -> list[str]:
        """A note on the claims that a scale has no rows for; a study is about something else."""
        if self.name != "results":
            return []
        judged = {claim.name for claim in self._claims()}
        missing = [claim.text for claim in CLAIMS if claim.name not in judged]
        if not any(row.probed for row in self.scale.rows):
            missing.append(DECODABLE)
        return [f"Not judged here, for want of rows or data: {' '.join(missing)}"] if missing else []

    def _decodability(self, found: Mapping[Cell, dict[str, Any]]) -> list[dict[str, Any]]:
        probes = {cell.row: [result["probes"]] for cell, result in found.items() if cell.stage == "probing"}
        return [decodability(probes)] if any(row.probed for row in self.scale.rows) else []

    def _tested_cells(self, cells: list[Cell]) -> tuple[Cells, list[str]]:
        """The metrics of cells, over the test rows that all of them answered, so that every two can be paired; and a note on
        the other rows. (Audio that cannot be decoded is missed by those that hear it, not by those that read.)"""
        for cell in cells:
            if cell.hash not in self._predictions:
                self._predictions[cell.hash] = read_predictions(self.output / cell.name / PREDICTIONS)
        answered = [frozenset(line["id"] for line in self._predictions[cell.hash]) for cell in cells]
        common = frozenset.intersection(*answered) if cells else frozenset()
        tested: Cells = defaultdict(dict)
        for cell in cells:
            comet = comet_scores(self.output / cell.name)
            key = (cell.hash, frozenset(comet.items()), common)
            if key not in self._scored:
                lines = [line for line in self._predictions[cell.hash] if line["id"] in common]
                self._scored[key] = metrics_of(lines, comet)
            tested[cell.row, cell.percent][cell.seed] = self._scored[key]
        if others := sorted(frozenset().union(*answered) - common):
            return tested, [
                f"{len(others)} test row(s) that not every model answered count for none, e.g. {others[0]}."
            ]
        return tested, []

    def _row(self, row: str, found: dict[Cell, dict[str, Any]], tested: Cells) -> dict[str, Any]:
        pretrained = [cell for cell in found if cell.row == row and cell.stage == "pretraining"]
        percents = sorted({percent for name, percent in tested if name == row}, reverse=True)
        probed = [cell for cell in found if cell.row == row and cell.stage == "probing"]
        return {
            "pretraining": _pretraining(pretrained, found),
            "probes": [found[cell]["probes"] for cell in probed],
            "fine_tuning": {
                str(percent): _tested(tested[row, percent], row, percent, tested)
                | {
                    "seconds": _mean(found, row, percent, "seconds"),
                    "peak_memory_bytes": _mean(found, row, percent, "peak_memory_bytes"),
                    "llm_tokens": _mean(found, row, percent, "llm_tokens"),
                }
                for percent in percents
            },
        }


def _unusable(found: Mapping[Cell, dict[str, Any]]) -> list[str]:
    """A note on the rows that cells could not use, if there are any."""
    most = max(found.values(), key=lambda result: result.get("set_aside", 0), default={})
    if not most.get("set_aside"):
        return []
    first = most.get("set_aside_first") or "see the log"
    return [
        f"Up to {most['set_aside']} row(s) of a run's data could not be used and count for nothing. The first: {first}"
    ]


def _distinct(dictionaries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({json.dumps(each, sort_keys=True): each for each in dictionaries}.values())


def _any(tested: Cells) -> dict[tuple[str, str], CorpusMetric]:
    return next(iter(next(iter(tested.values()), {}).values()), {})


def _mean(found: Mapping[Cell, dict[str, Any]], row: str, percent: int, name: str) -> float:
    return statistics.mean(result[name] for cell, result in found.items() if (cell.row, cell.percent) == (row, percent))


def _pretraining(cells: list[Cell], found: Mapping[Cell, dict[str, Any]]) -> dict[str, Any]:
    """Cost (with that of the rows it starts from) and retrieval, means over seeds."""
    if not cells:
        return {}
    chains = [[found[cell] for cell in with_starts(cell) if cell in found] for cell in cells]
    cost = {
        name: statistics.mean(sum(result[name] for result in chain) for chain in chains)
        for name in ("seconds", "processor_seconds", "steps", "llm_tokens")
    }
    cost["peak_memory_bytes"] = statistics.mean(
        max(result["peak_memory_bytes"] for result in chain) for chain in chains
    )
    ranked = [found[cell]["retrieval"] for cell in cells]
    first = ranked[0]
    # Intervals are of seeds that were measured on the same utterances. (Runs of earlier versions do not tell.)
    if "text_of" not in first or any(one.get("text_of") != first["text_of"] for one in ranked):
        ranked = []
    recalls = [recall_of(retrieval) for retrieval in ranked]
    own = [found[cell]["own_retrieval"] for cell in cells if "own_retrieval" in found[cell]]
    return {
        "seeds": [cell.seed for cell in cells],
        **cost,
        "retrieval": {
            "texts": first["texts"],
            **{
                name: {
                    layer: statistics.mean(found[cell]["retrieval"][name][layer] for cell in cells)
                    for layer in first[name]
                }
                for name in ("recall@1", "recall@5", "mean_rank")
            },
            "own": own
            and {
                "similarity": own[0]["similarity"],
                "seeds": len(own),
                "recall@1": statistics.mean(value for entry in own for value in entry["recall@1"].values()),
            },
            "recall@1_intervals": {
                place: mean_over_seeds([metrics[place] for metrics in recalls]).interval
                for place in (recalls[0] if recalls else ())
            },
            "by_language": _by_language(ranked),
            "recall@1_of_seeds": [statistics.mean(found[cell]["retrieval"]["recall@1"].values()) for cell in cells],
        },
    }


def _by_language(retrievals: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Where speech is in several languages: of each, recall@1 among the transcripts of all, and its interval, by layer and
    as their "mean"."""
    spoken = sorted({name for name in (retrievals[0].get("language_of", []) if retrievals else []) if name})
    found = {}
    for language in spoken if len(spoken) > 1 else ():
        metrics = [recall_of(retrieval, language) for retrieval in retrievals]
        estimates = {place: mean_over_seeds([of_seed[place] for of_seed in metrics]) for place in metrics[0]}
        found[language] = {
            "utterances": retrievals[0]["language_of"].count(language),
            "recall@1": {place: estimate.value for place, estimate in estimates.items()},
            "intervals": {place: estimate.interval for place, estimate in estimates.items()},
        }
    return found


def _tested(seeds: Mapping[int, Any], row: str, percent: int, tested: Cells) -> dict[str, Any]:
    """Every measure: its estimate, and the differences to the baselines on the same fraction."""
    order = sorted(seeds)
    found: dict[str, Any] = {"seeds": order, "measures": {}}
    for measure in MEASURES:
        key = (measure.task, measure.metric)
        if any(key not in seeds[seed] for seed in order):
            continue
        entry = printed(mean_over_seeds([seeds[seed][key] for seed in order]), measure)
        for baseline in BASELINES:
            others = tested.get((baseline, percent), {})
            common = [seed for seed in order if key in others.get(seed, {})]
            if row != baseline and common:
                change = difference([seeds[seed][key] for seed in common], [others[seed][key] for seed in common])
                entry[f"against_{baseline}"] = {**printed(change, measure), "p": change.p}
        found["measures"][measure.key] = entry
    return found


def printed(estimate: Estimate, measure: Measure) -> dict[str, Any]:
    """In the unit in which it is printed."""
    return {
        "value": measure.factor * estimate.value,
        "interval": [measure.factor * end for end in estimate.interval],
        "seeds": [measure.factor * value for value in estimate.seeds],
        "error_of_seeds": measure.factor * estimate.error_of_seeds,
        "error_of_test": measure.factor * estimate.error_of_test,
    }


# ---- figures ---------------------------------------------------------------------------------------------------------


def figures_of(results: dict[str, Any]) -> list[tuple[str, Any, str]]:
    """(name, figure, text alternative) of what is there."""
    rows = {name: results["rows"][name] for name in DRAWN if name in results["rows"]}
    others = {name: row for name, row in results["rows"].items() if name not in rows}
    rows |= dict(list(others.items())[: max(0, MOST_LINES - len(rows))])
    found = []
    recalls = {
        name: {
            layer: (value, *retrieval["recall@1_intervals"].get(layer, ()))
            for layer, value in retrieval["recall@1"].items()
        }
        for name, row in rows.items()
        if (retrieval := row["pretraining"].get("retrieval"))
    }
    if recalls:
        figure = plots.lines_per_place(recalls, "recall@1", limits=(0, 1))
        found.append(
            ("retrieval", figure, "Held-out retrieval per layer, one line per row of pretraining, with 95% intervals.")
        )
    for measure in MEASURES:
        if measure.metric != "loss" and not measure.decides:
            continue
        curves = {
            name: {
                percent: (entry["value"], *entry["interval"])
                for percent, tested in reversed(row["fine_tuning"].items())
                if (entry := tested["measures"].get(measure.key))
            }
            for name, row in rows.items()
        }
        if curves := {name: values for name, values in curves.items() if values}:
            figure = plots.lines_per_place(curves, measure.label, places="% of the fine-tuning data")
            text = f"{measure.label} over the share of the fine-tuning data, one line per row, with 95% intervals."
            found.append((f"{measure.task}-{measure.metric}", figure, text))
    return found
