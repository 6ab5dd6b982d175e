"""The half-precision search by itself: the exact comparison after it would hide its errors.

Runs on a GPU, and on the emulator of tests/cuda_on_host.
"""

import pytest
import torch
from cases import ON_HOST, Place, normal, searches_in_half_precision
from shapes import SEARCH_SHAPES
from tolerances import MOST_COMPARED

from unicode_fast import PreparedCodebook, nearest_codeword

# The emulator takes about a microsecond for each row and codeword.
MOST_ROWS = 64 if ON_HOST else 1_000_000


@searches_in_half_precision()
@pytest.mark.parametrize("name", SEARCH_SHAPES)
def test_random_rows_have_few_candidates(name: str, place: Place) -> None:
    """No row at a named shape falls back to all codewords, and few rows have a second candidate."""
    shape = SEARCH_SHAPES[name]
    rows = min(shape.rows, MOST_ROWS)
    # Drawn on the device: a CPU would take seconds for the largest shape.
    features, codebook = torch.randn(rows, shape.width, device=place.device), normal(shape.codewords, shape.width)
    compared = torch.ops.unicode_fast.compared_codewords(features, codebook.to(place.device))
    assert compared.dtype == torch.int32
    assert compared.shape == (rows,)
    assert int(compared.min()) >= 1
    assert float(compared.double().mean()) <= MOST_COMPARED


@searches_in_half_precision()
def test_what_half_precision_cannot_serve_falls_back(place: Place) -> None:
    """Rows that hold NaN or are too far away, and rows with more candidates than a list has places."""
    near = normal(1, 40).expand(9, 40) + 1e-2 * torch.eye(9, 40)
    codebook = torch.cat([near, normal(60, 40, seed=1)]).to(place.device)
    features = torch.cat([codebook[:1], codebook[9:10], codebook[:1] * torch.nan, codebook[:1] * 1e30])
    compared = torch.ops.unicode_fast.compared_codewords(features, codebook)
    assert compared.tolist() == [-1, 1, -1, -1]


@searches_in_half_precision()
@pytest.mark.parametrize("spread", [1e-6, 1e-4])
def test_a_cluster_has_one_candidate(spread: float, place: Place) -> None:
    """A codebook of 7 tight clusters: one codeword of a cluster takes part in the search, and its members decide."""
    codebook = normal(7, 70, seed=1)[torch.arange(300) % 7] + spread * normal(300, 70, seed=2)
    features = torch.cat([normal(100, 70), codebook[::9]])
    codebook, features = codebook.to(place.device), features.to(place.device)
    compared = torch.ops.unicode_fast.compared_codewords(features, codebook)
    assert int(compared.min()) >= 1
    assert float(compared.double().mean()) <= MOST_COMPARED
    truth = (features.double().cpu()[:, None] - codebook.double().cpu()).square().sum(2).argmin(1)
    for given in (codebook, PreparedCodebook(codebook)):
        assert torch.equal(nearest_codeword(features, given, backend=place.backend).index.cpu(), truth)


@searches_in_half_precision()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copies_of_a_codeword_are_no_candidates(dtype: torch.dtype, place: Place) -> None:
    """A codebook of 40 different codewords among 600, and of one; of equal ones the lowest index wins."""
    different = normal(40, 70, seed=1).to(dtype)
    different[:, 0] = 0.0
    codebook = different[torch.arange(600) ** 2 % 40].to(place.device)
    codebook[::2, 0] = -0.0
    codebook[7, 3] = torch.nan
    features = normal(100, 70).to(place.device)
    compared = torch.ops.unicode_fast.compared_codewords(features, codebook)
    assert int(compared.min()) >= 1
    assert float(compared.double().mean()) <= MOST_COMPARED
    distances = (features.double().cpu()[:, None] - codebook.double().cpu()).square().sum(2).nan_to_num(torch.inf)
    assert torch.equal(nearest_codeword(features, codebook, backend=place.backend).index.cpu(), distances.argmin(1))
    one = codebook[:1].expand(600, 70)
    assert torch.ops.unicode_fast.compared_codewords(features, one).tolist() == [1] * 100
    assert int(nearest_codeword(features, one, backend=place.backend).index.max()) == 0


@pytest.mark.skipif(not ON_HOST, reason="only the emulator can be any GPU")
@pytest.mark.parametrize("capability", ["80", "86", "90"])
@pytest.mark.parametrize(("multiprocessors", "width"), [("1", 130), ("20", 130)])
def test_whatever_the_gpu(monkeypatch: pytest.MonkeyPatch, capability: str, multiprocessors: str, width: int) -> None:
    """The tiles and splits that a GPU's size decides: wgmma, wide or middle tiles on 1 multiprocessor, splits on 20."""
    monkeypatch.setenv("UNICODE_FAST_HOST_CAPABILITY", capability)
    monkeypatch.setenv("UNICODE_FAST_HOST_MULTIPROCESSORS", multiprocessors)
    features, codebook = normal(258, width), normal(300, width, seed=1)
    truth = (features.double()[:, None] - codebook.double()).square().sum(2).argmin(1)
    assert torch.equal(nearest_codeword(features, codebook, backend="cpp").index, truth)
    assert int(torch.ops.unicode_fast.compared_codewords(features, codebook).min()) >= 1


@pytest.mark.skipif(not ON_HOST, reason="only the emulator can be any GPU")
@pytest.mark.parametrize("codewords", [200, 600])
@pytest.mark.parametrize(("width", "dtype"), [(128, torch.float32), (136, torch.bfloat16), (256, torch.float32)])
def test_blocks_that_do_several_tiles_of_rows(
    monkeypatch: pytest.MonkeyPatch, width: int, dtype: torch.dtype, codewords: int
) -> None:
    """One block of wgmma does six tiles of rows and prepares each before its turn, bit for bit as six blocks do."""
    monkeypatch.setenv("UNICODE_FAST_MAIN_LOOP", "wgmma")
    features, codebook = normal(710, width).to(dtype), normal(codewords, width, seed=1).to(dtype)
    results = []
    for multiprocessors in ("132", "1"):
        monkeypatch.setenv("UNICODE_FAST_HOST_MULTIPROCESSORS", multiprocessors)
        found = nearest_codeword(features, codebook, backend="cpp")
        results.append((*found, torch.ops.unicode_fast.compared_codewords(features, codebook)))
    assert all(torch.equal(former, present) for former, present in zip(*results, strict=True))
    truth = (features.double()[:, None] - codebook.double()).square().sum(2).argmin(1)
    assert torch.equal(results[1][0], truth)
