"""Metrics of the finished cells, from their predictions, as tables of statistics that can be resampled.

Each task has its own metric, the field's, and the loss of the right answers, in nats per token: at small sizes answers are
rarely right, and the loss still tells how far from right they are.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.metrics import corpus_metrics
from ..evaluation.metrics.resampling import CorpusMetric
from ..evaluation.retrieval import mean_of_queries


Prediction = dict[str, Any]  # a line of predictions.jsonl, see `stages.predict`


@dataclass(frozen=True)
class Measure:
    """How a metric is called, read and printed."""

    task: str
    metric: str
    label: str
    higher_is_better: bool
    factor: float = 1.0  # from the metric's own unit to the printed one
    digits: int = 1
    decides: bool = False  # whether a claim about the task is decided by it

    @property
    def key(self) -> str:
        return f"{self.task} {self.metric}"


STAYS = ("gender", "noise")  # what the paper says stays decodable from the states
TRAITS = ("gender", "rate", "noise", "reverberation")
MEASURES = (
    Measure("asr", "wer", "ASR WER %", False, factor=100, decides=True),
    Measure("st", "bleu", "ST BLEU", True, decides=True),
    Measure("st", "chrf++", "ST chrF++", True),
    Measure("st", "comet", "ST COMET", True, factor=100),
    Measure("st", "term_coverage", "ST term coverage %", True, factor=100),  # MuST-SHE: gender in what is written
    Measure("st", "gender_accuracy", "ST gender accuracy %", True, factor=100),
    Measure("sqa", "f1", "SQA F1", True, decides=True),
    Measure("sqa", "exact_match", "SQA EM", True),
    Measure("traits", "accuracy", "traits accuracy %", True, factor=100, decides=True),
    *(Measure("traits", trait, trait, True, factor=100) for trait in TRAITS),
    *(Measure(task, "loss", f"{task.upper() if task != 'traits' else task} loss", False, digits=3)
      for task in ("asr", "st", "sqa", "traits")),
    *(Measure("probe", label, f"{label} accuracy", True, factor=100) for label in STAYS),
)  # fmt: skip


def read_predictions(path: Path) -> list[Prediction]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def metrics_of(
    predictions: list[Prediction], comet: Mapping[str, float] | None = None
) -> dict[tuple[str, str], CorpusMetric]:
    """(task, metric) -> the metric, with recordings (or passages) as its units, in an order that depends on the test rows
    alone.

    Args:
        comet: row id -> COMET of its translation, if they were scored; rows without a score count nothing.
    """
    by_task = defaultdict(list)
    for prediction in sorted(predictions, key=lambda prediction: prediction["id"]):
        by_task[prediction["task"]].append(prediction)
    found = {}
    for task, rows in by_task.items():
        metrics, _ = corpus_metrics(task, rows, {row["id"]: row["prediction"] for row in rows})
        if task == "traits":  # each trait's accuracy, the other traits' rows counting nothing
            right, count = metrics["accuracy"].statistics.T
            for trait in {row["trait"] for row in rows}:
                asked = np.array([row["trait"] == trait for row in rows], dtype=float)
                metrics[trait] = CorpusMetric(np.stack([right * asked, count * asked], 1), _ratio)
        if task == "st" and comet:
            scored = [[comet.get(row["id"], 0.0), float(row["id"] in comet)] for row in rows]
            metrics["comet"] = CorpusMetric(np.array(scored), _ratio)
        metrics["loss"] = CorpusMetric(np.array([[row["loss"], row["tokens"]] for row in rows]), _ratio)
        found |= {(task, name): metric.grouped([row["speech"] for row in rows]) for name, metric in metrics.items()}
    return found


def recall_of(retrieval: Mapping[str, Any], language: str | None = None) -> dict[str, CorpusMetric]:
    """Layer -> recall@1, and "mean", that of the layers, with distinct texts as units; of one language's utterances, among
    all transcripts, if it is given. (`stages.retrieval`)"""
    texts = np.array(retrieval["text_of"])
    asked = np.full(len(texts), True) if language is None else np.array(retrieval["language_of"]) == language
    hits = {layer: np.array(ranks)[asked] <= 1 for layer, ranks in retrieval["ranks"].items()}
    hits["mean"] = np.mean(list(hits.values()), axis=0)
    return {name: mean_of_queries(found.astype(float), texts[asked].tolist()) for name, found in hits.items()}


def _ratio(sums: np.ndarray) -> float:
    return float(sums[0] / sums[1])
