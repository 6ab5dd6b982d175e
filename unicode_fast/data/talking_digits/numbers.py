"""The harder built-in data set: clips of the numbers 0 to 99, spoken, handwritten in two digits and named in text.

A clip has ten seconds and a class (a number), whose event lasts four to nine consecutive seconds. In each second the
number is spoken, such as "forty two", and the picture shows two handwritten digits, "07" for seven. A third of the
clips have a second, shorter event of another number later. As in `digits.py`, streams of some clips are shifted, and
some have a distractor in one stream. No picture and no voice of a training clip appears in validation or test.

The training split resembles collected data: its classes have a long tail, and a tenth of its clips are mismatched. In a
mismatched clip, the sound, the pictures or the sentence names another number than the class.
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
from unicode_fast.data.talking_digits.generated import (
    checked_clips,
    clip_ids,
    description,
    open_generated,
    standardisation,
    standardised,
)
from unicode_fast.data.talking_digits.number_clips import BACKGROUND, CLASSES, NumbersRecipe, plan_numbers
from unicode_fast.data.talking_digits.sound import Vocabulary, Voices, render_audio, voices_of
from unicode_fast.data.talking_digits.spectrogram import BANDS, QUARTERS, log_mel_quarters
from unicode_fast.data.talking_digits.speech import SAMPLE_RATE_HZ

NAME = "talking-numbers"
GENERATOR_VERSION = 1
MODALITIES = {
    "audio": Modality("vector", (QUARTERS * BANDS,)),
    "video": Modality("grid", (handwriting.GRID_SIDE, handwriting.GRID_SIDE, handwriting.CHANNELS)),
    "text": Modality("words", (sentences.WORD_WIDTH,)),
}


def load(
    *,
    cache: str | os.PathLike[str] | None = None,
    easy: bool = False,
    clips: Mapping[str, int] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Store:
    """Open `talking-numbers`; generate it if it is not in the cache.

    Features of each split, all float32: "audio" (clips, 10, 256), four quarters of 64 bands; "video"
    (clips, 10, 7, 7, 16); "text" (clips, 10, 128). Other arrays: "audio.label" and "video.label" (clips, 10, 101)
    uint8, the number of the event in each second, background last; "class" and "id" (clips,) int64; "second" (clips,)
    int64, the number of the second event, or -1; "mismatched" (clips,) bool, the first event of one stream and its
    labels, or the sentence, have another number than the class; "text.number" (clips,) int64, the number in the
    sentence; "text.length" (clips,) int64 in 8..10; "text.sentence" (clips,) strings; "shifted" (clips,) bool, the
    streams' first events differ in time; "audio.distractor" and "video.distractor" (clips, 10) int8, the number outside
    events, or -1; "voice" (clips,) int64, an index into `extra["voices"]`; "video.picture" (clips, 10, 2) int64, the
    numbers of the shown pictures, or -1; in val and test "video.frames" (clips, 10, 16, 16) uint8, the pictures behind
    the features.

    In val and test, class counts differ by at most one, and nothing is mismatched. Voices and pictures are divided
    among the splits as in "talking-digits" with the same seed. Features are standardised, (value - mean) / deviation.
    `extra["standardisation"]` has the statistics of the training split: per band and quarter for sound, over all values
    for pictures and words.

    Args:
        cache: cache folder; None takes UNICODE_FAST_CACHE, else the platform's cache folder.
        easy: one event, no distractors, shifts and mismatches, equal class counts, pictures and voices shared by the
            splits.
        clips: number of clips of each split; None takes 4,000 train, 500 val and 1,000 test.
        seed: seed of all random numbers, including the division of pictures and voices among splits.
        progress: show a progress bar on standard error while clips are made.

    Raises:
        ValueError: a number of clips or the seed is out of range.
        OSError: the cache folder cannot be written or the disk is full; existing files are unchanged.
        RuntimeError: espeak-ng failed; the message includes its output.
    """
    recipe = NumbersRecipe(NAME, seed, easy, checked_clips(clips, seed))
    return open_generated(recipe, GENERATOR_VERSION, cache, lambda folder: _make(recipe, folder, progress))


def vocabulary(recipe: NumbersRecipe) -> Vocabulary:
    """The numbers 0..99 in English words."""
    latest_start = round(recipe.latest_start_seconds * SAMPLE_RATE_HZ)
    return Vocabulary(sentences.number_names(), recipe.recordings, recipe.words_per_minute, latest_start)


def _make(recipe: NumbersRecipe, folder: Path, progress: bool) -> None:
    """Make all clips and write them as a feature store."""
    total = sum(recipe.clips.values())
    with tqdm(total=total, desc=f"making {recipe.name}", unit="clip", disable=not progress, file=sys.stderr) as bar:
        voices = voices_of(recipe, vocabulary(recipe), bar.set_postfix_str)
        bar.set_postfix_str("")
        splits = {split: _raw_split(recipe, split, voices, bar.update) for split in recipe.clips}
        standard = standardisation(splits["train"])
        splits = {split: standardised(arrays, standard) for split, arrays in splits.items()}
        bar.set_postfix_str("writing")
        extra = description(recipe, GENERATOR_VERSION, voices, standard)
        write_store(folder, recipe.name, MODALITIES, CLASSES, splits, extra)


def _raw_split(
    recipe: NumbersRecipe, split: str, voices: Voices, progress: Callable[[int], object]
) -> dict[str, np.ndarray]:
    """All arrays of one split, before standardisation."""
    plan = plan_numbers(recipe, split, voices.of_split(split))
    wordings = sentences.number_wordings()
    sentence_words = sentences.make_sentences(
        [wordings[number] for number in plan.named["text"]], recipe.language, recipe.generator(split, "text")
    )
    vectors, lengths = sentences.sentence_vectors(sentence_words)
    frames = plan.frames(recipe.generator(split, "frames"))
    sound = recipe.generator(split, "sound")
    arrays = {
        "audio": render_audio(plan.heard, plan.voice, voices, sound, log_mel_quarters, progress),
        "video": handwriting.windows(frames),
        "text": vectors,
        "class": plan.number,
        "second": plan.second,
        "id": clip_ids(split, len(plan.number)),
        "mismatched": plan.mismatched,
        "text.number": plan.named["text"],
        "text.length": lengths,
        "text.sentence": np.array([" ".join(words) for words in sentence_words]),
        "shifted": plan.shifted,
        "voice": plan.voice,
        "video.picture": plan.picture,
    }
    for name, events in plan.events.items():
        arrays[f"{name}.label"] = np.eye(BACKGROUND + 1, dtype=np.uint8)[np.where(events < 0, BACKGROUND, events)]
        arrays[f"{name}.distractor"] = plan.distractor[name].astype(np.int8)
    if split != "train":
        arrays["video.frames"] = frames
    return arrays
