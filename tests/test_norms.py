"""Norms and squared errors by the operators for CPUs, beside torch's functions in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from cases import ON_HOST, normal, strided
from compare import assert_all_close, assert_close
from tolerances import EXACT, transformer_layer
from torch import Tensor
from torch.nn import functional as F

from unicode_fast import backend, losses
from unicode_fast.modules.feature_norm import FeatureNorm

pytestmark = pytest.mark.skipif(ON_HOST or not backend.compiled(), reason="the C++ extension is not there")

OPERATORS = torch.ops.unicode_fast_layers
# Sizes around a register, a block of 64 rows and a thread's columns or numbers.
SIZES = [(1, 1, 5), (5, 10, 128), (3, 7, 15), (13, 5, 130), (40, 11, 200)]


def mask_of(clips: int, length: int, masked: bool) -> Tensor | None:
    return tiny.mask_of([1 + clip * length // clips for clip in range(clips)], length) if masked else None


def results(function: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    """Output of a function of tensors and, from a random gradient in it, the gradients in them."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = function(*leaves)
    output.backward(normal(*output.shape, seed=9).to(output.dtype))
    found = [output.detach()]
    for leaf in leaves:
        assert leaf.grad is not None
        found.append(leaf.grad)
    return found


def check(own: Callable[..., Tensor], exact: Callable[..., Tensor], *tensors: Tensor) -> None:
    """Fail unless the first function agrees in float32 with the second in float64."""
    expected = results(exact, *(tensor.double() for tensor in tensors))
    for found, truth in zip(results(own, *tensors), expected, strict=True):
        assert_close(found, truth, transformer_layer(truth))


def added_norm(factors: Tensor | None) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The norm of first + second * factors by the operator and by torch, as functions of two tensors and parameters."""

    def by_torch(first: Tensor, second: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        added = first + (second if factors is None else second * factors.double())
        return F.layer_norm(added, (first.shape[-1],), weight, bias, 1e-3)

    return lambda first, second, *parameters: OPERATORS.add_norm(first, second, factors, *parameters, 1e-3), by_torch


def norm_inputs(clips: int, length: int, width: int) -> list[Tensor]:
    shapes = ((clips, length, width), (clips, length, width), (width,), (width,))
    return [normal(*shape, seed=number) + number for number, shape in enumerate(shapes)]


@pytest.mark.parametrize("dropout", ["none", "by clip", "by position"])
@pytest.mark.parametrize("sizes", SIZES)
def test_add_norm(sizes: tuple[int, int, int], dropout: str) -> None:
    """With factors in the order of clips, or of positions as attention draws them."""
    clips, length, width = sizes
    by_position = (normal(length, clips, width, seed=7) > 0).float().transpose(0, 1) * 1.5
    factors = {"none": None, "by clip": by_position.contiguous(), "by position": by_position}[dropout]
    check(*added_norm(factors), *norm_inputs(*sizes))


def test_add_norm_of_any_layout() -> None:
    tensors = norm_inputs(4, 6, 20)
    factors = (normal(4, 6, 20, seed=7) > 0).float()
    expected = results(added_norm(factors)[0], *tensors)
    found = results(added_norm(strided(factors))[0], *(strided(tensor) for tensor in tensors))
    assert_all_close(found, expected, EXACT)
    assert [tensor.shape for tensor in results(added_norm(None)[0], *norm_inputs(0, 6, 20))[:2]] == [(0, 6, 20)] * 2


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_feature_norm(sizes: tuple[int, int, int], masked: bool) -> None:
    mask = mask_of(*sizes[:2], masked)
    norm = FeatureNorm(sizes[2])
    for part in range(3):

        def normalise(z: Tensor, part: int = part) -> Tensor:
            normalised, moments = norm(z, mask)
            return normalised if part == 0 else moments[part - 1]

        z = 3 + 2 * normal(*sizes)
        if part == 0:
            check(normalise, normalise, z)
        else:
            truth = normalise(z.double())
            assert_close(normalise(z.requires_grad_()), truth, transformer_layer(truth))
            assert not normalise(z).requires_grad


def test_feature_norm_leaves_out_invalid_positions() -> None:
    """Whatever they hold, others do not change; without a valid one the moments are 0."""
    z, mask = normal(4, 5, 70), tiny.mask_of([5, 2, 3, 0], 5)
    odd = torch.where(mask.unsqueeze(-1), z, math.nan)
    norm = FeatureNorm(70)
    (found, moments), (expected, truth) = norm(odd, mask), norm(z, mask)
    assert_all_close([found[mask], *moments], [expected[mask], *truth], EXACT)
    _, moments = norm(odd, torch.zeros_like(mask))
    assert not any(moment.any() for moment in moments)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), *SIZES, (4, 3, 7, 7, 16), (70, 2, 5, 65)])
def test_squared_error(shape: tuple[int, ...], masked: bool) -> None:
    mask = mask_of(*shape[:2], masked)
    decoded, target = normal(*shape), normal(*shape, seed=1)

    def error(one: Tensor, other: Tensor) -> Tensor:
        return losses.reconstruction(one, other, mask)

    check(error, error, decoded, target)
    # A target without gradient, and maps with their channels last.
    check(lambda x: error(x, target), lambda x: error(x, target.double()), decoded)
    assert_all_close(results(error, strided(decoded), strided(target)), results(error, decoded, target), EXACT)


def test_squared_error_leaves_out_invalid_positions() -> None:
    decoded, target, mask = normal(3, 4, 20), normal(3, 4, 20, seed=1), tiny.mask_of([4, 0, 2], 4)

    def error(one: Tensor, other: Tensor) -> Tensor:
        return losses.reconstruction(one, other, mask)

    odd = torch.where(mask.unsqueeze(-1), decoded, math.nan)
    assert_all_close(results(error, odd, target), results(error, decoded, target), EXACT)
    nothing = losses.reconstruction(decoded, target, torch.zeros_like(mask))
    assert nothing == 0
    assert losses.reconstruction(torch.where(mask.unsqueeze(-1), math.nan, decoded), target, mask).isnan()


@pytest.mark.parametrize("threads", [2, 3])
def test_threads(threads: int, set_threads: Callable[[int], None]) -> None:
    tensors, norm, mask = norm_inputs(40, 11, 200), FeatureNorm(200), mask_of(40, 11, True)
    calls: list[Callable[[], list[Tensor]]] = [
        lambda: results(added_norm(None)[0], *tensors),
        lambda: results(lambda z: norm(z, mask)[0], tensors[0]),
        lambda: results(lambda x, y: losses.reconstruction(x, y, mask), *tensors[:2]),
    ]
    set_threads(1)
    expected = [call() for call in calls]
    set_threads(threads)
    for call, truth in zip(calls, expected, strict=True):
        assert_all_close(call(), truth, EXACT)


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch computes what the operators do not: other dtypes, under autocast, with the reference forced."""
    z, norm = normal(2, 3, 4), FeatureNorm(4)
    calls: list[str] = []
    own = {name: getattr(OPERATORS, name) for name in ("feature_norm", "squared_error")}
    for name, operator in own.items():
        noted = lambda *inputs, name=name, operator=operator: calls.append(name) or operator(*inputs)  # noqa: E731
        monkeypatch.setattr(OPERATORS, name, noted)

    def by_operators(x: Tensor = z, target: Tensor = z) -> bool:
        calls.clear()
        norm(x), losses.reconstruction(x, target)
        assert calls in ([], ["feature_norm"], ["feature_norm", "squared_error"])
        return len(calls) == 2

    assert by_operators()
    assert not by_operators(z.double(), z.double())
    assert not by_operators(z, z.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not by_operators()
    monkeypatch.setattr(backend, "_FORCED", "reference")
    assert not by_operators()


ONCE: list[tuple[str, tuple[Any, ...]]] = [
    ("add_norm", (normal(2, 3, 4), None, torch.ones(4), torch.ones(4), 1e-5)),
    ("feature_norm", (None, 1e-5)),
    ("squared_error", (normal(2, 3, 4, seed=1), None)),
]


@pytest.mark.parametrize(("operator", "arguments"), ONCE)
def test_differentiated_once(operator: str, arguments: tuple[Any, ...]) -> None:
    z = normal(2, 3, 4).requires_grad_()
    found = getattr(OPERATORS, operator)(z, *arguments)
    total = (found[0] if isinstance(found, tuple) else found).sum()
    with pytest.raises(RuntimeError, match="can be differentiated once on a CPU in float32"):
        torch.autograd.grad(total, z, create_graph=True)


Z, W = normal(2, 3, 4), torch.ones(4)
BAD: list[tuple[str, tuple[Any, ...], type[Exception], str]] = [
    ("add_norm", (Z.half(), Z, None, W, W, 1e-5), TypeError, "first must be float32, got float16"),
    ("add_norm", (Z[0], Z, None, W, W, 1e-5), ValueError, r"first must have shape \(B, T, D\).* got \(3, 4\)"),
    ("add_norm", (Z[..., :0], Z, None, W, W, 1e-5), ValueError, "D at least 1"),
    ("add_norm", (Z, Z[:1], None, W, W, 1e-5), ValueError, r"second must have shape \(2, 3, 4\).* got \(1, 3, 4\)"),
    ("add_norm", (Z, Z, Z[..., :3], W, W, 1e-5), ValueError, r"factors must have shape \(2, 3, 4\)"),
    ("add_norm", (Z, Z, None, W[:3], W, 1e-5), ValueError, r"weight must have shape \(4,\), .* got \(3,\)"),
    ("add_norm", (Z, Z, None, W, W.double(), 1e-5), TypeError, "bias must be float32, got float64"),
    ("feature_norm", (Z.double(), None, 1e-5), TypeError, "features must be float32, got float64"),
    ("feature_norm", (Z[0], None, 1e-5), ValueError, r"features must have shape \(B, T, D\).* got \(3, 4\)"),
    ("feature_norm", (Z, torch.ones(2, 4) > 0, 1e-5), ValueError, r"valid must have shape \(2, 3\)"),
    ("squared_error", (Z, Z.double(), None), TypeError, "target must be float32, got float64"),
    ("squared_error", (Z, Z[:1], None), ValueError, r"target must have shape \(2, 3, 4\).* got \(1, 3, 4\)"),
    ("squared_error", (Z[:0], Z[:0], None), ValueError, r"decoded must have shape .* got \(0, 3, 4\)"),
    ("squared_error", (Z, Z, torch.ones(2, 3)), TypeError, "valid must be bool, got float32"),
]


@pytest.mark.parametrize(("operator", "arguments", "error", "message"), BAD)
def test_bad_arguments(operator: str, arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(OPERATORS, operator)(*arguments)
