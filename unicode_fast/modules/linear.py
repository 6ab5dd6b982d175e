"""Linear layers that use the faster of torch's two libraries of matrix products on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unicode_fast.modules import host

# Multiplications of a product from which the other library is faster.
LEAST_PRODUCT = 8_000_000


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`; large products in float32 on a CPU with AVX-512 are convolutions with kernels of one cell.

    torch computes products with MKL and convolutions with oneDNN, which is the faster on AMD's processors with AVX-512.

    Args:
        rows: (..., inputs).
        weight: (outputs, inputs).
        bias: (outputs,), or None.

    Returns:
        (..., outputs).
    """
    if not _by_convolution(rows, weight):
        return F.linear(rows, weight, bias)
    maps = rows.reshape(1, -1, 1, rows.shape[-1]).permute(0, 3, 1, 2)  # (1, inputs, rows, 1), channels last
    # A dilation does not change a kernel of one cell, but with one thread torch uses oneDNN for dilated kernels only.
    maps = F.conv2d(maps, weight[:, :, None, None], bias, dilation=(1, 2))
    return maps.permute(0, 2, 3, 1).reshape(*rows.shape[:-1], -1)


def _by_convolution(rows: Tensor, weight: Tensor) -> bool:
    return (
        # First: torch.compile cannot trace the next questions.
        not torch.compiler.is_compiling()
        and host.is_on_host(rows)
        and rows.dtype == weight.dtype == torch.float32
        and rows.numel() * len(weight) >= LEAST_PRODUCT
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and not torch.is_autocast_enabled("cpu")
    )


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, rows: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        return linear(rows, self.weight, self.bias)
