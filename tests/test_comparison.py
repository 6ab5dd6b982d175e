"""The table of the benchmarks, with made-up rows, and the truth that its rows are compared with."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import comparison
import contenders
import pytest
import torch
from cases import normal
from measurement import INSTRUCTION_SETS, instruction_set
from shapes import GROWTH_SHAPES

from unicode_fast.reference import nearest_codeword_reference

ROOT = Path(__file__).resolve().parent.parent
RUN = {"device": "a processor", "threads": 2, "torch": "2.13", "commit": "0123456789abcdef", "date": "2026-01-02"}
SIZE = {"rows": 8, "codewords": 4, "width": 3}


def row(contender: str, median_ms: float, wrong: int = 0, **fields: object) -> dict:
    checked = {"wrong_rows": wrong, "checked_rows": 8}
    names = {"problem": "search", "shape": "s", "contender": contender}
    return {**names, **SIZE, "median_ms": median_ms, **checked, **RUN, **fields}


def cells(*rows: dict, stem: str = "quantiser") -> list[str]:
    (problem,) = comparison.problems({stem: list(rows)}).values()
    return comparison.cells(problem)


def test_the_best_peer_is_the_fastest_of_the_same_run() -> None:
    earlier = row("torch", 0.5, date="2025-01-02")
    slow = row("faiss", 4.0, wrong=3)
    variants = row("reference", 0.1), row("ours with mma.sync", 0.1)
    head = ["nearest codeword", "N 8, M 4, D 3", "2 ms"]
    tail = ["2.0x", "exact / 3 of 8 rows differ", "a processor"]
    assert cells(row("ours", 2.0), row("torch", 6.0), slow, *variants) == [*head, "faiss 4 ms", *tail]
    assert cells(row("ours", 2.0), earlier) == [*head, "-", "-", "exact", "a processor"]


def test_our_faster_row_counts() -> None:
    found = cells(row("ours", 2.0), row("ours in a CUDA graph", 0.05), row("torch", 1.0))
    assert found[2:5] == ["50 us in a CUDA graph", "torch 1 ms", "20.0x"]


def test_collapsed_codebooks_are_beside_random_ones() -> None:
    names = {"problem": "repeated"}
    found = cells(row("ours", 2.0, **names), row(contenders.RANDOM, 1.0, **names))
    assert found[:5] == [
        "nearest codeword, 40 distinct",
        "N 8, M 4, D 3",
        "2 ms",
        "ours, random codewords 1 ms",
        "0.5x",
    ]


def test_loops_have_the_fastest_loader() -> None:
    rates = {"step_clips_per_second": 1000.0, "clips": 10, **RUN}
    rows = [
        {"size": "s", "feed": name, "loop_clips_per_second": rate, "agreement": "exact", **rates}
        for name, rate in (("direct", 100.0), ("prefetch", 500.0))
    ]
    found = cells(*rows, stem="loader")
    assert found[1:6] == ["B 10, s, loader prefetch", "20 ms", "the step alone 10 ms", "0.5x", "exact / exact"]


def test_what_is_missing_has_a_line() -> None:
    names = {"problem": "search", "shape": "s"}
    rows = [
        row("ours", 2.0),
        {**names, "contender": "faiss", "missing": "faiss is not installed"},
        {**names, "contender": "flash-kmeans", "missing": "does not run on cpu"},
        {**names, "shape": "million", "contender": "ours", "missing": "not run: needs a GPU"},
    ]
    lines = comparison.summary({"quantiser": rows}).splitlines()
    assert lines[0] == "a processor, 2 thread(s), torch 2.13, 2026-01-02, commit `0123456789ab`"
    assert lines[-2:] == [
        "Missing peers: faiss (faiss is not installed).",
        "Not run: nearest codeword, million (needs a GPU).",
    ]
    # The only machine is in the line above the table.
    assert {len(line) for line in lines if line.startswith("|")} == {len(lines[2])}
    assert not any("a processor" in line for line in lines if line.startswith("|"))


def test_the_growth_of_memory_has_a_line() -> None:
    size = {"modalities": 1, "clips": 8, "steps": 1, "width": 3, "precision": "float32"}
    peaks = {("ours", GROWTH_SHAPES[0]): 8, ("ours", GROWTH_SHAPES[1]): 16, ("torch", GROWTH_SHAPES[1]): 64}
    rows = [{**row(name, 1.0), **size, "shape": shape, "peak_bytes": peak} for (name, shape), peak in peaks.items()]
    assert comparison.memory_growth(rows) == {"ours": 2.0}
    assert comparison.summary({"contrast": rows}).endswith("becomes fourfold: ours 2.0x.")
    assert comparison.memory_notes(rows[:1]) == []


@pytest.mark.parametrize("milliseconds", [0.0153, 0.976, 44.9, 13202.9])
def test_times_have_a_unit(milliseconds: float) -> None:
    number, unit = comparison.time_text(milliseconds).split()
    assert 0.1 <= float(number) < 1000
    assert float(number) * {"s": 1e3, "ms": 1.0, "us": 1e-3}[unit] == pytest.approx(milliseconds, rel=5e-3)


def test_the_truth_is_the_reference() -> None:
    """Also with equal codewords, codewords too near for the expanded square, a single one, and NaN."""
    centres = normal(5, 16)
    near = centres.repeat(4, 1) + 1e-7 * normal(20, 16, seed=1)
    features = torch.cat([normal(40, 16, seed=2), near, near[:1] * torch.nan])
    for codebook in (normal(30, 16, seed=3), centres.repeat(4, 1), near, centres[:1]):
        found = contenders.nearest_in_float64(features, codebook)
        assert torch.equal(found, nearest_codeword_reference(features, codebook)[0])
        wrong = found.clone()
        wrong[3] += 1
        assert contenders.wrong_rows(wrong, features, codebook) == (1, len(features))


@pytest.mark.skipif(not instruction_set(), reason="needs the C++ operators")
def test_peers_can_be_held_to_every_instruction_set() -> None:
    """The error of an unknown set names all that the C++ operators have."""
    code = "import unicode_fast, sys; sys.modules['unicode_fast._C'].build_info()"
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "UNICODE_FAST_CPU": "none"},
    )
    named = re.search(r"UNICODE_FAST_CPU must be (.*), and one", found.stderr)
    assert named, found.stderr
    assert set(re.split(r", | or ", named[1])) <= set(INSTRUCTION_SETS)


def test_a_benchmark_shows_its_progress(tmp_path: Path) -> None:
    """Its name when it starts, and a dot for each row, in a file too."""
    log = tmp_path / "log"
    (tmp_path / "bench_slow.py").write_text(f"""
from pathlib import Path
ROWS = KEY = ""

def shown():
    return Path({str(log)!r}).read_text().splitlines()[-1]

def bench_slow(keep):
    assert shown() == "bench_slow.py::bench_slow "
    for row in ({{}}, {{"missing": ""}}, {{}}):
        keep(row)
    assert shown() == "bench_slow.py::bench_slow .."
""")
    shutil.copy(ROOT / "benchmarks" / "conftest.py", tmp_path)
    options = ["-o", "python_files=bench_*.py", "-o", "python_functions=bench_*"]
    with log.open("w") as out:
        found = subprocess.run(
            [sys.executable, "-m", "pytest", *options],
            cwd=tmp_path,
            stdout=out,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "benchmarks", ROOT)))},
        )
    assert found.returncode == 0, log.read_text()
    assert "collected 1 item" in log.read_text()
