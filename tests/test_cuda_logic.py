"""The logic that the CUDA kernels share with the host, compiled for the host: bound, candidates, draws, tiles.

The rounding of the half-precision search is emulated in PyTorch, so no GPU is needed.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from cases import generator, normal
from numpy.typing import NDArray
from torch import Tensor

from unicode_fast.reference import counter_random

CSRC = Path(__file__).resolve().parent.parent / "csrc"
SOURCE = r"""
#include "common/counter_random.h"
#include "common/tiles.h"
#include "cuda/nearest_codeword/candidates.h"
#include "cuda/nearest_codeword/hopper_tiles.h"

#include <algorithm>

using namespace unicode_fast;

extern "C" {

int codebook_exponent(double largest) { return codebook_scale(largest); }

void row_exponents(int64_t rows, const double* largest, int codebook, int* exponents) {
  for (int64_t i = 0; i < rows; ++i) exponents[i] = row_scale(largest[i], codebook);
}

void float_exponents(int64_t rows, const float* largest, int codebook, int* exponents) {
  for (int64_t i = 0; i < rows; ++i) exponents[i] = row_scale(largest[i], codebook);
}

void twice_bounds(int64_t rows, const double* exact, const double* rounded, const double* residual, const int* shift,
                  const float* norms, int width, float* bounds) {
  for (int64_t i = 0; i < rows; ++i)
    bounds[i] = twice_bound({exact[i], rounded[i], residual[i]}, {norms[0], norms[1], norms[2]}, shift[i], width);
}

void row_norms(int64_t rows, const float* exact, const float* rounded, const float* residual, int width,
               double* norms) {
  for (int64_t i = 0; i < rows; ++i) {
    const RowNorms found = norms_of_sums(exact[i], rounded[i], residual[i], width);
    norms[i] = found.exact;
    norms[rows + i] = found.rounded;
    norms[2 * rows + i] = found.residual;
  }
}

// As in a block: tiles of `lists` sections of `section` codewords, a list for each section.
void find_candidates(int64_t rows, int64_t codewords, const float* scores, const float* bounds, int lists, int section,
                     Record* records) {
  for (int64_t i = 0; i < rows; ++i) {
    Candidate list[8 * kCandidates];
    float lowest[8];
    int counts[8] = {};
    std::fill(lowest, lowest + 8, kNoScore);
    for (int64_t first = 0; first < codewords; first += lists * section) {
      for (int p = 0; p < lists; ++p) {
        const int64_t begin = std::min(codewords, first + p * section), end = std::min(codewords, begin + section);
        const float* own = scores + i * codewords;
        float low = INFINITY;
        for (int64_t j = begin; j < end; ++j) low = fminf(low, own[j]);
        if (!(low <= add_up(lowest[p], bounds[i]))) continue;
        const float limit = lower_minimum(lowest[p], counts[p], low, bounds[i]);
        const int more = static_cast<int>(std::count_if(own + begin, own + end, [=](float s) { return s <= limit; }));
        counts[p] = make_room(list + p * kCandidates, counts[p], more, limit);
        if (counts[p] > kCandidates) continue;
        for (int64_t j = begin; j < end; ++j)
          if (own[j] <= limit) list[p * kCandidates + counts[p]++] = {own[j], static_cast<int>(j)};
      }
    }
    merge(list, lowest, counts, lists, bounds[i], records[i]);
  }
}

void direct_limits(int64_t count, const float* lowest, int64_t width, float* limits) {
  for (int64_t i = 0; i < count; ++i) limits[i] = direct_limit(lowest[i], width);
}

void member_errors(int64_t count, const float* rows, const float* members, const int* shifts, int width,
                   float* errors) {
  for (int64_t i = 0; i < count; ++i) errors[i] = member_error(rows[i], members[i], shifts[i], width);
}

void sums_up(int64_t count, const float* a, const float* b, float* sums) {
  for (int64_t i = 0; i < count; ++i) sums[i] = add_up(a[i], b[i]);
}

void draws(int64_t seed, int64_t step, int64_t stream, int64_t count, int64_t bound, uint64_t* bits, double* uniforms,
           int64_t* integers) {
  const uint64_t key = counter_random::key(seed, step, stream);
  for (int64_t i = 0; i < count; ++i) {
    bits[i] = counter_random::random_bits(key, i);
    uniforms[i] = counter_random::uniform(key, i);
    integers[i] = counter_random::integer(key, i, bound);
  }
}

int nearer_of(double distance, int64_t j, double best_distance, int64_t best) {
  return nearer(distance, j, best_distance, best);
}

void offsets(int rows, int width, uint32_t* places) {
  for (int i = 0; i < rows * width / 8; ++i) places[i] = piece_offset(i / (width / 8), i % (width / 8), width);
}

int stages(int width, int buffers) { return ring_stages(width, buffers); }
int buffers(int width) { return row_buffers(width); }

int64_t shared_bytes(int width, int buffers) { return kBarrierBytes + ring_and_row_bytes(width, buffers); }

uint64_t descriptor(uint32_t address) { return operand_descriptor(address); }

void constants(int64_t* result) {
  const int64_t all[] = {kTileCodewords, kGroupRows,      kGroups,       kStepWidth,      kBlockBytes,
                         kNormBytes,     kFullStageBytes, kSwizzleBytes, kMostSharedBytes};
  std::copy_n(all, sizeof(all) / sizeof(all[0]), result);
}

// As codeword_kernel writes them.
void write_tiles(int64_t codewords, int width, const uint16_t* operands, const float* norms, unsigned char* memory) {
  for (int64_t j = 0; j < codewords; ++j) {
    for (int d = 0; d < width; ++d)
      *reinterpret_cast<uint16_t*>(memory + operand_place(j, d, width)) = operands[j * width + d];
    *reinterpret_cast<float*>(memory + norm_place(j, width)) = norms[j];
  }
}

// As load_rows does.
void write_rows(int width, const uint16_t* rows, unsigned char* memory) {
  for (int r = 0; r < kGroupRows; ++r)
    for (int piece = 0; piece < width / 8; ++piece)
      std::copy_n(rows + r * width + piece * 8, 8,
                  reinterpret_cast<uint16_t*>(memory + block_offset(r, piece, kGroupRows)));
}

void splits(int64_t tiles, int64_t row_tiles, int64_t blocks, int most, int* result) {
  const Splits found = split_tiles(tiles, row_tiles, blocks, most);
  result[0] = found.count;
  result[1] = found.per_split;
}

}
"""
CANDIDATES = 6
OVERFLOW = CANDIDATES + 1
RECORD = np.dtype([("lowest", np.float32), ("count", np.int32), ("index", np.int32, CANDIDATES)])
INF, NAN = float("inf"), float("nan")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler was found for the logic of the kernels")
    folder = tmp_path_factory.mktemp("logic")
    (folder / "logic.cpp").write_text(SOURCE)
    command = [compiler, "-std=c++17", "-O2", "-shared", "-fPIC", f"-I{CSRC}", "logic.cpp", "-o", "logic.so"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "logic.so"))


def pointer(array: NDArray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def long(number: int) -> ctypes.c_int64:
    return ctypes.c_int64(number)


@pytest.mark.parametrize(("seed", "step", "stream"), [(0, 0, 0), (1, 2, 3), (-5, 10**12, 2), (2**63 - 1, 2**62, 1)])
def test_draws(library: ctypes.CDLL, seed: int, step: int, stream: int) -> None:
    count, bound = 1000, 12345
    bits, uniforms = np.empty(count, np.uint64), np.empty(count)
    integers = np.empty(count, np.int64)
    arrays = [pointer(array) for array in (bits, uniforms, integers)]
    library.draws(long(seed), long(step), long(stream), long(count), long(bound), *arrays)
    place = (seed, torch.tensor(step), stream, (count,))
    assert np.array_equal(bits.view(np.int64), counter_random.random_bits(*place).numpy())
    assert np.array_equal(uniforms, counter_random.uniform(*place).numpy())
    assert np.array_equal(integers, counter_random.integers(bound, *place).numpy())


def test_sums_are_rounded_up(library: ctypes.CDLL) -> None:
    a, b = (normal(200_000, seed=seed).numpy() * np.float32(2.0) ** np.arange(-20, 20).repeat(5000) for seed in (0, 1))
    a, b = a.astype(np.float32), b[::-1].astype(np.float32).copy()
    sums = np.empty_like(a)
    library.sums_up(long(a.size), pointer(a), pointer(b), pointer(sums))
    exact = a.astype(np.float64) + b
    assert np.all(sums >= exact)
    assert np.all(np.nextafter(sums, np.float32(-np.inf)) < exact)


@pytest.mark.parametrize(
    ("distance", "j", "best_distance", "best", "expected"),
    [
        (1.0, 5, 2.0, 0, True),
        (2.0, 0, 1.0, 5, False),
        (1.0, 4, 1.0, 5, True),
        (1.0, 5, 1.0, 4, False),
        (INF, 7, NAN, 0, True),
        (NAN, 0, INF, 7, False),
        (INF, 3, 1.7976931348623157e308, 4, True),
        (NAN, 1, NAN, 0, False),
    ],
)
def test_order_of_distances(
    library: ctypes.CDLL, distance: float, j: int, best_distance: float, best: int, expected: bool
) -> None:
    numbers = ctypes.c_double(distance), long(j), ctypes.c_double(best_distance), long(best)
    assert bool(library.nearer_of(*numbers)) == expected


@pytest.mark.parametrize("width", [64, 128, 320])
def test_pieces_have_places_of_their_own(library: ctypes.CDLL, width: int) -> None:
    rows = 16
    places = np.empty((rows, width // 8), np.uint32)
    library.offsets(rows, width, pointer(places))
    assert sorted(places.reshape(-1).tolist()) == list(range(0, rows * width * 2, 16))
    assert np.array_equal(places // (width * 2), np.arange(rows)[:, None].repeat(width // 8, axis=1))
    # What eight threads read or write together lies in different banks: 128 bytes are all of them.
    for first in (0, 8):
        for piece in range(width // 8):
            assert len(set((places[first : first + 8, piece] % 128).tolist())) == 8


class HopperTiles(NamedTuple):
    """Sizes of csrc/cuda/nearest_codeword/hopper_tiles.h."""

    codewords: int
    rows: int
    groups: int
    step: int
    block_bytes: int
    norm_bytes: int
    stage_bytes: int
    swizzle_bytes: int
    most_shared_bytes: int


@pytest.fixture(scope="module")
def tiles(library: ctypes.CDLL) -> HopperTiles:
    numbers = np.empty(len(HopperTiles._fields), np.int64)
    library.constants(pointer(numbers))
    library.descriptor.restype = ctypes.c_uint64
    library.shared_bytes.restype = ctypes.c_int64
    return HopperTiles(*numbers.tolist())


def read_operand(memory: NDArray, descriptor: int, rows: int) -> NDArray:
    """What wgmma reads, (rows, 16): by the fields of the descriptor, swizzled by the bits of the address."""
    start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    assert descriptor >> 62 == 1, "not the swizzle of 128 bytes"
    assert descriptor >> 49 & 7 == 0, "the pattern begins elsewhere"
    row, k = np.arange(rows)[:, None], np.arange(16)[None]
    address = start + row // 8 * stride + row % 8 * 128 + k * 2
    address = address ^ (address >> 7 & 7) << 4
    return memory.view(np.uint16)[address // 2]


@pytest.mark.parametrize("address", [0, 1024, 33 * 1024, 226 * 1024])
def test_descriptor_has_its_fields(library: ctypes.CDLL, tiles: HopperTiles, address: int) -> None:
    descriptor = library.descriptor(address)
    assert (descriptor & 0x3FFF) << 4 == address
    assert (descriptor >> 32 & 0x3FFF) << 4 == 8 * 128 == tiles.swizzle_bytes
    assert descriptor >> 62 == 1
    # Other fields are zero but for the leading offset, without meaning; the next 16 dimensions only change the address.
    assert descriptor & ~(0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 3 << 62) == 0
    assert library.descriptor(address + 96) == descriptor + 6


@pytest.mark.parametrize("width", [64, 128, 576])
def test_matrix_units_read_what_was_written(library: ctypes.CDLL, tiles: HopperTiles, width: int) -> None:
    """Writes tiles of codewords and a warpgroup's rows, copies a stage at a time, and reads by descriptors."""
    count = 2 * tiles.codewords
    codewords = np.arange(count * width, dtype=np.uint32).astype(np.uint16).reshape(count, width)
    rows = codewords[: tiles.rows] * np.uint16(7) + np.uint16(3)
    norms = np.arange(count, dtype=np.float32)
    tile_bytes = width // tiles.step * tiles.block_bytes + tiles.norm_bytes
    memory = np.zeros(2 * tile_bytes, np.uint8)
    library.write_tiles(long(count), width, pointer(codewords), pointer(norms), pointer(memory))
    row_bytes = tiles.rows * width * 2
    ring = 2 * row_bytes  # the second warpgroup's rows come first, as in a block
    shared = np.zeros(ring + 2 * tiles.stage_bytes, np.uint8)
    row_tile = np.zeros(row_bytes, np.uint8)
    library.write_rows(width, pointer(rows), pointer(row_tile))
    shared[row_bytes:ring] = row_tile
    chunks = width // tiles.step
    for step in range(2 * chunks):
        tile, chunk = divmod(step, chunks)
        stage = ring + step % 2 * tiles.stage_bytes
        assert stage % tiles.swizzle_bytes == 0
        size = tiles.block_bytes + (chunk == chunks - 1) * tiles.norm_bytes
        begin = tile * tile_bytes + chunk * tiles.block_bytes
        assert begin % 16 == size % 16 == 0
        shared[stage : stage + size] = memory[begin : begin + size]
        for k in range(tiles.step // 16):
            dimensions = slice(chunk * tiles.step + k * 16, chunk * tiles.step + k * 16 + 16)
            place = library.descriptor(stage) + k * 2
            expected = codewords[tile * tiles.codewords : (tile + 1) * tiles.codewords, dimensions]
            assert np.array_equal(read_operand(shared, place, tiles.codewords), expected)
            place = library.descriptor(row_bytes) + chunk * (tiles.rows * 2 * tiles.step >> 4) + k * 2
            assert np.array_equal(read_operand(shared, place, tiles.rows), rows[:, dimensions])
    kept = shared[stage + tiles.block_bytes : stage + tiles.stage_bytes].view(np.float32)
    assert np.array_equal(kept, norms[tiles.codewords :])


def test_stages_fit(library: ctypes.CDLL, tiles: HopperTiles) -> None:
    assert [library.stages(width, 1) for width in (64, 128, 192, 256, 320, 384, 448, 512, 576, 640, 2**20)] == [
        *(6, 5, 5, 4, 4, 3, 3, 2, 2),
        *(0, 0),
    ]
    for width in range(64, 640, 64):
        assert library.shared_bytes(width, 1) <= tiles.most_shared_bytes
        assert tiles.groups * tiles.rows * 2 * width % tiles.swizzle_bytes == 0
    assert tiles.stage_bytes % tiles.swizzle_bytes == 0
    # A persistent grid keeps two tiles of rows, or one and two in global memory.
    assert [library.buffers(width) for width in range(64, 640, 64)] == [2, 2, 3, 3] + 5 * [1]
    kept = {64: 2, 128: 2, 192: 3, 256: 3}
    stages = {width: library.stages(width, buffers) for width, buffers in kept.items()}
    assert stages == {64: 5, 128: 4, 192: 4, 256: 4}
    assert max(library.shared_bytes(*pair) for pair in kept.items()) <= tiles.most_shared_bytes
    # The last tile's blocks have been read as many stages earlier as a row has blocks.
    assert all(stages[width] >= width // 64 for width in (192, 256))


def test_the_scale_of_a_row_needs_no_float64(library: ctypes.CDLL) -> None:
    bits = np.r_[np.arange(0, 0x7F800000, 65_521), np.arange(300), 2**23 - 1, 2**23, 0x7F7FFFFF, 0x7F800000, 0x7FC00000]
    largest = bits.astype(np.uint32).view(np.float32)
    wide = largest.astype(np.float64)
    for codebook in (-130, 0, 160):
        expected, found = np.empty(len(bits), np.int32), np.empty(len(bits), np.int32)
        library.row_exponents(long(len(bits)), pointer(wide), codebook, pointer(expected))
        library.float_exponents(long(len(bits)), pointer(largest), codebook, pointer(found))
        assert np.array_equal(found, expected)


def test_splits_cover_all_tiles(library: ctypes.CDLL) -> None:
    for tiles in (1, 2, 3, 4, 7, 31, 32, 33, 64, 1000):
        for row_tiles in (1, 13, 38, 500):
            result = np.empty(2, np.int32)
            library.splits(long(tiles), long(row_tiles), long(264), 32, pointer(result))
            count, per_split = result.tolist()
            assert 1 <= count <= 32
            assert (count - 1) * per_split < tiles <= count * per_split


def test_splits_leave_no_block_for_another_round(library: ctypes.CDLL) -> None:
    """19 x 7 blocks would take two rounds on 132 multiprocessors, so it is 6 splits; many rows need none."""
    result = np.empty(2, np.int32)
    for tiles, row_tiles, expected in ((32, 19, [6, 6]), (4, 38, [4, 1]), (32, 7813, [1, 32]), (32, 1, [32, 1])):
        library.splits(long(tiles), long(row_tiles), long(264 if tiles == 4 else 132), 32, pointer(result))
        assert result.tolist() == expected


class Operands(NamedTuple):
    """Numbers as the matrix units read them, and the numbers for the bound, by row; in float64."""

    exact: Tensor  # scaled
    rounded: Tensor  # to half precision
    exponent: Tensor


def operands(centred: Tensor, exponent: Tensor) -> Operands:
    exact = centred * torch.exp2(exponent.double())[..., None]
    return Operands(exact, exact.float().half().double(), exponent)


def cut(values: Tensor, unit: Tensor) -> Tensor:
    return (values / unit).trunc() * unit


def matrix_unit(rows: Tensor, codewords: Tensor) -> Tensor:
    """Products with codewords, (N, M): sixteen at a time are added to a float32 number.

    Each is truncated at the 24th bit of the largest of them, and so is their sum.
    """
    sums = torch.zeros(rows.shape[0], codewords.shape[0], dtype=torch.float64)
    for first in range(0, rows.shape[1], 16):
        terms = rows[:, None, first : first + 16] * codewords[None, :, first : first + 16]
        largest = torch.maximum(terms.abs().amax(dim=2), sums.abs())
        unit = torch.exp2(torch.frexp(largest)[1].double() - 24)
        sums = cut(sums, unit) + cut(terms, unit[..., None]).sum(dim=2)
        sums = cut(sums, torch.exp2(torch.frexp(sums)[1].double() - 24))
    return sums


def norm(numbers: Tensor) -> Tensor:
    return numbers.square().sum(dim=1).sqrt()


def norms_in_float32(library: ctypes.CDLL, scaled: Tensor, rounded: Tensor, width: int) -> NDArray:
    """The norms of rows as load_rows_once finds them, (3, N): sums of squares in float32, one after the other."""
    numbers = (scaled, rounded, scaled - rounded)
    sums = [tensor.square().cumsum(dim=1)[:, -1].contiguous().numpy() for tensor in numbers]
    norms = np.empty((3, scaled.shape[0]))
    library.row_norms(long(scaled.shape[0]), *map(pointer, sums), width, pointer(norms))
    return norms


def search(library: ctypes.CDLL, features: Tensor, codebook: Tensor, *, once: bool) -> tuple[NDArray, Tensor, Tensor]:
    """The records of all rows, and the errors of their scores with the bound of each row, in float64.

    Args:
        once: rows are centred and their norms computed in float32, as by load_rows_once.
    """
    mean = codebook.double().mean(dim=0).float().double()
    from_mean = codebook.double() - mean
    library.codebook_exponent.argtypes = [ctypes.c_double]
    exponent = library.codebook_exponent(from_mean.abs().max().item())
    codes = operands(from_mean, torch.full((codebook.shape[0],), exponent))
    squared = codes.exact.square().sum(dim=1)
    maxima = (squared.max(), norm(codes.rounded).max(), norm(codes.exact - codes.rounded).max())
    norms = np.array([np.nextafter(np.float32(tensor.item()), np.float32(np.inf)) for tensor in maxima])

    centred = features.double() - mean
    largest = centred.abs().amax(dim=1).float().double().numpy()
    exponents, bounds = np.empty(len(largest), np.int32), np.empty(len(largest), np.float32)
    library.row_exponents(long(len(largest)), pointer(largest), exponent, pointer(exponents))
    rows = operands(centred, torch.from_numpy(exponents))
    shift = exponent - exponents
    width = -(-features.shape[1] // 64) * 64
    if once:
        parts = [torch.from_numpy(part).float()[:, None] for part in (exponents // 2, exponents - exponents // 2)]
        scaled = (features - mean.float()) * torch.exp2(parts[0]) * torch.exp2(parts[1])
        rows = rows._replace(rounded=scaled.half().double())
        row_norms = list(norms_in_float32(library, scaled, scaled.half().float(), width))
    else:
        row_norms = [norm(tensor).numpy() for tensor in (rows.exact, rows.rounded, rows.exact - rows.rounded)]
    numbers = [pointer(array) for array in (*row_norms, shift, norms)]
    library.twice_bounds(long(len(largest)), *numbers, width, pointer(bounds))

    factor = -2 * torch.exp2(torch.from_numpy(shift).double())[:, None]
    scores = (factor * matrix_unit(rows.rounded, codes.rounded) + squared.float().double()).float()
    truth = squared + factor * (rows.exact @ codes.exact.T)
    records = np.empty(len(largest), RECORD)
    columns = np.ascontiguousarray(scores.numpy())
    library.find_candidates(
        long(len(largest)), long(codebook.shape[0]), pointer(columns), pointer(bounds), 2, 3, pointer(records)
    )
    return records, (scores.double() - truth).abs().amax(dim=1), torch.from_numpy(bounds).double() / 2


def near_ties(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Pairs of codewords one unit in the last place apart, and rows between two codewords."""
    first = normal(6, width)
    second = first.clone()
    second[:, 3] = torch.nextafter(second[:, 3], torch.full_like(second[:, 3], INF))
    codebook = torch.cat([first, second])
    pairs = torch.randint(12, (2, rows), generator=generator())
    return (codebook[pairs[0]] + codebook[pairs[1]]) / 2, codebook


def on_half_steps(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Numbers halfway between two numbers of half precision, all of one sign, so that errors add up."""
    steps = 1024 + torch.randint(1024, (rows + 12, width), generator=generator()) + 0.5
    numbers = (steps / 1024).float()
    codebook = torch.cat([numbers[:6], -numbers[6:12]])
    return numbers[12:], codebook


def mixed_magnitudes(rows: int, width: int) -> tuple[Tensor, Tensor]:
    scale = torch.exp2(torch.randint(-30, 8, (width,), generator=generator()).float())
    row_scale = torch.exp2(torch.randint(-40, 40, (rows, 1), generator=generator(1)).float())
    return normal(rows, width) * scale * row_scale, normal(12, width, seed=1) * scale


# Each gives N rows and 12 codewords.
ROWS = 2**17
CASES: dict[str, Callable[[int, int], tuple[Tensor, Tensor]]] = {
    "gaussian": lambda n, d: (normal(n, d), normal(12, d, seed=1)),
    "near_ties": near_ties,
    "half_steps": on_half_steps,
    "on_codewords": lambda n, d: (
        normal(12, d).repeat(n // 12 + 1, 1)[:n] + 1e-6 * normal(n, d, seed=2),
        normal(12, d),
    ),
    "offset": lambda n, d: (normal(n, d) + 1e4, normal(12, d, seed=1) + 1e4),
    "far_rows": lambda n, d: (normal(n, d) + 1e5, 1e-3 * normal(12, d, seed=1)),
    "tiny": lambda n, d: (1e-30 * normal(n, d), 1e-30 * normal(12, d, seed=1)),
    "huge": lambda n, d: (1e17 * normal(n, d), 1e17 * normal(12, d, seed=1)),
    "subnormal": lambda n, d: (normal(n, d) * 2.0**-140, normal(12, d, seed=1) * 2.0**-140),
    "magnitudes": mixed_magnitudes,
}
# A million rows of 16 dimensions, and wider rows, which take many products of the matrix units.
SHAPES = [(name, width, rows) for name in CASES for width, rows in ((16, ROWS), (80, ROWS // 32), (4096, 100))]


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize(("name", "width", "rows"), SHAPES)
def test_bound_and_candidates(library: ctypes.CDLL, name: str, width: int, rows: int, once: bool) -> None:
    features, codebook = CASES[name](rows, width)
    records, error, bound = search(library, features, codebook, once=once)
    served = ~bound.isnan()
    assert served.float().mean() > 0.4, "the bound serves too few rows to be tested"
    assert (error <= bound)[served].all(), f"error exceeds the bound by {(error / bound)[served].max():.3g}"
    assert (records["count"][~served.numpy()] == OVERFLOW).all()
    distance = torch.stack([(features.double() - code).square().sum(dim=1) for code in codebook.double()], dim=1)
    nearest = (distance == distance.amin(dim=1, keepdim=True)).numpy()
    counts = records["count"]
    listed = np.zeros(nearest.shape, bool)
    for place in range(CANDIDATES):
        has = (counts > place) & (counts <= CANDIDATES)
        listed[has, records["index"][has, place]] = True
    whole = counts <= CANDIDATES
    assert (counts[whole] >= 1).all()
    assert not (nearest & ~listed)[whole].any(), "a nearest codeword is no candidate"
    if name == "gaussian":
        # What a sum in float32 may lose, and with it the bound, grows with the width.
        assert counts.mean() < 1.1 + width / 2**14, "the bound is too wide to be of use"


@pytest.mark.parametrize("width", [1, 16, 4096])
@pytest.mark.parametrize("size", [1e-30, 2.0**-70, 1.0, 1e4])
def test_norms_in_float32_are_rounded_up(library: ctypes.CDLL, width: int, size: float) -> None:
    """Of numbers whose squares vanish too, and where the rounding of the difference is the whole error."""
    exact = size * torch.rand(200, width, generator=generator(), dtype=torch.float64)
    scaled = exact.float()
    for rounded in (scaled.half().float(), scaled):
        padded = -(-width // 64) * 64
        found = norms_in_float32(library, scaled, rounded, padded)
        truth = [norm(tensor).numpy() for tensor in (exact, rounded.double(), exact - rounded.double())]
        assert (found >= truth).all()
        # Of use: above the rounding of one number, not far above the truth.
        slack = 2.0**-22 * truth[0] + 2 * (padded * 2.0**-149) ** 0.5
        assert (found <= np.stack(truth) * (1 + (width + 100) * 2.0**-22) + slack).all()


@pytest.mark.parametrize("once", [False, True])
def test_rows_without_a_bound(library: ctypes.CDLL, once: bool) -> None:
    """Rows with NaN or infinity, or too far away for float32 scores, are compared with every codeword."""
    features = torch.tensor([[NAN, 0.0], [INF, 0.0], [1e38, 0.0], [0.0, 0.0]])
    records, _, bound = search(library, features, 1e-20 * normal(12, 2), once=once)
    assert bound.isnan().tolist() == [True, True, True, False]
    assert (records["count"][:3] == OVERFLOW).all()
    assert records["count"][3] <= OVERFLOW


def test_lists_against_their_definition(library: ctypes.CDLL) -> None:
    """Random scores with few values, so lists fill, empty and overflow: a list holds all scores within the bound."""
    rows, codewords = 20_000, 61
    scores = torch.randint(0, 40, (rows, codewords), generator=generator()).float().numpy()
    scores[:, 7::9] = INF
    bounds = torch.randint(0, 4, (rows,), generator=generator(1)).float().numpy()
    records = np.empty(rows, RECORD)
    numbers = pointer(scores), pointer(bounds)
    library.find_candidates(long(rows), long(codewords), *numbers, 4, 5, pointer(records))
    limit = scores.min(axis=1) + bounds
    overflowed = 0
    for row in range(rows):
        truth = np.flatnonzero(scores[row] <= limit[row])
        count = records["count"][row]
        if count <= CANDIDATES:
            assert sorted(records["index"][row, :count].tolist()) == truth.tolist()
            assert records["lowest"][row] == scores[row].min()
        else:
            overflowed += 1
        # One list for each of four sections, and one for all: more than six codewords within the bound overflow.
        assert len(truth) <= CANDIDATES or count == OVERFLOW
    assert 0 < overflowed < rows / 2


@pytest.mark.parametrize(("rows", "width"), [(200_000, 3), (3_000, 200), (300, 4096)])
@pytest.mark.parametrize("scale", [1e-22, 1.0, 1e18])
def test_the_plain_search_compares_the_nearest_again(library: ctypes.CDLL, rows: int, width: int, scale: float) -> None:
    """Near-ties: pairs of codewords one unit in the last place apart."""
    generator = np.random.default_rng(0)
    first = (scale * generator.normal(size=(8, width))).astype(np.float32)
    second = first.copy()
    second[:, 0] = np.nextafter(second[:, 0], np.float32(np.inf))
    codewords = np.concatenate([first, second])
    noise = (scale * 1e-3 * generator.normal(size=(rows, width))).astype(np.float32)
    features = codewords[generator.integers(16, size=rows)] + noise
    rough, exact = np.empty((rows, 16), np.float32), np.empty((rows, 16))
    for j, codeword in enumerate(codewords):
        with np.errstate(over="ignore"):
            rough[:, j] = np.square(features - codeword).cumsum(1, dtype=np.float32)[:, -1]
        exact[:, j] = np.square(features.astype(np.float64) - codeword.astype(np.float64)).sum(1)
    limits = np.empty(rows, np.float32)
    lowest = np.ascontiguousarray(rough.min(1))
    library.direct_limits(ctypes.c_int64(rows), pointer(lowest), ctypes.c_int64(width), pointer(limits))
    assert (rough[np.arange(rows), exact.argmin(1)] <= limits).all()


def truncated(values: np.ndarray) -> np.ndarray:
    """The next float32 numbers towards zero, in float64."""
    near = values.astype(np.float32)
    return np.where(np.abs(near) > np.abs(values), np.nextafter(near, np.float32(0)), near).astype(np.float64)


@pytest.mark.parametrize("width", [1, 70, 65536])
@pytest.mark.parametrize("scale", [1e-30, 2.0**-48, 2.0**-20, 1.0, 1e12])
def test_scores_of_members_are_within_their_bound(library: ctypes.CDLL, width: int, scale: float) -> None:
    """Half precision of the operands, and float64 of distances, move the score of a member by at most the bound."""
    count = 200 if width <= 70 else 20
    row, member = normal(count, width).numpy(), (scale * normal(count, width, seed=1)).numpy()
    # Half precision loses as much as it can of all elements of the first rows, in one direction.
    first, lost = count // 4, np.random.default_rng(0).integers(8, size=width) * 2.0**-8 + 2.0**-11
    row[:first], member[:first] = 1 + lost, np.float32(scale) * (1 + lost[::-1])
    # Some members are so small that half precision has few bits for them.
    member[-first:] *= np.float32(2.0**-28)
    sizes = np.abs(row).max(1), np.sqrt((member.astype(np.float64) ** 2).sum(1)).max(keepdims=True)
    row_scale, member_scale = (top - np.frexp(size)[1] for top, size in zip((8, 15), sizes, strict=True))
    scaled = np.ldexp(row, row_scale[:, None]), np.ldexp(member, member_scale[:, None])
    squares = [(values * values).sum(1, dtype=np.float32) for values in scaled]
    kept = [values.astype(np.float16).astype(np.float64) for values in scaled]
    shifts = (member_scale - row_scale).astype(np.int32)
    product = np.zeros(count)
    for start in range(0, width, 16):  # float32 sums that truncate
        product = truncated(product + (kept[0][:, start : start + 16] * kept[1][:, start : start + 16]).sum(1))
    score = squares[1] - np.ldexp(2 * product, shifts)
    apart = row.astype(np.float64) - member
    exact = (apart * apart).sum(1).astype(np.longdouble) - (row.astype(np.longdouble) ** 2).sum(1)
    moved = np.abs(score - np.ldexp(exact, 2 * member_scale))
    errors = np.empty(count, np.float32)
    library.member_errors(
        ctypes.c_int64(count), *map(pointer, squares), pointer(shifts), ctypes.c_int(width), pointer(errors)
    )
    assert (moved <= errors).all()
    if width <= 70 and 1e-20 < scale <= 1:
        # At the first scale by the rounding of float64, at the others by that of half precision.
        assert (moved > errors / (1000 if scale == 2.0**-48 else 3)).any()
