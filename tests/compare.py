"""Comparisons whose message has the place and the size of a difference, and slow truths for operators."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tolerances import NO_WORSE_FACTOR, Tolerance, nearest_factor, squared_distance
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def to_float64(tensor: Tensor) -> NDArray[np.float64]:
    """A tensor's numbers, exactly, as a float64 NumPy array."""
    return tensor.detach().cpu().to(torch.float64).numpy()


def assert_close(actual: Tensor, expected: NDArray | Tensor, tolerance: Tolerance, what: str = "result") -> None:
    """Fail unless all elements agree; NaN and infinities must stand at the same places."""
    truth = to_float64(expected) if isinstance(expected, Tensor) else np.asarray(expected, dtype=np.float64)
    found = to_float64(actual)
    assert found.shape == truth.shape, f"{what} has shape {found.shape}, expected {truth.shape}"
    assert np.array_equal(np.isnan(found), np.isnan(truth)), f"{what} has NaN at other places than expected"
    allowed = tolerance.absolute + tolerance.relative * np.abs(np.nan_to_num(truth, posinf=0, neginf=0))
    with np.errstate(invalid="ignore"):
        error = np.where((found == truth) | np.isnan(truth), 0, np.abs(found - truth))
    if not np.all(error <= allowed):
        worst = np.unravel_index(np.argmax(error - allowed), error.shape)
        raise AssertionError(
            f"{what} is {found[worst]!r} at {tuple(map(int, worst))}, expected {truth[worst]!r}: "
            f"error {error[worst]:.3g}, allowed {allowed[worst]:.3g}"
        )


def assert_all_close(
    actual: Iterable[Tensor], expected: Iterable[Tensor], tolerance: Tolerance, what: str = "result"
) -> None:
    """Fail unless both have the same number of tensors, and all agree in their order."""
    for found, truth in zip(actual, expected, strict=True):
        assert_close(found, truth, tolerance, what)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def assert_no_worse(actual: Tensor, reference: Tensor, truth: Tensor, slack: Tolerance, what: str = "result") -> None:
    """Fail if the error of a result exceeds the reference's own error at the same dtype by more than the slack."""
    expected = to_float64(truth)
    found = np.abs(to_float64(actual) - expected).max(initial=0)
    own = np.abs(to_float64(reference) - expected).max(initial=0)
    allowed = NO_WORSE_FACTOR * own + slack.absolute + slack.relative * np.abs(expected).max(initial=0)
    assert found <= allowed, f"{what} errs by {found:.3g}, the reference by {own:.3g}; allowed is {allowed:.3g}"


def true_squared_distances(features: Tensor, codebook: Tensor) -> NDArray[np.float64]:
    """Float64 sums of squared float64 differences, one codeword after the other: (N, M)."""
    rows, codewords = to_float64(features), to_float64(codebook)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.stack([np.square(rows - codeword).sum(axis=1) for codeword in codewords], axis=1)


def assert_nearest(index: Tensor, distance: Tensor, features: Tensor, codebook: Tensor) -> None:
    """Fail unless nearest_codeword's promise holds for (N, D) features and an (M, D) codebook, both without NaN."""
    truth = true_squared_distances(features, codebook)
    rows, codewords = truth.shape
    assert index.dtype == torch.int64
    assert index.shape == distance.shape == (rows,)
    chosen = index.cpu().numpy()
    assert np.all((chosen >= 0) & (chosen < codewords)), "an index is out of range"
    if rows == 0:
        return
    of_chosen, smallest = truth[np.arange(rows), chosen], truth.min(axis=1)
    wrong = np.flatnonzero(of_chosen > smallest * nearest_factor(features.shape[1]))
    assert wrong.size == 0, (
        f"{wrong.size} of {rows} rows beyond the promise; row {wrong[0]} got {chosen[wrong[0]]} at "
        f"{of_chosen[wrong[0]]!r} instead of {truth[wrong[0]].argmin()} at {smallest[wrong[0]]!r}"
    )
    _, first, group = np.unique(
        codebook.cpu().view(torch.uint8).numpy(), axis=0, return_index=True, return_inverse=True
    )
    lowest = first[group.reshape(-1)]
    assert np.array_equal(lowest[chosen], chosen), "of bit-identical codewords the lowest index must win"
    with np.errstate(over="ignore"):
        expected = of_chosen.astype(np.float64 if features.dtype == torch.float64 else np.float32)
    assert_close(distance, expected, squared_distance(features.shape[1], distance.dtype), "squared distance")


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.bytes = max(self.bytes, *sizes, 0)
        return result
