"""Log-mel features of each second of sound: over the whole second, or over each quarter."""

from __future__ import annotations

import functools
import math

import numpy as np
from scipy.fft import rfft

from unicode_fast.data.talking_digits.speech import SAMPLE_RATE_HZ

BANDS, QUARTERS = 64, 4
_WINDOW, _HOP, _TRANSFORM = 400, 256, 512
_LOWEST_HZ, _HIGHEST_HZ = 60.0, 7600.0
_FLOOR = 1e-6


@functools.cache
def mel_filters() -> np.ndarray:
    """(257, 64) float32 triangles, evenly spaced on the mel scale 2595 log10(1 + f / 700), each with peak 1."""
    lowest, highest = (2595 * math.log10(1 + limit / 700) for limit in (_LOWEST_HZ, _HIGHEST_HZ))
    edges_mel = np.linspace(lowest, highest, BANDS + 2)
    edges = 700 * (10 ** (edges_mel / 2595) - 1)
    frequency = np.arange(_TRANSFORM // 2 + 1) * SAMPLE_RATE_HZ / _TRANSFORM
    rising = (frequency[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequency[:, None]) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


def log_mel_statistics(seconds: np.ndarray) -> np.ndarray:
    """Mean and standard deviation over time of the log-mel spectrum of each second.

    61 Hann windows of 25 ms every 16 ms, none of which overlaps the next second.

    Args:
        seconds: (N, 16000) float32 samples at 16 kHz.

    Returns:
        (N, 128) float32: the 64 means, then the 64 standard deviations, of log(power + 1e-6).
    """
    log_mel = _log_mel(seconds)  # (N, 61, 64)
    return np.concatenate([log_mel.mean(1), log_mel.std(1)], axis=1)


def log_mel_quarters(seconds: np.ndarray) -> np.ndarray:
    """Mean of the log-mel spectrum over each quarter of a second, which keeps the order of sounds.

    The windows are those of `log_mel_statistics`; each belongs to the quarter of its centre.

    Args:
        seconds: (N, 16000) float32 samples at 16 kHz.

    Returns:
        (N, 256) float32: 64 means of log(power + 1e-6) for each quarter in turn.
    """
    log_mel = _log_mel(seconds)  # (N, 61, 64)
    quarter = (np.arange(log_mel.shape[1]) * _HOP + _WINDOW // 2) * QUARTERS // SAMPLE_RATE_HZ
    means = [log_mel[:, quarter == number].mean(1) for number in range(QUARTERS)]
    return np.concatenate(means, axis=1)


def _log_mel(seconds: np.ndarray) -> np.ndarray:
    """(N, 61, 64) float32: log(power + 1e-6) in each window and band."""
    frames = np.lib.stride_tricks.sliding_window_view(seconds, _WINDOW, axis=1)[:, ::_HOP]  # (N, 61, 400)
    window = np.hanning(_WINDOW + 1)[:-1].astype(np.float32) / np.float32(np.sqrt(_WINDOW))
    spectrum = rfft(frames * window, _TRANSFORM, axis=2)
    power = spectrum.real**2 + spectrum.imag**2
    return np.log(power @ mel_filters() + np.float32(_FLOOR))
