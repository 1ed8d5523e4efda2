"""Settings of fine-tuning."""

from dataclasses import dataclass, field

from .base import SpeechLLMTrainingArguments


@dataclass
class FineTuningArguments(SpeechLLMTrainingArguments):
    """Settings of `FineTuningTrainer`, beyond those of `transformers.TrainingArguments`."""

    lora_rank: int = field(
        default=0, metadata={"help": "Rank of LoRA on the LLM's attention and MLP; 0, as in the paper, trains none."}
    )
    lora_alpha: int = field(default=16, metadata={"help": "LoRA's scale is lora_alpha / lora_rank."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer that evaluation generates."})
    predict_with_generate: bool = field(
        default=True, metadata={"help": "Evaluate by generation (WER and CER), besides the loss."}
    )
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Utterances per device in evaluation."})

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("lora_rank", 0), ("lora_alpha", 1), ("max_new_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
