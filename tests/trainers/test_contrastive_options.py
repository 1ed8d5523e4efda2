"""Options of the contrastive term: weights and temperature, position shift, negatives from beyond the batch."""

import math

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import batch_of, contrastive, loss_and_gradient, tiny_rows, tiny_trainable, weights_of

from speechllm import CheckpointError
from speechllm.data.feature_cache import FeatureCache, text_key
from speechllm.objectives import layerwise_contrastive_loss
from speechllm.trainers.negatives import HardNegatives, TrainingTexts, extra_texts


RESUMED = {
    "max_steps": 5,
    "per_device_train_batch_size": 4,
    "learning_rate": 3e-2,
    "warmup_steps": 0,
    "save_strategy": "steps",
    "save_steps": 3,
    "layers": "0,2",
}


def logs_of(trainer):
    return [log for log in trainer.state.log_history if "loss" in log]


def test_the_temperature_and_the_layers_weights_are_learned_and_resumed(tmp_path):
    options = {**RESUMED, "temperature_learned": True, "layer_weights": "learned"}
    whole = contrastive(tmp_path / "whole", **options)
    whole.train()
    logs = logs_of(whole)
    assert logs[0]["temperature"] == pytest.approx(0.1) and logs[0]["weight_layer_2"] == pytest.approx(1)
    assert logs[4]["temperature"] != pytest.approx(0.1, rel=1e-2)
    assert all(0.1 <= log[f"weight_layer_{layer}"] <= 10 for log in logs for layer in (0, 2))
    assert len({log["weight_layer_0"] for log in logs}) == 5
    assert logs[1]["loss"] == pytest.approx(
        sum(logs[1][f"weight_layer_{l}"] * logs[1][f"loss_layer_{l}"] - math.log(logs[1][f"weight_layer_{l}"]) / 2 for l in (0, 2)),  # noqa: E741
        abs=1e-3,
    )  # fmt: skip
    resumed = contrastive(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, value in whole.scalars.parameters.items():
        assert torch.equal(value, resumed.scalars.parameters[name]), name
    assert logs_of(resumed)[-1]["loss"] == pytest.approx(logs[-1]["loss"], abs=1e-6)

    saved = load_file(tmp_path / "whole" / "checkpoint-3" / "loss_scalars.safetensors")
    assert {name for name in saved if "." not in name} == {"log_temperature", "log_variance_0", "log_variance_2"}
    again = contrastive(tmp_path / "again", **options)
    again.scalars.load(str(tmp_path / "whole" / "checkpoint-3"))
    moments = [again.scalars.optimizer.state[value] for value in again.scalars.parameters.values()]
    assert all(state["step"] == 3 and state["exp_avg_sq"] > 0 for state in moments) and len(moments) == 3
    whole.save_model(str(tmp_path / "published"))
    assert not list((tmp_path / "published").glob("loss_scalars*"))
    plain = contrastive(tmp_path / "other", **{**options, "layer_weights": None})
    with pytest.raises(
        CheckpointError, match=r"holds the learned scalars .*log_variance_0.* ask for \['log_temperature'\]"
    ):
        plain.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))


def test_learned_scalars_stay_in_bounds(tmp_path):
    trainer = contrastive(
        tmp_path, temperature_learned=True, layer_weights="learned", learning_rate=10.0, warmup_steps=0, max_steps=1
    )
    trainer.train()
    assert trainer.scalars.log_temperature.exp().item() == pytest.approx(0.01) or trainer._temperature() > 1
    assert all(0.0999 <= w.item() <= 10.001 for w in trainer.scalars.weights(trainer.all_layers).values())


def test_layer_weights_are_given_and_ramp_up(tmp_path):
    trainer = contrastive(tmp_path, layers="0,2", layer_weights="2:0.25")
    loss, _ = loss_and_gradient(trainer, batch_of(trainer))
    logs = {"loss": 0.0}
    trainer.log(logs)
    assert loss == pytest.approx(logs["loss_layer_0"] + 0.25 * logs["loss_layer_2"], abs=1e-5)
    trainer = contrastive(tmp_path, layer_schedule="0:emb 10:0,2 20:2,3", layer_ramp=4, layer_weights="2:2")
    for step, expected in (
        (0, {0: 1}),
        (10, {0: 1, 2: 0.5}),
        (12, {0: 1, 2: 1.5}),
        (13, {0: 1, 2: 2}),
        (19, {0: 1, 2: 2}),
        (20, {2: 2, 3: 0.25}),
        (30, {2: 2, 3: 1}),
    ):
        assert trainer.layer_weights_at(step, trainer.layers_at(step)) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["llama-tied", "gpt2"])
def test_both_sides_are_shifted_by_the_same_random_offset(tmp_path, text):
    trainer = contrastive(tmp_path, tiny_trainable(text), layers="0,2", position_shift=400)
    trainer.speechllm.train()
    seen = []
    trainer.headless.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    shifts = []
    for step in (0, 0, 1):
        trainer.state.global_step = step
        loss_and_gradient(trainer, batch_of(trainer))
        (text_shift, *_), (speech_shift, *_) = (positions[0].tolist() for positions in seen[-2:])
        assert text_shift == speech_shift < 400
        assert (seen[-1].diff(dim=-1) == 1).all() and seen[-1].shape[0] == 4
        shifts.append(text_shift)
    assert shifts[0] == shifts[1] != shifts[2]
    plain = contrastive(tmp_path, tiny_trainable(text), layers="0,2")
    expected, gradient = loss_and_gradient(plain, batch_of(plain))
    loss, shifted = loss_and_gradient(trainer, batch_of(trainer))
    relative = "llama" in text  # rotary positions: only distances matter, up to rounding
    assert (abs(loss - expected) < 1e-4) == relative
    trainer.speechllm.eval()
    seen.clear()
    trainer.aligned_states(trainer.model, trainer.on_device(batch_of(trainer)), [0, 2])
    assert seen == [None, None]  # evaluation is not shifted


# ---- negatives -----------------------------------------------------------------------------------------------------

TEXTS = [
    "the train leaves at noon",  # 0
    "The train leaves at noon!",  # 0 again
    "the train leaves at noon today",  # 1, nearly 0
    "a locomotive departs at midday",  # 2, means 0
    "bread and butter",  # 3
    "salt and pepper",  # 4
    "green grass grows",  # 5
]


@pytest.fixture
def texts(tmp_path):
    cache = FeatureCache(tmp_path, {})
    vectors = {
        0: [1, 0, 0, 0],
        2: [0.9, 0.1, 0, 0],
        3: [0.98, 0.02, 0, 0.1],
        4: [0.3, 1, 0, 0],
        5: [0.1, 1, 0.3, 0],
        6: [0, 0, 1, 1],
    }
    for row, vector in vectors.items():
        tokens = torch.tensor([vector, vector]).float() + torch.tensor([[0.1], [-0.1]])
        cache.put(text_key(TEXTS[row]), {"layer_0": -tokens, "layer_3": tokens})
    return TrainingTexts(TEXTS, [text.lower().strip("!") for text in TEXTS], cache)


def test_texts_are_counted_once(texts):
    assert len(texts) == 6 and texts.of_row == [0, 0, 1, 2, 3, 4, 5]
    states, mask = texts.of([2, 5], [0, 3], torch.device("cpu"))
    assert states[3].shape == (2, 2, 4) and mask.all() and torch.equal(states[0], -states[3])


def test_drawn_texts_are_never_of_the_batch_and_depend_on_the_seed(texts):
    draws = [texts.draw(3, {0, 4}, str(seed)) for seed in range(50)]
    assert all(len(set(drawn)) == 3 and not {0, 4} & set(drawn) for drawn in draws)
    assert {number for drawn in draws for number in drawn} == {1, 2, 3, 5}
    assert texts.draw(3, {0, 4}, "7") == draws[7]
    assert sorted(texts.draw(100, {0}, "")) == [1, 2, 3, 4, 5]


def test_mined_texts_are_the_nearest_that_are_allowed(texts):
    hard = HardNegatives(texts, 2, 3, refresh=10, maximum_similarity=0.95, device=torch.device("cpu"))
    # Row 0: text 1 shares its words and text 2 its meaning; of the others, 3 is nearest, then 4.
    assert hard.of([0], 0) == [3, 4] and hard.of([0, 1], 0) == [3, 4]
    assert hard.of([4], 0)[0] == 4
    hard.remember(0, torch.tensor([0.0, 0.0, 3.0, 3.0]))  # its speech sounds like text 5
    assert hard.of([0], 9) == [3, 4]  # not searched again yet
    assert hard.of([0], 10)[0] == 5
    assert hard.of([1], 10) == [3, 4]
    loose = HardNegatives(texts, 2, 3, refresh=10, maximum_similarity=1.0, device=torch.device("cpu"))
    assert loose.of([0], 0) == [2, 3]
    many = HardNegatives(texts, 9, 3, refresh=10, maximum_similarity=0.95, device=torch.device("cpu"))
    assert set(many.of([0], 0)) == {3, 4, 5}

    extra = extra_texts(texts, [1, 2, 3], [0, 4], [3], torch.device("cpu"), hard)
    assert extra.allowed.tolist() == [[False, True], [False, True], [True, False]]
    extra = extra_texts(texts, [1, 2, 3], [0, 4], [3], torch.device("cpu"))
    assert extra.allowed.tolist() == [[False, True], [True, True], [True, False]]


def test_the_search_is_exact(tmp_path):
    cache, generator = FeatureCache(tmp_path, {}), torch.Generator().manual_seed(0)
    words = ["".join(chr(97 + (i * k) % 26) for k in (1, 3, 7, 11)) + str(i) for i in range(60)]
    states = torch.randn(60, 8, generator=generator)
    for word, state in zip(words, states):
        cache.put(text_key(word), {"layer_1": state[None]})
    hard = HardNegatives(TrainingTexts(words, words, cache), 5, 1, 10, 0.6, torch.device("cpu"))
    hard.search(block=7)
    unit = torch.nn.functional.normalize(states, dim=-1)
    centred = torch.nn.functional.normalize(unit - unit.mean(0), dim=-1)
    for row in range(60):
        allowed = [j for j in range(60) if j != row and centred[row] @ centred[j] <= 0.6]
        nearest = sorted(allowed, key=lambda j: -float(unit[row] @ unit[j]))[:5]
        assert hard.mined[row].tolist() == nearest


def test_negatives_from_beyond_the_batch_are_in_the_loss_and_resumed(tmp_path):
    rows = tiny_rows(24)
    options = {**RESUMED, "symmetric": True, "text_state_cache": str(tmp_path / "cache")}
    options.update(text_bank=3, hard_negatives=2, hard_negatives_refresh=2)
    trainer = contrastive(tmp_path / "run", train=rows, **options)
    loss, _ = loss_and_gradient(trainer, batch_of(trainer))
    plain = contrastive(tmp_path / "run", train=rows, **{**options, "text_bank": 0, "hard_negatives": 0})
    batch = plain.on_device(batch_of(plain))
    states = plain.aligned_states(plain.model, batch, [0, 2])
    negatives = trainer.further_negatives
    texts = negatives.texts
    present = {texts.of_row[row] for row in range(4)}
    numbers = texts.draw(3, present, "bank 42 0 [0, 1, 2, 3]")
    numbers += [n for n in negatives.hard.of([0, 1, 2, 3], 0) if n not in present.union(numbers)]
    assert len(numbers) > 3
    extra = extra_texts(texts, numbers, [0, 1, 2, 3], [0, 2], torch.device("cpu"), negatives.hard)
    sides = (states.text, states.text_mask, states.speech, states.speech_mask)
    expected = layerwise_contrastive_loss(*sides, symmetric=True, extra_texts=extra)["loss"].item()
    assert loss == pytest.approx(expected, abs=1e-5)
    assert loss > layerwise_contrastive_loss(*sides, symmetric=True)["loss"].item() + 0.1

    whole = contrastive(tmp_path / "whole", train=rows, **options)
    whole.train()
    assert all(3 < log["extra_texts"] <= 11 for log in logs_of(whole))
    assert whole.further_negatives.hard.seen.sum() == 20 and int(whole.further_negatives.hard.searches) == 3
    resumed = contrastive(tmp_path / "resumed", train=rows, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, value in weights_of(resumed.speechllm).items():
        torch.testing.assert_close(value, whole.speechllm.state_dict()[name], atol=1e-6, rtol=0, msg=name)
    for name in ("speech", "seen", "mined", "searches"):
        assert torch.equal(
            getattr(resumed.further_negatives.hard, name), getattr(whole.further_negatives.hard, name)
        ), name
    other = contrastive(tmp_path / "other", train=rows[:20], **options)
    with pytest.raises(CheckpointError, match="no mined negatives of this training set"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))


def test_settings_that_cannot_be(tmp_path):
    cache = {"text_state_cache": str(tmp_path)}
    for options, message in (
        ({"text_bank": 4}, "text_bank takes the texts' states from a cache: set text_state_cache"),
        ({"hard_negatives": 4, "symmetric": True}, "hard_negatives takes .* set text_state_cache"),
        ({"text_bank": 4, **cache}, "no effect on the text-to-speech direction.*set symmetric"),
        ({"position_shift": 400, **cache}, "Leave one out"),
        ({"gradcache_chunk": -1}, "gradcache_chunk is -1"),
        ({"layer_ramp": -1}, "layer_ramp is -1"),
        ({"layer_weights": "5"}, "layer_weights is '5'"),
        ({"layer_weights": "all:0.5"}, "layer_weights is 'all:0.5'"),
        ({"layer_weights": "9:1"}, "layers from 0 to 3"),
        ({"hard_negatives_refresh": 0}, "at least 1"),
        ({"hard_negatives_similarity": 2.0}, "it is a cosine"),
        ({"hard_negatives": 1, "hard_negatives_layer": 1, "layers": "0,2", "symmetric": True, **cache}, "one of those aligned"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            contrastive(tmp_path, **options)


@pytest.mark.parametrize(
    ("metric", "more"), [("loss_next_token", False), ("eval_loss_layer_2", False), ("recall@1_mean", True)]
)
def test_the_best_checkpoint_has_the_least_of_any_loss(tmp_path, metric, more):
    assert contrastive(tmp_path, metric_for_best_model=metric).args.greater_is_better is more
