"""Random numbers as a pure function of (seed, step, stream, position), the same on every device and backend.

There is no generator with a state. So a step can be replayed, split over ranks or captured in a CUDA graph, and its
random numbers stay the same.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# The increment and the two multipliers of SplitMix64, as signed 64-bit numbers.
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLIER_2 = 0x94D049BB133111EB - 2**64


def _signed(number: int) -> int:
    """The signed 64-bit number with the same lowest 64 bits."""
    return (number + 2**63) % 2**64 - 2**63


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Shift zeros in from the left; torch's own shift of a signed number repeats the sign."""
    return (bits >> count) & (2 ** (64 - count) - 1)


def _mix(bits: Tensor) -> Tensor:
    """The finishing function of SplitMix64, a bijection of 64-bit numbers."""
    bits = (bits ^ _shift_right(bits, 30)) * _MULTIPLIER_1
    bits = (bits ^ _shift_right(bits, 27)) * _MULTIPLIER_2
    return bits ^ _shift_right(bits, 31)


def random_bits(seed: int, step: Tensor, stream: int, shape: Sequence[int]) -> Tensor:
    """64 random bits for each position.

    With mix the finishing function of SplitMix64, g its increment and all arithmetic modulo 2^64::

        key = mix(mix(mix(seed + g) + step + g) + stream + g)
        bits[i] = mix(key + (i + 1) g)            i counts the positions row by row

    Args:
        seed: any Python integer; its lowest 64 bits count.
        step: () int64, the number of the batch; its device is that of the result.
        stream: a number for each purpose of draws within one step.
        shape: of the result.

    Returns:
        (*shape) int64, every bit pattern equally likely.

    Source:
        Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    key = _mix(torch.full_like(step, _signed(seed)) + _INCREMENT)
    key = _mix(key + step + _INCREMENT)
    key = _mix(key + _signed(stream) + _INCREMENT)
    count = 1
    for size in shape:
        count *= size
    position = torch.arange(1, count + 1, dtype=torch.int64, device=step.device)
    return _mix(key + position * _INCREMENT).reshape(tuple(shape))


def uniform(seed: int, step: Tensor, stream: int, shape: Sequence[int]) -> Tensor:
    """Uniform random numbers in [0, 1), multiples of 2^-53.

    Args:
        seed: any Python integer; its lowest 64 bits count.
        step: () int64, the number of the batch; its device is that of the result.
        stream: a number for each purpose of draws within one step.
        shape: of the result.

    Returns:
        (*shape) float64: the highest 53 of `random_bits`, divided by 2^53.
    """
    return _shift_right(random_bits(seed, step, stream, shape), 11).to(torch.float64) * 2.0**-53


def integers(bound: int, seed: int, step: Tensor, stream: int, shape: Sequence[int]) -> Tensor:
    """Uniform random integers in [0, bound).

    Args:
        bound: one more than the largest result; at least 1.
        seed: any Python integer; its lowest 64 bits count.
        step: () int64, the number of the batch; its device is that of the result.
        stream: a number for each purpose of draws within one step.
        shape: of the result.

    Returns:
        (*shape) int64: the highest 63 of `random_bits`, modulo `bound`; the bias is below bound 2^-63.
    """
    return _shift_right(random_bits(seed, step, stream, shape), 1) % bound
