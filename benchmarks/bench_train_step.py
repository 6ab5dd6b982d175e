"""Whole training steps, ours beside the original's, each in its own process; `pytest benchmarks/bench_train_step.py`.

The original's step must first agree with preset official. Each contender and size has a row in
results/train-step-<device>.json. On a CPU only QUICK is measured without `--all-steps`, whose rows also have the times
of the sections of the step. `--device cuda` is for a machine with a GPU.
"""

from collections.abc import Callable

import pytest
import train_steps
from measurement import printed_rows
from shapes import TRAIN_SHAPES

ROWS, KEY = "train-step", ("contender", "size")
SIZES = sorted({size for sizes in TRAIN_SHAPES.values() for size in sizes})
AGREEMENT = 1e-10
# The original takes 13 s for a step of the published sizes.
QUICK = (
    ("the original", "default"),
    ("recommended, float32", "default"),
    ("recommended, float32", "published, 4 clips"),
)


@pytest.fixture(scope="module")
def disagreement() -> float:
    """Checks that the original's step is that of preset official, before anything is timed."""
    found = train_steps.disagreement()
    assert found < AGREEMENT
    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("contender", train_steps.CONTENDERS)
def bench_step(
    request: pytest.FixtureRequest, disagreement: float, keep: Callable[[dict], None], contender: str, size: str
) -> None:
    device = request.config.getoption("--device")
    if size not in TRAIN_SHAPES[device]:
        pytest.skip("for another device")
    if device not in train_steps.CONTENDERS[contender].devices:
        missing = f"not run: measured on {' and '.join(train_steps.CONTENDERS[contender].devices)} only"
        keep({"contender": contender, "size": size, "missing": missing})
        pytest.skip(missing)
    every = device == "cuda" or request.config.getoption("--all-steps")
    if not every and (contender, size) not in QUICK:
        keep({"contender": contender, "size": size, "missing": "not run: --all-steps runs it"})
        pytest.skip("--all-steps runs it")
    profile = ["--profile"] if every and contender in train_steps.PROFILED else []
    for row in printed_rows("train_steps.py", contender, size, "--device", device, *profile):
        # The rules of preset recommended differ from the original's.
        agreement = {"agreement": f"{disagreement:.0e} from preset official"} if contender == "the original" else {}
        keep({**row, **agreement})
