"""The search and the quantiser's training step, ours beside others, each in its own process; `pytest benchmarks/`.

A line per shape and contender is printed at the end and kept in results/quantiser-<device>.json; a contender that is
missing is named as missing. `pytest benchmarks/bench_search.py --device cuda` is for a machine with a GPU.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import contenders
import pytest
from shapes import CPU_SHAPES

HERE = Path(__file__).resolve().parent
CASES = [
    (problem, shape, contender)
    for problem, choices in contenders.PROBLEMS.items()
    for shape in contenders.shape_names(problem)
    for contender in choices
]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Iterator[list[dict]]:
    """Rows of finished contenders; written down and printed when the last one has ended."""
    rows: list[dict] = []
    yield rows
    if not rows:
        return
    device = request.config.getoption("--device")
    folder = Path(request.config.getoption("--results"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"quantiser-{device}.json").write_text(json.dumps(rows, indent=1) + "\n")
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print()
        for row in rows:
            print(line(row))


def line(row: dict) -> str:
    """One line of the printed table."""
    start = f"{row['problem']:7} {row['shape']:24} {row['contender']:26}"
    if "missing" in row:
        return f"{start} {row['missing']}"
    spread = f"{row['p20_ms']:.3g} to {row['p80_ms']:.3g}"
    wrong = f"{row['wrong_rows']} of {row['checked_rows']} rows wrong"
    return f"{start} {row['median_ms']:9.3g} ms ({spread}), {wrong}"


@pytest.mark.parametrize(("problem", "shape", "contender"), CASES)
def bench_contender(
    request: pytest.FixtureRequest, results: list[dict], problem: str, shape: str, contender: str
) -> None:
    device = request.config.getoption("--device")
    if device == "cpu" and problem == "search" and shape not in CPU_SHAPES:
        pytest.skip("for GPUs")
    missing = contenders.PROBLEMS[problem][contender].obstacle(device)
    if contender == "reference" and problem == "search" and shape not in CPU_SHAPES[:2]:
        missing = "not run: needs seconds to minutes a call"
    if missing:
        results.append({"problem": problem, "shape": shape, "contender": contender, "missing": missing})
        pytest.skip(missing)
    command = [sys.executable, str(HERE / "contenders.py"), problem, contender, shape, "--device", device]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    row = json.loads(found.stdout.splitlines()[-1])
    results.append(row)
    if contender == "ours":
        assert row["wrong_rows"] == 0, line(row)
