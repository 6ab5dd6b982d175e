"""The sixteen common classes of UCF-101, used for video only, and VGGSound, used for audio only."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from unicode_fast.data.layouts.files import (
    Files,
    divide,
    hashed_split,
    label_array,
    numbers_of,
    read_csv,
    read_lines,
    text_array,
    zip_features,
)
from unicode_fast.data.layouts.index import ClipTable, DatasetIndex
from unicode_fast.data.layouts.published import (
    UCF_VGGSOUND,
    UCF_VGGSOUND_CLASSES,
    PublishedList,
    class_notes,
    count_notes,
)
from unicode_fast.data.layouts.request import Request
from unicode_fast.data.layouts.vggsound import POSITIONS, YOUTUBE_ID, zip_folder
from unicode_fast.data.store.checks import StoreError

# Folder, list and classes of each modality's data set; line i of both class files is the same class.
_SETS = {
    "video": ("UCF101/", "ucf2vggsound.csv", "UCF101sameVGGSound.txt"),
    "audio": ("vggsound40k/", "vggsound2ucf.csv", "VGGSoundsameUCF101.txt"),
}
# In UCF-101's first official split, groups 1 to 7 are the test split.
_TEST_GROUPS, _VAL_GROUPS = range(1, 8), range(8, 11)


def list_ucf_vggsound(root: Path, request: Request) -> DatasetIndex:
    """Split "all", video of UCF-101 and audio of VGGSound; and train, val and test splits of each.

    The released code trains on "all" of one and tests on "all" of the other. UCF-101 is divided by group: 1 to 7 are
    test, 8 to 10 val. A group holds all clips of one video. VGGSound is divided by the hash of the video's id. Classes
    have VGGSound's names.
    """
    files = Files("ucf-vggsound", root)
    names = {modality: files.file(classes) for modality, (_, _, classes) in _SETS.items()}
    chosen = {modality: those for modality, those in _SETS.items() if request.includes(modality)}
    lists = {modality: files.file(table) for modality, (_, table, _) in chosen.items()}
    folders = {modality: zip_folder(files, modality, base) for modality, (base, _, _) in chosen.items()}
    files.check()
    classes = {modality: read_lines(file) for modality, file in names.items()}
    if len(classes["audio"]) != len(classes["video"]):
        raise StoreError(
            f"{names['audio']} and {names['video']} must have equally many lines, got {len(classes['audio'])} and "
            f"{len(classes['video'])}"
        )
    whole = [listed_clips(lists[name], {name: folders[name]}, classes[name]) for name in chosen]
    notes = []
    for (modality, file), published in zip(names.items(), zip(*UCF_VGGSOUND_CLASSES, strict=True), strict=True):
        notes += class_notes(file, classes[modality], published)
    for name, table in zip(chosen, whole, strict=True):
        found = PublishedList({"all": len(table)}, len(np.unique(np.asarray(table.arrays["class"]))))
        notes += count_notes(lists[name], found, UCF_VGGSOUND[name])
    divided = divide([_divided(table) for table in whole])
    return DatasetIndex("ucf-vggsound", root, classes["audio"], {"all": whole}, divided, notes=notes)


def listed_clips(file: Path, folders: Mapping[str, Path], classes: Sequence[str]) -> ClipTable:
    """The clips of one list, with features from these folders by modality: their class in every second, no background.

    Raises:
        StoreError: a category is not a class.
    """
    rows = read_csv(file, ["category", "video_id"])
    target = numbers_of([row["category"] for row in rows], classes, file)
    names = [row["video_id"] for row in rows]
    label = label_array(len(rows), POSITIONS, len(classes), file)
    label[np.arange(len(rows)), :, target] = 1
    features = {name: zip_features(folder, names, POSITIONS, "repeat") for name, folder in folders.items()}
    labels = {f"{name}.label": label for name in folders}
    return ClipTable(features, {"id": text_array(names, file), "class": target, **labels})


def _divided(table: ClipTable) -> dict[str, np.ndarray]:
    names = [str(name) for name in np.asarray(table.arrays["id"])]
    if "audio" in table.features:
        return hashed_split([name[:YOUTUBE_ID] for name in names])
    return split_by_group(names)


def split_by_group(names: Sequence[str]) -> dict[str, np.ndarray]:
    """(clips,) bool by split, from names of UCF-101: groups 1 to 7 are test, 8 to 10 val, others train.

    Raises:
        StoreError: a name has no group.
    """
    groups = [re.search(r"_g(\d+)_", name) for name in names]
    unknown = [name for name, group in zip(names, groups, strict=True) if group is None]
    if unknown:
        raise StoreError(f"video_id of UCF-101 must have the form v_Basketball_g01_c01, got {unknown[0]!r}")
    number = np.array([int(group[1]) for group in groups if group is not None])
    test, val = np.isin(number, _TEST_GROUPS), np.isin(number, _VAL_GROUPS)
    return {"train": ~test & ~val, "val": val, "test": test}
