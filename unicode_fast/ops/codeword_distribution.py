"""The operator for the mean soft assignment of a clip's positions to codewords; differentiable."""

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from unicode_fast.ops import _checks, _library
from unicode_fast.reference.codeword_distribution import (
    codeword_distribution_backward_reference,
    codeword_distribution_reference,
)


def codeword_distribution(
    features: Tensor,
    codebook: Tensor,
    *,
    valid: Tensor | None = None,
    temperature: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Mean over a clip's valid positions of the softmax over codewords of the negative Euclidean distance.

    Args:
        features: (B, T, D) float64, float32, float16 or bfloat16.
        codebook: (M, D), M >= 1, float64, float32 or the dtype of `features`, on their device.
        valid: (B, T) bool, the positions that count, or None for all. The others may hold anything, NaN included.
        temperature: divisor of the distances; greater than 0, and normal, in the dtype of the result. A number, without
            gradient.
        backend: None takes the fastest that can run on this device. A named backend is used or refused, never
            replaced.

    Returns:
        (B, M) probabilities in the wider dtype of the two inputs, float32 at least. They add up to 1; a clip without
        a valid position has zeros. Differentiable once in `features` and `codebook`. A valid position with NaN makes
        its clip's row NaN, a codeword with NaN all rows.

    Raises:
        TypeError: a dtype, or the pair of dtypes, is unsupported.
        ValueError: shapes or devices differ, the codebook is empty, or the temperature is out of range.
        BackendUnavailable: `backend` cannot run here; the message has the reason.

    Precision:
        Computed in the result's dtype, under autocast too. Squared distances are clamped at 1e-12, where the gradient
        is 0, so a feature equal to its codeword has a finite gradient.

    Memory:
        The reference holds a few times max(2^22, T M) assignments, for any B, and a copy of the features of as many
        positions. On a CPU the C++ form holds max(2^19, T M) of them.

    Source:
        Liu et al., ACL 2022; Xia et al., NeurIPS 2023, the code matching loss.
    """
    _check(features, codebook, valid, temperature)
    operator = _library.find_operator("codeword_distribution", features.device, backend)
    result: Tensor = operator(features, codebook, valid, float(temperature))
    return result


def _result_dtype(features: Tensor, codebook: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(features.dtype, codebook.dtype), torch.float32)


def _check(features: Any, codebook: Any, valid: Any, temperature: Any) -> None:
    _checks.check_features_and_codebook(features, codebook, dimensions=3)
    _checks.check_temperature(temperature, _result_dtype(features, codebook))
    if valid is not None:
        _checks.check_tensor("valid", valid, (torch.bool,))
        _checks.check_like("valid", valid, features.shape[:2], "(B, T) of features", features, "features")


def _check_backward(
    gradient: Any, features: Any, codebook: Any, valid: Any, temperature: Any, in_codebook: Any
) -> None:
    _check(features, codebook, valid, temperature)
    _checks.check_tensor("gradient", gradient, _checks.FEATURE_DTYPES)
    _checks.check_like("gradient", gradient, (features.shape[0], codebook.shape[0]), "(B, M)", features, "features")


def _fake(features: Tensor, codebook: Tensor, valid: Tensor | None, temperature: float) -> Tensor:
    return features.new_empty((features.shape[0], codebook.shape[0]), dtype=_result_dtype(features, codebook))


def _fake_backward(
    gradient: Tensor,
    features: Tensor,
    codebook: Tensor,
    valid: Tensor | None,
    temperature: float,
    in_codebook: bool,
) -> tuple[Tensor, Tensor]:
    shape = codebook.shape if in_codebook else (0, codebook.shape[1])
    return features.new_empty(features.shape), codebook.new_empty(shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, codebook, valid, ctx.temperature = inputs
    ctx.save_for_backward(features, codebook, valid)


def _backward(ctx: Any, operator: OpOverload, gradient: Tensor) -> tuple[Tensor | None, ...]:
    features, codebook, valid = ctx.saved_tensors
    needed = ctx.needs_input_grad[1]
    in_features, in_codebook = operator(gradient, features, codebook, valid, ctx.temperature, needed)
    return in_features, in_codebook if needed else None, None, None


_library.declare(
    "codeword_distribution",
    "(Tensor features, Tensor codebook, Tensor? valid, float temperature) -> Tensor",
    _check,
    codeword_distribution_reference,
    _fake,
)
_library.declare(
    "codeword_distribution_backward",
    "(Tensor gradient, Tensor features, Tensor codebook, Tensor? valid, float temperature, bool in_codebook) -> "
    "(Tensor, Tensor)",
    _check_backward,
    codeword_distribution_backward_reference,
    _fake_backward,
)
_library.declare_gradient("codeword_distribution", _backward, _setup_context)
_library.refuse_second_gradient("codeword_distribution")
