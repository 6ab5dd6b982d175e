"""The plan of each clip of `talking-numbers`: numbers, times, mismatches, voice and pictures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unicode_fast.data.talking_digits import handwriting
from unicode_fast.data.talking_digits.clips import (
    LONGEST,
    POSITIONS,
    SHORTEST,
    PictureChooser,
    Recipe,
    distractors,
    seconds_of,
    shifted_runs,
    with_noise,
)

CLASSES = tuple(str(number) for number in range(100))
BACKGROUND = len(CLASSES)
STREAMS = ("audio", "video", "text")
_LONGEST_SECOND = 3
# First row of a picture in the middle of its frame.
_TOP = (handwriting.FRAME_SIDE - handwriting.SMALL_SIDE) // 2


@dataclass(frozen=True)
class NumbersRecipe(Recipe):
    """The parameters of clips of numbers; `easy` switches off all shares and the long tail.

    Attributes:
        distractor_share: share of audio and video streams with a distractor.
        shift_share: share of clips whose first event may differ in time between the streams.
        second_share: share of clips with two events.
        mismatch_share: share of training clips with a stream that names another number.
        tail_ratio: training clips of the most frequent class per clip of the rarest; 1 if `easy`.
        pixel_noise: standard deviation of the noise of pictures; 1 is full ink.
        recordings: recordings of each number by each voice, each at a random rate and pitch.
        words_per_minute: smallest and largest (exclusive) rate; at 190 every number fits in a second.
        latest_start_seconds: largest delay of a number in its second; small, so quarters cover the same sounds.
    """

    second_share: float = 1 / 3
    mismatch_share: float = 0.1
    tail_ratio: float = 10.0
    pixel_noise: float = 0.1
    recordings: int = 3
    words_per_minute: tuple[int, int] = (190, 230)
    latest_start_seconds: float = 0.05


@dataclass(frozen=True)
class NumbersPlan:
    """Clips of one split, N of them.

    Attributes:
        recipe: the parameters of the data set.
        number: (N,) int64, the class.
        second: (N,) int64, the number of the second event, or -1.
        named: for each stream (N,) int64, its number of the first event; the class, except in a mismatched stream.
        mismatched: (N,) bool, a stream names another number than the class.
        shifted: (N,) bool, the first event starts or stops at other times in the sound than in the pictures.
        events: for audio and video (N, 10) int64, the number of the event in each second, or -1.
        distractor: for audio and video (N, 10) int64, the number outside events, or -1.
        voice: (N,) int64, an index into all voices.
        picture: (N, 10, 2) int64, the numbers of the pictures of tens and units, or -1.
    """

    recipe: NumbersRecipe
    number: np.ndarray
    second: np.ndarray
    named: dict[str, np.ndarray]
    mismatched: np.ndarray
    shifted: np.ndarray
    events: dict[str, np.ndarray]
    distractor: dict[str, np.ndarray]
    voice: np.ndarray
    picture: np.ndarray

    @property
    def heard(self) -> np.ndarray:
        """(N, 10) int64, the number spoken in each second, or -1."""
        return np.maximum(self.events["audio"], self.distractor["audio"])

    def frames(self, generator: np.random.Generator) -> np.ndarray:
        """(N, 10, 16, 16) uint8: tens beside units."""
        side = handwriting.FRAME_SIDE
        # One blank picture at the end stands for "no picture".
        pixels = self.recipe.pictures.pixels
        pixels = np.concatenate([pixels, np.zeros_like(pixels[:1])])
        tens, units = np.moveaxis(pixels[self.picture.reshape(-1, 2)], 1, 0)
        clean, _ = handwriting.side_by_side(tens, units, np.full((len(tens), 2), _TOP))
        return with_noise(clean.reshape(-1, POSITIONS, side, side), self.recipe.pixel_noise, generator)


def plan_numbers(recipe: NumbersRecipe, split: str, voices: np.ndarray) -> NumbersPlan:
    """Draw the plan of each clip of a split.

    Args:
        recipe: parameters of the data set.
        split: name of the split.
        voices: numbers of the split's voices.
    """
    generator = recipe.generator(split, "plan")
    clips = recipe.clips[split]
    number = generator.permutation(np.repeat(np.arange(BACKGROUND), class_counts(recipe, split)))
    spoken, shown, later = _draw_times(recipe, clips, generator)
    second = _other_number([number], generator)
    wrong = _other_number([number, second], generator)
    share = 0.0 if recipe.easy or split != "train" else recipe.mismatch_share
    mismatched = generator.permutation(clips) < round(share * clips)
    odd = np.where(mismatched, generator.integers(len(STREAMS), size=clips), -1)
    named = {name: np.where(odd == stream, wrong, number) for stream, name in enumerate(STREAMS)}
    events, distractor = {}, {}
    for name, first in (("audio", spoken), ("video", shown)):
        events[name] = np.where(first, named[name][:, None], np.where(later, second[:, None], -1))
        other = _other_number([number, second, wrong], generator)
        share = 0.0 if recipe.easy else recipe.distractor_share
        distractor[name] = distractors(other, first | later, share, generator)
    seen = np.maximum(events["video"], distractor["video"])
    digits = np.where(seen[..., None] < 0, -1, np.stack([seen // 10, seen % 10], axis=-1))  # (N, 10, 2)
    choose = PictureChooser(recipe, split, generator)
    return NumbersPlan(
        recipe=recipe,
        number=number,
        second=np.where(later.any(1), second, -1),
        named=named,
        mismatched=mismatched,
        shifted=(spoken != shown).any(1),
        events=events,
        distractor=distractor,
        voice=voices[generator.integers(len(voices), size=clips)],
        picture=choose(digits.reshape(clips, -1)).reshape(digits.shape),
    )


def class_counts(recipe: NumbersRecipe, split: str) -> np.ndarray:
    """(100,) int64, number of clips of each class.

    In the training split the counts fall geometrically, over classes in random order, by a factor of `tail_ratio`. In
    other splits, and with `easy`, the counts differ by at most one.
    """
    clips = recipe.clips[split]
    if recipe.easy or split != "train":
        return np.bincount(np.arange(clips) % BACKGROUND, minlength=BACKGROUND)
    weight = recipe.tail_ratio ** -np.linspace(0, 1, BACKGROUND)
    ends = np.round(np.cumsum(weight) / weight.sum() * clips).astype(np.int64)
    return np.diff(ends, prepend=0)[recipe.generator("tail").permutation(BACKGROUND)]


def _draw_times(
    recipe: NumbersRecipe, clips: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N, 10) bool each: the first event in the sound, in the pictures, and the second event in both."""
    two = generator.random(clips) < (0.0 if recipe.easy else recipe.second_share)
    later_length = np.where(two, generator.integers(1, _LONGEST_SECOND + 1, clips), 0)
    # A pause of one second separates the events even if the first one ends later in a stream.
    room = POSITIONS - np.where(two, later_length + 1, 0)
    length = generator.integers(SHORTEST, np.minimum(room, LONGEST) + 1)
    start = generator.integers(0, room - length + 1)
    stop = start + length
    later_start = stop + 1 + generator.integers(0, room - stop + 1)
    later = seconds_of(later_start, later_start + later_length)
    shifted = generator.random(clips) < (0.0 if recipe.easy else recipe.shift_share)
    spoken = seconds_of(*shifted_runs(start, stop, shifted, generator))
    return spoken, seconds_of(start, stop), later


def _other_number(taken: list[np.ndarray], generator: np.random.Generator) -> np.ndarray:
    """(N,) int64, a random number different from all in `taken`, each (N,)."""
    keys = generator.random((len(taken[0]), BACKGROUND))
    for numbers in taken:
        keys[np.arange(len(keys)), numbers] = -1
    return keys.argmax(1)
