"""Number of threads of a command beside other work."""

import os
import time

import pytest
import torch
from processes import start

from unicode_fast import threads
from unicode_fast.threads import CoreUse, core_use, idle_threads

BUSY = "print(flush=True)\nwhile True: pass"


@pytest.mark.parametrize(
    ("busy", "own", "chosen"),
    [
        (1.0, 1.0, 4),  # Only this process.
        (1.3, 1.0, 4),
        (2.0, 1.0, 3),
        (4.0, 1.0, 1),
        (4.0, 0.1, 1),
        (0.9, 1.0, 4),  # Ticks are coarser than the time of a process.
    ],
)
def test_hand_written(busy: float, own: float, chosen: int) -> None:
    """Four threads during one second, after others."""
    before, now = CoreUse(10.0, 5.0, 70.0), CoreUse(11.0, 5.0 + own, 70.0 + busy)
    assert idle_threads(before, now, 4) == chosen


@pytest.mark.skipif(core_use() is None, reason="the system does not count the use of its cores")
def test_another_process_takes_a_core(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], set_threads: object
) -> None:
    """With as many busy processes as cores, a command has one thread, unless the user sets the number."""
    cores = len(os.sched_getaffinity(0))
    set_threads(2)
    others = [start("-c", BUSY) for _ in range(cores)]
    try:
        for other in others:
            other.stdout.readline()
        monkeypatch.setattr(threads, "_at_start", None)
        threads.note_start()
        end = time.monotonic() + 1
        while time.monotonic() < end:
            pass
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        threads.use_idle_cores()
        assert torch.get_num_threads() == 2
        for name in threads.VARIABLES:
            monkeypatch.delenv(name, raising=False)
        threads.use_idle_cores()
        assert torch.get_num_threads() == 1
    finally:
        for other in others:
            other.kill()
            other.communicate()
    assert "1 of 2 threads" in capsys.readouterr().err


def test_a_program_keeps_its_threads(monkeypatch: pytest.MonkeyPatch, set_threads: object) -> None:
    """The package changes no number in a program that imports it."""
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    set_threads(2)
    threads.use_idle_cores()
    assert torch.get_num_threads() == 2
