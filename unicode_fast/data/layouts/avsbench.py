"""AVSBench-S4: five frames of a video with masks of what sounds, its audio features, and a sentence of its category."""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unicode_fast.data.layouts.files import (
    Files,
    file_source,
    need,
    numbers_of,
    read_csv,
    read_sentences,
    text_array,
)
from unicode_fast.data.layouts.request import Request
from unicode_fast.data.layouts.sources import Listing, Part
from unicode_fast.data.layouts.zip_pickle import read_zipped_array
from unicode_fast.data.lazy import ClipArray, LazyArray
from unicode_fast.data.store.checks import StoreError
from unicode_fast.files.untrusted import PICTURE_VARIABLE, BadFile, check_size, read_bytes

STEPS = 5
_TABLE = "s4_meta_data.csv"
_PROMPTS = "AVSBenchCategories2Prompts.csv"
_PNG, _JPEG_SCAN = b"\x89PNG\r\n\x1a\n", b"\xff\xda"
# Of a JPEG: its pixels times the scans that go over all of them.
_MOST_SCANNED = 1 << 32


def list_avsbench(root: Path, request: Request) -> Listing:
    """Splits train, val and test of its own, with audio and text to ask by.

    Beside the features: "video.frames" (clips, 5, H, W, 3) uint8, and "video.mask" (clips, k, H, W) uint8, 1 on the
    object, where k is 1, the first frame, in train, and 5 in val and test. Both are read when indexed.
    """
    files = Files("avsbench-s4", root)
    table = files.file(_TABLE)
    prompts = files.file(_PROMPTS) if request.wants("text") else None
    for folder in ("visual_frames", "gt_masks", *(["feature/audio"] if request.wants("audio") else [])):
        files.folder(folder)
    files.check()
    rows = read_csv(table, ["split"])
    if rows and len(rows[0]) < 3:
        raise StoreError(f"{table} must have names in column 1 and categories in column 3, got {len(rows[0])} columns")
    columns = [list(row.values()) for row in rows]
    classes = sorted({values[2] for values in columns})
    parts: dict[str, list[Part]] = {}
    missing: list[str] = []
    for split in ("train", "val", "test"):
        chosen = [values for values, row in zip(columns, rows, strict=True) if row["split"] == split]
        if chosen:
            places = [Path(split, values[2], values[0]) for values in chosen]
            part = _part(root, places, classes, request, prompts)
            parts[split] = [Part(part.sources, {**part.arrays, **_frames_and_masks(root, places, missing)})]
    return Listing("avsbench-s4", root, classes, parts, missing=missing)


def _part(root: Path, places: Sequence[Path], classes: Sequence[str], request: Request, prompts: Path | None) -> Part:
    """The clips at some places, <split>/<category>/<video>, with what asks for them."""
    categories = [place.parts[1] for place in places]
    arrays: dict[str, ClipArray] = {
        "id": text_array([place.name for place in places], root / _TABLE),
        "class": numbers_of(categories, classes, root / _TABLE),
    }
    sources = {}
    if request.wants("audio"):
        zips = [
            root / "feature/audio" / place.parts[0] / "zip" / place.parts[1] / f"{place.name}.zip" for place in places
        ]
        sources["audio"] = file_source(zips, read_zipped_array, STEPS, "repeat")
    if prompts is not None:
        said = read_sentences(prompts, categories)
        arrays["text.sentence"] = text_array(said, prompts)
        sources["text"] = request.words(said)
    return Part(sources, arrays)


def _frames_and_masks(root: Path, places: Sequence[Path], missing: list[str]) -> dict[str, LazyArray]:
    """The pictures of some clips; files that are not there are added to `missing`."""
    found = {}
    masks = 1 if places[0].parts[0] == "train" else STEPS
    for key, folder, count in (("video.frames", "visual_frames", STEPS), ("video.mask", "gt_masks", masks)):
        groups = [[root / folder / p / f"{p.name}_{number + 1}.png" for number in range(count)] for p in places]
        absent = [str(file) for group in groups for file in group if not file.is_file()]
        missing += absent
        if not absent:
            found[key] = _pictures(groups, mask=key == "video.mask")
    return found


def _pictures(groups: Sequence[Sequence[Path]], mask: bool) -> LazyArray:
    """(clips, k, H, W) of 0 and 1, or (clips, k, H, W, 3); as large as the first."""
    shape = read_picture(groups[0][0], mask).shape

    def read(clip: int) -> np.ndarray:
        pictures = [read_picture(file, mask) for file in groups[clip]]
        for file, picture in zip(groups[clip], pictures, strict=True):
            if picture.shape != shape:
                raise StoreError(f"{file} must have shape {shape} as the others, got {picture.shape}")
        return np.stack(pictures)

    return LazyArray.by_clip((len(groups), len(groups[0]), *shape), np.uint8, read)


def read_picture(file: Path, mask: bool) -> np.ndarray:
    """(H, W, 3) uint8, or (H, W) uint8 of 0 and 1 of a mask.

    Raises:
        StoreError: the file is no PNG or JPEG picture, is damaged, or is larger than a limit.
        FileNotFoundError: there is no file.
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
                raise BadFile(f"it has {scans} scans of {pixels} pixels, together of at most {_MOST_SCANNED}")
            values = np.asarray(picture.convert("L" if mask else "RGB"))
    except FileNotFoundError:
        raise
    # A damaged picture can raise nearly anything.
    except Exception as error:
        raise StoreError(f"{file} must be a whole picture, PNG or JPEG, but cannot be read: {error}") from error
    return (values > 127).astype(np.uint8) if mask else values


def _check_chunks(png: memoryview) -> None:
    """Raise BadFile where a chunk of a PNG differs from its checksum, which Pillow compares of some alone."""
    kind, place = b"", len(_PNG)
    while kind != b"IEND":
        size, kind = int.from_bytes(png[place : place + 4], "big"), bytes(png[place + 4 : place + 8])
        end = place + 8 + size
        if end + 4 > len(png):
            raise BadFile("it is cut short")
        if zlib.crc32(png[place + 4 : end]) != int.from_bytes(png[end : end + 4], "big"):
            raise BadFile(f"the checksum of its chunk {kind!r} differs")
        place = end + 4
