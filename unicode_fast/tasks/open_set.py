"""Open-set classification: a probe learns K known classes in one modality, and meets other classes in the other."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from unicode_fast.data import ClipSet, Dataset
from unicode_fast.tasks.classification import Classification, CrossEntropy, OfficialClassification
from unicode_fast.tasks.encoded import TEST, WHOLE
from unicode_fast.tasks.metrics import open_set as metrics
from unicode_fast.tasks.metrics.intervals import Bootstrap, Estimate
from unicode_fast.tasks.metrics.open_set import Decisions
from unicode_fast.tasks.probe import EncodedClips, Examples, ProbeHead, ProbeRule

# Largest share of the source's validation clips of known classes below the threshold of the held_out protocol.
REJECTED = 0.05
_OFFICIAL_EPOCHS = {"ucf51": 16}


class KnownCrossEntropy(CrossEntropy):
    """Mean cross-entropy over clips, without the column of rejections."""

    def forward(self, logits: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
        """Logits (clips, K+1), truth (clips,)."""
        return cross_entropy(logits[:, :-1], truth)


def confidence(logits: Tensor) -> Tensor:
    """(clips,) float64: the largest softmax probability of logits (clips, K)."""
    return logits.to(torch.float64).softmax(1).amax(1)


@dataclass(frozen=True)
class OpenClassification(Classification):
    """HOS on clips of known and of unknown classes, held_out protocol.

    Attributes:
        known: K; the first K classes are known, and the truth of a clip of another class is K. `adapted` sets it.
    """

    known: int = 0

    name = "open-classification"
    measure = "hos"

    def adapted(self, dataset: Dataset, known: int | None) -> OpenClassification:
        """With this K, or half of the classes of a data set.

        Raises:
            ValueError: K leaves no known or no unknown class.
        """
        classes = len(dataset.classes)
        chosen = classes // 2 if known is None else known
        if not 0 < chosen < classes:
            raise ValueError(f"known must be at least 1 and below the {classes} classes of the data, got {chosen}")
        return replace(self, known=chosen)

    def columns(self, clips: ClipSet) -> int:
        """K."""
        return self.known

    def truth(self, clips: ClipSet, name: str) -> Tensor:
        """(clips,) int64: the class of each clip as in classification, K for all unknown classes."""
        return super().truth(clips, name).clamp(max=self.known)

    def learnt(self, truth: Tensor) -> Tensor:
        """Numbers of the clips of known classes.

        Raises:
            ValueError: there are none.
        """
        numbers = torch.nonzero(truth < self.known).flatten()
        if len(numbers) == 0:
            raise ValueError(f"clips to learn from must be of the {self.known} known classes, got none of {len(truth)}")
        return numbers

    def output(self, head: ProbeHead, codes: EncodedClips) -> Tensor:
        """(clips, K+1): logits of known classes, then infinity where a clip is rejected, minus infinity elsewhere."""
        logits = head.of_clips(codes)
        rejected = (confidence(logits.detach()) < head.threshold)[:, None]
        return torch.cat([logits, torch.where(rejected, torch.inf, -torch.inf).to(logits.dtype)], 1)

    def make_loss(self, columns: int, dtype: torch.dtype) -> nn.Module:
        """Cross-entropy over known classes, without parameters."""
        return KnownCrossEntropy()

    def judge(self, logits: Tensor, truth: Tensor, mask: Tensor) -> float:
        """Accuracy on clips of known classes, nothing rejected."""
        return super().score(logits[:, :-1], truth, mask)

    def calibrate(self, head: ProbeHead, validation: Examples) -> None:
        """Sets the threshold so that at most 5 % of the validation clips of known classes are rejected."""
        head.threshold = metrics.rejection_threshold(confidence(head.of_clips(validation.codes)).numpy(), REJECTED)

    def decide(self, logits: Tensor, truth: Tensor) -> Decisions:
        """The decisions of `output`; the truth does not enter."""
        known = logits[:, :-1]
        return Decisions(known.argmax(1).numpy(), confidence(known).numpy(), (logits[:, -1] > 0).numpy())

    def score(self, logits: Tensor, truth: Tensor, mask: Tensor) -> float:
        """HOS, or H under the official protocol."""
        return metrics.measure(self.decide(logits, truth), truth.numpy(), self.known)[self.measure]

    def chance(self, clips: ClipSet, name: str) -> float:
        """The best harmonic mean of a guess among known classes with a rejection rate.

        Raises:
            ValueError: clips are all of known classes, or all of unknown ones.
        """
        inside = self.truth(clips, name) < self.known
        if inside.all() or not inside.any():
            which = "known" if inside.all() else "unknown"
            raise ValueError(
                f"clips to score on must be of known and of unknown classes, got {len(inside)} of {which} ones only"
            )
        return metrics.chance_h(self.known)

    def estimate(self, logits: Tensor, truth: Tensor, mask: Tensor, bootstrap: Bootstrap) -> Estimate:
        """The score with its interval, threshold and epoch fixed."""
        return self.metrics(logits, truth, mask, bootstrap)[self.measure]

    def metrics(self, logits: Tensor, truth: Tensor, mask: Tensor, bootstrap: Bootstrap) -> dict[str, Estimate]:
        """Those of `open_set_metrics`."""
        return metrics.open_set_metrics(self.decide(logits, truth), truth.numpy(), self.known, bootstrap)

    def limits(self, trained: Tensor, tested: Tensor) -> dict[str, Estimate]:
        """The largest acc_in, and the largest score, if known classes without training clips are never recognised.

        Args:
            trained: (n,) truth of the clips that the probe may learn from.
            tested: (m,) truth of the scored clips.
        """
        inside = tested[tested < self.known]
        of_clips = np.isin(inside, trained).mean()
        of_classes = np.isin(inside.unique(), trained).mean()
        most = of_classes if self.measure == "hos" else of_clips
        return {
            "acc_in_ceiling": Estimate(float(of_clips)),
            f"{self.measure}_ceiling": Estimate(float(metrics.harmonic_mean(most, np.ones(())))),
        }


@dataclass(frozen=True)
class OfficialOpenClassification(OpenClassification):
    """H as the released open-set code of MICU defines it: the best of ten thresholds and of all epochs on test clips.

    Attributes:
        rule: 25 epochs, 16 for UCF-51.
    """

    rule: ProbeRule = replace(OfficialClassification.rule, epochs=25, halve_at=(10, 20))

    protocol = "official"
    tested = (WHOLE, TEST)
    measure = "h"

    def adapted(self, dataset: Dataset, known: int | None) -> OpenClassification:
        """With the released number of epochs, too."""
        epochs = _OFFICIAL_EPOCHS.get(dataset.name, self.rule.epochs)
        chosen = super().adapted(dataset, known).known
        return replace(self, known=chosen, rule=replace(self.rule, epochs=epochs))

    def output(self, head: ProbeHead, codes: EncodedClips) -> Tensor:
        """(clips, K)."""
        return head.of_clips(codes)

    def make_loss(self, columns: int, dtype: torch.dtype) -> nn.Module:
        """Cross-entropy, without parameters."""
        return CrossEntropy()

    def decide(self, logits: Tensor, truth: Tensor) -> Decisions:
        """At the best of ten thresholds by the truth of these very clips."""
        best, sure = logits.argmax(1).numpy(), confidence(logits).numpy()
        return metrics.official_decisions(best, sure, truth.numpy(), self.known)


class CrossOpenClassification(OpenClassification):
    """Open-set classification on clips of another data set with the same classes."""

    name = "cross-open-classification"
    across = True


class OfficialCrossOpenClassification(OfficialOpenClassification):
    """The released open-set definition on clips of another data set with the same classes."""

    name = "cross-open-classification"
    across = True
