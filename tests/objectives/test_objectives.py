"""Similarity, InfoNCE and the layerwise loss against loops and formulas written out."""

import math

import pytest
import torch

from speechllm.objectives import (
    cosine_similarity_matrix,
    info_nce,
    layerwise_contrastive_loss,
    masked_mean,
    parse_layer_schedule,
    parse_layers,
)


def sequences(batch=3, length=7, dim=5, seed=0, dtype=torch.float32):
    """States, and a mask with gaps, as a prefix and padding leave them."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(batch, length, dim, generator=generator).to(dtype)
    mask = torch.rand(batch, length, generator=generator) < 0.6
    mask[:, 2] = True
    return states, mask


def looped_cosine(text, text_mask, speech, speech_mask):
    matrix = torch.empty(len(text), len(speech), dtype=torch.float64)
    for i in range(len(text)):
        for j in range(len(speech)):
            a, b = text[i][text_mask[i]].double().mean(0), speech[j][speech_mask[j]].double().mean(0)
            matrix[i, j] = (a @ b) / (a.norm() * b.norm())
    return matrix


def test_cosine_equals_a_loop():
    pair = (*sequences(), *sequences(4, 9, 5, seed=1))
    torch.testing.assert_close(cosine_similarity_matrix(*pair).double(), looped_cosine(*pair), atol=1e-6, rtol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_states_are_accumulated_in_float32(autocast):
    text, text_mask = sequences(3, 400, 5, dtype=torch.bfloat16)
    speech, speech_mask = sequences(3, 300, 5, seed=1, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = cosine_similarity_matrix(text + 1, text_mask, speech + 1, speech_mask)
    assert found.dtype == torch.float32
    expected = looped_cosine(text + 1, text_mask, speech + 1, speech_mask)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)


def test_padding_has_no_gradient_and_no_say():
    states, mask = sequences()
    states[~mask] = torch.inf  # as overflowed padding may be
    states.requires_grad_()
    other, other_mask = sequences(seed=1)
    cosine_similarity_matrix(states, mask, other, other_mask).square().sum().backward()
    assert (states.grad[~mask] == 0).all()
    assert (states.grad[mask] != 0).any()
    assert masked_mean(states, torch.zeros_like(mask)).abs().max() == 0
    states = states.double().requires_grad_()
    torch.autograd.gradcheck(lambda states: masked_mean(states, mask), states)
    torch.autograd.gradgradcheck(lambda states: masked_mean(states, mask), states)


def test_gradients_are_right():
    text, text_mask = sequences(dtype=torch.float64)
    speech, speech_mask = sequences(seed=1, dtype=torch.float64)

    def loss(text, speech):
        return layerwise_contrastive_loss({0: text}, text_mask, {0: speech}, speech_mask, symmetric=True)["loss"]

    torch.autograd.gradcheck(loss, (text.requires_grad_(), speech.requires_grad_()))


@pytest.mark.parametrize("symmetric", [False, True])
def test_info_nce_is_its_formula(symmetric):
    matrix = torch.rand(4, 4, dtype=torch.float64)
    rows = [-math.log(math.exp(matrix[i, i] / 0.2) / sum(math.exp(x / 0.2) for x in matrix[i])) for i in range(4)]
    columns = [-math.log(math.exp(matrix[i, i] / 0.2) / sum(math.exp(x / 0.2) for x in matrix[:, i])) for i in range(4)]
    expected = (sum(rows) + sum(columns)) / 8 if symmetric else sum(rows) / 4
    assert info_nce(matrix, temperature=0.2, symmetric=symmetric).item() == pytest.approx(expected, abs=1e-12)
    assert info_nce(torch.ones(8, 8)).item() == pytest.approx(math.log(8))
    with pytest.raises(ValueError, match="square"):
        info_nce(torch.zeros(2, 3))


def test_the_layerwise_loss_is_the_sum_over_layers():
    text, speech = {l: sequences(seed=l)[0] for l in (0, 3)}, {l: sequences(seed=9 + l)[0] for l in (0, 3)}  # noqa: E741
    mask, other = sequences()[1], sequences(seed=5)[1]
    found = layerwise_contrastive_loss(text, mask, speech, other, layer_weights={3: 0.5})
    single = {l: info_nce(looped_cosine(text[l], mask, speech[l], other)).item() for l in (0, 3)}  # noqa: E741
    assert found["layer_0"].item() == pytest.approx(single[0], abs=1e-5)
    assert found["loss"].item() == pytest.approx(single[0] + 0.5 * single[3], abs=1e-5)

    flat = layerwise_contrastive_loss(text, mask, speech, other, similarity=lambda *states: torch.zeros(3, 3))
    assert flat["loss"].item() == pytest.approx(2 * math.log(3))


def test_not_a_number_is_an_error_that_names_the_item():
    (text, mask), (speech, other) = sequences(), sequences(seed=1)
    speech[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"layer 4 are not finite: speech items \[1\]"):
        layerwise_contrastive_loss({4: text}, mask, {4: speech}, other)
    with pytest.raises(ValueError, match=r"layers \[4\], speech of \[5\]"):
        layerwise_contrastive_loss({4: text}, mask, {5: speech}, other)


def test_names_of_layer_sets():
    assert parse_layers("emb", 32) == [0]
    assert parse_layers("all", 32) == [0, 5, 10, 15, 20, 25, 30, 32]
    assert parse_layers("all", 30) == [0, 5, 10, 15, 20, 25, 30]
    assert parse_layers("all", 3) == [0, 3]
    assert parse_layers("5, 0 -1", 30) == [0, 5, 30]
    for wrong in ("", "deep", "0,31", "-32", "1.5"):
        with pytest.raises(ValueError, match="layers is"):
            parse_layers(wrong, 30)
    assert parse_layer_schedule("300:all 0:emb", 10) == [(0, [0]), (300, [0, 5, 10])]
    for wrong in ("", "emb", "1:emb", "0:emb 0:all", "0:deep", "-1:emb"):
        with pytest.raises(ValueError):
            parse_layer_schedule(wrong, 10)
