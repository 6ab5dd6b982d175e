"""Batches: every clip once per epoch, any step at any time, and masks of valid positions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_store import CLASSES, LINES, MODALITIES, POSITIONS, arrays

from unicode_fast.data import Batches, ClipSet, open_store, write_store


@pytest.fixture
def clips(tmp_path: Path) -> ClipSet:
    write_store(tmp_path / "digits", "digits", MODALITIES, CLASSES, {"train": arrays(0, 23)})
    return open_store(tmp_path / "digits").split("train")


def epoch(batches: Batches, number: int) -> np.ndarray:
    first = number * batches.steps_per_epoch
    return np.concatenate([batches.indices(step) for step in range(first, first + batches.steps_per_epoch)])


def test_order_is_fixed(clips: ClipSet) -> None:
    """Another order after an update would change every resumed run."""
    batches = Batches(clips.select(range(8)), 4, seed=3)
    np.testing.assert_array_equal(epoch(batches, 0), [0, 1, 2, 7, 5, 6, 4, 3])
    np.testing.assert_array_equal(epoch(batches, 1), [5, 6, 3, 7, 0, 1, 2, 4])


@pytest.mark.parametrize(("drop_last", "sizes"), [(True, [5] * 4), (False, [5] * 4 + [3])])
def test_every_clip_once_an_epoch(clips: ClipSet, drop_last: bool, sizes: list[int]) -> None:
    batches = Batches(clips, 5, seed=1, drop_last=drop_last)
    assert batches.steps_per_epoch == len(sizes)
    for number in range(3):
        ids = epoch(batches, number)
        assert len(set(ids)) == len(ids) == sum(sizes)
    assert [len(batches.batch(step)) for step in range(len(sizes))] == sizes


def test_order_depends_on_seed_and_epoch_alone(clips: ClipSet) -> None:
    batches, again, other = Batches(clips, 5, seed=1), Batches(clips, 5, seed=1), Batches(clips, 5, seed=2)
    assert not np.array_equal(epoch(batches, 0), epoch(batches, 1))
    assert not np.array_equal(epoch(batches, 0), epoch(other, 0))
    # Another object, read backwards from the middle.
    for step in (11, 10, 3, 4):
        np.testing.assert_array_equal(again.batch(step).clips, batches.batch(step).clips)


def test_a_batch_holds_its_clips(clips: ClipSet) -> None:
    batches = Batches(clips, 5, seed=1, dtype=torch.float64)
    batch = batches.batch(2)
    chosen = batches.indices(2)
    np.testing.assert_array_equal(batch.clips, chosen)
    assert list(batch.id) == [f"clip {number}" for number in chosen]
    assert batch.features["picture"].shape == (5, POSITIONS, 8, 8, 1) and batch.features["line"].shape == (5, LINES, 8)
    for name in MODALITIES:
        assert batch.features[name].dtype == torch.float64
        np.testing.assert_array_equal(batch.features[name].numpy(), clips.features[name][chosen])
        np.testing.assert_array_equal(batch.mask[name].numpy(), clips.mask[name][chosen])
    assert list(batch.labels) == ["picture"] and batch.labels["picture"].dtype == torch.float64
    np.testing.assert_array_equal(batch.labels["picture"].numpy(), clips.labels["picture"][chosen])
    assert batch.target is not None and batch.target.dtype == torch.int64
    np.testing.assert_array_equal(batch.target.numpy(), clips.target[chosen])
    moved = batch.to("meta")
    assert moved.features["line"].device.type == moved.mask["line"].device.type == "meta"


def test_writing_into_a_batch_does_not_change_the_clips(clips: ClipSet) -> None:
    batches = Batches(clips, 5, seed=1)
    batches.batch(0).features["line"].fill_(7)
    np.testing.assert_array_equal(batches.batch(0).features["line"].numpy(), clips.features["line"][batches.indices(0)])


def test_chosen_and_restricted_clips_keep_their_numbers(clips: ClipSet) -> None:
    batch = Batches(clips.restrict(["line"]).select([20, 4, 9]), 3, seed=0, dtype="float32").batch(0)
    assert sorted(batch.clips) == [4, 9, 20]
    assert list(batch.features) == ["line"] and batch.features["line"].dtype == torch.float32


def test_clips_without_classes(clips: ClipSet) -> None:
    bare = ClipSet({"line": clips.arrays["line"]}, {"line": MODALITIES["line"]}, [], clips.index)
    batch = Batches(bare, 4).batch(0)
    assert batch.target is None and batch.labels == {} and batch.mask["line"].all()


def test_errors(clips: ClipSet) -> None:
    with pytest.raises(ValueError, match="clips must be at least one batch of 24, got 23"):
        Batches(clips, 24)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Batches(clips, 0)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        Batches(clips, 4, seed=-1)
    with pytest.raises(TypeError, match="dtype must be float32 or float64, got torch.float16"):
        Batches(clips, 4, dtype=torch.float16)
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        Batches(clips, 4).batch(-1)
    with pytest.raises(TypeError, match="dtype must be float32 or float64, got int64"):
        Batches(clips, 4, dtype="int64")
