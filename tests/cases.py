"""Inputs of the operator tests, each made in one place, and the places where an operator can run."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from unicode_fast import CodebookState
from unicode_fast.backend import EXTENSION, BackendUnavailable, choose_backend

# Whether backend "cpp" is csrc/cuda on the emulator, as tests/cuda_on_host/build.py makes it.
ON_HOST = EXTENSION.decision == "csrc/cuda on the host"


class Place(NamedTuple):
    """A device and a backend, and UNICODE_FAST_MAIN_LOOP if it is not the fastest."""

    operator: str
    device: str
    backend: str
    loop: str | None = None

    def skip_unless_usable(self) -> None:
        """Skip the running test where this machine lacks the device or the backend."""
        if self.device == "cuda" and not torch.cuda.is_available():
            pytest.skip("CUDA is not available")
        try:
            choose_backend(self.operator, torch.device(self.device), self.backend)
        except BackendUnavailable as error:
            pytest.skip(f"extension or backend is not available: {error}")
        if self.loop == "wgmma" and self.device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("this GPU has no wgmma")


_LOOPS = ("plain", "narrow", "middle", "wide", "wgmma")
# A new backend adds its line here, and every test of the operator runs on it.
_PLACES: dict[str, list[tuple[str, ...]]] = {
    "nearest_codeword": [
        ("cpu", "reference"),
        ("cpu", "cpp"),
        ("cuda", "reference"),
        ("cuda", "cuda"),
        *(("cuda", "cuda", loop) for loop in _LOOPS),
    ],
    "codebook_update": [("cpu", "reference"), ("cpu", "cpp"), ("cuda", "reference"), ("cuda", "cuda")],
    "codeword_distribution": [("cpu", "reference"), ("cpu", "cpp"), ("cuda", "reference")],
    "commitment_loss": [("cpu", "reference"), ("cpu", "cpp"), ("cuda", "reference"), ("cuda", "cuda")],
    "cross_info_nce": [("cpu", "reference"), ("cpu", "cpp"), ("cuda", "reference"), ("cuda", "triton")],
}
if ON_HOST:
    _PLACES["nearest_codeword"] = [("cpu", "cpp", loop) for loop in _LOOPS]
    _PLACES["codebook_update"] = _PLACES["commitment_loss"] = [("cpu", "cpp")]


def places(operator: str) -> pytest.MarkDecorator:
    """Run a test once for each device and backend of an operator, given to it as the fixture `place`."""
    chosen = [Place(operator, *names) for names in _PLACES[operator]]
    return pytest.mark.parametrize("place", chosen, ids=["-".join(names) for names in _PLACES[operator]], indirect=True)


def searches_in_half_precision() -> pytest.MarkDecorator:
    """Run a test once for each kernel of the search that scores in half precision, as the fixture `place`."""
    where = ("cpu", "cpp") if ON_HOST else ("cuda", "cuda")
    chosen = [Place("nearest_codeword", *where, loop) for loop in _LOOPS if loop != "plain"]
    return pytest.mark.parametrize("place", chosen, ids=["-".join(place[1:]) for place in chosen], indirect=True)


def generator(seed: int = 0) -> torch.Generator:
    """A CPU generator, so that every device gets the same numbers."""
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers, drawn in float64."""
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def strided(tensor: Tensor) -> Tensor:
    """The same numbers in memory with gaps, the last dimension not the fastest."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] * 2 + 1), -7, dtype=tensor.dtype, device=tensor.device)
    view = wide[..., 1::2]
    view.copy_(tensor)
    return view.transpose(0, -1).contiguous().transpose(0, -1) if tensor.dim() > 1 else view


def make_state(codebook: Tensor, modalities: int, count: float = 1.0, idle: int = 0) -> CodebookState:
    device, codewords = codebook.device, codebook.shape[0]
    return CodebookState(
        codebook.clone(),
        torch.full((codewords,), count, dtype=codebook.dtype, device=device),
        codebook.clone() * count if count else codebook.clone(),
        torch.full((modalities, codewords), idle, dtype=torch.int64, device=device),
        torch.zeros((), dtype=torch.int64, device=device),
    )


NearestInputs = tuple[Tensor, Tensor]


def _gaussian(rows: int, codewords: int, width: int, dtype: torch.dtype = torch.float32) -> Callable[[], NearestInputs]:
    return lambda: (normal(rows, width, dtype=dtype), normal(codewords, width, seed=1, dtype=dtype))


def _one_ulp_apart(dtype: torch.dtype) -> NearestInputs:
    """Pairs of codewords that differ by one unit in the last place of one coordinate, and rows on and between them."""
    first = normal(30, 24, dtype=dtype)
    second = first.clone()
    second[:, 5] = torch.nextafter(second[:, 5], torch.full_like(second[:, 5], torch.inf))
    rows = torch.cat([first, second, first + normal(30, 24, seed=2, dtype=dtype)])
    return rows, torch.stack([second, first], dim=1).flatten(0, 1)


def _duplicates() -> NearestInputs:
    codewords = normal(7, 20)
    copies = codewords[torch.randint(7, (50,), generator=generator())]
    return torch.cat([codewords, normal(60, 20, seed=2)]), copies


def _far_clusters() -> NearestInputs:
    """Two clusters far from each other and from the origin, of many codewords that are one ulp or so apart."""
    centres = torch.tensor([[1000.0], [-1000.0]]).expand(2, 16)
    spread = 2.0**-13 * torch.randint(-2, 3, (2, 40, 16), generator=generator())
    codewords = (centres[:, None] + spread).flatten(0, 1)
    return codewords[torch.randperm(80, generator=generator(1))] + 2.0**-14, codewords


def _clusters(clusters: int, members: int, spread: float, width: int = 24) -> tuple[Tensor, Tensor]:
    """Clusters of more codewords than a list of candidates holds, in mixed order; rows on, near and between them."""
    centres = normal(clusters, width, seed=3)
    codewords = (centres[:, None] * (1 + spread * normal(clusters, members, width, seed=4))).flatten(0, 1)
    codewords = codewords[torch.randperm(clusters * members, generator=generator())]
    between, near = (centres + centres.roll(1, 0)) / 2, centres + 1e-2 * normal(clusters, width)
    return torch.cat([codewords, between, near, normal(100, width, seed=5)]), codewords


def _cluster_and_outlier() -> NearestInputs:
    rows, codewords = _clusters(1, 80, 1e-6)
    return rows, torch.cat([10 * normal(1, 24, seed=6), codewords])


def _nested_clusters() -> NearestInputs:
    """Two clusters, each of two tighter ones, far from the rest."""
    rows, codewords = _clusters(2, 40, 1e-6)
    apart = 2e-4 * normal(1, 24, seed=7)
    return torch.cat([rows, rows + apart]), torch.cat([codewords, codewords + apart, 100 * normal(3, 24, seed=8)])


def _widest() -> NearestInputs:
    """Rows on, one ulp beside and between codewords of the largest width, all far from the origin."""
    codewords = normal(24, 4096) + 100
    beside = codewords.clone()
    beside[:, 4000] = torch.nextafter(beside[:, 4000], torch.full((24,), torch.inf))
    between = (codewords[:-1] + codewords[1:]) / 2
    return torch.cat([beside, between, normal(10, 4096, seed=1) + 100]), torch.cat([beside, codewords])


def _sphere() -> NearestInputs:
    """Rows at the centre of codewords that are equally far from it, with others far away."""
    signs = torch.randint(0, 2, (60, 16), generator=generator()) * 2.0 - 1
    return torch.zeros(5, 16), torch.cat([signs * 1e-3, 1e3 * normal(20, 16)])


def _subnormal() -> NearestInputs:
    return normal(40, 19) * 2.0**-140, normal(23, 19, seed=1) * 2.0**-140


def _magnitudes() -> NearestInputs:
    scale = torch.logspace(-20, 18, 39)[:, None]
    return normal(39, 12) * scale, normal(39, 12, seed=1) * scale


# Each is a hard case for a search that compares |c|^2 - 2 x.c, rounds its operands, or works in blocks.
NEAREST_CASES: dict[str, Callable[[], NearestInputs]] = {
    "training": _gaussian(800, 400, 256),
    "no_rows": _gaussian(0, 5, 8),
    "one_row": _gaussian(1, 400, 256),
    "one_codeword": _gaussian(33, 1, 16),
    "few_codewords": _gaussian(533, 3, 16),
    "primes": _gaussian(101, 37, 13),
    "below_blocks": _gaussian(127, 63, 31),
    "above_blocks": _gaussian(129, 65, 33),
    "width_1": _gaussian(367, 50, 1),
    "width_2": _gaussian(367, 50, 2),
    "width_3": _gaussian(367, 50, 3),
    "width_1_many": _gaussian(50, 3000, 1),
    "many_tiles": _gaussian(300, 1801, 70),
    "many_one_block_tiles": _gaussian(130, 2900, 64),
    "many_blocks": _gaussian(150, 520, 320),
    "widest_in_large_tiles": _gaussian(70, 770, 576),
    "wider": _gaussian(70, 300, 577),
    "widest": _widest,
    "float64": _gaussian(67, 50, 40, torch.float64),
    "float16": _gaussian(67, 50, 40, torch.float16),
    "bfloat16": _gaussian(67, 50, 40, torch.bfloat16),
    "float16_and_float32": lambda: (normal(67, 40, dtype=torch.float16), normal(50, 40, seed=1)),
    "bfloat16_and_float64": lambda: (normal(67, 40, dtype=torch.bfloat16), normal(50, 40, seed=1, dtype=torch.float64)),
    "float64_and_float32": lambda: (normal(67, 40, dtype=torch.float64), normal(50, 40, seed=1)),
    "float16_subnormal_and_float32": lambda: (
        (normal(67, 40) * 2.0**-20).half(),
        normal(50, 40, seed=1) * 2.0**-20,
    ),
    "float16_and_far_float32": lambda: ((2e4 * normal(67, 40)).half(), 1e30 * normal(50, 40, seed=1)),
    "bfloat16_and_float32_ulp_apart": lambda: (
        _one_ulp_apart(torch.float32)[0].bfloat16(),
        _one_ulp_apart(torch.float32)[1],
    ),
    "float32_and_beyond_float32": lambda: (
        normal(67, 40),
        normal(50, 40, seed=1, dtype=torch.float64) * torch.logspace(-300, 150, 50, dtype=torch.float64)[:, None],
    ),
    "float32_ulp_apart": lambda: _one_ulp_apart(torch.float32),
    "float64_ulp_apart": lambda: _one_ulp_apart(torch.float64),
    "duplicates": _duplicates,
    "all_equal": lambda: (normal(20, 8), torch.ones(50, 8)),
    "on_codewords": lambda: (normal(50, 30, seed=1), normal(50, 30, seed=1)),
    "offset_1e4": lambda: (normal(90, 32) + 1e4, normal(70, 32, seed=1) + 1e4),
    "offset_1e6": lambda: (normal(90, 32) + 1e6, normal(70, 32, seed=1) + 1e6),
    "rows_far_away": lambda: (normal(90, 32) + 1e5, 1e-3 * normal(70, 32, seed=1)),
    "far_clusters": _far_clusters,
    "clusters": lambda: _clusters(4, 30, 1e-6),
    "near_clusters": lambda: _clusters(3, 40, 2e-4),
    "loose_clusters": lambda: _clusters(3, 40, 2e-3),
    "cluster_and_outlier": _cluster_and_outlier,
    "nested_clusters": _nested_clusters,
    "clusters_float64": lambda: (_clusters(4, 30, 1e-12)[0], _clusters(4, 30, 1e-6)[1].double() * (1 + 1e-12)),
    "clusters_float16": lambda: (_clusters(3, 30, 1e-6)[0].half(), _clusters(3, 30, 2e-3)[1].half()),
    "sphere": _sphere,
    "tiny": lambda: (1e-30 * normal(60, 24), 1e-30 * normal(40, 24, seed=1)),
    "huge": lambda: (1e17 * normal(60, 24), 1e17 * normal(40, 24, seed=1)),
    "largest": lambda: (6e37 * normal(60, 24), 6e37 * normal(40, 24, seed=1)),
    "beyond_half": lambda: (1e6 * normal(60, 24), 1e6 * normal(40, 24, seed=1)),
    "subnormal": _subnormal,
    "magnitudes": _magnitudes,
}
