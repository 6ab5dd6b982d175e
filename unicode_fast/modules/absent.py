"""Clips that lack a modality: no position of their mask is valid, and what is computed of them counts nowhere."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def with_a_position(mask: Tensor) -> Tensor:
    """The mask of an encoder, which needs a valid position: the first one of clips that have none.

    Args:
        mask: (B, T) bool.

    Returns:
        (B, T) bool; the mask itself where each clip has a valid position.
    """
    return torch.cat([mask[:, :1] | ~mask.any(1, keepdim=True), mask[:, 1:]], 1)


def having(mask: Mapping[str, Tensor], *names: str) -> Tensor:
    """The clips that have all of these modalities, (B,) bool, from (B, T) bool by modality."""
    return torch.stack([mask[name].any(1) for name in names]).all(0)


def mean_over(values: Tensor, counted: Tensor | None, dim: int = 0) -> Tensor:
    """Mean along an axis of the values that count.

    Args:
        values: (...).
        counted: bool, to be broadcast to `values` but not along `dim`; None where all count.
        dim: the axis.

    Returns:
        As `values.mean(dim)`, to the last bit where all values count; 0 where none does.
    """
    if counted is None:
        return values.mean(dim)
    number = counted.sum(dim).clamp(min=1).to(values.dtype)
    return torch.where(counted, values, 0).mean(dim) * (values.shape[dim] / number)
