"""What may run on the host: reading a value of a tensor, and the internal operators for CPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from unicode_fast import backend


def is_on_host(tensor: Tensor) -> bool:
    """True on a CPU, where reading a value needs no device synchronisation."""
    return tensor.device.type == "cpu"


def has_operators(tensor: Tensor) -> bool:
    """Whether the operators of `unicode_fast_layers` compute with this tensor: float32 on a CPU, as it is."""
    return (
        backend.compiled()
        and hasattr(torch.ops.unicode_fast_layers, "attention")  # not in an extension without csrc/cpu
        and is_on_host(tensor)
        and tensor.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )
