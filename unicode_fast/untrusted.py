"""Reading files that somebody else has made: nothing is run, nothing blocks, and memory is bounded beforehand.

Readers of a format turn `BadFile` into their own error, which names the file.
"""

from __future__ import annotations

import io
import json
import math
import os
import stat
import zipfile
from typing import Any, BinaryIO

import numpy as np

# The environment variable with the bytes that a compressed file may unpack to.
UNPACKED_VARIABLE = "UNICODE_FAST_MAX_UNPACKED"
_UNPACKED = 1 << 30
# The same of a file of text or JSON, which is read whole.
TEXT_VARIABLE = "UNICODE_FAST_MAX_TEXT"
_TEXT = 1 << 25


class BadFile(ValueError):
    """A file is not what it must be; the message says in what, and does not name it."""


def limit(variable: str) -> int:
    """A limit in bytes, the environment variable's or the default.

    Raises:
        BadFile: the variable holds no positive whole number.
    """
    value = os.environ.get(variable) or str(_UNPACKED if variable == UNPACKED_VARIABLE else _TEXT)
    if not value.isdecimal() or int(value) == 0:
        raise BadFile(f"{variable} must be a positive number of bytes, got {value!r}")
    return int(value)


def check_size(size: int, variable: str = UNPACKED_VARIABLE) -> None:
    """Raise BadFile where so many bytes are more than a limit."""
    most = limit(variable)
    if size > most:
        raise BadFile(f"it holds {size} bytes of at most {most}; {variable} sets another limit")


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """A plain file to read; a pipe or a device, which could block or never end, is refused.

    Raises:
        BadFile: it is none.
        OSError: there is none, or it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise BadFile("it is no plain file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | os.PathLike[str], variable: str = TEXT_VARIABLE) -> bytes:
    """All of a plain file that is not above a limit.

    Raises:
        BadFile: it is no plain file, or larger.
        OSError: there is none, or it cannot be read.
    """
    with open_file(path) as file:
        check_size(os.fstat(file.fileno()).st_size, variable)
        return file.read()


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a JSON file.

    Raises:
        BadFile: it is no plain file, larger than a limit, no JSON, or nested too deeply.
        OSError: there is none, or it cannot be read.
    """
    return parse_json(read_bytes(path))


def parse_json(data: bytes) -> Any:
    """The content of a text in JSON.

    Raises:
        BadFile: it is none, or nested too deeply.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"it is no JSON: {error}") from error


def check_archive(archive: zipfile.ZipFile, size: int, variable: str = UNPACKED_VARIABLE) -> None:
    """Look at a zip's directory before anything is unpacked.

    Args:
        archive: opened.
        size: of its file in bytes.
        variable: of the limit.

    Raises:
        BadFile: its members are encrypted, or together larger than the file, and than the limit.
    """
    members = archive.infolist()
    total = sum(member.file_size for member in members)
    if total > size:
        check_size(total, variable)
    if any(member.flag_bits & 0x1 for member in members):
        raise BadFile("it is encrypted")


def read_npy(file: BinaryIO, size: int) -> np.ndarray:
    """The array of a .npy file, of plain values alone.

    Args:
        file: at its beginning.
        size: bytes from there to its end.

    Raises:
        BadFile: it is none, or has not as many bytes as its header says, or holds Python objects.
    """
    shape, fortran, dtype = npy_header(file)
    start = file.tell()
    if start + math.prod(shape) * dtype.itemsize != size:
        raise BadFile(f"it has {size - start} bytes of values for shape {shape} of {dtype}")
    data = bytearray(size - start)
    try:
        if file.readinto(data) < len(data):  # type: ignore[attr-defined]
            raise BadFile("it is cut short")
        return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    except ValueError as error:
        raise BadFile(str(error)) from error


def npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether columns come first, and dtype, as the header of a .npy file says.

    Raises:
        BadFile: there is no such header, or it is of Python objects.
    """
    try:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise BadFile(f"it is of version {version} of the .npy format")
        length = int.from_bytes(_exactly(file, 2 if version == (1, 0) else 4), "little")
        if length > 1 << 16:
            raise BadFile(f"its header has {length} bytes")
        header = _exactly(file, length)
        # Versions differ in the width of the length alone, as far as headers of ASCII go.
        again = io.BytesIO(length.to_bytes(2, "little") + header if length < 1 << 16 else b"")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(again)
    except BadFile:
        raise
    # A damaged header, which is Python's syntax, can raise nearly anything when it is parsed.
    except Exception as error:
        raise BadFile(f"it has no header of a .npy file: {error}") from error
    if dtype.hasobject or any(type(one) is not int or one < 0 for one in shape):
        raise BadFile(f"it holds {dtype} of shape {shape}, not plain values")
    return shape, bool(fortran), dtype


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise BadFile("it is cut short")
    return data
