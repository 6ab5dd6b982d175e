"""Options of the benchmarks, the files of their rows, and the table at the end."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import comparison
import pytest

from unicode_fast.files.writing import write_text

# The rows of this run, by the stem of their file.
MEASURED = pytest.StashKey[dict[str, list[dict]]]()
BEGUN = pytest.StashKey[float]()
# Longest time of one operator of pytest-benchmark.
OPERATOR_SECONDS = 0.3


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the contenders run")
    parser.addoption("--results", type=Path, help="folder for the measured numbers, such as benchmarks/results [none]")
    parser.addoption("--all-sets", action="store_true", help="measure the search on every instruction set as well")
    parser.addoption("--all-steps", action="store_true", help="measure slow and further training steps as well")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MEASURED], config.stash[BEGUN] = {}, time.perf_counter()
    # Prints the name of a benchmark when it starts: some take minutes.
    config.option.verbose += 1
    # pytest-benchmark's own table is in other units, and has no peers.
    config.option.benchmark_quiet, config.option.benchmark_max_time = True, OPERATOR_SECONDS


@pytest.fixture(scope="module")
def keep(request: pytest.FixtureRequest) -> Callable[[dict], None]:
    """Keeps a row for the table; with --results writes it at once, so that a time limit loses only later rows.

    The module has the name of its file, ROWS, and the fields by which a row replaces an earlier one, KEY. A row without
    numbers replaces none that has some. A row with numbers prints a dot, which shows progress.
    """
    folder, device = (request.config.getoption(name) for name in ("--results", "--device"))
    mine = request.config.stash[MEASURED].setdefault(request.module.ROWS, [])
    terminal, capture = map(request.config.pluginmanager.getplugin, ("terminalreporter", "capturemanager"))

    def add(row: dict) -> None:
        mine.append(row)
        if "missing" not in row:
            with capture.global_and_fixture_disabled():
                terminal.write(".", flush=True)
        if folder is None:
            return
        path = folder / f"{request.module.ROWS}-{device}.json"
        rows = json.loads(path.read_text()) if path.exists() else []
        known = {tuple(each[name] for name in request.module.KEY): each for each in rows}
        key = tuple(row[name] for name in request.module.KEY)
        if "missing" not in row or "missing" in known.get(key, row):
            known[key] = row
            write_text(path, json.dumps(list(known.values()), indent=1) + "\n")

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    measured = config.stash[MEASURED]
    if any(measured.values()):
        seconds = time.perf_counter() - config.stash[BEGUN]
        terminalreporter.section(f"ours beside the best peer, measured in {seconds:.0f} s")
        terminalreporter.write_line(comparison.summary(measured))
