"""AVSBench-S4: five frames per video with masks of the sounding object, audio features, and a sentence per category."""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unicode_fast.data.layouts.files import (
    Files,
    file_features,
    numbers_of,
    read_csv,
    read_sentences,
    text_array,
)
from unicode_fast.data.layouts.index import ClipTable, DatasetIndex
from unicode_fast.data.layouts.request import Request
from unicode_fast.data.layouts.zip_pickle import read_zipped_array
from unicode_fast.data.lazy import ClipArray, LazyArray
from unicode_fast.data.store.checks import StoreError
from unicode_fast.files.optional import need
from unicode_fast.files.untrusted import PICTURE_VARIABLE, BadFile, check_size, read_bytes

POSITIONS = 5
_TABLE = "s4_meta_data.csv"
_PROMPTS = "AVSBenchCategories2Prompts.csv"
_PNG, _JPEG_SCAN = b"\x89PNG\r\n\x1a\n", b"\xff\xda"
# Pixels of a JPEG times its number of scans.
_MOST_SCANNED = 1 << 32


def list_avsbench(root: Path, request: Request) -> DatasetIndex:
    """The official splits train, val and test, with audio and text as queries.

    Other arrays, read when indexed: "video.frames" is (clips, 5, H, W, 3) uint8. "video.mask" is (clips, n, H, W)
    uint8, 1 on the object. In train the number n of masks is 1, for the first frame; in val and test it is 5.
    """
    files = Files("avsbench-s4", root)
    table = files.file(_TABLE)
    prompts = files.file(_PROMPTS) if request.includes("text") else None
    for folder in ("visual_frames", "gt_masks", *(["feature/audio"] if request.includes("audio") else [])):
        files.folder(folder)
    files.check()
    rows = read_csv(table, ["split"])
    if rows and len(rows[0]) < 3:
        raise StoreError(f"{table} must have names in column 1 and categories in column 3, got {len(rows[0])} columns")
    columns = [list(row.values()) for row in rows]
    classes = sorted({values[2] for values in columns})
    tables: dict[str, list[ClipTable]] = {}
    missing: list[str] = []
    for split in ("train", "val", "test"):
        chosen = [values for values, row in zip(columns, rows, strict=True) if row["split"] == split]
        if chosen:
            places = [Path(split, values[2], values[0]) for values in chosen]
            clips = _clips(root, places, classes, request, prompts)
            tables[split] = [ClipTable(clips.features, {**clips.arrays, **_frames_and_masks(root, places, missing)})]
    return DatasetIndex("avsbench-s4", root, classes, tables, missing=missing)


def _clips(
    root: Path, places: Sequence[Path], classes: Sequence[str], request: Request, prompts: Path | None
) -> ClipTable:
    """The clips at some paths <split>/<category>/<video>, with their audio and sentences."""
    categories = [place.parts[1] for place in places]
    arrays: dict[str, ClipArray] = {
        "id": text_array([place.name for place in places], root / _TABLE),
        "class": numbers_of(categories, classes, root / _TABLE),
    }
    features = {}
    if request.includes("audio"):
        zips = [
            root / "feature/audio" / place.parts[0] / "zip" / place.parts[1] / f"{place.name}.zip" for place in places
        ]
        features["audio"] = file_features(zips, read_zipped_array, POSITIONS, "repeat")
    if prompts is not None:
        sentences = read_sentences(prompts, categories)
        arrays["text.sentence"] = text_array(sentences, prompts)
        features["text"] = request.words(sentences)
    return ClipTable(features, arrays)


def _frames_and_masks(root: Path, places: Sequence[Path], missing: list[str]) -> dict[str, LazyArray]:
    """The pictures of some clips; missing files are added to `missing`."""
    found = {}
    masks = 1 if places[0].parts[0] == "train" else POSITIONS
    for key, folder, count in (("video.frames", "visual_frames", POSITIONS), ("video.mask", "gt_masks", masks)):
        groups = [[root / folder / p / f"{p.name}_{number + 1}.png" for number in range(count)] for p in places]
        absent = [str(file) for group in groups for file in group if not file.is_file()]
        missing += absent
        if not absent:
            found[key] = _pictures(groups, mask=key == "video.mask")
    return found


def _pictures(groups: Sequence[Sequence[Path]], mask: bool) -> LazyArray:
    """(clips, n, H, W) of 0 and 1, or (clips, n, H, W, 3); all of the first picture's size."""
    shape = read_picture(groups[0][0], mask).shape

    def read(clip: int) -> np.ndarray:
        pictures = [read_picture(file, mask) for file in groups[clip]]
        for file, picture in zip(groups[clip], pictures, strict=True):
            if picture.shape != shape:
                raise StoreError(f"{file} must have shape {shape} of the first picture, got {picture.shape}")
        return np.stack(pictures)

    return LazyArray.by_clip((len(groups), len(groups[0]), *shape), np.uint8, read)


def read_picture(file: Path, mask: bool) -> np.ndarray:
    """(H, W, 3) uint8, or for a mask (H, W) uint8 of 0 and 1.

    Raises:
        StoreError: the file is no PNG or JPEG picture, is damaged, or is larger than a limit.
        FileNotFoundError: the file is missing.
    """
    png, jpeg = need("PIL.PngImagePlugin", "data"), need("PIL.JpegImagePlugin", "data")
    try:
        data = read_bytes(file, PICTURE_VARIABLE)
        if data.startswith(_PNG):
            _check_chunks(memoryview(data))
        with (png.PngImageFile if data.startswith(_PNG) else jpeg.JpegImageFile)(io.BytesIO(data)) as picture:
            pixels, scans = picture.width * picture.height, data.count(_JPEG_SCAN)
            check_size(3 * pixels, PICTURE_VARIABLE)
            if picture.format == "JPEG" and pixels * scans > _MOST_SCANNED:
                raise BadFile(f"it must scan at most {_MOST_SCANNED} pixels, got {scans} scans of {pixels} pixels")
            values = np.asarray(picture.convert("L" if mask else "RGB"))
    except FileNotFoundError:
        raise
    # A damaged picture can raise any exception.
    except Exception as error:
        raise StoreError(f"{file} must be a whole picture, PNG or JPEG, but cannot be read: {error}") from error
    return (values > 127).astype(np.uint8) if mask else values


def _check_chunks(png: memoryview) -> None:
    """Raise BadFile if a chunk of a PNG differs from its checksum; Pillow checks only some chunks."""
    kind, place = b"", len(_PNG)
    while kind != b"IEND":
        size, kind = int.from_bytes(png[place : place + 4], "big"), bytes(png[place + 4 : place + 8])
        end = place + 8 + size
        if end + 4 > len(png):
            raise BadFile("it is cut short")
        if zlib.crc32(png[place + 4 : end]) != int.from_bytes(png[end : end + 4], "big"):
            raise BadFile(f"the checksum of its chunk {kind!r} differs")
        place = end + 4
