"""A feature store from a folder of media files; an interruption loses no finished file."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import safetensors
import torch
from tqdm import tqdm

from unicode_fast.config import Modality
from unicode_fast.data.dataset import ClipSet, Dataset
from unicode_fast.data.lazy import ClipArray, LazyArray
from unicode_fast.data.store.checks import StoreError
from unicode_fast.data.store.write import PackedDtype, check_new, explained, make_parent, pack
from unicode_fast.errors import TooManyFiles, few, one_line, say
from unicode_fast.files.locks import alone
from unicode_fast.files.optional import MissingPackageError
from unicode_fast.files.tensor_files import CONTENT, write_tensors
from unicode_fast.files.untrusted import BadFile, parse_json, read_json
from unicode_fast.files.writing import remove, remove_unfinished, write_json
from unicode_fast.media.backbones import STEP_S, WINDOW_STEPS, Backbone, make
from unicode_fast.media.captions import Part, list_files, notes, read_captions, seconds
from unicode_fast.media.features import DEFAULTS, MediaError, Preprocessor, features
from unicode_fast.media.processes import Died, in_processes
from unicode_fast.version import __version__

SKIPPED = "skipped.csv"
_PLAN, _LOCK = "plan.json", ".lock"
_SUFFIX = ".safetensors"
# Why a file is skipped.
_UNDECODED, _UNREADABLE = "cannot be decoded", "cannot be read"
_FAILED, _DIED = "fail in a backbone", "end their process"


@dataclass(frozen=True)
class Skipped:
    """A file without clips.

    Attributes:
        id: of its part, as in the store.
        kind: a class of reasons.
        reason: in one line.
    """

    id: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Extraction:
    """What `extract` has written.

    Attributes:
        store: its folder.
        clips: number of clips by split.
        parts: number of files, or parts of files, that were to be read.
        skipped: those without clips.
        without: number of clips that lack a modality, by modality; only modalities that some clips lack.
        absent: modalities that no clip has, so the store has none of them.
        words_cut: number of captions with more words than their backbone keeps.
        media_s: seconds of media in all clips.
    """

    store: Path
    clips: dict[str, int]
    parts: int
    skipped: list[Skipped]
    without: dict[str, int]
    absent: list[str]
    words_cut: int
    media_s: float

    def lines(self) -> list[str]:
        """The summary, a few lines."""
        clips = sum(self.clips.values())
        used = self.parts - len(self.skipped)
        found = [f"{used:,} of {self.parts:,} files, {clips:,} clips, {self.media_s:,.0f} s of media"]
        kinds = Counter(one.kind for one in self.skipped)
        for kind, count in kinds.items():
            those = [f"{one.id}: {one.reason}" for one in self.skipped if one.kind == kind]
            found.append(f"{count:,} skipped, {kind}: {few(those)}")
        if self.skipped:
            found.append(f"skipped files are listed in {self.store / SKIPPED}")
        if self.absent:
            found.append(f"no clip has {' or '.join(self.absent)}, so the store has none")
        found += [f"{count:,} of {clips:,} clips have no {name}" for name, count in self.without.items()]
        if self.words_cut:
            found.append(f"{self.words_cut:,} captions have more words than their backbone keeps; the rest is not read")
        return found


def extract(  # noqa: PLR0913 - the files, their words and models, and how to compute them
    folder: str | os.PathLike[str],
    store: str | os.PathLike[str],
    *,
    captions: str | os.PathLike[str] | None = None,
    backbones: Mapping[str, Backbone] | Preprocessor | None = None,
    workers: int = 2,
    dtype: PackedDtype = "float32",
    progress: bool = True,
) -> Extraction:
    """Compute the features of a folder of media files and write them as a feature store.

    Each file's features are written to the folder `.<store>.extracting` beside the store as soon as they are computed.
    After an interruption the same call computes only the other files, and those that have changed; the store has the
    same digest as without the interruption. Files that cannot be decoded are skipped and listed in `skipped.csv` in the
    store.

    Clips have ten steps of one second; a longer file gives several clips. The clip's arrays are its features by
    modality, their lengths, `id`, `file`, `start` in seconds of the file, `caption`, and `class` if the table has
    classes. A clip without pictures, sound or caption has length 0 of that modality, and zeros.

    Args:
        folder: of the files.
        store: folder to make; it must not exist.
        captions: CSV with the columns file and, if wanted, split, class, caption, start and end; None takes every media
            file of the folder. A file without a split gets one from its name: 80 % train, 10 % val, 10 % test.
        backbones: by modality; None takes log-mel, efficientnet-lite0 and wordllama for audio, video and text.
            The processes are forked, so backbones of your own need no import.
        workers: number of processes that each compute one file at a time; they share torch's threads.
        dtype: of the features in the store.
        progress: show a progress bar on standard error.

    Returns:
        What was written and what was skipped.

    Raises:
        StoreError: the table is invalid, no clip is left, or an interrupted extraction had other settings.
        FileExistsError: `store` exists already.
        FileNotFoundError: the folder, its files or the table do not exist.
        ValueError: an argument is invalid.
        InUse: another process extracts to the same store.
        MissingPackageError: a package of a backbone is not installed.
        OSError: the folder cannot be written, or the disk is full; finished files are kept.
    """
    source, target = Path(folder).absolute(), Path(store).absolute()
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if dtype not in get_args(PackedDtype):
        raise ValueError(f"dtype must be one of {', '.join(get_args(PackedDtype))}, got {dtype!r}")
    check_target(target)
    if not source.is_dir():
        raise FileNotFoundError(f"videos must be an existing folder, got {str(folder)!r}")
    table = None if captions is None else Path(captions)
    found = list_files(source) if table is None else read_captions(table, source)
    for note in notes(found, table):
        say(f"note: {one_line(note)}", sys.stderr)
    made = _made(backbones, any(part.caption for part in found.parts))
    digest = "" if table is None else hashlib.sha256(table.read_bytes()).hexdigest()
    job = _Job(source, target, found.parts, made, Preprocessor.of(made))
    try:
        make_parent(target.parent)
        job.work.mkdir(exist_ok=True)
        with alone(job.work / _LOCK, f"extraction of {target}"):
            remove_unfinished(job.work)
            threads = job.begin(digest, max(1, torch.get_num_threads() // workers))
            skipped = job.compute(workers, threads, progress)
            done = job.finish(skipped, dtype, progress)
            remove(job.work)
    except OSError as error:
        raise explained(error, target) from error
    except KeyboardInterrupt:
        count = f"{len(job.records):,} of {len(job.parts):,}"
        say(f"{count} files are done and kept in {job.work}; the same command goes on with the others", sys.stderr)
        raise
    return done


def check_target(store: str | os.PathLike[str]) -> None:
    """Raise FileExistsError if the store exists; name the folder that an extraction to it has left."""
    target = Path(store).absolute()
    work = _work_folder(target)
    if target.exists() and work.exists():
        # A process that is killed after it has published the store leaves its files.
        say(f"note: {work} is left of an extraction to {target} and can be deleted", sys.stderr)
    check_new(target)


def _work_folder(target: Path) -> Path:
    return target.with_name(f".{target.name}.extracting")


def _made(backbones: Mapping[str, Backbone] | Preprocessor | None, captioned: bool) -> dict[str, Backbone]:
    """The backbones by modality; without captions none for them."""
    if backbones is None:
        backbones = {name: make(*one) for name, one in DEFAULTS.items() if captioned or one[1] != "caption"}
    elif isinstance(backbones, Preprocessor):
        backbones = backbones.make()
    wrong = [one for one in backbones.values() if isinstance(one, type) or not hasattr(one, "reads")]
    if wrong:
        raise TypeError(f"backbones must be objects such as make gives, got {wrong[0]!r:.60}")
    unread = [name for name, one in backbones.items() if one.reads == "caption" and not captioned]
    if unread:
        say(f"note: no file has a caption, so the store has no {', '.join(unread)}", sys.stderr)
    made = {name: one for name, one in backbones.items() if name not in unread}
    if not made:
        raise ValueError(f"backbones must read frames, sound or captions that the files have, got {list(backbones)}")
    return made


@dataclass(frozen=True)
class _Record:
    """The features of one part on the disk, or why it has none.

    Attributes:
        state: size and time of change of its file before they were computed.
        starts: by clip, in seconds of the file.
        lengths: steps of each clip by modality.
        media_s: seconds of media of all clips.
        words_cut: the caption has more words than are kept.
        skipped: kind and reason; None with features.
    """

    state: list[int]
    starts: list[float] = field(default_factory=list)
    lengths: list[dict[str, int]] = field(default_factory=list)
    media_s: float = 0.0
    words_cut: bool = False
    skipped: tuple[str, str] | None = None


class _Job:
    """One extraction.

    Args:
        source: folder of the files.
        target: the store.
        parts: what is computed.
        backbones: by modality.
        preprocessor: of them.
    """

    def __init__(
        self,
        source: Path,
        target: Path,
        parts: Sequence[Part],
        backbones: Mapping[str, Backbone],
        preprocessor: Preprocessor,
    ) -> None:
        self.source, self.target, self.parts = source, target, parts
        self.backbones, self.preprocessor = backbones, preprocessor
        self.work = _work_folder(target)
        self.records: dict[int, _Record] = {}

    def begin(self, table: str, threads: int) -> int:
        """Write the plan, or compare it with that of the interrupted extraction; returns the threads of a process.

        Args:
            table: checksum of the table; empty without one.
            threads: of a process of a new extraction.

        Raises:
            StoreError: the folder belongs to another extraction.
        """
        plan: dict[str, Any] = {
            "videos": str(self.source),
            "captions": table,
            "version of unicode_fast": __version__,
            "threads": threads,
            **{f"backbone of {name}": one for name, one in self.preprocessor.backbones.items()},
        }
        file = self.work / _PLAN
        if not file.exists():
            others = [entry.name for entry in self.work.iterdir() if entry.name != _LOCK]
            if others:
                raise StoreError(f"{self.work} must hold only files of an interrupted extraction, got {others[0]!r}")
            write_json(file, plan)
            return threads
        try:
            before = read_json(file)
            given = before["threads"]
        except (BadFile, TypeError, KeyError) as error:
            raise StoreError(f"{file} is damaged: {error}; delete the folder to start again") from error
        # Sums depend on the number of threads.
        plan["threads"] = given
        changed = [name for name in {**plan, **before} if plan.get(name) != before.get(name)]
        if changed:
            raise StoreError(
                f"{self.work} holds an interrupted extraction with other {', '.join(changed)}; repeat its command, or "
                "delete the folder to start again"
            )
        return int(given)

    def compute(self, workers: int, threads: int, progress: bool) -> list[Skipped]:
        """Compute the parts that are not done; returns those without features."""
        started = time.monotonic()
        for number in range(len(self.parts)):
            record = self._read(number)
            if record is not None:
                self.records[number] = record
        rest = [number for number in range(len(self.parts)) if number not in self.records]
        if self.records:
            say(f"resuming: {len(self.records):,} of {len(self.parts):,} files are done", sys.stderr)
        media = 0.0
        with tqdm(
            total=len(self.parts),
            initial=len(self.records),
            desc="extracting",
            unit="file",
            disable=not progress,
            dynamic_ncols=True,
        ) as bar:
            tick = bar.refresh if sys.stderr.isatty() else lambda: None
            # Closed at once after an error or Ctrl-C, which ends the processes.
            with contextlib.closing(in_processes(self._compute, rest, workers, threads, tick)) as results:
                for number, found in results:
                    if isinstance(found, Died):
                        why = f"signal {-found.status}" if found.status < 0 else f"status {found.status}"
                        found = _Record([], skipped=(_DIED, f"two processes ended with {why}, as for lack of memory"))
                    self.records[number] = found
                    media += found.media_s
                    bar.set_postfix_str(f"{media / (time.monotonic() - started):.1f} s of media/s", refresh=False)
                    bar.update()
        ended = sorted(self.records.items())
        return [Skipped(self.parts[number].id, *one.skipped) for number, one in ended if one.skipped is not None]

    def _file(self, number: int) -> Path:
        """The file with the features of a part; its name is that of the part and of the words that were read."""
        part = self.parts[number]
        name = json.dumps([part.id, part.caption])
        return self.work / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}{_SUFFIX}"

    def _read(self, number: int) -> _Record | None:
        """What the disk holds of a part; None if nothing, or if its file has changed."""
        file = self._file(number)
        try:
            with safetensors.safe_open(str(file), "np") as opened:
                content = parse_json(opened.metadata()[CONTENT].encode())
            record = _Record(**content)
            return record if record.state == _state(self.source / self.parts[number].file) else None
        # A file that was damaged can raise any exception; it is computed again.
        except Exception:
            return None

    def _compute(self, number: int) -> _Record:
        """Compute and write the features of a part, in a worker.

        Raises:
            OSError: they cannot be written.
        """
        part, path = self.parts[number], self.source / self.parts[number].file
        state: list[int] = []
        tensors: dict[str, torch.Tensor] = {}
        try:
            state = _state(path)
            clips = features(
                path,
                self.backbones,
                caption=part.caption or None,
                start_s=part.start_s,
                end_s=part.end_s,
            )
            self._check(clips)
            timed = [name for name, one in self.backbones.items() if one.reads != "caption"]
            for name in self.backbones:
                own = [clip.features[name] for clip in clips if name in clip.features]
                if own:
                    tensors[name] = torch.from_numpy(np.concatenate(own).astype(np.float32, copy=False))
            record = _Record(
                state,
                [clip.start_s for clip in clips],
                [{name: len(one) for name, one in clip.features.items()} for clip in clips],
                STEP_S * sum(max((len(clip.features.get(name, ())) for name in timed), default=0) for clip in clips),
                self._words_cut(part.caption),
            )
        except MediaError as error:
            record = _Record(state, skipped=(_UNDECODED, one_line(str(error).removeprefix(f"{path} "))))
        except (MissingPackageError, TooManyFiles):
            raise
        except OSError as error:
            record = _Record(state, skipped=(_UNREADABLE, one_line(error.strerror or str(error))))
        # A backbone can raise any exception.
        except Exception as error:
            tensors = {}
            record = _Record(state, skipped=(_FAILED, one_line(f"{type(error).__name__}: {error}")))
        write_tensors(self._file(number), tensors, vars(record))
        return record

    def _words_cut(self, caption: str) -> bool:
        """Whether a backbone leaves out words of a caption; one without a method `words` cannot say so."""
        readers = [one for one in self.backbones.values() if one.reads == "caption" and hasattr(one, "words")]
        return any(len(one.words(caption)) > WINDOW_STEPS for one in readers)

    def _check(self, clips: Sequence[Any]) -> None:
        """Raise ValueError unless there are clips, and features have the shapes of their backbones and are finite."""
        if not clips:
            raise MediaError("no step of it lies in this part")
        for clip in clips:
            for name, found in clip.features.items():
                shape = self.backbones[name].modality.shape
                if found.shape[1:] != shape or not 1 <= len(found) <= WINDOW_STEPS:
                    expected = ", ".join(map(str, (f"1 to {WINDOW_STEPS}", *shape)))
                    raise ValueError(f"features of {name} must have shape ({expected}), got {found.shape}")
                if not np.isfinite(found).all():
                    raise ValueError(f"features of {name} must be finite, got NaN or infinite values")

    def finish(self, skipped: list[Skipped], dtype: PackedDtype, progress: bool) -> Extraction:
        """Write the store.

        Raises:
            StoreError: no clip is left.
        """
        numbers = [number for number in range(len(self.parts)) if self.records[number].starts]
        if not numbers:
            why = f"; {skipped[0].id}: {skipped[0].reason}" if skipped else ""
            raise StoreError(f"videos must hold a file that can be decoded, got none of {len(self.parts)}{why}")
        lengths = [one for number in numbers for one in self.records[number].lengths]
        present = [name for name in self.backbones if any(one.get(name) for one in lengths)]
        data = _Extracted(self, numbers, present)
        texts = {SKIPPED: _csv(skipped)} if skipped else {}
        pack(data, self.target, dtype, progress=progress, texts=texts)
        lacking = Counter(name for one in lengths for name in present if not one.get(name))
        return Extraction(
            self.target,
            {split: len(data.split(split)) for split in data.splits},
            len(self.parts),
            skipped,
            {name: lacking[name] for name in present if lacking[name]},
            [name for name in self.backbones if name not in present],
            sum(self.records[number].words_cut for number in numbers),
            sum(self.records[number].media_s for number in numbers),
        )

    def clips(self, numbers: Sequence[int], names: Sequence[str]) -> Iterator[_Clip]:
        """The clips of some parts, in order."""
        for number in numbers:
            part, record, file = self.parts[number], self.records[number], self._file(number)
            rows = dict.fromkeys(names, 0)
            for place, (start, lengths) in enumerate(zip(record.starts, record.lengths, strict=True)):
                own = {name: lengths.get(name, 0) for name in names}
                yield _Clip(f"{part.id}#{seconds(start)}" if place else part.id, part, start, file, dict(rows), own)
                rows = {name: rows[name] + own[name] for name in names}


@dataclass(frozen=True)
class _Clip:
    """A clip on the disk: its features are the rows from `rows` on, as many as `lengths`, of its file's tensors."""

    id: str
    part: Part
    start: float
    file: Path
    rows: dict[str, int]
    lengths: dict[str, int]

    def features(self, name: str, modality: Modality) -> np.ndarray:
        """(WINDOW_STEPS, ...) float32, zeros after the end."""
        found, length = np.zeros((WINDOW_STEPS, *modality.shape), np.float32), self.lengths[name]
        if length:
            with safetensors.safe_open(str(self.file), "np") as opened:
                found[:length] = opened.get_slice(name)[self.rows[name] : self.rows[name] + length]
        return found


class _Extracted(Dataset):
    """The clips of an extraction, read when they are indexed.

    Args:
        job: with all records.
        numbers: of the parts with clips.
        names: modalities that some clip has.
    """

    def __init__(self, job: _Job, numbers: Sequence[int], names: Sequence[str]) -> None:
        preprocessor = Preprocessor({name: job.preprocessor.backbones[name] for name in names})
        modalities = preprocessor.modalities
        clips = list(job.clips(numbers, names))
        classes = sorted({clip.part.label for clip in clips} - {""})
        twice = [name for name, count in Counter(clip.id for clip in clips).items() if count > 1]
        if twice:
            raise StoreError(f"clips must have different names, got {twice[0]!r} more than once; rename its file")
        splits: dict[str, list[_Clip]] = {}
        for clip in clips:
            splits.setdefault(clip.part.split, []).append(clip)
        order = sorted(splits, key=lambda name: (*("train", "val", "test"), name).index(name))
        clip_sets = {
            split: [ClipSet(_arrays(own, modalities, classes), modalities, classes, np.arange(len(own)))]
            for split, own in ((split, splits[split]) for split in order)
        }
        super().__init__(job.target, job.source.name, modalities, classes, clip_sets)
        self.preprocessor = preprocessor.as_dict()
        states = [[number, job.records[number].state] for number in numbers]
        self.facts = json.dumps([self.preprocessor, states])

    def digest(self) -> str:
        """A checksum that also covers the states of the files, so that an interrupted pack of others is refused."""
        return hashlib.sha256((super().digest() + self.facts).encode()).hexdigest()


def _arrays(clips: Sequence[_Clip], modalities: Mapping[str, Modality], classes: Sequence[str]) -> dict[str, ClipArray]:
    """The arrays of the clips of a split."""
    arrays: dict[str, ClipArray] = {}
    for name, modality in modalities.items():

        def read(number: int, name: str = name, modality: Modality = modality) -> np.ndarray:
            return clips[number].features(name, modality)

        arrays[name] = LazyArray.by_clip((len(clips), WINDOW_STEPS, *modality.shape), np.float32, read)
        arrays[f"{name}.length"] = np.array([clip.lengths[name] for clip in clips], np.int64)
    arrays["id"] = np.array([clip.id for clip in clips])
    arrays["file"] = np.array([clip.part.file for clip in clips])
    arrays["start"] = np.array([clip.start for clip in clips], np.float64)
    arrays["caption"] = np.array([clip.part.caption for clip in clips])
    if classes:
        arrays["class"] = np.array([classes.index(clip.part.label) for clip in clips], np.int64)
    return arrays


def _state(file: Path) -> list[int]:
    """Size and time of change of a file."""
    found = file.stat()
    return [found.st_size, found.st_mtime_ns]


def _csv(skipped: Sequence[Skipped]) -> str:
    """The table of skipped files."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "kind", "reason"])
    writer.writerows([one.id, one.kind, one.reason] for one in skipped)
    return text.getvalue()
