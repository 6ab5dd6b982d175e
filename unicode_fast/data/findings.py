"""What `python -m unicode_fast.data check` says of a data set: findings, counts, shapes, and whether to train."""

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

# What training and tasks read where nothing else is asked for, and what published code takes.
_TRAINED_ON = DataConfig().train_split
_SPLITS = (_TRAINED_ON, "val", "test", WHOLE)
_BATCH = TrainConfig().batch_size
_UNMEASURED = "--validations 0 --probe_tasks none"
_SHOWN = 8


@dataclass
class Finding:
    """One kind of thing that was found.

    Attributes:
        kind: missing, unreadable, damaged, empty, short, truncated, non-finite, shape, dtype, labels, duplicate,
            copies, splits, or another of this module, or what the layout notes on its lists.
        bad: training must not start.
        text: what it is and what comes of it.
        clips: what the clips are called, or the splits, classes or files.
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
        shape: of one step, as most clips have it.
        dtype: as it is stored; several are joined by "and".
        steps: T, what every clip gets.
        shortest: valid steps of the shortest clip.
        longest: and of the longest.
    """

    kind: str
    shape: list[int]
    dtype: str
    steps: int
    shortest: int
    longest: int

    def line(self) -> str:
        """For the screen."""
        lengths = f"{self.shortest}" if self.shortest == self.longest else f"{self.shortest} to {self.longest}"
        valid = f", {lengths} of them valid" if self.shortest < self.steps else ""
        return f"{self.kind} {tuple(self.shape)} of {self.dtype}, {self.steps} steps{valid}"


@dataclass
class Report:
    """What was found.

    Attributes:
        data: what was looked at.
        clips: number of clips by split and modality.
        classes: number of clips by split and class, where clips have classes.
        modalities: what features look like, by split and modality.
        batch: of each split that is trained on, the largest `batch_size` up to the usual one that it has clips for.
        flags: without which training asks for more than there is.
        unmeasured: why there is nothing to validate and to measure on; empty where there is.
        findings: none where all is well.
    """

    data: str
    clips: dict[str, dict[str, int]] = field(default_factory=dict)
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
        """For JSON."""
        findings = [{**asdict(finding), "count": len(finding.clips)} for finding in self.findings]
        described = {
            split: {name: asdict(one) for name, one in names.items()} for split, names in self.modalities.items()
        }
        batch = {
            split: {"fits": size == _BATCH, "usual": _BATCH, "batch_size": size} for split, size in self.batch.items()
        }
        return {
            "data": self.data,
            "can_start": self.can_start,
            "flags": self.flags,
            "clips": self.clips,
            "classes": self.classes,
            "modalities": described,
            "batch": batch,
            "findings": findings,
        }

    def lines(self) -> Iterator[str]:
        """For the screen: long ones are cut, and what does not print in a file's name is as Python writes it."""
        return map(one_line, self._lines())

    def _lines(self) -> Iterator[str]:
        for split, counts in self.clips.items():
            yield f"{split}: " + ", ".join(f"{count} clips of {name}" for name, count in counts.items())
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

    def look(self, split: str, part: ClipSet, dtypes: Mapping[str, str]) -> None:
        """Add some clips of a split, which have been read and are sound."""
        known = self.modalities.setdefault(split, {})
        for name, kind in part.modalities.items():
            lengths, steps = part.lengths[name], part.arrays[name].shape[1]
            before = known.get(name)
            known[name] = Described(
                kind.kind,
                list(kind.shape),
                dtypes[name],
                steps,
                min([int(lengths.min()), *([before.shortest] if before else [])]),
                max([int(lengths.max()), *([before.longest] if before else [])]),
            )

    def count(self, split: str, part: ClipSet) -> None:
        """Add the classes of some clips of a split."""
        if "class" in part.arrays:
            counts = Counter(self.classes.get(split, {}))
            self.classes[split] = dict(counts + Counter(classes_of(part.target, part.classes)))

    def conclude(self, classes: Sequence[str], labelled: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """What follows from the clips and their classes once all have been counted.

        Args:
            classes: C names.
            labelled: by split and modality, (C,) bool, the classes that labels of steps have anywhere.
        """
        self.findings += _odd_splits(self.clips)
        # Where clips have classes, those of steps are the same.
        by_steps = {split: names for split, names in labelled.items() if split not in self.classes}
        doubtful = [*unlearnable(self.classes), *_blank(labelled), *_unseen_at_steps(classes, by_steps)]
        self.findings += doubtful
        for split in (_TRAINED_ON, WHOLE):
            if self.clips.get(split):
                self.batch[split] = min(_BATCH, *self.clips[split].values())
        self.flags = flags(self.clips, classes)
        self.unmeasured = unmeasured(self.clips, classes)
        if any(finding.kind != "unseen classes" for finding in doubtful) and _UNMEASURED not in self.flags:
            self.flags = f"{_UNMEASURED} {self.flags}".strip()


def flags(clips: Mapping[str, Mapping[str, int]], classes: Sequence[str]) -> str:
    """What training must be told where there is nothing to validate and to measure on, or less than a usual batch.

    Args:
        clips: number of clips by split and modality.
        classes: C names.
    """
    needed = [_UNMEASURED] if unmeasured(clips, classes) else []
    fewest = min(clips.get(_TRAINED_ON, {}).values(), default=_BATCH)
    return " ".join([*needed, f"--batch_size {fewest}"] if 0 < fewest < _BATCH else needed)


def unmeasured(clips: Mapping[str, Mapping[str, int]], classes: Sequence[str]) -> str:
    """Why there is nothing to validate and to measure on, of clips by split and modality; empty where there is."""
    lacking = [split for split in ("val", "test") if split not in clips]
    if lacking:
        return f"there is no split {' and no split '.join(lacking)}"
    return "" if classes else "clips have no classes"


def train_command(data: str, given: str = "") -> str:
    """How to train on some data, with the flags that are given."""
    return f"python -m unicode_fast.train --data {shlex.quote(data)} {given}".strip()


def classes_of(target: np.ndarray, classes: Sequence[str]) -> dict[str, int]:
    """How many clips there are of each class that has some."""
    counts = np.bincount(target, minlength=len(classes))
    return {name: int(count) for name, count in zip(classes, counts, strict=True) if count}


def unlearnable(classes: Mapping[str, Mapping[str, int]]) -> Iterator[Finding]:
    """Classes of clips that nothing can be learned of, or that training does not show."""
    train = classes.get(_TRAINED_ON)
    if not train:
        return
    numbers = all(_is_number(name) for name in train) and not all(name.isdecimal() for name in train)
    if numbers and len(train) > sum(train.values()) / 2:
        text = f"{len(train)} numbers are the classes of {sum(train.values())} clips of {_TRAINED_ON}"
        yield Finding("numbers", False, f"{text}: each is a class of its own, and regression is not learned")
    elif len(train) == 1:
        yield Finding("one class", False, f"all clips of {_TRAINED_ON} are of class {next(iter(train))!r}")
    elif max(train.values()) == 1:
        text = f"each class of {_TRAINED_ON} has one clip, so that none can be recognised in others"
        yield Finding("single clips", False, text)
    for split in ("val", "test"):
        lacking = [name for name in classes.get(split, {}) if name not in train]
        if lacking:
            text = f"classes of {split} that no clip of {_TRAINED_ON} has: their clips cannot be recognised"
            yield Finding("unseen classes", False, text, lacking)


def _blank(labelled: Mapping[str, Mapping[str, np.ndarray]]) -> Iterator[Finding]:
    """Labels of steps that name no class."""
    for split, names in labelled.items():
        blank = [name for name, on in names.items() if not on.any()]
        if blank:
            yield Finding("background", False, f"labels of {split} that are background alone, of modality", blank)


def _unseen_at_steps(classes: Sequence[str], labelled: Mapping[str, Mapping[str, np.ndarray]]) -> Iterator[Finding]:
    """Classes that labels of steps have elsewhere and not in training."""
    for split in ("val", "test"):
        for name, on in labelled.get(split, {}).items():
            known = labelled.get(_TRAINED_ON, {}).get(name)
            lacking = [] if known is None else [classes[int(number)] for number in np.flatnonzero(on & ~known)]
            if lacking:
                text = f"classes that labels of {name} have in {split} and nowhere in {_TRAINED_ON}"
                yield Finding("unseen classes", False, text, lacking)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


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
