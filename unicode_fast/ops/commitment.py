"""The operator for the commitment of features to their own and their partners' codewords; differentiable."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from unicode_fast.ops import _checks, _library
from unicode_fast.reference.commitment import commitment_backward_reference, commitment_reference


def commitment_loss(  # noqa: PLR0913 - four tensors, a mask and a backend
    features: Tensor,
    index: Tensor,
    codebook: Tensor,
    weights: Tensor,
    *,
    valid: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mean squared distances of all modalities' features to their own and their partners' codewords.

    Let e_o be the codeword of modality o in a row. Then loss_m is the sum over o of weights_mo times the mean of
    |x_m - e_o|^2 over the rows valid in both m and o.

    Args:
        features: (modalities, N, D) float64, float32, float16 or bfloat16.
        index: (modalities, N) int64, from `nearest_codeword`; in [0, M) at valid rows.
        codebook: (M, D) float64, float32 or the dtype of `features`; a constant of the loss, without gradient even
            where it requires one.
        weights: (modalities, modalities) floating point, own codewords on the diagonal; without gradient. A weight of
            zero adds nothing, whatever the features hold.
        valid: (modalities, N) bool, the rows that count, or None for all. The others may hold anything, NaN included.
        backend: None takes the fastest that can run on this device. A named backend is used or refused, never
            replaced.

    Returns:
        (modalities,) float64 for float64 features, else float32; differentiable once, in `features`.

    Raises:
        TypeError: a dtype is unsupported.
        ValueError: shapes or devices differ, or `weights` requires a gradient.
        IndexError: an index at a valid row is outside [0, M). On CUDA the loss is NaN instead, because the check would
            need a synchronisation.
        BackendUnavailable: `backend` cannot run here; the message has the reason.

    Precision:
        Sums of squares in float64 on the C++ backend, in the dtype of the result on the reference; autocast has no
        effect.

    Memory:
        The forward pass also computes the gradient and keeps it; it has the size of the features.

    Source:
        Xia et al., NeurIPS 2023, Eq. 8.
    """
    _check(features, index, valid, codebook, weights, _checks.FEATURE_DTYPES)
    if weights.requires_grad:
        raise ValueError("weights must have requires_grad=False, as they get no gradient, got True")
    operator = _library.find_operator("commitment_loss", features.device, backend)
    loss: Tensor = operator(features, index, valid, codebook.detach(), weights.to(torch.float64))[0]
    return loss


def _check(  # noqa: PLR0913 - the operator's arguments
    features: Any,
    index: Any,
    valid: Any,
    codebook: Any,
    weights: Any,
    weight_dtypes: Sequence[torch.dtype] = (torch.float64,),
) -> None:
    _checks.check_features_and_codebook(features, codebook, dimensions=3)
    if features.shape[0] < 1:
        raise ValueError(f"features must have at least one modality, got shape {tuple(features.shape)}")
    _checks.check_tensor("index", index, (torch.int64,))
    _checks.check_like("index", index, features.shape[:2], "(modalities, N) of features", features, "features")
    _checks.check_tensor("weights", weights, weight_dtypes)
    size = (features.shape[0], features.shape[0])
    _checks.check_like("weights", weights, size, "(modalities, modalities)", features, "features")
    if valid is not None:
        _checks.check_tensor("valid", valid, (torch.bool,))
        _checks.check_like("valid", valid, features.shape[:2], "(modalities, N) of features", features, "features")


def _check_backward(gradient: Any, direction: Any, features: Any) -> None:
    _checks.check_tensor("features", features, _checks.FEATURE_DTYPES)
    if features.dim() != 3:
        raise ValueError(f"features must have 3 dimensions, got shape {tuple(features.shape)}")
    for name, value, shape in (("gradient", gradient, features.shape[:1]), ("direction", direction, features.shape)):
        _checks.check_tensor(name, value, _checks.FEATURE_DTYPES)
        _checks.check_like(name, value, shape, "to match features", features, "features")


def _implementation(
    features: Tensor, index: Tensor, valid: Tensor | None, codebook: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    with _checks.naming_index("index", list(index), [] if valid is None else list(valid), codebook.shape[0]):
        return commitment_reference(features, index, valid, codebook, weights)


def _fake(
    features: Tensor, index: Tensor, valid: Tensor | None, codebook: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(features.dtype, torch.float32)
    return features.new_empty(features.shape[0], dtype=dtype), features.new_empty(features.shape)


def _fake_backward(gradient: Tensor, direction: Tensor, features: Tensor) -> Tensor:
    return direction.new_empty(direction.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], inputs[0])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, operator: OpOverload, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return operator(gradient, *ctx.saved_tensors), None, None, None, None


_library.declare(
    "commitment_loss",
    "(Tensor features, Tensor index, Tensor? valid, Tensor codebook, Tensor weights) -> "
    "(Tensor loss, Tensor direction)",
    _check,
    _implementation,
    _fake,
)
_library.declare(
    "commitment_loss_backward",
    "(Tensor gradient, Tensor direction, Tensor features) -> Tensor",
    _check_backward,
    commitment_backward_reference,
    _fake_backward,
)
_library.declare_gradient("commitment_loss", _backward, _setup_context)
_library.refuse_second_gradient("commitment_loss")
