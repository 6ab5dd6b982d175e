"""A model without torch's wrappers, and its tensors by their names in that model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from unicode_fast.modules.model import UniCode

# torch.compile holds the module under this name; DataParallel and others hold it as `module`.
_COMPILED = "_orig_mod"


def unwrapped(model: Any) -> Any:
    """The module inside torch.compile, DataParallel, DistributedDataParallel or AveragedModel; others unchanged."""
    while isinstance(model, nn.Module) and not isinstance(model, UniCode):
        inner = getattr(model, _COMPILED, getattr(model, "module", None))
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def unwrapped_unicode(model: Any) -> UniCode:
    """The UniCode inside torch's wrappers.

    Raises:
        TypeError: it is no UniCode.
    """
    plain = unwrapped(model)
    if not isinstance(plain, UniCode):
        raise TypeError(f"model must be a UniCode, got {type(model).__name__}")
    return plain


def plain_model(model: Any) -> tuple[UniCode, dict[str, Tensor]]:
    """A model without wrappers, and its parameters and buffers by the names of its configuration.

    Raises:
        TypeError: it is no UniCode.
        ValueError: a module was replaced, so no model of this configuration could load the tensors.
    """
    plain = unwrapped_unicode(model)
    state: dict[str, Tensor] = plain.state_dict()
    for name in [name for name in state if _COMPILED in name]:
        state[name.replace(f"{_COMPILED}.", "")] = state.pop(name)
    for name in (*plain.shapes, *state):
        value, shape = state.get(name), plain.shapes.get(name)
        if type(value) is not Tensor or value.shape != shape:
            must = "be absent" if shape is None else f"be a tensor of shape {tuple(shape)}"
            got = "none" if value is None else f"{type(value).__name__} {tuple(value.shape)}"
            raise ValueError(
                f"model must have its original parameters and buffers to be written: {name} must {must}, got {got}"
            )
    return plain, state
