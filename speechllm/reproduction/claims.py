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

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..evaluation.metrics.resampling import CorpusMetric
from .intervals import difference, holm
from .measures import MEASURES, Measure
from .plan import Scale


LEVEL = 0.05
Cells = dict[tuple[str, int], dict[int, dict[tuple[str, str], CorpusMetric]]]  # (row, percent) -> seed -> metrics


@dataclass(frozen=True)
class Comparison:
    """`row` after fine-tuning on `percent` against another cell, at a task."""

    task: str
    row: str
    percent: int
    other: str
    other_percent: int

    def __str__(self) -> str:
        return f"{self.task}: {self.row} at {self.percent}% against {self.other} at {self.other_percent}%"


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
) -> Claim:
    """All combinations; `percents`: of the row, of the other."""
    return Claim(
        name,
        text,
        tuple(
            Comparison(task, row, percent, other, other_percent)
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
        "Adding the ASR loss to contrastive pretraining improves recognition (in the paper it closes the gap to ASR "
        "pretraining).",
        ("asr",), ("contr-cos-all-asr",), ("contr-cos-all",), ((100, 100),),
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
        "What the voice tells besides words is kept: contrastive pretraining is better than none at questions about it.",
        ("traits",), ("contr-cos-emb", *_ALL), ("none",),
    ),
)  # fmt: skip


def claims_of(scale: Scale) -> list[Claim]:
    """The claims as far as the scale has the rows and fractions that they compare."""

    def there(row: str, percent: int) -> bool:
        return any(
            r.name == row and percent in (scale.fractions if r.fractions is None else r.fractions) for r in scale.rows
        )

    found = []
    for claim in CLAIMS:
        parts = [c for c in claim.comparisons if there(c.row, c.percent) and there(c.other, c.other_percent)]
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
    found = asdict(difference([a[seed][key] for seed in seeds], [b[seed][key] for seed in seeds]))
    sign = measure.factor if measure.higher_is_better else -measure.factor
    low, high = sorted(sign * end for end in found["interval"])
    return {
        "comparison": str(comparison),
        **asdict(comparison),
        "metric": measure.metric,
        "improvement": sign * found["value"],
        "interval": [low, high],
        "p": found["p"],
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
        sure = p < LEVEL and part["improvement"] != 0
        part["verdict"] = ("confirmed" if part["improvement"] > 0 else "contradicted") if sure else "undecided"
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
