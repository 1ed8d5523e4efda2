"""There and back through the official client: train and push with the package, load by remote code where it is not
installed, compare exactly. Each side is a process of its own with an empty HF_HOME and `HF_ENDPOINT` on a loopback Hub.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import WRITE_TOKEN, running_hub
from safetensors.torch import load_file
from without_package import HIDE_PACKAGE

import speechllm
from speechllm.checkpoint_speechllm import HUB_FILES
from speechllm.pushing_speechllm import card_for


pytestmark = pytest.mark.timeout(
    600
)  # two processes that train, publish and load a dozen checkpoints: a minute of work
TESTS = Path(__file__).parent.parent
INPUTS = """
import numpy as np, torch
from safetensors.torch import save_file

def outputs(model, processor, path):
    signal = np.sin(np.arange(8000) ** 1.3 / 50).astype(np.float32)
    inputs = processor(["a<|audio|>", "a<|audio|>b"], [signal, signal[:5000]])
    model.eval()
    with torch.no_grad():
        logits = model(**inputs).logits
        tokens = model.generate(**processor("a<|audio|>", signal), max_new_tokens=5, do_sample=False)
    save_file({"logits": logits.contiguous(), "tokens": tokens.contiguous()}, path)
"""
AUTHOR = """
import os, sys
sys.path[:0] = sys.argv[1:3]
import numpy as np, soundfile
from transformers import AutoProcessor
from speechllm import CheckpointError, SpeechLLMForConditionalGeneration as Model
from speechllm.cli import main
from trained_checkpoints import adapt, new_model, pretrain

# The trainers push: at every save, and at the end.
pushing = dict(save_strategy="steps", save_steps=1, save_total_limit=1, push_to_hub=True, hub_always_push=True)
pretrain("pretrained", hub_model_id="org/pretrained", hub_token=os.environ["HF_TOKEN"], **pushing)
adapt("adapted", "pretrained", hub_model_id="org/adapted", hub_private_repo=True, **pushing)

def publish(name, checkpoint, *options):
    assert main(["publish", "--model", checkpoint, "--repo-id", name, *options]) == 0

soundfile.write("hello you.wav", np.zeros(800), 16_000)
for name, *options in (
    ("projector", "--revision", "v1", "--license", "mit", "--example", "hello you.wav"),
    ("merged", "--merge-lora", "--private"),
):
    publish("org/" + name, "adapted", *options, "--dry-run", "dry-" + name)
    publish("org/" + name, "adapted", *options)
publish("org/full", "adapted", "--full", "--max-shard-size", "60KB", "--license", "mit")
# From Python, a model that came from the Hub; then another kind of weights over it.
model = Model.from_pretrained("org/projector", revision="v1")
model.push_to_hub("org/pushed", private=True, tags=["for-the-tests"], commit_description="At length.")
model.save_pretrained("saved", kind="full", push_to_hub=True, repo_id="org/saved")
model.push_to_hub("org/changed", kind="full")
try:
    model.push_to_hub("org/full", private=True)
    raise SystemExit("what is public went on as if it were private")
except CheckpointError as error:
    assert "org/full exists already and is public" in str(error)
Model.from_pretrained("pretrained").push_to_hub("org/fresh")  # which has no card yet
publish("org/changed", "pretrained")
# Trained further in memory, it is no longer what the card that it came with says.
model = Model.from_pretrained("org/pretrained")
pretrain("further", model)
model.push_to_hub("org/further")

for name in ("pretrained", "adapted", "dry-merged"):
    outputs(Model.from_pretrained(name), AutoProcessor.from_pretrained(name), name + ".safetensors")
"""
READER = """
import json, sys
from transformers import AutoModel, AutoProcessor

published = AutoModel.from_pretrained("org/projector", revision="v1", trust_remote_code=True)
published.push_to_hub("reader/copy", kind="full")
for name, revision in json.loads(sys.argv[1]):
    options = {"revision": revision, "trust_remote_code": True}
    model = AutoModel.from_pretrained(name, **options)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    outputs(model, AutoProcessor.from_pretrained(name, **options), name.replace("/", "-") + ".safetensors")
assert "speechllm" not in sys.modules
"""


def environment(hub, home, token):
    values = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    values.pop("PYTHONPATH", None)
    values |= {"HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return values | ({"HF_TOKEN": token} if token else {})


def run(hub, folder, arguments, token=WRITE_TOKEN):
    """Run Python in `folder`; returns what it printed."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=550, cwd=folder,
        env=environment(hub, folder / "home", token),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def hub(bases):
    with running_hub() as hub:
        hub.base_commits = {name: hub.add(f"org/{name}", bases / name) for name in ("speech", "llm")}
        yield hub


@pytest.fixture(scope="module")
def author(hub, tmp_path_factory):
    """The folder of someone who trained and published; `log` is what was printed."""
    folder = tmp_path_factory.mktemp("author")
    done = run(hub.address, folder, ["-c", INPUTS + AUTHOR, TESTS, TESTS / "hub"])
    (folder / "log").write_text(done.stdout + done.stderr)
    # The base repositories move on; what was published is pinned to the commits it was trained with.
    for name in ("speech", "llm"):
        hub.repositories[f"org/{name}"].commit({"config.json": b"{}"}, "break it", "main")
    return folder


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["projector", "merged"])
def test_the_repository_is_the_dry_run(author, hub, name):
    repository = hub.repositories[f"org/{name}"]
    pushed = repository.files("v1" if name == "projector" else "main")
    assert pushed == contents(author / f"dry-{name}")
    for file in HUB_FILES:
        assert pushed[file] == Path(speechllm.__file__).with_name(file).read_bytes(), file
    assert len(repository.commits) == 2  # the empty first one, and ours
    if name == "projector":
        assert repository.files("main") == {}


def test_large_files_went_the_way_of_large_files(author, hub):
    stored, files = set(hub.large_files.values()), hub.repositories["org/full"].files()
    weights = {data for path, data in files.items() if path.endswith(".safetensors")}
    assert len(weights) > 3 and weights <= stored
    assert not any(data in stored for path, data in files.items() if path.endswith(".py"))


def test_loading_back_is_exact(author, hub, tmp_path):
    """By remote code, at a branch and at commits, the frozen parts from repositories that have moved on."""
    commits = {name: repository.branches["main"] for name, repository in hub.repositories.items()}
    expected = {
        "org/projector": ("v1", "adapted"),
        "org/full": (commits["org/full"], "adapted"),
        "org/merged": (commits["org/merged"], "dry-merged"),
        "org/changed": ("main", "pretrained"),
        "org/pretrained": (commits["org/pretrained"], "pretrained"),
        "org/adapted": ("main", "adapted"),
        "org/pushed": ("main", "adapted"),
        "org/saved": ("main", "adapted"),
        "org/fresh": ("main", "pretrained"),
    }
    wanted = json.dumps([(name, revision) for name, (revision, _) in expected.items()])
    run(hub.address, tmp_path, ["-c", HIDE_PACKAGE + INPUTS + READER, wanted])
    for name, (_, source) in expected.items():
        found, original = (load_file(path) for path in (
            tmp_path / f"{name.replace('/', '-')}.safetensors", author / f"{source}.safetensors"
        ))  # fmt: skip
        assert found["logits"].dtype == original["logits"].dtype, name
        assert torch.equal(found["logits"], original["logits"]), name
        assert torch.equal(found["tokens"], original["tokens"]), name
    assert_card(hub.repositories["reader/copy"].files(), "reader/copy", "full", published_as="org/projector")


def assert_card(files, name, kind, published_as=None):
    """That a repository's card speaks of it, and of no other, and has the plot that it shows."""
    card = files["README.md"].decode()
    assert f"\n# {name}\n" in card and card.count(f'from_pretrained("{name}", trust_remote_code=True)') == 2
    assert f"model-index:\n- name: {name.partition('/')[2]}\n" in card
    assert ("holds the trained weights only" in card) == (kind == "projector")
    assert ("This repository holds all weights." in card) == (kind == "full")
    assert f"\nbase_model_relation: {'adapter' if kind == 'projector' else 'finetune'}\n" in card
    assert "](images/recall_per_layer.png)" in card
    assert files["images/recall_per_layer.png"].startswith(b"\x89PNG")
    if published_as:
        assert published_as not in card
        assert "\nlicense: mit\n" in card and "src: examples/hello you.wav\n" in card
        assert files["examples/hello you.wav"].startswith(b"RIFF")


def test_models_push_their_card(author, hub):
    """The one they were published with, made their own; one from a trainer's folder gets a new one."""
    changed, _ = list(hub.repositories["org/changed"].commits.values())[1:]
    assert_card(changed, "org/changed", "full", published_as="org/projector")
    pushed = hub.repositories["org/pushed"].files()
    assert_card(pushed, "org/pushed", "projector", published_as="org/projector")
    assert "- for-the-tests\n" in pushed["README.md"].decode()
    assert_card(hub.repositories["org/saved"].files(), "org/saved", "full", published_as="org/projector")
    assert_card(hub.repositories["org/fresh"].files(), "org/fresh", "projector")
    names = ("training_summary.json", "images/recall_per_layer.png")
    original = hub.repositories["org/projector"].files("v1")
    assert all(changed[name] == original[name] for name in names)


def test_a_model_that_was_trained_further_gets_a_card_of_its_own(author, hub):
    files, source = hub.repositories["org/further"].files(), hub.repositories["org/pretrained"].files()
    stages, before = (json.loads(these["training_summary.json"])["stages"] for these in (files, source))
    assert stages[:-1] == before and len(before) == 1
    assert_card(files, "org/further", "projector")
    assert files["README.md"].decode() != card_for("org/further", "projector", source["README.md"].decode())


def test_the_base_models_are_pinned_by_commit(author, hub):
    config = json.loads(hub.repositories["org/projector"].files("v1")["config.json"])
    assert config["base_models"] == {
        "speech": {"id": "org/speech", "revision": hub.base_commits["speech"]},
        "text": {"id": "org/llm", "revision": hub.base_commits["llm"]},
    }
    card = hub.repositories["org/projector"].files("v1")["README.md"].decode()
    assert f"| org/speech | `{hub.base_commits['speech']}` | mit |" in card  # the licence from the Hub's card
    assert f"| org/llm | `{hub.base_commits['llm']}` | unknown |" in card
    assert "license: mit\n" in hub.repositories["org/full"].files()["README.md"].decode()


@pytest.mark.parametrize("name, steps", [("pretrained", 2), ("adapted", 2)])
def test_trainers_push_whole_checkpoints(author, hub, name, steps):
    """Every commit of the run loads: weights of its own step, code, processor, card; and nothing else."""
    repository = hub.repositories[f"org/{name}"]
    assert repository.messages == [
        "initial commit", *(f"Training in progress, step {step + 1}" for step in range(steps)), "Model save",
    ]  # fmt: skip
    commits = list(repository.commits.values())[1:]
    assert len({files["projector.safetensors"] for files in commits}) == steps
    for files in commits:
        assert set(HUB_FILES) < set(files) and "README.md" in files and "processor_config.json" in files
        assert {Path(path).suffix for path in files} == {".json", ".jinja", ".md", ".png", ".py", ".safetensors"}
        assert ("adapter/adapter_model.safetensors" in files) == (name == "adapted")
        assert "training_args.json" not in files  # which has paths
    assert commits[-1]["projector.safetensors"] == (author / name / "projector.safetensors").read_bytes()
    assert json.loads(commits[0]["training_summary.json"])["stages"][-1]["steps"] == 1


def test_the_other_kind_of_weights_is_replaced(author, hub):
    old, new = list(hub.repositories["org/changed"].commits.values())[1:]
    assert "model.safetensors" in old and "adapter/adapter_model.safetensors" in old
    assert [path for path in new if path.endswith(".safetensors")] == ["projector.safetensors"]


def test_private_means_private(author, hub):
    private = {name for name, repository in hub.repositories.items() if repository.private}
    assert private == {"org/adapted", "org/merged", "org/pushed"}


def test_the_token_is_nowhere(author, hub):
    """Not in what was printed, in any file that was written (also by trainers that were given it), nor uploaded."""
    for path, data in contents(author).items():
        assert WRITE_TOKEN.encode() not in data, path
    for name, repository in hub.repositories.items():
        for files in repository.commits.values():
            for path, data in files.items():
                assert WRITE_TOKEN.encode() not in data, (name, path)
    assert not any(WRITE_TOKEN in path for _, path in hub.requests)


# ---- refusals ------------------------------------------------------------------------------------------------------

REFUSED = """
import json, os, sys
from speechllm.cli import main

for token, repository, *options in json.loads(sys.argv[2]):
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    assert main(["publish", "--model", sys.argv[1], "--repo-id", repository, *options]) == 1
"""


def refusals(hub, folder, model, *cases):
    """What the command prints for each (token, repository, options): one line."""
    done = run(hub, folder, ["-c", REFUSED, model, json.dumps(cases)], token=None)
    lines = done.stderr.splitlines()
    assert "Traceback" not in done.stderr and len(lines) == len(cases), done.stderr
    assert not any(case[0] and case[0] in done.stdout + done.stderr for case in cases)
    return lines


def test_refusals_are_explained(pretrained, hub, tmp_path):
    hub.add("org/public", tmp_path)
    before = set(hub.repositories)
    nobody, other, owner = refusals(
        hub.address, tmp_path, pretrained,
        (None, "org/mine"), ("hf_ReadOnly", "org/mine"), (WRITE_TOKEN, "org/public", "--private"),
    )  # fmt: skip
    start = "speechllm: error: org/mine was not uploaded: the Hub answered"
    assert nobody.startswith(f"{start} 401. You are not logged in. Run `hf auth login`")
    assert other.startswith(f"{start} 403. The token in use is not allowed to write there. Run `hf auth login`")
    assert "org/public exists already and is public. Make it private in its settings" in owner
    assert set(hub.repositories) == before and len(hub.repositories["org/public"].commits) == 2  # nothing was sent


def test_without_a_network(pretrained, tmp_path):
    (line,) = refusals("http://127.0.0.1:9", tmp_path, pretrained, (WRITE_TOKEN, "org/mine"))
    assert line.startswith("speechllm: error: org/mine was not uploaded: http://127.0.0.1:9 cannot be reached (")
    assert line.endswith("--dry-run works without it.")
