"""When an event happens: C+1 columns a segment, background last."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from unicode_fast.tasks import metrics
from unicode_fast.tasks.probe import Clips, EncodedClips, ProbeHead, ProbeRule


class SegmentLoss(nn.Module):
    """Binary cross-entropy, mean over valid segments and columns."""

    def forward(self, logits: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
        """Logits and truth (clips, T, C+1), mask (clips, T)."""
        return binary_cross_entropy_with_logits(logits[mask], truth[mask].to(logits.dtype))


class OfficialSegmentLoss(SegmentLoss):
    """Binary cross-entropy plus the released code's ExpLog term.

    ExpLog = - mean over segments of sum_c y_c log softmax(x)_c exp(-alpha_c), with one alpha_c a column that starts at
    0.1 and is trained with the head.

    Args:
        columns: C+1.
        dtype: of the alphas.

    Source:
        The released AVVP training.
    """

    def __init__(self, columns: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((columns,), 0.1, dtype=dtype))

    def forward(self, logits: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
        """Logits and truth (clips, T, C+1), mask (clips, T)."""
        chosen = truth[mask].to(logits.dtype)  # (segments, C+1)
        exp_log = -(chosen * logits[mask].log_softmax(1) * torch.exp(-self.alpha)).sum(1).mean()
        return super().forward(logits, truth, mask) + exp_log


class Localisation:
    """Pooled micro-F1 over the C foreground classes at threshold 0.5, sound protocol."""

    name = "localisation"
    protocol = "sound"
    rule = ProbeRule(epochs=30, batch_size=200, learning_rate=4e-3, least_steps=300)

    def modalities(self, clips: Clips, names: Sequence[str]) -> list[str]:
        """Those with labels a segment; a sentence has no time axis."""
        return [name for name in names if name in clips.labels]

    def columns(self, clips: Clips) -> int:
        """C+1."""
        return len(clips.classes) + 1

    def truth(self, clips: Clips, name: str) -> Tensor:
        """(clips, T, C+1) bool."""
        return torch.from_numpy(np.asarray(clips.labels[name]) > 0)

    def output(self, head: ProbeHead, codes: EncodedClips) -> Tensor:
        """(clips, T, C+1)."""
        return head.of_steps(codes)

    def make_loss(self, columns: int, dtype: torch.dtype) -> nn.Module:
        """Binary cross-entropy, without parameters."""
        return SegmentLoss()

    def score(self, logits: Tensor, truth: Tensor, mask: Tensor) -> float:
        """Micro-F1 of probability > 0.5, background left out."""
        return metrics.micro_f1((logits[mask][:, :-1] > 0).numpy(), truth[mask][:, :-1].numpy())

    def chance(self, clips: Clips, name: str) -> float:
        """The best F1 of a constant prediction."""
        return metrics.constant_f1(
            self.truth(clips, name)[torch.from_numpy(np.array(clips.mask[name]))][:, :-1].numpy()
        )


class OfficialLocalisation(Localisation):
    """Precision as the released AVVP code defines it, background included."""

    protocol = "official"
    rule = ProbeRule(epochs=50, batch_size=80, learning_rate=4e-4, halve_at=(10, 20, 30), clip_norm=0.5)

    def make_loss(self, columns: int, dtype: torch.dtype) -> nn.Module:
        """With the ExpLog term and its alphas."""
        return OfficialSegmentLoss(columns, dtype)

    def score(self, logits: Tensor, truth: Tensor, mask: Tensor) -> float:
        """Precision averaged over batches; the released code chooses the epoch by it, and it is what was published."""
        return metrics.official_scores(
            (logits > 0).numpy(), truth.numpy(), mask.numpy(), self.rule.batch_size
        ).precision

    def chance(self, clips: Clips, name: str) -> float:
        """The best official precision of a constant prediction."""
        return metrics.official_constant_precision(
            self.truth(clips, name).numpy(), np.array(clips.mask[name]), self.rule.batch_size
        )
