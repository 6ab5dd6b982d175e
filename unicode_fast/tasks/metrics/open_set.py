"""Measures of open-set classification: K known classes, and one answer for everything else."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix

from unicode_fast.tasks.metrics.intervals import Bootstrap, Estimate

THRESHOLDS = 10
# Resamples in memory at a time, each with one number a clip.
_ROWS = 100


class Decisions(NamedTuple):
    """What a classifier of K known classes says about n clips.

    Attributes:
        best: (n,) int64 in [0, K), the likeliest known class.
        confidence: (n,) float64, the probability of that class.
        rejected: (n,) bool, True where the clip is predicted to be of an unknown class.
    """

    best: np.ndarray
    confidence: np.ndarray
    rejected: np.ndarray


def harmonic_mean(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """2 a b / (a + b), 0 where both are 0; NaN where one is NaN."""
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    total = one + other
    return np.divide(2 * one * other, total, out=np.zeros_like(total), where=total != 0)


def chance_h(known: int) -> float:
    """The best harmonic mean of a guess that ignores the clip.

    The guess rejects with probability r, else draws one of K classes uniformly. Its accuracy on known clips is
    (1 - r) / K, its recall of unknown clips is r. The harmonic mean is largest at r = 1 / (1 + sqrt K).

    Args:
        known: K.

    Returns:
        2 / (1 + sqrt K)^2.
    """
    return 2 / (1 + math.sqrt(known)) ** 2


def rejection_threshold(confidence: np.ndarray, share: float) -> float:
    """The largest threshold among these values below which at most a share of them lies.

    Args:
        confidence: (n,), at least one.
        share: in [0, 1).
    """
    return float(np.sort(confidence)[math.floor(share * len(confidence))])


def official_decisions(best: np.ndarray, confidence: np.ndarray, truth: np.ndarray, known: int) -> Decisions:
    """Decisions at the best of ten thresholds, which are evenly spaced from the least confidence to the largest.

    A clip is rejected if its confidence is below the threshold. The best threshold has the largest H on these very
    clips; among equals it is the least.

    Args:
        best: (n,) int64 in [0, K).
        confidence: (n,).
        truth: (n,) int64 in [0, K], K for an unknown class.
        known: K.

    Source:
        The released open-set evaluation of MICU.
    """
    low, high = confidence.min(), confidence.max()
    thresholds = [low + (high - low) * place / (THRESHOLDS - 1) for place in range(THRESHOLDS)]
    tried = [Decisions(best, confidence, confidence < threshold) for threshold in thresholds]
    return max(tried, key=lambda decisions: measure(decisions, truth, known)["h"])


def measure(decisions: Decisions, truth: np.ndarray, known: int) -> dict[str, float]:
    """The measures of `open_set_metrics` without intervals; NaN where there is no known or no unknown clip."""
    found = _measures(decisions, truth, known, np.ones((1, len(truth))))
    return {name: float(values[0]) for name, values in found.items()}


def open_set_metrics(decisions: Decisions, truth: np.ndarray, known: int, bootstrap: Bootstrap) -> dict[str, Estimate]:
    """Measures of open-set decisions.

    Args:
        decisions: on n clips.
        truth: (n,) int64 in [0, K], K for an unknown class.
        known: K.
        bootstrap: of the n clips.

    Returns:
        "os_star": accuracy on known clips, mean over their classes; a rejection is an error.
        "unk": share of unknown clips that are rejected.
        "hos": harmonic mean of both.
        "os": (K os_star + unk) / (K + 1).
        "acc_in": accuracy on known clips, mean over clips.
        "acc_out": the same number as "unk".
        "h": harmonic mean of acc_in and acc_out.
        "auroc": share of pairs of a known and an unknown clip in which the known one has the larger confidence; ties
        count half.
        "oscr": the same share of pairs whose known clip also has the right best class. This is the area under the
        curve of correct classification rate over false positive rate.

    Source:
        OS* and OS: Panareda Busto and Gall, ICCV 2017. HOS: Bucci et al., ECCV 2020. OSCR: Dhamija et al., NeurIPS
        2018. acc_in, acc_out and H: the released open-set evaluation of MICU.
    """
    once = measure(decisions, truth, known)
    weights = bootstrap.weights
    chunks = [
        _measures(decisions, truth, known, weights[start : start + _ROWS]) for start in range(0, len(weights), _ROWS)
    ]
    drawn = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in once}
    return {name: bootstrap.estimate(value, partial(_drawn, drawn[name])) for name, value in once.items()}


def _drawn(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return values


def _measures(decisions: Decisions, truth: np.ndarray, known: int, weights: np.ndarray) -> dict[str, np.ndarray]:
    """(n,) of each measure, from weights (n, clips)."""
    inside = truth < known
    right = inside & (decisions.best == truth)
    accepted = right & ~decisions.rejected
    of_class = np.eye(known + 1)[truth][:, :known]  # (clips, K)
    counts = weights @ of_class
    recalls = _share(weights @ (of_class * accepted[:, None]), counts)  # (n, K)
    present = counts > 0
    os_star = _share(np.nansum(recalls, 1), present.sum(1))
    insiders, outsiders = counts.sum(1), weights @ ~inside
    acc_in, unk = _share(weights @ accepted, insiders), _share(weights @ (~inside & decisions.rejected), outsiders)
    _, level = np.unique(decisions.confidence, return_inverse=True)
    at_level = csr_matrix((np.ones(len(level)), (np.arange(len(level)), level)))  # (clips, levels)
    below = (weights * ~inside) @ at_level
    below = below.cumsum(1) - below / 2  # unknown clips of less confidence, and half of those of the same
    won = [(((weights * those) @ at_level) * below).sum(1) for those in (inside, right)]
    auroc, oscr = (_share(pairs, insiders * outsiders) for pairs in won)
    return {
        "os_star": os_star,
        "unk": unk,
        "hos": harmonic_mean(os_star, unk),
        "os": (known * os_star + unk) / (known + 1),
        "acc_in": acc_in,
        "acc_out": unk,
        "h": harmonic_mean(acc_in, unk),
        "auroc": auroc,
        "oscr": oscr,
    }


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """The quotient, NaN where the whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0)
