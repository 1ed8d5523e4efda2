"""Two processes with four utterances each train as one with eight does."""

import re

import pytest
import torch
from filelock import FileLock
from tiny_training import weights_of
from two_processes import RUNS, run, run_sharded, run_twice

from speechllm import SpeechLLMForConditionalGeneration


UNLIKE_ONE = ("per device", "not finite", "own caches", "own text caches")


@pytest.fixture(scope="module")
def two(tmp_path_factory, worker_id):
    """What became of all runs on two processes, per process; the test workers share it."""
    folder = tmp_path_factory.getbasetemp()
    shared = (folder if worker_id == "master" else folder.parent) / "two_processes.pt"
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            torch.save(run_twice(tmp_path_factory.mktemp("two"), list(RUNS)), shared)
    return torch.load(shared, weights_only=False)


@pytest.mark.parametrize("name", [name for name in RUNS if name not in UNLIKE_ONE])
def test_two_processes_train_as_one(name, two, tmp_path):
    one = run(name, tmp_path)
    for found in two:
        (first, whole), *later = zip(found[name]["gradients"], one["gradients"], strict=True)
        if name == "wasserstein":  # whose sums of plans round with the order of the work: up to 1.5e-5 in elements of 5
            assert (first - whole).norm() < 1e-5 * whole.norm()
        else:
            torch.testing.assert_close(first, whole, atol=1e-5, rtol=0)
        for gradient, expected in later:  # of weights that the optimiser moved by Adam's ratios of small gradients
            torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-3)
        for parameter, value in found[name]["weights"].items():
            torch.testing.assert_close(value, one["weights"][parameter], atol=1e-5, rtol=0, msg=parameter)
    for log, expected in zip(two[0][name]["logs"], one["logs"], strict=True):
        assert log == pytest.approx(expected, abs=1e-5)


def test_without_gathering_two_processes_are_two_batches(two, tmp_path):
    assert two[0]["per device"]["logs"][0]["loss"] < 0.9 * run("cosine", tmp_path)["logs"][0]["loss"]


def test_sharded_weights_train_evaluate_save_and_resume_as_whole_ones(tmp_path):
    """FSDP2 as Accelerate sets it up for the trainers."""
    sharded = [found["sharded"] for found in run_twice(tmp_path, ["sharded"])]
    one = run_sharded(tmp_path / "one")
    for kind in one:
        for found in sharded:
            assert found[kind]["losses"] == pytest.approx(one[kind]["losses"], abs=1e-4)
            assert found[kind]["resumed"] == pytest.approx(one[kind]["losses"], abs=1e-4)
            assert found[kind]["evaluation"] == pytest.approx(one[kind]["evaluation"], abs=1e-4)
        saved, expected = (
            weights_of(SpeechLLMForConditionalGeneration.from_pretrained(folder).model.projector)
            for folder in (tmp_path / kind / "saved by 2", tmp_path / "one" / kind / "saved by 1")
        )
        for name, value in saved.items():
            torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=0, msg=name)


def test_every_process_says_what_is_not_finite(two):
    for found in two:
        assert (
            "on process 1: the similarities at layer 2 are not finite: text items [1]" in found["not finite"]["error"]
        )


@pytest.mark.parametrize("name", ["own caches", "own text caches"])
def test_every_process_says_that_a_cache_is_not_shared(name, two):
    """It would encode alone what is missing from its cache, which FSDP2 waits for in vain."""
    for found in two:
        assert re.search(
            r"Process 0 on \S+ does not see in .*/cache of [01]/.* process\(es\) \[1\] wrote", found[name]["error"]
        )
