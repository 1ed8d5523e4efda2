"""Base models of which the Hub has pickled weights alone, as most of the HuBERT family: taken as the Hub's own converter offers
them, or refused."""

import shutil

import pytest
import torch
from hub_server import WRITE_TOKEN, Discussion, Repository, running_hub
from safetensors.torch import load_file
from test_hub_round_trip import run


READER = """
import sys
import torch
from safetensors.torch import load_file
from pathlib import Path
from speechllm import CheckpointError, SpeechLLMForConditionalGeneration as Model, SpeechLLMProcessor

SMALL = dict(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=48)
model = Model.from_speech_text_pretrained("org/converted", "org/llm", **SMALL)
print(model.config.base_models["speech"]["revision"], model.config.base_models["text"]["revision"])
model.save_pretrained("saved")
for loaded in (model, Model.from_pretrained("saved")):
    weights = loaded.model.speech_encoder.state_dict()
    for name, value in load_file(sys.argv[1]).items():
        assert torch.equal(weights[name], value), name
hub = {"token": sys.argv[2], "cache_dir": "elsewhere"}  # which the base models take too
Model.from_speech_text_pretrained("org/converted", "org/secret", **hub, **SMALL).save_pretrained("secret")
Model.from_pretrained("secret", **hub, local_files_only=True)
SpeechLLMProcessor.from_config(model.config.__class__.from_pretrained("secret"), **hub)
assert Path("elsewhere/models--org--secret").is_dir()
for name in ("refused", "outdated"):
    try:
        Model.from_speech_text_pretrained(f"org/{name}", "org/llm", **SMALL)
    except CheckpointError as error:
        print(error)
"""


@pytest.fixture
def pickled(bases, tmp_path):
    """A folder of the speech encoder with pickled weights alone."""
    folder = tmp_path / "pickled"
    shutil.copytree(bases / "speech", folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_the_hubs_own_conversion_of_the_same_weights_is_taken(bases, pickled, tmp_path):
    converted = (bases / "speech" / "model.safetensors").read_bytes()
    with running_hub() as hub:
        llm = hub.add("org/llm", bases / "llm")
        hub.add("org/secret", bases / "llm")
        hub.repositories["org/secret"].private = True
        for name, author in (("converted", "SFconvertbot"), ("refused", "somebody"), ("outdated", "SFconvertbot")):
            hub.add(f"org/{name}", pickled)
            repository: Repository = hub.repositories[f"org/{name}"]
            offer = repository.commit({**repository.files(), "model.safetensors": converted}, "convert", "refs/pr/1")
            repository.discussions.append(Discussion(1, author))
            if name == "outdated":  # the repository has other weights since
                repository.commit({**repository.files(), "pytorch_model.bin": b"other weights"}, "retrain", "main")
            elif name == "converted":
                offered = offer
        script = ["-c", READER, bases / "speech" / "model.safetensors", WRITE_TOKEN]
        printed = run(hub.address, tmp_path, script, token=None).stdout.splitlines()
    assert printed[0] == f"{offered} {llm}"
    for line, name in zip(printed[1:], ("refused", "outdated"), strict=True):
        assert line.startswith(
            f"Cannot load the frozen speech model 'org/{name}': its weights (pytorch_model.bin) are pickled"
        )
        assert "The Hub converts them on request: https://huggingface.co/spaces/safetensors/convert." in line
