"""Own data: one .npy file per clip and modality, and a CSV file of clips."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast, get_args

import numpy as np

from unicode_fast.config import Kind
from unicode_fast.data.layouts.files import (
    Files,
    file_features,
    numbers_of,
    read_csv,
    read_lines,
    text_array,
)
from unicode_fast.data.layouts.index import ClipTable, DatasetIndex, FeatureFiles, Note
from unicode_fast.data.layouts.request import Request
from unicode_fast.data.lazy import LazyArray
from unicode_fast.data.store.checks import StoreError, check_name
from unicode_fast.files import untrusted
from unicode_fast.files.untrusted import BadFile, npy_header, open_file

_TABLE, _CLASSES, _KINDS = "clips.csv", "classes.txt", "modalities.csv"
_COLUMNS = ("id", "split", "class", "without")


def list_clips(root: Path, request: Request) -> DatasetIndex:
    """The splits of `clips.csv`.

    `ROOT/clips.csv` has the columns id and split, and class if clips have classes. Each folder `ROOT/MODALITY` with a
    file `<id>.npy` for every clip is a modality. Its arrays are (positions, C) or (positions, H, W, C), of any length.
    A clip may lack modalities: the column without names them, separated by ";", and only they have no file.
    Labels are optional: `ROOT/MODALITY.labels/<id>.npy` is (positions, C + 1) in [0, 1], background last.
    `ROOT/classes.txt` lists the classes in order, one per line; without it they are sorted. `ROOT/modalities.csv`, with
    the columns modality and kind, sets the kind and the order of modalities; only the kind "words" must be given.
    """
    files = Files("clips", root)
    table = files.file(_TABLE)
    files.check()
    rows = read_csv(table, ["id", "split"])
    if not rows:
        raise StoreError(f"{table} must list at least one clip, got none")
    for column in rows[0].keys() & {"split", "class"}:
        blank = [row["id"] for row in rows if not row[column]]
        if blank:
            raise StoreError(f"{column} in {table} must be given for every clip, got none for {blank[0]!r}")
    for split in dict.fromkeys(row["split"] for row in rows):
        check_name(f"split in {table}", split, "_.")
    _check_disjoint(rows, table)
    if "class" in rows[0]:
        _check_classes(rows, table)
    kinds = _kinds(root)
    names = [name for name in kinds if request.includes(name)]
    for name in names:
        if not (name.isascii() and name.isidentifier()):
            raise StoreError(
                f"a modality folder in {root} must have a name of ASCII letters, digits and underscores that "
                f"begins with no digit, got {name!r}"
            )
        files.folder(name)
    files.check()
    bad = sorted({row["id"] for row in rows if not row["id"] or Path(row["id"]).name != row["id"]})
    if bad:
        raise StoreError(f"id in {table} must be a file name without folders, got {bad[0]!r}")
    arrays: dict[str, np.ndarray | LazyArray] = {"id": text_array([row["id"] for row in rows], table)}
    classes: list[str] = []
    if "class" in rows[0]:
        labels = [row["class"] for row in rows]
        classes = read_lines(root / _CLASSES) if (root / _CLASSES).is_file() else sorted(set(labels))
        arrays["class"] = numbers_of(labels, classes, table)
    lacking = _without(rows, list(kinds), table)
    features = {}
    missing: list[str] = []
    for name in names:
        paths = [root / name / f"{row['id']}.npy" for row in rows]
        without = np.array([name in those for those in lacking])
        features[name] = _features(paths, without, kinds[name], table)
        lengths, positions = np.asarray(features[name].lengths), features[name].positions
        if (root / f"{name}.labels").is_dir():
            labels_of_clips = [root / f"{name}.labels" / path.name for path in paths]
            there = zip(labels_of_clips, without, strict=True)
            missing += [str(path) for path, absent in there if not absent and not path.is_file()]
            arrays[f"{name}.label"] = _labels(labels_of_clips, without, lengths, (positions, len(classes) + 1))
    joined = ClipTable(features, arrays)
    tables = {}
    for split in dict.fromkeys(row["split"] for row in rows):
        tables[split] = [joined.select(np.array([row["split"] == split for row in rows]))]
    return DatasetIndex(
        root.name, root, classes, tables, missing=missing, notes=list(_notes(rows)), list_file=table.name
    )


def _kinds(root: Path) -> dict[str, Kind | None]:
    """The modalities, those with a given kind first."""
    given: dict[str, Kind | None] = {}
    if (root / _KINDS).is_file():
        rows = read_csv(root / _KINDS, ["modality", "kind"])
        wrong = [row["kind"] for row in rows if row["kind"] not in get_args(Kind)]
        if wrong:
            raise StoreError(f"kind in {root / _KINDS} must be one of {', '.join(get_args(Kind))}, got {wrong[0]!r}")
        given = {row["modality"]: cast(Kind, row["kind"]) for row in rows}
    folders = sorted(path.name for path in root.iterdir() if path.is_dir())
    others = [name for name in folders if not name.endswith(".labels") and not name.startswith(".")]
    return {**given, **{name: None for name in others if name not in given}}


def _without(rows: Sequence[Mapping[str, str]], names: Sequence[str], table: Path) -> list[set[str]]:
    """The modalities that each clip lacks.

    Raises:
        StoreError: a name is no modality, or a clip lacks all of them.
    """
    found = [{name.strip() for name in row.get("without", "").split(";")} - {""} for row in rows]
    for row, lacking in zip(rows, found, strict=True):
        if unknown := sorted(lacking - set(names)):
            raise StoreError(
                f"without in {table} must name modalities of the folder, {', '.join(names)}, separated by ';', got "
                f"{unknown[0]!r} for {row['id']!r}"
            )
        if lacking == set(names):
            raise StoreError(f"without in {table} must leave each clip a modality, got all of them for {row['id']!r}")
    return found


def _features(paths: Sequence[Path], without: np.ndarray, kind: Kind | None, table: Path) -> FeatureFiles:
    """The files of one modality.

    Raises:
        StoreError: a clip without the modality has a file.
    """
    lengths = npy_positions(paths)
    found = file_features(paths, read_npy, int(lengths.max(initial=1)), "zeros", kind=kind, lengths=lengths)
    if found.missing is None or not without.any():
        return found
    both = np.flatnonzero(without & ~found.missing)
    if len(both):
        raise StoreError(
            f"without in {table} must name modalities of which a clip has no file, got {paths[both[0]]} beside it "
            f"({len(both)} such files)"
        )
    return replace(found, missing=found.missing & ~without, without=without)


def _check_disjoint(rows: Sequence[Mapping[str, str]], table: Path) -> None:
    """Raise StoreError if a clip is in two splits, because test clips must not be training clips."""
    first: dict[str, str] = {}
    both = [row["id"] for row in rows if first.setdefault(row["id"], row["split"]) != row["split"]]
    if both:
        raise StoreError(f"id in {table} must be in one split only, got {both[0]!r} in two ({len(both)} such rows)")


def _check_classes(rows: Sequence[Mapping[str, str]], table: Path) -> None:
    """Raise StoreError if a clip has two classes, or two class names differ only in surrounding spaces."""
    first: dict[str, str] = {}
    names: dict[str, str] = {}
    for row in rows:
        name, other = row["class"], first.setdefault(row["id"], row["class"])
        if other != name:
            raise StoreError(
                f"class in {table} must be one for each clip, got {other!r} and {name!r} for {row['id']!r}"
            )
        other = names.setdefault(name.strip(), name)
        if other != name:
            raise StoreError(f"class in {table} must always have the same spelling, got {other!r} and {name!r}")


def _notes(rows: Sequence[Mapping[str, str]]) -> Iterator[Note]:
    """Notes on columns and class names that may be mistakes."""
    unread = [column for column in rows[0] if column not in _COLUMNS]
    if unread:
        text = f"not read: {', '.join(unread)}; only {', '.join(_COLUMNS)} are read"
        yield Note("columns", text, False)
    names = sorted({row["class"] for row in rows}) if "class" in rows[0] else []
    classes = set(names)
    joined = [name for name in names if re.search("[;|]", name) or classes.intersection(re.split(", *", name)) - {name}]
    if joined:
        text = f"a clip has one class, so each of these is one name; use labels for several classes: {joined[0]!r}"
        yield Note("class names", text + _more(joined), False)
    padded = [name for name in names if name != name.strip()]
    if padded:
        yield Note("class names", f"with spaces around them: {padded[0]!r}{_more(padded)}", False)
    spelt: dict[str, str] = {}
    twins = [(name, spelt[name.casefold()]) for name in names if spelt.setdefault(name.casefold(), name) != name]
    if twins:
        yield Note("class names", f"{twins[0][1]!r} and {twins[0][0]!r} are two classes{_more(twins)}", False)


def _more(found: Sequence[object]) -> str:
    return f", and {len(found) - 1} more" if len(found) > 1 else ""


def read_npy(file: Path) -> np.ndarray:
    """The array in a .npy file.

    Raises:
        StoreError: the file is no .npy file, or holds Python objects.
        FileNotFoundError: there is no file.
    """
    try:
        with open_file(file) as stream:
            return untrusted.read_npy(stream, os.fstat(stream.fileno()).st_size)
    except BadFile as error:
        raise StoreError(f"{file} must be a whole .npy file of numbers, not of objects: {error}") from error


def npy_positions(files: Sequence[Path]) -> np.ndarray:
    """(files,) int64 numbers of positions, from the headers of .npy files.

    The number is 0 if the file is missing or damaged, or if its shape of a position differs from the first file's.
    """
    shapes: list[tuple[int, ...]] = []
    for file in files:
        try:
            with open_file(file) as stream:
                shapes.append(npy_header(stream, os.fstat(stream.fileno()).st_size)[0])
        except (OSError, BadFile):
            shapes.append(())
    first = next((shape for shape in shapes if shape), ())
    return np.array(
        [shape[0] if shape and shape[1:] == first[1:] and 0 not in shape else 0 for shape in shapes], np.int64
    )


def _labels(files: Sequence[Path], without: np.ndarray, lengths: np.ndarray, shape: tuple[int, int]) -> LazyArray:
    """(clips, T, C+1) float32 from T and C+1, zeros after the end of a clip, and for a clip without the modality."""
    positions, columns = shape

    def read(clip: int) -> np.ndarray:
        if without[clip]:
            return np.zeros(shape, np.float32)
        label = read_npy(files[clip])
        if label.shape != (lengths[clip], columns):
            expected = f"{(int(lengths[clip]), columns)}, one column more than the {columns - 1} classes of {_TABLE}"
            raise StoreError(f"{files[clip]} must have shape {expected}, got {label.shape}")
        if label.dtype.kind not in "biuf":
            raise StoreError(f"{files[clip]} must hold numbers, got {label.dtype}")
        outside = label[~((label >= 0) & (label <= 1))]
        if len(outside):
            raise StoreError(f"{files[clip]} must lie in [0, 1], got {outside[0]}")
        return np.concatenate([label, np.zeros((positions - len(label), columns))]).astype(np.float32)

    return LazyArray.by_clip((len(files), *shape), np.float32, read)
