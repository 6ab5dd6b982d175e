"""Backbones: what turns the frames, the sound and the captions of files into features of each step.

A backbone is a small object with the attributes of `Backbone`. `register` adds a class of your own under a name;
`make` makes a backbone by its name, or from a local folder with a model of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np

from unicode_fast.config import Modality
from unicode_fast.errors import few

# What a backbone reads of a file.
Reads: TypeAlias = Literal["frames", "sound", "caption"]
# Seconds between two steps.
STEP_S = 1.0
# Most steps of a clip; longer files are cut into windows.
WINDOW_STEPS = 10


class Backbone(Protocol):
    """One modality's features of each step.

    A backbone of sound may have `window_s`, the seconds that a step reads, and `hop_s`, those between two steps; both
    are 1 without them. A backbone of frames may have `frame_numbers(count, steps)`, which gives the numbers of the
    frames of each step, (steps, rate) int64, from the number of frames of a clip. Without it, step t has the frames
    shown at t + (k + 1/2) / rate seconds, k from 0 to rate - 1. A backbone of captions may have `words(caption)`, a
    list of all words, which tells how many beyond WINDOW_STEPS have no vector. `options` are the keyword arguments that
    made it, if any. `weights_sha256` is the checksum of its weights, if it has some.

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
        """Features.

        Args:
            given: (N, H, W, 3) uint8 RGB frames of one size; (N, S) float32 mono sound in -1..1, a row for each step;
                or a caption, text.

        Returns:
            (N, ...) float32 in the shape of a step; of a caption (words, ...), at most WINDOW_STEPS.
        """


Factory: TypeAlias = Callable[..., Backbone]
_factories: dict[str, Factory] = {}


def register(name: str, factory: Factory) -> None:
    """Add a backbone under a name, for this process and those forked from it.

    Args:
        name: letters, digits, "-" and "_"; not that of another backbone.
        factory: a class or function that makes the backbone; its keyword arguments are options, which must be
            JSON values.

    Raises:
        ValueError: the name is taken or has other characters.
        TypeError: the factory cannot be called.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"name must be of letters, digits, - and _, got {name!r}")
    if not callable(factory):
        raise TypeError(f"factory must be a class or function, got {type(factory).__name__}")
    if _factories.setdefault(name, factory) is not factory:
        raise ValueError(f"name must be new, got {name!r} of another backbone")


def names() -> list[str]:
    """The registered names."""
    return list(_factories)


def make(name: str, reads: Reads, **options: Any) -> Backbone:
    """Make a backbone.

    Args:
        name: a registered name, or a local folder with a model that transformers reads.
        reads: what it must read.
        options: keyword arguments of the registered class or function.

    Raises:
        ValueError: the name is unknown, an option is invalid, or the backbone reads something else.
        MissingPackageError: a package that it needs is not installed.
    """
    if name in _factories:
        try:
            backbone = _factories[name](**options)
        except TypeError as error:
            raise ValueError(f"options of backbone {name!r} must be its arguments, got {options}: {error}") from error
    elif Path(name).is_dir():
        from unicode_fast.media.local_models import local_model

        backbone = local_model(name, reads, **options)
    else:
        raise ValueError(f"backbone must be one of {few(names())}, or a local folder with a model, got {name!r}")
    if backbone.reads != reads:
        raise ValueError(f"backbone {name!r} must read {reads}, it reads {backbone.reads}")
    return backbone
