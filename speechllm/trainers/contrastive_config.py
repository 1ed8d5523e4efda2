"""Settings of contrastive pretraining."""

from dataclasses import dataclass, field

from ..objectives import parse_layer_schedule, parse_layer_weights
from ..objectives.distillation import DIRECTIONS
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
    similarity: str = field(
        default="cosine",
        metadata={
            "help": "Similarity of a text and an utterance: 'cosine' of mean tokens (the cheapest); or minus a distance of "
            "the token sequences: 'wasserstein', the paper's debiased Sinkhorn divergence (next dearest); "
            "'wasserstein_geomloss', the same with each pair's own diameter, exactly as published (slow: pair by pair); "
            "'transport_cost', that of the entropic plan, an upper bound; 'exact_wasserstein', solved pair by pair on the "
            "CPU (far dearer, needs POT)."
        },
    )
    layer_weights: str | None = field(
        default=None,
        metadata={
            "help": "Weights of layers in the loss: '0:1 5:0.5' (1 where absent), or 'learned': by the uncertainty of each "
            "layer's task (arXiv 1705.07115), within 0.1 and 10. The paper: all 1."
        },
    )
    layer_ramp: int = field(
        default=0,
        metadata={
            "help": "Steps over which the weight of a layer that `layer_schedule` adds grows from 0; 0: at once."
        },
    )
    temperature: float = field(default=0.1, metadata={"help": "Temperature of InfoNCE (where it starts, if learned)."})
    temperature_learned: bool = field(
        default=False, metadata={"help": "Learn the temperature along, as CLIP does; it stays at or above 0.01."}
    )
    symmetric: bool = field(
        default=False, metadata={"help": "Average with the speech-to-text direction (the paper: text to speech only)."}
    )
    gather_negatives: bool = field(
        default=True,
        metadata={
            "help": "On several processes, take negatives from all of them: the loss is then that of one large batch. The "
            "paper's code takes each device's own. (Gradient accumulation adds no negatives; gradcache_chunk does.)"
        },
    )
    gradcache_chunk: int = field(
        default=0,
        metadata={
            "help": "Run the per-device batch through the model in chunks of so many utterances, twice (GradCache): memory "
            "of one chunk, negatives and gradient of the whole batch; 0: at once."
        },
    )
    position_shift: int = field(
        default=0,
        metadata={
            "help": "Shift the positions of both sides by the same random offset below this, new in every step (the "
            "paper's ablation: 400); 0: none."
        },
    )
    text_bank: int = field(
        default=0,
        metadata={
            "help": "Random texts of the training data as further negatives of each utterance, so many per step. They cost "
            "no LLM pass, but need text_state_cache, and `symmetric`: they compete where an utterance looks for its text."
        },
    )
    hard_negatives: int = field(
        default=0,
        metadata={
            "help": "Texts per utterance, mined from all training texts as those it is most easily taken for, as further "
            "negatives of all utterances of the batch. Needs text_state_cache and `symmetric`, as text_bank."
        },
    )
    hard_negatives_layer: int = field(
        default=-1, metadata={"help": "Layer at which hard negatives are mined, one of those aligned; -1: the deepest."}
    )
    hard_negatives_refresh: int = field(default=500, metadata={"help": "Steps between searches for hard negatives."})
    hard_negatives_similarity: float = field(
        default=0.9,
        metadata={
            "help": "A text is no hard negative of an utterance if it is more similar than this to the utterance's own "
            "text (cosine of centred mean states): it may mean the same. Near-duplicates by words never are."
        },
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
    contrastive_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the contrastive loss; 0 turns it off (a row of the paper without contr-*)."},
    )
    next_token_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the next-token loss on the answers, `target` or the transcript: the paper's '+ asr' (it prints "
            "no weight; 1 here), with contrastive_weight 0 its ASR pretraining. Rows of other tasks make training joint."
        },
    )
    mixed_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of next-word prediction where each word is given as speech or as text, the paper's 'mixed' "
            "rows; the data needs word times (`speechllm align`)."
        },
    )
    mixed_speech_probability: float = field(
        default=0.5, metadata={"help": "Probability of a word to be given as speech, in the mixed term."}
    )
    mixed_punctuation: bool = field(
        default=False, metadata={"help": "Keep punctuation in the mixed term's text (the paper removes it)."}
    )
    distillation_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the KL divergence between the LLM's predictions after the transcript and after the "
            "speech (not in the paper; as in Ultravox)."
        },
    )
    distillation_target: str = field(
        default="transcript",
        metadata={
            "help": "Answer whose predictions are compared: 'transcript' (any ASR data: the LLM repeats it) or 'target' "
            "(the rows' own, with their `prompt`; an LLM's answers to the transcripts make it Ultravox's)."
        },
    )
    distillation_prompt: str = field(
        default="Repeat this word for word.",
        metadata={"help": "Instruction behind speech and transcript, where distillation_target is 'transcript'."},
    )
    distillation_temperature: float = field(
        default=1.0, metadata={"help": "Temperature of both distributions; Ultravox takes 2."}
    )
    distillation_direction: str = field(
        default="forward", metadata={"help": "'forward', KL(text || speech), or 'reverse', KL(speech || text)."}
    )
    norm_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of a term that ties the scale of the speech tokens to that of the LLM's embeddings (not in "
            "the paper: its losses leave the scale free)."
        },
    )
    log_figures: bool = field(
        default=True,
        metadata={
            "help": "At each evaluation, put figures of the alignment on the dashboards of report_to (tensorboard, wandb, "
            "trackio): retrieval per layer, and similarities of held-out texts and utterances."
        },
    )
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Utterances per device in evaluation."})

    def __post_init__(self):
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            # Transformers would take every loss but the whole one for a metric of which more is better.
            lower = "loss" in self.metric_for_best_model or "mean_rank" in self.metric_for_best_model
            self.greater_is_better = not lower
        super().__post_init__()
        parse_layer_schedule(self.layer_schedule or f"0:{self.layers.replace(' ', ',')}", ANY_DEPTH)
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0 (the paper: 0.1).")
        if self.layer_weights not in (None, "learned"):
            parse_layer_weights(self.layer_weights, ANY_DEPTH)
        for name in ("layer_ramp", "gradcache_chunk", "position_shift", "text_bank", "hard_negatives"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 (off) or above.")
        if self.hard_negatives_refresh < 1:
            raise ValueError(f"hard_negatives_refresh is {self.hard_negatives_refresh}; it must be at least 1.")
        if not -1 <= self.hard_negatives_similarity <= 1:
            raise ValueError(f"hard_negatives_similarity is {self.hard_negatives_similarity}; it is a cosine: -1 to 1.")
        for name in ("text_bank", "hard_negatives"):
            if getattr(self, name) and not self.text_state_cache:
                raise ValueError(f"{name} takes the texts' states from a cache: set text_state_cache to a folder.")
            if getattr(self, name) and not self.symmetric:
                raise ValueError(
                    f"{name} has no effect on the text-to-speech direction, where utterances compete: set symmetric."
                )
        if self.position_shift and self.text_state_cache:
            raise ValueError(
                "position_shift gives texts other states in every step, text_state_cache the same. Leave one out."
            )
        for name in ("contrastive", "next_token", "mixed", "distillation", "norm"):
            if not 0 <= (weight := getattr(self, f"{name}_weight")) < float("inf"):
                raise ValueError(f"{name}_weight is {weight}; it must be 0 (off) or above.")
        if not 0 < self.mixed_speech_probability < 1:
            raise ValueError(f"mixed_speech_probability is {self.mixed_speech_probability}; it must be in (0, 1).")
        if self.distillation_target not in ("transcript", "target"):
            raise ValueError(f"distillation_target is {self.distillation_target!r}; use 'transcript' or 'target'.")
        if self.distillation_direction not in DIRECTIONS:
            raise ValueError(f"distillation_direction is {self.distillation_direction!r}; use one of {DIRECTIONS}.")
        if self.distillation_temperature <= 0:
            raise ValueError(f"distillation_temperature is {self.distillation_temperature}; it must be above 0.")
