"""The quick start end to end: on tiny models in the fast suite, on the real ones (few steps) in the slow one."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from tiny import SPEECH, TEXT, tiny_feature_extractor, tiny_tokenizer, tone
from transformers import AutoConfig, AutoModelForCausalLM, WhisperForConditionalGeneration

from speechllm.quickstart import run as quickstart_run
from speechllm.quickstart.run import Quickstart, verdict
from speechllm.quickstart.settings import QuickstartArguments
from speechllm.quickstart.sources import Source


WORDS = "one two three four five six seven eight nine ten red green blue cat dog bird tree house sun moon".split()


@pytest.fixture
def tiny_source(tmp_path: Path) -> Source:
    """Tiny models saved as folders, and 24 tones that stand for 24 different texts."""
    speech, text = tmp_path / "speech", tmp_path / "text"
    WhisperForConditionalGeneration(AutoConfig.for_model("whisper", **SPEECH["whisper"][1])).save_pretrained(speech)
    tiny_feature_extractor("whisper").save_pretrained(speech)
    tokenizer = tiny_tokenizer()
    values = {**TEXT["llama-tied"][1], "vocab_size": len(tokenizer)}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **values)).save_pretrained(text)
    tokenizer.save_pretrained(text)
    rows = []
    for i in range(24):
        path = tmp_path / f"{i}.wav"
        soundfile.write(path, tone(0.4 + 0.05 * i, seed=i), 16_000)
        words = [WORDS[(i * k + k) % len(WORDS)] + str(i) for k in (1, 3, 7)]
        rows.append({"id": str(i), "audio": str(path), "text": " ".join(words), "duration": 0.4 + 0.05 * i})
    return Source("packages", str(speech), None, str(text), None, rows, credits=[])


def test_every_stage_leaves_its_part_of_the_report(tiny_source, tmp_path, monkeypatch):
    monkeypatch.setenv("SPEECHLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(quickstart_run, "load_source", lambda name: tiny_source)
    monkeypatch.setattr(quickstart_run, "PRETRAINING_BATCH", 4)
    monkeypatch.setattr(quickstart_run, "FINE_TUNING_BATCH", 4)
    settings = QuickstartArguments(output=str(tmp_path / "out"), steps=[3, 2, 4], test_utterances=6, lora_rank=2)
    run = Quickstart(settings)
    run.run()
    report = json.loads((tmp_path / "out/report.json").read_text())

    assert report["status"] == "complete"
    assert report["data"]["test_utterances"] == 6
    assert report["data"]["train_utterances"] + 6 + report["data"]["dropped_near_duplicates"] == 24
    assert 0 < report["model"]["trainable_parameters"] < report["model"]["total_parameters"]
    pretraining = report["pretraining"]
    assert pretraining["layers"] == [0, 3]
    assert set(pretraining["recall_at_1"]) == {"before", "after_embedding", "after"}
    assert pretraining["chance"] == pytest.approx(1 / 6)
    assert len(pretraining["similarity"]["after"]["3"]) == 6
    arms = {arm["name"]: arm for arm in report["fine_tuning"]["arms"]}
    assert list(arms) == ["pretrained", "scratch_equal_steps", "scratch_equal_compute"]
    assert arms["scratch_equal_steps"]["steps"] == arms["pretrained"]["steps"] == 4
    assert arms["scratch_equal_compute"]["llm_tokens_total"] >= 0.8 * arms["pretrained"]["llm_tokens_total"]
    assert report["peak_memory_bytes"] > 1e8
    assert all(set(sample["hypotheses"]) == set(arms) for sample in report["samples"])
    assert report["fine_tuning"]["lora_rank"] == 2
    lora = sum(value.numel() for name, value in run.model.named_parameters() if "lora_" in name)
    assert all(arm["trainable_parameters"] == report["model"]["trainable_parameters"] + lora for arm in arms.values())
    page = " ".join((tmp_path / "out/report.html").read_text().split())
    assert "the projector is the only part that it trains" in page
    assert f"besides the projector it trains LoRA matrices of rank 2 on the LLM ({lora:,} parameters)" in page
    assert (tmp_path / "out/model/model.safetensors").is_file()

    # The same seed gives the same figures, now from caches that the first run has filled.
    monkeypatch.setattr(quickstart_run, "write_report", lambda *_: None)  # drawing takes most of the time
    again = Quickstart(dataclasses.replace(settings, output=str(tmp_path / "again"))).run()
    for name in ("recall_at_1", "recall_at_5", "llm_tokens"):
        assert again["pretraining"][name] == pretraining[name]
    for arm in again["fine_tuning"]["arms"]:
        for name in ("loss", "wer", "cer", "steps", "llm_tokens_total"):
            assert arm[name] == arms[arm["name"]][name], (arm["name"], name)
    assert len(again["fine_tuning"]["arms"]) == 3

    # A run that goes on from another's trunk is the run that it would have been from the start.
    for name, trunk in (("branched", run.trunk), ("whole", None)):
        run.fine_tune(name, name, run.untrained, 6, trunk=trunk)
    branched, whole = run.report["fine_tuning"]["arms"][-2:]
    assert whole["loss"] == pytest.approx(branched["loss"], abs=1e-5)
    assert whole["llm_tokens"] == branched["llm_tokens"]


def test_the_verdict_tells_a_defeat_as_it_is():
    arms = {"pretrained": {"wer": 0.6, "loss": 2.0}, "scratch_equal_compute": {"wer": 0.5, "loss": 1.9}}
    assert "At equal compute the pretrained projector loses: WER 60.0% against 50.0%" in verdict(arms)
    arms = {"pretrained": {"wer": 0.4, "loss": 2.0}, "scratch_equal_steps": {"wer": 0.5, "loss": 1.9}}
    assert "At equal steps the pretrained projector wins in wer only" in verdict(arms)


@pytest.mark.parametrize("steps", [[1, 2], [0, 1, 1], [1, 2, 3, 4]])
def test_steps_that_make_no_sense_are_refused(steps):
    with pytest.raises(ValueError, match="three positive numbers"):
        QuickstartArguments(steps=steps)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_on_real_weights_and_speech(tmp_path):
    """The command itself, with few steps: report, checkpoint, transcription, and loading without the package."""
    output = tmp_path / "out"
    command = [sys.executable, "-m", "speechllm"]
    steps = ["--steps", "60", "8", "20"]  # fewer, and the best answer might be none
    subprocess.run([*command, "quickstart", "--output", str(output), *steps], check=True, timeout=1500)
    report = json.loads((output / "report.json").read_text())
    recall = report["pretraining"]["recall_at_1"]
    assert report["data"]["test_utterances"] >= 80
    assert recall["before"]["0"] < 0.1 < recall["after_embedding"]["0"]  # 60 steps already reach about 0.3
    assert report["peak_memory_bytes"] < 6e9
    assert {"train_minutes", "train_utterances"} <= set(report["data"])
    assert report["fine_tuning"]["lora_rank"] == 8 and (output / "model" / "adapter").is_dir()

    audio = report["samples"][0]["audio"]
    heard = subprocess.run(
        [*command, "transcribe", "--model", str(output / "model"), audio], check=True, capture_output=True, text=True
    ).stdout
    assert heard.strip()

    # The README's example where `speechllm` cannot be imported.
    program = """
import sys
sys.modules["speechllm"] = None
from transformers import AutoModel, AutoProcessor
folder, audio = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
chat = [{"role": "user", "content": [{"type": "audio", "audio": audio}, {"type": "text", "text": "Transcribe the speech."}]}]
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, max_new_tokens=256, do_sample=False)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    remote = subprocess.run(
        [sys.executable, "-c", program, str(output / "model"), audio],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    ).stdout
    assert remote.strip() == heard.strip()
