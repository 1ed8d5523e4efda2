"""Settings of the quick start. The defaults are meant to take under 20 minutes on two cores."""

from dataclasses import dataclass, field


@dataclass
class QuickstartArguments:
    """Pretrain and fine-tune a small SpeechLLM on real speech, and report what happened."""

    output: str = field(default="runs/quickstart", metadata={"help": "Folder for the report, plots and model."})
    source: str = field(
        default="auto",
        metadata={
            "help": "Where models and speech come from: 'packages' (package registries), 'hub' (Hugging Face Hub), or "
            "'auto' (packages, else the Hub)."
        },
    )
    steps: list[int] = field(
        default_factory=lambda: [400, 120, 90],
        metadata={
            "help": "Three numbers: pretraining steps at the LLM's input, then at all layers, then fine-tuning steps."
        },
    )
    test_utterances: int = field(default=84, metadata={"help": "Held-out utterances, all of different texts."})
    seed: int = field(default=0, metadata={"help": "Decides the split, the initial projector and the order of data."})
    compute_arms: bool = field(
        default=True, metadata={"help": "Also fine-tune from scratch, at equal steps and at equal compute."}
    )
    lora_rank: int = field(
        default=8, metadata={"help": "Rank of LoRA on the LLM in fine-tuning; 0 trains the projector only (the paper)."}
    )

    def __post_init__(self):
        if len(self.steps) != 3 or min(self.steps) < 1:
            raise ValueError(f"--steps takes three positive numbers, e.g. 400 120 90; got {self.steps}.")
        if self.source not in ("packages", "hub", "auto"):
            raise ValueError(f"--source is {self.source!r}; use 'packages', 'hub' or 'auto'.")
