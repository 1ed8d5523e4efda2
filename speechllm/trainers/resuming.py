"""Which checkpoint an interrupted run goes on from, and whether it is this run's."""

import logging
import os
import re
from pathlib import Path
from typing import Any

from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpoint_speechllm import CheckpointError
from ..hub.training_summary import published_base_models, read_summary, stage_settings


logger = logging.getLogger(__name__)

# Settings that may change when a run goes on: those of evaluation, and what one turns where memory does not suffice.
FREE = {
    "bf16", "fp16", "early_stopping_patience", "early_stopping_threshold", "gradcache_chunk", "gradient_accumulation_steps",
    "gradient_checkpointing", "log_figures", "max_new_tokens", "per_device_train_batch_size", "predict_with_generate",
}  # fmt: skip


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
        default = {name: getattr(type(trainer.args), name, None) for name in sorted({*begun, *wanted} - FREE)}
        values = {name: (begun.get(name, value), wanted.get(name, value)) for name, value in default.items()}
        changed = [f"{name} was {was}, and is {now} now" for name, (was, now) in values.items() if was != now]
    if changed:
        raise CheckpointError(
            f"{checkpoint} is of another run: {'; '.join(changed)}. Give this one another --output_dir. (To go on from that "
            "run's weights: --model; to go on with it all the same: --resume_from_checkpoint.)"
        )


def _identity(stage: dict[str, Any]) -> dict[str, Any]:
    """What of a stage does not change when its command is run again."""
    return {name: stage[name] for name in ("trainer", "settings", "steps")}


def refuse_weights_alone(checkpoint: str | os.PathLike) -> None:
    """
    Raises:
        CheckpointError: if the optimiser's state is not there (`save_only_model`): the run would begin anew, with its
            learning rate, where it should go on.
    """
    folder = Path(checkpoint)
    missing = [name for name in (OPTIMIZER_NAME, SCHEDULER_NAME) if not (folder / name).is_file()]
    if missing and (folder / TRAINER_STATE_NAME).is_file():
        raise CheckpointError(
            f"{checkpoint} holds no {missing[0]}, as with save_only_model: the run cannot go on where it was. Start one from "
            "its weights (--model) in another --output_dir."
        )
