"""codeword_distribution: hand-written values, an independent oracle, gradients, masks and extreme inputs."""

from collections.abc import Callable
from math import exp

import numpy as np
import pytest
import tolerances
import torch
from cases import Place, generator, normal, places, strided
from compare import LargestTensor, assert_all_close, assert_close, assert_no_worse, to_float64
from numpy.typing import NDArray
from tolerances import EXACT, GRADCHECK
from torch import Tensor

from unicode_fast.ops import codeword_distribution
from unicode_fast.reference import codeword_distribution as reference_module
from unicode_fast.reference import codeword_distribution_backward_reference, codeword_distribution_reference

NAN = float("nan")


def oracle(
    features: Tensor, codebook: Tensor, valid: Tensor | None = None, temperature: float = 1.0
) -> NDArray[np.float64]:
    """Position by position and codeword by codeword, from direct differences."""
    rows, codewords = to_float64(features), to_float64(codebook)
    result = np.zeros((len(rows), len(codewords)))
    for clip in range(len(rows)):
        steps = [t for t in range(rows.shape[1]) if valid is None or valid[clip, t]]
        for step in steps:
            distance = np.linalg.norm(rows[clip, step] - codewords, axis=1)
            weight = np.exp(-(np.maximum(distance, 1e-6) - distance.min()) / temperature)
            result[clip] += weight / weight.sum() / len(steps)
    return result


@places("codeword_distribution")
def test_hand_written(place: Place) -> None:
    codebook = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64, device=place.device)
    features = torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[1.5, 2.0], [3.0, 0.0]]], dtype=torch.float64)
    valid = torch.tensor([[True, True], [True, False]], device=place.device)
    result = codeword_distribution(features.to(place.device), codebook, valid=valid, backend=place.backend)
    # The first clip's positions are 3 and 4, then 4 and 3 from the codewords: their mean is even. The second clip's one
    # valid position is 5/2 from both.
    assert_close(result, np.full((2, 2), 0.5), tolerances.codeword_distribution(2, torch.float64))
    one = codeword_distribution(features[:1, :1].to(place.device), codebook, temperature=0.5, backend=place.backend)
    near = 1 / (1 + exp(-2))
    assert_close(one, np.array([[near, 1 - near]]), tolerances.codeword_distribution(2, torch.float64))


SIZES = {
    "small": (3, 4, 5, 6),
    "training": (80, 10, 400, 256),
    "no_clips": (0, 4, 5, 6),
    "no_steps": (3, 0, 5, 6),
    "one_of_each": (1, 1, 1, 1),
    "primes": (7, 11, 13, 17),
    "around_blocks": (17, 3, 129, 31),
}


@places("codeword_distribution")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_against_oracle(size: str, dtype: torch.dtype, place: Place) -> None:
    clips, steps, codewords, width = SIZES[size]
    features, codebook = normal(clips, steps, width, dtype=dtype), normal(codewords, width, seed=1, dtype=dtype)
    valid = torch.rand(clips, steps, generator=generator()) < 0.7
    tolerance = tolerances.codeword_distribution(width, dtype)
    inputs = features.to(place.device), codebook.to(place.device)
    for temperature in (1.0, 0.3):
        result = codeword_distribution(
            *inputs, valid=valid.to(place.device), temperature=temperature, backend=place.backend
        )
        assert result.dtype == dtype
        assert_close(result, oracle(features, codebook, valid, temperature), tolerance)
    assert_close(codeword_distribution(*inputs, backend=place.backend), oracle(features, codebook), tolerance)


@places("codeword_distribution")
def test_masked_positions_may_hold_anything(place: Place) -> None:
    features, codebook = normal(4, 5, 3, dtype=torch.float64), normal(6, 3, seed=1, dtype=torch.float64)
    valid = torch.rand(4, 5, generator=generator()) < 0.6
    valid[2] = False
    clean = torch.where(valid[:, :, None], features, 0)
    spoilt = torch.where(valid[:, :, None], features, NAN)
    results, gradients = [], []
    for inputs in (clean, spoilt):
        rows, codewords = inputs.to(place.device).requires_grad_(), codebook.to(place.device).requires_grad_()
        result = codeword_distribution(rows, codewords, valid=valid.to(place.device), backend=place.backend)
        results.append(result)
        gradients.append(torch.autograd.grad(result.square().sum(), (rows, codewords)))
    assert_close(results[1], results[0], EXACT)
    assert results[1][2].tolist() == [0.0] * 6
    assert_all_close(gradients[1], gradients[0], EXACT)
    assert not gradients[1][0].cpu()[~valid].any()


@places("codeword_distribution")
def test_gradcheck(place: Place) -> None:
    features = normal(2, 3, 3, dtype=torch.float64).to(place.device).requires_grad_()
    codebook = normal(4, 3, seed=1, dtype=torch.float64).to(place.device).requires_grad_()
    valid = torch.tensor([[True, False, True], [False, True, True]], device=place.device)
    for mask in (None, valid):
        for temperature in (1.0, 0.4):

            def function(x: Tensor, e: Tensor, mask: Tensor | None = mask, temperature: float = temperature) -> Tensor:
                return codeword_distribution(x, e, valid=mask, temperature=temperature, backend=place.backend)

            assert torch.autograd.gradcheck(
                function, (features, codebook), rtol=GRADCHECK.relative, atol=GRADCHECK.absolute
            )


@places("codeword_distribution")
@pytest.mark.parametrize(
    ("features", "codebook", "result"),
    [
        (torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float64),
    ],
)
def test_dtypes(features: torch.dtype, codebook: torch.dtype, result: torch.dtype, place: Place) -> None:
    rows = normal(3, 4, 20, dtype=features).to(place.device).requires_grad_()
    codewords = normal(7, 20, seed=1, dtype=codebook).to(place.device).requires_grad_()
    found = codeword_distribution(rows, codewords, backend=place.backend)
    assert found.dtype == result
    assert_close(found, oracle(rows, codewords), tolerances.codeword_distribution(20, result))
    gradients = torch.autograd.grad(found.square().sum(), (rows, codewords))
    assert [gradient.dtype for gradient in gradients] == [features, codebook]
    wide = rows.detach().double().requires_grad_(), codewords.detach().double().requires_grad_()
    expected = torch.autograd.grad(codeword_distribution(*wide, backend="reference").square().sum(), wide)
    for gradient, truth in zip(gradients, expected, strict=True):
        rounding = tolerances.UNIT_ROUNDOFF[gradient.dtype]
        computing = tolerances.codeword_distribution_gradient(20, result)
        assert_close(gradient, truth, tolerances.Tolerance(rounding + computing.relative, computing.absolute))


@places("codeword_distribution")
def test_strided(place: Place) -> None:
    features, codebook = normal(3, 4, 7).to(place.device), normal(5, 7, seed=1).to(place.device)
    expected = codeword_distribution(features, codebook, backend=place.backend)
    found = codeword_distribution(strided(features), strided(codebook), backend=place.backend)
    assert_close(found, expected, tolerances.codeword_distribution(7, torch.float32))
    gradient = torch.ones(3, 5, device=place.device).expand(3, 5)
    rows = strided(features).requires_grad_()
    codeword_distribution(rows, codebook, backend=place.backend).backward(gradient)
    assert rows.grad is not None


@places("codeword_distribution")
def test_large_common_offset(place: Place) -> None:
    """The expansion about the mean codeword keeps digits that an expansion about the origin would lose."""
    features = (normal(4, 5, 32) * 16).round() / 16 + 1024
    codebook = (normal(9, 32, seed=1) * 16).round() / 16 + 1024
    found = codeword_distribution(features.to(place.device), codebook.to(place.device), backend=place.backend)
    assert_close(found, oracle(features, codebook), tolerances.codeword_distribution(32, torch.float32))


@places("codeword_distribution")
@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e4, 1e15])
def test_scales(scale: float, place: Place) -> None:
    """Tiny features give an even distribution, huge features a certain one; gradients stay finite."""
    features = (normal(2, 3, 8) * scale).to(place.device).requires_grad_()
    codebook = (normal(5, 8, seed=1) * scale).to(place.device).requires_grad_()
    found = codeword_distribution(features, codebook, backend=place.backend)
    assert_close(found.sum(dim=1), np.ones(2), tolerances.codeword_distribution(8, torch.float32))
    gradients = torch.autograd.grad(found.square().sum(), (features, codebook))
    assert all(gradient.isfinite().all() for gradient in gradients)
    if scale < 1e-5:
        even = tolerances.Tolerance(10 * scale, tolerances.codeword_distribution(8, torch.float32).relative)
        assert_close(found, np.full((2, 5), 0.2), even)


@places("codeword_distribution")
def test_squares_near_the_largest_number(place: Place) -> None:
    features = torch.tensor([[[1.5e19]]], device=place.device)
    codebook = torch.tensor([[-1e18], [1e18]], device=place.device)
    found = codeword_distribution(features, codebook, temperature=1e18, backend=place.backend)
    near = 1 / (1 + exp(-2))
    # The distances are 16 and 14 temperatures.
    error = 16 * tolerances.codeword_distribution(1, torch.float32).relative
    assert_close(found, np.array([[1 - near, near]]), tolerances.Tolerance(error))


@places("codeword_distribution")
def test_features_on_codewords(place: Place) -> None:
    """At distance 0 the square root's slope is infinite; the gradient of that distance counts as 0."""
    codebook = (normal(4, 6).round() / 4).to(place.device).requires_grad_()
    features = codebook.detach()[None].clone().requires_grad_()
    found = codeword_distribution(features, codebook, backend=place.backend)
    assert_close(found, oracle(features, codebook), tolerances.codeword_distribution(6, torch.float32))
    gradients = torch.autograd.grad(found.square().sum(), (features, codebook))
    assert all(gradient.isfinite().all() for gradient in gradients)


@places("codeword_distribution")
def test_not_a_number_stays_in_its_clip(place: Place) -> None:
    features, codebook = normal(3, 4, 5).to(place.device), normal(6, 5, seed=1).to(place.device)
    features[1, 2, 0] = NAN
    found = codeword_distribution(features, codebook, backend=place.backend)
    assert found.isnan().all(dim=1).tolist() == found.isnan().any(dim=1).tolist() == [False, True, False]


@places("codeword_distribution")
def test_no_worse_than_reference(place: Place) -> None:
    features, codebook, gradient = normal(20, 10, 64), normal(90, 64, seed=1), normal(20, 90, seed=2)
    truth = codeword_distribution_reference(features.double(), codebook.double(), None, 1.0)
    own = codeword_distribution_reference(features, codebook, None, 1.0)
    rows, codewords = features.to(place.device).requires_grad_(), codebook.to(place.device).requires_grad_()
    found = codeword_distribution(rows, codewords, backend=place.backend)
    slack = tolerances.Tolerance(tolerances.UNIT_ROUNDOFF[torch.float32])
    assert_no_worse(found, own, truth, slack)
    found.backward(gradient.to(place.device))
    truths = codeword_distribution_backward_reference(gradient, features.double(), codebook.double(), None, 1.0)
    owns = codeword_distribution_backward_reference(gradient, features, codebook, None, 1.0)
    for tensor, own_part, true_part in zip((rows, codewords), owns, truths, strict=True):
        assert tensor.grad is not None
        assert_no_worse(tensor.grad, own_part, true_part, slack, "gradient")


@places("codeword_distribution")
def test_autocast_changes_nothing(place: Place) -> None:
    def run() -> list[Tensor]:
        rows = normal(3, 4, 32).to(place.device).requires_grad_()
        codewords = normal(9, 32, seed=1).to(place.device).requires_grad_()
        found = codeword_distribution(rows, codewords, backend=place.backend)
        return [found, *torch.autograd.grad(found.square().sum(), (rows, codewords))]

    expected = run()
    with torch.autocast(place.device, dtype=torch.bfloat16):
        found = run()
    for tensor, truth in zip(found, expected, strict=True):
        assert tensor.dtype == torch.float32
        assert_close(tensor, truth, EXACT)


@places("codeword_distribution")
def test_a_fixed_codebook_gets_no_gradient(place: Place) -> None:
    """The gradient in the features is the same with and without that in the codebook."""
    features, codebook = normal(3, 4, 5).to(place.device).requires_grad_(), normal(6, 5, seed=1).to(place.device)
    results = []
    for codewords in (codebook, codebook.clone().requires_grad_()):
        found = codeword_distribution(features, codewords, backend=place.backend)
        found.square().sum().backward()
        results.append(features.grad)
        features.grad = None
    assert_close(results[0], results[1], EXACT)
    assert codebook.grad is None
    inputs = torch.ones_like(found), features.detach(), codebook, None, 1.0
    suffix = "_reference" if place.backend == "reference" else ""
    operator = getattr(torch.ops.unicode_fast, "codeword_distribution_backward" + suffix)
    assert [operator(*inputs, asked)[1].shape for asked in (True, False)] == [(6, 5), (0, 5)]


@places("codeword_distribution")
@pytest.mark.parametrize("threads", [1, 2])
def test_chunks_of_clips(threads: int, place: Place, set_threads: Callable[[int], None]) -> None:
    """More assignments than are in memory at a time, by products that another library may compute."""
    set_threads(threads)
    features, codebook, gradient = normal(90, 11, 128), normal(700, 128, seed=1), normal(90, 700, seed=2)
    valid = torch.rand(90, 11, generator=generator()) < 0.7
    leaves = features.to(place.device).requires_grad_(), codebook.to(place.device).requires_grad_()
    found = codeword_distribution(*leaves, valid=valid.to(place.device), temperature=0.7, backend=place.backend)
    truth = codeword_distribution_reference(features.double(), codebook.double(), valid, 0.7)
    assert_close(found, truth, tolerances.codeword_distribution(128, torch.float32))
    gradients = torch.autograd.grad(found, leaves, gradient.to(place.device))
    truths = codeword_distribution_backward_reference(gradient, features.double(), codebook.double(), valid, 0.7)
    assert_all_close(gradients, truths, tolerances.codeword_distribution_gradient(128, torch.float32))


@places("codeword_distribution")
def test_second_gradient_is_refused(place: Place) -> None:
    features = normal(2, 3, 4).to(place.device).requires_grad_()
    found = codeword_distribution(features, normal(5, 4, seed=1).to(place.device), backend=place.backend)
    (gradient,) = torch.autograd.grad(found.square().sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="codeword_distribution can be differentiated once"):
        gradient.sum().backward()


@pytest.mark.parametrize("elements", [1, 50, 130])
def test_chunks_change_nothing(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    features, codebook, gradient = (
        normal(7, 4, 5, dtype=torch.float64),
        normal(9, 5, seed=1, dtype=torch.float64),
        normal(7, 9, seed=2, dtype=torch.float64),
    )
    valid = torch.rand(7, 4, generator=generator()) < 0.7

    def compute() -> list[Tensor]:
        inputs = features, codebook, valid, 0.7
        return [codeword_distribution_reference(*inputs), *codeword_distribution_backward_reference(gradient, *inputs)]

    expected = compute()
    monkeypatch.setattr(reference_module, "CHUNK_ELEMENTS", elements)
    assert_all_close(compute(), expected, tolerances.codeword_distribution_gradient(5, torch.float64))


def test_large_batches_never_hold_all_assignments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_module, "CHUNK_ELEMENTS", 2**14)
    features, codebook = normal(100, 10, 4), normal(200, 4, seed=1)
    inputs = features, codebook, None, 1.0
    with LargestTensor() as largest:
        found = codeword_distribution_reference(*inputs)
        codeword_distribution_backward_reference(torch.ones_like(found), *inputs)
    assert features.nbytes < largest.bytes <= max(4 * 2**14, found.nbytes)
