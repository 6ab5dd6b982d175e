"""Every tolerance of the tests, each with its reason. Numbers are relative unless they say otherwise.

u is the unit roundoff of the dtype that a result is computed in: 2^-53 for float64, 2^-24 for float32.
"""

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    """A result may differ from the truth by absolute + relative |truth| in each element."""

    relative: float
    absolute: float = 0.0


UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}

# Equal to the last bit: the same operations in the same order, or integers.
EXACT = Tolerance(0.0)


def nearest_factor(width: int) -> float:
    """By how much the chosen distance may exceed the smallest one.

    Two float64 sums of the same D non-negative terms in different orders differ by at most about 2 D u, one for each
    codeword that is compared. This is the promise in the docstring of nearest_codeword.
    """
    return 1 + 4 * width * 2.0**-53


def squared_distance(width: int, dtype: torch.dtype) -> Tolerance:
    """Of nearest_codeword's distance: a float64 sum in another order, then one rounding to the dtype of the result.

    The absolute part is the smallest subnormal: below the normal numbers rounding is no longer relative.
    """
    return Tolerance(2 * width * 2.0**-53 + UNIT_ROUNDOFF[dtype], torch.finfo(dtype).smallest_normal * 2.0**-23)


def codebook_update(dtype: torch.dtype) -> Tolerance:
    """Of counts, sums and codewords after a few updates of at most some hundred rows.

    The reference computes in float64, where sums of some hundred numbers of order one agree to 1e-13 in any order, and
    rounds once to the state's dtype; a few updates round a few times.
    """
    return Tolerance(1e-12, 1e-12) if dtype == torch.float64 else Tolerance(4 * UNIT_ROUNDOFF[dtype], 1e-12)


# The affine form of the sequential update and the loop that it was derived from, in float64: the same products and
# sums of non-negative weights in another order.
AFFINE_FORM = Tolerance(1e-12, 1e-12)


# Of sums of some ten thousand float64 numbers of order one in another order: their errors add up as a random walk, and
# the sums themselves may cancel.
MANY_ROWS = Tolerance(1e-12, 1e-11)


def codeword_distribution(width: int, dtype: torch.dtype) -> Tolerance:
    """Of probabilities of order 1/M and less, from features and codewords of order one.

    The expanded squared distance q ~ 2 D carries an error of D u q, the distance half of it, and the softmax turns an
    error of the distance, divided by the temperature (0.3 at least in these tests), into a relative one.
    """
    error = 4 * width**1.5 * UNIT_ROUNDOFF[dtype]
    return Tolerance(error, error * 1e-3)


def codeword_distribution_gradient(width: int, dtype: torch.dtype) -> Tolerance:
    """Of its gradients: the error of the probabilities again, in sums with cancellation of terms of order one."""
    error = 16 * width**1.5 * UNIT_ROUNDOFF[dtype]
    return Tolerance(error, error)


def cross_info_nce(largest_score: float, dtype: torch.dtype) -> Tolerance:
    """Of losses: scores up to `largest_score` carry an error of some u times themselves into differences of order one.

    32 covers dot products of up to 64 terms, whose errors add up as a random walk, and the sums over clips.
    """
    error = 32 * UNIT_ROUNDOFF[dtype] * max(1.0, largest_score)
    return Tolerance(error, error)


def cross_info_nce_gradient(largest_score: float, dtype: torch.dtype) -> Tolerance:
    """Of its gradients: the softmax turns the absolute error of a score into a relative one of a probability."""
    error = 64 * UNIT_ROUNDOFF[dtype] * max(1.0, largest_score)
    return Tolerance(error, error)


def cross_info_nce_half_gradient(dtype: torch.dtype, largest_gradient: float) -> Tolerance:
    """Of gradients of half-precision vectors in Triton, which rounds slopes to their dtype before it multiplies them.

    Each term of a sum over clips errs by u of itself. Terms cancel, but the largest sum is about as large as its terms.
    """
    error = 2 * UNIT_ROUNDOFF[dtype]
    return Tolerance(error, 2 * error * largest_gradient)


# Of a loss whose scores are of order one and come from factors that lost all but eleven bits each.
CROSS_INFO_NCE_TF32 = Tolerance(2.0**-10)

# How much larger than the reference's own error, at the same dtype and against float64, the error of another backend
# may be: it adds in another order, which costs at most the same again.
NO_WORSE_FACTOR = 2.0

# torch.autograd.gradcheck in float64 with its default step of 1e-6: central differences of functions of order one err
# by about 1e-12 from the step's square and 2^-53 / 1e-6 = 1e-10 from rounding; with slack for curvature.
GRADCHECK = Tolerance(1e-5, 1e-7)

# Codewords that the half-precision search leaves open for a row of normal numbers, on average: 1.02 to 1.11 were seen.
MOST_COMPARED = 1.5

# Statistical tests use fixed seeds, so they cannot flake; the bound says how unlikely the accepted generator's result
# is. Five standard errors leave a true hypothesis a chance of 6e-7 to fail when a seed is changed.
STANDARD_ERRORS = 5.0

# For pytest.approx on losses in float64: sums of some thousand terms of order one, in another order.
FLOAT64 = {"rel": 1e-10, "abs": 1e-12}

# Sums of some ten thousand squares of order one, in another order; bfloat16 rounds the gradient once, relative 2^-9,
# and gradients that cancel keep the absolute error of their terms.
COMMITMENT = {
    torch.float64: Tolerance(1e-12, 1e-12),
    torch.float32: Tolerance(1e-5, 1e-6),
    torch.bfloat16: Tolerance(2.0**-8, 2.0**-8),
}


# Several ranks, or micro-batches, beside one process and the whole batch, in float64 after some steps: sums in another
# order. Adam divides by the size of the gradient plus 1e-8, so a gradient that is zero but for rounding (1e-16, as of
# a bias in front of a softmax) moves its parameter by 1e-8 of the learning rate; 1e-13 was seen after sixteen steps.
SHARED_BATCH = Tolerance(1e-9, 1e-10)

# A float32 run that an older version began, and that this one ends four steps later with any backend and number of
# threads: sums in another order. Of a bias in front of a softmax the gradient is rounding alone, which Adam scales up:
# 1.3e-5 was seen there, 6e-8 elsewhere. The four steps move parameters by some 1e-3.
CONTINUED_RUN = Tolerance(1e-4, 1e-4)
