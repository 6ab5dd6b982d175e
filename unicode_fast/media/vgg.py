"""VGG19 of pictures and VGGish of sound, from local files of their published weights."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.fft import rfft
from torch import Tensor, nn

from unicode_fast.config import Modality
from unicode_fast.errors import few
from unicode_fast.files.checked_torch import read_torch
from unicode_fast.files.optional import need
from unicode_fast.files.untrusted import BadFile, open_file
from unicode_fast.media import networks
from unicode_fast.media.backbones import Reads

# Output channels of the convolutions between two poolings.
_VGG19 = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)
_VGGISH = ((64,), (128,), (256, 256), (512, 512))
_SIDE = 224
# Mean colour of ImageNet as blue, green, red.
_MEAN_BGR = (103.939, 116.779, 123.68)
# Frames of a spectrogram in one example of VGGish, mel bands, and what is added before the logarithm.
_FRAMES, _BANDS, _OFFSET = 96, 64, 0.01
_WINDOW, _HOP, _TRANSFORM = 400, 160, 512
_LOWEST_HZ, _HIGHEST_HZ = 125.0, 7500.0


def _convolutions(channels: int, groups: tuple[tuple[int, ...], ...]) -> nn.Sequential:
    """3 x 3 convolutions with ReLU, and a pooling after each group; the numbers of layers are those of the files."""
    layers: list[nn.Module] = []
    for group in groups:
        for width in group:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


class Vgg19:
    """The output of the fifth pooling of VGG19 with the weights of Caffe and Keras, averaged over frames of a second.

    Frames are resized to 224 x 224 without keeping their aspect, bilinear with antialiasing. Second i of a clip of L
    frames and s seconds has the frames int(i L / s + (k / n) L / s), k from 0 to n - 1.

    Args:
        weights: file with Keras's layers (.h5, block1_conv1 to block5_conv4), or with the Caffe weights under the names
            of torchvision's layers (.pth, features.0.weight to features.34.bias). Both expect blue first. torchvision's
            own VGG19 is another network; its weights do not give these features.
        frames_per_step: n.

    Raises:
        ValueError: the file is none of these, or a tensor is missing, of another shape or not finite.
        FileNotFoundError: there is no such file.

    Source:
        Tian et al., "Audio-Visual Event Localization in Unconstrained Videos", ECCV 2018, and its released scripts.
    """

    name = "vgg19"
    reads: Reads = "frames"
    modality = Modality("grid", (7, 7, 512))

    def __init__(self, weights: str | os.PathLike[str], frames_per_step: int = 16) -> None:
        if type(frames_per_step) is not int or frames_per_step < 1:
            raise ValueError(f"frames_per_step must be a whole number of at least 1, got {frames_per_step!r}")
        file = _file_of(weights)
        self.rate = frames_per_step
        self.options = {"weights": str(file), "frames_per_step": frames_per_step}
        self.weights_sha256 = networks.sha256_of(file)
        with torch.device("meta"):
            self.network = _convolutions(3, _VGG19)
        _load(self.network, _of_keras(file) if file.suffix in (".h5", ".hdf5") else _of_torch(file), file)

    def frame_numbers(self, count: int, steps: int) -> np.ndarray:
        """Numbers of the frames of each second of a clip.

        Args:
            count: L, frames of the clip.
            steps: s, its seconds.

        Returns:
            (steps, frames_per_step) int64.
        """
        second, place = np.arange(steps)[:, None], np.arange(self.rate)[None]
        # int(i L / s + (k / n) L / s) in whole numbers.
        return (second * self.rate + place) * count // (steps * self.rate)

    def __call__(self, given: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) frames to (N, 7, 7, 512)."""
        pixels = networks.resized(given, _SIDE).flip(1) - torch.tensor(_MEAN_BGR).view(3, 1, 1)
        return np.ascontiguousarray(networks.run(self.network, pixels).transpose(0, 2, 3, 1))


class VGGish:
    """VGGish's 128 features of 0.96 s, after the last ReLU, without PCA and quantisation.

    Step k reads the sound from 0.96 k s on, so it begins 0.04 k s before second k of the pictures.

    Args:
        weights: file with the layers of torchvggish (vggish-10086976.pth: features.0.weight to embeddings.4.bias).

    Raises:
        ValueError: the file is another one, or a tensor is missing, of another shape or not finite.
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
        file = _file_of(weights)
        self.options = {"weights": str(file)}
        self.weights_sha256 = networks.sha256_of(file)
        sizes = (_VGGISH[-1][-1] * (_FRAMES // 16) * (_BANDS // 16), 4096, 4096, 128)
        with torch.device("meta"):
            linear = [(nn.Linear(*pair), nn.ReLU()) for pair in zip(sizes[:-1], sizes[1:], strict=True)]
            embeddings = nn.Sequential(*(layer for pair in linear for layer in pair))
            self.network = nn.ModuleDict({"features": _convolutions(1, _VGGISH), "embeddings": embeddings})
        _load(self.network, _of_torch(file, ""), file)

    def __call__(self, given: np.ndarray) -> np.ndarray:
        """(N, 15600) samples to (N, 128), never negative."""
        return networks.run(self._run, torch.from_numpy(log_mel_examples(given)).unsqueeze(1))

    def _run(self, examples: Tensor) -> Tensor:
        maps = self.network["features"](examples)  # (N, 512, 6, 4)
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


def _file_of(weights: Any) -> Path:
    if not isinstance(weights, (str, os.PathLike)):
        raise ValueError(f"weights must be a file, got {weights!r}")
    file = Path(weights).absolute()
    if not file.exists():
        raise FileNotFoundError(f"weights must be an existing file, got {str(weights)!r}")
    return file


def _load(network: nn.Module, tensors: Mapping[str, Tensor], file: Path) -> None:
    """Gives a network without values these tensors, which must be its state in shape and names."""
    expected = network.state_dict()
    lacking = [name for name in expected if name not in tensors]
    if lacking:
        raise ValueError(f"weights in {file} must have all layers of the network, it lacks {few(lacking)}")
    for name, own in expected.items():
        shape = tuple(tensors[name].shape)
        if shape != tuple(own.shape):
            raise ValueError(f"{name} in {file} must have shape {tuple(own.shape)}, got {shape}")
        if not bool(tensors[name].isfinite().all()):
            raise ValueError(f"{name} in {file} must be finite, got NaN or Inf")
    network.load_state_dict({name: tensors[name].float() for name in expected}, assign=True)
    network.requires_grad_(False)


def _of_torch(file: Path, prefix: str = "features.") -> dict[str, Tensor]:
    """The tensors of a .pth file whose names begin with a prefix, without it."""
    try:
        content = read_torch(file)
    except BadFile as error:
        raise ValueError(f"weights in {file} must be a file of tensors: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"weights in {file} must be tensors by name, got {type(content).__name__}")
    named = {name: one for name, one in content.items() if isinstance(name, str) and isinstance(one, Tensor)}
    return {name.removeprefix(prefix): one for name, one in named.items() if name.startswith(prefix)}


def _of_keras(file: Path) -> dict[str, Tensor]:
    """The convolutions of a Keras file under the numbers of the layers of `_convolutions`."""
    h5py, found = need("h5py", "media"), {}
    with torch.device("meta"):
        layers = [name for name, layer in _convolutions(3, _VGG19).named_children() if isinstance(layer, nn.Conv2d)]
    names = [f"block{b + 1}_conv{c + 1}" for b, group in enumerate(_VGG19) for c in range(len(group))]
    try:
        with open_file(file) as stream, h5py.File(stream, "r") as content:
            arrays: dict[str, list[np.ndarray]] = {}

            def visit(path: str, item: Any) -> None:
                owner = next((part for part in path.split("/") if part in names), None)
                if owner is not None and isinstance(item, h5py.Dataset) and item.size < 1 << 24:
                    arrays.setdefault(owner, []).append(np.asarray(item, np.float32))

            content.visititems(visit)
    except (OSError, BadFile) as error:
        raise ValueError(f"weights in {file} must be a file of Keras: {error}") from error
    for layer, name in zip(layers, names, strict=True):
        for array in arrays.get(name, []):
            # A kernel is (3, 3, in, out).
            kind = {4: "weight", 1: "bias"}.get(array.ndim)
            if kind is not None:
                found[f"{layer}.{kind}"] = torch.from_numpy(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array)
    return found
