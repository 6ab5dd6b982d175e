"""The search, search and update, and the quantiser's training step, ours beside others; `pytest benchmarks/`.

Each shape and contender has a line, which is printed and kept in results/quantiser-<device>.json. The line of a
contender that has not run holds the reason. `pytest benchmarks/bench_search.py --device cuda` is for a machine with a
GPU.
"""

from collections.abc import Callable

import contenders
import pytest
from measurement import printed_rows
from shapes import CPU_SHAPES

ROWS = "quantiser"
CASES = [(problem, shape) for problem in contenders.PROBLEMS for shape in contenders.shape_names(problem)]


def line(row: dict) -> str:
    """One line of the printed table."""
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
    if found or problem == "step":
        return found
    if device == "cpu" and shape not in CPU_SHAPES:
        return "not run: needs a GPU"
    if contender == "reference" and shape not in CPU_SHAPES[:2]:
        return "not run: needs seconds to minutes a call"
    return ""


@pytest.mark.parametrize(("problem", "shape"), CASES)
def bench_contenders(request: pytest.FixtureRequest, keep: Callable[[dict], None], problem: str, shape: str) -> None:
    device = request.config.getoption("--device")
    able = []
    for contender in contenders.PROBLEMS[problem]:
        missing = obstacle(problem, shape, contender, device)
        if missing:
            keep({"problem": problem, "shape": shape, "contender": contender, "missing": missing})
        else:
            able.append(contender)
    if not able:
        pytest.skip("no contender can run here")
    for together in [able] if device == "cuda" else [[contender] for contender in able]:
        rows = []
        for row in printed_rows("contenders.py", problem, shape, *together, "--device", device):
            rows.append(row)
            keep(row)
        for row in rows:
            assert not row["contender"].startswith("ours") or row["wrong_rows"] == 0, line(row)
