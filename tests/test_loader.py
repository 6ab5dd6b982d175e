"""Batch loaders: all kinds return the same batches, from any step; errors are raised once; helpers end."""

import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from unicode_fast.data import Batches, BatchLoaderError, open_loader, open_store
from unicode_fast.data.dataset import Batch
from unicode_fast.data.loader import BatchLoader, PrefetchLoader, ResidentLoader

CPU = torch.device("cpu")
KINDS = {"direct": BatchLoader, "prefetch": PrefetchLoader, "resident": ResidentLoader}
# Kinds with their number of workers.
LOADERS = [("direct", 0), ("prefetch", 0), ("prefetch", 1), ("prefetch", 2), ("resident", 0)]
forked = pytest.mark.skipif(sys.platform != "linux", reason="worker processes are forked on Linux alone")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("store") / "tiny", {"train": 23, "val": 5, "test": 5})


@pytest.fixture
def batches(store: Path) -> Batches:
    return Batches(open_store(store).split("train"), 5, seed=1, drop_last=False)


def helpers() -> list[str]:
    """Threads and processes of loaders."""
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("loader")]
    return [*threads, *(process.name for process in multiprocessing.active_children())]


def assert_same(batch: Batch, truth: Batch) -> None:
    np.testing.assert_array_equal(batch.clips, truth.clips)
    np.testing.assert_array_equal(batch.id, truth.id)
    for name, features in truth.features.items():
        assert torch.equal(batch.features[name], features)
        assert torch.equal(batch.mask[name], truth.mask[name])


@pytest.mark.parametrize(("kind", "workers"), LOADERS)
def test_the_batches_are_those_of_their_steps(kind: str, workers: int, batches: Batches) -> None:
    """Across ends of epochs, from a later step as after a resume, and back again."""
    with open_loader(batches, CPU, kind, workers=workers) as loader:
        assert type(loader) is KINDS[kind]
        for step in (*range(12), 30, 31, 2, 3):
            assert_same(loader.batch(step), batches.batch(step))
    assert not helpers()


@pytest.mark.parametrize(("kind", "workers"), LOADERS)
def test_a_rank_gets_its_own_clips(kind: str, workers: int, batches: Batches) -> None:
    with open_loader(batches, CPU, kind, workers=workers, own=lambda clips: slice(clips // 2, clips)) as loader:
        for step in range(batches.steps_per_epoch):
            assert_same(loader.batch(step), batches.batch(step, slice(len(batches.indices(step)) // 2, None)))


@forked
def test_processes_read(batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes alternate; the random numbers of training are unchanged."""
    plain = Batches.batch

    def signed(self: Batches, step: int, own: slice, keep_halves: bool) -> Batch:
        return dataclasses.replace(plain(self, step, own, keep_halves=keep_halves), id=np.array([os.getpid()]))

    monkeypatch.setattr(Batches, "batch", signed)
    before = torch.get_rng_state()
    with open_loader(batches, CPU, "prefetch", workers=2) as loader:
        readers = [int(loader.batch(step).id[0]) for step in range(6)]
    assert len(set(readers)) == 2 and os.getpid() not in readers
    assert readers == readers[:2] * 3
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("steps", "furthest"), [(1, 2), (4, 3)])
def test_it_reads_ahead_and_no_further_than_the_end(
    steps: int, furthest: int, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    plain = Batches.batch

    def recorded(self: Batches, step: int, own: slice, keep_halves: bool) -> Batch:
        read.append(step)
        return plain(self, step, own, keep_halves=keep_halves)

    monkeypatch.setattr(Batches, "batch", recorded)
    with open_loader(batches, CPU, "prefetch", workers=0, end=4) as loader:
        for step in range(steps):
            loader.batch(step)
        while loader.ahead and not loader.ahead[-1].future.done():
            pass
    assert read == list(range(furthest + 1))


@pytest.mark.parametrize(("kind", "workers"), LOADERS[:-1])
def test_an_error_of_a_worker_is_one_clear_error(
    kind: str, workers: int, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Batches.batch

    def broken(self: Batches, step: int, own: slice, keep_halves: bool) -> Batch:
        if step == 2:
            raise OSError("the disk is gone")
        return plain(self, step, own, keep_halves=keep_halves)

    monkeypatch.setattr(Batches, "batch", broken)
    with open_loader(batches, CPU, kind, workers=workers) as loader:
        assert_same(loader.batch(0), plain(batches, 0))
        assert_same(loader.batch(1), plain(batches, 1))
        with pytest.raises(BatchLoaderError) as raised:
            loader.batch(2)
        assert str(raised.value) == "the loader could not read the batch of step 2: OSError: the disk is gone"
        assert "the disk is gone" in str(raised.value.__cause__)
    assert not helpers()


@forked
def test_a_worker_that_is_killed_is_one_clear_error(batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Batches.batch

    def killed(self: Batches, step: int, own: slice, keep_halves: bool) -> Batch:
        if step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, step, own, keep_halves=keep_halves)

    monkeypatch.setattr(Batches, "batch", killed)
    with open_loader(batches, CPU, "prefetch", workers=1) as loader:
        assert_same(loader.batch(0), plain(batches, 0))
        with pytest.raises(BatchLoaderError, match=r"read the batch of step [12]: .*; --loader_workers 0 reads it"):
            for step in (1, 2):
                loader.batch(step)
    assert not helpers()


def test_what_is_chosen_on_a_cpu(batches: Batches) -> None:
    """Clips of mapped arrays are selected directly; other arrays, which need reading or unpacking, are prefetched."""

    class Lazy:
        def __init__(self, array: np.ndarray) -> None:
            self.array, self.shape, self.mapped = array, array.shape, False

        def __getitem__(self, indices: np.ndarray) -> np.ndarray:
            return self.array[indices]

    with open_loader(batches, CPU) as loader:
        assert type(loader) is BatchLoader
    clips = batches.clips
    lazy = {**clips.arrays, "video": Lazy(clips.arrays["video"])}
    with open_loader(Batches(dataclasses.replace(clips, arrays=lazy), 5, seed=1, drop_last=False), CPU) as loader:
        assert type(loader) is PrefetchLoader
        assert_same(loader.batch(3), batches.batch(3))


def test_closing_ends_the_helpers(batches: Batches) -> None:
    loader = open_loader(batches, CPU, "prefetch", workers=2)
    loader.batch(0)
    assert helpers()
    loader.close()
    loader.close()
    assert not helpers()


def test_what_cannot_be_resident_names_the_way_out(batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(torch.Tensor, "new_empty", full)
    with pytest.raises(
        BatchLoaderError, match=r"loader 'resident' could not put 23 clips on cpu: no memory left; .*prefetch"
    ):
        open_loader(batches, CPU, "resident")


def test_many_threads_agree_on_the_order(batches: Batches) -> None:
    """Concurrent readers of different epochs, as at the end of an epoch, each get the order of their epoch."""
    alone = [Batches(batches.clips, 5, seed=1, drop_last=False).indices(step) for step in range(40)]
    wrong: list[int] = []

    def reader(start: int) -> None:
        wrong.extend(
            step for step in range(start, 40, 4) for _ in range(50) if (batches.indices(step) != alone[step]).any()
        )

    threads = [threading.Thread(target=reader, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available")
@pytest.mark.parametrize("kind", KINDS)
def test_batches_on_a_gpu(kind: str, batches: Batches) -> None:
    device = torch.device("cuda")
    with open_loader(batches, device, kind, workers=2) as loader:
        for step in range(12):
            batch = loader.batch(step)
            assert all(tensor.is_cuda for tensor in (*batch.features.values(), *batch.mask.values()))
            assert_same(batch.to("cpu"), batches.batch(step))


def test_the_thread_has_no_threads_of_its_own(batches: Batches) -> None:
    """A parallel loop in it would have OpenMP threads beside those of the training step."""
    before = torch.get_num_threads()
    with PrefetchLoader(batches, CPU, workers=0) as loader:
        assert loader.pool.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == before
        found = ThreadPoolExecutor(1).submit(torch.get_num_threads).result()
    assert found == before
