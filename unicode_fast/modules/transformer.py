"""Transformer layer and dropout, with the package's operators for short sequences on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unicode_fast.modules import host
from unicode_fast.modules.linear import linear

# Positions of a clip up to which attention has an operator, which keeps a head in the processor's caches.
LONGEST = 64


def _dropped(values: Tensor, p: float) -> Tensor:
    """Values after dropout, whose numbers are drawn in the order of the dimensions."""
    return values * torch.ops.unicode_fast_layers.dropout_factors(values.detach(), p)


class Dropout(nn.Dropout):
    """`nn.Dropout`; on a CPU the package draws its numbers. They are those that torch draws."""

    def forward(self, values: Tensor) -> Tensor:
        """Values of any shape to the same shape."""
        return _dropped(values, self.p) if self.draws_for(values) else super().forward(values)

    def draws_for(self, values: Tensor) -> bool:
        """Whether the package's operator draws the numbers."""
        return self.training and 0 < self.p < 1 and values.is_contiguous() and host.has_operators(values)


class TransformerLayer(nn.TransformerEncoderLayer):
    """`nn.TransformerEncoderLayer` with `linear` and `Dropout`, and with one operator for attention on a CPU.

    Padding masks are bool.

    Args:
        width, heads, feedforward_width, dropout: as in torch.
    """

    dropout: Dropout
    dropout1: Dropout
    dropout2: Dropout

    def __init__(self, width: int, heads: int, feedforward_width: int, dropout: float) -> None:
        super().__init__(width, heads, feedforward_width, dropout, batch_first=True)
        # After the first layer, attention and the second layer.
        self.dropout, self.dropout1, self.dropout2 = Dropout(dropout), Dropout(dropout), Dropout(dropout)

    def _sa_block(self, x: Tensor, attn_mask: Any, key_padding_mask: Tensor | None, is_causal: bool = False) -> Tensor:
        layer = self.self_attn
        short = x.dim() == 3 and x.shape[1] <= LONGEST
        if attn_mask is not None or is_causal or layer.dropout == 1 or not (short and host.has_operators(x)):
            return super()._sa_block(x, attn_mask, key_padding_mask, is_causal)
        vectors = linear(x, layer.in_proj_weight, layer.in_proj_bias)
        dropout = layer.dropout if layer.training else 0.0
        # torch has turned the mask into 0 for valid keys and -infinity for the others.
        valid = None if key_padding_mask is None else key_padding_mask == 0
        mixed = torch.ops.unicode_fast_layers.attention(vectors, valid, layer.num_heads, dropout)
        attended = linear(mixed, layer.out_proj.weight, layer.out_proj.bias)
        # torch's attention returns a view of (T, B, D), in whose order its dropout draws.
        if not self.dropout1.draws_for(attended):
            return self.dropout1(attended)
        return _dropped(attended.transpose(0, 1), self.dropout1.p).transpose(0, 1)

    def _ff_block(self, x: Tensor) -> Tensor:
        hidden = linear(x, self.linear1.weight, self.linear1.bias)
        if self.dropout.draws_for(hidden):
            hidden = torch.ops.unicode_fast_layers.relu_dropout(hidden, self.dropout.p)
        else:
            hidden = self.dropout(F.relu(hidden))
        return self.dropout2(linear(hidden, self.linear2.weight, self.linear2.bias))
