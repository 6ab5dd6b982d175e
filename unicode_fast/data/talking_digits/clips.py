"""The plan of each clip: digit, times, distractors, voice and pictures, drawn before rendering."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from unicode_fast.data.talking_digits import handwriting

POSITIONS = 10
CLASSES = tuple(str(digit) for digit in range(10))
BACKGROUND = len(CLASSES)
SHORTEST, LONGEST = 4, 9
_LONGEST_DISTRACTOR = 3
_SPLITS = ("train", "val", "test")
_SHARES = (0.65, 0.15, 0.2)
_PIXEL_NOISE = 0.15


@dataclass(frozen=True)
class Recipe:
    """All parameters of a generated data set, except the generator's version."""

    name: str
    seed: int
    easy: bool
    clips: dict[str, int]
    distractor_share: float = 0.3
    shift_share: float = 0.5

    @property
    def two(self) -> bool:
        """Whether each frame shows two digits side by side."""
        return self.name == "talking-digits-two"

    @property
    def language(self) -> str:
        """Language of words and sentences."""
        return "fr" if self.name == "talking-digits-b" else "en"

    @property
    def pictures(self) -> handwriting.Pictures:
        """All pictures that the data set draws from."""
        printed = self.name == "talking-digits-b"
        return handwriting.printed_pictures() if printed else handwriting.handwritten_pictures()

    def generator(self, *purpose: str) -> np.random.Generator:
        """A separate random generator for each purpose."""
        return np.random.default_rng([self.seed, zlib.crc32("/".join((self.name, *purpose)).encode())])

    def divided(self, count: int, purpose: str) -> dict[str, np.ndarray]:
        """The numbers 0..count-1, divided among the splits; with `easy` each split has all numbers."""
        if self.easy:
            return {split: np.arange(count) for split in _SPLITS}
        # The seed has the language, not the name, so data sets with the same voices and pictures divide them alike.
        generator = np.random.default_rng([self.seed, zlib.crc32(f"{self.language}/{purpose}".encode())])
        order = generator.permutation(count)
        ends = np.round(np.cumsum(_SHARES) * count).astype(int)
        return dict(zip(_SPLITS, map(np.sort, np.split(order, ends[:-1])), strict=True))


@dataclass(frozen=True)
class ClipPlan:
    """Clips of one split, N of them.

    Attributes:
        recipe: the parameters of the data set.
        digit: (N,) int64, the class.
        spoken: (N, 10) bool, the event is active in the sound.
        shown: (N, 10) bool, the event is active in the pictures.
        heard_distractor: (N, 10) int64, the other digit spoken in this second, or -1.
        seen_distractor: (N, 10) int64, the other digit shown in this frame, or -1.
        voice: (N,) int64, an index into all voices.
        picture: (N, 10) int64, the number of the picture shown, or -1.
        other: (N,) int64, the second digit of a two-digit clip.
        other_picture: (N, 10) int64, its pictures.
        side: (N,) int64, 0 if the named digit of a two-digit clip is on the left, 1 on the right.
    """

    recipe: Recipe
    digit: np.ndarray
    spoken: np.ndarray
    shown: np.ndarray
    heard_distractor: np.ndarray
    seen_distractor: np.ndarray
    voice: np.ndarray
    picture: np.ndarray
    other: np.ndarray
    other_picture: np.ndarray
    side: np.ndarray

    @property
    def heard(self) -> np.ndarray:
        """(N, 10) int64, the digit spoken in each second, or -1."""
        return np.where(self.spoken, self.digit[:, None], self.heard_distractor)

    def frames(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Render the pictures.

        Returns:
            frames: (N, 10, 16, 16) uint8; ink: (N, 10, 16, 16) bool, the named digit's ink in two-digit clips, else
            False.
        """
        clips, side = len(self.digit), handwriting.FRAME_SIDE
        if self.recipe.two:
            clean, ink = self._two_digits(generator)
        else:
            # One blank picture at the end stands for "no picture".
            large = handwriting.enlarged(self.recipe.pictures.pixels)
            large = np.concatenate([large, np.zeros((1, side, side), np.float32)])
            clean, ink = large[self.picture], np.zeros((clips, POSITIONS, side, side), bool)
        return with_noise(clean, _PIXEL_NOISE, generator), ink

    def _two_digits(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        clips, side = len(self.digit), handwriting.FRAME_SIDE
        pixels = self.recipe.pictures.pixels
        swapped = np.repeat(self.side == 1, POSITIONS)[:, None, None]
        named, other = pixels[self.picture.ravel()], pixels[self.other_picture.ravel()]
        top = generator.integers(0, side // 2 + 1, (clips, 1, 2)) + np.zeros((1, POSITIONS, 1), np.int64)
        clean, ink = handwriting.side_by_side(
            np.where(swapped, other, named), np.where(swapped, named, other), top.reshape(-1, 2)
        )
        chosen = ink[np.arange(len(ink)), np.repeat(self.side, POSITIONS)]
        return clean.reshape(clips, POSITIONS, side, side), chosen.reshape(clips, POSITIONS, side, side)


def with_noise(clean: np.ndarray, pixel_noise: float, generator: np.random.Generator) -> np.ndarray:
    """Pictures of random contrast on a random grey, with noise on each pixel.

    Args:
        clean: (N, 10, 16, 16) float32 in [0, 1], 1 is ink.
        pixel_noise: standard deviation of the noise; 1 is full ink.
        generator: the random generator.

    Returns:
        (N, 10, 16, 16) uint8.
    """
    clips = len(clean)
    contrast = generator.uniform(0.6, 1.0, (clips, POSITIONS, 1, 1)).astype(np.float32)
    grey = generator.uniform(0.0, 0.3, (clips, 1, 1, 1)).astype(np.float32)
    noise = generator.standard_normal(clean.shape, np.float32)
    noisy = grey + (1 - grey) * contrast * clean + np.float32(pixel_noise) * noise
    return np.round(255 * np.clip(noisy, 0, 1)).astype(np.uint8)


def plan_clips(recipe: Recipe, split: str, voices: np.ndarray) -> ClipPlan:
    """Draw the plan of each clip of a split.

    Args:
        recipe: parameters of the data set.
        split: name of the split.
        voices: numbers of the split's voices.
    """
    generator = recipe.generator(split, "plan")
    clips = recipe.clips[split]
    digit = generator.permutation(np.arange(clips) % 10)
    start, stop = _runs(clips, generator)
    plain = recipe.easy or recipe.two
    spoken_run, shown_run = (start, stop), (start, stop)
    if not plain:
        shifted = generator.random(clips) < recipe.shift_share
        spoken_run = shifted_runs(start, stop, shifted, generator)
    spoken = seconds_of(*spoken_run)
    shown = seconds_of(*shown_run) | recipe.two
    share = 0.0 if plain else recipe.distractor_share
    heard = distractors(_other_digits(digit, generator), spoken, share, generator)
    seen = distractors(_other_digits(digit, generator), shown, share, generator)
    other = _other_digits(digit, generator)
    choose = PictureChooser(recipe, split, generator)
    return ClipPlan(
        recipe=recipe,
        digit=digit,
        spoken=spoken,
        shown=shown,
        heard_distractor=heard,
        seen_distractor=seen,
        voice=voices[generator.integers(len(voices), size=clips)],
        picture=choose(np.where(shown, digit[:, None], seen)),
        other=other,
        other_picture=choose(np.repeat(other[:, None], POSITIONS, 1)),
        side=generator.integers(0, 2, clips),
    )


def _other_digits(digit: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return (digit + generator.integers(1, 10, len(digit))) % 10


def _runs(clips: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Start and end (exclusive) of runs of 4 to 9 seconds."""
    length = generator.integers(SHORTEST, LONGEST + 1, clips)
    start = generator.integers(0, POSITIONS - length + 1)
    return start, start + length


def seconds_of(start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """(N, 10) bool, the seconds of runs with these starts and ends (exclusive)."""
    time = np.arange(POSITIONS)
    return (time >= start[:, None]) & (time < stop[:, None])


def shifted_runs(
    start: np.ndarray, stop: np.ndarray, shifted: np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Runs whose start and end move by up to a second if `shifted`; the length stays 4 to 9 seconds."""
    moves = generator.integers(-1, 2, (2, len(start))) * shifted
    early, late = np.maximum(start + moves[0], 0), np.minimum(stop + moves[1], POSITIONS)
    allowed = (late - early >= SHORTEST) & (late - early <= LONGEST)
    return np.where(allowed, early, start), np.where(allowed, late, stop)


def distractors(other: np.ndarray, active: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    """(N, 10) int64: in a share of the clips, `other` in one to three seconds outside events; elsewhere -1."""
    seconds = generator.integers(1, _LONGEST_DISTRACTOR + 1, len(other))
    count = np.where(generator.random(len(other)) < share, seconds, 0)
    # Take the free seconds with the smallest random keys.
    keys = np.where(active, 2.0, generator.random(active.shape))
    taken = (np.argsort(np.argsort(keys, axis=1), axis=1) < count[:, None]) & ~active
    return np.where(taken, other[:, None], -1)


class PictureChooser:
    """Random pictures of given digits from a split's pictures, all different within a clip if there are enough."""

    def __init__(self, recipe: Recipe, split: str, generator: np.random.Generator) -> None:
        pictures = recipe.pictures
        groups = recipe.divided(int(pictures.group.max()) + 1, "pictures")[split]
        usable = np.isin(pictures.group, groups)
        self.of_digit = [np.flatnonzero(usable & (pictures.digit == digit)) for digit in range(10)]
        self.generator = generator

    def __call__(self, digits: np.ndarray) -> np.ndarray:
        """(N, K) picture numbers for (N, K) digits, -1 for digit -1."""
        chosen = np.full(digits.shape, -1, np.int64)
        for digit, numbers in enumerate(self.of_digit):
            rows = np.flatnonzero((digits == digit).any(1))
            order = np.argsort(self.generator.random((len(rows), len(numbers))), axis=1)
            drawn = numbers[order[:, np.arange(digits.shape[1]) % len(numbers)]]
            chosen[rows] = np.where(digits[rows] == digit, drawn, chosen[rows])
        return chosen
