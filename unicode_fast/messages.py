"""How an error is said on one line, and one that can be foreseen: of a file that cannot be written."""

from __future__ import annotations

import os
from pathlib import Path


def message_of(error: BaseException) -> str:
    """The text of an error; that of an OSError names its file, without the number of the error."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}, got {str(error.filename)!r}"
    return str(error)


def check_new_file(name: str, file: Path) -> None:
    """Raise ValueError where a file that a flag names is there already, or cannot be written."""
    if file.exists():
        raise ValueError(f"{name} must be a file that does not exist yet, got {str(file)!r}")
    check_writable(name, file)


def check_writable(name: str, file: Path) -> None:
    """Raise ValueError where a file that a flag names cannot be written, before what it will hold is worked for."""
    above = next(folder for folder in file.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"{name} must be a file in a folder that can be written, got {str(file)!r}")
