"""The features of one file: its clips of at most ten steps, in each modality that the file has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from unicode_fast.config import Modality
from unicode_fast.media.backbones import Backbone


class MediaError(ValueError):
    """A file cannot be decoded; the message names it."""


@dataclass(frozen=True)
class ClipFeatures:
    """One window of a file.

    Attributes:
        start_s: its beginning in seconds of the file.
        features: (T, ...) float32 by modality; a modality that the file lacks is missing. T is at most WINDOW_STEPS, of
            captions the number of words.
    """

    start_s: float
    features: dict[str, np.ndarray]


@dataclass(frozen=True)
class Preprocessor:
    """How files become features: the backbone and its options by modality, in the order of the modalities.

    It is what preprocessor.json holds, and travels with stores, runs, checkpoints and exported models.

    Attributes:
        backbones: by modality the name of a backbone, what it reads, its options, and kind and shape of its features.
    """

    backbones: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, backbones: Mapping[str, Backbone]) -> Preprocessor:
        """That of these backbones."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, content: Any) -> Preprocessor:
        """The reverse of `as_dict`; raises ValueError for what it cannot have written."""
        raise NotImplementedError

    def as_dict(self) -> dict[str, Any]:
        """The content of preprocessor.json."""
        raise NotImplementedError

    def make(self) -> dict[str, Backbone]:
        """The backbones by modality; raises ValueError where their features differ from those written here."""
        raise NotImplementedError

    @property
    def modalities(self) -> dict[str, Modality]:
        """Kind and shape by modality."""
        raise NotImplementedError


def features(  # noqa: PLR0913 - a file, its part and its words
    file: str | os.PathLike[str],
    backbones: Mapping[str, Backbone] | Preprocessor | None = None,
    *,
    caption: str | None = None,
    start_s: float = 0.0,
    end_s: float | None = None,
) -> list[ClipFeatures]:
    """Decode a file and compute the features of each second.

    Args:
        file: any that FFmpeg reads: video, sound, or a picture, which is one step.
        backbones: by modality; None takes efficientnet-lite0, log-mel and wordllama for video, audio and text.
        caption: words of the file; None or empty for none.
        start_s: first second of the file that is read.
        end_s: end of the part that is read; None for the end of the file.

    Returns:
        One ClipFeatures for each window of WINDOW_STEPS steps, the last one shorter. The caption belongs to each.

    Raises:
        FileNotFoundError: there is no such file.
        MediaError: the file has neither pictures nor sound that can be decoded in this part.
        ValueError: times are out of order.
        MissingPackageError: a package is not installed.
    """
    raise NotImplementedError
