"""The norm term by hand, and a table that its module scales."""

import math

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from speechllm.objectives import embedding_mean_square, scale_penalty


def test_by_hand():
    tokens = torch.tensor([[1.0, 2.0], [3.0, 4.0], [6.0, 2.0]], requires_grad=True)  # mean squares 7.5 and 20
    terms = scale_penalty(tokens, [2, 1], 2.0)
    assert terms["loss"].tolist() == pytest.approx([math.log(7.5 / 2) ** 2, math.log(10) ** 2], rel=1e-6)
    assert terms["ratio"].tolist() == pytest.approx([math.sqrt(7.5 / 2), math.sqrt(10)], rel=1e-6)
    assert not terms["ratio"].requires_grad
    (gradient,) = torch.autograd.grad(terms["loss"].sum(), tokens)
    first, second = tokens.detach().split([2, 1])
    expected = [4 * math.log(7.5 / 2) * first / (4 * 7.5), 4 * math.log(10) * second / (2 * 20)]
    torch.testing.assert_close(gradient, torch.cat(expected))


def test_twice_and_half_the_scale_are_equally_wrong():
    tokens = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    square = tokens.square().mean()
    twice, half, same = (scale_penalty(factor * tokens, [50], square)["loss"].item() for factor in (2, 0.5, 1))
    assert twice == pytest.approx(half, rel=1e-5) == pytest.approx(math.log(4) ** 2, rel=1e-5)
    assert same == pytest.approx(0, abs=1e-10)
    assert scale_penalty(tokens * 0, [50], square)["loss"].isfinite().all()


def test_a_gradient_step_brings_every_utterance_nearer():
    tokens = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([tokens[:20] * 3, tokens[20:] / 3]).requires_grad_()
    optimiser = torch.optim.Adam([tokens], lr=0.05)
    for _ in range(100):
        optimiser.zero_grad()
        scale_penalty(tokens, [20, 30], 1.0)["loss"].mean().backward()
        optimiser.step()
    assert scale_penalty(tokens, [20, 30], 1.0)["ratio"].tolist() == pytest.approx([1, 1], abs=0.05)


@pytest.mark.parametrize("chunk", [3, 100])
def test_mean_square_of_a_table(chunk):
    table = nn.Embedding(10, 4)
    assert embedding_mean_square(table, 10, chunk) == pytest.approx(table.weight.square().mean().item(), rel=1e-6)
    scaled = Gemma3TextScaledWordEmbedding(10, 4, padding_idx=0, embed_scale=2.0)
    expected = 4 * scaled.weight.square().mean().item()
    assert embedding_mean_square(scaled, 10, chunk) == pytest.approx(expected, rel=1e-6)
