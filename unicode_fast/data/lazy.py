"""Arrays whose clips are read from disk when they are indexed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor


class LazyArray:
    """Clips that are read when they are indexed; replaces a NumPy array of clips.

    `array[indices]`, with int64 numbers, bool, a slice, or one number, is an np.ndarray. `np.asarray(array)` reads all.
    `array.tensor(numbers)` returns clips in their stored dtype.

    Args:
        shape: (clips, ...).
        dtype: dtype of the result.
        read: from (n,) int64 numbers in [0, clips) to (n, ...) of that dtype; for float32 also a bfloat16 tensor.
        mapped: `read` only copies from memory-mapped files.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: Any,
        read: Callable[[np.ndarray], np.ndarray | Tensor],
        mapped: bool = False,
    ) -> None:
        self.shape, self.dtype, self.mapped = tuple(shape), np.dtype(dtype), mapped
        self._read = read

    @classmethod
    def by_clip(cls, shape: tuple[int, ...], dtype: Any, read_clip: Callable[[int], np.ndarray]) -> LazyArray:
        """An array whose clips are read one by one, each of shape `shape[1:]`."""

        def read(numbers: np.ndarray) -> np.ndarray:
            found = np.empty((len(numbers), *shape[1:]), dtype)
            for place, number in enumerate(numbers):
                found[place] = read_clip(int(number))
            return found

        return cls(shape, dtype, read)

    @classmethod
    def of(cls, array: ClipArray) -> LazyArray:
        """The same array; a memory-mapped array is read when it is indexed."""
        if isinstance(array, LazyArray):
            return array
        mapped = array
        return cls(mapped.shape, mapped.dtype, lambda numbers: np.asarray(mapped[numbers]), mapped=True)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __len__(self) -> int:
        """Number of clips."""
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        """Some clips; one number gives one clip without the axis of clips."""
        numbers = np.arange(len(self))[key]
        found = self._read(numbers if numbers.ndim else numbers[None])
        if isinstance(found, Tensor):
            found = (found.float() if found.dtype == torch.bfloat16 else found).numpy()
        return found if numbers.ndim else found[0]

    def tensor(self, numbers: np.ndarray) -> Tensor:
        """Some clips in their stored dtype, including bfloat16.

        Args:
            numbers: (n,) int64 in [0, clips).
        """
        found = self._read(numbers)
        return found if isinstance(found, Tensor) else as_tensor(found)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All clips, in memory."""
        if copy is False:
            raise ValueError("copy must be True or None for an array that is read from files, got False")
        return self[:] if dtype is None else self[:].astype(dtype)

    def select(self, numbers: np.ndarray) -> LazyArray:
        """Some clips in the order given, still unread."""
        shape = (len(numbers), *self.shape[1:])
        return LazyArray(shape, self.dtype, lambda chosen: self._read(numbers[chosen]), self.mapped)

    def __repr__(self) -> str:
        """Shape and dtype."""
        return f"LazyArray({self.shape}, {self.dtype})"


ClipArray: TypeAlias = np.ndarray | LazyArray


def as_tensor(array: np.ndarray) -> Tensor:
    """The array as a tensor: shared memory if the array is writable and contiguous, else a copy."""
    return torch.from_numpy(np.require(array, requirements=("C", "W")))


def select_clips(array: ClipArray, numbers: np.ndarray) -> ClipArray:
    """Some clips in the order given: a copy in memory, or a lazy array of them.

    Args:
        array: clips first.
        numbers: (n,) int64.
    """
    return array.select(numbers) if isinstance(array, LazyArray) else np.asarray(array[numbers])
