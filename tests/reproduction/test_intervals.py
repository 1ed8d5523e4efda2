"""Intervals against SciPy's and closed forms, and the verdicts on constructed numbers."""

import numpy as np
import pytest
from scipy import stats

from speechllm.evaluation.metrics.resampling import CorpusMetric
from speechllm.reproduction.claims import Claim, Comparison, decodability, judge, verdicts
from speechllm.reproduction.intervals import difference, estimate, holm, mean_over_seeds


def mean_metric(values):
    return CorpusMetric(np.array([[value, 1.0] for value in values]), lambda sums: sums[0] / sums[1])


# ---- intervals -------------------------------------------------------------------------------------------------------


def test_seeds_alone_give_students_interval():
    values = [0.3, 0.5, 0.9]
    found = estimate(values, np.full(100, 0.5), units=80)  # every resample of the test set is the same
    expected = stats.ttest_1samp(values, 0)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert found.error_of_test == 0


def test_test_set_alone_gives_the_means_own_interval():
    """Equal seeds: the standard error of a mean over independent utterances, s / sqrt(n), to the bootstrap's accuracy."""
    values = np.random.default_rng(0).normal(2, 1, 200)
    found = mean_over_seeds([mean_metric(values)] * 3, samples=4000)
    assert found.error_of_seeds == 0 and found.seeds == (pytest.approx(values.mean()),) * 3
    assert found.error_of_test == pytest.approx(values.std(ddof=0) / np.sqrt(200), rel=0.05)
    expected = stats.t.interval(0.95, 199, values.mean(), found.error_of_test)
    assert found.interval == pytest.approx(expected)


def test_both_parts_add_up():
    samples = np.random.default_rng(1).normal(0, 0.2, 1000)
    found = estimate([1.0, 1.4, 1.8], samples, units=50)
    of_seeds, of_test = 0.16 / 3, samples.var(ddof=1)
    error = np.sqrt(of_seeds + of_test)
    freedom = error**4 / (of_seeds**2 / 2 + of_test**2 / 49)
    assert found.interval == pytest.approx(stats.t.interval(0.95, freedom, 1.4, error))
    assert found.p == pytest.approx(2 * stats.t.sf(1.4 / error, freedom))


def test_one_seed_knows_the_test_set_alone():
    found = mean_over_seeds([mean_metric([0, 1, 1, 0])])
    assert np.isnan(found.error_of_seeds) and found.interval[0] < 0.5 < found.interval[1]


def test_of_one_unit_nothing_is_sure():
    found = estimate([0.2, 0.3], np.array([0.25] * 100), units=1)
    assert found.value == 0.25 and np.isnan(found.interval).all() and found.p == 1


def test_paired_difference_is_surer_than_two_means():
    generator = np.random.default_rng(2)
    hard = generator.normal(0, 5, 100)  # utterances differ much more than systems do
    a = [mean_metric(hard + generator.normal(1.0, 0.1, 100)) for _ in range(3)]
    b = [mean_metric(hard + generator.normal(0.0, 0.1, 100)) for _ in range(3)]
    found, alone = difference(a, b), mean_over_seeds(a)
    assert found.value == pytest.approx(1.0, abs=0.05) and found.p < 1e-4
    assert found.error_of_test < 0.05 * alone.error_of_test
    assert difference(b, a).value == -found.value
    with pytest.raises(ValueError, match="cannot be paired"):
        difference(a, b[:2])


def test_coverage():
    """Of 300 repetitions with differences between seeds and between utterances, the interval holds the truth in at least
    90% (it is meant to be 95%, and rather too wide)."""
    generator, hits = np.random.default_rng(3), 0
    for _ in range(300):
        utterances = generator.normal(0, 1, 40)
        seeds = [mean_metric(utterances + generator.normal(0, 0.3) + generator.normal(0, 0.5, 40)) for _ in range(3)]
        low, high = mean_over_seeds(seeds, samples=100).interval
        hits += low < 0 < high
    assert hits >= 270


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # the textbook's example
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


# ---- verdicts --------------------------------------------------------------------------------------------------------


def part(improvement, p):
    return {"improvement": improvement, "p": p, "seeds": [0], "allowed": 0.0}


@pytest.mark.parametrize(
    ("parts", "planned", "verdict"),
    [
        ([(2, 0.001), (1, 0.01)], 2, "confirmed"),
        ([(2, 0.001), (1, 0.3)], 2, "undecided"),
        ([(2, 0.001)], 2, "undecided"),  # the other was not run
        ([(-2, 0.001), (1, 0.3)], 2, "contradicted"),
        ([(-2, 0.001), (1, 0.001)], 2, "undecided"),  # true of one, false of the other
        ([(2, 0.03), (1, 0.04)], 2, "undecided"),  # each alone is below 0.05, but not for two tests
        ([(0, 0.0)], 1, "undecided"),
        ([], 2, "not run"),
    ],
)
def test_verdict(parts, planned, verdict):
    assert judge([part(*values) for values in parts], planned)["verdict"] == verdict


def test_direction_of_the_metric():
    """A lower WER is an improvement, and so is a higher F1."""
    claims = [Claim(task, task, (Comparison(task, "new", 100, "old", 100),)) for task in ("asr", "sqa")]
    low, high = ([mean_metric(np.random.default_rng(seed).normal(mean, 0.1, 60)) for seed in range(3)]
                 for mean in (1, 2))  # fmt: skip
    keys = {"asr": "wer", "sqa": "f1"}

    def cell(metrics):
        return {seed: {(task, name): metric for task in keys for name in (keys[task], "loss")}
                for seed, metric in enumerate(metrics)}  # fmt: skip

    recognition, questions = verdicts({("new", 100): cell(low), ("old", 100): cell(high)}, claims)
    assert recognition["by_metric"]["verdict"] == "confirmed" and questions["by_metric"]["verdict"] == "contradicted"
    assert recognition["by_loss"]["verdict"] == questions["by_loss"]["verdict"] == "confirmed"
    comparison = recognition["by_metric"]["comparisons"][0]
    assert comparison["improvement"] == pytest.approx(100, abs=5)  # per cent
    low_end, high_end = comparison["interval"]
    assert 0 < low_end < comparison["improvement"] < high_end


@pytest.mark.parametrize(("excess", "verdict"), [(0.0, "confirmed"), (0.05, "contradicted"), (0.01, "undecided")])
def test_no_worse_within_a_margin(excess, verdict):
    """A WER that is one point higher at most is as good; seeds and utterances differ by little."""
    claims = [Claim("gap", "gap", (Comparison("asr", "new", 100, "old", 100, margin=True),))]
    values = [np.random.default_rng(seed).normal(0.3, 0.01, 60) for seed in range(3)]

    def cell(shift):
        return {seed: {("asr", name): mean_metric(of_seed + shift) for name in ("wer", "loss")}
                for seed, of_seed in enumerate(values)}  # fmt: skip

    noise = np.random.default_rng(9).normal(0, 0.01, (3, 60))
    old = {seed: {key: mean_metric(of_seed + noise[seed]) for key in (("asr", "wer"), ("asr", "loss"))}
           for seed, of_seed in enumerate(values)}  # fmt: skip
    (found,) = verdicts({("new", 100): cell(excess + noise.mean()), ("old", 100): old}, claims)
    assert found["by_metric"]["verdict"] == verdict
    assert found["by_metric"]["comparisons"][0]["improvement"] == pytest.approx(-100 * excess, abs=0.2)


def probed(values, half=0.05):
    """One seed's probes, by how much above guessing at each place."""
    places = {f"layer {i}": {"above_guessing": {"value": value, "interval": [value - half, value + half]}}
              for i, value in enumerate(values)}  # fmt: skip
    return [{label: {"places": places} for label in ("gender", "noise")}]


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        ([0.3, 0.2, -0.3], "confirmed"),  # the last layer does not tell it without pretraining either
        ([0.3, 0.02, 0.3], "undecided"),
        ([0.3, -0.2, 0.3], "contradicted"),
    ],
)
def test_what_stays_decodable(after, verdict):
    rows = ("contr-cos-emb", "contr-cos-all", "contr-wasser-all")
    before = {"none": probed([0.4, 0.3, 0.01])}
    found = decodability({**before, **{row: probed(after) for row in rows}})
    assert found["by_metric"]["verdict"] == verdict
    assert all("at layer 1, the least of 2 places" in part["comparison"] for part in found["by_metric"]["comparisons"])
    if verdict == "confirmed":  # a row that was not probed is not held to be
        assert decodability({**before, rows[0]: probed(after)})["by_metric"]["verdict"] == "undecided"
    assert decodability({})["by_metric"]["verdict"] == "not run"
