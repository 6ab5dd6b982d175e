"""Sound features without a trained model."""

from __future__ import annotations

import numpy as np

from unicode_fast.config import Modality
from unicode_fast.data.talking_digits.spectrogram import log_mel_statistics
from unicode_fast.media.backbones import Reads


class LogMel:
    """Mean and standard deviation over each second of 64 log-mel bands from 60 to 7600 Hz, as of the built-in data."""

    name = "log-mel"
    reads: Reads = "sound"
    modality = Modality("vector", (128,))
    rate = 16000

    def __call__(self, given: np.ndarray) -> np.ndarray:
        """(N, 16000) samples to (N, 128)."""
        return log_mel_statistics(given)
