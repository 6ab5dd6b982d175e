"""Normalisation of features to the same mean and variance in all modalities, before the codebook."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from unicode_fast.modules import host

# Share of a batch's moments in the running ones.
MOMENTUM = 0.05
_SMALLEST_VARIANCE = 1e-5


class Moments(NamedTuple):
    """Mean and variance, (D,) each, of one modality's features over the valid positions of a batch."""

    mean: Tensor
    variance: Tensor


class FeatureNorm(nn.Module):
    """Batch normalisation of one modality's z over valid positions, without scale and shift.

    Without it modalities occupy separate regions of the feature space, whatever their content. With equal first two
    moments the same codewords can be nearest for all modalities. Training uses the moments of the whole batch over all
    ranks and micro-batches, with gradient. `encode` uses running moments.

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
        """Features normalised by the moments of the batch, and these moments, detached; no buffer changes.

        Args:
            z: (B, T, D).
            mask: (B, T) bool, or None where every position is valid.
        """
        if host.has_operators(z):
            normalised, mean, variance = torch.ops.unicode_fast_layers.feature_norm(z, mask, _SMALLEST_VARIANCE)
            return normalised, Moments(mean, variance)
        weight = z.new_ones(*z.shape[:2], 1) if mask is None else mask.unsqueeze(-1).to(z.dtype)
        count = weight.sum((0, 1)).clamp(min=1)
        mean = (z * weight).sum((0, 1)) / count
        variance = ((z - mean).square() * weight).sum((0, 1)) / count
        return _normalised(z, Moments(mean, variance)), Moments(mean.detach(), variance.detach())

    def by_running_moments(self, z: Tensor) -> Tensor:
        """Features (B, T, D) normalised by the running moments."""
        return _normalised(z, Moments(self.mean, self.variance))

    @torch.no_grad()
    def update(self, moments: Moments, counted: Tensor | None = None) -> None:
        """Moves the running moments towards those of a batch.

        Args:
            moments: of the batch.
            counted: () bool, whether the batch had a valid position; None if it had.
        """
        for running, own in ((self.mean, moments.mean), (self.variance, moments.variance)):
            running.lerp_(own if counted is None else torch.where(counted, own, running), MOMENTUM)


def _normalised(z: Tensor, moments: Moments) -> Tensor:
    return (z - moments.mean) * torch.rsqrt(moments.variance + _SMALLEST_VARIANCE)
