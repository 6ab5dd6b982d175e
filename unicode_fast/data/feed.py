"""How batches get from a store to the device that trains: one after the other, read ahead, or resident there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unicode_fast.data.batches import Batch, Batches, BatchSource, gather

Own = Callable[[int], slice]
FeedKind = Literal["auto", "resident", "prefetch", "direct"]
# The share of a GPU's free memory that resident clips may take; the rest is for the model and its activations.
RESIDENT_SHARE = 0.6
# Clips that are read at once while a split becomes resident.
PIECE = 256


class FeedError(RuntimeError):
    """A batch could not be read; the message names the step, and the cause is chained."""


class Feed:
    """Batches by global step, read and copied when they are asked for.

    The other feeds give the same batches in the same order: what a batch holds depends on its step alone.

    Args:
        batches: what is read.
        device: where features and masks go.
        own: of a number of clips in a batch, those that are wanted; None for all.
    """

    def __init__(self, batches: BatchSource, device: torch.device, own: Own | None = None) -> None:
        self.batches, self.device = batches, device
        self.own: Own = own or slice

    def batch(self, step: int) -> Batch:
        """The batch of this global step, on the device.

        Raises:
            FeedError: it could not be read.
        """
        try:
            return self.read(step).to(self.device)
        except Exception as error:
            raise _unreadable(step, error) from error

    def read(self, step: int) -> Batch:
        """The same on the CPU."""
        return self.batches.batch(step, self.own(self.batches.size(step)))

    def close(self) -> None:
        """Ends all threads; the feed cannot be used afterwards."""

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.close()


class ResidentFeed(Feed):
    """All clips of the split on the device, read once; a batch is a selection there.

    Args:
        batches: what is read.
        device: where the clips stay.
        own: as for every feed; all clips are resident nevertheless, as each may be wanted some time.

    Raises:
        FeedError: clips could not be read, or the device has too little memory.
    """

    def __init__(self, batches: Batches, device: torch.device, own: Own | None = None) -> None:
        super().__init__(batches, device, own)
        self.whole = batches
        clips, dtype = batches.clips, batches.dtype
        self.features: dict[str, Tensor] = {}
        self.mask: dict[str, Tensor] = {}
        try:
            for start in range(0, len(clips), PIECE):
                positions = np.arange(start, min(start + PIECE, len(clips)))
                piece = gather(clips, positions, dtype)
                for kept, read in ((self.features, piece.features), (self.mask, piece.mask)):
                    for name, tensor in read.items():
                        if start == 0:
                            kept[name] = tensor.new_empty((len(clips), *tensor.shape[1:]), device=device)
                        kept[name][start : start + len(positions)] = tensor
        except Exception as error:
            raise FeedError(
                f"feed 'resident' could not put {len(clips)} clips on {device}: {error}; take --feed prefetch"
            ) from error

    def batch(self, step: int) -> Batch:
        """The batch of this global step; features and masks only, which is what a training step reads."""
        indices = self.whole.indices(step)
        indices = indices[self.own(len(indices))]
        chosen = torch.from_numpy(np.ascontiguousarray(indices))
        if self.device.type == "cuda":
            chosen = chosen.pin_memory().to(self.device, non_blocking=True)

        def selected(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.index_select(0, chosen) for name, tensor in tensors.items()}

        clips = self.whole.clips
        return Batch(
            selected(self.features), selected(self.mask), {}, None, clips.index[indices], np.asarray(clips.id[indices])
        )


class _Ahead(NamedTuple):
    """A batch that a worker reads: its step, and the batch with the event that says when it is on the device."""

    step: int
    future: Future[tuple[Batch, torch.cuda.Event | None]]


class PrefetchFeed(Feed):
    """Batches that worker threads read ahead, into pinned memory and over a stream of their own where there is CUDA.

    Threads, as reading is copying memory, reading files and inflating them, which let other threads run meanwhile.

    Args:
        batches: what is read; its `batch` is called by several threads at once.
        device: where features and masks go.
        own: as for every feed.
        workers: threads; twice as many batches are under way.
        end: the step after the last one that will be asked for; None for no end.
    """

    def __init__(
        self,
        batches: BatchSource,
        device: torch.device,
        own: Own | None = None,
        *,
        workers: int,
        end: int | None = None,
    ) -> None:
        super().__init__(batches, device, own)
        self.depth, self.end = 2 * workers, end
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ahead: deque[_Ahead] = deque()
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="feed")

    def batch(self, step: int) -> Batch:
        """The batch of this global step; those after it are read meanwhile."""
        if not self.ahead or self.ahead[0].step != step:
            self._forget()
        start = self.ahead[-1].step + 1 if self.ahead else step
        stop = step + self.depth + 1 if self.end is None else max(step + 1, min(step + self.depth + 1, self.end))
        for number in range(start, stop):
            self.ahead.append(_Ahead(number, self.pool.submit(self._read, number)))
        try:
            batch, ready = self.ahead.popleft().future.result()
        except Exception as error:
            self._forget()
            raise _unreadable(step, error) from error
        if ready is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(ready)
            for tensor in (*batch.features.values(), *batch.mask.values()):
                tensor.record_stream(current)
        return batch

    def close(self) -> None:
        """Waits for what the threads are at, and ends them."""
        self._forget()
        self.pool.shutdown(wait=True, cancel_futures=True)

    def _forget(self) -> None:
        while self.ahead:
            self.ahead.pop().future.cancel()

    def _read(self, step: int) -> tuple[Batch, torch.cuda.Event | None]:
        batch = self.read(step)
        if self.stream is None:
            return batch.to(self.device), None
        with torch.cuda.stream(self.stream):
            moved = batch.pinned().to(self.device, non_blocking=True)
            return moved, self.stream.record_event()


def open_feed(
    batches: BatchSource,
    device: torch.device,
    kind: FeedKind = "auto",
    *,
    workers: int = 2,
    end: int | None = None,
    own: Own | None = None,
) -> Feed:
    """The feed of a run.

    Args:
        batches: what is read.
        device: that trains.
        kind: "auto" is "resident" on a GPU where RESIDENT_SHARE of its free memory holds all clips, "direct" on a CPU
            where the arrays are mapped ones, else "prefetch". A stream cannot be resident, and one thread reads it
            ahead.
        workers: threads of "prefetch".
        end: the step after the last one that will be asked for; None for no end.
        own: of a number of clips in a batch, those that are wanted, as where ranks share it; None for all.

    Returns:
        A context that closes the feed.

    Raises:
        FeedError: the clips cannot be made resident, and that was asked for.
    """
    if not isinstance(batches, Batches):
        if kind == "resident":
            raise FeedError("feed must be auto, prefetch or direct for a stream, got 'resident'")
        return (
            Feed(batches, device, own) if kind == "direct" else PrefetchFeed(batches, device, own, workers=1, end=end)
        )
    if kind == "auto":
        kind = _chosen(batches, device)
    if kind == "prefetch":
        return PrefetchFeed(batches, device, own, workers=workers, end=end)
    return ResidentFeed(batches, device, own) if kind == "resident" else Feed(batches, device, own)


def _chosen(batches: Batches, device: torch.device) -> FeedKind:
    if device.type == "cuda":
        return "resident" if _bytes(batches) < RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0] else "prefetch"
    # Selecting clips of mapped arrays takes some thousandths of a step, for which threads would only compete.
    mapped = all(isinstance(array, np.ndarray) for array in batches.clips.features.values())
    return "direct" if mapped else "prefetch"


def _bytes(batches: Batches) -> int:
    """What the features of all clips take on the device."""
    one = gather(batches.clips, np.arange(1), batches.dtype)
    return len(batches.clips) * sum(tensor.nbytes for tensor in one.features.values())


def _unreadable(step: int, error: Exception) -> FeedError:
    return FeedError(f"feed could not read the batch of step {step}: {type(error).__name__}: {error}")
