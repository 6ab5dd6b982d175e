"""Transformer layer and dropout, with the package's operators for short sequences on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unicode_fast.modules import host
from unicode_fast.modules.linear import linear

# Positions of a clip up to which attention has an operator, which keeps a head in the processor's caches.
LONGEST = 64
_OPERATORS = torch.ops.unicode_fast_layers


class Dropout(nn.Dropout):
    """`nn.Dropout`; on a CPU the package draws its numbers. They are those that torch draws."""

    def forward(self, values: Tensor) -> Tensor:
        """Values of any shape to the same shape."""
        drawn = self.training and 0 < self.p < 1 and values.is_contiguous() and host.has_operators(values)
        return values * _OPERATORS.dropout_factors(values.detach(), self.p) if drawn else super().forward(values)


class TransformerLayer(nn.TransformerEncoderLayer):
    """`nn.TransformerEncoderLayer`; training on a CPU takes `linear` and the package's operators.

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

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """(B, T, width) to the same shape, as in torch."""
        masked = src_mask is not None or is_causal
        if masked or not self._has_operators(src, src_key_padding_mask):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        layer = self.self_attn
        vectors = linear(src, layer.in_proj_weight, layer.in_proj_bias)
        valid = None if src_key_padding_mask is None else ~src_key_padding_mask
        mixed = _OPERATORS.attention(vectors, valid, layer.num_heads, layer.dropout if self.training else 0.0)
        attended = linear(mixed, layer.out_proj.weight, layer.out_proj.bias)
        # torch's attention returns a view of (T, B, D), in whose order its dropout draws.
        factors = self._factors(attended.transpose(0, 1), self.dropout1)
        added = self._add_norm(src, attended, None if factors is None else factors.transpose(0, 1), self.norm1)
        hidden = linear(added, self.linear1.weight, self.linear1.bias)
        drawn = self.training and self.dropout.p > 0
        hidden = _OPERATORS.relu_dropout(hidden, self.dropout.p) if drawn else F.relu(hidden)
        output = linear(hidden, self.linear2.weight, self.linear2.bias)
        return self._add_norm(added, output, self._factors(output, self.dropout2), self.norm2)

    def _has_operators(self, src: Tensor, padding: Tensor | None) -> bool:
        """Whether the package's operators compute the layer. Without a gradient torch has one operator for it."""
        dropouts = (self.self_attn.dropout, self.dropout.p, self.dropout1.p, self.dropout2.p)
        return (
            (self.training or torch.is_grad_enabled())
            and src.dim() == 3
            and src.shape[1] <= LONGEST
            and (padding is None or padding.dtype == torch.bool)
            and max(dropouts) < 1
            and host.has_operators(src)
        )

    def _factors(self, values: Tensor, dropout: Dropout) -> Tensor | None:
        drawn = self.training and dropout.p > 0
        return _OPERATORS.dropout_factors(values.detach(), dropout.p) if drawn else None

    def _add_norm(self, first: Tensor, second: Tensor, factors: Tensor | None, norm: nn.LayerNorm) -> Tensor:
        """The norm of first + second * factors."""
        result: Tensor = _OPERATORS.add_norm(first, second, factors, norm.weight, norm.bias, norm.eps)
        return result
