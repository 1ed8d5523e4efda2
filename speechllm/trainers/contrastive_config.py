"""Settings of contrastive pretraining."""

from dataclasses import dataclass, field

from ..objectives import parse_layer_schedule
from .base import SpeechLLMTrainingArguments


ANY_DEPTH = 10_000  # deeper than any LLM: settings are checked before the LLM is known


@dataclass
class ContrastiveArguments(SpeechLLMTrainingArguments):
    """Settings of `ContrastiveTrainer`, beyond those of `transformers.TrainingArguments`. Paper: arXiv 2412.15712."""

    layers: str = field(
        default="all",
        metadata={
            "help": "Hidden states to align: 'emb' (the LLM's input), 'all' (every fifth and the last), or '0,5,10'."
        },
    )
    layer_schedule: str | None = field(
        default=None,
        metadata={
            "help": "Curriculum, overrides `layers`: e.g. '0:emb 300:all' aligns the LLM's input for 300 steps, then all "
            "layers. From random initialisation, all layers at once hardly learn for hundreds of steps."
        },
    )
    similarity: str = field(default="cosine", metadata={"help": "Similarity of a text and an utterance: 'cosine'."})
    temperature: float = field(default=0.1, metadata={"help": "Temperature of InfoNCE."})
    symmetric: bool = field(
        default=False, metadata={"help": "Average with the speech-to-text direction (the paper: text to speech only)."}
    )
    prefix: str = field(
        default="auto",
        metadata={
            "help": "Text that both sides begin with and that pooling leaves out; it absorbs the LLM's attention sink. "
            "'auto': the opening of the LLM's user turn; 'bos'; '' for none, as in the paper; or any text."
        },
    )
    text_state_cache: str | None = field(
        default=None, metadata={"help": "Folder to keep the frozen LLM's text states in; they are computed once."}
    )
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Utterances per device in evaluation."})

    def __post_init__(self):
        super().__post_init__()
        parse_layer_schedule(self.layer_schedule or f"0:{self.layers.replace(' ', ',')}", ANY_DEPTH)
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0 (the paper: 0.1).")
