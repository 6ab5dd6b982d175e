"""The index of a layout: its clips, and their features in the original files, brought to one length."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from unicode_fast.config import Kind, Modality
from unicode_fast.data.dataset import WHOLE, ClipSet, Dataset
from unicode_fast.data.lazy import ClipArray, LazyArray, select_clips
from unicode_fast.data.store.checks import FEATURE_DTYPES, StoreError

# How clips get T positions: "repeat" cuts them or repeats the last row, "exact" accepts no other number, and "zeros"
# pads with zeros. Lengths, if given, mark the padding as invalid.
Fit = Literal["repeat", "exact", "zeros"]
_SHOWN_FILES = 12


@dataclass(frozen=True)
class FeatureFiles:
    """The features of one modality, read from disk clip by clip.

    Attributes:
        where: name of each clip's features for messages: path of its file, or key and number in an HDF5 file.
        read: from an entry of `numbers` to the clip's array (positions, ...), before `fit`.
        numbers: (clips,) int64, the argument of `read` for each clip.
        positions: T, the number of positions of every clip.
        fit: how clips get T positions.
        kind: kind of the modality; None means vector or grid, by the number of axes.
        lengths: (clips,) int64 valid positions, if `fit` is "zeros"; None if padding counts as valid.
        missing: (clips,) bool, the clips without a file.
        without: (clips,) bool, the clips that lack the modality and need no file; None for none.
    """

    where: Sequence[str]
    read: Callable[[int], np.ndarray]
    numbers: np.ndarray
    positions: int
    fit: Fit
    kind: Kind | None = None
    lengths: ClipArray | None = None
    missing: np.ndarray | None = None
    without: np.ndarray | None = None

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.numbers)

    @property
    def absent(self) -> list[str]:
        """Names of the clips without a file."""
        return [] if self.missing is None else [self.where[int(clip)] for clip in np.flatnonzero(self.missing)]

    def select(self, numbers: np.ndarray) -> FeatureFiles:
        """Some clips in the order given."""
        return replace(
            self,
            where=[self.where[number] for number in numbers],
            numbers=self.numbers[numbers],
            lengths=None if self.lengths is None else select_clips(self.lengths, numbers),
            missing=None if self.missing is None else self.missing[numbers],
            without=None if self.without is None else self.without[numbers],
        )

    def has(self, clip: int) -> bool:
        """Whether a clip has the modality."""
        return self.without is None or not self.without[clip]

    def raw(self, clip: int) -> np.ndarray:
        """The features of a clip as stored, (positions, ...).

        Raises:
            StoreError: the file is damaged, or holds no floating-point features.
        """
        array = self.read(int(self.numbers[clip]))
        if array.dtype.name not in FEATURE_DTYPES or array.ndim not in (2, 4):
            raise StoreError(
                f"{self.where[clip]} must hold (T, C) or (T, H, W, C) features of {', '.join(FEATURE_DTYPES)}, "
                f"got {array.shape} {array.dtype}"
            )
        return array

    def fitted(self, clip: int) -> np.ndarray:
        """The features of a clip, (T, ...).

        Raises:
            StoreError: a clip has no positions, not exactly T if `fit` is "exact", or values that are not finite.
        """
        array = self.raw(clip)
        if len(array) == 0:
            raise StoreError(f"{self.where[clip]} must have at least one position, got shape {array.shape}")
        if self.fit == "exact" and len(array) != self.positions:
            raise StoreError(f"{self.where[clip]} must have {self.positions} positions, got shape {array.shape}")
        if not np.isfinite(array).all():
            raise StoreError(f"{self.where[clip]} must hold finite features, got NaN or infinite values")
        short = self.positions - len(array)
        if short <= 0:
            return array[: self.positions]
        filling = np.repeat(array[-1:], short, 0) if self.fit == "repeat" else np.zeros((short, *array.shape[1:]))
        return np.concatenate([array, filling.astype(array.dtype)])

    def first(self) -> int | None:
        """The first clip that has the modality; None if none has."""
        return next((clip for clip in range(len(self)) if self.has(clip)), None)

    def modality(self, clip: int) -> Modality:
        """Kind and shape of one position, from a clip that has the modality.

        Raises:
            StoreError: that clip cannot be read.
            OSError: its file cannot be opened.
        """
        shape = self.raw(clip).shape[1:]
        try:
            return Modality(self.kind or ("grid" if len(shape) == 3 else "vector"), shape)
        except ValueError as error:
            raise StoreError(f"{self.where[clip]} must hold the features of a modality: {error}") from error

    def array(self, modality: Modality) -> LazyArray:
        """(clips, T, ...) float64, zeros for a clip that lacks the modality, read when indexed.

        Reading a clip of another shape raises StoreError.
        """

        def read_clip(clip: int) -> np.ndarray:
            if not self.has(clip):
                return np.zeros((self.positions, *modality.shape))
            array = self.fitted(clip)
            if array.shape[1:] != modality.shape:
                shape, first = ", ".join(map(str, ("T", *modality.shape))), self.where[self.first() or 0]
                raise StoreError(f"{self.where[clip]} must have shape ({shape}) like {first}, got {array.shape}")
            return array

        return LazyArray.by_clip((len(self), self.positions, *modality.shape), np.float64, read_clip)


@dataclass(frozen=True)
class ClipTable:
    """Some clips of a layout: features of their modalities, and their other arrays.

    Attributes:
        features: feature files by modality.
        arrays: other arrays, clips first: "id", "class", "<modality>.label" and other keys.
    """

    features: Mapping[str, FeatureFiles]
    arrays: Mapping[str, ClipArray]

    def __len__(self) -> int:
        """Number of clips."""
        return len(next(iter({**self.arrays, **self.features}.values())))

    def select(self, chosen: np.ndarray) -> ClipTable:
        """Some clips: (clips,) bool, or (n,) int64 in the order given."""
        numbers = np.arange(len(self))[chosen]
        features = {name: features.select(numbers) for name, features in self.features.items()}
        return ClipTable(features, {key: select_clips(array, numbers) for key, array in self.arrays.items()})


@dataclass(frozen=True)
class Note:
    """A remark on a data set for its user.

    Attributes:
        kind: one or two words.
        text: the remark.
        bad: training must not start.
    """

    kind: str
    text: str
    bad: bool


@dataclass(frozen=True)
class DatasetIndex:
    """The clips of a layout, before any feature is read.

    Attributes:
        name: name of the layout.
        root: its folder.
        classes: C names.
        lists: for each split one table of paired clips, or one per modality.
        divided: other splits: for each table of the split "all", the clips in that split, (clips,) bool.
        missing: missing files other than features.
        notes: remarks on its lists.
        list_file: name of the file that lists the clips, for messages.
    """

    name: str
    root: Path
    classes: list[str]
    lists: Mapping[str, Sequence[ClipTable]]
    divided: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    list_file: str = "its lists"

    @functools.cached_property
    def tables(self) -> dict[str, list[ClipTable]]:
        """The tables of every split."""
        chosen = {
            split: [table.select(clips) for table, clips in zip(self.lists[WHOLE], members, strict=True)]
            for split, members in self.divided.items()
        }
        return {**{split: list(tables) for split, tables in self.lists.items()}, **chosen}

    def open(self) -> Dataset:
        """Open the data set; the first clip of each modality is read for its shape.

        Raises:
            StoreError: a split has no clips, no clip has a modality, or the first clip cannot be read.
            FileNotFoundError: feature files are missing; the message names them.
        """
        for split, tables in self.tables.items():
            if any(len(table) == 0 for table in tables):
                raise StoreError(f"split {split!r} of {self.root} must hold at least one clip, got none")
        self._check_files()
        modalities = self._modalities()
        opened: dict[str, list[ClipSet]] = {}
        for split, listed in self.lists.items():
            for table in listed:
                arrays = dict(table.arrays)
                for name, features in table.features.items():
                    arrays[name] = features.array(modalities[name])
                    if features.lengths is not None:
                        arrays[f"{name}.length"] = features.lengths
                own = {name: modalities[name] for name in table.features}
                index = np.arange(len(table), dtype=np.int64)
                opened.setdefault(split, []).append(ClipSet(arrays, own, self.classes, index))
        numbers = {split: [np.flatnonzero(clips) for clips in those] for split, those in self.divided.items()}
        return Dataset(self.root, self.name, modalities, self.classes, opened, divided=numbers)

    def _modalities(self) -> dict[str, Modality]:
        """The modalities in the order of the lists."""
        found: dict[str, Modality | None] = {}
        for table in (table for tables in self.lists.values() for table in tables):
            for name, features in table.features.items():
                if found.setdefault(name, None) is None and (clip := features.first()) is not None:
                    found[name] = features.modality(clip)
        for name, modality in found.items():
            if modality is None:
                raise StoreError(f"{name!r} of {self.root} must be a modality of at least one clip, got none")
        return {name: modality for name, modality in found.items() if modality is not None}

    def _check_files(self) -> None:
        missing = dict.fromkeys(self.missing)
        for tables in self.lists.values():
            for features in (features for table in tables for features in table.features.values()):
                missing.update(dict.fromkeys(features.absent))
        if missing:
            shown = ", ".join(list(missing)[:_SHOWN_FILES])
            more = len(missing) - _SHOWN_FILES
            rest = f", and {more} more, which `python -m unicode_fast.data check` lists" if more > 0 else ""
            raise FileNotFoundError(
                f"{str(self.root)!r} must hold a file for each clip of {self.list_file}, missing are {shown}{rest}"
            )
