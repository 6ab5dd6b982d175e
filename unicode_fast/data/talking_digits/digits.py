"""The built-in data sets: clips of digits that are spoken, handwritten and named in a sentence.

A clip has ten seconds, a class (a digit), and an event of four to nine consecutive seconds. In each second of the event
the digit is spoken, and the picture is another handwritten image of it. In some clips, the event in the sound starts or
stops up to a second before or after the event in the pictures. In some clips, a different digit, the distractor, is
spoken or shown outside the event. The sentence names the digit once. No picture and no voice of a training clip appears
in validation or test.

espeak-ng synthesises the speech. It is licensed under GPL-3, so it runs in a child process, and only while clips are
made; `unicode_fast.data.talking_digits.speech` has the details.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from unicode_fast.config import Modality
from unicode_fast.data.store.read import Store
from unicode_fast.data.store.write import write_store
from unicode_fast.data.talking_digits import handwriting, sentences
from unicode_fast.data.talking_digits.clips import BACKGROUND, CLASSES, ClipPlan, Recipe, plan_clips
from unicode_fast.data.talking_digits.generated import (
    checked_clips,
    clip_ids,
    description,
    open_generated,
    standardisation,
    standardised,
)
from unicode_fast.data.talking_digits.sound import Voices, digit_vocabulary, render_audio, voices_of
from unicode_fast.data.talking_digits.spectrogram import log_mel_statistics

GENERATOR_VERSION = 4
DATASETS = ("talking-digits", "talking-digits-b", "talking-digits-two")
MODALITIES = {
    "audio": Modality("vector", (128,)),
    "video": Modality("grid", (handwriting.GRID_SIDE, handwriting.GRID_SIDE, handwriting.CHANNELS)),
    "text": Modality("words", (sentences.WORD_WIDTH,)),
}
_CALIBRATION_CLIPS = 200


def load(
    name: str = "talking-digits",
    *,
    cache: str | os.PathLike[str] | None = None,
    easy: bool = False,
    clips: Mapping[str, int] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Store:
    """Open a built-in data set; generate it if it is not in the cache.

    Features of each split: "audio" (clips, 10, 128), "video" (clips, 10, 7, 7, 16) and "text" (clips, 10, 128), all
    float32. Other arrays: "audio.label" and "video.label" (clips, 10, 11) uint8, the event alone, background last;
    "class" and "id" (clips,) int64; "text.length" (clips,) int64 in 8..10; "text.sentence" (clips,) strings; "shifted"
    (clips,) bool, the streams' events differ in time; "audio.distractor" and "video.distractor" (clips, 10) int8, the
    digit spoken or shown outside the event, or -1; "voice" (clips,) int64, an index into `extra["voices"]`;
    "video.picture" (clips, 10) int64, the number of the shown picture, or -1; in val and test "video.frames"
    (clips, 10, 16, 16) uint8, the pictures behind the features.

    "talking-digits-two" shows two digits side by side in all frames; sound and sentence name one of them, its "class".
    "other" (clips,) int64 is the second digit. "side" (clips,) int64 is 0 if the named digit is on the left.
    "video.mask" (clips, 10, 16, 16) uint8 is 1 on its ink. "video.frames" is in all splits. There are no distractors
    and no shifts.

    Features are standardised, (value - mean) / deviation. The statistics are those of 200 training clips of
    "talking-digits" with the same seed: per band for sound, over all values for pictures and words. All data sets of
    one seed share these numbers, in `extra["standardisation"]`, as if they shared a feature extractor.

    Args:
        name: "talking-digits"; "talking-digits-b", a second domain with printed faces, French words and other voices;
            or "talking-digits-two", for segmentation.
        cache: cache folder; None takes UNICODE_FAST_CACHE, else the platform's cache folder.
        easy: no distractors, no shifts, pictures and voices shared by the splits.
        clips: number of clips of each split; None takes 4,000 train, 500 val and 1,000 test.
        seed: seed of all random numbers, including the division of pictures and voices among splits.
        progress: show a progress bar on standard error while clips are made.

    Raises:
        ValueError: the name is unknown, or a number of clips or the seed is out of range.
        OSError: the cache folder cannot be written or the disk is full; existing files are unchanged.
        RuntimeError: espeak-ng failed; the message includes its output.
    """
    if name not in DATASETS:
        raise ValueError(f"name must be one of {', '.join(DATASETS)}, got {name!r}")
    recipe = Recipe(name, seed, easy, checked_clips(clips, seed))
    return open_generated(recipe, GENERATOR_VERSION, cache, lambda folder: _make(recipe, folder, progress))


def _make(recipe: Recipe, folder: Path, progress: bool) -> None:
    """Make all clips and write them as a feature store."""
    calibration = Recipe("talking-digits", recipe.seed, False, {"train": _CALIBRATION_CLIPS})
    total = sum(recipe.clips.values()) + _CALIBRATION_CLIPS
    with tqdm(total=total, desc=f"making {recipe.name}", unit="clip", disable=not progress, file=sys.stderr) as bar:
        voices = voices_of(recipe, digit_vocabulary(recipe.language), bar.set_postfix_str)
        shared = recipe.language == calibration.language and not recipe.easy
        calibrating_voices = voices if shared else voices_of(calibration, digit_vocabulary(calibration.language))
        bar.set_postfix_str("")
        standard = standardisation(_raw_split(calibration, "train", calibrating_voices, bar.update))
        splits = {
            split: standardised(_raw_split(recipe, split, voices, bar.update), standard) for split in recipe.clips
        }
        bar.set_postfix_str("writing")
        extra = description(recipe, GENERATOR_VERSION, voices, standard)
        write_store(folder, recipe.name, MODALITIES, CLASSES, splits, extra)


def _raw_split(recipe: Recipe, split: str, voices: Voices, progress: Callable[[int], object]) -> dict[str, np.ndarray]:
    """All arrays of one split, before standardisation."""
    plan = plan_clips(recipe, split, voices.of_split(split))
    generator = recipe.generator(split, "text")
    wordings = sentences.digit_wordings(recipe.language)
    sentence_words = sentences.make_sentences([wordings[digit] for digit in plan.digit], recipe.language, generator)
    vectors, lengths = sentences.sentence_vectors(sentence_words)
    frames, ink = plan.frames(recipe.generator(split, "frames"))
    arrays = {
        "audio": render_audio(
            plan.heard, plan.voice, voices, recipe.generator(split, "sound"), log_mel_statistics, progress
        ),
        "video": handwriting.windows(frames),
        "text": vectors,
        "audio.label": _labels(plan, plan.spoken),
        "video.label": _labels(plan, plan.shown),
        "class": plan.digit,
        "id": clip_ids(split, len(plan.digit)),
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
    """(clips, 10, 11) uint8: the event's digit in its seconds, else background."""
    return np.eye(BACKGROUND + 1, dtype=np.uint8)[np.where(active, plan.digit[:, None], BACKGROUND)]
