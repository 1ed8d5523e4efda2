import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from tiny import full_disk

from speechllm.evaluation import plots
from speechllm.quickstart import takeaways
from speechllm.quickstart.report import audio_address, strict_json, word_diff, write_report


LAYERS = ["0", "5", "10"]
HOSTILE = "<script>alert('x')</script> & \"quoted\" <img src=https://example.org/x.png> $\\frac{"
VOID = {"meta", "link", "br", "img", "input", "hr", "source", "col"}


def full_report(folder: Path) -> dict:
    """A report with every part, small."""
    audio = folder / "said.flac"
    soundfile.write(audio, 0.3 * np.sin(np.arange(16_000) / 20), 16_000)
    matrix = (np.eye(4) + 0.1).tolist()
    arm = {"seconds": 170.0, "cer": 0.4, "llm_tokens": 152_000, "history": [{"step": 5, "loss": 3.0}]}
    return {
        "status": "complete",
        "stage": "everything",
        "next": "",
        "command": "speechllm quickstart --output runs/quickstart",
        "seed": 0,
        "source": "packages",
        "versions": {"speechllm": "0.1.0", "torch": "2.11.0"},
        "machine": {"platform": "Linux", "cpus": 2},
        "created": "2025-06-01T12:34:56+00:00",
        "credits": [
            {"name": "weights", "version": "1", "licence": "MIT", "what": "An encoder", "sha256": "ab" * 32},
            {"name": "data", "version": "2", "licence": "CC-BY-4.0", "what": "Speech", "revision": "cd" * 20},
        ],
        "data": {
            "train_utterances": 411,
            "test_utterances": 108,
            "train_minutes": 16.4,
            "test_minutes": 6.1,
            "dropped_near_duplicates": 35,
            "set_aside": [{"id": "broken", "reason": "too short"}],
        },
        "model": {
            "speech_encoder": "Whisper tiny.en",
            "language_model": "SmolLM2",
            "trainable_parameters": 5_012_352,
            "total_parameters": 147_802_368,
            "speech_tokens_per_second": 5.9,
        },
        "pretraining": {
            "layers": [0, 5, 10],
            "steps": 40,
            "seconds": 248.0,
            "chance": 1 / 108,
            "schedule": "0:emb 20:all",
            "recall_at_1": {
                "before": dict.fromkeys(LAYERS, 0.0093),
                "after_embedding": {"0": 0.5, "5": 0.06, "10": 0.04},
                "after": {"0": 0.5, "5": 0.6, "10": 0.46},
            },
            "recall_at_5": {"before": dict.fromkeys(LAYERS, 0.05), "after": dict.fromkeys(LAYERS, 0.9)},
            "history": [
                {"step": 10, "loss": 3.0, "loss_layer_0": 3.0},
                {"step": 20, "loss": 2.0, "loss_layer_0": 2.0},
                {"step": 30, "loss": 7.0, "loss_layer_0": 1.5, "loss_layer_5": 2.5, "loss_layer_10": 3.0},
                {"step": 40, "loss": 4.0, "loss_layer_0": 1.0, "loss_layer_5": 1.5, "loss_layer_10": 1.5},
            ],
            "similarity": {
                "layers": [0, 10],
                "before": {"0": matrix[::-1], "10": matrix[::-1]},
                "after": {"0": matrix, "10": matrix},
                "texts": ["one", "two", "three", "four"],
            },
            "nearest_tokens": [
                {"id": "said", "text": "Press two now", "before": ["x", "\n"], "after": [" press", " press", " tw"]}
            ],
            "llm_tokens": 389_000,
        },
        "fine_tuning": {
            "lora_rank": 8,
            "arms": [
                {**arm, "name": "pretrained", "label": "pretrained", "steps": 200, "loss": 2.46, "wer": 0.62},
                {**arm, "name": "scratch_equal_steps", "label": "scratch", "steps": 200, "loss": 3.7, "wer": 1.21},
                {
                    **arm,
                    "name": "scratch_equal_compute",
                    "label": "scratch, longer",
                    "steps": 700,
                    "loss": 2.7,
                    "wer": 0.71,
                    "llm_tokens_total": 541_000,
                },
                {**arm, "name": "lora", "label": "LoRA", "steps": 150, "loss": 2.3, "wer": 0.53},
            ],
            "verdict": "Pretraining helps.",
        },
        "samples": [
            {
                "id": "said",
                "audio": str(audio),
                "reference": "Press two now.",
                "hypotheses": {"pretrained": "press two how", "scratch_equal_steps": "the"},
                "wer": {"pretrained": 1 / 3, "scratch_equal_steps": 1.0},
            }
        ],
        "peak_memory_bytes": 3_412_000_000,
        "seconds": {"fetching": 41.0, "pretraining": 248.0},
    }


class Page(HTMLParser):
    """Checks nesting while parsing and collects tags, attributes and text."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        self.text.append(data)

    def has(self, text: str) -> bool:
        return text in " ".join("".join(self.text).split())


def read(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_full_report(tmp_path):
    write_report(full_report(tmp_path), tmp_path / "run")
    page = read(tmp_path / "run")
    assert page.has("Complete. everything")
    assert page.has("Before pretraining 1 in 100 utterances finds its transcript among 108; after it, 52 in 100")
    assert page.has("Before pretraining 0 of 4 recordings are closest to their own transcript; after it, 4.")
    assert page.has("pretrained projector gets 62% of the words wrong, the one from scratch 121%")
    assert page.has("Pretraining pays for itself: 9 points fewer.")
    assert page.has("SHA-256 " + "ab" * 32) and page.has("CC-BY-4.0")
    assert not page.has("not run yet") and not page.has("None") and not page.has("nan")
    assert (tmp_path / "run" / "report.html").stat().st_size < 3_000_000
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    drawn = {path.stem for path in (tmp_path / "run" / "plots").glob("*.svg")}
    assert drawn == {path.stem for path in (tmp_path / "run" / "plots").glob("*.png")}
    assert drawn >= {"recall_per_layer", "loss_per_layer", "loss_total", "similarity_layer_0", "error_rates"}
    assert not list((tmp_path / "run").glob(".*"))
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == strict_json(full_report(tmp_path))


def test_page_is_self_contained_and_accessible(tmp_path):
    write_report(full_report(tmp_path), tmp_path)
    page = read(tmp_path)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base"}
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "poster", "data", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, name)
        assert not any(name.startswith("on") for name in attributes)
        if tag == "svg":
            assert attributes["role"] == "img" and len(attributes["aria-label"]) > 20
    styles = " ".join(re.findall(r"<style.*?</style>", (tmp_path / "report.html").read_text(), re.DOTALL))
    assert "@import" not in styles and not re.search(r"url\((?!#)", styles)
    assert dict(page.tags)["html"]["lang"] == "en"
    assert any(attributes.get("name") == "viewport" for tag, attributes in page.tags if tag == "meta")


def test_audio_is_embedded_and_plays_back(tmp_path):
    import base64
    import io

    write_report(full_report(tmp_path), tmp_path)
    (audio,) = [attributes for tag, attributes in read(tmp_path).tags if tag == "audio"]
    kind, _, content = audio["src"].partition(";base64,")
    assert kind in ("data:audio/mpeg", "data:audio/flac") and "controls" in audio
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(content)))
    assert rate == 16_000 and abs(len(samples) - 16_000) < 4_000


def test_audio_of_rare_rates_and_bad_files(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "rare.wav", np.zeros((500, 2)), 17_001)
    assert audio_address(tmp_path / "rare.wav").startswith("data:audio/flac")
    (tmp_path / "text.wav").write_text("not audio")
    report = full_report(tmp_path)
    sample = report["samples"][0]
    names = ["said.flac", "missing.wav", "text.wav"]
    report["samples"] = [{**sample, "audio": tmp_path / name} for name in names] + [{**sample, "audio": None}]
    write_report(report, tmp_path)
    page = read(tmp_path)
    assert sum(tag == "audio" for tag, _ in page.tags) == 1
    assert page.has("The audio could not be read") and page.has("No audio.")
    monkeypatch.setattr("speechllm.quickstart.report.AUDIO_BUDGET", 10)
    write_report(report, tmp_path)
    assert read(tmp_path).has("Audio left out to keep this page small.")


@pytest.mark.parametrize(
    "kept", [(), ("data",), ("pretraining",), ("fine_tuning",), ("samples", "seconds"), ("credits",)]
)
def test_partial_reports(tmp_path, kept):
    report = full_report(tmp_path)
    partial = {key: report[key] for key in kept} | {"status": "running", "stage": "this", "next": "that"}
    write_report(partial, tmp_path)
    page = read(tmp_path)
    assert page.has("Running. Done: this.") and page.has("Next: that.")
    assert page.has("not run yet")
    write_report({**partial, "status": "complete"}, tmp_path)
    assert read(tmp_path).has("not part of this run")


def test_empty_and_hollow_reports(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "svg_document", lambda figure: "<svg ></svg>")  # drawing takes most of the time
    monkeypatch.setattr(plots, "png_bytes", lambda figure: b"")
    write_report({}, tmp_path)
    read(tmp_path)
    for hollow in (None, {}):
        parts = ("data", "model", "pretraining", "fine_tuning", "samples", "seconds", "credits", "versions", "machine")
        write_report(dict.fromkeys(parts, hollow), tmp_path)
        read(tmp_path)
    report = full_report(tmp_path)
    for section in ("data", "model", "pretraining", "fine_tuning"):
        for key in report[section]:
            write_report({section: {k: v for k, v in report[section].items() if k != key}}, tmp_path)
            read(tmp_path)
            write_report({section: {key: report[section][key]}}, tmp_path)
            read(tmp_path)


def test_first_look_before_pretraining(tmp_path):
    report = full_report(tmp_path)
    pretraining = {"recall_at_1": {"before": report["pretraining"]["recall_at_1"]["before"]}, "chance": 1 / 108}
    write_report({"status": "running", "pretraining": pretraining}, tmp_path)
    page = read(tmp_path)
    assert page.has("Before pretraining 1 in 100 utterances finds its transcript among 108 (mean over 3 layers")
    assert page.has("Pretraining: not run yet.")


def test_hostile_texts_stay_texts(tmp_path):
    def poison(value):
        if isinstance(value, dict):
            return {key: value[key] if key in ("name", "schedule") else poison(value[key]) for key in value}
        if isinstance(value, list):
            return [poison(item) for item in value]
        return HOSTILE + "\x00\ud800" if isinstance(value, str) else value

    report = full_report(tmp_path)
    poisoned = poison(report) | {"status": "complete"}
    poisoned["seconds"] = {HOSTILE: 1.0}
    poisoned["fine_tuning"]["arms"][3]["name"] = HOSTILE
    poisoned["samples"][0]["audio"] = report["samples"][0]["audio"]
    write_report(poisoned, tmp_path)
    page = read(tmp_path)
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert page.has("<script>alert('x')</script>")
    json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))


def test_numbers_that_are_none(tmp_path):
    def spoil(value):
        if isinstance(value, dict):
            return {key: spoil(item) for key, item in value.items()}
        if isinstance(value, list):
            return [spoil(item) for item in value]
        return math.nan if isinstance(value, float) else value

    write_report(spoil(full_report(tmp_path)), tmp_path)
    text = (tmp_path / "report.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in report.json"))
    read(tmp_path)


def test_strict_json():
    given = {0: [np.float32(0.5), np.array([1, 2]), torch.tensor(math.inf), (Path("a"), True, None)], "x": -math.inf}
    assert strict_json(given) == {"0": [0.5, [1, 2], None, ["a", True, None]], "x": None}
    assert strict_json("a\x00\ud800é\n") == "a\ufffd\ufffdé\n"
    with pytest.raises(TypeError, match=r"report\.a\[1\] is a set"):
        strict_json({"a": [0, {1}]})


def test_a_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    write_report({"stage": "first"}, tmp_path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report({"stage": "second"}, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["stage"] == "first"
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_is_named_and_leaves_the_old_report(tmp_path):
    write_report({"stage": "first"}, tmp_path)
    with full_disk(room=1_000), pytest.raises(OSError, match=f"Cannot save to {tmp_path}: .* Free some space"):
        write_report({"stage": "second " * 300}, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["stage"] == "first"


def test_word_diff():
    runs = [
        (run["kind"], run["said"], run["heard"]) for run in word_diff("Press two, now - please!", "press too now a")
    ]
    assert runs == [
        ("same", "Press", "press"),
        ("wrong", "two,", "too"),
        ("same", "now", "now"),
        ("wrong", "please!", "a"),
    ]
    assert [run["kind"] for run in word_diff("a b", "a")] == ["same", "missing"]
    assert [run["kind"] for run in word_diff("a", "a b")] == ["same", "extra"]
    assert word_diff("", "") == []


def test_the_page_says_what_each_stage_trains(tmp_path):
    report = {"model": {"trainable_parameters": 100}, "fine_tuning": {"lora_rank": 0}}
    assert takeaways.lora(report["model"], report["fine_tuning"]) is None
    write_report(report, tmp_path)
    assert read(tmp_path).has("writing down what was said.") and not read(tmp_path).has("LoRA")
    report["fine_tuning"] = {"lora_rank": 4, "arms": []}
    assert takeaways.lora(report["model"], report["fine_tuning"]) == "LoRA matrices of rank 4 on the LLM"
    report["fine_tuning"]["arms"] = [{"name": "pretrained", "trainable_parameters": 1_200}]
    write_report(report, tmp_path)
    assert read(tmp_path).has(
        "pretraining trains 100 parameters; fine-tuning also trains LoRA matrices of rank 4 on the "
    )
    assert read(tmp_path).has("on the LLM (1,100 parameters).")


def test_takeaways_say_when_nothing_was_gained():
    pretraining = {"recall_at_1": {"before": {"0": 0.01}, "after": {"0": 0.02}}, "chance": 0.01}
    assert takeaways.recall(pretraining, 108).startswith("Pretraining did not help retrieval: before it 1 in 100")
    arms = [
        {"name": "pretrained", "wer": 0.60, "steps": 10},
        {"name": "scratch_equal_steps", "wer": 0.61, "steps": 10},
        {"name": "scratch_equal_compute", "wer": 0.50, "steps": 30},
    ]
    assert "no clear difference" in takeaways.comparison({"arms": arms}, "scratch_equal_steps")
    text = takeaways.comparison({"arms": arms}, "scratch_equal_compute")
    assert "does not pay for itself on this task: 10 points more." in text
    rising = {"history": [{"step": 1, "loss_layer_0": 1.0}, {"step": 2, "loss_layer_0": 2.0}]}
    assert takeaways.losses(rising).startswith("The loss did not fall: 1.00 nats at the start, 2.00")
    same = [{"text": "press two", "before": ["press"], "after": ["press"]}]
    assert takeaways.nearest_tokens(same).endswith("Pretraining did not bring them closer to the words.")
    assert takeaways.similarity(np.eye(2).tolist(), np.eye(2).tolist()).endswith("; after it, 2: no better.")


@pytest.mark.parametrize(
    ("token", "text", "expected"),
    [
        (" two", "Press two", True),
        ("Ġpre", "Press two", True),
        ("wo", "Press two", False),
        ("2", "or 2 to", True),
        ("a", "a b", False),
        ("", "a b", False),
        ("…", "a … b", False),
    ],
)
def test_pieces_of_words(token, text, expected):
    assert takeaways.is_piece(token, text) is expected


def test_durations():
    said = [takeaways.duration(seconds) for seconds in (None, 3.21, 48, 200, 3900)]
    assert said == ["–", "3.2 s", "48 s", "3 min 20 s", "1 h 05 min"]
