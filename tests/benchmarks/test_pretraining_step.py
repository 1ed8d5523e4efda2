"""The step benchmark on tiny random models: the whole of what it does at the other scales, and that its variants agree."""

import json

import pytest
import torch

from benchmarks.pretraining_step import (
    BY_LOOP,
    SCALES,
    flops_by_part,
    main,
    make_variants,
    published_loss,
    random_model,
    random_rows,
)


def test_it_reports_every_saving(tmp_path, capsys):
    output = tmp_path / "report.json"
    main(["--scale", "tiny", "--steps", "1", "--device", "cpu", "--largest-batch", "4", "--output", str(output)])
    text, report = capsys.readouterr().out, json.loads(output.read_text())
    for name, found in report["similarities"].items():
        lines = found["variants"]
        assert len(lines) == 6 and lines[0]["times_faster_than_published"] == 1
        assert all(line["seconds_per_step"] > 0 and line["variant"] in text for line in lines)
        assert found["loss_share"] > 0 and found["flop_per_step"] > 0 and found["peak_memory_bytes"] > 0
        assert {found[key] for key in found if key.startswith("largest_batch")} == {4}, name
    assert "Wasserstein takes" in text


@pytest.mark.parametrize("similarity", list(BY_LOOP))
def test_the_published_loss_is_ours(tmp_path, similarity):
    """Every variant minimises the same loss. Wasserstein: up to GeomLoss's own choice of the diameter."""
    model, processor = random_model(SCALES["tiny"], torch.device("cpu"), torch.float32)
    variants = make_variants(tmp_path, model, processor, random_rows(SCALES["tiny"], 4), 4, similarity)
    model.eval()
    losses = []
    for variant in variants:
        batch = dict(variant.batches[0])
        if variant.published:
            losses.append(published_loss(model, batch, variant.trainer.all_layers, variant.published).item())
        else:
            losses.append(variant.trainer.compute_loss(variant.trainer.model, batch).item())
    assert len(losses) == 6
    assert losses == pytest.approx([losses[0]] * 6, rel=1e-4 if similarity == "cosine" else 5e-3)


def test_operations_by_part():
    parts = flops_by_part(SCALES["tiny"])
    assert all(value > 0 for value in parts.values())
    assert parts["speech side, backward"] == pytest.approx(parts["speech side, forward"], rel=0.5)
    tokens = 2 * 4  # of half a second: 24 frames, two windows of 17, four queries each
    assert parts["LM head over both sides"] == 2 * 4 * (tokens + 8) * 32 * 300
