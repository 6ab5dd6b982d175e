"""Options of the benchmarks."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the contenders run")
    results = Path(__file__).resolve().parent / "results"
    parser.addoption("--results", default=str(results), help="folder for the measured numbers")
