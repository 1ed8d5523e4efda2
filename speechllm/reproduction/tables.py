"""The results as tables of text, for a page of Markdown and one of HTML."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .measures import MEASURES, STAYS, Measure
from .probing import decodable, mean_at


Results = Mapping[str, Any]  # see `report.Report.results`
MARKS = {"none": "₀", "asr-pretraining": "ₐ"}  # of a baseline, behind an arrow


@dataclass
class Table:
    title: str
    header: list[str]
    note: str = ""
    lines: list[list[str]] = field(default_factory=list)
    level: int = 2


def about(results: Results) -> str:
    """What was run, where, with what."""
    cells = results["cells"]
    places = "; or ".join(_environment(environment) for environment in results["environments"])
    units = ", ".join(f"{count} {task}" for task, count in results["units"].items())
    return (
        f"{cells['there']} of {cells['planned']} cells; seeds {', '.join(map(str, results['seeds'])) or 'none yet'}; test "
        f"recordings or passages: {units or 'none yet'}; {places}."
    )


def _environment(environment: Mapping[str, Any]) -> str:
    known = {"platform", "processor", "cpus", "jobs", "gpu"}
    versions = [f"{name} {number}" for name, number in environment.items() if name not in known]
    machine = [environment["platform"], f"{environment['cpus']} x {environment['processor']}", environment.get("gpu")]
    return ", ".join([*versions, *filter(None, machine), f"{environment['jobs']} at a time"])


def tables_of(results: Results) -> list[Table]:
    losses = [measure for measure in MEASURES if measure.metric == "loss"]
    traits = [measure for measure in MEASURES if measure.task == "traits" and measure.metric != "loss"]
    others = [
        measure for measure in MEASURES if measure.metric != "loss" and (measure not in traits or measure.decides)
    ]
    legend = (
        "Mean over seeds with its 95% interval (seeds and test set). Arrows: better ↑ or worse ↓ than no pretraining (₀) "
        "or ASR pretraining (ₐ) on the same data, paired, p < 0.05, not adjusted for the number of tests. Answers end at "
        "twice the length of their task's longest right answer."
    )
    tables = [
        *([_claims(results)] if results["claims"] else []),
        _pretraining(results),
        *_by_language(results),
        _fine_tuned(results, "Fine-tuned: the field's metrics", others, legend),
        _fine_tuned(results, "Fine-tuned: loss of the right answers, nats per token", losses, legend),
        _fine_tuned(results, "Fine-tuned: traits one by one, accuracy %", traits, legend),
        *_probed(results),
        _cost(results),
        *(table for claim in results["claims"] for table in _comparisons(claim)),
    ]
    # What is empty and not waited for was never planned: not every study fine-tunes.
    return [table for table in tables if table.lines or results["missing"]]


def markdown(results: Results, tables: list[Table], figures: list[str], plots: str = "plots") -> str:
    """A page whose plots are the files `<plots>/<figure>.svg` beside it."""
    lines = [f"# {results['title']}", "", f"`{results['command']}`", "", about(results), ""]
    lines += [f"- {note}" for note in results["notes"]]
    if missing := results["missing"]:
        lines += ["", f"**Not run, or failed:** {', '.join(missing)}."]
    for table in tables:
        lines += ["", f"{'#' * table.level} {table.title}", "", *([table.note, ""] if table.note else [])]
        if not table.lines:
            lines.append("Not run yet.")
            continue
        lines += [_line(table.header), "|" + "---|" * len(table.header), *map(_line, table.lines)]
    if figures:
        lines += ["", "## Plots", "", *(f"![{name}]({plots}/{name}.svg)" for name in figures)]
    return "\n".join(lines) + "\n"


def _line(texts: list[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


# ---- the tables ------------------------------------------------------------------------------------------------------


def _claims(results: Results) -> Table:
    note = (
        "A comparison is confirmed or contradicted if p < 0.05 after Holm's adjustment within its claim; a claim is "
        "confirmed if all of its comparisons are, contradicted if one is and none is confirmed, else undecided at this "
        "size. The field's metrics decide; the loss of the right answers is shown beside."
    )
    table = Table("Claims", ["claim", "verdict", "confirmed", "contradicted", "of", "by the loss", "confirmed",
                             "contradicted"], note)  # fmt: skip
    for claim in results["claims"]:
        by_metric, by_loss = claim["by_metric"], claim["by_loss"]
        of = f"{by_metric['run']}" + ("" if by_metric["run"] == by_metric["planned"] else f" ({by_metric['planned']})")
        counts = [[str(kind["confirmed"]), str(kind["contradicted"])] for kind in (by_metric, by_loss)]
        verdict = by_metric["verdict"] + (" (one seed)" if by_metric["seeds"] == 1 else "")
        table.lines.append([claim["claim"], verdict, *counts[0], of, by_loss["verdict"], *counts[1]])
    return table


def _pretraining(results: Results) -> Table:
    header = ["row", "seeds", "recall@1, mean of layers", "by its own similarity", "each seed"]
    layers = next(
        (row["pretraining"]["retrieval"]["recall@1"] for row in results["rows"].values() if row["pretraining"]), {}
    )
    table = Table(
        "Pretrained: held-out retrieval",
        [*header, *(f"layer {layer}" for layer in layers)],
        "Per cent of utterances whose transcript is the nearest of all, by the cosine of mean states (and, for rows trained "
        "with another similarity, by that one), with the mean's 95% interval (seeds and test texts).",
    )
    for name, row in results["rows"].items():
        if entry := row["pretraining"]:
            recall = entry["retrieval"]
            values = list(recall["recall@1"].values())
            ends = recall["recall@1_intervals"].get("mean")
            seeds = ", ".join(f"{100 * value:.0f}" for value in recall["recall@1_of_seeds"])
            table.lines.append(
                [
                    name,
                    str(len(entry["seeds"])),
                    f"{100 * statistics.mean(values):.1f}" + (f" {_percents(ends)}" if ends else ""),
                    f"{100 * recall['own']['recall@1']:.1f}" if recall["own"] else "",
                    seeds,
                    *(f"{100 * value:.0f}" for value in values),
                ]
            )
    return table


def _by_language(results: Results) -> list[Table]:
    """Retrieval of each language's utterances, if there are several."""
    lines = []
    for name, row in results["rows"].items():
        for language, found in row["pretraining"].get("retrieval", {}).get("by_language", {}).items():
            percents = {place: 100 * value for place, value in found["recall@1"].items()}
            mean = f"{percents.pop('mean'):.1f} {_percents(found['intervals']['mean'])}"
            layers = list(percents)
            values = [f"{value:.0f}" for value in percents.values()]
            lines.append([name, language, str(found["utterances"]), mean, *values])
    if not lines:
        return []
    header = ["row", "language", "utterances", "recall@1, mean of layers", *(f"layer {layer}" for layer in layers)]
    note = "Per cent of a language's utterances whose transcript is the nearest among those of all languages."
    return [Table("Pretrained: held-out retrieval by language", header, note, lines)]


def _probed(results: Results) -> list[Table]:
    """A table per label: what a linear probe reads off each row's states, place by place."""
    rows = {name: row["probes"] for name, row in results["rows"].items() if row["probes"]}
    if not rows:
        return []
    first = next(iter(rows.values()))[0]
    tables = []
    for label, found in first.items():
        percent = 100 if found["metric"] == "accuracy" else 1
        digits = 0 if percent == 100 else 2
        note = (
            f"Linear probes, {found['metric']}{' in per cent' if percent == 100 else ''}; guessing "
            f"{percent * found['guessing']:.{digits}f}. Intervals: over test {'s and '.join(found['split_by'])}s; splits share no "
            f"{' and no '.join(found['split_by'])}."
        )
        if label in STAYS:
            states = ", ".join(f"{name}: {decodable(of_seeds, label)}" for name, of_seeds in rows.items())
            note += f" Told better than by guessing (interval above 0): {states}."
        table = Table(f"Probes: {label}", ["row", "seeds", *found["places"]], note)
        for name, of_seeds in rows.items():
            entries = [mean_at(of_seeds, label, place) for place in found["places"]]
            texts = [
                f"{percent * e['value']:.{digits}f} [{percent * e['interval'][0]:.{digits}f}, "
                f"{percent * e['interval'][1]:.{digits}f}]"
                for e in entries
            ]
            table.lines.append([name, str(len(of_seeds)), *texts])
        tables.append(table)
    return tables


def _cost(results: Results) -> Table:
    header = [
        "row",
        "steps",
        "seconds",
        "processor seconds",
        "peak memory, GB",
        "LLM tokens",
        "fine-tuning seconds",
        "fine-tuning peak, GB",
        "fine-tuning LLM tokens",
    ]
    table = Table(
        "Cost",
        header,
        "Of one pretraining, with the warm start that it goes on from, and of one fine-tuning, on the largest fraction; means "
        "over seeds. Frozen features that are computed once for all rows are not counted.",
    )
    for name, row in results["rows"].items():
        entry, line = row["pretraining"], [name]
        if entry:
            line += [f"{entry['steps']:.0f}", f"{entry['seconds']:.0f}", f"{entry['processor_seconds']:.0f}"]
            line += [f"{entry['peak_memory_bytes'] / 1e9:.1f}", f"{entry['llm_tokens']:,.0f}"]
        else:  # another row's
            line += [""] * 5
        tuned = row["fine_tuning"].get(max(row["fine_tuning"], key=int, default=None))
        if tuned:
            line += [
                f"{tuned['seconds']:.0f}",
                f"{tuned['peak_memory_bytes'] / 1e9:.1f}",
                f"{tuned['llm_tokens']:,.0f}",
            ]
        else:
            line += [""] * 3
        if entry or tuned:
            table.lines.append(line)
    return table


def _fine_tuned(results: Results, title: str, measures: list[Measure], note: str) -> Table:
    entries = [
        (name, percent, tested)
        for name, row in results["rows"].items()
        for percent, tested in row["fine_tuning"].items()
    ]
    shown = [m for m in measures if any(m.key in tested["measures"] for _, _, tested in entries)]
    table = Table(title, ["row", "data", "seeds", *(measure.label for measure in shown)], note)
    for name, percent, tested in entries:
        texts = [_value(tested["measures"].get(measure.key), measure) for measure in shown]
        table.lines.append([name, f"{percent}%", str(len(tested["seeds"])), *texts])
    return table


def _value(entry: Mapping[str, Any] | None, measure: Measure) -> str:
    if entry is None:
        return ""
    low, high = (_number(end, measure.digits) for end in entry["interval"])
    text = f"{entry['value']:.{measure.digits}f} [{low}, {high}]"
    for baseline, mark in MARKS.items():
        change = entry.get(f"against_{baseline}")
        if change and change["p"] is not None and change["p"] < 0.05:
            text += (" ↑" if (change["value"] > 0) == measure.higher_is_better else " ↓") + mark
    return text


def _percents(interval: list[float | None]) -> str:
    low, high = (_number(None if end is None else 100 * end, 1) for end in interval)
    return f"[{low}, {high}]"


def _number(value: float | None, digits: int) -> str:
    return "?" if value is None else f"{value:.{digits}f}"


def _comparisons(claim: Mapping[str, Any]) -> list[Table]:
    tables = []
    for kind, title in (("by_metric", "by the metrics"), ("by_loss", "by the loss")):
        verdict = claim[kind]
        if not verdict["comparisons"]:
            continue
        table = Table(
            f"{claim['name'][0].upper()}{claim['name'][1:]}, {title}: {verdict['verdict']}",
            ["comparison", "improvement", "95% interval", "each seed", "adjusted p", ""],
            level=3,
        )
        for part in verdict["comparisons"]:
            measure = next(m for m in MEASURES if (m.task, m.metric) == (part["task"], part["metric"]))
            numbers = [part["improvement"], *part["interval"], *part["improvement_of_seeds"]]
            value, low, high, *seeds = (_number(number, measure.digits) for number in numbers)
            table.lines.append(
                [part["comparison"], f"{value} {measure.label.partition(' ')[2]}", f"{low} to {high}", ", ".join(seeds),
                 f"{part['adjusted_p']:.3f}", part["verdict"]]
            )  # fmt: skip
        tables.append(table)
    return tables
