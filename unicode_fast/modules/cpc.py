"""Cross-CPC: each modality's past predicts the near future of every modality."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from unicode_fast.config import ModelConfig
from unicode_fast.ops import CrossInfoNCE, cross_info_nce


class CrossCPC(nn.Module):
    """LSTM contexts and predictors per modality; Eq. 6.

    Clips of one step, clips shorter than the prediction needs, and modalities
    of different lengths are contrasted by their means over time instead.

    Args:
        names: the modalities.
        config: `width`, `cpc_layers`, `cpc_bias` and `cpc_steps` are read.
    """

    def __init__(self, names: tuple[str, ...], config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.steps = config.cpc_steps
        self.context = nn.ModuleDict(
            {name: nn.LSTM(width, width, config.cpc_layers, batch_first=True) for name in names}
        )
        self.predictors = nn.ModuleDict(
            {
                name: nn.ModuleList(nn.Linear(width, width, bias=config.cpc_bias) for _ in range(config.cpc_steps))
                for name in names
            }
        )

    def predicts_steps(self, semantic: Mapping[str, Tensor], earliest: int) -> bool:
        """Whether the clips are long enough, and equally long, to predict steps rather than contrast means."""
        lengths = {z.shape[1] for z in semantic.values()}
        return len(lengths) == 1 and lengths.pop() >= earliest + 1 + self.steps

    def forward(
        self,
        semantic: Mapping[str, Tensor],
        mask: Mapping[str, Tensor] | None,
        pair_weights: Tensor,
        *,
        position: Tensor,
        earliest: int,
        softmax_over: str,
        temperature: float,
    ) -> CrossInfoNCE:
        """The weighted contrastive loss of all pairs.

        Args:
            semantic: z by modality, (B, T, D).
            mask: (B, T) bool by modality, or None.
            pair_weights: (target modality, source modality).
            position: float scalar in [0, 1) that chooses the last step of the context.
            earliest: smallest 0-based step that may be chosen.
            softmax_over: as in `cross_info_nce`.
            temperature: divides the scores.
        """
        if self.predicts_steps(semantic, earliest):
            targets, predictions, valid = self._steps(semantic, mask, position, earliest)
        else:
            targets, predictions, valid = self._means(semantic, mask)
        return cross_info_nce(
            targets, predictions, pair_weights, valid=valid, softmax_over=softmax_over, temperature=temperature
        )

    def _steps(
        self, semantic: Mapping[str, Tensor], mask: Mapping[str, Tensor] | None, position: Tensor, earliest: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        z = torch.stack([semantic[name] for name in self.context])  # (modalities, B, T, D)
        ahead = torch.arange(1, self.steps + 1, device=z.device)
        if mask is None:
            longest = torch.full((), z.shape[2], device=z.device)
        else:
            lengths = torch.stack([mask[name].sum(1) for name in self.context])  # (modalities, B)
            longest = lengths.amin(0).amax()
        choices = (longest - self.steps - earliest).clamp(min=1)
        last = earliest + (position * choices).long().clamp(max=z.shape[2] - 1 - self.steps - earliest)
        targets = z.index_select(2, last + ahead).transpose(1, 2)  # (modalities, K, B, D)
        predictions = torch.stack(
            [
                torch.stack([predict(context[:, 0]) for predict in self.predictors[name]])  # type: ignore[union-attr]
                for name, context in (
                    (name, self.context[name](semantic[name])[0].index_select(1, last.view(1))) for name in self.context
                )
            ]
        )
        valid = None if mask is None else (last + ahead)[None, :, None] < lengths[:, None]
        return targets, predictions, valid

    def _means(
        self, semantic: Mapping[str, Tensor], mask: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, Tensor, None]:
        means = [clip_mean(semantic[name], None if mask is None else mask[name]) for name in self.context]
        predictions = [
            self.predictors[name][0](mean)  # type: ignore[index]
            for name, mean in zip(self.context, means, strict=True)
        ]
        return torch.stack(means).unsqueeze(1), torch.stack(predictions).unsqueeze(1), None


def clip_mean(sequence: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the valid steps: (B, T, D) and (B, T) to (B, D)."""
    if mask is None:
        return sequence.mean(1)
    weight = mask.unsqueeze(-1).to(sequence.dtype)
    return (sequence * weight).sum(1) / weight.sum(1).clamp(min=1)
