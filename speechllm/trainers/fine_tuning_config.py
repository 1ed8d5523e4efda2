"""Settings of fine-tuning."""

import logging
from dataclasses import dataclass, field

from .base import SpeechLLMTrainingArguments


logger = logging.getLogger(__name__)

LOWER_IS_BETTER = ("loss", "wer", "cer", "substitutions", "deletions", "insertions")  # endings of metrics' names


@dataclass
class FineTuningArguments(SpeechLLMTrainingArguments):
    """Settings of `FineTuningTrainer`, beyond those of `transformers.TrainingArguments`."""

    lora_rank: int = field(
        default=0,
        metadata={
            "help": "Rank of LoRA on the LLM's attention and MLP; 0, as in the paper, adds none. (That of --model goes on "
            "being trained.)"
        },
    )
    lora_alpha: int = field(default=16, metadata={"help": "LoRA's scale is lora_alpha / lora_rank."})
    train_llm: bool = field(
        default=False,
        metadata={"help": "Train all of the LLM too, in float32; checkpoints then hold all weights."},
    )
    answer_noise: float = field(
        default=0.0,
        metadata={
            "help": "Share of the answer's tokens in whose place the LLM reads random ones in training, so that it listens "
            "instead of guessing on from its own words. For little data (word dropout, arXiv 1511.06349)."
        },
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer that evaluation generates."})
    predict_with_generate: bool = field(
        default=True, metadata={"help": "Evaluate by generation (the metrics of each task), besides the loss."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations in a row without a better metric_for_best_model."},
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "How much better the metric must become to count, with early_stopping_patience."}
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Resume the count of early_stopping_patience too."}
    )
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Utterances per device in evaluation."})

    def __post_init__(self):
        if self.early_stopping_patience is not None and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            # Transformers would take every metric but the loss for one of which more is better.
            self.greater_is_better = not self.metric_for_best_model.endswith(LOWER_IS_BETTER)
        super().__post_init__()
        for name, least in (("lora_rank", 0), ("lora_alpha", 1), ("max_new_tokens", 1), ("early_stopping_patience", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}.")
        if not 0 <= self.answer_noise < 1:
            raise ValueError(f"answer_noise is {self.answer_noise}; it must be at least 0 and below 1.")
        if self.train_llm and self.lora_rank:
            raise ValueError("train_llm trains all of the LLM, lora_rank matrices beside it. Set one of them.")
        if self.early_stopping_patience is not None and self.eval_strategy == "no":
            raise ValueError("early_stopping_patience counts evaluations; set eval_strategy to steps or epoch.")
        if self.load_best_model_at_end and self.save_strategy == "steps" and self.save_steps != self.eval_steps:
            logger.warning(
                "The model is saved every %g steps and evaluated every %g, so the best one may not be there to load at the "
                "end. Set save_strategy to best, or save_steps to eval_steps.",
                self.save_steps,
                self.eval_steps,
            )
