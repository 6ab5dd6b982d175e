"""Terms of the assignment loss by the operators for CPUs: torch's results and gradients, in any layout."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tiny
import tolerances
import torch
from cases import ON_HOST, generator, normal, strided
from compare import assert_all_close, assert_close
from tolerances import EXACT
from torch import Tensor

from unicode_fast import backend, losses
from unicode_fast.modules import host

pytestmark = pytest.mark.skipif(ON_HOST or not backend.compiled(), reason="the C++ extension is not there")

OPERATORS = torch.ops.unicode_fast_layers
NAN, INF = float("nan"), float("inf")
# Clips, positions, codewords: fewer and more than the rows and lanes that are computed together.
SIZES = [(80, 10, 128), (13, 10, 33), (3, 1, 1), (2, 70, 5), (0, 4, 6)]


def mask_of(clips: int, length: int) -> Tensor:
    """Clips of all lengths, some of them without a valid position."""
    return tiny.mask_of([clip % (length + 1) for clip in range(clips)], length)


def compared(function: Callable[..., Tensor], scores: Tensor, *others: Any) -> None:
    """Fail unless value and gradient of a function of scores are torch's in float64 to rounding."""
    results = []
    for dtype in (torch.float32, torch.float64):
        leaf = scores.detach().to(dtype).requires_grad_()
        rest = [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in others]
        assert host.has_operators(leaf) == (dtype == torch.float32)
        value = function(leaf, *rest)
        value.backward(normal(value.numel(), seed=9).view(value.shape).to(dtype))
        results.append((value, leaf.grad))
    largest = scores.abs().max().item() if scores.numel() else 0.0
    for found, truth in zip(*results, strict=True):
        assert_close(found, truth, tolerances.assignment(largest, truth))


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("size", SIZES)
def test_soft_cross_entropy(size: tuple[int, int, int], scale: float) -> None:
    """Of targets that add up to 1, and of any."""
    scores = scale * normal(*size)
    for target in (normal(*size, seed=1).softmax(-1), normal(*size, seed=1)):
        compared(losses.soft_cross_entropy, scores, target)
        compared(losses.soft_cross_entropy, strided(scores), strided(target))


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", SIZES[:-1])
def test_presence(size: tuple[int, int, int], masked: bool, scale: float) -> None:
    """Certain codewords, whose probabilities are clamped, and codewords that hardly occur."""
    clips, length, codewords = size
    used = normal(clips, codewords, seed=1).softmax(-1)
    valid = mask_of(clips, length) if masked else None
    for scores in (scale * normal(*size), strided(scale * normal(*size))):
        compared(lambda x, used, valid=valid: losses.presence(used, x, valid), scores, used)


def balanced(
    scores: Tensor, weights: Tensor | None, totals: Tensor | None, rounds: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    totals = None if totals is None else totals.to(dtype)
    return losses.balanced_assignment(scores.to(dtype), weights, totals=totals, rounds=rounds)


@pytest.mark.parametrize("rounds", [0, 1, 3, 8])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("size", SIZES[:-1])
def test_balanced_assignment(size: tuple[int, int, int], scale: float, rounds: int) -> None:
    """Also of scores so far apart that exponentials of whole columns are 0."""
    rows, codewords = size[0] * size[1], size[2]
    scores = scale * normal(rows, codewords)
    weights, totals = torch.rand(rows, generator=generator()), torch.rand(codewords, generator=generator(1))
    weights[::5], totals[::3] = 0, 0
    counted = weights > 0
    for given in ((None, None), (counted, None), (weights, totals)):
        found, truth = balanced(scores, *given, rounds), balanced(scores, *given, rounds, torch.float64)
        kept = torch.ones_like(counted) if given[0] is None else counted
        largest = 2 * scores.abs().max().item()
        assert_close(found[kept], truth[kept], tolerances.balanced_assignment(largest, rounds))
    assert_close(balanced(strided(scores), None, None, rounds), balanced(scores, None, None, rounds), EXACT)


def by_torch(function: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(host, "has_operators", lambda values: False)
        return function()


@pytest.mark.parametrize("number", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["one", "row", "column", "all"])
def test_infinite_scores(number: float, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are NaN where torch's are."""
    scores = normal(70, 9)
    scores[{"one": (3, 2), "row": 3, "column": (slice(None), 2), "all": slice(None)}[where]] = number
    weights, target = torch.arange(70) % 5 > 0, normal(70, 9, seed=1).softmax(-1)
    clips, used = scores.view(7, 10, 9), normal(7, 9, seed=2).softmax(-1)
    for function in (
        lambda: losses.balanced_assignment(scores),
        lambda: losses.balanced_assignment(scores, weights)[weights],
        lambda: losses.soft_cross_entropy(scores, target),
        lambda: losses.presence(used, clips, weights.view(7, 10)),
    ):
        found, truth = function(), by_torch(function, monkeypatch)
        assert torch.equal(found.isnan(), truth.isnan())
        assert_close(found, truth, tolerances.balanced_assignment(10.0, 3))


def test_no_row_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """If all weights are 0, a column adds up to 0."""
    scores, weights = normal(70, 9), torch.zeros(70)
    truth = by_torch(lambda: losses.balanced_assignment(scores, weights), monkeypatch)
    assert_close(losses.balanced_assignment(scores, weights), truth, tolerances.balanced_assignment(10.0, 3))
    assert losses.balanced_assignment(scores[:0], weights[:0]).shape == (0, 9)


def all_results(size: tuple[int, int, int]) -> list[Tensor]:
    scores, used = normal(*size).requires_grad_(), normal(size[0], size[2], seed=1).softmax(-1)
    target = losses.balanced_assignment(scores.flatten(0, 1), mask_of(*size[:2]).flatten())
    errors = losses.soft_cross_entropy(scores, target.view(size)).sum() + losses.presence(used, scores)
    return [target, errors, *torch.autograd.grad(errors, scores)]


@pytest.mark.parametrize("threads", [2, 3])
def test_threads(threads: int, set_threads: Callable[[int], None]) -> None:
    set_threads(1)
    expected = all_results(SIZES[0])
    set_threads(threads)
    assert_all_close(all_results(SIZES[0])[:1], expected[:1], EXACT)
    assert_all_close(all_results(SIZES[0])[2:], expected[2:], EXACT)


@pytest.mark.parametrize(("operator", "shape"), [("soft_cross_entropy", (6, 4)), ("presence", (2, 3, 4))])
def test_differentiated_once(operator: str, shape: Sequence[int]) -> None:
    scores = normal(*shape).requires_grad_()
    arguments = (scores, torch.ones(6, 4)) if operator == "soft_cross_entropy" else (torch.ones(2, 4), scores, None)
    total = getattr(OPERATORS, operator)(*arguments).sum()
    with pytest.raises(RuntimeError, match="the assignment loss can be differentiated once on a CPU in float32"):
        torch.autograd.grad(total, scores, create_graph=True)


def test_training_steps_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the recommended preset; one under autocast computes with torch's operators."""
    taken: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Tensor]:
        operator = getattr(OPERATORS, name)

        def count(*arguments: Any) -> Tensor:
            taken[name] += 1
            return operator(*arguments)

        return count

    for name in ("balanced_assignment", "soft_cross_entropy", "presence"):
        monkeypatch.setattr(OPERATORS, name, counted(name))
    owner = tiny.trainer()
    batch = tiny.batch(owner.model)
    owner.train_step(batch, {name: mask_of(6, 5) for name in batch}, 1e-3)
    assert taken == {"balanced_assignment": 2, "soft_cross_entropy": 3, "presence": 2}
    taken.clear()
    with torch.autocast("cpu", torch.bfloat16):
        losses.presence(SCORES[:2], CLIPS)
    assert not taken


SCORES = normal(6, 4)
CLIPS = SCORES.view(2, 3, 4)
BAD: list[tuple[str, tuple[Any, ...], type[Exception], str]] = [
    ("balanced_assignment", (SCORES.double(), None, None, 2.0, 3), TypeError, "scores must be float32, got float64"),
    ("balanced_assignment", (SCORES.to("meta"), None, None, 2.0, 3), ValueError, "scores must be on a CPU, got meta"),
    ("balanced_assignment", (CLIPS, None, None, 2.0, 3), ValueError, r"scores must have shape .* got \(2, 3, 4\)"),
    ("balanced_assignment", (SCORES[:, :0], None, None, 2.0, 3), ValueError, "scores must have shape .* M at least 1"),
    ("balanced_assignment", (SCORES, SCORES[:5, 0], None, 2.0, 3), ValueError, r"weights must have shape \(6,\)"),
    ("balanced_assignment", (SCORES, SCORES[:, 0] > 0, None, 2.0, 3), TypeError, "weights must be float32, got bool"),
    ("balanced_assignment", (SCORES, None, SCORES[0, :3], 2.0, 3), ValueError, r"totals must have shape \(4,\)"),
    ("soft_cross_entropy", (SCORES, SCORES[:5]), ValueError, r"target must have shape \(6, 4\).* got \(5, 4\)"),
    ("soft_cross_entropy", (SCORES, SCORES.double()), TypeError, "target must be float32, got float64"),
    ("soft_cross_entropy", (SCORES[0], SCORES[0]), ValueError, r"scores must have shape \(N, M\)"),
    ("presence", (SCORES[:2], SCORES, None), ValueError, r"scores must have shape \(B, T, M\)"),
    ("presence", (SCORES[:3], CLIPS, None), ValueError, r"used must have shape \(2, 4\).* got \(3, 4\)"),
    ("presence", (SCORES[:2], CLIPS, torch.ones(2, 3)), TypeError, "valid must be bool, got float32"),
    ("presence", (SCORES[:2], CLIPS, torch.ones(2, 2) > 0), ValueError, r"valid must have shape \(2, 3\)"),
]


@pytest.mark.parametrize(("operator", "arguments", "error", "message"), BAD)
def test_bad_arguments(operator: str, arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(OPERATORS, operator)(*arguments)


@pytest.mark.parametrize("operator", ["soft_cross_entropy", "presence"])
def test_fixed_distributions(operator: str) -> None:
    fixed = SCORES.clone().requires_grad_()
    arguments = (SCORES, fixed) if operator == "soft_cross_entropy" else (fixed[:2], CLIPS, None)
    with pytest.raises(ValueError, match=r"(target|used) must have requires_grad=False"):
        getattr(OPERATORS, operator)(*arguments)
