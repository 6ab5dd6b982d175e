"""The nearest codeword in plain PyTorch: every distance from direct differences, in float64."""

import torch
from torch import Tensor

# Number of distances in memory at a time. 2^24 float64 numbers are 128 MiB; the training sizes need one chunk.
CHUNK_ELEMENTS = 2**24


def nearest_codeword_reference(features: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Index of, and squared distance to, the codeword closest to each feature vector.

    ::

        index_i = argmin_j sum_d (x_id - e_jd)^2

    Each distance is a float64 sum of squares of float64 differences. Its error is relative to the distance itself, at
    most D 2^-53 for given differences. The error of the expanded form |x|^2 - 2 x.e + |e|^2 grows with the norms. The
    search compares square roots, which adds at most 2^-51 for D >= 2 and nothing for D = 1. So the chosen distance is
    within the factor 1 + 4 D 2^-53 of the smallest.

    A matrix product with a shortlist is up to twelve times as fast. But some codebooks have more near-ties than a
    shortlist of fixed length, and a list of data-dependent length needs a synchronisation.

    Args:
        features: (N, D) float64, float32, float16 or bfloat16.
        codebook: (M, D), M >= 1, float64, float32 or the dtype of `features`.

    Returns:
        index: (N,) int64, the lowest of equally near codewords; squared_distance: (N,) float64 for float64 features,
        else float32. NaN counts as larger than any distance; a distance that overflows is smaller only than NaN.

    Memory:
        A float64 copy of both inputs and min(N M, 2^24) distances.

    Source:
        Xia et al., NeurIPS 2023, Eq. 2.
    """
    rows, codewords = features.to(torch.float64), codebook.to(torch.float64)
    chunk = max(1, CHUNK_ELEMENTS // codewords.shape[0])
    index = torch.cat([_nearest(block, codewords) for block in rows.split(chunk)])
    squared_distance = (rows - codewords[index]).square().sum(dim=1)
    return index, squared_distance.to(torch.promote_types(features.dtype, torch.float32))


def _nearest(rows: Tensor, codewords: Tensor) -> Tensor:
    distance = torch.cdist(rows, codewords, compute_mode="donot_use_mm_for_euclid_dist")  # (N, M)
    largest = torch.finfo(torch.float64).max
    return distance.nan_to_num_(nan=torch.inf, posinf=largest).argmin(dim=1)
