"""The model card: `model_card.md`, filled in from the checkpoint and from what training saw.

The metadata block is `huggingface_hub.ModelCardData`, the results a `model-index`; the text is rendered from the template
by `huggingface_hub.ModelCard`. What is not known is left out or called unknown, never guessed.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HTTPError

from ..pushing_speechllm import KIND_IN_CARD, is_local
from .inspection import describe_checkpoint


TEMPLATE = Path(__file__).with_name("model_card.md")
TAGS = ["speechllm", "speech", "audio", "custom_code"]
RECALL_PLOT = "images/recall_per_layer.png"
SAMPLES = {  # recordings that the Hub's own documentation uses in widgets
    "LibriSpeech sample 1": "https://cdn-media.huggingface.co/speech_samples/sample1.flac",
    "LibriSpeech sample 2": "https://cdn-media.huggingface.co/speech_samples/sample2.flac",
}
# metric of ours -> (the Hub's task, its metric, name for people, factor)
METRICS = {
    "asr_wer": ("automatic-speech-recognition", "wer", "WER (%)", 100),
    "asr_cer": ("automatic-speech-recognition", "cer", "CER (%)", 100),
    "st_bleu": ("translation", "bleu", "BLEU", 1),
    "st_chrf++": ("translation", "chrf", "chrF++", 1),
    "sqa_exact_match": ("question-answering", "exact_match", "Exact match (%)", 1),
    "sqa_f1": ("question-answering", "f1", "F1 (%)", 1),
    "traits_accuracy": ("audio-classification", "accuracy", "Accuracy (%)", 100),
    "recall@1_mean": ("audio-text-to-text", "recall", "Recall@1 of transcripts, mean over layers (%)", 100),
}


def write_card(
    folder: Path,
    repo_id: str,
    summary: dict[str, Any],
    base_models: dict[str, dict[str, str]],
    *,
    license: str | None = None,
    languages: Sequence[str] = (),
) -> ModelCard:
    """Write `README.md`, and the plot it shows, into a folder that holds a checkpoint and perhaps `examples/`.

    Args:
        summary: see `training_summary.py`; may be empty.
        base_models: the frozen parts' ids and revisions.
        license, languages: for the metadata; the languages default to those of the training data.
    """
    stages = summary.get("stages", [])
    description = describe_checkpoint(str(folder))
    bases = {
        part: {**base, "id": Path(base["id"]).name if is_local(base) else base["id"], "license": base_license(base)}
        for part, base in base_models.items()
    }
    published = [base["id"] for base in bases.values() if not is_local(base)]
    codes = {source["language"] for stage in stages for source in stage["data"] if source.get("language")}
    results = eval_results(stages[-1]) if stages else []
    relation, sentence = KIND_IN_CARD["projector" if description["kind"] == "projector-only" else "full"]
    examples = {path.stem: f"examples/{path.name}" for path in sorted((folder / "examples").glob("*"))}
    data = ModelCardData(
        language=list(languages) or sorted(code for code in codes if re.fullmatch("[a-z]{2,3}", code)) or None,
        license=license,
        library_name="transformers",
        pipeline_tag="audio-text-to-text",
        tags=TAGS,
        base_model=published or None,
        base_model_relation=relation if published else None,
        datasets=hub_datasets(stages) or None,
        widget=[{"example_title": title, "src": src} for title, src in (examples or SAMPLES).items()],
        co2_eq_emissions=emissions(stages),
        model_name=repo_id.rpartition("/")[2],
        eval_results=results or None,
        metrics=sorted({result.metric_type for result in results}) or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        repo_id=repo_id,
        languages=data.language or [],
        description=description,
        holds=sentence,
        bases=bases,
        stages=stages,
        recall_plot=RECALL_PLOT if draw_recall(folder, stages) else None,
    )
    card.save(folder / "README.md")
    return card


def base_license(base: dict[str, str]) -> str:
    """The licence on a base model's own card, "unknown" if it has none or the Hub cannot be reached."""
    if base.get("license"):
        return base["license"]
    if is_local(base):
        card = Path(base["id"]) / "README.md"
        found = ModelCard.load(card, ignore_metadata_errors=True).data.get("license") if card.is_file() else None
        return found or "unknown"
    try:
        data = HfApi().model_info(base["id"], revision=base.get("revision"), timeout=10).card_data
    except (HTTPError, OSError):
        return "unknown"
    return (data and (data.get("license_name") or data.get("license"))) or "unknown"


def hub_datasets(stages: list[dict[str, Any]]) -> list[str]:
    """Sources of the training data that are repositories of the Hub (`owner/name`)."""
    sources = [source["source"] or "" for stage in stages for source in stage["data"] if source["split"] == "train"]
    return sorted({source for source in sources if re.fullmatch(r"[\w.-]+/[\w.-]+", source)})


def emissions(stages: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The Hub's `co2_eq_emissions`, if every stage measured them."""
    grams = [stage.get("emissions_grams") for stage in stages]
    if not grams or None in grams:
        return None
    return {"emissions": round(sum(grams), 3), "source": "codecarbon", "hardware_used": stages[-1]["hardware"]}


def eval_results(stage: dict[str, Any]) -> list[EvalResult]:
    """A stage's held-out results in the Hub's terms; those that it has no name for are in the card's text only."""
    sources = sorted({source["source"] or "" for source in stage["data"] if source["split"] == "held-out"} - {""})
    name = ", ".join(sources) or "held-out utterances of the training data"
    return [
        EvalResult(
            task_type=task,
            dataset_type=sources[0] if len(sources) == 1 else "held-out",
            dataset_name=name,
            dataset_split="held-out",
            metric_type=metric,
            metric_name=label,
            metric_value=round(factor * stage["results"][key], 2),
        )
        for key, (task, metric, label, factor) in METRICS.items()
        if key in stage["results"]
    ]


def draw_recall(folder: Path, stages: list[dict[str, Any]]) -> bool:
    """Plot held-out retrieval per layer of the last stage that measured it; whether there was one."""
    from ..evaluation.plots import png_bytes, recall_per_layer  # matplotlib, for those who plot

    def recall(results: dict[str, float]) -> dict[int, float]:
        prefix = "recall@1_layer_"
        return {int(name.removeprefix(prefix)): v for name, v in results.items() if name.startswith(prefix)}

    for stage in reversed(stages):
        if after := recall(stage["results"]):
            before = recall(stage["first_results"])
            held_out = sum(source["utterances"] for source in stage["data"] if source["split"] == "held-out")
            moments = {**({"before pretraining": before} if before else {}), "after pretraining": after}
            (folder / RECALL_PLOT).parent.mkdir(exist_ok=True)
            figure = recall_per_layer(moments, chance=1 / held_out if held_out else None)
            (folder / RECALL_PLOT).write_bytes(png_bytes(figure, 150))
            return True
    return False
