"""Spoken words as 16 kHz samples, synthesised by espeak-ng in a child process.

espeak-ng is licensed under GPL-3. Its shared library is never loaded into the calling process: `espeak_child.py`, a
script in a separate process, receives the words and returns only samples.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np

SAMPLE_RATE_HZ = 16_000
_CHILD = Path(__file__).with_name("espeak_child.py")
_ESPEAK_RATE_HZ = 22_050


class SpokenWord(NamedTuple):
    """Text, espeak voice such as "en-us+f3", words per minute (80-450), and pitch (0-99)."""

    text: str
    voice: str
    rate: int
    pitch: int


def speak(words: Sequence[SpokenWord], progress: Callable[[int], object] | None = None) -> list[np.ndarray]:
    """Synthesise each word, trim silence, and scale to root mean square 1.

    One new process synthesises the words in order, because espeak-ng keeps state from word to word. The same list
    always gives the same samples.

    Args:
        words: the words in order.
        progress: called with 1 after each word.

    Returns:
        One (samples,) float32 array per word at 16 kHz.

    Raises:
        ValueError: a voice does not exist, or a word is silent.
        RuntimeError: the child process failed; the message includes its output.
    """
    command = [sys.executable, str(_CHILD)]
    # Messages go to a file: an unread pipe could fill up and block the child.
    with (
        tempfile.TemporaryFile() as messages,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages) as child,
    ):
        try:
            _send(child, words)
            return _read_words(cast(BinaryIO, child.stdout), words, progress)
        except (EOFError, BrokenPipeError) as error:
            child.wait()
            messages.seek(0)
            text = messages.read().decode(errors="replace").strip() or "no message"
            raise RuntimeError(
                f"espeak-ng must speak {len(words)} words, but its process ended with status {child.returncode}: {text}"
            ) from error


def _send(child: subprocess.Popen[bytes], words: Sequence[SpokenWord]) -> None:
    stream = cast(BinaryIO, child.stdin)
    stream.write(json.dumps(words).encode())
    stream.close()


def _read_words(
    stream: BinaryIO, words: Sequence[SpokenWord], progress: Callable[[int], object] | None
) -> list[np.ndarray]:
    """Read the child's samples; convert each word on arrival."""
    sample_rate = _read_int(stream)
    if sample_rate != _ESPEAK_RATE_HZ:
        raise RuntimeError(f"espeak-ng must sample at {_ESPEAK_RATE_HZ} Hz, got {sample_rate}")
    spoken = []
    for word in words:
        count = _read_int(stream)
        if count < 0:
            raise ValueError(f"voice must be one of espeak-ng's, got {word.voice!r}")
        spoken.append(_cleaned(np.frombuffer(_read_bytes(stream, 2 * count), "<i2"), word))
        if progress:
            progress(1)
    return spoken


def _read_int(stream: BinaryIO) -> int:
    return int.from_bytes(_read_bytes(stream, 4), "little", signed=True)


def _read_bytes(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise EOFError
    return data


def _cleaned(samples: np.ndarray, word: SpokenWord) -> np.ndarray:
    """Cut the silence at both ends, resample to 16 kHz, scale to root mean square 1."""
    # The import is slow, and not needed if the clips are cached.
    from scipy.signal import resample_poly

    loud = np.flatnonzero(np.abs(samples.astype(np.int32)) > 200)
    if len(loud) == 0:
        raise ValueError(f"text must make a sound, got silence for {word.text!r} with voice {word.voice!r}")
    trimmed = samples[loud[0] : loud[-1] + 1].astype(np.float32)
    resampled = resample_poly(trimmed, 320, 441).astype(np.float32)
    return resampled / np.sqrt(np.mean(resampled**2))
