"""Check a data set before training: every clip is read once, and problems are counted and named."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from tqdm import tqdm

from unicode_fast.data import built_in, stream
from unicode_fast.data.dataset import WHOLE, ClipSet, Dataset
from unicode_fast.data.findings import Described, Finding, Report, classes_of
from unicode_fast.data.layouts import Request
from unicode_fast.data.layouts.files import MissingFilesError, MissingPackageError
from unicode_fast.data.layouts.sources import ClipTable, DatasetIndex, FeatureFiles
from unicode_fast.data.lazy import ClipArray, LazyArray
from unicode_fast.data.opening import list_data, open_data
from unicode_fast.data.store.checks import StoreError, check_array_values, check_split
from unicode_fast.data.store.read import damages, open_store
from unicode_fast.data.store.write import MANIFEST, check_alike
from unicode_fast.errors import TooManyFiles, UsageError, is_foreseen, message_of
from unicode_fast.files.paths import expanded
from unicode_fast.files.untrusted import BadFile

_PIECE_VALUES = 1 << 22
# Errors of this machine, not of a data file.
_OF_THIS_MACHINE = (MissingPackageError, TooManyFiles)
# Of a clip: the shape of a position, the dtype, and the number of positions.
_Facts: TypeAlias = tuple[tuple[int, ...], str, int]

# Problems of single clips: whether training must not start, and the description.
_KINDS: Mapping[str, tuple[bool, str]] = {
    "missing": (True, "missing files"),
    "unreadable": (True, "damaged files, or files with other content"),
    "empty": (True, "no positions"),
    "steps": (True, "number of positions differs from the layout, which neither cuts nor repeats here"),
    "short": (False, "fewer positions than the layout has; the last is repeated"),
    "truncated": (False, "more positions than the layout has; the rest is cut off"),
    "non-finite": (True, "NaN or infinite values"),
    "shape": (True, "shape of a position differs from most clips"),
    "dtype": (False, "dtype differs from most clips; all are read as float64"),
    "labels": (True, "label files that are damaged or do not fit their clips"),
    "duplicate": (False, "listed more than once in a split"),
    "two classes": (False, "listed more than once in a split, with different classes"),
    "copies": (False, "same features as another clip"),
    "overlap": (False, "listed in more than one of train, val and test"),
}


def check(spec: str, request: Request | None = None, progress: bool = True) -> Report:
    """Read all features of a data set once and report; for a store, compare every checksum, even if verified before.

    Damaged files are findings; the check continues with the other files.

    Args:
        spec: as for `open_data`.
        request: modalities, and options for sentences.
        progress: show a progress bar on standard error.

    Raises:
        FileNotFoundError: `spec` names neither a layout with a folder nor a feature store.
        ValueError: the layout has none of the modalities.
        MissingPackageError: a package that the layout needs is not installed.
        TooManyFiles: no more files can be opened.
    """
    report, spec = Report(spec), expanded(spec)
    try:
        _check(report, spec, request or Request(), progress)
    except MissingFilesError as error:
        report.findings.append(Finding("missing", True, f"files that must be in {spec}", error.files))
    except (UsageError, FileNotFoundError, *_OF_THIS_MACHINE):
        raise
    # Readers of damaged files can raise any exception.
    except Exception as error:
        report.findings.append(Finding("contents", True, _said(error)))
    return report


def _said(error: Exception, where: str = "") -> str:
    """The message of an error, with its location; for an unexpected error also its type."""
    if is_foreseen(error) and not isinstance(error, BadFile):
        return message_of(error)
    text = str(error) if isinstance(error, BadFile) else f"{type(error).__name__}: {error}"
    return f"{where}: {text}" if where else text


def _check(report: Report, spec: str, request: Request, progress: bool) -> None:
    listing = None if spec.startswith(stream.SPEC) else list_data(spec, request)
    if listing is None:
        data = _open(report, spec, progress)
        if isinstance(data, stream.StreamedDataset):
            _check_stream(report, data, progress)
        elif data is not None:
            _check_store(report, data)
        return
    report.clips = {
        split: {name: len(table) for table in tables for name in table.sources}
        for split, tables in listing.tables.items()
    }
    there = {name for names in report.clips.values() for name in names}
    unknown = [name for name in request.modalities or () if name not in there]
    if unknown:
        raise UsageError(f"modalities must be among {', '.join(sorted(there))} for {spec}, got {unknown[0]!r}")
    report.findings += [Finding(note.kind, note.bad, note.text) for note in listing.notes]
    for split, tables in listing.tables.items():
        if "class" in tables[0].arrays:
            report.classes[split] = classes_of(np.asarray(tables[0].arrays["class"]), listing.classes)
    found, labelled = _find(report, listing, progress)
    report.conclude(listing.classes, labelled)
    report.findings += found
    if request.modalities is None and len(there) < 2:
        report.findings.append(Finding("modalities", True, f"training needs two, there is {', '.join(there)}"))
    elif report.can_start:
        # Raises the other errors that training would raise.
        listing.open()


def _open(report: Report, spec: str, progress: bool) -> Dataset | None:
    """Open a stream or a store, after its checksums are compared; None if a damaged store cannot be opened."""
    if spec.startswith(stream.SPEC):
        return open_data(spec, progress=progress)
    own = spec not in built_in.DATASETS and (Path(spec) / MANIFEST).exists()
    # A built-in data set is generated if it is missing.
    folder = Path(spec) if own else open_data(spec, progress=progress).path
    bad = []
    with tqdm(desc="checking", unit="B", unit_scale=True, disable=not progress, dynamic_ncols=True) as bar:
        for size, wrong in damages(folder):
            bar.update(size)
            bad += [wrong] if wrong else []
    if bad:
        report.findings.append(Finding("damaged", True, "files that changed since they were written", bad))
    try:
        return open_store(folder, verify=False)
    # Readers of damaged files can raise any exception.
    except Exception:
        if not bad:
            raise
        return None


def _check_stream(report: Report, data: stream.StreamedDataset, progress: bool) -> None:
    """Read every tar file separately, so that a damaged one hides no other."""
    found: dict[str, list[str]] = {"missing": [], "unreadable": []}
    labelled: dict[str, dict[str, np.ndarray]] = {}

    def look(part: ClipSet) -> None:
        report.look(split, part, {name: part.arrays[name].dtype.name for name in part.modalities})
        report.count(split, part)
        _add_labels(labelled.setdefault(split, {}), part)

    total = sum(len(files) for files in data.index["shards"].values())
    with tqdm(total=total, desc="checking", unit="file", disable=not progress, dynamic_ncols=True) as bar:
        for split, files in data.index["shards"].items():
            report.clips[split] = dict.fromkeys(data.modalities, sum(files.values()))
            for file, clips in files.items():
                alone = stream.StreamedDataset(data.root, {**data.index, "shards": {split: {file: clips}}})
                try:
                    alone.count(split, look)
                except FileNotFoundError as error:
                    found["missing"].append(str(error.filename or file))
                except _OF_THIS_MACHINE:
                    raise
                # Readers of damaged files can raise any exception.
                except Exception as error:
                    found["unreadable"].append(f"{file}: {_said(error)}")
                bar.update()
    report.conclude(data.classes, labelled)
    report.findings += [Finding(kind, *_KINDS[kind], names) for kind, names in found.items() if names]


def _check_store(report: Report, data: Dataset) -> None:
    """Check every value of a store whose checksums were compared."""
    first: dict[str, tuple[str, Any]] = {}
    labelled: dict[str, dict[str, np.ndarray]] = {}
    bad: list[str] = []
    for split in data.splits:
        report.clips[split] = {name: len(part) for part in data.parts(split) for name in part.modalities}
        for number, part in enumerate(data.parts(split)):
            # Divided splits only select clips of another split.
            wrong = [] if split in data.divided else list(_wrong(split, part, first))
            bad += wrong
            if wrong:
                continue
            report.look(split, part, {name: _stored(part.arrays[name]) for name in part.modalities})
            if number == 0:
                report.count(split, part)
            _add_labels(labelled.setdefault(split, {}), part)
    report.conclude(data.classes, labelled)
    if bad:
        report.findings.append(Finding("contents", True, "arrays with invalid contents", bad))


def _wrong(split: str, part: ClipSet, first: dict[str, tuple[str, Any]]) -> Iterator[str]:
    """Problems of the arrays of one ClipSet; `first` holds positions and dtype of each modality."""
    try:
        check_split(split, part.arrays, part.modalities, part.classes)
        check_alike(first, split, part)
    except StoreError as error:
        yield str(error)
        return
    positions = {name: part.arrays[name].shape[1] for name in part.modalities}
    for key, array in part.arrays.items():
        try:
            check_array_values(split, key, array, positions, len(part.classes))
        except (StoreError, OSError) as error:
            yield message_of(error)


def _stored(array: ClipArray) -> str:
    """The dtype of features in their files."""
    if isinstance(array, LazyArray):
        return str(array.tensor(np.zeros(1, np.int64)).dtype).removeprefix("torch.")
    return array.dtype.name


def _add_labels(seen: dict[str, np.ndarray], part: ClipSet) -> None:
    """Add the classes in the labels of some clips, by modality."""
    for name, array in part.labels.items():
        count = max(1, _PIECE_VALUES // max(1, int(np.prod(array.shape[1:]))))
        for start in range(0, len(array), count):
            on = np.asarray(_classes_on(np.asarray(array[start : start + count])).any(0))
            seen[name] = on | seen[name] if name in seen else on


def _classes_on(labels: np.ndarray) -> np.ndarray:
    """(clips, C) bool, the classes of labels (clips, T, C+1) at any position."""
    return np.asarray((labels[..., :-1] > 0).any(1))


def _find(
    report: Report, listing: DatasetIndex, progress: bool
) -> tuple[list[Finding], dict[str, dict[str, np.ndarray]]]:
    """Problems of single clips; and by split and modality (C,) bool, the classes in labels."""
    found: dict[str, list[str]] = {kind: [] for kind in _KINDS}
    found["missing"] += listing.missing
    unique: dict[str, dict[str, tuple[FeatureFiles, int]]] = {}
    for table in itertools.chain.from_iterable(listing.tables.values()):
        for name, source in table.sources.items():
            unique.setdefault(name, {}).update({where: (source, clip) for clip, where in enumerate(source.where)})
    total = sum(map(len, unique.values()))
    seen: dict[str, dict[str, _Facts]] = {}
    with tqdm(total=total, desc="checking", unit="file", disable=not progress, dynamic_ncols=True) as bar:
        for name, clips in unique.items():
            seen[name] = _look(clips, found, bar)
    report.modalities = _described(listing, seen)
    labelled = _read_labels(listing, found["labels"])
    for split, tables in listing.tables.items():
        for table in tables:
            names = _names(table)
            twice = [name for name, count in Counter(names).items() if count > 1]
            found["duplicate"] += [f"{name} in {split}" for name in twice]
            pairs = (
                set(zip(names, np.asarray(table.arrays["class"]).tolist(), strict=True))
                if "class" in table.arrays
                else ()
            )
            several = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
            found["two classes"] += [f"{name} in {split}" for name in several]
    found["overlap"] = _overlaps(listing)
    empty = [split for split, tables in listing.tables.items() if any(len(table) == 0 for table in tables)]
    findings = [Finding("no clips", True, f"split {split!r} has none") for split in empty]
    return findings + [Finding(kind, *_KINDS[kind], clips) for kind, clips in found.items() if clips], labelled


def _look(clips: Mapping[str, tuple[FeatureFiles, int]], found: dict[str, list[str]], bar: tqdm) -> dict[str, _Facts]:
    """Read every clip of one modality once; return shape of a position, dtype and positions of readable clips."""
    seen: dict[str, _Facts] = {}
    contents: dict[bytes, str] = {}
    for where, (source, clip) in clips.items():
        bar.update()
        if source.missing is not None and source.missing[clip]:
            found["missing"].append(where)
            continue
        try:
            array = source.raw(clip)
            content = hashlib.blake2b(np.ascontiguousarray(array).data, key=str(array.shape).encode()).digest()
            finite = np.isfinite(array).all()
        except _OF_THIS_MACHINE:
            raise
        # Readers of damaged files can raise any exception.
        except Exception as error:
            found["unreadable"].append(_said(error, where))
            continue
        seen[where] = (array.shape[1:], array.dtype.name, len(array))
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
        if not finite:
            found["non-finite"].append(where)
    for place, kind in enumerate(("shape", "dtype")):
        found[kind] += _unusual({where: facts[place] for where, facts in seen.items()})
    return seen


def _described(listing: DatasetIndex, seen: Mapping[str, Mapping[str, _Facts]]) -> dict[str, dict[str, Described]]:
    """Description of the readable features, by split and modality."""
    found: dict[str, dict[str, Described]] = {}
    for split, tables in listing.tables.items():
        for name, source in ((name, source) for table in tables for name, source in table.sources.items()):
            facts = [seen[name][where] for where in source.where if where in seen[name]]
            if not facts:
                continue
            shape = Counter(shape for shape, _, _ in facts).most_common(1)[0][0]
            lengths = [min(length, source.steps) for _, _, length in facts] if source.lengths is not None else []
            found.setdefault(split, {})[name] = Described(
                source.kind or ("grid" if len(shape) == 3 else "vector"),
                list(shape),
                " and ".join(sorted({dtype for _, dtype, _ in facts})),
                source.steps,
                min(lengths, default=source.steps),
                max(lengths, default=source.steps),
            )
    return found


def _read_labels(listing: DatasetIndex, bad: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """Read the arrays beside the features and add problems to `bad`; return the classes in labels, by split."""
    read = {
        split: [_labels_of(table, len(listing.classes), bad) for table in tables]
        for split, tables in listing.lists.items()
    }
    for split, members in listing.divided.items():
        pairs = zip(read[WHOLE], members, strict=True)
        read[split] = [{name: clips[chosen] for name, clips in labels.items()} for labels, chosen in pairs]
    return {
        split: {name: np.asarray(clips.any(0)) for labels in several for name, clips in labels.items()}
        for split, several in read.items()
    }


def _labels_of(table: ClipTable, classes: int, bad: list[str]) -> dict[str, np.ndarray]:
    """(clips, C) bool by modality, the classes in labels; missing files and clips are skipped, as already found."""
    found: dict[str, np.ndarray] = {}
    for key, array in table.arrays.items():
        owner, _, role = key.rpartition(".")
        source = table.sources.get(owner)
        lengths = None if source is None else source.lengths
        if role == "label" and not isinstance(array, LazyArray):
            found[owner] = _classes_on(array)
        for clip in range(len(array) if isinstance(array, LazyArray) else 0):
            try:
                if lengths is not None and lengths[clip] == 0:
                    continue
                values = array[clip]
                if role == "label":
                    on = found.setdefault(owner, np.zeros((len(array), classes), bool))
                    on[clip] = _classes_on(values[None])[0]
            except FileNotFoundError:
                continue
            except _OF_THIS_MACHINE:
                raise
            # Readers of damaged files can raise any exception.
            except Exception as error:
                bad.append(_said(error, f"{key} of clip {clip}"))
    return found


def _unusual(values: Mapping[str, Any]) -> list[str]:
    """The clips whose value is not the most frequent one, with both values."""
    if not values:
        return []
    usual = Counter(values.values()).most_common(1)[0][0]
    return [f"{where}: {value}, most have {usual}" for where, value in values.items() if value != usual]


def _names(table: ClipTable) -> Sequence[Any]:
    return np.asarray(table.arrays["id"]).tolist() if "id" in table.arrays else []


def _overlaps(listing: DatasetIndex) -> list[str]:
    splits: dict[tuple[tuple[str, ...], Any], list[str]] = {}
    for split in ("train", "val", "test"):
        for table in listing.tables.get(split, ()):
            for name in set(_names(table)):
                splits.setdefault((tuple(table.sources), name), []).append(split)
    return [f"{name} in {' and '.join(there)}" for (_, name), there in splits.items() if len(there) > 1]
