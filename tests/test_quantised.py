"""Loading with a quantised LLM: the encoder and the projector stay as they are, whichever kind the checkpoint is."""

import json
import warnings

import pytest
import torch
from tiny import PROJECTORS, tone
from tiny_training import save_base_models
from transformers import TorchAoConfig

from speechllm import SpeechLLMForConditionalGeneration, SpeechLLMModel, SpeechLLMProcessor


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    quantization = pytest.importorskip("torchao.quantization")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    model = SpeechLLMForConditionalGeneration.from_speech_text_pretrained(
        *save_base_models(folder), **PROJECTORS["qformer"]
    )
    for kind in ("projector", "full"):
        model.save_pretrained(folder / kind, kind=kind)
    return folder, model, SpeechLLMProcessor.from_config(model.config)


def quantised(module):
    return {n for n, p in module.named_parameters() if type(p.data) is not torch.Tensor}


@pytest.mark.parametrize("cls", [SpeechLLMForConditionalGeneration, SpeechLLMModel])
@pytest.mark.parametrize("kind", ["projector", "full"])
def test_int8_llm_on_the_cpu(saved, kind, cls):
    folder, model, processor = saved
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    loaded = cls.from_pretrained(folder / kind, quantization_config=config)
    llm = {n.split("language_model.")[1] for n in quantised(loaded) if "language_model." in n}
    linear = {
        f"{n}.weight" for n, m in loaded.base_model.language_model.named_modules() if isinstance(m, torch.nn.Linear)
    }
    assert llm == linear and len(quantised(loaded)) == len(linear) > 10, "only the LLM's linear layers"
    assert config.modules_to_not_convert is None, "the caller's own was changed"
    inputs = processor(["a<|audio|>b", "<|audio|>"], [tone(0.5), tone(0.31)])
    with torch.no_grad():
        expected, found = model.base_model(**inputs), loaded.base_model(**inputs)
    assert torch.equal(found.speech_tokens, expected.speech_tokens)
    difference = (found.last_hidden_state - expected.last_hidden_state).norm() / expected.last_hidden_state.norm()
    assert 0 < difference < 0.05  # eight bits
    if cls is SpeechLLMForConditionalGeneration:
        assert loaded.generate(**inputs, max_new_tokens=3, do_sample=False).shape[0] == 2


def test_the_projector_of_a_quantised_model_is_saved_for_the_whole_one(saved, tmp_path):
    folder, model, _ = saved
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    loaded = SpeechLLMForConditionalGeneration.from_pretrained(folder / "projector", quantization_config=config)
    loaded.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again/config.json").read_text())
    again = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
