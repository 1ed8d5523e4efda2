"""Audio from strangers: 2,000 damaged files and the headers that lie, decoded within bounds of time and memory."""

import io
import struct
import time
import tracemalloc

import numpy as np
import pytest
import soundfile
from tiny import tone

from speechllm import AudioError, load_audio
from speechllm.audio_speechllm import AudioTooLongError


LONGEST = 5.0  # seconds


def encoded(samples, rate=16_000, **options):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **{"format": "WAV", **options})
    return file.getvalue()


KINDS = [
    {"format": "WAV"},
    {"format": "WAV", "subtype": "FLOAT"},
    {"format": "WAV", "subtype": "IMA_ADPCM"},
    {"format": "FLAC"},
    {"format": "OGG", "subtype": "VORBIS"},
    {"format": "OGG", "subtype": "OPUS"},
    {"format": "MP3"},
]


def mutated(data: bytes, generator) -> bytes:
    """Bytes changed in the header or anywhere, extreme numbers put in, pieces removed, repeated, cut off."""
    data = bytearray(data)
    reach = len(data) if generator.random() < 0.5 else 80
    for _ in range(generator.integers(1, 12)):
        at = int(generator.integers(0, max(1, min(reach, len(data)))))
        kind = generator.integers(0, 5)
        if kind < 2:
            data[at : at + 1] = generator.bytes(1)
        elif kind == 2:
            extreme = generator.choice([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFE])
            data[at : at + 4] = struct.pack("<I" if generator.random() < 0.5 else ">I", extreme)
        elif kind == 3:
            del data[at : at + int(generator.integers(1, 50))]
        else:
            data[at:at] = data[at : at + int(generator.integers(1, 200))]
    return bytes(data[: generator.integers(0, len(data) + 1)] if generator.random() < 0.2 else data)


def test_2000_damaged_files():
    generator = np.random.default_rng(0)
    files = [encoded(tone(s, seed=i), **kind) for i, kind in enumerate(KINDS) for s in (0.03, 0.3)]
    outcomes, slowest = {"decoded": 0, "refused": 0}, 0.0
    for i in range(2000):
        data = mutated(files[i % len(files)], generator)
        begin = time.process_time()
        try:
            samples = load_audio(data, max_seconds=LONGEST)
        except AudioError as error:
            outcomes["refused"] += 1
            assert "the audio bytes" in str(error)
        else:
            outcomes["decoded"] += 1
            assert samples.dtype == np.float32 and samples.ndim == 1 and np.isfinite(samples).all()
            assert 400 <= len(samples) <= LONGEST * 16_000 + 100
        slowest = max(slowest, time.process_time() - begin)
    assert min(outcomes.values()) > 200, outcomes  # the damage is neither nothing nor all
    assert slowest < 30, "a file hung the decoder"


def flac_bomb(seconds: int) -> bytes:
    """A small file of long, nearly constant audio."""
    samples = np.zeros(seconds * 16_000, dtype=np.int16)
    samples[::50_000] = 1
    return encoded(samples, format="FLAC")


@pytest.mark.parametrize("name", ["compressed", "header", "flac header", "high rate"])
def test_memory_is_bounded_by_the_limit(name):
    data = {
        "compressed": lambda: flac_bomb(1800),
        # A stream of unknown length, whose header may claim anything.
        "header": lambda: (lambda w: w[:4] + b"\xff\xff\xff\xff" + w[8:40] + b"\xf0\xff\xff\xff" + w[44:])(
            encoded(tone(0.5))
        ),
        "flac header": lambda: (lambda f: f[:21] + bytes([f[21] | 0x0F]) + b"\xff\xff\xff\xff" + f[26:])(
            encoded(tone(0.5), format="FLAC")
        ),
        "high rate": lambda: encoded(np.tile(tone(4.0), 24), 383_990, format="WAV", subtype="PCM_U8"),
    }[name]()
    assert len(data) < 2e6
    tracemalloc.start()
    try:
        load_audio(data, max_seconds=LONGEST)
    except AudioError as error:
        assert not isinstance(error, AudioTooLongError) or name == "compressed"
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 60e6, f"{peak:,} bytes"


def minutes(rate, seconds, channels):
    """A FLAC of two different channels, or of one."""
    samples = np.tile((tone(1.0) * 2**15).astype(np.int16)[:, None], (-(-rate * seconds // 16_000), channels))
    samples = samples[: rate * seconds]
    samples[:, -1] //= 2
    return encoded(samples, rate, format="FLAC")


def traced(data, **options):
    """What `load_audio` returns or raises, and its peak of memory beyond what there was before."""
    tracemalloc.start()
    try:
        outcome = load_audio(data, **options)
    except AudioError as error:
        outcome = error
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return outcome, peak


def test_memory_of_stereo_and_of_high_rates():
    """A second of stereo at 96 kHz has 0.77 MB of samples, of which the mean of the channels is half."""
    samples, peak = traced(minutes(96_000, 60, 2), max_seconds=60)
    assert len(samples) == 60 * 16_000
    assert peak < 2.5 * 60 * 96_000 * 4, f"{peak:,} bytes"
    error, peak = traced(minutes(384_000, 50, 2), max_seconds=60)
    assert isinstance(error, AudioTooLongError) and "44 seconds at its 384,000 Hz" in str(error), error
    assert peak < 1.5 * (16 << 20) * 4 + 40e6, f"{peak:,} bytes"


def test_decoding_by_blocks_changes_nothing():
    """The same as soundfile's own decoding in one piece, over several blocks."""
    for channels in (1, 2):
        data = minutes(16_000, 100, channels)
        whole = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)[0].mean(axis=1)
        np.testing.assert_array_equal(load_audio(data, max_seconds=200), whole)


def test_the_limit(tmp_path):
    path = tmp_path / "long.wav"
    soundfile.write(path, tone(5.1), 16_000)
    for source in (path, path.read_bytes(), tone(5.1), {"array": tone(5.1), "sampling_rate": 16_000}):
        with pytest.raises(AudioTooLongError, match="longer than 5 seconds"):
            load_audio(source, max_seconds=LONGEST)
    assert len(load_audio(path)) == 81_600 == len(load_audio(path, max_seconds=5.1))
