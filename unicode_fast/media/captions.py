"""The clips of a folder of media files: from a table with their splits, classes and captions, or all files."""

from __future__ import annotations

import difflib
import hashlib
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from unicode_fast.data.layouts.files import read_csv_lines
from unicode_fast.data.store.checks import StoreError, check_name
from unicode_fast.errors import few

COLUMNS = ("file", "split", "class", "caption", "start", "end")
# Endings of the files that are read without a table.
SUFFIXES = (
    ".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts",
    ".webm", ".wmv",
    ".aac", ".aif", ".aiff", ".amr", ".flac", ".m4a", ".mka", ".mp3", ".oga", ".ogg", ".opus", ".wav", ".wma",
    ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp",
)  # fmt: skip
# Shares of train and val of files without a split; the rest is test.
_TRAIN, _VAL = 0.8, 0.9
_LONGEST_CAPTION = 4096
_NONE_FOUND = "a media file of a known kind, such as .mp4, .wav or .png"


class CaptionsError(StoreError):
    """A table of clips is invalid; the message has its line."""


@dataclass(frozen=True)
class Part:
    """A file, or a part of it, that becomes one or more clips.

    Attributes:
        file: path relative to the folder, with "/".
        split: name of its split.
        label: class; empty without classes.
        caption: words; empty for none.
        start_s: beginning in seconds of the file.
        end_s: end; None for the end of the file.
    """

    file: str
    split: str
    label: str = ""
    caption: str = ""
    start_s: float = 0.0
    end_s: float | None = None

    @property
    def id(self) -> str:
        """The file, and for a part of it `@START-END` in seconds; an end that is the file's is left out."""
        if self.start_s == 0 and self.end_s is None:
            return self.file
        return f"{self.file}@{seconds(self.start_s)}-{'' if self.end_s is None else seconds(self.end_s)}"


@dataclass(frozen=True)
class Parts:
    """The parts of a folder's files.

    Attributes:
        parts: in the order of the table, or of the files' names.
        ignored: number of other files, where there is no table.
        hashed: number of parts whose split is drawn.
        unread: columns of the table that are not read.
    """

    parts: list[Part]
    ignored: int = 0
    hashed: int = 0
    unread: tuple[str, ...] = ()


def seconds(value: float) -> str:
    """A time in seconds without needless zeros, as in names of clips."""
    return f"{value:.6f}".rstrip("0").rstrip(".")


def drawn_split(file: str) -> str:
    """The split of a file without one, from its name alone: 80 % train, 10 % val, 10 % test.

    Args:
        file: path relative to the folder, with "/".
    """
    digest = hashlib.sha256(file.encode("utf-8", "surrogateescape")).digest()
    draw = int.from_bytes(digest[:8], "big") / 2**64
    return "train" if draw < _TRAIN else "val" if draw < _VAL else "test"


def list_files(folder: Path) -> Parts:
    """All media files below a folder, by their suffix, sorted by name; hidden ones are ignored.

    Raises:
        FileNotFoundError: there is none.
    """
    found, ignored = [], 0
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.startswith(".") or Path(name).suffix.lower() not in SUFFIXES:
                ignored += 1
            else:
                found.append((Path(root) / name).relative_to(folder).as_posix())
    if not found:
        raise FileNotFoundError(f"videos must be a folder with {_NONE_FOUND}, got {str(folder)!r}, {ignored} others")
    return Parts([Part(file, drawn_split(file)) for file in sorted(found)], ignored, len(found))


def read_captions(table: Path, folder: Path) -> Parts:
    """The parts that a table lists.

    The columns are file, relative to the folder, and if wanted split, class, caption, start and end, in seconds. A file
    may have several rows with other times. A row without a split gets that of `drawn_split`.

    Args:
        table: CSV with a header, in UTF-8.
        folder: of the files.

    Raises:
        CaptionsError: a row is invalid; the message has its line.
        StoreError: the table is no CSV file in UTF-8, or lacks the column file.
        OSError: the table cannot be read.
    """
    rows = read_csv_lines(table, ["file"], optional=COLUMNS[1:])
    if not rows:
        raise CaptionsError(f"{table} must list at least one file, got none")
    reader = _Reader(table, folder, rows)
    parts = [reader.part(line, row) for line, row in rows]
    reader.check_splits(parts)
    hashed = sum(not row.get("split") for _, row in rows)
    return Parts(parts, 0, hashed, tuple(name for name in rows[0][1] if name not in COLUMNS))


class _Reader:
    """Turns rows into parts and checks them.

    Args:
        table: for messages.
        folder: of the files.
        rows: with the numbers of their lines.
    """

    def __init__(self, table: Path, folder: Path, rows: Sequence[tuple[int, Mapping[str, str]]]) -> None:
        self.table, self.folder, self.rows = table, folder, rows
        self.known: dict[str, bool] = {}
        self.classes: dict[str, str] = {}
        if "class" in rows[0][1] and not any(row["class"].strip() for _, row in rows):
            raise CaptionsError(f"{table} must have a class in each row, or no column class; got only blank ones")

    def error(self, line: int, what: str) -> CaptionsError:
        """The error of a line."""
        return CaptionsError(f"{self.table}, line {line}: {what}")

    def part(self, line: int, row: Mapping[str, str]) -> Part:
        """The part of a row."""
        file = self._file(line, row["file"])
        split, label, caption = (row.get(name, "") for name in ("split", "class", "caption"))
        if split:
            try:
                check_name("split", split, "_.")
            except StoreError as error:
                raise self.error(line, str(error)) from error
        if "class" in row:
            self._check_class(line, label)
        caption = caption.strip()
        if len(caption) > _LONGEST_CAPTION:
            raise self.error(line, f"caption must have at most {_LONGEST_CAPTION} characters, got {len(caption)}")
        start = self._time(line, "start", row.get("start", ""))
        end = self._time(line, "end", row.get("end", ""))
        if end is not None and end <= (start or 0.0):
            raise self.error(line, f"end must be after start, got start {seconds(start or 0.0)}, end {seconds(end)}")
        return Part(file, split or drawn_split(file), label, caption, start or 0.0, end)

    def _file(self, line: int, name: str) -> str:
        path = PurePosixPath(name)
        if not name.strip():
            raise self.error(line, "file must be given, got a blank one")
        if path.is_absolute() or ".." in path.parts:
            raise self.error(line, f"file must be a path within {str(self.folder)!r}, got {name!r}")
        file = path.as_posix()
        if file not in self.known:
            self.known[file] = (self.folder / file).is_file()
        if not self.known[file]:
            raise self.error(line, f"file must exist in {str(self.folder)!r}, got {name!r}{self._meant(file)}")
        return file

    def _meant(self, name: str) -> str:
        """A question with the name of a file that resembles this one."""
        there = [
            (Path(root) / one).relative_to(self.folder).as_posix()
            for root, _, files in os.walk(self.folder)
            for one in files
        ]
        # A name without its suffix or folder is not very close.
        parts = [one for one in there if PurePosixPath(one).stem == PurePosixPath(name).stem]
        near = parts[:1] or difflib.get_close_matches(name, there[:10_000], 1, 0.75)
        return f", is {near[0]!r} meant?" if near else ""

    def _check_class(self, line: int, label: str) -> None:
        if not label.strip():
            raise self.error(line, "class must be given in each row, got a blank one")
        other = self.classes.setdefault(label.strip(), label)
        if other != label:
            raise self.error(line, f"class must always have the same spelling, got {other!r} and {label!r}")

    def _time(self, line: int, name: str, text: str) -> float | None:
        if not text.strip():
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            raise self.error(line, f"{name} must be a number of seconds of at least 0, got {text!r:.60}")
        return value

    def check_splits(self, parts: Sequence[Part]) -> None:
        """Raise for equal rows, and for rows of two splits that share seconds of a file."""
        first: dict[str, tuple[int, Part]] = {}
        numbered = [(line, part) for (line, _), part in zip(self.rows, parts, strict=True)]
        for line, part in numbered:
            before, other = first.setdefault(part.id, (line, part))
            if before != line:
                also = "" if part.split == other.split else f", there in split {other.split!r}, here {part.split!r}"
                raise self.error(line, f"each clip must have one row, got {part.id!r} also in line {before}{also}")
        # By file and split, the part that ends last of those that begin no later.
        last: dict[tuple[str, str], tuple[int, Part]] = {}
        splits = {part.split for part in parts}
        for line, part in sorted(numbered, key=lambda one: (one[1].file, one[1].start_s)):
            for split in splits - {part.split}:
                before, other = last.get((part.file, split), (line, part))
                if before != line and _end(other) > part.start_s:
                    (above, one), (below, two) = sorted([(before, other), (line, part)], key=lambda pair: pair[0])
                    raise self.error(
                        below,
                        f"clips of two splits must share no seconds, got {two.id!r} in {two.split!r} and, in line "
                        f"{above}, {one.id!r} in {one.split!r}",
                    )
            _, other = last.setdefault((part.file, part.split), (line, part))
            if _end(part) >= _end(other):
                last[part.file, part.split] = (line, part)


def _end(part: Part) -> float:
    return math.inf if part.end_s is None else part.end_s


def notes(found: Parts, table: Path | None) -> list[str]:
    """What a user should know about the parts.

    Args:
        found: the parts.
        table: their table, if there is one.
    """
    lines = []
    if found.ignored:
        lines.append(f"{found.ignored:,} files are ignored: hidden, or with another suffix than {few(SUFFIXES)}")
    if found.unread:
        lines.append(f"{table}: columns not read: {', '.join(found.unread)}; only {', '.join(COLUMNS)} are")
    if found.hashed:
        counts = Counter(part.split for part in found.parts)
        sizes = ", ".join(f"{split} {counts[split]:,}" for split in ("train", "val", "test"))
        drawn = "all" if found.hashed == len(found.parts) else f"{found.hashed:,}"
        lines.append(f"split drawn from the name of the file, 80 % train, 10 % val, 10 % test, for {drawn} of {sizes}")
    return lines
