"""What a checkpoint says, looked at before a model or an optimiser is given it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unicode_fast.config import Config, Modality
from unicode_fast.errors import few
from unicode_fast.files.untrusted import BadFile
from unicode_fast.modules import UniCode

_SCALARS = (str, int, float, bool)
# Of an optimiser that is Adam, for each parameter.
_MOMENTS = ("exp_avg", "exp_avg_sq")


def check_config(saved: Any) -> None:
    """Raise BadFile where it is not of the types that `checkpoint.config_to_dict` gives; values are looked at later."""
    fields, modalities = _parts(saved, "config", ("fields", "modalities"))
    if type(fields) is not dict or not all(type(name) is str and type(one) in _SCALARS for name, one in fields.items()):
        raise BadFile("fields of its config must be text, numbers or truth values by name")
    if type(modalities) is not dict or not all(type(name) is str for name in modalities):
        raise BadFile("modalities of its config must be a dictionary by name")
    for name, item in modalities.items():
        kind, shape = _parts(item, f"modality {name!r:.40}", ("kind", "shape"))
        if type(kind) is not str or type(shape) not in (list, tuple) or any(type(size) is not int for size in shape):
            raise BadFile(f"modality {name!r:.40} must have a kind and whole numbers as its shape, got {item!r:.80}")


def check_tensors(state: Any) -> None:
    """Raise BadFile where it is no dictionary of tensors by name."""
    if not isinstance(state, dict):
        raise BadFile(f"its model must be a dictionary of tensors, got {type(state).__name__}")
    for name, value in state.items():
        if type(name) is not str or not isinstance(value, Tensor):
            raise BadFile(f"entry {name!r:.60} of its model must be a tensor, got {type(value).__name__}")


def check_resumed(content: Mapping[str, Any]) -> None:
    """Raise BadFile where what a run goes on from is not of the types that `train` saves."""
    progress = content["progress"]
    if type(progress) is not dict or type(progress.get("data")) is not str:
        raise BadFile("progress must be a dictionary that says what data were trained on")
    for name, least in (("seconds", 0), ("bytes", 0), ("ranks", 1)):
        value = progress.get(name, least)
        whole = type(value) is int and least <= value < 1 << 62
        if not whole and not (name == "seconds" and type(value) is float and 0 <= value < math.inf):
            raise BadFile(f"{name} of progress must be a number of at least {least}, got {value!r:.60}")
    best = progress.get("best")
    if best is not None:
        step, accuracy = _parts(best, "best of progress", ("step", "accuracy"))
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


def check_generator(name: str, state: Any, device: torch.device) -> None:
    """Raise BadFile where it is no state of a device's generator."""
    if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.dim() != 1 or not state.is_contiguous():
        raise BadFile(f"{name} must be the bytes of a generator's state, got {_shown(state)}")
    try:
        torch.Generator(device).set_state(state.cpu())
    except RuntimeError as error:
        raise BadFile(f"{name} is no state of a generator: {error!s:.100}") from error


def unfilled_model(config: Config, modalities: Mapping[str, Modality], state: Mapping[str, Tensor]) -> UniCode:
    """The model of a configuration without its memory, on the device meta, after a look at whether the state fits it.

    Raises:
        BadFile: no such model can be built, or it has other tensors.
    """
    sizes = config.model
    least = len(modalities) * (sizes.temporal_layers + sizes.cpc_layers + sizes.cpc_steps)
    if least > len(state):
        raise BadFile(
            f"does not fit its configuration: it has layers of more than {least} tensors, and holds {len(state)}"
        )
    try:
        with torch.device("meta"):
            model = UniCode(modalities, config)
    # Sizes that nobody has chosen can make any layer raise anything.
    except Exception as error:
        raise BadFile(
            f"does not fit its configuration: no model of it can be built, {type(error).__name__}: {error!s:.100}"
        ) from error
    check_state(model, state)
    return model


def check_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise BadFile where names, shapes and dtypes are not those of a model's parameters and buffers."""
    own = model.state_dict()
    problems = [f"{name} must be {_shown(value)}, got {_shown(state.get(name))}" for name, value in _unlike(own, state)]
    problems += [f"{name} is not of it" for name in state if name not in own]
    if problems:
        raise BadFile(f"does not fit its configuration: {few(problems, '; ')}")


def _unlike(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    for name, value in own.items():
        found = state.get(name)
        if found is None or found.shape != value.shape or found.dtype != value.dtype:
            yield name, value


def check_optimizer(name: str, saved: Any, parameters: Sequence[Tensor]) -> None:
    """Look at Adam's state before it is loaded: fused kernels take its memory to be laid out as the parameters are.

    Args:
        name: of the optimiser in the checkpoint.
        saved: what is there.
        parameters: of the optimiser, in its order.

    Raises:
        BadFile: an entry is of another shape, dtype or layout than its parameter, or is none of Adam's.
    """
    (state,) = _parts(saved, name, ("state",))
    if type(state) is not dict:
        raise BadFile(f"state of {name} must be a dictionary, got {type(state).__name__}")
    for index, entry in state.items():
        if type(index) is not int or not 0 <= index < len(parameters):
            raise BadFile(f"{name} has a state of parameter {index!r:.40}, of {len(parameters)}")
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
    """Those that mean something."""
    return [step for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def _parts(value: Any, what: str, names: tuple[str, ...]) -> tuple[Any, ...]:
    """Parts of a dictionary that must be there."""
    if type(value) is not dict or not {*names} <= {*value}:
        raise BadFile(f"{what} must be a dictionary with {', '.join(names)}, got {value!r:.60}")
    return tuple(value[name] for name in names)


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return "none" if value is None else type(value).__name__
    return f"{tuple(value.shape)!s:.60} {str(value.dtype).removeprefix('torch.')}"
