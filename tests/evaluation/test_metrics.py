"""Retrieval and nearest tokens on cases small enough to count by hand."""

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import tiny_processor
from tiny_training import tiny_rows, tiny_trainable

from speechllm.evaluation.nearest_tokens import nearest_tokens
from speechllm.evaluation.retrieval import chance_of, retrieval_intervals, retrieval_metrics, retrieval_ranks


def test_retrieval_by_hand():
    similarity = torch.tensor([[0.9, 0.1, 0.4], [0.8, 0.2, 0.1], [0.1, 0.3, 0.5]])  # rows: texts
    metrics = retrieval_metrics(similarity, ["a", "b", "c"], ks=(1, 2))
    assert metrics["recall@1"] == pytest.approx(2 / 3)  # the second utterance is nearest to the third text
    assert metrics["recall@2"] == 1
    assert metrics["mean_rank"] == pytest.approx(4 / 3)
    assert metrics["text_to_speech_mean_rank"] == pytest.approx(4 / 3)
    one_way = retrieval_metrics(torch.tensor([[0.9, 0.8], [0.1, 0.5]]), ["a", "b"])
    assert (one_way["mean_rank"], one_way["text_to_speech_mean_rank"]) == (1.5, 1)
    assert metrics["text_to_speech_recall@1"] == pytest.approx(2 / 3)


def test_equal_texts_ties_and_not_a_number():
    similarity = torch.tensor([[0.1, 0.9], [0.9, 0.1]])
    assert retrieval_metrics(similarity, ["same", "same"])["recall@1"] == 1
    assert retrieval_metrics(torch.ones(4, 4), list("abcd"))["recall@1"] == 0  # a collapsed model is no good one
    assert retrieval_metrics(torch.full((4, 4), torch.nan), list("abcd"))["recall@1"] == 0


def test_a_wrong_text_that_many_say_is_one_wrong_answer():
    """Three utterances of "a", whose text misleads one of "b"; of two spellings of "b" the nearer counts."""
    texts = ["a", "a", "a", "b", "b"]
    similarity = torch.tensor([[0.9, 0.9, 0.9, 0.8, 0.1]] * 3 + [[0.2, 0.9, 0.2, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7, 0.2]])
    ranks = retrieval_ranks(similarity, texts)
    assert ranks[""].tolist() == [1, 2, 1, 2, 1]  # a tie counts against us
    assert ranks["text_to_speech_"].tolist() == [1, 1, 1, 4, 1]
    similarity[4, 0] = torch.nan
    assert retrieval_ranks(similarity, texts)[""].tolist() == [2, 2, 1, 2, 1]


def test_ranks_of_distinct_texts_are_those_among_all():
    similarity = torch.randn(40, 40, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    similarity[3, 5] = similarity[7, 7] = torch.nan
    ranks = retrieval_ranks(similarity, [str(i) for i in range(40)])
    own = similarity.diagonal()
    assert ranks[""].tolist() == (~(similarity < own)).sum(0).tolist()
    assert ranks["text_to_speech_"].tolist() == (~(similarity < own[:, None])).sum(1).tolist()


@pytest.mark.parametrize("times", [[1] * 20, [8] * 5, [1, 2, 12]])
def test_chance_is_what_similarities_that_say_nothing_give(times):
    """Equal texts have one vector, so their rows are equal."""
    texts = [str(i) for i, count in enumerate(times) for _ in range(count)]
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(3000):
        rows = torch.randn(len(times), len(texts), generator=generator)
        found.append(retrieval_metrics(rows[[int(text) for text in texts]], texts, ks=(1,)))
    for prefix in ("", "text_to_speech_"):
        for measure, name in (("recall@1", "chance"), ("mean_rank", "chance_mean_rank")):
            values = [measured[f"{prefix}{measure}"] for measured in found]
            error = np.std(values) / len(values) ** 0.5
            assert chance_of(texts)[f"{prefix}{name}"] == pytest.approx(np.mean(values), abs=4 * error)


def test_intervals_are_those_of_scipys_bootstrap():
    """Percentiles of 1,000 and of 10,000 draws differ by a fraction of the standard error."""
    similarity = torch.randn(60, 60, generator=torch.Generator().manual_seed(0)) + 2 * torch.eye(60)
    texts = [str(i) for i in range(60)]
    found, values = retrieval_intervals(similarity, texts), retrieval_metrics(similarity, texts)
    assert found.keys() == values.keys()
    ranks = retrieval_ranks(similarity, texts)
    for name, queries in {
        "recall@1": ranks[""] <= 1,
        "text_to_speech_recall@5": ranks["text_to_speech_"] <= 5,
        "mean_rank": ranks[""],
    }.items():
        queries = queries.double().numpy()
        expected = stats.bootstrap((queries,), np.mean, n_resamples=10_000, method="percentile", rng=0)
        assert found[name] == pytest.approx(list(expected.confidence_interval), abs=0.2 * expected.standard_error)


def test_utterances_of_one_text_are_one_unit_of_the_intervals():
    """Ten utterances of each of two texts, of which all of one are found: not 20 independent ones."""
    similarity = torch.eye(2).repeat_interleave(10, 0).repeat_interleave(10, 1)
    similarity[:10, 10:] = 2  # the second text's utterances are nearest to the first
    found = retrieval_intervals(similarity, ["a"] * 10 + ["b"] * 10)
    assert retrieval_metrics(similarity, ["a"] * 10 + ["b"] * 10)["recall@1"] == 0.5
    assert found["recall@1"] == [0, 1]


def test_nearest_tokens_are_one_per_speech_token():
    model = tiny_trainable()
    processor = tiny_processor(model.config)
    rows = tiny_rows(2)
    found = nearest_tokens(model, processor, rows)
    assert [len(tokens) for tokens in found] == [processor.count_speech_tokens(len(row["audio"])) for row in rows]
    with torch.no_grad():  # an embedding table in which one entry is every speech token's nearest
        speech = model.get_audio_features(**processor.pad_features(processor.extract_features(rows[0]["audio"])))
        table = model.get_input_embeddings().weight
        table.copy_(-speech.pooler_output[0].expand_as(table))
        table[65] = speech.pooler_output[0]
    assert nearest_tokens(model, processor, rows[:1])[0][0] == processor.tokenizer.decode([65])
