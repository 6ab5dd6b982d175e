"""AVE: 4143 clips of ten seconds with one event each, audio and video, in HDF5 files."""

from __future__ import annotations

import math
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from unicode_fast.data.layouts.files import Files, need
from unicode_fast.data.layouts.request import Request
from unicode_fast.data.layouts.sources import Listing, Note, Part, Source
from unicode_fast.data.store.checks import StoreError
from unicode_fast.files.untrusted import BadFile, check_count, check_size, open_file

CLASSES = [
    "Church bell", "Male speech, man speaking", "Bark", "Fixed-wing aircraft, airplane", "Race car, auto racing",
    "Female speech, woman speaking", "Helicopter", "Violin, fiddle", "Flute", "Ukulele", "Frying (food)", "Truck",
    "Shofar", "Motorcycle", "Acoustic guitar", "Train horn", "Clock", "Banjo", "Goat", "Baby cry, infant cry", "Bus",
    "Chainsaw", "Cat", "Horse", "Toilet flush", "Rodents, rats, mice", "Accordion", "Mandolin",
]  # fmt: skip
KEY = "avadataset"
# Of an HDF5 file: names in a message, bytes of a chunk that may be larger than what it is of, and number of chunks.
_SHOWN_KEYS, _SMALL_CHUNK = 12, 1 << 26
# Chunks of a dataset, and of them those that one read touches, for each of which HDF5 takes some kilobytes.
_MOST_CHUNKS, _MOST_AT_ONCE = 1 << 22, 1 << 13
# Of HDF5's cache of unpacked chunks, its own numbers.
_CACHE_SLOTS, _CACHE = 521, 1 << 20
# Names and links on the way to a dataset.
_MOST_PARTS = 100
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
    data = H5Array(file, KEY)
    if len(data.shape) < 3 or data.shape[0] != clips:
        raise StoreError(f"{file} must hold {KEY} of ({clips}, steps, ...), got {data.shape}")
    where = [f"{file} ({KEY}[{number}])" for number in range(clips)]
    return Source(where, data.clip, np.arange(clips), data.shape[1], "exact")


def read_labels(file: Path, classes: int) -> np.ndarray:
    """(clips, T, C+1) uint8, background last."""
    data = H5Array(file, KEY)
    label = data.whole() if len(data.shape) == 3 and data.shape[2] == classes + 1 else np.full(1, 2)
    # Clip by clip, as masks of all would be as large again.
    if not all(((clip == 0) | (clip == 1)).all() for clip in label):
        raise StoreError(
            f"{file} must hold {KEY} of (clips, steps, {classes + 1}) 0 and 1, got {data.shape} {data.dtype}"
        )
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
    """A dataset of numbers in an HDF5 file, which stays open and unread.

    It must lie in the file itself: external storage, external links and virtual datasets, whose values are those of
    other files of the machine, are refused, and so are filters that HDF5 would load as a plugin.

    Args:
        file: of the dataset.
        key: its name in the root group.

    Attributes:
        shape: of it.
        dtype: of it.

    Raises:
        StoreError: it is no HDF5 file, has no such dataset, or one that is refused.
        FileNotFoundError: there is no file.
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
                raise BadFile(f"it has {', '.join(found) or 'none'}")
            place = _without_links(h5py, opened.id, key.encode())
            data = h5py.h5o.open(opened.id, place)
            if not isinstance(data, h5py.h5d.DatasetID):
                raise BadFile(f"{key!r} is none")
            self._properties = data.get_create_plist()
            self._check_place(h5py)
            self._data = h5py.Dataset(data)
            self.shape: tuple[int, ...] = self._data.shape or ()
            self.dtype: np.dtype = self._data.dtype
            self._check_sizes(h5py)
            # Open as it is, it would keep its cache, which large chunks do not fit in.
            del data, self._data
            # A chunk of many clips is unpacked once where they are read in their order, and looked at once.
            access = h5py.h5p.create(h5py.h5p.DATASET_ACCESS)
            access.set_chunk_cache(_CACHE_SLOTS, max(_CACHE, self._chunk), 0.75)
            self._data = h5py.Dataset(h5py.h5d.open(opened.id, place, access))
            self._sound: set[tuple[int, ...]] = set()
        # Damaged files raise nearly anything.
        except Exception as error:
            if opened is not None:
                opened.close()
            if isinstance(error, FileNotFoundError):
                raise
            raise StoreError(f"{file} must be a whole HDF5 file with a dataset {key!r} of numbers: {error}") from error

    def _check_place(self, h5py: Any) -> None:
        """Raise BadFile where values are not in the file itself, or need code that HDF5 does not have."""
        if self._properties.get_external_count():
            raise BadFile("its values are in another file, which is not read")
        if self._properties.get_layout() == h5py.h5d.VIRTUAL:
            raise BadFile("it is made of datasets of other files, which are not read")
        filters = [self._properties.get_filter(number)[0] for number in range(self._properties.get_nfilters())]
        # None of szip: its decoder writes anywhere where the file gives it other parameters.
        packings = {h5py.h5z.FILTER_DEFLATE: _gzip_size, h5py.h5z.FILTER_LZF: _lzf_size}
        order = [h5py.h5z.FILTER_SHUFFLE, *packings, h5py.h5z.FILTER_FLETCHER32]
        packed = [code for code in filters if code in packings]
        if filters != [code for code in order if code in filters] or len(packed) > 1:
            raise BadFile(f"it is packed by filters {filters}; shuffle, gzip or lzf, and fletcher32 are read")
        # The bits by which a chunk says that one was left out of it.
        self._packed, self._summed = (
            sum(1 << filters.index(code) for code in those if code in filters) for those in (packed, order[-1:])
        )
        self._unpacked_size = packings[packed[0]] if packed else lambda data, most: len(data)
        self._filtered = bool(filters)

    def _check_sizes(self, h5py: Any) -> None:
        if self.dtype.kind not in "biuf" or not self.shape:
            raise BadFile(f"it holds {self.dtype} of shape {self.shape}, not numbers")
        check_count(self.shape[0], "clips")
        size = math.prod(self.shape) * self.dtype.itemsize
        check_size(size // max(1, self.shape[0]))
        self._chunk = 0
        stored = self._data.id.get_storage_size()
        # Of values that are in one piece the file has the shape, and the number of bytes.
        if stored != size and (self._properties.get_layout() != h5py.h5d.CHUNKED or not stored):
            raise BadFile(f"it has {stored} bytes for shape {self.shape} of {self.dtype}")
        if self._properties.get_layout() == h5py.h5d.CHUNKED:
            sizes = self._properties.get_chunk()
            self._chunk = math.prod(sizes) * self.dtype.itemsize
            if self._chunk > max(size, _SMALL_CHUNK):
                raise BadFile(f"its chunks are of {self._chunk} bytes, it holds {size}")
            check_size(self._chunk)
            if math.prod(-(-whole // part) for whole, part in zip(self.shape, sizes, strict=True)) > _MOST_CHUNKS:
                raise BadFile(f"it has more than {_MOST_CHUNKS} chunks, of {self._chunk} bytes")

    def whole(self) -> np.ndarray:
        """All of it.

        Raises:
            StoreError: it is damaged, or larger than a limit.
        """
        try:
            check_size(math.prod(self.shape) * self.dtype.itemsize)
        except BadFile as error:
            raise StoreError(f"{self.where}) must be whole and of a moderate size: {error}") from error
        return self._read(slice(None), f"{self.where})")

    def clip(self, number: int) -> np.ndarray:
        """One clip, without the axis of clips.

        Raises:
            StoreError: it is damaged.
        """
        return self._read(number, f"{self.where}[{number}])")

    def _read(self, key: int | slice, where: str) -> np.ndarray:
        try:
            if self._chunk:
                parts = [
                    -(-whole // part) for whole, part in zip(self.shape, self._properties.get_chunk(), strict=True)
                ]
                touched = math.prod(parts[1:] if isinstance(key, int) else parts)
                if touched > _MOST_AT_ONCE:
                    raise BadFile(f"it is cut into {touched} chunks, of at most {_MOST_AT_ONCE} that are read at once")
            if self._filtered:
                self._check_chunks(slice(key, key + 1) if isinstance(key, int) else key)
            return self._data[key]
        # Damaged chunks raise nearly anything.
        except Exception as error:
            raise StoreError(f"{where} must be whole, but cannot be read: {error}") from error

    def _check_chunks(self, clips: slice) -> None:
        """Raise BadFile where a chunk does not unpack to its size: HDF5 unpacks whatever there is."""
        sizes = self._properties.get_chunk()
        for place in self._data.iter_chunks((clips, *(slice(None) for _ in sizes[1:]))):
            corner = tuple(part.start // size * size for part, size in zip(place, sizes, strict=True))
            info = None if corner in self._sound else self._data.id.get_chunk_info_by_coord(corner)
            if info is None or info.byte_offset is None:
                continue  # looked at, or never written
            if info.size > self._size:
                raise BadFile(f"a chunk has {info.size} bytes, the file {self._size}")
            left_out, data = self._data.id.read_direct_chunk(corner)
            data = data[:-4] if self._summed & ~left_out else data
            size = self._unpacked_size(data, self._chunk) if self._packed & ~left_out else len(data)
            if size != self._chunk:
                raise BadFile(f"a chunk does not unpack to its {self._chunk} bytes")
            if sizes[0] > 1 and len(self._sound) < _MOST_AT_ONCE:
                self._sound.add(corner)


def _without_links(h5py: Any, root: Any, key: bytes) -> bytes:
    """The path of an object from the root of its file, soft links followed.

    Raises:
        BadFile: a link leads to another file, or is one of many.
    """
    place, rest = b"/", key.split(b"/")
    for _ in range(_MOST_PARTS):
        while rest and rest[0] in (b"", b"."):
            del rest[0]
        if not rest:
            return place
        part, *rest = rest
        # It closes as soon as nothing refers to it.
        group = h5py.h5o.open(root, place)
        kind = group.links.get_info(part).type
        if kind == h5py.h5l.TYPE_HARD:
            place = place.rstrip(b"/") + b"/" + part
        elif kind == h5py.h5l.TYPE_SOFT:
            target = group.links.get_val(part)
            place, rest = b"/" if target.startswith(b"/") else place, [*target.split(b"/"), *rest]
        else:
            raise BadFile(f"{key.decode()!r} is a link to another place, which is not read")
    raise BadFile(f"{key.decode()!r} is a link through more than {_MOST_PARTS} places")


def _gzip_size(data: bytes, most: int) -> int:
    """Bytes that a chunk unpacks to, or another number than `most`."""
    unpacker = zlib.decompressobj()
    length = len(unpacker.decompress(data, most + 1))
    return length if unpacker.eof else most + 1


def _lzf_size(data: bytes, most: int) -> int:
    """The same of LZF: runs of bytes as they are, and of those that came before."""
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
