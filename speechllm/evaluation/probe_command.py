"""`speechllm probe`: from settings to a model, its data, and the probes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor

from ..data.sources import load_source
from ..modeling_speechllm import SpeechLLMForConditionalGeneration
from ..recipes import UsageError
from ..trainers.frozen_states import fill_frame_cache, frame_cache
from .probe_labels import MINIMUM
from .probe_report import sentence
from .probe_splits import plan_probes
from .probes import probe_layers


@dataclass
class ProbeArguments:
    """What to probe, for what, and how."""

    model: str = field(metadata={"help": "SpeechLLM checkpoint (folder or Hub id)."})
    data: str = field(metadata={"help": "Data set with the labels as columns."})
    output: str = field(metadata={"help": "Folder for probes.json, probes.html and plots/."})
    labels: str = field(
        default="speaker,gender,rate,noise,words",
        metadata={"help": "Of speaker, gender, rate, noise (column snr_db), reverberation, words, and other columns."},
    )
    compare: str | None = field(
        default=None, metadata={"help": "Another checkpoint to probe beside it, e.g. from before stage 1."}
    )
    untrained: bool = field(
        default=False, metadata={"help": "Probe the model with a new projector beside it, drawn by --seed."}
    )
    layers: str = field(default="all", metadata={"help": "'emb', 'all', or indices such as 0,5,10."})
    prefix: str = field(default="auto", metadata={"help": "What speech stands behind, as in pretraining."})
    seeds: int = field(default=3, metadata={"help": "Splits into training and test texts."})
    seed: int = field(default=0, metadata={"help": "Of the new projector."})
    bootstrap: int = field(default=1000, metadata={"help": "Resamples for the intervals."})
    minimum: int = field(default=MINIMUM, metadata={"help": "Utterances that a class, or a word, needs."})
    split_by_text_only: bool = field(
        default=False, metadata={"help": "Let test and training share speakers even where they need not."}
    )
    batch_size: int = field(default=16, metadata={"help": "Utterances at once."})
    dtype: str | None = field(default=None, metadata={"help": "dtype of the frozen parts, e.g. bfloat16."})
    device: str | None = field(default=None, metadata={"help": "cpu, or a GPU if there is one (the default)."})
    feature_cache: str | None = field(default=None, metadata={"help": "Folder to keep the encoder's features in."})
    strict: bool = field(default=False, metadata={"help": "Stop at the first row that cannot be used."})

    def __post_init__(self):
        if self.compare and self.untrained:
            raise UsageError("--compare and --untrained are two things to compare with; give one.")
        for name, least in (("seeds", 1), ("bootstrap", 1), ("minimum", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name} is {getattr(self, name)}; it must be at least {least}.")
        if self.dtype is not None and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise UsageError(f"--dtype is {self.dtype!r}; use float32, bfloat16 or float16.")


def run_probes(settings: ProbeArguments) -> dict[str, Any]:
    """Load, probe, and print a summary; returns the content of `probes.json`."""
    loaded = load_source(settings.data, settings.strict, for_training=False)
    names = [name.strip() for name in settings.labels.split(",") if name.strip()]
    splitting = {
        "seeds": settings.seeds,
        "minimum": settings.minimum,
        "by_speaker": not settings.split_by_text_only,
    }
    plan_probes(loaded.rows, names, **splitting)  # tells what is wrong before a model is loaded
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = {"dtype": getattr(torch, settings.dtype)} if settings.dtype else {}

    def load(name: str):
        model = SpeechLLMForConditionalGeneration.from_pretrained(name, **options).to(device).eval()
        processor = AutoProcessor.from_pretrained(name)
        frames = None
        if settings.feature_cache:
            frames = frame_cache(settings.feature_cache, model.model, processor)
            fill_frame_cache(frames, loaded.rows, model.model, processor)  # what cannot be heard is found again below
        return model, processor, frames

    model, processor, frames = load(settings.model)
    report = probe_layers(
        model,
        processor,
        loaded.rows,
        names,
        settings.layers,
        name=settings.model if settings.compare else "trained",
        compare={settings.compare: load(settings.compare)} if settings.compare else None,
        untrained=settings.seed if settings.untrained else None,
        output=Path(settings.output),
        prefix=settings.prefix,
        batch_size=settings.batch_size,
        frames=frames,
        set_aside=loaded.set_aside,
        bootstrap=settings.bootstrap,
        **splitting,
    )
    for name, entry in report["labels"].items():
        print(f"{name}: {sentence(entry, report['places'])}")
    if report["set_aside"]:
        print(f"{len(report['set_aside'])} utterance(s) set aside, e.g. {report['set_aside'][0]['reason']}")
    print(f"Saved to {settings.output}")
    return report
