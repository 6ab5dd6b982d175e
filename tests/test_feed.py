"""Feeds: the same batches whatever brings them, from any step on; errors surface once; threads end."""

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from unicode_fast.data import Batches, FeedError, open_feed, open_store
from unicode_fast.data.batches import Batch
from unicode_fast.data.feed import Feed, PrefetchFeed, ResidentFeed

CPU = torch.device("cpu")
KINDS = {"direct": Feed, "prefetch": PrefetchFeed, "resident": ResidentFeed}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("store") / "tiny", {"train": 23, "val": 5, "test": 5})


@pytest.fixture
def batches(store: Path) -> Batches:
    return Batches(open_store(store).split("train"), 5, seed=1, drop_last=False)


def feed_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("feed")]


def assert_same(batch: Batch, truth: Batch) -> None:
    np.testing.assert_array_equal(batch.clips, truth.clips)
    np.testing.assert_array_equal(batch.id, truth.id)
    for name, features in truth.features.items():
        assert torch.equal(batch.features[name], features)
        assert torch.equal(batch.mask[name], truth.mask[name])


@pytest.mark.parametrize("kind", KINDS)
def test_the_batches_are_those_of_their_steps(kind: str, batches: Batches) -> None:
    """Over the ends of epochs, from a later step on as after a resume, and back again."""
    with open_feed(batches, CPU, kind, workers=3) as feed:
        assert type(feed) is KINDS[kind]
        for step in (*range(12), 30, 31, 2, 3):
            assert_same(feed.batch(step), batches.batch(step))


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_gets_its_own_clips(kind: str, batches: Batches) -> None:
    with open_feed(batches, CPU, kind, own=lambda clips: slice(clips // 2, clips)) as feed:
        for step in range(batches.steps_per_epoch):
            assert_same(feed.batch(step), batches.batch(step, slice(len(batches.indices(step)) // 2, None)))


def test_it_reads_ahead_and_no_further_than_the_end(batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    plain = Batches.batch

    def noted(self: Batches, step: int, own: slice) -> Batch:
        read.append(step)
        return plain(self, step, own)

    monkeypatch.setattr(Batches, "batch", noted)
    with open_feed(batches, CPU, "prefetch", workers=1, end=4) as feed:
        feed.batch(0)
        feed.close()
        assert 0 in read and max(read) <= 2, "two batches for each worker"
    read.clear()
    with open_feed(batches, CPU, "prefetch", workers=2, end=4) as feed:
        for step in range(4):
            feed.batch(step)
    assert sorted(read) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["direct", "prefetch"])
def test_an_error_of_a_worker_is_one_clear_error(kind: str, batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Batches.batch

    def broken(self: Batches, step: int, own: slice) -> Batch:
        if step == 2:
            raise OSError("the disk is gone")
        return plain(self, step, own)

    monkeypatch.setattr(Batches, "batch", broken)
    with open_feed(batches, CPU, kind) as feed:
        assert_same(feed.batch(0), plain(batches, 0))
        assert_same(feed.batch(1), plain(batches, 1))
        with pytest.raises(FeedError, match="feed could not read the batch of step 2: OSError: the disk is gone"):
            feed.batch(2)
    assert not feed_threads()


def test_what_is_chosen_on_a_cpu(batches: Batches) -> None:
    """Mapped arrays are selected from at once, others, which have to be read or inflated, ahead."""

    class Lazy:
        def __init__(self, array: np.ndarray) -> None:
            self.array, self.shape = array, array.shape

        def __getitem__(self, indices: np.ndarray) -> np.ndarray:
            return self.array[indices]

    with open_feed(batches, CPU) as feed:
        assert type(feed) is Feed
    clips = batches.clips
    lazy = {**clips.arrays, "video": Lazy(clips.arrays["video"])}
    with open_feed(Batches(dataclasses.replace(clips, arrays=lazy), 5, seed=1, drop_last=False), CPU) as feed:
        assert type(feed) is PrefetchFeed
        assert_same(feed.batch(3), batches.batch(3))


def test_closing_ends_the_threads(batches: Batches) -> None:
    feed = open_feed(batches, CPU, "prefetch", workers=2)
    feed.batch(0)
    assert feed_threads()
    feed.close()
    feed.close()
    assert not feed_threads()


def test_what_cannot_be_resident_names_the_way_out(batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(torch.Tensor, "new_empty", full)
    with pytest.raises(FeedError, match=r"feed 'resident' could not put 23 clips on cpu: no memory left; .*prefetch"):
        open_feed(batches, CPU, "resident")


def test_many_threads_agree_on_the_order(batches: Batches) -> None:
    """Readers of different epochs at once, as at the end of one, each get the order of their own."""
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
    with open_feed(batches, device, kind, workers=2) as feed:
        for step in range(12):
            batch = feed.batch(step)
            assert all(tensor.is_cuda for tensor in (*batch.features.values(), *batch.mask.values()))
            assert_same(batch.to("cpu"), batches.batch(step))
