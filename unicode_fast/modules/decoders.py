"""Decoders: from a codeword and specific features back to the input."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unicode_fast.config import Modality, ModelConfig
from unicode_fast.modules.encoders import ResidualBlock
from unicode_fast.modules.linear import Linear, linear


class VectorDecoder(nn.Module):
    """One linear layer over the projected codeword and the specific features.

    Args:
        specific_width: of the specific features.
        output_width: of the reconstruction.
        width: D.
    """

    def __init__(self, specific_width: int, output_width: int, width: int) -> None:
        super().__init__()
        self.code = Linear(width, width)
        self.output = Linear(width + specific_width, output_width)

    def forward(self, codeword: Tensor, specific: Tensor) -> Tensor:
        """(B, T, D) and (B, T, S) to (B, T, output_width)."""
        return self.output(torch.cat([self.code(codeword), specific], -1))


class GridDecoder(nn.Module):
    """Transposed convolutions over the specific map with the codeword in each of its cells.

    Args:
        channels: of the reconstructed grid.
        config: `width`, `grid_hidden_width`, `grid_specific_width` and `residual_skip` are read.
    """

    def __init__(self, channels: int, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.grid_hidden_width
        self.code = Linear(config.width, config.width)
        self.convolutions = nn.Sequential(
            nn.ConvTranspose2d(config.width + config.grid_specific_width, hidden, 3),
            ResidualBlock(hidden, config.residual_skip),
            nn.ConvTranspose2d(hidden, channels, 3),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(channels, channels, 1),
        )

    def forward(self, codeword: Tensor, specific: Tensor) -> Tensor:
        """(B, T, D) and the map (B, T, h, w, S) to (B, T, h+4, w+4, C)."""
        code = self.code(codeword).flatten(0, 1)
        first, rest = cast(nn.ConvTranspose2d, self.convolutions[0]), self.convolutions[1:]
        of_code, of_map = first.weight.split([code.shape[1], specific.shape[-1]])
        # All cells have the same codeword, so its convolution is a product with the weights summed at each cell.
        places = torch.eye(9, dtype=code.dtype, device=code.device).view(1, 9, 3, 3)
        reached = F.conv_transpose2d(code.new_ones(1, 1, *specific.shape[2:4]), places).view(9, -1)  # (9, cells)
        summed = reached.to(of_code.dtype).T @ of_code.flatten(2).permute(2, 1, 0).flatten(1)  # (cells, hidden·D)
        from_code = linear(code, summed.view(-1, code.shape[1]))  # (B·T, cells·hidden)
        from_map = F.conv_transpose2d(specific.flatten(0, 1).permute(0, 3, 1, 2), of_map, first.bias)
        maps = rest(from_map.add_(from_code.view_as(from_map.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)))
        return maps.permute(0, 2, 3, 1).unflatten(0, specific.shape[:2])


def make_decoder(modality: Modality, config: ModelConfig, *, word_target: str) -> nn.Module:
    """The decoder of a modality; words are reconstructed as LSTM output or as input vectors (`word_target`)."""
    if modality.kind == "grid":
        return GridDecoder(modality.shape[-1], config)
    output = config.word_width if modality.kind == "words" and word_target == "lstm" else modality.shape[-1]
    return VectorDecoder(config.vector_specific_width, output, config.width)
