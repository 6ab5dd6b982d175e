"""Scores of predicted masks by frame, independent of the batches of frames."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from unicode_fast.tasks.metrics.intervals import Bootstrap, Estimate
from unicode_fast.tasks.metrics.pooled import by_clip

THRESHOLDS = 255
BETA_SQUARED = 0.3


class MaskScores(NamedTuple):
    """Scores of n frames.

    Attributes:
        iou: (n,) intersection over union at probability 0.5; for a frame without foreground, the share of its pixels
            that are predicted as background.
        f: (n, 255) F-score at each threshold, beta squared 0.3; 0 without true positives.
        empty: (n,) bool, True where the truth has no foreground.
        clip: (n,) number of the clip.
    """

    iou: np.ndarray
    f: np.ndarray
    empty: np.ndarray
    clip: np.ndarray

    @property
    def miou(self) -> float:
        """Mean over frames."""
        return float(self.iou.mean())

    @property
    def f_score(self) -> float:
        """The largest of the 255 means over frames with foreground; 0 without such frames."""
        return 0.0 if self.empty.all() else float(self.f[~self.empty].mean(0).max())


def frame_scores(probability: np.ndarray, truth: np.ndarray, clip: np.ndarray) -> MaskScores:
    """Scores of each frame.

    A pixel is predicted at a threshold where its probability is at least the threshold. The 255 thresholds are evenly
    spaced in [0, 1 - 1e-10], in float32. Intersection over union takes probability > 0.5.

    Args:
        probability: (n, H, W) float32 in [0, 1].
        truth: (n, H, W) bool.
        clip: (n,) numbers of clips.

    Raises:
        ValueError: the shapes differ, or there are no frames.

    Source:
        The measures of the released segmentation code, without its batches.
    """
    if probability.shape != truth.shape or probability.ndim != 3 or not truth.size or len(clip) != len(truth):
        raise ValueError(
            "probability and truth must have one shape (frames, H, W) with at least one frame, and clip (frames,), got "
            f"{probability.shape}, {truth.shape} and {clip.shape}"
        )
    frames, pixels = len(truth), truth[0].size
    flat, foreground = probability.reshape(frames, pixels), truth.reshape(frames, pixels)
    chosen, empty = flat > 0.5, np.logical_not(foreground.any(1))
    both, either = (chosen & foreground).sum(1), (chosen | foreground).sum(1)
    iou = np.where(empty, (~chosen).mean(1), both / np.maximum(either, 1))
    # Number of thresholds that a pixel reaches: a histogram replaces sums over pixels.
    thresholds = torch.linspace(0, 1 - 1e-10, THRESHOLDS).numpy()
    reached = np.searchsorted(thresholds, flat, side="right") + np.arange(frames)[:, None] * (THRESHOLDS + 1)
    predicted = _at_least(reached.ravel(), frames)
    found = _at_least(reached[foreground], frames)
    labelled = foreground.sum(1, keepdims=True)
    precision = found / np.maximum(predicted, 1)
    recall = found / np.maximum(labelled, 1)
    below = BETA_SQUARED * precision + recall
    f = np.divide((1 + BETA_SQUARED) * precision * recall, below, out=np.zeros_like(below), where=below > 0)
    return MaskScores(iou, f, empty, np.asarray(clip))


def _at_least(places: np.ndarray, frames: int) -> np.ndarray:
    """(frames, 255) pixels at each threshold or above, from frame * 256 + thresholds reached."""
    counts = np.bincount(places, minlength=frames * (THRESHOLDS + 1)).reshape(frames, THRESHOLDS + 1)
    return counts[:, ::-1].cumsum(1)[:, -2::-1]


def joined(several: list[MaskScores]) -> MaskScores:
    """Concatenates the frames of several scores."""
    return MaskScores(*(np.concatenate(arrays) for arrays in zip(*several, strict=True)))


def official_mask_scores(scores: MaskScores, batch_size: int) -> tuple[float, float]:
    """MIoU and F-score as the released code averages them.

    MIoU of a batch is the mean IoU over frames. Its F-score is the largest of 255 means over frames with foreground,
    0 without such frames. All batches have equal weight, whatever the size of the last. Both scores, F above all,
    therefore depend on the batch size.

    Args:
        scores: of frames, grouped by clip.
        batch_size: clips per batch.

    Raises:
        ValueError: the batch size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    batch = np.unique(scores.clip, return_inverse=True)[1].reshape(-1) // batch_size
    batches = [MaskScores(*(array[batch == number] for array in scores)) for number in range(int(batch.max()) + 1)]
    return float(np.mean([each.miou for each in batches])), float(np.mean([each.f_score for each in batches]))


def measured_masks(scores: MaskScores, bootstrap: Bootstrap, batch_size: int) -> dict[str, Estimate]:
    """MIoU and F-score with intervals over clips, then the released code's averages.

    Args:
        scores: of the frames of all clips, clips numbered as in `bootstrap`.
        bootstrap: of the clips.
        batch_size: clips per batch of the released averages.
    """
    clips = bootstrap.weights.shape[1]
    of_frames = (scores.iou, np.ones(len(scores.iou)), scores.f * ~scores.empty[:, None], ~scores.empty)
    iou, frames, curve, full = (by_clip(values, scores.clip, clips) for values in of_frames)

    def mean_iou(weights: np.ndarray) -> np.ndarray:
        return weights @ iou / (weights @ frames)

    def largest_f(weights: np.ndarray) -> np.ndarray:
        return (weights @ curve / np.maximum(weights @ full, 1)[:, None]).max(1)

    official = official_mask_scores(scores, batch_size)
    return {
        "miou": bootstrap.estimate(scores.miou, mean_iou),
        "f_score": bootstrap.estimate(scores.f_score, largest_f),
        "official_miou": Estimate(official[0]),
        "official_f_score": Estimate(official[1]),
    }
