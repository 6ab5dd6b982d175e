"""bfloat16 for NumPy, which has no such dtype: values are rounded when written and exact when read."""

from __future__ import annotations

import numpy as np
import torch

NAME = "bfloat16"


def to_bits(array: np.ndarray) -> np.ndarray:
    """Round to bfloat16: to nearest, ties to even.

    Args:
        array: float64, float32, or a dtype that float32 represents exactly.

    Returns:
        The bits, uint16, of the same shape.
    """
    rounded = torch.from_numpy(np.ascontiguousarray(array, np.float32)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)


def from_bits(bits: np.ndarray) -> np.ndarray:
    """The exact values, float32, of bfloat16 bits, uint16, of the same shape."""
    return torch.from_numpy(np.ascontiguousarray(bits).view(np.int16)).view(torch.bfloat16).to(torch.float32).numpy()
