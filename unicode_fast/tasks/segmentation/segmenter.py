"""The segmentation network: a pyramid of picture features, query blocks (TPAVI) on every stage, and a decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unicode_fast.checked_state import check_state
from unicode_fast.checkpoint import CheckpointError
from unicode_fast.errors import few
from unicode_fast.files.tensor_files import read_tensors, write_tensors
from unicode_fast.files.untrusted import BadFile
from unicode_fast.tasks.segmentation.backbones import PyramidSettings, make_pyramid

FORMAT = "unicode_fast segmenter 1"
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class QueryBlock(nn.Module):
    """TPAVI with dot products: every pixel of every frame attends to the query of all frames.

    Theta and g are linear in the map x, and phi is linear in the query. With N pixels in all frames,
    z = x + W(theta phi^T g / N), then a layer norm. There is no softmax, so phi^T g is computed first: a (C/2, C/2)
    matrix per clip in place of one of N x N. The query is constant over a frame, so phi multiplies the spatial mean of
    g.

    Args:
        channels: C of the maps.
        query_width: D of the query.
        share: initial scale of the query's contribution to the maps.

    Source:
        Zhou et al., Audio-Visual Segmentation, ECCV 2022, with the query's projection widened to codewords.
    """

    def __init__(self, channels: int, query_width: int, share: float = 0.0) -> None:
        super().__init__()
        inner = max(1, channels // 2)
        self.align = nn.Linear(query_width, channels)
        self.theta, self.phi = nn.Linear(channels, inner), nn.Linear(channels, inner)
        self.g, self.expand = nn.Linear(channels, inner), nn.Linear(inner, channels)
        self.batch_norm = nn.BatchNorm1d(channels)
        self.layer_norm = nn.LayerNorm(channels)
        nn.init.constant_(self.batch_norm.weight, share)

    def forward(self, maps: Tensor, query: Tensor) -> Tensor:
        """Maps (B, F, C, h, w) and query (B, F, D) to maps of the same shape."""
        batch, frames, channels, height, width = maps.shape
        x = maps.permute(0, 1, 3, 4, 2).flatten(2, 3)  # (B, F, h·w, C)
        phi = self.phi(self.align(query))  # (B, F, C/2)
        mixed = phi.transpose(1, 2) @ self.g(x).mean(2) / frames  # (B, C/2, C/2)
        y = self.expand(self.theta(x).flatten(1, 2) @ mixed)  # (B, F·h·w, C)
        y = self.batch_norm(y.transpose(1, 2)).transpose(1, 2)
        z = self.layer_norm(y.view_as(x) + x)
        return z.view(batch, frames, height, width, channels).permute(0, 1, 4, 2, 3)


class DilatedSum(nn.Module):
    """Sum of 3x3 convolutions of several dilations; `deviation` of their initial weights, None for torch's own."""

    def __init__(self, inputs: int, outputs: int, dilations: Sequence[int], deviation: float | None) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation) for dilation in dilations
        )
        if deviation is not None:
            for branch in self.branches:
                nn.init.normal_(branch.get_parameter("weight"), std=deviation)

    def forward(self, maps: Tensor) -> Tensor:
        """(N, inputs, h, w) to (N, outputs, h, w)."""
        return torch.stack([branch(maps) for branch in self.branches]).sum(0)


class ResidualUnit(nn.Module):
    """ReLU, convolution, ReLU, convolution, with a residual from the first ReLU, as released."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, maps: Tensor) -> Tensor:
        """(N, channels, h, w) to the same shape."""
        maps = F.relu(maps)
        return maps + self.second(F.relu(self.first(maps)))


class Fusion(nn.Module):
    """Adds a finer stage to the maps of the coarser ones, and enlarges the sum."""

    def __init__(self, channels: int, factor: int, *, first: bool) -> None:
        super().__init__()
        self.factor = factor
        self.lateral = None if first else ResidualUnit(channels)
        self.merge = ResidualUnit(channels)

    def forward(self, maps: Tensor, finer: Tensor | None = None) -> Tensor:
        """(N, channels, h, w) to (N, channels, factor h, factor w)."""
        if self.lateral is not None and finer is not None:
            maps = maps + self.lateral(finer)
        maps = self.merge(maps)
        if self.factor == 1:
            return maps
        return F.interpolate(maps, scale_factor=self.factor, mode="bilinear", align_corners=True)


class Segmenter(nn.Module):
    """One logit per pixel from frames and the codewords of a query.

    Args:
        backbone: "light" or a model of timm.
        channels: of the frames.
        frames: F, frames of a clip.
        query_steps: T, positions of a query.
        query_width: D, width of a codeword.
        settings: widths and dilations of the head.
    """

    query_center: Tensor
    query_scale: Tensor
    pixel_mean: Tensor
    pixel_deviation: Tensor

    def __init__(
        self,
        backbone: str,
        *,
        channels: int,
        frames: int,
        query_steps: int,
        query_width: int,
        settings: PyramidSettings,
    ) -> None:
        super().__init__()
        self.description: dict[str, Any] = {
            "backbone": backbone,
            "channels": channels,
            "frames": frames,
            "query_steps": query_steps,
            "query_width": query_width,
        }
        self.backbone = make_pyramid(backbone, channels)
        strides, width = self.backbone.strides, settings.width
        self.reduce = nn.ModuleList(
            DilatedSum(inputs, width, settings.dilations, settings.dilated_deviation) for inputs in self.backbone.widths
        )
        self.blocks = nn.ModuleList(QueryBlock(width, query_width, settings.query_share) for _ in strides)
        # The finest stage is enlarged before and within the last convolutions, twice at most each.
        before = 2 if strides[0] > 1 else 1
        factors = [before, *(coarse // fine for fine, coarse in zip(strides, strides[1:], strict=False))]
        self.fuse = nn.ModuleList(
            Fusion(width, factor, first=stage == len(strides) - 1) for stage, factor in enumerate(factors)
        )
        self.narrow = nn.Conv2d(width, width // 2, 3, padding=1)
        self.enlarge = strides[0] // before
        self.to_mask = nn.Sequential(
            nn.Conv2d(width // 2, max(width // 8, 4), 3, padding=1), nn.ReLU(), nn.Conv2d(max(width // 8, 4), 1, 1)
        )
        self.time = nn.Linear(query_steps, frames)
        # Each frame starts with the mean of the query.
        nn.init.constant_(self.time.weight, 1 / query_steps)
        nn.init.zeros_(self.time.bias)
        self.register_buffer("query_center", torch.zeros(query_width))
        self.register_buffer("query_scale", torch.ones(()))
        mean, deviation = (
            (IMAGENET_MEAN, IMAGENET_DEVIATION) if channels == 3 else ((0.5,) * channels, (0.25,) * channels)
        )
        self.register_buffer("pixel_mean", torch.tensor(mean))
        self.register_buffer("pixel_deviation", torch.tensor(deviation))

    def forward(self, frames: Tensor, query: Tensor) -> Tensor:
        """Frames (B, F, H, W, channels) uint8 and query (B, T, D) to logits (B, F, H, W).

        Raises:
            ValueError: sides are no multiple of the coarsest stage's stride.
        """
        batch, count, height, width, _ = frames.shape
        if height % self.backbone.multiple or width % self.backbone.multiple:
            raise ValueError(
                f"frames must have sides that are multiples of {self.backbone.multiple}, got {height} x {width}"
            )
        pictures = (frames.flatten(0, 1) / 255 - self.pixel_mean) / self.pixel_deviation
        codes = (query - self.query_center) / self.query_scale
        timed = self.time(codes.transpose(1, 2)).transpose(1, 2)  # (B, F, D)
        maps = []
        for reduce, block, stage in zip(
            self.reduce, self.blocks, self.backbone(pictures.permute(0, 3, 1, 2)), strict=True
        ):
            maps.append(block(reduce(stage).unflatten(0, (batch, count)), timed).flatten(0, 1))
        merged: Tensor | None = None
        for fuse, stage in zip(reversed(self.fuse), reversed(maps), strict=True):
            merged = fuse(stage) if merged is None else fuse(merged, stage)
        narrow = self.narrow(merged)
        if self.enlarge > 1:
            narrow = F.interpolate(narrow, scale_factor=self.enlarge, mode="bilinear", align_corners=False)
        return self.to_mask(narrow).view(batch, count, height, width)


def save_segmenter(segmenter: Segmenter, path: Path, described: dict[str, Any]) -> None:
    """Writes all parameters and buffers, the time projection among them, as one safetensors file with a checksum.

    Args:
        segmenter: trained.
        path: a new file, which appears whole or not at all.
        described: other plain values in the file, such as the modality of its queries.

    Raises:
        FileExistsError: the file exists.
    """
    if path.exists():
        raise FileExistsError(f"segmenter file must not exist yet, got {str(path)!r}")
    content = {"format": FORMAT, "segmenter": segmenter.description, **described}
    write_tensors(path, segmenter.state_dict(), content)


def load_segmenter(path: Path, settings: PyramidSettings, expected: Mapping[str, Any]) -> Segmenter:
    """A segmenter that `save_segmenter` wrote, in evaluation mode on the CPU.

    Args:
        path: the file.
        settings: of its backbone.
        expected: values that the file must hold: the segmenter's description, and the other values in the file.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is no file of a segmenter, or is damaged.
        ValueError: it has other values than `expected`.
    """
    where = f"segmenter file {str(path)!r} is damaged or of other sizes:"
    try:
        content, tensors = read_tensors(path)
    except BadFile as error:
        raise CheckpointError(f"{where} {error}") from error
    if type(content) is not dict or content.get("format") != FORMAT or type(content.get("segmenter")) is not dict:
        raise CheckpointError(f"segmenter file must have format {FORMAT!r}, {str(path)!r} has another")
    described = content["segmenter"]
    # Compared before the build, so that a file cannot choose sizes or backbone.
    found = {**content, **described}
    for name, value in expected.items():
        if type(found.get(name)) is not type(value) or found[name] != value:
            raise ValueError(f"{name} of the segmenter in {str(path)!r} must be {value!r}, got {found.get(name)!r:.60}")
    if not {*described} <= {*expected}:
        raise CheckpointError(f"{where} it has the description {few([*described])}")
    try:
        segmenter = Segmenter(**described, settings=settings)
        check_state(segmenter, tensors)
    except (BadFile, TypeError) as error:
        raise CheckpointError(f"{where} it {error}") from error
    segmenter.load_state_dict(tensors)
    return segmenter.eval().requires_grad_(False)
