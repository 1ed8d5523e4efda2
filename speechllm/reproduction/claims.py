"""The paper's claims as comparisons of cells, and what the numbers say about each.

A claim is a list of comparisons "this cell is better at this task than that one". Each has an improvement (the difference
of the task's metric, turned so that more is better), an interval and a p-value (`intervals.py`), and the p-values of a
claim are adjusted for their number (Holm). Then

    a comparison is   confirmed      if its improvement is above 0 and the adjusted p below 0.05,
                      contradicted   if it is below 0 and the adjusted p below 0.05,
                      undecided      otherwise;
    a claim is        confirmed      if all its comparisons are,
                      contradicted   if at least one is, and none is confirmed,
                      undecided      otherwise: too small a size, or true of some of it only.

The verdict is by the field's metrics. Beside it stands the one by the loss of the right answers, which sees differences
long before an answer is right.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from scipy import stats

from ..evaluation.metrics.resampling import CorpusMetric
from .intervals import difference, holm
from .measures import MEASURES, STAYS, Measure
from .plan import Scale


LEVEL = 0.05
MARGINS = {"wer": 0.01, "loss": 0.05}  # words; nats per token
Cells = dict[tuple[str, int], dict[int, dict[tuple[str, str], CorpusMetric]]]  # (row, percent) -> seed -> metrics


@dataclass(frozen=True)
class Comparison:
    """`row` after fine-tuning on `percent` against another cell, at a task."""

    task: str
    row: str
    percent: int
    other: str
    other_percent: int
    margin: bool = False  # whether to be worse by less than `MARGINS` is enough

    def __str__(self) -> str:
        verb = "no worse than" if self.margin else "against"
        return f"{self.task}: {self.row} at {self.percent}% {verb} {self.other} at {self.other_percent}%"


@dataclass(frozen=True)
class Claim:
    name: str
    text: str
    comparisons: tuple[Comparison, ...]


def _claim(
    name: str,
    text: str,
    tasks: Sequence[str],
    rows: Sequence[str],
    others: Sequence[str],
    percents: Sequence[tuple[int, int]] = ((100, 100), (10, 10)),
    margin: bool = False,
) -> Claim:
    """All combinations; `percents`: of the row, of the other."""
    return Claim(
        name,
        text,
        tuple(
            Comparison(task, row, percent, other, other_percent, margin)
            for task in tasks
            for row in rows
            for other in others
            for percent, other_percent in percents
        ),
    )


_ALL = ("contr-cos-all", "contr-wasser-all")
CLAIMS = (
    _claim(
        "all layers",
        "Contrastive pretraining over all layers beats no pretraining and ASR pretraining on translation and question "
        "answering.",
        ("st", "sqa"), _ALL, ("none", "asr-pretraining"),
    ),
    _claim(
        "a tenth of the data",
        "After it, a tenth of the fine-tuning data gives more than all of it without pretraining.",
        ("asr", "st", "sqa"), _ALL, ("none",), ((10, 100),),
    ),
    _claim(
        "depth",
        "Aligning all layers beats aligning the LLM's input alone on translation and question answering.",
        ("st", "sqa"), _ALL, ("contr-cos-emb",),
    ),
    _claim(
        "the ASR loss",
        "Adding the ASR loss to contrastive pretraining improves recognition.",
        ("asr",), ("contr-cos-all-asr",), ("contr-cos-all",), ((100, 100),),
    ),
    _claim(
        "the gap to ASR pretraining",
        "With the ASR loss added, recognition is as good as after ASR pretraining (less than a point of WER worse, or 0.05 "
        "nats).",
        ("asr",), ("contr-cos-all-asr",), ("asr-pretraining",), ((100, 100),), margin=True,
    ),
    _claim(
        "more pretraining data",
        "More pretraining data helps.",
        ("asr", "st", "sqa"), ("contr-cos-all",), ("contr-cos-all-29-percent",), ((100, 100),),
    ),
    _claim(
        "GigaSpeech",
        "More pretraining data helps (with GigaSpeech).",
        ("asr", "st", "sqa"), ("contr-cos-all-giga",), ("contr-cos-all",), ((100, 100),),
    ),
    _claim(
        "traits",
        "Contrastive pretraining is better than none at questions about what the voice tells besides words.",
        ("traits",), ("contr-cos-emb", *_ALL), ("none",),
    ),
)  # fmt: skip


DECODABLE = "Gender and noise stay decodable from the states, wherever they are without pretraining."


def claims_of(scale: Scale) -> list[Claim]:
    """The claims as far as the scale has the tasks, rows and fractions that they compare."""

    def there(row: str, percent: int) -> bool:
        return any(
            r.name == row and percent in (scale.fractions if r.fractions is None else r.fractions) for r in scale.rows
        )

    found = []
    for claim in CLAIMS:
        parts = [
            c
            for c in claim.comparisons
            if (not scale.tasks or c.task in scale.tasks)
            and there(c.row, c.percent)
            and there(c.other, c.other_percent)
        ]
        found += [replace(claim, comparisons=tuple(parts))] if parts else []
    return found


def compare(comparison: Comparison, measure: Measure, cells: Cells) -> dict[str, Any] | None:
    """The improvement in printed units over the seeds that both cells have; None where there are none."""
    a = cells.get((comparison.row, comparison.percent), {})
    b = cells.get((comparison.other, comparison.other_percent), {})
    key = (measure.task, measure.metric)
    seeds = sorted(seed for seed in a.keys() & b.keys() if key in a[seed] and key in b[seed])
    if not seeds:
        return None
    pairs = [a[seed][key] for seed in seeds], [b[seed][key] for seed in seeds]
    found = asdict(difference(*pairs))
    sign = measure.factor if measure.higher_is_better else -measure.factor
    allowed = MARGINS[measure.metric] if comparison.margin else 0.0
    low, high = sorted(sign * end for end in found["interval"])
    return {
        "comparison": str(comparison),
        **asdict(comparison),
        "metric": measure.metric,
        "improvement": sign * found["value"],
        "interval": [low, high],
        "p": difference(*pairs, offset=allowed if measure.higher_is_better else -allowed).p,
        "allowed": measure.factor * allowed,
        "seeds": seeds,
        "improvement_of_seeds": [sign * value for value in found["seeds"]],
    }


def judge(parts: list[dict[str, Any]], planned: int) -> dict[str, Any]:
    """The verdict on a claim from its comparisons (see above), each of which gets `adjusted_p` and `verdict`.

    Args:
        planned: how many comparisons the claim has; the others were not run.
    """
    for part, p in zip(parts, holm([part["p"] for part in parts])):
        part["adjusted_p"] = p
        improvement = part["improvement"] + part["allowed"]
        sure = p < LEVEL and improvement != 0
        part["verdict"] = ("confirmed" if improvement > 0 else "contradicted") if sure else "undecided"
    counts = {name: sum(part["verdict"] == name for part in parts) for name in ("confirmed", "contradicted")}
    if not parts:
        verdict = "not run"
    elif counts["confirmed"] == planned:
        verdict = "confirmed"
    elif counts["contradicted"] and not counts["confirmed"]:
        verdict = "contradicted"
    else:
        verdict = "undecided"
    seeds = min((len(part["seeds"]) for part in parts), default=0)
    return {"verdict": verdict, "seeds": seeds, **counts, "run": len(parts), "planned": planned, "comparisons": parts}


def verdicts(cells: Cells, claims: Sequence[Claim] = CLAIMS) -> list[dict[str, Any]]:
    """Of each claim: by the field's metrics, and by the loss of the right answers."""
    found = []
    for claim in claims:
        entry: dict[str, Any] = {"name": claim.name, "claim": claim.text}
        for kind in ("metric", "loss"):
            parts = []
            for comparison in claim.comparisons:
                measure = next(
                    measure
                    for measure in MEASURES
                    if measure.task == comparison.task
                    and (measure.metric == "loss" if kind == "loss" else measure.decides)
                )
                parts += [part] if (part := compare(comparison, measure, cells)) else []
            entry[f"by_{kind}"] = judge(parts, len(claim.comparisons))
        found.append(entry)
    return found


# ---- what stays decodable ----------------------------------------------------------------------------------------------


def decodability(probes: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """The claim that gender and noise stay decodable, from linear probes (`probing.py`).

    A row is judged at the place, of those where the states without pretraining tell the label, at which its own tell it
    least: by how much more often than guessing, whose p-value is that of a normal distribution with the interval.

    Args:
        probes: row -> of each seed, label -> see `probe_cell`.
    """
    rows = ("contr-cos-emb", *_ALL)
    parts = []
    for row, label in itertools.product(rows, STAYS):
        if not probes.get(row) or not probes.get("none"):
            continue
        before = probes["none"][0][label]["places"]
        places = {
            place: found["above_guessing"]
            for place, found in probes[row][0][label]["places"].items()
            if before[place]["above_guessing"]["interval"][0] > 0
        }
        if not places:
            continue
        place, found = min(places.items(), key=lambda item: item[1]["value"])
        low, high = found["interval"]
        measure = next(measure for measure in MEASURES if (measure.task, measure.metric) == ("probe", label))
        error = (high - low) / (2 * stats.norm.ppf(0.975))
        parts.append(
            {
                "comparison": f"{label}: {row} against guessing, at {place}, the least of {len(places)} places",
                "task": "probe",
                "metric": label,
                "improvement": measure.factor * found["value"],
                "interval": [measure.factor * low, measure.factor * high],
                "p": float(2 * stats.norm.sf(abs(found["value"]) / error)) if error else float(found["value"] == 0),
                "allowed": 0.0,
                "seeds": [0],
                "improvement_of_seeds": [measure.factor * found["value"]],
            }
        )
    return {
        "name": "gender and noise",
        "claim": DECODABLE,
        "by_metric": judge(parts, len(rows) * len(STAYS)),
        "by_loss": {"verdict": "", "confirmed": "", "contradicted": "", "comparisons": []},
    }
