"""The metrics of each task from rows of the schema and predictions by id.

| task | reference | metrics |
|---|---|---|
| `asr` | `target` or `text` | `wer`, `cer`, `mean_utterance_wer`; `substitutions`, `deletions`, `insertions`, `reference_words`, and `character_...` |
| `st` | `target`, in `target_language` | `bleu`, `chrf++` with signatures; with `gender_terms` also those of MuST-SHE |
| `sqa` | `answers` or `target` | `exact_match`, `f1` |
| `traits` | `target`, one of `choices` | `accuracy`, `macro_f1` |
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from ...data.schema import Row
from .error_rates import Alignment, recognition
from .gender_terms import gender_terms
from .normalisation import normaliser
from .question_answering import question_answering
from .resampling import CorpusMetric, bootstrap_values, compared, interval
from .traits import classification, named_choice
from .translation import translation


MAIN_METRIC = {"asr": "wer", "st": "bleu", "sqa": "f1", "traits": "accuracy"}

Metrics = dict[str, CorpusMetric]
Facts = dict[str, Any]  # what has no interval: counts of errors, signatures


class ScoringError(ValueError):
    """Rows and predictions that cannot be scored; the message names the utterance, the cause and the remedy."""


def score(
    task: str,
    rows: Sequence[Row],
    predictions: Mapping[str, str],
    *,
    bootstrap: int = 0,
    seed: int = 0,
    cluster: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The metrics of a task (see above); error rates, accuracies and shares as fractions, the others from 0 to 100.

    Args:
        rows: with `id` and a reference.
        predictions: id -> the model's answer, "" if it gave none; those of other rows are not looked at.
        bootstrap: resamples; each metric then also gets `<metric>_interval`, [low, high] of 95%.
        cluster: column whose rows with the same value are drawn together (`speaker`, `passage_id`): utterances that
            belong together are no independent evidence, and intervals without it are too narrow.
        options: of `asr`: `normalisation` ("basic", see `normalisation.py`) and `alignment` ("levenshtein", see
            `error_rates.py`).

    Raises:
        ScoringError: if a row has no reference or no prediction, or an id is there twice.
        ModuleNotFoundError: if an optional package of the metric is missing; the message names it.
    """
    metrics, facts = corpus_metrics(task, rows, predictions, **options)
    return summary(metrics, facts, bootstrap, seed, groups_of(rows, cluster))


def summary(
    metrics: Metrics, facts: Facts, bootstrap: int = 0, seed: int = 0, groups: Sequence[Any] | None = None
) -> dict[str, Any]:
    """Metrics and facts as plain numbers, with intervals if `bootstrap`; groups: what is drawn together."""
    found = {name: metric.score for name, metric in metrics.items()} | facts
    if bootstrap:
        units = [metric if groups is None else metric.grouped(groups) for metric in metrics.values()]
        values = bootstrap_values(units, bootstrap, seed)
        found |= {f"{name}_interval": interval(some) for name, some in zip(metrics, values)}
    return found


def paired_test(
    task: str,
    rows: Sequence[Row],
    predictions_a: Mapping[str, str],
    predictions_b: Mapping[str, str],
    metric: str | None = None,
    seed: int = 0,
    *,
    test: Literal["randomisation", "bootstrap"] = "randomisation",
    cluster: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Is system A's metric another than system B's on the same rows?

    Args:
        metric: one of the task's, by default its main one.
        test: where `p` is from: approximate randomisation (10,000 exchanges) or the paired bootstrap (1,000 resamples).
        cluster, options: see `score`.

    Returns:
        `difference` (A - B), `interval` (95%, paired bootstrap), two-sided `p`, `test`.

    Raises:
        ScoringError: as `score`, and if the task has no such metric.
    """
    wanted = [metric or MAIN_METRIC.get(task)]
    (found,) = paired_tests(
        task, rows, predictions_a, predictions_b, wanted, seed, test=test, cluster=cluster, **options
    ).values()
    return found


def paired_tests(
    task: str,
    rows: Sequence[Row],
    predictions_a: Mapping[str, str],
    predictions_b: Mapping[str, str],
    metrics: Sequence[str | None] | None = None,
    seed: int = 0,
    *,
    test: Literal["randomisation", "bootstrap"] = "randomisation",
    cluster: str | None = None,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """Metric -> what `paired_test` says of it; by default all of the task's.

    Raises:
        ScoringError: see `paired_test`.
    """
    groups = groups_of(rows, cluster)
    a, b = (corpus_metrics(task, rows, predictions, **options)[0] for predictions in (predictions_a, predictions_b))
    if unknown := [name for name in metrics or [] if name not in a]:
        raise ScoringError(f"Task {task!r} has no metric {unknown[0]!r}. Use one of {', '.join(a)}.")
    pairs = {name: (a[name], b[name]) for name in (metrics or a)}
    if groups is not None:
        pairs = {name: tuple(metric.grouped(groups) for metric in pair) for name, pair in pairs.items()}
    return {name: compared(*pair, seed, test) for name, pair in pairs.items()}


def utterance_scores(
    task: str, rows: Sequence[Row], predictions: Mapping[str, str], metric: str, **options: Any
) -> dict[str, float]:
    """Id -> the metric of that utterance alone; NaN where it has none (a reference without a word)."""
    found = corpus_metrics(task, rows, predictions, **options)[0][metric]
    return {row["id"]: float(found.value(sums)) for row, sums in zip(rows, found.statistics)}


def groups_of(rows: Sequence[Row], cluster: str | None) -> list[Any] | None:
    """What each row is drawn together with; `None` without a `cluster` column."""
    return None if cluster is None else [_required(row, cluster, "clusters") for row in rows]


# ---- tasks -----------------------------------------------------------------------------------------------------------


def corpus_metrics(
    task: str, rows: Sequence[Row], predictions: Mapping[str, str], **options: Any
) -> tuple[Metrics, Facts]:
    """The task's metrics with what resampling needs, and facts about them (counts of errors, signatures).

    Raises:
        ScoringError: see `score`.
    """
    if task not in TASKS:
        raise ScoringError(f"There are no metrics for task {task!r}, only for {', '.join(TASKS)}.")
    return TASKS[task](rows, answers_of(rows, predictions), **options)


def _recognition(
    rows: Sequence[Row], answers: list[str], normalisation: str = "basic", alignment: Alignment = "levenshtein"
) -> tuple[Metrics, Facts]:
    references = [reference_of(row, "target", "text") for row in rows]
    try:
        return recognition(references, answers, normaliser(normalisation), alignment)
    except ValueError as error:
        raise ScoringError(str(error)) from error


def _translation(rows: Sequence[Row], answers: list[str]) -> tuple[Metrics, Facts]:
    references = [reference_of(row, "target") for row in rows]
    metrics, signatures = translation(references, answers, [row.get("target_language") for row in rows])
    if any(row.get("gender_terms") for row in rows):
        terms, categories = ([row.get(name) for row in rows] for name in ("gender_terms", "category"))
        try:
            metrics |= gender_terms(terms, categories, answers)
        except ValueError as error:
            raise ScoringError(str(error)) from error
    return metrics, signatures


def _question_answering(rows: Sequence[Row], answers: list[str]) -> tuple[Metrics, Facts]:
    return question_answering([_acceptable(row) for row in rows], answers), {}


def _acceptable(row: Row) -> list[str]:
    answers = row.get("answers") or []
    if isinstance(answers, str) or not all(isinstance(text, str) for text in answers):
        raise ScoringError(f"{row['id']}: `answers` is {answers!r}. Give a list of texts.")
    return [text for text in answers if text] or [reference_of(row, "target")]


def _traits(rows: Sequence[Row], answers: list[str]) -> tuple[Metrics, Facts]:
    """A label of one trait is no label of another, also where they are written alike."""
    labels = [(row.get("trait") or "", reference_of(row, "target")) for row in rows]
    predicted = []
    for row, answer, (trait, _) in zip(rows, answers, labels):
        choice = named_choice(
            answer, row.get("choices") or sorted({label for other, label in labels if other == trait})
        )
        predicted.append(choice and (trait, choice))
    return classification(labels, predicted), {}


TASKS: dict[str, Callable] = {"asr": _recognition, "st": _translation, "sqa": _question_answering, "traits": _traits}


# ---- rows and predictions --------------------------------------------------------------------------------------------


def answers_of(rows: Sequence[Row], predictions: Mapping[str, str]) -> list[str]:
    """The predictions in the order of the rows."""
    if not rows:
        raise ScoringError("There are no rows to score.")
    names = [_required(row, "id", "predictions") for row in rows]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ScoringError(f"{len(twice)} id(s) are there more than once, first {twice[0]!r}. Give each row its own.")
    missing = [name for name in names if name not in predictions]
    if missing:
        example = next(iter(predictions), None)
        raise ScoringError(
            f"{len(missing)} of {len(names)} rows have no prediction, first {missing[0]!r}; predictions have ids like "
            f'{example!r}. Leave those rows out, or give "" for them, which counts as all wrong.'
        )
    for name in names:
        if not isinstance(predictions[name], str):
            kind = type(predictions[name]).__name__
            raise ScoringError(f'{name}: the prediction is of type {kind}, not text. Give "" where there is no answer.')
    return [predictions[name] for name in names]


def reference_of(row: Row, *columns: str) -> str:
    """The first of the columns that is filled."""
    for column in columns:
        if row.get(column):
            if not isinstance(row[column], str):
                raise ScoringError(f"{row['id']}: `{column}` is {row[column]!r}. Give a text.")
            return row[column]
    wanted = " and no ".join(f"`{column}`" for column in columns)
    raise ScoringError(f"{row['id']}: there is no {wanted} to score against. Leave the row out, or give it one.")


def _required(row: Row, column: str, purpose: str) -> Any:
    if row.get(column) is None:
        raise ScoringError(f"{row.get('id', row.get('audio'))}: there is no `{column}`, which tells {purpose} apart.")
    return row[column]
