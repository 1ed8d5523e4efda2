"""Audio that is a part of a file, or several files: what is heard, what is read, what is refused."""

import numpy as np
import pytest
import soundfile
from tiny import tone

from speechllm import AudioError, load_audio
from speechllm.data.checking import duration_of
from speechllm.data.feature_cache import audio_key


LONG = tone(10.0)


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [(("WAV", "PCM_16"), 1e-4), (("FLAC", "PCM_16"), 1e-4), (("OGG", "OPUS"), 0.2), (("MP3", None), 0.2)],
)
def test_a_segment_is_that_part_of_the_recording(tmp_path, kind, tolerance):
    soundfile.write(tmp_path / "a", LONG, 16_000, format=kind[0], subtype=kind[1])
    segment = load_audio({"path": str(tmp_path / "a"), "offset": 4.0, "duration": 1.5})
    assert segment.shape == (24_000,)
    assert np.sqrt(np.mean((segment - LONG[64_000:88_000]) ** 2)) < tolerance / 2
    late = load_audio({"path": str(tmp_path / "a"), "offset": 9.0})  # to the end
    assert abs(len(late) - 16_000) < 1_600


def test_no_more_is_decoded_than_the_segment(tmp_path, monkeypatch):
    path = tmp_path / "a.flac"
    soundfile.write(path, np.tile(LONG, 60), 16_000)  # ten minutes
    read, original = [], soundfile.SoundFile.read

    def counted(self, *args, **kwargs):
        samples = original(self, *args, **kwargs)
        read.append(len(samples))
        return samples

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    segment = {"path": str(path), "offset": 500.0, "duration": 2.0}
    assert len(load_audio(segment)) == 32_000 and sum(read) == 32_000
    audio_key(segment)
    assert sum(read) == 64_000


def test_segments_are_resampled_and_mixed_down(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.stack([LONG, LONG], 1), 8_000)  # plays at half its speed: 20 seconds
    assert len(load_audio({"path": str(path), "offset": 19.0, "duration": 1.0})) == 16_000


def test_segments_of_bytes(tmp_path):
    soundfile.write(tmp_path / "a.wav", LONG, 16_000)
    held = {"bytes": (tmp_path / "a.wav").read_bytes(), "offset": 1.0, "duration": 0.5}
    named = {"path": str(tmp_path / "a.wav"), "offset": 1.0, "duration": 0.5}
    np.testing.assert_array_equal(load_audio(held), load_audio(named))
    assert audio_key(held) == audio_key(named)


def test_parts_are_played_one_after_the_other(tmp_path):
    soundfile.write(tmp_path / "a.wav", LONG, 16_000, subtype="FLOAT")
    parts = {"parts": [{"path": str(tmp_path / "a.wav"), "offset": 1.0, "duration": 0.5}, str(tmp_path / "a.wav")]}
    np.testing.assert_array_equal(load_audio(parts), np.concatenate([LONG[16_000:24_000], LONG]))
    assert duration_of(parts) == pytest.approx(10.5)
    assert audio_key(parts) != audio_key({"parts": parts["parts"][::-1]})
    with pytest.raises(AudioError, match="longer than 10.2 seconds"):
        load_audio(parts, max_seconds=10.2)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ({"offset": 9.0, "duration": 2.0}, "ends 1.0 seconds before the segment that begins at 9 and lasts 2 does"),
        ({"offset": 12.0, "duration": 2.0}, "ends 4.0 seconds before"),
        ({"offset": 12.0}, "too short"),
        ({"offset": -1.0, "duration": 2.0}, "offset -1.0. Give seconds, at least 0"),
        ({"offset": float("nan"), "duration": 2.0}, "offset nan"),
        ({"offset": "1", "duration": 2.0}, "offset '1'"),
        ({"offset": 1.0, "duration": 0.0}, "too short"),
        ({"offset": 1.0, "duration": 3.0, "path": "nowhere.wav"}, "nowhere.wav: there is no such file"),
        ({"byte_offset": 100, "byte_length": 10**9}, "too early"),
        ({"byte_offset": 100, "byte_length": 1000}, "not audio that can be decoded"),
    ],
)
def test_segments_that_make_no_sense(tmp_path, times, message):
    soundfile.write(tmp_path / "a.wav", LONG, 16_000)
    with pytest.raises(AudioError, match=message):
        load_audio({"path": str(tmp_path / "a.wav"), **times})


def test_a_segment_may_end_a_little_after_the_recording(tmp_path):
    soundfile.write(tmp_path / "a.wav", LONG, 16_000)
    assert len(load_audio({"path": str(tmp_path / "a.wav"), "offset": 9.0, "duration": 1.2})) == 16_000


def test_a_recording_that_is_cut_off_is_noticed_where_it_matters(tmp_path):
    soundfile.write(tmp_path / "a.flac", LONG, 16_000)
    data = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(data[: len(data) // 2])
    assert len(load_audio({"path": str(tmp_path / "a.flac"), "offset": 1.0, "duration": 1.0})) == 16_000
    with pytest.raises(AudioError, match="truncated|decoded"):
        load_audio({"path": str(tmp_path / "a.flac"), "offset": 8.0, "duration": 1.0})


def test_the_limit_on_the_length_holds_for_segments(tmp_path):
    soundfile.write(tmp_path / "a.wav", LONG, 16_000)
    with pytest.raises(AudioError, match="longer than 2 seconds"):
        load_audio({"path": str(tmp_path / "a.wav"), "offset": 1.0, "duration": 5.0}, max_seconds=2.0)
