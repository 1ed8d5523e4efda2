"""A Hub that fails or cannot be reached is not taken for one that lacks a file; and what an upload leaves alone."""

import json
import subprocess
import sys

import peft
import pytest
from hub_server import WRITE_TOKEN, running_hub
from test_hub_round_trip import TESTS, environment
from tiny import enliven, tiny_model


SCRIPT = """
import json, os, sys
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from hub_server import running_hub

with running_hub() as hub:
    os.environ["HF_ENDPOINT"] = hub.address
    import time
    time.sleep = lambda seconds: None  # the client's pauses between attempts
    import huggingface_hub
    from speechllm import SpeechLLMForConditionalGeneration as Model
    from speechllm.hub.inspection import describe_checkpoint
    from speechllm.hub.training_summary import read_summary

    def loaded(name, failing=None, read=Model.from_pretrained):
        hub.failing = failing
        try:
            value = read(name)
        except OSError as error:
            return f"{type(error).__name__}: {error}"
        return sorted(getattr(value, "peft_config", [])) if isinstance(value, Model) else value

    for name in ("adapted", "plain"):
        hub.add("org/" + name, Path(name))
    ADAPTER = "adapter/adapter_config.json"
    found = {
        "projector fails": loaded("org/adapted", "projector.safetensors"),
        "adapter fails": loaded("org/adapted", ADAPTER),
        "summary fails": loaded("org/adapted", "training_summary.json", read_summary),
        "description fails": loaded("org/adapted", "adapter/adapter_model", describe_checkpoint),
        "adapter": loaded("org/adapted"),
        "adapter in the cache": loaded("org/adapted", "."),
        "no adapter": loaded("org/plain"),
        "known to have none": loaded("org/plain", "."),
        "summary": loaded("org/plain", None, read_summary),
        "no repository": loaded("org/nothing", None, read_summary),
    }
    hub.add("org/plain", Path("plain"), "another commit")
    loaded("org/plain", "adapter")  # of this commit, all but the adapter is known
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    found["offline"] = loaded("org/plain")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failures")
    model = enliven(tiny_model("hubert-layer"))
    model.save_pretrained(folder / "plain", kind="full")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(folder / "adapted", kind="full")
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(TESTS), str(TESTS / "hub")],
        capture_output=True, text=True, timeout=300, cwd=folder, env=environment("", folder / "home", None),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "case, path",
    [
        ("adapter fails", "adapter/adapter_config.json"),
        ("projector fails", "projector.safetensors"),
        ("summary fails", "training_summary.json"),
        ("description fails", "adapter/adapter_model.safetensors"),
    ],
)
def test_a_failure_is_not_an_absent_file(found, case, path):
    assert found[case].startswith(f"CheckpointError: Cannot tell whether org/adapted has a file {path}: ")
    assert "it answered 500" in found[case] and "HF_HUB_OFFLINE=1" in found[case]


def test_absent_files_are_absent(found):
    assert found["adapter"] == found["adapter in the cache"] == ["default"]
    assert found["no adapter"] == found["known to have none"] == found["offline"] == []
    assert found["summary"] == found["no repository"] == {}


PUSH = """
import os, sys
from huggingface_hub import HfApi
from speechllm.pushing_speechllm import upload_checkpoint
upload_checkpoint(HfApi(), sys.argv[1], "org/model", "new")
"""


def test_an_upload_replaces_weights_at_the_root_only(tmp_path):
    old = (
        "model-00001-of-00002.safetensors", "model.safetensors.index.json", "old_speechllm.py",
        "adapter/adapter_model.safetensors", "adapter/adapter_config.json",
        "gguf-source/x.safetensors", "gguf-source/x_speechllm.py", "notes.md", "projector.safetensors",
    )  # fmt: skip
    for name in old:
        (tmp_path / "old" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "old" / name).write_text(name)
    (tmp_path / "new").mkdir()
    (tmp_path / "new/projector.safetensors").write_text("new")
    with running_hub() as hub:
        hub.add("org/model", tmp_path / "old")
        subprocess.run(
            [sys.executable, "-c", PUSH, str(tmp_path / "new")],
            check=True, timeout=120, env=environment(hub.address, tmp_path / "home", WRITE_TOKEN),
        )  # fmt: skip
        files = hub.repositories["org/model"].files()
    assert set(files) == {
        "gguf-source/x.safetensors",
        "gguf-source/x_speechllm.py",
        "notes.md",
        "projector.safetensors",
    }
    assert files["projector.safetensors"] == b"new"
