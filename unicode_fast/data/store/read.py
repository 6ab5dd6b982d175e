"""Read feature stores: folders of .npy files with a manifest, opened as memory-mapped arrays.

Format 2 has several files for large arrays, bfloat16, and splits with separate clips for each modality. Format 1, from
older versions, has one file for each array of a split.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from unicode_fast.config import Modality
from unicode_fast.data import bfloat16
from unicode_fast.data.dataset import WHOLE, ClipSet, Dataset
from unicode_fast.data.lazy import ClipArray, LazyArray
from unicode_fast.data.store.checks import DamagedStoreError, StoreError, check_names
from unicode_fast.data.store.write import FORMAT, MANIFEST, PREPROCESSOR, check_clip_sets
from unicode_fast.errors import TooManyFiles
from unicode_fast.files.paths import cache_folder
from unicode_fast.files.untrusted import (
    BadFile,
    check_text,
    npy_header,
    open_file,
    parse_json,
    read_bytes,
    read_json,
)
from unicode_fast.files.writing import write_text

_OLDER_FORMAT = 1
# Folder in the cache folder with a record for each verified store.
_STAMPS = "verified"
# Bytes that clip numbers may take beyond twice the size of all files.
_INDEX_ROOM = 100 << 20
_CHUNK_BYTES = 1 << 22


class Store(Dataset):
    """An opened feature store; made by `open_store`.

    Attributes:
        path: its folder.
        name: name of the data set.
        modalities: kind and shape of one position of each modality.
        classes: C class names.
        splits: the names of the splits.
        extra: additional entries of its writer.
        preprocessor: content of preprocessor.json, if the features were computed from media, else None.
    """

    def __init__(
        self,
        path: Path,
        manifest: Mapping[str, Any],
        clip_sets: Mapping[str, Sequence[ClipSet]],
        divided: Mapping[str, Sequence[np.ndarray]],
    ) -> None:
        modalities, classes = _modalities(manifest), manifest["classes"]
        super().__init__(path, manifest["name"], modalities, classes, clip_sets, manifest["extra"], divided)
        self.preprocessor = _read_preprocessor(path, manifest)

    def digest(self) -> str:
        """The checksum of the manifest, which includes the checksums of all files."""
        return hashlib.sha256(read_bytes(self.path / MANIFEST)).hexdigest()

    def has_digest(self, digest: str) -> bool:
        """Whether this is the store's digest, or its digest in the older format."""
        manifest = _read_manifest(self.path)
        splits = {
            split: {
                "clips": described["clips"],
                "arrays": {key: entry["shards"][0] for key, entry in described["arrays"].items()},
            }
            for split in _listed(manifest)
            for described in manifest["splits"][split]["parts"][:1]
        }
        older = json.dumps({**manifest, "format": _OLDER_FORMAT, "splits": splits}, indent=1)
        return digest in (self.digest(), hashlib.sha256(older.encode()).hexdigest())


def open_store(path: str | os.PathLike[str], *, verify: bool | Literal["always"] = True) -> Store:
    """Open a feature store, its arrays memory-mapped and read-only.

    Args:
        path: a folder from `write_store` or `pack`.
        verify: compare every file's checksum and check every value. A record in the cache folder holds size and times
            of change of every file; later calls skip the comparison while the record matches. "always" ignores the
            record, so it also finds changed bits on the disk. False checks only sizes and shapes.

    Returns:
        The store.

    Raises:
        FileNotFoundError: `path` is not a feature store.
        DamagedStoreError: a file is missing, cut short or changed; the message names it and the remedy.
        StoreError: the contents are invalid, such as NaN features; the message names split, key and clip.
    """
    folder = Path(path).absolute()
    manifest = _read_manifest(folder)
    modalities = _modalities(manifest)
    clip_sets: dict[str, list[ClipSet]] = {}
    for split in _listed(manifest):
        for described in manifest["splits"][split]["parts"]:
            arrays = {key: _map_array(folder, entry) for key, entry in described["arrays"].items()}
            own = {name: modalities[name] for name in described["modalities"]}
            index = np.arange(described["clips"], dtype=np.int64)
            clip_sets.setdefault(split, []).append(ClipSet(arrays, own, list(manifest["classes"]), index))
    # Taken before verification, so that a file that changes meanwhile is verified again.
    stamp = _stamp(folder, manifest) if verify else {}
    if verify == "always" or (verify and not _is_stamped(folder, stamp)):
        for entry in _all_files(manifest):
            _check_digest(folder, entry)
        with _of(folder):
            check_clip_sets(manifest["classes"], clip_sets, values=True)
        _write_stamp(folder, stamp)
    divided = {
        split: [np.array(_map_file(folder, entry)) for entry in described["parts"]]
        for split, described in manifest["splits"].items()
        if "of" in described
    }
    with _of(folder):
        _check_divided(divided, clip_sets)
    return Store(folder, manifest, clip_sets, divided)


def _damaged(file: Path, what: str) -> DamagedStoreError:
    return DamagedStoreError(
        f"file {str(file)!r} must be as written, but {what}. Copy the store again, or delete and recreate it"
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        manifest = read_json(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            error.errno, f"path must be the folder of a feature store with its {MANIFEST}", str(folder)
        ) from error
    except BadFile as error:
        raise _damaged(file, str(error)) from error
    if not isinstance(manifest, dict) or manifest.get("format") not in (_OLDER_FORMAT, FORMAT):
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise StoreError(f"format in {str(file)!r} must be {_OLDER_FORMAT} or {FORMAT}, got {found!r}")
    try:
        with _of(folder):
            if manifest["format"] == _OLDER_FORMAT:
                manifest["splits"] = _current(manifest)
            _check_manifest(manifest)
    except StoreError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise _damaged(file, f"an entry is missing or malformed: {error!r}") from error
    return manifest


def _current(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The splits of a manifest of the older format, in the current format."""
    current = {}
    for split, described in manifest["splits"].items():
        arrays = {key: {**entry, "shards": [entry]} for key, entry in described["arrays"].items()}
        whole = {"modalities": list(manifest["modalities"]), "clips": described["clips"], "arrays": arrays}
        current[split] = {"parts": [whole]}
    return current


@contextlib.contextmanager
def _of(folder: Path) -> Iterator[None]:
    """Add the manifest's path to a StoreError."""
    try:
        yield
    except StoreError as error:
        raise StoreError(f"{error}; its manifest is {str(folder / MANIFEST)!r}") from error


def _check_manifest(manifest: Mapping[str, Any]) -> None:
    """Raise StoreError, or the errors of malformed values, unless the entries are consistent."""
    modalities = _modalities(manifest)
    check_names(modalities, manifest["classes"])
    for split in _listed(manifest):
        for described in manifest["splits"][split]["parts"]:
            arrays = described["arrays"]
            for key, entry in arrays.items():
                _check_entry(entry, entry["shards"], f"array {key!r} of split {split!r}")
            for name in described["modalities"]:
                if 0 in arrays[name]["shape"] or name not in modalities:
                    raise StoreError(f"array {name!r} of split {split!r} must hold features of a modality, got none")
            if not described["modalities"] or {one["shape"][0] for one in arrays.values()} != {described["clips"]}:
                raise StoreError(f"clips of split {split!r} must be the length of its arrays, got {described['clips']}")
    for split, described in manifest["splits"].items():
        for entry in described["parts"] if "of" in described else ():
            _check_entry(entry, [entry], f"split {split!r}")
    clips = sum(one["clips"] for split in _listed(manifest) for one in manifest["splits"][split]["parts"])
    # Several splits may use the same file.
    size = sum({one["file"]: one["bytes"] for one in _all_files(manifest)}.values())
    if 8 * clips > 2 * size + _INDEX_ROOM:
        raise StoreError(f"clips must be few enough for {size} bytes of files, got {clips}")
    described = manifest.get("preprocessor")
    if described is not None and (type(described["sha256"]) is not str or type(described["bytes"]) is not int):
        raise TypeError("preprocessor must have the bytes and the sha256 of its file")
    if type(manifest["name"]) is not str or not isinstance(manifest["extra"], dict):
        raise TypeError("name must be a string, and extra a mapping")


def _check_entry(entry: Mapping[str, Any], files: Sequence[Mapping[str, Any]], what: str) -> None:
    """Raise KeyError, TypeError or StoreError unless an array's files are valid and in the store's folder."""
    for one in (entry, *files):
        shape = one["shape"]
        if type(shape) is not list or not shape or not all(type(size) is int and size >= 0 for size in shape):
            raise TypeError(f"shape of {what} must be a list of sizes, got {shape!r:.80}")
        if type(one["dtype"]) is not str:
            raise TypeError(f"dtype of {what} must be a string, got {one['dtype']!r:.80}")
    if [sum(one["shape"][0] for one in files), *files[0]["shape"][1:]] != entry["shape"] or any(
        one["shape"][1:] != files[0]["shape"][1:] or one["dtype"] != files[0]["dtype"] for one in files
    ):
        raise TypeError(f"files of {what} must have the joint shape {entry['shape']!r:.80} and one dtype, got others")
    for one in files:
        if type(one["bytes"]) is not int or type(one["sha256"]) is not str:
            raise TypeError(f"bytes and sha256 of {what} must be an integer and a string")
        if os.path.basename(one["file"]) != one["file"] or "\\" in one["file"]:
            raise StoreError(f"file in the manifest must be a plain file name, got {one['file']!r}")


def _modalities(manifest: Mapping[str, Any]) -> dict[str, Modality]:
    return {
        name: Modality(kind=described["kind"], shape=tuple(described["shape"]))
        for name, described in manifest["modalities"].items()
    }


def _listed(manifest: Mapping[str, Any]) -> list[str]:
    """The splits with their own files; the other splits select clips of the split "all"."""
    return [split for split, described in manifest["splits"].items() if "of" not in described]


def _check_divided(divided: Mapping[str, Sequence[np.ndarray]], clip_sets: Mapping[str, Sequence[ClipSet]]) -> None:
    """Raise StoreError unless divided splits select existing clips of the split "all"."""
    for split, members in divided.items():
        sizes = [len(clips) for clips in clip_sets.get(WHOLE, ())]
        if len(sizes) != len(members) or any(
            numbers.dtype != np.int64
            or numbers.ndim != 1
            or len(numbers) == 0
            or numbers.min() < 0
            or numbers.max() >= size
            for numbers, size in zip(members, sizes, strict=True)
        ):
            raise StoreError(f"split {split!r} must select (n,) int64 numbers of clips of split {WHOLE!r}, got others")


def _all_files(manifest: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for described in manifest["splits"].values():
        if "of" in described:
            yield from described["parts"]
        else:
            yield from (
                entry for clips in described["parts"] for one in clips["arrays"].values() for entry in one["shards"]
            )


def _read_preprocessor(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """The content of a store's preprocessor.json; None if the manifest lists none."""
    # Imported here because media writes stores.
    from unicode_fast.media.stored import checked_preprocessor

    listed, file = manifest.get("preprocessor"), folder / PREPROCESSOR
    if listed is None:
        return None
    try:
        content = read_bytes(file)
        if hashlib.sha256(content).hexdigest() != listed["sha256"]:
            raise BadFile(f"its checksum differs from {MANIFEST}")
        return checked_preprocessor(parse_json(content), _modalities(manifest), exactly=True)
    except FileNotFoundError as error:
        raise _damaged(file, f"it is missing, but {MANIFEST} lists it") from error
    except BadFile as error:
        raise _damaged(file, str(error)) from error


def _map_array(folder: Path, entry: Mapping[str, Any]) -> ClipArray:
    """One array, memory-mapped; lazy with several files, or with bfloat16."""
    files = [_map_file(folder, one) for one in entry["shards"]]
    if len(files) == 1 and entry["dtype"] != bfloat16.NAME:
        return files[0]
    shape = (sum(map(len, files)), *files[0].shape[1:])
    ends = np.cumsum([len(file) for file in files])
    starts = ends - [len(file) for file in files]
    rounded = entry["dtype"] == bfloat16.NAME
    # torch copies with several threads and has bfloat16, but no strings.
    in_torch = rounded or files[0].dtype.kind == "f"
    values = [_unwritable(file, rounded) if in_torch else np.asarray(file) for file in files]
    join: Any = torch.cat if in_torch else np.concatenate

    def read(numbers: np.ndarray) -> np.ndarray | torch.Tensor:
        owner = np.searchsorted(ends, numbers, side="right")
        places = zip(owner.tolist(), (numbers - starts[owner]).tolist(), strict=True)
        # The empty first array gives an empty result for no clips.
        return join([values[0][:0], *(values[file][clip : clip + 1] for file, clip in places)])

    return LazyArray(shape, np.float32 if rounded else files[0].dtype, read, mapped=True)


def _unwritable(mapped: np.ndarray, rounded: bool) -> torch.Tensor:
    """A tensor that shares read-only memory, without torch's warning; bfloat16 if `rounded`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(mapped.view(np.int16)).view(torch.bfloat16) if rounded else torch.from_numpy(mapped)


def _map_file(folder: Path, entry: Mapping[str, Any]) -> np.ndarray:
    """One file, memory-mapped, after its size, dtype and shape are compared with the manifest."""
    file = folder / entry["file"]
    try:
        with open_file(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size != entry["bytes"]:
                raise BadFile(f"it has {size} bytes instead of {entry['bytes']}")
            shape, fortran, dtype = npy_header(stream, size)
            if list(shape) != entry["shape"] or dtype.str != entry["dtype"]:
                raise BadFile(f"it holds {shape} {dtype.str} instead of {entry['shape']} {entry['dtype']}")
            order: Literal["F", "C"] = "F" if fortran else "C"
            if 0 in shape:
                return np.empty(shape, dtype)
            array = np.memmap(stream, dtype, "r", stream.tell(), shape, order)
            check_text(array)
    except FileNotFoundError as error:
        raise _damaged(file, f"it is missing, but {MANIFEST} lists it") from error
    except BadFile as error:
        raise _damaged(file, f"{error}, compared with {MANIFEST}") from error
    return array


def _check_digest(folder: Path, entry: Mapping[str, Any]) -> None:
    file = folder / entry["file"]
    digest = hashlib.sha256()
    with open_file(file) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != entry["sha256"]:
        raise _damaged(file, f"its checksum differs from {MANIFEST}")


def damages(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """Read every file of a store; yield its number of bytes, and its problem, or "" without one.

    Raises:
        As `open_store`, if the manifest is missing or invalid.
    """
    folder = Path(path).absolute()
    manifest = _read_manifest(folder)
    if manifest.get("preprocessor") is not None:
        try:
            _read_preprocessor(folder, manifest)
            yield manifest["preprocessor"]["bytes"], ""
        except (StoreError, OSError) as error:
            yield manifest["preprocessor"]["bytes"], str(error)
    for entry in _all_files(manifest):
        try:
            _map_file(folder, entry)
            _check_digest(folder, entry)
            yield entry["bytes"], ""
        except (StoreError, OSError) as error:
            yield entry["bytes"], str(error)
        except TooManyFiles:
            raise
        # Readers of damaged files can raise any exception.
        except Exception as error:
            yield entry["bytes"], str(_damaged(folder / entry["file"], f"it cannot be read: {error!r}"))


def _stamp(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The store's path, and size and times of change of the manifest and of every array file."""
    files = [entry["file"] for entry in _all_files(manifest)]
    states = {file: (folder / file).stat() for file in [MANIFEST, *files]}
    listed = {file: [state.st_size, state.st_mtime_ns, state.st_ctime_ns] for file, state in states.items()}
    return {"store": str(folder), "files": listed}


def _stamp_file(folder: Path) -> Path:
    """The path of a store's record: outside the store, so that a downloaded store has none."""
    digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    name = hashlib.sha256(f"{folder}\n{digest}".encode("utf-8", "surrogateescape")).hexdigest()
    return cache_folder() / _STAMPS / f"{name[:32]}.json"


def _is_stamped(folder: Path, stamp: Mapping[str, Any]) -> bool:
    """Whether a matching record exists that only this user or root can write."""
    try:
        with open_file(_stamp_file(folder)) as file:
            state = os.fstat(file.fileno())
            ours = not hasattr(os, "geteuid") or (state.st_uid in (0, os.geteuid()) and not state.st_mode & 0o022)
            return ours and parse_json(file.read()) == stamp
    except (OSError, ValueError):
        return False


def _write_stamp(folder: Path, stamp: Mapping[str, Any]) -> None:
    """Record a verified store; without a writable cache folder, the store is verified again next time."""
    with contextlib.suppress(OSError, ValueError):
        file = _stamp_file(folder)
        if not file.parent.is_symlink():
            write_text(file, json.dumps(stamp))
