"""Frames and sound of media files by presentation time, decoded with PyAV.

Of several streams the first video stream that is no cover picture and the first audio stream are read. Zero of a file's
clock is the earliest presentation time of these two. Samples that an encoder adds before the sound, 1,024 in AAC, have
earlier times in the file and are not part of it.

Only regular local files in formats of `_FORMATS` are opened. Playlists and other formats that name further files or
addresses are not among them. A file that ends early or is damaged is an error, never a shorter file.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.signal import resample_poly

from unicode_fast.files.optional import need
from unicode_fast.files.untrusted import BadFile, open_file

# FFmpeg's demuxers that may open a file; no playlists, no image sequences, no devices.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,live_flv,asf,ogg,wav,w64,aiff,au,caf,mp3,flac,"
    "aac,ac3,eac3,dts,amr,amrnb,amrwb,ape,wv,tta,voc,mxf,nut,rm,dv,ivf,h264,hevc,m4v,gif,apng,yuv4mpegpipe,swf,"
    "png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe,ppm_pipe,pgm_pipe"
)
# FFmpeg's protocols that a file may make it open; none.
_PROTOCOLS = ""
_PICTURES = ("png_pipe", "jpeg_pipe", "webp_pipe", "bmp_pipe", "tiff_pipe", "ppm_pipe", "pgm_pipe")
# Formats whose header holds the duration, so that a missing end can be seen.
_TIMED_FORMATS = ("mov", "matroska", "avi", "wav", "flac", "aiff")
# Limits of the pixels of a frame, seconds of a file and samples per second; others are more likely damaged than real.
MOST_PIXELS = 8192 * 8192
MOST_SECONDS = 6 * 3600.0
LEAST_RATE_HZ, MOST_RATE_HZ = 1000, 384_000
# Seconds that are resampled together.
_BLOCK_S = 60
# Sound that begins within this time of the end of the sound before follows it: many formats round times to 1 ms.
_ROUNDING_S = 0.01
# A frame may begin this much before the one before it, and a file may end this much before its header says.
_TOLERANCE_S = 1.0


class MediaError(ValueError):
    """A file cannot be decoded; the message names it."""


@dataclass(frozen=True)
class Sound:
    """The samples of a part of a file.

    Attributes:
        samples: (S,) float32, mono, sample k at `start_s` + k / rate; zeros where the file has none.
        end_s: end of the last sample that the file has in this part, in seconds of its clock; 0 without any.
    """

    samples: np.ndarray
    end_s: float


class MediaFile:
    """An opened file; a context manager that closes it.

    Args:
        file: video, sound or a single picture.

    Attributes:
        has_frames: it has a video stream that is no cover picture.
        has_sound: it has an audio stream.
        is_picture: it is one picture.

    Raises:
        FileNotFoundError: there is no such file.
        MediaError: it cannot be read, or has neither frames nor sound.
        MissingPackageError: PyAV is not installed.
    """

    def __init__(self, file: str | os.PathLike[str]) -> None:
        self.path = Path(file)
        self._av = need("av", "media")
        if not self.path.exists():
            raise FileNotFoundError(f"file must exist, got {str(self.path)!r}")
        self._stack = contextlib.ExitStack()
        # Also where a frame is converted after it was decoded.
        self._stack.enter_context(self._named("cannot be decoded"))
        self._opened = self._stack.enter_context(contextlib.ExitStack())
        # End of each stream that was decoded to its end, by its number.
        self._ends_s: dict[int, float] = {}
        try:
            self._open()
            if self._video is None and self._audio is None:
                raise MediaError(f"{self.path} must hold frames or sound, got neither")
            if self._video is not None:
                self._check_pixels(self._video.width, self._video.height)
        except BaseException:
            self._stack.close()
            raise
        self.has_frames, self.has_sound = self._video is not None, self._audio is not None
        self.is_picture = self._container.format.name in _PICTURES

    def _open(self) -> None:
        """Open the file, again if it is open, to decode from its beginning."""
        self._opened.close()
        if self.path.stat().st_size == 0:
            raise MediaError(f"{self.path} must be a media file, got an empty file")
        try:
            content = self._opened.enter_context(open_file(self.path))
        except BadFile as error:
            raise MediaError(f"{self.path} must be a media file: {error}") from error
        self._check_riff(content.read(12))
        content.seek(0)
        options = {"format_whitelist": _FORMATS, "protocol_whitelist": _PROTOCOLS, "max_pixels": str(MOST_PIXELS)}
        # From PyAV 19 on, any bytes in metadata are allowed.
        lenient = {"metadata_errors": "replace"} if int(self._av.__version__.split(".")[0]) < 19 else {}
        with self._named("cannot be opened as a media file"):
            self._container = self._opened.enter_context(self._av.open(content, options=options, **lenient))
        self._is_at_beginning = True
        streams = self._container.streams
        cover = self._av.stream.Disposition.attached_pic
        self._video = next((stream for stream in streams.video if not stream.disposition & cover), None)
        self._audio = next(iter(streams.audio), None)
        if self._video is not None:
            # A picture that lacks its end is not filled up. Of a TIFF this would refuse whole ones too.
            strict = {"err_detect": "explode"} if self._container.format.name in ("jpeg_pipe", "png_pipe") else {}
            self._video.codec_context.options = {"max_pixels": str(MOST_PIXELS), **strict}

    def __enter__(self) -> MediaFile:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Turns FFmpeg's errors into a MediaError that names the file."""
        try:
            yield
        except self._av.error.FFmpegError as error:
            raise MediaError(f"{self.path} {what}: {error.strerror or error}") from error

    def _check_pixels(self, width: int, height: int) -> None:
        if width * height > MOST_PIXELS:
            raise MediaError(
                f"{self.path} must have frames of at most {MOST_PIXELS} pixels, got {width} x {height} pixels"
            )

    def _check_riff(self, head: bytes) -> None:
        """Raise MediaError where a WAVE or AVI file is shorter than its header says; FFmpeg then changes the length."""
        written, size = int.from_bytes(head[4:8], "little"), self.path.stat().st_size
        # Larger numbers stand for an unknown size. Some writers miscount a few bytes.
        if head[:4] == b"RIFF" and head[8:] in (b"WAVE", b"AVI ") and size + 1024 < written + 8 < 0x7FFF0000:
            raise MediaError(f"{self.path} must hold {written + 8} bytes, as its header says, got {size}")

    @property
    def zero_s(self) -> float:
        """Presentation time, in the file, of the clock's zero."""
        times = [
            # Sound before time 0 is what the encoder added; older versions of FFmpeg do not cut it off.
            max(float(stream.start_time * stream.time_base), 0.0 if stream is self._audio else -math.inf)
            for stream in (self._video, self._audio)
            if stream is not None and stream.start_time is not None and stream.time_base
        ]
        return min(times, default=0.0)

    def frames(self, start_s: float = 0.0, end_s: float = math.inf) -> Iterator[tuple[float, float, Any]]:
        """Begin and end, in seconds of the clock, of each frame that a part of the file shows, and PyAV's frame.

        A frame is shown until the next one begins, the last one for its own duration. Of a part after the last frame
        this is the last one. No other frame is held.

        Raises:
            MediaError: the frames cannot be decoded to the end of the part, or one is damaged.
        """
        shown: tuple[float, float, Any] | None = None
        for begin, end, frame in self._decoded("video", start_s, end_s):
            self._check_pixels(frame.width, frame.height)
            if shown is not None and begin > max(shown[0], start_s):
                yield shown[0], begin, shown[2]
            shown = begin, end, frame
        if shown is not None:
            yield shown

    def sound(self, rate_hz: int, start_s: float = 0.0, end_s: float = math.inf) -> Sound:
        """The sound of a part of the file, the mean of its channels.

        Args:
            rate_hz: samples per second of the result.
            start_s: time of its first sample.
            end_s: its end; infinite for that of the file.

        Returns:
            The samples up to the end of the sound; none where the file has no sound. In formats that round times, a
            part can lie up to 10 ms beside the same part of the whole.

        Raises:
            MediaError: the sound cannot be decoded to the end of the part.

        Memory:
            The result, and a minute in the rate of the file.
        """
        if self._audio is None:
            return Sound(np.zeros(0, np.float32), 0.0)
        resampler: _Resampler | None = None
        for begin, end, frame in self._decoded("audio", start_s - _TOLERANCE_S, end_s + _TOLERANCE_S):
            if resampler is None:
                resampler = _Resampler(self._checked_rate(frame.sample_rate), rate_hz)
            elif frame.sample_rate != resampler.own_hz:
                rates = f"{resampler.own_hz} and {frame.sample_rate}"
                raise MediaError(f"{self.path} must have sound of one rate, got {rates} Hz at {begin:.1f} s")
            if end > start_s - _TOLERANCE_S:
                resampler.add(round((begin - start_s) * resampler.own_hz), self._mono(frame))
        if resampler is None or resampler.end <= 0:
            return Sound(np.zeros(0, np.float32), 0.0)
        found_s = min(start_s + resampler.end / resampler.own_hz, end_s)
        return Sound(resampler.first(round((found_s - start_s) * rate_hz)), found_s)

    def _checked_rate(self, rate_hz: int) -> int:
        if not LEAST_RATE_HZ <= rate_hz <= MOST_RATE_HZ:
            raise MediaError(
                f"{self.path} must have {LEAST_RATE_HZ} to {MOST_RATE_HZ} samples per second, got {rate_hz}"
            )
        return rate_hz

    def _mono(self, frame: Any) -> np.ndarray:
        """(samples,) float32 in -1..1, the mean of the channels."""
        try:
            values = frame.to_ndarray()
        except ValueError as error:
            raise MediaError(f"{self.path} must have samples of a known type, got {frame.format.name}") from error
        channels = frame.layout.nb_channels
        samples = values.mean(0) if frame.format.is_planar else values.reshape(-1, channels).mean(1)
        if values.dtype.kind == "f":
            return samples.astype(np.float32)
        limits = np.iinfo(values.dtype)
        # Unsigned samples have their zero in the middle.
        middle = (limits.max + 1) / 2 if values.dtype.kind == "u" else 0
        return ((samples - middle) / (limits.max + 1 - middle)).astype(np.float32)

    def _decoded(self, kind: str, start_s: float, end_s: float) -> Iterator[tuple[float, float, Any]]:
        """Begin and end in seconds of the clock, and the frame, of one stream from a time on, earlier ones possible.

        The last one is the first that begins after the part.
        """
        first = None
        # Formats of sound alone often have no index, and a search in them gives wrong times.
        if self.has_frames and start_s > 0:
            found = self._decoded_from(kind, start_s)
            # A search can end in the middle of a frame.
            with contextlib.suppress(MediaError):
                first = next(found, None)
        if first is None or first[0] > start_s:
            found = self._decoded_from(kind, 0.0)
            first = next(found, None)
        for begin, end, frame in itertools.chain([] if first is None else [first], found):
            if frame.is_corrupt and end > start_s and begin < end_s:
                raise MediaError(f"{self.path} must be whole, its {kind} is damaged at {begin:.1f} s")
            yield begin, end, frame
            if begin >= end_s:
                return

    def _decoded_from(self, kind: str, first_s: float) -> Iterator[tuple[float, float, Any]]:
        """Those after a search for a time, or from the beginning, with times that rise."""
        with self._named("cannot be decoded from its beginning"):
            if first_s > 0:
                self._container.seek(int((first_s + self.zero_s) * 1e6))
            elif not self._is_at_beginning:
                # Some formats cannot go back.
                self._open()
        self._is_at_beginning = False
        stream = self._video if kind == "video" else self._audio
        frames = self._frames_of(stream)
        before, end = -math.inf, None
        while True:
            with self._named(f"cannot be decoded after {end or 0.0:.1f} s"):
                frame = next(frames, None)
            if frame is None:
                break
            begin = None if frame.time is None else frame.time - self.zero_s
            if begin is None and end is None and first_s > 0:
                # Only the beginning's time is known without one.
                return
            if begin is None or (kind == "audio" and end is not None and abs(begin - end) < _ROUNDING_S):
                begin = end or 0.0
            if begin < before - _TOLERANCE_S:
                raise MediaError(f"{self.path} must have times that rise, got {before:.1f} s before {begin:.1f} s")
            before, end = begin, begin + _length_s(stream, frame)
            if end > MOST_SECONDS:
                raise MediaError(f"{self.path} must be at most {MOST_SECONDS:.0f} s long, got a frame at {begin:.0f} s")
            yield begin, end, frame
        if end is not None or first_s == 0:
            self._check_end(stream, end or 0.0)

    def _frames_of(self, stream: Any) -> Iterator[Any]:
        for packet in self._container.demux(stream):
            # Empty packets repeat the last frame; the one without a time ends the stream.
            if packet.size or packet.dts is None:
                yield from packet.decode()

    def _check_end(self, stream: Any, end_s: float) -> None:
        """Raise MediaError where the header promises a longer stream, or a longer file of streams that all ended."""
        if not self._container.format.name.startswith(_TIMED_FORMATS):
            return
        self._ends_s[stream.index] = end_s
        promised_s = _promised_s(stream)
        if promised_s is not None:
            promised_s -= self.zero_s
        elif len(self._ends_s) == len(self._container.streams) and self._container.duration:
            promised_s, end_s = self._container.duration / 1e6, max(self._ends_s.values())
        if promised_s is not None and end_s < promised_s - _TOLERANCE_S:
            raise MediaError(
                f"{self.path} must last {promised_s:.1f} s, as its header says, its {stream.type} ends at {end_s:.1f} s"
            )


class _Resampler:
    """Resamples sound piece by piece, in blocks; gaps between the pieces are zeros.

    Args:
        own_hz: samples per second that are given.
        rate_hz: samples per second of the result.

    Attributes:
        end: after the last sample that was given.
    """

    def __init__(self, own_hz: int, rate_hz: int) -> None:
        divisor = math.gcd(own_hz, rate_hz)
        self.own_hz, self._up, self._down = own_hz, rate_hz // divisor, own_hz // divisor
        # The filter of resample_poly reads 10 max(up, down) / up samples on each side.
        self._margin = self._down * (10 // min(self._up, self._down) + 1)
        self._block = self._down * math.ceil(_BLOCK_S * own_hz / self._down)
        self._waiting: list[tuple[int, np.ndarray]] = []
        self._done: list[np.ndarray] = []
        self.end = 0

    def add(self, place: int, samples: np.ndarray) -> None:
        """A piece whose first sample has this number, counted from that of the result."""
        self.end = max(self.end, place + len(samples))
        while place >= (len(self._done) + 1) * self._block + self._margin:
            self._resample()
        self._waiting.append((place, samples))

    def first(self, count: int) -> np.ndarray:
        """(count,) float32: the first samples of the result."""
        while sum(map(len, self._done)) < count:
            self._resample()
        return np.concatenate([*self._done, np.zeros(0, np.float32)])[:count]

    def _resample(self) -> None:
        first = len(self._done) * self._block
        # The last block is shorter.
        size = min(self._block, self._down * math.ceil((self.end - first) / self._down))
        joined = np.zeros(size + 2 * self._margin, np.float32)
        for place, samples in self._waiting:
            start = place - first + self._margin
            begin = max(start, 0)
            end = max(begin, min(start + len(samples), len(joined)))
            joined[begin:end] = samples[begin - start : end - start]
        skipped, count = (length * self._up // self._down for length in (self._margin, size))
        resampled = resample_poly(joined, self._up, self._down) if self._waiting else np.zeros(skipped + count)
        self._done.append(resampled[skipped : skipped + count].astype(np.float32))
        # The next block reads some samples before its own.
        self._waiting = [
            (place, samples)
            for place, samples in self._waiting
            if place + len(samples) > first + self._block - self._margin
        ]


def _length_s(stream: Any, frame: Any) -> float:
    """Seconds that a decoded frame of pictures or sound lasts."""
    if stream.type == "audio":
        return float(frame.samples / frame.sample_rate)
    if frame.duration and frame.time_base:
        return float(frame.duration * frame.time_base)
    return 1 / float(stream.average_rate) if stream.average_rate else 0.0


def _promised_s(stream: Any) -> float | None:
    """The end of a stream by the file's header, in seconds of the file."""
    if stream.duration and stream.time_base:
        return float((stream.duration + (stream.start_time or 0)) * stream.time_base)
    # Of Matroska.
    written = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if written is None:
        return None
    hours, minutes, seconds = map(float, written.groups())
    return 3600 * hours + 60 * minutes + seconds


# Signs of a, b, c, d of the display matrix of quarter turns against the clock.
_TURNS = ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))


def _orientation(frame: Any) -> tuple[int, ...]:
    """Signs of a, b, c, d: a pixel at (x, y) is shown in the direction of (a x + c y, b x + d y)."""
    kind = need("av.sidedata.sidedata", "media").Type.DISPLAYMATRIX
    try:
        found = frame.side_data.get(kind)
    except ValueError:
        # PyAV 18 gives no list with a kind that it does not know, such as Exif, but the angle; then none is mirrored.
        return _TURNS[round(frame.rotation / 90) % 4]
    if found is None:
        return _TURNS[0]
    matrix = np.frombuffer(found, np.int32)
    a, b, c, d = (int(value) for value in np.sign(matrix[[0, 1, 3, 4]]))
    return (a, 0, 0, d) if a and d else (0, b, c, 0)


def pixels(frame: Any, like: np.ndarray | None = None) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a frame of PyAV, as its file says that it is shown; in the size of `like`, if given."""
    a, b, c, d = _orientation(frame)
    scaled = {}
    if like is not None:
        height, width = like.shape[:2] if a else like.shape[1::-1]
        scaled = {"height": height, "width": width}
    found = frame.to_ndarray(format="rgb24", **scaled)
    return np.ascontiguousarray(found[::d, ::a] if a else found.transpose(1, 0, 2)[::b, ::c])
