"""The configuration: sub-configurations, errors, and the arithmetic from samples to speech tokens."""

import json

import pytest
import torch
from tiny import PROJECTORS, SPEECH, TEXT, tiny_config, tiny_model
from transformers import AutoConfig, GPT2Config, HubertConfig, WhisperConfig

from speechllm import SpeechLLMConfig, SpeechLLMProjectorConfig
from speechllm.configuration_speechllm import AUTO_MAP, SpeechTokenRule


def test_the_defaults_are_hubert_the_papers_projector_and_llama():
    config = SpeechLLMConfig()
    assert config.speech_config.model_type == "hubert"
    assert config.text_config.model_type == "llama"
    projector = config.projector_config
    assert (projector.projector_type, projector.window_frames, projector.num_queries) == ("qformer", 17, 4)
    assert (projector.hidden_size, projector.num_hidden_layers, projector.num_attention_heads) == (768, 4, 12)
    assert config.freeze_speech_encoder and config.freeze_language_model and not config.frozen_in_train_mode


@pytest.mark.parametrize("text", TEXT)
@pytest.mark.parametrize("speech", SPEECH)
def test_a_config_survives_saving(tmp_path, speech, text):
    config = tiny_config(speech, "mlp", text, speech_layer=1, base_models={"speech": {"id": "x", "revision": None}})
    config.save_pretrained(tmp_path)
    for loaded in (SpeechLLMConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, SpeechLLMConfig)
        assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
        assert type(loaded.speech_config) is type(config.speech_config)
        assert loaded.speech_token_rule == config.speech_token_rule
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_sub_configs_may_be_dicts_or_objects():
    by_dict = SpeechLLMConfig(
        speech_config={"model_type": "whisper", "d_model": 32},
        text_config={"model_type": "gpt2", "n_embd": 32},
        projector_config={"projector_type": "mlp"},
    )
    by_object = SpeechLLMConfig(
        speech_config=WhisperConfig(d_model=32),
        text_config=GPT2Config(n_embd=32),
        projector_config=SpeechLLMProjectorConfig(projector_type="mlp"),
    )
    assert by_dict.to_dict() == by_object.to_dict()
    assert by_dict.speech_hidden_size == 32
    assert by_dict.audio_token_id == by_dict.text_config.vocab_size
    assert by_dict.tie_word_embeddings is True


def test_the_adapters_width_feeds_the_projector_unless_a_layer_is_chosen():
    speech = {"model_type": "wav2vec2", "add_adapter": True, "output_hidden_size": 48, "hidden_size": 32}
    assert SpeechLLMConfig(speech_config=speech).speech_hidden_size == 48
    assert SpeechLLMConfig(speech_config=speech, speech_layer=3).speech_hidden_size == 32


@pytest.mark.parametrize(
    "options, message",
    [
        ({"speech_config": {"model_type": "humbert"}}, "speech_config.*'humbert'.*does not know.*spelling"),
        ({"text_config": {"model_type": "lama"}}, "text_config.*'lama'.*does not know"),
        ({"speech_config": {"model_type": "bert"}}, "'bert'.*not a speech encoder.*'hubert'"),
        ({"speech_config": {"model_type": "speecht5"}}, "'speecht5'.*not a speech encoder"),
        ({"speech_layer": 13}, "speech_layer is 13.*states 0 to 12"),
        ({"speech_layer": -1}, "speech_layer is -1"),
        ({"projector_config": {"projector_type": "linear"}}, "'linear'.*'qformer' or 'mlp'"),
        ({"projector_config": {"window_frames": 0}}, r"window_frames \(0\)"),
        ({"projector_config": {"num_queries": 0}}, r"num_queries \(0\)"),
    ],
)
def test_impossible_settings_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        SpeechLLMConfig(**options)


def test_a_saved_config_with_an_unknown_encoder_is_explained(tmp_path):
    config = SpeechLLMConfig()
    config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["speech_config"]["model_type"] = "whispr"
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="'whispr'"):
        SpeechLLMConfig.from_pretrained(tmp_path)


def test_known_encoders_have_50_frames_per_second():
    assert SpeechLLMConfig(speech_config=HubertConfig()).speech_token_rule.frames_per_second == 50
    whisper = SpeechLLMConfig(speech_config=WhisperConfig()).speech_token_rule
    assert whisper.frames_per_second == 50
    assert whisper.frames(3000) == 1500
    hubert = SpeechLLMConfig(speech_config=HubertConfig()).speech_token_rule
    assert (hubert.shortest, hubert.frames(400), hubert.frames(399), hubert.frames(16_000)) == (400, 1, 0, 49)
    assert whisper.shortest == 400


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("speech", SPEECH)
def test_the_rule_counts_numbers_and_tensors_alike_and_never_below_zero(speech, projector):
    rule = tiny_config(speech, projector).speech_token_rule
    samples = torch.arange(0, 20_000, 37)
    counts = rule.tokens(rule.frames(rule.steps(samples)))
    assert counts.tolist() == [rule.tokens(rule.frames(rule.steps(n))) for n in samples.tolist()]
    assert (counts.diff() >= 0).all() and counts[0] == 0
    assert SpeechTokenRule.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule
    assert rule.frames(rule.steps(rule.shortest)) >= 1
    if speech != "whisper":
        assert rule.frames(rule.steps(rule.shortest - 1)) == 0


@pytest.mark.parametrize("speech", ["hubert-layer", "wav2vec2-adapter"])
def test_the_rule_agrees_with_the_encoder(speech):
    model = tiny_model(speech, "mlp").model
    rule = model.config.speech_token_rule
    for samples in (*range(rule.shortest, rule.shortest + 700, 61), 5_000, 7_777):
        with torch.no_grad():
            frames = model.speech_encoder(torch.randn(1, samples)).last_hidden_state
        assert frames.shape[1] == rule.frames(samples), samples
