"""The report of `python -m unicode_fast.data check`: findings, counts, shapes, and whether training can start."""

from __future__ import annotations

import difflib
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from unicode_fast.config import DataConfig, TrainConfig
from unicode_fast.data.dataset import WHOLE, ClipSet
from unicode_fast.errors import one_line

# The default splits and batch size of training and tasks.
_TRAINED_ON = DataConfig().train_split
_SPLITS = (_TRAINED_ON, "val", "test", WHOLE)
_BATCH = TrainConfig().batch_size
_UNMEASURED = "--validations 0 --probe_tasks none"
_SHOWN = 8


@dataclass
class Finding:
    """One kind of problem, with the clips that have it.

    Attributes:
        kind: a key of `check._KINDS`, another kind of this module such as "splits", or the kind of a layout's note.
        bad: training must not start.
        text: the problem and its consequence.
        clips: names of the clips, splits, classes or files.
    """

    kind: str
    bad: bool
    text: str
    clips: list[str] = field(default_factory=list)


@dataclass
class Described:
    """The features of one modality in one split.

    Attributes:
        kind: vector, grid or words.
        shape: of one position, in most clips.
        dtype: the stored dtype; several are joined by "and".
        positions: T, the number of positions of every clip.
        shortest: valid positions of the shortest clip.
        longest: valid positions of the longest clip.
    """

    kind: str
    shape: list[int]
    dtype: str
    positions: int
    shortest: int
    longest: int

    def line(self) -> str:
        """The description as text."""
        lengths = f"{self.shortest}" if self.shortest == self.longest else f"{self.shortest} to {self.longest}"
        valid = f", {lengths} valid" if self.shortest < self.positions else ""
        return f"{self.kind} {tuple(self.shape)} of {self.dtype}, {self.positions} positions{valid}"


@dataclass
class Report:
    """The result of a check.

    Attributes:
        data: the data set that was checked.
        clips: number of clips by split and modality, those that lack the modality too.
        lacking: number of clips that lack a modality, by split and modality.
        classes: number of clips by split and class, where clips have classes.
        modalities: description of the features, by split and modality.
        batch: for each training split, the largest `batch_size` up to the default that its clips allow.
        flags: flags that training needs with these data.
        unmeasured: why nothing can be validated and measured; empty if it can.
        findings: empty if there is no problem.
    """

    data: str
    clips: dict[str, dict[str, int]] = field(default_factory=dict)
    lacking: dict[str, dict[str, int]] = field(default_factory=dict)
    classes: dict[str, dict[str, int]] = field(default_factory=dict)
    modalities: dict[str, dict[str, Described]] = field(default_factory=dict)
    batch: dict[str, int] = field(default_factory=dict)
    flags: str = ""
    unmeasured: str = ""
    findings: list[Finding] = field(default_factory=list)

    @property
    def can_start(self) -> bool:
        """Whether training can start."""
        return not any(finding.bad for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """The report for JSON."""
        findings = [{**asdict(finding), "count": len(finding.clips)} for finding in self.findings]
        # Older reports have "steps" for "positions".
        described = {
            split: {name: {**asdict(one), "steps": one.positions} for name, one in names.items()}
            for split, names in self.modalities.items()
        }
        batch = {
            split: {"fits": size == _BATCH, "usual": _BATCH, "batch_size": size} for split, size in self.batch.items()
        }
        plain = {name: getattr(self, name) for name in ("data", "can_start", "flags", "clips", "lacking", "classes")}
        return {**plain, "modalities": described, "batch": batch, "findings": findings}

    def lines(self) -> Iterator[str]:
        """The lines of the text report; long lines are cut, and unprintable characters are escaped."""
        return map(one_line, self._lines())

    def _lines(self) -> Iterator[str]:
        for split, counts in self.clips.items():
            lacking = self.lacking.get(split, {})
            there = {name: count - lacking.get(name, 0) for name, count in counts.items()}
            yield f"{split}: " + ", ".join(f"{count} clips of {name}" for name, count in there.items())
            if lacking:
                yield f"{split}: " + ", ".join(f"{count} clips without {name}" for name, count in lacking.items())
            yield from (f"    {name}: {one.line()}" for name, one in self.modalities.get(split, {}).items())
        for split, counts in self.classes.items():
            yield f"{split}: {len(counts)} classes of {min(counts.values())} to {max(counts.values())} clips"
        for split, size in self.batch.items():
            if size < _BATCH:
                yield f"{split}: {size} clips are fewer than the usual batch of {_BATCH}; --batch_size {size} fits"
        for finding in self.findings:
            count = f" ({len(finding.clips)})" if finding.clips else ""
            yield f"{'ERROR' if finding.bad else 'note'} {finding.kind}{count}: {finding.text}"
            yield from (f"    {clip}" for clip in finding.clips[:_SHOWN])
            if len(finding.clips) > _SHOWN:
                yield f"    and {len(finding.clips) - _SHOWN} more"
        if self.can_start and self.unmeasured:
            yield f"{self.unmeasured}: training is not validated, and no task is measured"
        start = f"training can start, with {self.flags}" if self.flags else "training can start"
        yield start if self.can_start else "training cannot start"

    def describe(self, split: str, clips: ClipSet, dtypes: Mapping[str, str]) -> None:
        """Add the description of some valid clips of a split."""
        known = self.modalities.setdefault(split, {})
        for name, kind in clips.modalities.items():
            positions, before = clips.arrays[name].shape[1], known.get(name)
            lengths = clips.lengths[name]
            lengths = lengths[lengths > 0]
            if not len(lengths):
                continue
            known[name] = Described(
                kind.kind,
                list(kind.shape),
                dtypes[name],
                positions,
                min([int(lengths.min()), *([before.shortest] if before else [])]),
                max([int(lengths.max()), *([before.longest] if before else [])]),
            )

    def count(self, split: str, clips: ClipSet) -> None:
        """Add the classes of some clips of a split."""
        if "class" in clips.arrays:
            counts = Counter(self.classes.get(split, {}))
            self.classes[split] = dict(counts + Counter(classes_of(clips.target, clips.classes)))

    def conclude(self, classes: Sequence[str], labelled: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Add the findings on splits and classes after all clips are counted.

        Args:
            classes: C names.
            labelled: by split and modality, (C,) bool, the classes in labels of positions.
        """
        self.findings += _odd_splits(self.clips)
        self.findings += [
            Finding("lacking", True, f"no clip of {split} has {name}")
            for split, counts in self.lacking.items()
            for name, count in counts.items()
            if split in _SPLITS and count == self.clips[split][name]
        ]
        # If clips have classes, labels of positions have the same classes.
        by_position = {split: names for split, names in labelled.items() if split not in self.classes}
        doubtful = [*unlearnable(self.classes), *_blank(labelled), *_unseen_at_positions(classes, by_position)]
        self.findings += doubtful
        for split in (_TRAINED_ON, WHOLE):
            if self.clips.get(split):
                self.batch[split] = min(_BATCH, *self.clips[split].values())
        self.flags = flags(self.clips, classes)
        self.unmeasured = unmeasured(self.clips, classes)
        if any(finding.kind != "unseen classes" for finding in doubtful) and _UNMEASURED not in self.flags:
            self.flags = f"{_UNMEASURED} {self.flags}".strip()


def flags(clips: Mapping[str, Mapping[str, int]], classes: Sequence[str]) -> str:
    """Flags that training needs if nothing can be validated and measured, or clips are fewer than a default batch.

    Args:
        clips: number of clips by split and modality.
        classes: C names.
    """
    needed = [_UNMEASURED] if unmeasured(clips, classes) else []
    fewest = min(clips.get(_TRAINED_ON, {}).values(), default=_BATCH)
    return " ".join([*needed, f"--batch_size {fewest}"] if 0 < fewest < _BATCH else needed)


def unmeasured(clips: Mapping[str, Mapping[str, int]], classes: Sequence[str]) -> str:
    """Why nothing can be validated and measured, from clips by split and modality; empty if it can."""
    lacking = [split for split in ("val", "test") if split not in clips]
    if lacking:
        return f"there is no split {' and no split '.join(lacking)}"
    return "" if classes else "clips have no classes"


def train_command(data: str, given: str = "") -> str:
    """The command that trains on these data with these flags."""
    return f"python -m unicode_fast.train --data {shlex.quote(data)} {given}".strip()


def classes_of(target: np.ndarray, classes: Sequence[str]) -> dict[str, int]:
    """Number of clips of each class that has clips."""
    counts = np.bincount(target, minlength=len(classes))
    return {name: int(count) for name, count in zip(classes, counts, strict=True) if count}


def unlearnable(classes: Mapping[str, Mapping[str, int]]) -> Iterator[Finding]:
    """Classes of clips that cannot be learned, or do not occur in training."""
    train = classes.get(_TRAINED_ON)
    if not train:
        return
    numbers = all(_is_number(name) for name in train) and not all(name.isdecimal() for name in train)
    if numbers and len(train) > sum(train.values()) / 2:
        text = f"{len(train)} numbers are the classes of {sum(train.values())} clips of {_TRAINED_ON}"
        yield Finding("numbers", False, f"{text}: each number is a separate class, and regression is not supported")
    elif len(train) == 1:
        yield Finding("one class", False, f"all clips of {_TRAINED_ON} are of class {next(iter(train))!r}")
    elif max(train.values()) == 1:
        text = f"each class of {_TRAINED_ON} has one clip, so no class can be recognised in other clips"
        yield Finding("single clips", False, text)
    for split in ("val", "test"):
        lacking = [name for name in classes.get(split, {}) if name not in train]
        if lacking:
            text = f"classes of {split} without a clip in {_TRAINED_ON}: their clips cannot be recognised"
            yield Finding("unseen classes", False, text, lacking)


def _blank(labelled: Mapping[str, Mapping[str, np.ndarray]]) -> Iterator[Finding]:
    """Labels of positions without any class."""
    for split, names in labelled.items():
        blank = [name for name, on in names.items() if not on.any()]
        if blank:
            yield Finding("background", False, f"labels of {split} are background only, of modality", blank)


def _unseen_at_positions(classes: Sequence[str], labelled: Mapping[str, Mapping[str, np.ndarray]]) -> Iterator[Finding]:
    """Classes in labels of positions that do not occur in training."""
    for split in ("val", "test"):
        for name, on in labelled.get(split, {}).items():
            known = labelled.get(_TRAINED_ON, {}).get(name)
            lacking = [] if known is None else [classes[int(number)] for number in np.flatnonzero(on & ~known)]
            if lacking:
                text = f"classes in labels of {name} of {split} that do not occur in {_TRAINED_ON}"
                yield Finding("unseen classes", False, text, lacking)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _odd_splits(clips: Mapping[str, Mapping[str, int]]) -> Iterator[Finding]:
    """Splits with other names than the defaults, and a missing training split."""
    odd, misspelt = [], False
    for split, counts in clips.items():
        if split not in _SPLITS:
            meant = difflib.get_close_matches(split.lower(), _SPLITS, 1)
            misspelt |= any(name not in clips for name in meant)
            odd.append(f"{split}: {max(counts.values())} clips" + (f", a misspelt {meant[0]}?" if meant else ""))
    if odd:
        text = f"not among {', '.join(_SPLITS)}: no task uses them, and training only with --train_split"
        yield Finding("splits", misspelt, text, odd)
    if _TRAINED_ON not in clips:
        there = ", ".join(clips)
        yield Finding("no training clips", True, f"no split {_TRAINED_ON!r}; --train_split may name one of {there}")
