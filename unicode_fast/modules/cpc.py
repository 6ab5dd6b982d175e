"""Cross-CPC: each modality's past predicts the near future of every modality."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unicode_fast.config import MethodConfig, ModelConfig, TrainConfig
from unicode_fast.modules import host
from unicode_fast.modules.linear import Linear
from unicode_fast.modules.precision import autocast_context
from unicode_fast.ops import cross_info_nce


class Contrast(NamedTuple):
    """Results of Cross-CPC for a batch.

    loss (): weighted loss of all pairs; recognised (target, source): share of clips whose prediction scores highest
    with their own target, over all prediction steps.
    """

    loss: Tensor
    recognised: Tensor


class CrossCPC(nn.Module):
    """LSTM contexts and predictors per modality; Eq. 6.

    A clip that is too short for the drawn context is left out. If all clips of a
    batch are too short, or T differs between modalities, the loss contrasts the
    clips' means over time instead. A clip that lacks a modality is neither a
    positive nor a negative of its pairs.

    Args:
        names: the modalities.
        config: `width`, `cpc_layers`, `cpc_bias` and `cpc_steps` are read.
        method: the other `cpc_` fields are read.
        train: `precision` and `dtype` are read, for contexts and predictions; scores and losses keep the dtype of z.
    """

    def __init__(self, names: tuple[str, ...], config: ModelConfig, method: MethodConfig, train: TrainConfig) -> None:
        super().__init__()
        self.train_config = train
        width = config.width
        self.names = names
        self.steps = config.cpc_steps
        self.earliest = method.cpc_earliest
        self.softmax_over = method.cpc_softmax_over
        self.temperature = method.cpc_temperature * (math.sqrt(width) if method.cpc_scale == "sqrt_width" else 1)
        self.weights = (method.cpc_weight, method.cpc_weight * method.cpc_self_weight)
        self.context = nn.ModuleDict(
            {name: nn.LSTM(width, width, config.cpc_layers, batch_first=True) for name in names}
        )
        self.predictors = nn.ModuleDict(
            {
                name: nn.ModuleList(Linear(width, width, bias=config.cpc_bias) for _ in range(config.cpc_steps))
                for name in names
            }
        )

    def predicts_steps(self, semantic: Mapping[str, Tensor]) -> bool:
        """Whether T is equal in all modalities and long enough for a context and its prediction steps."""
        lengths = {z.shape[1] for z in semantic.values()}
        return len(lengths) == 1 and lengths.pop() >= self.earliest + 1 + self.steps

    def forward(
        self,
        semantic: Mapping[str, Tensor],
        mask: Mapping[str, Tensor] | None,
        position: Tensor,
        rows: slice = slice(None),
    ) -> Contrast:
        """The weighted contrastive loss of all pairs.

        Args:
            semantic: z by modality, (B, T, D).
            mask: (B, T) bool by modality, or None.
            position: float scalar in [0, 1) that chooses the last position of the context.
            rows: clips whose share of the loss is computed, each contrasted with all.
        """
        if not self.predicts_steps(semantic):
            return self._contrast(*self._means(semantic, mask), rows)
        if mask is None:
            return self._contrast(*self._predictions(semantic, None, position), rows)
        longest = self._common_lengths(mask).amax()
        enough = longest >= self.earliest + 1 + self.steps
        if host.is_on_host(enough) and not enough:
            return self._contrast(*self._means(semantic, mask), rows)
        predicted = self._contrast(*self._predictions(semantic, mask, position, longest), rows)
        if host.is_on_host(enough):
            return predicted
        means = self._contrast(*self._means(semantic, mask), rows)
        return Contrast(*(torch.where(enough, a, b) for a, b in zip(predicted, means, strict=True)))

    def _contrast(self, targets: Tensor, predictions: Tensor, valid: Tensor | None, rows: slice) -> Contrast:
        cross, within = self.weights
        size = (len(self.names), len(self.names))
        weights = torch.full(size, cross, dtype=targets.dtype, device=targets.device).fill_diagonal_(within)
        result = cross_info_nce(
            targets,
            predictions,
            weights,
            valid=valid,
            softmax_over=self.softmax_over,
            temperature=self.temperature,
            rows=rows,
        )
        clips = targets.new_ones(targets.shape[:3]) if valid is None else valid.to(targets.dtype)
        number = torch.einsum("tkb,skb->ts", clips, clips)
        return Contrast(result.loss, result.hits.sum(-1) / number.clamp(min=1))

    def _lengths(self, mask: Mapping[str, Tensor]) -> Tensor:
        """Number of valid positions of each clip, (modalities, B)."""
        return torch.stack([mask[name].sum(1) for name in self.names])

    def _common_lengths(self, mask: Mapping[str, Tensor]) -> Tensor:
        """Number of positions that all modalities of a clip have, (B,); 0 for a clip with fewer than two of them."""
        lengths = self._lengths(mask)
        there = lengths > 0
        longest = next(iter(mask.values())).shape[1]
        return torch.where(there, lengths, longest).amin(0) * (there.sum(0) > 1)

    def _predictions(
        self,
        semantic: Mapping[str, Tensor],
        mask: Mapping[str, Tensor] | None,
        position: Tensor,
        longest: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        z = torch.stack([semantic[name] for name in self.names])  # (modalities, B, T, D)
        ahead = torch.arange(1, self.steps + 1, device=z.device)
        if longest is None:
            longest = torch.full((), z.shape[2], device=z.device)
        choices = (longest - self.steps - self.earliest).clamp(min=1)
        last = self.earliest + (position * choices).long()
        targets = z.index_select(2, last + ahead).transpose(1, 2)  # (modalities, K, B, D)
        predictions = []
        with autocast_context(self.train_config, z.device):
            for name in self.names:
                # Later positions have no effect; on a GPU, cutting them off would need a synchronisation.
                read = semantic[name][:, : int(last) + 1] if host.is_on_host(last) else semantic[name]
                context = self.context[name](read)[0].index_select(1, last.view(1))[:, 0]  # (B, D)
                predictions.append(torch.stack([predict(context) for predict in self._predictors(name)]))
        valid = None if mask is None else (last + ahead)[None, :, None] < self._lengths(mask)[:, None]
        return targets, torch.stack(predictions).to(z.dtype), valid

    def _means(
        self, semantic: Mapping[str, Tensor], mask: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        means = [clip_mean(semantic[name], None if mask is None else mask[name]) for name in self.names]
        predictions = [self._predictors(name)[0](mean) for name, mean in zip(self.names, means, strict=True)]
        valid = None if mask is None else torch.stack([mask[name].any(1) for name in self.names]).unsqueeze(1)
        if valid is not None and host.is_on_host(valid) and valid.all():
            valid = None
        return torch.stack(means).unsqueeze(1), torch.stack(predictions).unsqueeze(1), valid

    def _predictors(self, name: str) -> nn.ModuleList:
        return cast(nn.ModuleList, self.predictors[name])


def clip_mean(sequence: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the valid positions: (B, T, D) and (B, T) to (B, D); 0 for a clip without one."""
    if mask is None:
        return sequence.mean(1)
    weight = mask.unsqueeze(-1).to(sequence.dtype)
    return (sequence * weight).sum(1) / weight.sum(1).clamp(min=1)


def at_positions(sequence: Tensor, mask: Tensor | None, positions: int) -> Tensor:
    """Features at each position of another modality; the mean of the clip where they have none.

    Args:
        sequence: (B, T, D).
        mask: (B, T) bool, or None where every position is valid.
        positions: number of positions of the other modality.

    Returns:
        (B, positions, D). With T positions the valid features stay, and the mean stands for padding. With another
        number every position has the mean.
    """
    if sequence.shape[1] == positions and mask is None:
        return sequence
    mean = clip_mean(sequence, mask).unsqueeze(1)
    if sequence.shape[1] != positions or mask is None:
        return mean.expand(-1, positions, -1)
    return torch.where(mask.unsqueeze(-1), sequence, mean)


def clip_directions(features: Mapping[str, Tensor], mask: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Means over valid positions, of length 1: (B, T, D) by modality to (B, D)."""
    masks = mask or dict.fromkeys(features)
    return {name: F.normalize(clip_mean(z, masks[name]), dim=-1) for name, z in features.items()}
