"""Options of the benchmarks, and the files of their rows."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from unicode_fast.files.writing import write_text


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the contenders run")
    results = Path(__file__).resolve().parent / "results"
    parser.addoption("--results", default=str(results), help="folder for the measured numbers")


@pytest.fixture(scope="module")
def keep(request: pytest.FixtureRequest) -> Callable[[dict], None]:
    """Writes and prints each row at once, so that a time limit loses only later rows.

    The module has the name of its file, ROWS, and `line`, the text of a row.
    """
    folder, device = (request.config.getoption(name) for name in ("--results", "--device"))
    manager = request.config.pluginmanager.getplugin("capturemanager")
    rows: list[dict] = []

    def add(row: dict) -> None:
        rows.append(row)
        write_text(Path(folder) / f"{request.module.ROWS}-{device}.json", json.dumps(rows, indent=1) + "\n")
        with manager.global_and_fixture_disabled():
            print(request.module.line(row), flush=True)

    return add
