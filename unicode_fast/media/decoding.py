"""Frames and sound of media files by presentation time, decoded with PyAV.

Zero of a file's clock is the earliest presentation time of its first video and its first audio stream. Samples that an
encoder adds before the sound, 1,024 in AAC, have earlier times in the file and are not part of it.

Only regular local files in formats of `_FORMATS` are opened. Playlists and other formats that name further files or
addresses are not among them.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy.signal import resample_poly

from unicode_fast.files.optional import need
from unicode_fast.files.untrusted import BadFile, open_file

if TYPE_CHECKING:
    import av.container

# FFmpeg's demuxers that may open a file; no playlists, no image sequences, no devices.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,live_flv,asf,ogg,wav,w64,aiff,au,caf,mp3,flac,"
    "aac,ac3,eac3,dts,amr,amrnb,amrwb,ape,wv,tta,voc,mxf,nut,rm,dv,ivf,h264,hevc,m4v,gif,apng,yuv4mpegpipe,swf,"
    "png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe,ppm_pipe,pgm_pipe"
)
_PICTURES = ("png_pipe", "jpeg_pipe", "webp_pipe", "bmp_pipe", "tiff_pipe", "ppm_pipe", "pgm_pipe")
# Formats whose header holds the duration, so that a missing end can be seen.
_TIMED_FORMATS = ("mov", "matroska", "avi")
# Most pixels of a frame, samples per second and seconds of a file: a larger one is more likely damaged than real.
MOST_PIXELS = 8192 * 8192
MOST_RATE_HZ = 768_000
MOST_SECONDS = 6 * 3600.0
# Sound that is decoded beside a part for the filter of the resampler.
_MARGIN_S = 0.1
# A shorter time between two pieces of sound is the rounding of their times to milliseconds.
_NO_GAP_S = 0.0011


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
        file: any that FFmpeg reads, among video, sound and single pictures.

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
        try:
            self._open()
            if self._video is None and self._audio is None:
                raise MediaError(f"{self.path} must hold frames or sound, got neither")
        except BaseException:
            self._stack.close()
            raise
        self.has_frames, self.has_sound = self._video is not None, self._audio is not None
        self.is_picture = self._container.format.name in _PICTURES

    def _open(self) -> None:
        """Open the file at its beginning, also after another pass: some formats cannot be searched at all."""
        self._stack.close()
        self._container = self._opened()
        streams = self._container.streams
        cover = self._av.stream.Disposition.attached_pic
        shown = [stream for stream in streams.video if not stream.disposition & cover]
        self._video: Any = shown[0] if shown else None
        self._audio: Any = streams.audio[0] if streams.audio else None

    def _opened(self) -> av.container.InputContainer:
        if self.path.stat().st_size == 0:
            raise MediaError(f"{self.path} must be a media file, got an empty file")
        try:
            stream = self._stack.enter_context(open_file(self.path))
        except BadFile as error:
            raise MediaError(f"{self.path} must be a media file: {error}") from error
        with self._named("cannot be opened as a media file"):
            options = {"format_whitelist": _FORMATS, "protocol_whitelist": ""}
            return self._stack.enter_context(self._av.open(stream, metadata_errors="replace", options=options))

    def __enter__(self) -> MediaFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Turns FFmpeg's errors into a MediaError that names the file."""
        try:
            yield
        except (self._av.error.FFmpegError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise MediaError(f"{self.path} {what}: {reason}") from error

    @property
    def zero_s(self) -> float:
        """Presentation time, in the file, of the clock's zero."""
        times = [
            float(stream.start_time * stream.time_base)
            for stream in (self._video, self._audio)
            if stream is not None and stream.start_time is not None and stream.time_base is not None
        ]
        return min(times, default=0.0)

    @property
    def promised_s(self) -> float | None:
        """Duration by the header, in formats whose header has it; a shorter file has lost its end."""
        duration = self._container.duration
        return duration / 1e6 if duration and self._container.format.name.startswith(_TIMED_FORMATS) else None

    def frames(self, start_s: float = 0.0, end_s: float = math.inf) -> Iterator[tuple[float, float, Any]]:
        """Begin and end, in seconds of the clock, of each frame that a part of the file shows, and PyAV's frame.

        A frame is shown until the next one begins, the last one for its own duration.

        Raises:
            MediaError: the frames cannot be decoded to the end of the part.
        """
        shown: tuple[float, float, Any] | None = None
        for begin, end, frame in self._decoded("video", start_s, end_s):
            if frame.width * frame.height > MOST_PIXELS:
                size = f"{frame.width} x {frame.height}"
                raise MediaError(f"{self.path} must have frames of at most {MOST_PIXELS} pixels, got {size}")
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
            The samples up to the end of the sound; none where the file has no sound.

        Raises:
            MediaError: the sound cannot be decoded to the end of the part.
        """
        if self._audio is None:
            return Sound(np.zeros(0, np.float32), 0.0)
        pieces, own = [], int(self._audio.rate)
        if own > MOST_RATE_HZ:
            raise MediaError(f"{self.path} must have at most {MOST_RATE_HZ} samples per second, got {own}")
        # The filter of the resampler reads some samples beside the part.
        early, late = start_s - _MARGIN_S, end_s + _MARGIN_S
        follows = 0
        for begin, end, frame in self._decoded("audio", early, late):
            place = round((begin - early) * own)
            # Rounded times would leave gaps of some samples.
            if abs(place - follows) < _NO_GAP_S * own:
                place = follows
            follows = place + frame.samples
            if end > early:
                pieces.append((place, _mono(frame)))
        joined = np.zeros(max((place + len(samples) for place, samples in pieces), default=0), np.float32)
        for place, samples in pieces:
            first = max(0, -place)
            joined[place + first : place + len(samples)] = samples[first:]
        found_s = min(early + len(joined) / own, end_s) if len(joined) else 0.0
        divisor = math.gcd(own, rate_hz)
        resampled = resample_poly(joined, rate_hz // divisor, own // divisor) if len(joined) else joined
        skipped, count = round(_MARGIN_S * rate_hz), max(0, round((found_s - start_s) * rate_hz))
        samples = resampled[skipped : skipped + count]
        return Sound(np.pad(samples, (0, count - len(samples))).astype(np.float32), found_s)

    def _decoded(
        self, kind: Literal["video", "audio"], start_s: float, end_s: float
    ) -> Iterator[tuple[float, float, Any]]:
        """Begin and end in seconds of the clock, and the frame, of one stream from a time on, earlier ones possible."""
        end = 0.0
        # Formats of sound alone often have no index, and a search in them gives wrong times.
        self._start(start_s if self.has_frames else 0.0)
        stream = self._video if kind == "video" else self._audio
        frames = self._frames_of(stream)
        while True:
            with self._named(f"cannot be decoded after {end:.1f} s"):
                frame = next(frames, None)
            if frame is None:
                return
            # A frame without a time follows the one before it.
            begin = end if frame.time is None else frame.time - self.zero_s
            end = begin + _length_s(stream, frame)
            if end > MOST_SECONDS:
                raise MediaError(f"{self.path} must be at most {MOST_SECONDS:.0f} s long, got a frame at {begin:.0f} s")
            if begin >= end_s:
                return
            yield begin, end, frame

    def _start(self, start_s: float) -> None:
        """Go to a time or, in a file that cannot be searched, to the beginning."""
        self._open()
        if start_s > 0:
            try:
                self._container.seek(int((start_s + self.zero_s) * 1e6))
            except self._av.error.FFmpegError:
                self._open()

    def _frames_of(self, stream: Any) -> Iterator[Any]:
        for packet in self._container.demux(stream):
            # Empty packets repeat the last frame; the one without a time ends the stream.
            if packet.size or packet.dts is None:
                yield from packet.decode()


def _length_s(stream: Any, frame: Any) -> float:
    """Seconds that a decoded frame of pictures or sound lasts."""
    if stream.type == "audio":
        return float(frame.samples / frame.sample_rate)
    if frame.duration and frame.time_base:
        return float(frame.duration * frame.time_base)
    return float(1 / stream.average_rate) if stream.average_rate else 0.0


def _mono(frame: Any) -> np.ndarray:
    """(samples,) float32 in -1..1, the mean of the channels."""
    values = frame.to_ndarray()
    channels = frame.layout.nb_channels
    samples = values.reshape(-1, channels).mean(1) if not frame.format.is_planar else values.mean(0)
    if values.dtype.kind == "f":
        return samples.astype(np.float32)
    limits = np.iinfo(values.dtype)
    # Unsigned samples have their zero in the middle.
    middle = (limits.max + 1) / 2 if values.dtype.kind == "u" else 0
    return ((samples - middle) / (limits.max + 1 - middle)).astype(np.float32)


def pixels(frame: Any, like: np.ndarray | None = None) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a frame of PyAV, upright; in the size of `like`, if it is given."""
    found = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)
    if like is not None and found.shape != like.shape:
        height, width = like.shape[:2] if frame.rotation % 180 == 0 else like.shape[1::-1]
        found = np.rot90(frame.to_ndarray(format="rgb24", width=width, height=height), round(frame.rotation / 90) % 4)
    return np.ascontiguousarray(found)
