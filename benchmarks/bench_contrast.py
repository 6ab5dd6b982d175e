"""The Cross-CPC loss with its gradient, ours beside others; `pytest benchmarks/`.

Each contender, shape and precision has a row in results/contrast-<device>.json. A contender that is missing, or needs
too much, has a row with the reason. `pytest benchmarks/bench_contrast.py
--device cuda` is for a machine with a GPU.
"""

from collections.abc import Callable

import contrast
import pytest
from comparison import memory_growth
from measurement import printed_rows

ROWS, KEY = "contrast", ("shape", "precision", "contender")
# Largest error of a gradient, relative to its largest number. Its causes are the rounding of scores and, in bfloat16,
# of slopes and of the gradient itself.
LARGEST_ERRORS = {"float32": 1e-4, "tf32": 1e-2, "bfloat16": 2e-2}
# Memory beyond inputs, gradients and named workspaces, relative to inputs and gradients.
LARGEST_EXCESS = 0.1
# With fewer clips, the allocator's rounding of small tensors has a large share.
LEAST_CLIPS = 1024
# Of the peak memory on a CPU where B·D doubles; a matrix of all scores would make it fourfold.
LARGEST_GROWTH = 2.5


def line(row: dict) -> str:
    """One row as text."""
    start = f"{row['shape']:14} {row['precision']:9} {row['contender']:37}"
    if "missing" in row:
        return f"{start} {row['missing']}"
    spread = f"{row['p20_ms']:.3g} to {row['p80_ms']:.3g}"
    peak = "" if row["peak_bytes"] is None else f", peak {mebibytes(row['peak_bytes'])}"
    if row["workspace_bytes"]:
        named = ", ".join(f"{name} {mebibytes(size)}" for name, size in row["workspace_bytes"].items())
        peak += f" (gradients {mebibytes(row['gradient_bytes'])}, {named})"
    errors = f"errors {row['loss_error']:.1e} of the loss, {row['gradient_error']:.1e} of its gradients"
    return f"{start} {row['median_ms']:9.3g} ms ({spread}){peak}, {errors}"


def mebibytes(size: int) -> str:
    """A size in bytes as text."""
    return f"{size / 2**20:.3g} MiB"


def excess(row: dict) -> float:
    """Unnamed memory, relative to inputs and gradients, which have the same size."""
    unnamed = row["peak_bytes"] - row["gradient_bytes"] - sum(row["workspace_bytes"].values())
    return unnamed / (2 * row["gradient_bytes"])


def bench_contrast(request: pytest.FixtureRequest, keep: Callable[[dict], None]) -> None:
    rows = []
    for row in printed_rows("contrast.py", *contrast.CONTENDERS, "--device", request.config.getoption("--device")):
        rows.append(row)
        keep(row)
    for row in rows:
        if row["contender"] == "ours" and "missing" not in row:
            assert row["gradient_error"] < LARGEST_ERRORS[row["precision"]], line(row)
            if row["workspace_bytes"] and row["clips"] >= LEAST_CLIPS:
                assert excess(row) < LARGEST_EXCESS, line(row)
    growth = memory_growth(rows)
    assert growth.get("ours", 0) < LARGEST_GROWTH, growth
