"""The further terms of stage 1 against passes written out, and against fine-tuning where they are the same."""

import json
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import soundfile
import torch
from safetensors.torch import load_file
from test_contrastive_trainer import LayerCalls
from tiny import tiny_processor, tone
from tiny_training import (
    batch_of,
    contrastive,
    fine_tuning,
    gradient_of,
    loss_and_gradient,
    save_base_models,
    tiny_rows,
    tiny_trainable,
    uneven_rows,
    weights_of,
)
from torch.nn import functional as F
from transformers import Trainer
from two_processes import Watch

from speechllm.data.forced_alignment import aligned_row
from speechllm.data.joining import joined_rows
from speechllm.objectives import mixed_sequence, spoken_words
from speechllm.trainers import ContrastiveArguments, ContrastiveTrainer


ALONE = {"contrastive_weight": 0.0}
ALL = {"next_token_weight": 0.5, "mixed_weight": 0.25, "distillation_weight": 2.0, "norm_weight": 0.1}


def rows_with_words(count=16, **options):
    """Utterances of two to five windows, so that words have windows of their own."""
    rows = [aligned_row(row, None) for row in tiny_rows(count, seconds=0.3, **options)]
    return [{**row, "duration": len(row["audio"]) / 16_000} for row in rows]


def states_of(trainer, batch):
    return trainer.aligned_states(trainer.model, trainer.on_device(batch), [])


def hidden_states(model, pieces):
    """Final hidden states of one row: `pieces` are token ids and speech tokens, in order."""
    table = model.get_input_embeddings()
    pieces = [piece if piece.ndim == 2 else table(piece) for piece in pieces]
    return model.model(inputs_embeds=torch.cat(pieces)[None]).last_hidden_state[0]


def speech_of(model, processor, row):
    return model.get_audio_features(**processor.pad_features(processor.extract_features(row["audio"]))).pooler_output


# ---- next-token ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
def test_asr_term_is_the_loss_of_fine_tuning(tmp_path, cached):
    rows = tiny_rows(4)
    rows[1] |= {"task": "st", "target_language": "German", "target": "etwas"}  # joint training
    rows[2] |= {"prompt": "What is it?", "target": "a tone"}
    options = {"train": rows, **({"feature_cache": str(tmp_path)} if cached else {})}
    tuned = fine_tuning(tmp_path, **options)
    expected, expected_gradient = loss_and_gradient(tuned, batch_of(tuned))
    trainer = contrastive(tmp_path, **options, **ALONE, next_token_weight=1.0)
    batch = batch_of(trainer)
    assert ("speech_frames" in batch) == cached
    loss, gradient = loss_and_gradient(trainer, batch)
    assert loss == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-4)


def test_without_the_contrastive_term_the_llm_runs_once_per_prompt(tmp_path):
    rows = rows_with_words()
    for options, passes in (
        ({"norm_weight": 1.0}, 0),
        ({"next_token_weight": 1.0}, 1),
        ({"mixed_weight": 1.0}, 1),
        ({"distillation_weight": 1.0}, 2),
    ):
        trainer = contrastive(tmp_path, train=rows, **ALONE, **options)
        calls, logits = LayerCalls(trainer.speechllm), []
        trainer.speechllm.head.register_forward_hook(lambda *args, logits=logits: logits.append(args[-1].logits.shape))
        batch = batch_of(trainer)
        loss_and_gradient(trainer, batch)
        assert calls.count == [passes] * 3
        assert (trainer.llm_tokens > 0) == (passes > 0)
        if "next_token" in batch.get("further", {}):  # the head runs on the answers alone
            answers = int((batch["further"]["next_token"]["labels"] != -100).sum())
            assert [shape[1] for shape in logits] == [answers]
    assert trainer.llm_tokens == sum(
        int(batch["further"][side]["attention_mask"].sum()) for side in ("student", "teacher")
    )


# ---- mixed ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["llama-tied", "gemma3", "gpt2"])
def test_mixed_term_is_next_word_prediction_on_spliced_rows(tmp_path, text):
    rows = rows_with_words(4)
    rows[0]["words"][0]["word"] += ","
    model = tiny_trainable(text)
    trainer = contrastive(tmp_path, model, rows, **ALONE, mixed_weight=1.0, seed=7)
    trainer.state.global_step = 5
    model.train()
    batch = batch_of(trainer)
    found = trainer.terms.mixed(states_of(trainer, batch))["loss"] / trainer.terms.counts([batch])["mixed"]

    processor, losses = trainer.processing_class, []
    prefix = torch.tensor(trainer.prefix)
    for row in rows:
        words = [word["word"].strip(",") for word in row["words"]]
        speech = speech_of(model, processor, row)
        spans = dict(enumerate(trainer.train_dataset.further["words"](row, frames_of(processor, row))[1]))
        spoken = spoken_words(len(words), 0.5, random.Random(f"mixed 7 5 {row['id']}"))
        pieces, labels = [prefix], [-100] * len(prefix)
        for i, word in enumerate(words):
            if spoken[i]:
                first = spans[i].first if not (i and spoken[i - 1]) else spans[i - 1].last
                first = max([first, *(spans[j].last for j in range(i) if spoken[j])])
                pieces.append(speech[first : spans[i].last])
                labels += [-100] * len(pieces[-1])
            else:
                ids = processor.tokenizer(f" {word}" if i else word, add_special_tokens=False).input_ids
                pieces.append(torch.tensor(ids))
                labels += ids
        logits = model.compute_logits(hidden_states(model, pieces)[None])[0]
        losses.append(F.cross_entropy(logits[:-1], torch.tensor(labels[1:]), reduction="none", ignore_index=-100))
        losses[-1] = losses[-1][torch.tensor(labels[1:]) != -100]
    assert found.item() == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)


def frames_of(processor, row):
    return [processor.rule.frames(part["steps"]) for part in processor.extract_features(row["audio"])]


def test_mixing_depends_on_seed_step_and_row_alone(tmp_path):
    rows = rows_with_words(8)
    for row in rows:  # many words, so that choices hardly agree by chance
        row["words"] = [{"word": f"w{i}", "start": i / 30, "end": (i + 1) / 30} for i in range(9)]
    trainer = contrastive(tmp_path, train=rows, **ALONE, mixed_weight=1.0)
    trainer.speechllm.train()
    seen = []
    trainer.terms._cross_entropy = lambda prompt, tokens: seen.append(prompt) or tokens.sum()

    def mixed(indices, step):
        trainer.state.global_step = step
        states = states_of(trainer, batch_of(trainer, indices))
        trainer.terms.mixed(states)
        prompt = seen.pop()
        return [ids[mask.bool()].tolist() for ids, mask in zip(prompt["input_ids"], prompt["attention_mask"])]

    whole = mixed(range(4), 0)
    assert whole == mixed([0, 1], 0) + mixed([2, 3], 0)
    assert all(a != b for a, b in zip(whole, mixed(range(4), 1)))
    trainer.speechllm.eval()
    assert mixed(range(4), 0) == mixed(range(4), 1) != whole


def test_joined_utterances_mix_too(tmp_path):
    rows = joined_rows(rows_with_words(8), 4, maximum_seconds=2.0)
    trainer = contrastive(tmp_path, train=rows, **ALONE, mixed_weight=1.0)
    loss, gradient = loss_and_gradient(trainer, batch_of(trainer))
    assert 0 < loss < 20 and gradient.abs().max() > 0


def test_one_word_utterances_leave_a_zero_loss_in_the_graph(tmp_path):
    rows = [{**row, "words": row["words"][:1]} for row in rows_with_words(4)]
    trainer = contrastive(tmp_path, train=rows, **ALONE, mixed_weight=1.0)
    loss, gradient = loss_and_gradient(trainer, batch_of(trainer))
    assert loss == 0 and gradient.abs().max() == 0


# ---- distillation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("direction", "temperature", "target"), [
    ("forward", 1.0, "transcript"), ("reverse", 2.0, "target")])  # fmt: skip
def test_distillation_term_is_the_divergence_of_whole_logits(tmp_path, direction, temperature, target):
    rows = tiny_rows(4)
    if target == "target":
        rows = [{**row, "prompt": f"Question {i}?", "target": "answer " * (i + 1)} for i, row in enumerate(rows)]
    options = {"distillation_direction": direction, "distillation_temperature": temperature}
    trainer = contrastive(tmp_path, train=rows, **ALONE, distillation_weight=1.0, distillation_target=target, **options)
    model, processor = trainer.speechllm, trainer.processing_class
    loss, gradient = loss_and_gradient(trainer, batch_of(trainer))

    model.zero_grad()
    values = []

    def encode(text):
        return torch.tensor(processor.tokenizer(text, add_special_tokens=False).input_ids)

    for row in rows:
        answer = encode(f"{row['target' if target == 'target' else 'text']}<|im_end|>")
        instruction = row.get("prompt", "Repeat this word for word.")
        logits = []
        for heard in (speech_of(model, processor, row), encode(row["text"] + "\n")):
            pieces = [encode("<|im_start|>user\n"), heard, encode(f"{instruction}<|im_end|>\n<|im_start|>assistant\n")]
            hidden = hidden_states(model, [*pieces, answer])
            logits.append(model.compute_logits(hidden[None])[0, -len(answer) - 1 : -1] / temperature)
        student, teacher = (F.log_softmax(value, -1) for value in logits)
        q, p = (student, teacher.detach()) if direction == "forward" else (teacher.detach(), student)
        values.append(F.kl_div(q, p, reduction="none", log_target=True).sum(-1) * temperature**2)
    expected = torch.cat(values).mean()
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-6) and loss > 0.01
    torch.testing.assert_close(gradient, gradient_of(model), atol=1e-5, rtol=1e-4)


# ---- together ------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_weighted_sum_and_only_the_projector_moves(tmp_path):
    rows = rows_with_words()
    model = tiny_trainable()
    before = weights_of(model)
    trainer = contrastive(tmp_path, model, rows, rows[:6], contrastive_weight=0.7, layers="0,2", max_steps=3, **ALL)
    batch = batch_of(trainer)
    single = {}
    for name, weight in {"contrastive": 0.7, **ALL}.items():
        name = name.removesuffix("_weight")
        states = trainer.aligned_states(trainer.model, trainer.on_device(dict(batch)), [0, 2])
        model.train()
        count = trainer.terms.counts([batch]).get(name, 1)
        single[name] = weight * (trainer.objectives[name][1](states)["loss"] / count).item()
    loss, gradient = loss_and_gradient(trainer, batch)
    assert loss == pytest.approx(sum(single.values()), abs=1e-5) and all(value > 0 for value in single.values())
    assert all(p.grad is None for name, p in model.named_parameters() if "projector." not in name)

    trainer = contrastive(tmp_path, model, rows, rows[:6], contrastive_weight=0.7, layers="0,2", max_steps=3, **ALL)
    trainer.train()
    log = [log for log in trainer.state.log_history if "loss" in log][-1]
    parts = {"contrastive": 0.7, **{name.removesuffix("_weight"): weight for name, weight in ALL.items()}}
    assert log["loss"] == pytest.approx(sum(w * log[f"loss_{name}"] for name, w in parts.items()), abs=1e-4)
    assert log["loss_norm_ratio"] > 0
    metrics, again = trainer.evaluate(), trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(sum(w * metrics[f"eval_loss_{n}"] for n, w in parts.items()), abs=1e-5)
    assert {n: v for n, v in metrics.items() if "loss" in n} == {n: v for n, v in again.items() if "loss" in n}
    for name, value in weights_of(model).items():
        assert torch.equal(value, before[name]) == ("projector." not in name), name


def test_cached_and_computed_frames_give_the_same_terms(tmp_path):
    rows = rows_with_words(4)
    options = {"train": rows, "layers": "0,2", **ALL}
    expected, gradient = loss_and_gradient(trainer := contrastive(tmp_path, **options), batch_of(trainer))
    trainer = contrastive(tmp_path, feature_cache=str(tmp_path), text_state_cache=str(tmp_path), **options)
    batch = batch_of(trainer)
    assert "speech_frames" in batch and "text_states" in batch
    loss, cached_gradient = loss_and_gradient(trainer, batch)
    assert loss == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(cached_gradient, gradient, atol=1e-5, rtol=1e-4)


def one_step(folder, rows, **options):
    """The projector's gradient, and the logged losses, of the first optimiser step."""
    trainer = contrastive(folder, train=rows, max_steps=1, max_grad_norm=0.0, **options)
    trainer.add_callback(watch := Watch(trainer))
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    return watch.gradients[0], {name: value for name, value in log.items() if name.startswith("loss")}


@pytest.mark.parametrize("name", ALL)
def test_a_term_does_not_depend_on_accumulation(tmp_path, name):
    rows = uneven_rows(8)  # all of them are one step
    rows[5] = {**rows[5], "audio": tone(0.3) * 0}  # is set aside: batches differ in their number of rows too
    expected, logs = one_step(tmp_path, rows, per_device_train_batch_size=8, **ALONE, **{name: 2.0})
    assert expected.abs().max() > 1e-3
    for size in (4, 2):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, **ALONE, name: 2.0}
        gradient, split_logs = one_step(tmp_path, rows, **options)
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=0)
        assert split_logs == pytest.approx(logs, abs=1e-5)


def test_terms_do_not_depend_on_chunks(tmp_path):
    options = {"layers": "0,2", "per_device_train_batch_size": 8, **ALL}
    expected, logs = one_step(tmp_path, uneven_rows(8), **options)
    for chunk in (2, 3):
        gradient, chunk_logs = one_step(tmp_path, uneven_rows(8), gradcache_chunk=chunk, **options)
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=0)
        assert chunk_logs == pytest.approx(logs, abs=1e-5)


def test_held_out_terms_do_not_depend_on_the_batch_size(tmp_path):
    rows = uneven_rows(8)
    found = [
        contrastive(tmp_path, train=rows, held_out=rows, per_device_eval_batch_size=size, **ALL).evaluate()
        for size in (8, 3)
    ]
    for name in ALL:
        name = f"eval_loss_{name.removesuffix('_weight')}"
        assert found[0][name] == pytest.approx(found[1][name], abs=1e-5) and found[0][name] > 0


def test_resumption_goes_on_with_the_same_mixtures(tmp_path):
    rows = rows_with_words(16)
    options = {"train": rows, **ALONE, "mixed_weight": 1.0, "max_steps": 6, "learning_rate": 1e-3}
    whole = contrastive(tmp_path / "whole", save_strategy="steps", save_steps=3, **options)
    whole.train()
    resumed = contrastive(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (whole, resumed)]
    assert len(losses[0]) == 6 and losses[0] == losses[1] and len(set(losses[0])) == 6
    for name, value in weights_of(whole.speechllm).items():
        assert torch.equal(value, weights_of(resumed.speechllm)[name]), name


@pytest.mark.parametrize("name", ALL)
def test_what_is_not_finite_is_named_without_the_contrastive_loss_too(tmp_path, name):
    rows = uneven_rows(4)
    rows[1] = aligned_row({**rows[1], "text": "qq zz qq zz qq"}, None)
    trainer = contrastive(tmp_path, train=rows, **ALONE, **{name: 1.0}, mixed_speech_probability=0.01)
    for bad in (torch.nan, torch.inf):
        batch = batch_of(trainer)
        batch["input_values"][2] = bad
        with pytest.raises(ValueError, match=r"speech tokens of items \[2\] of the batch hold NaN.*learning rate"):
            loss_and_gradient(trainer, batch)
    if name == "norm_weight":
        return
    tokenizer = trainer.processing_class.tokenizer
    (letter,) = tokenizer("zz zz", add_special_tokens=False).input_ids[-1:]
    assert not any(letter in tokenizer(row["text"]).input_ids for row in rows if row is not rows[1])
    with torch.no_grad():
        trainer.speechllm.get_input_embeddings().weight[letter] = torch.inf
    side = "transcripts" if name == "distillation_weight" else "speech"
    with pytest.raises(ValueError, match=rf"LLM's states after the {side} of items \[1\] of the batch"):
        loss_and_gradient(trainer, batch_of(trainer))


# ---- what cannot be ------------------------------------------------------------------------------------------------


def test_rows_that_a_term_cannot_use_are_set_aside(tmp_path):
    rows = rows_with_words(8)
    del rows[2]["words"]
    rows[3]["words"] = [{"word": "...", "start": 0.0, "end": 0.1}]
    rows[4]["words"] = [{"word": "one", "start": "0.0"}]
    trainer = contrastive(tmp_path, train=rows, mixed_weight=1.0)
    reasons = {item.id: item.reason for item in trainer.set_aside.values()}
    assert set(reasons) == {"utterance 2", "utterance 3", "utterance 4"}
    assert "only punctuation" in reasons["utterance 3"] and "speechllm align" in reasons["utterance 2"]
    rows = [{**row, "target": "x"} if i else row for i, row in enumerate(tiny_rows(6))]
    trainer = contrastive(tmp_path, train=rows, distillation_weight=1.0, distillation_target="target")
    assert [item.id for item in trainer.set_aside.values()] == ["utterance 0"]
    rows = [{**row, "task": "asr" if i else "juggling"} for i, row in enumerate(tiny_rows(6))]
    trainer = contrastive(tmp_path, train=rows, next_token_weight=1.0)
    assert [item.id for item in trainer.set_aside.values()] == ["utterance 0"]
    assert not contrastive(tmp_path, train=rows, distillation_weight=1.0).set_aside  # has an instruction of its own


def test_proportional_times_are_said_to_be_so(tmp_path, caplog):
    rows = rows_with_words(8)
    for row in rows[:5]:
        row["alignment"] = "forced"
    contrastive(tmp_path, train=rows, held_out=rows, mixed_weight=1.0)
    warnings = [record.message for record in caplog.records if "word times" in record.message]
    assert len(warnings) == 1 and "3 of 8" in warnings[0]
    caplog.clear()
    contrastive(tmp_path, train=rows[:5], mixed_weight=1.0)
    assert "word times" not in caplog.text


def test_settings_that_cannot_be(tmp_path):
    for options, message in (
        ({"next_token_weight": -1.0}, "next_token_weight is -1"),
        ({"norm_weight": float("nan")}, "norm_weight is nan"),
        ({"mixed_speech_probability": 1.0}, "mixed_speech_probability is 1.0"),
        ({"distillation_target": "poem"}, "distillation_target is 'poem'"),
        ({"distillation_direction": "up"}, "distillation_direction is 'up'"),
        ({"distillation_temperature": 0.0}, "distillation_temperature is 0"),
        (ALONE, "nothing to minimise"),
    ):
        with pytest.raises(ValueError, match=message):
            contrastive(tmp_path, **options)
    model = tiny_trainable()
    args = ContrastiveArguments(output_dir=str(tmp_path), next_token_weight=1.0, use_cpu=True)
    with pytest.raises(ValueError, match="next_token_weight needs an LM head"):
        ContrastiveTrainer(model.model, args, tiny_rows(), None, tiny_processor(model.config))


def test_weights_that_several_processes_would_not_share(tmp_path, monkeypatch):
    trainer = contrastive(tmp_path, tiny_trainable(freeze_language_model=False), distillation_weight=1.0)
    trainer.terms.prepare()  # one process
    monkeypatch.setattr(ContrastiveArguments, "world_size", 2)
    contrastive(tmp_path, next_token_weight=1.0).terms.prepare()
    with pytest.raises(ValueError, match="distillation_weight on several processes needs a frozen LLM"):
        trainer.terms.prepare()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("deepspeed", {"zero_stage": 3}, "distillation_weight does not go with ZeRO stage 3. Use FSDP2"),
        ("fsdp", {"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading leaves.*Set it to false"),
    ],
)
def test_weights_that_are_not_there_are_refused_before_any_data_is_read(tmp_path, monkeypatch, name, settings, message):
    create = Trainer.create_accelerator_and_postprocess

    def with_plugin(trainer):
        create(trainer)
        setattr(trainer, f"is_{name}_enabled", True)
        state = type(trainer.accelerator.state)
        monkeypatch.setattr(state, f"{name}_plugin", SimpleNamespace(**settings), raising=False)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", with_plugin)
    with pytest.raises(ValueError, match=message):
        contrastive(tmp_path, distillation_weight=1.0, feature_cache=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_mixed_sequences_agree_with_the_trainer(tmp_path):
    """The placeholders of a mixed prompt are as many as the speech tokens that are put there, whatever is chosen."""
    rows = rows_with_words(8)
    trainer = contrastive(tmp_path, train=rows, **ALONE, mixed_weight=1.0)
    placeholder = trainer.headless.config.audio_token_id
    for row in rows:
        _, words = trainer.train_dataset.further["words"](row, frames_of(trainer.processing_class, row))
        count = trainer.processing_class.count_speech_tokens(len(row["audio"]))
        for spoken in ([True, True], [True, False], [False, True]):
            sequence = mixed_sequence(words, spoken, placeholder)
            assert all(0 <= token < count for token in sequence.speech)


@pytest.mark.slow
def test_two_processes_share_the_gradient_of_every_term(tmp_path):
    """Two processes with a batch each end at the weights of one process that accumulates both batches."""
    speech, llm = save_base_models(tmp_path)
    lines = []
    for i, row in enumerate(rows_with_words(4)):
        soundfile.write(tmp_path / f"{i}.wav", row.pop("audio"), 16_000)
        lines.append(json.dumps({**row, "audio": f"{i}.wav"}))
    (tmp_path / "four.jsonl").write_text("\n".join(lines))
    settings = {"speech_model": speech, "text_model": llm, "train_data": str(tmp_path / "four.jsonl"), "contrastive_weight": 0,
                "projector": json.dumps({"dropout": 0.0, "hidden_size": 32, "num_attention_heads": 2,
                                         "num_hidden_layers": 1, "intermediate_size": 48, "num_queries": 2}),
                "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "length_window": 0, "seed": 3,
                "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
                "dataloader_pin_memory": False, **ALL}  # fmt: skip
    options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    command = ["-m", "speechllm", "pretrain", *options]
    runs = {
        "two": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command],
        "one": [sys.executable, *command, "--gradient_accumulation_steps", "2"],
    }
    for name, run in runs.items():
        done = subprocess.run(
            [*run, "--output_dir", str(tmp_path / name)],
            capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    weights = [load_file(tmp_path / name / "projector.safetensors") for name in runs]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], atol=1e-5, rtol=0, msg=name)
