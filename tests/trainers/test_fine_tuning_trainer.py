"""Fine-tuning: every answer token weighs alike, the reused prompt changes nothing, LoRA trains what it should."""

import pytest
import torch
from tiny import tiny_processor, tiny_tokenizer, tone
from tiny_training import (
    batch_of,
    contrastive,
    fine_tuning,
    gradient_of,
    loss_and_gradient,
    save_base_models,
    tiny_rows,
    tiny_trainable,
    weights_of,
)
from transformers import AutoModel, TrainerCallback

from speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor


def system_processor(model, message):
    """A processor whose chats open with a system message, so that all prompts share a long start."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = f"{{{{ '<|im_start|>system\n{message}<|im_end|>\n' }}}}" + tokenizer.chat_template
    return tiny_processor(model.config, tokenizer)


@pytest.mark.parametrize(
    "message", ["Hi.", "Listen closely and answer in one sentence."]
)  # the second: past the window
@pytest.mark.parametrize("text", ["llama-tied", "qwen3", "gemma2", "gemma3"])
def test_reusing_the_prompts_start_changes_nothing(tmp_path, text, message):
    model = tiny_trainable(text)
    trainer = fine_tuning(tmp_path, model, processor=system_processor(model, message))
    reused, reused_gradient = loss_and_gradient(trainer, batch_of(trainer))
    assert len(trainer._prompt_start[0]) > len(message)
    again, _ = loss_and_gradient(trainer, batch_of(trainer))
    trainer._without_start = lambda batch: batch
    whole, whole_gradient = loss_and_gradient(trainer, batch_of(trainer))
    assert reused == pytest.approx(whole, abs=1e-5)
    assert again == reused
    torch.testing.assert_close(reused_gradient, whole_gradient, atol=1e-5, rtol=1e-3)


def test_a_trained_llm_shares_the_prompts_start_within_a_step(tmp_path):
    model = tiny_trainable()
    trainer = fine_tuning(tmp_path, model, processor=system_processor(model, "Listen closely."), lora_rank=2)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # at its zeros, lora_A would get no gradient
            torch.nn.init.normal_(parameter, std=0.1)

    def loss_and_gradients() -> tuple[float, torch.Tensor, torch.Tensor]:
        loss, projector = loss_and_gradient(trainer, batch_of(trainer))
        adapter = torch.cat([p.grad.flatten() for name, p in model.named_parameters() if "lora_" in name])
        return loss, projector, adapter

    shared = loss_and_gradients()
    tokens = trainer.llm_tokens
    trainer._without_start = lambda batch: batch
    whole = loss_and_gradients()
    assert 2 * tokens < trainer.llm_tokens  # fewer tokens passed through the LLM
    torch.testing.assert_close(shared, whole, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_held_out_loss_shares_the_prompts_start(tmp_path, lora_rank):
    """The same loss for fewer tokens, in the precision of evaluation: none of it is training's autocast."""
    model = tiny_trainable()
    processor = system_processor(model, "Listen closely and answer in one sentence.")
    options = {"lora_rank": lora_rank, "bf16": True, "predict_with_generate": False}
    trainer = fine_tuning(tmp_path, model, processor=processor, **options)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    lengths: list[int] = []
    model.register_forward_pre_hook(
        lambda module, _, inputs: lengths.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    tokens, shared = trainer.llm_tokens, trainer.evaluate(tiny_rows(6))["eval_loss"]
    assert trainer.llm_tokens == tokens  # counts what training costs
    short = max(lengths)
    trainer._without_start = lambda batch: batch
    assert shared == pytest.approx(trainer.evaluate(tiny_rows(6))["eval_loss"], abs=1e-5)
    assert short < max(lengths) / 1.3


def test_the_held_out_loss_after_training_is_all_of_trainings_precision(tmp_path):
    """Accelerate has the model run in bfloat16 from then on, and the prompt's start does too."""
    model = tiny_trainable()
    processor = system_processor(model, "Listen closely.")
    options = {"lora_rank": 2, "bf16": True, "max_steps": 1, "predict_with_generate": False}
    trainer = fine_tuning(tmp_path, model, processor=processor, **options)
    trainer.train()
    dtypes = []
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    trainer.evaluate(tiny_rows(4))
    assert {*dtypes} == {torch.bfloat16} and trainer._shares_start


def test_under_autocast_all_of_lora_runs_in_bfloat16(tmp_path):
    """In the pass over the prompt's shared start, too."""
    model = tiny_trainable().to(torch.bfloat16)
    processor = system_processor(model, "Listen closely.")
    trainer = fine_tuning(tmp_path, model, processor=processor, lora_rank=2, bf16=True, max_steps=1)
    adapters = [module for name, module in model.named_modules() if name.endswith("lora_A.default")]
    dtypes = []
    for adapter in adapters:
        adapter.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    trainer.train()
    assert dtypes == [torch.bfloat16] * (2 * len(adapters))  # the start, and the rest


def test_reuse_follows_the_batch(tmp_path):
    rows = tiny_rows(8)
    for row in rows[4:]:
        row["prompt"] = "Say it again."  # behind the audio: the start stays the same
    trainer = fine_tuning(tmp_path, train=rows)
    loss_and_gradient(trainer, batch_of(trainer, [0]))  # one row: all up to its first placeholder is "shared"
    loss, _ = loss_and_gradient(trainer, batch_of(trainer, [1, 6, 7]))
    trainer._without_start = lambda batch: batch
    assert loss == pytest.approx(loss_and_gradient(trainer, batch_of(trainer, [1, 6, 7]))[0], abs=1e-5)


def test_logits_of_answers_are_enough(tmp_path):
    trainer = fine_tuning(tmp_path)
    batch = trainer._model_inputs(batch_of(trainer))
    few = trainer.speechllm(**batch, answer_logits_only=True)
    full = trainer.speechllm(**batch)
    assert few.logits.shape[0] == (batch["labels"] != -100).sum() < batch["labels"].numel() / 2
    torch.testing.assert_close(few.loss, full.loss, atol=1e-6, rtol=0)


def test_noise_replaces_what_is_read_of_the_answers_and_not_what_is_learned(tmp_path):
    trainer = fine_tuning(tmp_path, answer_noise=0.5)
    seen, forward = [], trainer.speechllm.forward
    trainer.speechllm.forward = lambda **inputs: seen.append(inputs) or forward(**inputs)
    batch = next(iter(trainer.get_train_dataloader()))
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(trainer.compute_loss(trainer.speechllm, dict(batch)).item())
    assert losses[0] == losses[1] != losses[2]
    length = seen[0]["labels"].shape[1]  # without the start that all rows share
    clean, labels = batch["input_ids"][:, -length:], batch["labels"][:, -length:]
    changed, answer = seen[0]["input_ids"] != clean, labels != -100
    assert torch.equal(seen[0]["labels"], labels) and not changed[~answer].any()
    assert 0.25 < changed[answer].float().mean() < 0.75
    trainer.args.answer_noise = 0.0
    assert trainer.compute_loss(trainer.speechllm, dict(batch)).item() not in losses
    assert torch.equal(seen[-1]["input_ids"], clean)
    with pytest.raises(ValueError, match="answer_noise is 1"):
        fine_tuning(tmp_path / "other", answer_noise=1)


def test_noise_is_never_the_placeholder_of_audio(tmp_path):
    """Qwen's vocabulary, for one, has room for it: sooner or later it would be drawn, and no audio fit."""
    trainer = fine_tuning(tmp_path, answer_noise=0.5)
    config = trainer.speechllm.config
    config.text_config.vocab_size = config.audio_token_id + 1
    ids = torch.zeros(64, 1024, dtype=torch.long)
    noisy = trainer._with_noise({"input_ids": ids, "labels": ids})["input_ids"]
    assert config.audio_token_id - 1 in noisy and config.audio_token_id not in noisy


def test_accumulated_batches_weigh_every_answer_token_alike(tmp_path):
    rows = tiny_rows(8)
    for i, row in enumerate(rows):
        row["target"] = "word " * (1 + 3 * i)  # of very different lengths
    found = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            found.append(gradient_of(trainer.speechllm).clone())

    for size, accumulation in ((8, 1), (2, 4)):
        trainer = fine_tuning(
            tmp_path,
            train=rows,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0.0,
        )
        trainer.add_callback(Watch())
        trainer.train()
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-3)


def test_cached_frames_give_the_same_loss(tmp_path):
    plain, cached = fine_tuning(tmp_path), fine_tuning(tmp_path, feature_cache=str(tmp_path / "cache"))
    loss, gradient = loss_and_gradient(plain, batch_of(plain))
    batch = batch_of(cached)
    assert "speech_frames" in batch
    cached_loss, cached_gradient = loss_and_gradient(cached, batch)
    assert cached_loss == pytest.approx(loss, abs=1e-5)
    torch.testing.assert_close(cached_gradient, gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("rank", [0, 2])
def test_training_learns_and_touches_only_what_it_should(tmp_path, rank):
    model = tiny_trainable()
    before = weights_of(model)
    trainer = fine_tuning(
        tmp_path, model, held_out=tiny_rows(4), max_steps=12, lora_rank=rank, learning_rate=3e-3, max_new_tokens=3
    )
    untrained = trainer.evaluate()
    trainer.train()
    trained = trainer.evaluate()
    assert trained["eval_loss"] < untrained["eval_loss"] - 0.3
    assert {"eval_loss", "eval_wer", "eval_cer", "eval_runtime"} <= trained.keys()
    assert set(trainer.predictions) == {row["id"] for row in tiny_rows(4)}
    trained_names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("projector." in name or "lora_" in name for name in trained_names)
    assert any("lora_" in name for name in trained_names) == bool(rank)
    for name, value in model.state_dict().items():
        plain = name.replace(".base_layer.", ".")
        if "lora_" in name:
            assert "lora_B" not in name or value.abs().max() > 0, name
        else:
            assert torch.equal(value, before[plain]) == ("projector." not in name), name


def test_lora_weights_are_float32_beside_a_bfloat16_llm(tmp_path):
    trainer = fine_tuning(tmp_path, tiny_trainable().to(torch.bfloat16), lora_rank=2)
    adapters = [p.dtype for name, p in trainer.model.named_parameters() if "lora_" in name]
    assert set(adapters) == {torch.float32}
    assert loss_and_gradient(trainer, batch_of(trainer))[0] > 0


def test_the_held_out_loss_is_per_token(tmp_path):
    rows = tiny_rows(6)
    rows[0]["target"] = "a much longer answer than all of the others have"
    trainer = fine_tuning(tmp_path, held_out=rows, per_device_eval_batch_size=4, predict_with_generate=False)
    metrics = trainer.evaluate()
    whole = trainer.eval_batches(trainer.eval_dataset)
    total = count = 0.0
    for batch in whole:
        for i in range(len(batch["rows"])):
            single = next(iter(trainer._loader(trainer.eval_dataset, batch_sampler=[[batch["rows"][i]]])))
            logits = trainer.speechllm(**trainer._model_inputs(single)).logits[0, :-1]
            labels = single["labels"][0, 1:]
            total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100).item()
            count += int((labels != -100).sum())
    assert metrics["eval_loss"] == pytest.approx(total / count, abs=1e-4)
    assert "eval_wer" not in metrics


def test_one_recording_may_have_several_questions(tmp_path):
    path = str(tmp_path / "one.wav")
    import soundfile

    soundfile.write(path, tone(0.2), 16_000)
    rows = [{"audio": path, "prompt": f"Question {i}?", "target": f"answer {i}"} for i in range(3)]
    trainer = fine_tuning(tmp_path, held_out=rows, max_new_tokens=2, feature_cache=str(tmp_path / "cache"))
    trainer.evaluate()
    assert len(trainer.predictions) == 3


def test_a_batch_of_unusable_utterances_has_no_weight(tmp_path):
    rows = tiny_rows(8)
    for row in rows[:4]:
        row["audio"] = tone(0.2) * 0
    trainer = fine_tuning(tmp_path, train=rows)
    empty, full = batch_of(trainer, range(4)), batch_of(trainer, range(4, 8))
    assert (empty["labels"] == -100).all()  # they must not count in `num_items_in_batch` either
    count = trainer._get_num_items_in_batch([empty, full], "cpu")
    assert count == (full["labels"] != -100).sum()
    loss, gradient = loss_and_gradient(trainer, empty, num_items_in_batch=count)
    assert loss == 0 and gradient.abs().max() == 0
    nothing = trainer._get_num_items_in_batch([empty], "cpu")
    assert loss_and_gradient(trainer, batch_of(trainer, range(4)), num_items_in_batch=nothing)[0] == 0


def test_rows_without_an_answer_are_set_aside(tmp_path):
    rows = tiny_rows(6)
    rows[0] = {"id": "mute", "audio": tone(0.2)}
    rows[1] = {**rows[1], "task": "sqa"}
    trainer = fine_tuning(tmp_path, train=rows)
    mute, unasked = trainer.set_aside.values()
    assert (mute.id, unasked.id) == ("mute", "utterance 1") and "question" in unasked.reason


def test_items_longer_than_the_context_are_set_aside(tmp_path):
    model = tiny_trainable("gpt2")  # whose positions end: the model itself would fail
    rows = tiny_rows(5)
    rows[2]["text"] = "word " * 300
    for train, options in (
        (fine_tuning, {"held_out": rows, "max_new_tokens": 2}),  # listed once
        (contrastive, {}),
        (contrastive, {"text_state_cache": str(tmp_path / "cache")}),
    ):
        trainer = train(tmp_path, model, rows, max_steps=4, **options)
        trainer.train()
        if "held_out" in options:
            trainer.evaluate()
        (item,) = trainer.set_aside.values()
        assert item.id == "utterance 2" and "takes more tokens than the 1,024 of the LLM's context" in item.reason


@pytest.mark.parametrize("rank", [0, 2])
def test_what_the_trainer_saves_loads_again(tmp_path, rank):
    model = SpeechLLMForConditionalGeneration.from_speech_text_pretrained(
        *save_base_models(tmp_path), hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=48
    )
    processor = SpeechLLMProcessor.from_config(model.config)
    trainer = fine_tuning(tmp_path / "run", model, processor=processor, lora_rank=rank, learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "run" / "projector.safetensors").is_file()
    assert '"max_new_tokens"' in (tmp_path / "run" / "training_args.json").read_text()
    again = AutoModel.from_pretrained(tmp_path / "run")
    batch = trainer._model_inputs(batch_of(trainer))
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        torch.testing.assert_close(again.eval()(**batch).logits, expected, atol=1e-6, rtol=0)
