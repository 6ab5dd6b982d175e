"""Write feature stores file by file; a reader finds a complete store or none."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from tqdm import tqdm

from unicode_fast.config import Modality
from unicode_fast.data import bfloat16
from unicode_fast.data.dataset import WHOLE, ClipSet, Dataset
from unicode_fast.data.lazy import LazyArray
from unicode_fast.data.store.checks import (
    StoreError,
    check_array_values,
    check_names,
    check_present,
    check_split,
    check_values,
    check_written,
)
from unicode_fast.errors import REMEDIES, message_of
from unicode_fast.files.locks import exclusive
from unicode_fast.files.writing import atomic_file, atomic_folder, publish, remove_unfinished, write_text

PackedDtype: TypeAlias = Literal["float32", "float16", "bfloat16", "float64"]
FORMAT = 2
MANIFEST = "manifest.json"
# File beside the manifest of a store whose features were computed from media.
PREPROCESSOR = "preprocessor.json"
SHARD_BYTES = 1 << 29
_CHUNK_BYTES = 1 << 24
_LOG, _PLAN = "journal.jsonl", "plan.json"


def write_store(
    path: str | os.PathLike[str],
    name: str,
    modalities: Mapping[str, Modality],
    classes: Sequence[str],
    splits: Mapping[str, Mapping[str, np.ndarray]],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Check the arrays and write them as a feature store.

    The files are written to a temporary folder beside `path` and flushed to the disk; then the folder is renamed. After
    any interruption, `path` holds a complete store or nothing. If several processes write the same path, one succeeds
    and the others raise FileExistsError.

    Args:
        path: the folder to make; it must not exist.
        name: name of the data set.
        modalities: kind and shape of one position of each modality.
        classes: C class names.
        splits: for each split its arrays by key, clips first. The key of features is their modality: (clips, T, ...) of
            float16, float32 or float64, with zeros after the end of shorter clips. "<modality>.length" (clips,) int64
            in [0, T] is needed if lengths differ; 0 for a clip that lacks the modality, and each clip has one.
            "<modality>.label" is (clips, T, C+1) uint8 or float32 in [0, 1], background last. "class" is (clips,) int64
            in [0, C). "id" is (clips,) different numbers or strings. Other keys are stored unchanged.
        extra: additional entries, JSON-serialisable.

    Raises:
        StoreError: the arrays are inconsistent, hold NaN, infinite or impossible values or duplicate ids, or are
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
    check_names(modalities, classes)
    none = np.empty(0, np.int64)
    clip_sets = {split: [ClipSet(arrays, dict(modalities), list(classes), none)] for split, arrays in splits.items()}
    dataset = Dataset(target, name, modalities, classes, clip_sets, extra)
    check_clip_sets(classes, clip_sets)
    try:
        json.dumps(dataset.extra, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise StoreError(f"extra must be JSON-serialisable, got: {error}") from error
    dtypes = {key: next(iter(splits.values()))[key].dtype.name for key in modalities}
    try:
        make_parent(target.parent)
        with atomic_folder(target) as folder:
            _Writer(dataset, folder, dtypes, SHARD_BYTES, {}).write(False)
            for split, arrays in splits.items():
                check_written(split, arrays, modalities)
    except OSError as error:
        raise explained(error, target) from error


def pack(
    dataset: Dataset,
    path: str | os.PathLike[str],
    dtype: PackedDtype = "float32",
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write a data set as a feature store; it keeps the data set's preprocessor.

    Files are written to the folder `.<name>.packing` beside `path`. Each file is flushed to the disk before a log
    records it; the folder is renamed at the end. After an interruption the same call resumes after the last recorded
    file, and the result is the same, byte for byte. Memory holds some clips of one file, and labels, classes and ids.

    Args:
        dataset: a data set from `open_data`.
        path: the folder to make; it must not exist.
        dtype: dtype of the features; values are rounded to nearest, for float16 and bfloat16 via float32.
        shard_bytes: approximate limit of the size of a file of features.
        progress: show a progress bar on standard error.
        texts: other files of the folder, by name; no reader of the store needs them.

    Raises:
        ValueError: the dtype is unknown, or the size not positive.
        StoreError: features are not finite, out of the dtype's range, or inconsistent; the message names the clip. Or
            the folder holds an interrupted pack of other data or another dtype.
        FileExistsError: `path` exists already.
        OSError: the folder cannot be written, or the disk is full; finished files are kept for the next call.
    """
    target = Path(path).absolute()
    if dtype not in get_args(PackedDtype):
        raise ValueError(f"dtype must be one of {', '.join(get_args(PackedDtype))}, got {dtype!r}")
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes must be at least 1, got {shard_bytes}")
    check_new(target)
    check_names(dataset.modalities, dataset.classes)
    check_clip_sets(dataset.classes, {split: dataset.clip_sets(split) for split in dataset.splits})
    folder = target.with_name(f".{target.name}.packing")
    try:
        make_parent(target.parent)
        with exclusive(target.with_name(f".{target.name}.lock"), _say):
            check_new(target)
            if folder.is_symlink() or not folder.is_dir():
                folder.unlink(missing_ok=True)
                folder.mkdir()
            done = _read_log(folder, json.dumps([FORMAT, dataset.digest(), dtype, shard_bytes]))
            with open(folder / _LOG, "a", encoding="utf-8") as log:

                def record(entry: dict[str, Any]) -> None:
                    log.write(json.dumps(entry) + "\n")
                    log.flush()
                    os.fsync(log.fileno())

                _Writer(dataset, folder, dict.fromkeys(dataset.modalities, dtype), shard_bytes, done, record).write(
                    progress
                )
            remove_unfinished(folder)
            # Temporary files of older versions.
            for leftover in folder.glob("*.part"):
                leftover.unlink()
            for name, text in (texts or {}).items():
                write_text(folder / name, text)
            publish(folder, target)
            for name in (_LOG, _PLAN):
                (target / name).unlink()
    except OSError as error:
        raise explained(error, target) from error


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def _read_log(folder: Path, plan: str) -> dict[str, dict[str, Any]]:
    """The finished files, by name, after a check that they are of the same data."""
    file = folder / _PLAN
    odd = [entry for entry in folder.iterdir() if not stat.S_ISREG(entry.lstat().st_mode)]
    if not file.exists():
        remove_unfinished(folder, _PLAN)
        odd += folder.iterdir()
    if odd:
        raise StoreError(f"{folder} must hold only the files of an interrupted pack, got {odd[0].name!r}")
    if not file.exists():
        write_text(file, plan)
    elif file.read_bytes() != plan.encode():
        raise StoreError(
            f"{folder} must be of the same data, dtype and shard_bytes, got others; delete the folder to start again"
        )
    done = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / _LOG).read_text(encoding="utf-8").splitlines():
            # The last line may be cut short.
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                entry = json.loads(line)
                done[entry["file"]] = {key: entry[key] for key in ("file", "shape", "dtype", "bytes", "sha256")}
    # A recorded file is complete, unless the disk lost some of it.
    sizes = {entry.name: entry.stat().st_size for entry in folder.iterdir()}
    return {name: entry for name, entry in done.items() if sizes.get(name) == entry["bytes"]}


class _Writer:
    """Writes the files of a store into a folder.

    Args:
        dataset: with checked names, shapes and dtypes.
        folder: the output folder.
        dtypes: stored dtypes of the features, by modality.
        shard_bytes: approximate limit of the size of a file of features.
        done: the entries of existing files, by name.
        record: called with the entry of each new file.
    """

    def __init__(  # noqa: PLR0913 - input, output and progress of one pack
        self,
        dataset: Dataset,
        folder: Path,
        dtypes: Mapping[str, str],
        shard_bytes: int,
        done: dict[str, dict[str, Any]],
        record: Callable[[dict[str, Any]], None] = lambda entry: None,
    ) -> None:
        self.dataset, self.folder, self.dtypes, self.shard_bytes = dataset, folder, dtypes, shard_bytes
        self.done, self.record = done, record

    def write(self, progress: bool) -> None:
        """Write all files, the manifest last."""
        data = self.dataset
        splits: dict[str, Any] = {}
        with tqdm(total=self._total(), desc="packing", unit="B", unit_scale=True, disable=not progress) as bar:
            for split in data.splits:
                if split in data.divided:
                    members = enumerate(data.divided[split])
                    numbers = [self._file(f"{split}-numbers-{place}.npy", one.shape, one.dtype, [one])
                               for place, one in members]  # fmt: skip
                    splits[split] = {"of": WHOLE, "parts": numbers}
                    continue
                clip_sets = data.clip_sets(split)
                splits[split] = {"parts": []}
                for clips in clip_sets:
                    check_present(split, clips.arrays, clips.modalities)
                    prefix = split if len(clip_sets) == 1 else f"{split}-of-{'-'.join(clips.modalities)}"
                    arrays = {key: self._array(prefix, split, key, clips, bar) for key in clips.arrays}
                    count = next(iter(arrays.values()))["shape"][0]
                    splits[split]["parts"].append(
                        {"modalities": list(clips.modalities), "clips": count, "arrays": arrays}
                    )
        modalities = {
            name: {"kind": kind.kind, "shape": list(kind.shape), "dtype": self.dtypes[name]}
            for name, kind in data.modalities.items()
        }
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "name": data.name,
            "modalities": modalities,
            "classes": data.classes,
            "splits": splits,
            "extra": data.extra,
        }
        if data.preprocessor is not None:
            text = json.dumps(data.preprocessor, indent=1)
            write_text(self.folder / PREPROCESSOR, text)
            written = text.encode()
            manifest["preprocessor"] = {"bytes": len(written), "sha256": hashlib.sha256(written).hexdigest()}
        write_text(self.folder / MANIFEST, json.dumps(manifest, indent=1))

    def _total(self) -> int:
        return sum(
            int(np.prod(array.shape)) * self._stored(clips, key).itemsize
            for split in self.dataset.splits
            if split not in self.dataset.divided
            for clips in self.dataset.clip_sets(split)
            for key, array in clips.arrays.items()
        )

    def _stored(self, clips: ClipSet, key: str) -> np.dtype:
        """The dtype in the files."""
        if key not in clips.modalities:
            return clips.arrays[key].dtype
        return np.dtype(np.uint16 if self.dtypes[key] == bfloat16.NAME else self.dtypes[key])

    def _array(self, prefix: str, split: str, key: str, clips: ClipSet, bar: tqdm) -> dict[str, Any]:
        """One array's files and their entry in the manifest."""
        array, stored = clips.arrays[key], self._stored(clips, key)
        # Pictures and masks are large; labels and lengths are read as a whole.
        large = isinstance(array, LazyArray) and key.rpartition(".")[2] not in ("label", "length")
        clip_bytes = max(1, int(np.prod(array.shape[1:])) * stored.itemsize)
        per_file = max(1, self.shard_bytes // clip_bytes) if key in clips.modalities or large else len(array)
        files = []
        starts = range(0, len(array), per_file)
        for number, start in enumerate(starts):
            stop = min(start + per_file, len(array))
            name = f"{prefix}-{key}.npy" if len(starts) == 1 else f"{prefix}-{key}-{number:05d}.npy"
            chunks = self._chunks(split, key, clips, (start, stop))
            files.append(self._file(name, (stop - start, *array.shape[1:]), stored, chunks))
            bar.update((stop - start) * clip_bytes)
        rounded = key in clips.modalities and self.dtypes[key] == bfloat16.NAME
        return {"shape": list(array.shape), "dtype": bfloat16.NAME if rounded else stored.str, "shards": files}

    def _file(self, name: str, shape: tuple[int, ...], dtype: np.dtype, chunks: Iterable[np.ndarray]) -> dict[str, Any]:
        """The entry of one .npy file; if the file is missing, it is written chunk by chunk."""
        if name not in self.done:
            digest, size = hashlib.sha256(), 0
            with atomic_file(self.folder / name) as stream:
                for data in _bytes(shape, dtype, chunks):
                    digest.update(data)
                    size += stream.write(data)
            entry = {"file": name, "shape": list(shape), "dtype": dtype.str, "bytes": size}
            self.done[name] = {**entry, "sha256": digest.hexdigest()}
            self.record(self.done[name])
        return self.done[name]

    def _chunks(self, split: str, key: str, clips: ClipSet, span: tuple[int, int]) -> Iterator[np.ndarray]:
        """The values of some clips, checked and converted, a few clips at a time."""
        array = clips.arrays[key]
        positions = {name: clips.arrays[name].shape[1] for name in clips.modalities}
        count = max(1, _CHUNK_BYTES // max(1, int(np.prod(array.shape[1:])) * array.dtype.itemsize))
        for start in range(*span, count):
            try:
                chunk = np.asarray(array[start : min(start + count, span[1])])
            except OSError as error:
                raise StoreError(
                    f"features of {key!r} of split {split!r} must be readable, got: {message_of(error)}"
                ) from error
            check_array_values(split, key, chunk, positions, len(self.dataset.classes), start)
            if key in clips.modalities:
                chunk = _converted(f"array {key!r} of split {split!r}", chunk, self.dtypes[key], start)
            yield chunk


def _converted(where: str, chunk: np.ndarray, dtype: str, start: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        if dtype in ("float16", bfloat16.NAME):
            chunk = chunk.astype(np.float32)
        bits = bfloat16.to_bits(chunk) if dtype == bfloat16.NAME else chunk.astype(dtype)
    values = bfloat16.from_bits(bits) if dtype == bfloat16.NAME else bits
    finite = np.isfinite(values).reshape(len(values), -1).all(1)
    if not finite.all():
        clip = start + int(finite.argmin())
        raise StoreError(f"{where} must be in the range of {dtype}, got larger values in clip {clip}")
    return bits


def _bytes(shape: tuple[int, ...], dtype: np.dtype, chunks: Iterable[np.ndarray]) -> Iterator[bytes]:
    header = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    yield header.getvalue()
    for chunk in chunks:
        yield np.ascontiguousarray(chunk, dtype).tobytes()


def check_clip_sets(classes: Sequence[str], clip_sets: Mapping[str, Sequence[ClipSet]], values: bool = False) -> None:
    """Raise StoreError unless shapes and dtypes of all splits are consistent; `values` checks the values, too."""
    if len(clip_sets) == 0:
        raise StoreError("splits must name at least one split, got none")
    first: dict[str, tuple[str, Any]] = {}
    for split, clips in ((split, clips) for split, those in clip_sets.items() for clips in those):
        check_split(split, clips.arrays, clips.modalities, classes)
        check_alike(first, split, clips)
        if values:
            check_values(split, clips.arrays, clips.modalities, classes)


def check_alike(first: dict[str, tuple[str, Any]], split: str, clips: ClipSet) -> None:
    """Raise StoreError unless positions and dtype of features are those in `first`; add them for a new modality."""
    for name in clips.modalities:
        found = (clips.arrays[name].shape[1], clips.arrays[name].dtype)
        other, expected = first.setdefault(name, (split, found))
        if found != expected:
            raise StoreError(
                f"features of {name!r} must have the same number of positions and dtype in all splits, "
                f"got {expected[0]} {expected[1]} in {other!r} and {found[0]} {found[1]} in {split!r}"
            )


def check_new(path: str | os.PathLike[str]) -> None:
    """Raise FileExistsError if the path of a new folder exists."""
    if Path(path).exists():
        raise FileExistsError(errno.EEXIST, "the folder to write must not exist yet", str(path))


def make_parent(parent: Path) -> None:
    """Make the parent folder of a store."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(parent)) from error


def explained(error: OSError, target: Path) -> OSError:
    """The same error with the failed action and the remedy."""
    if error.errno == errno.EEXIST or error.errno in REMEDIES:
        return error
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        remedy = "the disk is full; free some space or choose a folder on another disk"
    else:
        remedy = f"{error.strerror or error}; choose a writable folder"
    return type(error)(error.errno, f"the data could not be written: {remedy}", str(target))
