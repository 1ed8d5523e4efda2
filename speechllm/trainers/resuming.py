"""Which checkpoint an interrupted run goes on from, and whether it is this run's."""

import logging
import math
import os
import re
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpoint_speechllm import CheckpointError
from ..hub.training_summary import published_base_models, read_summary, stage_settings


logger = logging.getLogger(__name__)

# Settings that may change when a run goes on: those of evaluation, and what one turns where memory does not suffice.
FREE = {
    "bf16", "fp16", "early_stopping_patience", "early_stopping_threshold", "gradcache_chunk", "gradient_checkpointing",
    "log_figures", "max_new_tokens", "predict_with_generate",
}  # fmt: skip
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")  # of which the product must stay


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """The last `checkpoint-N` in a folder that was written to its end; `None` if there is none. Others, of a process that was
    killed while it saved, are passed over, and said."""
    named = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    found = {int(match[1]): path for path in Path(folder).glob("*") if (match := named.fullmatch(path.name))}
    for _, path in sorted(found.items(), reverse=True):
        if (path / TRAINER_STATE_NAME).is_file():  # which is written last
            return str(path)
        logger.warning("%s was not written to its end, and is passed over.", path)
    return None


def checkpoint_to_resume(folder: str | os.PathLike, asked: str | os.PathLike | bool) -> str:
    """The checkpoint that is asked for by its path, or (`True`) the last one of the folder.

    Raises:
        CheckpointError: if it is not there, or was not written to its end.
    """
    if str(asked).lower() == "true":
        if (found := last_checkpoint(folder)) is None:
            raise CheckpointError(f"{folder} holds no checkpoint to go on from. Start without.")
        return found
    if not (Path(asked) / TRAINER_STATE_NAME).is_file():
        raise CheckpointError(
            f"{asked} is no checkpoint of a training run, or was not written to its end ({TRAINER_STATE_NAME} is missing). "
            "Give the path of a checkpoint-N folder."
        )
    return str(asked)


def refuse_other_run(checkpoint: str | os.PathLike, trainer: Any) -> None:
    """
    Raises:
        CheckpointError: if the checkpoint is from another stage of training, another model, or other settings than the
            trainer's; it would be gone on with instead of what is asked for.
    """
    summary = read_summary(checkpoint)
    if not summary.get("stages"):
        return
    *earlier, stage = map(_identity, summary["stages"])
    begun_from = [*map(_identity, trainer.earlier_stages)]
    base_models = published_base_models(trainer.headless.config.base_models or {})
    if stage["trainer"] != type(trainer).__name__:
        changed = [f"it is of {stage['trainer']}"]
    elif (earlier, summary["base_models"]) != (begun_from, base_models):
        changed = ["it began from another model"]
    else:
        begun, wanted = stage["settings"], stage_settings(trainer.args)
        default = {name: getattr(type(trainer.args), name, None) for name in sorted({*begun, *wanted, *BATCH} - FREE)}
        values = {name: (begun.get(name, value), wanted.get(name, value)) for name, value in default.items()}
        batches = [math.prod(values[name][time] for name in BATCH) for time in (0, 1)]
        if batches[0] == batches[1]:
            values = {name: pair for name, pair in values.items() if name not in BATCH}
        changed = [f"{name} was {was}, and is {now} now" for name, (was, now) in values.items() if was != now]
    if changed:
        raise CheckpointError(
            f"{checkpoint} is of another run: {'; '.join(changed)}. Give this one another --output_dir. (To go on from that "
            "run's weights: --model; to go on with it all the same: --resume_from_checkpoint.)"
        )


def _identity(stage: dict[str, Any]) -> dict[str, Any]:
    """What of a stage does not change when its command is run again."""
    return {name: stage[name] for name in ("trainer", "settings", "steps")}


def refuse_weights_alone(checkpoint: str | os.PathLike, args: TrainingArguments) -> None:
    """
    Raises:
        CheckpointError: if there is more to train and the optimiser's state is not there (`save_only_model`): the run would
            begin anew, with its learning rate, where it should go on.
    """
    folder = Path(checkpoint)
    missing = [name for name in (OPTIMIZER_NAME, SCHEDULER_NAME) if not (folder / name).is_file()]
    if missing and not _is_finished(TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)), args):
        raise CheckpointError(
            f"{checkpoint} holds no {missing[0]}, as with save_only_model: the run cannot go on where it was. Start one from "
            "its weights (--model) in another --output_dir."
        )


def _is_finished(state: TrainerState, args: TrainingArguments) -> bool:
    """Whether a run has all the steps, or epochs, that the settings ask for."""
    asked, had = (
        (args.max_steps, state.global_step) if args.max_steps > 0 else (args.num_train_epochs, state.num_train_epochs)
    )
    return state.global_step >= state.max_steps and had >= asked
