"""S-MiT: a contrastive loss of pooled features with an adaptive mean margin.

Clips i and j of two modalities have similarity S_ij. The positive loses a margin that grows with its lead over the mean
negative:

    M_i = alpha (S_ii - mean_{j != i} S_ij)
    L   = -mean_i log exp(S_ii - M_i) / (exp(S_ii - M_i) + sum_{j != i} exp(S_ij))

in both directions, added. The margin is part of the graph, so the positive logit is (1 - alpha) S_ii + alpha mean S_ij.
At alpha 1 the loss has no gradient in S_ii from the positive, at alpha 0 it is InfoNCE.

Source:
    Monfort et al., "Spoken Moments: Learning Joint Audio-Visual Representations from Video Descriptions", CVPR 2021,
    Eq. 2 and 3, alpha 0.5. Our version: S is the cosine of mean semantic features over valid positions, divided by
    `align_temperature`; theirs is the dot product of a 4096-wide head. Pairs of modalities are averaged. The softmax
    over columns has the margin of its columns; the public code takes that of the rows, `smit_margin` "shared".
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from unicode_fast.methods.recipe import Recipe, compared
from unicode_fast.modules.alignment import Alignment, Draw
from unicode_fast.modules.cpc import clip_directions
from unicode_fast.modules.model import ModelOutput, UniCode


class AdaptiveMeanMargin(Alignment):
    """The loss of S-MiT over all pairs of modalities."""

    def batch_terms(self, model: UniCode, output: ModelOutput, draw: Draw) -> dict[str, Tensor]:
        """The term "s-mit"."""
        method = self.config.method
        pooled = clip_directions(output.semantic, output.mask)
        shared = method.smit_margin == "shared"
        terms = [
            adaptive_mean_margin(pooled[one] @ pooled[other].T / method.align_temperature, method.smit_alpha, shared)
            for one, other in combinations(self.names, 2)
        ]
        return {"s-mit": method.align_weight * torch.stack(terms).mean()}


def adaptive_mean_margin(similarity: Tensor, alpha: float, shared: bool = False) -> Tensor:
    """The loss of a matrix of similarities, (B, B), in both directions, added; (). One clip alone has the loss 0.

    Args:
        similarity: of clips in one modality, the rows, and in another one.
        alpha: of the margin.
        shared: the softmax over columns has the margin of the rows.
    """
    by_row = _with_margin(similarity, similarity, alpha)
    by_column = _with_margin(similarity.T, similarity if shared else similarity.T, alpha)
    clips = torch.arange(len(similarity), device=similarity.device)
    return F.cross_entropy(by_row, clips) + F.cross_entropy(by_column, clips)


def _with_margin(similarity: Tensor, source: Tensor, alpha: float) -> Tensor:
    """The logits of a softmax over the second axis; `source` has the negatives of the margin in its rows."""
    positive = similarity.diagonal()
    mean = (source.sum(1) - positive) / max(1, len(source) - 1)
    return similarity - torch.diag(alpha * (positive - mean))


RECIPE: Recipe = compared("S-MiT", AdaptiveMeanMargin)
