"""The search on each instruction set of this processor: `pytest benchmarks/bench_instruction_sets.py --all-sets`.

Ours, faiss, and torch's addmm and min are held to the same set. Rows are kept in results/instruction-sets-cpu.json; a
set that the processor or the extension lacks has a row with the reason.
"""

from collections.abc import Callable

import pytest
from bench_search import measured, obstacle
from measurement import INSTRUCTION_SETS, has
from shapes import CPU_SHAPES

ROWS, KEY = "instruction-sets", ("instructions", "shape", "contender")
CONTENDERS = ("ours", "torch addmm+min", "faiss")


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
def bench_set(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    keep: Callable[[dict], None],
    instructions: str,
) -> None:
    if not request.config.getoption("--all-sets"):
        pytest.skip("--all-sets runs it")
    if request.config.getoption("--device") != "cpu":
        pytest.skip("for CPUs")
    cases = [("search", shape, contender) for shape in CPU_SHAPES if shape != "one row" for contender in CONTENDERS]
    if not has(instructions):
        missing = "not run: this processor or this build lacks it"
        keep({"instructions": instructions, "shape": "all sizes", "contender": "ours", "missing": missing})
        pytest.skip(missing)
    for case in list(cases):
        reason = obstacle(*case, "cpu")
        if reason:
            cases.remove(case)
            names = dict(zip(("problem", "shape", "contender"), case, strict=True))
            keep({**names, "instructions": instructions, "missing": reason})
    # Random numbers of torch depend on the set.
    truth = tmp_path_factory.getbasetemp() / f"truth {instructions}"
    measured(cases, "cpu", truth, INSTRUCTION_SETS[instructions], keep)
