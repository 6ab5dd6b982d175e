"""Mistakes in csrc/cuda that the emulator must find: `python tests/cuda_on_host/mutations.py FOLDER`.

Each mistake is made in a copy of csrc, where a number chooses it at run time. So one compilation holds all mistakes.
The native program benchmarks/gpu/kernels then runs once for each. It must find wrong rows or rows that fell back to the
exhaustive comparison, or the emulator must stop it. If a mistake is not found, the status is 1.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import build

SECONDS = 60
SEARCHES = ("search_narrow", "search_middle", "search_wide", "search_wgmma")
MMA = SEARCHES[:3]
WGMMA = SEARCHES[3:]
STATISTICS = ("statistics_scan", "statistics_sorted")


class Mutation(NamedTuple):
    """A mistake.

    Attributes:
        file: below csrc/cuda.
        right: an expression or, with its semicolon, a statement.
        mistaken: its replacement; "" for a statement that is left out.
        kernels: of the native program, one of which must show it.
        after: text of the file; `right` is the first one behind it, and the only one where this is "".
    """

    file: str
    right: str
    mistaken: str
    kernels: tuple[str, ...]
    after: str = ""

    @property
    def name(self) -> str:
        """Its name in the printed line."""
        return f"{self.right} -> {self.mistaken or 'left out'}"


_HALF, _HOPPER = "nearest_codeword/half_search.cuh", "nearest_codeword/hopper_search.cuh"
_LOOP, _OPERANDS = "nearest_codeword/hopper_loop.cuh", "nearest_codeword/codebook_operands.cuh"
_DUPLICATES, _OPEN = "nearest_codeword/duplicates.cuh", "nearest_codeword/open_rows.cuh"
_CLUSTERS, _MEMBERS = "nearest_codeword/clusters.cuh", "nearest_codeword/members.cuh"
_NEAREST, _STATISTICS = "nearest_codeword/nearest_codeword.cu", "codebook_update/codebook_statistics.cu"
_APPLY, _COMMITMENT = "codebook_update/codebook_apply.cu", "commitment/commitment.cu"
_WRITES = "codebook_update/codebook_apply.cuh"
_WAIT_FOR_ROWS = "wait_for(rows_full + (turn % kPrepared * kGroups + group) * 8, turn / kPrepared % 2);"

MUTATIONS = (
    # Fragments.
    Mutation(
        _HALF,
        "multiply(sums[m][n], row_part[m], column_part[0], column_part[1]);",
        "multiply(sums[m][n], row_part[m], column_part[1], column_part[0]);",
        MMA,
    ),
    Mutation(
        _HALF,
        "multiply(sums[m][n + 1], row_part[m], column_part[2], column_part[3]);",
        "multiply(sums[m][n + 1], row_part[m], column_part[0], column_part[1]);",
        MMA,
    ),
    Mutation(_HALF, "(k * 2 + lane / 16) ^ (lane % 8)", "(k * 2 + lane / 8 % 2) ^ (lane % 8)", MMA),
    Mutation(_HALF, "(k * 2 + lane / 8 % 2) ^ (lane % 8)", "(k * 2 + lane / 8 % 2)", MMA),
    # Copies and their waits.
    Mutation(_HALF, "wait_for_copies<S::kStages - 2>();", "wait_for_copies<S::kStages - 1>();", MMA),
    Mutation(_HALF, "step + S::kStages - 1 < steps", "step + S::kStages < steps", MMA),
    Mutation(_HALF, "copy_stage + 1 == S::kStages", "copy_stage + 1 == S::kStages - 1", MMA),
    Mutation(_LOOP, "wait_for_products<1>();", "", WGMMA),
    Mutation(_LOOP, "wait_for_products<1>();", "wait_for_products<2>();", WGMMA),
    Mutation(_LOOP, "wait_for_products<0>();", "wait_for_products<1>();", WGMMA),
    Mutation(_LOOP, "begin_products();", "", WGMMA),
    Mutation(_LOOP, "wait_for(full + place.stage * 8, place.parity);", "", WGMMA),
    Mutation(_LOOP, "wait_for(empty + place.stage * 8, place.parity);", "", WGMMA),
    Mutation(
        _LOOP,
        "wait_for(full + place.stage * 8, place.parity);",
        "wait_for(full + place.stage * 8, place.parity ^ 1);",
        WGMMA,
    ),
    Mutation(
        _LOOP,
        "wait_for(empty + place.stage * 8, place.parity);",
        "wait_for(empty + place.stage * 8, place.parity ^ 1);",
        WGMMA,
    ),
    Mutation(_LOOP, "k > 0 || chunk > 0", "true", WGMMA),
    Mutation(_LOOP, "k * 2", "k * 4", WGMMA, "ring_operand + place.stage"),
    Mutation(_LOOP, "chunk * (kGroupRows * 2 * kStepWidth >> 4)", "chunk * (kGroupRows * kStepWidth >> 4)", WGMMA),
    # Arrivals: one too few, one too many.
    Mutation(_LOOP, "if (chunk > 0 && lane == 0) arrive(empty + stage_before * 8);", "", WGMMA),
    Mutation(
        _LOOP,
        "if (chunk > 0 && lane == 0) arrive(empty + stage_before * 8);",
        "if (chunk > 0 && lane < 2) arrive(empty + stage_before * 8);",
        WGMMA,
    ),
    Mutation(
        _LOOP,
        "if (lane == 0) arrive(empty + stage_before * 8);",
        "if (lane < 2) arrive(empty + stage_before * 8);",
        WGMMA,
        "__syncwarp",
    ),
    Mutation(
        _HOPPER,
        "start_barrier(empty + stage * 8, kComputing / 32);",
        "start_barrier(empty + stage * 8, kComputing / 32 - 1);",
        WGMMA,
    ),
    Mutation(_HOPPER, "fence_async();", "", WGMMA, "load_rows<Warpgroup>"),
    # Rows that other warps prepare: waits, arrivals and fence; the buffer, the warpgroup and the tile.
    Mutation(_HOPPER, "wait_for(rows_empty + now % (kPrepared * kGroups) * 8, turn / kPrepared % 2 ^ 1);", "", WGMMA),
    Mutation(_HOPPER, _WAIT_FOR_ROWS, "", WGMMA, "group < kGroups && kStaged"),
    Mutation(_HOPPER, _WAIT_FOR_ROWS, "", WGMMA, "if (kBuffers == kMostBuffers)"),
    Mutation(
        _HOPPER,
        "wait_for(rows_empty + now % (kPrepared * kGroups) * 8, turn / kPrepared % 2 ^ 1);",
        "wait_for(rows_empty + now % (kPrepared * kGroups) * 8, 1);",
        WGMMA,
    ),
    Mutation(
        _HOPPER,
        _WAIT_FOR_ROWS,
        "wait_for(rows_full + (turn % kPrepared * kGroups + group) * 8, 0);",
        WGMMA,
        "if (kBuffers == kMostBuffers)",
    ),
    Mutation(_HOPPER, "arrive(rows_empty + (now % kPrepared * kGroups + group) * 8);", "", WGMMA),
    Mutation(
        _HOPPER,
        "start_barrier(rows_full + i * 8, kPreparers);",
        "start_barrier(rows_full + i * 8, kPreparers - 1);",
        WGMMA,
    ),
    Mutation(_HOPPER, "fence_async();", "", WGMMA, "fence_async_global();"),
    Mutation(_HOPPER, "fence_async_global();", "", WGMMA),
    Mutation(_HOPPER, "turn % kRowBuffers * kGroups + group", "group", WGMMA),
    Mutation(_HOPPER, "turn * fresh_grid()", "turn", WGMMA),
    # Rows that a warp reads ahead: the end of the former copy, the row of the next, its phase; zeros behind the last.
    Mutation(_LOOP, "wait_for(block.full, ahead.parity);", "", WGMMA),
    Mutation(_LOOP, "ahead.parity ^= 1;", "", WGMMA),
    Mutation(_LOOP, "fence_async();", "", WGMMA, "All have read their rows."),
    Mutation(_LOOP, "following + thread / 8 - r", "following", WGMMA),
    Mutation(_LOOP, "ahead.place >= a.features.rows", "ahead.place > a.features.rows", WGMMA),
    Mutation(_HOPPER, "ahead[i] = 0;", "", WGMMA),
    # Staged rows: the block of the tile before has been read, and the bytes of both warpgroups.
    Mutation(_LOOP, "before < 0 ? place.parity : place.parity ^ 1", "place.parity ^ 1", WGMMA),
    Mutation(_LOOP, "bytes + kGroups * kRowBlockBytes", "bytes + kRowBlockBytes", WGMMA),
    Mutation(_LOOP, "next < a.features.rows", "next <= a.features.rows", WGMMA),
    # Candidates: the prefix of a quad's hits, room for them, and their places.
    Mutation(_HALF, "if (quad_lane >= 1) up_to += one_before;", "", SEARCHES),
    Mutation(_HALF, "if (quad_lane >= 2) up_to += two_before;", "", SEARCHES),
    Mutation(_HALF, "minima.count[slot] += more;", "minima.count[slot] += hits;", SEARCHES),
    Mutation(_HALF, "minima.count[slot] + more > kCandidates", "minima.count[slot] + more > kCandidates + 1", SEARCHES),
    Mutation(_HALF, "first + n * 8 + quad_lane * 2 + side_column", "first + n * 8 + quad_lane * 2", SEARCHES),
    Mutation(_HALF, "low = fminf(low, __shfl_xor_sync(~0u, low, 2));", "", SEARCHES),
    Mutation(_HALF, "group_low[group] <= limit", "own_low <= limit && group == 0", WGMMA),
    Mutation(
        _HALF, "first + column / 2 * 8 + quad_lane * 2 + column % 2", "first + column / 2 * 8 + quad_lane * 2", SEARCHES
    ),
    # Rows that are read once: the scale, the piece, the row whose bound a thread computes, the pieces read again.
    Mutation(_HALF, "power_of_two(exponent - part)", "power_of_two(exponent - part - 1)", SEARCHES),
    Mutation(_HALF, "first < a.features.columns", "first <= a.features.columns", SEARCHES, "largest = 0;"),
    Mutation(_HALF, "lane == round", "lane == 0", SEARCHES),
    Mutation(_HALF, "keeps ? lane + kKeptPieces * 8 : lane", "lane + kKeptPieces * 8", SEARCHES),
    # Duplicates: the order of the two, the comparison of elements, both zeros.
    Mutation(_DUPLICATES, "j < other ? other : j", "j", ("operands",)),
    Mutation(_DUPLICATES, "load(codebook, j, d) != load(codebook, other, d)", "true", ("operands",)),
    Mutation(_DUPLICATES, "element + 0.0", "element", ("operands",)),
    # Open rows: both layouts of operands, the limit of scores, the codeword of a bit, the better distance.
    Mutation(_HALF, "from + number * 16", "from + number * 16 + 16", WGMMA),
    Mutation(_OPEN, "score <= block.bounds[row]", "score > block.bounds[row]", SEARCHES),
    Mutation(_OPEN, "part * 8 * S::kTilesN", "part * 8", SEARCHES),
    Mutation(_OPEN, "open.index[r] = codeword;", "", SEARCHES),
    Mutation(_OPEN, "first_row += stride", "first_row += rows", SEARCHES),
    # Clusters: the members of a row's only candidate and of others, bound and scores, the cluster of a row, the chain.
    Mutation(_CLUSTERS, "norms[Layout::norm(j, width)] = INFINITY;", "", ("operands",)),
    Mutation(_CLUSTERS, "clusters.apart[link] <= limit", "true", ("search_narrow",)),
    Mutation(_OPERANDS, "grid * (1.0 / kGrids)", "0", ("operands",)),
    Mutation(_CLUSTERS, "found.start >= 0", "found.start > 0", ("search_narrow",)),
    Mutation(_MEMBERS, "start + n * 8 + group", "start + n * 8", SEARCHES),
    Mutation(_MEMBERS, "e % 2 == 0 ? left : right", "left", SEARCHES),
    Mutation(_MEMBERS, "start + at < cluster.size", "at < cluster.size && start == 0", SEARCHES),
    Mutation(_MEMBERS, "!(low[0] > limit[0]) || !(low[1] > limit[1])", "!(low[0] > limit[0])", SEARCHES),
    Mutation(_MEMBERS, "bit % 4 == 0 ? open[0] : open[1]", "open[0]", SEARCHES),
    Mutation(_MEMBERS, "bit / 4 + bit % 4 * 8", "bit / 4", SEARCHES),
    Mutation(_MEMBERS, "(low & run) == 0", "true", SEARCHES),
    Mutation(_MEMBERS, "next == warp", "warp == 0 && next == warp", SEARCHES),
    Mutation(_MEMBERS, "(next + 1) % warps", "(next + 1) % (blockDim.x / 32)", ("search_narrow",)),
    Mutation(_NEAREST, "place < places", "place < places - 1", MMA),
    Mutation(_NEAREST, "nearest + radius", "nearest", MMA),
    Mutation(_NEAREST, "near_members = a.clusters.of(best).size > 0;", "", MMA),
    Mutation(_OPEN, "max(cluster.size, 1)", "1", SEARCHES),
    # Tails, one too far or one too short.
    Mutation(_HALF, "first_row + r < row_count<S>(a)", "first_row + r <= row_count<S>(a)", SEARCHES, "load_rows_once("),
    Mutation(_HALF, "first + 8 <= features.columns", "first + 8 <= features.columns + 1", SEARCHES),
    Mutation(_HALF, "first + e < features.columns", "first + e <= features.columns", SEARCHES),
    Mutation(_HALF, "first_row + r >= a.features.rows", "first_row + r > a.features.rows", SEARCHES),
    Mutation(_OPERANDS, "j >= codebook.rows", "j > codebook.rows", ("operands",), "bool left_out = "),
    Mutation(
        _NEAREST,
        "first + column + k * 16 < codebook.rows",
        "first + column + k * 16 <= codebook.rows",
        ("search_plain",),
        "const bool there = ",
    ),
    Mutation(_NEAREST, "codeword < codebook.rows", "codeword <= codebook.rows", ("search_direct",), "column + k * 16;"),
    Mutation(_NEAREST, "row < rows", "row <= rows", ("search_plain", "search_direct"), "threadIdx.x % 16 == 0 && "),
    Mutation(_NEAREST, "row < a.features.rows", "row <= a.features.rows", MMA, "bool compare_all = false;"),
    Mutation(_STATISTICS, "first + e < rows", "first + e <= rows", ("statistics_scan",)),
    Mutation(
        _STATISTICS, "row < tile.last", "row <= tile.last", ("statistics_sorted",), "row = start + i * 32 + lane;"
    ),
    Mutation(_STATISTICS, "i < number", "i <= number", ("statistics_sorted",), "values[i] = "),
    Mutation(
        _STATISTICS, "i < number", "i <= number", ("statistics_sorted",), "int* const at = counts + tile * codewords;"
    ),
    Mutation(_STATISTICS, "warp * share", "(warp + 1) * share", ("statistics_sorted",)),
    # Addresses, blocks of columns and of codewords, and rows that are drawn.
    Mutation(_HALF, "reinterpret_cast<uintptr_t>(features.data) % 16 == 0", "true", SEARCHES),
    Mutation(_HALF, "features.row_stride * number_bytes % 16 == 0", "true", SEARCHES),
    Mutation(_HOPPER, "fence_async();", "", WGMMA, "start_barrier(empty"),
    Mutation(_STATISTICS, "blockIdx.y", "0u", ("statistics_sorted",), "piece = blockIdx.x"),
    Mutation(_STATISTICS, "blockIdx.y", "0u", ("statistics_sorted",), "join_kernel("),
    Mutation(_STATISTICS, "kJoined + blockIdx.y * batch.codewords + k", "kJoined + k", ("statistics_sorted",)),
    Mutation(
        _STATISTICS,
        "threadIdx.x % kOfGroup * kNumbers",
        "threadIdx.x % kOfGroup",
        ("statistics_sorted",),
        "read_column = ",
    ),
    Mutation(_STATISTICS, "sorted.starts[k] != sorted.starts[k + 1]", "true", ("statistics_sorted",)),
    Mutation(_STATISTICS, "sorted.starts[k] != sorted.starts[k + 1]", "false", ("statistics_sorted",)),
    Mutation(_STATISTICS, "before += all;", "before = all;", ("statistics_sorted",)),
    Mutation(
        _STATISTICS,
        "drawn >= batch.modality[m].total_rows",
        "drawn > batch.modality[m].total_rows",
        ("statistics_scan",),
    ),
    Mutation(_STATISTICS, "attempt < kAttempts", "attempt < kAttempts - 1", ("statistics_scan",)),
    Mutation(_COMMITMENT, "codeword < 0", "false", ("commitment",)),
    # Memory that blocks share.
    Mutation(
        _STATISTICS,
        "atomicAdd(&counts[blockIdx.x * batch.codewords + code], 1);",
        "counts[blockIdx.x * batch.codewords + code] += 1;",
        ("statistics_sorted",),
    ),
    Mutation(
        _STATISTICS,
        "cudaMemsetAsync(sorted.counts, 0, plan.tiles * batch.codewords * sizeof(int), stream)",
        "cudaSuccess",
        ("statistics_sorted",),
    ),
    Mutation(_STATISTICS, "atomicAdd(&counts[code], 1);", "counts[code] += 1;", ("statistics_sorted",)),
    Mutation(_STATISTICS, "start.zeros[i] = 0;", "", ("statistics_sorted",)),
    Mutation(_STATISTICS, "*start.step += 1;", "", ("apply",)),
    Mutation(_STATISTICS, "atomicAdd(&counts[m * batch.codewords + codes[i]], 1.0);", "", ("apply",)),
    Mutation(
        _STATISTICS,
        "atomicAdd(&counts[m * batch.codewords + codes[i]], 1.0);",
        "counts[m * batch.codewords + codes[i]] += 1;",
        ("apply",),
    ),
    # Order between blocks.
    Mutation(_STATISTICS, "wait_for_count(sorted.arrived + kStarted, 1)", "void()", ("statistics_sorted",)),
    Mutation(_STATISTICS, "number", "static_cast<int>(blockIdx.x)", ("statistics_sorted",), "const int begun = "),
    Mutation(_STATISTICS, "number != prefix_blocks - 1", "number != 0", ("statistics_sorted",)),
    Mutation(_STATISTICS, "joined[0] != pieces - 1", "joined[0] != 0", ("statistics_sorted",)),
    Mutation(_STATISTICS, "begun - prefix_blocks", "0", ("apply",), "kWritesState<kEnd>) {\n      if (begun"),
    # A codeword that is reset from another: it waits for that one's vector, and its old values are read first.
    Mutation(_WRITES, "counted[0] == 0", "counted[0] == 1", ("apply",)),
    Mutation(_WRITES, "counted[0] == 0", "false", ("apply",)),
    Mutation(_WRITES, "blockIdx.y * update.state.codewords + k", "k", ("apply",)),
    Mutation(_WRITES, "if (reset) deliver<T>(update, k, column, writes);", "", ("apply",)),
    Mutation(_WRITES, "atomicExch(update.first_reset + source, static_cast<int>(k) + 1)", "0", ("apply",)),
    Mutation(_WRITES, "reset && !copies ? candidate : vector", "vector", ("apply",)),
    Mutation(_APPLY, "d < state.width", "d <= state.width", ("apply",), "update.reset[k] != 0;"),
    Mutation(_COMMITMENT, "row < a.rows", "row <= a.rows", ("commitment",), "double total = 0;"),
)

# Every barrier and every wait for a warp or warpgroup, left out.
_BARRIER = re.compile(r"__syncthreads\(\);|__syncwarp\(\);|wait_for_group\(group\);")
_KERNELS_OF = {
    _HALF: SEARCHES,
    _HOPPER: WGMMA,
    _LOOP: WGMMA,
    _OPERANDS: ("operands",),
    _CLUSTERS: ("operands", "search_narrow"),
    _MEMBERS: ("search_narrow",),
    _OPEN: SEARCHES,
    _NEAREST: (*MMA, "search_plain", "search_direct"),
    _STATISTICS: (*STATISTICS, "apply"),
    _APPLY: ("apply",),
    _WRITES: ("apply",),
    _COMMITMENT: ("commitment",),
    "reduce.cuh": (*STATISTICS, "apply"),
}


class Place(NamedTuple):
    """Where a mutation lies in its file, and the line's number."""

    mutation: Mutation
    start: int
    line: int


def places(cuda: Path) -> Iterator[Place]:
    """Where each mutation goes, barriers included.

    Raises:
        SystemExit: the text of one does not occur once.
    """
    for mutation in MUTATIONS:
        text = (cuda / mutation.file).read_text()
        begin = text.find(mutation.after)
        start = text.find(mutation.right, begin)
        if begin < 0 or start < 0 or (not mutation.after and text.count(mutation.right) != 1):
            raise SystemExit(f"tests/cuda_on_host: this mutation does not apply any more: {mutation.name}")
        yield Place(mutation, start, text.count("\n", 0, start) + 1)
    for path in sorted([*cuda.rglob("*.cu"), *cuda.rglob("*.cuh")]):
        name, text = str(path.relative_to(cuda)), path.read_text()
        for found in _BARRIER.finditer(text):
            line = text.count("\n", 0, found.start()) + 1
            yield Place(Mutation(name, found[0], "", _KERNELS_OF[name]), found.start(), line)


def mutated(text: str, chosen: dict[int, Place]) -> str:
    """A file that makes the mistake whose number UNICODE_FAST_MUTATION is."""
    by_start: dict[int, dict[int, Mutation]] = {}
    for number, place in chosen.items():
        by_start.setdefault(place.start, {})[number] = place.mutation
    for start, mutations in sorted(by_start.items(), reverse=True):
        right = next(iter(mutations.values())).right
        new = right
        for number, mutation in mutations.items():
            test = f"::on_host::mutation() == {number}"
            if right.endswith(";"):
                new = f"if ({test}) {{ {mutation.mistaken} }} else {{ {new} }}"
            else:
                new = f"({test} ? ({mutation.mistaken}) : ({new}))"
        text = text[:start] + new + text[start + len(right) :]
    return text


def build_mutants(folder: Path) -> tuple[Path, list[Place]]:
    """Compile the native program with all mistakes; returns it with the mistakes by their numbers, from 1."""
    copy = folder / "csrc"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(build.ROOT / "csrc", copy)
    found = list(places(copy / "cuda"))
    for name in {place.mutation.file for place in found}:
        path = copy / "cuda" / name
        chosen = {number: place for number, place in enumerate(found, 1) if place.mutation.file == name}
        path.write_text(mutated(path.read_text(), chosen))
    return build.build_program(folder, copy), found


def verdict(program: Path, number: int, kernels: Sequence[str]) -> str:
    """The first failure that a mistake causes; "" if it causes none. Number 0 is no mistake."""
    for kernel in kernels:
        command = [str(program), "--size", "small", "--only", kernel]
        environment = {**os.environ, "UNICODE_FAST_MUTATION": str(number or "")}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as run:
            killer = threading.Timer(SECONDS, run.kill)
            killer.start()
            assert run.stdout is not None
            wrong = next((case for case in map(json.loads, run.stdout) if not case["ok"]), None)
            if wrong is not None:
                run.kill()
            killer.cancel()
        if wrong is not None:
            return f"{kernel}, {wrong['case']}: {wrong['message'] or 'wrong'}"
        if run.returncode != 0:
            return f"{kernel}: ended with status {run.returncode}, or not within {SECONDS} s"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where to build")
    folder = parser.parse_args().folder.resolve()
    build.make_folder(folder)
    started = time.monotonic()
    program, found = build_mutants(folder)
    print(f"{len(found)} mistakes compiled in {time.monotonic() - started:.0f} s", flush=True)
    wrong = verdict(program, 0, tuple(dict.fromkeys(kernel for kernels in _KERNELS_OF.values() for kernel in kernels)))
    if wrong:
        print(f"without a mistake: {wrong}")
        return 1
    missed = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        verdicts = pool.map(lambda pair: verdict(program, pair[0], pair[1].mutation.kernels), enumerate(found, 1))
        for place, shown in zip(found, verdicts, strict=True):
            missed += not shown
            where = f"{place.mutation.file}:{place.line}"
            print(f"{'found' if shown else 'MISSED'} {where} {place.mutation.name}: {shown[:160]}", flush=True)
    print(f"{len(found) - missed} of {len(found)} mistakes found in {time.monotonic() - started:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
