"""Checks of a checkpoint's content before a model or an optimiser loads it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unicode_fast.config import Config, Modality
from unicode_fast.errors import few
from unicode_fast.files.untrusted import BadFile
from unicode_fast.methods import make_model
from unicode_fast.modules import UniCode

_SCALARS = (str, int, float, bool)
# Adam's state of each parameter.
_MOMENTS = ("exp_avg", "exp_avg_sq")


def check_config(saved: Any) -> None:
    """Raise BadFile if types differ from those of `checkpoint.config_to_dict`; later checks read the values."""
    fields, modalities = _entries(saved, "config", ("fields", "modalities"))
    if type(fields) is not dict or not all(type(name) is str and type(one) in _SCALARS for name, one in fields.items()):
        raise BadFile("fields of its config must be text, numbers or truth values by name")
    if type(modalities) is not dict or not all(type(name) is str for name in modalities):
        raise BadFile("modalities of its config must be a dictionary by name")
    for name, item in modalities.items():
        kind, shape = _entries(item, f"modality {name!r:.40}", ("kind", "shape"))
        if type(kind) is not str or type(shape) not in (list, tuple) or any(type(size) is not int for size in shape):
            raise BadFile(f"modality {name!r:.40} must have a kind and whole numbers as its shape, got {item!r:.80}")


def check_tensors(state: Any) -> None:
    """Raise BadFile if it is not a dictionary of tensors by name."""
    if not isinstance(state, dict):
        raise BadFile(f"its model must be a dictionary of tensors, got {type(state).__name__}")
    for name, value in state.items():
        if type(name) is not str or not isinstance(value, Tensor):
            raise BadFile(f"entry {name!r:.60} of its model must be a tensor, got {type(value).__name__}")


def check_resumed(content: Mapping[str, Any]) -> None:
    """Raise BadFile if the entries of a checkpoint that resume reads do not have the types that `train` saves."""
    progress = content["progress"]
    if type(progress) is not dict or type(progress.get("data")) is not str:
        raise BadFile("progress must be a dictionary with the checksum of the dataset as data")
    for name, least in (("seconds", 0), ("bytes", 0), ("ranks", 1)):
        value = progress.get(name, least)
        whole = type(value) is int and least <= value < 1 << 62
        if not whole and not (name == "seconds" and type(value) is float and 0 <= value < math.inf):
            raise BadFile(f"{name} of progress must be a number of at least {least}, got {value!r:.60}")
    best = progress.get("best")
    if best is not None:
        step, accuracy = _entries(best, "best of progress", ("step", "accuracy"))
        if type(step) is not int or type(accuracy) not in (int, float) or not math.isfinite(accuracy):
            raise BadFile(f"best of progress must be a step and its accuracy, got {best!r:.80}")
    changes = progress.get("changes", [])
    if type(changes) is not list or not all(type(change) is dict for change in changes):
        raise BadFile(f"changes of progress must be a list of dictionaries, got {changes!r:.80}")
    usage = content.get("usage")
    shape = (len(content["config"]["modalities"]), content["config"]["fields"].get("codewords"))
    if usage is not None and (not isinstance(usage, Tensor) or (usage.shape, usage.dtype) != (shape, torch.float64)):
        raise BadFile(f"usage must be {shape} float64, modalities by codewords, got {_shown(usage)}")
    check_generator("rng", content["rng"], torch.device("cpu"))


def check_preprocessor(saved: Any, modalities: Mapping[str, Modality]) -> dict[str, Any] | None:
    """The preprocessor of a checkpoint; None if it has none.

    Raises:
        BadFile: the entry is no preprocessor of these modalities.
    """
    # Imported here because media is above the modules.
    from unicode_fast.media.stored import checked_preprocessor

    return checked_preprocessor(saved, modalities, exactly=False)


def check_generator(name: str, state: Any, device: torch.device) -> None:
    """Raise BadFile if it is not a state of a device's generator."""
    if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.dim() != 1 or not state.is_contiguous():
        raise BadFile(f"{name} must be the bytes of a generator's state, got {_shown(state)}")
    try:
        torch.Generator(device).set_state(state.cpu())
    except RuntimeError as error:
        raise BadFile(f"{name} must be the state of a generator: {error!s:.100}") from error


def unfilled_model(config: Config, modalities: Mapping[str, Modality], state: Mapping[str, Tensor]) -> UniCode:
    """The model of a configuration on the meta device, after a check that the state fits it.

    Raises:
        BadFile: the model cannot be built, or has other tensors.
    """
    sizes = config.model
    least = len(modalities) * (sizes.temporal_layers + sizes.cpc_layers + sizes.cpc_steps)
    if least > len(state):
        raise BadFile(f"does not fit its configuration: its layers need more than {least} tensors, got {len(state)}")
    try:
        with torch.device("meta"):
            model = make_model(modalities, config)
    # Arbitrary sizes can make any layer raise any exception.
    except Exception as error:
        raise BadFile(
            f"does not fit its configuration: the model cannot be built, {type(error).__name__}: {error!s:.100}"
        ) from error
    check_state(model, state)
    return model


def check_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise BadFile if names, shapes or dtypes differ from those of a model's parameters and buffers."""
    own = model.state_dict()
    problems = [f"{name} must be {_shown(value)}, got {_shown(state.get(name))}" for name, value in _unlike(own, state)]
    problems += [f"{name} is unknown" for name in state if name not in own]
    if problems:
        raise BadFile(f"does not fit its configuration: {few(problems, '; ')}")


def _unlike(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    for name, value in own.items():
        found = state.get(name)
        if found is None or found.shape != value.shape or found.dtype != value.dtype:
            yield name, value


def check_optimizer(name: str, saved: Any, parameters: Sequence[Tensor]) -> None:
    """Checks Adam's state before it is loaded: fused kernels assume the memory layout of the parameters.

    Args:
        name: of the optimiser in the checkpoint.
        saved: the entry of the checkpoint.
        parameters: of the optimiser, in its order.

    Raises:
        BadFile: an entry is not one of Adam, or has another shape, dtype or layout than its parameter.
    """
    (state,) = _entries(saved, name, ("state",))
    if type(state) is not dict:
        raise BadFile(f"state of {name} must be a dictionary, got {type(state).__name__}")
    for index, entry in state.items():
        if type(index) is not int or not 0 <= index < len(parameters):
            raise BadFile(f"{name} must have states of {len(parameters)} parameters, got one of {index!r:.40}")
        if type(entry) is not dict or {*entry} != {"step", *_MOMENTS}:
            raise BadFile(f"state {index} of {name} must hold step, {', '.join(_MOMENTS)}, got {entry!r:.60}")
        parameter, step = parameters[index], entry["step"]
        if not isinstance(step, Tensor) or step.dim() or step.dtype not in (torch.float32, torch.float64):
            raise BadFile(f"step of state {index} of {name} must be one number, got {_shown(step)}")
        if not (0 <= step < math.inf and step == step.round()):
            raise BadFile(f"step of state {index} of {name} must be a whole number, got {float(step)}")
        for moment in _MOMENTS:
            value = entry[moment]
            if not isinstance(value, Tensor) or (value.shape, value.dtype) != (parameter.shape, parameter.dtype):
                raise BadFile(f"{moment} of state {index} of {name} must be {_shown(parameter)}, got {_shown(value)}")
            if _strides(value) != _strides(parameter):
                raise BadFile(
                    f"{moment} of state {index} of {name} must have the strides {parameter.stride()}, "
                    f"got {value.stride()}"
                )


def _strides(tensor: Tensor) -> list[int]:
    """The strides of dimensions with more than one element."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def _entries(value: Any, what: str, names: tuple[str, ...]) -> tuple[Any, ...]:
    """Required entries of a dictionary."""
    if type(value) is not dict or not {*names} <= {*value}:
        raise BadFile(f"{what} must be a dictionary with {', '.join(names)}, got {value!r:.60}")
    return tuple(value[name] for name in names)


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return "none" if value is None else type(value).__name__
    return f"{tuple(value.shape)!s:.60} {str(value.dtype).removeprefix('torch.')}"
