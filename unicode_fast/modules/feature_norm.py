"""Features of all modalities around the same centre with the same spread, before the codebook sees them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

# Share of a batch's moments in the running ones.
MOMENTUM = 0.05
_SMALLEST_VARIANCE = 1e-5


class Moments(NamedTuple):
    """Of one modality's features over the valid steps of a batch, mean and variance (D,) each."""

    mean: Tensor
    variance: Tensor


class FeatureNorm(nn.Module):
    """Batch normalisation over valid steps, without scale and shift, of one modality's z.

    Modalities end up in regions of their own, whose distance says nothing of what the features are about; with their
    first two moments alike the same codewords can be nearest for all of them. While training the moments are those of
    the batch, with gradient, however ranks or micro-batches divide it; single modalities are encoded with running ones.

    Args:
        width: D.

    Source:
        Ioffe and Szegedy, "Batch Normalization", ICML 2015; by modality as in Liang et al., "Mind the Gap",
        NeurIPS 2022.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def forward(self, z: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Moments]:
        """Features normalised by the batch's own moments, and these, detached; no buffer changes.

        Args:
            z: (B, T, D).
            mask: (B, T) bool, or None where every step is valid.
        """
        weight = z.new_ones(*z.shape[:2], 1) if mask is None else mask.unsqueeze(-1).to(z.dtype)
        count = weight.sum((0, 1)).clamp(min=1)
        mean = (z * weight).sum((0, 1)) / count
        variance = ((z - mean).square() * weight).sum((0, 1)) / count
        return _normalised(z, Moments(mean, variance)), Moments(mean.detach(), variance.detach())

    def by_running_moments(self, z: Tensor) -> Tensor:
        """Features (B, T, D) normalised by the running moments."""
        return _normalised(z, Moments(self.mean, self.variance))

    @torch.no_grad()
    def update(self, moments: Moments) -> None:
        """Takes a share of a batch's moments into the running ones."""
        self.mean.lerp_(moments.mean, MOMENTUM)
        self.variance.lerp_(moments.variance, MOMENTUM)


def _normalised(z: Tensor, moments: Moments) -> Tensor:
    return (z - moments.mean) * torch.rsqrt(moments.variance + _SMALLEST_VARIANCE)
