"""The counter-based generator: against SplitMix64 written in NumPy, and as random numbers."""

import numpy as np
import pytest
import tolerances
import torch
from numpy.typing import NDArray

from unicode_fast.reference import counter_random

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def splitmix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def step_number(step: int) -> torch.Tensor:
    return torch.tensor(step, dtype=torch.int64)


@pytest.mark.parametrize(("seed", "step", "stream"), [(0, 0, 0), (1, 2, 3), (-5, 10**12, 2), (2**63 - 1, 2**62, 0)])
def test_against_numpy(seed: int, step: int, stream: int) -> None:
    key = np.array([0], dtype=np.uint64)
    with np.errstate(over="ignore"):
        for number in (seed, step, stream):
            key = splitmix(key + np.uint64(number % 2**64) + GOLDEN)
        expected = splitmix(key + np.arange(1, 11, dtype=np.uint64) * GOLDEN)
    bits = counter_random.random_bits(seed, step_number(step), stream, (2, 5))
    assert bits.numpy().reshape(-1).view(np.uint64).tolist() == expected.tolist()
    uniform = counter_random.uniform(seed, step_number(step), stream, (10,))
    assert uniform.tolist() == [int(number >> np.uint64(11)) * 2.0**-53 for number in expected]
    integers = counter_random.integers(1000, seed, step_number(step), stream, (10,))
    assert integers.tolist() == [int(number >> np.uint64(1)) % 1000 for number in expected]


def test_published_numbers() -> None:
    """SplitMix64 from state 1234567 begins with this number in its author's and other people's test vectors."""
    mixed = splitmix(np.array([1234567], dtype=np.uint64) + GOLDEN)
    assert mixed.tolist() == [6457827717110365317]


def assert_uncorrelated(first: NDArray[np.float64], second: NDArray[np.float64]) -> None:
    correlation = np.corrcoef(first.reshape(-1), second.reshape(-1))[0, 1]
    assert abs(correlation) < tolerances.STANDARD_ERRORS / np.sqrt(first.size)


def test_uniform_and_independent() -> None:
    count = 40_000
    draws = {
        (seed, step, stream): counter_random.uniform(seed, step_number(step), stream, (count,)).numpy()
        for seed in (0, 1)
        for step in (0, 1, 2)
        for stream in (0, 1)
    }
    for numbers in draws.values():
        allowed = tolerances.STANDARD_ERRORS / np.sqrt(count)
        assert 0 <= numbers.min()
        assert numbers.max() < 1
        assert abs(numbers.mean() - 1 / 2) < allowed * np.sqrt(1 / 12)
        assert abs(np.square(numbers - 1 / 2).mean() - 1 / 12) < allowed * np.sqrt(1 / 180)
        tenths = np.bincount((numbers * 10).astype(int), minlength=10)
        assert np.all(np.abs(tenths - count / 10) < tolerances.STANDARD_ERRORS * np.sqrt(count * 0.09))
        assert_uncorrelated(numbers[:-1], numbers[1:])
    keys = list(draws)
    for place, first in enumerate(keys):
        for second in keys[place + 1 :]:
            assert_uncorrelated(draws[first], draws[second])


def test_same_position_over_many_steps() -> None:
    """The numbers of one position over many steps are as random as those of one step's positions."""
    numbers = np.array([counter_random.uniform(9, step_number(step), 1, (1,)).item() for step in range(4000)])
    allowed = tolerances.STANDARD_ERRORS / np.sqrt(4000)
    assert abs(numbers.mean() - 1 / 2) < allowed * np.sqrt(1 / 12)
    assert_uncorrelated(numbers[:-1], numbers[1:])


def test_empty() -> None:
    assert counter_random.uniform(0, step_number(0), 0, (0, 3)).shape == (0, 3)
