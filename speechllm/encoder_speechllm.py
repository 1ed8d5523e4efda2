"""Audio segments -> encoder frames, each segment as if it were encoded alone.

Whisper and the wav2vec 2.0 family treat padding differently, and some of them cannot tell it from speech:

- Layer-normalised encoders of the wav2vec 2.0 family mask padding at every step: a padded batch is exact.
- Others normalise or convolve over time, padding included: segments of unequal length must not share a batch.
- Whisper was trained on 30 s of speech and silence. It runs on a segment and `context_seconds` of silence behind it:
  positions beyond are cut off, and padding is masked.
"""

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask

from .configuration_speechllm import SAMPLING_RATE, SpeechLLMConfig
from .projector_speechllm import length_mask


MASKED_ENCODERS = ("hubert", "unispeech", "unispeech-sat", "wav2vec2", "wavlm")


def encode_segments(
    encoder: PreTrainedModel, config: SpeechLLMConfig, inputs: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `SpeechLLMModel.encode_speech`.

    inputs: (segments, samples) or (segments, bins, steps), mask: (segments, samples or steps), `True` = valid
    -> frames (segments, frames, speech hidden size), valid frames of each segment (segments,)
    """
    rule = config.speech_token_rule
    steps = mask.sum(-1)
    frames = rule.frames(steps)
    if (frames < 1).any():
        short = torch.nonzero(frames < 1).flatten().tolist()
        raise ValueError(
            f"Audio segments {short} of the batch are shorter than one encoder frame ({rule.shortest} samples at 16 "
            "kHz). Leave them out or pad them with silence."
        )
    inputs = inputs.to(encoder.dtype)
    if config.is_whisper:
        return _encode_log_mel(encoder, config, inputs, steps), frames
    longest = int(steps.max())
    inputs, mask = inputs[:, :longest], mask[:, :longest]
    if mask.all():
        return _encode_waveform(encoder, config, inputs), frames
    if _masks_padding(config.speech_config):
        return _encode_waveform(encoder, config, inputs, mask), frames
    states = inputs.new_zeros(len(inputs), int(frames.max()), config.speech_hidden_size)
    for length in steps.unique():
        rows = torch.nonzero(steps == length).flatten()
        encoded = _encode_waveform(encoder, config, inputs[rows, :length])
        states[rows, : int(frames[rows[0]])] = encoded.to(states.device)
    return states, frames


def _masks_padding(speech_config) -> bool:
    """Whether a padded batch gives each segment the frames that it gets alone."""
    return (
        speech_config.model_type in MASKED_ENCODERS
        and speech_config.feat_extract_norm == "layer"
        and not getattr(speech_config, "add_adapter", False)
    )


def _encode_waveform(encoder, config, waveform, mask=None) -> torch.Tensor:
    layer = config.speech_layer
    output = encoder(waveform, attention_mask=mask, output_hidden_states=layer is not None, return_dict=True)
    return output.last_hidden_state if layer is None else output.hidden_states[layer]


def _encode_log_mel(encoder, config, features: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """features: (segments, bins, steps), steps: (segments,) valid -> (segments, frames, speech hidden size)"""
    context = round(config.context_seconds * SAMPLING_RATE) // config.speech_token_rule.samples_per_step
    heard = (steps + context).clamp(max=features.shape[-1])
    features = features[..., : int(heard.max())]
    valid = length_mask(heard, features.shape[-1])[:, None]
    # What the convolutions see beyond the heard part is their own zero padding, as if the segment were alone.
    states = F.gelu(encoder.conv1(features * valid))
    states = states * valid.to(states.device)  # of a model that is spread over devices
    states = F.gelu(encoder.conv2(states)).transpose(1, 2)
    states = states + encoder.embed_positions(torch.arange(states.shape[1], device=states.device))
    states = F.dropout(states, p=encoder.dropout, training=encoder.training)
    mask = create_bidirectional_mask(
        config=encoder.config,
        inputs_embeds=states,
        attention_mask=length_mask(config.speech_token_rule.frames(heard), states.shape[1]).to(states.device),
    )
    stop = config.speech_layer
    for layer in encoder.layers[:stop]:
        states = layer(states, mask)
    return encoder.layer_norm(states) if stop in (None, len(encoder.layers)) else states
