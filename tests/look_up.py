"""A model whose features are code numbers, for tests of what is done with codes."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

CODEWORDS, WIDTH = 25, 16
NAMES = ("audio", "video", "text")


class Encoded(NamedTuple):
    index: Tensor  # type: ignore[assignment]
    vector: Tensor


class LookUp(nn.Module):
    """Features are code numbers, and encoding looks them up; dropout replaces some and counts its calls."""

    def __init__(self, scale: float = 1.0, noise: float = 0.2) -> None:
        super().__init__()
        self.names, self.dtype, self.device, self.noise = NAMES, torch.float32, torch.device("cpu"), noise
        self.codewords = CODEWORDS
        generator = torch.Generator().manual_seed(5)
        self.register_buffer("codebook", scale * torch.randn(CODEWORDS, WIDTH, generator=generator))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.part = nn.Dropout()

    def encode(self, name: str, features: Tensor, mask: Tensor | None = None, *, dropout: bool = False) -> Encoded:
        index = features[..., 0].long()
        if dropout:
            self.calls += 1
            index = torch.where(torch.rand(index.shape) < self.noise, torch.randint(CODEWORDS, index.shape), index)
        return Encoded(index, self.codebook[index])
