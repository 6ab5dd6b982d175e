"""Whether a process does anything: what tells long work from work that hangs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import psutil

try:
    import resource
except ImportError:  # There is none on Windows.
    resource = None  # type: ignore[assignment]

# Of the time between two looks; a process that waits needs less.
_BUSY_SHARE = 0.02
_waiting = 0


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """While this process waits for another one, which is no part of its job and may take as long as it likes."""
    global _waiting
    _waiting += 1
    try:
        yield
    finally:
        _waiting -= 1


class Activity:
    """What this process and those that it started have done, but for the thread that looks.

    It is active while it computes, reads or writes files, or has memory-mapped files read.
    """

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.own, self.others = self._own(), self._others()

    def look(self, seconds: float) -> bool:
        """Whether anything was done since the last look, `seconds` ago."""
        own = self._own()
        active = _waiting > 0 or _differs(own, self.own, seconds)
        if not active:
            # Only now, as all processes of the machine are gone through for those that this one started.
            others = self._others()
            active, self.others = _differs(others, self.others, seconds), others
        # Looking reads files too.
        self.own = self._own()
        return active

    def _own(self) -> tuple[float, int]:
        """Seconds of computing, and bytes and pages that were read or written."""
        pages = resource.getrusage(resource.RUSAGE_SELF).ru_majflt if resource else 0
        return time.process_time() - time.thread_time(), _bytes(self.process) + pages

    def _others(self) -> tuple[float, int]:
        """The same of the processes that this one started, and these; one that ends takes its share with it."""
        seconds, moved = 0.0, 0
        for child in self.process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                times = child.cpu_times()
                seconds += times.user + times.system
                moved += _bytes(child)
        return seconds, moved


def _bytes(process: psutil.Process) -> int:
    """What was read and written; zero where the system does not tell, so that computing alone counts there."""
    try:
        counters = process.io_counters()
    except (AttributeError, OSError, RuntimeError, ValueError, psutil.Error):
        return 0
    return int(counters.read_bytes + counters.write_bytes)


def _differs(now: tuple[float, int], before: tuple[float, int], seconds: float) -> bool:
    return abs(now[0] - before[0]) > _BUSY_SHARE * seconds or now[1] != before[1]
