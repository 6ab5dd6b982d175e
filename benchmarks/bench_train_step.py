"""Whole training steps, ours beside the original's, each in its own process; `pytest benchmarks/bench_train_step.py`.

First the original's step has to agree with preset official. A line for each contender and size is printed at the end,
with the parts of some, and kept in results/train-step-<device>.json; `--device cuda` is for a machine with a GPU.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import train_steps
from shapes import TRAIN_SHAPES

from unicode_fast.files.writing import write_text

HERE = Path(__file__).resolve().parent
SIZES = sorted({size for sizes in TRAIN_SHAPES.values() for size in sizes})
AGREEMENT = 1e-10


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Iterator[list[dict]]:
    """Rows of finished contenders, printed when the last one has ended."""
    rows: list[dict] = []
    yield rows
    if not rows:
        return
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print()
        for row in rows:
            print(line(row))


def keep(request: pytest.FixtureRequest, rows: list[dict]) -> None:
    """Writes down what there is so far, as an interrupted benchmark has measured something too."""
    folder = Path(request.config.getoption("--results"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"train-step-{request.config.getoption('--device')}.json"
    write_text(path, json.dumps(rows, indent=1) + "\n")


def line(row: dict) -> str:
    """One line of the printed table."""
    start = f"{row['size']:20} {row['contender']:64}"
    if "missing" in row:
        return f"{start} {row['missing']}"
    spread = f"{row['p20_ms']:.4g} to {row['p80_ms']:.4g}"
    return f"{start} {row['median_ms']:9.4g} ms ({spread}), {row['clips_per_second']:.4g} clips/s"


@pytest.fixture(scope="module")
def original_is_right() -> None:
    """Nothing is timed before the original's step has been found to be that of preset official."""
    assert train_steps.disagreement() < AGREEMENT


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("contender", train_steps.CONTENDERS)
def bench_step(
    request: pytest.FixtureRequest, original_is_right: None, results: list[dict], contender: str, size: str
) -> None:
    device = request.config.getoption("--device")
    if size not in TRAIN_SHAPES[device]:
        pytest.skip("for another device")
    missing = ""
    if device not in train_steps.CONTENDERS[contender].devices:
        missing = f"not run: measured on {' and '.join(train_steps.CONTENDERS[contender].devices)} only"
    if missing:
        results.append({"contender": contender, "size": size, "missing": missing})
        pytest.skip(missing)
    command = [sys.executable, str(HERE / "train_steps.py"), contender, size, "--device", device]
    if contender in train_steps.PROFILED:
        command.append("--profile")
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    results.append(json.loads(found.stdout.splitlines()[-1]))
    keep(request, results)
