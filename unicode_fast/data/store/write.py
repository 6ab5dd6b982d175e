"""Writing a feature store so that a reader sees all of it or nothing."""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unicode_fast.config import Modality
from unicode_fast.data.dataset import ClipSet
from unicode_fast.data.store.checks import (
    StoreError,
    check_names,
    check_split,
    check_values,
    check_written,
)
from unicode_fast.errors import CURES
from unicode_fast.files.writing import atomic_folder

FORMAT = 1
SHARDED_FORMAT = 2
MANIFEST = "manifest.json"
_PIECE_BYTES = 1 << 24


def write_store(
    path: str | os.PathLike[str],
    name: str,
    modalities: Mapping[str, Modality],
    classes: Sequence[str],
    splits: Mapping[str, Mapping[str, np.ndarray]],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Check the arrays and write them as a feature store.

    The files go to a temporary folder beside `path`, are flushed to the disk, and the folder is then renamed: whatever
    interrupts the writing, `path` never holds half a store. Of several processes that write the same path one
    succeeds and the others raise FileExistsError.

    Args:
        path: the folder to make; it must not exist.
        name: what people call the data set.
        modalities: kind and shape of one time step of each modality.
        classes: C class names.
        splits: for each split its arrays, clips first. A modality's name holds its features (clips, T, ...) of float16,
            float32 or float64, with zeros after the end of shorter clips; "<modality>.length" (clips,) int64 in [1, T]
            where lengths differ; "<modality>.label" (clips, T, C+1) uint8 or float32 in [0, 1], background last;
            "class" (clips,) int64 in [0, C); "id" (clips,) numbers or strings, all different. Other keys are kept as
            they are.
        extra: anything else that JSON can hold.

    Raises:
        StoreError: the arrays do not fit together, hold NaN, infinite or impossible values, name a clip twice, or are
            not zero after a clip's end.
        FileExistsError: `path` exists already.
        OSError: the folder cannot be written or the disk is full; nothing is left behind.
    """
    target = Path(path).absolute()
    check_new(target)
    for split, arrays in splits.items():
        for key, array in arrays.items():
            if not isinstance(array, (np.ndarray, np.generic)):
                raise StoreError(f"splits[{split!r}][{key!r}] must be a NumPy array, got {type(array).__name__}")
    check_contents(modalities, classes, splits)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "name": name,
        "modalities": {
            key: {
                "kind": modality.kind,
                "shape": list(modality.shape),
                "dtype": next(iter(splits.values()))[key].dtype.name,
            }
            for key, modality in modalities.items()
        },
        "classes": list(classes),
        "splits": {},
        "extra": dict(extra or {}),
    }
    try:
        json.dumps(manifest, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise StoreError(f"extra must hold what JSON can hold, got: {error}") from error
    try:
        make_parent(target.parent)
        with atomic_folder(target) as inside:
            for split, arrays in splits.items():
                entries = {key: _write_array(inside, f"{split}-{key}.npy", array) for key, array in arrays.items()}
                manifest["splits"][split] = {"clips": len(next(iter(arrays.values()))), "arrays": entries}
            write_bytes(inside / MANIFEST, json.dumps(manifest, indent=1).encode())
    except OSError as error:
        raise explained(error, target) from error


def check_contents(
    modalities: Mapping[str, Modality], classes: Sequence[str], splits: Mapping[str, Mapping[str, np.ndarray]]
) -> None:
    """Raise StoreError unless all splits fit the modalities and one another, by shape, dtype and value."""
    check_names(modalities, classes)
    none = np.empty(0, np.int64)
    check_parts(classes, [(split, ClipSet(arrays, dict(modalities), [], none)) for split, arrays in splits.items()])
    for split, arrays in splits.items():
        check_written(split, arrays, modalities)


def check_parts(classes: Sequence[str], parts: Sequence[tuple[str, ClipSet]]) -> None:
    """Raise StoreError unless the lists of clips, each beside the name of its split, are sound and fit one another."""
    if len(parts) == 0:
        raise StoreError("splits must name at least one split, got none")
    first: dict[str, tuple[str, Any]] = {}
    for split, part in parts:
        check_split(split, part.arrays, part.modalities, classes)
        check_alike(first, split, part)
        check_values(split, part.arrays, part.modalities, classes)


def check_alike(first: dict[str, tuple[str, Any]], split: str, part: ClipSet) -> None:
    """Raise StoreError unless features have the steps and dtype that `first` holds, or is given, by modality."""
    for name in part.modalities:
        found = (part.arrays[name].shape[1], part.arrays[name].dtype)
        other, wanted = first.setdefault(name, (split, found))
        if found != wanted:
            raise StoreError(
                f"features of {name!r} must have the same number of time steps and dtype in all splits, "
                f"got {wanted[0]} {wanted[1]} in {other!r} and {found[0]} {found[1]} in {split!r}"
            )


def check_new(path: str | os.PathLike[str]) -> None:
    """Raise FileExistsError where there is something at the path of a folder that is to be made."""
    if Path(path).exists():
        raise FileExistsError(errno.EEXIST, "the folder to write must not exist yet", str(path))


def make_parent(parent: Path) -> None:
    """Make the folder above a store."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(parent)) from error


def explained(error: OSError, target: Path) -> OSError:
    """The same error with a message that says what was being done and what helps."""
    if error.errno == errno.EEXIST or error.errno in CURES:
        return error
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        cure = "the disk is full; free some space or choose a folder on another disk"
    else:
        cure = f"{error.strerror or error}; choose a folder that can be written"
    return type(error)(error.errno, f"the data could not be written: {cure}", str(target))


def _write_array(folder: Path, file: str, array: np.ndarray) -> dict[str, Any]:
    """Write one .npy file, returning its manifest entry; the checksum is of the whole file."""
    array = np.ascontiguousarray(array)
    digest = hashlib.sha256()
    with open(folder / file, "xb") as stream:
        header = npy_header(array.shape, array.dtype)
        body = array.reshape(-1).view(np.uint8)
        starts = range(0, len(body), _PIECE_BYTES)
        for piece in itertools.chain([header], (body[start : start + _PIECE_BYTES].tobytes() for start in starts)):
            digest.update(piece)
            stream.write(piece)
        stream.flush()
        os.fsync(stream.fileno())
    return {
        "file": file,
        "shape": list(array.shape),
        "dtype": array.dtype.str,
        "bytes": len(header) + len(body),
        "sha256": digest.hexdigest(),
    }


def npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """The bytes of a .npy file before its values, which are in C order."""
    buffer = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, described)
    return buffer.getvalue()


def write_bytes(file: Path, data: bytes) -> None:
    """Write a new file that is on the disk afterwards."""
    with open(file, "xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
