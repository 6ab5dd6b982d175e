"""Localisation of events in time: C+1 columns per segment, background last."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from unicode_fast.data import ClipSet
from unicode_fast.tasks.encoded import TEST, TRAIN, WHOLE
from unicode_fast.tasks.metrics import scores as metrics
from unicode_fast.tasks.metrics.intervals import Bootstrap, Estimate
from unicode_fast.tasks.metrics.pooled import micro_f1, pooled_metrics
from unicode_fast.tasks.probe import EncodedClips, ProbeHead, ProbeRule, ProbeTask, all_clips


class SegmentLoss(nn.Module):
    """Binary cross-entropy, mean over valid segments and columns."""

    def forward(self, logits: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
        """Logits and truth (clips, T, C+1), mask (clips, T)."""
        return binary_cross_entropy_with_logits(logits[mask], truth[mask].to(logits.dtype))


class OfficialSegmentLoss(SegmentLoss):
    """Binary cross-entropy plus the released code's ExpLog term.

    ExpLog = - mean over segments of sum_c y_c log softmax(x)_c exp(-alpha_c). Each column has one alpha_c, which starts
    at 0.1 and is trained with the head.

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


OFFICIAL_RULE = ProbeRule(epochs=50, batch_size=80, learning_rate=4e-4, halve_at=(10, 20, 30), clip_norm=0.5)


class Localisation(ProbeTask):
    """Pooled micro-F1 over the C foreground classes at threshold 0.5, held_out protocol."""

    name = "localisation"
    protocol = "held_out"
    across = False
    tested: tuple[str, ...] = (TEST,)
    rule = ProbeRule(epochs=30, batch_size=200, learning_rate=4e-3, least_steps=300)

    def fits(self, clips: ClipSet, name: str) -> bool:
        """True for modalities with segment labels; a sentence has no time axis."""
        return name in clips.labels

    def columns(self, clips: ClipSet) -> int:
        """C+1."""
        return len(clips.classes) + 1

    def truth(self, clips: ClipSet, name: str) -> Tensor:
        """(clips, T, C+1) bool."""
        return torch.from_numpy(all_clips(clips.labels[name]) > 0)

    def output(self, head: ProbeHead, codes: EncodedClips) -> Tensor:
        """(clips, T, C+1)."""
        return head.of_positions(codes)

    def make_loss(self, columns: int, dtype: torch.dtype) -> nn.Module:
        """Binary cross-entropy, without parameters."""
        return SegmentLoss()

    def score(self, logits: Tensor, truth: Tensor, mask: Tensor) -> float:
        """Micro-F1 at probability > 0.5, without the background."""
        return metrics.micro_f1((logits[mask][:, :-1] > 0).numpy(), truth[mask][:, :-1].numpy())

    def chance(self, clips: ClipSet, name: str) -> float:
        """The best F1 of a constant prediction."""
        return metrics.constant_f1(
            self.truth(clips, name)[torch.from_numpy(np.array(clips.mask[name]))][:, :-1].numpy()
        )

    def estimate(self, logits: Tensor, truth: Tensor, mask: Tensor, bootstrap: Bootstrap) -> Estimate:
        """Micro-F1 with its interval."""
        chosen, target = logits[mask][:, :-1] > 0, truth[mask][:, :-1]
        return micro_f1(chosen.numpy(), target.numpy(), _clip_of_position(mask), bootstrap)

    def metrics(self, logits: Tensor, truth: Tensor, mask: Tensor, bootstrap: Bootstrap) -> dict[str, Estimate]:
        """Pooled precision, recall, F1 and mAP over the C foreground classes, then the released code's measures."""
        chosen, target = logits[mask][:, :-1], truth[mask][:, :-1]
        official = metrics.official_scores((logits > 0).numpy(), truth.numpy(), mask.numpy(), OFFICIAL_RULE.batch_size)
        return {
            **pooled_metrics((chosen > 0).numpy(), chosen.numpy(), target.numpy(), _clip_of_position(mask), bootstrap),
            **{f"official_{name}": Estimate(value) for name, value in official._asdict().items()},
        }


def _clip_of_position(mask: Tensor) -> np.ndarray:
    """(positions,) int64 from mask (clips, T): the clip of each valid position."""
    return torch.arange(len(mask)).repeat_interleave(mask.sum(1)).numpy()


class OfficialLocalisation(Localisation):
    """Precision as the released AVVP code defines it, background included."""

    protocol = "official"
    tested: tuple[str, ...] = (WHOLE, TRAIN)
    rule = OFFICIAL_RULE

    def make_loss(self, columns: int, dtype: torch.dtype) -> nn.Module:
        """With the ExpLog term and its alphas."""
        return OfficialSegmentLoss(columns, dtype)

    def estimate(self, logits: Tensor, truth: Tensor, mask: Tensor, bootstrap: Bootstrap) -> Estimate:
        """The score without an interval: it is an average over batches in their order, not over clips."""
        return Estimate(self.score(logits, truth, mask))

    def score(self, logits: Tensor, truth: Tensor, mask: Tensor) -> float:
        """Precision averaged over batches; it chooses the released epoch, and the paper prints it."""
        return metrics.official_scores(
            (logits > 0).numpy(), truth.numpy(), mask.numpy(), self.rule.batch_size
        ).precision

    def chance(self, clips: ClipSet, name: str) -> float:
        """The best official precision of a constant prediction."""
        return metrics.official_constant_precision(
            self.truth(clips, name).numpy(), np.array(clips.mask[name]), self.rule.batch_size
        )


class CrossLocalisation(Localisation):
    """Localisation on clips of another data set with the same classes."""

    name = "cross-localisation"
    across = True


class OfficialCrossLocalisation(OfficialLocalisation):
    """F1 as the released AVE to AVVP code defines it, background included."""

    name = "cross-localisation"
    across = True
    tested = (TEST,)

    def score(self, logits: Tensor, truth: Tensor, mask: Tensor) -> float:
        """F1 of precision and recall averaged over batches; it chooses the released epoch, and the paper prints it."""
        return metrics.official_scores((logits > 0).numpy(), truth.numpy(), mask.numpy(), self.rule.batch_size).f1

    def chance(self, clips: ClipSet, name: str) -> float:
        """The best official F1 of a constant prediction."""
        return metrics.official_constant_f1(
            self.truth(clips, name).numpy(), np.array(clips.mask[name]), self.rule.batch_size
        )
