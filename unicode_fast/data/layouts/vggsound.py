"""VGGSound-AVEL 24K and 40K with sentences of categories, and the larger lists of 81K and 179K clips."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from unicode_fast.data.layouts.files import (
    Files,
    hashed_split,
    numbers_of,
    read_csv,
    read_lines,
    read_sentences,
    text_array,
    zip_features,
)
from unicode_fast.data.layouts.index import ClipTable, DatasetIndex, FeatureFiles, Fit, Note
from unicode_fast.data.layouts.published import AVEL_40K, AVEL_90K, PublishedList, count_notes
from unicode_fast.data.layouts.request import Request
from unicode_fast.data.lazy import LazyArray
from unicode_fast.data.store.checks import StoreError

POSITIONS = 10
YOUTUBE_ID = 11
# List of each data set with categories, and its published counts.
_LISTS = {"40k": ("vggsound-avel40k.csv", AVEL_40K), "90k": ("vggsound-avel90k-new.csv", AVEL_90K)}
_CATEGORIES = "VggsoundAVEL40kCategories.txt"
_PROMPTS = "vggsoundCategories2Prompts.csv"
# Order of the splits in the released code.
_OFFICIAL_ORDER = ("train", "test", "val")
# The first upload of the list held about half of the clips.
_BAD_ROWS = range(17_000, 25_000)


def zip_folder(files: Files, modality: str, base: str = "") -> Path:
    """The folder of a modality's zips."""
    return files.folder(f"{base}feature/{modality}/zip", f"{base}{modality}/zip")


def zipped_features(files: Files, request: Request, names: Sequence[str]) -> dict[str, FeatureFiles]:
    """Feature files of audio, whose short clips repeat the last row, and of video, which must have all positions."""
    fits: dict[str, Fit] = {"audio": "repeat", "video": "exact"}
    return {
        modality: zip_features(zip_folder(files, modality), names, POSITIONS, fit)
        for modality, fit in fits.items()
        if request.includes(modality)
    }


def avel_lister(layout: str, whole: bool, size: str = "40k") -> Callable[[Path, Request], DatasetIndex]:
    """The reader of a data set with categories.

    The split train of the 40K list is the 24K set. `whole` adds the split "all", the 40K set: train, test and val
    joined in this order, as in the released code.
    """
    name, published = _LISTS[size]

    def list_avel(root: Path, request: Request) -> DatasetIndex:
        files = Files(layout, root)
        table, categories = files.file(name), files.file(_CATEGORIES)
        prompts = files.file(_PROMPTS) if request.includes("text") else None
        zipped_features(files, request, [])
        files.check()
        classes = read_lines(categories)
        rows = read_csv(table, ["category", "video_id", "split"])
        others = sorted({row["split"] for row in rows} - set(_OFFICIAL_ORDER))
        if others:
            raise StoreError(f"split in {table} must be train, val or test, got {', '.join(map(repr, others))}")
        rows = [row for split in _OFFICIAL_ORDER for row in rows if row["split"] == split]
        names = [row["video_id"] for row in rows]
        target = numbers_of([row["category"] for row in rows], classes, table)
        arrays: dict[str, np.ndarray | LazyArray] = {"class": target, "id": text_array(names, table)}
        features = zipped_features(files, request, names)
        folder = next((root / name for name in ("feature/label/zip", "label/zip") if (root / name).is_dir()), None)
        missing: list[str] = []
        notes = [note for note in list_notes(len(rows), table, 40_000) if note.bad and size == "40k"]
        if not notes:
            counts = {split: sum(row["split"] == split for row in rows) for split in published.clips}
            notes = count_notes(table, PublishedList(counts, len(np.unique(target))), published)
        if folder is None:
            notes.append(Note("labels", f"{root} has no folder feature/label/zip: only clips have classes", False))
        else:
            label, presence = _labels(folder, names, target, len(classes))
            missing = presence.absent
            arrays.update({f"{modality}.label": label for modality in features})
        if prompts is not None:
            sentences = read_sentences(prompts, [classes[number] for number in target])
            arrays["text.sentence"] = text_array(sentences, prompts)
            features["text"] = request.words(sentences)
        joined = ClipTable(features, arrays)
        chosen = {split: np.array([row["split"] == split for row in rows]) for split in ("train", "val", "test")}
        chosen = {split: members for split, members in chosen.items() if members.any()}
        if whole:
            divided = {split: [members] for split, members in chosen.items()}
            return DatasetIndex(layout, root, classes, {"all": [joined]}, divided, missing, notes)
        lists = {split: [joined.select(members)] for split, members in chosen.items()}
        return DatasetIndex(layout, root, classes, lists, missing=missing, notes=notes)

    return list_avel


def list_notes(rows: int, table: Path, expected: int) -> list[Note]:
    """Notes on a list with an unexpected number of rows."""
    if expected == 40_000 and rows in _BAD_ROWS:
        return [
            Note(
                "bad list",
                f"{table} has {rows} rows of about {expected}: it is the first upload, with half of the clips; "
                "download the current file",
                True,
            )
        ]
    if not 0.9 * expected < rows < 1.1 * expected:
        return [Note("rows", f"{table} has {rows} rows, expected about {expected}", False)]
    return []


def _labels(folder: Path, names: Sequence[str], target: np.ndarray, classes: int) -> tuple[LazyArray, FeatureFiles]:
    """(clips, 10, C+1) uint8: the clip's category in positions where it occurs, else background."""
    presence = zip_features(folder, names, POSITIONS, "exact")

    def read(clip: int) -> np.ndarray:
        present = presence.read(clip)
        if present.shape != (POSITIONS,) or not np.isin(present, (0, 1)).all():
            raise StoreError(
                f"{presence.where[clip]} must hold ({POSITIONS},) of 0 and 1, got {present.shape} {present.dtype}"
            )
        label = np.zeros((POSITIONS, classes + 1), np.uint8)
        label[:, target[clip]] = present
        label[:, classes] = 1 - present
        return label

    return LazyArray.by_clip((len(names), POSITIONS, classes + 1), np.uint8, read), presence


def checked_lister(layout: str) -> Callable[[Path, Request], DatasetIndex]:
    """The reader of a data set without categories: "all", and train, val and test by the hash of the video's id."""

    def list_checked(root: Path, request: Request) -> DatasetIndex:
        files = Files(layout, root)
        table = files.file(f"video_name_{layout}_checked.csv")
        zipped_features(files, request, [])
        files.check()
        names = [row["id"] for row in read_csv(table, ["id"])]
        wrong = [name for name in names if not name.endswith(".mp4")]
        if wrong:
            raise StoreError(f"id in {table} must end in .mp4, got {wrong[0]!r}")
        names = [name.removesuffix(".mp4") for name in names]
        joined = ClipTable(zipped_features(files, request, names), {"id": text_array(names, table)})
        chosen = hashed_split([name[:YOUTUBE_ID] for name in names])
        divided = {split: [members] for split, members in chosen.items() if members.any()}
        expected = int(layout.removeprefix("vggsound").removesuffix("k")) * 1000
        notes = list_notes(len(names), table, expected)
        return DatasetIndex(layout, root, [], {"all": [joined]}, divided, notes=notes)

    return list_checked
