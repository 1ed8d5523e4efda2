"""Wasserstein distances of several layers in one call, in small blocks and in a GPU's large ones, equal layer by layer."""

import gc

import pytest
import torch
from test_optimal_transport import batch, relative_error

from speechllm.objectives import layers, packed_sequences, sinkhorn, wasserstein_distance_matrix
from speechllm.objectives.layers import layerwise_contrastive_loss


TEXTS, UTTERANCES = (3, 40, 9, 1, 22), (70, 1, 18, 120, 33)


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the texts that the loss asks the distances of."""
    shapes = []

    def counted(text, *others, **options):
        shapes.append(text.shape)
        return wasserstein_distance_matrix(text, *others, **options)

    monkeypatch.setattr(layers, "wasserstein_distance_matrix", counted)
    return shapes


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Run the GPU's way of cutting the work on whatever device there is."""
    for module in (packed_sequences, sinkhorn):
        monkeypatch.setattr(module, "in_large_blocks", lambda device: True)


def loss_and_gradients(sides, dtype, similarity):
    """The symmetric loss of three layers, its parts, and the gradient of every state."""
    states, masks = sides[::2], sides[1::2]
    leaves = [
        {layer: (state * (1 + layer) + layer).to(dtype).requires_grad_() for layer in (0, 4, 7)} for state in states
    ]
    terms = layerwise_contrastive_loss(leaves[0], masks[0], leaves[1], masks[1], similarity=similarity, symmetric=True)
    terms["loss"].backward()
    return terms, [(leaf.grad, mask) for side, mask in zip(leaves, masks) for leaf in side.values()]


@pytest.mark.parametrize("kind", ["random", "clustered"])
@pytest.mark.parametrize(  # a rounding error of 6e-8 in an exponent is divided by eps = 0.0025
    ("dtype", "tolerance", "of_gradients"), [(torch.float64, 1e-10, 1e-10), (torch.float32, 1e-6, 1e-5)]
)
@pytest.mark.parametrize(("place", "size"), [("cpu", 384), ("cpu", 40), ("gpu", 2**25), ("gpu", 2**12)])
def test_all_layers_in_one_call_equal_layer_by_layer(
    kind, dtype, tolerance, of_gradients, place, size, calls, request, monkeypatch
):
    sides = batch(kind, TEXTS, UTTERANCES, 48, torch.float64)
    one_by_one = lambda *sequences: -wasserstein_distance_matrix(*sequences)  # noqa: E731
    expected, expected_gradients = loss_and_gradients(sides, dtype, one_by_one)
    if place == "gpu":
        request.getfixturevalue("as_on_a_gpu")
        monkeypatch.setattr(sinkhorn, "LARGE_BLOCK", size)
    else:
        monkeypatch.setattr(sinkhorn, "ROWS", size)
        monkeypatch.setattr(sinkhorn, "PANEL", size**2)
    found, gradients = loss_and_gradients(sides, dtype, "wasserstein")
    assert calls == [(3, 5, 42, 48)]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=tolerance, rtol=0)
    for (gradient, mask), (other, _) in zip(gradients, expected_gradients, strict=True):
        assert relative_error(gradient, other, mask) < of_gradients
        assert (gradient[~mask] == 0).all()


def test_layers_of_other_shapes_and_empty_batches_go_one_by_one(calls):
    text, text_mask, speech, speech_mask = batch("random", TEXTS, UTTERANCES, 16)
    wide = [torch.cat([side, side], -1) for side in (text, speech)]
    found = layers.layer_similarities(
        layers.negative_wasserstein, ({0: text, 1: wide[0]}, text_mask), ({0: speech, 1: wide[1]}, speech_mask)
    )
    assert calls == [text.shape, wide[0].shape]
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)
    nothing = layers.layer_similarities(
        layers.negative_wasserstein, ({0: text, 1: text}, text_mask), ({0: speech[:0], 1: speech[:0]}, speech_mask[:0])
    )
    assert nothing.shape == (2, 5, 0) and len(calls) == 2


@pytest.mark.parametrize(("rows", "largest"), [(1024, 2**25), (20, 1500)])
def test_blocks_of_all_layers_cover_each_pair_once_and_stay_within_the_limit(rows, largest, as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(sinkhorn, "LARGE_ROWS", rows)
    monkeypatch.setattr(sinkhorn, "LARGE_BLOCK", largest)
    text, text_mask, speech, speech_mask = batch("random", (2, 3, 1, 2, 4) * 4, (5, 7, 6) * 4, 8)
    most = sinkhorn._most_tokens(3, text.device)
    x, y = (
        sinkhorn.PackedSequences(torch.stack([states] * 3), mask, torch.float32, tokens, tokens)
        for states, mask, tokens in ((text, text_mask, most[0]), (speech, speech_mask, most[1]))
    )
    pairs, sizes = torch.zeros(20, 12), []
    for texts, utterances in sinkhorn._panels(x, y):
        for block in sinkhorn._Panel(x, y, texts, utterances).blocks:
            pairs[block.x.sequences, block.y.sequences] += 1
            sizes.append(block.kernel.numel())
            expected = x.units[:, block.x.tokens] @ y.units[:, block.y.tokens].mT
            torch.testing.assert_close(block.unpadded(block.kernel), expected)
    assert (pairs == 1).all()
    assert max(sizes) <= largest and (len(sizes) == 1) == (largest == 2**25)


def test_sequences_of_similar_length_are_padded_together():
    lengths = [100, 9, 10, 98, 11, 97]
    mask = torch.arange(100) < torch.tensor(lengths)[:, None]
    x = sinkhorn.PackedSequences(torch.rand(6, 100, 2), mask, torch.float32, 300, 50)
    assert [[lengths[item] for item in x.kept[group.sequences]] for group in x.groups] == [[9, 10, 11], [97, 98, 100]]
    x = sinkhorn.PackedSequences(torch.rand(6, 100, 2), mask, torch.float32, 200, 50)  # a block holds two long ones
    assert [group.lengths for group in x.groups] == [[9, 10, 11], [97, 98], [100]]


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
        kept = [
            type(found)
            for found in gc.get_objects()
            if type(found) in (sinkhorn._Panel, sinkhorn._Block, sinkhorn.PackedSequences)
        ]
    finally:
        gc.enable()
    assert kept == []
