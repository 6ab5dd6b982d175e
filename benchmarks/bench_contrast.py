"""The Cross-CPC loss with its gradient, ours beside others, each in its own process; `pytest benchmarks/`.

A line per shape, precision and contender is printed at the end and kept in results/contrast-<device>.json; a contender
that is missing is named as missing. `pytest benchmarks/bench_contrast.py --device cuda` is for a machine with a GPU.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import contrast
import pytest
from shapes import CONTRAST_CASES

CASES = dict.fromkeys(case for cases in CONTRAST_CASES.values() for case in cases)
HERE = Path(__file__).resolve().parent
# What a gradient may err by, relative to its largest number: roundings of scores and, in bfloat16, of slopes and of the
# gradient itself.
LARGEST_ERRORS = {"float32": 1e-4, "tf32": 1e-2, "bfloat16": 2e-2}


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
    (folder / f"contrast-{device}.json").write_text(json.dumps(rows, indent=1) + "\n")
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print()
        for row in rows:
            print(line(row))


def line(row: dict) -> str:
    """One line of the printed table."""
    start = f"{row['shape']:14} {row['precision']:9} {row['contender']:26}"
    if "missing" in row:
        return f"{start} {row['missing']}"
    spread = f"{row['p20_ms']:.3g} to {row['p80_ms']:.3g}"
    peak = "" if row["peak_bytes"] is None else f", {row['peak_bytes'] / 2**20:.0f} MiB"
    errors = f"errors {row['loss_error']:.1e} of the loss, {row['gradient_error']:.1e} of its gradients"
    return f"{start} {row['median_ms']:9.3g} ms ({spread}){peak}, {errors}"


@pytest.mark.parametrize("contender", contrast.CONTENDERS)
@pytest.mark.parametrize(("shape", "precision"), CASES)
def bench_contrast(
    request: pytest.FixtureRequest, results: list[dict], shape: str, precision: str, contender: str
) -> None:
    device = request.config.getoption("--device")
    if (shape, precision) not in CONTRAST_CASES[device]:
        pytest.skip("for GPUs" if device == "cpu" else "for CPUs")
    command = [sys.executable, str(HERE / "contrast.py"), contender, shape, precision, "--device", device]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    row = json.loads(found.stdout.splitlines()[-1])
    results.append(row)
    if contender == "ours":
        assert row["gradient_error"] < LARGEST_ERRORS[precision], line(row)
