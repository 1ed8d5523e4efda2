"""COMET of the finished cells' translations, scored in one go when the cells are there: its model takes minutes to load.

It runs in an environment of its own (`evaluation/metrics/comet.py`). A cell's scores are kept beside its predictions, and go
with them when the cell is run again.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..evaluation.metrics.comet import MODEL, comet_score
from ..evaluation.page import write_whole
from .measures import read_predictions
from .plan import Cell
from .run import read_result
from .stages import PREDICTIONS


SCORES = "comet.json"


def comet_scores(folder: Path, model: str | None = None) -> dict[str, float]:
    """Row id -> score of a cell's translations; empty where they were not scored (with this model, if one is given)."""
    found = _read(folder)
    return found.get("scores", {}) if model in (None, found.get("model")) else {}


def comet_models(folders: Iterable[Path]) -> list[str]:
    """By which models the translations of cells were scored."""
    return sorted({found["model"] for folder in folders if (found := _read(folder))})


def _read(folder: Path) -> dict[str, Any]:
    path = folder / SCORES
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def score_translations(cells: Iterable[Cell], output: Path, *, model: str = MODEL, **options: Any) -> None:
    """Write the scores of all finished cells that have translations with transcript and reference, and no scores of this model.

    Args:
        output: the run's folder.
        model, options: of `comet_score`.

    Raises:
        CometUnavailable: if COMET cannot run.
    """
    folders = [output / cell.name for cell in cells if cell.stage == "fine-tuning" and read_result(cell, output)]
    asked, predictions = [], {}
    for folder in folders:
        if comet_scores(folder, model):
            continue
        for row in read_predictions(folder / PREDICTIONS):
            if row["task"] == "st" and row.get("text") and row.get("target"):
                name = f"{folder.name} {row['id']}"
                asked.append({"folder": folder, "row": row["id"], **row, "id": name})
                predictions[name] = row["prediction"]
    if not asked:
        print("COMET has nothing new to read: no cell here translates, or all have their scores", flush=True)
        return
    print(f"COMET ({model}) reads {len(asked)} translations", flush=True)
    scores = comet_score(asked, predictions, model=model, **options)["comet_scores"]
    for folder in {row["folder"]: None for row in asked}:
        found = {row["row"]: scores[row["id"]] for row in asked if row["folder"] == folder}
        write_whole(folder / SCORES, json.dumps({"model": model, "scores": found}, ensure_ascii=False, indent=1) + "\n")
