"""Small media files for tests, written with PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Codecs of video and audio by suffix.
CODECS = {
    ".mp4": ("h264", "aac"),
    ".mov": ("h264", "aac"),
    ".mkv": ("h264", "aac"),
    ".avi": ("mpeg4", "pcm_s16le"),
    ".webm": ("libvpx", "libopus"),
    ".flv": ("h264", "aac"),
    ".ts": ("h264", "aac"),
    ".mka": (None, "aac"),
    ".wav": (None, "pcm_s16le"),
    ".flac": (None, "flac"),
    ".mp3": (None, "mp3"),
    ".m4a": (None, "aac"),
    ".ogg": (None, "libopus"),
}
SIDE = 64


def write_media(  # noqa: PLR0913 - pictures, sound and their clocks
    file: Path,
    frames: np.ndarray | None = None,
    times_s: Sequence[float] | None = None,
    sound: np.ndarray | None = None,
    rate_hz: int = 48000,
    *,
    fps: float = 25,
    sound_at_s: float = 0.0,
    quality: dict[str, str] | None = None,
) -> Path:
    """Writes a file.

    Args:
        file: its suffix chooses container and codecs.
        frames: (n, H, W, 3) uint8, or None for no video.
        times_s: presentation time of each frame; None for n / fps.
        sound: (samples,) float32, or None for no sound.
        rate_hz: of the sound.
        fps: frames per second.
        sound_at_s: presentation time of the first sample.
        quality: options of the video encoder.
    """
    av = pytest.importorskip("av")
    of_video, of_audio = CODECS[file.suffix]
    with av.open(str(file), "w") as container:
        streams: list[tuple[Any, list[Any]]] = []
        if frames is not None:
            rate = Fraction(fps).limit_denominator(1001)
            video = container.add_stream(of_video, rate=rate, options=quality or {})
            video.height, video.width = frames.shape[1:3]
            video.pix_fmt = "yuv420p"
            clock = Fraction(1, 30000)
            video.codec_context.time_base = clock
            times = [n / fps for n in range(len(frames))] if times_s is None else times_s
            given = []
            for picture, time in zip(frames, times, strict=True):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")
                frame.pts, frame.time_base = round(time / clock), clock
                given.append(frame)
            streams.append((video, given))
        if sound is not None:
            audio = container.add_stream(of_audio, rate=rate_hz, layout="mono")
            given = []
            for start in range(0, len(sound), 1024):
                planes = (sound[start : start + 1024] * 32767).astype(np.int16)[None]
                frame = av.AudioFrame.from_ndarray(planes, "s16", layout="mono")
                frame.sample_rate, frame.time_base = rate_hz, Fraction(1, rate_hz)
                frame.pts = start + round(sound_at_s * rate_hz)
                given.append(frame)
            streams.append((audio, given))
        for stream, given in streams:
            for frame in [*given, None]:
                for packet in stream.encode(frame):
                    container.mux(packet)
    return file


def flash_and_beep(file: Path, fps: float = 25, seconds: int = 10, at: Sequence[int] = (3, 7), **more: Any) -> Path:
    """A black film with white pictures and a tone of 1 kHz in some seconds; without streams that the suffix lacks."""
    frames = None
    if CODECS[file.suffix][0] is not None:
        times = np.arange(int(seconds * fps)) / fps
        white = np.isin(np.floor(times + 1e-9).astype(int), at)
        frames = np.repeat(np.where(white, 255, 0).astype(np.uint8), SIDE * SIDE * 3).reshape(-1, SIDE, SIDE, 3)
    return write_media(file, frames, sound=beeps(seconds, at), fps=fps, **more)


def beeps(seconds: float, at: Sequence[int] = (3, 7), rate_hz: int = 48000) -> np.ndarray:
    """(samples,) float32: a tone of 1 kHz in some seconds, else silence."""
    time = np.arange(round(seconds * rate_hz)) / rate_hz
    return np.where(np.isin(time.astype(int), at), 0.5 * np.cos(2 * np.pi * 1000 * time), 0).astype(np.float32)
