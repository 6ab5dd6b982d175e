"""nearest_codeword: results by hand, the promise under adversarial inputs, and results of odd inputs."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases import NEAREST_CASES, Place, generator, normal, places, strided
from compare import assert_nearest

from unicode_fast.ops import nearest_codeword
from unicode_fast.reference import nearest_codeword as reference_module

NAN, INF = float("nan"), float("inf")


@places("nearest_codeword")
def test_hand_written(place: Place) -> None:
    codebook = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]], device=place.device)
    features = torch.tensor([[1.0, 1.0], [2.0, -1.0], [0.0, 3.0], [1.5, 0.0]], device=place.device)
    result = nearest_codeword(features, codebook, backend=place.backend)
    assert result.index.tolist() == [0, 1, 2, 0]  # the last one is a tie, and the lower index wins it
    assert result.squared_distance.tolist() == [2.0, 2.0, 1.0, 2.25]


@places("nearest_codeword")
@pytest.mark.parametrize("name", NEAREST_CASES)
def test_promise(name: str, place: Place) -> None:
    features, codebook = NEAREST_CASES[name]()
    result = nearest_codeword(features.to(place.device), codebook.to(place.device), backend=place.backend)
    assert_nearest(*result, features, codebook)


@places("nearest_codeword")
def test_lowest_of_identical_codewords_wins(place: Place) -> None:
    codebook = normal(5, 30)[torch.tensor([3, 1, 3, 4, 1, 0, 3, 4, 2])].to(place.device)
    index = nearest_codeword(codebook, codebook, backend=place.backend).index
    assert index.tolist() == [0, 1, 0, 3, 1, 5, 0, 3, 8]


@places("nearest_codeword")
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (2, 1, 3, 6), (0, 4, 6)])
def test_leading_dimensions(shape: tuple[int, ...], place: Place) -> None:
    features, codebook = normal(*shape).to(place.device), normal(7, 6, seed=1).to(place.device)
    result = nearest_codeword(features, codebook, backend=place.backend)
    assert result.index.shape == result.squared_distance.shape == shape[:-1]
    assert_nearest(*(tensor.reshape(-1) for tensor in result), features.reshape(-1, 6), codebook)


@places("nearest_codeword")
def test_strided(place: Place) -> None:
    features, codebook = normal(6, 9, 17).to(place.device), normal(11, 17, seed=1).to(place.device)
    expected = nearest_codeword(features, codebook, backend=place.backend)
    result = nearest_codeword(strided(features), strided(codebook), backend=place.backend)
    transposed = nearest_codeword(features.transpose(0, 1), codebook.T.contiguous().T, backend=place.backend)
    assert all(map(torch.equal, result, expected))
    assert torch.equal(transposed.index.T, expected.index)


@places("nearest_codeword")
def test_rows_further_apart_than_32_bits_count(place: Place) -> None:
    """Offsets of 2^32 and more; on the CPU zeros without a write take no memory."""
    step = 2**31 + 8
    if place.device == "cuda":
        if torch.cuda.mem_get_info()[0] < 6 * step:
            pytest.skip("the rows do not fit into what is free of the memory")
        memory = torch.zeros(2 * step + 24, dtype=torch.float16, device="cuda")
    else:
        memory = torch.from_numpy(np.zeros(2 * step + 24, dtype=np.float16))
    features, codebook = memory.as_strided((3, 24), (step, 1)), normal(5, 24, seed=1)
    features.copy_(normal(3, 24))
    result = nearest_codeword(features, codebook.to(place.device), backend=place.backend)
    assert_nearest(*result, features, codebook)


@places("nearest_codeword")
@pytest.mark.parametrize(
    ("features", "codebook", "distance"),
    [
        (torch.float64, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float64),
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float32),
        (torch.float16, torch.float16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
)
def test_dtypes(features: torch.dtype, codebook: torch.dtype, distance: torch.dtype, place: Place) -> None:
    rows, codewords = normal(9, 5, dtype=features), normal(4, 5, seed=1, dtype=codebook)
    result = nearest_codeword(rows.to(place.device), codewords.to(place.device), backend=place.backend)
    assert result.index.dtype == torch.int64
    assert result.squared_distance.dtype == distance


@places("nearest_codeword")
def test_not_a_number_and_infinity(place: Place) -> None:
    codebook = torch.tensor([[NAN, 0.0], [1.0, 0.0], [INF, 0.0], [5.0, 0.0]], device=place.device)
    rows = torch.tensor([[NAN, 0.0], [4.0, 0.0], [INF, 0.0], [-INF, 0.0], [0.0, NAN]], device=place.device)
    index, distance = nearest_codeword(rows, codebook, backend=place.backend)
    # A row with NaN gets 0. Infinity is infinitely far from every finite codeword, so the lowest index wins.
    assert index.tolist() == [0, 3, 1, 1, 0]
    assert distance.isnan().tolist() == [True, False, False, False, True]
    assert distance[1:4].tolist() == [1.0, INF, INF]
    only_nan = nearest_codeword(rows[1:2], codebook[:1].expand(3, 2), backend=place.backend)
    assert only_nan.index.tolist() == [0]
    assert only_nan.squared_distance.isnan().all()


@places("nearest_codeword")
def test_overflow_is_preferred_to_nan(place: Place) -> None:
    codebook = torch.tensor([[NAN], [-1e200]], dtype=torch.float64, device=place.device)
    index, distance = nearest_codeword(-codebook[1:], codebook, backend=place.backend)
    assert index.tolist() == [1]
    assert distance.tolist() == [INF]


@places("nearest_codeword")
def test_repeatable(place: Place) -> None:
    features, codebook = normal(300, 33).to(place.device), normal(50, 33, seed=1).to(place.device)
    first = nearest_codeword(features, codebook, backend=place.backend)
    for _ in range(3):
        assert all(map(torch.equal, first, nearest_codeword(features, codebook, backend=place.backend)))


@pytest.mark.parametrize("name", NEAREST_CASES)
def test_threads_change_nothing(name: str, set_threads: Callable[[int], None]) -> None:
    Place("nearest_codeword", "cpu", "cpp").skip_unless_usable()
    features, codebook = NEAREST_CASES[name]()
    set_threads(1)
    alone = nearest_codeword(features, codebook, backend="cpp")
    set_threads(3)
    together = nearest_codeword(features, codebook, backend="cpp")
    assert all(map(torch.equal, together, alone))


@places("nearest_codeword")
def test_has_no_gradient(place: Place) -> None:
    features = normal(4, 3).to(place.device).requires_grad_()
    codebook = normal(2, 3, seed=1).to(place.device).requires_grad_()
    assert not nearest_codeword(features, codebook, backend=place.backend).squared_distance.requires_grad
    _, distance = torch.ops.unicode_fast.nearest_codeword(features, codebook)
    assert not distance.requires_grad


@places("nearest_codeword")
def test_autocast_changes_nothing(place: Place) -> None:
    features, codebook = normal(200, 64).to(place.device), normal(50, 64, seed=1).to(place.device)
    expected = nearest_codeword(features, codebook, backend=place.backend)
    with torch.autocast(place.device, dtype=torch.bfloat16):
        result = nearest_codeword(features, codebook, backend=place.backend)
    assert all(map(torch.equal, result, expected))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features, codebook = normal(103, 9), normal(10, 9, seed=1)
    expected = nearest_codeword(features, codebook, backend="reference")
    monkeypatch.setattr(reference_module, "CHUNK_ELEMENTS", 70)
    result = nearest_codeword(features, codebook, backend="reference")
    assert all(map(torch.equal, result, expected))


@pytest.mark.parametrize("name", ["float64_ulp_apart", "offset_1e4", "offset_1e6", "far_clusters", "tiny", "largest"])
def test_cases_are_hard(name: str) -> None:
    """The usual search, by |c|^2 - 2 x.c in the inputs' dtype, breaks the promise, so the comparison can fail."""
    features, codebook = NEAREST_CASES[name]()
    index = (codebook.square().sum(dim=1) - 2 * features @ codebook.T).argmin(dim=1)
    _, distance = nearest_codeword(features, codebook)
    with pytest.raises(AssertionError, match="beyond the promise"):
        assert_nearest(index, distance, features, codebook)


@places("nearest_codeword")
@pytest.mark.parametrize("width", [1, 64])
def test_flushing_subnormal_numbers_changes_nothing(place: Place, width: int) -> None:
    """Inputs are normal numbers, their differences are not."""
    tiny = torch.finfo(torch.float32).tiny
    features = (1 + torch.rand(200, width, generator=generator())) * tiny
    codebook = (1 + torch.rand(30, width, generator=generator(1))) * tiny
    truth = (features.double()[:, None] - codebook.double()).square().sum(2).argmin(1)
    assert torch.set_flush_denormal(True)
    try:
        found = nearest_codeword(features.to(place.device), codebook.to(place.device), backend=place.backend).index
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found.cpu(), truth)
