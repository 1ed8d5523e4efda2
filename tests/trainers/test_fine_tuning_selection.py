"""Choosing the best checkpoint by any task's metric, stopping early, resuming exactly, training all of the LLM."""

import json
import shutil

import pytest
import torch
from tiny import tiny_processor
from tiny_training import fine_tuning, save_base_models, tiny_rows, tiny_trainable, weights_of
from transformers import AutoModel

from speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from speechllm.evaluation.metrics import score
from speechllm.trainers import FineTuningArguments
from speechllm.training import run_training


SMALL = dict(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=48)


def mixed_rows(count=8):
    rows = tiny_rows(count)
    for row, task in zip(rows, ["asr", "st", "sqa", "traits"] * count):
        row["task"] = task
        if task == "st":
            row.update(target="ein Apfel", target_language="de")
        elif task == "sqa":
            row.update(question="What is it?", answers=["an apple", "apple"], target="an apple")
        elif task == "traits":
            row.update(trait="gender", choices=["female", "male"], target="female", prompt="female or male?")
    return rows


def assembled(folder):
    torch.manual_seed(5)
    model = SpeechLLMForConditionalGeneration.from_speech_text_pretrained(*save_base_models(folder), **SMALL)
    return model, SpeechLLMProcessor.from_config(model.config)


def arguments(folder, **options):
    return FineTuningArguments(output_dir=str(folder), use_cpu=True, **options)


def test_every_task_has_its_metrics(tmp_path):
    rows = mixed_rows()
    trainer = fine_tuning(tmp_path, held_out=rows, max_new_tokens=3)
    metrics = trainer.evaluate()
    names = {
        "eval_asr_wer",
        "eval_asr_cer",
        "eval_st_bleu",
        "eval_sqa_f1",
        "eval_sqa_exact_match",
        "eval_traits_accuracy",
    }
    assert names <= metrics.keys()
    assert "eval_wer" not in metrics  # not all of it is recognition
    for task, name in (("asr", "wer"), ("st", "bleu"), ("sqa", "f1"), ("traits", "accuracy")):
        members = [row for row in rows if row["task"] == task]
        assert metrics[f"eval_{task}_{name}"] == pytest.approx(score(task, members, trainer.predictions)[name])
    recognition = fine_tuning(tmp_path, held_out=tiny_rows(2), max_new_tokens=3).evaluate()
    assert recognition["eval_wer"] == recognition["eval_asr_wer"]


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("eval_asr_wer", False),
        ("cer", False),
        ("eval_loss", False),
        ("asr_mean_utterance_wer", False),
        ("st_bleu", True),
        ("eval_sqa_f1", True),
        ("traits_accuracy", True),
    ],
)
def test_the_better_of_two_values_is_known_by_the_metrics_name(tmp_path, metric, greater):
    assert arguments(tmp_path, metric_for_best_model=metric).greater_is_better is greater
    assert (
        arguments(tmp_path, metric_for_best_model=metric, greater_is_better=not greater).greater_is_better
        is not greater
    )


def test_settings_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(ValueError, match="set eval_strategy"):
        arguments(tmp_path, early_stopping_patience=2)
    with pytest.raises(ValueError, match="early_stopping_patience is 0"):
        arguments(tmp_path, early_stopping_patience=0, eval_strategy="epoch")
    with pytest.raises(ValueError, match="Set one of them"):
        arguments(tmp_path, train_llm=True, lora_rank=4)
    with pytest.raises(ValueError, match="'st_bleu'; evaluation on this data gives loss, asr_wer"):
        fine_tuning(tmp_path, held_out=tiny_rows(2), metric_for_best_model="st_bleu")
    with pytest.raises(ValueError, match="gives loss."):
        fine_tuning(tmp_path, held_out=tiny_rows(2), metric_for_best_model="wer", predict_with_generate=False)
    model = tiny_trainable()
    fine_tuning(tmp_path, model, lora_rank=2)
    with pytest.raises(ValueError, match="Merge it into the LLM first"):
        fine_tuning(tmp_path, model, train_llm=True)
    with pytest.raises(ValueError, match=r"LoRA of rank 2 and alpha 16.*lora_rank is 4 and lora_alpha 16"):
        fine_tuning(tmp_path, model, lora_rank=4)
    again = fine_tuning(tmp_path, model, learning_rate=1e-2)
    before = weights_of(again.speechllm)
    again.train()  # which goes on, also if nothing is said of it
    assert any("lora_" in name and not torch.equal(x, before[name]) for name, x in weights_of(again.speechllm).items())
    thawed = tiny_trainable().to(torch.bfloat16)
    thawed.config.freeze_language_model = False
    language_model = fine_tuning(tmp_path, thawed).headless.language_model
    assert all(p.dtype == torch.float32 and p.requires_grad for p in language_model.parameters())


def scripted(trainer, values):
    """Evaluation that finds these values of the metric, one after the other, and else works as it does."""
    real, script = trainer.held_out_loss, iter(values)
    trainer.held_out_loss = lambda dataset: real(dataset) * 0 + next(script)
    return trainer


KINDS = ["projector", "projector lora", "full", "full lora", "full llm"]
EVERY = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "predict_with_generate": False,
    "load_best_model_at_end": True,
    "learning_rate": 1e-2,
    "max_steps": 4,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_models_weights_come_back_bit_by_bit(tmp_path, kind):
    model, processor = assembled(tmp_path)
    model.is_self_contained = kind.startswith("full")
    options = {**EVERY, "lora_rank": 2 * ("lora" in kind), "train_llm": "llm" in kind, "save_total_limit": 1}
    trainer = fine_tuning(tmp_path / "run", model, held_out=tiny_rows(2), processor=processor, **options)
    scripted(trainer, [3.0, 1.0, 2.0, 2.5])
    kept = {}

    def keep(folder=None, state_dict=None, save=trainer._save):
        kept[trainer.state.global_step] = weights_of(trainer.speechllm)
        save(folder, state_dict)

    trainer._save = keep
    trainer.train()
    assert trainer.state.best_metric == 1.0 and trainer.state.best_global_step == 2
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    after = weights_of(trainer.speechllm)
    assert all(torch.equal(after[name], value) for name, value in kept[2].items())
    assert any(not torch.equal(after[name], value) for name, value in kept[4].items())
    trainer.save_model()
    names = {path.name for path in (tmp_path / "run").glob("*.safetensors")}
    assert names == {"model.safetensors" if kind.startswith("full") else "projector.safetensors"}
    again = AutoModel.from_pretrained(tmp_path / "run")
    assert all(torch.equal(value, after[name]) for name, value in weights_of(again).items())


def test_training_stops_when_the_metric_no_longer_improves(tmp_path):
    options = {**EVERY, "max_steps": 9, "early_stopping_patience": 2}
    trainer = scripted(fine_tuning(tmp_path, held_out=tiny_rows(2), **options), [3.0, 2.0, 2.5, 2.1, 1.0])
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.state.best_global_step == 2


def test_a_run_that_was_stopped_early_has_ended(tmp_path, capsys):
    """Unless it is to be more patient; without patience there, it begins to count when the run goes on."""
    options = {**EVERY, "max_steps": 9, "save_strategy": "steps", "load_best_model_at_end": False}

    def run(metrics, **further):
        trainer = scripted(fine_tuning(tmp_path, held_out=tiny_rows(2), **options, **further), metrics)
        run_training(trainer)
        return trainer

    run([3.0, 2.0, 2.5, 2.1, 5.0], early_stopping_patience=2)
    capsys.readouterr()
    again = run([2.1], early_stopping_patience=2)
    assert again.state.global_step == 4 and "It ended after 4 steps" in capsys.readouterr().out
    patient = run([2.2, 2.3, 9.0], early_stopping_patience=4)
    assert patient.state.global_step == 6
    shutil.rmtree(tmp_path / "checkpoint-6")
    shutil.rmtree(tmp_path / "checkpoint-5")
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["EarlyStoppingCallback"]
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text(json.dumps(state))
    assert run([2.2, 2.3, 9.0], early_stopping_patience=2).state.global_step == 6


@pytest.mark.parametrize("kind", ["projector", "lora", "llm"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, kind):
    """Losses, order of the data, best metric, evaluations left, weights: across an epoch's end, with dropout."""

    def trainer(folder, **options):
        model = tiny_trainable(dropout=0.1)
        options = {
            **EVERY,
            "max_steps": 8,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "eval_steps": 2,
            "save_steps": 2,
            "early_stopping_patience": 2,
            "lora_rank": 2 * (kind == "lora"),
            "train_llm": kind == "llm",
            "learning_rate": 1e-3,
            **options,
        }
        made = fine_tuning(tmp_path / folder, model, tiny_rows(12), tiny_rows(2), **options)
        made.seen = []
        compute = made.compute_loss
        made.compute_loss = lambda model, inputs, *a, **k: (
            made.seen.append(inputs["rows"]),
            compute(model, inputs, *a, **k),
        )[1]
        return made

    whole = scripted(trainer("whole"), [3.0, 1.0, 2.0, 2.5])
    whole.train()  # 3 steps per epoch; evaluated and saved after 2, 4 (the best), 6 and 8, where patience ends too
    resumed = scripted(trainer("resumed", max_steps=8), [2.5])
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert resumed.seen == whole.seen[12:] and len(resumed.seen) == 4
    losses = [[(log["step"], log["loss"]) for log in t.state.log_history if "loss" in log] for t in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    for name in ("global_step", "epoch", "best_metric", "best_global_step"):
        assert getattr(resumed.state, name) == getattr(whole.state, name), name
    assert resumed.state.best_metric == 1.0
    assert resumed.state.best_model_checkpoint == str(tmp_path / "whole" / "checkpoint-4")
    counters = [
        json.loads((tmp_path / folder / "checkpoint-8" / "trainer_state.json").read_text())["stateful_callbacks"]
        for folder in ("whole", "resumed")
    ]
    counts = [found["EarlyStoppingCallback"]["attributes"]["early_stopping_patience_counter"] for found in counters]
    assert counts == [2, 2]
    after = weights_of(whole.speechllm)
    assert all(torch.equal(value, after[name]) for name, value in weights_of(resumed.speechllm).items())


def test_all_of_the_llm_is_trained_in_float32_and_saved(tmp_path):
    model = tiny_trainable()
    for part in (model.model.speech_encoder, model.model.language_model, model.head):
        part.to(torch.bfloat16)
    before = weights_of(model)
    trainer = fine_tuning(tmp_path, model, train_llm=True, learning_rate=1e-2, max_steps=2)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(parameter.dtype == torch.float32 for name, parameter in model.named_parameters() if name in trained)
    trainer.train()
    for name, value in model.state_dict().items():
        same = torch.equal(value.float(), before[name].float())
        assert same == ("speech_encoder" in name), name
    trainer.save_model()
    tiny_processor(model.config).save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert again.dtype == torch.float32 and not again.config.freeze_language_model
    after = weights_of(model)
    assert all(torch.equal(value, after[name]) for name, value in weights_of(again).items() if "language_model" in name)
