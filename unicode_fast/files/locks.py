"""Locks that end with their process: `exclusive` waits for the lock, `alone` raises an error."""

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

# Errors of a file system without locks.
_WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
# Locked files by process: opening and closing such a file again would release its lock.
_held: set[tuple[int, int, int]] = set()


class InUse(RuntimeError):
    """Another process uses this folder; the message names it."""


@contextlib.contextmanager
def exclusive(file: Path, say: Callable[[str], None]) -> Iterator[bool]:
    """Wait for a lock and hold it; yield False if the file system has no locks.

    Args:
        file: `.<name>.lock`, created if missing. Anything at this path that is no file is replaced, except a non-empty
            folder; links are not followed.
        say: called with one line if another process holds the lock.

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
    """The holder of a lock, which writes its name a moment after it takes the lock."""
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip()
        if holder:
            return holder
        time.sleep(0.01)
    return "another process"


@contextlib.contextmanager
def alone(file: Path, what: str) -> Iterator[None]:
    """Hold a lock for this process, not for its children; raise an error if another process holds it.

    Args:
        file: created if missing; names the holder.
        what: the locked object, for the error.

    Raises:
        InUse: another process holds the lock.
        OSError: the file cannot be opened.
    """
    if is_held(file):
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
        # A file with a second name may be another program's, and is not written to.
        if os.fstat(descriptor).st_nlink <= 1:
            with naming(file):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()} since {now}\n".encode(), 0)
        yield
    finally:
        if held in _held and os.fstat(descriptor).st_nlink <= 1:
            # Otherwise the error of a later process could name this holder.
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
        _held.discard(held)
        os.close(descriptor)


def is_held(file: Path) -> bool:
    """Whether this process holds the lock of `alone`."""
    try:
        return _identity(os.stat(file)) in _held
    except OSError:
        return False


def _identity(found: os.stat_result) -> tuple[int, int, int]:
    return os.getpid(), found.st_dev, found.st_ino


def _open(file: Path, of_others: bool = True) -> int:
    """A descriptor of the lock file; links are not followed."""
    flags = os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    for last in (False, True):
        try:
            descriptor = os.open(file, flags | os.O_RDWR, 0o666)
        except PermissionError:
            if not of_others:
                raise
            # A lock needs no write access, so another user's file can be locked, too.
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
    """Remove anything but a lock file from its path; a non-empty folder is an error."""
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
