"""Bootstrap intervals over clips: statistics are functions of clip weights, and all resamples are one matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 1000
_PERCENTILES = (2.5, 97.5)

Statistic = Callable[[np.ndarray], np.ndarray]


class Estimate(NamedTuple):
    """A number and, if there is one, its 95 % interval."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Low and high; None where there is none."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    def reaches(self, chance: float) -> bool:
        """True where the number, or the low end of its interval, is at most `chance`."""
        return min(self.value, *(self.interval or (self.value,))) <= chance

    def as_dict(self) -> dict[str, Any]:
        """Plain values, without the interval where there is none."""
        return {key: value for key, value in self._asdict().items() if value is not None}


class Bootstrap:
    """Percentile intervals from clips drawn with replacement; every statistic has the same draws.

    Args:
        clips: number of clips, at least one.
        seed: of the draws.
        resamples: number of draws, R.

    Raises:
        ValueError: a number is below 1.
    """

    def __init__(self, clips: int, seed: int, resamples: int = RESAMPLES) -> None:
        if clips < 1 or resamples < 1:
            raise ValueError(f"clips and resamples must be at least 1, got {clips} and {resamples}")
        draws = np.random.default_rng(seed).multinomial(clips, np.full(clips, 1 / clips), size=resamples)
        self.weights = draws.astype(np.float64)  # (R, clips), count of each clip in each draw

    def estimate(self, value: float, statistic: Statistic) -> Estimate:
        """A value with the interval of its statistic.

        Args:
            value: of all clips once.
            statistic: from weights (n, clips) to (n,), NaN where undefined. Draws with NaN are left out.
        """
        drawn = statistic(self.weights)
        if np.isnan(drawn).all():
            return Estimate(value)
        low, high = np.nanpercentile(drawn, _PERCENTILES)
        return Estimate(value, float(low), float(high))

    def of_mean(self, values: np.ndarray) -> Estimate:
        """The mean over clips of one number per clip, (clips,)."""
        return self.estimate(float(np.mean(values)), weighted_mean(values))

    def of_median(self, values: np.ndarray) -> Estimate:
        """The median over clips of one number per clip, (clips,)."""
        return self.estimate(float(np.median(values)), weighted_median(values))


def weighted_mean(values: np.ndarray) -> Statistic:
    """Statistic of weights (n, clips): the weighted mean of `values` (clips,)."""
    return lambda weights: weights @ values / weights.sum(1)


def weighted_median(values: np.ndarray) -> Statistic:
    """Statistic of integer weights (n, clips): the median of `values` (clips,), each counted by its weight."""
    order = np.argsort(values, kind="stable")
    ranked = np.asarray(values)[order]

    def median(weights: np.ndarray) -> np.ndarray:
        reached = weights[:, order].cumsum(1)
        half = reached[:, -1:] / 2
        # An even count has two middle values; an odd count has one, taken twice.
        return (ranked[(reached >= half).argmax(1)] + ranked[(reached > half).argmax(1)]) / 2

    return median
