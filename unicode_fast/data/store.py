"""Reading feature stores: a folder of plain .npy files and a manifest, opened as memory-mapped arrays."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from unicode_fast.config import Modality
from unicode_fast.data.store_checks import DamagedStoreError, StoreError
from unicode_fast.data.store_write import FORMAT, MANIFEST, check_contents, write_store

__all__ = ["ClipSet", "DamagedStoreError", "Store", "StoreError", "open_store", "write_store"]

_STAMP = "verified.json"
_PIECE_BYTES = 1 << 22


@dataclass(frozen=True)
class ClipSet:
    """Clips of one split, one array per modality.

    Attributes:
        arrays: everything the store holds for these clips, by key; clips first.
        modalities: the modalities in use, in order, with the shape of one time step.
        classes: C class names.
        index: (clips,) int64, the clips' numbers in their split.
    """

    arrays: Mapping[str, np.ndarray]
    modalities: dict[str, Modality]
    classes: list[str]
    index: np.ndarray

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.index)

    @property
    def features(self) -> dict[str, np.ndarray]:
        """Per modality (clips, T, ...) floating point, memory-mapped where no clips were selected."""
        return {name: self.arrays[name] for name in self.modalities}

    @property
    def mask(self) -> dict[str, np.ndarray]:
        """Per modality (clips, T) bool, True at the valid steps; all True where the store has no lengths."""
        return {name: self._mask(name) for name in self.modalities}

    @property
    def lengths(self) -> dict[str, np.ndarray]:
        """Per modality (clips,) int64, the number of valid steps."""
        return {name: self._lengths(name) for name in self.modalities}

    @property
    def labels(self) -> dict[str, np.ndarray]:
        """(clips, T, C+1) uint8 or float32, background last, for each modality that has them."""
        return {name: self.arrays[f"{name}.label"] for name in self.modalities if f"{name}.label" in self.arrays}

    @property
    def target(self) -> np.ndarray:
        """(clips,) int64 class of each clip.

        Raises:
            StoreError: the store has no clip classes.
        """
        if "class" not in self.arrays:
            raise StoreError(f"clips must have an array 'class' to give targets, got keys {sorted(self.arrays)}")
        return self.arrays["class"]

    @property
    def id(self) -> np.ndarray:
        """(clips,) the clips' own names or numbers; their numbers in the split where the store has none."""
        return self.arrays.get("id", self.index)

    def select(self, indices: Sequence[int] | np.ndarray) -> ClipSet:
        """Some of the clips, in the order given.

        Args:
            indices: (n,) numbers in [0, len), or (len,) bool.

        Returns:
            A ClipSet whose arrays are copies in memory.

        Raises:
            IndexError: a number is outside.
        """
        chosen = np.asarray(indices)
        if chosen.dtype != bool:
            chosen = chosen.astype(np.int64)
            if len(chosen) and (chosen.min() < 0 or chosen.max() >= len(self)):
                raise IndexError(f"indices must lie in [0, {len(self)}), got {chosen.min()} to {chosen.max()}")
        arrays = {key: np.asarray(array[chosen]) for key, array in self.arrays.items()}
        return replace(self, arrays=arrays, index=self.index[chosen])

    def restrict(self, names: Iterable[str]) -> ClipSet:
        """The same clips with these modalities only, in this order.

        Raises:
            ValueError: a modality is unknown.
        """
        wanted = list(names)
        unknown = [name for name in wanted if name not in self.modalities]
        if unknown:
            raise ValueError(f"modalities must be among {list(self.modalities)}, got {unknown[0]!r}")
        return replace(self, modalities={name: self.modalities[name] for name in wanted})

    def _lengths(self, name: str) -> np.ndarray:
        steps = self.arrays[name].shape[1]
        return self.arrays.get(f"{name}.length", np.full(len(self), steps, np.int64))

    def _mask(self, name: str) -> np.ndarray:
        return np.arange(self.arrays[name].shape[1]) < self._lengths(name)[:, None]


class Store:
    """An opened feature store; made by `open_store`.

    Attributes:
        path: its folder.
        name: what people call the data set.
        modalities: kind and shape of one time step of each modality.
        classes: C class names.
        splits: the names of the splits.
        extra: what the writer added.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any], splits: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        self.path = path
        self.name: str = manifest["name"]
        self.modalities = _modalities(manifest)
        self.classes: list[str] = list(manifest["classes"])
        self.extra: dict[str, Any] = dict(manifest["extra"])
        self.splits = list(splits)
        self._arrays = splits

    def split(self, name: str) -> ClipSet:
        """The clips of one split.

        Raises:
            ValueError: there is no such split.
        """
        if name not in self._arrays:
            raise ValueError(f"split must be one of {self.splits}, got {name!r}")
        arrays = self._arrays[name]
        clips = len(arrays[next(iter(self.modalities))])
        return ClipSet(arrays, dict(self.modalities), list(self.classes), np.arange(clips, dtype=np.int64))

    def clips(self, split: str, modality: str) -> ClipSet:
        """The clips of one split that have this modality: all of them, as the modalities of a store are paired.

        Raises:
            ValueError: there is no such split or modality.
        """
        if modality not in self.modalities:
            raise ValueError(f"modality must be one of {', '.join(self.modalities)}, got {modality!r}")
        return self.split(split)

    def modalities_named(self, names: Iterable[str]) -> dict[str, Modality]:
        """Some of the modalities, in the order given.

        Raises:
            ValueError: a modality is unknown.
        """
        return self.split(self.splits[0]).restrict(names).modalities

    def __repr__(self) -> str:
        """Name, folder and number of clips."""
        counts = ", ".join(f"{split}: {len(self.split(split))}" for split in self.splits)
        return f"Store({self.name!r}, {str(self.path)!r}, {counts})"


def open_store(path: str | os.PathLike[str], *, verify: bool = True) -> Store:
    """Open a feature store, its arrays memory-mapped and read-only.

    Args:
        path: the folder that `write_store` made.
        verify: compare every file's checksum and look at every value. What was verified is noted in the folder with
            each file's size and time of change, and not done again until one of them differs; a folder that cannot be
            written is verified each time. With False only sizes and shapes are checked.

    Returns:
        The store.

    Raises:
        FileNotFoundError: `path` is not a feature store.
        DamagedStoreError: a file is missing, cut short or changed; the message names it and what helps.
        StoreError: the contents are not what they must be, such as NaN features; split, key and clip are named.
    """
    folder = Path(path).absolute()
    manifest = _read_manifest(folder)
    splits = {
        split: {key: _map_array(folder, entry) for key, entry in described["arrays"].items()}
        for split, described in manifest["splits"].items()
    }
    if verify and not _is_stamped(folder, manifest):
        for described in manifest["splits"].values():
            for entry in described["arrays"].values():
                _check_digest(folder, entry)
        check_contents(_modalities(manifest), manifest["classes"], splits)
        _write_stamp(folder, manifest)
    return Store(folder, manifest, splits)


def _damaged(file: Path, what: str) -> DamagedStoreError:
    return DamagedStoreError(
        f"file {str(file)!r} must be as it was written, but {what}. Copy the feature store again or delete its folder "
        "and make it anew"
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            error.errno, f"path must be the folder of a feature store, which holds a {MANIFEST}", str(folder)
        ) from error
    except ValueError as error:
        raise _damaged(file, f"it is no JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise StoreError(f"format in {str(file)!r} must be {FORMAT}, got {found!r}")
    try:
        _modalities(manifest)
        for described in manifest["splits"].values():
            for entry in described["arrays"].values():
                _check_entry(entry)
        _ = manifest["name"], manifest["classes"], manifest["extra"]
    except StoreError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(file, f"an entry is missing or misshapen: {error!r}") from error
    return manifest


def _check_entry(entry: Mapping[str, Any]) -> None:
    """Raise KeyError where a field is missing, StoreError where the file lies outside the store."""
    _ = entry["shape"], entry["dtype"], entry["bytes"], entry["sha256"]
    if os.path.basename(entry["file"]) != entry["file"] or "\\" in entry["file"]:
        raise StoreError(f"file in the manifest must be a plain file name, got {entry['file']!r}")


def _modalities(manifest: Mapping[str, Any]) -> dict[str, Modality]:
    return {
        name: Modality(kind=described["kind"], shape=tuple(described["shape"]))
        for name, described in manifest["modalities"].items()
    }


def _map_array(folder: Path, entry: Mapping[str, Any]) -> np.ndarray:
    """One array, memory-mapped; its size, dtype and shape compared with the manifest."""
    file = folder / entry["file"]
    try:
        size = file.stat().st_size
    except FileNotFoundError as error:
        raise _damaged(file, "it is missing") from error
    if size != entry["bytes"]:
        raise _damaged(file, f"it has {size} bytes in place of {entry['bytes']}")
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise _damaged(file, f"it is no .npy file: {error}") from error
    if list(array.shape) != entry["shape"] or array.dtype.str != entry["dtype"]:
        raise _damaged(file, f"it holds {array.shape} {array.dtype.str} in place of {entry['shape']} {entry['dtype']}")
    return array


def _check_digest(folder: Path, entry: Mapping[str, Any]) -> None:
    file = folder / entry["file"]
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while piece := stream.read(_PIECE_BYTES):
            digest.update(piece)
    if digest.hexdigest() != entry["sha256"]:
        raise _damaged(file, "its checksum differs")


def _stamp(folder: Path, manifest: Mapping[str, Any]) -> dict[str, list[int]]:
    """Size and time of change of the manifest and of every array file."""
    files = [entry["file"] for described in manifest["splits"].values() for entry in described["arrays"].values()]
    states = {file: (folder / file).stat() for file in [MANIFEST, *files]}
    return {file: [state.st_size, state.st_mtime_ns] for file, state in states.items()}


def _is_stamped(folder: Path, manifest: Mapping[str, Any]) -> bool:
    try:
        return json.loads((folder / _STAMP).read_bytes()) == _stamp(folder, manifest)
    except (OSError, ValueError):
        return False


def _write_stamp(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Note what was verified; a folder that cannot be written is verified again next time."""
    temporary = folder / f"{_STAMP}.{os.getpid()}"
    try:
        temporary.write_text(json.dumps(_stamp(folder, manifest)))
        os.replace(temporary, folder / _STAMP)
    except OSError:
        temporary.unlink(missing_ok=True)
