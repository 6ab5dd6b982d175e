"""The interface of every data set: splits, clips of a modality, and batches of clips.

The order of batches depends on seed and training step alone; in a stream also on the number of ranks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from unicode_fast.config import Modality
from unicode_fast.data.lazy import ClipArray, LazyArray, as_tensor, select_clips
from unicode_fast.data.store.checks import StoreError

# The split that other splits divide.
WHOLE = "all"


@dataclass(frozen=True)
class ClipSet:
    """Clips of one split, one array per modality.

    Attributes:
        arrays: all arrays of these clips, by key; clips first. Features may be a `LazyArray`, which reads clips when
            it is indexed.
        modalities: the modalities in use, in order, with the shape of one position.
        classes: C class names.
        index: (clips,) int64, the clips' numbers in their split.
    """

    arrays: Mapping[str, ClipArray]
    modalities: dict[str, Modality]
    classes: list[str]
    index: np.ndarray

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.index)

    @property
    def features(self) -> dict[str, np.ndarray]:
        """Per modality (clips, T, ...) floating point: memory-mapped, or a LazyArray with the same indexing."""
        return {name: cast(np.ndarray, self.arrays[name]) for name in self.modalities}

    @property
    def mask(self) -> dict[str, np.ndarray]:
        """Per modality (clips, T) bool, True at valid positions; all True without lengths."""
        lengths = self.lengths.items()
        return {name: np.arange(self.arrays[name].shape[1]) < length[:, None] for name, length in lengths}

    @property
    def lengths(self) -> dict[str, np.ndarray]:
        """Per modality (clips,) int64, the number of valid positions; 0 for a clip that lacks the modality."""
        full = {name: np.full(len(self), self.arrays[name].shape[1], np.int64) for name in self.modalities}
        return {name: np.asarray(self.arrays.get(f"{name}.length", positions)) for name, positions in full.items()}

    @property
    def labels(self) -> dict[str, np.ndarray]:
        """(clips, T, C+1) uint8 or float32, background last, for each labelled modality."""
        owners = [name for name in self.modalities if f"{name}.label" in self.arrays]
        return {name: cast(np.ndarray, self.arrays[f"{name}.label"]) for name in owners}

    @property
    def target(self) -> np.ndarray:
        """(clips,) int64 class of each clip.

        Raises:
            StoreError: clips have no classes.
        """
        if "class" not in self.arrays:
            raise StoreError(f"arrays of clips must include 'class' for targets, got {sorted(self.arrays)}")
        return np.asarray(self.arrays["class"])

    @property
    def id(self) -> np.ndarray:
        """(clips,) the clips' own names or numbers; by default their numbers in the split."""
        return np.asarray(self.arrays.get("id", self.index))

    def select(self, indices: Sequence[int] | np.ndarray) -> ClipSet:
        """Some of the clips, in the order given.

        Args:
            indices: (n,) numbers in [0, len), or (len,) bool.

        Returns:
            A ClipSet with copies in memory; lazy arrays stay lazy.

        Raises:
            IndexError: a number is out of range.
        """
        chosen = np.asarray(indices)
        if chosen.dtype != bool:
            chosen = chosen.astype(np.int64)
            if len(chosen) and (chosen.min() < 0 or chosen.max() >= len(self)):
                raise IndexError(f"indices must lie in [0, {len(self)}), got {chosen.min()} to {chosen.max()}")
        numbers = np.arange(len(self))[chosen]
        arrays = {key: select_clips(array, numbers) for key, array in self.arrays.items()}
        return replace(self, arrays=arrays, index=self.index[chosen])

    def lacking(self) -> dict[str, int]:
        """Number of clips that lack a modality, for the modalities that some clip lacks."""
        found = {name: int(np.count_nonzero(~self.has(name))) for name in self.modalities}
        return {name: count for name, count in found.items() if count}

    def has(self, name: str) -> np.ndarray:
        """(clips,) bool, the clips that have a modality."""
        length = self.arrays.get(f"{name}.length")
        return np.ones(len(self), bool) if length is None else np.asarray(length) > 0

    def having(self, name: str) -> ClipSet:
        """The clips that have a modality, features unread; these clips themselves if all have it."""
        there = self.has(name)
        return self if there.all() else self.select_unread(np.flatnonzero(there))

    def select_unread(self, numbers: np.ndarray) -> ClipSet:
        """Some of the clips, (n,) int64, in the order given, features unread."""
        unread = {name: LazyArray.of(self.arrays[name]) for name in self.modalities}
        return replace(self, arrays={**self.arrays, **unread}).select(numbers)

    def restrict(self, names: Iterable[str]) -> ClipSet:
        """The same clips with these modalities only, in this order.

        Raises:
            ValueError: a modality is unknown.
        """
        return replace(self, modalities=_named(self.modalities, names))


@dataclass(frozen=True)
class Batch:
    """B clips as tensors on the CPU.

    Attributes:
        features: per modality (B, T, ...) of the requested dtype, or stored half precision.
        mask: per modality (B, T) bool, True at valid positions.
        labels: (B, T, C+1) of that dtype for each labelled modality.
        target: (B,) int64 clip classes, or None without classes.
        clips: (B,) int64 clip numbers in their split.
        id: (B,) the clips' own names or numbers.
    """

    features: dict[str, Tensor]
    mask: dict[str, Tensor]
    labels: dict[str, Tensor]
    target: Tensor | None
    clips: np.ndarray
    id: np.ndarray

    def __len__(self) -> int:
        """Number of clips, B."""
        return len(self.clips)

    def to(self, device: torch.device | str, non_blocking: bool = False, dtype: torch.dtype | None = None) -> Batch:
        """The same batch with its tensors on another device; features are cast there."""
        moved = self._changed(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        features = {name: tensor.to(dtype or tensor.dtype) for name, tensor in moved.features.items()}
        return replace(moved, features=features)

    def pinned(self) -> Batch:
        """A copy in pinned memory, so that `to` can be asynchronous."""
        return self._changed(Tensor.pin_memory)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Batch:
        features, mask, labels = (
            {name: change(tensor) for name, tensor in tensors.items()}
            for tensors in (self.features, self.mask, self.labels)
        )
        return Batch(features, mask, labels, None if self.target is None else change(self.target), self.clips, self.id)


class BatchSource(Protocol):
    """Batches by global training step; `Batches` has random access, a stream is fastest in order."""

    dtype: torch.dtype

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in one epoch."""

    def size(self, step: int) -> int:
        """Number of clips of all ranks in the batch at this global step."""

    def batch(self, step: int, own: slice = slice(None), *, keep_halves: bool = False) -> Batch:
        """The batch at this global step, counted from 0 over all epochs, or only the rank's `own` clips."""

    def ids(self, step: int, batch: Batch) -> np.ndarray:
        """The clips' own names or numbers: of all ranks' clips, or for a stream of those in `batch`."""


class Batches:
    """Shuffled batches with random access by global training step.

    Every epoch has each clip once, in an order that depends on (seed, epoch) alone, so a run can resume at any step.
    The order comes from raw 64-bit draws of Philox and a stable sort; both are the same on every machine.

    Args:
        clips: clips to draw from.
        batch_size: B.
        seed: any integer >= 0.
        drop_last: omit the last, smaller batch of an epoch.
        dtype: of features and labels: float32 or float64, as torch dtype or by name.

    Raises:
        ValueError: there are fewer clips than one batch, or a size or seed is out of range.
        TypeError: another dtype.
    """

    def __init__(
        self,
        clips: ClipSet,
        batch_size: int,
        seed: int = 0,
        drop_last: bool = True,
        dtype: torch.dtype | str = torch.float32,
    ) -> None:
        check_batch_size(batch_size)
        dtype = checked_dtype(dtype)
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        if len(clips) < batch_size:
            raise ValueError(f"clips must be at least one batch of {batch_size}, got {len(clips)}")
        self.clips, self.batch_size, self.seed, self.drop_last, self.dtype = clips, batch_size, seed, drop_last, dtype
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in one epoch."""
        whole, rest = divmod(len(self.clips), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def indices(self, step: int) -> np.ndarray:
        """(B,) int64 indices into `clips` of the batch at this global step."""
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        epoch, place = divmod(step, self.steps_per_epoch)
        # Another thread may replace the attribute with its own epoch.
        order = self._order
        if order[0] != epoch:
            draws = np.random.Philox(np.random.SeedSequence([self.seed, epoch])).random_raw(len(self.clips))
            order = self._order = (epoch, np.argsort(draws, kind="stable"))
        return order[1][place * self.batch_size : (place + 1) * self.batch_size]

    def size(self, step: int) -> int:
        """Number of clips in the batch at this global step."""
        return len(self.indices(step))

    def ids(self, step: int, batch: Batch) -> np.ndarray:
        """(B,) the clips' own names or numbers, of the whole batch."""
        return np.asarray(self.clips.id[self.indices(step)])

    def batch(self, step: int, own: slice = slice(None), *, keep_halves: bool = False) -> Batch:
        """The batch at this global step, counted from 0 over all epochs, or only its `own` clips."""
        return gather(self.clips, self.indices(step)[own], self.dtype, keep_halves=keep_halves)


def gather(
    clips: ClipSet, indices: np.ndarray, dtype: torch.dtype | str = torch.float32, *, keep_halves: bool = False
) -> Batch:
    """The clips with these indices as one batch.

    Args:
        clips: clips to select from.
        indices: (B,) int64.
        dtype: of features and labels.
        keep_halves: keep features that are stored as float16 or bfloat16, to move half the bytes; the later cast to
            `dtype` is exact.
    """
    dtype = checked_dtype(dtype)
    lengths = {name: length[indices] for name, length in clips.lengths.items()}
    kept = (torch.float16, torch.bfloat16) if keep_halves else ()
    stored = {name: _stored(array, indices) for name, array in clips.features.items()}
    features = {name: tensor if tensor.dtype in kept else tensor.to(dtype) for name, tensor in stored.items()}
    mask = {
        name: torch.from_numpy(np.arange(features[name].shape[1]) < length[:, None])  # (B, T)
        for name, length in lengths.items()
    }
    labels = {name: _stored(array, indices).to(dtype) for name, array in clips.labels.items()}
    target = torch.from_numpy(np.array(clips.target[indices])) if "class" in clips.arrays else None
    return Batch(features, mask, labels, target, clips.index[indices], np.asarray(clips.id[indices]))


def _stored(array: ClipArray, indices: np.ndarray) -> Tensor:
    """A copy of some clips."""
    return array.tensor(indices) if isinstance(array, LazyArray) else as_tensor(array[indices])


def check_batch_size(batch_size: int) -> None:
    """Raise ValueError below 1."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


def checked_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """float32 or float64 as a torch dtype; another one is a TypeError."""
    dtypes = {"float32": torch.float32, "float64": torch.float64}
    name = str(dtype).removeprefix("torch.")
    if name not in dtypes:
        raise TypeError(f"dtype must be float32 or float64, got {dtype}")
    return dtypes[name]


class Dataset:
    """An opened data set.

    Args:
        path: its folder.
        name: its name.
        modalities: kind and shape of one position of each modality.
        classes: C class names.
        clip_sets: the clips of each split: one ClipSet if modalities are paired, else one ClipSet per modality.
        divided: other splits: for each ClipSet of the split "all", the numbers of its clips in that split.
        extra: additional entries of its writer.

    Attributes:
        splits: the names of the splits; the other attributes are as the arguments.
        preprocessor: how the features were computed from media, in the form of `media.Preprocessor.as_dict`; None if
            unknown.
        shares_batches: ranks share each batch. If False, each rank reads its own clips, and their order depends on the
            number of ranks.
    """

    shares_batches = True

    def __init__(  # noqa: PLR0913 - the fields of a data set
        self,
        path: Path,
        name: str,
        modalities: Mapping[str, Modality],
        classes: Sequence[str],
        clip_sets: Mapping[str, Sequence[ClipSet]],
        extra: Mapping[str, Any] | None = None,
        divided: Mapping[str, Sequence[np.ndarray]] | None = None,
    ) -> None:
        self.path, self.name = path, name
        self.preprocessor: dict[str, Any] | None = None
        self.modalities = dict(modalities)
        self.classes = list(classes)
        self.extra = dict(extra or {})
        self.divided = {split: tuple(numbers) for split, numbers in (divided or {}).items()}
        self._clip_sets = {split: tuple(sets) for split, sets in clip_sets.items()}
        for split, members in self.divided.items():
            pairs = zip(self._clip_sets[WHOLE], members, strict=True)
            chosen = (clips.select_unread(numbers) for clips, numbers in pairs)
            self._clip_sets[split] = tuple(replace(one, index=np.arange(len(one), dtype=np.int64)) for one in chosen)
        self.splits = list(self._clip_sets)

    def split(self, name: str) -> ClipSet:
        """The clips of one split with paired modalities.

        Raises:
            ValueError: the split is unknown, or its modalities are not paired.
        """
        clip_sets = self.clip_sets(name)
        if len(clip_sets) > 1:
            owners = " and ".join(", ".join(clips.modalities) for clips in clip_sets)
            raise ValueError(
                f"split must have paired modalities, got {name!r} of {self.name}, where {owners} have separate clips; "
                f"use clips({name!r}, modality)"
            )
        return clip_sets[0]

    def clips(self, split: str, modality: str) -> ClipSet:
        """The clips of a split with this modality.

        Raises:
            ValueError: the split is unknown, or has no clip with the modality.
        """
        clip_sets = self.clip_sets(split)
        for clips in clip_sets:
            if modality in clips.modalities:
                return clips
        there = [name for clips in clip_sets for name in clips.modalities]
        raise ValueError(f"modality must be one of {there} in split {split!r}, got {modality!r}")

    def clip_sets(self, split: str) -> tuple[ClipSet, ...]:
        """The ClipSets of a split; one if its modalities are paired.

        Raises:
            ValueError: the split is unknown.
        """
        if split not in self._clip_sets:
            raise ValueError(f"split must be one of {self.splits}, got {split!r}")
        return self._clip_sets[split]

    def shared(self, first: str, second: str) -> list[str]:
        """The names of clips in both splits; none if clips have only numbers, or a split is missing."""
        names: list[set[str]] = []
        for split in (first, second):
            clip_sets = self.clip_sets(split) if split in self.splits else ()
            named = [clips.id for clips in clip_sets if "id" in clips.arrays and clips.arrays["id"].dtype.kind == "U"]
            names.append({str(name) for ids in named for name in ids})
        return sorted(names[0] & names[1])

    def number(self, split: str) -> int:
        """Number of clips of a split, of its longest list if modalities are not paired.

        Raises:
            ValueError: the split is unknown.
        """
        return max(map(len, self.clip_sets(split)))

    def lacking(self, split: str) -> dict[str, int]:
        """Number of clips of a split that lack a modality, for the modalities that some clip lacks.

        Raises:
            ValueError: the split is unknown.
        """
        return {name: count for clips in self.clip_sets(split) for name, count in clips.lacking().items()}

    def batches(
        self,
        split: str,
        names: Iterable[str],
        batch_size: int,
        seed: int = 0,
        drop_last: bool = True,
        dtype: torch.dtype | str = torch.float32,
    ) -> BatchSource:
        """Shuffled batches of the paired clips of a split, with these modalities; other arguments as `Batches`."""
        return Batches(self.split(split).restrict(names), batch_size, seed, drop_last, dtype)

    def modalities_named(self, names: Iterable[str]) -> dict[str, Modality]:
        """Some of the modalities, in the order given.

        Raises:
            ValueError: a modality is unknown.
        """
        return _named(self.modalities, names)

    def digest(self) -> str:
        """A checksum of modalities, classes, shapes and the clips' names, which identifies the data set."""
        kinds = {name: [kind.kind, kind.shape] for name, kind in self.modalities.items()}
        lists = {
            split: [[{k: [v.shape, v.dtype.str] for k, v in clips.arrays.items()}, clips.id.tolist()] for clips in sets]
            for split, sets in self._clip_sets.items()
        }
        described = json.dumps([self.name, kinds, self.classes, lists])
        return hashlib.sha256(described.encode()).hexdigest()

    def has_digest(self, digest: str) -> bool:
        """Whether this is the digest of the data set."""
        return digest == self.digest()

    def __repr__(self) -> str:
        """Kind, name, folder and number of clips."""
        counts = ", ".join(
            f"{name}: {'+'.join(str(len(one)) for one in sets)}" for name, sets in self._clip_sets.items()
        )
        return f"{type(self).__name__}({self.name!r}, {str(self.path)!r}, {counts})"


def _named(modalities: Mapping[str, Modality], names: Iterable[str]) -> dict[str, Modality]:
    """Some of the modalities, in the order given."""
    chosen = list(names)
    unknown = [name for name in chosen if name not in modalities]
    if unknown:
        raise ValueError(f"modalities must be of the data set, such as {', '.join(modalities)}, got {unknown[0]!r}")
    return {name: modalities[name] for name in chosen}
