"""The mean soft assignment of a clip's positions to codewords, and its gradient, in plain PyTorch."""

from collections.abc import Iterator

import torch
from torch import Tensor

# Number of assignments in memory at a time. 2^22 float32 numbers are 16 MiB; the paper's batch of 80 needs one chunk.
CHUNK_ELEMENTS = 2**22
# Below this squared distance the slope of the square root counts as 0; at distance 0 it would be infinite.
SMALLEST_SQUARED_DISTANCE = 1e-12


def codeword_distribution_reference(
    features: Tensor, codebook: Tensor, valid: Tensor | None, temperature: float
) -> Tensor:
    """Mean over a clip's valid positions of the softmax over codewords of the negative Euclidean distance.

    ::

        P_bk = 1/|V_b| sum_(t in V_b) softmax_k(-||z_bt - e_k||_2 / temperature)

    The squared distance is expanded, |z|^2 - 2 z.e + |e|^2, about the codebook's mean, and at least 1e-12.

    Args:
        features: (B, T, D) float64, float32, float16 or bfloat16.
        codebook: (M, D), M >= 1, float64, float32 or the dtype of `features`.
        valid: (B, T) bool, or None where every position is valid.
        temperature: greater than 0.

    Returns:
        (B, M) in the wider dtype of the two inputs, float32 at least. Zeros for a clip without a valid position.

    Memory:
        A few times max(2^22, T M) assignments, for any B, and a copy of the features of as many positions.

    Source:
        Liu et al., ACL 2022, Eq. 5; Xia et al., NeurIPS 2023, the code matching loss.
    """
    share = _share_of_position(features, codebook, valid)  # (B, T)
    result = share.new_zeros((features.shape[0], codebook.shape[0]))
    for block in _blocks(features, codebook):
        rows, codewords = _centred(features[block], codebook, share[block])
        distance = _squared_distance(rows, codewords).sqrt_()  # (block, T, M)
        probability = torch.softmax(distance / -temperature, dim=2)
        result[block] = (share[block, None] @ probability).squeeze(1)
    return result


def codeword_distribution_backward_reference(
    gradient: Tensor,
    features: Tensor,
    codebook: Tensor,
    valid: Tensor | None,
    temperature: float,
    in_codebook: bool = True,
) -> tuple[Tensor, Tensor]:
    """Gradients of `codeword_distribution_reference` in both of its inputs.

    With p the softmax at one position, d the distance, g the gradient in P and s = 1/|V_b| at valid positions and 0
    elsewhere::

        q_k = -s p_k (g_k - sum_l p_l g_l) / (2 temperature d_k)      the gradient in the squared distance
        grad z = 2 sum_k q_k (z - e_k),  grad e_k = -2 sum_(b, t) q_k (z - e_k)

    Args:
        gradient: (B, M), the gradient in the result.
        features: (B, T, D), as in the forward pass.
        codebook: (M, D), as in the forward pass.
        valid: (B, T) bool or None, as in the forward pass.
        temperature: as in the forward pass.
        in_codebook: whether to compute the second gradient.

    Returns:
        Gradients in the shapes and dtypes of `features` and `codebook`; without `in_codebook` the second is (0, D).

    Memory:
        A few times max(2^22, T M) assignments, for any B, and a copy of the features of as many positions.
    """
    share = _share_of_position(features, codebook, valid)  # (B, T)
    # Contiguous like the fakes of the operator's results, whatever the strides of the inputs.
    in_features = features.new_zeros(features.shape)
    in_codewords = share.new_zeros(codebook.shape if in_codebook else (0, codebook.shape[1]))
    for block in _blocks(features, codebook):
        rows, codewords = _centred(features[block], codebook, share[block])
        squared = _squared_distance(rows, codewords)  # (block, T, M)
        distance = squared.sqrt()
        slope = torch.softmax(distance / -temperature, dim=2)
        arriving = gradient[block, None].to(share.dtype)  # (block, 1, M)
        mean = slope @ arriving.transpose(1, 2)  # (block, T, 1)
        slope.mul_(arriving - mean).mul_(share[block, :, None] / (-2 * temperature)).div_(distance)
        slope.masked_fill_(squared <= SMALLEST_SQUARED_DISTANCE, 0)
        in_features[block] = 2 * torch.addcmul(-(slope @ codewords), rows, slope.sum(dim=2, keepdim=True))
        if in_codebook:
            slope, rows = slope.flatten(0, 1), rows.flatten(0, 1)
            in_codewords += 2 * (codewords * slope.sum(dim=0)[:, None] - slope.T @ rows)
    return in_features, in_codewords.to(codebook.dtype)


def _blocks(features: Tensor, codebook: Tensor) -> Iterator[slice]:
    """Blocks of clips whose assignments are in memory at the same time."""
    clips, positions = features.shape[:2]
    size = max(1, CHUNK_ELEMENTS // max(1, positions * codebook.shape[0]))
    return (slice(start, start + size) for start in range(0, clips, size))


def _share_of_position(features: Tensor, codebook: Tensor, valid: Tensor | None) -> Tensor:
    """The weight of each position in its clip's mean, in the dtype of the computation: (B, T)."""
    dtype = torch.promote_types(torch.promote_types(features.dtype, codebook.dtype), torch.float32)
    if valid is None:
        return torch.full(features.shape[:2], 1 / max(features.shape[1], 1), dtype=dtype, device=features.device)
    return valid.to(dtype) / valid.sum(dim=1, keepdim=True).clamp(min=1)


def _centred(features: Tensor, codebook: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Both inputs relative to the mean codeword; rows of invalid positions become zeros.

    Distances stay the same, and a large common offset costs no precision in the expanded form.
    """
    codewords = codebook.to(share.dtype)
    centre = codewords.mean(dim=0)
    return torch.where(share[:, :, None] > 0, features.to(share.dtype) - centre, 0), codewords - centre


def _squared_distance(rows: Tensor, codewords: Tensor) -> Tensor:
    flat = rows.flatten(0, 1)
    squared = torch.addmm(codewords.square().sum(dim=1), flat, codewords.T, alpha=-2)
    squared.add_(flat.square().sum(dim=1, keepdim=True)).clamp_(min=SMALLEST_SQUARED_DISTANCE)
    return squared.unflatten(0, rows.shape[:2])  # (B, T, M)
