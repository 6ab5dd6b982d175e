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
from unicode_fast.data.layouts.files import MissingFilesError
from unicode_fast.data.layouts.index import ClipTable, DatasetIndex, FeatureFiles
from unicode_fast.data.lazy import ClipArray, LazyArray
from unicode_fast.data.opening import list_data, open_data
from unicode_fast.data.store.checks import StoreError, check_array_values, check_present, check_split
from unicode_fast.data.store.read import damages, open_store
from unicode_fast.data.store.write import MANIFEST, check_alike
from unicode_fast.errors import TooManyFiles, UsageError, is_foreseen, message_of
from unicode_fast.files.optional import MissingPackageError
from unicode_fast.files.paths import expanded
from unicode_fast.files.untrusted import BadFile

_CHUNK_VALUES = 1 << 22
# Errors of this machine, not of a data file.
_OF_THIS_MACHINE = (MissingPackageError, TooManyFiles)
# Shape of a position, dtype, and number of positions of a clip.
_Facts: TypeAlias = tuple[tuple[int, ...], str, int]

# Problems of single clips: whether training must not start, and the description.
_KINDS: Mapping[str, tuple[bool, str]] = {
    "missing": (True, "missing files"),
    "unreadable": (True, "damaged files, or files with other content"),
    "empty": (True, "no positions"),
    "positions": (True, "number of positions differs from the layout, which neither cuts nor repeats here"),
    "short": (False, "fewer positions than the layout has; the last position is repeated"),
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
    """Read all features of a data set once and report; a store's checksums are compared even if verified before.

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
        report.findings.append(Finding("contents", True, _located_message(error)))
    return report


def _located_message(error: Exception, where: str = "") -> str:
    """The message of an error, with its location; an unexpected error also has its type."""
    if is_foreseen(error) and not isinstance(error, BadFile):
        return message_of(error)
    text = str(error) if isinstance(error, BadFile) else f"{type(error).__name__}: {error}"
    return f"{where}: {text}" if where else text


def _check(report: Report, spec: str, request: Request, progress: bool) -> None:
    index = None if spec.startswith(stream.SPEC) else list_data(spec, request)
    if index is None:
        data = _open(report, spec, progress)
        if isinstance(data, stream.StreamedDataset):
            _check_stream(report, data, progress)
        elif data is not None:
            _check_store(report, data)
        return
    report.clips = {
        split: {name: len(table) for table in tables for name in table.features}
        for split, tables in index.tables.items()
    }
    there = {name for names in report.clips.values() for name in names}
    unknown = [name for name in request.modalities or () if name not in there]
    if unknown:
        raise UsageError(f"modalities must be among {', '.join(sorted(there))} for {spec}, got {unknown[0]!r}")
    report.findings += [Finding(note.kind, note.bad, note.text) for note in index.notes]
    for split, tables in index.tables.items():
        counts = {name: _lacking(features) for table in tables for name, features in table.features.items()}
        report.lacking[split] = {name: count for name, count in counts.items() if count}
    for split, tables in index.tables.items():
        if "class" in tables[0].arrays:
            report.classes[split] = classes_of(np.asarray(tables[0].arrays["class"]), index.classes)
    report.findings += _ceilings(index)
    found, labelled = _find(report, index, progress)
    report.conclude(index.classes, labelled)
    report.findings += found
    if request.modalities is None and len(there) < 2:
        report.findings.append(Finding("modalities", True, f"training needs two, got {', '.join(there)}"))
    elif report.can_start:
        # Raises the other errors that training would raise.
        index.open()


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
    """Read every tar file separately, so that all damaged files are found."""
    found: dict[str, list[str]] = {"missing": [], "unreadable": []}
    labelled: dict[str, dict[str, np.ndarray]] = {}

    def add(clips: ClipSet) -> None:
        report.describe(split, clips, {name: clips.arrays[name].dtype.name for name in clips.modalities})
        report.count(split, clips)
        report.lacking[split] = dict(Counter(report.lacking.get(split, {})) + Counter(clips.lacking()))
        _add_labels(labelled.setdefault(split, {}), clips)

    total = sum(len(files) for files in data.index["shards"].values())
    with tqdm(total=total, desc="checking", unit="file", disable=not progress, dynamic_ncols=True) as bar:
        for split, files in data.index["shards"].items():
            report.clips[split] = dict.fromkeys(data.modalities, sum(files.values()))
            for file, count in files.items():
                alone = stream.StreamedDataset(data.root, {**data.index, "shards": {split: {file: count}}})
                try:
                    alone.count(split, add)
                except FileNotFoundError as error:
                    found["missing"].append(str(error.filename or file))
                except _OF_THIS_MACHINE:
                    raise
                # Readers of damaged files can raise any exception.
                except Exception as error:
                    found["unreadable"].append(f"{file}: {_located_message(error)}")
                bar.update()
    report.conclude(data.classes, labelled)
    report.findings += [Finding(kind, *_KINDS[kind], names) for kind, names in found.items() if names]


def _check_store(report: Report, data: Dataset) -> None:
    """Check every value of a store whose checksums were compared."""
    first: dict[str, tuple[str, Any]] = {}
    labelled: dict[str, dict[str, np.ndarray]] = {}
    bad: list[str] = []
    for split in data.splits:
        report.clips[split] = {name: len(clips) for clips in data.clip_sets(split) for name in clips.modalities}
        for number, clips in enumerate(data.clip_sets(split)):
            # A divided split only selects clips of another split.
            wrong = [] if split in data.divided else list(_wrong(split, clips, first))
            bad += wrong
            if wrong:
                continue
            report.describe(split, clips, {name: _stored(clips.arrays[name]) for name in clips.modalities})
            if number == 0:
                report.count(split, clips)
            report.lacking.setdefault(split, {}).update(clips.lacking())
            _add_labels(labelled.setdefault(split, {}), clips)
    report.conclude(data.classes, labelled)
    if bad:
        report.findings.append(Finding("contents", True, "arrays with invalid contents", bad))


def _wrong(split: str, clips: ClipSet, first: dict[str, tuple[str, Any]]) -> Iterator[str]:
    """Problems of the arrays of one ClipSet; `first` holds positions and dtype of each modality."""
    try:
        check_split(split, clips.arrays, clips.modalities, clips.classes)
        check_alike(first, split, clips)
    except StoreError as error:
        yield str(error)
        return
    positions = {name: clips.arrays[name].shape[1] for name in clips.modalities}
    for key, array in clips.arrays.items():
        try:
            check_array_values(split, key, array, positions, len(clips.classes))
        except (StoreError, OSError) as error:
            yield message_of(error)
    try:
        check_present(split, clips.arrays, clips.modalities)
    except StoreError as error:
        yield message_of(error)


def _stored(array: ClipArray) -> str:
    """The dtype of features in their files."""
    if isinstance(array, LazyArray):
        return str(array.tensor(np.zeros(1, np.int64)).dtype).removeprefix("torch.")
    return array.dtype.name


def _add_labels(labelled: dict[str, np.ndarray], clips: ClipSet) -> None:
    """Add the classes in the labels of some clips, by modality."""
    for name, array in clips.labels.items():
        count = max(1, _CHUNK_VALUES // max(1, int(np.prod(array.shape[1:]))))
        for start in range(0, len(array), count):
            on = np.asarray(_classes_on(np.asarray(array[start : start + count])).any(0))
            labelled[name] = on | labelled[name] if name in labelled else on


def _classes_on(labels: np.ndarray) -> np.ndarray:
    """(clips, C) bool, the classes of labels (clips, T, C+1) at any position."""
    return np.asarray((labels[..., :-1] > 0).any(1))


def _ceilings(index: DatasetIndex) -> Iterator[Finding]:
    """Limits of zero-shot accuracy where the list of one modality lacks classes of another modality's."""
    for trained, tested in ((WHOLE, WHOLE), ("train", "test")):
        pairs = itertools.product(index.tables.get(trained, ()), index.tables.get(tested, ()))
        for source, target in pairs:
            apart = not set(source.features) & set(target.features)
            if not apart or not all("class" in table.arrays and len(table) for table in (source, target)):
                continue
            known, classes = (np.asarray(table.arrays["class"]) for table in (source, target))
            reachable = np.isin(classes, known)
            if not reachable.all():
                names = [", ".join(table.features) for table in (source, target)]
                text = (
                    f"zero-shot accuracy {' → '.join(names)} is at most {100 * reachable.mean():.1f} % on {tested}: "
                    f"{(~reachable).sum():,} of {len(classes):,} clips of {names[1]} are of classes without {names[0]} "
                    f"in {trained}"
                )
                yield Finding("ceiling", False, text, [index.classes[n] for n in np.unique(classes[~reachable])])


def _find(
    report: Report, index: DatasetIndex, progress: bool
) -> tuple[list[Finding], dict[str, dict[str, np.ndarray]]]:
    """Problems of single clips; and by split and modality (C,) bool, the classes in labels."""
    found: dict[str, list[str]] = {kind: [] for kind in _KINDS}
    found["missing"] += index.missing
    unique: dict[str, dict[str, tuple[FeatureFiles, int]]] = {}
    for table in itertools.chain.from_iterable(index.tables.values()):
        for name, features in table.features.items():
            unique.setdefault(name, {}).update({where: (features, clip) for clip, where in enumerate(features.where)})
    total = sum(map(len, unique.values()))
    facts: dict[str, dict[str, _Facts]] = {}
    with tqdm(total=total, desc="checking", unit="file", disable=not progress, dynamic_ncols=True) as bar:
        for name, clips in unique.items():
            facts[name] = _read(clips, found, bar)
    report.modalities = _described(index, facts)
    labelled = _read_labels(index, found["labels"])
    for split, tables in index.tables.items():
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
    found["overlap"] = _overlaps(index)
    empty = [split for split, tables in index.tables.items() if any(len(table) == 0 for table in tables)]
    findings = [Finding("no clips", True, f"split {split!r} has none") for split in empty]
    return findings + [Finding(kind, *_KINDS[kind], clips) for kind, clips in found.items() if clips], labelled


def _read(clips: Mapping[str, tuple[FeatureFiles, int]], found: dict[str, list[str]], bar: tqdm) -> dict[str, _Facts]:
    """Read every clip of one modality once; return shape of a position, dtype and positions of readable clips."""
    facts: dict[str, _Facts] = {}
    contents: dict[bytes, str] = {}
    for where, (features, clip) in clips.items():
        bar.update()
        if not features.has(clip):
            continue
        if features.missing is not None and features.missing[clip]:
            found["missing"].append(where)
            continue
        try:
            array = features.raw(clip)
            content = hashlib.blake2b(np.ascontiguousarray(array).data, key=str(array.shape).encode()).digest()
            finite = np.isfinite(array).all()
        except _OF_THIS_MACHINE:
            raise
        # Readers of damaged files can raise any exception.
        except Exception as error:
            found["unreadable"].append(_located_message(error, where))
            continue
        facts[where] = (array.shape[1:], array.dtype.name, len(array))
        first = contents.setdefault(content, where)
        if first != where and len(array):
            found["copies"].append(f"{where}: as {first}")
        if len(array) == 0:
            found["empty"].append(where)
        elif features.fit == "exact" and len(array) != features.positions:
            found["positions"].append(f"{where}: {len(array)} of {features.positions}")
        elif features.fit == "repeat" and len(array) != features.positions:
            found["short" if len(array) < features.positions else "truncated"].append(
                f"{where}: {len(array)} of {features.positions}"
            )
        if not finite:
            found["non-finite"].append(where)
    for place, kind in enumerate(("shape", "dtype")):
        found[kind] += _unusual({where: fact[place] for where, fact in facts.items()})
    return facts


def _described(index: DatasetIndex, facts: Mapping[str, Mapping[str, _Facts]]) -> dict[str, dict[str, Described]]:
    """Description of the readable features, by split and modality."""
    found: dict[str, dict[str, Described]] = {}
    for split, tables in index.tables.items():
        for name, features in ((name, features) for table in tables for name, features in table.features.items()):
            readable = [facts[name][where] for where in features.where if where in facts[name]]
            if not readable:
                continue
            shape = Counter(shape for shape, _, _ in readable).most_common(1)[0][0]
            lengths = [] if features.lengths is None else [min(one[2], features.positions) for one in readable]
            found.setdefault(split, {})[name] = Described(
                features.kind or ("grid" if len(shape) == 3 else "vector"),
                list(shape),
                " and ".join(sorted({dtype for _, dtype, _ in readable})),
                features.positions,
                min(lengths, default=features.positions),
                max(lengths, default=features.positions),
            )
    return found


def _read_labels(index: DatasetIndex, bad: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """Read the arrays beside the features and add problems to `bad`; return the classes in labels, by split."""
    read = {
        split: [_labels_of(table, len(index.classes), bad) for table in tables] for split, tables in index.lists.items()
    }
    for split, members in index.divided.items():
        pairs = zip(read[WHOLE], members, strict=True)
        read[split] = [{name: clips[chosen] for name, clips in labels.items()} for labels, chosen in pairs]
    return {
        split: {name: np.asarray(clips.any(0)) for labels in several for name, clips in labels.items()}
        for split, several in read.items()
    }


def _labels_of(table: ClipTable, classes: int, bad: list[str]) -> dict[str, np.ndarray]:
    """(clips, C) bool by modality, the classes in labels; missing files and clips, already reported, are skipped."""
    found: dict[str, np.ndarray] = {}
    for key, array in table.arrays.items():
        owner, _, role = key.rpartition(".")
        features = table.features.get(owner)
        lengths = None if features is None else features.lengths
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
                bad.append(_located_message(error, f"{key} of clip {clip}"))
    return found


def _lacking(features: FeatureFiles) -> int:
    """Number of clips that lack a modality."""
    return 0 if features.without is None else int(np.count_nonzero(features.without))


def _unusual(values: Mapping[str, Any]) -> list[str]:
    """The clips whose value is not the most frequent one, with both values."""
    if not values:
        return []
    usual = Counter(values.values()).most_common(1)[0][0]
    return [f"{where}: {value}, most have {usual}" for where, value in values.items() if value != usual]


def _names(table: ClipTable) -> Sequence[Any]:
    return np.asarray(table.arrays["id"]).tolist() if "id" in table.arrays else []


def _overlaps(index: DatasetIndex) -> list[str]:
    splits: dict[tuple[tuple[str, ...], Any], list[str]] = {}
    for split in ("train", "val", "test"):
        for table in index.tables.get(split, ()):
            for name in set(_names(table)):
                splits.setdefault((tuple(table.features), name), []).append(split)
    return [f"{name} in {' and '.join(there)}" for (_, name), there in splits.items() if len(there) > 1]
