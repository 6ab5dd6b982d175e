"""Linear layers as convolutions: values, gradients, and when torch's own product is taken."""

import pytest
import torch
from cases import normal
from compare import assert_close
from tolerances import EXACT, UNIT_ROUNDOFF
from torch import Tensor
from torch.nn import functional as F

from unicode_fast.modules import linear as layers

AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


def results(
    function: object, rows: Tensor, weight: Tensor, bias: Tensor | None, *, absolute: bool = False
) -> list[Tensor]:
    """The product and its gradients for a fixed gradient of the product; of absolute values if `absolute`."""
    leaves = [None if tensor is None else tensor.clone().requires_grad_() for tensor in (rows, weight, bias)]
    product = function(*leaves)  # type: ignore[operator]
    gradient = normal(*product.shape, seed=3).to(product.dtype)
    product.backward(gradient.abs() if absolute else gradient)
    return [product, *(leaf.grad for leaf in leaves if leaf is not None)]


@pytest.mark.parametrize("by_convolution", [False, True])
@pytest.mark.parametrize(
    ("shape", "outputs", "biased", "threads"),
    [((80, 10, 128), 128, True, 2), ((80, 10, 128), 128, True, 1), ((800, 784), 256, False, 2), ((3, 7), 5, True, 2)],
)
def test_against_float64(
    shape: tuple[int, ...],
    outputs: int,
    biased: bool,
    threads: int,
    by_convolution: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each sum of n products errs by at most n u times the sum of their absolute values, in any order."""
    monkeypatch.setattr(layers, "_by_convolution", lambda rows, weight: by_convolution)
    given = normal(*shape), normal(outputs, shape[-1], seed=1), normal(outputs, seed=2) if biased else None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = results(layers.linear, *given)
    finally:
        torch.set_num_threads(before)
    doubled = [None if tensor is None else tensor.double() for tensor in given]
    sizes = [None if tensor is None else tensor.abs() for tensor in doubled]
    terms = max(given[0].numel() // shape[-1], shape[-1], outputs) + 1
    truths, bounds = results(F.linear, *doubled), results(F.linear, *sizes, absolute=True)
    for product, truth, bound in zip(found, truths, bounds, strict=True):
        allowed = terms * UNIT_ROUNDOFF[torch.float32] * bound.detach()
        assert ((product - truth).abs() <= allowed).all()


@pytest.mark.skipif(not AVX512, reason="MKL is as fast with narrower vectors")
def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only large products in float32 are convolutions, and none in bfloat16's context or while compiling."""
    rows, weight = normal(80, 10, 128), normal(128, 128)
    assert layers._by_convolution(rows, weight)
    assert not layers._by_convolution(rows[:40], weight)
    assert not layers._by_convolution(rows.double(), weight.double())
    assert not layers._by_convolution(rows, weight.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not layers._by_convolution(rows, weight)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not layers._by_convolution(rows, weight)


def test_layout_of_the_rows() -> None:
    """Rows of any strides, and none."""
    rows, weight = normal(128, 10, 80).permute(2, 1, 0), normal(128, 128)
    assert_close(layers.linear(rows, weight), layers.linear(rows.contiguous(), weight), EXACT)
    assert layers.linear(normal(0, 10, 128), weight).shape == (0, 10, 128)


def test_a_layer_of_a_size_for_convolutions_compiles_to_one_graph() -> None:
    layer, rows = layers.Linear(128, 128), normal(80, 10, 128)
    assert rows.numel() * 128 >= layers.LEAST_PRODUCT
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert_close(compiled(rows), F.linear(rows, layer.weight, layer.bias), EXACT)
