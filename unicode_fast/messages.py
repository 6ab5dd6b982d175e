"""How an error is said on one line."""

from __future__ import annotations


def message_of(error: BaseException) -> str:
    """The text of an error; that of an OSError names its file, without the number of the error."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}, got {str(error.filename)!r}"
    return str(error)
