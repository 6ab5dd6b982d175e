"""Locks of a process: one process holds it, the error of another names the holder, and a killed holder leaves none."""

import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from unicode_fast.files.locks import InUse, alone, exclusive


def forked(act: Callable[[], object]) -> int:
    """A process that runs some code and ends with status 0, or with 1 after an exception."""
    process = os.fork()
    if process:
        return process
    try:
        act()
        os._exit(0)
    finally:
        os._exit(1)


def status_of(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_error_of_a_second_process_names_the_holder(tmp_path: Path) -> None:
    file = tmp_path / ".lock"

    def refused() -> None:
        with pytest.raises(InUse, match=f"^run A is in use by process {os.getppid()} on .* since 20.* UTC; wait for"):
            with alone(file, "run A"):
                pass

    with alone(file, "run A"):
        assert status_of(forked(refused)) == 0
    with alone(file, "run A"):
        assert file.read_bytes().startswith(f"process {os.getpid()} on ".encode())


def test_the_error_waits_for_the_name_of_a_new_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, looks, read = tmp_path / ".lock", itertools.count(), os.pread

    def refused() -> None:
        with pytest.raises(InUse, match=f"is in use by process {os.getppid()} on"), alone(file, "run A"):
            pass

    with alone(file, "run A"):
        monkeypatch.setattr(os, "pread", lambda *arguments: read(*arguments) if next(looks) > 3 else b"")
        assert status_of(forked(refused)) == 0
    with pytest.raises(ValueError, match="ends"), alone(file, "run A"):
        raise ValueError("ends")
    assert file.read_bytes() == b""


def test_one_process_holds_it_once_and_keeps_it(tmp_path: Path) -> None:
    """A second open and close of the file would release the lock."""
    file = tmp_path / ".lock"

    def taken() -> None:
        with pytest.raises(InUse), alone(file, "run A"):
            pass

    with alone(file, "run A"):
        with pytest.raises(InUse, match="run A is in use by this process"), alone(file, "run A"):
            pass
        assert status_of(forked(taken)) == 0
    assert status_of(forked(taken)) == 1


def test_a_killed_holder_leaves_it_free_though_its_children_live(tmp_path: Path) -> None:
    file, child = tmp_path / ".lock", tmp_path / "child"

    def hold() -> None:
        with alone(file, "run A"):
            reader = forked(lambda: time.sleep(30))
            child.with_suffix(".new").write_text(str(reader))
            child.with_suffix(".new").rename(child)
            time.sleep(30)

    holder = forked(hold)
    wait_for(child.exists)
    with pytest.raises(InUse, match=f"process {holder} "), alone(file, "run A"):
        pass
    os.kill(holder, signal.SIGKILL)
    assert status_of(holder) == -signal.SIGKILL
    reader = int(child.read_text())
    os.kill(reader, 0)
    with alone(file, "run A"):
        pass
    os.kill(reader, signal.SIGKILL)


def test_what_is_no_file_is_replaced_and_links_are_not_followed(tmp_path: Path) -> None:
    aim = tmp_path / "aim"
    aim.write_text("of somebody else")
    link, folder = tmp_path / ".link", tmp_path / ".folder"
    link.symlink_to(aim)
    folder.mkdir()
    for file in (link, folder):
        with alone(file, "run A"):
            assert file.is_file() and not file.is_symlink()
    assert aim.read_text() == "of somebody else"


def test_one_waits_for_its_turn(tmp_path: Path) -> None:
    file, held, lines = tmp_path / ".store.lock", tmp_path / "held", []

    def hold() -> None:
        with exclusive(file, lambda _: None):
            held.touch()
            time.sleep(0.2)
            (tmp_path / "made").touch()

    holder = forked(hold)
    wait_for(held.exists)
    with exclusive(file, lines.append):
        assert (tmp_path / "made").exists()
    assert lines == ["waiting for another process that makes store"] and status_of(holder) == 0
