"""How well a model does its tasks: answers, metrics with intervals, and a page to read them on.

1. Rows that cannot be asked (no audio, no prompt) are set aside. Every other row is answered (`generation.py`); an
   interrupted run goes on where it stopped, any number of processes share the work.
2. Answers to rows with a reference are scored (`metrics/`), by task and by language pair or trait.
3. `predictions.jsonl`, `metrics.json` and `report.html` are written.
"""

import json
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..base_models_speechllm import CheckpointError
from ..data.checking import malformed
from ..data.feature_cache import FeatureCache, fingerprint
from ..data.prompts import filled, prompt_of, shared_prefix
from ..data.schema import Row, SetAside, with_ids, with_target
from ..hub.training_summary import library_versions
from ..modeling_speechllm import SpeechLLMForConditionalGeneration
from ..processing_speechllm import SpeechLLMProcessor
from .generation import generate_answers, lacks_transcript
from .layerwise import FEWEST, alignment_report, layer_indices
from .metrics.comet import CometUnavailable, comet_score, find_environment
from .metrics.normalisation import normaliser
from .page import strict_json, write_whole
from .prediction_files import PredictionFiles, answered_ids, input_key
from .report import write_report
from .scoring import (
    Baseline,
    EvaluationError,
    check_metrics,
    compare,
    compare_comet,
    is_scored,
    read_baseline,
    references_of,
    score_task,
    task_of,
    utterance_scores,
)
from .text_abilities import compare_text_abilities


SETTINGS_FILE = "evaluation.json"  # what the predictions in a folder were made with


@dataclass
class Request:
    """The rows to answer, and what was found wrong with the data."""

    rows: list[Row]
    set_aside: list[SetAside] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)  # ids that several rows had


def evaluate_model(
    model: SpeechLLMForConditionalGeneration,
    processor: SpeechLLMProcessor,
    rows: list[Row],
    output: str | os.PathLike,
    *,
    tasks: list[str] | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 256,
    num_beams: int = 1,
    prompts: dict[str, str] | None = None,
    oracle: bool = False,
    bootstrap: int = 1000,
    seed: int = 0,
    normalisation: str = "basic",
    error_alignment: str = "levenshtein",
    cluster: str | None = None,
    baseline: str | os.PathLike | None = None,
    strict: bool = False,
    set_aside: list[SetAside] | None = None,
    frames: FeatureCache | None = None,
    workers: int = 0,
    text_abilities: bool = False,
    alignment: bool | str | Sequence[int] = False,
    prefix: str = "auto",
    comet: dict[str, Any] | None = None,
    description: dict[str, Any] | None = None,
    worst: int = 10,
) -> dict[str, Any]:
    """Answer, score and report; every process calls this, and gets the metrics.

    Args:
        rows: of the data schema; those of tasks without a metric, or without a reference, are answered but not scored.
        output: folder for `predictions.jsonl`, `metrics.json` and `report.html`. Answers that it already holds, made by
            the same model with the same settings, are kept; all of them must be to rows that are there.
        tasks: evaluate these only; default: all that the rows have.
        prompts: by task, the prompt in place of the rows' own; may name columns, as in "{question} Be brief."
        oracle: put each row's transcript in the place of its audio: what the LLM answers if nothing is lost in hearing.
        bootstrap: resamples for the intervals; 0 gives none.
        seed: of the bootstrap and the paired test.
        normalisation: of recognition, see `metrics/normalisation.py`.
        error_alignment: of recognition, "levenshtein" or "sclite", see `metrics/error_rates.py`.
        cluster: column whose rows with the same value are drawn together for intervals and tests, as `passage_id`, in the
            tasks that have it.
        baseline: another run's folder (or file of predictions) for paired tests of each task's metrics.
        strict: raise instead of setting rows aside, and where a reference is missing or an id is used twice.
        set_aside: what was set aside before, to be reported with the rest.
        frames: cache of encoder frames.
        workers: processes that prepare batches.
        text_abilities: compare the LLM's answers to text with those of the base LLM.
        alignment: measure how speech and text meet at each layer, see `layerwise.py`; written to `alignment.html` too.
            `True`: at every fifth and the last; else the `layers` of `alignment_report`.
        prefix: of the alignment, as in pretraining (`ContrastiveArguments.prefix`).
        comet: score translations by COMET too, with these options of `metrics.comet.comet_score`.
        description: of the data, for the report.
        worst: utterances of each task to show in the report.

    Returns:
        The content of `metrics.json`; `tasks` holds, by task, `metrics`, their intervals, and counts.

    Raises:
        EvaluationError: if nothing can be evaluated, the folder holds answers made otherwise or to other data, or the
            data has faults and `strict` is set.
        ModuleNotFoundError: if a package of the metrics is not installed.
        CometUnavailable: if COMET is asked for and cannot run.
        ValueError, CheckpointError: if alignment or text abilities cannot be measured.
        (What else was asked for is written before, where any of this is only found out at the end.)
    """
    start, state, output = time.time(), PartialState(), Path(output)
    request = _request(rows, tasks, prompts or {}, oracle)
    request.set_aside[:0] = set_aside or []
    if strict:
        _refuse_faults(request)
    if not request.rows:
        first = request.set_aside[0].reason if request.set_aside else "there are no rows."
        raise EvaluationError(f"There is nothing to evaluate: {first}")
    if cluster is not None:
        _check_cluster(request.rows, cluster)
    others = read_baseline(baseline) if baseline else None  # all that could fail, before hours of work
    try:
        normaliser(normalisation)
    except ValueError as error:
        raise EvaluationError(str(error)) from None
    check_metrics(request.rows)
    if comet is not None:
        if not any(task_of(row) == "st" and is_scored(row) and row.get("text") for row in request.rows):
            raise EvaluationError(
                "COMET needs translations (task st) with reference and transcript; the data has none."
            )
        find_environment(comet.get("python"))
    layers = "all" if alignment is True else alignment
    pairs = _distinct_recordings(request.rows) if alignment else []
    if alignment:
        try:
            layer_indices(layers, len(model.model.llm_layers))
            shared_prefix(prefix, processor)
        except ValueError as error:
            raise EvaluationError(f"Alignment: {error}") from None
        if len(pairs) < FEWEST:
            raise EvaluationError(
                f"Alignment needs {FEWEST} recordings with a transcript (`text`); the data has {len(pairs)}."
            )
    made_by = {
        "model": model_identity(model),
        "generation": {
            "tasks": sorted(set(map(task_of, request.rows))),
            "max_new_tokens": max_new_tokens,
            "num_beams": num_beams,
            "oracle": oracle,
        },
    }
    scoring = {"seed": seed, "normalisation": normalisation, "error_alignment": error_alignment, "cluster": cluster}
    if state.is_main_process:
        _claim(output, made_by, {row["id"] for row in request.rows} | {item.id for item in request.set_aside})
    state.wait_for_everyone()
    inputs = {(row["id"], prompt_of(row)): input_key(row, oracle) for row in request.rows}
    files = PredictionFiles(output, state.process_index, inputs)
    resumed = sum((row["id"], prompt_of(row)) in files.answers for row in request.rows)
    generate_answers(
        model,
        processor,
        request.rows,
        files,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        oracle=oracle,
        frames=frames,
        workers=workers,
        strict=strict,
    )
    if state.is_main_process:
        files.read()
        tasks_found = _score(request.rows, files, others, bootstrap=bootstrap, **scoring)
        failures: list[Exception | None] = []

        def measured(measure: Callable[..., Any], *positional: Any, **options: Any) -> Any:
            try:
                return measure(*positional, **options)
            except (ValueError, CheckpointError) as error:
                failures.append(error)
                return None

        if comet is not None:
            options = {**comet, "bootstrap": bootstrap}
            failures.append(_add_comet(tasks_found, request.rows, files, others, options, scoring))
        at_layers = {"prefix": prefix, "batch_size": batch_size, "output": output, "frames": frames}
        metrics = {
            **made_by,
            "data": {**(description or {}), **_data_counts(request)},
            "scoring": {**scoring, "bootstrap": bootstrap, "baseline": str(baseline) if baseline else None},
            "tasks": tasks_found,
            "alignment": alignment and measured(alignment_report, model, processor, pairs, layers, **at_layers),
            "text_abilities": text_abilities and measured(compare_text_abilities, model, processor),
            "run": {
                "seconds": round(time.time() - start, 1),
                "answers_kept_from_before": resumed,
                "batch_size": batch_size,
                "processes": state.num_processes,
                "device": str(model.device),
                "versions": {"python": platform.python_version(), **library_versions()},
            },
        }
        _write(output, metrics, request, files, worst)
    state.wait_for_everyone()
    for failure in filter(None, failures if state.is_main_process else ()):
        raise failure
    return json.loads((output / "metrics.json").read_text(encoding="utf-8"))


# ---- before --------------------------------------------------------------------------------------------------------


def _request(rows: list[Row], tasks: list[str] | None, prompts: dict[str, str], oracle: bool) -> Request:
    """The rows of these tasks that can be asked, with ids of their own and their prompts; the others, with reasons.

    Raises:
        EvaluationError: if no row is of one of the tasks.
    """
    present = Counter(map(task_of, rows))
    if missing := [task for task in [*(tasks or []), *prompts] if task not in present]:
        raise EvaluationError(
            f"No row is of the task {', '.join(map(repr, missing))}; the data has {', '.join(present) or 'no rows'}."
        )
    if tasks and (unused := sorted(prompts.keys() - set(tasks))):
        raise EvaluationError(f"There is a prompt for {unused[0]!r}, which is not among the tasks {', '.join(tasks)}.")
    rows = [row for row in rows if tasks is None or task_of(row) in tasks]
    given = Counter(str(row["id"]) for row in rows if row.get("id") not in (None, ""))
    request = Request([], duplicates=[name for name, count in given.items() if count > 1])
    for row in map(with_target, with_ids(rows)):
        cause = "malformed row"
        try:
            if reason := malformed(row):
                raise ValueError(reason)
            cause = "no audio"
            if row.get("audio") is None and not oracle:
                raise ValueError(f"{row['id']} has no `audio`. Give it one.")
            cause = "empty transcript"
            if oracle and (reason := lacks_transcript(row)):
                raise ValueError(reason)
            cause = f"task {task_of(row)!r} without a prompt"
            if task_of(row) in prompts:
                row = {**row, "prompt": filled(row, prompts[task_of(row)])}
            prompt_of(row)
            request.rows.append(row)
        except ValueError as error:
            request.set_aside.append(SetAside(row["id"], str(error), cause))
    return request


def _distinct_recordings(rows: list[Row]) -> list[Row]:
    """One row with a transcript of each recording, whatever the task."""
    found: dict[Any, Row] = {}
    for row in rows:
        if row.get("text") and row.get("audio") is not None:
            audio = row["audio"]
            key = str(audio) if isinstance(audio, str | os.PathLike) else id(audio)
            if isinstance(audio, dict):  # a segment, say, of which every row has a dict of its own
                key = json.dumps(audio, sort_keys=True, default=id)
            found.setdefault(key, row)
    return list(found.values())


def _check_cluster(rows: list[Row], cluster: str) -> None:
    tasks: dict[str, list[bool]] = {}
    for row in rows:
        tasks.setdefault(task_of(row), []).append(row.get(cluster) is not None)
    if not any(map(any, tasks.values())):
        raise EvaluationError(f"cluster is {cluster!r}, but no row has such a column.")
    if partly := [task for task, found in tasks.items() if any(found) and not all(found)]:
        raise EvaluationError(
            f"cluster is {cluster!r}, but {tasks[partly[0]].count(False)} row(s) of the task {partly[0]!r} have no such "
            "column. Fill it, or leave cluster out."
        )


def _refuse_faults(request: Request) -> None:
    if request.set_aside:
        raise EvaluationError(f"{request.set_aside[0].reason} (--strict stops here.)")
    if request.duplicates:
        names = ", ".join(request.duplicates[:5])
        raise EvaluationError(f"{len(request.duplicates)} id(s) are used by several rows: {names}. Make them unique.")
    if unscored := [row["id"] for row in request.rows if not is_scored(row)]:
        raise EvaluationError(
            f"{len(unscored)} row(s) have no reference, or no metric, to be scored by, the first: {unscored[0]}."
        )


def model_identity(model: SpeechLLMForConditionalGeneration) -> dict[str, Any]:
    """What tells a model from another: a hash of its projector and its pinned base models, else of all its weights."""
    adapter = any("lora_" in name for name in model.state_dict())
    pinned = bool(model.config.base_models) and not model._base_is_trained() and not adapter
    return {
        "name": model.name_or_path or None,
        "weights": fingerprint(model.model.projector if pinned else model),
        "adapter": adapter,
        "base_models": model.config.base_models,
        "dtype": str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
    }


def _claim(output: Path, made_by: dict[str, Any], ids: set[str]) -> None:
    """Note in the folder what its predictions are made with.

    Args:
        ids: of all rows, also of those set aside, which may have had answers.

    Raises:
        EvaluationError: if it holds predictions that were made otherwise, or answers to other rows.
    """
    path = output / SETTINGS_FILE
    wanted = json.loads(json.dumps(made_by))
    if path.is_file() and any(output.glob("predictions*.jsonl")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = {}
        for part, values in wanted.items():
            for name, value in values.items():
                if name != "name" and found.get(part, {}).get(name) != value:
                    raise EvaluationError(
                        f"{output} holds predictions of another run ({part} {name}: {found.get(part, {}).get(name)}, now "
                        f"{value}). Choose another --output, or remove that folder."
                    )
    if lost := sorted(answered_ids(output) - ids):  # which would not be in the file at the end
        raise EvaluationError(
            f"{output} holds the answers to {len(lost)} utterance(s) that are not in this data, the first: {lost[0]}. "
            "They would be lost. Choose another --output, or remove that folder."
        )
    write_whole(path, json.dumps(wanted, indent=2) + "\n")


# ---- after ---------------------------------------------------------------------------------------------------------


def _score(
    rows: list[Row], files: PredictionFiles, baseline: Baseline | None, bootstrap: int, **scoring: Any
) -> dict[str, Any]:
    """By task: counts and, where there are references, metrics, groups, paired tests, and each utterance's score."""
    found: dict[str, Any] = {}
    for task in dict.fromkeys(map(task_of, rows)):
        members = [row for row in rows if task_of(row) == task]
        lines = {row["id"]: files.answers.get((row["id"], prompt_of(row))) for row in members}
        answered = [row for row in members if lines[row["id"]] is not None]
        predictions = {row["id"]: lines[row["id"]]["prediction"] for row in answered}
        scored = [row for row in answered if is_scored(row)]
        found[task] = {
            "utterances": len(members),
            "answered": len(answered),
            "scored": len(scored),
            "without_reference": sum(not references_of(row) for row in members),
            "empty_predictions": sum(not text for text in predictions.values()),
            "cut_off": sum(not lines[row["id"]]["ended"] for row in answered),  # at the limit on tokens
        }
        if scored:
            options = _options_for(task, scored, scoring)
            found[task].update(score_task(task, scored, predictions, bootstrap=bootstrap, **options))
            found[task]["utterance_scores"] = utterance_scores(task, scored, predictions, **options)
            if baseline is not None:
                found[task]["against_baseline"] = compare(task, scored, predictions, baseline, **options)
    return found


def _add_comet(
    tasks: dict[str, Any],
    rows: list[Row],
    files: PredictionFiles,
    baseline: Baseline | None,
    options: dict[str, Any],
    scoring: dict[str, Any],
) -> CometUnavailable | None:
    """Add COMET to the metrics and tests of translation, over the rows that have a transcript; what went wrong, if it
    did."""
    lines = {row["id"]: files.answers.get((row["id"], prompt_of(row))) for row in rows}
    rows = [row for row in rows if task_of(row) == "st" and is_scored(row) and row.get("text") and lines[row["id"]]]
    if not rows:
        return None
    predictions = {row["id"]: lines[row["id"]]["prediction"] for row in rows}
    resampling = _options_for("st", rows, scoring)
    try:
        found = comet_score(rows, predictions, **options, **resampling)
    except CometUnavailable as error:
        return error
    scores = tasks["st"]["comet_scores"] = found.pop("comet_scores")
    tasks["st"]["metrics"].update(found, comet_utterances=len(rows))
    if baseline is not None:
        tests = compare_comet(rows, scores, found["comet_model"], baseline, **resampling)
        tasks["st"]["against_baseline"]["tests"].update(tests)
    return None


def _options_for(task: str, rows: list[Row], scoring: dict[str, Any]) -> dict[str, Any]:
    """The settings of scoring that a task has."""
    options = {"seed": scoring["seed"]}
    if task == "asr":
        options |= {"normalisation": scoring["normalisation"], "alignment": scoring["error_alignment"]}
    if all(row.get(scoring["cluster"]) is not None for row in rows):
        options["cluster"] = scoring["cluster"]
    return options


def _data_counts(request: Request) -> dict[str, Any]:
    seconds = [row["duration"] for row in request.rows if row.get("duration")]
    return {
        "rows": len(request.rows),
        "hours": round(sum(seconds) / 3600, 4) if len(seconds) == len(request.rows) else None,
        "duplicate_ids": request.duplicates,
    }


def _write(output: Path, metrics: dict[str, Any], request: Request, files: PredictionFiles, worst: int) -> None:
    """The three files; the predictions in the order of the data."""
    scores = {task: found.pop("utterance_scores", {}) for task, found in metrics["tasks"].items()}
    comet = metrics["tasks"].get("st", {}).pop("comet_scores", {})
    aside = list(request.set_aside)
    answers = []
    for row in request.rows:
        line = files.answers.get((row["id"], prompt_of(row)))
        if line is None:
            reason = files.unusable.get(row["id"], f"{row['id']} was not answered.")
            aside.append(SetAside(row["id"], reason, "audio or transcript that cannot be used"))
            continue
        task = task_of(row)
        audio = row.get("audio")
        answers.append(
            {
                "id": row["id"],
                "task": task,
                "prompt": line["prompt"],
                "prediction": line["prediction"],
                "references": references_of(row),
                "score": scores[task].get(row["id"]),
                "ended": line["ended"],
                "input": line.get("input"),
                "audio": str(audio) if isinstance(audio, str | os.PathLike) else None,
                **({"comet": comet[row["id"]]} if row["id"] in comet else {}),
            }
        )
    metrics["set_aside"] = [asdict(item) for item in aside]
    files.replace([*answers, *({"id": item.id, "set_aside": item.reason} for item in aside)])
    metrics = strict_json(metrics, "metrics")
    write_whole(output / "metrics.json", json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    write_report(output, metrics, request.rows, answers, scores, worst)
