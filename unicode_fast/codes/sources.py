"""What is encoded: the clips of a data set, or media files; each gives its rows by number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from unicode_fast.codes.files import backbones_of, encode_features, encode_file
from unicode_fast.codes.formats import Row
from unicode_fast.config import Modality
from unicode_fast.data import ClipSet, Dataset
from unicode_fast.data.dataset import WHOLE
from unicode_fast.errors import one_line
from unicode_fast.media.captions import Part, seconds
from unicode_fast.media.features import MediaError
from unicode_fast.modules.model import Encoded, UniCode

# Clips whose features are read together.
_READ_CLIPS = 32


class Skipped(NamedTuple):
    """A file without codes."""

    id: str
    reason: str


class Source(Protocol):
    """What `encode_to_folder` encodes.

    Attributes:
        described: the settings that the codes depend on, JSON values; they go into codes.json.
        unit: "clip" or "file".
        modalities: names of what is encoded.
        vectors: rows have vectors.
    """

    described: dict[str, Any]
    unit: str
    modalities: list[str]
    vectors: bool

    def __len__(self) -> int:
        """Number of units."""

    def rows(self, model: UniCode, start: int, stop: int) -> Iterator[list[Row] | Skipped]:
        """The rows of each unit in [start, stop), one for each modality of a clip."""


def splits_of(dataset: Dataset, splits: Sequence[str] | None = None) -> list[str]:
    """The named splits; None gives every split, but "all" only if no other divides it.

    Raises:
        ValueError: a split is unknown.
    """
    if splits is None:
        return [split for split in dataset.splits if split != WHOLE or not dataset.divided]
    for split in splits:
        if split not in dataset.splits:
            raise ValueError(f"splits must be among {', '.join(dataset.splits)}, got {split!r}")
    return list(dict.fromkeys(splits))


def modalities_of(
    model: UniCode, there: Mapping[str, Modality], chosen: Sequence[str] | None = None, argument: str = "modalities"
) -> list[str]:
    """The named modalities, in the model's order; None gives all that model and data have.

    Args:
        model: that encodes.
        there: modalities of the data.
        chosen: names; None for all.
        argument: for the message.

    Raises:
        ValueError: model or data lack a named one, have none in common, or differ in its kind or shape.
    """
    common = [name for name in model.names if name in there]
    for name in chosen or ():
        if name not in common:
            raise ValueError(f"{argument} must be among {', '.join(common) or 'none'}, got {name!r}")
    found = [name for name in common if chosen is None or name in chosen]
    if not found:
        raise ValueError(f"data must have a modality of the model, {', '.join(model.names)}, got {', '.join(there)}")
    for name in found:
        own, theirs = model.modalities[name], there[name]
        if own != theirs:
            raise ValueError(
                f"data must have {name!r} of kind {own.kind} and shape {own.shape} as the model, got {theirs.kind} "
                f"{theirs.shape}"
            )
    return found


def encoded_clips(
    model: UniCode, clips: ClipSet, name: str, numbers: np.ndarray
) -> Iterator[tuple[int, Encoded | None]]:
    """Numbers of clips and their codes by `UniCode.encode_clip`; None for a clip that lacks the modality."""
    lengths = clips.lengths[name]
    for start in range(0, len(numbers), _READ_CLIPS):
        chunk = numbers[start : start + _READ_CLIPS]
        features = np.asarray(clips.features[name][chunk])
        for number, values in zip(chunk, features, strict=True):
            length = int(lengths[number])
            found = encode_features(model, {name: values[:length]})[name] if length else None
            yield int(number), found


class ClipSource:
    """The clips of some splits of a data set.

    Args:
        dataset: must read clips by number, so no stream.
        splits: of `splits_of`.
        modalities: of `modalities_of`.
        vectors: rows have vectors.

    Raises:
        ValueError: the data are a stream.
    """

    unit = "clip"

    def __init__(self, dataset: Dataset, splits: Sequence[str], modalities: Sequence[str], vectors: bool) -> None:
        if not dataset.shares_batches:
            raise ValueError(f"data must be read by number, so no webdataset stream, got {str(dataset.path)!r}")
        self.vectors, self.modalities = vectors, list(modalities)
        self.sets = [(split, clips) for split in splits for clips in dataset.clip_sets(split)]
        self.sets = [(split, clips) for split, clips in self.sets if set(clips.modalities) & set(modalities)]
        self.described = {
            "data": dataset.name,
            "data_sha256": dataset.digest(),
            "splits": list(splits),
        }

    def __len__(self) -> int:
        return sum(len(clips) for _, clips in self.sets)

    def rows(self, model: UniCode, start: int, stop: int) -> Iterator[list[Row] | Skipped]:
        """The rows of clips."""
        before = 0
        for split, clips in self.sets:
            numbers = np.arange(max(start - before, 0), min(stop - before, len(clips)))
            before += len(clips)
            names = [name for name in self.modalities if name in clips.modalities]
            ids, starts = clips.id, clips.arrays.get("start")
            every = [encoded_clips(model, clips, name, numbers) for name in names]
            for number, *found in zip(numbers, *every, strict=True):
                start_s = None if starts is None else float(starts[number])
                yield [
                    _row(str(ids[number]), split, name, start_s, one, self.vectors)
                    for name, (_, one) in zip(names, found, strict=True)
                    if one is not None
                ]


class FileSource:
    """Media files.

    Args:
        model: has a preprocessor.
        folder: of the files.
        parts: of `media.captions`.
        modalities: of `modalities_of`.
        vectors: rows have vectors.
    """

    unit = "file"

    def __init__(
        self, model: UniCode, folder: Path, parts: Sequence[Part], modalities: Sequence[str], vectors: bool
    ) -> None:
        backbones_of(model, modalities)
        self.folder, self.parts, self.vectors, self.modalities = folder, list(parts), vectors, list(modalities)
        files = []
        for part in self.parts:
            state = (folder / part.file).stat()
            files.append([part.id, part.split, part.caption, state.st_size, state.st_mtime_ns])
        self.described = {
            "data": folder.name,
            "data_sha256": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
            "splits": list(dict.fromkeys(part.split for part in self.parts)),
        }

    def __len__(self) -> int:
        return len(self.parts)

    def rows(self, model: UniCode, start: int, stop: int) -> Iterator[list[Row] | Skipped]:
        """The rows of files, of each window in turn."""
        for part in self.parts[start:stop]:
            path = self.folder / part.file
            try:
                clips = encode_file(
                    model, path, part.caption or None, self.modalities, start_s=part.start_s, end_s=part.end_s
                )
            except MediaError as error:
                yield Skipped(part.id, one_line(str(error).removeprefix(f"{path} ")))
                continue
            yield [
                _row(
                    f"{part.id}#{seconds(clip.start_s)}" if place else part.id,
                    part.split, name, clip.start_s, clip.codes[name], self.vectors,
                )
                for place, clip in enumerate(clips)
                for name in self.modalities
                if name in clip.codes
            ]  # fmt: skip


def _row(id: str, split: str, name: str, start_s: float | None, found: Encoded, vectors: bool) -> Row:
    codes = found.index.cpu().numpy()
    return Row(id, split, name, start_s, codes, found.vector.float().cpu().numpy() if vectors else None)
