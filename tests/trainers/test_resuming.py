"""From which checkpoint a run goes on: the last one that is whole, of this run, with all of its state, and not too far."""

import json
import logging
import shutil

import pytest
import torch
from tiny import tiny_processor
from tiny_training import contrastive, fine_tuning, tiny_rows, tiny_trainable, weights_of

from speechllm import CheckpointError
from speechllm.data.schema import SetAside
from speechllm.trainers.resuming import last_checkpoint
from speechllm.training import run_training


EVERY_2 = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}


def steps_of(trainer):
    """The steps that it takes, as they are taken."""
    seen, step = [], trainer.training_step
    trainer.training_step = lambda *a, **k: (seen.append(trainer.state.global_step), step(*a, **k))[1]
    return seen


def assert_same_weights(trainer, other):
    after = weights_of(other.speechllm)
    for name, value in weights_of(trainer.speechllm).items():
        torch.testing.assert_close(value, after[name], atol=1e-5, rtol=0, msg=name)


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(tmp_path, caplog):
    whole = contrastive(tmp_path / "whole", **EVERY_2, max_steps=4)
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    (tmp_path / "killed" / "checkpoint-4" / "trainer_state.json").unlink()
    (tmp_path / "killed" / "checkpoint-notes").mkdir()
    with caplog.at_level(logging.WARNING):
        assert last_checkpoint(tmp_path / "killed") == str(tmp_path / "killed" / "checkpoint-2")
    assert "checkpoint-4 was not written to its end" in caplog.text
    assert last_checkpoint(tmp_path / "nowhere") is None
    with pytest.raises(CheckpointError, match="no checkpoint to go on from"):
        contrastive(tmp_path / "nowhere").train(resume_from_checkpoint=True)
    with pytest.raises(
        CheckpointError, match=r"checkpoint-4 .*not written to its end \(trainer_state.json is missing\)"
    ):
        run_training(contrastive(tmp_path / "killed", resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-4")))
    trainer = contrastive(
        tmp_path / "killed", **EVERY_2, max_steps=4, resume_from_checkpoint="True"
    )  # as a recipe says it
    steps = steps_of(trainer)
    run_training(trainer)
    assert steps == [2, 3]
    assert_same_weights(trainer, whole)


def test_a_finished_run_is_not_trained_on(tmp_path, capsys):
    """Six steps of four an epoch: `Trainer` would take a seventh, and an eighth the next time."""
    options = {**EVERY_2, "max_steps": 6}
    first = contrastive(tmp_path, **options)
    run_training(first)
    record = json.loads((tmp_path / "trainer_state.json").read_text())
    assert record["log_history"][-1]["train_loss"] > 0
    capsys.readouterr()
    again = contrastive(tmp_path, **options)
    steps = steps_of(again)
    run_training(again)
    assert "It ended after 6 steps; nothing was left to train." in capsys.readouterr().out
    assert not steps and json.loads((tmp_path / "trainer_state.json").read_text()) == record
    assert not any("train_loss" in log for log in again.state.log_history)  # it would be that of no step
    assert again.state.global_step == 6 and not (tmp_path / "checkpoint-7").exists()
    for name, value in weights_of(first.speechllm).items():
        assert torch.equal(again.speechllm.state_dict()[name], value), name
    longer = contrastive(tmp_path, **{**options, "max_steps": 8}, save_total_limit=1)  # removes what it went on from
    steps = steps_of(longer)
    run_training(longer)
    assert steps == [6, 7] and "nothing was left" not in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-8"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layers": "0"}, "layers was 0,1, and is 0 now"),
        ({"learning_rate": 1e-3}, "learning_rate was 0.01, and is 0.001 now"),
        ({"similarity": "wasserstein"}, "similarity was cosine, and is wasserstein now"),
        ({"layer_schedule": "0:emb 2:all"}, "layer_schedule was None, and is 0:emb 2:all now"),
        ({"per_device_train_batch_size": 8}, "per_device_train_batch_size was 4, and is 8 now"),
    ],
)
def test_other_settings_are_another_run(tmp_path, change, reason):
    options = {**EVERY_2, "layers": "0,1", "max_steps": 2}
    run_training(contrastive(tmp_path, **options))
    with pytest.raises(CheckpointError, match=f"of another run: {reason}.*another --output_dir"):
        run_training(contrastive(tmp_path, **{**options, **change, "max_steps": 4}))
    for free in (
        {"gradcache_chunk": 2},  # decides how the loss is computed, not what it is
        {"gradient_checkpointing": True},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},  # as many rows a step
    ):
        run_training(contrastive(tmp_path, **{**options, **free}))
    told = contrastive(
        tmp_path, **{**options, **change, "max_steps": 3}, resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    steps = steps_of(told)
    run_training(told)
    assert steps == [2]


def test_another_stage_or_model_is_another_run(tmp_path):
    run_training(contrastive(tmp_path / "one", **EVERY_2))
    with pytest.raises(CheckpointError, match="it is of ContrastiveTrainer"):
        run_training(fine_tuning(tmp_path / "one", **EVERY_2, max_steps=4))
    run_training(contrastive(tmp_path / "two", **EVERY_2, seed=3))

    def tuned(start, **options):
        model = tiny_trainable()
        model.name_or_path = str(tmp_path / start)  # as `from_pretrained` has it
        return fine_tuning(tmp_path / "tuned", model, processor=tiny_processor(model.config), **EVERY_2, **options)

    run_training(tuned("one"))
    with pytest.raises(CheckpointError, match="it began from another model"):
        run_training(tuned("two", max_steps=4))
    run_training(contrastive(tmp_path / "one", **EVERY_2))  # a script, started again: nothing is left to train here
    run_training(tuned("one", max_steps=4))


def test_weights_alone_are_no_checkpoint_to_go_on_from(tmp_path):
    """The optimiser and the learning rate would begin anew, and nothing would say so."""
    options = {**EVERY_2, "save_only_model": True}
    run_training(contrastive(tmp_path, **options))
    for longer in ({"max_steps": 4}, {"max_steps": -1, "num_train_epochs": 2}):
        with pytest.raises(CheckpointError, match="holds no optimizer.pt, as with save_only_model"):
            run_training(contrastive(tmp_path, **options, **longer))
    run_training(contrastive(tmp_path, **options))  # which has nothing left to train


def test_a_run_of_float16_goes_on_without(tmp_path):
    """Its checkpoint holds the state of a loss scale that bfloat16 has no use for."""
    contrastive(tmp_path, **EVERY_2).train()
    torch.save({"scale": 65536.0}, tmp_path / "checkpoint-2" / "scaler.pt")
    trainer = contrastive(tmp_path, **EVERY_2, max_steps=3, bf16=True)
    steps = steps_of(trainer)
    run_training(trainer)
    assert steps == [2]


def test_a_checkpoint_that_is_whole_survives_a_failing_upload(tmp_path, monkeypatch):
    trainer = contrastive(tmp_path, **EVERY_2, max_steps=4)

    def full(folder):
        raise OSError(28, "No space left on device", "/tmp")

    monkeypatch.setattr(trainer, "_push_from_checkpoint", full)
    monkeypatch.setattr(trainer.args, "push_to_hub", True)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_what_was_set_aside_before_stays_listed(tmp_path):
    rows = tiny_rows()
    rows[3]["text"] = ""
    contrastive(tmp_path, train=rows, **EVERY_2).train()
    rows = tiny_rows()
    rows[5]["text"] = ""
    resumed = contrastive(tmp_path, train=rows, **EVERY_2, max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    listed = [json.loads(line)["id"] for line in (tmp_path / "set_aside.jsonl").read_text().splitlines()]
    assert sorted(listed) == ["utterance 3", "utterance 5"]


def test_rows_that_share_an_id_are_all_listed_and_none_twice(tmp_path):
    """Of one manifest with an id three times, and of two that number their rows from 1."""
    aside = [SetAside("1", reason) for reason in ("1 is there twice", "1 is there twice", "1 has no transcript")]
    for max_steps in (2, 4):
        trainer = contrastive(tmp_path, **{**EVERY_2, "max_steps": max_steps})
        trainer.note_set_aside(aside)
        trainer.train(resume_from_checkpoint=max_steps == 4)
        assert list(trainer.set_aside.values()) == aside
        listed = [json.loads(line)["reason"] for line in (tmp_path / "set_aside.jsonl").read_text().splitlines()]
        assert listed == [item.reason for item in aside]


def test_lora_beside_a_thawed_llm_is_resumed(tmp_path):
    """Its own weights are saved by the names that they have without LoRA."""

    def trainer(folder, **options):
        model = tiny_trainable()
        model.config.freeze_language_model = False
        model.model.language_model.requires_grad_(True)
        return fine_tuning(tmp_path / folder, model, lora_rank=2, **EVERY_2, **options)

    whole = trainer("whole", max_steps=4)
    whole.train()
    resumed = trainer("resumed", max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    after, changed = weights_of(whole.speechllm), 0
    for name, value in weights_of(resumed.speechllm).items():
        torch.testing.assert_close(value, after[name], atol=1e-5, rtol=0, msg=name)
        changed += "base_layer" in name and not torch.equal(
            value, weights_of(tiny_trainable()).get(name.replace(".base_layer", ""), value)
        )
    assert changed
