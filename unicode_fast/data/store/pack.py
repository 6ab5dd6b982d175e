"""Packing a data set into a feature store that is read in any order without decompressing, shard by shard."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from tqdm import tqdm

from unicode_fast.config import Modality
from unicode_fast.data import bfloat16
from unicode_fast.data.dataset import WHOLE, ClipSet, Dataset
from unicode_fast.data.lazy import ClipArray, LazyArray
from unicode_fast.data.store.checks import StoreError, check_array_values, check_names, check_split
from unicode_fast.data.store.write import (
    MANIFEST,
    SHARDED_FORMAT,
    check_alike,
    check_new,
    explained,
    make_parent,
    npy_header,
    write_bytes,
)
from unicode_fast.errors import message_of
from unicode_fast.files.locks import exclusive
from unicode_fast.files.writing import atomic_file, publish, remove_unfinished, sync_folder

PackedDtype: TypeAlias = Literal["float32", "float16", "bfloat16", "float64"]
SHARD_BYTES = 1 << 29
_PIECE_BYTES = 1 << 24
_JOURNAL, _PLAN = "journal.jsonl", "plan.json"


def pack(
    dataset: Dataset,
    path: str | os.PathLike[str],
    dtype: PackedDtype = "float32",
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> None:
    """Write a data set as a feature store.

    Files go to the folder `.<name>.packing` beside `path`, each flushed to the disk before a journal notes it, and the
    folder gets its name when all are there. After an interruption the same call goes on behind the last file that was
    noted, and the result is the same, byte for byte. Only a piece of one file is in memory at a time, beside labels,
    classes and ids.

    Args:
        dataset: what `open_data` returns.
        path: the folder to make; it must not exist.
        dtype: of the features; values are rounded to nearest, for float16 and bfloat16 by way of float32.
        shard_bytes: about the largest size of a file of features.
        progress: show a progress bar on standard error.

    Raises:
        ValueError: the dtype is unknown, or the size not positive.
        StoreError: features are not finite, or not in the range of the dtype, or do not fit together; the clip is
            named. Or another data set, or another dtype, is half packed there.
        FileExistsError: `path` exists already.
        OSError: the folder cannot be written, or the disk is full; what was written is kept for the next call.
    """
    target = Path(path).absolute()
    if dtype not in get_args(PackedDtype):
        raise ValueError(f"dtype must be one of {', '.join(get_args(PackedDtype))}, got {dtype!r}")
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes must be at least 1, got {shard_bytes}")
    check_new(target)
    _check(dataset)
    folder = target.with_name(f".{target.name}.packing")
    try:
        make_parent(target.parent)
        with exclusive(target.with_name(f".{target.name}.lock"), _say):
            check_new(target)
            if folder.is_symlink() or not folder.is_dir():
                folder.unlink(missing_ok=True)
                folder.mkdir()
            _Packer(dataset, folder, dtype, shard_bytes).write(progress)
            publish(folder, target)
            for name in (_JOURNAL, _PLAN):
                (target / name).unlink()
    except OSError as error:
        raise explained(error, target) from error


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def _check(dataset: Dataset) -> None:
    """Raise StoreError unless names, shapes and dtypes fit together; no feature is read."""
    check_names(dataset.modalities, dataset.classes)
    first: dict[str, tuple[str, Any]] = {}
    for split in dataset.splits:
        for part in dataset.parts(split):
            check_split(split, part.arrays, part.modalities, dataset.classes)
            check_alike(first, split, part)


class _Packer:
    """Writes the files of a store into a folder, going on with those that are there."""

    def __init__(self, dataset: Dataset, folder: Path, dtype: PackedDtype, shard_bytes: int) -> None:
        self.dataset, self.folder, self.dtype, self.shard_bytes = dataset, folder, dtype, shard_bytes
        self.done = self._read_journal()

    def _read_journal(self) -> dict[str, dict[str, Any]]:
        """The files that are whole, by name; checks that they are of the same data."""
        plan = json.dumps([SHARDED_FORMAT, self.dataset.digest(), self.dtype, self.shard_bytes]).encode()
        file = self.folder / _PLAN
        odd = [entry for entry in self.folder.iterdir() if not stat.S_ISREG(entry.lstat().st_mode)]
        if not file.exists():
            remove_unfinished(self.folder, _PLAN)
            odd += self.folder.iterdir()
        if odd:
            raise StoreError(f"{self.folder} must hold what an interrupted pack left and no more, got {odd[0].name!r}")
        if not file.exists():
            with atomic_file(file) as stream:
                stream.write(plan)
        elif file.read_bytes() != plan:
            raise StoreError(
                f"{self.folder} must hold what was begun with the same data, dtype and shard size, got others; delete "
                "the folder to begin anew"
            )
        done = {}
        with contextlib.suppress(FileNotFoundError):
            for line in (self.folder / _JOURNAL).read_text(encoding="utf-8").splitlines():
                # The last line may be cut short.
                with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                    shard = json.loads(line)
                    done[shard["file"]] = {key: shard[key] for key in ("file", "shape", "dtype", "bytes", "sha256")}
        # A file that was noted is whole, unless the disk lost it.
        sizes = {entry.name: entry.stat().st_size for entry in self.folder.iterdir()}
        return {name: shard for name, shard in done.items() if sizes.get(name) == shard["bytes"]}

    def write(self, progress: bool) -> None:
        """All files, the manifest last."""
        splits: dict[str, Any] = {}
        shown = tqdm(total=self._total(), desc="packing", unit="B", unit_scale=True, disable=not progress)
        with shown, open(self.folder / _JOURNAL, "a", encoding="utf-8") as journal:
            for split in self.dataset.splits:
                parts = self.dataset.parts(split)
                if split in self.dataset.divided:
                    splits[split] = {"of": WHOLE, "parts": self._numbers(split, journal)}
                    continue
                for part in parts:
                    prefix = split if len(parts) == 1 else f"{split}-of-{'-'.join(part.modalities)}"
                    arrays = {key: self._array(prefix, split, key, part, journal, shown) for key in part.arrays}
                    described = {"modalities": list(part.modalities), "clips": len(part), "arrays": arrays}
                    splits.setdefault(split, {"parts": []})["parts"].append(described)
        self._finish(splits)

    def _total(self) -> int:
        sizes = [
            int(np.prod(array.shape)) * self._stored(part, key).itemsize
            for split in self.dataset.splits
            if split not in self.dataset.divided
            for part in self.dataset.parts(split)
            for key, array in part.arrays.items()
        ]
        return sum(sizes)

    def _stored(self, part: ClipSet, key: str) -> np.dtype:
        """The dtype of the numbers in the files."""
        if key not in part.modalities:
            return part.arrays[key].dtype
        return np.dtype(np.uint16 if self.dtype == bfloat16.NAME else self.dtype)

    def _array(self, prefix: str, split: str, key: str, part: ClipSet, journal: Any, shown: tqdm) -> dict[str, Any]:
        """One array's files and their entry in the manifest."""
        array, stored = part.arrays[key], self._stored(part, key)
        small = key not in part.modalities and not _is_large(key, array)
        clip_bytes = max(1, int(np.prod(array.shape[1:])) * stored.itemsize)
        step = len(array) if small else max(1, self.shard_bytes // clip_bytes)
        shards = []
        starts = range(0, len(array), step)
        for number, start in enumerate(starts):
            stop = min(start + step, len(array))
            name = f"{prefix}-{key}.npy" if len(starts) == 1 else f"{prefix}-{key}-{number:05d}.npy"
            if name not in self.done:
                pieces = self._pieces(split, key, part, (start, stop))
                shard = _write_shard(self.folder / name, (stop - start, *array.shape[1:]), stored, pieces)
                self._note(shard, journal)
            shown.update((stop - start) * clip_bytes)
            shards.append(self.done[name])
        features = key in part.modalities and self.dtype == bfloat16.NAME
        return {"shape": list(array.shape), "dtype": bfloat16.NAME if features else stored.str, "shards": shards}

    def _numbers(self, split: str, journal: Any) -> list[dict[str, Any]]:
        """For each list of the whole split, the file with the numbers of the clips that this split takes of it."""
        found = []
        for place, numbers in enumerate(self.dataset.divided[split]):
            name = f"{split}-numbers-{place}.npy"
            if name not in self.done:
                self._note(_write_shard(self.folder / name, numbers.shape, numbers.dtype, iter([numbers])), journal)
            found.append(self.done[name])
        return found

    def _note(self, shard: dict[str, Any], journal: Any) -> None:
        """Remember a file that is whole."""
        sync_folder(self.folder)
        journal.write(json.dumps(shard) + "\n")
        journal.flush()
        os.fsync(journal.fileno())
        self.done[shard["file"]] = shard

    def _pieces(self, split: str, key: str, part: ClipSet, clips: tuple[int, int]) -> Iterator[np.ndarray]:
        """The numbers of some clips, checked and converted, a few clips at a time."""
        array = part.arrays[key]
        steps = {name: part.arrays[name].shape[1] for name in part.modalities}
        step = max(1, _PIECE_BYTES // max(1, int(np.prod(array.shape[1:])) * array.dtype.itemsize))
        for start in range(*clips, step):
            try:
                piece = np.asarray(array[start : min(start + step, clips[1])])
            except OSError as error:
                raise StoreError(
                    f"features of {key!r} of split {split!r} must be readable, got: {message_of(error)}"
                ) from error
            check_array_values(split, key, piece, steps, len(self.dataset.classes), start)
            if key in part.modalities:
                piece = self._converted(f"array {key!r} of split {split!r}", piece, start)
            yield piece

    def _converted(self, where: str, piece: np.ndarray, start: int) -> np.ndarray:
        if self.dtype in ("float16", bfloat16.NAME):
            with np.errstate(over="ignore"):
                piece = piece.astype(np.float32)
        with np.errstate(over="ignore"):
            bits = bfloat16.to_bits(piece) if self.dtype == bfloat16.NAME else piece.astype(self.dtype)
        values = bfloat16.from_bits(bits) if self.dtype == bfloat16.NAME else bits
        finite = np.isfinite(values).reshape(len(values), -1).all(1)
        if not finite.all():
            clip = start + int(finite.argmin())
            raise StoreError(f"{where} must be in the range of {self.dtype}, got larger values in clip {clip}")
        return bits

    def _finish(self, splits: Mapping[str, Any]) -> None:
        data = self.dataset
        manifest = {
            "format": SHARDED_FORMAT,
            "name": data.name,
            "modalities": {name: _described(kind, self.dtype) for name, kind in data.modalities.items()},
            "classes": data.classes,
            "splits": splits,
            "extra": data.extra,
        }
        (self.folder / MANIFEST).unlink(missing_ok=True)
        write_bytes(self.folder / MANIFEST, json.dumps(manifest, indent=1).encode())
        remove_unfinished(self.folder)
        # As older versions called them.
        for leftover in self.folder.glob("*.part"):
            leftover.unlink()


def _described(modality: Modality, dtype: str) -> dict[str, Any]:
    return {"kind": modality.kind, "shape": list(modality.shape), "dtype": dtype}


def _is_large(key: str, array: ClipArray) -> bool:
    """Pictures and masks are; labels and lengths are read whole."""
    return isinstance(array, LazyArray) and key.rpartition(".")[2] not in ("label", "length")


def _write_shard(file: Path, shape: tuple[int, ...], dtype: np.dtype, pieces: Iterator[np.ndarray]) -> dict[str, Any]:
    """Write one .npy file piece by piece, returning its entry; the checksum is of the whole file."""
    digest, size = hashlib.sha256(), 0
    with atomic_file(file) as stream:
        for data in _bytes(shape, dtype, pieces):
            digest.update(data)
            size += stream.write(data)
    return {
        "file": file.name,
        "shape": list(shape),
        "dtype": dtype.str,
        "bytes": size,
        "sha256": digest.hexdigest(),
    }


def _bytes(shape: tuple[int, ...], dtype: np.dtype, pieces: Iterator[np.ndarray]) -> Iterator[bytes]:
    yield npy_header(shape, dtype)
    for piece in pieces:
        yield np.ascontiguousarray(piece, dtype).tobytes()
