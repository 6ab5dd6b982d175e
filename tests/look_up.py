"""A model whose features are code numbers, and clips of such features, for tests of the use of codes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from unicode_fast.config import Modality
from unicode_fast.data import ClipSet, Dataset

CODEWORDS, WIDTH = 25, 16
NAMES = ("audio", "video", "text")


class Encoded(NamedTuple):
    index: Tensor  # type: ignore[assignment]
    vector: Tensor


class LookUp(nn.Module):
    """Features are code numbers, and encoding gathers their codewords; dropout replaces some and counts its calls."""

    def __init__(self, scale: float = 1.0, noise: float = 0.2) -> None:
        super().__init__()
        self.names, self.dtype, self.device, self.noise = NAMES, torch.float32, torch.device("cpu"), noise
        self.codewords, self.code_sizes = CODEWORDS, (CODEWORDS,)
        generator = torch.Generator().manual_seed(5)
        self.register_buffer("codebook", scale * torch.randn(CODEWORDS, WIDTH, generator=generator))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.inner = nn.Dropout()

    def encode(self, name: str, features: Tensor, mask: Tensor | None = None, *, dropout: bool = False) -> Encoded:
        index = features[..., 0].long()
        if dropout:
            self.calls += 1
            index = torch.where(torch.rand(index.shape) < self.noise, torch.randint(CODEWORDS, index.shape), index)
        return Encoded(index, self.codebook[index])


def coded(codes: Mapping[str, np.ndarray], classes: Sequence[str], arrays: Mapping[str, np.ndarray]) -> ClipSet:
    """Clips with these codes, (clips, T) by modality; words have no time axis."""
    kinds = {name: Modality("words" if name == "text" else "vector", (1,)) for name in codes}
    features = {name: one[..., None].astype(np.float32) for name, one in codes.items()}
    return ClipSet({**features, **arrays}, kinds, list(classes), np.arange(len(next(iter(codes.values())))))


def dataset(splits: Mapping[str, ClipSet], name: str = "codes") -> Dataset:
    first = next(iter(splits.values()))
    return Dataset(Path(), name, first.modalities, first.classes, {split: [clips] for split, clips in splits.items()})
