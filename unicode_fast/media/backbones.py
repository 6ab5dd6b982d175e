"""Backbones: what turns the frames, the sound and the captions of files into features of each step.

A backbone is a small object with the attributes of `Backbone`. `register` adds a class of your own under a name;
`make` makes a backbone by its name, or from a local folder with a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np

from unicode_fast.config import Modality

# What a backbone reads of a file.
Reads: TypeAlias = Literal["frames", "sound", "caption"]
# Seconds between two steps.
STEP_S = 1.0
# Most steps of a clip; longer files are cut into windows.
WINDOW_STEPS = 10


@runtime_checkable
class Backbone(Protocol):
    """One modality's features of each step.

    Attributes:
        name: as registered, or the folder of a local model.
        reads: what it is called with.
        modality: kind and shape of the features of a step, or of a word.
        rate: frames per step, whose features are averaged; samples per second of sound; 0 for captions.
    """

    name: str
    reads: Reads
    modality: Modality
    rate: int

    def __call__(self, given: Any) -> np.ndarray:
        """Features, float32.

        Args:
            given: (N, H, W, 3) uint8 RGB frames of one size; (N, S) float32 sound in -1..1, mono, each row one window;
                or a caption, text.

        Returns:
            (N, ...) in the shape of a step; of a caption (words, ...).
        """


# A backbone of sound may have `window_s` and `hop_s`, the seconds of a window and between the beginnings of two; without
# them both are STEP_S. A backbone of frames may have `frame_numbers(count, steps)`, which gives the numbers of the frames
# of each step, (steps, rate) int64, from the number of frames of the file; without it, step t has the frames shown at
# t + k / rate seconds.
_FACTORIES: dict[str, Callable[..., Backbone]] = {}


def register(name: str, factory: Callable[..., Backbone]) -> None:
    """Add a backbone under a name.

    Args:
        name: letters, digits, "-" and "_"; not that of another backbone.
        factory: a class or function that makes the backbone; its keyword arguments are options, which must be
            JSON values.

    Raises:
        ValueError: the name is taken or has other characters.
        TypeError: the factory cannot be called.
    """
    raise NotImplementedError


def make(name: str, reads: Reads, **options: Any) -> Backbone:
    """Make a backbone.

    Args:
        name: a registered name, or a local folder with a model that transformers reads.
        reads: what it must read.
        options: keyword arguments of the registered factory.

    Raises:
        ValueError: the name is unknown, or the backbone reads something else.
        MissingPackageError: a package that it needs is not installed.
    """
    raise NotImplementedError
