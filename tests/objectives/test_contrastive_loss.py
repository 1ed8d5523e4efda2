"""The contrastive loss beyond one square batch: rectangles, extra texts, odd sequences, several processes."""

import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from test_objectives import looped_cosine, sequences

from speechllm.objectives import (
    ExtraTexts,
    cosine_similarity_matrix,
    info_nce,
    layerwise_contrastive_loss,
    parse_layer_weights,
)
from speechllm.objectives.layers import SIMILARITIES


def late_interaction(text, text_mask, speech, speech_mask):
    """A similarity of tokens: each text token's best match, averaged."""
    products = torch.einsum("ild,jmd->ijlm", text, speech).masked_fill(~speech_mask[None, :, None], -1e4)
    weights = text_mask / text_mask.sum(-1, keepdim=True).clamp(min=1)
    return (products.amax(-1) * weights[:, None]).sum(-1) / 10


def cross_entropy(values, target):
    return -math.log(math.exp(values[target]) / sum(math.exp(value) for value in values))


@pytest.mark.parametrize(("shape", "offset"), [((3, 5), 0), ((3, 5), 2), ((3, 5), 4), ((5, 3), 0), ((5, 3), 1)])
def test_rows_and_columns_without_a_partner_are_negatives_only(shape, offset):
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pairs = [(i, i + offset) for i in range(shape[0]) if i + offset < shape[1]]
    rows = sum(cross_entropy((matrix[i] / 0.3).tolist(), j) for i, j in pairs)
    columns = sum(cross_entropy((matrix[:, j] / 0.3).tolist(), i) for i, j in pairs)
    found = info_nce(matrix, temperature=0.3, offset=offset)
    assert found.item() == pytest.approx(rows / len(pairs), abs=1e-12)
    found = info_nce(matrix, temperature=0.3, offset=offset, symmetric=True)
    assert found.item() == pytest.approx((rows + columns) / 2 / len(pairs), abs=1e-12)
    with pytest.raises(ValueError, match="square"):
        info_nce(matrix)
    assert info_nce(matrix[:0], offset=0, symmetric=True) == 0


def test_coarse_similarities_are_summed_in_float32():
    matrix = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = info_nce(matrix, symmetric=True)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, info_nce(matrix.double(), symmetric=True).float(), atol=1e-5, rtol=0)


def test_the_temperature_may_be_learned():
    matrix = torch.randn(4, 4, dtype=torch.float64)
    log_temperature = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda t: info_nce(matrix, temperature=t.exp(), symmetric=True), log_temperature)


def test_extra_texts_compete_where_utterances_look_for_their_text():
    (text, mask), (speech, other) = sequences(), sequences(seed=1)
    extra, extra_mask = sequences(4, 9, seed=2)
    allowed = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
    matrix, further = (
        looped_cosine(text, mask, speech, other) / 0.1,
        looped_cosine(extra, extra_mask, speech, other) / 0.1,
    )
    rows = sum(cross_entropy(matrix[i].tolist(), i) for i in range(3)) / 3
    columns = sum(cross_entropy(matrix[:, j].tolist() + further[allowed[:, j], j].tolist(), j) for j in range(3)) / 3
    extra_texts = ExtraTexts({5: extra}, extra_mask, allowed)
    loss = partial(layerwise_contrastive_loss, {5: text}, mask, {5: speech}, other, extra_texts=extra_texts)
    assert loss(symmetric=True)["loss"].item() == pytest.approx((rows + columns) / 2, abs=1e-5)
    with pytest.raises(ValueError, match="symmetric"):
        loss()


@pytest.mark.parametrize("similarity", [*SIMILARITIES, late_interaction])
def test_what_is_not_finite_is_named_for_every_similarity(similarity):
    (text, mask), (speech, other) = sequences(4), sequences(4, seed=1)
    loss = partial(layerwise_contrastive_loss, similarity=similarity)
    for bad in (math.nan, math.inf, -math.inf):
        broken, broken_text = speech.clone(), text.clone()
        broken[1, 2, 3] = broken[3, 2, 0] = broken_text[0, 2, 0] = bad
        with pytest.raises(
            ValueError, match=r"layer 7 are not finite: speech items \[1, 3\] of the batch hold NaN or inf"
        ):
            loss({0: text, 7: text}, mask, {0: speech, 7: broken}, other)
        with pytest.raises(ValueError, match=r"layer 0 are not finite: text items \[0\] and speech items \[1, 3\]"):
            loss({0: broken_text}, mask, {0: broken}, other)
        # what padding holds is nobody's business
        padded = speech.masked_fill(~other[:, :, None], bad)
        expected = loss({0: text}, mask, {0: speech.masked_fill(~other[:, :, None], 0)}, other)["loss"]
        torch.testing.assert_close(loss({0: text}, mask, {0: padded}, other)["loss"], expected)


def test_a_similarity_that_makes_infinities_is_named():
    (text, mask), (speech, other) = sequences(), sequences(seed=1)
    with pytest.raises(ValueError, match=r"states are finite, but their similarities at layers \[4\] are not"):
        layerwise_contrastive_loss(
            {4: text}, mask, {4: speech}, other, similarity=lambda *states: cosine_similarity_matrix(*states) / 0
        )


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("lengths", [(0, 3, 1), (1, 1, 1)])
def test_empty_sequences_and_single_tokens(similarity, lengths):
    (text, _), (speech, _) = sequences(length=4), sequences(length=4, seed=1)
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    speech.requires_grad_()
    loss = layerwise_contrastive_loss({0: text}, mask, {0: speech}, mask, similarity=similarity, symmetric=True)["loss"]
    loss.backward()
    assert loss.isfinite() and speech.grad.isfinite().all()
    assert (speech.grad[~mask] == 0).all()


def test_other_input_that_cannot_be():
    (text, mask), (speech, other) = sequences(), sequences(2, seed=1)
    with pytest.raises(ValueError, match="3 texts and 2 utterances"):
        layerwise_contrastive_loss({0: text}, mask, {0: speech}, other)
    assert parse_layer_weights("0:1 5:0.5, -1:2", 6) == {0: 1.0, 5: 0.5, 6: 2.0}
    for wrong in ("", "0", "0:", "7:1", "0:-1", "0:inf", "0:nan", "emb"):
        with pytest.raises(ValueError, match="layer_weights is"):
            parse_layer_weights(wrong, 6)


# ---- several processes ---------------------------------------------------------------------------------------------


def global_batch():
    """Eight pairs of two layers, and three extra texts."""
    text, speech = ({layer: sequences(8, seed=layer + side)[0] for layer in (0, 4)} for side in (0, 50))
    allowed = torch.rand(3, 8, generator=torch.Generator().manual_seed(3)) < 0.7
    extra = sequences(3, 5, seed=9)
    extra_texts = ExtraTexts({0: extra[0], 4: -extra[0]}, extra[1], allowed)
    return text, sequences(8, seed=1)[1], speech, sequences(8, seed=2)[1], extra_texts


def share_of(counts, rank, **options):
    """Loss of one process's share of the global batch, and the gradient of both sides' states."""
    text, text_mask, speech, speech_mask, extra = global_batch()
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    length = 7 - rank  # lengths differ between processes; what is cut off is masked first
    text_mask[:, 6] = speech_mask[:, 6] = False
    leaves = [{k: v[mine, :length].clone().requires_grad_() for k, v in side.items()} for side in (text, speech)]
    if options.pop("extra", False):
        options["extra_texts"] = ExtraTexts(extra.states, extra.mask, extra.allowed[:, mine])
    terms = layerwise_contrastive_loss(
        leaves[0], text_mask[mine, :length], leaves[1], speech_mask[mine, :length], layer_weights={4: 0.5}, **options
    )
    terms["loss"].backward()
    gradient = torch.cat(
        [torch.nn.functional.pad(v.grad, (0, 0, 0, rank)) for side in leaves for v in side.values()], 1
    )
    return terms["loss"].detach(), gradient


CASES = {
    f"{name} {counts} {options}": (counts, {"similarity": similarity, **options})
    for name, similarity in (("cosine", "cosine"), ("tokens", late_interaction))
    for counts in ((4, 4), (3, 5), (8, 0))
    for options in ({}, {"symmetric": True}, {"symmetric": True, "extra": True})
}


def gathered(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    found = {name: share_of(counts, rank, gather=True, **options) for name, (counts, options) in CASES.items()}
    (text, mask), (speech, other) = sequences(), sequences(seed=1)
    if rank == 1:
        speech[2, 2] = torch.nan
    try:
        layerwise_contrastive_loss({3: text}, mask, {3: speech}, other, gather=True)
    except ValueError as error:
        found["error"] = str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_the_loss_of_two_processes_is_that_of_the_whole_batch(tmp_path):
    torch.multiprocessing.start_processes(gathered, (str(tmp_path),), nprocs=2, start_method="fork")
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, (_, options) in CASES.items():
        loss, gradient = share_of((8, 0), 0, **options)
        for rank in range(2):
            torch.testing.assert_close(found[rank][name][0], loss, atol=1e-6, rtol=0, msg=f"{name}, process {rank}")
        # Data parallelism halves the sum over processes; what each of them finds is twice its share.
        both = torch.cat([found[rank][name][1] for rank in range(2)]) / 2
        torch.testing.assert_close(both, gradient, atol=1e-6, rtol=0, msg=name)
    for rank in range(2):  # no process waits for one that failed
        assert "on process 1: the similarities at layer 3 are not finite: speech items [2]" in found[rank]["error"]
