"""Find the files of a layout, and read its lists."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unicode_fast.data.layouts.index import FeatureFiles, Fit
from unicode_fast.data.layouts.zip_pickle import read_zipped_array
from unicode_fast.data.store.checks import StoreError
from unicode_fast.files.untrusted import TEXT_VARIABLE, BadFile, check_count, limit, read_bytes


class MissingFilesError(FileNotFoundError):
    """Lists, folders or files of a layout are missing; `files` has their names below the root."""

    def __init__(self, message: str, files: Sequence[str]) -> None:
        super().__init__(message)
        self.files = list(files)


class Files:
    """The required files and folders below a root; one error names all missing ones.

    Args:
        layout: its name, for the error.
        root: the folder of the data set.
    """

    def __init__(self, layout: str, root: Path) -> None:
        self.layout, self.root = layout, root
        self.missing: list[str] = []

    def file(self, name: str) -> Path:
        """The path of a required file."""
        if not (self.root / name).is_file():
            self.missing.append(name)
        return self.root / name

    def folder(self, *names: str) -> Path:
        """The first of these folders that exists; if none exists, the first name is reported as missing."""
        for name in names:
            if (self.root / name).is_dir():
                return self.root / name
        self.missing.append(f"{names[0]}/")
        return self.root / names[0]

    def check(self) -> None:
        """Raise MissingFilesError with the names of all missing files and folders."""
        if self.missing:
            raise MissingFilesError(
                f"{self.layout} must have its files in {str(self.root)!r}, missing are {', '.join(self.missing)}",
                self.missing,
            )


def read_csv(file: Path, columns: Sequence[str], delimiter: str = ",") -> list[dict[str, str]]:
    """The rows of a CSV file with a header.

    Args:
        file: UTF-8, with or without a byte order mark.
        columns: required columns.
        delimiter: separator of columns.

    Raises:
        StoreError: invalid UTF-8, an open quote, a missing or duplicate column, another number of fields than in the
            header, or rows above a limit.
    """
    return [row for _, row in read_csv_lines(file, columns, delimiter)]


def read_csv_lines(
    file: Path, columns: Sequence[str], delimiter: str = ",", optional: Sequence[str] = ()
) -> list[tuple[int, dict[str, str]]]:
    """The same as `read_csv`, each row with the number of its first line; `optional` columns may occur once."""
    lines = _csv_rows(file, delimiter)
    _, there = next(lines, (1, []))
    if any(there.count(name) != 1 for name in columns):
        separated = "tabs" if delimiter == "\t" else "commas"
        raise StoreError(
            f"{file} must have the columns {', '.join(columns)}, separated by {separated}, got {_some(there)}"
        )
    twice = [name for name in optional if there.count(name) > 1]
    if twice:
        raise StoreError(f"{file} must have each column once, got {twice[0]!r} more than once")
    rows: list[tuple[int, dict[str, str]]] = []
    for line, row in lines:
        if len(row) < len(there):
            raise StoreError(
                f"{file} must have {_some(there)} in each row, row {len(rows) + 1} is cut short (line {line})"
            )
        if len(row) > len(there):
            raise StoreError(
                f"{file} must have {len(there)} fields in each row, row {len(rows) + 1} has more (line {line}): "
                f"{_some(row)}"
            )
        rows.append((line, dict(zip(there, row, strict=True))))
    return rows


def _csv_rows(file: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The non-empty rows of a CSV file and the numbers of their first lines, limited by their memory."""
    data = _content(file)
    most, held = _room(len(data)), 0
    if b"\0" in data:
        raise StoreError(f"{file} must be a text, got a NUL at byte {data.index(0)}")
    if max(map(len, io.BytesIO(data)), default=0) > _LONGEST_ROW:
        raise StoreError(f"{file} must have rows of at most {_LONGEST_ROW} bytes, got a longer one")
    number = 0
    try:
        with io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline="") as stream:
            reader, last = csv.reader(stream, delimiter=delimiter, strict=True), 0
            for number, row in enumerate(reader):
                first, last = last + 1, reader.line_num
                # The memory of a dict and its fields.
                held += 240 + sum(map(sys.getsizeof, row)) + 8 * len(row)
                if held > most:
                    raise StoreError(f"{file} must hold fewer rows, got more than {number}; {_CURE}")
                if row:
                    yield first, row
    except csv.Error as error:
        # The csv module's message for a quote that is not closed.
        why = "a quote is not closed" if "end of data" in str(error) else error
        raise StoreError(f"{file} must be a CSV file, but after row {number}: {why}") from error
    except UnicodeDecodeError:
        _decoded(data, file)


_LONGEST_ROW = 1 << 20
_CURE = f"{TEXT_VARIABLE} sets another limit"


def _room(size: int) -> int:
    """Limit of the memory, in bytes, for the content of a file of this size."""
    return 2 * size + 3 * limit(TEXT_VARIABLE)


def _some(names: Sequence[str]) -> str:
    """The first names, for a message."""
    return ", ".join(name[:40] for name in names[:9]) + (", …" if len(names) > 9 else "")


def _content(file: Path) -> bytes:
    try:
        return read_bytes(file)
    except BadFile as error:
        raise StoreError(f"{file} must be a plain file of text: {error}") from error


def _decoded(data: bytes, file: Path) -> str:
    """The text of a UTF-8 file, without byte order mark, line ends unchanged."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise StoreError(
            f"{file} must be in UTF-8, got byte {error.object[error.start]:#x} at {error.start}"
        ) from error


def read_lines(file: Path) -> list[str]:
    """The lines of a list, one name each.

    Raises:
        StoreError: a name occurs twice.
    """
    data = _content(file)
    try:
        check_count(sum(map(data.count, _LINE_ENDS)), "lines")
    except BadFile as error:
        raise StoreError(f"{file} must be a list of names: {error}") from error
    names = [line.strip() for line in _decoded(data, file).splitlines() if line.strip()]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise StoreError(f"{file} must list each class once, got {min(twice)!r} twice")
    return names


# All line ends of `str.splitlines`, in UTF-8.
_LINE_ENDS = [character.encode() for character in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"]


def text_array(values: Sequence[str], file: Path) -> np.ndarray:
    """(n,) strings, each as wide as the longest.

    Args:
        values: the strings.
        file: their file, for the error.

    Raises:
        StoreError: they exceed a memory limit.
    """
    longest = max(map(len, values), default=0)
    if 4 * longest * len(values) > _room(0):
        raise StoreError(f"{file} must have short texts, got {len(values)}, one of {longest} characters; {_CURE}")
    return np.array(values)


def label_array(rows: int, positions: int, classes: int, file: Path) -> np.ndarray:
    """(rows, positions, classes + 1) uint8 of zeros.

    Args:
        rows: number of rows of `file`.
        positions: T, for each row.
        classes: C, without the background.
        file: the list, for the error.

    Raises:
        StoreError: the array exceeds a memory limit.
    """
    if rows * positions * (classes + 1) > _room(0):
        raise StoreError(f"{file} must have fewer rows or classes, got {rows} of {classes} classes; {_CURE}")
    return np.zeros((rows, positions, classes + 1), np.uint8)


def numbers_of(names: Sequence[str], classes: Sequence[str], file: Path) -> np.ndarray:
    """(n,) int64, the class number of each name.

    Raises:
        StoreError: a name is not a class.
    """
    place = {name: number for number, name in enumerate(classes)}
    unknown = sorted({name for name in names if name not in place})
    if unknown:
        raise StoreError(
            f"{file} must have only classes of its category file, got {_some([repr(name) for name in unknown])}"
        )
    return np.array([place[name] for name in names], np.int64)


def read_sentences(file: Path, names: Sequence[str]) -> list[str]:
    """The sentences of some categories.

    Args:
        file: categories in column "label", their sentences in the second column.
        names: the categories, in the order of the result.

    Raises:
        StoreError: a column is missing, or a category has no sentence.
    """
    rows = read_csv(file, ["label"])
    if rows and len(rows[0]) < 2:
        raise StoreError(f"{file} must have sentences in its second column, got one column")
    second = list(rows[0])[1] if rows else ""
    sentences = {row["label"].strip(): row[second].strip() for row in rows}
    lacking = sorted(set(names) - set(sentences))
    if lacking:
        raise StoreError(f"{file} must have a sentence for each category, got none for {_some(lacking)}")
    return [sentences[name] for name in names]


def zip_features(folder: Path, names: Sequence[str], positions: int, fit: Fit) -> FeatureFiles:
    """Features in one zip per name, with a pickled array."""
    return file_features([folder / f"{name}.zip" for name in names], read_zipped_array, positions, fit)


def file_features(
    files: Sequence[Path], read: Callable[[Path], np.ndarray], positions: int, fit: Fit, **more: Any
) -> FeatureFiles:
    """Features in one file per clip; each folder is listed once to find missing files."""
    there = {folder: _names_in(folder) for folder in {file.parent for file in files}}
    return FeatureFiles(
        where=[str(file) for file in files],
        read=lambda number: read(files[number]),
        numbers=np.arange(len(files)),
        positions=positions,
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
    """The members by split, one array per list of clips; splits that are empty in a list are omitted."""
    chosen = {split: [those[split] for those in members] for split in members[0]} if members else {}
    return {split: those for split, those in chosen.items() if all(clips.any() for clips in those)}
