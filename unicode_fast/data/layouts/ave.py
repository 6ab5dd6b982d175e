"""AVE: 4143 clips of ten seconds with one event each, audio and video, in HDF5 files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unicode_fast.data.files import Files, need
from unicode_fast.data.layouts.request import Request
from unicode_fast.data.sources import Listing, Note, Part, Source
from unicode_fast.data.store_checks import StoreError

CLASSES = [
    "Church bell", "Male speech, man speaking", "Bark", "Fixed-wing aircraft, airplane", "Race car, auto racing",
    "Female speech, woman speaking", "Helicopter", "Violin, fiddle", "Flute", "Ukulele", "Frying (food)", "Truck",
    "Shofar", "Motorcycle", "Acoustic guitar", "Train horn", "Clock", "Banjo", "Goat", "Baby cry, infant cry", "Bus",
    "Chainsaw", "Cat", "Horse", "Toilet flush", "Rodents, rats, mice", "Accordion", "Mandolin",
]  # fmt: skip
KEY = "avadataset"
_FEATURES = {"audio": "audio_feature.h5", "video": "visual_feature.h5"}


def list_ave(root: Path, request: Request) -> Listing:
    """Splits train, val and test as the order files say; "id" is a clip's number in the feature files."""
    files = Files("ave", root)
    features = feature_files(files, request)
    labels = files.file("labels.h5")
    orders = {split: files.file(f"{split}_order.h5") for split in ("train", "val", "test")}
    files.check()
    label = read_labels(labels, len(CLASSES))
    parts, notes = {}, []
    for split, file in orders.items():
        part, more = ordered_part(features, label, read_order(file, len(label)), file)
        parts[split] = [part]
        notes += more
    return Listing("ave", root, CLASSES, parts, notes=notes)


def feature_files(files: Files, request: Request, base: str = "") -> dict[str, Path]:
    """The file of each modality that is wanted."""
    return {name: files.file(base + file) for name, file in _FEATURES.items() if request.wants(name)}


def ordered_part(
    features: dict[str, Path], label: np.ndarray, order: np.ndarray, file: Path
) -> tuple[Part, list[Note]]:
    """Some clips of the feature files, with labels of both modalities and the class of most seconds."""
    chosen = label[order]
    seconds = chosen[..., :-1].sum(1)  # (clips, C)
    arrays = {
        "id": order,
        "class": seconds.argmax(1).astype(np.int64),
        **{f"{name}.label": chosen for name in features},
    }
    sources = {name: h5_source(path, len(label)).select(order) for name, path in features.items()}
    empty = int((seconds.max(1) == 0).sum())
    text = f"{empty} clips of {file} have no event in any second and count as class 0, as in the released code"
    return Part(sources, arrays), [Note("no event", text, False)] if empty else []


def h5_source(file: Path, clips: int) -> Source:
    """Features of all clips of an HDF5 file, read one by one."""
    data = open_h5(file, KEY)
    if data.ndim < 3 or len(data) != clips:
        raise StoreError(f"{file} must hold {KEY} of ({clips}, steps, ...), got {data.shape}")
    where = [f"{file} ({KEY}[{number}])" for number in range(clips)]
    return Source(where, lambda number: data[number], np.arange(clips), data.shape[1], "exact")


def read_labels(file: Path, classes: int) -> np.ndarray:
    """(clips, T, C+1) uint8, background last."""
    label = open_h5(file, KEY)[:]
    if label.ndim != 3 or label.shape[2] != classes + 1 or not np.isin(label, (0, 1)).all():
        raise StoreError(
            f"{file} must hold {KEY} of (clips, steps, {classes + 1}) 0 and 1, got {label.shape} {label.dtype}"
        )
    return label.astype(np.uint8)


def read_order(file: Path, clips: int) -> np.ndarray:
    """(n,) int64 numbers of clips."""
    order = open_h5(file, "order")[:]
    whole = order.ndim == 1 and order.dtype.kind in "iu"
    if not whole or len(order) == 0 or order.min() < 0 or order.max() >= clips:
        raise StoreError(f"{file} must hold order of (n,) integers in [0, {clips}), got {_described(order)}")
    return order.astype(np.int64)


def _described(order: np.ndarray) -> str:
    ends = f" from {order.min()} to {order.max()}" if order.size and order.dtype.kind in "iuf" else ""
    return f"{order.shape} {order.dtype}{ends}"


def open_h5(file: Path, key: str) -> Any:
    """A dataset of an HDF5 file, which stays open and unread.

    Raises:
        StoreError: it is no HDF5 file, or has no such dataset.
        MissingPackageError: h5py is not installed.
    """
    h5py = need("h5py", "data")
    try:
        opened = h5py.File(file, "r")
    except OSError as error:
        raise StoreError(f"{file} must be a whole HDF5 file, but cannot be opened: {error}") from error
    found: Sequence[str] = list(opened)
    if key not in found or not isinstance(opened[key], h5py.Dataset):
        raise StoreError(f"{file} must hold a dataset {key!r}, got {', '.join(found) or 'none'}")
    return opened[key]
