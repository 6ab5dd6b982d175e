"""Arrays out of pickles, and nothing else: an unpickler that can rebuild NumPy arrays and has no other names."""

from __future__ import annotations

import io
import pickle
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


class _Dtype:
    """A new dtype for each call: what follows in the pickle may set its byte order, and not that of a shared one."""

    __slots__ = ()

    def __call__(self, name: str, align: bool = False, copy: bool = True) -> np.dtype:
        return np.dtype(str(name), bool(align), True)


class _FromBuffer:
    """How NumPy rebuilds arrays of pickle protocol 5."""

    __slots__ = ()

    def __call__(self, *arguments: Any) -> np.ndarray:
        return _FROM_BUFFER(*arguments)


_FROM_BUFFER: Any = np.empty(0).__reduce_ex__(5)[0]
# NumPy moved its core; both names are in the files that are about. They are looked up here, never imported by name.
_ARRAY_NAMES: Mapping[tuple[str, str], Any] = {
    **{
        (f"numpy.{core}.{module}", name): value
        for core in ("core", "_core")
        for module, name, value in (
            ("multiarray", "_reconstruct", np.empty(0).__reduce__()[0]),
            ("multiarray", "scalar", np.float64(0).__reduce__()[0]),
            ("numeric", "_frombuffer", _FromBuffer()),
        )
    },
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _Dtype(),
    ("_codecs", "encode"): _Encode(),
    ("__builtin__", "bytes"): _Bytes(),
    ("builtins", "bytes"): _Bytes(),
}


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
    """The array in a pickle.

    Args:
        data: the pickle's bytes, of any protocol.
        where: what messages call it.

    Raises:
        PickleError: it holds anything but one plain NumPy array; the message names what, and nothing was run.
    """
    value = _loads(data, where, _ARRAY_NAMES, "one NumPy array")
    if type(value) is not np.ndarray or value.dtype.hasobject:
        found = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise PickleError(f"{where} must be a pickle of one NumPy array of numbers, got {found}")
    return value


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
