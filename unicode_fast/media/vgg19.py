"""VGG19 of pictures, from a local file of its published weights."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import nn

from unicode_fast.config import Modality
from unicode_fast.media import networks, weight_files
from unicode_fast.media.backbones import Reads

# Output channels of the convolutions between two poolings.
_CONVOLUTIONS = ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4)
_SIDE = 224
# Mean colour of ImageNet as blue, green, red.
_MEAN_BGR = (103.939, 116.779, 123.68)
# Begin of the SHA-256 of torchvision's weights, vgg19-dcbb9e9d.pth, which have the same names and shapes.
_TORCHVISION = "dcbb9e9d"


class Vgg19:
    """The output of the fifth pooling of VGG19 with the weights of Caffe and Keras, averaged over frames of a second.

    Frames are resized to 224 x 224 without keeping their aspect, bilinear without antialiasing and rounded to whole
    numbers, as OpenCV does for AVE. The result differs from OpenCV's by at most 1 of 255.

    Second i of a clip of L frames and s seconds has the frames int(i L / s + (k / n) L / s), k from 0 to n - 1. AVE's
    scripts round L / s down first. So theirs are the same where s divides L, else up to L mod s frames earlier.

    Args:
        weights: one of two kinds of files. A .h5 of Keras has the layers block1_conv1 to block5_conv4, with or without
            the classifier. A .pth with the weights of Caffe has features.0.weight to features.34.bias, as
            vgg19-d01eb7cb.pth. torchvision's own VGG19 is another network; its weights do not give these features.
        frames_per_step: n; 16 in one of AVE's scripts, 8 in another.

    Raises:
        ValueError: the file is none of these, or a tensor is missing, unknown, of another shape or not finite.
        FileNotFoundError: there is no such file.
        MissingPackageError: h5py is not installed, which a .h5 needs.

    Source:
        Tian et al., "Audio-Visual Event Localization in Unconstrained Videos", ECCV 2018, and its released scripts.
    """

    name = "vgg19"
    reads: Reads = "frames"
    modality = Modality("grid", (7, 7, 512))

    def __init__(self, weights: str | os.PathLike[str], frames_per_step: int = 16) -> None:
        if type(frames_per_step) is not int or frames_per_step < 1:
            raise ValueError(f"frames_per_step must be a whole number of at least 1, got {frames_per_step!r}")
        file = weight_files.file_of(weights)
        self.rate = frames_per_step
        self.options = {"weights": str(file), "frames_per_step": frames_per_step}
        self.weights_sha256 = networks.sha256_of(file)
        if self.weights_sha256.startswith(_TORCHVISION):
            raise ValueError(f"weights must be those of Caffe or Keras, got torchvision's in {file}")
        with torch.device("meta"):
            self.network = nn.ModuleDict({"features": networks.convolutions(3, _CONVOLUTIONS)})
        if file.suffix in (".h5", ".hdf5"):
            layers = [f"block{b + 1}_conv{c + 1}" for b, group in enumerate(_CONVOLUTIONS) for c in range(len(group))]
            called = [f"{layer}/{kind}" for layer in layers for kind in ("kernel", "bias")]
            names = dict(zip(self.network.state_dict(), called, strict=True))
            weight_files.load(self.network, weight_files.of_keras(file, layers), file, names)
        else:
            tensors = weight_files.of_torch(file).items()
            kept = {name: one for name, one in tensors if not name.startswith("classifier.")}
            weight_files.load(self.network, kept, file)

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
        pixels = networks.resized(given, _SIDE, antialias=False).round()
        blue_first = pixels.flip(1) - torch.tensor(_MEAN_BGR).view(3, 1, 1)
        maps = networks.run(self.network["features"], blue_first)  # (N, 512, 7, 7)
        return np.ascontiguousarray(maps.transpose(0, 2, 3, 1))
