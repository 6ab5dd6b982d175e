"""Finding the files that a layout consists of, and reading its lists."""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from unicode_fast.data.sources import Fit, Source
from unicode_fast.data.store_checks import StoreError
from unicode_fast.data.zip_pickle import read_zipped_array


class MissingFilesError(FileNotFoundError):
    """Lists, folders or files of a layout are not there; `files` has their names below the root."""

    def __init__(self, message: str, files: Sequence[str]) -> None:
        super().__init__(message)
        self.files = list(files)


class Files:
    """The files and folders that must be below a root; all that are missing are named together.

    Args:
        layout: its name, for the message.
        root: the folder of the data set.
    """

    def __init__(self, layout: str, root: Path) -> None:
        self.layout, self.root = layout, root
        self.missing: list[str] = []

    def file(self, name: str) -> Path:
        """The path of a file that must be there."""
        if not (self.root / name).is_file():
            self.missing.append(name)
        return self.root / name

    def folder(self, *names: str) -> Path:
        """The first of these folders that is there; the first is the one that is asked for where none is."""
        for name in names:
            if (self.root / name).is_dir():
                return self.root / name
        self.missing.append(f"{names[0]}/")
        return self.root / names[0]

    def check(self) -> None:
        """Raise MissingFilesError that names everything that was asked for and is not there."""
        if self.missing:
            raise MissingFilesError(
                f"{self.layout} must have its files in {str(self.root)!r}, missing are {', '.join(self.missing)}",
                self.missing,
            )


def read_csv(file: Path, columns: Sequence[str], delimiter: str = ",") -> list[dict[str, str]]:
    """The rows of a CSV file with a header.

    Args:
        file: UTF-8, with or without a byte order mark.
        columns: that must be there.
        delimiter: between columns.

    Raises:
        StoreError: it is no UTF-8, a column is missing, or a row has more or fewer fields than the header.
    """
    with io.StringIO(_text(file), newline="") as stream:
        reader = csv.DictReader(stream, delimiter=delimiter)
        there = reader.fieldnames or []
        lacking = [name for name in columns if name not in there]
        if lacking:
            separated = "tabs" if delimiter == "\t" else "commas"
            raise StoreError(
                f"{file} must have the columns {', '.join(columns)}, separated by {separated}, got {', '.join(there)}"
            )
        rows = list(reader)
    for number, row in enumerate(rows):
        if None in row.values():
            raise StoreError(f"{file} must have {', '.join(there)} in each row, row {number + 1} is cut short")
        if None in row:
            raise StoreError(f"{file} must have {len(there)} fields in each row, row {number + 1} has more: {row}")
    return rows


def read_table(file: Path) -> list[list[str]]:
    """The rows of a CSV file by position, without its header and empty lines."""
    with io.StringIO(_text(file), newline="") as stream:
        return [row for row in csv.reader(stream) if row][1:]


def _text(file: Path) -> str:
    """What a file in UTF-8 says, with or without a byte order mark, lines ended as they are."""
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise StoreError(
            f"{file} must be in UTF-8, got byte {error.object[error.start]:#x} at {error.start}"
        ) from error


def read_lines(file: Path) -> list[str]:
    """The lines of a list, one name each.

    Raises:
        StoreError: a name is there twice.
    """
    names = [line.strip() for line in _text(file).splitlines() if line.strip()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise StoreError(f"{file} must name each class once, got {twice[0]!r} twice")
    return names


def numbers_of(names: Sequence[str], classes: Sequence[str], file: Path) -> np.ndarray:
    """(n,) int64, the place of each name among the classes.

    Raises:
        StoreError: a name is not among them.
    """
    place = {name: number for number, name in enumerate(classes)}
    unknown = sorted({name for name in names if name not in place})
    if unknown:
        raise StoreError(f"{file} must name classes of its category file alone, got {', '.join(map(repr, unknown))}")
    return np.array([place[name] for name in names], np.int64)


def read_sentences(file: Path, names: Sequence[str]) -> list[str]:
    """The sentence of each of some categories.

    Args:
        file: its column "label" holds categories, its second column their sentences.
        names: the categories, in the order of the result.

    Raises:
        StoreError: there is no such column, or a category has no sentence.
    """
    rows = read_csv(file, ["label"])
    if rows and len(rows[0]) < 2:
        raise StoreError(f"{file} must have the sentences in its second column, got one column")
    second = list(rows[0])[1] if rows else ""
    sentences = {row["label"].strip(): row[second].strip() for row in rows}
    lacking = sorted(set(names) - set(sentences))
    if lacking:
        raise StoreError(f"{file} must have a sentence for each category, got none for {', '.join(lacking)}")
    return [sentences[name] for name in names]


def zip_source(folder: Path, names: Sequence[str], steps: int, fit: Fit) -> Source:
    """Features in one zip of a pickled array for each name."""
    return file_source([folder / f"{name}.zip" for name in names], read_zipped_array, steps, fit)


def file_source(files: Sequence[Path], read: Callable[[Path], np.ndarray], steps: int, fit: Fit, **more: Any) -> Source:
    """Features in one file for each clip; each folder is listed once to see what is there."""
    there = {folder: _names_in(folder) for folder in {file.parent for file in files}}
    return Source(
        where=[str(file) for file in files],
        read=lambda number: read(files[number]),
        numbers=np.arange(len(files)),
        steps=steps,
        fit=fit,
        missing=np.array([file.name not in there[file.parent] for file in files], bool),
        **more,
    )


def _names_in(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return set()


def hashed_split(names: Sequence[str]) -> dict[str, np.ndarray]:
    """Disjoint splits that depend on the names alone: about 70 % train, 15 % val, 15 % test.

    Args:
        names: (clips,); clips of the same name share a split.

    Returns:
        (clips,) bool by split.
    """
    draws = np.array([int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") for name in names]) / 2**32
    return {"train": draws < 0.7, "val": (draws >= 0.7) & (draws < 0.85), "test": draws >= 0.85}


def divide(members: Sequence[Mapping[str, np.ndarray]]) -> dict[str, list[np.ndarray]]:
    """The same by split, one array for each list of clips; splits without clips in one of the lists are left out."""
    chosen = {split: [those[split] for those in members] for split in members[0]} if members else {}
    return {split: those for split, those in chosen.items() if all(clips.any() for clips in those)}


class MissingPackageError(RuntimeError):
    """A package that these data need is not installed."""


def need(package: str, extra: str) -> ModuleType:
    """An optional package.

    Raises:
        MissingPackageError: it is not installed; the message names the extra that has it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"package {package!r} must be installed to read these data: pip install 'unicode_fast[{extra}]'"
        ) from error
