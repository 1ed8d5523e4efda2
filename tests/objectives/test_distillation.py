"""The KL term against PyTorch's own on whole logits; chunks change nothing but memory."""

import pytest
import torch
from torch.nn import functional as F

from speechllm.objectives import next_token_kl, next_token_loss


POSITIONS, WIDTH, VOCABULARY = 23, 12, 101


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(POSITIONS, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher.requires_grad_(), weight.requires_grad_()


def reference(student, teacher, weight, temperature, direction):
    found, target = (F.log_softmax(states @ weight.T / temperature, -1) for states in (student, teacher.detach()))
    q, p = (found, target) if direction == "forward" else (target, found)
    return F.kl_div(q, p, reduction="batchmean", log_target=True) * temperature**2


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 7, 23, 256])
def test_value_and_gradient_are_those_of_whole_logits(parts, direction, temperature, chunk):
    student, teacher, weight = parts
    frozen = weight.detach()
    options = {"temperature": temperature, "direction": direction}
    loss = next_token_kl(student, teacher, lambda states: states @ frozen.T, chunk=chunk, **options)
    expected = reference(student, teacher, frozen, **options)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    total = next_token_kl(student, teacher, lambda states: states @ frozen.T, chunk=chunk, reduction="sum", **options)
    assert total.item() == pytest.approx(POSITIONS * expected.item(), abs=1e-11)
    (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
    (expected_gradient,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-12, rtol=0)
    loss.backward()
    assert teacher.grad is None


def test_in_float32_and_bfloat16(parts):
    student, teacher, weight = (part.detach() for part in parts)
    expected = reference(student, teacher, weight, 1.0, "forward").item()

    def head(states):
        return states @ weight.to(states.dtype).T

    single = next_token_kl(student.float(), teacher.float(), head, chunk=5)
    assert single.dtype == torch.float32 and single.item() == pytest.approx(expected, rel=1e-6)
    half = next_token_kl(student.bfloat16(), teacher.bfloat16(), head, chunk=5)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(expected, rel=0.02)


def test_equal_distributions_have_no_divergence_and_no_gradient(parts):
    student, _, weight = parts
    loss = next_token_kl(student, student.detach(), lambda states: states @ weight.detach().T)
    (gradient,) = torch.autograd.grad(loss, student)
    assert abs(loss.item()) < 1e-14 and gradient.abs().max() < 1e-14


def test_logits_of_one_chunk_exist_at_a_time(parts):
    """In both passes the head is asked for `chunk` positions at most, and the graph keeps none of its logits."""
    student, teacher, weight = parts
    frozen, sizes, kept = weight.detach(), [], []

    def head(states):
        sizes.append(len(states))
        return states @ frozen.T

    def pack(tensor):
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = next_token_kl(student, teacher, head, chunk=5)
    assert not any(VOCABULARY in shape for shape in kept)
    loss.backward()
    assert max(sizes) == 5 and sum(sizes) == 4 * POSITIONS  # student and teacher, forward and again for backward


def test_the_gradient_reaches_the_head_and_through_no_positions(parts):
    student, teacher, weight = parts
    expected = torch.autograd.grad(
        F.kl_div(
            F.log_softmax(student @ weight.T, -1),
            F.log_softmax(teacher @ weight.detach().T, -1),
            reduction="batchmean",
            log_target=True,
        ),
        weight,
    )[0]
    loss = next_token_kl(student, teacher, lambda states: states @ weight.T, chunk=4)
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], expected, atol=1e-12, rtol=0)
    nothing = next_token_kl(student[:0], teacher[:0], lambda states: states @ weight.T)
    assert nothing == 0 and torch.autograd.grad(nothing, student)[0].abs().max() == 0


def test_what_cannot_be(parts):
    student, teacher, _ = parts
    with pytest.raises(ValueError, match=r"shapes \(23, 12\) and \(22, 12\)"):
        next_token_kl(student, teacher[1:], lambda states: states)
    with pytest.raises(ValueError, match="direction is 'sideways'"):
        next_token_kl(student, teacher, lambda states: states, direction="sideways")
    with pytest.raises(ValueError, match="reduction is 'none'"):
        next_token_kl(student, teacher, lambda states: states, reduction="none")


def test_next_token_loss_is_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(5, 8, generator=generator).bfloat16()
    table, labels = torch.randn(11, 8, generator=generator).bfloat16(), torch.tensor([3, 0, 10, 7, 7])
    for reduction in ("mean", "sum"):
        found = next_token_loss(states, labels, lambda hidden: hidden @ table.T, reduction=reduction)
        expected = torch.nn.functional.cross_entropy((states @ table.T).float(), labels, reduction=reduction)
        assert found.dtype == torch.float32 and torch.equal(found, expected)
    with pytest.raises(ValueError, match=r"States have shape \(5, 8\) and labels \(4,\)"):
        next_token_loss(states, labels[:4], lambda hidden: hidden)
