"""Read arrays from pickles and nothing else: only the names that describe an array are accepted."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unicode_fast.data.store.checks import StoreError
from unicode_fast.files.pickle_opcodes import unpickle
from unicode_fast.files.untrusted import (
    BadFile,
    check_count,
    check_text,
    open_archive,
    open_file,
    read_bytes,
    read_member,
)

_SUFFIX = ".pkl"


class PickleError(StoreError):
    """A pickle holds content that is not allowed; no code of it was run."""


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """The bytes of a text, because Python 3 writes bytes for Python 2 as a text and its encoding."""
    if type(text) is not str or encoding != "latin1":
        raise BadFile("its pickle must encode text as latin1 only")
    return text.encode("latin1")


class _Description:
    """The plain values that describe an array or dtype in a pickle, checked afterwards.

    A crafted state can corrupt NumPy's memory. We read shape, dtype and bytes, and build the array ourselves.
    """

    __slots__ = ("arguments", "kind", "state")

    def __init__(self, kind: str, arguments: tuple[Any, ...]) -> None:
        self.kind, self.arguments, self.state = kind, arguments, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _describe(kind: str) -> Callable[..., _Description]:
    """The replacement of one NumPy function in a pickle."""
    return lambda *arguments: _Description(kind, arguments)


# NumPy renamed its core package; files have either name. Nothing is imported by a name in a pickle.
_ARRAY_NAMES: Mapping[tuple[str, str], Callable[..., Any]] = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _describe("array") for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _describe("buffer") for core in ("core", "_core")},
    ("numpy", "ndarray"): _describe("class"),
    ("numpy", "dtype"): _describe("dtype"),
    ("_codecs", "encode"): _encode,
    # The form of empty bytes that Python 3 writes for Python 2.
    ("__builtin__", "bytes"): lambda: b"",
    ("builtins", "bytes"): lambda: b"",
}
_MOST_AXES = 16
# Boolean, signed, unsigned and floating-point numbers, and text.
_PLAIN = re.compile(r"b1|[iu][1248]|f[248]|U[0-9]{1,6}")


def _dtype(described: Any) -> np.dtype:
    """The dtype in a pickle.

    Raises:
        ValueError: it is not of plain numbers or text.
    """
    if not isinstance(described, _Description) or described.kind != "dtype":
        raise ValueError(f"a dtype is {type(described).__name__}")
    name, state = described.arguments[0], described.state
    # The types are checked first, because the content of a tuple can be too large to show or compare.
    if type(name) is not str or not _PLAIN.fullmatch(name):
        raise ValueError(f"its dtype must be of plain numbers, got {_shown(name)}")
    # (version, byte order, then fields of structured dtypes, ...)
    if state is not None and (
        type(state) is not tuple
        or type(state[1]) is not str
        or state[1] not in ("<", ">", "|", "=")
        or any(field is not None for field in state[2:5])
    ):
        raise ValueError(f"its dtype {name!r} must have the state of plain numbers")
    return np.dtype(name).newbyteorder("=" if state is None else state[1])


def _shown(value: Any) -> str:
    return repr(value[:80]) if type(value) is str else type(value).__name__


def _array(described: _Description) -> np.ndarray:
    """The array in a pickle, sharing the pickle's bytes.

    Raises:
        ValueError: shape, dtype and bytes do not form a plain array.
    """
    if described.kind == "buffer":
        data, dtype, shape, order = described.arguments
    elif described.kind == "array" and type(described.state) is tuple:
        _, shape, dtype, fortran, data = described.state
        order = "F" if fortran else "C"
    else:
        raise ValueError(f"it holds a {described.kind} alone")
    plain = _dtype(dtype)
    # Python 2 writes bytes as text.
    data = data.encode("latin1") if type(data) is str else data
    if type(data) not in (bytes, bytearray) or type(shape) is not tuple or len(shape) > _MOST_AXES:
        raise ValueError(f"its bytes are {type(data).__name__}, its shape {type(shape).__name__}")
    if not all(type(size) is int and size >= 0 for size in shape) or order not in ("C", "F"):
        raise ValueError("its shape must be a tuple of sizes, and its order C or F")
    if len(data) != math.prod(shape) * plain.itemsize:
        raise ValueError(f"it has {len(data)} bytes for shape {shape} and dtype {plain}")
    array = np.frombuffer(data, plain).reshape(shape, order=order)
    check_text(array)
    return array


def _loads(data: bytes, where: str, names: Mapping[tuple[str, str], Callable[..., Any]], what: str) -> Any:
    try:
        return unpickle(data, names)
    except BadFile as error:
        raise PickleError(f"{where} must be a pickle of {what} only, but cannot be read: {error}") from error


def unpickle_array(data: bytes, where: str) -> np.ndarray:
    """The array in a pickle, possibly read-only.

    Args:
        data: the pickle's bytes, of any protocol.
        where: name of the pickle for messages.

    Raises:
        PickleError: it holds anything but one plain NumPy array; the message names it, and nothing was run.
    """
    value = _loads(data, where, _ARRAY_NAMES, "one NumPy array")
    if not isinstance(value, _Description):
        raise PickleError(f"{where} must be a pickle of one NumPy array of numbers, got {type(value).__name__}")
    try:
        return _array(value)
    except (ValueError, TypeError, IndexError, OverflowError) as error:
        raise PickleError(f"{where} must be a pickle of one NumPy array of numbers, but {error}") from error


def unpickle_counts(file: Path) -> dict[int, int]:
    """The dictionary from integers to integers in a pickle file.

    Raises:
        PickleError: it holds anything else; nothing was run.
        OSError: the file cannot be read.
    """
    what = "a dict of integers"
    try:
        data = read_bytes(file)
        # An integer takes at least two bytes.
        check_count(len(data) // 4, "integers")
    except BadFile as error:
        raise PickleError(f"{file} must be a pickle of {what}, but {error}") from error
    value = _loads(data, str(file), {}, what)
    if type(value) is not dict or not all(type(number) is int for item in value.items() for number in item):
        raise PickleError(f"{file} must be a pickle of {what} to integers, got {type(value).__name__}")
    return value


def read_zipped_array(file: Path) -> np.ndarray:
    """The array in the one member of a zip whose name contains ".pkl".

    Raises:
        PickleError: the member holds anything but an array of numbers.
        StoreError: the file is no zip, is damaged, unpacks to more than a limit, or lacks exactly one such member.
        FileNotFoundError: the file is missing.
    """
    try:
        with open_file(file) as stream, open_archive(stream) as archive:
            members = [name for name in archive.namelist() if _SUFFIX in name]
            if len(members) != 1:
                raise StoreError(
                    f"{file} must hold exactly one {_SUFFIX} member, got {', '.join(members[:9]) or 'none'}"
                )
            data = read_member(archive, members[0])
    except BadFile as error:
        raise StoreError(f"{file} must be a whole zip file, but cannot be read: {error}") from error
    return unpickle_array(data, f"{file} ({members[0]})")
