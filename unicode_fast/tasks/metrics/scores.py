"""Scores of probes and of chance; the released code's own variants have `official` in their names."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from sklearn.metrics import accuracy_score, f1_score


class OfficialScores(NamedTuple):
    """Precision, recall and F1 as the released code averages them, fractions."""

    precision: float
    recall: float
    f1: float


def accuracy(prediction: np.ndarray, target: np.ndarray) -> float:
    """Share of clips whose class is predicted.

    Args:
        prediction: (clips,) integers, at least one.
        target: (clips,) integers.

    Raises:
        ValueError: the lengths differ, or there are no clips.
    """
    _check_same_shape(prediction, target, 1)
    return float(accuracy_score(target, prediction))


def micro_f1(prediction: np.ndarray, truth: np.ndarray) -> float:
    """F1 of true positives, false positives and false negatives pooled over segments and classes.

    Args:
        prediction: (segments, C) bool or 0/1, foreground classes only, at least one segment.
        truth: (segments, C).

    Returns:
        2 TP / (2 TP + FP + FN); 0 where nothing is predicted and nothing is true.

    Raises:
        ValueError: the shapes differ, or there are no segments.
    """
    _check_same_shape(prediction, truth, 2)
    # scikit-learn reads one column as a two-class problem; flattened, it pools the entries of any number of columns.
    return float(f1_score(np.ravel(truth) > 0, np.ravel(prediction) > 0, average="binary", zero_division=0))


def constant_f1(truth: np.ndarray) -> float:
    """The best pooled F1 of one fixed set of classes, predicted in every segment.

    P_c counts the segments of class c. A set S has TP = sum of P_c over S and predicts |S| N entries. Its F1 is
    2 TP / (|S| N + sum of all P_c). Among sets of one size the most frequent classes are best, so C sets are compared.

    Args:
        truth: (segments, C) bool or 0/1, at least one segment.

    Raises:
        ValueError: `truth` has another shape.
    """
    _check_same_shape(truth, truth, 2)
    positives = np.sort((np.asarray(truth) > 0).sum(0))[::-1]
    if not positives.any():
        return 0.0
    sizes = np.arange(1, len(positives) + 1)
    return float((2 * np.cumsum(positives) / (sizes * len(truth) + positives.sum())).max())


def official_target(labels: np.ndarray) -> np.ndarray:
    """The clip class as the released code derives it from segment labels.

    The class of a segment is the argmax over the C foreground columns, 0 where there is only background. The class of
    a clip is the largest of its segments.

    Args:
        labels: (clips, T, C+1), background last.

    Returns:
        (clips,) int64.

    Source:
        The released AVE evaluation.
    """
    return np.asarray(labels)[..., :-1].argmax(-1).max(1).astype(np.int64)


def clip_target(labels: np.ndarray) -> np.ndarray:
    """The most frequent class of a clip's foreground segments.

    Args:
        labels: (clips, T, C+1), background last; a segment's class is the argmax over its C foreground columns.

    Returns:
        (clips,) int64; among equally frequent classes, the smallest.

    Raises:
        ValueError: a clip has no foreground segment.
    """
    foreground = np.asarray(labels)[..., :-1]
    classes = np.eye(foreground.shape[-1], dtype=np.int64)[foreground.argmax(-1)]  # (clips, T, C)
    counts = (classes * (foreground > 0).any(-1, keepdims=True)).sum(1)
    if not counts.any(1).all():
        clip = int(counts.any(1).argmin())
        raise ValueError(f"labels must mark a foreground class in each clip to classify, none in clip {clip}")
    return counts.argmax(1)


def official_scores(prediction: np.ndarray, truth: np.ndarray, mask: np.ndarray, batch_size: int) -> OfficialScores:
    """Precision and recall over all columns, background included, averaged over batches and not pooled.

    In each batch precision = TP / (number predicted) and recall = TP / (number labelled), both 0 without predictions.
    Batches are weighted by their clips. F1 is computed from the two averages, 0 where both are 0; the released code
    divides by zero there.

    Args:
        prediction: (clips, T, C+1) bool.
        truth: (clips, T, C+1) 0/1.
        mask: (clips, T) bool; segments outside it are left out.
        batch_size: clips per batch, in their order; the last batch may be smaller.

    Raises:
        ValueError: the shapes differ, there are no clips, or the batch size is below 1.

    Source:
        The released AVVP evaluation.
    """
    _check_same_shape(prediction, truth, 3)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    clips = len(prediction)
    precision = recall = 0.0
    for start in range(0, clips, batch_size):
        batch = slice(start, start + batch_size)
        predicted = np.asarray(prediction[batch])[mask[batch]] > 0
        labelled = np.asarray(truth[batch])[mask[batch]] > 0
        if predicted.any():
            hits, weight = (predicted & labelled).sum(), len(prediction[batch]) / clips
            precision += weight * hits / predicted.sum()
            recall += weight * hits / max(labelled.sum(), 1)
    total = precision + recall
    return OfficialScores(float(precision), float(recall), float(2 * precision * recall / total) if total else 0.0)


def official_constant_precision(truth: np.ndarray, mask: np.ndarray, batch_size: int) -> float:
    """The best official precision of a constant prediction.

    In each batch, the precision of a constant set of columns is the mean of the columns' frequencies. No set exceeds
    its best single column, so C+1 columns are compared.

    Args:
        truth: (clips, T, C+1) 0/1.
        mask: (clips, T) bool.
        batch_size: clips per batch, as in `official_scores`.

    Raises:
        ValueError: as in `official_scores`.
    """
    columns = np.eye(truth.shape[-1], dtype=bool)
    return max(
        official_scores(np.broadcast_to(column, truth.shape), truth, mask, batch_size).precision for column in columns
    )


def official_constant_f1(truth: np.ndarray, mask: np.ndarray, batch_size: int) -> float:
    """The best official F1 of a constant prediction of the k commonest columns, k from 1 to C+1.

    Args:
        truth: (clips, T, C+1) 0/1.
        mask: (clips, T) bool.
        batch_size: clips per batch, as in `official_scores`.

    Raises:
        ValueError: as in `official_scores`.
    """
    commonest = np.argsort(-(np.asarray(truth)[mask] > 0).sum(0), kind="stable")
    sets = [np.isin(np.arange(truth.shape[-1]), commonest[: size + 1]) for size in range(truth.shape[-1])]
    return max(official_scores(np.broadcast_to(chosen, truth.shape), truth, mask, batch_size).f1 for chosen in sets)


def _check_same_shape(prediction: np.ndarray, truth: np.ndarray, dimensions: int) -> None:
    if np.ndim(truth) != dimensions or np.shape(truth)[0] == 0:
        raise ValueError(f"truth must have {dimensions} dimensions and at least one row, got shape {np.shape(truth)}")
    if np.shape(prediction) != np.shape(truth):
        raise ValueError(f"prediction must have the shape of truth, {np.shape(truth)}, got {np.shape(prediction)}")
