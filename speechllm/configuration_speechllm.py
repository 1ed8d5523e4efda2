"""Configuration of a SpeechLLM: a speech encoder, a projector and a large language model.

    waveform --encoder--> frames --projector--> speech tokens --LLM--> text
    16 kHz                50 /s                 12 /s

The arithmetic from samples to speech tokens lives here too (`SpeechTokenRule`), because the processor (which writes
one placeholder per speech token into the prompt) and the model (which fills them) must agree on it to the token.
"""

from copy import deepcopy
from dataclasses import asdict, dataclass
from math import inf, prod
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig


SAMPLING_RATE = 16_000  # Hz; every encoder below was trained on it
AUDIO_TOKEN = "<|audio|>"  # the placeholder in prompts
MEL_HOP = 160  # samples between two log-mel frames of Whisper
MEL_WINDOW = 400  # samples under one log-mel frame of Whisper
WAVEFORM_ENCODERS = (  # the wav2vec 2.0 family: strided convolutions over the waveform, then a Transformer
    "data2vec-audio",
    "hubert",
    "unispeech",
    "unispeech-sat",
    "wav2vec2",
    "wav2vec2-conformer",
    "wavlm",
)

AUTO_MAP = {
    "AutoConfig": "configuration_speechllm.SpeechLLMConfig",
    "AutoModel": "modeling_speechllm.SpeechLLMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_speechllm.SpeechLLMForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_speechllm.SpeechLLMForConditionalGeneration",
    "AutoProcessor": "processing_speechllm.SpeechLLMProcessor",
}
CUSTOM_PIPELINES = {"audio-text-to-text": {"impl": "pipeline_speechllm.SpeechLLMPipeline", "pt": ["AutoModel"]}}


@dataclass(frozen=True)
class SpeechTokenRule:
    """How many speech tokens an utterance becomes: input steps -> encoder frames -> projector windows -> tokens.

    Args:
        convolutions: (kernel, stride, padding) of every strided layer between the encoder's input and its frames. One
            input step is a sample (wav2vec 2.0 family) or a log-mel frame (Whisper).
        samples_per_step: 1 for waveforms, 160 for log-mel frames.
        window: encoder frames in one projector window.
        tokens_per_window: speech tokens that the projector makes of a window.
    """

    convolutions: tuple[tuple[int, int, int], ...]
    samples_per_step: int
    window: int
    tokens_per_window: int

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SpeechTokenRule":
        return cls(**{**values, "convolutions": tuple(tuple(layer) for layer in values["convolutions"])})

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "convolutions": [list(layer) for layer in self.convolutions]}

    @property
    def frames_per_second(self) -> float:
        return SAMPLING_RATE / self.samples_per_step / prod(stride for _, stride, _ in self.convolutions)

    def steps(self, samples):
        """Valid input steps of an utterance of `samples` samples (an int or an integer tensor)."""
        return -(-samples // self.samples_per_step)

    def frames(self, steps):
        """Encoder frames of `steps` input steps (an int or an integer tensor). Never negative."""
        for kernel, stride, padding in self.convolutions:
            steps = (steps + 2 * padding - kernel) // stride + 1
        return steps * (steps > 0)

    def tokens(self, frames):
        """Speech tokens of `frames` encoder frames; a last, partly filled window counts as a window."""
        return -(-frames // self.window) * self.tokens_per_window

    @property
    def shortest(self) -> int:
        """Samples of the shortest audio that fills one encoder frame."""
        if self.samples_per_step > 1:
            return MEL_WINDOW
        steps = 1
        for kernel, stride, padding in reversed(self.convolutions):
            steps = max((steps - 1) * stride + kernel - 2 * padding, 1)
        return steps


class SpeechLLMProjectorConfig(PreTrainedConfig):
    """Projector from encoder frames to speech tokens. The defaults are the paper's (42.5 M parameters with
    HuBERT-large and Llama-3.1-8B).

    Args:
        projector_type: `"qformer"`, the window-level Q-Former of the paper, or `"mlp"`, which stacks the frames of a
            window and maps them through two linear layers to one speech token.
        window_frames: encoder frames per non-overlapping window; 17 is a third of a second at 50 frames per second.
        num_queries: learned queries, hence speech tokens, per window (Q-Former only).
        hidden_size: width of the Q-Former, or of the hidden layer of the MLP.
        num_hidden_layers, num_attention_heads, intermediate_size: of the Q-Former; cross-attention in every layer.
        dropout: applied to the Q-Former's hidden states and attention, or to the MLP's hidden layer.
    """

    model_type = "speechllm_projector"
    base_config_key = "projector_config"

    projector_type: str = "qformer"
    window_frames: int = 17
    num_queries: int = 4
    hidden_size: int = 768
    num_hidden_layers: int = 4
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    dropout: float | int = 0.1
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.projector_type not in ("qformer", "mlp"):
            raise ValueError(f"projector_type is {self.projector_type!r}; use 'qformer' or 'mlp'.")
        if self.window_frames < 1 or self.num_queries < 1:
            raise ValueError(
                f"window_frames ({self.window_frames}) and num_queries ({self.num_queries}) must be at least 1."
            )

    @property
    def tokens_per_window(self) -> int:
        return self.num_queries if self.projector_type == "qformer" else 1


class SpeechLLMConfig(PreTrainedConfig):
    """Configuration of `SpeechLLMModel` and `SpeechLLMForConditionalGeneration`.

    Args:
        speech_config: configuration of the encoder: Whisper, or one of the wav2vec 2.0 family (HuBERT, WavLM, wav2vec
            2.0, ...: `WAVEFORM_ENCODERS`). A `PreTrainedConfig` or a dict with a `model_type`. Default: HuBERT.
        text_config: configuration of any causal language model of Transformers. Default: Llama.
        projector_config: see `SpeechLLMProjectorConfig`.
        speech_layer: which hidden state of the encoder feeds the projector (0 = before the first layer). `None`, the
            default, is the encoder's final output.
        audio_token_id: id of the placeholder token in prompts. It may lie outside the LLM's vocabulary: it is never
            looked up, only replaced by speech tokens.
        context_seconds: silence that Whisper hears after the end of an utterance. 30 gives it the full window that it
            was trained on; 0.5 gives nearly the same features at a fraction of the time. Ignored by other encoders.
        encoder_batch_seconds: audio that one call of the encoder takes at most; longer inputs run in several calls,
            so memory stays bounded.
        freeze_speech_encoder, freeze_language_model: frozen parts get no gradient and stay in evaluation mode.
        frozen_in_train_mode: put frozen parts in training mode under `train()` (dropout, SpecAugment and layer drop
            active), as the paper's published code does.
        base_models: repository ids or folders of the frozen parts and the revisions they are pinned to:
            `{"speech": {"id": ..., "revision": ...}, "text": {...}}`. Written by `from_speech_text_pretrained`.
    """

    model_type = "speechllm"
    sub_configs: ClassVar[dict[str, type]] = {
        "speech_config": AutoConfig,
        "text_config": AutoConfig,
        "projector_config": SpeechLLMProjectorConfig,
    }

    speech_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projector_config: dict | PreTrainedConfig | None = None
    speech_layer: int | None = None
    audio_token_id: int | None = None
    context_seconds: float | int = 0.5
    encoder_batch_seconds: float | int = 120.0
    freeze_speech_encoder: bool = True
    freeze_language_model: bool = True
    frozen_in_train_mode: bool = False
    base_models: dict | None = None
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs):
        self.speech_config = _sub_config(self.speech_config, "speech_config", default="hubert")
        self.text_config = _sub_config(self.text_config, "text_config", default="llama")
        if self.projector_config is None:
            self.projector_config = SpeechLLMProjectorConfig()
        elif isinstance(self.projector_config, dict):
            self.projector_config = SpeechLLMProjectorConfig(**self.projector_config)
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        if self.audio_token_id is None:
            self.audio_token_id = self.text_config.vocab_size
        super().__post_init__(**kwargs)
        if not self.is_whisper and self.speech_config.model_type not in WAVEFORM_ENCODERS:
            raise ValueError(
                f"speech_config is of type {self.speech_config.model_type!r}, which is not a speech encoder that can "
                f"be used here. Use 'whisper' or one of {', '.join(map(repr, WAVEFORM_ENCODERS))}."
            )
        layers = self.speech_config.num_hidden_layers
        if self.speech_layer is not None and not 0 <= self.speech_layer <= layers:
            raise ValueError(
                f"speech_layer is {self.speech_layer}, but the {self.speech_config.model_type} encoder has hidden "
                f"states 0 to {layers}. Leave it out for the final output."
            )

    @property
    def speech_hidden_size(self) -> int:
        """Width of the encoder frames that feed the projector."""
        adapted = getattr(self.speech_config, "add_adapter", False) and self.speech_layer is None
        return self.speech_config.output_hidden_size if adapted else self.speech_config.hidden_size

    @property
    def is_whisper(self) -> bool:
        return self.speech_config.model_type == "whisper"

    @property
    def speech_token_rule(self) -> SpeechTokenRule:
        """From audio samples to speech tokens, for this encoder and projector."""
        speech = self.speech_config
        if self.is_whisper:
            convolutions = [(3, 1, 1), (3, 2, 1)]
        else:
            convolutions = [(kernel, stride, 0) for kernel, stride in zip(speech.conv_kernel, speech.conv_stride)]
            if getattr(speech, "add_adapter", False) and self.speech_layer is None:
                convolutions += [(speech.adapter_kernel_size, speech.adapter_stride, 1)] * speech.num_adapter_layers
        return SpeechTokenRule(
            convolutions=tuple(convolutions),
            samples_per_step=MEL_HOP if self.is_whisper else 1,
            window=self.projector_config.window_frames,
            tokens_per_window=self.projector_config.tokens_per_window,
        )

    @property
    def context(self) -> float:
        """Tokens that the LLM has positions for; infinite if it does not say."""
        return getattr(self.get_text_config(), "max_position_embeddings", None) or inf

    @property
    def batch_context(self) -> float:
        """Tokens up to which a batch may generate. A row that has ended goes on as padding until the longest has: beyond a
        table of learned positions, where rotary ones have no table."""
        return self.context if getattr(self.get_text_config(), "rope_parameters", None) is None else inf

    def to_dict(self) -> dict[str, Any]:
        # Every published config says where its code lies, whoever saved it last (loading from the Hub rewrites it).
        return {**super().to_dict(), "auto_map": dict(AUTO_MAP), "custom_pipelines": deepcopy(CUSTOM_PIPELINES)}


def _sub_config(value: dict | PreTrainedConfig | None, name: str, default: str) -> PreTrainedConfig:
    """A configuration object from what the user or a config.json gave."""
    if isinstance(value, PreTrainedConfig):
        return value
    values = dict(value or {})
    model_type = values.pop("model_type", default)
    try:
        return AutoConfig.for_model(model_type, **values)
    except ValueError as error:
        raise ValueError(
            f"{name} names the model type {model_type!r}, which this version of Transformers does not know. "
            "Check its spelling or update Transformers."
        ) from error


__all__ = ["SpeechLLMConfig", "SpeechLLMProjectorConfig", "SpeechTokenRule"]
