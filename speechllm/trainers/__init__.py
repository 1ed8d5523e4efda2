"""How it is minimised: `Trainer` subclasses and their settings."""

from .aligned_states import AlignedStates
from .base import SpeechLLMTrainer, SpeechLLMTrainingArguments
from .contrastive_config import ContrastiveArguments
from .contrastive_trainer import ContrastiveTrainer
from .fine_tuning_config import FineTuningArguments
from .fine_tuning_trainer import FineTuningTrainer, add_lora


__all__ = [
    "AlignedStates",
    "ContrastiveArguments",
    "ContrastiveTrainer",
    "FineTuningArguments",
    "FineTuningTrainer",
    "SpeechLLMTrainer",
    "SpeechLLMTrainingArguments",
    "add_lora",
]
