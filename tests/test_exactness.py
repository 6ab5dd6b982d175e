"""The bound of docs/exactness.md: the rounding emulated in PyTorch over millions of scores, and the C++ code."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import normal
from torch import Tensor

UNIT = 2.0**-23
LARGEST = 32767


def rounded(values: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """Integers of the search as float64, and the factors by which values were multiplied; `norms` of the vectors."""
    longest = 46000 - values.shape[1] ** 0.5 / 2
    top = values.abs().amax(1, keepdim=True) if norms.ndim else values.abs().amax()
    steps = torch.minimum(longest / norms, LARGEST / top.clamp_min(2.0**-40)).float().double()
    return (values * steps).round(), steps


def scores_and_bound(rows: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computed scores (N, M), true ones (N, M) and the bound (N,), all float64."""
    width = rows.shape[1]
    mean = codebook.double().mean(0).float().double()
    centred = codebook.double() - mean
    largest = centred.abs().max()
    scale = 2.0 ** -largest.log2().floor() if largest > 0 else torch.tensor(1.0, dtype=torch.float64)
    codes = centred * scale
    # In float32, as the kernels do it.
    y_float = ((rows.float() - mean.float()) * (2 * scale).float()).double()
    y = 2 * scale * (rows.double() - mean)
    squared = codes.square().sum(1).max()
    kept_codes, code_steps = rounded(codes, squared.sqrt())
    inflate = 1 + (width + 16) * UNIT
    norm = y_float.norm(dim=1, keepdim=True) * inflate
    kept_rows, steps = rounded(y_float, norm.clamp_min(2.0**-40))
    unit = 1 / (steps * code_steps)
    norms = codes.square().sum(1).float()
    computed = (norms - (kept_rows @ kept_codes.T).float() * unit.float()).double()
    true = codes.square().sum(1) - y @ codes.T
    norm = norm * steps
    residual = (y_float * steps - kept_rows).norm(dim=1, keepdim=True) * inflate + 2 * UNIT * norm
    kept, rest = kept_codes.norm(dim=1).max(), (codes * code_steps - kept_codes).norm(dim=1).max()
    bound = (
        unit * (residual * kept + norm * rest)
        + 2 * UNIT * (squared + unit * (norm + residual) * kept)
        + width * 2.0**-60
    )
    return computed, true, bound[:, 0]


def near_ties(rows: int, codewords: int, width: int) -> tuple[Tensor, Tensor]:
    """Codewords in pairs one unit in the last place apart, rows in the middle of pairs."""
    first = normal(codewords // 2, width)
    second = first.clone()
    second[:, 0] = torch.nextafter(second[:, 0], torch.full_like(second[:, 0], torch.inf))
    codebook = torch.cat([first, second])
    return codebook[torch.arange(rows) % codewords] + 1e-3 * normal(rows, width, seed=1), codebook


def aligned(rows: int, codewords: int, width: int) -> tuple[Tensor, Tensor]:
    """Rows parallel to codewords and all of one sign, where rounding errors add up rather than cancel."""
    codebook = normal(codewords, width).abs() + 1
    codebook[::2] *= -1
    return codebook[torch.arange(rows) % codewords] * (1 + normal(rows, 1, seed=1).abs()), codebook


DATA: dict[str, Callable[[int, int, int], tuple[Tensor, Tensor]]] = {
    "normal": lambda n, m, d: (normal(n, d), normal(m, d, seed=1)),
    "offset": lambda n, m, d: (normal(n, d) + 1e3, normal(m, d, seed=1) + 1e3),
    "rows far away": lambda n, m, d: (normal(n, d) + 1e4, 1e-2 * normal(m, d, seed=1)),
    "many magnitudes": lambda n, m, d: (
        normal(n, d) * torch.logspace(-6, 6, n)[:, None],
        normal(m, d, seed=1) * torch.logspace(-6, 3, m)[:, None],
    ),
    "tiny": lambda n, m, d: (1e-30 * normal(n, d), 1e-30 * normal(m, d, seed=1)),
    "near ties": near_ties,
    "aligned": aligned,
}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(("rows", "codewords", "width"), [(100_000, 32, 8), (4_000, 100, 96), (1_000, 60, 1000)])
def test_bound_and_candidates(data: str, rows: int, codewords: int, width: int) -> None:
    features, codebook = DATA[data](rows, codewords, width)
    computed, true, bound = scores_and_bound(features, codebook)
    finite = computed.isfinite().all(1) & bound.isfinite()
    assert finite.float().mean() > 0.99
    # The true score is computed in float64: its own error is far below the bound's.
    assert ((computed - true).abs().amax(1) <= bound)[finite].all()
    candidates = computed <= computed.amin(1, keepdim=True) + 2 * bound[:, None]
    nearest = torch.cdist(features.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    assert candidates.gather(1, nearest[:, None])[finite[:, None]].all()


def test_the_bound_is_not_idle() -> None:
    """With a hundredth of it, scores and candidates fail: the test above can fail."""
    features, codebook = DATA["aligned"](4_000, 100, 96)
    computed, true, bound = scores_and_bound(features, codebook)
    assert not ((computed - true).abs().amax(1) <= bound / 100).all()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The loops of csrc/cpu, compiled by themselves."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler was found")
    source = Path(__file__).parent / "cpu_scores.cpp"
    built = tmp_path_factory.mktemp("scores") / "scores.so"
    command = [compiler, "-std=c++20", "-O3", "-fPIC", "-shared", "-o", str(built), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return ctypes.CDLL(str(built))


def address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@pytest.mark.parametrize("kernels", ["twin", "portable", "avx2", "avx_vnni", "avx512", "avx512_vnni"])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(
    ("rows", "codewords", "width"), [(30_000, 34, 7), (2_000, 100, 96), (500, 70, 1001), (100, 40, 4096)]
)
def test_scores_of_the_compiled_loops(
    library: ctypes.CDLL, data: str, kernels: str, rows: int, codewords: int, width: int
) -> None:
    if not library.usable(kernels.encode()):
        pytest.skip(f"this processor has no {kernels}")
    features, codebook = DATA[data](rows, codewords, width)
    features, exact = features.contiguous(), codebook.double().contiguous()
    scores, twice = torch.empty(rows, codewords), torch.empty(rows)
    mean, scale = torch.empty(width), ctypes.c_double()
    sizes = (ctypes.c_int64(number) for number in (rows, codewords, width))
    outputs = (address(array) for array in (features, exact, scores, twice, mean))
    getattr(library, f"scores_{kernels}")(*sizes, *outputs, ctypes.byref(scale))
    assert scale.value > 0
    y = -2 * scale.value * (features.double() - mean.double())
    codes = scale.value * (exact - mean.double())
    true = codes.square().sum(1) + y @ codes.T
    finite = twice < 1e30
    assert finite.float().mean() > 0.99
    assert ((scores.double() - true).abs().amax(1) <= twice.double() / 2)[finite].all()
    # The bound is not too wide: errors come within a factor of thirty of it.
    if data == "aligned":
        assert ((scores.double() - true).abs().amax(1) > twice.double() / 60)[finite].any()
