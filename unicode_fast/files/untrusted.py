"""Reading files that somebody else has made: nothing is run, nothing blocks, and memory is bounded beforehand.

Readers of a format turn `BadFile` into their own error, which names the file.
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

from unicode_fast.errors import CURES, TooManyFiles, message_of

# The environment variable with the bytes that a compressed file may unpack to.
UNPACKED_VARIABLE = "UNICODE_FAST_MAX_UNPACKED"
# The same of a file of text or JSON, which is read whole.
TEXT_VARIABLE = "UNICODE_FAST_MAX_TEXT"
# The same of a picture, with a byte for each colour of a pixel.
PICTURE_VARIABLE = "UNICODE_FAST_MAX_PICTURE"
_DEFAULTS = {UNPACKED_VARIABLE: 1 << 30, TEXT_VARIABLE: 1 << 25, PICTURE_VARIABLE: 1 << 25}
# Objects that Python makes of a text take up to some hundred bytes each, so there may be one for this many bytes.
_BYTES_PER_OBJECT = 32
# How a member of a zip may be packed: stored, deflate, bzip2. The other method takes memory as its header says.
_PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)


class BadFile(ValueError):
    """A file is not what it must be; the message says in what, and does not name it."""


def limit(variable: str) -> int:
    """A limit in bytes, the environment variable's or the default.

    Raises:
        BadFile: the variable holds no positive whole number.
    """
    value = os.environ.get(variable) or str(_DEFAULTS[variable])
    if not value.isdecimal() or int(value) == 0:
        raise BadFile(f"{variable} must be a positive number of bytes, got {value!r}")
    return int(value)


def check_size(size: int, variable: str = UNPACKED_VARIABLE) -> None:
    """Raise BadFile where so many bytes are more than a limit."""
    most = limit(variable)
    if size > most:
        raise BadFile(f"it holds {size} bytes of at most {most}; {variable} sets another limit")


def check_count(count: int, what: str) -> None:
    """Raise BadFile where a file lists more objects than the limit of text is good for: 1,048,576 by default."""
    most = limit(TEXT_VARIABLE) // _BYTES_PER_OBJECT
    if count > most:
        raise BadFile(f"it holds {count} {what} of at most {most}; {TEXT_VARIABLE}={count * 32} would take them")


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """A plain file to read; a pipe or a device, which could block or never end, is refused.

    Raises:
        BadFile: it is none.
        TooManyFiles: this process or this machine may open no more.
        OSError: there is none, or it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        if error.errno in CURES:
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
        BadFile: it is none, nested too deeply, or of more values than a limit.
    """
    check_count(sum(map(data.count, (b",", b"[", b"{"))), "values")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"it is no JSON: {error}") from error


def open_archive(file: BinaryIO, variable: str = UNPACKED_VARIABLE) -> zipfile.ZipFile:
    """A zip whose directory has been looked at, and nothing unpacked yet; `read_member` unpacks.

    Args:
        file: opened.
        variable: of the limit.

    Raises:
        BadFile: it is no zip, its directory is damaged or too large, or as `check_archive`.
    """
    size = file.seek(0, os.SEEK_END)
    try:
        # What zipfile will take for the directory, of which it makes an object for every 46 bytes.
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
        if end is not None:
            check_count(end[5] // 46, "members")
        archive = zipfile.ZipFile(file)
    except BadFile:
        raise
    # A damaged directory can raise nearly anything.
    except Exception as error:
        raise BadFile(f"it is no zip: {error}") from error
    check_archive(archive, size, variable)
    return archive


def check_archive(archive: zipfile.ZipFile, size: int, variable: str = UNPACKED_VARIABLE) -> None:
    """Look at a zip's directory before anything is unpacked.

    Args:
        archive: opened.
        size: of its file in bytes.
        variable: of the limit.

    Raises:
        BadFile: its members are encrypted or packed in an unusual way, or together larger than the file, and than the
            limit.
    """
    members = archive.infolist()
    total = sum(member.file_size for member in members)
    if total > size:
        check_size(total, variable)
    if any(member.flag_bits & 0x1 for member in members):
        raise BadFile("it is encrypted")
    unusual = [member.compress_type for member in members if member.compress_type not in _PACKINGS]
    if unusual:
        raise BadFile(f"it is packed by method {unusual[0]} of zip, not by deflate")


def read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """What a member of a zip holds, its checksum compared; no more is unpacked than the directory says.

    Raises:
        BadFile: there is none, or it is damaged.
    """
    try:
        member = archive.getinfo(name)
        with archive.open(member) as stream:
            # Without a number all would be unpacked before it is cut to size.
            data = stream.read(member.file_size + 1)
    # A damaged member can raise nearly anything.
    except Exception as error:
        raise BadFile(f"member {name!r} cannot be unpacked: {error}") from error
    if len(data) != member.file_size:
        raise BadFile(f"member {name!r} is cut short")
    return data


def read_npy(file: BinaryIO, size: int) -> np.ndarray:
    """The array of a .npy file, of plain values alone.

    Args:
        file: at its beginning.
        size: bytes from there to its end.

    Raises:
        BadFile: it is none, or has not as many bytes as its header says, or holds Python objects.
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
    """Raise BadFile where an array of text holds numbers that are no letters: only looking at them would fail."""
    if array.dtype.kind == "U" and array.size:
        codes = np.ascontiguousarray(array).reshape(-1).view(np.dtype(np.uint32).newbyteorder(array.dtype.byteorder))
        if codes.max() > sys.maxunicode:
            raise BadFile(f"it holds {codes.max():#x} as a letter of a text")


def npy_header(file: BinaryIO, size: int | None = None) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether columns come first, and dtype, as the header of a .npy file says.

    Args:
        file: at its beginning.
        size: bytes from there to its end, which must be as many as the header says; None does not compare.

    Raises:
        BadFile: there is no such header, it is of Python objects, or of another number of bytes.
    """
    start = file.tell()
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
        raise BadFile(f"it is no .npy file: {error}") from error
    if dtype.hasobject or dtype.itemsize == 0 or not all(type(one) is int and 0 <= one < 1 << 63 for one in shape):
        raise BadFile(f"it holds {dtype!s:.80} of shape {shape!s:.80}, not plain values")
    rest = None if size is None else size - (file.tell() - start)
    if rest is not None and math.prod(shape) * dtype.itemsize != rest:
        raise BadFile(f"it has {rest} bytes of values for shape {shape!s:.80} of {dtype!s:.80}")
    return shape, bool(fortran), dtype


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise BadFile("it is cut short")
    return data
