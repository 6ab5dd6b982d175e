"""What backbones with a network share: resized pictures, batches of one size, and checksums of weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unicode_fast.files.untrusted import open_file

# Pictures or sounds that a network reads together, always as many, so that none depends on the others of a file.
_TOGETHER = 4


def resized(frames: np.ndarray, side: int) -> Tensor:
    """(N, H, W, 3) uint8 to (N, 3, side, side) float32 in 0..255, bilinear with antialiasing; the aspect may change."""
    given = torch.from_numpy(np.require(frames, requirements=("C", "W"))).permute(0, 3, 1, 2).float()
    return F.interpolate(given, (side, side), mode="bilinear", antialias=True, align_corners=False)


def centre_square(frames: np.ndarray) -> np.ndarray:
    """The square in the middle of each picture, (N, H, W, 3) to (N, s, s, 3)."""
    height, width = frames.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return frames[:, top : top + side, left : left + side]


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
