"""The transformer layer of the temporal module."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unicode_fast.modules import host
from unicode_fast.modules.linear import linear


def dropout(values: Tensor, probability: float) -> Tensor:
    """`F.dropout` in training; on a CPU with four draws from one random number of 64 bits.

    torch draws one number of 64 bits for each element, on one thread.

    Args:
        values: any shape, floating point.
        probability: of a zero, rounded to a multiple of 2^-16 on a CPU.
    """
    if not host.is_on_host(values) or probability in (0, 1) or torch.compiler.is_compiling():
        return F.dropout(values, probability)
    count = values.numel()
    numbers = torch.empty((count + 3) // 4, dtype=torch.int64, device=values.device).random_(-(2**63), None)
    draws = numbers.view(torch.int16)[:count].view(values.shape)  # uniform from -2^15 to 2^15 - 1
    kept = draws >= round(probability * 2**16) - 2**15
    return values * kept.to(values.dtype).mul_(1 / (1 - probability))


class TransformerLayer(nn.TransformerEncoderLayer):
    """`nn.TransformerEncoderLayer`, post-norm with ReLU and the batch first, with `linear` and `dropout`."""

    def forward(self, sequence: Tensor, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """(B, T, D) and a (B, T) mask to (B, T, D)."""
        sequence = self.norm1(sequence + self._drop(self._attend(sequence, valid)))
        hidden = self._drop(F.relu(linear(sequence, self.linear1.weight, self.linear1.bias)))
        return self.norm2(sequence + self._drop(linear(hidden, self.linear2.weight, self.linear2.bias)))

    def _attend(self, sequence: Tensor, valid: Tensor | None) -> Tensor:
        attention = self.self_attn
        projected = linear(sequence, attention.in_proj_weight, attention.in_proj_bias)
        query, key, value = projected.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None if valid is None else valid[:, None, None]
        probability = self.dropout.p if self.training else 0.0
        if probability and host.is_on_host(sequence):
            # torch's attention has the slow draws of F.dropout.
            scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5  # (B, heads, T, T)
            scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
            read = dropout(scores.softmax(-1), probability) @ value
        else:
            read = F.scaled_dot_product_attention(query, key, value, mask, probability)
        return linear(read.transpose(1, 2).flatten(2), attention.out_proj.weight, attention.out_proj.bias)

    def _drop(self, values: Tensor) -> Tensor:
        return dropout(values, self.dropout.p) if self.training else values
