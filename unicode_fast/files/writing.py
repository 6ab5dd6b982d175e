"""Atomic and durable writing of files and folders."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from unicode_fast.files.paths import expanded

_UNFINISHED = ".unfinished-"
# Temporary files of a run by earlier versions.
_OLDER = re.compile(r"\..+\.(pt|png|csv|json|yaml)\.[a-z0-9_]{8}")


def path_of(name: str, value: Any) -> Path:
    """An argument as a path.

    Raises:
        TypeError: the argument is no path.
    """
    try:
        return Path(expanded(os.fspath(value)))
    except TypeError:
        raise TypeError(f"{name} must be a path, got {type(value).__name__}") from None


@contextlib.contextmanager
def atomic_file(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """A file that appears complete or not at all; a failure leaves an existing file unchanged.

    Args:
        path: path of the file; a temporary file beside it is written, flushed to the disk, then renamed.
        mode: "wb", or "w" for text in UTF-8 with unchanged line ends.

    Raises:
        OSError: the folder cannot be written, or the disk is full; the message names the path.
    """
    temporary = None
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=unfinished(path))
        with os.fdopen(handle, mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        # The error names no file, or the temporary one, whose name is internal.
        if isinstance(error, OSError) and Path(error.filename or unfinished(path)).name.startswith(unfinished(path)):
            raise OSError(error.errno, f"{error.strerror}; nothing that was there before is lost", str(path)) from error
        raise


def unfinished(path: Path) -> str:
    """Prefix of temporary names beside a file or folder."""
    return f".{path.name}{_UNFINISHED}"


def remove_unfinished(folder: Path, name: str = "") -> None:
    """Remove temporary files of killed processes; no other process may write there.

    Args:
        folder: their folder, which may be missing.
        name: name of the file or folder that they wrote; "" for any.
    """
    for leftover in folder.glob(f".{name}*"):
        ours = leftover.name.startswith(f".{name}{_UNFINISHED}") if name else _UNFINISHED in leftover.name
        if ours or (not name and _OLDER.fullmatch(leftover.name)):
            remove(leftover)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add this path to system errors without one, such as errors of an open file."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, f"{error.strerror or error}; nothing that was saved is lost", str(path)) from error


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, atomically."""
    with atomic_file(path, "w") as file:
        file.write(text)


def write_json(path: Path, value: object) -> None:
    """Write indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `path` at the end; a failure removes it.

    Args:
        path: path of the folder, which must be missing or empty.

    Raises:
        FileExistsError: the path exists, or another process made it meanwhile.
        OSError: the folder cannot be written, or the disk is full.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=unfinished(path)) as made:
        inside = Path(made) / path.name
        inside.mkdir()
        yield inside
        publish(inside, path)


def publish(temporary: Path, target: Path) -> None:
    """Rename a finished folder durably.

    Raises:
        FileExistsError: the target exists.
    """
    sync_folder(temporary)
    # A rename replaces an empty folder, and fails on a non-empty one.
    try:
        os.rename(temporary, target)
    except OSError as error:
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "another process made it first", str(target)) from error
        raise
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's names to the disk; Windows needs no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_new_file(name: str, file: Path) -> None:
    """Raise ValueError if a flag's output file exists, or cannot be written."""
    if os.path.lexists(file):
        raise ValueError(f"{name} must be a file that does not exist yet, got {str(file)!r}")
    check_writable(name, file)


def check_writable(name: str, file: Path) -> None:
    """Raise ValueError if a flag's output file cannot be written, before its content is computed."""
    above = next(folder for folder in file.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"{name} must be a file in a writable folder, got {str(file)!r}")
