"""Sound of clips: voices, spoken words, coloured noise, and features of the mixture."""

from __future__ import annotations

import dataclasses
import itertools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from unicode_fast.data.talking_digits.clips import POSITIONS, Recipe
from unicode_fast.data.talking_digits.sentences import NAMES
from unicode_fast.data.talking_digits.speech import SAMPLE_RATE_HZ, SpokenWord, speak

_ENGLISH = (
    "en-us", "en-us+f1", "en-us+m2", "en-us+m8", "en-us+antonio", "en-us+victor", "en-us+klatt6", "en-us+robert",
    "en-us+Denis", "en-us+Mike", "en", "en+f2", "en+m3", "en+aunty", "en+pablo", "en+ed", "en+Alex", "en+linda",
    "en+klatt", "en+Reed", "en-gb-x-rp", "en-gb-x-rp+f3", "en-gb-x-rp+m4", "en-gb-x-rp+edward", "en-gb-x-rp+paul",
    "en-gb-x-rp+klatt2", "en-gb-x-rp+Storm", "en-029", "en-029+f4", "en-029+m5", "en-029+gustave", "en-029+klatt3",
    "en-029+benjamin", "en-029+Annie", "en-029+max", "en-029+Hugo", "en-029+pedro", "en-gb-scotland",
    "en-gb-scotland+f5", "en-gb-scotland+m6", "en-gb-scotland+adam", "en-gb-scotland+quincy", "en-gb-scotland+klatt4",
    "en-gb-scotland+Henrique", "en-gb-scotland+Mario", "en-gb-scotland+michael", "en-gb-x-gbclan", "en-gb-x-gbclan+m1",
    "en-gb-x-gbclan+m7", "en-gb-x-gbclan+john", "en-gb-x-gbclan+rob", "en-gb-x-gbclan+Diogo", "en-gb-x-gbclan+miguel",
    "en-gb-x-gbclan+klatt5",
)  # fmt: skip
_FRENCH = (
    "fr", "fr+f1", "fr+f4", "fr+m5", "fr+m8", "fr+Annie", "fr+steph", "fr+antonio", "fr+klatt6", "fr+gustave",
    "fr+benjamin", "fr-be", "fr-be+f2", "fr-be+f5", "fr-be+m3", "fr-be+m6", "fr-be+ed", "fr-be+pablo", "fr-be+klatt4",
    "fr-be+aunty", "fr-be+Reed", "fr-be+Alex", "fr-ch", "fr-ch+f3", "fr-ch+m4", "fr-ch+m7", "fr-ch+caleb",
    "fr-ch+edward", "fr-ch+john", "fr-ch+klatt2", "fr-ch+miguel", "fr-ch+Michael",
)  # fmt: skip
_VARIANTS = 6
_RATES, _PITCHES = (130, 210), (20, 80)
_NOISE_SECONDS = 40
_NOISE_SLOPES = (0.5, 1.0, 1.5)
# Root mean squares; a word has 1 before its gain.
_NOISE_LEVELS = (0.02, 0.2)
_GAINS, _LOUDNESSES = (0.3, 1.0), (0.7, 1.4)
_LONGEST_WORD = int(0.95 * SAMPLE_RATE_HZ)
_FADE = 400
_CLIPS_AT_ONCE = 4
# Spoken words between two progress messages.
_SAY_EVERY = 200


@dataclass(frozen=True)
class Vocabulary:
    """The spoken words, and their rates.

    Attributes:
        texts: the text of each class.
        recordings: recordings of each text by each voice, each at a random rate and pitch.
        rates: smallest and largest (exclusive) number of words per minute.
        latest_start: largest delay of a word in its second, in samples, if it fits.
    """

    texts: Sequence[str]
    recordings: int
    rates: tuple[int, int]
    latest_start: int = SAMPLE_RATE_HZ


@dataclass(frozen=True)
class Voices:
    """Voices and their recordings.

    Attributes:
        names: names of all voices of the language; the index is a voice's number.
        by_split: numbers of the voices of each split.
        words: for each (voice, class) several recordings, (samples,) float32 at 16 kHz.
        vocabulary: the spoken words.
    """

    names: list[str]
    by_split: dict[str, np.ndarray]
    words: dict[tuple[int, int], list[np.ndarray]]
    vocabulary: Vocabulary

    def of_split(self, split: str) -> np.ndarray:
        """Numbers of the split's voices."""
        return self.by_split[split]


def digit_vocabulary(language: str) -> Vocabulary:
    """The ten digits, each spoken at six rates and pitches."""
    return Vocabulary(NAMES[language], _VARIANTS, _RATES)


def voices_of(recipe: Recipe, vocabulary: Vocabulary, say: Callable[[str], object] = lambda _: None) -> Voices:
    """All voices of a recipe's splits, with their recordings; `say` is called with the progress."""
    names = _FRENCH if recipe.language == "fr" else _ENGLISH
    by_split = recipe.divided(len(names), "voices")
    used = {int(voice) for split in recipe.clips for voice in by_split[split]}
    # espeak-ng keeps state from word to word. Training voices come first, so their recordings are the same in all data
    # sets of a seed.
    divided = dataclasses.replace(recipe, easy=False).divided(len(names), "voices")
    in_order = [int(voice) for numbers in divided.values() for voice in numbers if voice in used]
    words = _spoken_words(names, recipe.seed, in_order, vocabulary, say)
    return Voices(list(names), by_split, words, vocabulary)


def _spoken_words(
    names: Sequence[str], seed: int, used: list[int], vocabulary: Vocabulary, say: Callable[[str], object]
) -> dict[tuple[int, int], list[np.ndarray]]:
    texts, recordings = vocabulary.texts, vocabulary.recordings
    places = [(voice, label) for voice in used for label in range(len(texts)) for _ in range(recordings)]
    words: list[SpokenWord] = []
    for voice, label in places:
        generator = np.random.default_rng([seed, voice, label, len(words) % recordings])
        rate, pitch = int(generator.integers(*vocabulary.rates)), int(generator.integers(*_PITCHES))
        words.append(SpokenWord(texts[label], names[voice], rate, pitch))
    done = itertools.count(1)

    def report(_: int) -> None:
        number = next(done)
        if number % _SAY_EVERY == 0:
            say(f"speaking, {number} of {len(words)} words")

    say("speaking")
    spoken: dict[tuple[int, int], list[np.ndarray]] = {}
    for place, samples in zip(places, speak(words, report), strict=True):
        spoken.setdefault(place, []).append(_at_most_a_second(samples))
    return spoken


def _at_most_a_second(samples: np.ndarray) -> np.ndarray:
    """The word, cut at 0.95 s and faded out if it is longer."""
    if len(samples) <= _LONGEST_WORD:
        return samples
    cut = samples[:_LONGEST_WORD].copy()
    cut[-_FADE:] *= np.linspace(1, 0, _FADE, dtype=np.float32)
    return cut


def _coloured_noise(generator: np.random.Generator) -> np.ndarray:
    """(3, samples) float32 noise with power falling as 1/f^slope, root mean square 1."""
    samples = _NOISE_SECONDS * SAMPLE_RATE_HZ
    spectrum = np.fft.rfft(generator.standard_normal((len(_NOISE_SLOPES), samples)), axis=1)
    frequency = np.maximum(np.arange(spectrum.shape[1]) / _NOISE_SECONDS, 50.0)
    noise = np.fft.irfft(spectrum / frequency ** (np.array(_NOISE_SLOPES)[:, None] / 2), axis=1)
    return (noise / noise.std(axis=1, keepdims=True)).astype(np.float32)


def render_audio(
    heard: np.ndarray,
    voice: np.ndarray,
    voices: Voices,
    generator: np.random.Generator,
    statistics: Callable[[np.ndarray], np.ndarray],
    progress: Callable[[int], object],
) -> np.ndarray:
    """Mix the sound of each second and compute its features.

    All random numbers are drawn first, so the result does not depend on the number of threads.

    Args:
        heard: (N, 10) int64, the class spoken in each second, or -1.
        voice: (N,) int64, an index into all voices.
        voices: voices with their recordings.
        generator: the random generator.
        statistics: from (n, 16000) samples to (n, D) features.
        progress: called with the number of finished clips.

    Returns:
        (N, 10, D) float32.
    """
    clips = len(heard)
    noise = _coloured_noise(generator)
    draw = _Draws(
        colour=generator.integers(len(noise), size=clips),
        place=generator.integers(noise.shape[1] - SAMPLE_RATE_HZ, size=(clips, POSITIONS)),
        level=_log_uniform(generator, _NOISE_LEVELS, clips),
        gain=_log_uniform(generator, _GAINS, clips),
        loudness=_log_uniform(generator, _LOUDNESSES, (clips, POSITIONS)),
        variant=generator.integers(voices.vocabulary.recordings, size=(clips, POSITIONS)),
        offset=generator.random((clips, POSITIONS)),
    )
    features: list[np.ndarray] = []

    def render(first: int) -> np.ndarray:
        last = min(first + _CLIPS_AT_ONCE, clips)
        places = [(clip, second) for clip in range(first, last) for second in range(POSITIONS)]
        keys = [(int(voice[clip]), int(heard[clip, second])) for clip, second in places]
        recordings = [voices.words[key] if key[1] >= 0 else None for key in keys]
        latest = voices.vocabulary.latest_start
        seconds = [_second(words, latest, noise, draw, at) for words, at in zip(recordings, places, strict=True)]
        return statistics(np.stack(seconds)).reshape(last - first, POSITIONS, -1)

    # The limit is global: without the lock, the end of one call would lift it for a concurrent one.
    with _ONE_BLAS_THREAD, threadpool_limits(1), ThreadPoolExecutor(_workers()) as pool:
        for rendered in pool.map(render, range(0, clips, _CLIPS_AT_ONCE)):
            features.append(rendered)
            progress(len(rendered))
    return np.concatenate(features)


# The bits of a matrix product depend on the number of threads.
_ONE_BLAS_THREAD = threading.Lock()


@dataclass(frozen=True)
class _Draws:
    """Random numbers for N clips: (N,) colour, level and gain; (N, 10) place, loudness, variant and offset."""

    colour: np.ndarray
    place: np.ndarray
    level: np.ndarray
    gain: np.ndarray
    loudness: np.ndarray
    variant: np.ndarray
    offset: np.ndarray


def _second(
    recordings: Sequence[np.ndarray] | None, latest_start: int, noise: np.ndarray, draw: _Draws, at: tuple[int, int]
) -> np.ndarray:
    """(16000,) float32 samples of one (clip, second): noise, and one of the recordings, if any."""
    clip, _ = at
    place = draw.place[at]
    mixture = noise[draw.colour[clip], place : place + SAMPLE_RATE_HZ] * np.float32(draw.level[clip])
    if recordings is not None:
        word = recordings[draw.variant[at]]
        start = int(draw.offset[at] * min(SAMPLE_RATE_HZ - len(word), latest_start))
        mixture[start : start + len(word)] += np.float32(draw.loudness[at]) * word
    return mixture * np.float32(draw.gain[clip])


def _log_uniform(
    generator: np.random.Generator, limits: tuple[float, float], size: int | tuple[int, int]
) -> np.ndarray:
    return np.exp(generator.uniform(np.log(limits[0]), np.log(limits[1]), size))


def _workers() -> int:
    """Number of processors of this process, at most eight."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, usable)
