"""Looking at a data set before it is trained on: every clip is read once, and what is wrong is counted and named."""

from __future__ import annotations

import hashlib
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
from unicode_fast.data.layouts.sources import Listing, Part, Source
from unicode_fast.data.lazy import ClipArray, LazyArray
from unicode_fast.data.opening import list_data, open_data
from unicode_fast.data.store.checks import StoreError, check_array_values, check_split
from unicode_fast.data.store.read import damages, open_store
from unicode_fast.data.store.write import MANIFEST, check_alike
from unicode_fast.errors import TooManyFiles, UsageError, is_foreseen, message_of
from unicode_fast.files.paths import expanded
from unicode_fast.files.untrusted import BadFile

_PIECE_VALUES = 1 << 22
# Errors that are about no file of the data.
_OF_THIS_MACHINE = (MissingPackageError, TooManyFiles)
# Of a clip: the shape of a step, the dtype, and the number of steps.
_Facts: TypeAlias = tuple[tuple[int, ...], str, int]

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
    "two classes": (False, "listed more than once in a split, with different classes"),
    "copies": (False, "hold the same numbers as another clip"),
    "overlap": (False, "listed in more than one of train, val and test"),
}


def check(spec: str, request: Request | None = None, progress: bool = True) -> Report:
    """Read all features of a data set once and report; of a store every checksum is compared, whatever was noted.

    What is damaged, whatever it is, is a finding, and the others are looked at all the same.

    Args:
        spec: what `open_data` takes.
        request: which modalities, and what reads sentences.
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
    # Whatever a reader of damaged files raises.
    except Exception as error:
        report.findings.append(Finding("contents", True, _said(error)))
    return report


def _said(error: Exception, where: str = "") -> str:
    """What an error says; where it was if it does not say so, and of one that nobody foresaw its name."""
    if is_foreseen(error) and not isinstance(error, BadFile):
        return message_of(error)
    said = str(error) if isinstance(error, BadFile) else f"{type(error).__name__}: {error}"
    return f"{where}: {said}" if where else said


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
        split: {name: len(part) for part in parts for name in part.sources} for split, parts in listing.parts.items()
    }
    there = {name for names in report.clips.values() for name in names}
    unknown = [name for name in request.modalities or () if name not in there]
    if unknown:
        raise UsageError(f"modalities must be some that {spec} has clips of, which it has not of {unknown[0]!r}")
    report.findings += [Finding(note.kind, note.bad, note.text) for note in listing.notes]
    for split, parts in listing.parts.items():
        if "class" in parts[0].arrays:
            report.classes[split] = classes_of(np.asarray(parts[0].arrays["class"]), listing.classes)
    found, labelled = _find(report, listing, progress)
    report.conclude(listing.classes, labelled)
    report.findings += found
    if request.modalities is None and len(there) < 2:
        report.findings.append(Finding("modalities", True, f"training needs two, there is {', '.join(there)}"))
    elif report.can_start:
        # The rest of what training would refuse.
        listing.open()


def _open(report: Report, spec: str, progress: bool) -> Dataset | None:
    """What is no layout, the files of a store compared with their checksums; None where one cannot be opened."""
    if spec.startswith(stream.SPEC):
        return open_data(spec, progress=progress)
    own = spec not in built_in.DATASETS and (Path(spec) / MANIFEST).exists()
    # That of a built-in data set is made where it is missing.
    folder = Path(spec) if own else open_data(spec, progress=progress).path
    bad = []
    with tqdm(desc="checking", unit="B", unit_scale=True, disable=not progress, dynamic_ncols=True) as bar:
        for size, wrong in damages(folder):
            bar.update(size)
            bad += [wrong] if wrong else []
    if bad:
        report.findings.append(Finding("damaged", True, "files that are not as they were written", bad))
    try:
        return open_store(folder, verify=False)
    # Whatever a reader of damaged files raises.
    except Exception:
        if not bad:
            raise
        return None


def _check_stream(report: Report, data: stream.StreamedDataset, progress: bool) -> None:
    """Read every tar file, each by itself, so that one that is damaged hides no other."""
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
                # Whatever a reader of damaged files raises.
                except Exception as error:
                    found["unreadable"].append(f"{file}: {_said(error)}")
                bar.update()
    report.conclude(data.classes, labelled)
    report.findings += [Finding(kind, *_KINDS[kind], names) for kind, names in found.items() if names]


def _check_store(report: Report, data: Dataset) -> None:
    """Look at every value of a store whose files have been compared with their checksums."""
    first: dict[str, tuple[str, Any]] = {}
    labelled: dict[str, dict[str, np.ndarray]] = {}
    bad: list[str] = []
    for split in data.splits:
        report.clips[split] = {name: len(part) for part in data.parts(split) for name in part.modalities}
        for number, part in enumerate(data.parts(split)):
            # The others are clips of the split that they divide.
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
        report.findings.append(Finding("contents", True, "arrays that do not hold what they must", bad))


def _wrong(split: str, part: ClipSet, first: dict[str, tuple[str, Any]]) -> Iterator[str]:
    """What is wrong with the arrays of one list of clips; `first` holds steps and dtype of each modality."""
    try:
        check_split(split, part.arrays, part.modalities, part.classes)
        check_alike(first, split, part)
    except StoreError as error:
        yield str(error)
        return
    steps = {name: part.arrays[name].shape[1] for name in part.modalities}
    for key, array in part.arrays.items():
        try:
            check_array_values(split, key, array, steps, len(part.classes))
        except (StoreError, OSError) as error:
            yield message_of(error)


def _stored(array: ClipArray) -> str:
    """The dtype that features have in their files."""
    if isinstance(array, LazyArray):
        return str(array.tensor(np.zeros(1, np.int64)).dtype).removeprefix("torch.")
    return array.dtype.name


def _add_labels(seen: dict[str, np.ndarray], part: ClipSet) -> None:
    """Note for each modality which classes its labels have anywhere in some clips."""
    for name, array in part.labels.items():
        step = max(1, _PIECE_VALUES // max(1, int(np.prod(array.shape[1:]))))
        for start in range(0, len(array), step):
            on = np.asarray(_classes_on(np.asarray(array[start : start + step])).any(0))
            seen[name] = on | seen[name] if name in seen else on


def _classes_on(labels: np.ndarray) -> np.ndarray:
    """(clips, C) bool, the classes that labels (clips, T, C+1) have at any step."""
    return np.asarray((labels[..., :-1] > 0).any(1))


def _find(report: Report, listing: Listing, progress: bool) -> tuple[list[Finding], dict[str, dict[str, np.ndarray]]]:
    """What is wrong with single clips; and by split and modality (C,) bool, the classes that labels have."""
    found: dict[str, list[str]] = {kind: [] for kind in _KINDS}
    found["missing"] += listing.missing
    unique: dict[str, dict[str, tuple[Source, int]]] = {}
    for parts in listing.parts.values():
        for part in parts:
            for name, source in part.sources.items():
                unique.setdefault(name, {}).update({where: (source, clip) for clip, where in enumerate(source.where)})
    total = sum(map(len, unique.values()))
    seen: dict[str, dict[str, _Facts]] = {}
    with tqdm(total=total, desc="checking", unit="file", disable=not progress, dynamic_ncols=True) as bar:
        for name, clips in unique.items():
            seen[name] = _look(clips, found, bar)
    report.modalities = _described(listing, seen)
    labelled = _read_labels(listing, found["labels"])
    for split, parts in listing.parts.items():
        for part in parts:
            names = _names(part)
            twice = [name for name, count in Counter(names).items() if count > 1]
            found["duplicate"] += [f"{name} in {split}" for name in twice]
            pairs = (
                set(zip(names, np.asarray(part.arrays["class"]).tolist(), strict=True))
                if "class" in part.arrays
                else ()
            )
            several = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
            found["two classes"] += [f"{name} in {split}" for name in several]
    found["overlap"] = _overlaps(listing)
    empty = [split for split, parts in listing.parts.items() if any(len(part) == 0 for part in parts)]
    findings = [Finding("no clips", True, f"split {split!r} has none") for split in empty]
    return findings + [Finding(kind, *_KINDS[kind], clips) for kind, clips in found.items() if clips], labelled


def _look(clips: Mapping[str, tuple[Source, int]], found: dict[str, list[str]], bar: tqdm) -> dict[str, _Facts]:
    """Read every clip of one modality once; shape of a step, dtype and number of steps of those that can be read."""
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
        # Whatever a reader of damaged files raises.
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


def _described(listing: Listing, seen: Mapping[str, Mapping[str, _Facts]]) -> dict[str, dict[str, Described]]:
    """What the features look like that could be read, by split and modality."""
    found: dict[str, dict[str, Described]] = {}
    for split, parts in listing.parts.items():
        for name, source in ((name, source) for part in parts for name, source in part.sources.items()):
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


def _read_labels(listing: Listing, bad: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """Reads what is kept beside the features, adding what is wrong to a list; classes that labels have, by split."""
    read = {
        split: [_labels_of(part, len(listing.classes), bad) for part in parts] for split, parts in listing.lists.items()
    }
    for split, members in listing.divided.items():
        pairs = zip(read[WHOLE], members, strict=True)
        read[split] = [{name: clips[chosen] for name, clips in labels.items()} for labels, chosen in pairs]
    return {
        split: {name: np.asarray(clips.any(0)) for labels in several for name, clips in labels.items()}
        for split, several in read.items()
    }


def _labels_of(part: Part, classes: int, bad: list[str]) -> dict[str, np.ndarray]:
    """(clips, C) bool by modality, the classes that labels have; missing files and clips have been found already."""
    found: dict[str, np.ndarray] = {}
    for key, array in part.arrays.items():
        owner, _, role = key.rpartition(".")
        source = part.sources.get(owner)
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
            # Whatever a reader of damaged files raises.
            except Exception as error:
                bad.append(_said(error, f"{key} of clip {clip}"))
    return found


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
