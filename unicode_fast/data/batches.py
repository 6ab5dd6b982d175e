"""Batches of clips as tensors: a shuffled order that depends on the seed and the step alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from unicode_fast.data.lazy import ClipArray, LazyArray, as_tensor

if TYPE_CHECKING:
    from unicode_fast.data.dataset import ClipSet


@dataclass(frozen=True)
class Batch:
    """B clips as tensors on the CPU.

    Attributes:
        features: per modality (B, T, ...) of the dtype asked for, or halves where they were kept.
        mask: per modality (B, T) bool, True at the valid steps.
        labels: (B, T, C+1) of that dtype for each modality that has labels.
        target: (B,) int64 clip classes, or None where the clips have none.
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
        """The same batch with its tensors on another device, where the features get the dtype."""

        def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in tensors.items()}

        features = {name: tensor.to(dtype or tensor.dtype) for name, tensor in moved(self.features).items()}
        target = None if self.target is None else self.target.to(device, non_blocking=non_blocking)
        return Batch(features, moved(self.mask), moved(self.labels), target, self.clips, self.id)

    def pinned(self) -> Batch:
        """A copy in memory that a GPU reads by itself, so that `to` need not wait."""

        def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.pin_memory() for name, tensor in tensors.items()}

        target = None if self.target is None else self.target.pin_memory()
        return Batch(copied(self.features), copied(self.mask), copied(self.labels), target, self.clips, self.id)


class BatchSource(Protocol):
    """Batches by global step; `Batches` has them in any order, a stream best in theirs."""

    dtype: torch.dtype

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in one epoch."""

    def size(self, step: int) -> int:
        """Number of clips in the batch at this global step, those of all ranks."""

    def batch(self, step: int, own: slice = slice(None), *, keep_halves: bool = False) -> Batch:
        """The batch at this global step, counted from 0 over all epochs, or only the clips that a rank owns."""

    def ids(self, step: int, batch: Batch) -> np.ndarray:
        """The clips' own names or numbers, of all ranks where they are known, else those in `batch`."""


class Batches:
    """Shuffled batches with random access by global step.

    Every epoch visits each clip once, in an order that depends on (seed, epoch) alone, so a run that resumes at step s
    needs nothing but s. The order comes from raw 64-bit draws of Philox and a stable sort; both are the same on every
    machine.

    Args:
        clips: what to draw from.
        batch_size: B.
        seed: any integer >= 0.
        drop_last: leave out the last, smaller batch of an epoch.
        dtype: of features and labels: float32 or float64, as torch dtype or by name.

    Raises:
        ValueError: there are fewer clips than one batch, or a size or seed is out of range.
        TypeError: the dtype is another one.
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
        """(B,) int64 positions in `clips` of the batch at this global step."""
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        epoch, place = divmod(step, self.steps_per_epoch)
        # Threads that read other epochs may replace the attribute meanwhile.
        order = self._order
        if order[0] != epoch:
            draws = np.random.Philox(np.random.SeedSequence([self.seed, epoch])).random_raw(len(self.clips))
            order = self._order = (epoch, np.argsort(draws, kind="stable"))
        return order[1][place * self.batch_size : (place + 1) * self.batch_size]

    def size(self, step: int) -> int:
        """Number of clips in the batch at this global step."""
        return len(self.indices(step))

    def ids(self, step: int, batch: Batch) -> np.ndarray:
        """(B,) the clips' own names or numbers; those of the whole batch, whatever part of it was read."""
        return np.asarray(self.clips.id[self.indices(step)])

    def batch(self, step: int, own: slice = slice(None), *, keep_halves: bool = False) -> Batch:
        """The batch at this global step, counted from 0 over all epochs, or only its `own` clips."""
        return gather(self.clips, self.indices(step)[own], self.dtype, keep_halves=keep_halves)


def gather(
    clips: ClipSet, indices: np.ndarray, dtype: torch.dtype | str = torch.float32, *, keep_halves: bool = False
) -> Batch:
    """The clips at these positions as one batch.

    Args:
        clips: of which they are some.
        indices: (B,) int64.
        dtype: of features and labels.
        keep_halves: leave features that are stored as float16 or bfloat16 as they are, half the bytes to move; the
            change to `dtype` is exact wherever it is made.
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


def iterate(clips: ClipSet, batch_size: int, dtype: torch.dtype | str = torch.float32) -> Iterator[Batch]:
    """All clips in their order, the last batch as large as what is left.

    Args:
        clips: at least one.
        batch_size: B.
        dtype: of features and labels: float32 or float64, as torch dtype or by name.

    Raises:
        ValueError: there are no clips, or the size is below 1.
        TypeError: the dtype is another one.
    """
    check_batch_size(batch_size)
    dtype = checked_dtype(dtype)
    if len(clips) == 0:
        raise ValueError("clips must be at least one, got none")
    starts = range(0, len(clips), batch_size)
    return (gather(clips, np.arange(start, min(start + batch_size, len(clips))), dtype) for start in starts)


def _stored(array: ClipArray, indices: np.ndarray) -> Tensor:
    """Some clips of an array, a copy."""
    return array.tensor(indices) if isinstance(array, LazyArray) else as_tensor(array[indices])


def check_batch_size(batch_size: int) -> None:
    """Raise ValueError where it is below 1."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


def checked_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """float32 or float64 as a torch dtype; another one is a TypeError."""
    known = {"float32": torch.float32, "float64": torch.float64}
    name = str(dtype).removeprefix("torch.")
    if name not in known:
        raise TypeError(f"dtype must be float32 or float64, got {dtype}")
    return known[name]
