"""Safetensors files with a checksum: tensors, and JSON content in the header."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from unicode_fast.files.untrusted import BadFile, open_file
from unicode_fast.files.writing import atomic_file

# Keys of the header's metadata.
CONTENT, CHECKSUM = "unicode_fast", "sha256"
# Bytes of a header, enough for some 40000 tensors.
MOST_HEADER = 1 << 22
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def write_tensors(path: Path, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
    """Write tensors and JSON content, with a SHA-256 of both, atomically.

    Args:
        path: path of the file.
        tensors: tensors by name.
        content: JSON-serialisable content.

    Raises:
        OSError: the file cannot be written.
    """
    written = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    facts = json.dumps(content)
    header = {CONTENT: facts, CHECKSUM: checksum_of(facts, written)}
    with atomic_file(path) as file:
        file.write(safetensors.torch.save(written, header))


def read_tensors(path: str | os.PathLike[str]) -> tuple[Any, dict[str, Tensor]]:
    """The content and the tensors of a file; files of older versions have no checksum.

    Raises:
        BadFile: the file is no safetensors file of the package, is damaged, or does not match its checksum.
        OSError: the file is missing, or cannot be read.
    """
    with open_file(path) as file:
        header, start = _header(file, os.fstat(file.fileno()).st_size)
        metadata = header.pop("__metadata__", {})
        if type(metadata) is not dict or type(metadata.get(CONTENT)) is not str:
            raise BadFile(f"its header has no {CONTENT!r}")
        # A checksum under a damaged key would not be compared.
        if not {*metadata} <= {CONTENT, CHECKSUM}:
            raise BadFile(f"its header must have only the metadata {CONTENT!r} and {CHECKSUM!r}")
        facts, checksum = metadata[CONTENT], metadata.get(CHECKSUM)
        content = _json(facts.encode("utf-8", "surrogatepass"))
        tensors = {name: _read(file, start, item) for name, item in header.items()}
    if checksum is not None and checksum != checksum_of(facts, tensors):
        raise BadFile("its checksum differs from its header")
    return content, tensors


def read_foreign_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of another package's safetensors file; its metadata are ignored.

    Raises:
        BadFile: the file is no safetensors file, or damaged.
        OSError: the file is missing, or cannot be read.
    """
    with open_file(path) as file:
        header, start = _header(file, os.fstat(file.fileno()).st_size)
        header.pop("__metadata__", None)
        return {name: _read(file, start, item) for name, item in header.items()}


def count_values(path: str | os.PathLike[str]) -> int:
    """Number of values of all tensors of a safetensors file.

    Raises:
        As `read_foreign_tensors`.
    """
    with open_file(path) as file:
        header, _ = _header(file, os.fstat(file.fileno()).st_size)
        return sum(math.prod(item["shape"]) for name, item in header.items() if name != "__metadata__")


def checksum_of(facts: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of content, names, dtypes, shapes and bytes."""
    found = hashlib.sha256(facts.encode("utf-8", "surrogatepass"))
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode("utf-8", "surrogatepass"))
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _header(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The header, and its end; raise BadFile unless its tensors fill the file without gaps."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, MOST_HEADER):
        raise BadFile(f"its header must have at most {MOST_HEADER} bytes of the file's {size}, got {length}")
    header = _json(file.read(length))
    if type(header) is not dict:
        raise BadFile("its header is no JSON object")
    end = 0
    for name, item in sorted(((name, item) for name, item in header.items() if name != "__metadata__"), key=_bounds):
        if item["data_offsets"][0] != end:
            raise BadFile(f"tensor {name!r:.60} must begin at the end of the tensor before it")
        end = item["data_offsets"][1]
    if 8 + length + end != size:
        raise BadFile(f"its tensors must end at byte {size}, the end of the file, got {8 + length + end}")
    return header, 8 + length


def _bounds(named: tuple[str, Any]) -> tuple[int, int]:
    """Offsets of a tensor, after a check of its entry in the header."""
    name, item = named
    if type(item) is not dict or {*item} != {"dtype", "shape", "data_offsets"}:
        raise BadFile(f"tensor {name!r:.60} must have dtype, shape and data_offsets in the header")
    shape, offsets = item["shape"], item["data_offsets"]
    if type(shape) is not list or type(offsets) is not list or len(offsets) != 2:
        raise BadFile(f"tensor {name!r:.60} must have lists as shape and data_offsets in the header")
    if any(type(number) is not int or not 0 <= number < 1 << 48 for number in (*shape, *offsets)):
        raise BadFile(f"tensor {name!r:.60} must have integers as shape and data_offsets in the header")
    dtype = _DTYPES.get(item["dtype"]) if type(item["dtype"]) is str else None
    if dtype is None or len(shape) > 8 or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise BadFile(f"tensor {name!r:.60} must have the bytes of its dtype and shape, got {offsets[1] - offsets[0]}")
    return offsets[0], offsets[1]


def _read(file: BinaryIO, start: int, described: Mapping[str, Any]) -> Tensor:
    dtype, shape = _DTYPES[described["dtype"]], described["shape"]
    data = bytearray(math.prod(shape) * dtype.itemsize)
    if not data:
        try:
            return torch.empty(shape, dtype=dtype)
        except RuntimeError as error:
            raise BadFile(f"a tensor cannot have shape {shape!s:.60}") from error
    file.seek(start + described["data_offsets"][0])
    if file.readinto(data) < len(data):  # type: ignore[attr-defined]
        raise BadFile("it is cut short")
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


def _json(data: bytes) -> Any:
    try:
        return json.loads(data, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadFile):
            raise
        raise BadFile(f"its header is no JSON: {error!s:.100}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without duplicate keys."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise BadFile("its header has a duplicate key")
    return found
