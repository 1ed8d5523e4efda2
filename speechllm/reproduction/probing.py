"""What survives of the voice: linear probes of a pretrained model's states (`evaluation/probes.py`) for traits and words.

Settings of a probing: `data` (a manifest with the labels' columns), `labels`, `layers`, `dtype`, `splits`, `bootstrap`.
"""

import statistics
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoProcessor

from ..data.schema import load_rows
from ..evaluation.probes import probe_layers
from ..modeling_speechllm import SpeechLLMForConditionalGeneration
from ..trainers.frozen_states import fill_frame_cache, frame_cache
from .cost import Cost
from .plan import Cell


def probe_cell(cell: Cell, folder: Path) -> dict[str, Any]:
    """Probe the checkpoint that the cell starts from; the whole report goes to `probes` in its folder.

    Returns:
        Its cost, and `probes`: label -> `metric`, `guessing`, and `places`: place -> `value`, `interval`,
        `above_guessing` (likewise).
    """
    settings = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, settings.get("dtype", "float32"))
    model = SpeechLLMForConditionalGeneration.from_pretrained(settings["model"], dtype=dtype).to(device).eval()
    processor = AutoProcessor.from_pretrained(settings["model"])
    rows = load_rows(settings["data"])
    frames = None
    if settings.get("feature_cache"):
        frames = frame_cache(settings["feature_cache"], model.model, processor)
        fill_frame_cache(frames, rows, model.model, processor)
    with Cost() as cost:
        report = probe_layers(
            model,
            processor,
            rows,
            settings["labels"],
            settings.get("layers", "all"),
            name=cell.row,
            output=folder / "probes",
            frames=frames,
            seeds=settings.get("splits", 3),
            bootstrap=settings.get("bootstrap", 1000),
        )
    return {
        **cost.measured,
        "utterances": report["utterances"],
        "probes": {
            label: {
                "metric": found["metric"],
                "split_by": found["split_by"],
                "guessing": found["guessing"]["value"],
                "places": found["models"][cell.row],
            }
            for label, found in report["labels"].items()
        },
    }


def decodable(of_seeds: list[dict[str, Any]], label: str) -> str:
    """Whether a label can be told from the states better than by guessing (the interval over test utterances lies
    above 0, with every seed): "everywhere", "nowhere", or at which share of the places."""
    places = list(of_seeds[0][label]["places"])
    sure = [
        place
        for place in places
        if all(seed[label]["places"][place]["above_guessing"]["interval"][0] > 0 for seed in of_seeds)
    ]
    return {0: "nowhere", len(places): "everywhere"}.get(len(sure), f"at {len(sure)} of {len(places)} places")


def mean_at(of_seeds: list[dict[str, Any]], label: str, place: str) -> dict[str, Any]:
    """Value and interval ends, means over seeds."""
    entries = [seed[label]["places"][place] for seed in of_seeds]
    return {
        "value": statistics.mean(entry["value"] for entry in entries),
        "interval": [statistics.mean(entry["interval"][end] for entry in entries) for end in (0, 1)],
    }
