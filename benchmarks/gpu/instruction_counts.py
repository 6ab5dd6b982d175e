"""Counts the instructions of the CUDA search for docs/performance.md: `python benchmarks/gpu/instruction_counts.py`.

It compiles the kernels for compute capability 9.0a in several forms of forms.h, and writes
benchmarks/results/instruction-counts.json. `--check` compares its counts with that file, if both are of one version of
nvcc. It needs nvcc, a C++ compiler and nvdisasm, which Triton's wheel holds.

Counts of code are static: a loop's body or one side of a branch counts once, and code that is instantiated for several
types counts once for each. A pass is the shortest path of a warp through a loop. The shortest path of compare_members
and finish_kernel reads aligned rows in float32. Cycles are those of one warp: the stalls that the code names, and
assumed latencies where it waits for a result. Waits for other warps are not part of them.
"""

import argparse
import heapq
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from program import ROOT, SEARCH, compiler, switches

from unicode_fast.files.writing import write_json

RESULT = ROOT / "benchmarks" / "results" / "instruction-counts.json"
# Values of switches.
FORMS = {
    "former": dict.fromkeys(switches(), 0),
    "present": {},
    "duplicates": {"EXCLUDE_DUPLICATES": 0},
    "minimum": {"BRANCH_FREE_MINIMUM": 1},
}
ONE_BUFFER, TWO_BUFFERS, STAGED = (f"hopper_search_kernelILi{number}" for number in (1, 2, 3))
AGAIN, FINISH = "open_rows_kernelINS0_5AgainINS0_5ShapeILi2", "finish_kernelIffE"
# Sections of load_rows_twice, and the pieces of eight numbers in their code.
_STORED = "*reinterpret_cast<uint4*>(tile"
ELEMENT, STORE = ("const double centred", _STORED, 1), (_STORED, "for (int", 1)
LARGEST = ("largest = fmaxf(", "for (int", 2)
STAGES = """#include <cstdio>
#include "hopper_tiles.h"
int main() {
  using namespace unicode_fast;
  std::printf("%d %d %d\\n", kGroups, kGroupRows, kPreparers / 8);
  for (int width = 64; width <= 256; width += 64)
    std::printf("%d %d\\n", ring_stages(width), ring_stages(width, row_buffers(width)));
}
"""
# Assumed cycles until a result is there, by operation (SYNCS: barriers in shared memory), and until an operation has
# read its registers.
LATENCIES, OTHERS, READ = {"SHFL": 24, "LDS": 30, "SYNCS": 30, "LDG": 300}, 20, 15
# Products of half precision, each with a sum, in a cycle of a multiprocessor (H100 or H200, 989 TFLOP/s at 1.83 GHz).
PRODUCTS = 2048
# Eight threads prepare a row: rows at once of a warpgroup, which loads its own, and of a warp.
LOADED, WARP_ROWS = 128 // 8, 32 // 8
_PLACE = re.compile(r'//## File "([^"]+)", line (\d+)')
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?((\w+).*?)\s*;")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
# A place on a path, and the places where threads meet, by barrier.
_State = tuple[int, tuple[tuple[str, int], ...]]


class Instruction(NamedTuple):
    """An instruction: its operation, its text, if a predicate guards it, and its places, the innermost first.

    Attributes:
        control: from the lowest bit on, the cycles until the next instruction (4 bits), a hint (1), the barriers of its
            result and of the registers that it reads (3 each, 7: none), and those that it waits for (6).
    """

    operation: str
    text: str
    guarded: bool
    places: list[tuple[str, int]]
    control: int


class Code(NamedTuple):
    """The instructions of the kernels of one name, and the numbers of those that labels name."""

    instructions: list[Instruction]
    labels: dict[str, int]

    def find(self, operation: str, line: str = "", after: int = 0) -> int:
        """The first instruction of this kind that comes from a line with this text."""
        for number, each in enumerate(self.instructions):
            if number >= after and self.comes_from(number, line) and each.text.startswith(operation):
                return number
        raise SystemExit(f"no {operation or 'instruction'} comes from a line with {line!r}")

    def comes_from(self, number: int, line: str) -> bool:
        return not line or any(line in source(*place) for place in self.instructions[number].places)

    def target(self, number: int) -> int | None:
        found = _TARGET.search(self.instructions[number].text)
        return self.labels[found[1]] if found else None

    def loops(self, place: int) -> list[tuple[int, int]]:
        """First and last instruction of the loops around a place, the innermost loop first."""
        branches = [(self.target(i), i) for i, each in enumerate(self.instructions) if each.operation == "BRA"]
        found = [(to, i) for to, i in branches if to is not None and to <= place <= i]
        return sorted(found, key=lambda loop: loop[1] - loop[0])

    def path(self, *stops: int) -> int:
        """Instructions on the shortest path through these, the first and the last included."""
        return len(self.walk(*stops))

    def walk(self, *stops: int) -> list[int]:
        """The shortest path."""
        return [stops[0], *(number for pair in pairwise(stops) for number in self._between(*pair))]

    def cycles(self, *stops: int) -> int:
        """Cycles of a warp on the shortest path."""
        now, ready = 0, [0] * 8
        for number in self.walk(*stops):
            operation, control = self.instructions[number].operation, self.instructions[number].control
            result, read, waits = control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
            now = max(now, *(ready[barrier] for barrier in range(6) if waits >> barrier & 1), 0)
            ready[result] = max(ready[result], now + LATENCIES.get(operation, OTHERS))
            ready[read] = max(ready[read], now + READ)
            now += max(control & 15, 1)
        return now

    def _between(self, start: int, end: int) -> list[int]:
        """The instructions from one to another, after it."""
        waiting: list[tuple[int, _State, _State | None]] = [(0, (start, ()), None)]
        before: dict[_State, _State | None] = {}
        while waiting:
            length, state, former = heapq.heappop(waiting)
            number, barriers = state
            if number == end and length > 0:
                found = [number]
                while former is not None and before[former] is not None:
                    found.append(former[0])
                    former = before[former]
                return found[::-1]
            if state in before or number >= len(self.instructions):
                continue
            before[state] = former
            operation, text, guarded, *_ = self.instructions[number]
            target, following = self.target(number), [number + 1]
            if operation == "BSSY" and target is not None:
                barriers = tuple(sorted({**dict(barriers), text.split()[1].rstrip(","): target}.items()))
            elif operation == "BSYNC":
                # The barrier's target, where the threads of both sides meet.
                following = [dict(barriers).get(text.split()[1], number + 1)]
            elif operation == "BRA" and target is not None:
                # BRA.DIV and the like depend on more than a predicate.
                following = [target, number + 1][: 1 + (guarded or not text.startswith("BRA `"))]
            elif operation in ("EXIT", "RET"):
                following = [number + 1] if guarded else []
            for each in following:
                heapq.heappush(waiting, (length + 1, (each, barriers), state))
        raise SystemExit(f"no path leads from instruction {start} to {end}")


@cache
def source(file: str, line: int) -> str:
    """A line of a source of the search; empty for other files."""
    path = SEARCH.parent / file
    # nvcc names lines beyond a file's last.
    return (path.read_text().splitlines()[line - 1 :] or [""])[0] if path.exists() else ""


def find_nvdisasm() -> str:
    """The program, from PATH or from Triton.

    Raises:
        SystemExit: there is none.
    """
    found = shutil.which("nvdisasm")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        found = shutil.which("nvdisasm", path=str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    if found is None:
        raise SystemExit("nvdisasm must be on PATH or in an installed Triton")
    return found


def disassemble(form: str) -> list[str]:
    """The lines of the search's assembly, with the places that each instruction comes from."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / "search.cubin")
        words = ["-std=c++20", "-O3", "-w", "-lineinfo", "-gencode=arch=compute_90a,code=sm_90a", "-cubin", "-o", cubin]
        words += [f"-DUNICODE_FAST_{name}={value}" for name, value in FORMS[form].items()]
        done = subprocess.run([compiler(), *words, str(SEARCH)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(done.stderr)
        return subprocess.check_output([find_nvdisasm(), "-gi", "-hex", cubin], text=True).splitlines()


@cache
def assembly() -> dict[str, list[str]]:
    """Of all forms."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(FORMS, pool.map(disassemble, FORMS), strict=True))


@cache
def code(form: str, kernel: str) -> Code:
    """The kernels whose names hold this one."""
    found, inside, fresh = Code([], {}), False, True
    places: list[tuple[str, int]] = []
    for line, following in pairwise(assembly()[form]):
        if line.startswith(".text."):
            inside = kernel in line
        if not inside:
            continue
        if place := _PLACE.search(line):
            places = [] if fresh else places
            fresh = False
            places.append((Path(place[1]).name, int(place[2])))
        elif line.startswith(".L_"):
            found.labels[line.rstrip(":")] = len(found.instructions)
        elif instruction := _INSTRUCTION.match(line):
            fresh = True
            guard, text, operation = instruction.groups()
            if operation != "NOP":
                # The upper half of the encoding.
                control = int(following.strip(" \t/*"), 16) >> 41
                found.instructions.append(Instruction(operation, text, guard is not None, places, control))
    return found


def count(kernel: Code, file: str, function: str, start: str = "", end: str = "\n", operations: str = ".*") -> int:
    """Instructions of a function's lines, from one with `start` to the line before one with `end`."""
    text = (SEARCH.parent / file).read_text().splitlines()
    first = next((i for i, line in enumerate(text, 1) if function in line), 0)
    last = next((i for i, line in enumerate(text, 1) if i > first and line == "}"), 0)
    begin = next((i for i in range(first, last + 1) if first and (start or function) in text[i - 1]), 0)
    if begin == 0:
        raise SystemExit(f"{file} has no line with {start!r} in {function!r}")
    stop = next((i for i in range(begin + 1, last + 1) if end in text[i - 1]), last + 1)
    lines = {(file, line): begin <= line < stop for line in range(first, last + 1)}
    found = [each for each in kernel.instructions if re.fullmatch(operations, each.operation)]
    return sum(next((lines[place] for place in each.places if place in lines), False) for each in found)


def keep_candidates(form: str) -> dict[str, float]:
    """Parts of keep_candidates for 64 scores of a thread; the code does them twice."""

    def part(start: str, end: str) -> float:
        return count(code(form, ONE_BUFFER), "half_search.cuh", "void keep_candidates", start, end) / 2

    bounds = ("", "if (!__any_sync(~0u, own_low", "float low = fminf(own_low", "const bool hit", "for (int word")
    scores, test, limits, groups = map(part, bounds, bounds[1:])
    # The code that makes room lies between these two.
    rest = part("for (int word", "if (quad_lane == 0) minima.count") + part("if (minima.count[slot] > kC", "if ((kSkip")
    store, several = part("if ((kSkip", "const float score ="), part("const float score =", "\n")
    return {
        "scores": scores,
        "test": test,
        "fixed": limits + rest,
        "groups": groups,
        "store": store,
        "several": several,
    }


@cache
def layout() -> tuple[list[int], list[list[int]]]:
    """Warpgroups, rows of one and rows prepared at once; stages without and with a persistent grid, by width."""
    with tempfile.TemporaryDirectory() as folder:
        file, program = Path(folder) / "stages.cpp", str(Path(folder) / "stages")
        file.write_text(STAGES)
        compile_host = [os.environ.get("CXX", "c++"), "-std=c++20", f"-I{SEARCH.parent}", str(file), "-o", program]
        subprocess.run(compile_host, check=True)
        lines = subprocess.check_output([program], text=True).splitlines()
    first, *stages = [[int(word) for word in line.split()] for line in lines]
    return first, stages


def passes() -> dict[str, float]:
    """Instructions of a warp on shortest paths, which cluster_arithmetic.py adds up."""
    slot = keep_candidates("present")
    found = {"slot with a candidate": slot["fixed"] + slot["store"], "group with a candidate": slot["groups"] / 8}
    found["slot with several in a thread"] = slot["several"]
    for name, kernel in (("block of a tile", ONE_BUFFER), ("persistent grid", STAGED)):
        search = code("present", kernel)
        chunks, tiles = search.loops(search.find("HGMMA"))[:2]
        found |= {f"chunk, {name}": search.path(*chunks), f"tile, {name}": search.path(*tiles)}
    finish = code("present", FINISH)
    distance, marked = finish.find("DFMA", "squared_distance"), finish.find("STG", "mark_of(")
    begin, end = finish.loops(distance)[0]
    inside = (i for i in range(distance, end) if finish.instructions[i].operation == "DFMA")
    four = min((finish.loops(i)[0] for i in inside), key=lambda loop: loop[1] - loop[0])
    found["finish, marked row"] = finish.path(0, marked, finish.find("EXIT", after=marked))
    found["candidate, 32 columns"], found["128 further columns"] = finish.path(begin, distance, end), finish.path(*four)
    nearest = finish.find("MUFU.RSQ", "const float nearest")
    several = finish.path(0, distance, nearest, marked, finish.find("EXIT", after=marked))
    found["finish, marked row with several candidates"] = several - found["candidate, 32 columns"]
    again = code("present", AGAIN)
    found |= members(again) | second_scoring(again)
    compared = again.find("LDS", "const uint64_t first = keys")
    begin, end = again.loops(compared)[0]
    found["two keys compared"] = again.path(begin, compared, end)
    return found


def members(again: Code) -> dict[str, int]:
    """Of compare_members, for aligned rows in float32."""
    of_rows = "prepare(float{}, float{})"
    largest, stored = again.find("FMNMX", of_rows), again.find("STS", of_rows)
    first = again.find("HMMA", "multiply(scores[n], {first")
    # The code of both loops over members has these lines.
    columns, tiles = again.loops(first)[:2]
    second = again.find("HMMA", "multiply(scores[n], {first", after=tiles[1])
    begin, end = again.loops(second)[1]
    group, row = again.find("", "const int count = __popc("), again.find("", "const int bit = __ffs(open_rows)")
    exact = again.find("DFMA", "const double distance = exact_distance(", after=row)
    read, rounds = (again.path(*again.loops(place)[0]) for place in (largest, stored))
    column, tile, scored = again.path(*columns), again.path(*tiles), again.path(begin, second, end)
    whole = again.path(group, largest, stored, first, second, group) - 1
    return {
        "members, rows, 32 columns": read + rounds,
        "members, 64 columns": column,
        "members, beside them": tile,
        "members again, beside them": scored - column,
        "members again, tile with an open member": again.path(begin, second, row, end) - column,
        "members, 16 rows": whole - read - rounds - column - tile - scored,
        "members, row with an open member, 32 columns": again.path(row, exact, row) - 1,
    }


def second_scoring(again: Code) -> dict[str, int]:
    """Of open_rows_kernel, for 64 rows and 128 codewords at once."""
    product, below = again.find("HMMA", "multiply(sums[m][n], row_part"), again.find("STS", "open.below[row *")
    row = again.find("", "const int64_t row = a.search.open_rows[first_row + r];")
    of_rough = "const float rough = rough_distance("
    tested = again.find("", "if (rough > open.limit[r]) continue;", after=again.find("FFMA", of_rough))
    exact = again.find("DFMA", "const double distance = exact_distance(")
    begin, end = next(loop for loop in again.loops(product) if loop[0] <= below <= loop[1])
    sums = [i for i, each in enumerate(again.instructions) if each.operation == "FFMA"]
    sums = [i for i in sums if again.comes_from(i, of_rough)]
    shortest = min(sums, key=lambda i: again.path(tested, i, tested))
    # The code for four sums at once follows.
    columns = next(loop for loop in (again.loops(i)[0] for i in sums) if loop[0] > shortest)
    return {
        "again, chunk": again.path(begin, product, end),
        "again, tile": again.path(begin, product, below, end) - again.path(begin, product, end),
        "again, row in a tile": again.path(row, row) - 1,
        "again, candidate, 32 columns": again.path(tested, shortest, tested) - 1,
        "again, 128 further columns": again.path(*columns),
        "again, exact, 32 columns": again.path(tested, exact, tested) - 1,
    }


def prepare_cycles(kernel: str, function: str, width: int, *reads: tuple[str, str]) -> tuple[int, int]:
    """Of a warp, for a round of rows in float32, with these reads, and for bounds after the rounds."""
    search = code("present", kernel)
    begin, end = search.loops(search.find("SHFL", function))[0]
    kept = [i for i in range(begin, end) if search.comes_from(i, "store_rounded(kept[i]")]
    # 16 bytes of each thread of a row are 64 columns.
    stores = [i for i in kept if search.instructions[i].text.startswith(("STS.128", "STG.E.128"))]
    if len(stores) < width // 64:
        raise SystemExit(f"{function} stores {len(stores)} pieces of a row of {width} columns")
    bounds = ("LDG", "norms_of(*a.facts)"), ("STS", "*bound = inside ?"), ("STS", "*factor = ")
    a_round = search.cycles(begin, *(search.find(*read, after=begin) for read in reads), *stores[: width // 64], end)
    return a_round, search.cycles(end, *(search.find(*each, after=end) for each in bounds))


def preparations() -> list[list[Any]]:
    """Rows of a table: cycles to prepare a tile of rows, of its products, and of both, for 1024 and 8192 codewords."""
    (groups, group_rows, prepared), found = layout()[0], []
    copies = [("UBLKCP", "copy_bulk(")] * WARP_ROWS  # a loop of one thread after the other
    for width in (64, 128, 256):
        load = prepare_cycles(ONE_BUFFER, "load_rows<S, float>", width, ("LDG", "load_aligned(from + first, kept[i]"))
        kernel = STAGED if width > 128 else TWO_BUFFERS
        prepare = prepare_cycles(kernel, "prepare_rows<kPieces, float>", width, *copies)
        # Each warpgroup loads its own rows, before its products. Other warps prepare those of all, meanwhile.
        forms = ("load_rows", load, LOADED, 1, sum), ("prepare_rows", prepare, prepared, groups, max)
        for name, (a_round, bounds), at_once, turns, both in forms:
            rounds = turns * math.ceil(group_rows / at_once)
            total = rounds * a_round + turns * bounds
            row = [f"`{name}`", width, f"{rounds} x {a_round}", f"{turns} x {bounds}", total]
            for codewords in (1024, 8192):
                products = groups * group_rows * codewords * width // PRODUCTS
                row += [products, both((total, products))]
            found.append(row)
    return found


def parts(form: str, kernel: str, file: str, *functions: str) -> str:
    """The code of some functions, as a sum."""
    return " + ".join(str(count(code(form, kernel), file, function)) for function in functions)


def of_a_number(operations: str, *others: tuple[str, str, int]) -> tuple[float, float]:
    """Operations of load_rows for a number in the former form, of prepare_rows in the present one.

    The sections of the code, `others` of the former form, hold so many pieces of eight numbers for each of three types.
    """

    def total(kernel: Code, file: str, function: str, *sections: tuple[str, str, int]) -> float:
        counts = (
            count(kernel, file, function, start, end, operations) / (24 * pieces) for start, end, pieces in sections
        )
        return sum(counts)

    kept = ("float kept[kPieces]", "// All have read", 2), ("Squares squares;", "for (int distance", 2)
    former = total(code("former", ONE_BUFFER), "half_search.cuh", "void load_rows_twice(", ELEMENT, *others)
    return former, total(code("present", TWO_BUFFERS), "hopper_loop.cuh", "void prepare_rows(", *kept)


def rows() -> list[tuple[str, str, float | str, float | str]]:
    """The rows of docs/performance.md: part, unit, former form, present form."""
    former, present, minimum = map(keep_candidates, ("former", "present", "minimum"))
    all_scores = sum(former[name] for name in ("fixed", "groups", "store", "several"))
    single = present["fixed"] + present["store"]
    groups = f"and {present['groups'] / 8:g} for each group of columns with a candidate in the warp"
    rounded = of_a_number("FADD|FMNMX|FFMA|FMUL|FSEL|F2FP|HADD2|PRMT", LARGEST, STORE)
    hashes = ("uint64_t hash_of(", "int64_t enter(", "void exclude_later(")
    duplicates = [parts(form, "codeword_kernel", "duplicates.cuh", *hashes) for form in ("duplicates", "present")]
    kernels = (ONE_BUFFER, TWO_BUFFERS, STAGED)
    loads = count(code("present", ONE_BUFFER), "half_search.cuh", "void load_rows_once(")
    prepares = [count(code("present", kernel), "hopper_loop.cuh", "void prepare_rows(") for kernel in kernels]
    keeps = [count(code("present", kernel), "half_search.cuh", "void keep_candidates") for kernel in kernels]
    compare, grid = "`FIND_CLUSTERS`: `compare_members`", "`PERSISTENT_GRID`"
    paths = passes()
    found: list[tuple[str, str, float | str, float | str]] = [
        ("`keep_candidates`, scores and their minimum", "64 scores of a thread", former["scores"], present["scores"]),
        ("the test whether they hold a candidate", "64 scores", former["test"], present["test"]),
        ("candidates, where a thread holds at most one", "64 scores", all_scores, f"{single:g}, {groups}"),
        (
            "candidates, where a thread holds several",
            "64 scores",
            all_scores,
            f"{single + present['several']:g}, {groups}",
        ),
        ("`load_rows`, float64 arithmetic", "a number", *of_a_number("D(ADD|MUL|FMA)")),
        ("`load_rows`, conversions from and to float64", "a number", *of_a_number("F2F")),
        ("`load_rows`, float32 arithmetic, packing and minima", "a number", *rounded),
        ("`EXCLUDE_DUPLICATES`: `hash_of`, `enter`, `exclude_later`", "code, two layouts, all types", *duplicates),
        (f"{compare}, aligned float32", "32 columns of 16 rows", "-", paths["members, rows, 32 columns"]),
        (f"{compare}, products", "64 columns of 16 rows and 32 members", "-", paths["members, 64 columns"]),
        (f"{compare}, first scores", "16 rows and 32 members", "-", paths["members, beside them"]),
        (f"{compare}, second scores", "16 rows and 32 members", "-", paths["members again, beside them"]),
        (
            f"{compare}, the same with an open member",
            "16 rows and 32 members",
            "-",
            paths["members again, tile with an open member"],
        ),
        (f"{compare}, beside members", "16 rows", "-", paths["members, 16 rows"]),
        (f"{grid}: `load_rows` in a warp that computes products", "code, three types", loads, 0),
        (f"{grid}: `prepare_rows` in a warp that prepares rows, D 64 or 128", "code, three types", 0, prepares[1]),
        (f"{grid}: the same, D 192 or 256", "code, three types", 0, prepares[2]),
        (f"{grid}: `keep_candidates`, D 64 or 128", "all its code", *keeps[:2]),
        (f"{grid}: the same, D 192 or 256", "all its code", *keeps[::2]),
    ]
    for width, numbers in zip((64, 128, 192, 256), layout()[1], strict=True):
        found.append((f"{grid}: stages of the ring, D {width}", "a block", *numbers))
    for name, part in (("scores and their minimum", "scores"), ("the store of a thread's only candidate", "store")):
        found.append((f"`BRANCH_FREE_MINIMUM`: {name}", "64 scores", present[part], minimum[part]))
    return found


def shown(row: tuple[str, str, float | str, float | str]) -> list[str]:
    return [cell if isinstance(cell, str) else f"{cell:.4g}" for cell in row]


def counted() -> dict[str, Any]:
    """What the file of results holds."""
    return {
        "nvcc": nvcc_version(),
        "rows": [shown(row) for row in rows()],
        "passes": passes(),
        "latencies": {**LATENCIES, "others": OTHERS},
        "preparations": preparations(),
    }


def entries(counts: dict[str, Any]) -> list[Any]:
    names = ("passes", "latencies")
    return [*counts["rows"], *counts["preparations"], *(item for name in names for item in counts[name].items())]


def nvcc_version() -> str:
    text = subprocess.check_output([compiler(), "--version"], text=True)
    return next(iter(re.findall(r"V(\d[\d.]+)", text)), "unknown")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the file of results, and write nothing")
    if not parser.parse_args().check:
        return write_json(RESULT, counted())
    before, version = json.loads(RESULT.read_text()), nvcc_version()
    if before["nvcc"] != version:
        return print(f"instruction counts of nvcc {before['nvcc']} are not compared with those of {version}")
    found = counted()
    if found != before:
        old, items = map(entries, (before, found))
        new = [str(item) for item in items if item not in old]
        sys.exit(f"error: {RESULT.name} is out of date, run python {__file__}; new: {', '.join(new)}")
    print(f"instruction counts of nvcc {version} are those of {RESULT.name}")


if __name__ == "__main__":
    main()
