"""The command line from end to end on tiny models: what it prints, what it leaves, and how it fails."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from safetensors.torch import load_file
from tiny_training import save_base_models, tiny_rows

from speechllm import SpeechLLMForConditionalGeneration
from speechllm.cli import COMMANDS, main
from speechllm.hub.inspection import describe_checkpoint


PROJECTOR = dict(
    dropout=0.0, hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=48, num_queries=2
)


def write_manifest(folder, count=16, first=0):
    path = folder / f"rows-{first}.jsonl"
    lines = []
    for i, row in enumerate(tiny_rows(count, first)):
        soundfile.write(folder / f"{first + i}.wav", row["audio"], 16_000)
        lines.append(
            json.dumps({"audio": f"{first + i}.wav", "text": row["text"], "duration": len(row["audio"]) / 16_000})
        )
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe of contrastive pretraining, and its folder."""
    folder = tmp_path_factory.mktemp("cli")
    speech, llm = save_base_models(folder)
    values = {
        "speech_model": speech,
        "text_model": llm,
        "projector": PROJECTOR,
        "train_data": write_manifest(folder),
        "eval_data": write_manifest(folder, 6, first=16),
        "layers": "0,2",
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "output_dir": str(folder / "pretrained"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def pretrained(recipe):
    assert main(["pretrain", "--config", str(recipe), "--max_steps", "2"]) == 0
    return recipe.parent / "pretrained"


def fails(capsys, arguments, code, *words):
    """The command exits with `code` and one line that holds `words`."""
    try:
        found = main(arguments)
    except SystemExit as stop:
        found = stop.code
    error = capsys.readouterr().err
    assert found == code, error
    assert "Traceback" not in error
    for word in words:
        assert word in error
    return error


# ---- usage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(main([command, "--help"] if command else ["--help"]))
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in COMMANDS if command is None else [f"speechllm {command}"]:
        assert word in text


def test_version_and_nothing(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == "0.1.0"
    assert main([]) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pretend"], ["no command 'pretend'"]),
        (["pretrain", "--learning_rat", "1"], ["Did you mean `--learning_rate`"]),
        (["finetune", "--lora_rank", "-1", "--model", "m", "--train_data", "d", "--use_cpu"], ["lora_rank is -1"]),
        (["pretrain", "--train_data", "d"], ["--speech_model"]),
        (["pretrain", "--model", "m"], ["--train_data"]),
        (["transcribe", "a.wav"], ["--model"]),
        (["transcribe", "--model", "m", "--max-new-tokens", "0", "a.wav"], ["whole number above 0"]),
        (["info"], ["model"]),
        (["serve", "--model", "m", "--max-wait-ms", "nan"], ["number from 0 to 60000"]),
        (["serve", "--model", "m", "--port", "65536"], ["from 0 to 65535"]),
        (["serve", "--model", "m", "--port", "-1"], ["from 0 to 65535"]),
        (["demo", "--model", "m", "--port", "70000"], ["from 0 to 65535"]),
        (["reproduce", "--scale", "tiny", "--output", "x", "--comet-gpus", "1"], ["--comet-gpus", "Add --comet"]),
        (
            ["evaluate", "--model", "m", "--data", "d", "--output", "x", "--comet_python", "p"],
            ["--comet_python", "Add --comet"],
        ),
        (["quickstart", "--output", "x", "--stepps", "3"], ["stepps"]),
    ],
)
def test_usage_errors(arguments, words, capsys):
    fails(capsys, arguments, 2, *words)


def test_failures_name_the_item(recipe, tmp_path, capsys):
    run = ["pretrain", "--config", str(recipe), "--output_dir", str(tmp_path / "run")]
    error = fails(capsys, [*run, "--train_data", "nowhere.jsonl"], 1, "nowhere.jsonl", "no such manifest")
    assert len(error.strip().splitlines()) == 1
    fails(capsys, [*run, "--speech_model", str(tmp_path / "none")], 1, "none", "speech model")
    fails(capsys, [*run, "--layers", "0,9"], 1, "from 0 to 3")
    fails(capsys, [*run, "--per_device_train_batch_size", "64"], 1, "distinct transcripts")
    (tmp_path / "file").write_text("")
    fails(capsys, [*run, "--feature_cache", str(tmp_path / "file")], 1, "Cannot write to the feature cache")


def test_a_disk_that_fills_up_during_a_run(recipe, tmp_path):
    """The projector has room, the optimiser's state, twice as large, has not; half a checkpoint would be resumed from."""
    run = tmp_path / "run"
    options = ["--output_dir", str(run), "--save_strategy", "steps", "--save_steps", "1", "--max_steps", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "speechllm", "pretrain", "--config", str(recipe), *options],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, 80_000)),
        capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"speechllm: error: Cannot save to {run / 'checkpoint-1'}: ") and "Free some space" in last
    assert "inline_container" in last and "Traceback" not in done.stderr
    assert not list(run.glob("checkpoint-*"))


# ---- runs ----------------------------------------------------------------------------------------------------------


def test_pretrain_from_a_recipe(pretrained):
    state = json.loads((pretrained / "trainer_state.json").read_text())
    assert state["global_step"] == 2  # the command line overrides the recipe
    assert "eval_recall@1_layer_2" in json.loads((pretrained / "eval_results.json").read_text())
    assert (pretrained / "projector.safetensors").is_file() and not (pretrained / "model.safetensors").exists()
    assert json.loads((pretrained / "training_args.json").read_text())["layers"] == "0,2"


def test_finetune_resume_transcribe_and_info(pretrained, recipe, tmp_path, capsys):
    values = {k: v for k, v in yaml.safe_load(recipe.read_text()).items()
              if k not in ("speech_model", "text_model", "projector", "layers")}  # fmt: skip
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"this is text")
    manifest = tmp_path / "train.jsonl"
    manifest.write_text("".join(
        json.dumps({"audio": str(path), "text": text}) + "\n"
        for path, text in [(bad, "no"), *((recipe.parent / f"{i}.wav", f"word {i}") for i in range(12))]
    ) + 3 * (json.dumps({"id": "same", "audio": str(recipe.parent / "0.wav"), "text": "word 0"}) + "\n"))  # fmt: skip
    values.update(model=str(pretrained), train_data=str(manifest), max_new_tokens=3, lora_rank=2, max_steps=4,
                  output_dir=str(tmp_path / "tuned"), save_strategy="steps", save_steps=2)  # fmt: skip
    (tmp_path / "finetune.yaml").write_text(yaml.safe_dump(values))
    command = ["finetune", "--config", str(tmp_path / "finetune.yaml")]
    assert main([*command, "--feature_cache", str(tmp_path / "cache")]) == 0
    printed = capsys.readouterr().out
    assert "1 utterance(s) set aside: audio cannot be decoded; e.g. " in printed and "wer" in printed
    listed = (tmp_path / "tuned" / "set_aside.jsonl").read_text()
    assert "bad.wav" in listed and listed.count("same is there twice") == 2
    assert main([*command, "--max_steps", "5"]) == 0
    assert f"Resuming from {tmp_path / 'tuned' / 'checkpoint-4'}" in capsys.readouterr().out
    assert (tmp_path / "tuned" / "set_aside.jsonl").read_text().count("same is there twice") == 2

    good = str(recipe.parent / "0.wav")
    transcribe = ["transcribe", "--model", str(tmp_path / "tuned"), "--max-new-tokens", "3"]
    assert main([*transcribe, good]) == 0
    one = capsys.readouterr().out
    soundfile.write(tmp_path / "silent.wav", np.zeros(8000), 16_000)
    files = [str(bad), good, str(tmp_path / "nowhere.wav"), str(tmp_path / "silent.wav")]
    assert main([*transcribe, *files]) == 1
    captured = capsys.readouterr()
    assert captured.out == f"{good}\t{one.strip()}\n" or captured.out.rstrip() == f"{good}\t{one}".rstrip()
    assert [word in captured.err for word in ("bad.wav", "nowhere.wav: there is no", "silent")] == [True] * 3
    assert "Traceback" not in captured.err

    assert main(["info", str(tmp_path / "tuned"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "projector-only" and found["adapter_parameters"] > 0
    assert found["base_models"]["text"]["id"].endswith("llm")
    assert found["parts"]["projector"]["trained"] and not found["parts"]["language model"]["trained"]
    assert main(["info", str(tmp_path / "tuned")]) == 0
    assert "adapter" in capsys.readouterr().out


def test_info_counts_what_is_there(pretrained, tmp_path):
    model = SpeechLLMForConditionalGeneration.from_pretrained(pretrained)
    projector = sum(p.numel() for p in model.model.projector.parameters())
    assert describe_checkpoint(str(pretrained))["parts"]["projector"]["parameters"] == projector
    assert describe_checkpoint(str(pretrained))["adapter_parameters"] == 0
    model.save_pretrained(tmp_path / "full", kind="full")
    assert describe_checkpoint(str(tmp_path / "full"))["kind"] == "full"
    model.save_pretrained(tmp_path / "parts", kind="full", max_shard_size="100KB")
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    stored = [describe_checkpoint(str(tmp_path / name))["stored_tensors"] for name in ("full", "parts")]
    assert stored[0] == stored[1] > 50


def test_broken_checkpoints(pretrained, recipe, tmp_path, capsys):
    fails(capsys, ["info", str(tmp_path / "none")], 1, "not a checkpoint")
    fails(capsys, ["info", yaml.safe_load(recipe.read_text())["text_model"]], 1, "'llama', not a SpeechLLM")
    model = SpeechLLMForConditionalGeneration.from_pretrained(pretrained)
    model.save_pretrained(tmp_path / "broken")
    weights = tmp_path / "broken" / "projector.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    fails(capsys, ["info", str(tmp_path / "broken")], 1, "projector.safetensors", "cannot be read")
    good = str(recipe.parent / "0.wav")
    fails(capsys, ["transcribe", "--model", str(tmp_path / "broken"), good], 1, "projector.safetensors")
    weights.unlink()
    fails(capsys, ["info", str(tmp_path / "broken")], 1, "holds neither")
    fails(capsys, ["transcribe", "--model", str(tmp_path / "broken"), good], 1, "broken")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes(recipe, tmp_path):
    """They see different batches of one global batch, save once, and evaluate the whole set."""
    # One global batch of four: a process's share is one of the two batches that a single process has.
    rows = Path(recipe.parent / "rows-0.jsonl").read_text().splitlines()[:4]
    (recipe.parent / "four.jsonl").write_text("\n".join(rows))

    def launch(name, processes, *options):
        """Pretrain under `accelerate launch`; returns the log."""
        # `--multi_gpu` is Accelerate's name for several processes on one machine: with `--cpu` it starts one, unless there
        # is MPI.
        several = ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else []
        command = [
            sys.executable, "-m", "accelerate.commands.launch", *several, "--num_processes", str(processes),
            "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
            "-m", "speechllm", "pretrain", "--config", str(recipe), "--output_dir", str(tmp_path / name), "--seed", "3",
            "--per_device_train_batch_size", "2", "--length_window", "0", "--feature_cache", str(tmp_path / "cache"),
            "--train_data", str(recipe.parent / "four.jsonl"), "--gather_negatives", "false", *options,
        ]  # fmt: skip
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("Saved to") == 1
        return json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]

    two = launch("two", 2)

    # Each step's loss is the mean of the losses of both processes' batches (of different items), as one process has it
    # with two batches accumulated; so are the gradients, hence the weights.
    single = launch("one", 1, "--gradient_accumulation_steps", "2")
    losses, expected = ([log["loss"] for log in history if "loss" in log] for history in (two, single))
    assert losses == pytest.approx(expected, abs=1e-4)
    weights = [load_file(tmp_path / name / "projector.safetensors") for name in ("two", "one")]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], atol=1e-5, rtol=0, msg=name)
    evaluated = [json.loads((tmp_path / name / "eval_results.json").read_text()) for name in ("two", "one")]
    for name in ("eval_loss", "eval_recall@1_mean", "eval_mean_rank_layer_2"):
        assert evaluated[0][name] == pytest.approx(evaluated[1][name], abs=1e-4)
