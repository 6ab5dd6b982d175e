"""The examples of codewords: frames and sound of media files, words of sentences, or pictures that the data hold."""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from unicode_fast.config import Modality
from unicode_fast.data import ClipSet
from unicode_fast.errors import message_of, one_line
from unicode_fast.files.optional import need
from unicode_fast.media.backbones import STEP_S, WINDOW_STEPS, Reads
from unicode_fast.media.decoding import MediaError, MediaFile, pixels
from unicode_fast.media.vgg import VGGish
from unicode_fast.media.wordllama import words_of
from unicode_fast.report.codebook_data import CodebookUse, Example
from unicode_fast.tasks.probe import EncodedClips

# Bounds of the bytes of an example, in base64, and the largest picture.
PICTURE_BYTES, SOUND_BYTES = 5600, 5200
_WIDTH, _HEIGHT = 160, 96
_QUALITIES = (70, 50, 30, 15)
# Pictures up to this side are shown in whole pixels.
_SMALL = 64
_RATE_HZ, _BITS_PER_SECOND = 16000, 24000
_BANDS = 32
# What is shown for a kind of features whose backbone is unknown.
_READS: dict[str, Reads] = {"grid": "frames", "vector": "sound", "words": "caption"}


@dataclass
class Shown:
    """An example of a codeword.

    Attributes:
        clip: id of the clip.
        place: its seconds or words with the codeword.
        label: class of the event at this place, or of the clip; empty without classes.
        picture: PNG or JPEG, or None.
        alt: what the picture shows.
        small: the picture is of few pixels.
        sound: MP3, or None.
        sentence: parts of the sentence, each with whether it has the codeword; None without a sentence.
    """

    clip: str
    place: str
    label: str = ""
    picture: bytes | None = None
    alt: str = ""
    small: bool = False
    sound: bytes | None = None
    sentence: list[tuple[str, bool]] | None = None


@dataclass
class Examples:
    """The examples of all codewords of a page.

    Attributes:
        shown: by codeword and modality.
        words: by codeword and modality of words, its words and their number, the most frequent first.
        unread: files that could not be read, and why.
    """

    shown: dict[tuple[int, str], list[Shown]] = field(default_factory=dict)
    words: dict[tuple[int, str], list[tuple[str, int]]] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """The clips of one modality of a split, and what is known of their content.

    Attributes:
        name: the modality.
        clips: with this modality.
        modality: kind and shape of its features.
        reads: what its features were computed from.
        backbone: name of what computed them; empty where it is unknown.
        media: folder of the clips' files, or None.
    """

    name: str
    clips: ClipSet
    modality: Modality
    reads: Reads
    backbone: str
    media: Path | None

    @property
    def has_files(self) -> bool:
        """Whether examples are read from media files."""
        return self.media is not None and self.reads != "caption"

    @property
    def bytes_each(self) -> int:
        """Bound of the bytes of an example's picture or sound in a page."""
        if self.reads == "caption":
            return 0
        return SOUND_BYTES if self.has_files and self.reads == "sound" else PICTURE_BYTES

    @property
    def captions(self) -> list[str] | None:
        """One sentence for each clip; None without."""
        keys = ["caption", f"{self.name}.sentence"] if self.reads == "caption" else []
        for key in keys:
            if key in self.clips.arrays:
                return [str(one) for one in np.asarray(self.clips.arrays[key])]
        return None

    def starts(self) -> np.ndarray:
        """(clips,) beginning of each clip in seconds of its file; 0 where it is unknown."""
        return np.asarray(self.clips.arrays.get("start", np.zeros(len(self.clips))), np.float64)

    def second(self, example: Example) -> float:
        """Where the middle of an example begins, in seconds of its file."""
        start = float(self.starts()[example.clip])
        if self.backbone != VGGish.name:
            return start + example.middle * STEP_S
        # Its steps are shorter than a second, from the first window of the file on.
        first = self._first_start(example.clip)
        return first + (start - first + example.middle * STEP_S) * VGGish.hop_s

    def _first_start(self, clip: int) -> float:
        """Beginning of the first of the windows that a part of a file was cut into."""
        name = str(self.clips.id[clip]).rpartition("#")[0]
        (found,) = np.nonzero(np.asarray(self.clips.id) == name)
        return float(self.starts()[found[0] if len(found) else clip])

    def place(self, example: Example) -> str:
        """The positions of an example in words."""
        if self.modality.kind == "words":
            return f"word{'s' * (len(example.positions) > 1)} {_ranges([at + 1 for at in example.positions])}"
        start = float(self.starts()[example.clip])
        shift = int(start) if start.is_integer() else start
        return f"{_ranges([at + shift for at in example.positions])}\N{NO-BREAK SPACE}s"

    def label(self, example: Example) -> str:
        """The events at an example's place, else the class of its clip."""
        labels, classes = self.clips.labels.get(self.name), self.clips.classes
        if labels is not None:
            there = np.asarray(labels[np.array([example.clip])])[0, example.middle, :-1]
            events = ", ".join(classes[number] for number in np.flatnonzero(there > 0))
            return f"event {events}" if events else "no event"
        if "class" in self.clips.arrays:
            return f"class {classes[int(self.clips.target[example.clip])]}"
        return ""


def sources(
    clips: Mapping[str, ClipSet], preprocessor: Mapping[str, Any] | None, media: Path | None
) -> dict[str, Source]:
    """The sources of examples by modality.

    Args:
        clips: of a split, by modality.
        preprocessor: of the data, or None.
        media: folder of the media files, or None.
    """
    described = {} if preprocessor is None else preprocessor["modalities"]
    found = {}
    for name, one in clips.items():
        kind = one.modalities[name]
        known = described.get(name, {"reads": _READS[kind.kind], "backbone": ""})
        found[name] = Source(name, one, kind, known["reads"], known["backbone"], media)
    return found


def collect(
    use: CodebookUse,
    of: Mapping[str, Source],
    codes: Mapping[str, EncodedClips],
    pictured: int,
    *,
    progress: bool = True,
) -> Examples:
    """The content of the examples.

    Args:
        use: with examples.
        of: their sources, by modality.
        codes: of the same clips, by modality.
        pictured: number of codewords whose examples have pictures and sound; the others have ids and words.
        progress: show a bar of the files on the error stream.
    """
    found, wanted = Examples(), []
    texts = {name: _Texts(one) for name, one in of.items() if one.captions is not None}
    for number, codeword in enumerate(use.codewords):
        for name, examples in codeword.examples.items():
            shown = [
                Shown(str(of[name].clips.id[one.clip]), of[name].place(one), of[name].label(one)) for one in examples
            ]
            found.shown[codeword.code, name] = shown
            pairs = list(zip(examples, shown, strict=True))
            if name in texts:
                for one, into in pairs:
                    into.sentence = texts[name].parts(one)
            elif number < pictured:
                wanted += [(of[name], one, into) for one, into in pairs]
    for name, text in texts.items():
        for code, counter in text.counted(codes[name], {codeword.code for codeword in use.codewords}).items():
            found.words[code, name] = counter.most_common()
    for source, one, into in wanted:
        if not source.has_files:
            _draw(source, one, into)
    _read([one for one in wanted if one[0].has_files], found.unread, progress)
    return found


class _Texts:
    """The sentences of a modality and their words.

    Args:
        source: with captions.
    """

    def __init__(self, source: Source) -> None:
        self.captions, self._lengths = source.captions or [], source.clips.lengths[source.name]
        # A local folder is one of BERT, whose words are also the marks between them.
        known: dict[str, list[Callable[[str], list[str]]]] = {"wordllama": [words_of], "": [str.split]}
        self._divided = known.get(
            source.backbone, [_with_marks] if os.sep in source.backbone else [words_of, str.split]
        )

    def words(self, clip: int) -> list[str] | None:
        """The word at each position of a clip; None where it is unknown how the sentence was divided."""
        caption = self.captions[clip]
        for divided in self._divided:
            words = divided(caption)
            if min(len(words), WINDOW_STEPS) == self._lengths[clip]:
                return words[:WINDOW_STEPS]
        return None

    def parts(self, example: Example) -> list[tuple[str, bool]]:
        """The sentence of an example, its words with the codeword apart."""
        caption, words = self.captions[example.clip], self.words(example.clip)
        parts: list[tuple[str, bool]] = []
        cut = end = 0
        for place, word in enumerate(words or ()):
            begin = caption.index(word, end)
            end = begin + len(word)
            if place in example.positions:
                parts += [(caption[cut:begin], False), (word, True)]
                cut = end
        return [(text, marked) for text, marked in [*parts, (caption[cut:], False)] if text]

    def counted(self, codes: EncodedClips, chosen: set[int]) -> dict[int, Counter[str]]:
        """How often each word has each codeword."""
        found: dict[int, Counter[str]] = {}
        code, mask = codes.code.numpy(), codes.mask.numpy()
        for clip in range(len(codes)):
            for place, word in enumerate(self.words(clip) or ()):
                if mask[clip, place] and int(code[clip, place]) in chosen:
                    found.setdefault(int(code[clip, place]), Counter())[word.lower()] += 1
        return found


def _with_marks(caption: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", caption)


def _ranges(numbers: Sequence[float]) -> str:
    """Ascending numbers, neighbours as a range, such as "0, 3-5"."""
    runs: list[list[float]] = []
    for number in numbers:
        if runs and number - runs[-1][-1] == 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]:g}" if len(run) == 1 else f"{run[0]:g}–{run[-1]:g}" for run in runs)


def _draw(source: Source, example: Example, into: Shown) -> None:
    """The picture of an example that the data themselves give, if any."""
    chosen, key = np.array([example.clip]), f"{source.name}.frames"
    if key in source.clips.arrays:
        frames = np.asarray(source.clips.arrays[key][chosen])[0]
        frame = frames[min(example.middle, len(frames) - 1)]
        _show(frame, into)
        into.alt = f"picture of {into.clip} at position {example.middle}"
    elif source.modality.kind == "vector":
        features = np.asarray(source.clips.features[source.name][chosen])[0].astype(np.float32)
        _show(_spectrum(features, example.positions), into)
        into.alt = f"features of {into.clip} over its {len(features)} positions, the codeword's underlined"


def _spectrum(features: np.ndarray, positions: Sequence[int]) -> np.ndarray:
    """(H, T) uint8 of (T, D) features, the first channel at the bottom, with a line under some positions."""
    groups = np.array_split(features, min(_BANDS, features.shape[1]), axis=1)
    bands = np.stack([group.mean(1) for group in groups], 1)  # (T, bands)
    low, high = np.nanmin(bands), np.nanmax(bands)
    grey = np.round(255 * (bands - low) / max(high - low, 1e-9)).astype(np.uint8)
    line = np.isin(np.arange(len(grey)), positions)[None].repeat(2, 0) * np.uint8(255)
    return np.concatenate([grey.T[::-1], np.zeros_like(line[:1]), line])


def _show(pixels_: np.ndarray, into: Shown) -> None:
    """Puts a picture, (H, W) or (H, W, 3) uint8, into an example, in bounded bytes."""
    picture = Image.fromarray(np.ascontiguousarray(pixels_))
    into.small = max(picture.size) <= _SMALL
    with io.BytesIO() as file:
        if into.small:
            picture.save(file, "png", optimize=True)
            into.picture = file.getvalue()
            return
        picture = picture.convert("RGB")
        picture.thumbnail((_WIDTH, _HEIGHT))
        for quality in _QUALITIES:
            file.seek(0)
            file.truncate()
            picture.save(file, "jpeg", quality=quality, optimize=True)
            if file.tell() * 4 <= 3 * PICTURE_BYTES - 400:
                break
        into.picture = file.getvalue()


def _mp3(samples: np.ndarray) -> bytes:
    """Mono sound, (samples,) float32 at 16 kHz, as MP3."""
    av = need("av", "media")
    with io.BytesIO() as file:
        with av.open(file, "w", format="mp3") as container:
            stream = container.add_stream("mp3", rate=_RATE_HZ, layout="mono")
            stream.bit_rate = _BITS_PER_SECOND
            loud = np.round(np.clip(samples, -1, 1) * 32767).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(loud[None], "s16", layout="mono")
            frame.sample_rate = _RATE_HZ
            for packet in [*stream.encode(frame), *stream.encode(None)]:
                container.mux(packet)
        return file.getvalue()


def _read(wanted: Sequence[tuple[Source, Example, Shown]], unread: dict[str, str], progress: bool) -> None:
    """Reads frames and sound of examples, each file once; names files that cannot be read."""
    files: dict[str, list[tuple[Source, Example, Shown]]] = {}
    for source, one, into in wanted:
        files.setdefault(str(np.asarray(source.clips.arrays["file"])[one.clip]), []).append((source, one, into))
    hidden = not (progress and files)
    for file, those in tqdm(files.items(), "reading media", unit="file", disable=hidden, dynamic_ncols=True):
        try:
            with MediaFile(path_in(those[0][0].media, file)) as media:
                _read_file(media, those)
        except FileNotFoundError:
            unread[file] = "there is no such file"
        except (MediaError, OSError) as error:
            unread[file] = one_line(message_of(error))


def path_in(folder: Path | None, file: str) -> Path:
    """The path of a clip's file.

    Raises:
        MediaError: it leaves the folder.
    """
    inner = PurePosixPath(file)
    if folder is None or inner.is_absolute() or ".." in inner.parts or os.path.isabs(file):
        raise MediaError(f"file must lie inside the folder of media, got {file!r}")
    return folder / inner


def _read_file(media: MediaFile, wanted: Iterable[tuple[Source, Example, Shown]]) -> None:
    """Reads the examples of one file, frames in one pass."""
    at: list[tuple[float, Shown]] = []
    for source, one, into in wanted:
        second = source.second(one)
        if source.reads == "frames" and media.has_frames:
            at.append((second + STEP_S / 2, into))
            into.alt = f"frame of {into.clip} at {second + STEP_S / 2:g} s"
        elif source.reads == "sound" and media.has_sound:
            samples = media.sound(_RATE_HZ, second, second + STEP_S).samples
            if len(samples):
                into.sound = _mp3(samples)
    at.sort(key=lambda one: one[0])
    for frame, into in zip(_frames(media, [time for time, _ in at]), (one for _, one in at), strict=False):
        _show(frame, into)


def _frames(media: MediaFile, times: Sequence[float]) -> Iterator[np.ndarray]:
    """The frame shown at each of some ascending times; the last one stays, the first stands for the time before it."""
    place, last = 0, None
    if not times:
        return
    for _, end, frame in media.frames(times[0], times[-1] + STEP_S / 2):
        last = frame
        while place < len(times) and times[place] < end:
            yield pixels(frame)
            place += 1
    for _ in times[place:] if last is not None else ():
        yield pixels(last)
