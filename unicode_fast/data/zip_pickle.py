"""Arrays out of pickles, and nothing else: an unpickler that notes what describes an array, and has no other names."""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unicode_fast.data.store_checks import StoreError
from unicode_fast.untrusted import (
    TEXT_VARIABLE,
    BadFile,
    check_count,
    check_size,
    check_text,
    open_archive,
    open_file,
    read_bytes,
    read_member,
)

_SUFFIX = ".pkl"
# What pickles are written with: of any, of integers, of a dict, and of an array. None makes one object contain another
# in a way that grows beyond the file but tuples, which are looked at by type and place alone.
_REMEMBERED = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_FRAME = {"PROTO", "FRAME", "MARK", "STOP", *_REMEMBERED}
_INTEGERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1"}
_COUNTS = _FRAME | _INTEGERS | {"EMPTY_DICT", "DICT", "SETITEM", "SETITEMS"}
_ARRAY = {
    *(_FRAME | _INTEGERS),
    *("GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "NONE", "NEWTRUE", "NEWFALSE", "GET", "BINGET", "LONG_BINGET"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS", "LIST"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
# An array takes some forty operations, a dict three for each integer.
_MOST_OF_ARRAY = 1000


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
_MOST_AXES = 16
_PLAIN = re.compile(r"b1|[iu][1248]|f[248]|U[0-9]{1,6}")


def _dtype(described: Any) -> np.dtype:
    """The dtype that a pickle describes.

    Raises:
        ValueError: it is none of plain numbers or text.
    """
    if not isinstance(described, _Description) or described.kind != "dtype":
        raise ValueError(f"a dtype is {type(described).__name__}")
    name, state = described.arguments[0], described.state
    # Types first: what a tuple holds can be too long to be shown or compared.
    if type(name) is not str or not _PLAIN.fullmatch(name):
        raise ValueError(f"its dtype is {_shown(name)}, which is none of plain numbers")
    # (version, byte order, then what only structured dtypes have, ...)
    if state is not None and (
        type(state) is not tuple
        or type(state[1]) is not str
        or state[1] not in ("<", ">", "|", "=")
        or any(part is not None for part in state[2:5])
    ):
        raise ValueError(f"its dtype {name!r} has a state that is of no plain numbers")
    return np.dtype(name).newbyteorder("=" if state is None else state[1])


def _shown(value: Any) -> str:
    return repr(value[:80]) if type(value) is str else type(value).__name__


def _array(described: _Description) -> np.ndarray:
    """The array that a pickle describes, over the pickle's own bytes.

    Raises:
        ValueError: shape, dtype and bytes are not those of a plain array.
    """
    if described.kind == "buffer":
        data, dtype, shape, order = described.arguments
    elif described.kind == "array" and type(described.state) is tuple:
        _, shape, dtype, fortran, data = described.state
        order = "F" if fortran else "C"
    else:
        raise ValueError(f"it holds a {described.kind} alone")
    plain = _dtype(dtype)
    # Text is how Python 2 wrote bytes.
    data = data.encode("latin1") if type(data) is str else data
    if type(data) not in (bytes, bytearray) or type(shape) is not tuple or len(shape) > _MOST_AXES:
        raise ValueError(f"its bytes are {type(data).__name__}, its shape {type(shape).__name__}")
    if not all(type(size) is int and size >= 0 for size in shape) or order not in ("C", "F"):
        raise ValueError("its shape is no tuple of sizes, or its order none of C and F")
    if len(data) != math.prod(shape) * plain.itemsize:
        raise ValueError(f"it has {len(data)} bytes for shape {shape} and dtype {plain}")
    array = np.frombuffer(data, plain).reshape(shape, order=order)
    check_text(array)
    return array


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
            raise _names_another(self.where, self.what, f"{module}.{name}") from None


def _check_operations(data: bytes, where: str, names: Collection[tuple[str, str]], what: str, most: int) -> None:
    """Raise PickleError unless a pickle's operations are few, of the kinds that may be there, and in bounds.

    A number in a pickle can ask for any amount of memory, before anything that it makes is looked at.
    """
    known = _ARRAY if names else _COUNTS
    foreign = named = ""
    texts: list[str] = []
    for number, (operation, argument, _) in enumerate(pickletools.genops(data)):
        if number == most:
            raise PickleError(f"{where} must be a pickle of {what}, got one of more than {most} operations")
        name = operation.name
        if name not in known:
            foreign = foreign or name
        if name == "GLOBAL" and tuple(str(argument).split(" ", 1)) not in names:
            named = named or str(argument).replace(" ", ".")
        # Of two texts right before it; the unpickler looks at every name.
        if name == "STACK_GLOBAL" and len(texts) == 2 and tuple(texts) not in names:
            named = named or ".".join(texts)
        if name not in _REMEMBERED:
            texts = [*texts[-1:], argument] if type(argument) is str and name not in ("GLOBAL", "INST") else []
        if texts:
            check_size(len(texts[-1]), TEXT_VARIABLE)
        if type(argument) is int and ("PUT" in name or "GET" in name) and argument > most:
            raise PickleError(f"{where} must be a pickle of {what}, got one with {argument} as a place of its memory")
        if type(argument) is int and not -(1 << 63) <= argument < 1 << 63 and name in _INTEGERS:
            raise PickleError(f"{where} must be a pickle of {what}, got an integer of more than 64 bits")
    if named:
        raise _names_another(where, what, named)
    if foreign:
        raise PickleError(f"{where} must be a pickle of {what} alone, got one with operation {foreign}")


def _names_another(where: str, what: str, name: str) -> PickleError:
    return PickleError(f"{where} must be a pickle of {what} alone, but it names {name}, which was not run")


def _loads(data: bytes, where: str, names: Mapping[tuple[str, str], Any], what: str, most: int) -> Any:
    try:
        _check_operations(data, where, names, what, most)
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
    value = _loads(data, where, _ARRAY_NAMES, "one NumPy array", _MOST_OF_ARRAY)
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
        # Each integer takes two bytes, and two operations with its key.
        most = len(data)
        check_count(most // 4, "integers")
    except BadFile as error:
        raise PickleError(f"{file} must be a pickle of {what}, but {error}") from error
    value = _loads(data, str(file), {}, what, most)
    if type(value) is not dict or not all(type(number) is int for item in value.items() for number in item):
        raise PickleError(f"{file} must be a pickle of {what} to integers, got {type(value).__name__}")
    return value


def read_zipped_array(file: Path) -> np.ndarray:
    """The array in the one member of a zip whose name contains ".pkl".

    Raises:
        PickleError: the member holds anything but an array of numbers.
        StoreError: the file is no zip, is damaged, unpacks to more than a limit, or has not exactly one such member.
        FileNotFoundError: there is no file.
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
