"""Classification of the event in a clip: one class per clip, from the maximum of its codes over time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from unicode_fast.data import ClipSet, StoreError
from unicode_fast.tasks.encoded import TEST, TRAIN, WHOLE
from unicode_fast.tasks.metrics import scores as metrics
from unicode_fast.tasks.metrics.intervals import Bootstrap, Estimate
from unicode_fast.tasks.metrics.pooled import pooled_metrics
from unicode_fast.tasks.probe import EncodedClips, ProbeHead, ProbeRule, ProbeTask, all_clips


class CrossEntropy(nn.Module):
    """Mean cross-entropy over clips."""

    def forward(self, logits: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
        """Logits (clips, C), truth (clips,); the head has applied the mask."""
        return cross_entropy(logits, truth)


class Classification(ProbeTask):
    """Accuracy on clips, held_out protocol."""

    name = "classification"
    protocol = "held_out"
    across = False
    tested: tuple[str, ...] = (TEST,)
    rule = ProbeRule(epochs=15, batch_size=200, learning_rate=4e-3, least_steps=300)

    def fits(self, clips: ClipSet, name: str) -> bool:
        """True for every modality."""
        return True

    def columns(self, clips: ClipSet) -> int:
        """C."""
        return len(clips.classes)

    def truth(self, clips: ClipSet, name: str) -> Tensor:
        """(clips,) int64: the class of each clip, else the most frequent foreground class of its segments."""
        try:
            return torch.from_numpy(np.array(clips.target))
        except StoreError:
            if name not in clips.labels:
                raise
        return torch.from_numpy(metrics.clip_target(all_clips(clips.labels[name])))

    def output(self, head: ProbeHead, codes: EncodedClips) -> Tensor:
        """(clips, C)."""
        return head.of_clips(codes)

    def make_loss(self, columns: int, dtype: torch.dtype) -> nn.Module:
        """Cross-entropy, without parameters."""
        return CrossEntropy()

    def score(self, logits: Tensor, truth: Tensor, mask: Tensor) -> float:
        """Share of clips whose class has the largest logit."""
        return metrics.accuracy(logits.argmax(1).numpy(), truth.numpy())

    def chance(self, clips: ClipSet, name: str) -> float:
        """1 / C."""
        return 1 / len(clips.classes)

    def estimate(self, logits: Tensor, truth: Tensor, mask: Tensor, bootstrap: Bootstrap) -> Estimate:
        """Accuracy with its interval."""
        return bootstrap.of_mean((logits.argmax(1) == truth).numpy().astype(float))

    def metrics(self, logits: Tensor, truth: Tensor, mask: Tensor, bootstrap: Bootstrap) -> dict[str, Estimate]:
        """Accuracy, and pooled precision, recall, F1 and mAP over classes with the softmax as score."""
        columns = logits.shape[1]
        predicted, target = logits.argmax(1).numpy(), truth.numpy()
        chosen, labelled = (np.eye(columns, dtype=bool)[classes] for classes in (predicted, target))
        return {
            "accuracy": self.estimate(logits, truth, mask, bootstrap),
            **pooled_metrics(chosen, logits.softmax(1).numpy(), labelled, np.arange(len(target)), bootstrap),
        }


class OfficialClassification(Classification):
    """Accuracy as the released AVE code defines it."""

    protocol = "official"
    tested: tuple[str, ...] = (WHOLE, TRAIN)
    rule = ProbeRule(epochs=30, batch_size=80, learning_rate=4e-4, halve_at=(10, 20, 30), clip_norm=0.5)

    def truth(self, clips: ClipSet, name: str) -> Tensor:
        """(clips,) int64: the largest segment class, or the clip's class for a modality without segment labels."""
        if name not in clips.labels:
            return super().truth(clips, name)
        return torch.from_numpy(metrics.official_target(all_clips(clips.labels[name])))


class CrossClassification(Classification):
    """Classification on clips of another data set with the same classes."""

    name = "cross-classification"
    across = True


class OfficialCrossClassification(OfficialClassification):
    """Accuracy as the released UCF-101 and VGGSound code defines it: the target is the clip's class."""

    name = "cross-classification"
    across = True
    tested = (WHOLE, TEST)

    def truth(self, clips: ClipSet, name: str) -> Tensor:
        """(clips,) int64."""
        return Classification.truth(self, clips, name)
