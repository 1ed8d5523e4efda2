"""Similarities, transport plans and their figures, against Transformers' hidden states and other solvers."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog
from tiny import enliven, tiny_config, tiny_model, tiny_processor, tone

from speechllm.evaluation.alignment import (
    Alignment,
    align,
    plan_figure,
    similarity_figure,
    speech_token_edges,
    transport_plan,
)
from speechllm.evaluation.plots import svg_document
from speechllm.objectives import exact_wasserstein_distance_matrix


SENTENCE = "Hello, $x$ & <b>"
PREFIX = [1, 2, 3]


@pytest.mark.parametrize(("speech", "text"), [("whisper", "llama-tied"), ("hubert-layer", "gemma3"), ("wavlm", "gpt2")])
def test_layers_are_those_of_transformers(speech, text):
    model = enliven(tiny_model(speech, text=text))
    processor = tiny_processor(model.config)
    samples = tone(1.3)
    alignment = align(model, processor, samples, SENTENCE, PREFIX)
    text_ids = processor.tokenizer(SENTENCE, add_special_tokens=False).input_ids
    assert alignment.tokens == list(SENTENCE)

    def states(ids, **features):
        with torch.no_grad():
            output = model.model(input_ids=torch.tensor([ids]), output_hidden_states=True, **features)
        return torch.stack(output.hidden_states)[:, 0, len(PREFIX) :]  # (layers, tokens, dim)

    features = processor.pad_features(processor.extract_features(samples))
    count = processor.count_speech_tokens(len(samples))
    x, y = states([*PREFIX, *[processor.audio_token_id] * count], **features), states([*PREFIX, *text_ids])
    first = 1 if text == "gpt2" else 0  # whose state 0 here lacks the positions that Transformers' holds
    expected = torch.cosine_similarity(x[:, :, None], y[:, None], dim=-1)
    assert alignment.similarity.shape == expected.shape == (4, count, len(text_ids))
    torch.testing.assert_close(torch.tensor(alignment.similarity[first:]), expected[first:], atol=2e-5, rtol=0)

    x_mask, y_mask = torch.ones(1, count, dtype=torch.bool), torch.ones(1, len(text_ids), dtype=torch.bool)
    for layer in range(first, 4):
        distance = exact_wasserstein_distance_matrix(y[layer][None], y_mask, x[layer][None], x_mask)
        assert alignment.transport_cost(layer) == pytest.approx(distance.item(), abs=2e-5)


@pytest.mark.parametrize(("rows", "columns"), [(7, 7), (9, 4), (3, 8), (5, 1)])
def test_plan_is_the_cheapest(rows, columns):
    cost = np.random.default_rng(rows).random((rows, columns))
    plan = transport_plan(cost)
    assert (plan >= 0).all()
    np.testing.assert_allclose(plan.sum(0), 1 / columns, atol=1e-6)
    np.testing.assert_allclose(plan.sum(1), 1 / rows, atol=1e-6)
    by_row, by_column = np.eye(rows).repeat(columns, 1), np.tile(np.eye(columns), rows)
    marginals = np.concatenate([np.full(rows, 1 / rows), np.full(columns, 1 / columns)])
    best = linprog(cost.ravel(), A_eq=np.vstack([by_row, by_column]), b_eq=marginals).fun
    assert (plan * cost).sum() == pytest.approx(best, abs=1e-6)
    if rows == columns:
        assert best == pytest.approx(cost[linear_sum_assignment(cost)].mean(), abs=1e-6)


@pytest.mark.parametrize("speech", ["whisper", "hubert-layer", "wav2vec2-adapter"])
@pytest.mark.parametrize("seconds", [0.11, 1.0, 5.003])
def test_every_speech_token_has_its_time(speech, seconds):
    processor = tiny_processor(tiny_config(speech), segment_seconds=2.0)
    samples = round(seconds * 16_000)
    edges = speech_token_edges(processor, samples)
    assert len(edges) == processor.count_speech_tokens(samples) + 1
    assert edges[0] == 0 and edges[-1] == pytest.approx(seconds, abs=1e-4)
    assert (np.diff(edges) > 0).all()


def test_times_of_windows():
    processor = tiny_processor(tiny_config("whisper"))  # windows of 5 frames at 50 per second, 2 tokens each
    np.testing.assert_allclose(speech_token_edges(processor, 3_680), [0, 0.05, 0.1, 0.15, 0.2, 0.215, 0.23], atol=1e-9)


def test_no_tokens():
    model = tiny_model()
    with pytest.raises(ValueError, match="sentence is empty"):
        align(model, tiny_processor(model.config), tone(1.0), "")


def test_figures_show_the_layer_asked_for():
    generator = np.random.default_rng(0)
    similarity = generator.uniform(-1, 1, (3, 4, 2)).astype(np.float32)
    plan = np.stack([transport_plan(1 - layer) for layer in similarity])
    alignment = Alignment(["$x$", " "], np.array([0, 0.5, 1, 1.25, 1.5]), similarity, plan)
    for figure, expected in (
        (similarity_figure(alignment, 2), similarity[2]),
        (plan_figure(alignment, 2), 200 * plan[2]),
    ):
        axes = figure.axes[0]
        (mesh,) = axes.collections
        np.testing.assert_allclose(mesh.get_array().reshape(2, 4), expected.T, rtol=1e-6)
        np.testing.assert_allclose(mesh.get_coordinates()[0, :, 0], alignment.edges)
        assert axes.get_xlabel() == "speech (seconds)"
        assert axes.yaxis_inverted()  # the sentence begins at the top
        assert [label.get_text() for label in axes.get_yticklabels()] == ["$x$", "\N{OPEN BOX}"]
        assert ">$x$<" in svg_document(figure)


def test_labels_cannot_smuggle_markup():
    alignment = Alignment(["<script>"], np.array([0, 1.0]), np.zeros((1, 1, 1)), np.ones((1, 1, 1)))
    assert "<script" not in svg_document(similarity_figure(alignment, 0))
