"""Noise, rooms, and data sets of conditions, checked from the signals that were written."""

import numpy as np
import pytest
import soundfile
import torch

from speechllm.synthesis import acoustics
from speechllm.synthesis.variants import trait_rows, variants


def speech(seconds=3.0, seed=0):
    """Bursts of noise with pauses, like syllables."""
    time = np.arange(int(16_000 * seconds)) / 16_000
    envelope = np.clip(np.sin(2 * np.pi * 3 * time), 0, None)
    return torch.from_numpy(0.1 * envelope * np.random.default_rng(seed).standard_normal(len(time))).float()


@pytest.mark.parametrize("snr", [-5, 0, 10, 30])
def test_noise_has_its_level(snr):
    clean = speech()
    noisy = acoustics.with_noise(clean, snr, seed=1)
    noise = (noisy - clean).double()
    assert float(10 * torch.log10(clean.double().square().sum() / noise.square().sum())) == pytest.approx(snr, abs=0.01)
    assert acoustics.measured_snr(clean, 0.3 * noisy) == pytest.approx(snr, abs=0.15)  # by projection, gain unknown
    assert torch.equal(noisy, acoustics.with_noise(clean, snr, seed=1))
    assert not torch.equal(noisy, acoustics.with_noise(clean, snr, seed=2))


def test_noise_is_pink():
    power = np.abs(np.fft.rfft(acoustics.pink_noise(16_000 * 20, seed=0).numpy())) ** 2
    hertz = np.fft.rfftfreq(16_000 * 20, 1 / 16_000)
    octaves = [power[(hertz >= low) & (hertz < 2 * low)].sum() for low in (50, 100, 200, 400, 800, 1600, 3200)]
    assert np.max(octaves) / np.min(octaves) < 1.2  # the same in every octave


@pytest.mark.parametrize("seconds", [0.2, 0.5, 1.2])
def test_rooms_have_their_reverberation_time(seconds):
    found = []
    for seed in range(3):
        response = acoustics.room_response(seconds, seed)
        assert response[0] == 1 and len(response) == round(seconds * 16_000)
        assert float(response[1:].double().square().sum()) == pytest.approx(1, rel=1e-3)  # direct sound = reverberation
        found.append(acoustics.measured_reverberation_time(response[1:]))
    assert np.mean(found) == pytest.approx(seconds, rel=0.05)
    impulse = torch.zeros(32_000)
    impulse[0] = 1.0
    through = acoustics.with_reverberation(impulse, seconds, seed=0)
    assert acoustics.measured_reverberation_time(through[1:]) == pytest.approx(found[0], rel=0.01)


def test_measured_reverberation_time_of_an_exact_decay():
    decay = torch.from_numpy(10 ** (-3 * np.arange(16_000) / 16_000 / 0.4))
    assert acoustics.measured_reverberation_time(decay) == pytest.approx(0.4, rel=1e-3)


def test_a_room_keeps_length_and_onset():
    clean = torch.cat([torch.zeros(1600), speech()])
    wet = acoustics.with_reverberation(clean, 0.8, seed=0)
    assert wet.shape == clean.shape and wet[:1600].abs().max() < 1e-6
    for seconds in (0, 0.01, 9, float("nan")):
        with pytest.raises(ValueError, match="0.05 to 5"):
            acoustics.room_response(seconds, 0)


@pytest.fixture
def recordings(tmp_path):
    """Four recordings of each of two texts."""
    rows = []
    for text in ("one", "two"):
        for take in range(4):
            path = tmp_path / f"{text}{take}.flac"
            soundfile.write(path, speech(1.0, take).numpy(), 16_000)
            row = {"id": f"{text} {take}", "audio": str(path), "text": text, "duration": 1.0}
            rows.append({**row, "gender": ("female", "male")[take % 2], "rate": (0.7, 1.4)[take // 2]})
    return rows


def test_variants_are_what_their_labels_say(recordings, tmp_path):
    made = variants(recordings, tmp_path / "out", (None, 3.0), (None, 0.5), progress=False).rows
    assert len(made) == 8 * 4 and len({row["id"] for row in made}) == 32
    levels = []
    for row in made:
        clean = torch.from_numpy(soundfile.read(recordings[int(row["id"][:5] == "two 0") * 4]["audio"])[0]).float()
        samples = torch.from_numpy(soundfile.read(row["audio"])[0]).float()
        levels.append(float(samples.square().mean().sqrt()))
        assert len(samples) == 16_000
        if row["id"].startswith(("one 0", "two 0")) and row.get("reverberation") is None:
            expected = row.get("snr_db", 60)
            found = acoustics.measured_snr(clean, samples)
            assert found > 60 if expected == 60 else found == pytest.approx(expected, abs=0.2)
    assert max(levels) / min(levels) < 1.01  # loudness tells nothing
    assert sum("snr_db" in row for row in made) == 16 and sum("reverberation" in row for row in made) == 16
    again = variants(recordings, tmp_path / "out", (None, 3.0), (None, 0.5), progress=False)
    assert again.rows == made and again.reused == 32


def test_conditions_are_dealt_out_evenly_within_a_text(recordings, tmp_path):
    made = variants(recordings, tmp_path / "out", (None, 3.0), (None, 0.5), crossed=False, progress=False).rows
    assert len(made) == 8
    for text in ("one", "two"):
        conditions = [(row.get("snr_db"), row.get("reverberation")) for row in made if row["text"] == text]
        assert sorted(conditions, key=str) == sorted([(None, None), (None, 0.5), (3.0, None), (3.0, 0.5)], key=str)


def test_trait_rows_ask_about_what_is_there(recordings, tmp_path):
    made = variants(recordings, tmp_path / "out", (None, 15.0, 0.0), (None, 0.5), progress=False).rows
    rows = trait_rows(made)
    assert len(rows) == 4 * len(made) and len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert row["task"] == "traits" and row["target"] in row["choices"]
        expected = {
            "gender": row["gender"],
            "rate": {0.7: "slow", 1.4: "fast"}[row["rate"]],
            "noise": {None: "clean", 15.0: "some noise", 0.0: "much noise"}[row.get("snr_db")],
            "reverberation": "echoing" if "reverberation" in row else "dry",
        }
        assert row["target"] == expected[row["trait"]]
    for trait in ("noise", "reverberation", "gender", "rate"):  # the text says nothing about the answer
        by_text = [
            sorted(r["target"] for r in rows if r["trait"] == trait and r["text"] == text) for text in ("one", "two")
        ]
        assert by_text[0] == by_text[1]
    with pytest.raises(ValueError, match="mood"):
        trait_rows(made, ["mood"])
    with pytest.raises(ValueError, match="gender needs the column 'gender'"):
        trait_rows([{"id": "x", "rate": 1.0}], ["gender"])


def test_unusable_audio_is_set_aside(recordings, tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"this is text")
    bad = {**recordings[0], "id": "bad", "audio": str(tmp_path / "bad.wav")}
    made = variants([bad, *recordings[:2]], tmp_path / "out", (None, 3.0), (None,), progress=False)
    assert len(made.rows) == 4 and len(made.set_aside) == 2 and "bad" in made.set_aside[0].id
    with pytest.raises(ValueError, match="None of 1 recording"):
        variants([bad], tmp_path / "other", progress=False)
    with pytest.raises(ValueError, match="SNRs"):
        variants(recordings, tmp_path / "other", (200.0,), progress=False)
