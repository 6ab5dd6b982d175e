"""AVVP, the annotated videos of LLP, with separate events in each modality; and its common classes with AVE."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from unicode_fast.data.layouts import published
from unicode_fast.data.layouts.ave import CLASSES, h5_files, ordered_table, read_labels, read_order
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
from unicode_fast.data.layouts.index import ClipTable, DatasetIndex, Fit, Note
from unicode_fast.data.layouts.published import PublishedList, count_notes
from unicode_fast.data.layouts.request import Request
from unicode_fast.data.layouts.vggsound import POSITIONS, YOUTUBE_ID, zip_folder
from unicode_fast.data.store.checks import StoreError

_STREAMS = {"audio": "audio", "video": "visual"}


def list_avvp(root: Path, request: Request) -> DatasetIndex:
    """Split "all", one list of clips per modality; and train, val and test splits of them.

    The released code trains and tests on "all". The other splits depend on the hash of the video's id alone, so no
    video is in two of them.
    """
    files = Files("avvp", root)
    lists = _list_files(files, request, "AVVP_eval_{}_checked_combined.csv")
    categories = files.file("AVVP_Categories.txt")
    folders = {name: zip_folder(files, name) for name in lists}
    files.check()
    classes = read_lines(categories)
    whole = [_annotated(name, lists[name], folders[name], classes) for name in lists]
    divided = divide([hashed_split(_videos(table)) for table in whole])
    notes = _test_notes(lists, whole, published.AVVP)
    return DatasetIndex("avvp", root, classes, {"all": whole}, divided, notes=notes)


def list_ave_avvp(root: Path, request: Request) -> DatasetIndex:
    """The twelve common classes: "all", train and val from AVE; test from AVVP, one list per modality.

    The released code trains on "all", the whole AVE list; train and val divide it by the hash of a clip's number.
    The root holds AVE/, AVVP/ and AVE_AVVP/ with the lists.
    """
    files = Files("ave-avvp", root)
    features = h5_files(files, request, "AVE/")
    labels, order = files.file("AVE_AVVP/ave_avvp_labels.h5"), files.file("AVE_AVVP/ave_avvp_order.h5")
    lists = _list_files(files, request, "AVE_AVVP/AVE_AVVP_eval_{}_checked_combined.csv")
    categories = files.file("AVE_AVVP/AVE_AVVP_Categories.txt")
    folders = {name: zip_folder(files, name, "AVVP/") for name in lists}
    files.check()
    classes = read_lines(categories)
    label = read_labels(labels, len(classes))
    numbers = read_order(order, len(label))
    trained, notes = ordered_table(features, label, numbers, order)
    target = np.asarray(trained.arrays["class"])
    found = PublishedList({"train": len(numbers)}, len(np.unique(target)))
    notes += count_notes(order, found, published.AVE_AVVP_TRAIN)
    whole = PublishedList({"all": len(label)})
    notes += count_notes(labels, whole, PublishedList({"all": published.AVE_CLIPS}))
    notes += published.class_notes(categories, classes, list(published.AVE_AVVP_CLASSES))
    notes += published.ave_avvp_notes(order, target, classes, _ave_classes(root, numbers), CLASSES)
    held_out = hashed_split([f"ave {number}" for number in numbers])["val"]
    tested = [_annotated(name, lists[name], folders[name], classes) for name in lists]
    notes += _test_notes(lists, tested, published.AVE_AVVP_TEST)
    divided = divide([{"train": ~held_out, "val": held_out}])
    return DatasetIndex("ave-avvp", root, classes, {"all": [trained], "test": tested}, divided, notes=notes)


def _list_files(files: Files, request: Request, name: str) -> dict[str, Path]:
    return {key: files.file(name.format(word)) for key, word in _STREAMS.items() if request.includes(key)}


def _test_notes(
    lists: Mapping[str, Path], tables: Sequence[ClipTable], known: Mapping[str, PublishedList]
) -> list[Note]:
    notes = []
    for (name, file), table in zip(lists.items(), tables, strict=True):
        notes += count_notes(file, PublishedList({"test": len(table)}), known[name])
    return notes


def _ave_classes(root: Path, numbers: np.ndarray) -> np.ndarray:
    """(n,) int64, the class of these clips in AVE's own labels; (0,) without their file, which no task needs."""
    with contextlib.suppress(FileNotFoundError, StoreError):
        label = read_labels(root / "AVE/labels.h5", len(CLASSES))
        if len(label) > numbers.max():
            return np.asarray(label[numbers, :, :-1].sum(1).argmax(1))
    return np.zeros(0, np.int64)


def _videos(table: ClipTable) -> list[str]:
    return [str(name)[:YOUTUBE_ID] for name in np.asarray(table.arrays["id"])]


def _annotated(modality: str, file: Path, folder: Path, classes: Sequence[str]) -> ClipTable:
    """The clips of one list with the features and labels of one modality."""
    rows = read_csv(file, ["filename", "onset", "offset", "event_labels"], delimiter="\t")
    names = [row["filename"] for row in rows]
    label = label_array(len(rows), POSITIONS, len(classes), file)
    for number, row in enumerate(rows):
        label[number] = event_label(row, classes, file)
    fit: Fit = "repeat" if modality == "audio" else "exact"
    features = zip_features(folder, [name[:YOUTUBE_ID] for name in names], POSITIONS, fit)
    return ClipTable({modality: features}, {"id": text_array(names, file), f"{modality}.label": label})


def event_label(row: dict[str, str], classes: Sequence[str], file: Path) -> np.ndarray:
    """(10, C+1) uint8: each event's class in the seconds [onset, offset), background in other seconds.

    Raises:
        StoreError: the three lists of the row differ in length, or a second is out of range.
    """
    try:
        onset, offset = ([int(value) for value in row[key].split(",")] for key in ("onset", "offset"))
    except ValueError as error:
        raise StoreError(f"{file} must have whole seconds, got {row['filename']}: {error}") from error
    events = numbers_of([name.strip() for name in row["event_labels"].split(",")], classes, file)
    if not len(onset) == len(offset) == len(events):
        raise StoreError(
            f"{file} must list as many onsets and offsets as events, got {len(onset)}, {len(offset)} and {len(events)} "
            f"for {row['filename']}"
        )
    label = np.zeros((POSITIONS, len(classes) + 1), np.uint8)
    for start, stop, event in zip(onset, offset, events, strict=True):
        if not 0 <= start <= stop <= POSITIONS:
            raise StoreError(f"{file} must have seconds in [0, {POSITIONS}], got {start} to {stop}: {row['filename']}")
        label[start:stop, event] = 1
    label[:, -1] = label[:, :-1].max(1) == 0
    return label
