"""VGGish of sound, from a local file of its published weights."""

from __future__ import annotations

import functools
import os

import numpy as np
import torch
from scipy.fft import rfft
from torch import Tensor, nn

from unicode_fast.config import Modality
from unicode_fast.media import networks, weight_files
from unicode_fast.media.backbones import Reads

# Output channels of the convolutions between two poolings, and widths of the three layers after them.
_CONVOLUTIONS = ((64,), (128,), (256,) * 2, (512,) * 2)
_EMBEDDINGS = (4096, 4096, 128)
# Frames of a spectrogram in one example, mel bands, and what is added before the logarithm.
_FRAMES, _BANDS, _OFFSET = 96, 64, 0.01
_WINDOW, _HOP, _TRANSFORM = 400, 160, 512
_LOWEST_HZ, _HIGHEST_HZ = 125.0, 7500.0


class VGGish:
    """VGGish's 128 features of 0.96 s, after the last ReLU, without PCA and quantisation.

    Step k of a clip reads its sound from 0.96 k to 0.96 k + 0.975 s, so it begins 0.04 k s before second k of the
    pictures. Each clip of ten seconds begins at its first second again, so no step is more than 0.36 s early.

    Args:
        weights: file with the layers of torchvggish (vggish-10086976.pth: features.0.weight to embeddings.4.bias).

    Raises:
        ValueError: the file is another one, or a tensor is missing, unknown, of another shape or not finite.
        FileNotFoundError: there is no such file.

    Source:
        Hershey et al., "CNN Architectures for Large-Scale Audio Classification", ICASSP 2017.
    """

    name = "vggish"
    reads: Reads = "sound"
    modality = Modality("vector", (128,))
    rate = 16000
    hop_s = 0.96
    window_s = ((_FRAMES - 1) * _HOP + _WINDOW) / rate

    def __init__(self, weights: str | os.PathLike[str]) -> None:
        file = weight_files.file_of(weights)
        self.options = {"weights": str(file)}
        self.weights_sha256 = networks.sha256_of(file)
        # Four poolings halve both sides of an example.
        width, layers = _CONVOLUTIONS[-1][-1] * (_FRAMES // 16) * (_BANDS // 16), list[nn.Module]()
        with torch.device("meta"):
            for next_width in _EMBEDDINGS:
                layers += [nn.Linear(width, next_width), nn.ReLU()]
                width = next_width
            features = networks.convolutions(1, _CONVOLUTIONS)
        self.network = nn.ModuleDict({"features": features, "embeddings": nn.Sequential(*layers)})
        weight_files.load(self.network, weight_files.of_torch(file), file)

    def __call__(self, given: np.ndarray) -> np.ndarray:
        """(N, 15600) samples to (N, 128), never negative."""
        return networks.run(self._run, torch.from_numpy(log_mel_examples(given)).unsqueeze(1))

    def _run(self, examples: Tensor) -> Tensor:
        maps = self.network["features"](examples)  # (N, 512, 6, 4)
        # The published weights expect the channels last.
        features: Tensor = self.network["embeddings"](maps.permute(0, 2, 3, 1).flatten(1))
        return features


def log_mel_examples(samples: np.ndarray) -> np.ndarray:
    """Input of VGGish: log(mel + 0.01) of magnitudes in windows of 25 ms every 10 ms.

    Args:
        samples: (N, 15600) at 16 kHz.

    Returns:
        (N, 96, 64) float32.
    """
    frames = np.lib.stride_tricks.sliding_window_view(samples.astype(np.float64), _WINDOW, axis=1)[:, ::_HOP]
    window = np.hanning(_WINDOW + 1)[:-1]
    mel = np.abs(rfft(frames * window, _TRANSFORM, axis=2)) @ _mel_filters()
    return np.log(mel + _OFFSET).astype(np.float32)


@functools.cache
def _mel_filters() -> np.ndarray:
    """(257, 64) float64 triangles whose sides are straight on the mel scale, without the constant frequency."""

    def mel(hertz: np.ndarray) -> np.ndarray:
        return 1127 * np.log1p(hertz / 700)

    bins = mel(np.linspace(0, VGGish.rate / 2, _TRANSFORM // 2 + 1))[:, None]
    lowest, highest = mel(np.array([_LOWEST_HZ, _HIGHEST_HZ]))
    edges = np.linspace(lowest, highest, _BANDS + 2)
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    filters: np.ndarray = np.maximum(0, np.minimum(rising, falling))
    filters[0] = 0
    return filters
