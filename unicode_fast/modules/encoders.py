"""Encoders: word LSTM, semantic and specific encoders, temporal relation module."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unicode_fast.config import Modality, ModelConfig
from unicode_fast.modules.linear import Linear
from unicode_fast.modules.transformer import TransformerLayer


class WordEncoder(nn.Module):
    """Two-layer bidirectional LSTM over word vectors.

    The backward direction starts at the last valid word of each clip, so padding has no effect. Without a mask it
    starts at the last position.

    Args:
        input_width: width of a word vector.
        output_width: width of both directions together; even.
        layers: LSTM layers of each direction, at least 1.
    """

    def __init__(self, input_width: int, output_width: int, layers: int = 2) -> None:
        super().__init__()
        if output_width % 2:
            raise ValueError(f"word_width must be even, got {output_width}")
        widths = [input_width] + [output_width] * (layers - 1)
        self.forward_layers = nn.ModuleList(nn.LSTM(width, output_width // 2, batch_first=True) for width in widths)
        self.backward_layers = nn.ModuleList(nn.LSTM(width, output_width // 2, batch_first=True) for width in widths)

    def forward(self, words: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, E) words and a (B, T) mask to (B, T, output_width)."""
        positions = torch.arange(words.shape[1], device=words.device)
        if mask is None:
            reverse = positions.flip(0).expand(words.shape[:2])
        else:
            last = mask.sum(1, keepdim=True) - 1  # (B, 1)
            reverse = torch.where(positions <= last, last - positions, positions)
        output = words
        for ahead, back in zip(self.forward_layers, self.backward_layers, strict=True):
            backward = _reorder(back(_reorder(output, reverse))[0], reverse)
            output = torch.cat([ahead(output)[0], backward], -1)
        return output


def _reorder(sequence: Tensor, order: Tensor) -> Tensor:
    return sequence.gather(1, order.unsqueeze(-1).expand(-1, -1, sequence.shape[-1]))


class VectorSpecificEncoder(nn.Sequential):
    """Linear and ReLU: the modality-specific features of vectors and words."""

    def __init__(self, input_width: int, output_width: int) -> None:
        super().__init__(Linear(input_width, output_width), nn.ReLU())


class ResidualBlock(nn.Module):
    """ReLU, 3x3 convolution, ReLU, 1x1 convolution, added to a skip; then ReLU.

    The released block rectifies in place, so its skip is relu(x): `skip="relu"`.
    With `skip="input"` it is x.
    """

    def __init__(self, channels: int, skip: str) -> None:
        super().__init__()
        self.skip = skip
        self.wide = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.narrow = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """(B·T, channels, h, w) to the same shape."""
        active = F.relu(maps)
        added = self.narrow(F.relu_(self.wide(active)))
        return F.relu_(added.add_(active if self.skip == "relu" else maps))


class GridSpecificEncoder(nn.Module):
    """Convolutions over a grid: a specific map, and a vector of it for CLUB.

    Args:
        channels: of the input grid.
        config: `grid_hidden_width`, `grid_specific_width`, `grid_club_width` and `residual_skip` are read.
    """

    def __init__(self, channels: int, config: ModelConfig) -> None:
        super().__init__()
        hidden, width = config.grid_hidden_width, config.grid_specific_width
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, hidden, 3),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, width, 3),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 1),
            ResidualBlock(width, config.residual_skip),
        )
        club = config.grid_club_width
        self.club_head = nn.Sequential(Linear(width, 2 * club), nn.ReLU(), Linear(2 * club, club))

    def forward(self, grids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, H, W, C) to the map (B, T, H-4, W-4, S) and the CLUB vector (B, T, Y)."""
        maps = grids.flatten(0, 1).permute(0, 3, 1, 2)
        if self._weights_outweigh(maps):
            maps = maps.contiguous()
        maps = self.convolutions(maps)
        vectors = self.club_head(maps.mean((2, 3)))
        return maps.permute(0, 2, 3, 1).unflatten(0, grids.shape[:2]), vectors.unflatten(0, grids.shape[:2])

    def _weights_outweigh(self, maps: Tensor) -> bool:
        """Whether a CPU would copy more weights to the layout of the maps than it would copy elements of the maps.

        A grid has its channels last. A convolution then copies weights and their gradient to channels last, unless they
        are so already. With four clips of the published sizes these copies took nearly half of a step.
        """
        weights = [weight for weight in self.convolutions.parameters() if weight.dim() == 4]
        by_channel = not weights[0].is_contiguous(memory_format=torch.channels_last)
        return maps.device.type == "cpu" and by_channel and sum(map(Tensor.numel, weights)) > maps.numel()


class GridSemanticEncoder(nn.Module):
    """Channel re-weighting of a grid, then pooling of its cells into one vector.

    The released attention normalises over an axis of size one, so it is a sum;
    `grid_pooling` chooses sum, attention or flatten.

    Args:
        shape: (H, W, C) of the grid.
        config: `squeeze_width`, `grid_pooling`, `grid_semantic_width` and `width` are read.
    """

    def __init__(self, shape: tuple[int, ...], config: ModelConfig) -> None:
        super().__init__()
        height, width, channels = shape
        self.pooling = config.grid_pooling
        self.squeeze = Linear(channels, config.squeeze_width, bias=False)
        self.excite = Linear(config.squeeze_width, channels, bias=False)
        self.output_width = channels
        if self.pooling == "attention":
            self.query = Linear(channels, config.width)
            self.key = Linear(channels, config.width)
            self.score = Linear(config.width, 1)
        elif self.pooling == "flatten":
            self.output_width = config.grid_semantic_width
            self.read = Linear(height * width * channels, self.output_width)

    def reweighted(self, grids: Tensor) -> Tensor:
        """Grids with re-weighted channels, in their shape."""
        scale = torch.sigmoid(self.excite(F.relu(self.squeeze(grids.mean((2, 3))))))
        return grids * (1 + scale)[:, :, None, None]

    def forward(self, grids: Tensor) -> Tensor:
        """(B, T, H, W, C) to (B, T, output_width)."""
        weighted = self.reweighted(grids)
        if self.pooling == "sum":
            return weighted.sum((2, 3))
        if self.pooling == "flatten":
            return F.relu(self.read(weighted.flatten(2)))
        cells = weighted.flatten(2, 3)  # (B, T, H·W, C)
        query = F.relu(self.query(cells.mean(2, keepdim=True)))
        weights = torch.tanh(self.score(query * F.relu(self.key(cells)))).softmax(2)
        return (weights * cells).sum(2)


class TemporalRelation(nn.Module):
    """Linear layer to the shared width, then transformer layers over the positions of a clip.

    Post-norm, no positional encoding, no final norm (paper section 3.2), so the
    result has the scale of a layer norm.

    Args:
        input_width: of the modality's semantic input.
        config: `width`, `temporal_layers`, `temporal_heads`, `feedforward_width`, `dropout`, `equal_layers` are read.
    """

    def __init__(self, input_width: int, config: ModelConfig) -> None:
        super().__init__()
        if config.width % config.temporal_heads:
            raise ValueError(
                f"width must be a multiple of temporal_heads ({config.temporal_heads}), got {config.width}"
            )
        self.affine = Linear(input_width, config.width)
        layers = [
            TransformerLayer(config.width, config.temporal_heads, config.feedforward_width, config.dropout)
            for _ in range(1 if config.equal_layers else config.temporal_layers)
        ]
        if config.equal_layers:
            layers = [copy.deepcopy(layers[0]) for _ in range(config.temporal_layers)]
        self.layers = nn.ModuleList(layers)

    def forward(self, sequence: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, input_width) and a (B, T) mask to (B, T, D)."""
        output = self.affine(sequence)
        padding = None if mask is None else ~mask
        for layer in self.layers:
            output = layer(output, src_key_padding_mask=padding)
        return output


class ModalityEncoder(nn.Module):
    """All encoders of one modality: words, semantic, specific.

    Args:
        modality: kind and shape.
        config: sizes.
    """

    def __init__(self, modality: Modality, config: ModelConfig) -> None:
        super().__init__()
        self.kind = modality.kind
        width = modality.shape[-1]
        self.specific: nn.Module
        if self.kind == "grid":
            self.semantic = GridSemanticEncoder(modality.shape, config)
            self.specific = GridSpecificEncoder(width, config)
            width = self.semantic.output_width
        else:
            if self.kind == "words":
                self.words = WordEncoder(width, config.word_width)
                width = config.word_width
            self.specific = VectorSpecificEncoder(width, config.vector_specific_width)
        self.temporal = TemporalRelation(width, config)

    def read_words(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Input of both branches: LSTM output for words, else the features unchanged."""
        return self.words(features, mask) if self.kind == "words" else features

    def encode_semantic(self, read: Tensor, mask: Tensor | None = None) -> Tensor:
        """Z, (B, T, D), from the output of `read_words`."""
        return self.temporal(self.semantic(read) if self.kind == "grid" else read, mask)

    def encode_specific(self, read: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Specific features for the decoder, and their form for CLUB, (B, T, Y).

        Args:
            read: output of `read_words`.
            mask: (B, T) bool, for encoders that use moments of a batch; these features are of single positions.
        """
        if self.kind == "grid":
            maps, vectors = self.specific(read)
            return maps, vectors
        specific = self.specific(read)
        return specific, specific
