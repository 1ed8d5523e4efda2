"""Transformers' common model tests against our classes. What is skipped, and why, is in `SKIPPED`."""

import unittest
from functools import partial
from unittest import mock

import pytest
from tiny import tiny_config, tiny_processor, tone
from transformers.testing_utils import torch_device
from transformers_tests import TestsNotAvailable, load, skip

from speechllm import SpeechLLMForConditionalGeneration, SpeechLLMModel


try:
    common = load("test_modeling_common")
except TestsNotAvailable as reason:
    pytest.skip(str(reason), allow_module_level=True)

FRAMES = (
    "the encoder's frames, states and attentions are not kept: an hour of audio would need gigabytes for them "
    "(`encode_speech` gives the frames)"
)
PLACEHOLDERS = (
    "audio with `inputs_embeds` is refused: the placeholder may lie beyond the vocabulary, so an embedding cannot stand "
    "for it; `embed_prompt` makes embeddings of both"
)
REFUSED = "a checkpoint that lacks weights is refused on purpose; the test wants it loaded with random ones"
SKIPPED = {
    "test_generation_tester_mixin_inheritance": "Transformers' generation tests are not in its source distribution; "
    "ours are in tests/test_generation.py",
    "test_get_audio_features_attentions": FRAMES,
    "test_get_audio_features_hidden_states": FRAMES,
    "test_inputs_embeds": PLACEHOLDERS,
    "test_inputs_embeds_matches_input_ids": PLACEHOLDERS,
    "test_model_weights_reload_no_missing_tied_weights": REFUSED,
    # With a tied head nothing is missing, and the tests run.
    "HubertMLPQwenTest.test_base_model_prefix_loads_base_weights": REFUSED,
    "HubertMLPQwenTest.test_correct_missing_keys": REFUSED,
}


class Tester:
    """Makes the small models and inputs that the common tests ask for."""

    batch_size = 7  # as many as the attention tests want: they would fill the batch up with prompts without audio
    is_training = True

    def __init__(self, speech, projector, text, audio_token_id):
        self.parts, self.audio_token_id = (speech, projector, text), audio_token_id
        config = self.get_config()
        self.seq_length = self.inputs(config)["input_ids"].shape[1]
        self.hidden_size = config.text_config.hidden_size
        self.num_hidden_layers = config.text_config.num_hidden_layers
        self.num_attention_heads = config.text_config.num_attention_heads

    def get_config(self):
        # The common tests want a gradient everywhere, few layers and few positions.
        options = {"freeze_speech_encoder": False, "freeze_language_model": False}
        config = tiny_config(*self.parts, audio_token_id=self.audio_token_id, **options)
        text = config.text_config
        text.num_hidden_layers, text.max_position_embeddings = 2, 512
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:2]
        return config

    def inputs(self, config):
        processor = tiny_processor(config)
        audios = [tone(0.35, seed=i) for i in range(self.batch_size)]
        texts = [f"a<|audio|>{'bcdefgh'[i]}xyz" for i in range(self.batch_size)]
        batch = processor(texts, audios, return_tensors="pt")
        batch["input_ids"][batch["input_ids"] == processor.audio_token_id] = config.audio_token_id
        return {name: value.to(torch_device) for name, value in batch.items()}

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        return config, self.inputs(config)


class CommonTests(common.ModelTesterMixin):
    all_model_classes = (SpeechLLMModel, SpeechLLMForConditionalGeneration)
    _is_composite = True
    additional_model_inputs = ("input_values", "input_values_mask", "input_features", "input_features_mask")
    skip_test_audio_features_output_shape = True  # there are no frames in the output: see `SKIPPED`

    def setUp(self):
        # Some tests clamp token ids to the vocabulary, others draw them from it at random.
        audio_token_id = 258 if "rope" in self._testMethodName else 5
        self.model_tester = Tester(*self.parts, audio_token_id)
        # Which class has a head and takes labels the common tests read from Transformers' own tables.
        for table, name in (
            (common.MODEL_MAPPING_NAMES, "SpeechLLMModel"),
            (common.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "SpeechLLMForConditionalGeneration"),
        ):
            patch = mock.patch.dict(table, {"speechllm": name})
            patch.start()
            self.addCleanup(patch.stop)


@partial(skip, skipped=SKIPPED)
class WhisperQFormerLlamaTest(CommonTests, unittest.TestCase):
    parts = ("whisper", "qformer", "llama-tied")


@partial(skip, skipped=SKIPPED)
class HubertMLPQwenTest(CommonTests, unittest.TestCase):
    parts = ("hubert-layer", "mlp", "qwen3")
