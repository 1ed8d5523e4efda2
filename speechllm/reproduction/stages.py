"""Run one cell: pretrain a projector, or fine-tune from one and test.

1. The cell's complete settings are written to `recipe.yaml` in its folder: `speechllm pretrain --config` or `speechllm
   finetune --config` with that file trains the same model.
2. The model is trained, at the cost that `result.json` tells.
3. A pretrained model is measured by held-out retrieval at every fifth layer and the last, whatever it was trained for. A
   fine-tuned one answers the test rows greedily; the answers, and the loss of the right ones, are kept row by row in
   `predictions.jsonl`, so that metrics and intervals can be computed later, and together with other cells'. One that is
   probed is not trained (`probing.py`).

The *text-only oracle* is fine-tuned and tested with the transcript in the place of the audio: what the LLM can do if
nothing is lost in hearing. Its recipe does not say so; with it alone, speech is heard.
"""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PrinterCallback, ProgressCallback

from ..data.schema import Row, audio_paths
from ..evaluation.generation import TranscriptItems
from ..evaluation.retrieval import retrieval_ranks
from ..evaluation.scoring import task_of
from ..modeling_speechllm import SpeechLLMForConditionalGeneration
from ..recipes import parse_settings
from ..trainers import ContrastiveArguments, ContrastiveTrainer, FineTuningArguments, FineTuningTrainer
from ..trainers.base import SpeechLLMTrainer
from ..trainers.memory import GiveMemoryBack
from ..training import DataArguments, ModelArguments, load_model
from .cost import Cost
from .plan import MODEL, Cell
from .probing import probe_cell


PREDICTIONS = "predictions.jsonl"
# Columns of a test row that its prediction keeps: references, and what metrics need
KEPT = ("text", "target", "answers", "target_language", "gender_terms", "category", "trait", "choices")


def run_cell(cell: Cell, output: Path) -> dict[str, Any]:
    """Train and measure; returns what `result.json` is to hold besides the cell's name and hash.

    Args:
        output: the run's folder; the cell has its own below it, and that of the cell it starts from is complete.
    """
    folder = output / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    settings = {**cell.settings, "output_dir": str(folder / "training")}
    if cell.start is not None:
        settings["model"] = str(output / cell.start.name / MODEL)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    return {"pretraining": _pretrain, "fine-tuning": _fine_tune, "probing": probe_cell}[cell.stage](cell, folder)


def _trainer(folder: Path, settings_type: type, trainer_type: type, max_steps: int | None) -> SpeechLLMTrainer:
    """The trainer of a cell's recipe. (`max_steps: 0` means no training here, and no limit to Transformers.)"""
    options = ["--config", str(folder / "recipe.yaml"), "--use_cpu", str(not torch.cuda.is_available())]
    options += ["--disable_tqdm", "true", *(["--max_steps", "1"] if max_steps == 0 else [])]
    model_settings, data, settings = parse_settings([ModelArguments, DataArguments, settings_type], options, "cell", "")
    train, held_out = data.load()
    model, processor = load_model(model_settings, settings)
    trainer = trainer_type(model, settings, train, held_out, processor)
    trainer.note_set_aside(data.set_aside)
    return _quiet(trainer)


def _quiet(trainer: SpeechLLMTrainer) -> SpeechLLMTrainer:
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(GiveMemoryBack)
    return trainer


def _unusable(trainer: SpeechLLMTrainer) -> dict[str, Any]:
    """How many rows of training and test could not be used, and why the first could not."""
    reasons = [item.reason for item in trainer.set_aside.values()]
    return {"set_aside": len(reasons), "set_aside_first": reasons[0] if reasons else None}


def _trained(trainer: SpeechLLMTrainer, max_steps: int | None) -> dict[str, Any]:
    """Train, unless `max_steps` is 0; the cost, and the losses on the way."""
    with Cost() as cost:
        if max_steps != 0:
            trainer.train()
    return {
        **cost.measured,
        "steps": trainer.state.global_step,
        "llm_tokens": trainer.llm_tokens if max_steps != 0 else 0,  # what was to be learned from may be cached already
        "train_rows": len(trainer.train_rows),
        "trainable_parameters": sum(p.numel() for p in trainer.speechllm.parameters() if p.requires_grad),
        "history": [
            {name: value for name, value in log.items() if name == "step" or name.startswith("loss")}
            for log in trainer.state.log_history
            if "loss" in log
        ],
    }


# ---- pretraining -----------------------------------------------------------------------------------------------------


def _pretrain(cell: Cell, folder: Path) -> dict[str, Any]:
    steps = cell.settings.get("max_steps")
    trainer = _trainer(folder, ContrastiveArguments, ContrastiveTrainer, steps)
    result = _trained(trainer, steps)
    result["retrieval"] = retrieval(trainer)
    if trainer.args.similarity != "cosine":
        result["own_retrieval"] = {"similarity": trainer.args.similarity, **retrieval(trainer, trainer.args.similarity)}
    trainer.speechllm.save_pretrained(folder / MODEL, kind="projector")
    trainer.processing_class.save_pretrained(folder / MODEL)
    return {**result, **_unusable(trainer)}


def retrieval(trainer: ContrastiveTrainer, similarity: str = "cosine") -> dict[str, Any]:
    """Held-out retrieval at the LLM's input, every fifth layer and the last, by the cosine of mean tokens or another
    similarity. Of each utterance, `text_of` numbers what it says, `language_of` names its language, and
    `ranks` are those of its transcript, layer by layer."""
    settings = trainer.args
    arguments = ContrastiveArguments(
        output_dir=settings.output_dir,
        similarity=similarity,
        use_cpu=settings.use_cpu,
        prefix=settings.prefix,
        feature_cache=settings.feature_cache,
        text_state_cache=settings.text_state_cache,
        per_device_eval_batch_size=settings.per_device_eval_batch_size,
        dataloader_pin_memory=settings.dataloader_pin_memory,
        disable_tqdm=True,
    )
    measure = ContrastiveTrainer(trainer.speechllm, arguments, None, trainer.eval_rows, trainer.processing_class)
    metrics = _quiet(measure).evaluate()
    said = [measure.batch_key(row) for row in measure.held_out_rows]
    return {
        "texts": len(said),
        "layers": measure.all_layers,
        "loss": metrics["eval_loss"],
        "language_of": [row.get("language") for row in measure.held_out_rows],
        "text_of": [*map(list(dict.fromkeys(said)).index, said)],
        "ranks": {
            str(layer): retrieval_ranks(matrix, said)[""].tolist()
            for layer, matrix in measure.held_out_similarity.items()
        },
        **{
            name: {str(layer): metrics[f"eval_{name}_layer_{layer}"] for layer in measure.all_layers}
            for name in ("recall@1", "recall@5", "mean_rank", "text_to_speech_recall@1")
        },
    }


# ---- fine-tuning -----------------------------------------------------------------------------------------------------


class OracleTrainer(FineTuningTrainer):
    """Fine-tuning on transcripts in the place of audio."""

    _shares_start = False  # no audio ends what the rows of a batch have in common: it may reach into the answer

    def items(self, rows: list[Row], with_answer: bool = True) -> TranscriptItems:
        return TranscriptItems(rows, self.processing_class, with_answer)


def _fine_tune(cell: Cell, folder: Path) -> dict[str, Any]:
    steps = cell.settings.get("max_steps")
    trainer = _trainer(folder, FineTuningArguments, OracleTrainer if cell.oracle else FineTuningTrainer, steps)
    result = _trained(trainer, steps)
    with Cost() as cost:
        predictions = predict(trainer)
    lines = [json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions]
    (folder / PREDICTIONS).write_text("".join(lines), encoding="utf-8")
    tested = {"test_rows": len(predictions), "test_seconds": cost.measured["seconds"]}
    return {**result, **tested, **_unusable(trainer)}


def predict(trainer: FineTuningTrainer) -> list[dict[str, Any]]:
    """The answers to the held-out rows, with the right ones' loss (summed nats) and number of tokens."""
    trainer.speechllm.eval()
    losses = answer_losses(trainer.speechllm, trainer)
    answers: dict[str, str] = {}
    longest = trainer.args.max_new_tokens
    for task in dict.fromkeys(task_of(row) for row in trainer.eval_rows):
        rows = [row for row in trainer.eval_rows if task_of(row) == task and row["id"] in losses]
        # Greedy answers stop at the end of turn; what rambles on need not do so beyond twice the longest right answer.
        tokens = max((losses[row["id"]][1] for row in rows), default=longest)
        trainer.args.max_new_tokens = min(longest, 2 * tokens)
        answers |= trainer.answers(rows)
    trainer.args.max_new_tokens = longest
    return [
        {
            "id": row["id"],
            "task": task_of(row),
            "speech": str(row.get("passage_id") or _recording(row)),
            **{name: row[name] for name in KEPT if name in row},
            "prediction": answers.get(row["id"], ""),
            "loss": losses[row["id"]][0],
            "tokens": losses[row["id"]][1],
        }
        for row in trainer.eval_rows
        if row["id"] in losses
    ]


def _recording(row: Row) -> str:
    """Its file, or its place in a shard; the row's own name where it is in memory. Segments of a file are one recording."""
    audio = row["audio"]
    path = next(iter(audio_paths(audio)), row["id"])
    start = audio.get("byte_offset") if isinstance(audio, dict) else None
    return path if start is None else f"{path} {start}"


@torch.no_grad()
def answer_losses(model: SpeechLLMForConditionalGeneration, trainer: FineTuningTrainer) -> dict[str, tuple[float, int]]:
    """Row id -> (cross-entropy of the right answer in nats, summed over its tokens; tokens)."""
    dataset, found = trainer.items(trainer.eval_rows), {}
    for batch in trainer.eval_batches(dataset):
        batch = trainer.on_device(batch)
        if not batch["weight"]:
            continue
        inputs = trainer.answer_inputs(batch)
        logits = model(**inputs, answer_logits_only=True).logits.float()
        targets = inputs["labels"][:, 1:]
        counts = (targets != -100).sum(1).tolist()
        losses = torch.nn.functional.cross_entropy(logits, targets[targets != -100], reduction="none").split(counts)
        for row, loss in zip(batch["rows"], losses):
            found[dataset.rows[row]["id"]] = (round(loss.sum().item(), 5), len(loss))
    return found
