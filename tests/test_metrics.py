"""Scores of probes and of chance, by hand, against scikit-learn and against loops over the released definitions."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from task_tolerances import LOSS, RATIO

from unicode_fast.tasks.localisation import OfficialSegmentLoss, SegmentLoss
from unicode_fast.tasks.metrics import scores as metrics


def close(value: float) -> object:
    return pytest.approx(value, rel=RATIO.relative, abs=RATIO.absolute)


def test_accuracy_by_hand_and_by_scikit_learn() -> None:
    assert metrics.accuracy(np.array([0, 1, 2, 2]), np.array([0, 1, 2, 0])) == 0.75
    generator = np.random.default_rng(0)
    prediction, target = generator.integers(5, size=(2, 200))
    assert metrics.accuracy(prediction, target) == close(accuracy_score(target, prediction))


def test_micro_f1_by_hand() -> None:
    truth = np.array([[1, 0], [1, 0], [0, 1], [0, 0]])
    prediction = np.array([[1, 0], [0, 1], [0, 1], [0, 1]])
    # Two true positives, two false positives, one false negative.
    assert metrics.micro_f1(prediction, truth) == close(4 / 7)
    assert metrics.micro_f1(np.zeros_like(truth), truth) == 0.0
    assert metrics.micro_f1(np.zeros_like(truth), np.zeros_like(truth)) == 0.0
    assert metrics.micro_f1(truth, truth) == 1.0


@pytest.mark.parametrize("classes", [1, 2, 10])
def test_micro_f1_is_that_of_scikit_learn(classes: int) -> None:
    generator = np.random.default_rng(classes)
    truth, prediction = generator.random((2, 300, classes)) < 0.2
    # With one column scikit-learn's "micro" would count zeros too. A second, empty column makes it a set of labels.
    padded = [np.concatenate([labels, np.zeros((300, 1), bool)], 1) for labels in (truth, prediction)]
    assert metrics.micro_f1(prediction, truth) == close(f1_score(*padded, average="micro", zero_division=0))


def test_constant_f1_by_hand() -> None:
    # Class 0 is in three of four segments, class 1 in one: class 0 alone has F1 2*3/(4+4), both have 2*4/(8+4).
    truth = np.array([[1, 0], [1, 0], [1, 1], [0, 0]])
    assert metrics.constant_f1(truth) == close(0.75)
    assert metrics.constant_f1(np.zeros((4, 3))) == 0.0
    assert metrics.constant_f1(np.ones((4, 3))) == 1.0


@pytest.mark.parametrize("seed", range(20))
def test_constant_f1_is_the_best_of_all_sets(seed: int) -> None:
    generator = np.random.default_rng(seed)
    truth = generator.random((12, 5)) < generator.random(5)
    every_set = itertools.product([False, True], repeat=5)
    best = max(metrics.micro_f1(np.broadcast_to(np.array(chosen), truth.shape), truth) for chosen in every_set)
    assert metrics.constant_f1(truth) == close(best)


def test_official_target_by_hand() -> None:
    labels = np.zeros((3, 3, 4))
    labels[0, [0, 1], 2] = labels[0, 2, 3] = 1  # class 2, then background
    labels[1, :, 3] = 1  # background throughout
    labels[2, 0, 0] = labels[2, 1, 1] = labels[2, 2, 3] = 1  # two classes: the larger number wins
    assert metrics.official_target(labels).tolist() == [2, 0, 1]


def test_official_scores_by_hand() -> None:
    """Two batches of one clip each: precisions 1/2 and 0, where the pooled value would be 1/2."""
    truth = np.array([[[1, 0, 0], [0, 0, 1]], [[0, 1, 0], [0, 0, 1]]])
    prediction = np.array([[[1, 1, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]], bool)
    mask = np.ones((2, 2), bool)
    scores = metrics.official_scores(prediction, truth, mask, batch_size=1)
    assert scores.precision == close(0.25)
    assert scores.recall == close(0.25)
    assert scores.f1 == close(0.25)
    assert metrics.official_scores(prediction, truth, mask, batch_size=2).precision == close(0.5)
    assert metrics.official_scores(np.zeros_like(prediction), truth, mask, 2) == (0.0, 0.0, 0.0)


def _official_loop(prediction: np.ndarray, truth: np.ndarray, batch_size: int) -> tuple[float, float]:
    """The released definition entry by entry: sums over a batch, then averages weighted by its 10 B segments."""
    precisions, recalls, weights = [], [], []
    for start in range(0, len(truth), batch_size):
        hits = predicted = labelled = 0
        for clip in range(start, min(start + batch_size, len(truth))):
            for step in range(truth.shape[1]):
                for column in range(truth.shape[2]):
                    predicted += prediction[clip, step, column]
                    labelled += truth[clip, step, column]
                    hits += prediction[clip, step, column] * truth[clip, step, column]
        precisions.append(hits / predicted if predicted else 0)
        recalls.append(hits / labelled if predicted else 0)
        weights.append(10 * (min(start + batch_size, len(truth)) - start))
    return np.average(precisions, weights=weights), np.average(recalls, weights=weights)


def test_official_scores_agree_with_loops() -> None:
    generator = np.random.default_rng(1)
    truth = np.eye(4, dtype=int)[generator.integers(4, size=(23, 10))]
    prediction = (generator.random(truth.shape) < 0.3).astype(int)
    prediction[8:16] = 0  # a batch without predictions
    scores = metrics.official_scores(prediction > 0, truth, np.ones(truth.shape[:2], bool), batch_size=8)
    precision, recall = _official_loop(prediction, truth, 8)
    assert scores == (close(precision), close(recall), close(2 * precision * recall / (precision + recall)))


def test_official_scores_leave_padding_out() -> None:
    generator = np.random.default_rng(2)
    truth, prediction = generator.random((2, 9, 6, 3)) < 0.4
    short = np.ones((9, 6), bool)
    short[:, 4:] = False
    cut = metrics.official_scores(prediction[:, :4], truth[:, :4], short[:, :4], 4)
    assert metrics.official_scores(prediction, truth, short, 4) == cut


@pytest.mark.parametrize("seed", range(5))
def test_official_constant_precision_is_the_best_of_all_sets(seed: int) -> None:
    generator = np.random.default_rng(seed)
    truth = np.eye(4)[generator.choice(4, (9, 5), p=[0.1, 0.2, 0.3, 0.4])]
    mask = np.arange(5) < generator.integers(1, 6, (9, 1))
    best = max(
        metrics.official_scores(np.broadcast_to(np.array(chosen), truth.shape), truth, mask, 4).precision
        for chosen in itertools.product([False, True], repeat=4)
    )
    assert metrics.official_constant_precision(truth, mask, 4) == close(best)


def test_official_segment_loss_agrees_with_loops() -> None:
    """Binary cross-entropy over all entries plus ExpLog, from the formulas."""
    generator = np.random.default_rng(3)
    logits, alpha = generator.normal(size=(6, 5)), generator.normal(size=5)
    truth = np.eye(5)[generator.integers(5, size=6)]
    truth[0, 2] = 1  # two labels at once
    entropy = exp_log = 0.0
    for row, label in zip(logits, truth, strict=True):
        for value, target in zip(row, label, strict=True):
            probability = 1 / (1 + np.exp(-value))
            entropy -= target * np.log(probability) + (1 - target) * np.log(1 - probability)
        for column, target in enumerate(label):
            exp_log -= target * np.log(np.exp(row[column]) / np.exp(row).sum()) * np.exp(-alpha[column])
    loss = OfficialSegmentLoss(5, torch.float64)
    assert loss.alpha.tolist() == [0.1] * 5
    with torch.no_grad():
        loss.alpha.copy_(torch.from_numpy(alpha))
    arguments = torch.from_numpy(logits).view(2, 3, 5), torch.from_numpy(truth).view(2, 3, 5) > 0
    mask = torch.ones(2, 3, dtype=torch.bool)
    expected = entropy / 30 + exp_log / 6
    assert float(loss(*arguments, mask)) == pytest.approx(expected, rel=LOSS.relative, abs=LOSS.absolute)
    assert float(SegmentLoss()(*arguments, mask)) == pytest.approx(entropy / 30, rel=LOSS.relative, abs=LOSS.absolute)


def test_bad_input_is_named() -> None:
    one = np.ones((2, 3))
    with pytest.raises(ValueError, match=r"prediction must have the shape of truth, \(2, 3\), got \(2, 2\)"):
        metrics.micro_f1(np.ones((2, 2)), one)
    with pytest.raises(ValueError, match=r"truth must have 2 dimensions and at least one row, got shape \(0, 3\)"):
        metrics.constant_f1(np.ones((0, 3)))
    with pytest.raises(ValueError, match="truth must have 1 dimensions"):
        metrics.accuracy(one, one)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        metrics.official_scores(one[None] > 0, one[None], np.ones((1, 2), bool), 0)
