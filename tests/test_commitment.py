"""commitment_loss: loops in float64, gradients, masks, odd shapes, bad input."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases import Place, normal, places
from compare import assert_close
from tolerances import COMMITMENT, EXACT

from unicode_fast import commitment_loss


def inputs(modalities: int, rows: int, codewords: int, width: int, dtype: torch.dtype = torch.float64) -> tuple:
    features = normal(modalities, rows, width, dtype=dtype)
    index = torch.arange(modalities * rows).reshape(modalities, rows) * 7 % codewords
    codebook = normal(codewords, width, seed=1, dtype=dtype)
    weights = normal(modalities, modalities, seed=2, dtype=torch.float64).abs()
    valid = (torch.arange(modalities * rows).reshape(modalities, rows) * 5) % 3 != 0
    return features, index, codebook, weights, valid


def loops(
    features: np.ndarray, index: np.ndarray, codebook: np.ndarray, weights: np.ndarray, valid: np.ndarray
) -> tuple:
    """Loss and gradient, row by row."""
    modalities, rows, _ = features.shape
    loss, gradient = np.zeros(modalities), np.zeros_like(features)
    for m in range(modalities):
        for o in range(modalities):
            both = [i for i in range(rows) if valid[m, i] and valid[o, i]]
            for i in both:
                difference = features[m, i] - codebook[index[o, i]]
                loss[m] += weights[m, o] / len(both) * (difference**2).sum()
                gradient[m, i] += 2 * weights[m, o] / len(both) * difference
    return loss, gradient


@places("commitment_loss")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 7, 3, 5), (3, 130, 17, 33), (4, 65, 9, 64)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_against_loops(place: Place, shape: tuple, masked: bool, dtype: torch.dtype) -> None:
    features, index, codebook, weights, valid = (x.to(place.device) for x in inputs(*shape, dtype))
    features.requires_grad_()
    found = commitment_loss(features, index, codebook, weights, valid=valid if masked else None, backend=place.backend)
    mask = valid if masked else torch.ones_like(valid)
    arrays = (features.detach().double(), index, codebook.double(), weights, mask)
    loss, gradient = loops(*(x.cpu().numpy() for x in arrays))
    (ours,) = torch.autograd.grad(found.sum(), features)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ours.dtype == dtype
    assert_close(found, loss, COMMITMENT[dtype])
    assert_close(ours, gradient, COMMITMENT[dtype])


@places("commitment_loss")
def test_each_loss_has_its_own_gradient(place: Place) -> None:
    features, index, codebook, weights, _ = (x.to(place.device) for x in inputs(3, 9, 5, 4))
    features.requires_grad_()
    found = commitment_loss(features, index, codebook, weights, backend=place.backend)
    (gradient,) = torch.autograd.grad(found[1], features)
    assert gradient[1].abs().sum() > 0
    assert_close(gradient[::2], torch.zeros_like(gradient[::2]), EXACT)


@places("commitment_loss")
def test_rows_that_do_not_count_may_hold_anything(place: Place) -> None:
    features, index, codebook, weights, valid = (x.to(place.device) for x in inputs(2, 9, 5, 4))
    truth = commitment_loss(features, index, codebook, weights, valid=valid, backend=place.backend)
    features[~valid] = torch.nan
    index[~valid] = -5
    features.requires_grad_()
    found = commitment_loss(features, index, codebook, weights, valid=valid, backend=place.backend)
    found.sum().backward()
    assert_close(found, truth, EXACT)
    assert features.grad is not None and features.grad.isfinite().all()


def test_threads_change_nothing(set_threads: Callable[[int], None]) -> None:
    Place("commitment_loss", "cpu", "cpp").skip_unless_usable()
    features, index, codebook, weights, valid = inputs(3, 500, 17, 33, torch.float32)
    results = []
    for threads in (1, 3):
        set_threads(threads)
        leaf = features.clone().requires_grad_()
        loss = commitment_loss(leaf, index, codebook, weights, valid=valid, backend="cpp")
        results.append((loss, *torch.autograd.grad(loss.sum(), leaf)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@places("commitment_loss")
def test_no_rows(place: Place) -> None:
    features, index, codebook, weights, _ = (x.to(place.device) for x in inputs(2, 0, 5, 4))
    assert commitment_loss(features, index, codebook, weights, backend=place.backend).tolist() == [0, 0]


@places("commitment_loss")
def test_strided_and_float32_codebook(place: Place) -> None:
    features, index, codebook, weights, _ = (x.to(place.device) for x in inputs(2, 40, 5, 24, torch.float32))
    wide = torch.stack([features, features], -1)[..., 0].half()
    found = commitment_loss(wide, index.t().contiguous().t(), codebook, weights, backend=place.backend)
    assert_close(
        found,
        commitment_loss(wide.contiguous(), index, codebook, weights, backend="reference"),
        COMMITMENT[torch.float32],
    )


@places("commitment_loss")
def test_a_weight_of_zero_adds_nothing(place: Place) -> None:
    features, index, codebook, weights, _ = (x.to(place.device) for x in inputs(2, 9, 5, 4))
    features[0], weights[0] = torch.inf, 0
    features.requires_grad_()
    found = commitment_loss(features, index, codebook, weights, backend=place.backend)
    found.sum().backward()
    assert found[0] == 0 and found[1] > 0
    assert features.grad is not None and not features.grad[0].any()


@places("commitment_loss")
def test_the_gradient_stops_at_the_codewords(place: Place) -> None:
    features, index, codebook, weights, _ = (x.to(place.device) for x in inputs(2, 4, 5, 3))
    features.requires_grad_(), codebook.requires_grad_()
    commitment_loss(features, index, codebook, weights, backend=place.backend).sum().backward()
    assert codebook.grad is None
    assert features.grad is not None and features.grad.any()


def test_differentiated_once() -> None:
    features, index, codebook, weights, _ = inputs(2, 4, 5, 3)
    features.requires_grad_()
    loss = commitment_loss(features, index, codebook, weights).sum()
    (gradient,) = torch.autograd.grad(loss, features, create_graph=True)
    with pytest.raises(RuntimeError, match="commitment_loss can be differentiated once"):
        gradient.sum().backward()


BAD = [
    ({"features": normal(4, 3)}, ValueError, "features must have 3 dimensions"),
    ({"index": torch.zeros(2, 5, dtype=torch.int64)}, ValueError, r"index must have shape \(2, 4\)"),
    ({"index": torch.zeros(2, 4)}, TypeError, "index must be int64, got float32"),
    ({"weights": torch.ones(2)}, ValueError, r"weights must have shape \(2, 2\)"),
    ({"weights": torch.ones(2, 2).requires_grad_()}, ValueError, "weights must have requires_grad=False"),
    ({"valid": torch.ones(2, 4)}, TypeError, "valid must be bool, got float32"),
    ({"index": torch.full((2, 4), -1)}, IndexError, r"index(\[0\])? must be in \[0, 5\)|out of range|out of bounds"),
    ({"index": torch.full((2, 4), 9)}, IndexError, r"index(\[0\])? must be in \[0, 5\)|out of range|out of bounds"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change: dict, error: type[Exception], message: str) -> None:
    names = ("features", "index", "codebook", "weights")
    arguments = dict(zip(names, inputs(2, 4, 5, 3)[:4], strict=True))
    with pytest.raises(error, match=message):
        commitment_loss(**{**arguments, **change})
