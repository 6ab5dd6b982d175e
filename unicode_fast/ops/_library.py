"""How operators are declared to torch, and how a call finds the implementation that it asked for.

Every operator X is declared twice, with one schema, one fake and one gradient formula:

* `torch.ops.unicode_fast.X` is what a faster backend implements. The reference is registered for it under the key
  CompositeExplicitAutograd, which torch takes for every device that has no implementation of its own. A backend adds
  its own under "CPU" or "CUDA", from C++ (`TORCH_LIBRARY_IMPL`) or from Python (`torch.library.impl`), before or after
  this module is imported; nothing here changes and nothing is overwritten.
* `torch.ops.unicode_fast.X_reference` is the reference on every device, also where X has something faster.

A public function checks its arguments, asks `choose_backend` and calls X_reference for "reference" and X for any other
name. As both are operators, gradients, torch.compile, autocast and error messages are the same on every backend.

Implementations run with autocast switched off: they get their inputs in the dtypes that the caller chose and decide
for themselves in what dtype they compute. An operator that is differentiated needs a second one, X_backward, declared
in the same way; differentiating that one raises.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from unicode_fast.backend import choose_backend

NAMESPACE = "unicode_fast"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_SUFFIXES = ("", "_reference")


def declare(
    name: str,
    signature: str,
    check: Callable[..., None],
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
) -> None:
    """Declare an operator and its reference twin, both implemented by the reference.

    Args:
        name: the operator's.
        signature: the schema without the name, as "(Tensor x, float y) -> Tensor".
        check: takes the schema's arguments; raises where they do not fit together. Nothing else has looked at those of
            whoever calls the operator itself.
        implementation: takes the schema's arguments in their order.
        fake: the same for tensors without data; gives results of the right shape, dtype and device.
    """
    for suffix in _SUFFIXES:
        LIBRARY.define(f"{name}{suffix}{signature}", tags=(torch.Tag.pt2_compliant_tag,))
        run = _checked(check, _without_autocast(implementation))
        LIBRARY.impl(f"{name}{suffix}", run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}{suffix}", _checked(check, fake), lib=LIBRARY)


def implement(name: str, device: str, check: Callable[..., None], implementation: Callable[..., Any]) -> None:
    """Register what a backend in Python runs on a kind of device, as "CUDA", in place of the reference."""
    LIBRARY.impl(name, _checked(check, _without_autocast(implementation)), device)


def declare_gradient(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Register the gradient formula of an operator and of its twin.

    Args:
        name: the operator's.
        backward: takes the context, the backward operator of the same twin and the arriving gradients; returns one
            gradient or None for each input.
        setup_context: takes the context, the inputs and the output, and keeps what `backward` needs.
    """
    for suffix in _SUFFIXES:
        backward_operator = getattr(torch.ops.unicode_fast, f"{name}_backward{suffix}").default
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}{suffix}", _bind(backward, backward_operator), setup_context=setup_context, lib=LIBRARY
        )


def declare_without_gradient(name: str, inputs: int) -> None:
    """Mark all outputs of an operator and of its twin as not differentiable."""

    def setup_context(ctx: Any, inputs: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*([output] if isinstance(output, Tensor) else output))

    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        return (None,) * inputs

    for suffix in _SUFFIXES:
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}{suffix}", backward, setup_context=setup_context, lib=LIBRARY
        )


def refuse_second_gradient(name: str) -> None:
    """Make differentiating the backward operator of `name`, and of its twin, an error that says what is missing."""

    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(
            f"{name} can be differentiated once; its gradient has no gradient (create_graph=True, gradient penalties "
            "and second-order methods need one). Compute this term with differentiable torch operations instead."
        )

    for suffix in _SUFFIXES:
        torch.library.register_autograd(f"{NAMESPACE}::{name}_backward{suffix}", backward, lib=LIBRARY)


def find_operator(name: str, device: torch.device, backend: str | None, part: str | None = None) -> OpOverload:
    """The operator, or its reference twin, that a call on this device with this backend goes to.

    Args:
        name: the public function's.
        device: where the tensors are.
        backend: that was asked for.
        part: name of the operator, where the public function calls more than the one that has its name.

    Raises:
        BackendUnavailable: `backend` cannot run this operator here; the message says why.
        ValueError: there is no backend of this name.
    """
    suffix = "_reference" if _choose(name, device, backend) == "reference" else ""
    operator: OpOverload = getattr(torch.ops.unicode_fast, (part or name) + suffix).default
    return operator


def _choose(name: str, device: torch.device, backend: str | None) -> str:
    """The choice, as one constant for torch.compile, which could not follow how it is made."""
    return choose_backend(name, device, backend)


# What torch.compiler.assume_constant_result does, which may import the compiler first, and Triton with it.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _bind(backward: Callable[..., Any], operator: OpOverload) -> Callable[..., Any]:
    return lambda ctx, *gradients: backward(ctx, operator, *gradients)


def _checked(check: Callable[..., None], function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def run(*arguments: Any) -> Any:
        check(*arguments)
        return function(*arguments)

    return run


def _without_autocast(implementation: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(implementation)
    def run(*arguments: Any) -> Any:
        device_type = _first_tensor(arguments).device.type
        if not torch.is_autocast_enabled(device_type):
            return implementation(*arguments)
        with torch.autocast(device_type, enabled=False):
            return implementation(*arguments)

    return run


def _first_tensor(arguments: Sequence[Any]) -> Tensor:
    return next(argument for argument in arguments if isinstance(argument, Tensor))
