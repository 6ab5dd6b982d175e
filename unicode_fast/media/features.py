"""The features of one file: its clips of at most ten steps, in each modality that the file has."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from unicode_fast.config import Modality
from unicode_fast.errors import few
from unicode_fast.media.backbones import STEP_S, WINDOW_STEPS, Backbone, Reads, make
from unicode_fast.media.decoding import MediaError, MediaFile, Sound, pixels

# The backbones that need no file of weights.
DEFAULTS: dict[str, tuple[str, Reads]] = {
    "audio": ("log-mel", "sound"),
    "video": ("efficientnet-lite0", "frames"),
    "text": ("wordllama", "caption"),
}
# A last part of a file counts as a step if it lasts at least this share of one.
_LAST_STEP = 0.5


@dataclass(frozen=True)
class ClipFeatures:
    """One window of a file.

    Attributes:
        start_s: its beginning in seconds of the file.
        features: (T, ...) float32 by modality; a modality that the file lacks is missing. T is at most WINDOW_STEPS, of
            captions the number of words.
    """

    start_s: float
    features: dict[str, np.ndarray]


@dataclass(frozen=True)
class Preprocessor:
    """How files become features; preprocessor.json travels with stores, runs, checkpoints and exported models.

    Attributes:
        backbones: by modality, in the order of the modalities: "backbone", a name; "reads", what it is called with;
            "options", its keyword arguments; "kind" and "shape" of its features; "rate"; and "weights_sha256", the
            checksum of its weights or None.
    """

    backbones: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, backbones: Mapping[str, Backbone]) -> Preprocessor:
        """That of these backbones."""
        return cls({name: _described(backbone) for name, backbone in backbones.items()})

    @classmethod
    def from_dict(cls, content: Any) -> Preprocessor:
        """The reverse of `as_dict`.

        Raises:
            ValueError: `as_dict` gives no such content.
        """
        modalities = content.get("modalities") if isinstance(content, dict) else None
        if not isinstance(modalities, dict) or content.get("format") != 1:
            raise ValueError(f"preprocessor must be of format 1 with modalities, got {content!r:.100}")
        timing = (content.get("step_s"), content.get("window_steps"))
        if timing != (STEP_S, WINDOW_STEPS):
            raise ValueError(f"preprocessor must have steps of {STEP_S} s, {WINDOW_STEPS} in a window, got {timing}")
        for name, one in modalities.items():
            fields = {"backbone": str, "reads": str, "options": dict, "kind": str, "shape": list, "rate": int}
            wrong = [key for key, kind in fields.items() if not isinstance(one, dict) or type(one.get(key)) is not kind]
            if wrong or not isinstance(one.get("weights_sha256"), str | None):
                raise ValueError(
                    f"preprocessor must have {few(wrong) or 'weights_sha256'} for {name!r}, got {one!r:.100}"
                )
            Modality(one["kind"], tuple(one["shape"]))
        return cls(modalities)

    def as_dict(self) -> dict[str, Any]:
        """The content of preprocessor.json."""
        return {"format": 1, "step_s": STEP_S, "window_steps": WINDOW_STEPS, "modalities": self.backbones}

    def make(self) -> dict[str, Backbone]:
        """The backbones by modality.

        Raises:
            ValueError: a backbone is unknown, or its features or weights are others than those written here.
            MissingPackageError: a package that one needs is not installed.
        """
        made = {}
        for name, one in self.backbones.items():
            made[name] = make(one["backbone"], one["reads"], **one["options"])
            own = _described(made[name])
            changed = [key for key, value in own.items() if value != one.get(key)]
            if changed:
                key = changed[0]
                raise ValueError(f"{key} of backbone {one['backbone']!r} must be {one.get(key)!r}, got {own[key]!r}")
        return made

    @property
    def modalities(self) -> dict[str, Modality]:
        """Kind and shape by modality."""
        return {name: Modality(one["kind"], tuple(one["shape"])) for name, one in self.backbones.items()}


def _described(backbone: Backbone) -> dict[str, Any]:
    return {
        "backbone": backbone.name,
        "reads": backbone.reads,
        "options": dict(getattr(backbone, "options", {})),
        "kind": backbone.modality.kind,
        "shape": list(backbone.modality.shape),
        "rate": backbone.rate,
        "weights_sha256": getattr(backbone, "weights_sha256", None),
    }


def default_backbones() -> dict[str, Backbone]:
    """log-mel for audio, efficientnet-lite0 for video, wordllama for text."""
    return {modality: make(name, reads) for modality, (name, reads) in DEFAULTS.items()}


def features(
    file: str | os.PathLike[str],
    backbones: Mapping[str, Backbone] | Preprocessor | None = None,
    *,
    caption: str | None = None,
    start_s: float = 0.0,
    end_s: float | None = None,
) -> list[ClipFeatures]:
    """Decode a file and compute the features of each second.

    Step t of a file is its second from `start_s` + t on. A last part counts as a step from half a second on, and every
    file has one step at least. Where sound ends earlier than the pictures, silence follows; where pictures end earlier,
    the last one stays.

    Args:
        file: any that FFmpeg reads: video, sound, or a picture, which is one step.
        backbones: by modality; None takes efficientnet-lite0, log-mel and wordllama for video, audio and text.
        caption: words of the file; None or empty for none.
        start_s: first second of the file that is read.
        end_s: end of the part that is read; None for the end of the file.

    Returns:
        One ClipFeatures for each window of WINDOW_STEPS steps, the last one shorter. The caption belongs to each.

    Raises:
        FileNotFoundError: there is no such file.
        MediaError: the file cannot be decoded, or has nothing in this part.
        ValueError: times are out of order.
        MissingPackageError: a package is not installed.
    """
    if not 0 <= start_s < (math.inf if end_s is None else end_s):
        raise ValueError(f"start_s must be at least 0 and before end_s, got {start_s} and {end_s}")
    if backbones is None:
        backbones = default_backbones()
    elif isinstance(backbones, Preprocessor):
        backbones = backbones.make()
    with MediaFile(file) as media:
        found = _Part(media, backbones, start_s, math.inf if end_s is None else end_s).features()
    found = {name: values for name, values in found.items() if len(values)}
    steps = max((len(values) for values in found.values()), default=0)
    for name, backbone in backbones.items():
        if caption and backbone.reads == "caption" and len(words := backbone(caption)):
            found[name] = words
    if not found:
        part = f" from {start_s} s on" if start_s else ""
        raise MediaError(f"{file} must hold what a backbone reads{part}, got nothing")
    captions = [name for name, backbone in backbones.items() if backbone.reads == "caption"]
    return [
        ClipFeatures(
            start_s + first * STEP_S,
            {
                name: found[name] if name in captions else found[name][first : first + WINDOW_STEPS]
                for name in backbones
                if name in found
            },
        )
        # A file of which only the caption is read is one window.
        for first in range(0, max(steps, 1), WINDOW_STEPS)
    ]


class _Part:
    """A part of an opened file, decoded once for each backbone.

    Args:
        media: the file.
        backbones: by modality.
        start_s: beginning of the part in seconds of the file.
        end_s: its end, possibly infinite.
    """

    def __init__(self, media: MediaFile, backbones: Mapping[str, Backbone], start_s: float, end_s: float) -> None:
        self.media, self.backbones, self.start_s, self.end_s = media, backbones, start_s, end_s
        self.frames_end_s = 0.0

    def features(self) -> dict[str, np.ndarray]:
        """(T, ...) by modality, of frames and sound, the same T for all."""
        sounds = {
            name: self.media.sound(one.rate, self.start_s, self.end_s)
            for name, one in self.backbones.items()
            if one.reads == "sound" and self.media.has_sound
        }
        found = {
            name: self._of_frames(one)
            for name, one in self.backbones.items()
            if one.reads == "frames" and self.media.has_frames
        }
        found = {name: values for name, values in found.items() if len(values)}
        sounds = {name: sound for name, sound in sounds.items() if sound.end_s > self.start_s}
        ends = [sound.end_s for sound in sounds.values()] + [self.frames_end_s] * bool(found)
        steps = self._steps(max(ends, default=0.0))
        for name, sound in sounds.items():
            found[name] = self._of_sound(self.backbones[name], sound, steps)
        return {name: _of_length(values, steps) for name, values in found.items()}

    def _steps(self, end_s: float) -> int:
        """Number of steps of the part, if the file ends there."""
        length = (min(end_s, self.end_s) - self.start_s) / STEP_S
        return max(1, math.floor(length + 1 - _LAST_STEP + 1e-6)) if end_s > self.start_s else 0

    def _of_frames(self, backbone: Backbone) -> np.ndarray:
        numbers = getattr(backbone, "frame_numbers", None)
        chosen = self._frames_at_times(backbone.rate) if numbers is None else self._frames_by_number(numbers)
        found: list[np.ndarray] = []
        waiting: list[np.ndarray] = []
        # Whole steps, of some ten frames.
        together = backbone.rate * max(1, WINDOW_STEPS // backbone.rate)
        for frame in chosen:
            waiting.append(frame)
            if len(waiting) == together:
                found.append(_mean_of_steps(backbone, waiting))
                waiting = []
        if waiting:
            waiting += [waiting[-1]] * (-len(waiting) % backbone.rate)
            found.append(_mean_of_steps(backbone, waiting))
        return np.concatenate(found) if found else np.zeros((0, *backbone.modality.shape), np.float32)

    def _frames_at_times(self, rate: int) -> Iterator[np.ndarray]:
        """(H, W, 3) frames shown at `start_s` + (k + 1/2) / rate; the first stands for the time before it."""
        number, last = 0, None
        for _, end, frame in self.media.frames(self.start_s, self.end_s):
            self.frames_end_s = min(end, self.end_s)
            while self.start_s + (number + 0.5) * STEP_S / rate < self.frames_end_s - 1e-6:
                last = pixels(frame, last)
                yield last
                number += 1
        if number == 0 and self.frames_end_s:
            yield pixels(frame)

    def _frames_by_number(self, numbers: Callable[[int, int], np.ndarray]) -> Iterator[np.ndarray]:
        """(H, W, 3) frames of each step, by their numbers in the part."""
        count = 0
        for _, end, _ in self.media.frames(self.start_s, self.end_s):
            self.frames_end_s, count = min(end, self.end_s), count + 1
        if count == 0:
            return
        wanted, place, last = numbers(count, self._steps(self.frames_end_s)).ravel(), 0, None
        for number, (_, _, frame) in enumerate(self.media.frames(self.start_s, self.end_s)):
            while place < len(wanted) and wanted[place] == number:
                last = pixels(frame, last)
                yield last
                place += 1

    def _of_sound(self, backbone: Backbone, sound: Sound, steps: int) -> np.ndarray:
        window, hop = (round(getattr(backbone, f"{name}_s", STEP_S) * backbone.rate) for name in ("window", "hop"))
        end = round(steps * STEP_S * backbone.rate) + window
        samples, found = np.pad(sound.samples, (0, max(0, end - len(sound.samples)))), []
        for first in range(0, steps, WINDOW_STEPS):
            # Each clip begins at its own second, so that a hop of less than a second does not add up in a long file.
            starts = round(first * STEP_S * backbone.rate) + hop * np.arange(min(WINDOW_STEPS, steps - first))
            found.append(backbone(samples[starts[:, None] + np.arange(window)]))
        return np.concatenate(found)


def _mean_of_steps(backbone: Backbone, frames: list[np.ndarray]) -> np.ndarray:
    found = backbone(np.stack(frames))
    return found.reshape(-1, backbone.rate, *found.shape[1:]).mean(1)


def _of_length(values: np.ndarray, steps: int) -> np.ndarray:
    """The first `steps` of (T, ...); the last one is repeated where there are fewer."""
    return values[np.minimum(np.arange(steps), len(values) - 1)]
