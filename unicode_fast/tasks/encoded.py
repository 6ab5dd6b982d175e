"""The codes of a data set by a frozen model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from unicode_fast.data import ClipSet, Dataset, built_in
from unicode_fast.data.talking_digits.sentences import content_words
from unicode_fast.modules.wrapped import unwrapped
from unicode_fast.tasks.probe import EncodedClips, Examples, FrozenModel, ProbeTask, encode_split

TRAIN, VALIDATION, TEST, WHOLE = "train", "val", "test", "all"
# What a probe reads of a code: its codeword; its one-hot vector; the same for content words only. Content words of a
# sentence name what the other modalities show too.
View = Literal["codewords", "tokens", "content"]


class EncodedDataset:
    """One data set and its codes. Each split and modality is encoded once, on first use.

    The clips of a modality are those that have it.

    Args:
        model: encodes in evaluation mode; its mode is restored.
        dataset: modalities need not be paired.
    """

    def __init__(self, model: FrozenModel, dataset: Dataset) -> None:
        self.model: FrozenModel = unwrapped(model)
        self.dataset = dataset
        self._clips: dict[tuple[str, str], ClipSet] = {}
        self._codes: dict[tuple[str, str, View], EncodedClips] = {}

    @property
    def names(self) -> list[str]:
        """Modalities of both the model and the data set, in the model's order."""
        return [name for name in self.model.names if name in self.dataset.modalities]

    def clips(self, split: str, name: str) -> ClipSet:
        """Clips of a split that have this modality.

        Raises:
            ValueError: split or modality is unknown, or no clip has the modality.
        """
        if (split, name) not in self._clips:
            whole = self.dataset.clips(split, name)
            self._clips[split, name] = whole.having(name)
            if not len(self._clips[split, name]):
                raise ValueError(f"split {split!r} must have clips with {name!r}, got none of {len(whole)}")
        return self._clips[split, name]

    def left_out(self, split: str, name: str) -> int:
        """Number of clips of a split that lack this modality."""
        return len(self.dataset.clips(split, name)) - len(self.clips(split, name))

    def common(self, split: str, *names: str) -> list[np.ndarray]:
        """For each of some paired modalities the places, (n,) int64 among its clips, of the clips that have all."""
        have = [self.dataset.clips(split, name).has(name) for name in names]
        return [np.flatnonzero(np.all(have, axis=0)[own]) for own in have]

    def paired(self, split: str, one: str, other: str) -> bool:
        """True where two modalities are of the same clips."""
        return self.dataset.clips(split, one) is self.dataset.clips(split, other)

    def codes(self, split: str, name: str, view: View = "codewords") -> EncodedClips:
        """Codes of these clips, in the form that a probe reads."""
        if (split, name, view) not in self._codes:
            self._codes[split, name, view] = self._viewed(split, name, view)
        return self._codes[split, name, view]

    def _viewed(self, split: str, name: str, view: View) -> EncodedClips:
        if view == "codewords":
            return encode_split(self.model, self.clips(split, name), name)
        if view == "tokens":
            return self.codes(split, name).tokens(self.model.code_sizes)
        tokens = self.codes(split, name, "tokens")
        return tokens.only(self._content(split, name)) if self.has_content(name) else tokens

    def has_content(self, name: str) -> bool:
        """True where a modality has marked content words, as the built-in sentences have."""
        return name == "text" and self.dataset.name in built_in.DATASETS

    def _content(self, split: str, name: str) -> Tensor:
        """(clips, T) bool."""
        clips = self.clips(split, name)
        return torch.from_numpy(content_words(clips))

    def aligned(self, split: str, one: str, other: str) -> bool:
        """True where positions of two modalities are the same seconds; a sentence has no time axis."""
        kinds = [self.dataset.modalities[name].kind for name in (one, other)]
        positions = [self.clips(split, name).features[name].shape[1] for name in (one, other)]
        return "words" not in kinds and positions[0] == positions[1]

    def examples(self, task: ProbeTask, split: str, name: str, view: View = "codewords") -> Examples:
        """Codes and targets of these clips."""
        return Examples(self.codes(split, name, view), task.truth(self.clips(split, name), name))

    def first_of(self, splits: Sequence[str]) -> str:
        """The first of these splits in the data set.

        Raises:
            ValueError: the data set has none of them.
        """
        for split in splits:
            if split in self.dataset.splits:
                return split
        raise ValueError(f"data must have split {' or '.join(splits)}, got {', '.join(self.dataset.splits)}")


def check_classes(source: Sequence[str], target: Sequence[str]) -> None:
    """Checks that two data sets have the same classes in the same order.

    Raises:
        ValueError: the classes differ; the message names them.
    """
    if list(source) == list(target):
        return
    only = [[name for name in one if name not in other] for one, other in ((source, target), (target, source))]
    if any(only):
        found = "; ".join(
            f"only the {which} has {', '.join(map(repr, names))}"
            for which, names in zip(("source", "target"), only, strict=True)
            if names
        )
    else:
        place = next(number for number, pair in enumerate(zip(source, target, strict=True)) if pair[0] != pair[1])
        found = f"class {place} is {source[place]!r} in the source and {target[place]!r} in the target"
    raise ValueError(f"classes of both data sets must be the same in the same order, but {found}")
