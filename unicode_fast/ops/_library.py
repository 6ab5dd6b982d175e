"""Declaration of operators to torch, and choice of the implementation of a call.

Every operator X is declared twice, with one schema, one fake and one gradient formula:

* `torch.ops.unicode_fast.X` has the faster backends. The reference is registered for it under the key
  CompositeExplicitAutograd, which torch uses on each device without an implementation of its own. A backend registers
  its implementation under "CPU" or "CUDA", from C++ (`TORCH_LIBRARY_IMPL`) or from Python (`torch.library.impl`). It
  may do so before or after the import of this module; nothing is overwritten.
* `torch.ops.unicode_fast.X_reference` is the reference on every device, even if X has a faster implementation.

A public function checks its arguments, calls `choose_backend`, and then X_reference for "reference" or X for any other
name. Both are operators, so gradients, torch.compile, autocast and error messages are the same on every backend.

Implementations run without autocast: inputs keep the dtypes of the call, and the implementation chooses the dtype of
its computation. A differentiable operator needs a second operator, X_backward, declared in the same way. X_backward
cannot be differentiated.
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
        name: of the operator.
        signature: the schema without the name, such as "(Tensor x, float y) -> Tensor".
        check: takes the schema's arguments; raises where they do not fit together. It is the only check of a direct
            call of the operator.
        implementation: takes the schema's arguments in their order.
        fake: the same for tensors without data; returns tensors of the right shape, dtype and device.
    """
    for suffix in _SUFFIXES:
        LIBRARY.define(f"{name}{suffix}{signature}", tags=(torch.Tag.pt2_compliant_tag,))
        run = _checked(check, _without_autocast(implementation))
        LIBRARY.impl(f"{name}{suffix}", run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}{suffix}", _checked(check, fake), lib=LIBRARY)


def implement(name: str, device: str, check: Callable[..., None], implementation: Callable[..., Any]) -> None:
    """Register a backend's implementation in Python for a kind of device, such as "CUDA"."""
    LIBRARY.impl(name, _checked(check, _without_autocast(implementation)), device)


def declare_gradient(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Register the gradient formula of an operator and of its twin.

    Args:
        name: of the operator.
        backward: takes the context, the backward operator of the same twin and the output gradients; returns one
            gradient or None for each input.
        setup_context: takes the context, the inputs and the output, and saves the tensors for `backward`.
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


def refuse_second_gradient(name: str, called: str | None = None) -> None:
    """Make differentiating the backward operator of `name`, and of its twin, a clear error.

    Args:
        name: of the public function.
        called: name of the operator, if it differs from that of the public function.
    """

    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(
            f"{name} can be differentiated once; its gradient has no gradient (create_graph=True, gradient penalties "
            "and second-order methods need one). Compute this term with differentiable torch operations instead."
        )

    for suffix in _SUFFIXES:
        torch.library.register_autograd(f"{NAMESPACE}::{called or name}_backward{suffix}", backward, lib=LIBRARY)


def find_operator(name: str, device: torch.device, backend: str | None, called: str | None = None) -> OpOverload:
    """The operator, or its reference twin, for a device and a backend.

    Args:
        name: of the public function.
        device: of the tensors.
        backend: of the call, or None.
        called: name of the operator, if it differs from that of the public function.

    Raises:
        BackendUnavailable: `backend` cannot run this operator here; the message has the reason.
        ValueError: there is no backend of this name.
    """
    suffix = "_reference" if _choose(name, device, backend) == "reference" else ""
    operator: OpOverload = getattr(torch.ops.unicode_fast, (called or name) + suffix).default
    return operator


def _choose(name: str, device: torch.device, backend: str | None) -> str:
    """The name of the backend, a constant for torch.compile, which cannot trace its choice."""
    return choose_backend(name, device, backend)


# As torch.compiler.assume_constant_result does; its import may import the compiler, and with it Triton.
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
