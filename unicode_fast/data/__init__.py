"""Feature stores, batches, and the built-in data sets."""

from __future__ import annotations

from unicode_fast.config import DataConfig
from unicode_fast.data import talking_digits
from unicode_fast.data.batches import Batch, Batches, iterate
from unicode_fast.data.feed import Feed, FeedError, open_feed
from unicode_fast.data.store import ClipSet, DamagedStoreError, Store, StoreError, open_store, write_store

__all__ = [
    "Batch",
    "Batches",
    "ClipSet",
    "DamagedStoreError",
    "Feed",
    "FeedError",
    "Store",
    "StoreError",
    "iterate",
    "open_dataset",
    "open_feed",
    "open_store",
    "write_store",
]


def open_dataset(config: DataConfig, progress: bool = True) -> Store:
    """Open the data set that a configuration names.

    Args:
        config: `data` is the name of a built-in data set or the folder of a feature store; the fields on clips, `easy`
            and `data_seed` are for built-in ones.
        progress: show a progress bar on standard error while a built-in data set is made.

    Raises:
        FileNotFoundError: it is neither.
        StoreError: the feature store is damaged or its contents are not what they must be.
        OSError: the cache folder cannot be written or the disk is full.
    """
    if config.data not in talking_digits.DATASETS:
        return open_store(config.data)
    clips = {"train": config.train_clips, "val": config.val_clips, "test": config.test_clips}
    return talking_digits.load(config.data, easy=config.easy, clips=clips, seed=config.data_seed, progress=progress)
