"""When the host may read a value of a tensor to choose what to compute."""

from __future__ import annotations

from torch import Tensor


def is_on_host(tensor: Tensor) -> bool:
    """True on a CPU, where reading a value needs no device synchronisation."""
    return tensor.device.type == "cpu"
