"""Every tolerance of the tests, each with its reason. Numbers are relative unless stated otherwise.

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
    """The largest ratio of the chosen distance to the smallest one.

    Two float64 sums of the same D non-negative terms in different orders differ by at most about 2 D u. Two codewords
    are compared. This is the promise in the docstring of nearest_codeword.
    """
    return 1 + 4 * width * 2.0**-53


def squared_distance(width: int, dtype: torch.dtype) -> Tolerance:
    """Of nearest_codeword's distance: a float64 sum in another order, then one rounding to the dtype of the result.

    The absolute part is the smallest subnormal: below the normal numbers rounding is no longer relative.
    """
    return Tolerance(2 * width * 2.0**-53 + UNIT_ROUNDOFF[dtype], torch.finfo(dtype).smallest_normal * 2.0**-23)


def codebook_update(dtype: torch.dtype) -> Tolerance:
    """Of counts, sums and codewords after a few updates of at most some hundred rows.

    The reference computes in float64, where sums of some hundred numbers of order one agree to 1e-13 in any order. It
    rounds once to the state's dtype; a few updates round a few times.
    """
    return Tolerance(1e-12, 1e-12) if dtype == torch.float64 else Tolerance(4 * UNIT_ROUNDOFF[dtype], 1e-12)


# The affine form of the sequential update beside the original loop, in float64: the same products and sums of
# non-negative weights in another order.
AFFINE_FORM = Tolerance(1e-12, 1e-12)


# Of sums of some ten thousand float64 numbers of order one in another order. Their errors add up as a random walk, and
# the sums themselves may cancel.
MANY_ROWS = Tolerance(1e-12, 1e-11)


def codeword_distribution(width: int, dtype: torch.dtype) -> Tolerance:
    """Of probabilities of order 1/M and less, from features and codewords of order one.

    The expanded squared distance q ~ 2 D has an error of D u q, the distance half of it. The softmax turns an error of
    the distance, divided by the temperature (0.3 at least in these tests), into a relative error.
    """
    error = 4 * width**1.5 * UNIT_ROUNDOFF[dtype]
    return Tolerance(error, error * 1e-3)


def codeword_distribution_gradient(width: int, dtype: torch.dtype) -> Tolerance:
    """Of its gradients: the error of the probabilities again, in sums with cancellation of terms of order one."""
    error = 16 * width**1.5 * UNIT_ROUNDOFF[dtype]
    return Tolerance(error, error)


def cross_info_nce(largest_score: float, dtype: torch.dtype) -> Tolerance:
    """Of losses: scores up to `largest_score` cause errors of some u times themselves in differences of order one.

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


# Of a loss whose scores are of order one, from factors with eleven bits each.
CROSS_INFO_NCE_TF32 = Tolerance(2.0**-10)

# Largest ratio of another backend's error to the reference's own error, at the same dtype and against float64. The
# backend adds in another order, which causes at most the same error again.
NO_WORSE_FACTOR = 2.0


def transformer_layer(truth: torch.Tensor) -> Tolerance:
    """Of a layer's output, or of a gradient, in float32 from inputs of order one.

    Some ten products follow each other, each of up to some hundred terms, whose errors add up as a random walk. Terms
    cancel, so the error is one of the largest number. 16 u were measured, over five instruction sets.
    """
    return Tolerance(0.0, 64 * UNIT_ROUNDOFF[torch.float32] * truth.abs().max().item())


# Of parameters of order one and moments after ten steps of Adam with rate 1e-2 in float32. A moment is a sum of ten
# terms, each rounded a few times, and a step is the ratio of two. 28 u were measured.
ADAM = Tolerance(64 * UNIT_ROUNDOFF[torch.float32], 64 * UNIT_ROUNDOFF[torch.float32] * 1e-2)

# Of CLUB's gradients, beside the reference's own error, which may happen to be smaller than a rounding.
CLUB = Tolerance(8 * UNIT_ROUNDOFF[torch.float32], 8 * UNIT_ROUNDOFF[torch.float32])


def assignment(largest_score: float, truth: torch.Tensor) -> Tolerance:
    """Of a term of the assignment loss, or its gradient, in float32 from scores up to `largest_score`.

    The softmax turns the rounding of a score into a relative error of a probability. Terms of sums cancel, so the error
    is one of the largest number.
    """
    largest = truth.abs().max().item() if truth.numel() else 0.0
    return Tolerance(0.0, 16 * UNIT_ROUNDOFF[torch.float32] * max(1.0, largest_score) * max(1.0, largest))


def balanced_assignment(largest_score: float, rounds: int) -> Tolerance:
    """Of probabilities in float32 from scores, times their sharpness, up to `largest_score`.

    Each round rounds a logit some times and adds up columns, 64 numbers of one in float32. Scaling columns and rows
    enlarges no error of a logit. An error of a logit is a relative one of its exponential. Those below normal numbers
    are 0.
    """
    error = (rounds + 1) * UNIT_ROUNDOFF[torch.float32] * (4 * largest_score + 64)
    return Tolerance(error, 2 * torch.finfo(torch.float32).smallest_normal)


# torch.autograd.gradcheck in float64 with its default difference of 1e-6. Central differences of functions of order one
# err by about 1e-12 from its square and by 2^-53 / 1e-6 = 1e-10 from rounding; with slack for curvature.
GRADCHECK = Tolerance(1e-5, 1e-7)

# Mean number of codewords that the half-precision search leaves open for a row of normal numbers: it was 1.02 to 1.11.
MOST_COMPARED = 1.5

# Statistical tests use fixed seeds, so they cannot flake. The bound limits how unlikely the result of the generator may
# be. With five standard errors a true hypothesis fails after a change of the seed with probability 6e-7.
STANDARD_ERRORS = 5.0

# For pytest.approx on losses in float64: sums of some thousand terms of order one, in another order.
FLOAT64 = {"rel": 1e-10, "abs": 1e-12}

# Losses beside loops over clips, in float64: sums of some hundred terms of order one in another order. In gradients the
# expansion of distances, divided by the temperature 0.05 of the assignment, enlarges roundings; 1.5e-10 was measured.
NAIVE_LOSS = Tolerance(1e-10, 1e-12)
NAIVE_GRADIENT = Tolerance(1e-9, 1e-11)

# Sums of some ten thousand squares of order one, in another order. bfloat16 rounds the gradient once, relative 2^-9.
# Gradients that cancel keep the absolute error of their terms.
COMMITMENT = {
    torch.float64: Tolerance(1e-12, 1e-12),
    torch.float32: Tolerance(1e-5, 1e-6),
    torch.bfloat16: Tolerance(2.0**-8, 2.0**-8),
}


# Several ranks, or micro-batches, beside one process and the whole batch, in float64 after some steps: sums in another
# order. A bias in front of a softmax has a gradient of rounding alone, 1e-16. Adam divides it by its size plus 1e-8, so
# the bias moves by 1e-8 of the learning rate. After sixteen steps 1e-13 was measured.
SHARED_BATCH = Tolerance(1e-9, 1e-10)

# A float32 run of an older version that this version continues for four steps, with any backend and number of threads:
# sums in another order. A bias in front of a softmax has a gradient of rounding alone, which Adam scales up. There
# 1.3e-5 was measured, elsewhere 6e-8. The four steps move parameters by some 1e-3.
CONTINUED_RUN = Tolerance(1e-4, 1e-4)
