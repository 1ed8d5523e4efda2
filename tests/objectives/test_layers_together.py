"""Wasserstein distances of several layers: what a GPU takes in one call and in large blocks equals layer by layer."""

import gc

import pytest
import torch
from test_optimal_transport import batch, relative_error

from speechllm.objectives import layers, sinkhorn, wasserstein_distance_matrix
from speechllm.objectives.layers import layerwise_contrastive_loss


TEXTS, UTTERANCES = (3, 40, 9, 1, 22), (70, 1, 18, 120, 33)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Run the GPU's way of cutting the work on whatever device there is; returns the shapes of the calls."""
    calls = []

    def counted(text, *others, **options):
        calls.append(text.shape)
        return wasserstein_distance_matrix(text, *others, **options)

    for module in (layers, sinkhorn):
        monkeypatch.setattr(module, "in_large_blocks", lambda device: True)
    monkeypatch.setattr(layers, "wasserstein_distance_matrix", counted)
    return calls


def loss_and_gradients(sides, dtype):
    """The symmetric loss of three layers, its parts, and the gradient of every state."""
    states, masks = sides[::2], sides[1::2]
    leaves = [
        {layer: (state * (1 + layer) + layer).to(dtype).requires_grad_() for layer in (0, 4, 7)} for state in states
    ]
    terms = layerwise_contrastive_loss(
        leaves[0], masks[0], leaves[1], masks[1], similarity="wasserstein", symmetric=True
    )
    terms["loss"].backward()
    return terms, [(leaf.grad, mask) for side, mask in zip(leaves, masks) for leaf in side.values()]


@pytest.mark.parametrize("kind", ["random", "clustered"])
@pytest.mark.parametrize(
    ("dtype", "tolerance", "largest"),
    [(torch.float64, 1e-10, 2**24), (torch.float64, 1e-10, 2000), (torch.float32, 1e-6, 2**24)],
)
def test_all_layers_in_one_call_equal_layer_by_layer(kind, dtype, tolerance, largest, request, monkeypatch):
    sides = batch(kind, TEXTS, UTTERANCES, 48, torch.float64)
    expected, expected_gradients = loss_and_gradients(sides, dtype)
    calls = request.getfixturevalue("as_on_a_gpu")
    monkeypatch.setattr(sinkhorn, "LARGE_BLOCK", largest)
    found, gradients = loss_and_gradients(sides, dtype)
    assert calls == [(3, 5, 42, 48)]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=tolerance, rtol=0)
    for (gradient, mask), (other, _) in zip(gradients, expected_gradients, strict=True):
        assert relative_error(gradient, other, mask) < tolerance
        assert (gradient[~mask] == 0).all()


def test_layers_of_other_shapes_and_empty_batches_go_one_by_one(as_on_a_gpu):
    text, text_mask, speech, speech_mask = batch("random", TEXTS, UTTERANCES, 16)
    wide = [torch.cat([side, side], -1) for side in (text, speech)]
    found = layers.layer_similarities(
        layers.negative_wasserstein, ({0: text, 1: wide[0]}, text_mask), ({0: speech, 1: wide[1]}, speech_mask)
    )
    assert as_on_a_gpu == [text.shape, wide[0].shape]
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)
    nothing = layers.layer_similarities(
        layers.negative_wasserstein, ({0: text, 1: text}, text_mask), ({0: speech[:0], 1: speech[:0]}, speech_mask[:0])
    )
    assert nothing.shape == (2, 5, 0) and len(as_on_a_gpu) == 2


@pytest.mark.parametrize("largest", [2**24, 6000])
def test_panels_of_all_layers_stay_within_the_limit(largest, as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(sinkhorn, "LARGE_BLOCK", largest)
    text, text_mask, speech, speech_mask = batch("random", (2, 3, 1, 2, 4) * 4, (5, 7, 6) * 4, 8)
    x, y = (
        sinkhorn._Packed(torch.stack([states] * 3), mask, torch.float32)
        for states, mask in ((text, text_mask), (speech, speech_mask))
    )
    panels = sinkhorn._panels(x, y)
    sizes = [3 * len(x.units[0, x.tokens(*texts)]) * len(y.units[0, y.tokens(*others)]) for _, texts, others in panels]
    assert all(layer == slice(0, 3) for layer, _, _ in panels)
    assert max(sizes) <= largest and (len(panels) == 1) == (largest == 2**24)
    assert sum(sizes) == 3 * x.starts[-1] * y.starts[-1]  # each pair once


def test_one_layer_beyond_float32_does_not_slow_the_others(monkeypatch):
    """Sums near the cut-off of the exponent send a layer, and only that one, through the slow way."""
    text, text_mask, speech, speech_mask = batch("random", (3, 9), (20, 8), 16)
    slow = []
    by_autograd = sinkhorn.by_autograd
    monkeypatch.setattr(
        sinkhorn, "by_autograd", lambda *given, **kw: slow.append(given[1]) or by_autograd(*given, **kw)
    )
    near = [torch.ones_like(side) + 1e-3 * torch.rand_like(side) for side in (text, speech)]
    options = {"blur": 0.01}
    found = wasserstein_distance_matrix(
        torch.stack([text, near[0]]), text_mask, torch.stack([speech, near[1]]), speech_mask, **options
    )
    assert len(slow) == 1
    for layer, (x, y) in enumerate([(text, speech), near]):
        expected = wasserstein_distance_matrix(x, text_mask, y, speech_mask, **options)
        torch.testing.assert_close(found[layer], expected, atol=1e-6, rtol=0)


def test_nothing_waits_for_the_garbage_collector():
    """The exponentials of all pairs are large; a cycle of references would keep them for steps to come."""
    text, text_mask, speech, speech_mask = batch("random", (3, 9), (20, 8), 16)
    gc.collect()
    gc.disable()
    try:
        wasserstein_distance_matrix(text, text_mask, speech.requires_grad_(), speech_mask).sum().backward()
        kept = [type(found) for found in gc.get_objects() if type(found) in (sinkhorn._Panel, sinkhorn._Packed)]
    finally:
        gc.enable()
    assert kept == []
