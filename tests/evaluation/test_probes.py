"""Probes on states in which it is known what can be read, where; metrics against scikit-learn; the command."""

import json
import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import soundfile
import torch
from sklearn.metrics import r2_score, roc_auc_score
from tiny import tiny_processor
from tiny_training import WORDS, tiny_rows, tiny_trainable

from speechllm.cli import main
from speechllm.data.splits import near_duplicate_clusters
from speechllm.evaluation import probe_splits, probes
from speechllm.evaluation.probe_labels import ProbeError, read_labels
from speechllm.evaluation.probes import area_under_roc, fresh_projector, probe_layers, probe_states, r_squared


COUNT = 240


def labelled_rows(count=COUNT, seed=0):
    """Utterances of four speakers; every text is spoken by two of them; noise, rate and words vary independently."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        text = i // 2
        words = [f"filler{text}", *generator.permutation(WORDS[:6])[:2], f"other{text}"]
        if i % 2:
            words = rows[-1]["text"].split()
        speaker = int(generator.integers(4))
        rows.append(
            {
                "id": f"row {i}",
                "text": " ".join(words),
                "speaker": f"speaker {speaker}",
                "gender": ("female", "male")[speaker % 2],
                "rate": float(generator.uniform(1, 4)),
                **([{}, {"snr_db": 10.0}, {"snr_db": 0.0}][int(generator.integers(3))]),
            }
        )
    return rows


def states_that_know(rows, *names, dim=24, noise=0.4, seed=1):
    """(rows, dim) states from which the named labels can be read linearly, and nothing else."""
    columns = []
    for label in read_labels(rows, names) if names else []:
        values = np.eye(len(label.names))[label.values] if label.kind == "classes" else label.values.astype(float)
        columns.append(values.reshape(len(rows), -1))
    generator = np.random.default_rng(seed)
    known = np.concatenate(columns, 1) if columns else np.zeros((len(rows), 1))
    mixed = known @ generator.normal(size=(known.shape[1], dim))
    return (mixed + noise * generator.normal(size=mixed.shape)).astype(np.float32)


# ---- what can be read, where -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report():
    rows = labelled_rows()
    knows = states_that_know(rows, "speaker", "noise", "rate", "words", noise=0.2)
    states = {
        "trained": {"encoder": knows, "0": states_that_know(rows, "noise")},
        "untrained": {"encoder": knows, "0": states_that_know(rows)},
    }
    return probe_states(states, rows, ["speaker", "noise", "rate", "words"], bootstrap=200)


@pytest.mark.parametrize(("label", "guessing"), [("speaker", 0.35), ("noise", 0.45), ("rate", 0.02), ("words", 0.5)])
def test_a_probe_finds_what_is_there(report, label, guessing):
    entry = report["labels"][label]
    at = entry["models"]["trained"]["encoder"]
    assert at["value"] > 0.85 and entry["guessing"]["value"] <= guessing
    assert at["above_guessing"]["interval"][0] > 0.2
    assert at["interval"][0] <= at["value"] <= at["interval"][1] and len(at["seeds"]) == 3
    assert at["value"] == pytest.approx(np.mean(at["seeds"]))
    assert entry["models"]["untrained"]["encoder"]["first_minus_this"] == {"value": 0, "interval": [0, 0]}


@pytest.mark.parametrize("label", ["speaker", "rate", "words"])
def test_a_probe_does_not_find_what_is_not_there(report, label):
    for model in ("trained", "untrained"):
        assert report["labels"][label]["models"][model]["0"]["above_guessing"]["interval"][0] < 0.02


def test_models_are_compared_in_pairs(report):
    of = report["labels"]["noise"]["models"]
    change = of["untrained"]["0"]["first_minus_this"]
    assert change["value"] == pytest.approx(of["trained"]["0"]["value"] - of["untrained"]["0"]["value"])
    assert change["interval"][0] > 0.2


def test_a_label_that_says_nothing_is_above_guessing_no_more_often_than_chance():
    """Intervals of 95% around a difference of nothing: labels drawn anew, states that know none of them."""
    wrong = 0
    for seed in range(20):
        rows = labelled_rows(120, seed)
        generator = np.random.default_rng(seed)
        states = {"m": {"0": generator.normal(size=(120, 8)).astype(np.float32)}}
        found = probe_states(states, rows, ["gender"], seeds=1, bootstrap=200, by_speaker=False)
        wrong += found["labels"]["gender"]["models"]["m"]["0"]["above_guessing"]["interval"][0] > 0
    assert wrong <= 3


def test_a_voice_that_is_misjudged_as_a_whole_is_one_mistake_and_not_many():
    """Where splits share no speaker, the interval is over speakers too."""
    rows = labelled_rows()
    for i, row in enumerate(rows):  # twelve speakers, three of whom sound like the other gender
        row["speaker"] = f"{row['gender']} {i % 6}"
    states = states_that_know(rows, "gender", noise=0.1)
    odd = np.array([row["speaker"] in ("female 0", "male 1", "male 2") for row in rows])
    states[odd] = states.mean(0) - (states[odd] - states.mean(0))
    clusters = np.array(near_duplicate_clusters([row["text"] for row in rows]))
    ((label, splits, split_by),) = probe_splits.plan_probes(rows, ["gender"])
    assert split_by == ["text", "speaker"] and len(label.index) == len(rows)
    of_texts, of_both = (
        probes._probe(label, {"m": {"0": states}}, rows, clusters, splits, 300, speakers)["models"]["m"]["0"]
        for speakers in (False, True)
    )
    assert of_texts["value"] == of_both["value"] > 0.5
    widths = [high - low for low, high in (of_texts["interval"], of_both["interval"])]
    assert widths[1] > 1.5 * widths[0]
    reported = probe_states({"m": {"0": states}}, rows, ["gender"], bootstrap=300)["labels"]["gender"]
    assert reported["models"]["m"]["0"]["interval"] == pytest.approx(list(of_both["interval"]))


# ---- splits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["noise", "gender", "words", "rate"])
def test_sides_share_no_text_and_no_speaker(name):
    rows = labelled_rows()
    clusters = np.array(near_duplicate_clusters([row["text"] for row in rows]))
    (label,) = read_labels(rows, [name])
    splits, split_by = probe_splits._splits(label, rows, clusters, 3, 0.3, by_speaker=True)
    assert split_by == ["text", "speaker"]
    for train, test in splits:
        assert not set(clusters[train]) & set(clusters[test])
        assert not {rows[i]["speaker"] for i in train} & {rows[i]["speaker"] for i in test}
        if name == "gender":
            assert {rows[i]["gender"] for i in train} == {rows[i]["gender"] for i in test} == {"female", "male"}
    assert len({tuple(test) for _, test in splits}) == 3
    again, _ = probe_splits._splits(label, rows, clusters, 3, 0.3, by_speaker=True)
    assert all((a[1] == b[1]).all() for a, b in zip(splits, again))


def test_rows_without_text_are_each_alone():
    rows = [{"id": f"one two three {i}"} for i in range(3)] + [{"id": str(i), "text": "the same"} for i in range(2)]
    assert len(set(probe_splits.text_clusters(rows))) == 4


def test_speakers_with_texts_of_their_own_lose_no_rows():
    rows = [
        {**row, "text": f"word{i} of{i} its{i} own{i}", "speaker": str(i % 20)} for i, row in enumerate(labelled_rows())
    ]
    clusters = np.array(near_duplicate_clusters([row["text"] for row in rows]))
    (label,) = read_labels(rows, ["noise"])
    (train, test), *_ = probe_splits._splits(label, rows, clusters, 1, 0.3, by_speaker=True)[0]
    assert len(train) + len(test) == len(rows) and len({rows[i]["speaker"] for i in test}) == 6


def test_a_voice_cannot_pass_for_a_gender():
    """States that know the speaker and nothing that speakers of a gender share: held-out speakers give it away."""
    rows = [
        {**row, "speaker": str(i % 16), "gender": ("female", "male")[i % 2]} for i, row in enumerate(labelled_rows())
    ]
    vectors = np.random.default_rng(0).normal(size=(16, 64))
    x = np.stack([vectors[int(row["speaker"])] for row in rows]).astype(np.float32)
    states = {"m": {"0": x + 0.1 * np.random.default_rng(1).normal(size=x.shape)}}
    across = probe_states(states, rows, ["gender"], bootstrap=50)["labels"]["gender"]
    within = probe_states(states, rows, ["gender"], bootstrap=50, by_speaker=False)["labels"]["gender"]
    assert within["models"]["m"]["0"]["value"] > 0.95 and across["models"]["m"]["0"]["value"] < 0.8
    assert within["notes"] == ["Test and training utterances share speakers."] and across["notes"] == []


def test_one_speaker_per_class_leaves_splits_by_text():
    rows = [{**row, "speaker": row["gender"]} for row in labelled_rows()]
    states = {"m": {"0": states_that_know(rows, "gender")}}
    entry = probe_states(states, rows, ["gender"], seeds=1, bootstrap=50)["labels"]["gender"]
    assert entry["split_by"] == ["text"] and entry["models"]["m"]["0"]["value"] > 0.9


def test_test_rows_do_not_touch_the_training():
    """Neither standardisation nor fit nor choice of strength: other states of the test rows change no prediction."""
    rows = labelled_rows()
    (label,) = read_labels(rows, ["noise"])
    clusters = np.array(near_duplicate_clusters([row["text"] for row in rows]))
    (train, test), *_ = probe_splits._splits(label, rows, clusters, 1, 0.3, by_speaker=False)[0]
    x = states_that_know(rows, "noise", noise=1.5)
    changed = x.copy()
    changed[test[1:]] = 1e3
    before, after = (probes._fit(label, states, train, test, clusters, 0) for states in (x, changed))
    assert before[0] == after[0] and (before[1:] != after[1:]).any()


# ---- measures --------------------------------------------------------------------------------------------------------


def test_measures_agree_with_scikit_learn_under_weights():
    generator = np.random.default_rng(0)
    truth, scores = generator.normal(size=40), generator.normal(size=40)
    present, ties = generator.random(40) < 0.3, np.round(scores, 0)
    weights = np.concatenate([np.ones((1, 40)), generator.integers(0, 4, (5, 40))])
    for draw, value in zip(weights, r_squared(truth + scores, truth, weights)):
        assert value == pytest.approx(r2_score(truth, truth + scores, sample_weight=draw), abs=1e-9)
    for values in (scores, ties):
        for draw, value in zip(weights, area_under_roc(values, present, weights, np.zeros(40))):
            assert value == pytest.approx(roc_auc_score(present, values, sample_weight=draw), abs=1e-9)


def test_telling_languages_is_not_knowing_words():
    present = np.array([True, True, False, False, False, False])
    languages = np.array(["es", "es", "es", "en", "en", "en"])
    scores = (languages == "es").astype(float)  # high for all of Spanish
    assert area_under_roc(scores, present, np.ones((1, 6)), languages) == 0.5
    assert area_under_roc(scores, present, np.ones((1, 6)), np.zeros(6)) == pytest.approx(0.875)
    assert np.isnan(area_under_roc(scores, present, np.ones((1, 6)), np.arange(6)))


# ---- labels ----------------------------------------------------------------------------------------------------------


def test_labels_are_read_by_kind():
    rows = labelled_rows()
    speaker, noise, rate, words = read_labels(rows, ["speaker", "noise", "rate", "words"])
    assert speaker.kind == noise.kind == "classes" and noise.names == ["0 dB", "10 dB", "clean"]
    assert [noise.names[v] == "clean" for v in noise.values] == ["snr_db" not in row for row in rows]
    assert rate.kind == "number" and rate.values.tolist() == [row["rate"] for row in rows]
    assert words.values[3].tolist() == [name in rows[3]["text"].split() for name in words.names]
    assert sorted(words.names) == sorted(WORDS[:6])  # the fillers are in too few texts
    as_text = [{name: str(value) for name, value in row.items()} for row in rows]  # as from CSV
    for ours, theirs in zip((speaker, noise, rate), read_labels(as_text, ["speaker", "noise", "rate"])):
        assert (ours.values == theirs.values).all() and ours.names == theirs.names
    many = [{**row, "snr_db": float(i)} for i, row in enumerate(rows)]
    assert read_labels(many, ["noise"])[0].names == ["79.67 dB to 159.33 dB", "above 159.33 dB", "up to 79.67 dB"]
    numbered = [{**row, "speaker": i % 3} for i, row in enumerate(rows)]
    assert read_labels(numbered, ["speaker"])[0].names == ["0", "1", "2"]


def test_rate_comes_from_text_and_duration_where_there_is_no_column():
    rows = [{"id": str(i), "text": "one two three", "duration": 1.0 + i} for i in range(30)]
    assert read_labels(rows, ["rate"])[0].values[1] == 1.5


def test_what_cannot_be_used_is_set_aside_and_counted():
    rows = labelled_rows()
    rows[0] = {**rows[0], "speaker": None}
    rows[1] = {**rows[1], "speaker": ["a", "list"]}
    rows[2] = {**rows[2], "speaker": "a rare one", "rate": math.nan, "snr_db": "loud"}
    speaker, rate, noise = read_labels(rows, ["speaker", "rate", "noise"])
    assert speaker.set_aside == {"without a text or number": 2, "class 'a rare one' has fewer than 10 utterances": 1}
    assert speaker.index.tolist() == list(range(3, COUNT))
    assert rate.set_aside == {"without a finite number": 1} and noise.set_aside == {"neither a number nor absent": 1}
    states = {"m": {"0": states_that_know(labelled_rows(), "speaker")}}
    entry = probe_states(states, rows, ["speaker"], seeds=1, bootstrap=20)["labels"]["speaker"]
    assert entry["utterances"] == COUNT - 3 and entry["models"]["m"]["0"]["value"] > 0.85


def test_labels_that_cannot_be_probed_are_errors_all_at_once():
    rows = [{"id": str(i), "text": f"text {i}", "speaker": "one", "gender": ["a", "b"][i == 3]} for i in range(40)]
    with pytest.raises(ProbeError) as error:
        read_labels(rows, ["speaker", "gender", "noise", "accent", "words"])
    for part in (
        "'one' 40 times",
        "'b' 1 times",
        "column `snr_db`",
        "column `accent` (there are gender, speaker)",
        "words:",
    ):
        assert part in str(error.value)
    with pytest.raises(ProbeError, match="no label"):
        read_labels(rows, [])
    constant = [{"id": str(i), "rate": 2.0} for i in range(40)]
    with pytest.raises(ProbeError, match="all are the same"):
        read_labels(constant, ["rate"])
    one_text = [{**row, "text": "always the same few words"} for row in labelled_rows()]
    with pytest.raises(ProbeError, match="no split by text"):
        probe_states({"m": {"0": np.ones((COUNT, 2))}}, one_text, ["speaker"])


def test_classes_of_one_language_each_are_noted():
    rows = [{**row, "language": row["speaker"]} for row in labelled_rows()]
    states = {"m": {"0": states_that_know(rows, "speaker")}}
    entry = probe_states(states, rows, ["speaker"], seeds=1, bootstrap=20)["labels"]["speaker"]
    assert entry["notes"] == ["Every class has one language: the probe may tell languages apart."]


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Loud and quiet tones in files, a manifest, and a checkpoint."""
    folder = tmp_path_factory.mktemp("spoken")
    model = tiny_trainable()
    processor = tiny_processor(model.config)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    rows = []
    for i, row in enumerate(tiny_rows(48)):
        quiet = i % 2 == 0
        soundfile.write(folder / f"{i}.wav", row["audio"] * (0.05 if quiet else 1), 16_000)
        rows.append({"audio": f"{i}.wav", "text": f"{row['text']} {i}", "speaker": ["loud", "quiet"][quiet]})
    rows.append({"audio": "missing.wav", "text": "nobody", "speaker": "loud"})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, model, processor


def test_the_command_probes_a_checkpoint_before_and_after(spoken, tmp_path, capsys):
    folder, _, _ = spoken
    command = ["probe", "--model", str(folder / "model"), "--data", str(folder / "data.jsonl"), "--device", "cpu"]
    command += ["--labels", "speaker", "--untrained", "--layers", "0,3", "--seeds", "2", "--bootstrap", "50"]
    assert main([*command, "--output", str(tmp_path / "out"), "--feature_cache", str(tmp_path / "cache")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("speaker: ") and "1 utterance(s) set aside" in printed and "missing.wav" in printed
    report = json.loads((tmp_path / "out" / "probes.json").read_text())
    assert report["models"] == ["trained", "untrained"] and report["places"] == ["encoder", "0", "3"]
    assert report["utterances"] == 48 and len(report["set_aside"]) == 1
    of = report["labels"]["speaker"]["models"]
    assert of["trained"]["encoder"]["value"] == of["untrained"]["encoder"]["value"]
    page = (tmp_path / "out" / "probes.html").read_text()
    assert "<script" not in page and "src=" not in page and page.count("<svg") == 3
    for path in (tmp_path / "out" / "plots").glob("*.svg"):
        ElementTree.parse(path)

    assert main([*command, "--output", str(tmp_path / "again")]) == 0  # without the cache
    again = json.loads((tmp_path / "again" / "probes.json").read_text())
    assert again["labels"]["speaker"]["models"]["trained"]["encoder"] == of["trained"]["encoder"]


def test_the_command_tells_what_is_wrong_with_labels_before_loading_a_model(spoken, tmp_path, capsys):
    folder, _, _ = spoken
    command = ["probe", "--model", "no-such-model", "--data", str(folder / "data.jsonl"), "--output", str(tmp_path)]
    assert main([*command, "--labels", "speaker,accent"]) == 1
    assert "accent: no row has a value in the column `accent`" in capsys.readouterr().err
    assert main([*command, "--untrained", "--compare", "other"]) == 2


def test_models_are_compared_on_the_places_and_rows_that_both_have(spoken):
    folder, model, processor = spoken
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    rows = [{**row, "audio": str(folder / row["audio"])} for row in rows]
    other = tiny_trainable("gpt2")
    report = probe_layers(
        model, processor, rows, ["speaker"], "0,-1", compare={"gpt2": (other, tiny_processor(other.config), None)},
        seeds=1, bootstrap=20,
    )  # fmt: skip
    assert report["places"] == ["encoder", "0", "3"] and report["models"] == ["trained", "gpt2"]


def test_a_fresh_projector_is_as_new_and_only_for_a_while():
    model = tiny_trainable()
    trained, new = model.model.projector, []
    for seed in (0, 0, 1):
        with fresh_projector(model, seed):
            new.append({name: value.clone() for name, value in model.model.projector.named_parameters()})
    assert model.model.projector is trained
    assert all(torch.equal(new[0][name], new[1][name]) for name in new[0])
    assert not torch.equal(new[0]["window_model.queries"], new[2]["window_model.queries"])
    for name, parameter in trained.named_parameters():  # `tiny_trainable` leaves its projector as initialised
        assert new[0][name].shape == parameter.shape
        spread = parameter.std(correction=0).item()
        assert new[0][name].std(correction=0).item() == pytest.approx(spread, rel=0.3, abs=1e-6), name
