import numpy as np
import pytest
from tiny import tone

from speechllm import load_audio
from speechllm.data.speed import speed_perturbed


def test_faster_is_shorter_and_higher():
    time = np.arange(16_000) / 16_000
    row = {"id": "a", "audio": (0.5 * np.sin(2 * np.pi * 400 * time)).astype(np.float32), "text": "x", "duration": 1.0}
    for perturbed, factor in zip(speed_perturbed([row], (0.9, 1.1)), (0.9, 1.1)):
        heard = load_audio(perturbed["audio"])
        assert len(heard) == pytest.approx(16_000 / factor, abs=2)
        assert perturbed["duration"] == pytest.approx(1 / factor)
        peak = np.abs(np.fft.rfft(heard)).argmax() * 16_000 / len(heard)
        assert peak == pytest.approx(400 * factor, abs=2)
        assert perturbed["text"] == "x"


def test_ids_tell_them_apart():
    rows = [{"id": str(i), "audio": tone(0.5, i), "text": "x", "duration": 0.5} for i in range(3)]
    assert len({row["id"] for row in rows + speed_perturbed(rows)}) == 9
