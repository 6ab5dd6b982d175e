"""Checks of shapes, dtypes and devices; each error has the argument, what it must be and what it was."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

FEATURE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
STATE_DTYPES = (torch.float64, torch.float32)


def check_tensor(name: str, value: Any, dtypes: Sequence[torch.dtype], reason: str = "") -> None:
    """Raise unless `value` is a tensor of one of these dtypes, for a reason such as " to match features"."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a sparse, nested or otherwise packed one")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be {_one_of(dtypes)}{reason}, got {_short(value.dtype)}")


def check_like(name: str, value: Any, shape: Sequence[int], meaning: str, like: Tensor, like_name: str) -> None:
    """Raise unless the tensor `value` has this shape, described by `meaning`, and lies on the device of `like`."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, {meaning}, got {tuple(value.shape)}")
    check_device(name, value, like, like_name)


def check_device(name: str, value: Any, like: Tensor, like_name: str) -> None:
    """Raise unless the tensor `value` lies on the device of `like`."""
    if value.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}, got {value.device}")


def check_codebook(name: str, codebook: Any, dtypes: Sequence[torch.dtype]) -> None:
    """Raise unless the codebook is (M, D), M and D at least 1, of one of these dtypes."""
    check_tensor(name, codebook, dtypes)
    if codebook.dim() != 2 or 0 in codebook.shape:
        raise ValueError(f"{name} must have shape (M, D), M and D at least 1, got {tuple(codebook.shape)}")


@contextmanager
def naming_index(name: str, index: Sequence[Tensor], valid: Sequence[Tensor], codewords: int) -> Iterator[None]:
    """Turn torch's error about an index out of range, of two possible types, into one that names the index.

    Args:
        name: of the list of indices.
        index: tensors of equal or different shapes.
        valid: a mask for each of them, or empty where every row is valid.
        codewords: M, upper bound of the indices.
    """
    try:
        yield
    except (IndexError, RuntimeError):
        for m, codes in enumerate(index):
            wrong = (codes < 0) | (codes >= codewords)
            found = codes[wrong & valid[m] if len(valid) else wrong]
            if found.numel():
                message = f"{name}[{m}] must be in [0, {codewords}) at valid rows, got {found[0].item()}"
                raise IndexError(message) from None
        raise


def check_features_and_codebook(features: Any, codebook: Any, dimensions: int | None = None) -> None:
    """Raise unless features (..., D), with this number of dimensions, and codebook (M, D) fit together."""
    check_tensor("features", features, FEATURE_DTYPES)
    dtypes = tuple(dict.fromkeys((*STATE_DTYPES, features.dtype)))
    check_tensor("codebook", codebook, dtypes, f" to match features of {_short(features.dtype)}")
    if dimensions is None and features.dim() < 1:
        raise ValueError("features must have shape (..., D), got a tensor without dimensions")
    if dimensions is not None and features.dim() != dimensions:
        raise ValueError(f"features must have {dimensions} dimensions, got shape {tuple(features.shape)}")
    if features.shape[-1] < 1:
        raise ValueError(f"features must have a width of at least 1, got shape {tuple(features.shape)}")
    if codebook.dim() != 2 or codebook.shape[1] != features.shape[-1]:
        raise ValueError(
            f"codebook must have shape (M, {features.shape[-1]}) to match features of shape {tuple(features.shape)}, "
            f"got {tuple(codebook.shape)}"
        )
    if codebook.shape[0] < 1:
        raise ValueError(f"codebook must have at least one codeword, got shape {tuple(codebook.shape)}")
    if codebook.device != features.device:
        raise ValueError(f"codebook must be on the device of features, {features.device}, got {codebook.device}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise unless `value` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r:.60}")


def check_group(group: Any) -> None:
    """Raise unless `group` is a ProcessGroup or None."""
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a ProcessGroup or None, got {type(group).__name__}")


def check_temperature(temperature: Any, dtype: torch.dtype) -> None:
    """Raise unless the temperature, a number, is finite and a normal number of `dtype` above 0."""
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature must be a number, got {type(temperature).__name__}")
    limits = torch.finfo(dtype)
    # A quotient by a subnormal number overflows.
    if not limits.smallest_normal <= temperature <= limits.max:
        least = f"at least {limits.smallest_normal}, the smallest normal number,"
        raise ValueError(f"temperature must be finite and {least} in {_short(dtype)}, got {temperature}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _one_of(dtypes: Sequence[torch.dtype]) -> str:
    *first, last = (_short(dtype) for dtype in dtypes)
    return f"{', '.join(first)} or {last}" if first else last
