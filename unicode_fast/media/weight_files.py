"""Files of published weights: found, read and checked against a network."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unicode_fast.data.layouts.ave import H5Array
from unicode_fast.errors import few
from unicode_fast.files.checked_torch import read_torch
from unicode_fast.files.optional import need
from unicode_fast.files.untrusted import BadFile

# Limits of the objects in a file of Keras, of which the published ones have less than 200, and of values in a kernel.
_MOST_OBJECTS, _MOST_VALUES = 10_000, 1 << 22
# A kernel or bias in a file of weights or of a whole model: names of the published files, and of later Keras.
_KERAS = re.compile(r"(?:model_weights/)?(\w+)/(?:\1/)?(?:\1_(W|b)_1|(kernel|bias))(?::0)?")


def file_of(weights: Any) -> Path:
    """The absolute path of a file of weights.

    Raises:
        ValueError: `weights` is no path, or that of something else than a file.
        FileNotFoundError: there is no such file.
    """
    if not isinstance(weights, (str, os.PathLike)):
        raise ValueError(f"weights must be a file, got {weights!r}")
    file = Path(weights).absolute()
    if not file.exists():
        raise FileNotFoundError(f"weights must be an existing file, got {str(weights)!r}")
    if not file.is_file():
        raise ValueError(f"weights must be a file, got {str(weights)!r}")
    return file


def load(network: nn.Module, tensors: Mapping[str, Tensor], file: Path, names: Mapping[str, str] | None = None) -> None:
    """Gives a network without values these tensors, which must be its whole state.

    Args:
        network: on the device meta.
        tensors: by their names in the file.
        file: their file, for messages.
        names: what the file calls each tensor of the network; None for the network's own names.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape or not finite.
    """
    expected = network.state_dict()
    called = names or {name: name for name in expected}
    lacking = [name for name in called.values() if name not in tensors]
    if lacking:
        raise ValueError(f"weights in {file} must have each tensor of the network, it lacks {few(lacking)}")
    unknown = [name for name in tensors if name not in called.values()]
    if unknown:
        raise ValueError(f"weights in {file} must have only tensors of the network, it also has {few(unknown)}")
    for name, own in expected.items():
        given, shape = tensors[called[name]], tuple(own.shape)
        if tuple(given.shape) != shape:
            raise ValueError(f"{called[name]} in {file} must have shape {shape}, got {tuple(given.shape)}")
        if not given.is_floating_point() or not bool(given.isfinite().all()):
            raise ValueError(f"{called[name]} in {file} must be finite floating-point numbers, got others")
    network.load_state_dict({name: tensors[called[name]].float() for name in expected}, assign=True)
    network.requires_grad_(False)


def of_torch(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of torch.save by name.

    Raises:
        ValueError: the file has another content.
    """
    try:
        content = read_torch(file)
    except BadFile as error:
        raise ValueError(f"weights in {file} must be a file of tensors: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(one, Tensor) for one in content.values()):
        raise ValueError(f"weights in {file} must be tensors by name, got another content")
    return {str(name): one for name, one in content.items()}


def of_keras(file: Path, layers: Collection[str]) -> dict[str, Tensor]:
    """The kernels and biases of convolutions in a file of Keras.

    Args:
        file: .h5 of weights or of a whole model.
        layers: their names; other layers are ignored.

    Returns:
        LAYER/kernel (out, in, height, width) and LAYER/bias (out,).

    Raises:
        ValueError: the file is no HDF5 file, an array is damaged, no number or too large, or a layer has it twice.
        MissingPackageError: h5py is not installed.
    """
    h5py = need("h5py", "media")
    paths: list[str] = []

    def keep(path: str) -> bool | None:
        paths.append(path)
        # Anything but None ends the visit.
        return len(paths) > _MOST_OBJECTS or None

    try:
        with h5py.File(file, "r") as content:
            content.visit(keep)
    # Damaged files can raise any exception.
    except Exception as error:
        raise ValueError(f"weights in {file} must be a file of Keras: {error}") from error
    found: dict[str, Tensor] = {}
    for path in filter(None, map(_KERAS.fullmatch, paths)):
        if path[1] not in layers:
            continue
        name = f"{path[1]}/{'kernel' if (path[2] or path[3]) in ('W', 'kernel') else 'bias'}"
        if name in found:
            raise ValueError(f"{name} in {file} must occur once, got {path[0]!r} too")
        array = H5Array(file, path[0])
        if array.dtype.kind != "f" or math.prod(array.shape) > _MOST_VALUES:
            raise ValueError(
                f"{name} in {file} must have at most {_MOST_VALUES} floating-point numbers, "
                f"got {array.dtype} of shape {array.shape}"
            )
        values = torch.from_numpy(array.whole().astype(np.float32, copy=False))
        # Keras keeps kernels as (height, width, in, out).
        found[name] = values.permute(3, 2, 0, 1).contiguous() if values.dim() == 4 else values
    return found
