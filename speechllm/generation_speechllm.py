"""What audio changes in `generate`; the rest is Transformers' `GenerationMixin`.

1. Audio enters with the prompt only: later steps find it in the cache.
2. Beams and several samples repeat each prompt, and with it its own audio segments, however many it has.
3. The placeholder is never generated. Its id may lie beyond the LLM's vocabulary, where processors that look up scores by
   token would fail.
"""

import torch
from torch.nn import functional as F
from transformers import GenerationMixin
from transformers.generation import (
    LogitsProcessorList,
    PromptLookupCandidateGenerator,
    SuppressTokensLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)


AUDIO_INPUTS = (
    "input_values",
    "input_values_mask",
    "input_features",
    "input_features_mask",
    "speech_frames",
    "speech_frames_mask",
)


class AudioAwareLogitsProcessors(LogitsProcessorList):
    """Processors that index the scores by prompt token (repetition penalties, n-gram bans) meet the placeholder's id,
    which may lie beyond the LLM's vocabulary: they see extra columns, which are cut off again. Classifier-free guidance
    compares the scores with a further pass of the model and sees them as they are."""

    def __init__(self, processors: LogitsProcessorList, extra: int):
        super().__init__(processors)
        self.extra = extra

    def __call__(self, input_ids, scores, **kwargs):
        for processor in self:
            extra = 0 if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor) else self.extra
            scores = F.pad(scores, (0, extra), value=-torch.inf)
            scores = LogitsProcessorList([processor])(input_ids, scores, **kwargs)
            scores = scores[:, : scores.shape[1] - extra]
        return scores


class SpeechLLMGenerationMixin(GenerationMixin):
    """`generate` with audio, for `SpeechLLMForConditionalGeneration`."""

    def _get_logits_processor(self, *args, **kwargs) -> LogitsProcessorList:
        processors = super()._get_logits_processor(*args, **kwargs)
        extra = self.config.audio_token_id + 1 - self.config.text_config.vocab_size
        if extra > 0:
            return AudioAwareLogitsProcessors(processors, extra)
        # The LLM has spare rows in its embedding table, of which the placeholder's id is one, and could be drawn.
        return LogitsProcessorList([SuppressTokensLogitsProcessor([self.config.audio_token_id]), *processors])

    def _get_candidate_generator(self, *args, **kwargs):
        """Prompt lookup tries what follows in the prompt, and looks up its score: the placeholder's is to be the least."""
        generator, placeholder = super()._get_candidate_generator(*args, **kwargs), self.config.audio_token_id
        if isinstance(generator, PromptLookupCandidateGenerator):
            processors = [SuppressTokensLogitsProcessor([placeholder]), *generator.logits_processor]
            generator.logits_processor = LogitsProcessorList(processors)
            generator.vocab_size = max(generator.vocab_size, placeholder + 1)
        return generator

    # `generate` looks for `inputs_embeds` among the parameters.
    def prepare_inputs_for_generation(self, *args, inputs_embeds=None, is_first_iteration=False, **kwargs):
        inputs = super().prepare_inputs_for_generation(
            *args, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration or not kwargs.get("use_cache", True):
            return inputs
        cache = kwargs.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:  # a draft model's first pass, which is not called one
            return inputs | {name: kwargs[name] for name in AUDIO_INPUTS if kwargs.get(name) is not None}
        return {name: value for name, value in inputs.items() if name not in AUDIO_INPUTS}  # the cache holds the audio

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
