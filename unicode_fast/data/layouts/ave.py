"""AVE: 4143 clips of ten seconds with one event each, audio and video, in HDF5 files."""

from __future__ import annotations

import math
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from unicode_fast.data.layouts.files import Files
from unicode_fast.data.layouts.index import ClipTable, DatasetIndex, FeatureFiles, Note
from unicode_fast.data.layouts.published import AVE, PublishedList, count_notes
from unicode_fast.data.layouts.request import Request
from unicode_fast.data.store.checks import StoreError
from unicode_fast.files.optional import need
from unicode_fast.files.untrusted import BadFile, check_count, check_size, open_file

CLASSES = [
    "Church bell", "Male speech, man speaking", "Bark", "Fixed-wing aircraft, airplane", "Race car, auto racing",
    "Female speech, woman speaking", "Helicopter", "Violin, fiddle", "Flute", "Ukulele", "Frying (food)", "Truck",
    "Shofar", "Motorcycle", "Acoustic guitar", "Train horn", "Clock", "Banjo", "Goat", "Baby cry, infant cry", "Bus",
    "Chainsaw", "Cat", "Horse", "Toilet flush", "Rodents, rats, mice", "Accordion", "Mandolin",
]  # fmt: skip
KEY = "avadataset"
# Names of datasets in a message, and the size in bytes up to which a chunk may exceed its dataset.
_SHOWN_KEYS, _SMALL_CHUNK = 12, 1 << 26
# Limits of the chunks of a dataset, and of the chunks per read; HDF5 takes some kilobytes for each.
_MOST_CHUNKS, _MOST_AT_ONCE = 1 << 22, 1 << 13
# HDF5's defaults for its cache of unpacked chunks.
_CACHE_SLOTS, _CACHE = 521, 1 << 20
# Limit of the names and links in the path of a dataset.
_MOST_NAMES = 100
_FEATURES = {"audio": "audio_feature.h5", "video": "visual_feature.h5"}


def list_ave(root: Path, request: Request) -> DatasetIndex:
    """Splits train, val and test of the order files; "id" is a clip's number in the feature files."""
    files = Files("ave", root)
    features = h5_files(files, request)
    labels = files.file("labels.h5")
    orders = {split: files.file(f"{split}_order.h5") for split in ("train", "val", "test")}
    files.check()
    label = read_labels(labels, len(CLASSES))
    tables: dict[str, list[ClipTable]] = {}
    notes: list[Note] = []
    for split, file in orders.items():
        clips, more = ordered_table(features, label, read_order(file, len(label)), file)
        tables[split] = [clips]
        notes += more
    found = PublishedList({split: len(clips) for split, (clips,) in tables.items()})
    notes += count_notes(root / "{train,val,test}_order.h5", found, AVE)
    return DatasetIndex("ave", root, CLASSES, tables, notes=notes)


def h5_files(files: Files, request: Request, base: str = "") -> dict[str, Path]:
    """The feature file of each requested modality."""
    return {name: files.file(base + file) for name, file in _FEATURES.items() if request.includes(name)}


def ordered_table(
    features: dict[str, Path], label: np.ndarray, order: np.ndarray, file: Path
) -> tuple[ClipTable, list[Note]]:
    """Some clips of the feature files, with labels of both modalities and the most frequent class of their seconds."""
    chosen = label[order]
    seconds = chosen[..., :-1].sum(1)  # (clips, C)
    arrays = {
        "id": order,
        "class": seconds.argmax(1).astype(np.int64),
        **{f"{name}.label": chosen for name in features},
    }
    selected = {name: h5_features(path, len(label)).select(order) for name, path in features.items()}
    empty = int((seconds.max(1) == 0).sum())
    text = f"{empty} clips of {file} have no event and count as class 0, as in the released code"
    return ClipTable(selected, arrays), [Note("no event", text, False)] if empty else []


def h5_features(file: Path, clips: int) -> FeatureFiles:
    """Features of all clips of an HDF5 file, read one by one."""
    data = H5Array(file, KEY)
    if len(data.shape) < 3 or data.shape[0] != clips:
        raise StoreError(f"{file} must hold {KEY} of ({clips}, T, ...), got {data.shape}")
    where = [f"{file} ({KEY}[{number}])" for number in range(clips)]
    return FeatureFiles(where, data.clip, np.arange(clips), data.shape[1], "exact")


def read_labels(file: Path, classes: int) -> np.ndarray:
    """(clips, T, C+1) uint8, background last."""
    data = H5Array(file, KEY)
    label = data.whole() if len(data.shape) == 3 and data.shape[2] == classes + 1 else np.full(1, 2)
    # Clip by clip, because masks of all clips would double the memory.
    if not all(((clip == 0) | (clip == 1)).all() for clip in label):
        raise StoreError(f"{file} must hold {KEY} of (clips, T, {classes + 1}) 0 and 1, got {data.shape} {data.dtype}")
    return label.astype(np.uint8, copy=False)


def read_order(file: Path, clips: int) -> np.ndarray:
    """(n,) int64 numbers of clips."""
    data = H5Array(file, "order")
    whole = len(data.shape) == 1 and data.dtype.kind in "iu"
    order = data.whole() if whole else np.empty(0)
    if not whole or len(order) == 0 or order.min() < 0 or order.max() >= clips:
        ends = f" from {order.min()} to {order.max()}" if order.size else ""
        raise StoreError(
            f"{file} must hold order of (n,) integers in [0, {clips}), got {data.shape} {data.dtype}{ends}"
        )
    return order.astype(np.int64)


class H5Array:
    """A dataset of numbers in an HDF5 file, opened and unread.

    Its values must be in the file itself. External storage, external links and virtual datasets are refused, because
    they read other files. Filters that are plugins of HDF5 are refused, too.

    Args:
        file: the HDF5 file.
        key: the dataset's name in the root group.

    Attributes:
        shape: shape of the dataset.
        dtype: dtype of the dataset.

    Raises:
        StoreError: the file is no HDF5 file, lacks the dataset, or the dataset is refused.
        FileNotFoundError: the file is missing.
        MissingPackageError: h5py is not installed.
    """

    def __init__(self, file: Path, key: str) -> None:
        h5py = need("h5py", "data")
        self.where = f"{file} ({key}"
        opened = None
        try:
            with open_file(file) as stream:
                self._size = os.fstat(stream.fileno()).st_size
            opened = h5py.File(file, "r")
            found = [name for name, _ in zip(opened, range(_SHOWN_KEYS), strict=False)]
            if not opened.id.links.exists(key.encode()):
                raise BadFile(f"it has {', '.join(found) or 'no dataset'}")
            place = _without_links(h5py, opened.id, key.encode())
            data = h5py.h5o.open(opened.id, place)
            if not isinstance(data, h5py.h5d.DatasetID):
                raise BadFile(f"{key!r} is no dataset")
            self._properties = data.get_create_plist()
            self._check_place(h5py)
            self._data = h5py.Dataset(data)
            self.shape: tuple[int, ...] = self._data.shape or ()
            self.dtype: np.dtype = self._data.dtype
            self._check_sizes(h5py)
            # An open dataset would keep its cache, which is too small for large chunks.
            del data, self._data
            # A chunk of many clips is unpacked and checked once if clips are read in order.
            access = h5py.h5p.create(h5py.h5p.DATASET_ACCESS)
            access.set_chunk_cache(_CACHE_SLOTS, max(_CACHE, self._chunk), 0.75)
            self._data = h5py.Dataset(h5py.h5d.open(opened.id, place, access))
            self._checked: set[tuple[int, ...]] = set()
        # Damaged files can raise any exception.
        except Exception as error:
            if opened is not None:
                opened.close()
            if isinstance(error, FileNotFoundError):
                raise
            raise StoreError(f"{file} must be a whole HDF5 file with a dataset {key!r} of numbers: {error}") from error

    def _check_place(self, h5py: Any) -> None:
        """Raise BadFile if values are in another file, or need a filter plugin."""
        if self._properties.get_external_count():
            raise BadFile("its values must be in the file, got external storage")
        if self._properties.get_layout() == h5py.h5d.VIRTUAL:
            raise BadFile("its values must be in the file, got a virtual dataset")
        filters = [self._properties.get_filter(number)[0] for number in range(self._properties.get_nfilters())]
        # No szip: with crafted parameters its decoder writes out of bounds.
        packings = {h5py.h5z.FILTER_DEFLATE: _gzip_size, h5py.h5z.FILTER_LZF: _lzf_size}
        order = [h5py.h5z.FILTER_SHUFFLE, *packings, h5py.h5z.FILTER_FLETCHER32]
        packed = [code for code in filters if code in packings]
        if filters != [code for code in order if code in filters] or len(packed) > 1:
            raise BadFile(f"its filters must be shuffle, gzip or lzf, and fletcher32, got {filters}")
        # The bits of a chunk's mask of omitted filters.
        self._packed, self._summed = (
            sum(1 << filters.index(code) for code in those if code in filters) for those in (packed, order[-1:])
        )
        self._unpacked_size = packings[packed[0]] if packed else lambda data, most: len(data)
        self._filtered = bool(filters)

    def _check_sizes(self, h5py: Any) -> None:
        if self.dtype.kind not in "biuf" or not self.shape:
            raise BadFile(f"it must hold numbers, got {self.dtype} of shape {self.shape}")
        check_count(self.shape[0], "clips")
        size = math.prod(self.shape) * self.dtype.itemsize
        check_size(size // max(1, self.shape[0]))
        self._chunk = 0
        stored = self._data.id.get_storage_size()
        # For contiguous values the file states shape and number of bytes.
        if stored != size and (self._properties.get_layout() != h5py.h5d.CHUNKED or not stored):
            raise BadFile(f"it has {stored} bytes for shape {self.shape} of {self.dtype}")
        if self._properties.get_layout() == h5py.h5d.CHUNKED:
            sizes = self._properties.get_chunk()
            self._chunk = math.prod(sizes) * self.dtype.itemsize
            if self._chunk > max(size, _SMALL_CHUNK):
                raise BadFile(f"its chunks must have at most its {size} bytes, got {self._chunk}")
            check_size(self._chunk)
            if math.prod(-(-whole // size) for whole, size in zip(self.shape, sizes, strict=True)) > _MOST_CHUNKS:
                raise BadFile(f"it must have at most {_MOST_CHUNKS} chunks, got more, of {self._chunk} bytes")

    def whole(self) -> np.ndarray:
        """All values.

        Raises:
            StoreError: the dataset is damaged, or larger than a limit.
        """
        try:
            check_size(math.prod(self.shape) * self.dtype.itemsize)
        except BadFile as error:
            raise StoreError(f"{self.where}) must be within the size limit: {error}") from error
        return self._read(slice(None), f"{self.where})")

    def clip(self, number: int) -> np.ndarray:
        """One clip, without the axis of clips.

        Raises:
            StoreError: the clip is damaged.
        """
        return self._read(number, f"{self.where}[{number}])")

    def _read(self, key: int | slice, where: str) -> np.ndarray:
        try:
            if self._chunk:
                counts = [
                    -(-whole // size) for whole, size in zip(self.shape, self._properties.get_chunk(), strict=True)
                ]
                touched = math.prod(counts[1:] if isinstance(key, int) else counts)
                if touched > _MOST_AT_ONCE:
                    raise BadFile(f"it must have at most {_MOST_AT_ONCE} chunks per read, got {touched}")
            if self._filtered:
                self._check_chunks(slice(key, key + 1) if isinstance(key, int) else key)
            return self._data[key]
        # Damaged chunks can raise any exception.
        except Exception as error:
            raise StoreError(f"{where} must be whole, but cannot be read: {error}") from error

    def _check_chunks(self, clips: slice) -> None:
        """Raise BadFile if a chunk does not unpack to its size, which HDF5 does not check."""
        sizes = self._properties.get_chunk()
        for place in self._data.iter_chunks((clips, *(slice(None) for _ in sizes[1:]))):
            corner = tuple(one.start // size * size for one, size in zip(place, sizes, strict=True))
            info = None if corner in self._checked else self._data.id.get_chunk_info_by_coord(corner)
            if info is None or info.byte_offset is None:
                continue  # already checked, or never written
            if info.size > self._size:
                raise BadFile(f"a chunk must fit in the file of {self._size} bytes, got {info.size}")
            left_out, data = self._data.id.read_direct_chunk(corner)
            data = data[:-4] if self._summed & ~left_out else data
            size = self._unpacked_size(data, self._chunk) if self._packed & ~left_out else len(data)
            if size != self._chunk:
                raise BadFile(f"a chunk does not unpack to its {self._chunk} bytes")
            if sizes[0] > 1 and len(self._checked) < _MOST_AT_ONCE:
                self._checked.add(corner)


def _without_links(h5py: Any, root: Any, key: bytes) -> bytes:
    """The path of an object from the root of its file, with soft links resolved.

    Raises:
        BadFile: a link leads to another file, or there are too many links.
    """
    place, rest = b"/", key.split(b"/")
    for _ in range(_MOST_NAMES):
        while rest and rest[0] in (b"", b"."):
            del rest[0]
        if not rest:
            return place
        name, *rest = rest
        # HDF5 closes a group without references.
        group = h5py.h5o.open(root, place)
        kind = group.links.get_info(name).type
        if kind == h5py.h5l.TYPE_HARD:
            place = place.rstrip(b"/") + b"/" + name
        elif kind == h5py.h5l.TYPE_SOFT:
            target = group.links.get_val(name)
            place, rest = b"/" if target.startswith(b"/") else place, [*target.split(b"/"), *rest]
        else:
            raise BadFile(f"{key.decode()!r} must not be a link to another file")
    raise BadFile(f"{key.decode()!r} must be a link through at most {_MOST_NAMES} names")


def _gzip_size(data: bytes, most: int) -> int:
    """Bytes of an unpacked chunk; `most + 1` if it is larger or damaged."""
    unpacker = zlib.decompressobj()
    length = len(unpacker.decompress(data, most + 1))
    return length if unpacker.eof else most + 1


def _lzf_size(data: bytes, most: int) -> int:
    """As `_gzip_size`, for LZF: literal runs, and back references."""
    place = length = 0
    while place < len(data):
        control = data[place]
        if control < 32:
            place += control + 2
            length += control + 1
        else:
            long = control >> 5 == 7
            length += (control >> 5) + 2 + (data[place + 1] if long else 0)
            place += 3 if long else 2
    return length if place == len(data) else most + 1
