"""The serving benchmark on a tiny random model: a real server, and a report that holds what the documentation quotes."""

import json

import pytest
import torch
from tiny import enliven, tiny_config, tiny_processor


pytest.importorskip("uvicorn", reason="the server needs uvicorn: pip install 'speechllm[serve]'")

from benchmarks.serving import main
from speechllm import SpeechLLMForConditionalGeneration


def test_it_reports_overhead_and_gain(tmp_path, capsys):
    config = tiny_config("whisper")
    torch.manual_seed(0)
    model = enliven(SpeechLLMForConditionalGeneration(config).eval())
    processor = tiny_processor(config)
    letters = {i for i in range(len(processor.tokenizer)) if processor.tokenizer.decode([i]).isalnum()}
    model.generation_config.suppress_tokens = sorted(set(range(config.text_config.vocab_size)) - letters)
    model.save_pretrained(tmp_path / "tiny", kind="full")
    processor.save_pretrained(tmp_path / "tiny")
    before = (tmp_path / "tiny/generation_config.json").read_text()

    output = tmp_path / "serving.json"
    main(f"--model {tmp_path / 'tiny'} --requests 2 --tokens 3 --seconds 0.5 --output {output}".split())
    text, report = capsys.readouterr().out, json.loads(output.read_text())
    assert report["tokens"] == 3 and report["audio_seconds"] == 0.5
    assert report["same_answers_of_2"] == 2  # the server did the work that it is compared with
    assert report["bare_seconds"] > 0 and report["served_seconds"] > 0 and report["overhead"] > 0
    rates = report["requests_per_second"]
    assert list(rates) == list(report["gain"]) == ["1", "4", "16"] and report["gain"]["1"] == 1
    for clients, rate in rates.items():
        assert rate > 0 and report["gain"][clients] == pytest.approx(rate / rates["1"])
        assert f"{clients:>2} client(s): {rate:.2f} requests/s" in text
    assert f"latency: {report['overhead']:.2f} x bare generate" in text
    assert (tmp_path / "tiny/generation_config.json").read_text() == before
