"""A default step beside one other busy process; `pytest benchmarks/bench_busy.py`, about 30 s.

Each row is a process of its own.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from measurement import printed_rows

ROWS, KEY = "busy", ("chosen", "busy")
BUSY = "print(flush=True)\nwhile True: pass"
# Threads, and busy processes.
CASES = [("2", 0), ("2", 1), ("1", 1), ("by train", 1)]


@contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """A context in which this many other processes compute without pause."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) for _ in range(number)]
    try:
        for other in others:
            assert other.stdout is not None
            other.stdout.readline()
        yield
    finally:
        for other in others:
            other.kill()
            other.communicate()


@pytest.mark.parametrize(("chosen", "busy"), CASES)
def bench_busy(keep: Callable[[dict], None], monkeypatch: pytest.MonkeyPatch, chosen: str, busy: int) -> None:
    options = ["recommended, float32", "default", "--seconds", "3"]
    if chosen == "by train":
        options.append("--idle-threads")
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    with busy_processes(busy):
        for row in printed_rows("train_steps.py", *options):
            keep({**row, "chosen": chosen, "busy": busy, "cores": os.cpu_count()})
