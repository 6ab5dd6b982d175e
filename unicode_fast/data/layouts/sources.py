"""Features where they lie: one array a clip, brought to one length, and the lists of clips that a layout names."""

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

# How clips get their number of steps: "repeat" cuts them or repeats their last row, "exact" takes no other number,
# "zeros" fills up with zeros, which lengths, where there are any, tell from features.
Fit = Literal["repeat", "exact", "zeros"]
_SHOWN_FILES = 12


@dataclass(frozen=True)
class Source:
    """The features of one modality, clip by clip as they lie on the disk.

    Attributes:
        where: what messages call each clip's features; its file's path, or key and number in an HDF5 file.
        read: from a clip's number, which `numbers` holds, to its array (steps, ...), however many steps it has.
        numbers: (clips,) int64, the number that `read` takes for each clip.
        steps: T, what every clip gets.
        fit: how it gets them.
        kind: of the modality; None tells vectors from grids by the number of axes.
        lengths: (clips,) int64 valid steps, where `fit` is "zeros"; None where the zeros count as steps.
        missing: (clips,) bool, the clips whose file is not there.
    """

    where: Sequence[str]
    read: Callable[[int], np.ndarray]
    numbers: np.ndarray
    steps: int
    fit: Fit
    kind: Kind | None = None
    lengths: ClipArray | None = None
    missing: np.ndarray | None = None

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.numbers)

    @property
    def absent(self) -> list[str]:
        """What the clips are called whose file is not there."""
        return [] if self.missing is None else [self.where[int(clip)] for clip in np.flatnonzero(self.missing)]

    def select(self, numbers: np.ndarray) -> Source:
        """Some clips in the order given."""
        return replace(
            self,
            where=[self.where[number] for number in numbers],
            numbers=self.numbers[numbers],
            lengths=None if self.lengths is None else select_clips(self.lengths, numbers),
            missing=None if self.missing is None else self.missing[numbers],
        )

    def raw(self, clip: int) -> np.ndarray:
        """The features of a clip as they are, (steps, ...) of any number of steps.

        Raises:
            StoreError: the file is damaged, or holds no floating-point features.
        """
        array = self.read(int(self.numbers[clip]))
        if array.dtype.name not in FEATURE_DTYPES or array.ndim not in (2, 4):
            raise StoreError(
                f"{self.where[clip]} must hold (steps, C) or (steps, H, W, C) features of {', '.join(FEATURE_DTYPES)}, "
                f"got {array.shape} {array.dtype}"
            )
        return array

    def fitted(self, clip: int) -> np.ndarray:
        """The features of a clip, (T, ...).

        Raises:
            StoreError: there are no steps, or not T where only T will do, or values that are not finite.
        """
        array = self.raw(clip)
        if len(array) == 0:
            raise StoreError(f"{self.where[clip]} must have at least one step, got shape {array.shape}")
        if self.fit == "exact" and len(array) != self.steps:
            raise StoreError(f"{self.where[clip]} must have {self.steps} steps, got shape {array.shape}")
        if not np.isfinite(array).all():
            raise StoreError(f"{self.where[clip]} must hold finite features, got NaN or infinite ones")
        short = self.steps - len(array)
        if short <= 0:
            return array[: self.steps]
        filling = np.repeat(array[-1:], short, 0) if self.fit == "repeat" else np.zeros((short, *array.shape[1:]))
        return np.concatenate([array, filling.astype(array.dtype)])

    def modality(self) -> Modality:
        """Kind and shape of one step, as the first clip shows them.

        Raises:
            StoreError: that clip cannot be read.
            OSError: that clip's file cannot be opened.
        """
        shape = self.raw(0).shape[1:]
        try:
            return Modality(self.kind or ("grid" if len(shape) == 3 else "vector"), shape)
        except ValueError as error:
            raise StoreError(f"{self.where[0]} must hold the features of a modality: {error}") from error

    def array(self, modality: Modality) -> LazyArray:
        """(clips, T, ...) float64, read when indexed; a clip of another shape than the modality's is an error then."""

        def read_clip(clip: int) -> np.ndarray:
            array = self.fitted(clip)
            if array.shape[1:] != modality.shape:
                raise StoreError(f"{self.where[clip]} must have steps of shape {modality.shape}, got {array.shape[1:]}")
            return array

        return LazyArray.by_clip((len(self), self.steps, *modality.shape), np.float64, read_clip)


@dataclass(frozen=True)
class Part:
    """Clips with all their modalities.

    Attributes:
        sources: features by modality.
        arrays: what else there is of each clip: "id", "class", "<modality>.label" and other keys.
    """

    sources: Mapping[str, Source]
    arrays: Mapping[str, ClipArray]

    def __len__(self) -> int:
        """Number of clips."""
        return len(next(iter({**self.arrays, **self.sources}.values())))

    def select(self, chosen: np.ndarray) -> Part:
        """Some clips: (clips,) bool, or (n,) int64 in the order given."""
        numbers = np.arange(len(self))[chosen]
        sources = {name: source.select(numbers) for name, source in self.sources.items()}
        return Part(sources, {key: select_clips(array, numbers) for key, array in self.arrays.items()})


@dataclass(frozen=True)
class Note:
    """Something about a data set that its user must know.

    Attributes:
        kind: one word.
        text: what it is.
        bad: training must not start.
    """

    kind: str
    text: str
    bad: bool


@dataclass(frozen=True)
class Listing:
    """What a layout says is there, before any feature is read.

    Attributes:
        name: of the layout.
        root: its folder.
        classes: C names.
        lists: for each split one list of paired clips, or one for each modality.
        divided: further splits, for each list of the split "all" the clips that they take of it, (clips,) bool.
        missing: files beside the features that clips need and that are not there.
        notes: on its lists.
        table: file that lists the clips, for messages.
    """

    name: str
    root: Path
    classes: list[str]
    lists: Mapping[str, Sequence[Part]]
    divided: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    table: str = "its lists"

    @functools.cached_property
    def parts(self) -> dict[str, list[Part]]:
        """The lists of every split."""
        chosen = {
            split: [part.select(clips) for part, clips in zip(self.lists[WHOLE], members, strict=True)]
            for split, members in self.divided.items()
        }
        return {**{split: list(parts) for split, parts in self.lists.items()}, **chosen}

    def open(self) -> Dataset:
        """The data set; the first clip of each modality is read for its shape.

        Raises:
            StoreError: a split has no clips, or the first clip cannot be read.
            FileNotFoundError: feature files are missing; the message names them.
        """
        for split, parts in self.parts.items():
            if any(len(part) == 0 for part in parts):
                raise StoreError(f"split {split!r} of {self.root} must hold at least one clip, got none")
        self._check_files()
        modalities: dict[str, Modality] = {}
        opened: dict[str, list[ClipSet]] = {}
        for split, listed in self.lists.items():
            for part in listed:
                arrays = dict(part.arrays)
                for name, source in part.sources.items():
                    if name not in modalities:
                        modalities[name] = source.modality()
                    arrays[name] = source.array(modalities[name])
                    if source.lengths is not None:
                        arrays[f"{name}.length"] = source.lengths
                own = {name: modalities[name] for name in part.sources}
                index = np.arange(len(part), dtype=np.int64)
                opened.setdefault(split, []).append(ClipSet(arrays, own, self.classes, index))
        numbers = {split: [np.flatnonzero(clips) for clips in those] for split, those in self.divided.items()}
        return Dataset(self.root, self.name, modalities, self.classes, opened, divided=numbers)

    def _check_files(self) -> None:
        missing = dict.fromkeys(self.missing)
        for parts in self.lists.values():
            for source in (source for part in parts for source in part.sources.values()):
                missing.update(dict.fromkeys(source.absent))
        if missing:
            shown = ", ".join(list(missing)[:_SHOWN_FILES])
            more = len(missing) - _SHOWN_FILES
            rest = f", and {more} more, which `python -m unicode_fast.data check` lists" if more > 0 else ""
            raise FileNotFoundError(
                f"{str(self.root)!r} must hold a file for each clip of {self.table}, missing are {shown}{rest}"
            )
