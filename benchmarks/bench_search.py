"""The search, search and update, and the quantiser's training step, ours beside others; `pytest benchmarks/`.

Rows are kept in results/quantiser-<device>.json. The row of a contender that has not run holds the reason. On a CPU all
contenders are held to the instruction set of ours. `pytest benchmarks/bench_search.py --device cuda` is for a machine
with a GPU.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import contenders
import pytest
from measurement import INSTRUCTION_SETS, instruction_set, printed_rows
from shapes import CPU_SHAPES

ROWS, KEY = "quantiser", ("problem", "shape", "contender")
# The reference takes seconds to minutes a call at larger sizes.
REFERENCE_SHAPES = {"search": ("one modality", "one row"), "step": ("default",)}


def line(row: dict) -> str:
    """One row as text."""
    start = f"{row['problem']:7} {row['shape']:24} {row['contender']:26}"
    if "missing" in row:
        return f"{start} {row['missing']}"
    spread = f"{row['p20_ms']:.3g} to {row['p80_ms']:.3g}"
    wrong = f"{row['wrong_rows']} of {row['checked_rows']} rows wrong"
    peak = "" if row["peak_bytes"] is None else f", {row['peak_bytes'] / 2**20:.0f} MiB"
    return f"{start} {row['median_ms']:9.3g} ms ({spread}){peak}, {wrong}"


def obstacle(problem: str, shape: str, contender: str, device: str) -> str:
    """The reason why a contender is not measured at a shape; empty where it is."""
    found = contenders.PROBLEMS[problem][contender].obstacle(device)
    if found:
        return found
    if device == "cpu" and problem != "step" and shape not in CPU_SHAPES:
        return "not run: needs a GPU"
    if contender == "reference" and shape not in REFERENCE_SHAPES[problem]:
        return "not run: slow, measured at the smallest size"
    return ""


def measured(
    cases: list[tuple[str, str, str]], device: str, truth: Path, variables: Mapping[str, str], keep: Callable
) -> None:
    """Measures cases of problem, shape and contender; those that share a process come first."""
    truth.mkdir(exist_ok=True)
    wrong = []
    for alone in (False, True):
        words = [word for case in cases if contenders.PROBLEMS[case[0]][case[2]].alone == alone for word in case]
        options = ("--device", device, "--truth", str(truth))
        for row in printed_rows("contenders.py", *words, *options, variables=variables) if words else ():
            keep(row)
            if row["contender"].startswith("ours") and row["wrong_rows"]:
                wrong.append(line(row))
    assert not wrong, wrong


@pytest.mark.parametrize("problem", contenders.PROBLEMS)
def bench_contenders(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, keep: Callable[[dict], None], problem: str
) -> None:
    device = request.config.getoption("--device")
    able = []
    for shape in contenders.shape_names(problem):
        for contender in contenders.PROBLEMS[problem]:
            missing = obstacle(problem, shape, contender, device)
            if missing:
                keep({"problem": problem, "shape": shape, "contender": contender, "missing": missing})
            else:
                able.append((problem, shape, contender))
    variables = INSTRUCTION_SETS.get(instruction_set(), {}) if device == "cpu" else {}
    measured(able, device, tmp_path_factory.getbasetemp() / "truth", variables, keep)
