"""Locks that end with the process that holds them: one waits for its turn, the other is refused."""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import platform
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from unicode_fast.files.writing import naming

# Errors of a file system that has no locks.
_WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


# Files and which process holds them: to open one again there and close it would let go of its lock.
_held: set[tuple[int, int, int]] = set()


class InUse(RuntimeError):
    """Another process works in this folder; the message names it."""


@contextlib.contextmanager
def exclusive(file: Path, say: Callable[[str], None]) -> Iterator[bool]:
    """Wait for a lock and hold it; False where the file system has no such locks.

    Args:
        file: `.<name>.lock`, made if it is not there. What is there and is no file is replaced, but for a
            folder that holds something; links are not followed.
        say: told in one line when another process is waited for.

    Raises:
        OSError: the file cannot be opened.
    """
    descriptor = _open(file)
    try:
        try:
            held = _take(descriptor, wait=False)
        except BlockingIOError:
            say(f"waiting for another process that makes {file.stem[1:]}")
            held = _take(descriptor, wait=True)
        yield held
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    """Who holds a lock, which that process says a moment after it has taken it."""
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        said = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip()
        if said:
            return said
        time.sleep(0.01)
    return "another process"


@contextlib.contextmanager
def alone(file: Path, what: str) -> Iterator[None]:
    """Hold a lock, or be refused where another process holds it; held by this process alone, not by its children.

    Args:
        file: made if it is not there; says who holds it.
        what: is locked, for the message.

    Raises:
        InUse: another process holds it.
        OSError: the file cannot be opened.
    """
    with contextlib.suppress(OSError):
        if _identity(os.stat(file)) in _held:
            raise InUse(f"{what} is in use by this process")
    descriptor = _open(file, of_others=False)
    held = _identity(os.fstat(descriptor))
    try:
        try:
            _take(descriptor, wait=False, of_process=True)
        except BlockingIOError as error:
            raise InUse(f"{what} is in use by {_holder(descriptor)}; wait for its end, or end it") from error
        _held.add(held)
        now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
        # With another name it may be no lock, and is not written to.
        if os.fstat(descriptor).st_nlink <= 1:
            with naming(file):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()} since {now}\n".encode(), 0)
        yield
    finally:
        if held in _held and os.fstat(descriptor).st_nlink <= 1:
            # So that whom the next one refuses does not read of this one.
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
        _held.discard(held)
        os.close(descriptor)


def _identity(found: os.stat_result) -> tuple[int, int, int]:
    return os.getpid(), found.st_dev, found.st_ino


def _open(file: Path, of_others: bool = True) -> int:
    """A descriptor of the lock file itself, never of what a link in its place points to."""
    flags = os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    for last in (False, True):
        try:
            descriptor = os.open(file, flags | os.O_RDWR, 0o666)
        except PermissionError:
            if not of_others:
                raise
            # Of another user, whose file can be locked all the same.
            descriptor = os.open(file, flags & ~os.O_CREAT | os.O_RDONLY)
        except OSError:
            if last or not (file.is_symlink() or file.is_dir()):
                raise
            _remove(file)
            continue
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
        _remove(file)
    raise OSError(errno.EINVAL, "a lock must be a plain file", str(file))


def _remove(file: Path) -> None:
    """Removes what is no lock from its place; a folder that holds something stays, and is an error."""
    if file.is_dir() and not file.is_symlink():
        file.rmdir()
    else:
        file.unlink(missing_ok=True)


if sys.platform == "win32":
    import msvcrt

    def _take(descriptor: int, wait: bool, of_process: bool = False) -> bool:
        while True:
            try:
                os.lseek(descriptor, 1 << 30, os.SEEK_SET)
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
                return True
            except OSError as error:
                if not wait:
                    raise BlockingIOError from error
                time.sleep(0.2)

else:
    import fcntl

    def _take(descriptor: int, wait: bool, of_process: bool = False) -> bool:
        lock = fcntl.lockf if of_process else fcntl.flock
        try:
            lock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise BlockingIOError from error
            if error.errno not in _WITHOUT_LOCKS:
                raise
            return False
        return True
