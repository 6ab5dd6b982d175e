"""Pictures, texts and spoken names of Tux Paint's stamps, from Debian's package to a search page.

`apt-get install tuxpaint-stamps-default`, then `python examples/stamps.py stamps`; about ten minutes on two cores.
"""

import argparse
import csv
import hashlib
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from unicode_fast import Modality, media
from unicode_fast.media.efficientnet_lite import EfficientNetLite0

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path, help="a new folder for films, features, run and page")
parser.add_argument("--stamps", type=Path, default=Path("/usr/share/tuxpaint/stamps"), help="Debian's folder")
parser.add_argument("--language", default="fr", help="of the spoken names; most stamps have fr, ru, ro, ca, bg and es")
parser.add_argument("--steps", type=int, default=400)
parser.add_argument("--queries", nargs="*", default=["a dog", "a red flower", "a fire truck"])
arguments = parser.parse_args()
videos, store, run, page = (arguments.folder / name for name in ("videos", "store", "run", "codebook.html"))

# Side of a film, frames per second, samples per second, and seconds of a stamp without a spoken name.
SIDE, FRAMES, SAMPLES, SILENT_S = 256, 2, 16000, 2.0


def picture(file: Path) -> np.ndarray:
    """(SIDE, SIDE, 3) uint8: the whole stamp on white."""
    with av.open(str(file)) as opened:
        frame = next(opened.decode(video=0))
    scale = SIDE / max(frame.width, frame.height)
    width, height = (max(1, round(side * scale)) for side in (frame.width, frame.height))
    pixels = frame.to_ndarray(format="rgba", width=width, height=height).astype(np.float32)
    opacity = pixels[..., 3:] / 255
    white = np.full((SIDE, SIDE, 3), 255, np.uint8)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    white[top : top + height, left : left + width] = pixels[..., :3] * opacity + 255 * (1 - opacity)
    return white


def write_film(file: Path, shown: np.ndarray | None, sound: np.ndarray | None) -> None:
    """The picture for as long as the sound; either may be missing."""
    seconds = SILENT_S if sound is None else len(sound) / SAMPLES
    with av.open(str(file), "w") as film:
        streams = []
        if shown is not None:
            video = film.add_stream("h264", rate=FRAMES, width=SIDE, height=SIDE, pix_fmt="yuv420p")
            count = max(1, round(seconds * FRAMES))
            streams.append((video, [av.VideoFrame.from_ndarray(shown, "rgb24") for _ in range(count)]))
        if sound is not None:
            spoken = av.AudioFrame.from_ndarray(sound[None], "fltp", layout="mono")
            spoken.sample_rate, spoken.pts, spoken.time_base = SAMPLES, 0, Fraction(1, SAMPLES)
            streams.append((film.add_stream("aac", rate=SAMPLES, layout="mono"), [spoken]))
        for stream, frames in streams:
            for frame in [*frames, None]:
                film.mux(stream.encode(frame))


def split_of(text: str) -> str:
    """Stamps of the same text are in the same split, so test has no name that was heard in training."""
    share = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32
    return "train" if share < 0.7 else "val" if share < 0.8 else "test"


class WholePicture(EfficientNetLite0):
    """The mean of EfficientNet's grid: a stamp shows one thing, and training on vectors is many times faster."""

    name = "whole-picture"
    modality = Modality("vector", (1280,))

    def __call__(self, given: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) frames to (N, 1280)."""
        return super().__call__(given).mean((1, 2))


# One film a stamp. PyAV reads no SVG, so a stamp with such a picture alone is heard and read, not seen.
rows = []
ending = "" if arguments.language == "en" else f"_{arguments.language}"
for text in sorted(arguments.stamps.rglob("*.txt")):
    caption = text.read_text(errors="replace").split("\n")[0].strip()
    shown, spoken = text.with_suffix(".png"), text.with_name(f"{text.stem}_desc{ending}.ogg")
    if not shown.exists() and not spoken.exists():
        continue
    sound = None
    if spoken.exists():
        with media.MediaFile(spoken) as opened:
            sound = opened.sound(SAMPLES).samples
    place = text.relative_to(arguments.stamps).with_suffix(".mp4")
    (videos / place).parent.mkdir(parents=True, exist_ok=True)
    write_film(videos / place, picture(shown) if shown.exists() else None, sound)
    rows.append([place.as_posix(), split_of(caption), place.parts[0], caption])
if not rows:
    parser.error(f"--stamps must be a folder with stamps, got {str(arguments.stamps)!r}")
with open(videos / "captions.csv", "w", newline="") as table:
    csv.writer(table).writerows([["file", "split", "class", "caption"], *rows])
print(f"{len(rows)} stamps in {videos}", flush=True)


def command(name: str, *words: object) -> None:
    """Run `python -m unicode_fast.NAME` and stop where it fails."""
    subprocess.run([sys.executable, "-m", f"unicode_fast.{name}", *map(str, words)], check=True)


media.register(WholePicture.name, WholePicture)
backbones = {
    "audio": media.make("log-mel", "sound"),
    "video": media.make(WholePicture.name, "frames"),
    "text": media.make("wordllama", "caption"),
}
done = media.extract(videos, store, captions=videos / "captions.csv", backbones=backbones)
print("\n".join(done.lines()), flush=True)
batch = min(80, sum(split == "train" for _, split, *_ in rows))
sizes = ("--steps", arguments.steps, "--batch_size", batch, "--warmup_steps", arguments.steps // 10)
command("train", "--data", store, "--out", run, "--probe_tasks", "classification", *sizes)
for source, target in (("text", "video"), ("audio", "video"), ("audio", "text")):
    command("evaluate", run, "--task", "retrieval", "--from", source, "--to", target)
command("inspect", run, "--data", store, "--media", videos, "--out", page)
for query in arguments.queries:
    command("search", run, "--data", store, "--query", query, "--in", "video", "--top", 5)
