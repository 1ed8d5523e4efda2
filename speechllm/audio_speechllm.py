"""From whatever a user calls audio to what an encoder hears: mono float32 at 16 kHz.

`load_audio` takes a path, the bytes of an audio file, a NumPy array, a torch tensor, or a dict:

    {"array", "sampling_rate"}, {"bytes"}, {"path"}     a row of a `datasets` audio column
    {"path", "offset", "duration"}                      seconds of a long recording, of which no more is read
    {"path", "byte_offset", "byte_length"}              a file inside a tar archive
    {"parts": [source, ...]}                            several, one after the other
    {"array", "checked": True}                          what `load_audio` returned, or a piece of it: taken as it is

`soundfile` decodes (the content decides the format, not the name) and `torchaudio` resamples. Audio that no
recogniser could make sense of raises an `AudioError`, so that training can set the utterance aside and count it.
"""

import io
import itertools
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch


try:
    import soundfile
except ImportError:
    soundfile = None
try:
    from torchaudio.functional import resample
except (ImportError, OSError):  # torchaudio raises OSError beside a torch build that it was not made for
    resample = None

from .configuration_speechllm import SAMPLING_RATE


LOWEST_RATE, HIGHEST_RATE = 4_000, 384_000  # Hz
SHORTEST = 400  # samples at 16 kHz, 25 ms: one frame of Whisper or of the wav2vec 2.0 family
BLOCK = 1 << 20  # samples per channel decoded at a time
# Of a file, where `max_seconds` bounds it: samples per channel and second, and samples that are taken at any rate.
BUDGET_RATE, SMALLEST_BUDGET = 96_000, 16 * BLOCK
LARGEST_SAMPLE = 16.0  # of float audio; files go a little beyond 1, integers in disguise far beyond
LARGEST_CLIPPED_FRACTION = 0.3  # of the samples at the peak value; loud but usable recordings stay below a few percent
QUIET = 0.01  # a peak below which samples at the peak are not clipped, but a few steps of quantisation
SILENCE = 1e-5  # largest difference between samples of a silent recording (-100 dBFS)
UNKNOWN_LENGTH = 0x7FFF0000  # from here on, a WAV header's size is what recorders write into a stream before its end

AudioSource = str | os.PathLike | bytes | np.ndarray | torch.Tensor | dict[str, Any]


class AudioError(ValueError):
    """Audio that cannot be used; the message names the item, the cause and the remedy."""


class AudioTooLongError(AudioError):
    """Audio beyond the caller's limit."""


def load_audio(
    source: AudioSource,
    sampling_rate: int | None = None,
    name: str | None = None,
    shortest: int = SHORTEST,
    max_seconds: float | None = None,
) -> np.ndarray:
    """Decode, check, mix down and resample.

    Args:
        source: path, bytes of an audio file, samples of shape (time,), (channels, time) or (time, channels) as floats
            in [-1, 1] or integers, or a dict (module docstring).
        sampling_rate: of samples, in Hz; 16,000 if not given. A file knows its own.
        name: what error messages call this item; default: the path or the kind of source.
        shortest: samples at 16 kHz that there must be at least.
        max_seconds: longest audio to accept. A file is decoded no further than that, whatever its header claims and
            however well it compresses, and above 96 kHz no further than as many samples, so time and memory are
            bounded; give it for audio from strangers.

    Returns:
        (samples,) float32 at 16 kHz.

    Raises:
        AudioError: if the source is missing, empty, not audio, truncated, too short, silent, clipped beyond use, of
            more than two channels or of an impossible sampling rate, or has samples that are not finite.
        AudioTooLongError: if it is longer than `max_seconds`, or has more samples than so much audio at 96 kHz.
    """
    if isinstance(source, dict):
        name = name or source.get("path")
        if source.get("array") is not None:
            if source.get("checked"):
                return np.asarray(source["array"], dtype=np.float32)
            return load_audio(source["array"], source.get("sampling_rate", sampling_rate), name, shortest, max_seconds)
        if source.get("parts"):
            parts = [load_audio(part, sampling_rate, None, 1, max_seconds) for part in source["parts"]]
            return _checked(np.concatenate(parts), SAMPLING_RATE, name or "The audio", shortest, max_seconds)
        inner = source.get("bytes") or source.get("path")
        if not inner:
            raise AudioError(f"{name or 'The audio'} is a dict without `array`, `bytes` or `path`. Give one of them.")
        if source.get("offset") is not None or source.get("duration") is not None:
            name = name or "the audio bytes"
            samples, rate = read_segment(source, name, max_seconds)
            return _resampled(_checked(samples, rate, name, shortest, max_seconds), rate, name)
        if source.get("byte_length"):
            inner = read_bytes(source)
        return load_audio(inner, sampling_rate, name, shortest, max_seconds)
    if isinstance(source, str | os.PathLike):
        name = str(source) if name in (None, str(source)) else f"{name} ({source})"
        samples, rate = _decode(_read(source, name), name, max_seconds)
    elif isinstance(source, bytes | bytearray | memoryview):
        name = name or "the audio bytes"
        samples, rate = _decode(bytes(source), name, max_seconds)
    elif isinstance(source, np.ndarray | torch.Tensor | list | tuple):
        name = name or "the audio array"
        samples, rate = _as_samples(source, name), SAMPLING_RATE if sampling_rate is None else sampling_rate
    elif hasattr(source, "get_all_samples"):  # torchcodec's, as in the audio columns of `datasets`
        try:
            decoded = source.get_all_samples()
        except Exception as error:  # what it raises depends on the file
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise AudioError(f"{name or 'The audio'} cannot be decoded: {reason}") from error
        return load_audio(decoded.data, decoded.sample_rate, name, shortest, max_seconds)
    else:
        raise AudioError(
            f"{name or 'The audio'} is a {type(source).__name__}. Give a path, bytes, a NumPy array or a torch tensor."
        )
    return _resampled(_checked(_mono(samples, name), rate, name, shortest, max_seconds), rate, name)


def is_silent(samples: np.ndarray) -> bool:
    """Whether nothing is to be heard in (samples,), as in a muted stretch of a recording."""
    return bool(samples.max() - samples.min() < SILENCE)


def cut_at_pauses(samples: np.ndarray, max_seconds: float) -> list[tuple[int, int]]:
    """(samples,) at 16 kHz -> the (start, end) of pieces of at most `max_seconds`, each cut at the quietest tenth of a
    second in the last third before the limit, so that words stay whole."""
    limit, frame = round(max_seconds * SAMPLING_RATE), SAMPLING_RATE // 10
    if limit < 3 * frame:
        raise ValueError(f"Pieces of {max_seconds} seconds are too short; use at least 0.3.")
    cuts = [0]
    while len(samples) - cuts[-1] > limit:
        first, last = cuts[-1] + limit * 2 // 3, cuts[-1] + limit
        # The rest must not be too short to be heard.
        last = min(last, max(first + frame, len(samples) - SHORTEST * 4))
        count = (last - first) // frame
        energy = np.square(samples[first : first + count * frame].reshape(count, frame)).sum(axis=1)
        cuts.append(first + int(energy.argmin()) * frame + frame // 2)
    return list(itertools.pairwise([*cuts, len(samples)]))


def read_segment(
    source: dict[str, Any], name: str | None = None, max_seconds: float | None = None
) -> tuple[np.ndarray, int]:
    """Samples (time,), mean over the channels, at their own rate, of a dict with `path` (or `bytes`), `offset` and
    `duration` in seconds; and that rate. What lies before and after is not decoded.

    Raises:
        AudioError: if the recording cannot be read, or ends more than half a second before the segment does.
    """
    path = source.get("path")
    name = name or str(path)
    name = name if not path or str(path) in name else f"{name} ({path})"
    start, seconds = source.get("offset") or 0.0, source.get("duration")
    for what, value in (("offset", start), ("duration", math.inf if seconds is None else seconds)):
        if isinstance(value, str) or not value >= 0:
            raise AudioError(f"{name} has the {what} {value!r}. Give seconds, at least 0.")
    if not source.get("bytes") and not Path(path).is_file():
        raise AudioError(f"{name}: there is no such file. Check the path.")
    return _decode(source.get("bytes") or str(path), name, max_seconds, float(start), seconds)


def read_bytes(source: dict[str, Any]) -> bytes:
    """`byte_length` bytes of the file `path`, from `byte_offset` on."""
    data = _read(source["path"], str(source["path"]), source.get("byte_offset") or 0, source["byte_length"])
    if len(data) < source["byte_length"]:
        raise AudioError(f"{source['path']} ends {source['byte_length'] - len(data):,} bytes too early. Copy it again.")
    return data


def _read(path: str | os.PathLike, name: str, start: int = 0, length: int = -1) -> bytes:
    if str(path).startswith(("http://", "https://")):
        raise AudioError(f"{name} is an address. Download it first and give the file's path.")
    try:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(length)
    except FileNotFoundError:
        raise AudioError(f"{name}: there is no such file. Check the path.") from None
    except OSError as error:
        raise AudioError(f"{name} cannot be read: {error.strerror}. Check the path and its permissions.") from None


def _decode(
    data: bytes | str, name: str, max_seconds: float | None, offset: float = 0.0, duration: float | None = None
) -> tuple[np.ndarray, int]:
    """An audio file, its bytes or its path, from `offset` on -> samples (time,), mean over its channels, and sampling
    rate. `duration` seconds of it where that is given, else all, which must be there."""
    if soundfile is None:
        raise AudioError(f"{name} cannot be decoded: the package soundfile is missing. Run `pip install soundfile`.")
    if not data:
        raise AudioError(f"{name} is an empty file. Record or download it again.")
    if duration is None and data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        data, declared = _with_length(data), int.from_bytes(data[4:8], "little")
        # Streams of unknown length declare 0 or a very large number; those are complete as they are.
        if 0 < declared < UNKNOWN_LENGTH and declared > len(data) - 8 + 1:
            raise AudioError(
                f"{name} is truncated: its header promises {declared + 8:,} bytes, but there are {len(data):,}. "
                "Download or copy it again."
            )
    try:
        with soundfile.SoundFile(data if isinstance(data, str) else io.BytesIO(data)) as file:
            rate, declared = file.samplerate, file.frames
            _check_rate(rate, name)
            _check_channels(file.channels, name)
            wanted = math.inf if duration is None else round(duration * rate)
            if offset:
                file.seek(min(round(offset * rate), declared))
                declared -= round(offset * rate)
            if duration is not None:
                if wanted - declared > rate / 2:
                    raise AudioError(
                        f"{name} ends {(wanted - declared) / rate:.1f} seconds before the segment that begins at "
                        f"{offset:g} and lasts {duration:g} does. Correct the segment's times, or download it again."
                    )
                declared = max(0, min(declared, wanted))
            limit = math.inf if max_seconds is None else int(max_seconds * rate)
            budget = math.inf if max_seconds is None else max(int(max_seconds * BUDGET_RATE), SMALLEST_BUDGET)
            decoded, count = bytearray(), 0  # which grows without a second copy
            # A header may claim any length: memory is taken for what is there, not for that.
            while count <= min(limit, budget):
                size = min(BLOCK, wanted - count)
                block = file.read(size, dtype="float32", always_2d=True)
                decoded += block.mean(axis=1).data
                count += len(block)
                if len(block) < size or not size:
                    break
            samples = np.frombuffer(decoded, dtype=np.float32)
    except AudioError:
        raise
    except (soundfile.SoundFileError, RuntimeError, ValueError, MemoryError) as error:
        reason = str(error).removeprefix("Error opening ").split(": ", 1)[-1].rstrip(".")
        raise AudioError(
            f"{name} is not audio that can be decoded ({reason}). Convert it to WAV, FLAC, Ogg or MP3, or download it "
            "again if it was truncated."
        ) from None
    if budget < count <= limit:
        raise AudioTooLongError(
            f"{name} has more than {budget:,} samples per channel, the limit here, which is {budget / rate:.0f} seconds at "
            f"its {rate:,} Hz. Resample it to 16,000 Hz or cut it into parts."
        )
    if 0 < declared < 2**62 and len(samples) < declared and len(samples) <= limit:
        raise AudioError(
            f"{name} is truncated: {len(samples):,} of {declared:,} samples could be decoded. Download it again."
        )
    return samples, rate


def _with_length(data: bytes) -> bytes:
    """A WAV file whose samples are declared to be none, as some recorders leave it in a stream: with their real length."""
    if int.from_bytes(data[4:8], "little") in (len(data) - 8, len(data) - 9):  # whole, and perhaps of no samples
        return data
    at = 12
    while at + 8 < len(data):
        name, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if name == b"data":
            rest = min(len(data) - at - 8, 0xFFFFFFFF)
            return data if size else data[: at + 4] + rest.to_bytes(4, "little") + data[at + 8 :]
        at += 8 + size + size % 2
    return data


def _as_samples(source: Any, name: str) -> np.ndarray:
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        source = source.float() if source.dtype in (torch.bfloat16, torch.float16) else source
    samples = np.asarray(source)
    if samples.ndim not in (1, 2):
        raise AudioError(f"{name} has shape {samples.shape}. Give (time,), (channels, time) or (time, channels).")
    if np.issubdtype(samples.dtype, np.integer):
        if samples.dtype.itemsize == 8:  # which no recording has, and any list of whole numbers becomes
            raise AudioError(
                f"{name} has 64-bit integers, which do not say how loud they are. Convert them to the type that was recorded "
                "(int16, int32), or to floats in [-1, 1]."
            )
        half = 2.0 ** (8 * samples.dtype.itemsize - 1)
        zero = half if np.issubdtype(samples.dtype, np.unsignedinteger) else 0.0  # as in 8-bit WAV files
        return ((samples - zero) / half).astype(np.float32)
    if not np.issubdtype(samples.dtype, np.floating):
        raise AudioError(f"{name} has elements of type {samples.dtype}. Give floats in [-1, 1] or integers.")
    return samples.astype(np.float32)


def _mono(samples: np.ndarray, name: str) -> np.ndarray:
    if samples.size == 0:
        raise AudioError(f"{name} has no samples. Record or download it again.")
    if samples.ndim == 1:
        return samples
    if samples.shape[0] < samples.shape[1]:
        samples = samples.T
    _check_channels(samples.shape[1], name)
    return samples.mean(axis=1)


def _check_channels(channels: int, name: str) -> None:
    if channels > 2:
        raise AudioError(f"{name} has {channels} channels. Choose one or mix them down to mono or stereo first.")


def _check_rate(rate: float, name: str) -> None:
    if not isinstance(rate, int | float | np.number) or not LOWEST_RATE <= rate <= HIGHEST_RATE:
        shown = f"{rate:,} Hz" if isinstance(rate, int | float | np.number) else repr(rate)
        raise AudioError(
            f"{name} has a sampling rate of {shown}; {LOWEST_RATE:,} to {HIGHEST_RATE:,} Hz are possible for speech. "
            "Correct the rate (or the file's header)."
        )


def _checked(
    samples: np.ndarray, rate: float, name: str, shortest: int, max_seconds: float | None = None
) -> np.ndarray:
    """Refuse what no recogniser could make sense of. (Before resampling, which would blur a clipped signal's peaks.)"""
    _check_rate(rate, name)
    seconds = len(samples) / rate
    if max_seconds is not None and seconds > max_seconds:
        raise AudioTooLongError(f"{name} is longer than {max_seconds:g} seconds, the limit here. Cut it into parts.")
    if seconds < shortest / SAMPLING_RATE:
        raise AudioError(
            f"{name} is too short: {seconds * 1000:.1f} ms, and the encoder needs at least "
            f"{shortest / SAMPLING_RATE * 1000:.1f} ms. Leave it out or pad it with silence."
        )
    if not np.isfinite(samples).all():
        count = int((~np.isfinite(samples)).sum())
        raise AudioError(f"{name} has {count:,} samples that are not finite numbers. Export it again without them.")
    low, high = samples.min(), samples.max()
    if is_silent(samples):
        raise AudioError(f"{name} is silent: all of its {len(samples):,} samples are equal. Check the recording.")
    peak = max(-low, high)
    if peak > LARGEST_SAMPLE:
        raise AudioError(
            f"{name} has samples up to {peak:,.0f}; floats must be in [-1, 1]. Give integer samples as integers, or "
            "divide them by the largest value of their type."
        )
    # No copy of the magnitudes: the recording may be an hour long.
    clipped = sum(map(np.count_nonzero, (samples >= 0.999 * peak, samples <= -0.999 * peak))) / len(samples)
    if clipped > LARGEST_CLIPPED_FRACTION and peak > QUIET:
        raise AudioError(
            f"{name} is clipped: {clipped:.0%} of its samples are at the peak value, so no speech can be left in it. "
            "Record it again at a lower level."
        )
    return samples


def _resampled(samples: np.ndarray, rate: float, name: str) -> np.ndarray:
    if rate == SAMPLING_RATE:
        return samples
    if resample is None:
        raise AudioError(f"{name} is at {rate:,} Hz and torchaudio, which resamples, is missing: install torchaudio.")
    rate = round(rate)
    # Odd rates would need filters of gigabytes; 5 Hz more or less, or 50 from 40 kHz up, are inaudible.
    step = 100 if rate >= 40_000 else 10
    if math.gcd(rate, SAMPLING_RATE) < step:
        rate = round(rate / step) * step
    return resample(torch.from_numpy(np.ascontiguousarray(samples)), rate, SAMPLING_RATE).numpy()


__all__ = ["AudioError", "AudioTooLongError", "cut_at_pauses", "load_audio", "read_bytes", "read_segment"]
