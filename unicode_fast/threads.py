"""Number of threads of a new run on a CPU: as many as other processes leave cores idle.

At the end of a parallel loop, a thread of OpenMP spins until the others have finished. If another process has the core
of one of them, every loop lasts until the scheduler returns it. Two threads then take longer than one.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import NamedTuple

STATISTICS = Path("/proc/stat")
# Each of them sets a number of threads, which is kept.
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Columns of a core in /proc/stat, in ticks: user, nice, system, idle, iowait, irq, softirq, steal.
_IDLE_COLUMNS, _COLUMNS = (3, 4), 8


def number_is_given() -> bool:
    """Whether a variable sets the number of threads.

    Raises:
        ValueError: its value is no number of threads, nor a list with one for each level of nesting.
    """
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    for name, value in given.items():
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", value.replace(" ", "")):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    return bool(given)


class CoreUse(NamedTuple):
    """Seconds since an arbitrary start: clock, time of this process on all cores, and busy time of its cores."""

    clock: float
    own: float
    busy: float


def core_use() -> CoreUse | None:
    """The use of the cores on which this process may run; None where the system does not count it."""
    if not hasattr(os, "sched_getaffinity") or not STATISTICS.exists():
        return None
    cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    ticks = 0
    for line in STATISTICS.read_text(encoding="utf-8").splitlines():
        name, *columns = line.split()
        if name in cores:
            ticks += sum(int(value) for n, value in enumerate(columns[:_COLUMNS]) if n not in _IDLE_COLUMNS)
    return CoreUse(time.monotonic(), time.process_time(), ticks / os.sysconf("SC_CLK_TCK"))


def idle_threads(before: CoreUse, now: CoreUse, threads: int) -> int:
    """Threads of `threads` that had an idle core between two times, rounded; at least 1."""
    others = (now.busy - before.busy - (now.own - before.own)) / (now.clock - before.clock)
    return max(1, threads - max(0, round(others)))


_at_start: CoreUse | None = None


def note_start() -> None:
    """Notes the use of the cores before the imports of a command, which take seconds."""
    global _at_start
    _at_start = core_use()


def idle_now(threads: int) -> int:
    """Threads that had an idle core since this command started; all in a program that only imports the package."""
    now = core_use()
    return threads if _at_start is None or now is None else idle_threads(_at_start, now, threads)
