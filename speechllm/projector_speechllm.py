"""From encoder frames to speech tokens: the trained part of a SpeechLLM.

1. Each utterance's frames are cut into non-overlapping windows of `window_frames`; the last one may be partly filled.
2. Each window becomes a few speech tokens of the LLM's width, by a window-level Q-Former (arXiv 2412.15712, Section 3;
   BLIP-2's Q-Former, arXiv 2301.12597) or by a frame-stacking MLP. Frames that are padding are masked.

Cost: the Q-Former attends within a window only, so time and memory grow linearly with the audio.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Blip2QFormerConfig, Blip2QFormerModel
from transformers.activations import ACT2FN

from .configuration_speechllm import SpeechLLMConfig, SpeechLLMProjectorConfig


def length_mask(lengths: torch.Tensor, size: int) -> torch.Tensor:
    """(batch,) lengths -> (batch, size) boolean mask, `True` = valid."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


class SpeechLLMQFormerProjector(nn.Module):
    """Window-level Q-Former: `num_queries` learned queries cross-attend to the frames of one window."""

    def __init__(self, config: SpeechLLMProjectorConfig, speech_size: int, text_size: int):
        super().__init__()
        qformer_config = Blip2QFormerConfig(
            vocab_size=1,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            hidden_act=config.hidden_act,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
            initializer_range=config.initializer_range,
            encoder_hidden_size=speech_size,
            cross_attention_frequency=1,
        )
        # The Q-Former has no FlashAttention; whatever is not eager runs on scaled dot-product attention.
        eager = getattr(config, "_attn_implementation", None) == "eager"
        qformer_config._attn_implementation = "eager" if eager else "sdpa"
        self.layer_norm = nn.LayerNorm(speech_size, eps=config.layer_norm_eps)
        self.queries = nn.Parameter(torch.zeros(1, config.num_queries, config.hidden_size))
        self.qformer = Blip2QFormerModel._from_config(qformer_config)
        self.linear = nn.Linear(config.hidden_size, text_size)

    def forward(self, windows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """windows: (n, window, speech_size), mask: (n, window) -> (n, num_queries, text_size)"""
        states = self.layer_norm(windows) * mask[:, :, None]
        output = self.qformer(
            query_embeds=self.queries.expand(len(windows), -1, -1),
            encoder_hidden_states=states,
            encoder_attention_mask=mask.long(),
        )
        return self.linear(output.last_hidden_state)


class SpeechLLMStackingProjector(nn.Module):
    """Frame stacking: the frames of one window, concatenated, through two linear layers to one speech token."""

    def __init__(self, config: SpeechLLMProjectorConfig, speech_size: int, text_size: int):
        super().__init__()
        self.layer_norm = nn.LayerNorm(speech_size, eps=config.layer_norm_eps)
        self.linear_1 = nn.Linear(config.window_frames * speech_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.dropout)
        self.linear_2 = nn.Linear(config.hidden_size, text_size)

    def forward(self, windows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """windows: (n, window, speech_size), mask: (n, window) -> (n, 1, text_size)"""
        states = (self.layer_norm(windows) * mask[:, :, None]).flatten(1)
        return self.linear_2(self.dropout(self.activation(self.linear_1(states))))[:, None]


class SpeechLLMProjector(nn.Module):
    """Cuts each utterance's frames into windows and projects every window that holds at least one valid frame."""

    def __init__(self, config: SpeechLLMConfig):
        super().__init__()
        projector = config.projector_config
        kind = SpeechLLMQFormerProjector if projector.projector_type == "qformer" else SpeechLLMStackingProjector
        self.window_frames = projector.window_frames
        # Not `..._projector`: PEFT's `modules_to_save=["projector"]` would take it for another one.
        self.window_model = kind(projector, config.speech_hidden_size, config.text_config.hidden_size)

    def forward(self, frames: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """frames: (batch, frames, speech_size), lengths: (batch,) valid frames -> (speech tokens of the batch in
        order, text_size). Padding-only windows are never computed, so there is nothing to mask afterwards."""
        frames = frames.to(self.window_model.layer_norm.weight.dtype)
        frames = F.pad(frames, (0, 0, 0, -frames.shape[1] % self.window_frames))
        mask = length_mask(lengths, frames.shape[1]).unflatten(1, (-1, self.window_frames))
        windows = frames.unflatten(1, (-1, self.window_frames))
        valid = mask.any(-1)  # (batch, windows)
        return self.window_model(windows[valid], mask[valid]).flatten(0, 1)
