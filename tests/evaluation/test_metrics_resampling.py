"""Intervals and paired tests: against sacreBLEU's own, exact distributions, and by their error rate under the null."""

import itertools
import random

import numpy as np
import pytest
import sacrebleu
from sacrebleu.significance import PairedTest, _bootstrap_resample, estimate_ci

from speechllm.evaluation.metrics import ScoringError, paired_test, score
from speechllm.evaluation.metrics.question_answering import mean_percent
from speechllm.evaluation.metrics.resampling import (
    CorpusMetric,
    approximate_randomisation,
    bootstrap_values,
    compared,
    interval,
    paired_bootstrap,
)
from speechllm.evaluation.metrics.translation import translation


def two_systems(count: int) -> tuple[list[str], list[str], list[str]]:
    """Sentences, and two systems of which the first gets more of their words."""
    rng = random.Random(0)
    vocabulary = "the a dog cat house tree river runs sleeps sees big small red old in on under".split()
    references = [" ".join(rng.choices(vocabulary, k=rng.randint(4, 12))) for _ in range(count)]

    def system(right: float) -> list[str]:
        return [
            " ".join(word if rng.random() < right else rng.choice(vocabulary) for word in text.split())
            for text in references
        ]

    return references, system(0.8), system(0.77)


def test_bootstrap_is_that_of_sacrebleu():
    """The same draws give the same scores, so the same interval (theirs are float32 sums)."""
    references, hypotheses, _ = two_systems(60)
    ours = translation(references, hypotheses, [None] * 60)[0]
    for name, metric in (("bleu", sacrebleu.BLEU()), ("chrf++", sacrebleu.CHRF(word_order=2))):
        _, theirs = _bootstrap_resample(metric._extract_corpus_statistics(hypotheses, [references]), metric, 200)
        theirs = np.array([found.score for found in theirs])
        values = bootstrap_values([ours[name]], 200, seed=12345)[0]  # sacreBLEU's seed
        assert values == pytest.approx(theirs, abs=1e-4)
        low, high = interval(values)
        assert (high - low) / 2 == pytest.approx(estimate_ci(theirs)[1], abs=1e-4)


def test_randomisation_is_that_of_sacrebleu():
    """The same exchanges give the same p (100 of them: both draw these at once)."""
    references, a, b = two_systems(60)
    test = PairedTest([("a", a), ("b", b)], {"bleu": sacrebleu.BLEU()}, [references], test_type="ar", n_samples=100)
    theirs = test()[1]["BLEU"][1].p_value
    ours = [translation(references, texts, [None] * 60)[0]["bleu"] for texts in (a, b)]
    assert approximate_randomisation(*ours, samples=100, seed=12345) == theirs
    assert 0.05 < theirs < 0.95  # a case that says something


def test_paired_bootstrap_is_that_of_sacrebleu():
    """sacreBLEU centres absolute differences, which for clear differences counts one side: half of the two-sided p."""
    references, a, b = two_systems(60)
    ours = [translation(references, texts, [None] * 60)[0]["bleu"] for texts in (a, b)]
    found = paired_bootstrap(*ours, samples=1000, seed=12345)
    test = PairedTest([("a", a), ("b", b)], {"bleu": sacrebleu.BLEU()}, [references], test_type="bs", n_samples=1000)
    theirs = test()[1]["BLEU"]
    assert found["difference"] == pytest.approx(theirs[0].score - theirs[1].score, abs=1e-9)
    values = bootstrap_values(ours, 1000, seed=12345)
    one_sided = np.abs(values[0] - values[1])
    expected = (np.sum(one_sided - one_sided.mean() > abs(found["difference"])) + 1) / 1001
    assert theirs[1].p_value == pytest.approx(expected, abs=0.003)
    assert found["interval"] == interval(values[0] - values[1])
    assert found["p"] >= theirs[1].p_value


def test_randomisation_tends_to_the_exact_distribution():
    a, b = mean_percent([1, 1, 1, 0, 1, 1]), mean_percent([0, 0, 1, 1, 0, 0])
    signs = np.array(list(itertools.product((-1, 1), repeat=6)))
    differences = signs @ (a.statistics[:, 0] - b.statistics[:, 0])
    exact = np.mean(np.abs(differences) >= abs(differences[-1]))
    assert approximate_randomisation(a, b, 10_000) == pytest.approx(exact, abs=0.02)  # 4 standard errors
    assert approximate_randomisation(a, a, 100) == 1


def test_both_tests_keep_their_error_rate_and_find_differences():
    rng = np.random.default_rng(0)
    low = {"randomisation": 0, "bootstrap": 0}
    for _ in range(100):
        a, b = (mean_percent(some) for some in rng.random((2, 50)))
        low["randomisation"] += approximate_randomisation(a, b, 200) < 0.05
        low["bootstrap"] += paired_bootstrap(a, b, 200)["p"] < 0.05
    assert all(count <= 13 for count in low.values())  # 5 expected; more than 13 in 1 of 1,000 cases
    better = mean_percent(b.statistics[:, 0] + 0.3)
    assert approximate_randomisation(better, b, 1000) < 0.01
    assert paired_bootstrap(better, b, 1000)["p"] < 0.01


def test_interval_of_a_mean_is_the_known_one():
    values = np.random.default_rng(0).normal(size=2000)
    low, high = interval(bootstrap_values([mean_percent(values)], 1000, seed=0)[0])
    assert (high - low) / 200 == pytest.approx(1.96 * values.std() / 2000**0.5, rel=0.1)
    assert (low + high) / 200 == pytest.approx(values.mean(), abs=0.01)


def test_clusters_widen_intervals():
    """Ten questions on each passage, all right or all wrong: ten passages are the evidence, not a hundred questions."""
    rows = [{"id": str(i), "target": "yes", "passage_id": i // 10} for i in range(100)]
    predictions = {row["id"]: "yes" if row["passage_id"] % 2 else "no" for row in rows}
    alone = score("sqa", rows, predictions, bootstrap=500)["f1_interval"]
    together = score("sqa", rows, predictions, bootstrap=500, cluster="passage_id")["f1_interval"]
    assert together[1] - together[0] > 2 * (alone[1] - alone[0])
    with pytest.raises(ScoringError, match="0: there is no `speaker`, which tells clusters apart"):
        score("sqa", rows, predictions, bootstrap=10, cluster="speaker")


def test_a_metric_that_is_undefined_has_no_p():
    undefined = CorpusMetric(np.ones((4, 1)), lambda sums: np.nan)
    found = compared(undefined, undefined)
    assert np.isnan(found["difference"]) and np.isnan(found["p"])


def test_paired_test_of_rows():
    references, a, b = two_systems(60)
    rows = [{"id": str(i), "text": text, "target": text} for i, text in enumerate(references)]
    a, b = ({str(i): text for i, text in enumerate(texts)} for texts in (a, b))
    for task, metric in (("asr", None), ("st", "chrf++"), ("sqa", "f1")):
        found = paired_test(task, rows, a, b, metric)
        metric = metric or "wer"
        assert found["difference"] == pytest.approx(score(task, rows, a)[metric] - score(task, rows, b)[metric])
        assert found["interval"][0] <= found["difference"] <= found["interval"][1]
        reverse = paired_test(task, rows, b, a, metric)
        assert reverse["difference"] == -found["difference"]
        assert reverse["p"] == pytest.approx(found["p"], abs=1e-9)
    with pytest.raises(ScoringError, match="Task 'asr' has no metric 'bleu'. Use one of wer, cer, mean_utterance_wer"):
        paired_test("asr", rows, a, b, "bleu")
