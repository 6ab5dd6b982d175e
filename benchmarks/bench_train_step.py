"""Whole training steps, ours beside the original's, each in its own process; `pytest benchmarks/bench_train_step.py`.

The original's step must first agree with preset official. Each contender and size has a line, which is printed and
kept in results/train-step-<device>.json. Some lines have the times of the sections of the step. `--device cuda` is for
a machine with a GPU.
"""

from collections.abc import Callable

import pytest
import train_steps
from measurement import printed_rows
from shapes import TRAIN_SHAPES

ROWS = "train-step"
SIZES = sorted({size for sizes in TRAIN_SHAPES.values() for size in sizes})
AGREEMENT = 1e-10


def line(row: dict) -> str:
    """One line of the printed table."""
    start = f"{row['size']:20} {row['contender']:64}"
    if "missing" in row:
        return f"{start} {row['missing']}"
    spread = f"{row['p20_ms']:.4g} to {row['p80_ms']:.4g}"
    return f"{start} {row['median_ms']:9.4g} ms ({spread}), {row['clips_per_second']:.4g} clips/s"


@pytest.fixture(scope="module")
def original_is_right() -> None:
    """Checks that the original's step is that of preset official, before anything is timed."""
    assert train_steps.disagreement() < AGREEMENT


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("contender", train_steps.CONTENDERS)
def bench_step(
    request: pytest.FixtureRequest, original_is_right: None, keep: Callable[[dict], None], contender: str, size: str
) -> None:
    device = request.config.getoption("--device")
    if size not in TRAIN_SHAPES[device]:
        pytest.skip("for another device")
    if device not in train_steps.CONTENDERS[contender].devices:
        missing = f"not run: measured on {' and '.join(train_steps.CONTENDERS[contender].devices)} only"
        keep({"contender": contender, "size": size, "missing": missing})
        pytest.skip(missing)
    profile = ["--profile"] if contender in train_steps.PROFILED else []
    for row in printed_rows("train_steps.py", contender, size, "--device", device, *profile):
        keep(row)
