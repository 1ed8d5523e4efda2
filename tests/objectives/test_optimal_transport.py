"""Transport between token sequences against GeomLoss, POT and formulas written out."""

import math
import sys
from functools import partial

import ot
import pytest
import torch
from geomloss import SamplesLoss
from torch.nn import functional as F

from speechllm.objectives import (
    exact_wasserstein_distance_matrix,
    layerwise_contrastive_loss,
    transport_cost_matrix,
    wasserstein_distance_matrix,
)
from speechllm.objectives.layers import SIMILARITIES
from speechllm.objectives.sinkhorn import epsilon_schedule


KINDS = ("random", "near-identical", "clustered")
DISTANCES = (wasserstein_distance_matrix, exact_wasserstein_distance_matrix, transport_cost_matrix)


def batch(kind, text_lengths, speech_lengths, dim, dtype=torch.float32, seed=0):
    """Texts, their mask, utterances, their mask. Masks have gaps, and what they leave out is not a number."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    shared, centres = normal(dim), normal(5, dim)
    sides = []
    for lengths in (text_lengths, speech_lengths):
        states = torch.full((len(lengths), max(lengths) + 2, dim), torch.nan, dtype=torch.float64)
        mask = torch.zeros(states.shape[:2], dtype=torch.bool)
        for item, length in enumerate(lengths):
            mask[item, torch.randperm(states.shape[1], generator=generator)[:length]] = True
            noise = normal(length, dim)
            if kind == "near-identical":
                noise = shared + 1e-3 * noise
            elif kind == "clustered":  # a few directions and one huge dimension, as hidden states of LLMs have
                noise = 3 * centres[torch.randint(0, 5, (length,), generator=generator)] + 0.3 * noise
                noise[:, 0] += 20
            states[item, mask[item]] = noise
        sides += [states.to(dtype), mask]
    return sides


def by_pair(text, text_mask, speech, speech_mask, distance):
    units = [
        [F.normalize(states[i][mask[i]], dim=-1) for i in range(len(mask))]
        for states, mask in ((text, text_mask), (speech, speech_mask))
    ]
    return torch.stack([torch.stack([distance(x, y) for y in units[1]]) for x in units[0]])


def with_gradients(function, text, text_mask, speech, speech_mask):
    """The matrix, and the gradients of its weighted sum at text and speech."""
    text, speech = text.detach().clone().requires_grad_(), speech.detach().clone().requires_grad_()
    matrix = function(text, text_mask, speech, speech_mask)
    weights = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return matrix.detach(), *torch.autograd.grad((matrix * weights.to(matrix)).sum(), (text, speech))


def relative_error(found, expected, mask):
    return (found[mask] - expected[mask]).norm() / expected[mask].norm()


def drawn(count, seed):
    """Lengths of 1 to 200 tokens."""
    return torch.randint(1, 201, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text_lengths, speech_lengths, dim, options",
    [
        ((1, 2, 200, *drawn(2, 0)), (200, 1, *drawn(2, 1)), 64, {}),
        ((1, *drawn(2, 2)), (200, *drawn(2, 3)), 576, {}),
        ((200, *drawn(1, 4)), (1, *drawn(2, 5)), 4096, {}),
        ((8, 40, 25), (20, 120, 64, 3), 64, dict(blur=0.1, scaling=0.7, diameter=1.5)),
        ((1, 200, *drawn(2, 6)), (2, *drawn(2, 7)), 64, dict(diameter=None)),
        (drawn(2, 8), (200, *drawn(1, 9)), 576, dict(diameter=None)),
        ((1, *drawn(1, 10)), drawn(2, 11), 4096, dict(diameter=None)),
    ],
)
def test_equals_geomloss(kind, text_lengths, speech_lengths, dim, options):
    sides = batch(kind, text_lengths, speech_lengths, dim)
    reference = SamplesLoss("sinkhorn", p=2, **{"blur": 0.05, "scaling": 0.5, "diameter": 2.0, **options})
    found, *gradients = with_gradients(partial(wasserstein_distance_matrix, **options), *sides)
    # float64, so that the reference's own rounding, which near-identical tokens amplify, does not count
    sides = [side.double() if side.is_floating_point() else side for side in sides]
    expected, *expected_gradients = with_gradients(lambda *sides: by_pair(*sides, reference), *sides)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
    for gradient, expected_gradient, mask in zip(gradients, expected_gradients, sides[1::2]):
        assert relative_error(gradient, expected_gradient, mask) < 5e-5
        assert (gradient[~mask] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_blur_whose_exponents_leave_the_range_of_float32(kind):
    sides = batch(kind, (8, 40, 25), (20, 60, 3), 64)
    wide = [side.double() if side.is_floating_point() else side for side in sides]
    expected = by_pair(*wide, SamplesLoss("sinkhorn", p=2, blur=0.003, scaling=0.3, diameter=2.0))
    found = wasserstein_distance_matrix(*sides, blur=0.003, scaling=0.3)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)


def last_step(x, y, blur=0.05):
    """The divergence whose potentials before the last step are constants, by autograd."""

    def cost(x, y):
        return (x[:, None] - y).square().sum(-1) / 2

    def softmin(eps, cost, potential):
        return -eps * (potential / eps - cost / eps - math.log(cost.shape[1])).logsumexp(1)

    def value(x, y):
        with torch.no_grad():
            first, *_ = schedule = epsilon_schedule(2.0, blur, 0.5)
            f, g = softmin(first, cost(x, y), torch.zeros(len(y))), softmin(first, cost(y, x), torch.zeros(len(x)))
            for eps in schedule:
                f, g = (f + softmin(eps, cost(x, y), g)) / 2, (g + softmin(eps, cost(y, x), f)) / 2
        eps = blur**2
        return softmin(eps, cost(x, y.detach()), g).mean() + softmin(eps, cost(y, x.detach()), f).mean()

    return value(x, y) - value(x, x) / 2 - value(y, y) / 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_last_step(kind):
    sides = batch(kind, (1, 5, 9), (12, 2), 6, torch.float64)
    found = with_gradients(wasserstein_distance_matrix, *sides)
    expected = with_gradients(lambda *sides: by_pair(*sides, last_step), *sides)
    torch.testing.assert_close(found[0], expected[0], atol=1e-12, rtol=0)
    for gradient, expected_gradient, mask in zip(found[1:], expected[1:], sides[1::2]):
        assert relative_error(gradient, expected_gradient, mask) < 1e-9


def test_gradcheck_where_the_potentials_have_converged():
    """At a blur of 1 and 40 steps of nearly that eps, where the gradient of the last step is the whole gradient."""
    text, text_mask, speech, speech_mask = batch("random", (1, 3), (4, 2), 3, torch.float64)
    text, speech = (
        torch.stack([text, text.flip(-1)]).nan_to_num(0),
        torch.stack([speech, speech.roll(1, -1)]).nan_to_num(0),
    )

    def converged(text, speech):
        options = dict(blur=1.0, diameter=1.0001, scaling=1 - 2.5e-6)
        return wasserstein_distance_matrix(text, text_mask, speech, speech_mask, **options)

    torch.autograd.gradcheck(converged, (text.requires_grad_(), speech.requires_grad_()))


def test_gradcheck_of_the_exact_distance():
    """The best plan of generic data does not change under small changes: the gradient is exact."""
    text, text_mask, speech, speech_mask = batch("random", (1, 4), (5, 2, 4), 3, torch.float64)

    def exact(text, speech):
        return exact_wasserstein_distance_matrix(text, text_mask, speech, speech_mask)

    torch.autograd.gradcheck(exact, (text.nan_to_num(0).requires_grad_(), speech.nan_to_num(0).requires_grad_()))


def test_gradcheck_where_each_pairs_potentials_have_converged():
    """`diameter=None`: at a blur just below the pair's diameter, 40 steps of nearly that eps."""
    text, text_mask, speech, speech_mask = batch("random", (3,), (4,), 3, torch.float64)
    tokens = F.normalize(torch.cat([text[text_mask], speech[speech_mask]]), dim=-1)
    blur = 0.98 * (tokens.amax(0) - tokens.amin(0)).norm().item()

    def converged(text, speech):
        options = dict(blur=blur, diameter=None, scaling=1 - 5e-4)
        return wasserstein_distance_matrix(text, text_mask, speech, speech_mask, **options)

    torch.autograd.gradcheck(converged, (text.nan_to_num(0).requires_grad_(), speech.nan_to_num(0).requires_grad_()))


def entropic_plan(x, y, blur=0.05):
    """The plan of unit vectors after the schedule's last step, rounded to its marginals."""
    cost = 1 - x @ y.T
    a, b = torch.ones(len(x)).double() / len(x), torch.ones(len(y)).double() / len(y)

    def softmin(eps, cost, potential, weights):
        return -eps * (weights.log() + (potential - cost) / eps).logsumexp(1)

    first, *_ = schedule = epsilon_schedule(2.0, blur, 0.5)
    f, g = softmin(first, cost, torch.zeros(len(y)), b), softmin(first, cost.T, torch.zeros(len(x)), a)
    for eps in schedule:
        f, g = (f + softmin(eps, cost, g, b)) / 2, (g + softmin(eps, cost.T, f, a)) / 2
    g = softmin(eps, cost.T, f, a)
    plan = a[:, None] * b * ((f[:, None] + g - cost) / eps).exp()
    plan = plan * (a / plan.sum(1)).clamp(max=1)[:, None]
    plan = plan * (b / plan.sum(0)).clamp(max=1)
    missing = a - plan.sum(1), b - plan.sum(0)
    return plan + torch.outer(*missing) / missing[0].sum() if missing[0].sum() > 0 else plan


@pytest.mark.parametrize("kind", KINDS)
def test_the_transport_costs_gradient_is_that_of_a_constant_plan(kind):
    """d<P, C> / dx_i = -sum_j P_ij (v_j - <u_i, v_j> u_i) / |x_i|, for unit vectors u of x, v of y, and a constant P."""
    text, text_mask, speech, speech_mask = batch(kind, (3, 9), (12,), 6, torch.float64)
    text_gradient, y = torch.zeros_like(text), speech[0][speech_mask[0]]
    found = torch.zeros(2, 1, dtype=torch.float64)
    for i, mask in enumerate(text_mask):
        x = text[i][mask]
        u, v = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
        plan = entropic_plan(u, v)
        found[i] = (plan * (1 - u @ v.T)).sum()
        along = (plan * (u @ v.T)).sum(1, keepdim=True)
        text_gradient[i, mask] = -(plan @ v - along * u) / x.norm(dim=-1, keepdim=True)
    text.requires_grad_()
    matrix = transport_cost_matrix(text, text_mask, speech, speech_mask)
    torch.testing.assert_close(matrix, found, atol=1e-10, rtol=0)
    (gradient,) = torch.autograd.grad(matrix.sum(), text)
    assert relative_error(gradient, text_gradient, text_mask) < 1e-6


def test_layers_in_one_call_equal_one_call_each():
    text, text_mask, speech, speech_mask = batch("random", (3, 9, 4), (20, 1, 8), 16)
    text, speech = torch.stack([text, text.flip(-1)]), torch.stack([speech, speech * 2 + 1])
    for distance in DISTANCES:
        found = with_gradients(distance, text, text_mask, speech, speech_mask)
        for layer in range(2):
            expected = distance(text[layer], text_mask, speech[layer], speech_mask)
            torch.testing.assert_close(found[0][layer], expected, atol=1e-6, rtol=0)
        assert (found[1][:, ~text_mask] == 0).all() and (found[2][:, speech_mask] != 0).any()


@pytest.mark.parametrize(
    "distance",
    [
        *DISTANCES,
        *(partial(distance, diameter=None) for distance in (wasserstein_distance_matrix, transport_cost_matrix)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_states_are_accumulated_in_float32(dtype, distance):
    sides = [
        side / 100 if side.is_floating_point() else side for side in batch("random", (30, 12), (90, 40), 512, dtype)
    ]
    wide = [side.float() if side.is_floating_point() else side for side in sides]
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(distance, *sides)
    expected = with_gradients(distance, *wide)
    assert found[0].dtype == torch.float32 and found[1].dtype == found[2].dtype == dtype
    torch.testing.assert_close(found[0], expected[0], atol=1e-6, rtol=0)
    for gradient, expected_gradient, mask in zip(found[1:], expected[1:], sides[1::2]):
        assert relative_error(gradient.float(), expected_gradient, mask) < 5e-3  # the gradient is stored in `dtype`


def test_reduced_matmul_precision_is_not_used_and_comes_back():
    sides = batch("random", (30, 12), (90, 40), 512)
    expected = wasserstein_distance_matrix(*sides)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")  # bfloat16 products, also on CPUs
        torch.testing.assert_close(wasserstein_distance_matrix(*sides), expected, atol=1e-6, rtol=0)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("kind", KINDS)
def test_identical_sequences_are_at_distance_0_and_none_is_nearer(kind):
    text, mask, *_ = batch(kind, (1, 5, 80, 33), (1,), 32)
    for options in ({}, dict(diameter=None)):
        matrix = wasserstein_distance_matrix(text, mask, text.clone(), mask, **options)
        assert matrix.diagonal().abs().max() < 1e-6
        assert matrix.min() > -1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text_lengths, speech_lengths, dim", [
    ((1, 9, 60), (50, 1, 9, 120), 64), (drawn(2, 0), drawn(2, 7), 576), (drawn(1, 13), drawn(1, 1), 4096)])  # fmt: skip
def test_exact_transport_equals_pot(kind, text_lengths, speech_lengths, dim):
    sides = batch(kind, text_lengths, speech_lengths, dim)
    found, *gradients = with_gradients(exact_wasserstein_distance_matrix, *sides)
    wide = [side.double() if side.is_floating_point() else side for side in sides]

    def emd2(x, y):
        return ot.emd2(x.new_tensor([]), x.new_tensor([]), (x[:, None] - y).square().sum(-1) / 2)

    expected, *expected_gradients = with_gradients(lambda *sides: by_pair(*sides, emd2), *wide)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
    for gradient, mask in zip(gradients, sides[1::2]):
        assert (gradient[~mask] == 0).all()
    if kind == "random":  # elsewhere rounding may choose another plan of the same cost
        for gradient, expected_gradient, mask in zip(gradients, expected_gradients, sides[1::2]):
            assert relative_error(gradient, expected_gradient, mask) < 5e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_cost_of_the_entropic_plan_is_an_upper_bound_and_tight(kind):
    sides = batch(kind, (1, 9, 30), (25, 1, 9, 40), 32, torch.float64)
    exact = exact_wasserstein_distance_matrix(*sides)
    loose, *gradients = with_gradients(transport_cost_matrix, *sides)
    tight = transport_cost_matrix(*sides, blur=0.005, scaling=0.95)
    assert (loose - exact).min() > -1e-9 and (tight - exact).min() > -1e-9
    if kind == "random":  # clusters converge more slowly
        assert (tight - exact).mean() < 0.5 * (loose - exact).mean()
    assert transport_cost_matrix(*sides, diameter=None).sub(exact).min() > -1e-9
    for gradient, mask in zip(gradients, sides[1::2]):
        assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).any()


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_gradient_goes_downhill(distance):
    text, text_mask, speech, speech_mask = batch("random", (6, 9), (12, 20), 16, torch.float64)
    value, _, gradient = with_gradients(distance, text, text_mask, speech, speech_mask)
    weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    moved = distance(text, text_mask, speech - 1e-3 * gradient / gradient.norm(), speech_mask)
    assert ((moved - value) * weights).sum() < 0


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("lengths", [(0, 3, 1), (1, 1, 1), (0, 0, 0)])
def test_empty_sequences_and_single_tokens(distance, lengths):
    text, _, speech, _ = batch("random", (4, 4, 4), (4, 4, 4), 8)
    text, speech = text.nan_to_num(1.0), speech.nan_to_num(1.0)
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    options = [{}] if distance is exact_wasserstein_distance_matrix else [{}, dict(diameter=None)]
    for option in options:
        matrix, *gradients = with_gradients(partial(distance, **option), text, mask, speech, mask)
        empty = mask.sum(1) == 0
        assert matrix.isfinite().all() and matrix.shape == (3, 3) and matrix.dtype == torch.float32
        assert (matrix[empty] == 1).all() and (matrix[:, empty] == 1).all()
        for gradient in gradients:
            assert gradient.isfinite().all() and (gradient[~mask] == 0).all()


@pytest.mark.parametrize("lengths", [((3, 2), (0, 0)), ((0, 0), (4, 5)), ((0, 0), (0, 0)), ((), (4, 5)), ((3, 2), ())])
def test_a_side_without_any_token_has_no_gradient(lengths):
    text, speech = (torch.randn(len(side), 6, 8, requires_grad=True) for side in lengths)
    masks = [torch.arange(6) < torch.tensor(side).view(-1, 1) for side in lengths]
    matrix = wasserstein_distance_matrix(text, masks[0], speech, masks[1])
    assert matrix.shape == (len(text), len(speech)) and (matrix == 1).all()
    for gradient in torch.autograd.grad(matrix.sum(), (text, speech)):
        assert (gradient == 0).all()


def test_single_tokens_are_at_one_minus_their_cosine():
    text, speech = torch.randn(3, 1, 8), torch.randn(4, 1, 8)
    masks = torch.ones(3, 1), torch.ones(4, 1)
    expected = 1 - F.cosine_similarity(text, speech.transpose(0, 1), dim=-1)
    for distance in DISTANCES:
        torch.testing.assert_close(distance(text, masks[0], speech, masks[1]), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("distance", DISTANCES)
def test_zero_vectors_and_extreme_scales(distance):
    text, text_mask, speech, speech_mask = batch("random", (4, 6), (9, 3), 8)
    text[0, text_mask[0].nonzero()[0]] = 0
    speech[0] *= 1e12
    matrix, *gradients = with_gradients(distance, text, text_mask, speech, speech_mask)
    assert matrix.isfinite().all() and all(
        gradient[mask].isfinite().all() for gradient, mask in zip(gradients, (text_mask, speech_mask))
    )
    if distance is wasserstein_distance_matrix:
        reference = by_pair(text, text_mask, speech, speech_mask, SamplesLoss("sinkhorn", p=2, blur=0.05, diameter=2.0))
        torch.testing.assert_close(matrix, reference, atol=1e-6, rtol=0)


@pytest.mark.parametrize("distance", DISTANCES)
def test_what_is_not_finite_stays_visible(distance):
    for bad in (math.nan, math.inf):
        text, text_mask, speech, speech_mask = batch("random", (4, 6), (9, 3), 8)
        speech[1, speech_mask[1].nonzero()[0], 0] = bad
        assert distance(text, text_mask, speech, speech_mask)[:, 1].isnan().all()


def test_only_the_gradient_that_is_needed_and_only_once():
    text, text_mask, speech, speech_mask = batch("random", (4, 6), (9, 3), 8)
    speech.requires_grad_()
    matrix = wasserstein_distance_matrix(text, text_mask, speech, speech_mask)
    (first,) = torch.autograd.grad(matrix.square().sum(), speech, retain_graph=True, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first[speech_mask].sum().backward()
    (second,) = torch.autograd.grad(matrix.square().sum(), speech)
    assert (first == second).all()
    assert not wasserstein_distance_matrix(text, text_mask, speech.detach(), speech_mask).requires_grad


@pytest.mark.parametrize("distance", DISTANCES)
def test_bad_input_is_named(distance):
    text, text_mask, speech, speech_mask = batch("random", (4, 6), (9, 3), 8)
    with pytest.raises(ValueError, match="dim, and layers if given, must agree"):
        distance(text[..., :5], text_mask, speech, speech_mask)
    with pytest.raises(ValueError, match="dim, and layers if given, must agree"):
        distance(text[None], text_mask, speech, speech_mask)
    with pytest.raises(ValueError, match=r"speech_mask \(2, 10\)"):
        distance(text, text_mask, speech, speech_mask[:, 1:])
    with pytest.raises(ValueError, match=r"text has shape \(8, 8\)"):
        distance(text[0], text_mask[0], speech, speech_mask)
    with pytest.raises(ValueError, match=r"text has dtype torch.int64"):
        distance(text.nan_to_num(0).long(), text_mask, speech, speech_mask)


@pytest.mark.parametrize("distance", [wasserstein_distance_matrix, transport_cost_matrix])
def test_bad_settings_are_named(distance):
    sides = batch("random", (4, 6), (9, 3), 8)
    for name, values in dict(blur=(0, -1, math.nan, math.inf), scaling=(0, 1, 1.5, math.nan), diameter=(0, -2)).items():
        for value in values:
            with pytest.raises(ValueError, match=f"{name} is {value}"):
                distance(*sides, **{name: value})


def test_similarities_are_minus_the_distances():
    sides = batch("random", (4, 6), (9, 3), 8)
    names = "wasserstein", "exact_wasserstein", "transport_cost", "wasserstein_geomloss"
    for name, distance in zip(names, (*DISTANCES, partial(wasserstein_distance_matrix, diameter=None)), strict=True):
        assert (SIMILARITIES[name](*sides) == -distance(*sides)).all()


def test_the_loss_exactly_as_published():
    """Cross-entropy of minus GeomLoss's divergences, each pair with the diameter that GeomLoss gives it, over tau."""
    sides = batch("clustered", (3, 9, 5), (12, 7, 20), 16)
    text, text_mask, speech, speech_mask = sides
    wide = [side.double() if side.is_floating_point() else side for side in sides]
    reference = SamplesLoss("sinkhorn", p=2, blur=0.05)
    expected = F.cross_entropy(-by_pair(*wide, reference) / 0.1, torch.arange(3)).item()
    found = {
        name: layerwise_contrastive_loss({4: text}, text_mask, {4: speech}, speech_mask, similarity=name)["loss"].item()
        for name in ("wasserstein_geomloss", "wasserstein")
    }
    assert found["wasserstein_geomloss"] == pytest.approx(expected, abs=1e-5)
    assert abs(found["wasserstein"] - expected) > 1e-4


def test_without_pot_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ImportError, match=r"pip install 'speechllm\[transport\]'"):
        exact_wasserstein_distance_matrix(*batch("random", (4,), (9,), 8))
