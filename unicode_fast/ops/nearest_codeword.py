"""The operator that finds the nearest codeword of every feature vector."""

from typing import NamedTuple

import torch
from torch import Tensor

from unicode_fast.ops import _checks, _library
from unicode_fast.reference.nearest_codeword import nearest_codeword_reference


class NearestCodeword(NamedTuple):
    """What `nearest_codeword` returns.

    Attributes:
        index: (...) int64 in [0, M).
        squared_distance: (...) float64 for float64 features, else float32.
    """

    # The field hides the method of the same name of tuples, which nothing needs here.
    index: Tensor  # type: ignore[assignment]
    squared_distance: Tensor


def nearest_codeword(features: Tensor, codebook: Tensor, *, backend: str | None = None) -> NearestCodeword:
    """Index of, and squared distance to, the codeword closest to each feature vector.

    Closest means smallest squared Euclidean distance between the numbers as given. The distance of the chosen
    codeword exceeds the smallest one by a factor of at most 1 + 4 D 2^-53; of bit-identical codewords the lowest
    index wins. This holds on every backend, under autocast too.

    Args:
        features: (..., D) float64, float32, float16 or bfloat16; usually (B, T, D).
        codebook: (M, D), M >= 1, float64, float32 or the dtype of `features`, on their device. Half-precision
            features with a float32 codebook are the normal case under autocast.
        backend: None takes the fastest that can run on this device. A named backend is used or refused, never
            replaced.

    Returns:
        index: (...) int64 in [0, M); squared_distance: (...) float64 for float64 features, else float32, infinite
        where that cannot hold it. On the device of `features`, without gradient. A row that holds NaN gets index 0
        and distance NaN; a codeword that holds NaN is chosen only where all others hold NaN too.

    Raises:
        TypeError: a dtype, or the pair of dtypes, is unsupported.
        ValueError: widths or devices differ, or the codebook is empty.
        BackendUnavailable: `backend` cannot run here; the message says why.

    Precision:
        The reference compares float64 sums of squared differences. C++ and CUDA score all codewords in bfloat16,
        float16 or float32, and compare those that the bound of docs/exactness.md leaves open by such sums. A squared
        distance that float64 cannot hold, from float64 inputs above 1e154, counts as the largest number.

    Memory:
        Never N M. Reference: float64 copies of both inputs and min(N M, 2^24) distances. C++: a float64 copy of the
        codebook and its operands, and for each thread operands and candidates of up to 192 rows. CUDA: operands and
        norms of the codebook, and for each row and part of the codebook a record of 32 bytes.

    Source:
        Xia et al., NeurIPS 2023, Eq. 2.
    """
    _checks.check_features_and_codebook(features, codebook)
    operator = _library.find_operator("nearest_codeword", features.device, backend)
    rows = features.detach().reshape(-1, features.shape[-1])
    index, squared_distance = operator(rows, codebook.detach())
    return NearestCodeword(index.reshape(features.shape[:-1]), squared_distance.reshape(features.shape[:-1]))


def _fake(features: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    distance_dtype = torch.promote_types(features.dtype, torch.float32)
    rows = features.shape[0]
    return features.new_empty(rows, dtype=torch.int64), features.new_empty(rows, dtype=distance_dtype)


_library.declare(
    "nearest_codeword",
    "(Tensor features, Tensor codebook) -> (Tensor index, Tensor squared_distance)",
    nearest_codeword_reference,
    _fake,
)
_library.declare_without_gradient("nearest_codeword", inputs=2)
