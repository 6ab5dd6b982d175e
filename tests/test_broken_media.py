"""Files that are cut off, empty, mislabelled or damaged: `extract` names them and writes the others."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import struct
import sys
import time
from pathlib import Path
from subprocess import DEVNULL, Popen

import numpy as np
import pytest
from media_files import CODECS, SIDE, flash_and_beep, write_media

from unicode_fast import Modality, media
from unicode_fast.data import open_store

# Formats whose header tells the duration, also of a file that is cut off.
TOLD = (".mp4", ".mov", ".m4a", ".mkv", ".webm")


class Greys:
    """The mean grey of 8 x 8 parts of a frame."""

    name, reads, modality, rate = "greys", "frames", Modality("grid", (8, 8, 1)), 1

    def __call__(self, given: np.ndarray) -> np.ndarray:
        return given.reshape(len(given), 8, SIDE // 8, 8, SIDE // 8, 3).mean((2, 4, 5), dtype=np.float32)[..., None]


def extracted(folder: Path, store: Path) -> tuple[dict[str, dict[str, int]], dict[str, str]]:
    """Lengths by modality of each clip, and why each of the other files has none."""
    backbones = {"audio": media.make("log-mel", "sound"), "video": Greys()}
    done = media.extract(folder, store, backbones=backbones, workers=1, progress=False)
    data = open_store(store)
    lengths = {
        str(clips.id[row]): {name: int(clips.lengths[name][row]) for name in data.modalities}
        for clips in map(data.split, data.splits)
        for row in range(len(clips))
    }
    return lengths, {one.id: one.reason for one in done.skipped}


def declared(rate_hz: int, size: int) -> bytes:
    """A second of sound whose header declares a rate and a size."""
    header = struct.pack("<IHHIIHH", 16, 1, 1, rate_hz, 2 * rate_hz % 2**32, 2, 16)
    sound = np.zeros(16000, "<i2").tobytes()
    return b"RIFF" + struct.pack("<I", size) + b"WAVEfmt " + header + b"data" + struct.pack("<I", size) + sound


def test_broken_files_are_named_and_others_written(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    frames = np.full((6, SIDE, SIDE, 3), 200, np.uint8)
    whole = flash_and_beep(folder / "whole.mp4", fps=2, seconds=3, at=(1,))
    matroska = flash_and_beep(tmp_path / "film.mkv", fps=2, seconds=8, at=(1,)).read_bytes()
    write_media(folder / "silent.mp4", frames, sound=np.zeros(3 * 48000, np.float32), fps=2)
    write_media(folder / "mute.mp4", frames, fps=2)
    write_media(folder / "one-frame.mp4", frames[:1], fps=2)
    (folder / "named-wrongly.mp4").write_bytes(matroska)
    (folder / "declares-4-GB.wav").write_bytes(declared(16000, 4_000_000_000))
    for name, content in {
        "cut-early.mp4": whole.read_bytes()[:100],
        "cut-late.mp4": whole.read_bytes()[:-1000],
        "cut.mkv": matroska[: len(matroska) // 3],
        "empty.mp4": b"",
        "text.mp4": b"id,split,class\n" * 100,
        "declares-2-GHz.wav": declared(2_000_000_011, 32000),
    }.items():
        (folder / name).write_bytes(content)
    written, skipped = extracted(folder, tmp_path / "store")
    assert written == {
        "whole.mp4": {"audio": 3, "video": 3},
        "silent.mp4": {"audio": 3, "video": 3},
        "mute.mp4": {"audio": 0, "video": 3},
        "one-frame.mp4": {"audio": 0, "video": 1},
        "named-wrongly.mp4": {"audio": 8, "video": 8},
        "declares-4-GB.wav": {"audio": 1, "video": 0},
    }
    assert skipped.pop("empty.mp4") == "must be a media file, got an empty file"
    assert skipped.pop("declares-2-GHz.wav") == "must have 1000 to 384000 samples per second, got 2000000011"
    assert skipped.pop("cut.mkv").startswith("must last 8.0 s, as its header says, its ")
    assert set(skipped) == {"cut-early.mp4", "cut-late.mp4", "text.mp4"}
    assert all(reason.startswith("cannot be opened as a media file: ") for reason in skipped.values())


@pytest.mark.slow
@pytest.mark.parametrize("suffix", CODECS)
def test_each_format_cut_and_damaged(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    content = flash_and_beep(folder / f"whole{suffix}").read_bytes()
    chosen = np.random.default_rng(0)
    for share in (2, 30, 60, 80):
        (folder / f"cut-{share}{suffix}").write_bytes(content[: len(content) * share // 100])
    for trial in range(5):
        damaged = np.frombuffer(content, np.uint8).copy()
        damaged[chosen.integers(len(content), size=20)] = chosen.integers(256, size=20)
        (folder / f"damaged-{trial}{suffix}").write_bytes(damaged.tobytes())
    written, skipped = extracted(folder, tmp_path / "store")
    assert len(written) + len(skipped) == 10
    assert max(written[f"whole{suffix}"].values()) == 10
    cut = [name for name in written if name.startswith("cut")]
    assert not cut if suffix in TOLD else len(cut) == 4
    # What was read of a file in another format are its first seconds.
    assert all(max(written[name].values()) < 10 for name in cut)
    assert not any(reason.startswith("two processes ended") for reason in skipped.values())


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed(tmp_path: Path) -> None:
    """The command with its own backbones, and its workers: the same digest as without an interruption."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(12):
        flash_and_beep(folder / f"{number}.mp4", seconds=3 + number, at=(number % 3,))
    words = [sys.executable, "-m", "unicode_fast.extract", str(folder)]
    begun = time.monotonic()
    assert run([*words, str(tmp_path / "whole")]).wait() == 0
    seconds = time.monotonic() - begun
    chosen, kills = random.Random(0), 0
    for trial in range(4):
        store = tmp_path / f"killed-{trial}"
        for _ in range(20):
            process = run([*words, str(store)])
            time.sleep(chosen.uniform(0, seconds))
            kills += process.poll() is None
            with contextlib.suppress(ProcessLookupError):
                # Either the command alone, whose workers then end by themselves, or all at once.
                (os.kill if chosen.random() < 0.5 else os.killpg)(process.pid, signal.SIGKILL)
            process.wait()
            if store.exists():
                break
        assert open_store(store).digest() == open_store(tmp_path / "whole").digest()
    assert kills >= 4


def run(words: list[str]) -> Popen[bytes]:
    return Popen(words, stdout=DEVNULL, stderr=DEVNULL, start_new_session=True)
