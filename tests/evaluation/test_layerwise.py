"""Measures of alignment against definitions written out, the trainer's own evaluation, and states of known geometry."""

import itertools
import json
import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from tiny import tiny_processor
from tiny_training import contrastive, tiny_rows, tiny_trainable

from speechllm.data.items import approximate_length
from speechllm.evaluation import layerwise
from speechllm.evaluation.layerwise import alignment_report, layer_alignment, linear_cka, modality_gap, unbiased_hsic
from speechllm.evaluation.pooled_states import pooled_speech, pooled_text


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- CKA -------------------------------------------------------------------------------------------------------------


def test_hsic_is_the_mean_over_all_quadruples():
    """Its definition as a U-statistic (Song et al., 2012): E k12 l12 - 2 E k12 l13 + E k12 l34 over distinct indices."""
    x, y = normal(7, 3), normal(7, 2, seed=1) + normal(7, 3)[:, :2]
    k, l = x @ x.T, y @ y.T  # noqa: E741
    terms = [
        k[a, b] * l[a, b] - 2 * k[a, b] * l[a, c] + k[a, b] * l[c, d]
        for a, b, c, d in itertools.permutations(range(7), 4)
    ]
    assert unbiased_hsic(k, l).item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-10)


def test_cka_of_the_same_geometry_is_1():
    x = normal(20, 8)
    rotation = torch.linalg.qr(normal(8, 8, seed=1))[0]
    assert linear_cka(x, 3 * x @ rotation + normal(8, seed=2)) == pytest.approx(1, abs=1e-12)
    assert linear_cka(x, x @ normal(8, 8, seed=3)) < 0.99  # not every linear map keeps the geometry


def test_cka_of_unrelated_states_is_0_in_the_mean_for_any_dimension():
    values = [linear_cka(normal(12, 300, seed=2 * i), normal(12, 300, seed=2 * i + 1)) for i in range(200)]
    assert np.mean(values) == pytest.approx(0, abs=4 * np.std(values) / math.sqrt(200))

    def biased(x, y):  # as printed in Kornblith et al., 2019: far from 0 here
        x, y = x - x.mean(0), y - y.mean(0)
        return ((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())).item()

    assert biased(normal(12, 300), normal(12, 300, seed=1)) > 0.8


def test_cka_tends_to_the_biased_one_with_more_pairs():
    x = normal(3000, 4)
    y = x @ normal(4, 5, seed=1) + normal(3000, 5, seed=2)
    a, b = x - x.mean(0), y - y.mean(0)
    expected = ((b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())).item()
    assert linear_cka(x, y) == pytest.approx(expected, abs=2e-3)


def test_cka_of_a_constant_side_is_undefined():
    assert math.isnan(linear_cka(normal(6, 3), torch.ones(6, 3)))
    with pytest.raises(ValueError, match="at least 4 pairs"):
        linear_cka(normal(3, 2), normal(3, 2))


# ---- modality gap ----------------------------------------------------------------------------------------------------


def test_modality_gap_of_known_points():
    x = torch.tensor([[2.0, 0, 0], [0, 5, 0]])
    assert modality_gap(x, x) == 0
    assert modality_gap(x, -7 * x) == pytest.approx(math.sqrt(2))  # centroids (1/2, 1/2, 0) and minus that
    assert modality_gap(x[:1], -x[:1]) == pytest.approx(2)  # the largest there is


def test_gap_and_cka_are_two_things():
    """Speech shifted away from text as a whole: a gap, but the same geometry, and retrieval still finds its way."""
    text = normal(30, 16)
    shift = torch.zeros(16, dtype=torch.float64)
    shift[0] = 20
    measured = layer_alignment(text, text + shift, [str(i) for i in range(30)])
    assert measured["cka"] == pytest.approx(1, abs=1e-9) and measured["modality_gap"] > 0.8
    assert measured["cosine_within_speech"] > 0.8 > 0.2 > abs(measured["cosine_within_text"])
    together = layer_alignment(text, text, [str(i) for i in range(30)])
    assert together["intervals"]["recall@1"] == [1, 1] and together["intervals"]["text_to_speech_mean_rank"] == [1, 1]
    assert together["modality_gap"] == 0 and together["recall@1"] == 1 and together["cosine_pairs"] == pytest.approx(1)


def test_equal_texts_are_neither_negatives_of_the_loss_nor_unlike():
    text = torch.eye(4)[[0, 0, 1, 2]]
    measured = layer_alignment(text, text, ["a", "a", "b", "c"], temperature=1.0)
    assert measured["loss"] == pytest.approx(math.log(math.e + 2) - 1, rel=1e-6)  # of three texts, similarity 1 and 0
    assert measured["cosine_within_text"] == measured["cosine_between"] == 0


# ---- the report ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    model = tiny_trainable()
    return model, tiny_processor(model.config), tiny_rows(12)


def test_report_agrees_with_the_trainers_evaluation(trained, tmp_path):
    model, processor, rows = trained
    trainer = contrastive(tmp_path, model, held_out=rows, layers="0,2,3")
    expected = trainer.evaluate()
    report = alignment_report(model, processor, rows, [0, 2, 3], plans=0, batch_size=5)
    assert list(report["layers"]) == ["0", "2", "3"]
    for layer, measured in report["layers"].items():
        assert measured["loss"] == pytest.approx(expected[f"eval_loss_layer_{layer}"], abs=1e-4)
        for name in ("recall@1", "recall@5", "mean_rank", "text_to_speech_recall@1", "text_to_speech_mean_rank"):
            assert measured[name] == expected[f"eval_{name}_layer_{layer}"]
    assert report["chance"] == pytest.approx(1 / 12) and report["chance_loss"] == pytest.approx(math.log(12))
    assert report["chance_mean_rank"] == pytest.approx(6.5)
    assert report["text_to_speech_chance"] == pytest.approx(1 / 12)
    assert report["text_to_speech_chance_mean_rank"] == pytest.approx(6.5)


def test_chance_where_texts_repeat(trained, tmp_path):
    """Nine utterances of one text and three of others: four answers for an utterance, twelve for a text."""
    model, processor, rows = trained
    rows = [{**row, "text": "the same"} if i < 9 else row for i, row in enumerate(rows)]
    report = alignment_report(model, processor, rows, "0", output=tmp_path, plans=0)
    assert (report["chance"], report["chance_mean_rank"]) == (1 / 4, 2.5)
    assert report["text_to_speech_chance"] == pytest.approx((81 + 3) / 144)
    assert report["text_to_speech_chance_mean_rank"] == pytest.approx((9 * 1.3 + 3 * 6.5) / 12)
    assert report["layers"]["0"]["mean_rank"] <= 4 and report["layers"]["0"]["recall@5"] == 1
    page = " ".join((tmp_path / "alignment.html").read_text().split())
    assert "Guessing finds 25.0 of 100 from speech to text (the line), 58.3 from text to speech." in page
    lines = layerwise.alignment_figures(report)["mean_rank"][0].axes[0].get_lines()
    assert {"guessing, speech to text (2.5)", "guessing, text to speech (2.6)"} <= {line.get_label() for line in lines}


def test_pooled_states_are_means_of_transformers_states(trained):
    model, processor, rows = trained
    rows = [{**rows[0], "audio": np.concatenate([row["audio"] for row in rows])}, *rows[1:4]]
    prefix = [5, 6]
    pooled = pooled_speech(model, processor, rows, [0, 3], prefix=prefix, batch_size=3)
    texts = pooled_text(model, processor, ["one", "two words", "one"], [0, 3], prefix=prefix)
    for i, row in enumerate(rows):
        features = processor.pad_features(processor.extract_features(row["audio"]))
        count = processor.count_speech_tokens(len(row["audio"]))
        ids = torch.tensor([[*prefix, *[processor.audio_token_id] * count]])
        with torch.no_grad():
            states = model.model(input_ids=ids, output_hidden_states=True, **features).hidden_states
            frames, lengths = model.model.encode_speech(*features.values())
        torch.testing.assert_close(pooled.states["encoder"][i], frames[0, : lengths[0]].mean(0), atol=1e-5, rtol=1e-5)
        for layer in (0, 3):
            expected = states[layer][0, 2:].mean(0)
            torch.testing.assert_close(pooled.states[str(layer)][i], expected, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        ids = torch.tensor([[*prefix, *processor.tokenizer("two words", add_special_tokens=False).input_ids]])
        states = model.model(input_ids=ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(texts["3"][1], states[3][0, 2:].mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(texts["3"][0], texts["3"][2])


def test_lengths_for_sorting_are_on_one_scale(tmp_path):
    """All sources of two seconds, of which no file is opened."""
    samples, size = np.zeros(32_000, np.float32), 64_000
    path = tmp_path / "a.wav"
    path.write_bytes(bytes(size))
    shard = tmp_path / "shard.tar"
    shard.write_bytes(bytes(50 * size))
    sources = [
        str(path),
        {"path": str(path)},
        bytes(size),
        {"bytes": bytes(size), "path": "a.wav"},
        samples,
        torch.from_numpy(samples)[None],
        {"array": np.zeros(16_000), "sampling_rate": 8_000},
        {"path": str(shard), "byte_offset": 512, "byte_length": size},
        {"path": str(shard), "offset": 3.0, "duration": 2.0},
        {"parts": [{"path": str(path), "duration": 0.5}, np.zeros(8_000), bytes(size // 2)]},
    ]
    assert [approximate_length({"audio": source}) for source in sources] == [2.0] * len(sources)
    assert approximate_length({"audio": {"parts": [samples] * 2}, "sampling_rate": 32_000}) == 2
    assert approximate_length({"audio": {"path": str(path), "duration": "soon"}}) == 2  # decoding will tell


def test_plans_that_are_left_out_for_want_of_pot_are_said(trained, tmp_path, monkeypatch):
    model, processor, rows = trained
    monkeypatch.setattr(layerwise, "find_spec", lambda name: None)  # as where it is not installed
    report = alignment_report(model, processor, rows, "0", output=tmp_path)
    assert report["transport"] == [] and "speechllm[transport]" in report["transport_left_out"]
    assert "No transport plans: POT is not installed" in (tmp_path / "alignment.html").read_text()


def test_report_is_one_page_and_strict_json(trained, tmp_path):
    model, processor, rows = trained
    broken = {"id": "broken", "audio": str(tmp_path / "missing.wav"), "text": "three whole words"}
    silent = {"id": "no text", "audio": rows[0]["audio"]}
    rows = [{**row, "text": f"{row['text']} & <b>"} for row in rows]
    report = alignment_report(model, processor, [broken, *rows, silent], "all", output=tmp_path / "out", plans=2)
    assert json.loads((tmp_path / "out" / "alignment.json").read_text()) == report
    assert {item["id"] for item in report["set_aside"]} == {"broken", "no text"} and report["utterances"] == 12
    page = (tmp_path / "out" / "alignment.html").read_text()
    assert "<script" not in page and "<b>" not in page and "src=" not in page and page.count("<svg") == 6 + 2 * 2
    assert (
        "data:image" in page and "img-src data:" in page
    )  # the plans are pictures, which the page must let itself show
    for path in (tmp_path / "out" / "plots").glob("*.svg"):
        ElementTree.parse(path)
    assert "text_to_speech_mean_rank" in page and report["transport_left_out"] is None
    first, second = report["transport"]
    assert first["text"] == rows[0]["text"] and first["other_text"] == second["text"]
    assert first["cost"].keys() == report["layers"].keys() and all(0 <= cost <= 2 for cost in first["cost"].values())


def test_too_little_to_measure_is_an_error(trained, tmp_path):
    model, processor, rows = trained
    with pytest.raises(ValueError, match="needs 4 utterances"):
        alignment_report(model, processor, rows[:3], plans=0)
    with pytest.raises(ValueError, match="there is no `text`|has no `text`"):
        alignment_report(model, processor, [{"audio": rows[0]["audio"]}], plans=0)
    with pytest.raises(ValueError, match="indices from 0 to 3"):
        alignment_report(model, processor, rows, "7", plans=0)


def test_more_rows_than_allowed_are_drawn_the_same_every_time(trained):
    model, processor, rows = trained
    reports = [alignment_report(model, processor, rows, "0", plans=0, maximum_rows=6) for _ in range(2)]
    assert reports[0] == reports[1] and reports[0]["utterances"] == 6


def test_states_that_are_not_numbers_are_an_error(trained):
    _, processor, rows = trained
    model = tiny_trainable()
    with torch.no_grad():
        model.model.projector.window_model.linear.bias[0] = math.nan
    with pytest.raises(ValueError, match="12 of 12 states at '0' hold NaN"):
        alignment_report(model, processor, rows, "0", plans=0)
