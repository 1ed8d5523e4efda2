"""Noise at a known level and rooms of a known reverberation time, for speech of shape (samples,) at 16 kHz.

**Noise.** Pink noise n (equal power per octave, like the noise of rooms and streets) is added so that

    SNR = 10 log10(sum x^2 / sum (g n)^2)  dB

over the whole recording, pauses included (`torchaudio.functional.add_noise`).

**Reverberation.** The room's impulse response is a direct sound followed by Gaussian noise whose energy falls by 60 dB
in RT60 seconds, the classical model of a diffuse field (Moorer, 1979; Lehmann and Johansson, 2008):

    h(0) = 1,   h(t) = a n(t) 10^(-3 t / RT60)   for 2.5 ms < t <= RT60

with `a` such that direct sound and reverberation carry the energies' ratio asked for (0 dB by default: a listener
some metres from the speaker). The speech keeps its length: what rings on after its end is cut.

`measured_snr` and `measured_reverberation_time` (Schroeder's backward integration, 1965; the slope from -5 to -35 dB, as
ISO 3382 reads RT60 off T30) check both from the signals alone.
"""

import numpy as np
import torch
from torchaudio.functional import add_noise, fftconvolve

from ..configuration_speechllm import SAMPLING_RATE


FIRST_REFLECTION = 0.0025  # seconds after the direct sound
LEVEL = 0.05  # root mean square of every recording, -26 dB below full scale
HIGHEST_PEAK = 0.99


def pink_noise(samples: int, seed: int) -> torch.Tensor:
    """(samples,) Gaussian noise of power 1/f above 20 Hz, of root mean square 1."""
    draw = np.random.default_rng(seed)
    spectrum = draw.standard_normal(samples // 2 + 1) + 1j * draw.standard_normal(samples // 2 + 1)
    frequencies = np.fft.rfftfreq(samples, 1 / SAMPLING_RATE)
    spectrum *= np.where(frequencies < 20, 0, 1 / np.sqrt(np.maximum(frequencies, 20)))
    noise = np.fft.irfft(spectrum, samples)
    return torch.from_numpy(noise / np.sqrt(np.mean(noise**2))).float()


def with_noise(speech: torch.Tensor, snr_db: float, seed: int) -> torch.Tensor:
    """(samples,) speech and pink noise at `snr_db`."""
    return add_noise(speech, pink_noise(len(speech), seed), torch.tensor(float(snr_db)))


def room_response(reverberation_time: float, seed: int, direct_to_reverberant_db: float = 0.0) -> torch.Tensor:
    """(RT60 x 16,000,) impulse response of a room (module docstring).

    Args:
        reverberation_time: RT60 in seconds, 0.05 to 5.
        seed: of the reflections.
        direct_to_reverberant_db: energy of the direct sound over that of the rest.

    Raises:
        ValueError: if the time is outside those bounds.
    """
    if not 0.05 <= reverberation_time <= 5:
        raise ValueError(f"The reverberation time is {reverberation_time} s. Give 0.05 to 5.")
    seconds = np.arange(round(reverberation_time * SAMPLING_RATE)) / SAMPLING_RATE
    tail = np.random.default_rng(seed).standard_normal(len(seconds)) * 10 ** (-3 * seconds / reverberation_time)
    tail[seconds <= FIRST_REFLECTION] = 0
    tail *= np.sqrt(10 ** (-direct_to_reverberant_db / 10) / np.sum(tail**2))
    tail[0] = 1
    return torch.from_numpy(tail).float()


def with_reverberation(speech: torch.Tensor, reverberation_time: float, seed: int) -> torch.Tensor:
    """(samples,) speech in a room of RT60 `reverberation_time` seconds, of the same length."""
    return fftconvolve(speech, room_response(reverberation_time, seed))[: len(speech)]


def at_common_level(speech: torch.Tensor) -> torch.Tensor:
    """The samples at root mean square `LEVEL`, or less where their peak would be clipped: loudness tells nothing."""
    return speech * min(LEVEL / speech.square().mean().sqrt(), HIGHEST_PEAK / speech.abs().max())


def measured_snr(clean: torch.Tensor, noisy: torch.Tensor) -> float:
    """SNR in dB of a recording whose clean speech is known up to its gain: energy of the part of `noisy` that is
    proportional to `clean`, over the energy of the rest."""
    clean, noisy = clean.double(), noisy.double()
    speech = clean * (clean @ noisy) / (clean @ clean)
    return float(10 * torch.log10(speech.square().sum() / (noisy - speech).square().sum()))


def measured_reverberation_time(response: torch.Tensor) -> float:
    """RT60 in seconds of an impulse response, from the slope of its energy decay curve between -5 and -35 dB."""
    energy = np.asarray(response, dtype=np.float64) ** 2
    decay = 10 * np.log10(np.cumsum(energy[::-1])[::-1] / energy.sum() + 1e-12)
    part = np.flatnonzero((decay <= -5) & (decay >= -35))
    slope, _ = np.polyfit(part / SAMPLING_RATE, decay[part], 1)
    return float(-60 / slope)
