"""Read untrusted files: nothing is run, nothing blocks, and memory is bounded beforehand.

Readers of a format convert `BadFile` to their own error, which names the file.
"""

from __future__ import annotations

import io
import json
import math
import os
import stat
import sys
import zipfile
from typing import Any, BinaryIO

import numpy as np

from unicode_fast.errors import REMEDIES, TooManyFiles, message_of

# Environment variables of limits in bytes: of an unpacked file,
UNPACKED_VARIABLE = "UNICODE_FAST_MAX_UNPACKED"
# of a file of text or JSON, which is read as a whole,
TEXT_VARIABLE = "UNICODE_FAST_MAX_TEXT"
# and of a picture, with a byte per colour and pixel.
PICTURE_VARIABLE = "UNICODE_FAST_MAX_PICTURE"
_DEFAULTS = {UNPACKED_VARIABLE: 1 << 30, TEXT_VARIABLE: 1 << 25, PICTURE_VARIABLE: 1 << 25}
# Python objects from a text take up to some hundred bytes each; a file may list one per this many bytes of the limit.
_BYTES_PER_OBJECT = 32
# Allowed compression of a zip's member. For the other method, LZMA, the header sets the memory.
_PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)


class BadFile(ValueError):
    """A file is invalid; the message gives the reason, but does not name the file."""


def limit(variable: str) -> int:
    """A limit in bytes, the environment variable's or the default.

    Raises:
        BadFile: the variable is no positive integer.
    """
    value = os.environ.get(variable) or str(_DEFAULTS[variable])
    if not value.isdecimal() or int(value) == 0:
        raise BadFile(f"{variable} must be a positive number of bytes, got {value!r}")
    return int(value)


def check_size(size: int, variable: str = UNPACKED_VARIABLE) -> None:
    """Raise BadFile if a size in bytes exceeds a limit."""
    most = limit(variable)
    if size > most:
        raise BadFile(f"it holds {size} bytes of at most {most}; {variable} sets another limit")


def check_count(count: int, what: str) -> None:
    """Raise BadFile if a file lists more objects than the limit of text allows: 1,048,576 by default."""
    most = limit(TEXT_VARIABLE) // _BYTES_PER_OBJECT
    if count > most:
        raise BadFile(f"it holds {count} {what} of at most {most}; {TEXT_VARIABLE}={count * 32} would allow them")


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a plain file to read; a pipe or a device, which could block or never end, is refused.

    Raises:
        BadFile: the path is no plain file.
        TooManyFiles: the limit of open files of the process or the machine is reached.
        OSError: the file is missing, or cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        if error.errno in REMEDIES:
            raise TooManyFiles(message_of(error)) from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise BadFile("it is no plain file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | os.PathLike[str], variable: str = TEXT_VARIABLE) -> bytes:
    """The content of a plain file within a limit.

    Raises:
        BadFile: the path is no plain file, or the file is larger.
        OSError: the file is missing, or cannot be read.
    """
    with open_file(path) as file:
        check_size(os.fstat(file.fileno()).st_size, variable)
        return file.read()


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a JSON file.

    Raises:
        BadFile: the file is no plain file, larger than a limit, no JSON, or nested too deeply.
        OSError: the file is missing, or cannot be read.
    """
    return parse_json(read_bytes(path))


def parse_json(data: bytes) -> Any:
    """The content of a text in JSON.

    Raises:
        BadFile: the text is no JSON, nested too deeply, or has more values than a limit.
    """
    check_count(sum(map(data.count, (b",", b"[", b"{"))), "values")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"it is no JSON: {error}") from error


def open_archive(file: BinaryIO, variable: str = UNPACKED_VARIABLE) -> zipfile.ZipFile:
    """Open a zip after a check of its directory; nothing is unpacked. `read_member` unpacks.

    Args:
        file: the open file.
        variable: environment variable of the limit.

    Raises:
        BadFile: the file is no zip, its directory is damaged or too large, or as `check_archive`.
    """
    size = file.seek(0, os.SEEK_END)
    try:
        # The directory that zipfile will read, with one object for every 46 bytes.
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
        if end is not None:
            check_count(end[5] // 46, "members")
        archive = zipfile.ZipFile(file)
    except BadFile:
        raise
    # A damaged directory can raise any exception.
    except Exception as error:
        raise BadFile(f"it is no zip: {error}") from error
    check_archive(archive, size, variable)
    return archive


def check_archive(archive: zipfile.ZipFile, size: int, variable: str = UNPACKED_VARIABLE) -> None:
    """Check a zip's directory before anything is unpacked.

    Args:
        archive: the open zip.
        size: size of its file in bytes.
        variable: environment variable of the limit.

    Raises:
        BadFile: members are encrypted, have an unusual compression, or exceed both the file's size and the limit in
            total.
    """
    members = archive.infolist()
    total = sum(member.file_size for member in members)
    if total > size:
        check_size(total, variable)
    if any(member.flag_bits & 0x1 for member in members):
        raise BadFile("it is encrypted")
    unusual = [member.compress_type for member in members if member.compress_type not in _PACKINGS]
    if unusual:
        raise BadFile(f"it must be compressed by deflate or bzip2, got zip method {unusual[0]}")


def read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """The content of a zip's member, after a check of its checksum; its size in the directory bounds the memory.

    Raises:
        BadFile: the member is missing, or damaged.
    """
    try:
        member = archive.getinfo(name)
        with archive.open(member) as stream:
            # Without a size, zipfile would unpack everything before it cuts the result.
            data = stream.read(member.file_size + 1)
    # A damaged member can raise any exception.
    except Exception as error:
        raise BadFile(f"member {name!r} cannot be unpacked: {error}") from error
    if len(data) != member.file_size:
        raise BadFile(f"member {name!r} is cut short")
    return data


def read_npy(file: BinaryIO, size: int) -> np.ndarray:
    """The array of a .npy file of plain values.

    Args:
        file: the open file, at its beginning.
        size: bytes to its end.

    Raises:
        BadFile: the file is no .npy file, its size differs from its header, or it holds Python objects.
    """
    shape, fortran, dtype = npy_header(file, size)
    data = bytearray(math.prod(shape) * dtype.itemsize)
    try:
        if file.readinto(data) < len(data):  # type: ignore[attr-defined]
            raise BadFile("it is cut short")
        array = np.frombuffer(data, dtype) if data else np.empty(0, dtype)
        array = array.reshape(shape, order="F" if fortran else "C")
    except ValueError as error:
        raise BadFile(str(error)) from error
    check_text(array)
    return array


def check_text(array: np.ndarray) -> None:
    """Raise BadFile if an array of text has invalid characters, which fail when they are read."""
    if array.dtype.kind == "U" and array.size:
        codes = np.ascontiguousarray(array).reshape(-1).view(np.dtype(np.uint32).newbyteorder(array.dtype.byteorder))
        if codes.max() > sys.maxunicode:
            raise BadFile(f"its text must hold valid characters, got {codes.max():#x}")


def npy_header(file: BinaryIO, size: int | None = None) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order, and dtype, from the header of a .npy file.

    Args:
        file: the open file, at its beginning.
        size: bytes to its end, which must match the header; None does not compare.

    Raises:
        BadFile: the header is invalid, of Python objects, or of another size.
    """
    start = file.tell()
    try:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise BadFile(f"its .npy version must be 1.0, 2.0 or 3.0, got {version}")
        length = int.from_bytes(_exactly(file, 2 if version == (1, 0) else 4), "little")
        if length > 1 << 16:
            raise BadFile(f"its header must have at most {1 << 16} bytes, got {length}")
        header = _exactly(file, length)
        # For ASCII headers, versions differ only in the width of the length.
        again = io.BytesIO(length.to_bytes(2, "little") + header if length < 1 << 16 else b"")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(again)
    except BadFile:
        raise
    # A damaged header, in Python's syntax, can raise any exception when it is parsed.
    except Exception as error:
        raise BadFile(f"it is no .npy file: {error}") from error
    if dtype.hasobject or dtype.itemsize == 0 or not all(type(one) is int and 0 <= one < 1 << 63 for one in shape):
        raise BadFile(f"it must hold plain values, got {dtype!s:.80} of shape {shape!s:.80}")
    rest = None if size is None else size - (file.tell() - start)
    if rest is not None and math.prod(shape) * dtype.itemsize != rest:
        raise BadFile(f"it has {rest} bytes of values for shape {shape!s:.80} of {dtype!s:.80}")
    return shape, bool(fortran), dtype


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise BadFile("it is cut short")
    return data
