"""Number of threads of a command beside other work."""

import os
import time
from pathlib import Path

import pytest
import torch
from processes import start

from unicode_fast import CheckpointError, threads
from unicode_fast.threads import CoreUse, core_use, idle_threads
from unicode_fast.training.runs import set_threads as threads_of_run

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
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], set_threads: object, tmp_path: Path
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
        threads_of_run(tmp_path, new=True)
        assert torch.get_num_threads() == 2
        for name in threads.VARIABLES:
            monkeypatch.delenv(name, raising=False)
        threads_of_run(tmp_path, new=True)
        assert torch.get_num_threads() == 1
    finally:
        for other in others:
            other.kill()
            other.communicate()
    assert "1 of 2 threads" in capsys.readouterr().err


def test_a_run_keeps_its_threads(monkeypatch: pytest.MonkeyPatch, set_threads: object, tmp_path: Path) -> None:
    """A resumed run takes the number of its folder, whatever else runs; a variable goes before it."""
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    set_threads(1)
    threads_of_run(tmp_path, new=True)
    set_threads(2)
    threads_of_run(tmp_path, new=False)
    assert torch.get_num_threads() == 1
    set_threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    threads_of_run(tmp_path, new=False)
    assert torch.get_num_threads() == 2
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("MKL_NUM_THREADS", "two")
    with pytest.raises(ValueError, match=r"MKL_NUM_THREADS must be a whole number of at least 1, got 'two'"):
        threads_of_run(tmp_path, new=False)
    monkeypatch.delenv("MKL_NUM_THREADS")
    (tmp_path / "threads.json").write_text('{"threads": []}')
    with pytest.raises(CheckpointError, match=r"threads\.json is damaged"):
        threads_of_run(tmp_path, new=False)
    (tmp_path / "threads.json").unlink()
    threads_of_run(tmp_path, new=False)
    assert torch.get_num_threads() == 2


def test_a_program_keeps_its_threads(set_threads: object) -> None:
    """The package changes no number in a program that imports it."""
    set_threads(2)
    assert threads.idle_now(2) == 2
