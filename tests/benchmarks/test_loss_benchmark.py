"""The loss benchmark on small sequences: what it measures, and that its peers compute what ours does."""

import json

import pytest
import torch

from benchmarks.contrastive_loss import GEOMLOSS, cosine_by_sequence, main, products_alone, random_sides, ratio
from speechllm.objectives import cosine_similarity_matrix, wasserstein_distance_matrix


def test_times_ratios_and_memory_are_written(tmp_path, capsys):
    output = tmp_path / "new" / "loss.json"
    main(["--quick", "--cases", "2,32,1", "2,32,2", "--device", "cpu", "--output", str(output)])
    printed, report = capsys.readouterr().out, json.loads(output.read_text())
    assert [case["layers"] for case in report["wasserstein"]] == [1, 2]
    for case in report["wasserstein"]:
        assert set(case["seconds"]) == {"ours", "products alone", "GeomLoss loop", "POT loop", "POT batch"}
        times = case["seconds"]
        assert case["ratios"]["POT loop"]["value"] == pytest.approx(times["POT loop"] / times["ours"])
        assert case["ratios"]["products alone"]["met"] == (times["ours"] <= 2 * times["products alone"])
        assert float(case["notes"]["GeomLoss loop"].split()[4]) < 1e-6
    assert report["wasserstein"][0]["peak_megabytes"]["one cost matrix"] > 0
    assert report["cosine"]["ratios"]["by sequence"]["target"] == 3
    assert "peak memory" in printed and f"Written to {output}" in printed


def test_peers_compute_what_ours_does():
    sides = random_sides(3, 32, "cpu")
    torch.testing.assert_close(GEOMLOSS(*sides), wasserstein_distance_matrix(*sides), atol=1e-6, rtol=0)
    torch.testing.assert_close(cosine_by_sequence(*sides), cosine_similarity_matrix(*sides), atol=1e-6, rtol=0)
    products_alone([sides])()
    assert random_sides(2, 8, "cpu", dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_met_or_not():
    assert ratio(2.5, 2.0, at_most=True)["met"] is False and ratio(2.5, 2.0)["met"] is True
    assert "met" not in ratio(2.5, None)
