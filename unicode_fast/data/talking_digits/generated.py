"""Common functions of the built-in data sets: folders in the cache, and standardisation of features."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from unicode_fast.data.cache import open_or_make
from unicode_fast.data.store.read import Store
from unicode_fast.data.talking_digits.clips import POSITIONS, Recipe
from unicode_fast.data.talking_digits.sound import Voices
from unicode_fast.files.paths import cache_folder

DEFAULT_CLIPS = {"train": 4000, "val": 500, "test": 1000}
_SMALLEST_DEVIATION = 1e-3


def checked_clips(clips: Mapping[str, int] | None, seed: int) -> dict[str, int]:
    """The number of clips of each split, in order; None takes `DEFAULT_CLIPS`.

    Raises:
        ValueError: a number of clips or the seed is out of range.
    """
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    clips = DEFAULT_CLIPS if clips is None else clips
    if set(clips) != set(DEFAULT_CLIPS) or any(int(count) < 1 for count in clips.values()):
        raise ValueError(f"clips must give at least 1 for each of {', '.join(DEFAULT_CLIPS)}, got {dict(clips)}")
    return {split: int(clips[split]) for split in DEFAULT_CLIPS}


def open_generated(
    recipe: Recipe, generator_version: int, cache: str | os.PathLike[str] | None, make: Callable[[Path], None]
) -> Store:
    """Open a recipe's store in a cache folder, None for the platform's; a missing store is generated."""
    folder = (Path(cache) if cache is not None else cache_folder()) / folder_name(recipe, generator_version)
    return open_or_make(folder, make, _say)


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def folder_name(recipe: Recipe, generator_version: int) -> str:
    """Readable name, and a hash of all parameters of the contents."""
    described = json.dumps([generator_version, dataclasses.asdict(recipe)], sort_keys=True)
    level = "-easy" if recipe.easy else ""
    return f"{recipe.name}{level}-seed{recipe.seed}-{hashlib.sha256(described.encode()).hexdigest()[:12]}"


def clip_ids(split: str, clips: int) -> np.ndarray:
    """(clips,) int64, different in each split."""
    return np.arange(clips) + 1_000_000 * list(DEFAULT_CLIPS).index(split)


def standardisation(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Mean and standard deviation of each modality's features; for words the mean is 0, to keep the padding zero."""
    audio = arrays["audio"].astype(np.float64)
    video = arrays["video"].astype(np.float64)
    valid = np.arange(POSITIONS) < arrays["text.length"][:, None]
    text = arrays["text"][valid].astype(np.float64)
    deviation = np.maximum(audio.std((0, 1)), _SMALLEST_DEVIATION)
    return {
        "audio": {"mean": audio.mean((0, 1)).tolist(), "deviation": deviation.tolist()},
        "video": {"mean": float(video.mean()), "deviation": float(video.std())},
        "text": {"mean": 0.0, "deviation": float(text.std())},
    }


def standardised(arrays: dict[str, np.ndarray], standard: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The same arrays, features minus their mean and divided by their deviation."""
    for name, numbers in standard.items():
        mean = np.asarray(numbers["mean"], np.float32)
        arrays[name] = (arrays[name] - mean) / np.asarray(numbers["deviation"], np.float32)
    return arrays


def description(
    recipe: Recipe, generator_version: int, voices: Voices, standard: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """How a store was generated, for its `extra`."""
    return {
        "generator": generator_version,
        "recipe": dataclasses.asdict(recipe),
        "voices": voices.names,
        "standardisation": standard,
        "versions": {package: version(package) for package in ("espeakng-loader", "numpy", "scikit-learn")},
    }
