"""Looking at a data set before it is trained on: every clip is read once, and what is wrong is counted and named."""

from __future__ import annotations

import difflib
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from unicode_fast.config import DataConfig
from unicode_fast.data.dataset import WHOLE, Dataset
from unicode_fast.data.files import MissingFilesError, MissingPackageError
from unicode_fast.data.layouts import Request
from unicode_fast.data.lazy import LazyArray
from unicode_fast.data.opening import list_data, open_data
from unicode_fast.data.sources import Listing, Part, Source
from unicode_fast.data.store_checks import StoreError
from unicode_fast.data.stream import SPEC, StreamedDataset

# What training and tasks read where nothing else is asked for, and what published code takes.
_TRAINED_ON = DataConfig().train_split
_SPLITS = (_TRAINED_ON, "val", "test", WHOLE)
_SHOWN = 8


@dataclass
class Finding:
    """One kind of thing that was found.

    Attributes:
        kind: missing, unreadable, empty, short, truncated, non-finite, shape, dtype, labels, duplicate, copies, splits,
            or what the layout notes on its lists.
        bad: training must not start.
        text: what it is and what comes of it.
        clips: what the clips are called, or the splits.
    """

    kind: str
    bad: bool
    text: str
    clips: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What was found.

    Attributes:
        data: what was looked at.
        clips: number of clips by split and modality.
        classes: number of clips by split and class, where clips have classes.
        flags: without which training asks for more than there is.
        findings: none where all is well.
    """

    data: str
    clips: dict[str, dict[str, int]] = field(default_factory=dict)
    classes: dict[str, dict[str, int]] = field(default_factory=dict)
    flags: str = ""
    findings: list[Finding] = field(default_factory=list)

    @property
    def can_start(self) -> bool:
        """Whether training can start."""
        return not any(finding.bad for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        findings = [{**asdict(finding), "count": len(finding.clips)} for finding in self.findings]
        return {
            "data": self.data,
            "can_start": self.can_start,
            "flags": self.flags,
            "clips": self.clips,
            "classes": self.classes,
            "findings": findings,
        }

    def lines(self) -> Iterator[str]:
        """For the screen."""
        for split, counts in self.clips.items():
            yield f"{split}: " + ", ".join(f"{count} clips of {name}" for name, count in counts.items())
        for split, counts in self.classes.items():
            yield f"{split}: {len(counts)} classes of {min(counts.values())} to {max(counts.values())} clips"
        for finding in self.findings:
            count = f" ({len(finding.clips)})" if finding.clips else ""
            yield f"{'ERROR' if finding.bad else 'note'} {finding.kind}{count}: {finding.text}"
            yield from (f"    {clip}" for clip in finding.clips[:_SHOWN])
            if len(finding.clips) > _SHOWN:
                yield f"    and {len(finding.clips) - _SHOWN} more"
        start = f"training can start, with {self.flags}" if self.flags else "training can start"
        yield start if self.can_start else "training cannot start"


# What is found of single clips: whether it is bad, and what it means.
_KINDS: Mapping[str, tuple[bool, str]] = {
    "missing": (True, "files that are not there"),
    "unreadable": (True, "files that are damaged or hold something else"),
    "empty": (True, "no step at all"),
    "steps": (True, "another number of steps than the layout has, which cuts and repeats none here"),
    "short": (False, "fewer steps than the layout has; the last is repeated"),
    "truncated": (False, "more steps than the layout has; the rest is cut off"),
    "non-finite": (True, "NaN or infinite values"),
    "shape": (True, "steps of another shape than most clips have"),
    "dtype": (False, "another dtype than most clips have; all are read as float64"),
    "labels": (True, "files of labels that are damaged or do not fit their clips"),
    "duplicate": (False, "listed more than once in a split"),
    "copies": (False, "hold the same numbers as another clip"),
    "overlap": (False, "listed in more than one of train, val and test"),
}


def check(spec: str, request: Request | None = None, progress: bool = True) -> Report:
    """Read all features of a data set once and report.

    Args:
        spec: what `open_data` takes.
        request: which modalities, and what reads sentences.
        progress: show a progress bar on standard error.

    Raises:
        FileNotFoundError: `spec` names neither a layout with a folder nor a feature store.
        ValueError: the layout has none of the modalities.
    """
    request = request or Request()
    report = Report(spec)
    try:
        listing = None if spec.startswith(SPEC) else list_data(spec, request)
        if listing is None:
            data = open_data(spec, progress=progress)
            report.findings += _count(report, data) or _odd_splits(report.clips)
            report.flags = _flags(report.clips, data.classes)
            return report
    except MissingFilesError as error:
        report.findings.append(Finding("missing", True, f"files that must be in {spec}", error.files))
        return report
    except StoreError as error:
        report.findings.append(Finding("contents", True, str(error)))
        return report
    report.clips = {
        split: {name: len(part) for part in parts for name in part.sources} for split, parts in listing.parts.items()
    }
    there = {name for names in report.clips.values() for name in names}
    unknown = [name for name in request.modalities or () if name not in there]
    if unknown:
        raise ValueError(f"modalities must be some that {spec} has clips of, which it has not of {unknown[0]!r}")
    report.findings += [Finding(note.kind, note.bad, note.text) for note in listing.notes]
    for split, parts in listing.parts.items():
        if "class" in parts[0].arrays:
            report.classes[split] = _classes(np.asarray(parts[0].arrays["class"]), listing.classes)
    report.flags = _flags(report.clips, listing.classes)
    report.findings += _odd_splits(report.clips)
    report.findings += _find(listing, progress)
    if request.modalities is None and len(there) < 2:
        report.findings.append(Finding("modalities", True, f"training needs two, there is {', '.join(there)}"))
    elif report.can_start:
        try:
            listing.open()
        except (StoreError, ValueError) as error:
            report.findings.append(Finding("contents", True, str(error)))
    return report


def _count(report: Report, data: Dataset) -> list[Finding]:
    """Count the clips of what was checked when it was opened, and read a stream."""
    for split in data.splits:
        if isinstance(data, StreamedDataset):
            try:
                report.clips[split] = dict.fromkeys(data.modalities, data.count(split))
            except FileNotFoundError as error:
                return [Finding("missing", True, f"a file of split {split!r}", [str(error.filename or error)])]
            except StoreError as error:
                return [Finding("contents", True, str(error))]
            continue
        parts = data.parts(split)
        report.clips[split] = {name: len(part) for part in parts for name in part.modalities}
        if "class" in parts[0].arrays:
            report.classes[split] = _classes(parts[0].target, data.classes)
    return []


def _classes(target: np.ndarray, classes: Sequence[str]) -> dict[str, int]:
    """How many clips there are of each class that has some."""
    counts = np.bincount(target, minlength=len(classes))
    return {name: int(count) for name, count in zip(classes, counts, strict=True) if count}


def _flags(clips: Mapping[str, Mapping[str, int]], classes: Sequence[str]) -> str:
    """What training must be told where there is nothing to validate and to measure on."""
    return "" if classes and {"val", "test"} <= clips.keys() else "--validations 0 --probe_tasks none"


def _odd_splits(clips: Mapping[str, Mapping[str, int]]) -> Iterator[Finding]:
    """Splits that nothing reads unless it is told to, and whether the one is missing that training takes by itself."""
    odd, misspelt = [], False
    for split, counts in clips.items():
        if split not in _SPLITS:
            meant = difflib.get_close_matches(split.lower(), _SPLITS, 1)
            misspelt |= any(name not in clips for name in meant)
            odd.append(f"{split}: {max(counts.values())} clips" + (f", or is {meant[0]} meant?" if meant else ""))
    if odd:
        text = f"not among {', '.join(_SPLITS)}: no task reads them, and training only by --train_split"
        yield Finding("splits", misspelt, text, odd)
    if _TRAINED_ON not in clips:
        there = ", ".join(clips)
        yield Finding("no training clips", True, f"no split {_TRAINED_ON!r}; --train_split may name one of {there}")


def _find(listing: Listing, progress: bool) -> list[Finding]:
    """What is wrong with single clips."""
    found: dict[str, list[str]] = {kind: [] for kind in _KINDS}
    found["missing"] += listing.missing
    unique: dict[str, dict[str, tuple[Source, int]]] = {}
    for parts in listing.parts.values():
        for part in parts:
            for name, source in part.sources.items():
                unique.setdefault(name, {}).update({where: (source, clip) for clip, where in enumerate(source.where)})
    total = sum(map(len, unique.values()))
    with tqdm(total=total, desc="checking", unit="file", disable=not progress, dynamic_ncols=True) as bar:
        for clips in unique.values():
            _look(clips, found, bar)
    for part in itertools.chain.from_iterable(listing.lists.values()):
        found["labels"] += _bad_labels(part)
    for split, parts in listing.parts.items():
        for part in parts:
            twice = [name for name, count in Counter(_names(part)).items() if count > 1]
            found["duplicate"] += [f"{name} in {split}" for name in twice]
    found["overlap"] = _overlaps(listing)
    empty = [split for split, parts in listing.parts.items() if any(len(part) == 0 for part in parts)]
    findings = [Finding("no clips", True, f"split {split!r} has none") for split in empty]
    return findings + [Finding(kind, *_KINDS[kind], clips) for kind, clips in found.items() if clips]


def _look(clips: Mapping[str, tuple[Source, int]], found: dict[str, list[str]], bar: tqdm) -> None:
    """Read every clip of one modality once."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    contents: dict[bytes, str] = {}
    for where, (source, clip) in clips.items():
        bar.update()
        if source.missing is not None and source.missing[clip]:
            found["missing"].append(where)
            continue
        try:
            array = source.raw(clip)
        except MissingPackageError:
            raise
        except (StoreError, OSError) as error:
            found["unreadable"].append(str(error))
            continue
        shapes[where], dtypes[where] = array.shape[1:], array.dtype.name
        content = hashlib.blake2b(np.ascontiguousarray(array).data, key=str(array.shape).encode()).digest()
        first = contents.setdefault(content, where)
        if first != where and len(array):
            found["copies"].append(f"{where}: as {first}")
        if len(array) == 0:
            found["empty"].append(where)
        elif source.fit == "exact" and len(array) != source.steps:
            found["steps"].append(f"{where}: {len(array)} of {source.steps}")
        elif source.fit == "repeat" and len(array) != source.steps:
            found["short" if len(array) < source.steps else "truncated"].append(
                f"{where}: {len(array)} of {source.steps}"
            )
        if not np.isfinite(array).all():
            found["non-finite"].append(where)
    for kind, values in (("shape", shapes), ("dtype", dtypes)):
        found[kind] += _unusual(values)


def _bad_labels(part: Part) -> Iterator[str]:
    """Reads what is kept beside the features; files and clips that are not there have been found already."""
    for key, array in part.arrays.items():
        source = part.sources.get(key.removesuffix(".label"))
        lengths = None if source is None else source.lengths
        for clip in range(len(array) if isinstance(array, LazyArray) else 0):
            if lengths is not None and lengths[clip] == 0:
                continue
            try:
                array[clip]
            except FileNotFoundError:
                continue
            except (StoreError, OSError) as error:
                yield str(error)


def _unusual(values: Mapping[str, Any]) -> list[str]:
    """The clips whose value is not the most frequent one, and both."""
    if not values:
        return []
    usual = Counter(values.values()).most_common(1)[0][0]
    return [f"{where}: {value}, most have {usual}" for where, value in values.items() if value != usual]


def _names(part: Part) -> Sequence[Any]:
    return np.asarray(part.arrays["id"]).tolist() if "id" in part.arrays else []


def _overlaps(listing: Listing) -> list[str]:
    splits: dict[tuple[tuple[str, ...], Any], list[str]] = {}
    for split in ("train", "val", "test"):
        for part in listing.parts.get(split, ()):
            for name in set(_names(part)):
                splits.setdefault((tuple(part.sources), name), []).append(split)
    return [f"{name} in {' and '.join(there)}" for (_, name), there in splits.items() if len(there) > 1]
