"""Batches from a data set to the training device: read on demand, prefetched, or resident."""

from __future__ import annotations

import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from types import TracebackType
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from unicode_fast.data.dataset import Batch, Batches, BatchSource, gather

T = TypeVar("T")
Own = Callable[[int], slice]
LoaderKind = Literal["auto", "resident", "prefetch", "direct"]
# The share of a GPU's free memory that resident clips may take; the rest is for the model and its activations.
RESIDENT_SHARE = 0.6
# Batches on a GPU, or in transfer to it, beside the current one.
COPIED_AHEAD = 2
# Clips per read when a split is made resident.
CLIPS_PER_READ = 256


class BatchLoaderError(RuntimeError):
    """A batch could not be read; the message names the training step, and the cause is chained."""


class BatchLoader:
    """Batches by global step, read and copied on demand.

    All loaders return the same batches in the same order: the content of a batch depends on its step alone.

    Args:
        batches: the source of batches.
        device: device of features and masks.
        own: from the number of clips in a batch to the slice of this rank; None for all.
    """

    def __init__(self, batches: BatchSource, device: torch.device, own: Own | None = None) -> None:
        self.batches, self.device = batches, device
        self.own: Own = own or slice

    def batch(self, step: int) -> Batch:
        """The batch of this global step, on the device.

        Raises:
            BatchLoaderError: the batch could not be read.
        """
        try:
            return self.read(step).to(self.device, dtype=self.batches.dtype)
        except Exception as error:
            raise _unreadable(step, error) from error

    def read(self, step: int) -> Batch:
        """The same batch on the CPU; features in half precision are cast on the device."""
        return self.batches.batch(step, self.own(self.batches.size(step)), keep_halves=True)

    def close(self) -> None:
        """End all threads and processes; the loader cannot be used afterwards."""

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.close()


class ResidentLoader(BatchLoader):
    """All clips of the split on the device, in their stored dtype, read once; a batch is an index selection.

    Args:
        batches: the source of batches.
        device: device of the clips.
        own: as for `BatchLoader`; all clips are resident, because each rank gets each clip in some epoch.

    Raises:
        BatchLoaderError: clips could not be read, or the device has too little memory.
    """

    def __init__(self, batches: Batches, device: torch.device, own: Own | None = None) -> None:
        super().__init__(batches, device, own)
        self.whole = batches
        clips = batches.clips
        self.features: dict[str, Tensor] = {}
        self.mask: dict[str, Tensor] = {}
        try:
            for start in range(0, len(clips), CLIPS_PER_READ):
                positions = np.arange(start, min(start + CLIPS_PER_READ, len(clips)))
                chunk = gather(clips, positions, batches.dtype, keep_halves=True)
                for kept, read in ((self.features, chunk.features), (self.mask, chunk.mask)):
                    for name, tensor in read.items():
                        if start == 0:
                            kept[name] = tensor.new_empty((len(clips), *tensor.shape[1:]), device=device)
                        kept[name][start : start + len(positions)] = tensor
        except Exception as error:
            raise BatchLoaderError(
                f"loader 'resident' could not put {len(clips)} clips on {device}: {error}; use --loader prefetch"
            ) from error

    def batch(self, step: int) -> Batch:
        """The batch of this global step; features and masks only."""
        indices = self.whole.indices(step)
        indices = indices[self.own(len(indices))]
        chosen = torch.from_numpy(np.ascontiguousarray(indices))
        if self.device.type == "cuda":
            chosen = chosen.pin_memory().to(self.device, non_blocking=True)

        def selected(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.index_select(0, chosen) for name, tensor in tensors.items()}

        clips = self.whole.clips
        features = {name: tensor.to(self.whole.dtype) for name, tensor in selected(self.features).items()}
        return Batch(features, selected(self.mask), {}, None, clips.index[indices], np.asarray(clips.id[indices]))


class _Ahead(NamedTuple):
    """A prefetched batch: its step, and the batch with the CUDA event of its copy."""

    step: int
    future: Future[tuple[Batch, torch.cuda.Event | None]]


class PrefetchLoader(BatchLoader):
    """Worker processes prefetch batches; a thread copies them to pinned memory, then to the device on its own stream.

    Without CUDA the thread copies nothing.

    Args:
        batches: the source of batches.
        device: device of features and masks.
        own: as for `BatchLoader`.
        workers: processes, each two batches ahead; with 0, and on systems other than Linux, the thread reads the clips.
        end: the step after the last one of the run; None for no end.
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
        self.workers = workers if sys.platform == "linux" else 0
        self.end = sys.maxsize if end is None else end
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ahead: deque[_Ahead] = deque()
        self.from_workers: Iterator[Batch | _Failed] | None = None
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="loader")
        # With threads of its own for parallel loops, the loader's thread would make those of the training step sleep
        # instead of spin between loops, as OpenMP then has more threads than cores.
        threads = torch.get_num_threads()
        self.pool.submit(torch.set_num_threads, 1).result()
        torch.set_num_threads(threads)  # of threads that begin later

    def batch(self, step: int) -> Batch:
        """The batch of this global step; the next ones are prefetched."""
        if not self.ahead or self.ahead[0].step != step:
            self._forget()
        start = self.ahead[-1].step + 1 if self.ahead else step
        for number in range(start, max(step + 1, min(step + COPIED_AHEAD + 1, self.end))):
            self.ahead.append(_Ahead(number, self.pool.submit(self._move, number)))
        try:
            batch, ready = self.ahead.popleft().future.result()
        except Exception as error:
            self._forget()
            raise error if isinstance(error, BatchLoaderError) else _unreadable(step, error) from error
        if ready is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(ready)
            for tensor in (*batch.features.values(), *batch.mask.values()):
                tensor.record_stream(current)
        return batch

    def close(self) -> None:
        """Wait for the current read, then end the thread and the processes."""
        self._forget()
        self.pool.shutdown(wait=True, cancel_futures=True)

    def _forget(self) -> None:
        begun = [ahead.future for ahead in self.ahead if not ahead.future.cancel()]
        wait(begun)
        self.ahead.clear()
        # A DataLoader ends its processes with its iterator.
        self.from_workers = None

    def _move(self, step: int) -> tuple[Batch, torch.cuda.Event | None]:
        batch = self._from_worker(step) if self.workers else self.read(step)
        if self.stream is None:
            return batch.to(self.device, dtype=self.batches.dtype), None
        with torch.cuda.stream(self.stream):
            moved = batch.pinned().to(self.device, non_blocking=True, dtype=self.batches.dtype)
            return moved, self.stream.record_event()

    def _from_worker(self, step: int) -> Batch:
        if self.from_workers is None:
            # Forked processes inherit the open data set. In the main thread, a DataLoader would install a SIGCHLD
            # handler, which can raise at any line. Without its own generator it would draw from the training's.
            loader = DataLoader(
                _BatchesByStep(self.read),
                batch_size=None,
                sampler=range(step, max(step + 1, self.end)),
                collate_fn=_unchanged,
                num_workers=self.workers,
                multiprocessing_context="fork",
                generator=torch.Generator(),
            )
            self.from_workers = iter(loader)
        try:
            found = next(self.from_workers)
        except Exception as error:
            message = f"{_unreadable(step, error)}; --loader_workers 0 reads it without worker processes"
            raise BatchLoaderError(message) from error
        if isinstance(found, _Failed):
            raise BatchLoaderError(found.message) from RuntimeError(found.trace)
        return found


class _Failed(NamedTuple):
    """The result of a worker that failed: message and traceback, because tracebacks cannot be pickled."""

    message: str
    trace: str


class _BatchesByStep(torch.utils.data.Dataset):
    """Batches as items of a PyTorch data set, by training step."""

    def __init__(self, read: Callable[[int], Batch]) -> None:
        self.read = read

    def __getitem__(self, step: int) -> Batch | _Failed:
        try:
            # A training step reads only features and masks.
            return replace(self.read(step), labels={}, target=None)
        except Exception as error:
            return _Failed(str(_unreadable(step, error)), traceback.format_exc())


def _unchanged(batch: T) -> T:
    return batch


def open_loader(
    batches: BatchSource,
    device: torch.device,
    kind: LoaderKind = "auto",
    *,
    workers: int = 2,
    end: int | None = None,
    own: Own | None = None,
) -> BatchLoader:
    """The batch loader of a run.

    Args:
        batches: the source of batches.
        device: the training device.
        kind: "auto" means "resident" on a GPU if all clips fit in RESIDENT_SHARE of its free memory. On a CPU with
            memory-mapped arrays it means "direct", else "prefetch". A stream cannot be resident; one process
            prefetches it.
        workers: processes of "prefetch"; 0 for a thread.
        end: the step after the last one of the run; None for no end.
        own: from the number of clips in a batch to the slice of this rank; None for all.

    Returns:
        A context that closes the loader.

    Raises:
        BatchLoaderError: `kind` is "resident", and the clips cannot be made resident.
    """
    if not isinstance(batches, Batches):
        if kind == "resident":
            raise BatchLoaderError("loader must be auto, prefetch or direct for a stream, got 'resident'")
        kind, workers = "direct" if kind == "direct" else "prefetch", min(workers, 1)
    elif kind == "auto":
        kind = _chosen(batches, device)
    if kind == "prefetch":
        return PrefetchLoader(batches, device, own, workers=workers, end=end)
    if kind == "resident" and isinstance(batches, Batches):
        return ResidentLoader(batches, device, own)
    return BatchLoader(batches, device, own)


def _chosen(batches: Batches, device: torch.device) -> LoaderKind:
    if device.type == "cuda":
        return "resident" if _bytes(batches) < RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0] else "prefetch"
    # The selection of mapped clips takes thousandths of a training step; workers would compete for the CPU.
    features = batches.clips.features.values()
    mapped = all(isinstance(array, np.ndarray) or array.mapped for array in features)
    return "direct" if mapped else "prefetch"


def _bytes(batches: Batches) -> int:
    """Bytes of the features of all clips on the device."""
    one = gather(batches.clips, np.arange(1), batches.dtype, keep_halves=True)
    return len(batches.clips) * sum(tensor.nbytes for tensor in one.features.values())


def _unreadable(step: int, error: Exception) -> BatchLoaderError:
    return BatchLoaderError(f"the loader could not read the batch of step {step}: {type(error).__name__}: {error}")
