"""Contrastive pretraining: it learns, moves the projector only, runs no layer too many, and weighs every batch right."""

import json
from collections import Counter

import pytest
import torch
from tiny import tiny_processor, tiny_tokenizer, tone
from tiny_training import (
    batch_of,
    contrastive,
    gradient_of,
    loss_and_gradient,
    tiny_rows,
    tiny_trainable,
    weights_of,
)
from transformers import TrainerCallback, set_seed

from speechllm import AudioError
from speechllm.data.prompts import shared_prefix
from speechllm.objectives import cosine_similarity_matrix, layerwise_contrastive_loss
from speechllm.trainers import contrastive_trainer, held_out


class LayerCalls:
    """Counts the forward passes of each layer of an LLM."""

    def __init__(self, model):
        self.count = [0] * len(model.model.llm_layers)
        for i, layer in enumerate(model.model.llm_layers):
            layer.register_forward_hook(lambda *args, i=i: self.add(i))

    def add(self, i):
        self.count[i] += 1


def test_training_learns_and_only_the_projector_moves(tmp_path):
    model = tiny_trainable()
    before = weights_of(model)
    rows = tiny_rows(16)
    trainer = contrastive(
        tmp_path,
        model,
        rows,
        rows,
        layers="0,2",
        max_steps=100,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        logging_steps=20,
        feature_cache=str(tmp_path / "cache"),
        text_state_cache=str(tmp_path / "cache"),
    )
    modes = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            body = model.model
            modes.append((body.projector.training, body.speech_encoder.training, body.language_model.training))

    trainer.add_callback(Watch())
    untrained = trainer.evaluate()
    trainer.train()
    trained = trainer.evaluate()

    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[-1]["loss"] < 0.5 * logs[0]["loss"]
    assert logs[-1]["loss"] == pytest.approx(logs[-1]["loss_contrastive"], abs=1e-4)
    assert logs[-1]["loss_layer_0"] + logs[-1]["loss_layer_2"] == pytest.approx(logs[-1]["loss_contrastive"], abs=1e-5)
    assert untrained["eval_recall@1_mean"] < 0.4 < 0.8 < trained["eval_recall@1_mean"]
    assert trained["eval_loss"] < untrained["eval_loss"]
    for name in ("recall@1_layer_0", "recall@5_layer_2", "text_to_speech_recall@1_layer_0", "mean_rank_layer_2",
                 "recall@5_mean", "loss_layer_0", "loss_layer_2", "loss"):  # fmt: skip
        assert f"eval_{name}" in trained
    assert set(modes) == {(True, False, False)}
    after = weights_of(model)
    for name, value in after.items():
        assert torch.equal(value, before[name]) == ("projector." not in name), name


@pytest.mark.parametrize(("layers", "expected"), [("emb", [0, 0, 0]), ("0,1", [2, 0, 0]), ("2", [2, 2, 0])])
def test_no_layer_runs_beyond_the_last_one_used(tmp_path, layers, expected):
    trainer = contrastive(tmp_path, layers=layers)
    calls = LayerCalls(trainer.speechllm)
    loss_and_gradient(trainer, batch_of(trainer))
    assert calls.count == expected  # once for speech, once for text
    assert (trainer.llm_tokens > 0) == any(expected)


def test_the_schedule_switches_layers_at_its_step(tmp_path):
    trainer = contrastive(tmp_path, layer_schedule="0:emb 2:0,2", max_steps=4)
    calls, seen = LayerCalls(trainer.speechllm), []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(calls.count[1])

    trainer.add_callback(Watch())
    trainer.train()
    assert seen == [0, 0, 2, 4]
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert ["loss_layer_2" in log for log in logs] == [False, False, True, True]


def first_step_gradient(trainer):
    """Train one step; return the gradient that the optimiser saw."""
    found = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            found.append(gradient_of(trainer.speechllm).clone())

    trainer.add_callback(Watch())
    trainer.train()
    return found[0]


def test_accumulation_averages_the_gradients_of_its_batches(tmp_path):
    options = {"max_steps": 1, "max_grad_norm": 0.0, "warmup_steps": 0}
    whole = first_step_gradient(contrastive(tmp_path, gradient_accumulation_steps=3, **options))

    trainer = contrastive(tmp_path, **options)
    batches = [batch for batch, _ in zip(trainer.get_train_dataloader(), range(3))]
    parts = [loss_and_gradient(trainer, batch)[1] for batch in batches]
    torch.testing.assert_close(whole, torch.stack(parts).mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("similarity", [None, lambda *states: 0.5 * cosine_similarity_matrix(*states)])
def test_cached_and_computed_states_give_the_same_loss(tmp_path, similarity):
    options = {"similarity": similarity, "layers": "0,1,3"}  # a similarity of one's own gets states of every token
    plain = contrastive(tmp_path, **options)
    cached = contrastive(tmp_path, feature_cache=str(tmp_path), text_state_cache=str(tmp_path), **options)
    batch = batch_of(cached)
    assert "speech_frames" in batch and "input_values" not in batch
    assert batch["text_states"]["layer_1"].shape[1] == (
        1 if similarity is None else batch["text_input_ids"].shape[1] - 6
    )
    calls = LayerCalls(cached.speechllm)
    loss, gradient = loss_and_gradient(cached, batch)
    assert calls.count == [1, 1, 1]  # speech only
    expected, expected_gradient = loss_and_gradient(plain, batch_of(plain))
    assert loss == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bf16", [False, True])
def test_caches_are_filled_in_the_precision_of_training(tmp_path, bf16):
    """fp32 weights, under autocast or not. (In bf16 an utterance's states vary in the last bit with its batch.)"""

    def first_loss(**caches):
        trainer = contrastive(tmp_path, layers="0,1,3", max_steps=1, bf16=bf16, **caches)
        trainer.train()
        return trainer.state.log_history[0]["loss_contrastive"]

    expected = first_loss()
    for caches in ({"feature_cache": str(tmp_path)}, {"text_state_cache": str(tmp_path)}):
        assert first_loss(**caches) == pytest.approx(expected, abs=1e-4 if bf16 else 1e-5)


def test_the_tokens_of_cached_texts_count_once_however_warm_the_cache(tmp_path):
    rows = [*tiny_rows(6), {**tiny_rows(1)[0], "id": "said again"}]
    for layers in ("0,2", "0,2", "0"):  # cold, warm, and without any layer of the LLM
        trainer = contrastive(
            tmp_path, train=rows, held_out=tiny_rows(4, 8), layers=layers, text_state_cache=str(tmp_path)
        )
        tokenize = trainer.processing_class.tokenizer
        ids = [tokenize(row["text"], add_special_tokens=False).input_ids for row in rows[:6]]
        assert trainer.llm_tokens == (sum(len(trainer.prefix) + len(text) for text in ids) if layers == "0,2" else 0)
    trainer = contrastive(tmp_path, train=rows, layers="0,2", max_steps=1, text_state_cache=str(tmp_path))
    before, batch = trainer.llm_tokens, batch_of(trainer)
    trainer.compute_loss(trainer.model, dict(batch))
    assert trainer.llm_tokens == before + batch["attention_mask"].sum()  # the speech side


def test_the_loss_is_the_objective_of_separate_passes(tmp_path):
    trainer = contrastive(tmp_path, layers="0,3", symmetric=True, temperature=0.5)
    model, processor = trainer.speechllm, trainer.processing_class
    prefix = processor.tokenizer("<|im_start|>user\n").input_ids
    assert trainer.prefix == prefix
    text, speech = {0: [], 3: []}, {0: [], 3: []}
    with torch.no_grad():
        for row in tiny_rows(4):
            table = model.get_input_embeddings()
            start = table(torch.tensor([prefix]))
            sides = {
                "text": table(torch.tensor([processor.tokenizer(row["text"]).input_ids])),
                "speech": model.get_audio_features(
                    **processor.pad_features(processor.extract_features(row["audio"]))
                ).pooler_output[None],
            }
            for side, embeddings in sides.items():
                both = torch.cat([start, embeddings], 1)
                states = model.model(inputs_embeds=both, layers=[0, 3]).layer_states
                for layer in (0, 3):
                    (text if side == "text" else speech)[layer].append(states[layer][0, len(prefix) :])

    def pad(states):
        return {layer: torch.nn.utils.rnn.pad_sequence(values, batch_first=True) for layer, values in states.items()}

    def mask(states):
        return torch.nn.utils.rnn.pad_sequence([torch.ones(len(s)) for s in states[0]], batch_first=True).bool()

    expected = layerwise_contrastive_loss(
        pad(text), mask(text), pad(speech), mask(speech), temperature=0.5, symmetric=True
    )["loss"]
    loss, _ = loss_and_gradient(trainer, batch_of(trainer))
    assert loss == pytest.approx(expected.item(), abs=1e-4)


def test_a_further_objective_adds_its_term(tmp_path):
    seen = []

    def size(states):
        seen.append(states)
        value = states.speech_tokens.square().mean()
        return {"loss": value, "layer_0": 2 * value}

    plain = loss_and_gradient(contrastive(tmp_path), batch_of(contrastive(tmp_path)))[0]
    trainer = contrastive(tmp_path, objectives={"size": (0.3, size)}, max_steps=1)
    loss, _ = loss_and_gradient(trainer, batch_of(trainer))
    assert loss == pytest.approx(plain + 0.3 * seen[0].speech_tokens.square().mean().item(), abs=1e-5)
    trainer = contrastive(tmp_path, objectives={"size": (0.3, size)}, max_steps=1)
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert log["loss"] == pytest.approx(log["loss_contrastive"] + 0.3 * log["loss_size"], abs=1e-4)
    assert log["loss_size_layer_0"] == pytest.approx(2 * log["loss_size"], abs=1e-5)  # not mixed up with `loss_layer_0`
    alone = contrastive(tmp_path, held_out=tiny_rows(5), objectives={"size": (0.3, size)}, contrastive_weight=0)
    seen.clear()
    metrics = alone.evaluate()
    sizes = [len(states.text_mask) * states.speech_tokens.square().mean().item() for states in seen]
    assert len(sizes) == 2 and metrics["eval_loss_size"] == pytest.approx(sum(sizes) / 5, abs=1e-5)
    assert metrics["eval_loss"] == pytest.approx(0.3 * metrics["eval_loss_size"], abs=1e-6)


@pytest.mark.parametrize("similarity", ["cosine", "wasserstein"])
def test_a_held_out_set_is_compared_block_by_block(tmp_path, monkeypatch, similarity):
    """With the loss and the similarities of all pairs at once, padded."""
    blocks, compare = [], held_out.layer_similarities

    def noted(similarity, text, speech):
        blocks.append((len(text[1]), len(speech[1])))
        return compare(similarity, text, speech)

    monkeypatch.setattr(held_out, "BLOCK", 3)
    monkeypatch.setattr(held_out, "layer_similarities", noted)
    trainer = contrastive(tmp_path, held_out=tiny_rows(7), similarity=similarity, layers="0,2", symmetric=True)
    metrics = trainer.evaluate()
    assert len(blocks) == 9 and max(map(max, blocks)) == 3
    rows, states = trainer.held_out_states()
    assert [row["id"] for row in rows] == [f"utterance {i}" for i in range(7)]
    expected = layerwise_contrastive_loss(
        states.text, states.text_mask, states.speech, states.speech_mask, similarity=similarity, symmetric=True
    )
    for name, value in expected.items():
        assert metrics[f"eval_{name.replace('layer', 'loss_layer')}"] == pytest.approx(value.item(), abs=1e-5)
    for layer, matrix in trainer.similarity_matrices(states).items():
        torch.testing.assert_close(trainer.held_out_similarity[layer], matrix, atol=1e-5, rtol=0)


def test_held_out_pairs_that_are_not_finite_are_named(tmp_path, monkeypatch):
    compare = contrastive_trainer.held_out_matrices

    def broken(*arguments):
        matrices = compare(*arguments)
        next(iter(matrices.values()))[2, 2] = torch.nan
        return matrices

    monkeypatch.setattr(contrastive_trainer, "held_out_matrices", broken)
    with pytest.raises(ValueError, match=r"held-out pairs at layer 0 are not finite: \['utterance 2'\]"):
        contrastive(tmp_path, held_out=tiny_rows(5)).evaluate()


def test_equal_transcripts_never_share_a_batch(tmp_path):
    rows = [{**row, "text": ["Yes.", "yes", "no", "maybe", "never"][i % 5]} for i, row in enumerate(tiny_rows(20))]
    trainer = contrastive(tmp_path, train=rows)
    for batch in trainer.get_train_dataloader():
        texts = [rows[i]["text"].lower().strip(".") for i in batch["rows"]]
        assert len(set(texts)) == 4


# ---- utterances that cannot be used --------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
def test_unusable_utterances_are_set_aside_and_listed(tmp_path, cached):
    rows = tiny_rows(16)
    rows[2]["audio"] = tone(0.2) * 0  # silent
    rows[5]["audio"] = str(tmp_path / "nowhere.wav")
    rows[7]["text"] = " "
    held_out = tiny_rows(5, first=16)
    held_out[1]["audio"] = tone(0.2)[:3]
    options = {"feature_cache": str(tmp_path / "cache")} if cached else {}
    trainer = contrastive(tmp_path, train=rows, held_out=held_out, max_steps=8, **options)
    trainer.train()
    metrics = trainer.evaluate()
    names = {item.id for item in trainer.set_aside.values()}
    assert names == {"utterance 2", "utterance 5", "utterance 7", "utterance 17"}
    listed = (tmp_path / "set_aside.jsonl").read_text()
    kinds = Counter(json.loads(line)["kind"] for line in listed.splitlines())
    assert kinds == {"audio cannot be decoded": 3, "lacks what this training needs": 1}
    for word in ("silent", "nowhere.wav", "`text`", "too short"):
        assert word in listed
    assert metrics["eval_recall@5_mean"] == 1  # 4 are left


def test_a_batch_of_unusable_utterances_leaves_no_trace_in_gradient_and_log(tmp_path):
    rows = tiny_rows(8)
    for row in rows[:4]:
        row["audio"] = torch.full((3200,), float("nan"))
    trainer = contrastive(tmp_path, train=rows)
    batch = batch_of(trainer, range(4))
    assert len(batch["set_aside"]) == 4 and batch["rows"] == [4]
    loss, gradient = loss_and_gradient(trainer, batch)
    assert loss == 0 and gradient.abs().max() == 0
    expected, _ = loss_and_gradient(trainer, batch_of(trainer, range(4, 8)))
    logs = {"loss": 0.0}
    trainer.log(logs)
    assert logs["loss_contrastive"] == pytest.approx(expected, abs=1e-5)


def test_nothing_usable_is_an_error_that_says_why(tmp_path):
    rows = [{**row, "audio": tone(0.2) * 0} for row in tiny_rows(4)]
    with pytest.raises(ValueError, match=r"None of the 4 utterances can be used.*silent"):
        contrastive(tmp_path, train=rows).train()
    with pytest.raises(ValueError, match="nothing to train on.*silent"):
        contrastive(tmp_path, train=rows, feature_cache=str(tmp_path)).train()
    with pytest.raises(ValueError, match="nothing to train on.*no `text`"):
        contrastive(tmp_path, train=[{"audio": tone(0.2)}]).train()
    with pytest.raises(ValueError, match="can be used"):
        contrastive(tmp_path, held_out=rows).evaluate()
    assert issubclass(AudioError, ValueError)


def test_settings_that_cannot_be(tmp_path):
    for options, message in (
        ({"layers": "some"}, "layers is 'some'"),
        ({"layers": "0,9"}, "indices from 0 to 3"),
        ({"layer_schedule": "5:emb"}, "begin at step 0"),
        ({"layer_schedule": "0:emb 0:all"}, "same step"),
        ({"temperature": 0.0}, "above 0"),
        ({"layers": "0,3", "layer_weights": "2:5"}, r"names layer 2, which is not aligned; \[0, 3\] are"),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, "accumulation adds none"),
    ):
        with pytest.raises(ValueError, match=message):
            contrastive(tmp_path, **options)
    for config in ({"freeze_language_model": False}, {"frozen_in_train_mode": True}):
        with pytest.raises(ValueError, match="text_state_cache needs"):
            contrastive(tmp_path, tiny_trainable(**config), text_state_cache=str(tmp_path))
    for config in ({"freeze_speech_encoder": False}, {"frozen_in_train_mode": True}):
        with pytest.raises(ValueError, match="feature_cache needs"):
            contrastive(tmp_path, tiny_trainable(**config), feature_cache=str(tmp_path))


# ---- the shared prefix ---------------------------------------------------------------------------------------------

QWEN3_LIKE = (  # an empty thought goes before the last answer only, as in Qwen 3
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
)
GEMMA_LIKE = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + ('model' if m.role == 'assistant' else m.role) + ']\n' + "
    "m.content | trim + '[end]\n' }}{% endfor %}"
)
SYSTEM = "{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}"


@pytest.mark.parametrize(
    ("template", "bos", "expected"),
    [
        (None, True, "<|im_start|>user\n"),
        (QWEN3_LIKE, False, "<|im_start|>user\n"),
        (SYSTEM + QWEN3_LIKE, True, "<|im_start|>user\n"),
        (GEMMA_LIKE, True, "<|im_start|>[user]\n"),
    ],
)
def test_the_automatic_prefix_is_the_opening_of_a_user_turn(template, bos, expected):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    if not bos:
        tokenizer.bos_token = None
    processor = tiny_processor(tiny_trainable().config, tokenizer)
    assert tokenizer.decode(shared_prefix("auto", processor)) == expected
    assert shared_prefix("", processor) == []
    assert tokenizer.decode(shared_prefix("Hear: ", processor)) == "Hear: "
    if bos:
        assert shared_prefix("bos", processor) == [tokenizer.bos_token_id]
    else:
        with pytest.raises(ValueError, match="no such token"):
            shared_prefix("bos", processor)


def test_equal_seeds_give_equal_weights(tmp_path):
    found = []
    for seed in (3, 3, 4):
        set_seed(seed)
        model = tiny_trainable(dropout=0.1)
        set_seed(seed)
        contrastive(tmp_path, model, seed=seed, max_steps=3).train()
        found.append(weights_of(model.model.projector))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert any(not torch.equal(value, found[2][name]) for name, value in found[0].items())
