"""Decoding and checking audio: what is taken, and what each kind of bad audio is told."""

import io
import struct

import numpy as np
import pytest
import soundfile
import torch
from tiny import tone

from speechllm import AudioError, audio_speechllm, load_audio


SPEECH = tone(1.0)


def encoded(samples=SPEECH, rate=16_000, **options) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **{"format": "WAV", **options})
    return file.getvalue()


def similar(a, b, tolerance):
    """Equal in length up to rounding, and in the middle, where no filter sees the ends."""
    assert a.dtype == np.float32 and abs(len(a) - len(b)) <= 1
    size = min(len(a), len(b))
    np.testing.assert_allclose(a[500 : size - 500], b[500 : size - 500], atol=tolerance)


# ---- good audio ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, tolerance",
    [
        ({"subtype": "FLOAT"}, 0),
        ({"subtype": "PCM_16"}, 1e-4),
        ({"subtype": "PCM_24"}, 1e-6),
        ({"subtype": "PCM_U8"}, 0.02),
        ({"subtype": "ULAW"}, 0.05),
        ({"format": "FLAC"}, 1e-4),
        ({"format": "OGG", "subtype": "VORBIS"}, 0.3),
        ({"format": "AIFF"}, 1e-4),
        ({"format": "MP3"}, 0.3),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["path", "str", "bytes", "dict of bytes", "dict of path", "wrong extension"])
def test_files(tmp_path, options, tolerance, kind):
    data = encoded(**options)
    path = tmp_path / ("speech.mp3" if kind == "wrong extension" else "speech.wav")
    path.write_bytes(data)
    source = {
        "path": path,
        "wrong extension": path,
        "str": str(path),
        "bytes": data,
        "dict of bytes": {"bytes": data, "path": "elsewhere.wav"},
        "dict of path": {"bytes": None, "path": str(path)},
    }[kind]
    similar(load_audio(source), SPEECH, tolerance)


@pytest.mark.parametrize(
    "convert, tolerance",
    [
        (lambda x: x, 0),
        (lambda x: x.astype(np.float64), 0),
        (lambda x: x.astype(np.float16), 1e-3),
        (lambda x: (x * 32767).astype(np.int16), 1e-4),
        (lambda x: (x * (2**31 - 1)).astype(np.int32), 1e-6),
        (lambda x: (x * 127 + 128).astype(np.uint8), 0.02),
        (lambda x: (x * 32767 + 32768).astype(np.uint16), 1e-4),
        (lambda x: x.tolist(), 1e-7),
        (torch.from_numpy, 0),
        (lambda x: torch.from_numpy(x).bfloat16(), 0.01),
        (lambda x: torch.from_numpy(x).half().requires_grad_(), 1e-3),
        (lambda x: (torch.from_numpy(x) * 32767).short(), 1e-4),
        (lambda x: np.stack([x, x]), 0),
        (lambda x: np.stack([x, x], axis=1), 0),
        (lambda x: torch.from_numpy(x)[None], 0),
        (lambda x: {"array": x, "sampling_rate": 16_000}, 0),
        (lambda x: {"array": torch.from_numpy(x)}, 0),
    ],
)
def test_samples(convert, tolerance):
    similar(load_audio(convert(SPEECH)), SPEECH, tolerance)


def test_stereo_is_averaged():
    left, right = tone(1.0, seed=1), tone(1.0, seed=2)
    np.testing.assert_allclose(load_audio(np.stack([left, right])), (left + right) / 2, atol=1e-7)
    np.testing.assert_allclose(
        load_audio(encoded(np.stack([left, right], 1), subtype="FLOAT")), (left + right) / 2, atol=1e-7
    )


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 24_000, 32_000, 44_100, 48_000, 44_101, 96_001])
def test_any_sampling_rate_gives_the_same_sound(rate):
    def sound(rate):  # below 4 kHz, so that every rate holds it
        time = np.arange(rate) / rate
        return (0.3 * np.sin(2 * np.pi * 440 * time) + 0.2 * np.sin(2 * np.pi * 1234 * time)).astype(np.float32)

    expected = sound(16_000)
    for loaded in (
        load_audio(sound(rate), rate),
        load_audio(torch.from_numpy(sound(rate)), float(rate)),
        load_audio({"array": sound(rate), "sampling_rate": rate}),
        load_audio(encoded(sound(rate), rate, subtype="FLOAT")),
    ):
        similar(loaded[:8_000], expected[:8_000], 0.05 if rate % 10 == 1 else 0.02)


def test_a_files_own_sampling_rate_wins():
    assert len(load_audio(encoded(SPEECH, 8_000), 16_000)) == 32_000


def test_streams_of_unknown_length_are_complete_as_they_are():
    data = bytearray(encoded())
    at = data.index(b"data") + 4
    size = data[at : at + 4]
    for declared, of_data in (
        (0, None),
        (0xFFFFFFFF, None),
        (0, 0),
        (0x7FFFFF24, 0x7FFFFF00),
        (0x7FFFF024, 0x7FFFF000),
    ):
        data[4:8] = struct.pack("<I", declared)
        data[at : at + 4] = size if of_data is None else struct.pack("<I", of_data)
        np.testing.assert_allclose(load_audio(bytes(data)), SPEECH, atol=1e-4)


def test_a_file_of_no_samples_has_none_whatever_follows():
    empty = encoded(np.zeros(0, np.float32)) + b"LIST" + struct.pack("<I", 2_000) + bytes(range(250)) * 8
    with pytest.raises(AudioError, match="no samples"):
        load_audio(empty[:4] + struct.pack("<I", len(empty) - 8) + empty[8:])


def test_a_tensor_that_needs_a_gradient_is_audio():
    np.testing.assert_array_equal(load_audio(torch.tensor(SPEECH).requires_grad_()), SPEECH)


def test_what_has_been_checked_is_taken_as_it_is():
    piece = np.zeros(8_000, np.float32)
    assert load_audio({"array": piece, "checked": True}) is piece


def test_loud_and_quiet_recordings_pass():
    load_audio(np.clip(SPEECH * 2, -1, 1))
    load_audio(SPEECH * 1e-3)
    load_audio(np.sign(NOISE).astype(np.int16))  # silence with the last bit of 16 at work is not clipped
    load_audio(SPEECH * 1.7)  # float files may go beyond 1


# ---- bad audio -----------------------------------------------------------------------------------------------------

NOISE = np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
BAD_SAMPLES = {
    "empty": (np.zeros(0, np.float32), 16_000, "no samples"),
    "empty stereo": (np.zeros((2, 0), np.float32), 16_000, "no samples"),
    "one sample": (SPEECH[:1], 16_000, "too short: 0.1 ms"),
    "shorter than a window": (SPEECH[:399], 16_000, "too short: 24.9 ms.*at least 25.0 ms"),
    "short at its rate": (SPEECH[:1_000], 48_000, "too short: 20.8 ms"),
    "nan": (np.where(np.arange(16_000) == 7, np.nan, SPEECH), 16_000, "1 samples that are not finite"),
    "infinity": (np.where(np.arange(16_000) < 2, np.inf, SPEECH), 16_000, "2 samples that are not finite"),
    "silence": (np.zeros(16_000), 16_000, "silent"),
    "constant": (np.full(16_000, 0.5), 16_000, "silent"),
    "whisper of a dither": (NOISE * 1e-7, 16_000, "silent"),
    "one bit of noise": (np.sign(NOISE), 16_000, "clipped: 100%"),
    "one bit of noise at 8 kHz": (np.sign(NOISE), 8_000, "clipped: 100%"),
    "one bit of noise at 44.1 kHz": (np.sign(NOISE), 44_100, "clipped: 100%"),
    "one bit of stereo noise": (np.sign(NOISE).reshape(2, -1), 16_000, "clipped"),
    "clipped": (np.clip(SPEECH * 100, -1, 1), 16_000, "clipped: 9.%"),
    "eight channels": (np.stack([SPEECH] * 8), 16_000, "8 channels.*mix"),
    "zero rate": (SPEECH, 0, "sampling rate of 0 Hz.*possible"),
    "negative rate": (SPEECH, -16_000, "sampling rate of -16,000 Hz"),
    "3 MHz": (SPEECH, 3_000_000, "sampling rate of 3,000,000 Hz"),
    "nan rate": (SPEECH, float("nan"), "sampling rate of nan"),
    "rate as text": (SPEECH, "16000", "sampling rate of '16000'"),
    "three axes": (SPEECH.reshape(2, 2, -1), 16_000, r"shape \(2, 2, 4000\)"),
    "scalar": (np.array(1.0), 16_000, r"shape \(\)"),
    "complex": (SPEECH.astype(complex), 16_000, "complex128"),
    "booleans": (SPEECH > 0, 16_000, "elements of type bool"),
    "text": (np.array(["a"] * 500), 16_000, "elements of type <U1"),
    "64 bits": ((SPEECH * 32_768).astype(np.int64), 16_000, "64-bit integers.*int16"),
    "whole numbers": ((SPEECH * 32_768).astype(int).tolist(), 16_000, "64-bit integers"),
    "integers in disguise": (SPEECH * 32_768, 16_000, "samples up to .*integer samples as integers"),
}


@pytest.mark.parametrize("kind", BAD_SAMPLES)
def test_bad_samples(kind):
    samples, rate, message = BAD_SAMPLES[kind]
    for source in (samples, {"array": samples, "sampling_rate": rate}):
        with pytest.raises(AudioError, match=f"^item 7 .*{message}") as error:
            load_audio(source, rate, name="item 7")
        assert str(error.value).rstrip().endswith((".", ")")) and ". " in str(error.value), "cause. Remedy."


def bad_files(folder):
    wav, flac, mp3 = encoded(), encoded(format="FLAC"), encoded(tone(3.0), format="MP3")
    files = {
        "empty.wav": (b"", "is an empty file"),
        "text.wav": (b"This is a text file, whatever its name says.\n" * 30, "not audio that can be decoded"),
        "json.wav": (b"{}", "not audio that can be decoded"),
        "noise.mp3": (np.random.default_rng(0).bytes(3_000), "not audio that can be decoded"),
        "header.wav": (encoded(np.zeros(0, np.float32)), "no samples"),
        "truncated.wav": (wav[: len(wav) // 2], r"truncated: its header promises 32,044 bytes.*16,022"),
        "nearly.wav": (wav[:-10], "truncated"),
        "cut header.wav": (wav[:20], "truncated"),
        "truncated.flac": (flac[: len(flac) // 2], "truncated|not audio that can be decoded"),
        "truncated.mp3": (mp3[: len(mp3) // 2], "truncated: .* of 48,000 samples could be decoded"),
        "cut header.flac": (flac[:30], "truncated|not audio that can be decoded"),
        "eight channels.wav": (encoded(np.stack([SPEECH] * 8, 1)), "8 channels"),
        "silence.wav": (encoded(np.zeros(16_000)), "silent"),
        "short.wav": (encoded(SPEECH[:100]), "too short: 6.2 ms"),
        "slow.wav": (encoded(SPEECH, 100), "sampling rate of 100 Hz"),
        "fast.wav": (encoded(SPEECH, 3_000_000), "sampling rate of 3,000,000 Hz"),
        "nan.wav": (
            encoded(np.where(np.arange(16_000) < 3, np.nan, SPEECH), subtype="FLOAT"),
            "3 samples that are not",
        ),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    return {name: message for name, (_, message) in files.items()}


def test_bad_files_are_named_and_explained(tmp_path):
    for name, message in bad_files(tmp_path).items():
        with pytest.raises(AudioError, match=f"{name}.*({message})") as error:
            load_audio(tmp_path / name)
        assert len(str(error.value).removeprefix(str(tmp_path)).split(". ")) >= 2, str(error.value)
        with pytest.raises(AudioError, match=f"the audio bytes.*({message})"):
            load_audio((tmp_path / name).read_bytes())


def test_sources_that_are_no_audio(tmp_path):
    for source, message in (
        (tmp_path / "none.wav", "none.wav: there is no such file. Check the path"),
        (tmp_path, "cannot be read: Is a directory"),
        ("https://example.org/a.wav", "is an address. Download it first"),
        (None, "is a NoneType. Give a path"),
        (3, "is a int. Give a path"),
        ({}, "without `array`, `bytes` or `path`"),
        ({"path": ""}, "without `array`, `bytes` or `path`"),
    ):
        with pytest.raises(AudioError, match=message):
            load_audio(source)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(audio_speechllm, "soundfile", None)
    with pytest.raises(AudioError, match="pip install soundfile"):
        load_audio(encoded())
    monkeypatch.setattr(audio_speechllm, "resample", None)
    assert len(load_audio(SPEECH)) == 16_000
    with pytest.raises(AudioError, match="8,000 Hz and torchaudio"):
        load_audio(SPEECH, 8_000)


def test_an_odd_sampling_rate_does_not_need_gigabytes():
    """torchaudio's filter has 16,000 x 44,101 taps at 44,101 Hz."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    load_audio(tone(1.0, rate=44_101), 44_101)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
