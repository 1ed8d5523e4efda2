"""Transformers' common processor tests against ours. What is skipped, and why, is in `SKIPPED`."""

import tempfile
import unittest
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import soundfile
from tiny import tiny_config, tiny_feature_extractor, tiny_tokenizer, tone
from transformers_tests import TestsNotAvailable, load, skip

from speechllm import SpeechLLMProcessor


try:
    common = load("test_processing_common")
except TestsNotAvailable as reason:
    pytest.skip(str(reason), allow_module_level=True)

OWN_FEATURES = (
    "our features are not the extractor's own: `pad_features` names the mask after the input, and Whisper's go on for "
    "`context_seconds` instead of 30 s"
)
SKIPPED = {
    "test_apply_chat_template_assistant_mask": "`return_labels=True` marks the answers, with any chat template",
    "test_subprocessor_defaults_3_audio": OWN_FEATURES,
    "test_subprocessor_defaults_preserved_by_kwargs_2_audio": "padding is decided by the call, not by the tokenizer",
    "test_tokenizer_decode_defaults": "makes a processor without `speech_token_rule`; decoding is in test_processing.py",
}


class CommonTests(common.ProcessorTesterMixin):
    processor_class = SpeechLLMProcessor

    @classmethod
    def _setup_feature_extractor(cls):
        return tiny_feature_extractor(cls.speech)

    @classmethod
    def _setup_tokenizer(cls):
        return tiny_tokenizer()

    @classmethod
    def prepare_processor_dict(cls):
        return {"speech_token_rule": tiny_config(cls.speech).speech_token_rule.to_dict()}

    def prepare_audio_inputs(self, batch_size=None):
        return tone(0.4) if batch_size is None else [tone(0.4, seed=i) for i in range(batch_size)]

    def setUp(self):
        # Files in the place of addresses: the chat tests would download audio.
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        paths = [str(Path(folder.name, f"{i}.wav")) for i in range(2)]
        for i, path in enumerate(paths):
            soundfile.write(path, tone(0.5, seed=i), 16_000)
        patch = mock.patch.dict(common.MODALITY_INPUT_DATA, audio=paths)
        patch.start()
        self.addCleanup(patch.stop)


@partial(skip, skipped=SKIPPED)
class WhisperProcessorTest(CommonTests, unittest.TestCase):
    speech = "whisper"


@partial(skip, skipped=SKIPPED)
class HubertProcessorTest(CommonTests, unittest.TestCase):
    speech = "hubert-layer"
    audio_input_name = "input_values"
