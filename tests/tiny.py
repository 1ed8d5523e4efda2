"""Tiny random models of real architectures, shared by all tests. No network: tokenizers are built here."""

import resource
from contextlib import contextmanager

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

from speechllm.configuration_speechllm import SpeechLLMConfig


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>"]

WAVE = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=48,
    conv_dim=(16, 16, 16),
    conv_stride=(5, 8, 8),
    conv_kernel=(10, 8, 8),
    num_feat_extract_layers=3,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=2,
    mask_time_prob=0.0,
)
SPEECH = {
    "hubert-layer": ("hubert", {**WAVE, "feat_extract_norm": "layer", "do_stable_layer_norm": True}),
    "hubert-group": ("hubert", {**WAVE, "feat_extract_norm": "group"}),
    "wavlm": ("wavlm", {**WAVE, "feat_extract_norm": "layer", "do_stable_layer_norm": True}),
    "wav2vec2-layer": ("wav2vec2", {**WAVE, "feat_extract_norm": "layer", "do_stable_layer_norm": True}),
    "wav2vec2-group": ("wav2vec2", {**WAVE, "feat_extract_norm": "group"}),
    "wav2vec2-adapter": ("wav2vec2", {**WAVE, "feat_extract_norm": "layer", "add_adapter": True}),
    "whisper": (
        "whisper",
        dict(
            d_model=32,
            encoder_layers=2,
            encoder_attention_heads=2,
            encoder_ffn_dim=48,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=48,
            vocab_size=64,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
            decoder_start_token_id=0,
        ),
    ),
}
LLM = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=4096,
)
TEXT = {
    "llama-tied": ("llama", {**LLM, "tie_word_embeddings": True}),
    "llama-untied": ("llama", {**LLM, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", {**LLM, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**LLM, "tie_word_embeddings": False, "head_dim": 16}),
    "gemma2": ("gemma2", {**LLM, "head_dim": 16, "sliding_window": 16, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {**LLM, "head_dim": 16, "sliding_window": 16}),
    "gpt2": ("gpt2", dict(n_embd=32, n_layer=3, n_head=2, n_positions=1024)),
    "opt": (
        "opt",
        dict(hidden_size=32, num_hidden_layers=3, ffn_dim=48, num_attention_heads=2, word_embed_proj_dim=32),
    ),
}
PROJECTORS = {
    "qformer": dict(
        projector_type="qformer",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        num_queries=2,
        window_frames=5,
    ),
    "mlp": dict(projector_type="mlp", hidden_size=32, window_frames=5),
}


def tiny_tokenizer(padded_vocabulary: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a chat template: 256 bytes and two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        pad_token=SPECIAL[1],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_feature_extractor(speech: str):
    if SPEECH[speech][0] == "whisper":
        return WhisperFeatureExtractor(feature_size=80)
    return Wav2Vec2FeatureExtractor(return_attention_mask=SPEECH[speech][1]["feat_extract_norm"] == "layer")


def tiny_config(speech="whisper", projector="qformer", text="llama-tied", **options) -> SpeechLLMConfig:
    speech_type, speech_values = SPEECH[speech]
    text_type, text_values = TEXT[text]
    tokenizer = tiny_tokenizer()
    text_values = {
        **text_values,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return SpeechLLMConfig(
        speech_config=AutoConfig.for_model(speech_type, **speech_values),
        text_config=AutoConfig.for_model(text_type, **text_values),
        projector_config=PROJECTORS[projector],
        **options,
    )


def tiny_model(speech="whisper", projector="qformer", text="llama-tied", **options):
    from speechllm.modeling_speechllm import SpeechLLMForConditionalGeneration

    torch.manual_seed(0)
    return SpeechLLMForConditionalGeneration(tiny_config(speech, projector, text, **options)).eval()


def tone(seconds: float, seed: int = 0, rate: int = 16_000) -> np.ndarray:
    """A mono float32 test signal: a few drifting sines and a little noise, peak below 0.9."""
    generator = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    waves = [np.sin(2 * np.pi * generator.uniform(80, 2000) * time * (1 + 0.1 * time)) for _ in range(4)]
    signal = sum(waves) / 5 + 0.02 * generator.standard_normal(len(time))
    return signal.astype(np.float32)


def tiny_processor(config: SpeechLLMConfig, tokenizer=None, **options):
    """The processor of a model made by `tiny_model`."""
    from speechllm.processing_speechllm import SpeechLLMProcessor

    norm = getattr(config.speech_config, "feat_extract_norm", "layer")
    extractor = (
        WhisperFeatureExtractor(feature_size=config.speech_config.num_mel_bins)
        if config.is_whisper
        else Wav2Vec2FeatureExtractor(return_attention_mask=norm == "layer")
    )
    return SpeechLLMProcessor(
        extractor,
        tiny_tokenizer() if tokenizer is None else tokenizer,
        speech_token_rule=config.speech_token_rule.to_dict(),
        context_seconds=config.context_seconds,
        **options,
    )


def enliven(model):
    """Weights so large that every input matters: with small ones a leak between positions would hide in rounding."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2, generator=generator)
    return model


@contextmanager
def full_disk(room: int):
    """No file of this process can grow beyond `room` bytes: writing on fails with an error of the system, as on a full
    disk. (Python ignores the signal that would end the process.)"""
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
