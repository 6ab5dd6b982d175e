"""One table of all measurements: ours beside the best peer.

`pytest benchmarks/` prints it, and `update_readme.py` writes it from results/.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from shapes import GROWTH_SHAPES

HEADS = ("what", "size", "ours", "best peer", "ratio", "exact: ours / peer", "machine")
NUMBERS = ("ours", "ratio")
NOTE = (
    "Medians, float32 where not named; ratio is the peer's time by ours. Exact: rows whose codeword differs from "
    "float64; of Cross-CPC, the largest error of a gradient by its largest number. A dash was not compared."
)
WHAT = {
    "search": "nearest codeword",
    "repeated": "nearest codeword, 40 distinct",
    "clustered": "nearest codeword, 40 tight clusters",
    "update": "search and update",
    "step": "quantiser step",
    "contrast": "Cross-CPC",
}
# Fields that are equal in rows of one run.
RUN = ("device", "instructions", "threads", "torch", "commit", "date")
# Stem of the results, then the row's names.
Key = tuple[str, ...]


class Problem(NamedTuple):
    """Rows of one problem and size: ours, and those of peers; each measured, or with the reason in `missing`."""

    what: str
    size: str
    ours: dict
    peers: list[dict]


def machine(row: dict) -> str:
    """Machine, versions and commit of a row."""
    words = [row["device"], row.get("instructions"), f"{row['threads']} thread(s)", f"torch {row['torch']}"]
    words += [row["date"], f"commit `{(row['commit'] or 'unknown')[:12]}`"]
    return ", ".join(word for word in words if word)


def time_text(milliseconds: float) -> str:
    """A time with its unit."""
    if milliseconds >= 1e3:
        return f"{milliseconds / 1e3:.3g} s"
    return f"{milliseconds:.3g} ms" if milliseconds >= 0.1 else f"{1e3 * milliseconds:.3g} us"


def size_of(row: Mapping) -> str:
    """The sizes of a row's problem."""
    if "precision" in row:
        return f"{row['modalities']} x {row['clips']} clips, K {row['steps']}, D {row['width']}, {row['precision']}"
    if "rows" in row:
        return f"N {row['rows']}, M {row['codewords']}, D {row['width']}"
    rows = row["clips"] * row.get("steps", row.get("positions", 1))
    return f"{row['modalities']} x {rows} rows, M {row['codewords']}, D {row['width']}"


def _groups(rows: Iterable[dict], *names: str) -> dict[Key, list[dict]]:
    """Rows by the values of some fields."""
    found: dict[Key, list[dict]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def _problem(what: str, rows: list[dict]) -> Problem:
    """A problem with our faster row, called or in a CUDA graph. Further rows of ours and the reference are no peers."""
    own = [row for row in rows if row["contender"] in ("ours", "ours in a CUDA graph")]
    mine = min(own, key=lambda row: row.get("median_ms", math.inf), default={"missing": "not run"})
    others = ("ours with", "reference")
    peers = [row for row in rows if row not in own and not row["contender"].startswith(others)]
    measured = next((row for row in (mine, *peers) if "median_ms" in row), None)
    return Problem(what, rows[0]["shape"] if measured is None else size_of(measured), mine, peers)


def _quantiser(rows: list[dict]) -> dict[Key, Problem]:
    groups = _groups(rows, "problem", "shape")
    return {key: _problem(WHAT[key[0]], group) for key, group in groups.items()}


def _sets(rows: list[dict]) -> dict[Key, Problem]:
    groups = _groups(rows, "instructions", "shape")
    return {key: _problem(f"{WHAT['search']}, {key[0]}", group) for key, group in groups.items()}


def _contrast(rows: list[dict]) -> dict[Key, Problem]:
    groups = _groups(rows, "shape", "precision")
    return {key: _problem(WHAT["contrast"], group) for key, group in groups.items()}


def _operators(rows: list[dict]) -> dict[Key, Problem]:
    found = {}
    for key, group in _groups(rows, "operator", "shape").items():
        ours = next((row for row in group if row["contender"] != "reference"), group[0])
        found[key] = Problem(f"`{key[0]}`", size_of(ours), ours, [row for row in group if row is not ours])
    return found


def _steps(rows: list[dict]) -> dict[Key, Problem]:
    found = {}
    for key, group in _groups(rows, "size").items():
        named = {row["contender"]: row for row in group}
        ours = named.get("recommended, float32", {"missing": "not run"})
        peers = [{**named["the original"], "contender": "the released code"}] if "the original" in named else []
        size = f"B {ours['clips']}, {key[0].partition(',')[0]}" if "clips" in ours else key[0]
        found[key] = Problem("training step", size, ours, peers)
    return found


def _data(rows: list[dict]) -> dict[Key, Problem]:
    ours = next((row for row in rows if row["contender"] == "store, float32"), {"missing": "not run"})
    size = f"{rows[0]['clips']} clips, published"
    return {("reading",): Problem("reading a batch", size, ours, [r for r in rows if r["contender"][:4] == "zips"])}


def _loaders(rows: list[dict]) -> dict[Key, Problem]:
    """The loop with its fastest loader, beside the step on a batch in memory."""
    found = {}
    for key, group in _groups(rows, "size").items():
        row = max(group, key=lambda row: row["loop_clips_per_second"])
        loop, step = (
            {**row, "contender": name, "median_ms": 1e3 * row["clips"] / row[f"{field}_clips_per_second"]}
            for name, field in ((row["feed"], "loop"), ("the step alone", "step"))
        )
        found[key] = Problem("training loop", f"B {row['clips']}, {key[0]}, loader {row['feed']}", loop, [step])
    return found


PROBLEMS: dict[str, Callable[[list[dict]], dict[Key, Problem]]] = {
    "quantiser": _quantiser,
    "instruction-sets": _sets,
    "contrast": _contrast,
    "operators": _operators,
    "train-step": _steps,
    "loader": _loaders,
    "data": _data,
}


def problems(files: Mapping[str, list[dict]]) -> dict[Key, Problem]:
    """Problems by the stem of their file and their names, in the order of the table."""
    return {
        (stem, *key): problem
        for stem, read in PROBLEMS.items()
        if files.get(stem)
        for key, problem in read(files[stem]).items()
    }


def best_peer(problem: Problem) -> dict | None:
    """The fastest peer in the run of ours; None where none was measured in it."""
    run = [problem.ours.get(name) for name in RUN]
    able = [row for row in problem.peers if "median_ms" in row and [row.get(name) for name in RUN] == run]
    return min(able, key=lambda row: row["median_ms"], default=None)


def exactness(row: dict | None) -> str:
    """The wrong rows of a contender, or the largest error of its gradients."""
    if row is None:
        return "-"
    if "gradient_error" in row:
        return f"{row['gradient_error']:.0e}"
    if "wrong_rows" in row:
        return f"{row['wrong_rows']} of {row['checked_rows']} rows differ" if row["wrong_rows"] else "exact"
    return row.get("agreement", "-")


def cells(problem: Problem) -> list[str]:
    """The line of a measured problem."""
    ours, peer = problem.ours, best_peer(problem)
    ratio = "-" if peer is None else f"{peer['median_ms'] / ours['median_ms']:.1f}x"
    name = "-" if peer is None else f"{peer['contender']} {time_text(peer['median_ms'])}"
    both = [exactness(row) for row in (ours, peer)]
    exact = " / ".join(both) if peer is not None and set(both) != {"-"} else both[0]
    graph = " in a CUDA graph" if ours["contender"].endswith("in a CUDA graph") else ""
    return [problem.what, problem.size, time_text(ours["median_ms"]) + graph, name, ratio, exact, ours["device"]]


def table(lines: list[list[str]], *, padded: bool = False) -> str:
    """A table in Markdown; padded for a terminal."""
    heads = HEADS[: len(lines[0])]
    columns = list(zip(heads, *lines, strict=True))
    widths = [max(3, *map(len, column)) if padded else 3 for column in columns]
    numbers = [head in NUMBERS for head in heads]
    rule = ["-" * (width - 1) + (":" if number else "-") for width, number in zip(widths, numbers, strict=True)]

    def row(texts: Sequence[str]) -> str:
        each = zip(texts, widths, numbers, strict=True)
        aligned = [text.rjust(width) if number else text.ljust(width) for text, width, number in each]
        return f"| {' | '.join(aligned if padded else texts)} |"

    return "\n".join(map(row, [heads, rule, *lines]))


def memory_growth(rows: Iterable[dict]) -> dict[str, float]:
    """Peak memory of Cross-CPC at the larger size of GROWTH_SHAPES by that at the smaller, by contender, on a CPU."""
    groups = _groups((row for row in rows if row.get("peak_bytes") and row["precision"] == "float32"), "contender")
    peaks = {key[0]: {row["shape"]: row["peak_bytes"] for row in group} for key, group in groups.items()}
    small, large = GROWTH_SHAPES
    return {name: sizes[large] / sizes[small] for name, sizes in peaks.items() if sizes.keys() >= {small, large}}


def memory_notes(rows: Iterable[dict]) -> list[str]:
    """The growth of the peak memory in a sentence; none where it was not measured."""
    growth = ", ".join(f"{name} {factor:.1f}x" for name, factor in memory_growth(rows).items())
    small, large = GROWTH_SHAPES
    start = f"Growth of Cross-CPC's peak memory from {small} to {large}, where B·D doubles and B·B becomes fourfold"
    return [f"{start}: {growth}."] if growth else []


def missing(found: Iterable[Problem]) -> list[str]:
    """Peers that are missing or failed, and problems without a time, by reason, in two sentences."""
    peers: dict[str, None] = {}
    idle: dict[str, list[str]] = {}
    for problem in found:
        for row in problem.peers:
            reason = row.get("missing", "")
            if "not installed" in reason or "failed" in reason or " has none" in reason:
                peers[f"{row['contender']} ({reason})"] = None
        if "missing" in problem.ours:
            reason = problem.ours["missing"].removeprefix("not run: ")
            idle.setdefault(reason, []).append(f"{problem.what}, {problem.size}")
    lines = [f"Missing peers: {'; '.join(peers)}."] if peers else []
    reasons = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in idle.items())
    return lines + ([f"Not run: {reasons}."] if reasons else [])


def summary(files: Mapping[str, list[dict]]) -> str:
    """The text at the end of a run: machines, the table, and what is missing."""
    found = list(problems(files).values())
    measured = [problem for problem in found if "median_ms" in problem.ours]
    if not measured:
        return "\n".join(missing(found))
    lines = [cells(problem) for problem in measured]
    machines = dict.fromkeys(machine(problem.ours) for problem in measured)
    # The machine stands above the table where it has a single one.
    shown = [line[:-1] for line in lines] if len({line[-1] for line in lines}) == 1 else lines
    memory = memory_notes(files.get("contrast", []))
    return "\n".join([*machines, "", table(shown, padded=True), "", NOTE, *memory, *missing(found)])
