"""Bootstrap intervals and pooled metrics: weighted formulas against scikit-learn on repeated clips."""

import warnings

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, precision_recall_fscore_support
from task_tolerances import INTERVAL
from test_metrics import close

from unicode_fast.tasks.metrics import scores as metrics
from unicode_fast.tasks.metrics.intervals import Bootstrap, Estimate, weighted_mean, weighted_median
from unicode_fast.tasks.metrics.pooled import pooled_metrics, weighted_map

CLIPS, POSITIONS, CLASSES = 40, 5, 4
MEASURES = ("precision", "recall", "f1")


def example(seed: int, levels: int = 7) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores with many ties, truth that depends on them, and the clip of each row."""
    generator = np.random.default_rng(seed)
    truth = generator.random((CLIPS * POSITIONS, CLASSES)) < (0.1, 0.3, 0.02, 0.5)
    score = np.round(levels * (generator.random(truth.shape) + 0.4 * truth)) / levels
    return score, truth, np.repeat(np.arange(CLIPS), POSITIONS)


def repeated(weights: np.ndarray, rows: np.ndarray, clip: np.ndarray) -> np.ndarray:
    return np.repeat(rows, weights[clip].astype(int), 0)


def test_values_are_those_of_scikit_learn() -> None:
    score, truth, clip = example(0)
    found = pooled_metrics(score > 0.6, score, truth, clip, Bootstrap(CLIPS, 0))
    for average in ("micro", "macro"):
        values = precision_recall_fscore_support(truth, score > 0.6, average=average, zero_division=0)
        for measure, value in zip(MEASURES, values, strict=False):
            assert found[f"{average}_{measure}"].value == close(float(value))
    assert found["map"].value == close(float(average_precision_score(truth, score, average="macro")))
    assert found["micro_f1"].value == close(metrics.micro_f1(score > 0.6, truth))
    for estimate in found.values():
        assert estimate.low is not None and estimate.low < estimate.value < (estimate.high or 0)


def test_one_batch_gives_the_official_precision() -> None:
    """With the background for a column, pooled and official numbers are the same where there is one batch."""
    score, truth, clip = example(1)
    found = pooled_metrics(score > 0.6, score, truth, clip, Bootstrap(CLIPS, 0))
    shape = (CLIPS, POSITIONS, CLASSES)
    mask = np.ones(shape[:2], bool)
    official = metrics.official_scores((score > 0.6).reshape(shape), truth.reshape(shape), mask, CLIPS)
    assert [found[f"micro_{measure}"].value for measure in MEASURES] == [close(value) for value in official]
    in_parts = metrics.official_scores((score > 0.6).reshape(shape), truth.reshape(shape), mask, 7)
    assert in_parts.precision != close(official.precision)


def test_resampled_numbers_are_those_of_repeated_clips() -> None:
    """Each draw of the matrix equals scikit-learn's value of the drawn clips."""
    score, truth, clip = example(2)
    bootstrap = Bootstrap(CLIPS, 3, resamples=25)
    drawn: dict[str, np.ndarray] = {}

    class Recording(Bootstrap):
        def __init__(self) -> None:
            self.weights = bootstrap.weights

        def estimate(self, value: float, statistic: object) -> Estimate:
            drawn[str(len(drawn))] = statistic(self.weights)  # type: ignore[operator]
            return super().estimate(value, statistic)  # type: ignore[arg-type]

    names = list(pooled_metrics(score > 0.6, score, truth, clip, Recording()))
    for number, weights in enumerate(bootstrap.weights):
        rows = [repeated(weights, array, clip) for array in (score, truth)]
        present = rows[1].any(0)
        expected = [
            float(value)
            for average in ("micro", "macro")
            for value in precision_recall_fscore_support(rows[1], rows[0] > 0.6, average=average, zero_division=0)[:3]
        ]
        expected.append(float(average_precision_score(rows[1][:, present], rows[0][:, present], average="macro")))
        assert [drawn[str(place)][number] for place in range(len(names))] == [close(value) for value in expected]


def test_average_precision_leaves_out_classes_without_labels() -> None:
    score, truth, clip = example(3)
    truth[:, 1] = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pooled_metrics(score > 0.6, score, truth, clip, Bootstrap(CLIPS, 0))
    kept = [0, 2, 3]
    assert found["map"].value == close(float(average_precision_score(truth[:, kept], score[:, kept], average="macro")))
    truth[:] = False
    assert "map" not in pooled_metrics(score > 0.6, score, truth, clip, Bootstrap(CLIPS, 0))
    assert np.isnan(weighted_map(score, truth, clip, CLIPS)(np.ones((2, CLIPS)))).all()


def test_mean_and_median_of_weighted_clips() -> None:
    values = np.array([3.0, 1.0, 4.0, 1.5])
    weights = np.array([[1, 1, 1, 1], [0, 3, 0, 0], [2, 0, 1, 1], [1, 0, 2, 1]])
    every = [np.repeat(values, row) for row in weights]
    assert weighted_mean(values)(weights).tolist() == [close(float(row.mean())) for row in every]
    assert weighted_median(values)(weights).tolist() == [float(np.median(row)) for row in every]
    assert Bootstrap(4, 0).of_median(values).value == 2.25 and Bootstrap(4, 0).of_mean(values).value == 2.375


def test_intervals_are_those_of_scipy() -> None:
    """Percentile intervals of a mean, up to the chance of the draws."""
    values = np.random.default_rng(0).exponential(size=300)
    found = Bootstrap(300, 1, resamples=4000).of_mean(values)
    other = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=2).confidence_interval
    assert found.value == close(float(values.mean()))
    assert found.interval == pytest.approx((other.low, other.high), abs=INTERVAL.absolute)


def test_draws_depend_on_the_seed_alone() -> None:
    first, again, other = (Bootstrap(50, seed).weights for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert (first.sum(1) == 50).all()


def test_an_estimate_without_interval() -> None:
    assert Estimate(0.5).as_dict() == {"value": 0.5} and Estimate(0.5).interval is None
    assert Bootstrap(4, 0).estimate(0.5, lambda weights: np.full(len(weights), np.nan)) == Estimate(0.5)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="clips and resamples must be at least 1, got 0 and 1000"):
        Bootstrap(0, 0)
    score, truth, clip = example(0)
    with pytest.raises(ValueError, match="prediction, score and truth must have one shape"):
        pooled_metrics(score > 0, score[:, 1:], truth, clip, Bootstrap(CLIPS, 0))
