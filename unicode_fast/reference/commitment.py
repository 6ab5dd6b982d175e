"""Squared distances of features to their own and their partners' codewords, in plain PyTorch; one term of Eq. 8."""

import torch
from torch import Tensor


def commitment_reference(
    features: Tensor, index: Tensor, valid: Tensor | None, codebook: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted mean squared distances and their gradient, in one pass.

    With e the codeword of a row, R_mo the rows that are valid in modalities m and o, and n_mo their number::

        loss_m      = sum_o w_mo / n_mo  sum over R_mo of |x_m - e_o|^2
        direction_m = d loss_m / d x_m = sum_o 2 w_mo / n_mo (x_m - e_o)    at rows in R_mo

    Args:
        features: (modalities, N, D) float64, float32, float16 or bfloat16.
        index: (modalities, N) int64, the codeword of each row.
        valid: (modalities, N) bool, or None where every row is.
        codebook: (M, D) float64, float32 or the dtype of `features`.
        weights: (modalities, modalities) float64, own codewords on the diagonal, partners' beside it.

    Returns:
        loss: (modalities,) float64 for float64 features, else float32; direction: like `features`.

    Memory:
        A few times the features, in the dtype of the loss.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    codewords = codebook.to(dtype)
    losses, directions = [], []
    for m, x in enumerate(features):
        loss, direction = torch.zeros((), dtype=dtype, device=x.device), torch.zeros_like(x, dtype=dtype)
        for o, codes in enumerate(index):
            chosen = codewords.index_select(0, codes if valid is None else torch.where(valid[o], codes, 0))
            difference = x.to(dtype) - chosen
            scale = weights[m, o].to(dtype) / max(x.shape[0], 1)
            if valid is not None:
                both = valid[m] & valid[o]
                difference = torch.where(both[:, None], difference, 0)
                scale = weights[m, o].to(dtype) / both.sum().clamp(min=1)
            # A weight of zero adds nothing, whatever the features hold.
            loss = loss + torch.where(scale == 0, 0, scale * difference.square().sum())
            direction = direction + torch.where(scale == 0, 0, 2 * scale * difference)
        losses.append(loss)
        directions.append(direction.to(x.dtype))
    return torch.stack(losses), torch.stack(directions)


def commitment_backward_reference(gradient: Tensor, direction: Tensor, features: Tensor) -> Tensor:
    """Gradient in the features, (modalities, N, D); autograd needs `features` only as a dependency."""
    return (gradient[:, None, None] * direction).to(direction.dtype)
