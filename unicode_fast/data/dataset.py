"""What the rest of the package sees of any data set: its splits, and in each the clips that have a modality."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from unicode_fast.config import Modality
from unicode_fast.data.batches import Batches, BatchSource
from unicode_fast.data.lazy import ClipArray, LazyArray, select_clips
from unicode_fast.data.store.checks import StoreError

# The split that others divide.
WHOLE = "all"


@dataclass(frozen=True)
class ClipSet:
    """Clips of one split, one array per modality.

    Attributes:
        arrays: everything there is for these clips, by key; clips first. Features may be a `LazyArray`, which reads
            the clips it is indexed with.
        modalities: the modalities in use, in order, with the shape of one time step.
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
        """Per modality (clips, T, ...) floating point; memory-mapped or a LazyArray, which is indexed the same way."""
        return {name: cast(np.ndarray, self.arrays[name]) for name in self.modalities}

    @property
    def mask(self) -> dict[str, np.ndarray]:
        """Per modality (clips, T) bool, True at the valid steps; all True where there are no lengths."""
        return {name: self._mask(name) for name in self.modalities}

    @property
    def lengths(self) -> dict[str, np.ndarray]:
        """Per modality (clips,) int64, the number of valid steps."""
        return {name: self._lengths(name) for name in self.modalities}

    @property
    def labels(self) -> dict[str, np.ndarray]:
        """(clips, T, C+1) uint8 or float32, background last, for each modality that has them."""
        owners = [name for name in self.modalities if f"{name}.label" in self.arrays]
        return {name: cast(np.ndarray, self.arrays[f"{name}.label"]) for name in owners}

    @property
    def target(self) -> np.ndarray:
        """(clips,) int64 class of each clip.

        Raises:
            StoreError: there are no clip classes.
        """
        if "class" not in self.arrays:
            raise StoreError(f"clips must have an array 'class' to give targets, got keys {sorted(self.arrays)}")
        return np.asarray(self.arrays["class"])

    @property
    def id(self) -> np.ndarray:
        """(clips,) the clips' own names or numbers; their numbers in the split where they have none."""
        return np.asarray(self.arrays.get("id", self.index))

    def select(self, indices: Sequence[int] | np.ndarray) -> ClipSet:
        """Some of the clips, in the order given.

        Args:
            indices: (n,) numbers in [0, len), or (len,) bool.

        Returns:
            A ClipSet whose arrays are copies in memory, or lazy arrays where they were lazy.

        Raises:
            IndexError: a number is outside.
        """
        chosen = np.asarray(indices)
        if chosen.dtype != bool:
            chosen = chosen.astype(np.int64)
            if len(chosen) and (chosen.min() < 0 or chosen.max() >= len(self)):
                raise IndexError(f"indices must lie in [0, {len(self)}), got {chosen.min()} to {chosen.max()}")
        numbers = np.arange(len(self))[chosen]
        arrays = {key: select_clips(array, numbers) for key, array in self.arrays.items()}
        return replace(self, arrays=arrays, index=self.index[chosen])

    def restrict(self, names: Iterable[str]) -> ClipSet:
        """The same clips with these modalities only, in this order.

        Raises:
            ValueError: a modality is unknown.
        """
        return replace(self, modalities=_named(self.modalities, names))

    def _lengths(self, name: str) -> np.ndarray:
        steps = self.arrays[name].shape[1]
        return np.asarray(self.arrays.get(f"{name}.length", np.full(len(self), steps, np.int64)))

    def _mask(self, name: str) -> np.ndarray:
        return np.arange(self.arrays[name].shape[1]) < self._lengths(name)[:, None]


class Dataset:
    """An opened data set.

    Args:
        path: where it lies.
        name: what people call it.
        modalities: kind and shape of one time step of each modality.
        classes: C class names.
        parts: for each split its clips: one set where all modalities of a clip are paired, else one for each list of
            clips that a modality has.
        divided: further splits, for each list of the split "all" the numbers of the clips that they take of it.
        extra: what its writer added.

    Attributes:
        splits: the names of the splits; the other attributes are as the arguments.
        shares_batches: ranks share each batch; where False each reads clips of its own, and the order of all depends on
            the number of ranks.
    """

    shares_batches = True

    def __init__(  # noqa: PLR0913 - the record of a data set
        self,
        path: Path,
        name: str,
        modalities: Mapping[str, Modality],
        classes: Sequence[str],
        parts: Mapping[str, Sequence[ClipSet]],
        extra: Mapping[str, Any] | None = None,
        divided: Mapping[str, Sequence[np.ndarray]] | None = None,
    ) -> None:
        self.path, self.name = path, name
        self.modalities = dict(modalities)
        self.classes = list(classes)
        self.extra = dict(extra or {})
        self.divided = {split: tuple(numbers) for split, numbers in (divided or {}).items()}
        self._parts = {split: tuple(sets) for split, sets in parts.items()}
        for split, members in self.divided.items():
            pairs = zip(self._parts[WHOLE], members, strict=True)
            self._parts[split] = tuple(_taken(part, numbers) for part, numbers in pairs)
        self.splits = list(self._parts)

    def split(self, name: str) -> ClipSet:
        """The clips of one split, whose modalities are paired.

        Raises:
            ValueError: there is no such split, or each modality has clips of its own in it.
        """
        parts = self.parts(name)
        if len(parts) > 1:
            owners = " and ".join(", ".join(part.modalities) for part in parts)
            raise ValueError(
                f"split must be one whose clips have all modalities, got {name!r} of {self.name}, where {owners} have "
                f"clips of their own; clips({name!r}, modality) gives those"
            )
        return parts[0]

    def clips(self, split: str, modality: str) -> ClipSet:
        """The clips of a split that have a modality.

        Raises:
            ValueError: there is no such split, or no clip in it has the modality.
        """
        parts = self.parts(split)
        for part in parts:
            if modality in part.modalities:
                return part
        there = [name for part in parts for name in part.modalities]
        raise ValueError(f"modality must be one of {there} in split {split!r}, got {modality!r}")

    def parts(self, split: str) -> tuple[ClipSet, ...]:
        """The lists of clips of a split, one where the modalities are paired.

        Raises:
            ValueError: there is no such split.
        """
        if split not in self._parts:
            raise ValueError(f"split must be one of {self.splits}, got {split!r}")
        return self._parts[split]

    def shared(self, first: str, second: str) -> list[str]:
        """The names of clips that two splits have both; none where clips have numbers alone, or a split is missing."""
        names: list[set[str]] = []
        for split in (first, second):
            parts = self.parts(split) if split in self.splits else ()
            named = [part.id for part in parts if "id" in part.arrays and part.arrays["id"].dtype.kind == "U"]
            names.append({str(name) for ids in named for name in ids})
        return sorted(names[0] & names[1])

    def batches(
        self,
        split: str,
        names: Iterable[str],
        batch_size: int,
        seed: int = 0,
        drop_last: bool = True,
        dtype: torch.dtype | str = torch.float32,
    ) -> BatchSource:
        """Shuffled batches of the paired clips of a split, with these modalities; the others are as `Batches` says."""
        return Batches(self.split(split).restrict(names), batch_size, seed, drop_last, dtype)

    def modalities_named(self, names: Iterable[str]) -> dict[str, Modality]:
        """Some of the modalities, in the order given.

        Raises:
            ValueError: a modality is unknown.
        """
        return _named(self.modalities, names)

    def digest(self) -> str:
        """What tells one data set from another: a checksum of modalities, classes, shapes and the clips' names."""
        kinds = {name: [kind.kind, kind.shape] for name, kind in self.modalities.items()}
        lists = {
            split: [[{k: [v.shape, v.dtype.str] for k, v in part.arrays.items()}, part.id.tolist()] for part in parts]
            for split, parts in self._parts.items()
        }
        described = json.dumps([self.name, kinds, self.classes, lists])
        return hashlib.sha256(described.encode()).hexdigest()

    def has_digest(self, digest: str) -> bool:
        """Whether this is the digest of the data set."""
        return digest == self.digest()

    def __repr__(self) -> str:
        """Kind, name, folder and number of clips."""
        counts = ", ".join(f"{split}: {'+'.join(str(len(p)) for p in parts)}" for split, parts in self._parts.items())
        return f"{type(self).__name__}({self.name!r}, {str(self.path)!r}, {counts})"


def _named(modalities: Mapping[str, Modality], names: Iterable[str]) -> dict[str, Modality]:
    """Some of the modalities, in the order given."""
    wanted = list(names)
    unknown = [name for name in wanted if name not in modalities]
    if unknown:
        raise ValueError(f"modalities must be among {list(modalities)}, got {unknown[0]!r}")
    return {name: modalities[name] for name in wanted}


def _taken(part: ClipSet, numbers: np.ndarray) -> ClipSet:
    """Some clips as a list of their own, its features unread."""
    unread = {name: LazyArray.of(part.arrays[name]) for name in part.modalities}
    chosen = replace(part, arrays={**part.arrays, **unread}).select(numbers)
    return replace(chosen, index=np.arange(len(numbers), dtype=np.int64))
