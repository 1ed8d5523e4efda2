"""A SpeechLLM: a frozen speech encoder, a trainable projector and a frozen large language model.

1. The encoder turns each audio segment into frames (50 per second), see `encoder_speechllm`.
2. The projector turns every window of frames into a few *speech tokens* of the LLM's width, see `projector_speechllm`.
3. The speech tokens replace the placeholders in the prompt's embeddings, and the LLM reads on as if they were text.

`SpeechLLMModel` is that much, without a language-model head; asked for `layers`, it returns the LLM's hidden states at
those layers and runs no layer beyond the last of them, which is all that contrastive pretraining needs.
`SpeechLLMForConditionalGeneration` adds the head, the next-token loss and `generate`.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .checkpoint_speechllm import SpeechLLMCheckpointMixin
from .configuration_speechllm import SAMPLING_RATE, SpeechLLMConfig
from .encoder_speechllm import encode_segments
from .generation_speechllm import SpeechLLMGenerationMixin
from .language_speechllm import layer_stack, layer_states, split_causal_lm
from .projector_speechllm import SpeechLLMProjector, SpeechLLMQFormerProjector


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


def checkpoint_frozen(layer: nn.Module, checkpoint, forward, *args):
    """`checkpoint(forward, *args)` with the layer in evaluation mode.

    Transformers checkpoints layers in training mode only, but the gradient passes through a frozen LLM too, whose
    activations are what checkpointing is to save. So frozen layers bear the flag, and run without it."""

    def forward_in_evaluation(*args):
        layer.training = False
        try:
            return forward(*args)
        finally:
            layer.training = True

    # A reentrant checkpoint would cut the states that `layer_states` keeps inside it off from the gradient.
    return checkpoint(forward_in_evaluation, *args, use_reentrant=False)


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
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    # The projector is small and trained: it stays in fp32 whatever the dtype of the frozen parts.
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["projector"]

    def post_init(self) -> None:
        super().post_init()
        # Some families name the layers of all their variants (HuBERT); FSDP refuses names of layers that are not there.
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, SpeechLLMQFormerProjector):
            init.normal_(module.queries, mean=0.0, std=1.0)

    def freeze(self) -> None:
        """Take the gradient from the parts that the configuration freezes."""
        for module in self.frozen_modules():
            module.requires_grad_(False)

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
                    if isinstance(module, GradientCheckpointingLayer):
                        module.training = module.gradient_checkpointing  # see `checkpoint_frozen`
        return self

    def _set_gradient_checkpointing(self, *args, **kwargs):
        super()._set_gradient_checkpointing(*args, **kwargs)
        if not self.config.frozen_in_train_mode:
            for frozen in self.frozen_modules():
                for module in frozen.modules():
                    if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                        module._gradient_checkpointing_func = partial(
                            checkpoint_frozen, module, module._gradient_checkpointing_func
                        )
        self.train(self.training)


def _choose_attention(config: SpeechLLMConfig) -> None:
    """Eager attention for encoders that have no other (WavLM), whatever is asked for the whole model."""
    flags = {"sdpa": "_supports_sdpa", "flex_attention": "_supports_flex_attn"}
    speech_config = config.speech_config
    asked = speech_config._attn_implementation or "eager"
    flag = "_supports_flash_attn" if asked.startswith("flash") else flags.get(asked)
    if flag is not None and not getattr(AutoModel._model_mapping[type(speech_config)], flag, False):
        speech_config._attn_implementation = "eager"


class SpeechLLMModel(SpeechLLMPreTrainedModel):
    """Speech encoder, projector and LLM body, without a language-model head."""

    def __init__(self, config: SpeechLLMConfig, language_model: PreTrainedModel | None = None):
        super().__init__(config)
        _choose_attention(config)
        if config.is_whisper:
            self.speech_encoder = WhisperEncoder._from_config(config.speech_config)
        else:
            self.speech_encoder = AutoModel.from_config(config.speech_config)
        self.projector = SpeechLLMProjector(config)
        self.language_model = language_model or AutoModel.from_config(config.text_config)
        self.post_init()
        self.freeze()

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
        return layer_stack(self.language_model)[2]

    # ---- speech ----------------------------------------------------------------------------------------------------

    def encode_speech(self, inputs: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the speech encoder.

        Args:
            inputs: waveforms (segments, samples), or log-mel features (segments, bins, steps) for Whisper.
            mask: (segments, samples or steps), `True` = valid; padding is on the right.

        Returns:
            frames (segments, frames, speech hidden size) and the valid frames of each segment (segments,). A segment's
            frames do not depend on the batch that it is encoded in.
        """
        trained = any(parameter.requires_grad for parameter in self.speech_encoder.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            return encode_segments(self.speech_encoder, self.config, inputs, mask)

    @can_return_tuple
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
            raise ValueError(f"`{name}` needs `{name}_mask`, true where the audio is and false at padding.")
        if name == "speech_frames":
            return BaseModelOutputWithPooling(pooler_output=self.projector(inputs, mask.sum(-1)))

        seconds = mask.shape[-1] * self.config.speech_token_rule.samples_per_step / SAMPLING_RATE
        size = max(1, int(self.config.encoder_batch_seconds / seconds))
        tokens = []
        for start in range(0, len(inputs), size):
            part = slice(start, start + size)
            tokens.append(self.projector(*self.encode_speech(inputs[part], mask[part])))
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
        if speech_tokens.shape[-1] != embeddings.shape[-1]:
            raise ValueError(
                f"The speech tokens have width {speech_tokens.shape[-1]}, and this LLM's embeddings {embeddings.shape[-1]}."
            )
        # With the model spread over devices, the embedding table need not be where the prompt is.
        speech_tokens = speech_tokens.to(embeddings.device, embeddings.dtype)
        return embeddings.masked_scatter(placeholders[:, :, None].to(embeddings.device), speech_tokens)

    @can_return_tuple
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
        speech_tokens: torch.FloatTensor | None = None,
        layers: list[int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SpeechLLMModelOutput:
        """See `get_audio_features` for the audio inputs and the LLM's documentation for the rest.

        Args:
            speech_tokens: (placeholders in `input_ids`, text hidden size) instead of audio, as an earlier pass returned
                them.
            layers: if given, return `layer_states` at these hidden-state indices (0 = the LLM's input embeddings,
                k = after layer k, the last = after the final norm, as in `output_hidden_states`) and run no layer
                beyond the largest; with `[0]` the LLM does not run at all.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either `input_ids` or `inputs_embeds`, not both and not neither.")
        if any(audio is not None for audio in (input_values, input_features, speech_frames)):
            if speech_tokens is not None:
                raise ValueError("Give either audio or `speech_tokens`, not both.")
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
                speech_tokens=speech_tokens,
                layer_states=layer_states(self.language_model, layers, **text_inputs, **kwargs),
            )
        output = self.language_model(
            **text_inputs, past_key_values=past_key_values, use_cache=use_cache, return_dict=True, **kwargs
        )
        return SpeechLLMModelOutput(
            last_hidden_state=output.last_hidden_state,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            speech_tokens=speech_tokens,
        )


class SpeechLLMForConditionalGeneration(SpeechLLMPreTrainedModel, SpeechLLMGenerationMixin):
    """A SpeechLLM with its language-model head: audio and text in, text out."""

    def __init__(self, config: SpeechLLMConfig):
        super().__init__(config)
        causal_lm = AutoModelForCausalLM.from_config(config.text_config)
        names = {id(module): name for name, module in causal_lm.named_modules()}
        self._output_name = names[id(causal_lm.get_output_embeddings())]
        body, head = split_causal_lm(causal_lm, tie=config.tie_word_embeddings)
        self.model = SpeechLLMModel(config, body)
        self.head = head
        names = {id(module): name for name, module in self.named_modules()}
        source = names[id(self.get_input_embeddings())]
        self._tied_weights_keys = {f"head.{self._output_name}.weight": f"{source}.weight"}
        self.post_init()
        self.freeze()

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

    @can_return_tuple
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
        **kwargs: Unpack[TransformersKwargs],
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
            count = predicted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            loss = loss / (count.to(loss.device) if isinstance(count, torch.Tensor) else count)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            # A product with a part of a tensor would be one per row, each with its own copy of the head's weights (CPU).
            logits = self.compute_logits(hidden[:, kept].contiguous())
            if labels is not None:
                loss = self.loss_function(
                    logits, labels, vocab_size=logits.shape[-1], num_items_in_batch=num_items_in_batch, **kwargs
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


__all__ = ["SpeechLLMForConditionalGeneration", "SpeechLLMModel", "SpeechLLMPreTrainedModel"]
