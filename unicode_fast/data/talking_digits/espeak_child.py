"""The child process that loads espeak-ng: words on standard input, samples on standard output.

espeak-ng is licensed under GPL-3, so only this script loads its shared library; `speech.py` runs the script. It imports
nothing of the package, and ends after the last word.

Input: one JSON list of [text, voice, rate, pitch]. Output: the sample rate, then for each word its number of samples
(-1: no such voice) and the samples. Samples are int16, other numbers int32, all little-endian.
"""

import ctypes
import json
import os
import struct
import sys
from collections.abc import Iterator

SYNCHRONOUS = 2
RATE, PITCH = 1, 3
UTF8 = 1
SEED = 1


def _load_library() -> tuple[ctypes.CDLL, int]:
    """The initialised library and its sample rate in Hz."""
    try:
        import espeakng_loader
    except ImportError:
        sys.exit("espeakng-loader is not installed: pip install espeakng-loader")
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    sample_rate = library.espeak_Initialize(SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 1 << 15)
    if sample_rate <= 0:
        raise RuntimeError(f"espeak_Initialize must return a sample rate, got {sample_rate}")
    return library, sample_rate


def _spoken(library: ctypes.CDLL, words: list[tuple[str, str, int, int]]) -> Iterator[bytes | None]:
    """The int16 samples of each word as bytes, or None if the voice does not exist."""
    chunks: list[bytes] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
    def collect(samples: int | None, count: int, events: int | None) -> int:
        if samples and count > 0:
            chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    library.espeak_SetSynthCallback(collect)
    for text, voice, rate, pitch in words:
        chunks.clear()
        if library.espeak_SetVoiceByName(voice.encode()) != 0:
            yield None
            continue
        # Breathy voices use random noise, which the library seeds with the time of day.
        library.espeak_ng_SetRandSeed(ctypes.c_long(SEED))
        library.espeak_SetParameter(RATE, rate, 0)
        library.espeak_SetParameter(PITCH, pitch, 0)
        data = text.encode() + b"\0"
        status = library.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, 0, 0, UTF8, None, None)
        if status != 0:
            raise RuntimeError(f"espeak_Synth must return 0, got {status} for {text!r}")
        yield b"".join(chunks)


def main() -> None:
    """Read the words, synthesise them, and write the samples."""
    # The library may write to file descriptor 1: redirect it to standard error, and use the pipe for samples only.
    with os.fdopen(os.dup(1), "wb") as output:
        os.dup2(2, 1)
        words = json.loads(sys.stdin.buffer.read())
        library, sample_rate = _load_library()
        output.write(struct.pack("<i", sample_rate))
        for samples in _spoken(library, words):
            output.write(struct.pack("<i", -1 if samples is None else len(samples) // 2))
            output.write(samples or b"")


if __name__ == "__main__":
    main()
