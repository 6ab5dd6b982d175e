"""Clipping and Adam in one operator, beside torch's functions."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import ON_HOST, normal
from compare import assert_all_close, assert_close
from tolerances import ADAM, EXACT
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

from unicode_fast import backend
from unicode_fast.training.optimiser import ClippedAdam

pytestmark = pytest.mark.skipif(ON_HOST or not backend.compiled(), reason="the C++ extension is not there")

OPERATORS = torch.ops.unicode_fast_layers
# Sizes around a register and a thread's block; the second group never has a parameter with a gradient.
SHAPES: list[list[tuple[int, ...]]] = [
    [(3, 5), (), (31,), (33,)],
    [(4,)],
    [(0, 2), (3, 2, 5, 7)],
    [(70001,), (64, 512)],
]
STEPS = 5


def parameters(dtype: torch.dtype = torch.float32) -> list[list[Parameter]]:
    return [
        [Parameter(normal(*shape, seed=10 * g + n).to(dtype)) for n, shape in enumerate(shapes)]
        for g, shapes in enumerate(SHAPES)
    ]


def gradients(groups: list[list[Parameter]], step: int) -> None:
    """Norms of the groups lie on both sides of the largest."""
    for g, group in enumerate(groups):
        for n, parameter in enumerate(group):
            drawn = normal(*parameter.shape, seed=100 * step + 10 * g + n) * 10.0 ** (2 - 2 * g - step)
            parameter.grad = None if g == 1 else drawn.to(parameter.dtype)


def by_torch(optimizer: torch.optim.Optimizer, groups: list[list[Parameter]], most: float) -> None:
    for group in groups:
        clip_grad_norm_(group, most)
    optimizer.step()


def state_of(optimizer: torch.optim.Optimizer, groups: list[list[Parameter]]) -> list[Tensor]:
    """All parameters and moments."""
    flat = [parameter for group in groups for parameter in group]
    return [*flat, *(tensor for parameter in flat for tensor in optimizer.state[parameter].values())]


def trained(steps: int = STEPS, most: float = 0.5, groups: list[list[Parameter]] | None = None) -> list[Tensor]:
    groups = parameters() if groups is None else groups
    optimizer = ClippedAdam(groups, 1e-2, most)
    for step in range(steps):
        gradients(groups, step)
        optimizer.step()
    return [tensor.detach() for tensor in state_of(optimizer, groups)]


@pytest.mark.parametrize("most", [0.5, math.inf])
def test_result(most: float) -> None:
    """That of torch in float64, also after a checkpoint of torch's optimiser and into one."""
    groups, exact = parameters(), parameters(torch.float64)
    optimizer = ClippedAdam(groups, 1e-2, most)
    truth = torch.optim.Adam([parameter for group in exact for parameter in group], 1e-2)
    for step in range(2 * STEPS):
        gradients(groups, step % STEPS), gradients(exact, step % STEPS)
        optimizer.step()
        by_torch(truth, exact, most)
        if step == STEPS:
            theirs = torch.optim.Adam([parameter for group in groups for parameter in group], 1e-2)
            theirs.load_state_dict(optimizer.state_dict())
            optimizer = ClippedAdam(groups, 1e-2, most)
            optimizer.load_state_dict(theirs.state_dict())
    for found, expected in zip(state_of(optimizer, groups), state_of(truth, exact), strict=True):
        assert_close(found.detach(), expected.detach(), ADAM)


def test_gradients_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator changes none, and torch's function is not called."""
    monkeypatch.delattr("unicode_fast.training.optimiser.clip_grad_norm_")
    groups = parameters()
    optimizer = ClippedAdam(groups, 1e-2, 0.5)
    for step in range(3):
        gradients(groups, step)
        before = [parameter.grad.clone() for group in groups for parameter in group if parameter.grad is not None]
        optimizer.step()
        after = [parameter.grad for group in groups for parameter in group if parameter.grad is not None]
        assert_all_close(after, before, EXACT)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads(threads: int, set_threads: Callable[[int], None]) -> None:
    set_threads(1)
    expected = trained()
    set_threads(threads)
    assert_all_close(trained(), expected, EXACT)


def test_layouts() -> None:
    """Parameters, gradients and loaded moments may differ in their order in memory."""
    groups = parameters()
    weight = groups[2][1]
    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    optimizer = ClippedAdam(groups, 1e-2, 0.5)
    for step in range(STEPS):
        gradients(groups, step)
        assert weight.grad is not None and weight.grad.is_contiguous()
        if step == 2:
            for name in ("exp_avg", "exp_avg_sq"):
                optimizer.state[weight][name] = optimizer.state[weight][name].contiguous()
        optimizer.step()
    assert not weight.is_contiguous()
    expected = trained()
    for found, other in zip(state_of(optimizer, groups), expected, strict=True):
        # The norm of a group is added up in the order of memory.
        assert_close(found.detach(), other, ADAM)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite(value: float) -> None:
    """As clip_grad_norm_: NaN makes its whole group NaN, infinity makes itself NaN and all others 0."""
    groups = parameters()
    optimizer = ClippedAdam(groups, 1e-2, 0.5)
    gradients(groups, 0)
    optimizer.step()
    expected = copy.deepcopy(groups)
    gradients(groups, 1)
    assert groups[0][0].grad is not None
    groups[0][0].grad[1, 1] = value
    for group, copies in zip(groups, expected, strict=True):
        for parameter, other in zip(group, copies, strict=True):
            other.grad = None if parameter.grad is None else parameter.grad.clone()
    truth = torch.optim.Adam([parameter for group in expected for parameter in group], 1e-2)
    truth.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()
    by_torch(truth, expected, 0.5)
    for found, other in zip(state_of(optimizer, groups), state_of(truth, expected), strict=True):
        assert_close(found.detach(), other.detach(), ADAM)
    assert groups[0][0].isnan().sum() == (groups[0][0].numel() if math.isnan(value) else 1)


def test_graph_of_former_parameters() -> None:
    """A backward pass through numbers that the step has replaced is refused, as after torch's optimisers."""
    (weight,) = group = [Parameter(torch.ones(2, 2))]
    optimizer = ClippedAdam([group], 1e-2)
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    loss = (weight @ weight).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_closure() -> None:
    with pytest.raises(ValueError, match="closure must be None"):
        ClippedAdam(parameters(), 1e-2).step(lambda: 0.0)


def arguments(**changes: Any) -> list[Any]:
    lists = {name: [torch.ones(2, 3), torch.ones(4)] for name in ("parameters", "gradients", "means", "squares")}
    whole: dict[str, Any] = {**lists, "steps": [torch.ones(()), torch.ones(())], "sizes": [1, 1]}
    return [*(whole | changes).values(), 0.5, 1e-3, 0.9, 0.999, 1e-8]


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"gradients": [torch.ones(2, 3)]}, ValueError, "gradients must have a tensor for each of 2 parameters, got 1"),
    ({"steps": []}, ValueError, "steps must have a tensor for each of 2 parameters, got 0"),
    ({"parameters": [torch.ones(2, 3), torch.ones(4).double()]}, TypeError, r"parameters\[1\] must be float32"),
    ({"parameters": [torch.ones(2, 6)[:, ::2], torch.ones(4)]}, ValueError, r"parameters\[0\] .* strides \(6, 2\)"),
    ({"means": [torch.ones(2, 3), torch.ones(5)]}, ValueError, r"means\[1\] must have shape \(4,\).* got \(5,\)"),
    ({"squares": [torch.ones(2, 3), torch.ones(4).half()]}, TypeError, r"squares\[1\] must be float32, got float16"),
    ({"steps": [torch.ones(()), torch.ones(1)]}, ValueError, r"steps\[1\] must have shape \(\), a number, got \(1,\)"),
    ({"sizes": [1, 2]}, ValueError, r"sizes must add up to the 2 parameters, got \(1, 2\)"),
    ({"sizes": [3, -1]}, ValueError, r"sizes must add up to the 2 parameters, got \(3, -1\)"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        OPERATORS.clip_and_adam(*arguments(**changes))
