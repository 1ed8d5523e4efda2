"""Word times: exact on emissions whose path is known, within 40 ms on speech-like audio whose words' times are known."""

import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import soundfile
import torch
from tiny import SPEECH, tone
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
)

from speechllm.base_models_speechllm import CheckpointError
from speechllm.cli import main
from speechllm.data.forced_alignment import (
    AlignmentError,
    ForcedAligner,
    align_manifest,
    aligned_row,
    proportional_words,
    word_frames,
)
from speechllm.data.schema import ManifestError, load_rows


RATE = 16_000
BLANK, UNKNOWN, DELIMITER, LETTERS = 0, 1, 2, "ABCDEF"


def emissions(path, vocabulary=8, certain=6.0):
    """Log-probabilities whose best path is `path`, not free of doubt."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(len(path), vocabulary, generator=generator)
    logits[torch.arange(len(path)), torch.tensor(path)] += certain
    return logits.log_softmax(-1)


# ---- known paths ---------------------------------------------------------------------------------------------------


def test_a_known_path_is_found_exactly():
    path = [0, 0, 3, 3, 0, 4, 0, 2, 2, 0, 5, 0, 5, 5, 0, 0]
    assert word_frames(emissions(path), [[3, 4], [5, 5]], BLANK, DELIMITER) == [(2, 6), (10, 14)]
    assert word_frames(emissions([3, 4, 5]), [[3], [4, 5]], BLANK) == [
        (0, 1),
        (1, 3),
    ]  # no delimiter, not a frame to spare
    # A word that cannot be spelt has no frames, and no delimiter of its own.
    assert word_frames(emissions(path), [[], [3, 4], [], [5, 5], []], BLANK, DELIMITER) == [
        None, (2, 6), None, (10, 14), None]  # fmt: skip
    other_blank = [7 if token == 0 else token for token in path]
    assert word_frames(emissions(other_blank), [[3, 4], [5, 5]], 7, DELIMITER) == [(2, 6), (10, 14)]


def test_what_cannot_be_aligned_says_why():
    with pytest.raises(AlignmentError, match="needs 3 frames, but the audio has 2"):
        word_frames(emissions([5, 5]), [[5], [5]], BLANK)  # a blank must come between equal tokens
    with pytest.raises(AlignmentError, match="no character"):
        word_frames(emissions([3]), [[], []], BLANK)
    with pytest.raises(AlignmentError, match="not finite"):
        word_frames(emissions([3, 4]) * float("nan"), [[3]], BLANK)


def test_proportional_words():
    words = proportional_words("ab abcd  a", 2.0)  # 3 + 5 + 2 characters
    assert [word["word"] for word in words] == ["ab", "abcd", "a"]
    assert [(word["start"], word["end"]) for word in words] == [(0.0, 0.6), (0.6, 1.6), (1.6, 2.0)]
    assert proportional_words(" ", 1.0) == []


# ---- a recogniser --------------------------------------------------------------------------------------------------


def recogniser(folder, letters=LETTERS):
    """A tiny CTC model with its processor, and the folder that both are in."""
    vocabulary = {"<pad>": BLANK, "<unk>": UNKNOWN, "|": DELIMITER, **{c: i for i, c in enumerate(letters, 3)}}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), bos_token=None, eos_token=None)
    processor = Wav2Vec2Processor(Wav2Vec2FeatureExtractor(return_attention_mask=True), tokenizer)
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        **SPEECH["wav2vec2-layer"][1], vocab_size=len(vocabulary), pad_token_id=BLANK, hidden_dropout=0.0, layerdrop=0.0,
        attention_dropout=0.0, feat_proj_dropout=0.0, activation_dropout=0.0, final_dropout=0.0)  # fmt: skip
    model = Wav2Vec2ForCTC(config)
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    return model, processor


def test_random_model_end_to_end(tmp_path):
    recogniser(tmp_path)
    aligner = ForcedAligner(str(tmp_path), "cpu")
    waveform = tone(1.5)
    words = aligner(waveform, "bad Abc 1984 cafe, fed")
    assert [word["word"] for word in words] == ["bad", "Abc", "1984", "cafe,", "fed"]
    times = [time for word in words for time in (word["start"], word["end"])]
    assert times == sorted(times) and times[0] >= 0 and times[-1] <= 1.5
    assert all(word["end"] > word["start"] for word in words if word["word"] != "1984")
    assert aligner.unknown == {"1": 1, "9": 1, "8": 1, "4": 1, ",": 1}
    assert words[2]["start"] == words[1]["end"] and words[2]["end"] == words[3]["start"]
    assert words == aligner(waveform, "BAD ABC 1984 CAFE, FED") or [w["start"] for w in words] == [
        w["start"] for w in aligner(waveform, "BAD ABC 1984 CAFE, FED")
    ]


def test_a_pickled_recogniser_is_refused_with_the_way_to_convert(tmp_path, monkeypatch):
    """And the way works."""
    model, _ = recogniser(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"the recogniser '.*pytorch_model.bin.* are pickled.*convert") as error:
        ForcedAligner(str(tmp_path), "cpu")
    monkeypatch.chdir(tmp_path)
    exec(f"import glob, safetensors.torch, torch; {str(error.value).rpartition('once: ')[2]}")
    assert torch.equal(ForcedAligner(str(tmp_path), "cpu").model.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(("letters", "word", "expected"), [
    ("ABC", "aBc", [3, 4, 5]), ("abc", "ABC", [3, 4, 5]), ("abA", "aAb", [3, 5, 4]), ("AB", "a|b<", [3, 4])])  # fmt: skip
def test_case_and_special_characters(tmp_path, letters, word, expected):
    recogniser(tmp_path, letters)
    assert ForcedAligner(str(tmp_path), "cpu").spell(word) == expected


def spoken(text, generator):
    """Tones for letters, pauses between words: (waveform, true word times, label of every 20 ms)."""
    samples, times, labels = [np.zeros(int(0.1 * RATE))], [], [(0.1, BLANK)]
    now = 0.1
    for word in text.split():
        start = now
        for letter in word:
            seconds = generator.uniform(0.06, 0.14)
            ticks = np.arange(int(seconds * RATE)) / RATE
            frequency = 300 * 1.6 ** LETTERS.index(letter.upper())
            samples.append(0.5 * np.sin(2 * np.pi * frequency * ticks))
            now += len(ticks) / RATE
            labels.append((now, 3 + LETTERS.index(letter.upper())))
        times.append((start, now))
        seconds = generator.uniform(0.1, 0.2)
        samples.append(np.zeros(int(seconds * RATE)))
        now += len(samples[-1]) / RATE
        labels.append((now, DELIMITER))
    labels[-1] = (now, BLANK)  # no word follows
    waveform = np.concatenate(samples) + 0.01 * generator.standard_normal(sum(map(len, samples)))
    return waveform.astype(np.float32), times, labels


def words_at_random(generator, count):
    # No letter twice in a row: without a pause that would be one long tone.
    words = []
    while len(words) < count:
        word = "".join(generator.choice(list(LETTERS), generator.integers(2, 5)))
        words += [word] if all(a != b for a, b in itertools.pairwise(word)) else []
    return " ".join(words)


def test_a_trained_model_finds_the_words(tmp_path):
    """Each letter is a tone. A tiny model learns to tell them, and its alignment hits the words' known times."""
    model, processor = recogniser(tmp_path)
    generator = np.random.default_rng(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(200):
        waveform, _, labels = spoken(words_at_random(generator, 3), generator)
        inputs = processor(waveform, sampling_rate=RATE, return_tensors="pt")
        logits = model(**inputs).logits[0]
        middles = (np.arange(len(logits)) * 320 + 200) / RATE
        ends, values = zip(*labels)
        target = torch.tensor([values[min(np.searchsorted(ends, t), len(values) - 1)] for t in middles])
        loss = torch.nn.functional.cross_entropy(logits, target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.save_pretrained(tmp_path)
    aligner = ForcedAligner(str(tmp_path), "cpu")
    errors, guesses = [], []
    for _ in range(10):
        text = words_at_random(generator, 4)
        waveform, times, _ = spoken(text, generator)
        truth = np.array(times)
        for found, to in (
            (aligner(waveform, text.lower()), errors),
            (proportional_words(text, len(waveform) / RATE), guesses),
        ):
            to.append(np.abs(np.array([(word["start"], word["end"]) for word in found]) - truth))
    assert np.max(errors) < 0.040, np.max(errors)
    assert np.max(guesses) > 0.080  # what the test can tell apart


# ---- manifests -----------------------------------------------------------------------------------------------------


@pytest.fixture
def manifest(tmp_path):
    for i in range(4):
        soundfile.write(tmp_path / f"{i}.wav", tone(0.5, seed=i), RATE)
    (tmp_path / "bad.wav").write_bytes(b"this is text")
    rows = [{"audio": f"{i}.wav", "text": text, "id": f"u{i}"} for i, text in enumerate(["bad cafe", "", "1 2", "fed"])]
    rows += [{"audio": "bad.wav", "text": "a"}, {"audio": "3.wav", "text": "abcdef " * 9, "task": "asr"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_command(manifest, tmp_path, capsys):
    model = tmp_path / "ctc"
    model.mkdir()
    recogniser(model)
    output = tmp_path / "aligned.jsonl"
    arguments = ["align", "--data", str(manifest), "--output", str(output), "--device", "cpu"]
    assert main([*arguments, "--ctc_model", str(model)]) == 0
    printed = capsys.readouterr().out
    assert "2 utterance(s) aligned, 2 timed by the length" in printed and "2 utterance(s) set aside" in printed
    assert "2 character(s)" in printed
    rows = load_rows(str(output))
    assert [row["alignment"] for row in rows] == ["forced", "proportional", "forced", "proportional"]
    assert [row["id"] for row in rows] == ["u0", "u2", "u3", str(tmp_path / "3.wav")]
    assert [" ".join(word["word"] for word in row["words"]) for row in rows] == [row["text"].strip() for row in rows]
    assert rows[3]["task"] == "asr" and json.loads(output.read_text().splitlines()[0])["audio"] == "0.wav"
    listed = (tmp_path / "aligned.set_aside.jsonl").read_text()
    assert "u1 has no `text`" in listed and "bad.wav" in listed
    assert not list(tmp_path.glob("*.partial"))
    manifest.write_text(json.dumps({"audio": "0.wav", "text": "a"}))
    assert main(arguments) == 0 and not (tmp_path / "aligned.set_aside.jsonl").exists(), "of the run before"

    assert main([*arguments, "--output", str(tmp_path / "elsewhere" / "guessed.jsonl")]) == 0
    rows = load_rows(str(tmp_path / "elsewhere" / "guessed.jsonl"))
    assert {row["alignment"] for row in rows} == {"proportional"} and rows[0]["audio"] == str(tmp_path / "0.wav")


def test_audio_inside_a_parquet_file(manifest, tmp_path):
    held = {"bytes": (tmp_path / "0.wav").read_bytes(), "path": "0.wav"}
    pyarrow.parquet.write_table(pyarrow.table({"audio": [held], "text": ["bad"]}), tmp_path / "rows.parquet")
    align_manifest(str(tmp_path / "rows.parquet"), str(tmp_path / "aligned.jsonl"))
    (row,) = load_rows(tmp_path / "aligned.jsonl")
    assert Path(row["audio"]).read_bytes() == held["bytes"] and Path(row["audio"]).parent.name == "aligned.audio"


def test_bad_usage(manifest, tmp_path, capsys):
    for arguments, word in (
        (["--data", str(tmp_path / "none.jsonl"), "--output", "x.jsonl"], "no such manifest"),
        (["--data", str(manifest), "--output", str(tmp_path / "x.csv")], "ends in .jsonl"),
        (["--data", str(manifest), "--output", str(tmp_path / "x.jsonl"), "--ctc_model", str(tmp_path / "no")], "no"),
    ):
        assert main(["align", *arguments]) == 1
        error = capsys.readouterr().err
        assert word in error and "Traceback" not in error
    manifest.write_text(json.dumps({"audio": "bad.wav", "text": "a"}))
    with pytest.raises(ManifestError, match="none of its rows"):
        align_manifest(str(manifest), str(tmp_path / "x.jsonl"))


def test_what_cannot_be_used_is_set_aside_or_ends_a_strict_run(manifest, tmp_path, capsys):
    """Missing files, duplicate ids and bad audio alike, whether they are found before or on the way."""
    rows = [
        {"id": "good", "audio": "0.wav", "text": "a cab"},
        {"id": "gone", "audio": "gone.wav", "text": "a"},
        {"id": "good", "audio": "0.wav", "text": "a"},
        {"id": "broken", "audio": "bad.wav", "text": "a"},
    ]
    output = tmp_path / "aligned.jsonl"
    arguments = ["align", "--data", str(manifest), "--output", str(output)]
    for some in ([rows[0], rows[3]], rows):  # the first finds what cannot be used on the way
        manifest.write_text("".join(json.dumps(row) + "\n" for row in some))
        assert main([*arguments, "--strict"]) == 1 and not output.exists()
        assert "(--strict stops here.)" in capsys.readouterr().err
    assert main(arguments) == 0 and [row["id"] for row in load_rows(output)] == ["good"]
    reasons = (tmp_path / "aligned.set_aside.jsonl").read_text()
    assert all(reason in reasons for reason in ("gone.wav", "good is there twice", "bad.wav"))


def test_a_run_that_was_cut_short_goes_on(manifest, tmp_path, monkeypatch):
    output = tmp_path / "aligned.jsonl"
    seen = []

    def until_the_third(row, aligner):
        seen.append(row["id"])
        if len(seen) == 4:
            raise KeyboardInterrupt
        return aligned_row(row, aligner)

    monkeypatch.setattr("speechllm.data.forced_alignment.aligned_row", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        align_manifest(str(manifest), str(output))
    assert not output.exists()
    (partial,) = tmp_path.glob("*.partial")
    with open(partial, "a") as file:
        file.write('{"torn": ')  # as a crash leaves it
    counts = align_manifest(str(manifest), str(output))
    assert seen == ["u0", "u1", "u2", "u3", "u3", str(tmp_path / "bad.wav"), str(tmp_path / "3.wav")]
    assert counts == {"forced": 0, "proportional": 4, "set_aside": 2, "unknown": 0}
    whole = tmp_path / "whole.jsonl"
    align_manifest(str(manifest), str(whole))
    assert output.read_text() == whole.read_text()
