"""What backbones with a network share: resized pictures, batches of one size, convolutions, checksums of weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unicode_fast.files.untrusted import open_file

# Pictures or sounds that a network reads together, always as many, so that none depends on the others of a file.
_TOGETHER = 4


def resized(frames: np.ndarray, side: int, *, antialias: bool = True) -> Tensor:
    """(N, H, W, 3) uint8 to (N, 3, side, side) float32 in 0..255, bilinear; the aspect may change."""
    given = torch.from_numpy(np.require(frames, requirements=("C", "W"))).permute(0, 3, 1, 2).float()
    return F.interpolate(given, (side, side), mode="bilinear", antialias=antialias, align_corners=False)


def centre_square(frames: np.ndarray) -> np.ndarray:
    """The square in the middle of each picture, (N, H, W, 3) to (N, s, s, 3)."""
    height, width = frames.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return frames[:, top : top + side, left : left + side]


def convolutions(channels: int, groups: Sequence[Sequence[int]]) -> nn.Sequential:
    """Convolutions of 3 x 3 with ReLU, and a pooling of 2 x 2 after each group, as in networks of the VGG.

    Args:
        channels: of the input.
        groups: channels of each convolution, by group.
    """
    layers: list[nn.Module] = []
    for group in groups:
        for width in group:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


@torch.inference_mode()
def run(network: Callable[[Tensor], Tensor], rows: Tensor) -> np.ndarray:
    """The network's results for all rows, float32; each batch has the same number of rows, the last one filled up.

    So the features of a row do not depend on the number of rows.
    """
    found = []
    for start in range(0, len(rows), _TOGETHER):
        batch = rows[start : start + _TOGETHER]
        filled = F.pad(batch, (0, 0) * (rows.dim() - 1) + (0, _TOGETHER - len(batch)))
        found.append(network(filled)[: len(batch)].float())
    return torch.cat(found).numpy()


def sha256_of(file: str | os.PathLike[str]) -> str:
    """Checksum of a file of weights."""
    with open_file(file) as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()
