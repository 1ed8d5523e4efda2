"""A SpeechLLM: a frozen speech encoder, a trainable projector and a frozen large language model.

1. The encoder turns each audio segment into frames (50 per second).
2. The projector compresses every window of frames into a few *speech tokens* of the LLM's width: a window-level
   Q-Former (arXiv 2412.15712, Section 3; BLIP-2's Q-Former, arXiv 2301.12597) or a frame-stacking MLP.
3. The speech tokens replace the placeholders in the prompt's embeddings, and the LLM reads on as if they were text.

`SpeechLLMModel` is that much, without a language-model head; asked for `layers`, it returns the LLM's hidden states at
those layers and runs no layer beyond the last of them, which is all that contrastive pretraining needs.
`SpeechLLMForConditionalGeneration` adds the head, the next-token loss and `generate`.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, Blip2QFormerConfig, Blip2QFormerModel, GenerationMixin
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.generation import LogitsProcessorList
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from .checkpoint_speechllm import SpeechLLMCheckpointMixin
from .configuration_speechllm import SpeechLLMConfig, SpeechLLMProjectorConfig


AUDIO_INPUTS = (
    "input_values",
    "input_values_mask",
    "input_features",
    "input_features_mask",
    "speech_frames",
    "speech_frames_mask",
)


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
        self.window_projector = kind(projector, config.speech_hidden_size, config.text_config.hidden_size)

    def forward(self, frames: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """frames: (batch, frames, speech_size), lengths: (batch,) valid frames -> (speech tokens of the batch in
        order, text_size). Padding-only windows are never computed, so there is nothing to mask afterwards."""
        frames = frames.to(self.window_projector.layer_norm.weight.dtype)
        frames = F.pad(frames, (0, 0, 0, -frames.shape[1] % self.window_frames))
        mask = length_mask(lengths, frames.shape[1]).unflatten(1, (-1, self.window_frames))
        windows = frames.unflatten(1, (-1, self.window_frames))
        valid = mask.any(-1)  # (batch, windows)
        return self.window_projector(windows[valid], mask[valid]).flatten(0, 1)


@dataclass
class GivenBodyOutput(BaseModelOutputWithPast):
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None


class GivenBody(nn.Module):
    """Stands in for a causal LM's body, so that the LM maps given hidden states to logits exactly as it would its own
    (bias, soft-capping, scaling included), whatever its architecture."""

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **kwargs):
        return GivenBodyOutput(last_hidden_state=inputs_embeds)


def split_causal_lm(causal_lm: PreTrainedModel) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A causal LM -> its body, and what remains of it: a head that takes hidden states as `inputs_embeds`."""
    body = causal_lm.base_model
    setattr(causal_lm, causal_lm.base_model_prefix, GivenBody())
    # The tie, if any, is between parts that the SpeechLLM now holds.
    causal_lm._tied_weights_keys, causal_lm.all_tied_weights_keys = None, {}
    return body, causal_lm


@dataclass
class SpeechLLMModelOutput(BaseModelOutputWithPast):
    """
    speech_tokens: (speech tokens of the batch in order, text hidden size), before they enter the prompt.
    layer_states: the LLM's hidden states (batch, length, text hidden size) at the layers that were asked for.
    """

    speech_tokens: torch.FloatTensor | None = None
    layer_states: dict[int, torch.FloatTensor] | None = None


@dataclass
class SpeechLLMCausalLMOutput(ModelOutput):
    """
    loss: next-token cross-entropy in nats, if `labels` were given.
    logits: (batch, length, vocabulary); only the labelled positions, (labels, vocabulary), with `answer_logits_only`.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: object | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    speech_tokens: torch.FloatTensor | None = None


class SpeechLLMPreTrainedModel(SpeechLLMCheckpointMixin, PreTrainedModel):
    config_class = SpeechLLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]
    # The projector is small and trained: it stays in fp32 whatever the dtype of the frozen parts.
    _keep_in_fp32_modules_strict = ["projector"]

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, SpeechLLMQFormerProjector):
            init.normal_(module.queries, mean=0.0, std=1.0)

    def train(self, mode: bool = True):
        """As `nn.Module.train`, but frozen parts stay in evaluation mode (unless `config.frozen_in_train_mode`)."""
        super().train(mode)
        if mode and not self.config.frozen_in_train_mode:
            for frozen in self.frozen_modules():
                frozen.eval()
                for module in frozen.modules():
                    if hasattr(module, "get_base_layer"):  # a PEFT adapter inside the frozen part is trained
                        module.train()
                        module.get_base_layer().eval()
        return self


class SpeechLLMModel(SpeechLLMPreTrainedModel):
    """Speech encoder, projector and LLM body, without a language-model head."""

    def __init__(self, config: SpeechLLMConfig, language_model: PreTrainedModel | None = None):
        super().__init__(config)
        if config.is_whisper:
            self.speech_encoder = WhisperEncoder._from_config(config.speech_config)
        else:
            self.speech_encoder = AutoModel.from_config(config.speech_config)
        self.projector = SpeechLLMProjector(config)
        self.language_model = language_model or AutoModel.from_config(config.text_config)
        self.post_init()
        self.freeze()

    def freeze(self) -> None:
        """Take the gradient from the parts that the configuration freezes."""
        for module in self.frozen_modules():
            module.requires_grad_(False)

    def frozen_modules(self) -> list[nn.Module]:
        frozen = [self.speech_encoder] if self.config.freeze_speech_encoder else []
        return frozen + ([self.language_model] if self.config.freeze_language_model else [])

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @property
    def llm_layers(self) -> nn.ModuleList:
        """The LLM's stack of layers, under whatever name its architecture gives it."""
        return getattr(self.language_model, self._llm_layers_name())

    def _llm_layers_name(self) -> str:
        count = self.config.text_config.num_hidden_layers
        for name, child in self.language_model.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return name
        raise ValueError(
            f"{type(self.language_model).__name__} has no list of {count} layers; per-layer states need one."
        )

    # ---- speech ----------------------------------------------------------------------------------------------------

    def encode_speech(self, inputs: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the speech encoder.

        Args:
            inputs: waveforms (segments, samples), or log-mel features (segments, bins, steps) for Whisper.
            mask: (segments, samples or steps), 1 = valid; padding is on the right.

        Returns:
            frames (segments, frames, speech hidden size) and the valid frames of each segment (segments,). A segment's
            frames do not depend on the batch that it is encoded in.
        """
        steps = mask.sum(-1)
        frames = self.config.speech_token_rule.frames(steps)
        if (frames < 1).any():
            short = torch.nonzero(frames < 1).flatten().tolist()
            raise ValueError(
                f"Audio segments {short} of the batch are shorter than one encoder frame "
                f"({self.config.speech_token_rule.shortest} samples at 16 kHz). Leave them out or pad them with silence."
            )
        inputs = inputs.to(self.speech_encoder.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_speech_encoder):
            if self.config.is_whisper:
                return self._encode_log_mel(inputs, steps), frames
            speech = self.config.speech_config
            if speech.feat_extract_norm == "layer" and not getattr(speech, "add_adapter", False):
                return self._encode_waveform(inputs, mask), frames
            # Group normalisation runs over time, padding included (such encoders were trained without a mask), and an
            # adapter convolves over it: segments of unequal length must not share a batch.
            states = inputs.new_zeros(len(inputs), int(frames.max()), self.config.speech_hidden_size)
            for length in steps.unique():
                rows = torch.nonzero(steps == length).flatten()
                states[rows, : int(frames[rows[0]])] = self._encode_waveform(inputs[rows, :length], None)
            return states, frames

    def _encode_waveform(self, waveform: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        layer = self.config.speech_layer
        output = self.speech_encoder(waveform, attention_mask=mask, output_hidden_states=layer is not None)
        return output.last_hidden_state if layer is None else output.hidden_states[layer]

    def _encode_log_mel(self, features: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Whisper's encoder on less than its 30 s window: positions are cut off, and padding is masked."""
        encoder, rule = self.speech_encoder, self.config.speech_token_rule
        context = round(self.config.context_seconds * 100)  # log-mel frames
        heard = (steps + context).clamp(max=features.shape[-1])
        valid = length_mask(heard, features.shape[-1])[:, None]
        # What the convolutions see beyond the heard part is their own zero padding, as if the segment were alone.
        states = F.gelu(encoder.conv1(features * valid)) * valid
        states = F.gelu(encoder.conv2(states)).transpose(1, 2)
        states = states + encoder.embed_positions.weight[: states.shape[1]]
        states = F.dropout(states, p=encoder.dropout, training=encoder.training)
        mask = create_bidirectional_mask(
            config=encoder.config,
            inputs_embeds=states,
            attention_mask=length_mask(rule.frames(heard), states.shape[1]),
        )
        stop = self.config.speech_layer
        for layer in encoder.layers[:stop]:
            states = layer(states, mask)
        return encoder.layer_norm(states) if stop in (None, len(encoder.layers)) else states

    def get_audio_features(
        self,
        input_values: torch.Tensor | None = None,
        input_values_mask: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        speech_frames: torch.Tensor | None = None,
        speech_frames_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Speech tokens of a batch of audio segments: encoder, then projector.

        Long inputs run in several calls of at most `config.encoder_batch_seconds`, which bounds memory.

        Args:
            input_values, input_values_mask: waveforms and mask (segments, samples), wav2vec 2.0 family.
            input_features, input_features_mask: log-mel features (segments, bins, steps) and mask (segments, steps),
                Whisper.
            speech_frames, speech_frames_mask: encoder frames (segments, frames, speech hidden size) and mask, already
                computed (see `encode_speech`); the encoder is skipped.

        Returns:
            `pooler_output`: speech tokens (tokens of all segments in order, text hidden size).

        Raises:
            ValueError: if no input or several are given, or a mask is missing.
        """
        given = {
            "input_values": (input_values, input_values_mask),
            "input_features": (input_features, input_features_mask),
            "speech_frames": (speech_frames, speech_frames_mask),
        }
        given = {name: pair for name, pair in given.items() if pair[0] is not None}
        expected = "input_features" if self.config.is_whisper else "input_values"
        if len(given) != 1 or not set(given) <= {expected, "speech_frames"}:
            raise ValueError(
                f"The {self.config.speech_config.model_type} encoder takes `{expected}` (or precomputed "
                f"`speech_frames`), but got {sorted(given) or 'nothing'}. Was the batch made by this model's processor?"
            )
        ((name, (inputs, mask)),) = given.items()
        if mask is None:
            raise ValueError(f"`{name}` needs `{name}_mask`, 1 where the audio is and 0 where padding is.")
        if name == "speech_frames":
            return BaseModelOutputWithPooling(pooler_output=self.projector(inputs, mask.sum(-1)))

        rule = self.config.speech_token_rule
        seconds = mask.shape[-1] * rule.samples_per_step / 16_000
        size = max(1, int(self.config.encoder_batch_seconds / seconds))
        tokens = []
        for start in range(0, len(inputs), size):
            part_mask = mask[start : start + size]
            frames, lengths = self.encode_speech(inputs[start : start + size], part_mask)
            tokens.append(self.projector(frames, lengths))
        return BaseModelOutputWithPooling(pooler_output=torch.cat(tokens))

    # ---- prompt ----------------------------------------------------------------------------------------------------

    def embed_prompt(self, input_ids: torch.Tensor, speech_tokens: torch.Tensor | None) -> torch.Tensor:
        """Embeddings (batch, length, text hidden size) of a prompt, its placeholders replaced by speech tokens.

        Raises:
            ValueError: if the placeholders in `input_ids` are not as many as the speech tokens.
        """
        placeholders = input_ids == self.config.audio_token_id  # (batch, length)
        embeddings = self.get_input_embeddings()(input_ids.masked_fill(placeholders, 0))
        expected, found = int(placeholders.sum()), 0 if speech_tokens is None else len(speech_tokens)
        if expected != found:
            raise ValueError(
                f"The prompts hold {expected} audio placeholders ({placeholders.sum(-1).tolist()} per prompt), but the "
                f"audio makes {found} speech tokens. Prepare text and audio together with the model's processor, and "
                "do not truncate prompts."
            )
        if found == 0:
            return embeddings
        speech_tokens = speech_tokens.to(embeddings.device, embeddings.dtype)
        return embeddings.masked_scatter(placeholders[:, :, None], speech_tokens)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        input_values: torch.FloatTensor | None = None,
        input_values_mask: torch.LongTensor | None = None,
        input_features: torch.FloatTensor | None = None,
        input_features_mask: torch.LongTensor | None = None,
        speech_frames: torch.FloatTensor | None = None,
        speech_frames_mask: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: object | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        layers: list[int] | None = None,
        **kwargs,
    ) -> SpeechLLMModelOutput:
        """See `get_audio_features` for the audio inputs and the LLM's documentation for the rest.

        Args:
            layers: if given, return `layer_states` at these hidden-state indices (0 = the LLM's input embeddings,
                k = after layer k, the last = after the final norm, as in `output_hidden_states`) and run no layer
                beyond the largest; with `[0]` the LLM does not run at all.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either `input_ids` or `inputs_embeds`, not both and not neither.")
        speech_tokens = None
        if any(audio is not None for audio in (input_values, input_features, speech_frames)):
            speech_tokens = self.get_audio_features(
                input_values, input_values_mask, input_features, input_features_mask, speech_frames, speech_frames_mask
            ).pooler_output
        if inputs_embeds is None:
            inputs_embeds = self.embed_prompt(input_ids, speech_tokens)
        elif speech_tokens is not None:
            raise ValueError("Audio needs `input_ids` with placeholders; with `inputs_embeds` there are none to fill.")

        text_inputs = {"attention_mask": attention_mask, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        if layers is not None:
            return SpeechLLMModelOutput(
                speech_tokens=speech_tokens, layer_states=self._layer_states(layers, **text_inputs, **kwargs)
            )
        output = self.language_model(**text_inputs, past_key_values=past_key_values, use_cache=use_cache, **kwargs)
        return SpeechLLMModelOutput(
            last_hidden_state=output.last_hidden_state,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            speech_tokens=speech_tokens,
        )

    def _layer_states(self, layers: list[int], inputs_embeds: torch.Tensor, **kwargs) -> dict[int, torch.Tensor]:
        last, depth = max(layers), len(self.llm_layers)
        if min(layers) < 0 or last > depth:
            raise ValueError(f"layers {layers}: this LLM has hidden states 0 (its input) to {depth} (its output).")
        states = {0: inputs_embeds} if 0 in layers else {}
        if last == 0:
            return states

        def keep(index):
            def hook(module, args, output):
                states[index] = output[0] if isinstance(output, tuple) else output

            return hook

        hooks = [self.llm_layers[index - 1].register_forward_hook(keep(index)) for index in layers if 0 < index < depth]
        try:
            with self._only_first_layers(last):
                output = self.language_model(inputs_embeds=inputs_embeds, use_cache=False, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        if last == depth:
            states[depth] = output.last_hidden_state
        return {index: states[index] for index in layers}

    @contextmanager
    def _only_first_layers(self, count: int):
        name, layers = self._llm_layers_name(), self.llm_layers
        setattr(self.language_model, name, layers[:count])
        try:
            yield
        finally:
            setattr(self.language_model, name, layers)


class AudioAwareLogitsProcessors(LogitsProcessorList):
    """Processors that index the scores by prompt token (repetition penalties, n-gram bans) meet the placeholder's id,
    which may lie beyond the LLM's vocabulary: they see extra columns, which are cut off again."""

    def __init__(self, processors: LogitsProcessorList, extra: int):
        super().__init__(processors)
        self.extra = extra

    def __call__(self, input_ids, scores, **kwargs):
        scores = super().__call__(input_ids, F.pad(scores, (0, self.extra), value=-torch.inf), **kwargs)
        return scores[:, : scores.shape[1] - self.extra]


class SpeechLLMForConditionalGeneration(SpeechLLMPreTrainedModel, GenerationMixin):
    """A SpeechLLM with its language-model head: audio and text in, text out."""

    def __init__(self, config: SpeechLLMConfig):
        super().__init__(config)
        causal_lm = AutoModelForCausalLM.from_config(config.text_config)
        names = {id(module): name for name, module in causal_lm.named_modules()}
        self._output_name = names[id(causal_lm.get_output_embeddings())]
        body, self.head = split_causal_lm(causal_lm)
        self.model = SpeechLLMModel(config, body)
        if config.freeze_language_model:
            self.head.requires_grad_(False)
        names = {id(module): name for name, module in self.named_modules()}
        source = names[id(self.get_input_embeddings())]
        self._tied_weights_keys = {f"head.{self._output_name}.weight": f"{source}.weight"}
        self.post_init()

    def frozen_modules(self) -> list[nn.Module]:
        return self.model.frozen_modules() + ([self.head] if self.config.freeze_language_model else [])

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return getattr(self.head, self._output_name)

    def set_output_embeddings(self, value: nn.Module) -> None:
        setattr(self.head, self._output_name, value)

    def get_audio_features(self, *args, **kwargs) -> BaseModelOutputWithPooling:
        """See `SpeechLLMModel.get_audio_features`."""
        return self.model.get_audio_features(*args, **kwargs)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        input_values: torch.FloatTensor | None = None,
        input_values_mask: torch.LongTensor | None = None,
        input_features: torch.FloatTensor | None = None,
        input_features_mask: torch.LongTensor | None = None,
        speech_frames: torch.FloatTensor | None = None,
        speech_frames_mask: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: object | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        answer_logits_only: bool = False,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs,
    ) -> SpeechLLMCausalLMOutput:
        """See `SpeechLLMModel.forward` for the inputs.

        Args:
            labels: (batch, length) token ids; -100 where no loss is taken. Position i is predicted from those before.
            logits_to_keep: as in Transformers' causal LMs: compute logits of the last so many positions only.
            answer_logits_only: with `labels`, run the head on the positions that predict a label and nowhere else.
            num_items_in_batch: divide the summed loss by this instead of the number of labels (set by `Trainer`, so
                that gradient accumulation weighs every token alike).
        """
        outputs = self.model(
            input_ids=input_ids,
            input_values=input_values,
            input_values_mask=input_values_mask,
            input_features=input_features,
            input_features_mask=input_features_mask,
            speech_frames=speech_frames,
            speech_frames_mask=speech_frames_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss = None
        if labels is not None and answer_logits_only:
            targets = labels[:, 1:]
            predicted = targets != -100
            logits = self.compute_logits(hidden[:, :-1][predicted][None])[0]  # (labels, vocabulary)
            loss = F.cross_entropy(logits.float(), targets[predicted], reduction="sum")
            loss = loss / (predicted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.compute_logits(hidden[:, kept])
            if labels is not None:
                loss = self.loss_function(
                    logits, labels, vocab_size=logits.shape[-1], num_items_in_batch=num_items_in_batch
                )
        return SpeechLLMCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            speech_tokens=outputs.speech_tokens,
        )

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(batch, length, text hidden size) final hidden states -> (batch, length, vocabulary) logits."""
        return self.head(inputs_embeds=hidden).logits

    # ---- generation ------------------------------------------------------------------------------------------------

    def _get_logits_processor(self, *args, **kwargs) -> LogitsProcessorList:
        processors = super()._get_logits_processor(*args, **kwargs)
        extra = self.config.audio_token_id + 1 - self.config.text_config.vocab_size
        return AudioAwareLogitsProcessors(processors, extra) if extra > 0 else processors

    def prepare_inputs_for_generation(self, *args, is_first_iteration=False, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration and kwargs.get("use_cache", True):  # the cache holds the audio from here on
            inputs = {name: value for name, value in inputs.items() if name not in AUDIO_INPUTS}
        return inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Repeat each prompt `expand_size` times, and with it its own audio segments (beams, several samples)."""
        audio = {name: model_kwargs.pop(name) for name in AUDIO_INPUTS if model_kwargs.get(name) is not None}
        if audio and expand_size > 1 and input_ids is not None:
            rows = self._audio_segments_of_prompts(input_ids, audio)
            index = torch.tensor([i for segments in rows for _ in range(expand_size) for i in segments])
            audio = {name: value[index.to(value.device)] for name, value in audio.items()}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **audio}

    def _audio_segments_of_prompts(self, input_ids: torch.Tensor, audio: dict[str, torch.Tensor]) -> list[list[int]]:
        """For each prompt the indices of its audio segments: as many as fill its placeholders."""
        rule = self.config.speech_token_rule
        ((name, mask),) = ((name, value) for name, value in audio.items() if name.endswith("_mask"))
        frames = mask.sum(-1) if name == "speech_frames_mask" else rule.frames(mask.sum(-1))
        tokens = rule.tokens(frames).tolist()
        rows, segment = [], 0
        for missing in (input_ids == self.config.audio_token_id).sum(-1).tolist():
            rows.append([])
            while missing > 0 and segment < len(tokens):
                rows[-1].append(segment)
                missing -= tokens[segment]
                segment += 1
        return rows


__all__ = ["SpeechLLMForConditionalGeneration", "SpeechLLMModel", "SpeechLLMPreTrainedModel"]
