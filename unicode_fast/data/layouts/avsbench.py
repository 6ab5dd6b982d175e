"""AVSBench-S4: five frames of a video with masks of what sounds, its audio features, and a sentence of its category."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unicode_fast.data.files import Files, file_source, need, numbers_of, read_csv, read_prompts
from unicode_fast.data.layouts.request import Request
from unicode_fast.data.lazy import LazyArray
from unicode_fast.data.sources import Listing, Part
from unicode_fast.data.store_checks import StoreError
from unicode_fast.data.zip_pickle import read_zipped_array

STEPS = 5
_TABLE = "s4_meta_data.csv"
_PROMPTS = "AVSBenchCategories2Prompts.csv"


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
    videos = [list(row.values())[0] for row in rows]
    categories = [list(row.values())[2] for row in rows]
    classes = sorted(set(categories))
    target = numbers_of(categories, classes, table)
    sentences = read_prompts(prompts) if prompts is not None else {}
    parts: dict[str, list[Part]] = {}
    missing: list[str] = []
    for split in ("train", "val", "test"):
        chosen = [number for number, row in enumerate(rows) if row["split"] == split]
        if not chosen:
            continue
        places = [Path(split, categories[number], videos[number]) for number in chosen]
        arrays: dict[str, np.ndarray | LazyArray] = {
            "id": np.array([videos[number] for number in chosen]),
            "class": target[chosen],
        }
        for key, folder, pictures in (
            ("video.frames", "visual_frames", STEPS),
            ("video.mask", "gt_masks", 1 if split == "train" else STEPS),
        ):
            groups = [
                [root / folder / place / f"{place.name}_{number + 1}.png" for number in range(pictures)]
                for place in places
            ]
            absent = [str(file) for group in groups for file in group if not file.is_file()]
            missing += absent
            if not absent:
                arrays[key] = _pictures(groups, mask=key == "video.mask")
        sources = {}
        if request.wants("audio"):
            zips = [root / "feature/audio" / place.parts[0] / "zip" / Path(*place.parts[1:]) for place in places]
            files_of_clips = [file.with_name(f"{file.name}.zip") for file in zips]
            sources["audio"] = file_source(files_of_clips, read_zipped_array, STEPS, "repeat")
        if prompts is not None:
            lacking = sorted({categories[number] for number in chosen} - set(sentences))
            if lacking:
                raise StoreError(f"{prompts} must have a sentence for each category, got none for {', '.join(lacking)}")
            said = [sentences[categories[number]] for number in chosen]
            arrays["text.sentence"] = np.array(said)
            sources["text"] = request.words(said)
        parts[split] = [Part(sources, arrays)]
    return Listing("avsbench-s4", root, classes, parts, missing=missing)


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
        StoreError: the file is no picture.
    """
    image = need("PIL.Image", "data")
    try:
        with image.open(file) as picture:
            values = np.asarray(picture.convert("L" if mask else "RGB"))
    except OSError as error:
        raise StoreError(f"{file} must be a whole picture, but cannot be read: {error}") from error
    return (values > 127).astype(np.uint8) if mask else values
