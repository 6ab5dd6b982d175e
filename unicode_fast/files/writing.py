"""Files and folders that appear whole or not at all, and stay after a crash."""

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
# What earlier versions called those of a run.
_OLDER = re.compile(r"\..+\.(pt|png|csv|json|yaml)\.[a-z0-9_]{8}")


def path_of(name: str, value: Any) -> Path:
    """The path that an argument says.

    Raises:
        TypeError: it says none.
    """
    try:
        return Path(expanded(os.fspath(value)))
    except TypeError:
        raise TypeError(f"{name} must be a path, got {type(value).__name__}") from None


@contextlib.contextmanager
def atomic_file(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """A file that appears whole or not at all, and leaves an older one untouched on failure.

    Args:
        path: where it appears; written beside it first, flushed to the disk, then renamed.
        mode: "wb", or "w" for text in UTF-8 with lines that end as they are written.

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
        # Of no file, or of the temporary one, which nobody has heard of.
        if isinstance(error, OSError) and Path(error.filename or unfinished(path)).name.startswith(unfinished(path)):
            raise OSError(error.errno, f"{error.strerror}; nothing that was there before is lost", str(path)) from error
        raise


def unfinished(path: Path) -> str:
    """How the names of what is being written begin, beside the file or folder itself."""
    return f".{path.name}{_UNFINISHED}"


def remove_unfinished(folder: Path, name: str = "") -> None:
    """Removes what killed processes had not finished writing; only while no other process writes there.

    Args:
        folder: that they wrote in; there may be none.
        name: of the file or folder that they wrote; any where it is empty.
    """
    for leftover in folder.glob(f".{name}*"):
        ours = leftover.name.startswith(f".{name}{_UNFINISHED}") if name else _UNFINISHED in leftover.name
        if ours or (not name and _OLDER.fullmatch(leftover.name)):
            remove(leftover)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the system inside are about this file, which those of an open file do not say."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, f"{error.strerror or error}; nothing that was saved is lost", str(path)) from error


def remove(path: Path) -> None:
    """Removes a file, a link, or a folder with all that is in it, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A text in UTF-8, atomically."""
    with atomic_file(path, "w") as file:
        file.write(text)


def write_json(path: Path, value: object) -> None:
    """Indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when all is there; on failure it is removed.

    Args:
        path: of the folder; there must be nothing, or an empty folder.

    Raises:
        FileExistsError: there is something of that name, or another process has made it meanwhile.
        OSError: it cannot be written, or the disk is full.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=unfinished(path)) as made:
        inside = Path(made) / path.name
        inside.mkdir()
        yield inside
        publish(inside, path)


def publish(temporary: Path, target: Path) -> None:
    """Give a finished folder its name, so that it is there after a crash too.

    Raises:
        FileExistsError: there is one of that name.
    """
    sync_folder(temporary)
    # A rename replaces an empty folder, and fails on one that holds something.
    try:
        os.rename(temporary, target)
    except OSError as error:
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "another process made it first", str(target)) from error
        raise
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_new_file(name: str, file: Path) -> None:
    """Raise ValueError where a file that a flag names is there already, or cannot be written."""
    if os.path.lexists(file):
        raise ValueError(f"{name} must be a file that does not exist yet, got {str(file)!r}")
    check_writable(name, file)


def check_writable(name: str, file: Path) -> None:
    """Raise ValueError where a file that a flag names cannot be written, before what it will hold is worked for."""
    above = next(folder for folder in file.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"{name} must be a file in a folder that can be written, got {str(file)!r}")
