"""A model of media files that are decoded by their names, so that no test needs a decoder."""

from pathlib import Path

import numpy as np
import pytest
import tiny

from unicode_fast import UniCode, media
from unicode_fast.config import Modality
from unicode_fast.media.features import MediaError, Preprocessor


class Letters:
    """A word is the number of each of its letters from a to h."""

    name, reads, modality, rate = "letters", "caption", Modality("words", (8,)), 0

    def __call__(self, given: str) -> np.ndarray:
        return np.array([[word.count(one) for one in "abcdefgh"] for word in given.split()], np.float32).reshape(-1, 8)


class Noise:
    """Never called, because nothing is decoded."""

    name, reads, modality, rate = "noise", "sound", Modality("vector", (6,)), 8


def model(patch: pytest.MonkeyPatch) -> UniCode:
    """A model with a preprocessor. A file `N.mp4` has N seconds of sound, `broken.mp4` cannot be decoded."""
    for one in (Letters, Noise):
        media.register(one.name, one)
    patch.setattr("unicode_fast.codes.files.features", features)
    owner = tiny.model(names="audio,text").eval()
    owner.preprocessor = Preprocessor.of({"audio": Noise(), "text": Letters()}).as_dict()
    return owner


def features(file: Path, backbones: dict, *, caption: str | None, start_s: float, end_s: float | None) -> list:
    stem = Path(file).stem
    if stem == "broken":
        raise MediaError(f"{file} must be decodable, it is not")
    values = np.random.default_rng(len(stem)).normal(size=(int(stem), 6)).astype(np.float32)
    words = {"text": backbones["text"](caption)} if caption and "text" in backbones else {}
    return [
        media.ClipFeatures(
            start_s + start, ({"audio": values[start : start + 10]} if "audio" in backbones else {}) | words
        )
        for start in range(0, len(values), 10)
    ]
