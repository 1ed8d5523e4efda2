"""From predictions to the metrics of each task: of all its rows, of each language pair or trait, and of each utterance."""

import json
import math
import os
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.schema import Row
from .metrics import MAIN_METRIC, ScoringError, paired_tests, score
from .metrics import utterance_scores as scores_of
from .metrics.comet import comet_test
from .prediction_files import read_lines


# By what a task's rows are told apart in the tables. (Target languages have metrics of their own already.)
GROUPS = {"asr": "language", "st": "language", "sqa": "language", "traits": "trait"}
# What one utterance is judged by, and whether more is better; BLEU says little about a single sentence.
UTTERANCE_METRIC = {"asr": ("wer", False), "st": ("chrf++", True), "sqa": ("f1", True), "traits": ("accuracy", True)}
FEW = 3  # references of each task and target language that show whether the packages of its metrics are there


class EvaluationError(ValueError):
    """An evaluation that cannot be done; the message says why and what to do."""


def task_of(row: Row) -> str:
    return row.get("task") or "asr"


def references_of(row: Row) -> list[str]:
    """The row's acceptable answers. (A transcript is the answer to recognition only.)"""
    if task_of(row) == "sqa" and (answers := [text for text in row.get("answers") or [] if text]):
        return answers
    answer = row.get("target") or (row.get("text") if task_of(row) == "asr" else None)
    return [answer] if answer else []


def is_scored(row: Row) -> bool:
    return task_of(row) in MAIN_METRIC and bool(references_of(row))


def check_metrics(rows: list[Row]) -> None:
    """Score a few references against themselves, so that nothing is found to be missing after hours of answers.

    Raises:
        ModuleNotFoundError: if a package of a task's metrics, or what one of its target languages needs, is not
            installed.
    """
    few = defaultdict(list)
    for row in filter(is_scored, rows):
        few[task_of(row), str(row.get("target_language"))].append(row)
    for (task, _), members in few.items():
        right = {row["id"]: references_of(row)[0] for row in members[:FEW]}
        with suppress(ScoringError):  # what these few lack, as words, others may have
            score(task, members[:FEW], right)


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
        except (ScoringError, ModuleNotFoundError) as error:  # no reference has a word; other tasks have metrics
            return {"utterances": len(members), "metrics": {}, "reason": str(error)}

    groups = defaultdict(list)
    for row in rows:
        groups[str(row.get(GROUPS[task]) or "other")].append(row)
    found = scored(rows)
    del found["utterances"]  # which the caller counts
    if len(groups) > 1:
        found["groups"] = {name: scored(members) for name, members in sorted(groups.items())}
    return found


def utterance_scores(task: str, rows: list[Row], predictions: dict[str, str], **options: Any) -> dict[str, float]:
    """Id -> the utterance's own `UTTERANCE_METRIC`; without those that have none (a reference without a word).

    Args:
        options: of `metrics.score`; what is of resampling says nothing about one utterance.
    """
    options = {name: value for name, value in options.items() if name not in ("bootstrap", "seed", "cluster")}
    try:
        values = scores_of(task, rows, predictions, UTTERANCE_METRIC[task][0], **options)
    except (ScoringError, ModuleNotFoundError):  # for which `score_task` has the reason
        return {}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def worst_first(task: str, scores: dict[str, float]) -> list[str]:
    """Ids from the worst utterance to the best."""
    sign = 1 if UTTERANCE_METRIC[task][1] else -1
    return sorted(scores, key=lambda name: (sign * scores[name], name))


@dataclass
class Baseline:
    """Another evaluation, by task and id: its `predictions` and the `references` that they were scored by, where it tells
    them; and by id their scores by `comet_model`, if it has any."""

    predictions: dict[str | None, dict[str, str]]
    comet: dict[str, float]
    comet_model: str | None
    references: dict[str | None, dict[str, set[str]]] = field(default_factory=dict)


def read_baseline(path: str | os.PathLike) -> Baseline:
    """The evaluation in a folder, or (of the predictions alone) in a file.

    Raises:
        EvaluationError: if there are no predictions, or one is not a text.
    """
    path = Path(path)
    path = path / "predictions.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise EvaluationError(f"{path}: there is no such file of predictions. Give the --output of another evaluation.")
    lines = [line for line in read_lines(path) if "prediction" in line]
    if not lines:
        raise EvaluationError(f"{path} holds no predictions. Give the --output of another evaluation.")
    if odd := [line for line in lines if not isinstance(line["prediction"], str)]:
        raise EvaluationError(
            f"{path}: the prediction of {odd[0]['id']} is {odd[0]['prediction']!r:.80}, not a text. "
            'Write "" where there is no answer, or leave the line out.'
        )
    try:
        metrics = json.loads(path.with_name("metrics.json").read_text(encoding="utf-8"))
        comet_model = metrics["tasks"]["st"]["metrics"]["comet_model"]
    except (OSError, ValueError, KeyError, TypeError):
        comet_model = None
    # Ids alone do not do: of two tasks of a recording either may have been left out here or there. A run in progress, and
    # a file of one's own, name no tasks.
    predictions: dict[str | None, dict[str, str]] = defaultdict(dict)
    references: dict[str | None, dict[str, set[str]]] = defaultdict(dict)
    for line in lines:
        predictions[line.get("task")][line["id"]] = line["prediction"]
        if line.get("references"):
            told = line["references"]
            references[line.get("task")][line["id"]] = {told} if isinstance(told, str) else {*told}
    return Baseline(
        predictions,
        {line["id"]: line["comet"] for line in lines if line.get("comet") is not None},
        comet_model,
        references,
    )


def of_task(values: dict[str | None, dict[str, Any]], task: str) -> dict[str, Any]:
    """A baseline's values of a task by id, those of lines that name no task among them."""
    return {**values.get(None, {}), **values.get(task, {})}


def same_references(task: str, rows: list[Row], baseline: Baseline) -> list[Row]:
    """The rows without those that have other references in the baseline: under the same id, as "row 5", another subset has
    another utterance."""
    told = of_task(baseline.references, task)
    return [row for row in rows if told.get(row["id"]) in (None, {*references_of(row)})]


def compare(
    task: str, rows: list[Row], predictions: dict[str, str], baseline: Baseline, **options: Any
) -> dict[str, Any]:
    """Paired tests against another run over the rows that both have: how many `utterances`, how many were left out for
    their `other_references` there, and, by metric, `tests`."""
    others = of_task(baseline.predictions, task)
    both = [row for row in rows if row["id"] in others]
    common = same_references(task, both, baseline)
    try:
        tests = paired_tests(task, common, predictions, others, **options) if common else {}
    except (ScoringError, ModuleNotFoundError):  # no common reference has a word; or `score_task` has the reason
        tests = {}
    return {"utterances": len(common), "other_references": len(both) - len(common), "tests": tests}


def compare_comet(
    rows: list[Row], scores: dict[str, float], model: str, baseline: Baseline, **options: Any
) -> dict[str, dict[str, Any]]:
    """The paired test of COMET, to add to `tests`; none without scores of the same model for the same rows."""
    both = [row for row in rows if row["id"] in baseline.comet] if model == baseline.comet_model else []
    common = same_references("st", both, baseline)
    if not common:
        return {}
    return {"comet": {**comet_test(common, scores, baseline.comet, **options), "utterances": len(common)}}


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
