"""Check the zip directory and the pickle of a file of torch.save before torch reads the file.

`torch.load` with weights_only runs no code, but it does not check sizes and checksums, and its zip parser differs from
Python's.
"""

from __future__ import annotations

import io
import math
import os
import re
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import torch

from unicode_fast.files.pickle_opcodes import split_pickles, unpickle
from unicode_fast.files.untrusted import TEXT_VARIABLE, BadFile, check_size, limit, open_file

# Bytes of a zip's directory, enough for some 40000 tensors.
MOST_DIRECTORY = 1 << 22
# Bytes by which tensors that share memory may exceed the file's size in total.
MOST_SHARED = 1 << 26
# First bytes of files from before torch 1.6: a magic number and the format's version, both pickled.
_OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
_PROTOCOL, _OTHER_PROTOCOL = b"\x80\x02", "its pickle must have protocol 2, as torch.save writes"
_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_FOLDER, _MOST_DIMENSIONS = 0x10, 64
# A member's name must be unambiguous: no parser may read it as a folder or as another member's name.
_MEMBER = re.compile(r"[^/\\\x00]+/[\w./-]*[\w.-]", re.ASCII)
_STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


def read_torch(path: str | os.PathLike[str], map_location: str | torch.device = "cpu") -> Any:
    """The content of a file of torch.save: plain values, and dense tensors with all their bytes.

    Args:
        path: path of a plain file.
        map_location: device of the tensors.

    Raises:
        BadFile: the file is damaged, of torch's format before 0.1.10, or has other content.
        OSError: the file is missing, or cannot be read.
    """
    with open_file(path) as file:
        check_torch(file, os.fstat(file.fileno()).st_size)
        file.seek(0)
        old = file.read(len(_OLD)) == _OLD
        file.seek(0)
        try:
            # torch would first try a file from before 1.6 as a tar, with a parser that can take minutes.
            source = io.BytesIO(file.read()) if old else file
            return torch.load(source, map_location=map_location, weights_only=True)
        # An error of the GPU, not of the file.
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            raise BadFile(f"torch cannot read it: {type(error).__name__}: {error!s:.100}") from error


def check_torch(file: BinaryIO, size: int) -> int:
    """Check a file of torch.save, unread; return the number of values of all its tensors.

    Args:
        file: the open file.
        size: its size in bytes.

    Raises:
        BadFile: as `read_torch`.
    """
    head = file.read(len(_OLD))
    if head == _OLD:
        return _check_old(file, size).values
    if head[:4] != b"PK\3\4":
        raise BadFile("it is no file of torch.save")
    _check_directory(file, size)
    try:
        with zipfile.ZipFile(file) as archive:
            members = _members(archive, size)
            broken = archive.testzip()
            if broken is not None:
                raise BadFile(f"checksum of {broken!r:.60} is wrong")
            check_size(members["data.pkl"].file_size, TEXT_VARIABLE)
            data = archive.read(members["data.pkl"])
    except BadFile:
        raise
    # The module can raise any exception for a damaged zip.
    except Exception as error:
        raise BadFile(f"it is a damaged zip: {type(error).__name__}: {error!s:.100}") from error
    if data[:2] != _PROTOCOL:
        raise BadFile(_OTHER_PROTOCOL)
    tensors = _Tensors(size, {name: member.file_size for name, member in members.items()})
    unpickle(data, tensors.names, tensors.storage)
    return tensors.values


def _check_old(file: BinaryIO, size: int) -> _Tensors:
    """Check a file from before torch 1.6: pickles of the machine, the content and the storages' keys, then storages.

    Args:
        file: the open file, after `_OLD`.
        size: its size in bytes.
    """
    pickles, end = split_pickles(file.read(limit(TEXT_VARIABLE)), 3)
    if any(data[:2] != _PROTOCOL for data in pickles):
        raise BadFile(_OTHER_PROTOCOL)
    machine, content, listed = pickles
    tensors = _Tensors(size)
    unpickle(machine, {})
    unpickle(content, tensors.names, tensors.old_storage)
    keys = unpickle(listed, {})
    if type(keys) is not list or not all(type(key) is str for key in keys) or sorted(tensors.storages) != sorted(keys):
        raise BadFile("its storages differ from those of its tensors")
    place = len(_OLD) + end
    for key in keys:
        dtype, numel = tensors.storages[key]
        file.seek(place)
        if int.from_bytes(file.read(8), "little") != numel:
            raise BadFile(f"storage {key!r:.40} must be {numel} of {dtype}")
        place += 8 + numel * dtype.itemsize
    if place != size:
        raise BadFile(f"it must have the {place} bytes of its storages, got {size}")
    return tensors


def _check_directory(file: BinaryIO, size: int) -> None:
    """Raise BadFile unless the file ends with one small directory that every parser reads the same way."""
    start = max(0, size - _END.size - _LOCATOR.size - _END64.size)
    file.seek(start)
    tail = file.read(size - start)
    problem = BadFile("it is cut short, or its directory is not at its end")
    if len(tail) < _END.size:
        raise problem
    mark, disk, _, _, _, length, offset, comment = _END.unpack(tail[-_END.size :])
    end = size - _END.size
    if mark != b"PK\5\6" or comment:
        raise problem
    locator = tail[-_END.size - _LOCATOR.size : -_END.size]
    if locator[:4] == b"PK\6\7" and len(tail) == size - start == _END.size + _LOCATOR.size + _END64.size:
        end = start
        record = _END64.unpack(tail[: _END64.size])
        if _LOCATOR.unpack(locator)[2] != end or record[:2] != (b"PK\6\6", _END64.size - 12):
            raise problem
        length, offset = record[8], record[9]
    if offset + length != end or disk:
        raise problem
    if length > MOST_DIRECTORY:
        raise BadFile(f"its directory has {length} bytes of at most {MOST_DIRECTORY}")


def _members(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The members of torch.save's folder by their names in it."""
    members: dict[str, zipfile.ZipInfo] = {}
    folders = set()
    for member in archive.infolist():
        if not _MEMBER.fullmatch(member.orig_filename) or member.filename != member.orig_filename:
            raise BadFile(f"a member must have a name of torch.save's form, got {member.orig_filename!r:.60}")
        folder, name = member.filename.split("/", 1)
        folders.add(folder)
        # torch ignores the case of member names.
        if name.lower() in members:
            raise BadFile(f"member {name!r:.60} occurs twice")
        if member.compress_type or member.compress_size != member.file_size or member.flag_bits & 0x1:
            raise BadFile(f"member {name!r:.60} must be neither compressed nor encrypted")
        # torch leaves the memory of a member that is marked as a folder uninitialised.
        if member.external_attr & _FOLDER:
            raise BadFile(f"member {name!r:.60} is marked as a folder")
        members[name.lower()] = member
    if len(folders) != 1 or "data.pkl" not in members:
        raise BadFile("it must hold one folder with data.pkl, as torch.save writes")
    if sum(member.file_size for member in members.values()) > size:
        raise BadFile("its members share bytes")
    return members


class _Storage(NamedTuple):
    """The memory of tensors: values of one dtype."""

    dtype: torch.dtype
    numel: int


class _Dictionary(dict[Any, Any]):
    """An OrderedDict; its state has the versions of modules that `Module.state_dict` adds."""

    def __setstate__(self, state: Any) -> None:
        if type(state) is not dict or not {*state} <= {"_metadata"}:
            raise BadFile("an OrderedDict has attributes")
        versions = state.get("_metadata", _Dictionary())
        if type(versions) is not _Dictionary or not all(map(_is_version, versions.values())):
            raise BadFile("the versions of modules are not integers")


def _is_version(value: Any) -> bool:
    return type(value) is dict and {*value} <= {"version"} and all(type(number) is int for number in value.values())


class _Tensor:
    """A tensor without its values."""


class _Tensors:
    """Replacements of the names in a pickle of torch.save.

    Args:
        size: size of the file in bytes.
        sizes: sizes of its members.
    """

    def __init__(self, size: int, sizes: Mapping[str, int] | None = None) -> None:
        self.sizes, self.storages, self.left = sizes or {}, dict[str, _Storage](), size + MOST_SHARED
        self.names: Mapping[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): self.dictionary,
            ("torch._utils", "_rebuild_tensor"): self.tensor,
            ("torch._utils", "_rebuild_tensor_v2"): self.tensor,
            ("torch._utils", "_rebuild_parameter"): self.parameter,
            **{("torch", name): _StorageType(dtype) for name, dtype in _STORAGES.items()},
        }

    @property
    def values(self) -> int:
        """Number of values of all storages."""
        return sum(one.numel for one in self.storages.values())

    def dictionary(self, *items: Any) -> _Dictionary:
        """An empty OrderedDict, filled later."""
        if items:
            raise BadFile("an OrderedDict is not created empty")
        return _Dictionary()

    def old_storage(self, identity: Any) -> _Storage:
        """The storage of a persistent id from before torch 1.6; views are refused."""
        if type(identity) is not tuple or len(identity) != 6 or identity[-1] is not None:
            raise BadFile("a persistent id must be that of a whole storage, got another")
        return self.named(identity[:-1])

    def storage(self, identity: Any) -> _Storage:
        """The storage of a persistent id, after its size is compared with its member."""
        found = self.named(identity)
        held = self.sizes.get(f"data/{identity[2]}")
        if held != found.numel * found.dtype.itemsize:
            raise BadFile(
                f"storage {identity[2]!r:.40} must be {found.numel} of {found.dtype}, got a member of {held} bytes"
            )
        return found

    def named(self, identity: Any) -> _Storage:
        """The storage of a persistent id, with the same size and dtype at every use."""
        if type(identity) is not tuple or len(identity) != 5 or identity[0] != "storage":
            raise BadFile(f"a persistent id must be that of a storage, got {type(identity).__name__}")
        _, kind, key, location, numel = identity
        if (
            type(kind) is not _StorageType
            or type(key) is not str
            or type(location) is not str
            or type(numel) is not int
        ):
            raise BadFile("a storage must have a dtype, key, location and size of torch.save's types")
        # The two unpicklers may decode other characters than ASCII differently.
        if not key.isascii():
            raise BadFile(f"a storage must have an ASCII key, got {key!r:.40}")
        if location == "meta":
            raise BadFile("a storage is on the device meta, without values")
        found = self.storages.setdefault(key, _Storage(kind.dtype, numel))
        if found != (kind.dtype, numel) or numel < 0:
            raise BadFile(f"storage {key!r:.40} must be {numel} of {kind.dtype} in all places")
        return found

    def tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *more: Any) -> _Tensor:
        """A dense tensor inside its storage."""
        if type(shape) is not tuple or type(stride) is not tuple or len(shape) + len(stride) > 2 * _MOST_DIMENSIONS:
            raise BadFile(f"a tensor must have tuples of at most {_MOST_DIMENSIONS} numbers as shape and strides")
        sizes = (offset, *shape, *stride)
        if type(storage) is not _Storage or not all(type(size) is int and 0 <= size < 1 << 62 for size in sizes):
            raise BadFile("a tensor must have a storage, and an offset, shape and strides of non-negative integers")
        grad, hooks, *rest = more or (False, _Dictionary())
        if len(shape) != len(stride) or type(grad) is not bool or type(hooks) is not _Dictionary or hooks or any(rest):
            raise BadFile("a tensor must have as many strides as sizes, and no hooks or metadata")
        count = math.prod(shape)
        last = offset + sum((size - 1) * one for size, one in zip(shape, stride, strict=True)) if count else 0
        if count > storage.numel or last >= max(storage.numel, 1):
            raise BadFile(f"a tensor must lie in its storage of {storage.numel} values, got shape {tuple(shape)!s:.60}")
        self.left -= count * storage.dtype.itemsize
        if self.left < 0:
            raise BadFile("its tensors must take at most the file's size, got more through shared memory")
        return _Tensor()

    def parameter(self, tensor: Any, grad: Any, hooks: Any) -> _Tensor:
        """A parameter."""
        if type(tensor) is not _Tensor or type(grad) is not bool or type(hooks) is not _Dictionary or hooks:
            raise BadFile("a parameter must be a plain tensor")
        return _Tensor()


class _StorageType:
    """The name of a storage's dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, *arguments: Any) -> Any:
        """Raise BadFile, because no file of torch.save calls the type."""
        raise BadFile("a storage's type must not be called")
