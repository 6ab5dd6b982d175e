"""Data sets: public layouts, own files, feature stores, streams and built-in data; and their batches."""

from __future__ import annotations

from unicode_fast.data.dataset import Batch, Batches, BatchSource, ClipSet, Dataset
from unicode_fast.data.loader import BatchLoader, BatchLoaderError, open_loader
from unicode_fast.data.opening import open_data, open_dataset, verify
from unicode_fast.data.store.checks import DamagedStoreError, StoreError
from unicode_fast.data.store.read import Store, open_store
from unicode_fast.data.store.write import write_store
from unicode_fast.files.optional import MissingPackageError

__all__ = [
    "Batch",
    "BatchSource",
    "Batches",
    "ClipSet",
    "DamagedStoreError",
    "Dataset",
    "BatchLoader",
    "BatchLoaderError",
    "MissingPackageError",
    "Store",
    "StoreError",
    "open_data",
    "open_dataset",
    "open_loader",
    "open_store",
    "verify",
    "write_store",
]
