"""Estimates before a long work: clips and bytes of data sets, bytes of a run, and seconds of a training step."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch

from unicode_fast.config import Config, Modality
from unicode_fast.data import StoreError, open_data
from unicode_fast.data.dataset import WHOLE, Dataset
from unicode_fast.errors import message_of, say
from unicode_fast.files.optional import MissingPackageError
from unicode_fast.methods import make_model
from unicode_fast.training.runs import choose_device
from unicode_fast.training.trainer import Trainer

# The public features: positions of a clip, and shape of a position. Words are computed from sentences.
POSITIONS = 10
SHAPES: Mapping[str, Modality] = {
    "audio": Modality("vector", (128,)),
    "video": Modality("grid", (7, 7, 512)),
    "text": Modality("words", (768,)),
}
# The public features are float64.
_FEATURE_BYTES = 8
# A run keeps two checkpoints, each with the weights and Adam's two moments.
_COPIES = 2 * 3
# Clips of the first two steps that are timed, seconds of a batch up to which whole batches are timed, and how many.
_FEW, _MORE, _QUICK, _STEPS = 2, 6, 10.0, 3


@dataclass(frozen=True)
class Contents:
    """A data set of the tables, at hand or as published.

    Attributes:
        clips: number of clips by modality.
        shapes: kind and shape by modality.
        missing: why it cannot be opened; "" if it is at hand.
        splits: number of clips by split, if it is at hand.
    """

    clips: Mapping[str, int]
    shapes: Mapping[str, Modality]
    missing: str = ""
    splits: Mapping[str, int] = field(default_factory=dict)

    def gigabytes(self, modalities: Collection[str]) -> float:
        """Size of the features in float64, clips × positions × values × 8 bytes, without sentences; NaN is unknown."""
        if not self.clips:
            return math.nan
        values = {
            name: math.prod(shape.shape) for name, shape in self.shapes.items() if name in modalities and name != "text"
        }
        return sum(self.clips.get(name, 0) * POSITIONS * _FEATURE_BYTES * n for name, n in values.items()) / 1e9


def look(spec: str, modalities: Collection[str], published: Mapping[str, int], splits: Collection[str]) -> Contents:
    """The contents of a data set from its lists; those published if it is not at hand.

    Args:
        spec: as for `open_data`.
        modalities: names; sentences are not encoded here.
        published: number of clips by modality.
        splits: those that it must have.
    """
    names = [name for name in modalities if name != "text"]
    try:
        data = open_data(spec, modalities=names, progress=False)
        lacking = [split for split in splits if split not in data.splits]
    except (FileNotFoundError, StoreError, MissingPackageError) as error:
        return Contents(published, SHAPES, message_of(error))
    clips: dict[str, int] = {}
    for split in data.splits:
        for one in data.clip_sets(split) if split not in data.divided else ():
            for name in one.modalities:
                clips[name] = clips.get(name, 0) + len(one)
    missing = f"{spec} has no split {lacking[0]!r}" if lacking else ""
    return Contents(clips, {**SHAPES, **data.modalities}, missing, _splits(data))


def _splits(data: Dataset) -> dict[str, int]:
    return {split: max(map(len, data.clip_sets(split))) for split in data.splits}


def probe_clips(contents: Contents) -> int:
    """Clips that a probe trains on under the official protocol: the split "all", else train, else all there are."""
    there = [contents.splits[split] for split in (WHOLE, "train") if split in contents.splits]
    return there[0] if there else max(contents.clips.values(), default=0)


def run_gigabytes(config: Config, modalities: Mapping[str, Modality]) -> float:
    """Size of a run folder: two checkpoints with the weights and Adam's two moments."""
    with torch.device("meta"):
        model = make_model(modalities, config)
    values = sum(parameter.numel() for parameter in model.parameters())
    return _COPIES * values * getattr(torch, config.train.dtype).itemsize / 1e9


def seconds_per_step(config: Config, modalities: Mapping[str, Modality]) -> tuple[float, str]:
    """Seconds of a training step on random features on this machine, and how they were measured.

    Steps of a few clips are timed first, after one that is not. Where they show that a whole batch is quick, the result
    is the median of three whole batches. Elsewhere it is a line through the times of the small steps.

    Args:
        config: of the run.
        modalities: kind and shape by name.
    """
    device, size = choose_device(config.train.device), config.train.batch_size
    say(f"measuring a training step on {device}; --seconds_per_step SECONDS replaces this", sys.stderr)
    trainer = Trainer(config, modalities, device)
    least = 2 * config.train.micro_batches
    few, more = (min(size, max(clips, least)) for clips in (_FEW, _MORE))
    _timed(trainer, modalities, few)
    if more < size:
        short, longer = (_timed(trainer, modalities, clips) for clips in (few, more))
        whole = short + max(0.0, longer - short) / max(1, more - few) * (size - few)
        if whole > _QUICK:
            return whole, f"measured at start on {device}: a line through steps of {few} and {more} clips, at {size}"
    timed = [_timed(trainer, modalities, size) for _ in range(_STEPS)]
    return statistics.median(timed), f"measured at start on {device}: median of {_STEPS} steps"


def _timed(trainer: Trainer, modalities: Mapping[str, Modality], clips: int) -> float:
    device, dtype = trainer.model.device, getattr(torch, trainer.config.train.dtype)
    features = {
        name: torch.randn(clips, POSITIONS, *kind.shape, dtype=dtype, device=device)
        for name, kind in modalities.items()
    }
    begun = time.monotonic()
    trainer.train_step(features, None, trainer.config.train.learning_rate)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic() - begun
