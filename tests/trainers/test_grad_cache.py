"""GradCache: chunks give the gradient of the whole batch, dropout and all."""

import numpy as np
import pytest
import torch
from tiny import tone
from tiny_training import batch_of, contrastive, gradient_of, tiny_rows, tiny_trainable
from two_processes import late_interaction, scale

from speechllm.objectives import layerwise_contrastive_loss
from speechllm.trainers.grad_cache import split_batch, two_pass_backward


def stepped(trainer, seed=0):
    """The loss that a training step reports for eight rows, and the projector's gradient."""
    trainer.current_gradient_accumulation_steps = 1
    trainer.speechllm.zero_grad()
    batch = batch_of(trainer, range(8))
    torch.manual_seed(seed)
    loss = trainer.training_step(trainer.model, batch)
    return loss.item(), gradient_of(trainer.speechllm)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("similarity", [None, late_interaction, "wasserstein"])
def test_chunks_give_the_gradient_of_the_whole_batch(tmp_path, similarity, cached):
    options = {"similarity": similarity, "layers": "0,2", "symmetric": True, "objectives": {"scale": (0.1, scale)}}
    if cached:
        options.update(feature_cache=str(tmp_path), text_state_cache=str(tmp_path))
    expected, expected_gradient = stepped(contrastive(tmp_path, **options))
    for size in (1, 3, 8):
        loss, gradient = stepped(contrastive(tmp_path, gradcache_chunk=size, **options))
        assert loss == pytest.approx(expected, abs=1e-5)
        assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


def test_both_passes_of_a_chunk_drop_the_same(tmp_path):
    trainer = contrastive(tmp_path, tiny_trainable(dropout=0.3), gradcache_chunk=4, layers="0,2")
    loss, gradient = stepped(trainer, seed=3)

    # The same by hand: each chunk drops what the generator says when its first pass begins.
    trainer.speechllm.zero_grad()
    batch = trainer.on_device(batch_of(trainer, range(8)))
    torch.manual_seed(3)
    parts = [
        trainer.aligned_states(trainer.model, chunk, [0, 2]) for chunk in split_batch(batch, 4, trainer.model.config)
    ]
    joined = {layer: torch.cat([part.speech[layer] for part in parts]) for layer in (0, 2)}
    text = {layer: torch.cat([part.text[layer] for part in parts]) for layer in (0, 2)}
    masks = [torch.cat([getattr(part, side) for part in parts]) for side in ("text_mask", "speech_mask")]
    expected = layerwise_contrastive_loss(text, masks[0], joined, masks[1])["loss"]
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    torch.testing.assert_close(gradient, gradient_of(trainer.speechllm), atol=1e-5, rtol=1e-4)
    assert stepped(trainer, seed=4)[0] != pytest.approx(loss, abs=1e-4)  # there is dropout


def test_both_passes_of_a_chunk_mask_the_same_frames():
    """SpecAugment draws from NumPy's generator."""
    parameter = torch.ones(3, requires_grad=True)

    def encode(chunk):
        return parameter * float(np.random.rand()) * chunk["x"]

    np.random.seed(0)
    seen = []
    two_pass_backward([{"x": torch.ones(1, 3)}] * 2, lambda chunk: (seen.append(encode(chunk)), seen[-1])[1],
                      lambda output: [output], lambda states: states[0].sum())  # fmt: skip
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3]) and not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("speech", ["hubert-layer", "whisper"])
def test_an_utterance_keeps_its_segments(tmp_path, speech):
    rows = tiny_rows(5)
    rows[1]["audio"], rows[4]["audio"] = tone(0.7, seed=1), tone(0.5, seed=2)
    trainer = contrastive(tmp_path, tiny_trainable(speech=speech), rows)
    trainer.processing_class.segment_seconds = 0.3
    batch = batch_of(trainer, range(5))
    audio = next(name for name in ("input_values", "input_features") if name in batch)
    assert len(batch[audio]) == 1 + 3 + 1 + 1 + 2
    chunks = split_batch(batch, 2, trainer.model.config)
    assert [len(chunk[audio]) for chunk in chunks] == [4, 2, 2]
    assert [chunk["rows"] for chunk in chunks] == [[0, 1], [2, 3], [4]]
    for name in (audio, "input_ids", "text_input_ids", "attention_mask"):
        assert torch.equal(torch.cat([chunk[name] for chunk in chunks]), batch[name])


def test_memory_is_that_of_one_chunk():
    """No two chunks have a graph at the same time."""
    weight, alive = torch.ones(3, requires_grad=True), []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            alive.remove(1)
            return gradient

    def encode(chunk):
        if torch.is_grad_enabled():
            alive.append(1)
            assert len(alive) == 1
        return Counted.apply(chunk["x"] * weight)

    x = torch.randn(6, 3)
    chunks = [{"x": part} for part in x.split(2)]
    loss = two_pass_backward(chunks, encode, lambda out: [out], lambda states: states[0].logsumexp(0).sum())
    expected = torch.autograd.grad((x * (w := torch.ones(3, requires_grad=True))).logsumexp(0).sum(), w)[0]
    torch.testing.assert_close(weight.grad, expected)
    assert loss.item() == pytest.approx(x.logsumexp(0).sum().item(), abs=1e-5) and not alive
