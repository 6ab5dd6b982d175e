"""Transformer layers and dropout by the operators for CPUs: torch's results and torch's random numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import tolerances
import torch
from cases import ON_HOST, normal, strided
from compare import assert_all_close, assert_close
from tolerances import EXACT
from torch import Tensor, nn

from unicode_fast import backend
from unicode_fast.modules.transformer import LONGEST, Dropout, TransformerLayer

pytestmark = pytest.mark.skipif(ON_HOST or not backend.compiled(), reason="the C++ extension is not there")

OPERATORS = torch.ops.unicode_fast_layers
# Clips, positions, width, heads.
SIZES = [(5, 10, 128, 4), (3, 1, 24, 2), (3, 7, 20, 4), (4, 17, 15, 1), (2, LONGEST, 24, 3), (3, 33, 66, 2)]


def start_draws(drawn: int) -> None:
    """Seeds torch and draws 32-bit numbers, then one of two normal numbers, the other of which the generator keeps."""
    torch.manual_seed(1)
    torch.empty(drawn, dtype=torch.int32).random_()
    torch.randn(1)


def results(module: nn.Module, x: Tensor, drawn: int = 3, **masks: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """Output and gradients of a module, and the generator's state afterwards."""
    start_draws(drawn)
    leaf = x.clone().requires_grad_()
    output = module(leaf, **masks)
    output.backward(normal(*x.shape, seed=3).to(x.dtype))
    return [output, leaf.grad, *(p.grad for p in module.parameters())], torch.get_rng_state()


def check_layer(
    clips: int, length: int, width: int, heads: int, *, masked: bool, dropout: float, training: bool = True
) -> None:
    """Fail unless the layer gives what torch's layers of both dtypes do; their draws do not depend on the dtype."""
    own = TransformerLayer(width, heads, 2 * width, dropout)
    for number, parameter in enumerate(own.parameters()):
        parameter.data += normal(*parameter.shape, seed=number) / 10
    x = normal(clips, length, width, seed=2)
    lengths = [1 + clip * length // clips for clip in range(clips)]
    padding = ~tiny.mask_of(lengths, length) if masked else None
    found, state = results(own.train(training), x, src_key_padding_mask=padding)
    for dtype in (torch.float32, torch.float64):
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout, batch_first=True)
        layer.load_state_dict(own.state_dict())
        expected, theirs = results(layer.to(dtype).train(training), x.to(dtype), src_key_padding_mask=padding)
        assert torch.equal(state, theirs)
        for result, truth in zip(found, expected, strict=True):
            assert_close(result, truth, tolerances.transformer_layer(truth))


def check_draws(p: float) -> None:
    """Fail unless the factors are torch's to the last bit, from any place of the generator's 624 numbers."""
    for drawn in (0, 1, 620, 621):
        for size in (1, 311, 312, 313, 1023, 1024, 1025, 3000):
            start_draws(drawn)
            found, state = OPERATORS.dropout_factors(torch.empty(size), p), torch.get_rng_state()
            start_draws(drawn)
            assert torch.equal(found, torch.empty(size).bernoulli_(1 - p).div_(1 - p))
            assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_layer(sizes: tuple[int, int, int, int], masked: bool, dropout: float) -> None:
    check_layer(*sizes, masked=masked, dropout=dropout)


def test_layer_in_evaluation() -> None:
    check_layer(*SIZES[0], masked=True, dropout=0.3, training=False)


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.5, 0.999999])
def test_draws(p: float) -> None:
    check_draws(p)


@pytest.mark.parametrize("p", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("training", [True, False])
def test_dropout(p: float, training: bool) -> None:
    """With rows of any strides, whose draws torch orders by memory."""
    for x in (normal(5, 7, 30), normal(5, 7, 30).transpose(0, 1), normal(5, 7, 30)[..., ::2], normal(0, 7)):
        found, state = results(Dropout(p).train(training), x)
        expected, theirs = results(nn.Dropout(p).train(training), x)
        assert_all_close(found, expected, EXACT)
        assert torch.equal(state, theirs)


class ReluDropout(nn.Dropout):
    """The operator as a module."""

    def forward(self, values: Tensor) -> Tensor:
        return OPERATORS.relu_dropout(values, self.p)


@pytest.mark.parametrize("p", [0.1, 0.15, 0.5])
@pytest.mark.parametrize("threads", [1, 2])
def test_relu_dropout(p: float, threads: int, set_threads: Callable[[int], None]) -> None:
    """Of numbers with zeros of both signs, in any layout, and more than one thread's share of them."""
    set_threads(threads)
    x = normal(70, 1001)
    x[::3], x[1::7] = 0.0, -0.0
    for values in (x, strided(x[:9])):
        found, state = results(ReluDropout(p), values)
        expected, theirs = results(nn.Sequential(nn.ReLU(), nn.Dropout(p)), values.contiguous())
        assert_all_close(found, expected, EXACT)
        assert torch.equal(state, theirs)


def attended(vectors: Tensor, valid: Tensor | None = None, heads: int = 4, p: float = 0.0) -> tuple[Tensor, Tensor]:
    """Result of the operator, and the gradient of its sum in vectors."""
    torch.manual_seed(0)
    leaf = vectors.detach().requires_grad_()
    mixed = OPERATORS.attention(leaf, valid, heads, p)
    mixed.sum().backward()
    assert leaf.grad is not None
    return mixed, leaf.grad


@pytest.mark.parametrize("threads", [2, 3])
def test_threads(threads: int, set_threads: Callable[[int], None]) -> None:
    vectors = normal(20, 10, 3 * 32)
    set_threads(1)
    expected = attended(vectors, p=0.1)
    set_threads(threads)
    assert_all_close(attended(vectors, p=0.1), expected, EXACT)


def test_layout_of_the_vectors() -> None:
    vectors, valid = normal(3, 10, 3 * 32), tiny.mask_of([10, 2, 7], 10)
    expected = attended(vectors, valid)
    assert_all_close(attended(strided(vectors), strided(valid)), expected, EXACT)
    assert [part.shape for part in attended(vectors[:0])] == [(0, 10, 32), (0, 10, 96)]


def test_a_clip_without_a_valid_key() -> None:
    """Its attention and gradients are 0, those of other clips the same as without it."""
    vectors, valid = normal(3, 10, 3 * 32), tiny.mask_of([10, 0, 10], 10)
    for part, expected in zip(attended(vectors, valid), attended(vectors), strict=True):
        expected.data[1] = 0
        assert_close(part, expected, EXACT)


def test_invalid_keys_of_any_finite_value() -> None:
    """Numbers of padded positions reach neither the attention of others nor gradients."""
    vectors, valid = normal(3, 10, 3 * 32), tiny.mask_of([4, 4, 4], 10)
    changed = vectors.clone()
    changed[:, 4:, 32:] = 1e6
    for part, expected in zip(attended(changed, valid), attended(vectors, valid), strict=True):
        assert_close(part[:, :4], expected[:, :4], EXACT)


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's layer is taken where the operators have no result, or no reason to be faster."""
    taken: list[Tensor] = []
    monkeypatch.setattr(nn.TransformerEncoderLayer, "forward", lambda self, x, *_: taken.append(x) or x)
    layer, x = TransformerLayer(8, 2, 8, 0.1), normal(2, LONGEST, 8)

    def by_torch(values: Tensor = x, **arguments: Any) -> bool:
        taken.clear()
        layer(values, **arguments)
        return bool(taken)

    assert not by_torch()
    assert not by_torch(src_key_padding_mask=~tiny.mask_of([3, 5], LONGEST))
    assert by_torch(src_key_padding_mask=torch.zeros(2, LONGEST))
    assert by_torch(normal(2, LONGEST + 1, 8))
    assert by_torch(normal(LONGEST, 8))
    assert by_torch(src_mask=torch.zeros(LONGEST, LONGEST))
    assert by_torch(is_causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert by_torch()
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert by_torch()
    with monkeypatch.context() as patch:
        patch.setattr(backend, "_FORCED", "reference")
        assert by_torch()
    for dropout in (layer.self_attn, layer.dropout, layer.dropout1, layer.dropout2):
        with monkeypatch.context() as patch:
            patch.setattr(dropout, "dropout" if dropout is layer.self_attn else "p", 1.0)
            assert by_torch()
    layer.eval()
    assert not by_torch()
    with torch.no_grad():
        assert by_torch()
    layer.train().double()
    assert by_torch(x.double())


@pytest.mark.parametrize(("operator", "arguments"), [("attention", (None, 2, 0.0)), ("relu_dropout", (0.1,))])
def test_differentiated_once(operator: str, arguments: tuple[Any, ...]) -> None:
    vectors = normal(2, 3, 12).requires_grad_()
    total = getattr(OPERATORS, operator)(vectors, *arguments).sum()
    with pytest.raises(RuntimeError, match="can be differentiated once on a CPU in float32"):
        torch.autograd.grad(total, vectors, create_graph=True)


VECTORS = normal(2, 5, 24)
BAD: list[tuple[str, tuple[Any, ...], type[Exception], str]] = [
    ("attention", (VECTORS.double(), None, 2, 0.0), TypeError, "vectors must be float32, got float64"),
    ("attention", (VECTORS[..., :23], None, 2, 0.0), ValueError, r"vectors must have shape .* got \(2, 5, 23\)"),
    ("attention", (VECTORS, None, 3, 0.0), ValueError, "heads must divide the width of 8, got 3"),
    ("attention", (VECTORS, None, 0, 0.0), ValueError, "heads must divide the width of 8, got 0"),
    ("attention", (VECTORS, None, 6148914691236517205, 0.0), ValueError, "heads must divide the width of 8"),
    ("attention", (VECTORS[0], None, 2, 0.0), ValueError, r"vectors must have shape .* got \(5, 24\)"),
    ("attention", (VECTORS[:, :0], None, 2, 0.0), ValueError, "vectors must have shape .* T and D at least 1"),
    ("attention", (VECTORS, torch.ones(2, 5), 2, 0.0), TypeError, "valid must be bool, got float32"),
    ("attention", (VECTORS, torch.ones(2, 4) > 0, 2, 0.0), ValueError, r"valid must have shape \(2, 5\).* \(2, 4\)"),
    ("attention", (VECTORS, None, 2, 1.0), ValueError, "p must be at least 0 and less than 1, got 1"),
    ("attention", (VECTORS, None, 2, -0.1), ValueError, "p must be at least 0 and less than 1, got -0.1"),
    ("attention", (VECTORS, None, 2, float("nan")), ValueError, "p must be at least 0 and less than 1, got nan"),
    ("relu_dropout", (VECTORS.double(), 0.1), TypeError, "values must be float32, got float64"),
    ("relu_dropout", (VECTORS, 1.0), ValueError, "p must be at least 0 and less than 1, got 1"),
    ("dropout_factors", (VECTORS.half(), 0.1), TypeError, "like must be float32, got float16"),
    ("dropout_factors", (VECTORS.to("meta"), 0.1), ValueError, "like must be on a CPU, got meta"),
    ("dropout_factors", (VECTORS, 1.0), ValueError, "p must be at least 0 and less than 1, got 1"),
    ("dropout_factors", (VECTORS, -0.1), ValueError, "p must be at least 0 and less than 1, got -0.1"),
    ("dropout_factors", (VECTORS, float("nan")), ValueError, "p must be at least 0 and less than 1, got nan"),
]


@pytest.mark.parametrize(("operator", "arguments", "error", "message"), BAD)
def test_bad_arguments(operator: str, arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(OPERATORS, operator)(*arguments)
