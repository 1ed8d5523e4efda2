"""DeepSpeed's ZeRO-2 on two processes trains, evaluates, saves and resumes as one process does without it.

On CPUs: `pip install deepspeed` (0.19.8 was used; it is built where torch is installed), then

    DS_ACCELERATOR=cpu DS_BUILD_OPS=0 python -m pytest -m slow tests/trainers/test_deepspeed.py
"""

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import weights_of
from two_processes import run_twice, run_zero

from speechllm import SpeechLLMForConditionalGeneration
from speechllm.trainers import ContrastiveArguments


pytest.importorskip("deepspeed", reason="DeepSpeed is no dependency: it is built from source (docstring)")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder and results with DeepSpeed (per process) and without."""
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        found = [each["zero"] for each in run_twice(two, ["zero"])]
    return two, found, one, run_zero(one)


@pytest.mark.parametrize("name", ["learned", "accumulated", "terms", "lora", "llm"])
def test_zero_2_trains_evaluates_saves_and_resumes_as_one_process(name, runs):
    two, found, one, expected = runs
    for process in found:
        for part in ("losses", "resumed", "evaluation"):
            assert process[name][part] == pytest.approx(expected[name][part], abs=1e-4)
    saved, weights = (
        weights_of(SpeechLLMForConditionalGeneration.from_pretrained(folder / name / "saved")) for folder in (two, one)
    )
    for parameter, value in saved.items():
        torch.testing.assert_close(value, weights[parameter], atol=1e-4, rtol=0, msg=parameter)


@pytest.mark.parametrize("name", ["head", "bf16"])
def test_bf16(name, runs):
    two, found, one, expected = runs
    assert found[0][name]["losses"] == pytest.approx(expected[name]["losses"], rel=0.02)
    assert found[0][name]["resumed"] == found[0][name]["losses"]
    files = [path.relative_to(one / name) for path in (one / name / "saved").rglob("*.safetensors")]
    for file in files:
        saved, weights = load_file(two / name / file), load_file(one / name / file)
        assert saved.keys() == weights.keys()
        trained = {key: value for key, value in saved.items() if "projector." in key or "lora_" in key}
        assert {value.dtype for value in trained.values()} == {torch.float32}
        assert any((value != value.bfloat16().float()).any() for value in trained.values())  # no rounded weights


def test_checkpoints_hold_trained_weights_only(runs):
    (state,) = (runs[0] / "lora" / "whole" / "checkpoint-2").glob("global_step*/*model_states.pt")
    names = torch.load(state, weights_only=False)["module"]
    assert names and not [
        name for name in names if ".base_layer." in name or (name.endswith("dense.weight") and "speech_encoder" in name)
    ]


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_arguments_have_the_precision_of_the_launcher(precision, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    arguments = ContrastiveArguments(output_dir=str(tmp_path), use_cpu=True)
    assert arguments.bf16 == (precision == "bf16") and not arguments.fp16
