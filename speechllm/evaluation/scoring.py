"""From predictions to the metrics of each task: of all its rows, of each language pair or trait, and of each utterance."""

import math
from collections import defaultdict
from typing import Any

from ..data.schema import Row
from .metrics import MAIN_METRIC, ScoringError, paired_test, score
from .metrics import utterance_scores as scores_of


# By what a task's rows are told apart in the tables. (Target languages have metrics of their own already.)
GROUPS = {"asr": "language", "st": "language", "sqa": "language", "traits": "trait"}
# What one utterance is judged by, and whether more is better; BLEU says little about a single sentence.
UTTERANCE_METRIC = {"asr": ("wer", False), "st": ("chrf++", True), "sqa": ("f1", True), "traits": ("accuracy", True)}


def task_of(row: Row) -> str:
    return row.get("task") or "asr"


def references_of(row: Row) -> list[str]:
    """The row's acceptable answers. (A transcript is the answer to recognition only.)"""
    if task_of(row) == "sqa" and row.get("answers"):
        return list(row["answers"])
    answer = row.get("target") or (row.get("text") if task_of(row) == "asr" else None)
    return [answer] if answer else []


def is_scored(row: Row) -> bool:
    return task_of(row) in MAIN_METRIC and bool(references_of(row))


def score_task(task: str, rows: list[Row], predictions: dict[str, str], **options: Any) -> dict[str, Any]:
    """`metrics` of all rows and, where they differ in language or trait, of each of their `groups`.

    Args:
        rows: of that task, each with a reference and a prediction.
        predictions: by id.
        options: of `metrics.score`.
    """

    def scored(members: list[Row]) -> dict[str, Any]:
        try:
            return {"utterances": len(members), "metrics": score(task, members, predictions, **options)}
        except ScoringError as error:  # no reference has a word
            return {"utterances": len(members), "metrics": {}, "reason": str(error)}

    groups = defaultdict(list)
    for row in rows:
        groups[str(row.get(GROUPS[task]) or "other")].append(row)
    found = {"metrics": scored(rows)["metrics"]}
    if len(groups) > 1:
        found["groups"] = {name: scored(members) for name, members in sorted(groups.items())}
    return found


def utterance_scores(task: str, rows: list[Row], predictions: dict[str, str]) -> dict[str, float]:
    """Id -> the utterance's own `UTTERANCE_METRIC`; without those that have none (a reference without a word)."""
    values = scores_of(task, rows, predictions, UTTERANCE_METRIC[task][0])
    return {name: value for name, value in values.items() if math.isfinite(value)}


def worst_first(task: str, scores: dict[str, float]) -> list[str]:
    """Ids from the worst utterance to the best."""
    sign = 1 if UTTERANCE_METRIC[task][1] else -1
    return sorted(scores, key=lambda name: (sign * scores[name], name))


def compare(
    task: str, rows: list[Row], predictions: dict[str, str], baseline: dict[str, str], **options: Any
) -> dict[str, Any]:
    """Paired test of the task's main metric against another run's predictions, over the rows that both have."""
    common = [row for row in rows if row["id"] in baseline]
    if not common:
        return {"utterances": 0}
    metric = MAIN_METRIC[task]
    return {
        "utterances": len(common),
        "metric": metric,
        **paired_test(task, common, predictions, baseline, metric, **options),
    }


def training_metrics(rows: list[Row], predictions: dict[str, str]) -> dict[str, float]:
    """What evaluation during training logs: `<task>_<metric>` for every task, and `wer` and `cer` where all rows are
    recognition."""
    by_task = defaultdict(list)
    for row in rows:
        if row["id"] in predictions and is_scored(row):
            by_task[task_of(row)].append(row)
    found = {}
    for task, members in sorted(by_task.items()):
        values = score(task, members, predictions)
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        found.update({f"{task}_{name}": value for name, value in numbers.items()})
        if task == "asr" and all(task_of(row) == "asr" for row in rows):
            found.update({name: numbers[name] for name in ("wer", "cer")})
    return found
