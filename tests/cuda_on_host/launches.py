"""Launches of the package's kernels in a quantiser step, on the emulator: `python tests/cuda_on_host/launches.py`.

PYTHONPATH is the package of tests/cuda_on_host/build.py. The script prints the launches and fills of each part. Its
status is 1 if a number differs from docs/performance.md. Kernels of torch are not counted.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path

import torch

from unicode_fast.ops import (
    CodebookState,
    EmaConfig,
    PreparedCodebook,
    codebook_update,
    commitment_loss,
    nearest_codeword,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
OPERATORS = torch.ops.unicode_fast
# Modalities, rows of each, codewords, width.
SIZES = {"training": (3, 800, 400, 256), "sorted": (1, 17000, 1000, 8)}
FORMER, PRESENT = "update, two operators", "update"
RULE = EmaConfig()


def state_of(codewords: int, width: int, modalities: int) -> CodebookState:
    codebook = torch.randn(codewords, width)
    idle = torch.zeros(modalities, codewords, dtype=torch.int64)
    return CodebookState(codebook, torch.ones(codewords), codebook.clone(), idle, torch.zeros((), dtype=torch.int64))


def parts(size: tuple[int, int, int, int]) -> dict[str, Callable[[], object]]:
    """The calls of a step, by their rows in docs/performance.md."""
    modalities, rows, codewords, width = size
    state = state_of(codewords, width, modalities)
    features = torch.randn(modalities, rows, width)
    index = torch.randint(codewords, (modalities, rows))
    valid = torch.rand(modalities, rows) < 0.9
    prepared = PreparedCodebook(state.codebook)
    prepared.refresh()
    weights = torch.ones(modalities, modalities, dtype=torch.float64)
    shard = ([0] * modalities, [rows] * modalities)
    lists = (list(features), list(index), [], [])

    def two_operators() -> None:
        buffer = OPERATORS.codebook_statistics(state.codebook, state.step, *lists, None, *shard, False, *astuple(RULE))
        OPERATORS.codebook_apply(*state, buffer, None, None, *astuple(RULE))

    return {
        "search": lambda: nearest_codeword(features.flatten(0, 1), prepared, backend="cpp"),
        "commitment": lambda: commitment_loss(features, index, state.codebook, weights, backend="cpp"),
        "commitment, masked": lambda: commitment_loss(
            features, index, state.codebook, weights, valid=valid, backend="cpp"
        ),
        FORMER: two_operators,
        PRESENT: lambda: codebook_update(state, lists[0], lists[1], RULE, backend="cpp"),
        "operands": lambda: prepared.refresh(backend="cpp"),
    }


def launches_of(call: Callable[[], object]) -> list[str]:
    """The names of the kernels that a call launches; a fill counts as one."""
    call()  # a first call may prepare more
    with tempfile.TemporaryFile("w+") as lines:
        before = os.dup(2)
        os.dup2(lines.fileno(), 2)
        os.environ["UNICODE_FAST_HOST_LAUNCHES"] = "1"
        try:
            call()
        finally:
            del os.environ["UNICODE_FAST_HOST_LAUNCHES"]
            os.dup2(before, 2)
            os.close(before)
        lines.seek(0)
        return [line.removeprefix("launch ").strip() for line in lines if line.startswith("launch ")]


def table() -> Iterator[str]:
    """The rows of docs/performance.md."""
    counts: dict[str, dict[str, int]] = {}
    search: list[str] = []
    for size, numbers in SIZES.items():
        calls = parts(numbers).items()
        # The emulator searches for many rows too slowly.
        found = {name: launches_of(call) for name, call in calls if size == "training" or name in (FORMER, PRESENT)}
        for name, launches in found.items():
            print(f"{size}, {name}: {', '.join(launches)}")
        counts[size] = {name: len(launches) for name, launches in found.items()}
        search = found.get("search", search)
    # The former form has no second search.
    former = sum("open_rows_kernel" not in name for name in search)
    yield f"| launches of a search | a search | {former} | {len(search)} |"
    for size, rows in (("training", "no sorting"), ("sorted", "sorted rows")):
        yield f"| launches of an update, {rows} | {counts[size][FORMER]} | {counts[size][PRESENT]} |"
    step = counts["training"]
    rest = step["search"] + step["commitment"] + step["operands"]
    yield f"| launches of a quantiser step of 3 x 800 rows | {rest + step[FORMER]} | {rest + step[PRESENT]} |"


def main() -> int:
    torch.manual_seed(0)
    page = PAGE.read_text()
    missing = 0
    for row in table():
        missing += row not in page
        print(row, "" if row in page else "is not in docs/performance.md")
    return 1 if missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
