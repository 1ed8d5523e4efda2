"""What would be pushed: complete, exact, without a word about this machine; and what is refused."""

import filecmp
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tone
from tiny_training import contrastive
from trained_checkpoints import new_model

import speechllm
from speechllm import CheckpointError, SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from speechllm.checkpoint_speechllm import HUB_FILES
from speechllm.cli import main
from speechllm.hub.publishing import PublishingError, prepare_folder


PACKAGE = Path(speechllm.__file__).parent


def dry_run(checkpoint, folder, *options):
    assert (
        main(["publish", "--model", str(checkpoint), "--repo-id", "org/ears", "--dry-run", str(folder), *options]) == 0
    )
    return folder


def same_tensors(a, b):
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def logits_of(folder):
    model = SpeechLLMForConditionalGeneration.from_pretrained(folder)
    processor = SpeechLLMProcessor.from_pretrained(folder)
    with torch.no_grad():
        return model(**processor(["a<|audio|>", "a<|audio|>b"], [tone(0.5), tone(0.31)])).logits


# ---- the folder ----------------------------------------------------------------------------------------------------


def test_the_folder_holds_what_is_needed_and_nothing_else(adapted, tmp_path):
    (adapted / "optimizer.pt").write_bytes(b"state")
    (adapted / "notes.txt").write_text("mine")
    folder = dry_run(adapted, tmp_path / "new")
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "README.md", "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "chat_template.jinja",
        "config.json", "generation_config.json", "images/recall_per_layer.png", "processor_config.json",
        "projector.safetensors", "tokenizer.json", "tokenizer_config.json", "training_summary.json", *HUB_FILES,
    }  # fmt: skip
    for name in ("projector.safetensors", "adapter/adapter_model.safetensors"):
        same_tensors(adapted / name, folder / name)
    for name in HUB_FILES:
        assert filecmp.cmp(PACKAGE / name, folder / name, shallow=False), name
    assert torch.equal(logits_of(folder), logits_of(adapted))


@pytest.mark.parametrize("kind", ["projector", "full"])
def test_the_folder_says_nothing_about_this_machine(bases, adapted, tmp_path, kind):
    folder = dry_run(adapted, tmp_path / "new", *(["--full"] if kind == "full" else []))
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            for place in (adapted, bases, tmp_path, Path.home()):
                assert str(place).encode() not in data, (path, place)


def test_local_base_models_are_named_without_their_place(bases, tmp_path):
    model = new_model(bases / "speech", bases / "llm")
    model.save_pretrained(tmp_path / "model")
    SpeechLLMProcessor.from_config(model.config).save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"speech model .*speech is a folder on this machine.*--full"):
        prepare_folder(tmp_path / "model", tmp_path / "new", "org/ears")
    folder = dry_run(tmp_path / "model", tmp_path / "new", "--full")
    assert json.loads((folder / "config.json").read_text()).get("base_models") is None
    card = (folder / "README.md").read_text()
    assert "| speech | `sha256:" in card and "| mit |" in card  # of the encoder's own card
    assert not any(str(bases).encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert torch.equal(logits_of(folder), logits_of(tmp_path / "model"))


def test_examples_are_published(pretrained, tmp_path):
    import soundfile

    soundfile.write(tmp_path / "hello.wav", tone(0.3), 16_000)
    folder = dry_run(pretrained, tmp_path / "new", "--example", str(tmp_path / "hello.wav"))
    assert filecmp.cmp(tmp_path / "hello.wav", folder / "examples/hello.wav", shallow=False)
    assert "  src: examples/hello.wav" in (folder / "README.md").read_text()


# ---- kinds of weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["pretrained", "adapted"])
def test_projector_only_to_full_and_back_is_exact(request, tmp_path, which):
    checkpoint = request.getfixturevalue(which)
    full = dry_run(checkpoint, tmp_path / "full", "--full", "--max-shard-size", "40KB")
    shards = sorted(path.name for path in full.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (full / "projector.safetensors").exists()
    assert set(json.loads((full / "model.safetensors.index.json").read_text())["weight_map"].values()) == set(shards)
    assert torch.equal(logits_of(full), logits_of(checkpoint))
    again = dry_run(full, tmp_path / "again", "--full")  # copied as it is
    assert sorted(path.name for path in again.glob("model-*.safetensors")) == shards
    back = dry_run(full, tmp_path / "back")
    assert [path.name for path in back.glob("*.safetensors")] == ["projector.safetensors"]
    same_tensors(checkpoint / "projector.safetensors", back / "projector.safetensors")
    if which == "adapted":
        name = "adapter/adapter_model.safetensors"
        same_tensors(checkpoint / name, full / name)
        same_tensors(checkpoint / name, back / name)


def test_a_full_checkpoint_with_other_frozen_weights_stays_full(adapted, tmp_path):
    model = SpeechLLMForConditionalGeneration.from_pretrained(adapted)
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    model.save_pretrained(tmp_path / "model", kind="full")
    SpeechLLMProcessor.from_pretrained(adapted).save_pretrained(tmp_path / "model")
    with pytest.raises(PublishingError, match=r"1 frozen tensor.*layers.1.mlp.up_proj.weight.*--full"):
        prepare_folder(tmp_path / "model", tmp_path / "new", "org/ears")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_merged_weights_are_the_formulas(adapted, tmp_path, dtype):
    """W + (alpha / r) B A, computed here in float64; rounded once to the checkpoint's dtype."""
    folder = dry_run(adapted, tmp_path / "new", "--merge-lora", *(["--dtype", dtype] if dtype else []))
    assert not (folder / "adapter").exists() and not (folder / "projector.safetensors").exists()
    merged = load_file(folder / "model.safetensors")
    expected_dtype = torch.float32 if dtype else torch.bfloat16
    assert {t.dtype for name, t in merged.items() if "projector." not in name} == {expected_dtype}
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(expected_dtype).removeprefix("torch.")

    lora = load_file(adapted / "adapter/adapter_model.safetensors")
    scale = 16 / 2  # lora_alpha / lora_rank
    frozen = new_model().state_dict()
    changed = 0
    for name, weight in frozen.items():
        if "projector." in name:
            continue
        expected = weight.double()
        key = f"base_model.model.{name.removesuffix('.weight')}"
        key = key if f"{key}.lora_A.weight" in lora else name.removesuffix(".weight")
        if f"{key}.lora_A.weight" in lora:
            expected = expected + scale * lora[f"{key}.lora_B.weight"].double() @ lora[f"{key}.lora_A.weight"].double()
            changed += 1
        if name in merged:  # not: tied weights
            # float32: the sum's own rounding; bfloat16: half of its last of 8 bits
            tolerance = 1e-6 if dtype else 2.0**-8
            torch.testing.assert_close(merged[name].double(), expected, rtol=tolerance, atol=1e-6)
    assert changed == len(lora) // 2 > 0
    trained = load_file(adapted / "projector.safetensors")
    assert all(
        torch.equal(merged[name], value) and merged[name].dtype == value.dtype for name, value in trained.items()
    )
    if dtype:
        torch.testing.assert_close(logits_of(folder), logits_of(adapted), atol=1e-4, rtol=0)
    # What was merged cannot be taken apart again, and is not tried.
    with pytest.raises(CheckpointError, match="lacks `base_models`"):
        prepare_folder(folder, tmp_path / "back", "org/ears")
    card = (folder / "README.md").read_text()
    assert "LoRA (rank 2) is merged" in card and "base_model_relation: finetune" in card


def test_merged_and_sharded_is_merged(adapted, tmp_path):
    """In bfloat16 and in shards: the same tensors under an index, and the same logits."""
    whole = dry_run(adapted, tmp_path / "whole", "--merge-lora")
    sharded = dry_run(adapted, tmp_path / "sharded", "--merge-lora", "--max-shard-size", "20KB")
    assert not (sharded / "model.safetensors").exists() and not (sharded / "adapter").exists()
    shards = {path.name: load_file(path) for path in sharded.glob("model-*.safetensors")}
    assert len(shards) > 2
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == {name: shard for shard, tensors in shards.items() for name in tensors}
    tensors = {name: tensor for part in shards.values() for name, tensor in part.items()}
    assert {t.dtype for name, t in tensors.items() if "projector." not in name} == {torch.bfloat16}
    expected = load_file(whole / "model.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    logits = logits_of(sharded)
    assert torch.equal(logits, logits_of(whole)) and not torch.equal(logits, logits_of(adapted))


def test_there_must_be_an_adapter_to_merge(pretrained, tmp_path, capsys):
    arguments = ["publish", "--model", str(pretrained), "--repo-id", "org/ears", "--dry-run", str(tmp_path / "new")]
    assert main([*arguments, "--merge-lora"]) == 1
    assert "has no adapter to merge" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "repository", ["ears", "org/", "org/e ars", "org/a--b", "a/b/c", "org/ears.git", "https://huggingface.co/org/ears"]
)
def test_malformed_repository_names_are_a_usage_error(pretrained, capsys, repository):
    assert main(["publish", "--model", str(pretrained), "--repo-id", repository]) == 2
    assert "owner/name" in capsys.readouterr().err


def test_what_cannot_be_published_is_explained(pretrained, tmp_path, capsys):
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for model, target, options, message in (
        (tmp_path / "nowhere", "new", [], "nowhere is not a checkpoint: there is no config.json in it"),
        (tmp_path / "empty", "new", [], "empty is not a checkpoint"),
        (pretrained, "used", [], "used exists and is not an empty folder"),
        (pretrained, "new", ["--example", "missing.wav"], "missing.wav: there is no such recording"),
    ):
        arguments = ["publish", "--model", str(model), "--repo-id", "org/ears", "--dry-run", str(tmp_path / target)]
        assert main([*arguments, *options]) == 1
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("speechllm: error: ") and message in lines[0]
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "used/file").read_text() == "mine"


@pytest.mark.parametrize("sharded", [False, True])
def test_pickled_weights_are_refused_with_the_way_to_convert(pretrained, tmp_path, monkeypatch, sharded):
    """And the way works."""
    folder = dry_run(pretrained, tmp_path / "model", "--full")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    if sharded:
        (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00001.bin")
        (folder / "pytorch_model.bin.index.json").write_text("{}")
    for refused in (
        SpeechLLMForConditionalGeneration.from_pretrained,
        lambda f: prepare_folder(f, tmp_path / "x", "a/b"),
    ):
        with pytest.raises(CheckpointError, match=r"are pickled.*only safetensors are read.*convert") as error:
            refused(folder)
    monkeypatch.chdir(folder)
    exec(f"import glob, safetensors.torch, torch; {str(error.value).rpartition('once: ')[2]}")
    assert torch.equal(logits_of(folder), logits_of(pretrained))


def test_trainers_refuse_to_push_what_nobody_could_load(bases, cached, tmp_path):
    """Before anything is sent or trained."""
    with pytest.raises(CheckpointError, match="is a folder on this machine"):
        contrastive(tmp_path, new_model(bases / "speech", bases / "llm"), push_to_hub=True)
    with pytest.raises(ValueError, match=r"hub_strategy is 'checkpoint'.*pickled.*every_save"):
        contrastive(tmp_path, new_model(), push_to_hub=True, hub_strategy="checkpoint")


def test_a_refused_push_leaves_nothing_behind(cached, tmp_path, monkeypatch):
    trainer = contrastive(tmp_path / "run", new_model())
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    with pytest.raises(PublishingError, match="is not a checkpoint"):
        trainer._push(tmp_path / "nothing", "message")
    assert not list((tmp_path / "temporary").iterdir())


def test_a_model_whose_bases_are_folders_is_not_pushed(bases, tmp_path):
    with pytest.raises(CheckpointError, match="is a folder on this machine"):
        new_model(bases / "speech", bases / "llm").push_to_hub("org/ears")


def test_what_training_left_beside_the_weights_survives_a_copy(pretrained, tmp_path):
    shutil.copytree(pretrained, tmp_path / "copy")
    (tmp_path / "copy/training_summary.json").unlink()
    folder = dry_run(tmp_path / "copy", tmp_path / "new")
    assert "Nothing is recorded about the training" in (folder / "README.md").read_text()
