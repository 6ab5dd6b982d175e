"""Cycles of the CUDA search among tight clusters by arithmetic: `python benchmarks/gpu/cluster_arithmetic.py`.

It writes benchmarks/results/cluster-arithmetic.json, of which docs/performance.md has a table. `--check` compares with
that file. The cycles of a row are the sum over phases; a phase takes as many as the largest of its instructions, bytes,
products and conversions to float64. Waits and caches are not part of it. Instructions are those of
instruction-counts.json. Candidates and open members are those of simulated rows. Scored a second time are clusters too
wide for a representative, and those that lie in several cells.
"""

import argparse
import json
import math
import sys
from typing import Any, NamedTuple

import numpy as np
from program import ROOT

from unicode_fast.files.writing import write_json

sys.path.append(str(ROOT / "benchmarks"))
from shapes import SPREAD  # noqa: E402 - beside the benchmarks

RESULTS = ROOT / "benchmarks" / "results"
COUNTED = json.loads((RESULTS / "instruction-counts.json").read_text())
COUNTS = COUNTED["passes"]
# Instructions of load_rows for a number.
PREPARED = next(float(row[-1]) for row in COUNTED["rows"] if row[0].startswith("`load_rows`, float32"))
FILE = RESULTS / "cluster-arithmetic.json"
# Rows whose candidates are simulated, and of them those whose open members are.
SIMULATED, FEW = 8192, 256
# Of an H100 or H200: multiprocessors, and products of half precision in a cycle of one (989 TFLOP/s at 1.83 GHz).
MULTIPROCESSORS, FLOPS = 132, 4096
CLOCK = 989e12 / (MULTIPROCESSORS * FLOPS)
# In a cycle of a multiprocessor: instructions of a warp, one of each scheduler; conversions to float64 (the table of
# throughputs in the CUDA C++ Programming Guide, compute capability 9.0); bytes and products at 90 % and 80 % of the
# data sheet's 4.8 TB/s and 989 TFLOP/s. Products in tf32 take twice as long.
INSTRUCTIONS, CONVERSIONS = 4, 16
BYTES, PRODUCTS = 0.9 * 4.8e12 / CLOCK / MULTIPROCESSORS, 0.8 * FLOPS
# Of csrc/cuda/nearest_codeword. half_search.cuh: codewords of a tile, rows of a slot, columns of a group. Bytes of a
# record with its bound, and of a result. members.cuh: keys, rows and members at once. nearest_codeword.cu: numbers from
# which a split of the codebook has a persistent grid. candidates.h: candidates of a list. open_rows.cuh: rows and
# codewords at once, and the warps that score them. clusters.cuh: the edge of a cell, and the
# grids of cells.
TILE, SLOT_ROWS, GROUP = 256, 8, 32
RECORD, RESULT, KEYS, WARP_ROWS, MEMBERS = 36, 12, 2048, 16, 32
PERSISTENT, LIST = 2**17, 6
AGAIN_ROWS, AGAIN_CODEWORDS, AGAIN_WARPS = 64, 128, 8
CELL_EDGE, GRIDS = 32, 2
CLUSTERS = (40, 8, 2)
# Standard deviations of clusters that are looser than those of the benchmark, and of those too wide for a
# representative.
LOOSE, WIDE = 1e-4, 1.5e-3


class Candidates(NamedTuple):
    """Means of what a search finds.

    Attributes:
        kept: candidates of a row.
        beside_others: those of rows with more than one.
        slots: of slots with a candidate in a tile, among all.
        groups: groups of columns with a candidate, of a slot in a tile.
        several: slots in which a thread holds several in a tile, among all.
        rows: rows with more than one candidate, among all.
        between: rows that lie no nearer to a codeword than to another by more than the radius, among all.
    """

    kept: float
    beside_others: float
    slots: float
    groups: float
    several: float
    rows: float
    between: float


def half(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Norms of rows after rounding to half precision, and of the rounding errors."""
    rounded = numbers.astype(np.float16).astype(np.float64)
    return np.linalg.norm(rounded, axis=1), np.linalg.norm(numbers - rounded, axis=1)


def simulate(rows: np.ndarray, codewords: np.ndarray, radius: float) -> Candidates:
    """Candidates of a search by twice_bound of candidates.h and keep_candidates of half_search.cuh."""
    width, mean = rows.shape[1], codewords.mean(0)
    # A power of two; half precision holds the largest of these numbers.
    rows, codewords, radius = 16 * (rows - mean), 16 * (codewords - mean), 16 * radius
    kept_norms, lost = half(rows)
    code_norms, code_lost = half(codewords)
    size, exact = code_norms.max(), np.linalg.norm(rows, axis=1)
    squared = float((codewords**2).sum(1).max())
    bound = 2.0**-22 * squared + 2 * (lost * size + exact * code_lost.max())
    bound += 2 * (width + 16) * 2.0**-22 * kept_norms * size + radius * (exact + size + code_lost.max() + radius)
    scores = (codewords**2).sum(1) - 2 * rows @ codewords.T
    padded = np.pad(scores, ((0, 0), (0, -len(codewords) % TILE)), constant_values=np.inf)
    lowest, slots = np.full(len(rows), np.inf), []
    for tile in np.split(padded, padded.shape[1] // TILE, axis=1):
        before, lowest = lowest, np.minimum(lowest, tile.min(1))
        hits = (tile <= (lowest + 2 * bound)[:, None]).reshape(-1, SLOT_ROWS, TILE)
        groups = hits.reshape(len(hits), SLOT_ROWS, -1, GROUP).any((1, 3)).sum(1)
        # A thread of a quad has two neighbouring columns of eight.
        threads = hits.reshape(len(hits), SLOT_ROWS, -1, 4, 2).sum((2, 4)).max((1, 2))
        taken = (tile.min(1) <= before + 2 * bound).reshape(-1, SLOT_ROWS).any(1)
        slots.append([taken.mean(), (groups * taken).mean(), (threads > 1).mean()])
    kept = (scores <= (lowest + 2 * bound)[:, None]).sum(1)
    first, second = np.sqrt(np.maximum(np.partition(scores, 1, axis=1)[:, :2].T + (rows**2).sum(1), 0))
    between = (kept > 1) & (second <= first + radius)
    beside = kept * (kept > 1)
    return Candidates(kept.mean(), beside.mean(), *np.mean(slots, axis=0), (kept > 1).mean(), between.mean())


def in_several_cells(centres: np.ndarray, members: int, spread: float, random: Any) -> float:
    """Share of clusters that cross edges of each grid, which lie anywhere along a column with the same chance.

    Not all of these have several representatives, so the share is a bound.
    """
    scale = 2.0 ** (7 - math.floor(math.log2(np.abs(centres - centres.mean(0)).max())))
    ranges = np.ptp(spread * random.standard_normal((len(centres), members, centres.shape[1])), axis=1)
    crossed = 1 - np.prod(1 - np.minimum(scale / CELL_EDGE * ranges, 1), axis=1)
    return float((crossed**GRIDS).mean())


def open_members(
    rows: np.ndarray, centres: np.ndarray, members: int, spread: float, random: Any
) -> tuple[float, float]:
    """By member_error of candidates.h: members that a row compares in float64, and tiles that hold one, by row."""
    width = rows.shape[1]
    nearest = ((centres**2).sum(1) - 2 * rows @ centres.T).argmin(1)
    growth, rounded, found, tiles = (width + 16) * 2.0**-22, 2.0**-11 + 2.0**-19, 0, []
    for row, centre in zip(rows, centres[nearest], strict=True):
        apart = spread * random.standard_normal((members, width))
        apart = apart - apart[0]  # the first represents them
        y, squares = row - centre, (apart**2).sum(1)
        scores, far, largest = squares - 2 * apart @ y, np.linalg.norm(y), math.sqrt(squares.max())
        error = 2 * (2 * rounded + rounded**2 + growth * (1 + rounded) ** 2) * far * largest + growth * largest**2
        opened = np.flatnonzero(scores <= scores.min() + 2 * error)
        found += len(opened)
        tiles.append(np.bincount(np.unique(opened // MEMBERS), minlength=math.ceil(members / MEMBERS)))
    # Of the rows of a warp.
    groups = np.array(tiles).reshape(-1, WARP_ROWS, len(tiles[0])).any(1)
    return found / len(rows), float(groups.sum(1).mean())


def cycles(instructions: float, size: float = 0, products: float = 0, conversions: float = 0) -> float:
    """Cycles of a multiprocessor for a phase."""
    return max(instructions / INSTRUCTIONS, size / BYTES, products / PRODUCTS, conversions / CONVERSIONS)


def distance(width: int, first: str) -> float:
    """Instructions of a distance in float64, those of its first 32 columns included."""
    return COUNTS[first] + (width - 32) / 128 * COUNTS["128 further columns"]


def search(width: int, codewords: int, found: Candidates) -> float:
    """Cycles of a row in the search with wgmma."""
    tiles = math.ceil(codewords / TILE)
    form = "block of a tile" if tiles * TILE * width < PERSISTENT else "persistent grid"
    slot = found.slots * COUNTS["slot with a candidate"] + found.groups * COUNTS["group with a candidate"]
    slot += found.several * COUNTS["slot with several in a thread"]
    tile = width / 64 * COUNTS[f"chunk, {form}"] + COUNTS[f"tile, {form}"] + WARP_ROWS / SLOT_ROWS * slot
    score, products = tiles * tile / WARP_ROWS, 2 * width * TILE * tiles
    prepare, size = width / 32 * PREPARED, 4 * width + RECORD
    if form == "persistent grid":
        return cycles(prepare + score, size, products)
    # The warps prepare their rows before the products.
    return cycles(prepare, size) + cycles(score, 0, products)


def random_codewords(codewords: int, rows: np.ndarray, random: Any) -> tuple[float, float]:
    """Cycles of a row among random codewords, and a warp's groups of columns with a candidate in a tile."""
    width = rows.shape[1]
    found = simulate(rows, random.standard_normal((codewords, width)), 0)
    finish = COUNTS["finish, marked row"] + found.kept * distance(width, "candidate, 32 columns")
    size = 4 * width + RECORD + RESULT
    total = search(width, codewords, found) + cycles(finish, size, conversions=2 * width * found.kept)
    return total, found.groups


def scored_again(width: int, codewords: int, candidates: float, exact: float) -> float:
    """Cycles of an open row in open_rows_kernel, with so many candidates, some compared in float64."""
    tiles, further = math.ceil(codewords / AGAIN_CODEWORDS), (width - 32) / 128
    tile = AGAIN_WARPS / AGAIN_ROWS * (width / 64 * COUNTS["again, chunk"] + COUNTS["again, tile"])
    instructions = width / 32 * PREPARED + tiles * (tile + COUNTS["again, row in a tile"])
    rough = COUNTS["again, candidate, 32 columns"] + further * COUNTS["again, 128 further columns"]
    instructions += candidates * rough
    instructions += exact * (COUNTS["again, exact, 32 columns"] + further * COUNTS["128 further columns"])
    return cycles(instructions, 4 * width + RESULT, 2 * width * AGAIN_CODEWORDS * tiles, 2 * width * exact)


def clustered(codewords: int, clusters: int, spread: float, rows: np.ndarray, random: Any) -> dict[str, float]:
    """Cycles of a row among tight clusters, by kernel, and the members that it compares in float64."""
    width, members = rows.shape[1], codewords // clusters
    centres = random.standard_normal((clusters, width))
    found = simulate(rows, centres, spread * math.sqrt(2 * width))
    opened, tiles_with_open = open_members(rows[:FEW], centres, members, spread, random)
    finish = (1 - found.rows) * COUNTS["finish, marked row"]
    finish += found.rows * COUNTS["finish, marked row with several candidates"]
    finish += found.beside_others * distance(width, "candidate, 32 columns")
    tiles, groups = math.ceil(members / MEMBERS), KEYS / clusters / WARP_ROWS
    # Of a cluster's rows the last group is half full on average.
    share = groups / (groups + 0.5) * WARP_ROWS
    steps = math.log2(KEYS) * (math.log2(KEYS) + 1) / 2
    # One tile is scored once.
    scores = 1 + (tiles > 1)
    group = COUNTS["members, 16 rows"] + width / 32 * COUNTS["members, rows, 32 columns"]
    group += tiles * (scores * width / 64 * COUNTS["members, 64 columns"] + COUNTS["members, beside them"])
    group += tiles_with_open * COUNTS["members again, tile with an open member"]
    group += (tiles - tiles_with_open) * COUNTS["members again, beside them"]
    one_open = distance(width, "members, row with an open member, 32 columns")
    instructions = steps / 2 / 32 * COUNTS["two keys compared"] + group / share + opened * one_open
    products = scores * 2 * width * MEMBERS * tiles * WARP_ROWS / share
    # Differences of members, which other kernels write and this one reads from a cache, are the same for all rows.
    twice = max(found.between, in_several_cells(centres, members, spread, random))
    again = twice * scored_again(width, codewords, found.kept * members, found.kept * members)
    return {
        "search": search(width, codewords, found),
        "finish": cycles(finish, RECORD + found.beside_others * 4 * width, conversions=2 * width * found.beside_others),
        "members": cycles(instructions, 4 * width + RECORD + RESULT, products, 2 * width * opened) + again,
        "open": opened,
        "twice": twice,
    }


def wide(codewords: int, clusters: int, spread: float, rows: np.ndarray, random: Any) -> dict[str, float]:
    """Cycles of a row among clusters too wide for a representative, and the members that it compares in float64."""
    width = rows.shape[1]
    centres = random.standard_normal((clusters, width))
    members = centres[np.arange(codewords) % clusters] + spread * random.standard_normal((codewords, width))
    found = simulate(rows, members, 0)
    if found.rows < 1 or found.kept <= LIST:
        raise SystemExit(f"a row has {found.kept} candidates, which a list may hold")
    squares = (members**2).sum(1) - 2 * rows[:FEW] @ members.T + (rows[:FEW] ** 2).sum(1)[:, None]
    # Those of other clusters are no candidates.
    near = np.arange(codewords) % clusters == squares.argmin(1)[:, None] % clusters
    first = np.where(near, squares, np.inf)
    limits = np.minimum.accumulate(first, axis=1) * (1 + 2.5 * (width + 4) * 2.0**-23)
    before = np.pad(limits, ((0, 0), (1, 0)), constant_values=np.inf)[:, :-1]
    opened = float((near & (squares <= before)).sum(1).mean())
    return {
        "search": search(width, codewords, found),
        "finish": cycles(COUNTS["finish, marked row"], RECORD),
        "members": scored_again(width, codewords, found.kept, opened),
        "open": opened,
        "twice": 1,
    }


def counted() -> list[dict[str, float]]:
    """The rows of the table."""
    found = []
    for width in (64, 256):
        for codewords in (400, 1024):
            random = np.random.default_rng(0)
            rows = random.standard_normal((SIMULATED, width))
            base, groups = random_codewords(codewords, rows, random)
            kinds = [(clustered, number, SPREAD) for number in CLUSTERS]
            kinds += [*((clustered, number, LOOSE) for number in CLUSTERS), (wide, CLUSTERS[0], WIDE)]
            for kind, clusters, spread in kinds:
                each = kind(codewords, clusters, spread, rows, random)
                total = each["search"] + each["finish"] + each["members"]
                sizes = {
                    "width": width,
                    "codewords": codewords,
                    "clusters": clusters,
                    "spread": spread,
                    "random": base,
                    "groups": float(groups),
                }
                found.append({**sizes, **each, "ratio": total / base})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the file of results, and write nothing")
    check = parser.parse_args().check
    found = counted()
    if not check:
        return write_json(FILE, found)
    for old, new in zip(json.loads(FILE.read_text()), found, strict=True):
        if any(not math.isclose(old[name], new[name], rel_tol=1e-3) for name in new):
            sys.exit(f"error: {FILE.name} is out of date, run python {__file__}; new: {new}")


if __name__ == "__main__":
    main()
