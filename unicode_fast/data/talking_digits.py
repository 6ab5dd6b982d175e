"""The built-in data sets: clips of digits that are spoken, handwritten and named in a sentence.

A clip has ten seconds, a class (a digit), and a run of four to nine consecutive seconds in which the event is on: each
of these seconds of sound holds the spoken digit and each of these pictures shows another handwritten image of it. In
some clips the two streams start or stop up to a second apart, and in some a different digit, the distractor, is spoken
or shown outside the event. The sentence names the digit once. No picture and no voice of a training clip appears in
validation or test.

Speech is real speech synthesis by espeak-ng. That program is licensed under GPL-3, so it runs in a child process, and
only while clips are made (see `unicode_fast.data.speech`).
"""

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

from unicode_fast.config import Modality
from unicode_fast.data import handwriting, sentences
from unicode_fast.data.cache import cache_folder, open_or_make
from unicode_fast.data.clips import BACKGROUND, CLASSES, STEPS, ClipPlan, Recipe, plan_clips
from unicode_fast.data.sound import Voices, render_audio, voices_of
from unicode_fast.data.store import Store
from unicode_fast.data.store_write import write_store

GENERATOR_VERSION = 4
DATASETS = ("talking-digits", "talking-digits-b", "talking-digits-two")
DEFAULT_CLIPS = {"train": 4000, "val": 500, "test": 1000}
MODALITIES = {
    "audio": Modality("vector", (128,)),
    "video": Modality("grid", (handwriting.GRID_SIDE, handwriting.GRID_SIDE, handwriting.CHANNELS)),
    "text": Modality("words", (sentences.WORD_WIDTH,)),
}
_CALIBRATION_CLIPS = 200
_SMALLEST_DEVIATION = 1e-3


def load(
    name: str = "talking-digits",
    *,
    cache: str | os.PathLike[str] | None = None,
    easy: bool = False,
    clips: Mapping[str, int] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Store:
    """Open a built-in data set, making it first if it is not in the cache.

    Arrays of each split, beside the features "audio" (clips, 10, 128), "video" (clips, 10, 7, 7, 16) and "text"
    (clips, 10, 128), all float32: "audio.label" and "video.label" (clips, 10, 11) uint8, the event alone, background
    last; "class" and "id" (clips,) int64; "text.length" (clips,) int64 in 8..10; "text.sentence" (clips,) strings;
    "shifted" (clips,) bool, the streams' events differ in time; "audio.distractor" and "video.distractor" (clips, 10)
    int8, the digit spoken or shown outside the event, or -1; "voice" (clips,) int64, a number into `extra["voices"]`;
    "video.picture" (clips, 10) int64, the number of the picture shown, or -1; in val and test "video.frames"
    (clips, 10, 16, 16) uint8, the pictures that the features were cut from.

    "talking-digits-two" shows two digits side by side in all frames, and sound and sentence name one of them: "class"
    is that one, "other" (clips,) int64 the second, "side" (clips,) int64 is 0 where the named digit is on the left,
    "video.mask" (clips, 10, 16, 16) uint8 is 1 on its ink, and "video.frames" is kept in all splits. There are no
    distractors and no shifts.

    Features are standardised by mean and standard deviation of 200 training clips of "talking-digits" with the same
    seed, per band for sound and over everything for pictures and words; all data sets of one seed share these
    numbers, in `extra["standardisation"]`, as they would share a feature extractor. (value - mean) / deviation is what
    is stored.

    Args:
        name: "talking-digits"; "talking-digits-b", a second domain with printed faces, French words and other voices;
            or "talking-digits-two", for segmentation.
        cache: folder to keep it in; None takes UNICODE_FAST_CACHE, else the platform's cache folder.
        easy: no distractors, no shifts, pictures and voices shared by the splits.
        clips: number of clips of each split; None takes 4,000 train, 500 val and 1,000 test.
        seed: of everything random; it also divides pictures and voices among the splits.
        progress: show a progress bar on standard error while clips are made.

    Raises:
        ValueError: the name is unknown, or a number of clips or the seed is out of range.
        OSError: the cache folder cannot be written or the disk is full; what was there before is untouched.
        RuntimeError: espeak-ng failed; the message holds what it said.
    """
    if name not in DATASETS:
        raise ValueError(f"name must be one of {', '.join(DATASETS)}, got {name!r}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    recipe = Recipe(name, seed, easy, _checked_clips(DEFAULT_CLIPS if clips is None else clips))
    folder = (Path(cache) if cache is not None else cache_folder()) / _folder_name(recipe)
    return open_or_make(folder, lambda target: _make(recipe, target, progress), _say)


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def _checked_clips(clips: Mapping[str, int]) -> dict[str, int]:
    if set(clips) != set(DEFAULT_CLIPS) or any(int(count) < 1 for count in clips.values()):
        raise ValueError(f"clips must give at least 1 for each of {', '.join(DEFAULT_CLIPS)}, got {dict(clips)}")
    return {split: int(clips[split]) for split in DEFAULT_CLIPS}


def _folder_name(recipe: Recipe) -> str:
    """Readable name and a hash of everything that the contents depend on."""
    described = json.dumps([GENERATOR_VERSION, dataclasses.asdict(recipe)], sort_keys=True)
    level = "-easy" if recipe.easy else ""
    return f"{recipe.name}{level}-seed{recipe.seed}-{hashlib.sha256(described.encode()).hexdigest()[:12]}"


def _make(recipe: Recipe, folder: Path, progress: bool) -> None:
    """Make all clips and write them as a feature store."""
    calibration = Recipe("talking-digits", recipe.seed, False, {"train": _CALIBRATION_CLIPS})
    total = sum(recipe.clips.values()) + _CALIBRATION_CLIPS
    with tqdm(total=total, desc=f"making {recipe.name}", unit="clip", disable=not progress, file=sys.stderr) as bar:
        bar.set_postfix_str("speaking")
        voices = voices_of(recipe)
        shared = recipe.language == calibration.language and not recipe.easy
        calibrating_voices = voices if shared else voices_of(calibration)
        bar.set_postfix_str("")
        standard = _standardisation(_raw_split(calibration, "train", calibrating_voices, bar.update))
        splits = {
            split: _standardised(_raw_split(recipe, split, voices, bar.update), standard) for split in recipe.clips
        }
        bar.set_postfix_str("writing")
        extra = {
            "generator": GENERATOR_VERSION,
            "recipe": dataclasses.asdict(recipe),
            "voices": voices.names,
            "standardisation": standard,
            "versions": {package: version(package) for package in ("espeakng-loader", "numpy", "scikit-learn")},
        }
        write_store(folder, recipe.name, MODALITIES, CLASSES, splits, extra)


def _raw_split(recipe: Recipe, split: str, voices: Voices, progress: Callable[[int], object]) -> dict[str, np.ndarray]:
    """All arrays of one split, features not standardised yet."""
    plan = plan_clips(recipe, split, voices.of_split(split))
    generator = recipe.generator(split, "text")
    sentence_words = sentences.make_sentences(plan.digit, recipe.language, generator)
    vectors, lengths = sentences.sentence_vectors(sentence_words)
    frames, ink = plan.frames(recipe.generator(split, "frames"))
    arrays = {
        "audio": render_audio(plan, voices, recipe.generator(split, "sound"), progress),
        "video": handwriting.windows(frames),
        "text": vectors,
        "audio.label": _labels(plan, plan.spoken),
        "video.label": _labels(plan, plan.shown),
        "class": plan.digit,
        "id": np.arange(len(plan.digit)) + 1_000_000 * list(DEFAULT_CLIPS).index(split),
        "text.length": lengths,
        "text.sentence": np.array([" ".join(words) for words in sentence_words]),
        "shifted": (plan.spoken != plan.shown).any(1) if not recipe.two else np.zeros(len(plan.digit), bool),
        "audio.distractor": plan.heard_distractor.astype(np.int8),
        "video.distractor": plan.seen_distractor.astype(np.int8),
        "voice": plan.voice,
        "video.picture": plan.picture,
    }
    if recipe.two:
        arrays |= {"video.mask": ink.astype(np.uint8), "other": plan.other, "side": plan.side}
    if recipe.two or split != "train":
        arrays["video.frames"] = frames
    return arrays


def _labels(plan: ClipPlan, active: np.ndarray) -> np.ndarray:
    """(clips, 10, 11) uint8: the event's digit where it is on, else background."""
    return np.eye(BACKGROUND + 1, dtype=np.uint8)[np.where(active, plan.digit[:, None], BACKGROUND)]


def _standardisation(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Mean and standard deviation of each modality's features; of words only the scale, to keep the padding zero."""
    audio = arrays["audio"].astype(np.float64)
    video = arrays["video"].astype(np.float64)
    valid = np.arange(STEPS) < arrays["text.length"][:, None]
    text = arrays["text"][valid].astype(np.float64)
    deviation = np.maximum(audio.std((0, 1)), _SMALLEST_DEVIATION)
    return {
        "audio": {"mean": audio.mean((0, 1)).tolist(), "deviation": deviation.tolist()},
        "video": {"mean": float(video.mean()), "deviation": float(video.std())},
        "text": {"mean": 0.0, "deviation": float(text.std())},
    }


def _standardised(arrays: dict[str, np.ndarray], standard: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    for name, numbers in standard.items():
        mean = np.asarray(numbers["mean"], np.float32)
        arrays[name] = (arrays[name] - mean) / np.asarray(numbers["deviation"], np.float32)
    return arrays
