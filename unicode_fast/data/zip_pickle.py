"""Arrays out of pickles, and nothing else: an unpickler that notes what describes an array, and has no other names."""

from __future__ import annotations

import io
import math
import pickle
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unicode_fast.data.store_checks import StoreError

_SUFFIX = ".pkl"


class PickleError(StoreError):
    """A pickle holds something else than it may; nothing of it was run."""


# A pickle can also set attributes of what it names, so nothing that it can name has attributes that can be set.
class _Encode:
    """How Python 3 wrote bytes for readers of Python 2: text that is encoded on reading."""

    __slots__ = ()

    def __call__(self, text: str, encoding: str = "latin1") -> bytes:
        if encoding != "latin1":
            raise ValueError(f"bytes must be encoded as latin1, got {encoding!r}")
        return text.encode("latin1")


class _Bytes:
    """How Python 3 wrote empty bytes for readers of Python 2."""

    __slots__ = ()

    def __call__(self) -> bytes:
        return b""


class _Description:
    """What a pickle says of an array or its dtype, in place of the object itself: plain values, looked at afterwards.

    NumPy trusts the states that it is given, of fields and flags for example, so none from a file ever reaches it.
    """

    __slots__ = ("arguments", "kind", "state")

    def __init__(self, kind: str, arguments: tuple[Any, ...]) -> None:
        self.kind, self.arguments, self.state = kind, arguments, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Describe:
    """Called by a pickle where NumPy's function would be."""

    __slots__ = ("_kind",)
    _kind: str

    def __init__(self, kind: str) -> None:
        # Set here alone: BUILD sets attributes of what a pickle names.
        object.__setattr__(self, "_kind", kind)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(name)

    def __call__(self, *arguments: Any) -> _Description:
        return _Description(self._kind, arguments)


# NumPy moved its core; both names are in the files that are about. None is ever imported by what a pickle says.
_ARRAY_NAMES: Mapping[tuple[str, str], Any] = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Describe("array") for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _Describe("buffer") for core in ("core", "_core")},
    ("numpy", "ndarray"): _Describe("class"),
    ("numpy", "dtype"): _Describe("dtype"),
    ("_codecs", "encode"): _Encode(),
    ("__builtin__", "bytes"): _Bytes(),
    ("builtins", "bytes"): _Bytes(),
}
# Boolean, signed, unsigned and floating-point numbers, and text.
_PLAIN = re.compile(r"b1|[iu][1248]|f[248]|U[0-9]{1,6}")


def _dtype(described: Any) -> np.dtype:
    """The dtype that a pickle describes.

    Raises:
        ValueError: it is none of plain numbers or text.
    """
    if not isinstance(described, _Description) or described.kind != "dtype":
        raise ValueError(f"a dtype is {type(described).__name__}")
    name, state = str(described.arguments[0]), described.state
    if not _PLAIN.fullmatch(name):
        raise ValueError(f"its dtype is {name!r}, which is none of plain numbers")
    # (version, byte order, then what only structured dtypes have, ...)
    if state is not None and (state[1] not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5])):
        raise ValueError(f"its dtype {name!r} has the state {state!r:.80}")
    return np.dtype(name).newbyteorder("=" if state is None else state[1])


def _array(described: _Description) -> np.ndarray:
    """The array that a pickle describes, over the pickle's own bytes.

    Raises:
        ValueError: shape, dtype and bytes are not those of a plain array.
    """
    if described.kind == "buffer":
        data, dtype, shape, order = described.arguments
    elif described.kind == "array" and isinstance(described.state, tuple):
        _, shape, dtype, fortran, data = described.state
        order = "F" if fortran else "C"
    else:
        raise ValueError(f"it holds a {described.kind} alone")
    plain = _dtype(dtype)
    # Text is how Python 2 wrote bytes.
    data = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(data, (bytes, bytearray)) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"its bytes are {type(data).__name__}, its shape {shape!r:.80}")
    if len(data) != math.prod(shape) * plain.itemsize:
        raise ValueError(f"it has {len(data)} bytes for shape {shape!r:.80} and dtype {plain}")
    return np.frombuffer(data, plain).reshape(shape, order=order)


class _Unpickler(pickle.Unpickler):
    """Knows the names it is given; any other is an error before anything is called."""

    def __init__(self, stream: io.BytesIO, where: str, names: Mapping[tuple[str, str], Any], what: str) -> None:
        super().__init__(stream, encoding="latin1")
        self.where, self.names, self.what = where, names, what

    def find_class(self, module: str, name: str) -> Any:
        """The object of a name in the pickle.

        Raises:
            PickleError: it is not among the few that may be there.
        """
        try:
            return self.names[module, name]
        except KeyError:
            raise PickleError(
                f"{self.where} must be a pickle of {self.what} alone, but it names {module}.{name}, which was not run"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        """No array has objects outside the file."""
        raise PickleError(f"{self.where} must be a pickle of {self.what} alone, but it refers to object {pid!r}")


def _loads(data: bytes, where: str, names: Mapping[tuple[str, str], Any], what: str) -> Any:
    try:
        return _Unpickler(io.BytesIO(data), where, names, what).load()
    except PickleError:
        raise
    # A damaged pickle can raise nearly anything; with these names, none of it does more than raise.
    except Exception as error:
        raise PickleError(
            f"{where} must be a pickle of {what}, but cannot be read: {type(error).__name__}: {error}"
        ) from error


def unpickle_array(data: bytes, where: str) -> np.ndarray:
    """The array in a pickle; it may be one that cannot be written to.

    Args:
        data: the pickle's bytes, of any protocol.
        where: what messages call it.

    Raises:
        PickleError: it holds anything but one plain NumPy array; the message names what, and nothing was run.
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
    value = _loads(file.read_bytes(), str(file), {}, "a dict of integers")
    if type(value) is not dict or not all(type(number) is int for item in value.items() for number in item):
        raise PickleError(f"{file} must be a pickle of a dict of integers to integers, got {type(value).__name__}")
    return value


def read_zipped_array(file: Path) -> np.ndarray:
    """The array in the one member of a zip whose name contains ".pkl".

    Raises:
        PickleError: the member holds anything but an array of numbers.
        StoreError: the file is no zip, is damaged, or has not exactly one such member.
        FileNotFoundError: there is no file.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = [name for name in archive.namelist() if _SUFFIX in name]
            if len(members) != 1:
                raise StoreError(f"{file} must hold exactly one {_SUFFIX} member, got {', '.join(members) or 'none'}")
            data = archive.read(members[0])
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise StoreError(f"{file} must be a whole zip file, but cannot be read: {error}") from error
    return unpickle_array(data, f"{file} ({members[0]})")
