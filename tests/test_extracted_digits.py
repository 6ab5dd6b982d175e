"""The built-in talking digits written as mp4 files, and extracted again with their own features."""

from __future__ import annotations

import json
from pathlib import Path

import media_files
import numpy as np
import pytest

from unicode_fast import Modality, load, media
from unicode_fast.data import Dataset, Store, open_store, write_store
from unicode_fast.data.talking_digits import digits, handwriting, sentences, sound
from unicode_fast.data.talking_digits.clips import Recipe, plan_clips
from unicode_fast.data.talking_digits.spectrogram import log_mel_statistics
from unicode_fast.tasks import encode_split
from unicode_fast.train import main as train

pytestmark = pytest.mark.slow

CLIPS = {"train": 700, "val": 100, "test": 200}
# A pixel of a picture is a square of this side in the film.
ENLARGED = 8
FRAMES_PER_SECOND = 10
# Of the sound in the film, so that the loudest second is not cut off.
GAIN = 1 / 16


def write_films(store: Store, folder: Path) -> None:
    """Writes the clips of the data set as films, in a folder for each split, and captions.csv."""
    recipe = Recipe("talking-digits", 0, False, dict(CLIPS))
    voices = sound.voices_of(recipe, sound.digit_vocabulary("en"))
    rows = ["file,split,class,caption"]
    for split in CLIPS:
        plan = plan_clips(recipe, split, voices.of_split(split))
        frames, _ = plan.frames(recipe.generator(split, "frames"))
        samples = sound.render_audio(
            plan.heard, plan.voice, voices, recipe.generator(split, "sound"), in_16_bits, lambda _: None
        )
        clips = store.split(split)
        for number, (pictures, seconds) in enumerate(zip(frames, samples, strict=True)):
            (folder / split).mkdir(parents=True, exist_ok=True)
            large = pictures.repeat(ENLARGED, 1).repeat(ENLARGED, 2).repeat(FRAMES_PER_SECOND, 0)
            media_files.write_media(
                folder / split / f"{clips.id[number]}.mp4",
                np.repeat(large[..., None], 3, 3),
                fps=FRAMES_PER_SECOND,
                sound=seconds.ravel().astype(np.float32) / 32767,
                rate_hz=16000,
                quality={"crf": "12", "preset": "veryfast"},
            )
            name, caption = clips.classes[clips.target[number]], clips.arrays["text.sentence"][number]
            rows.append(f"{split}/{clips.id[number]}.mp4,{split},{name},{caption}")
    (folder / "captions.csv").write_text("\n".join(rows))


def in_16_bits(seconds: np.ndarray) -> np.ndarray:
    return np.round(seconds * GAIN * 32767).astype(np.int16)


class DigitSound:
    """The sound features of the built-in data.

    Args:
        mean: of each band, a list.
        deviation: of each band, a list.
    """

    name = "digit-sound"
    reads = "sound"
    modality = Modality("vector", (128,))
    rate = 16000

    def __init__(self, mean: list[float], deviation: list[float]) -> None:
        self.options = {"mean": mean, "deviation": deviation}

    def __call__(self, given: np.ndarray) -> np.ndarray:
        found = log_mel_statistics(given / np.float32(GAIN))
        return (found - np.asarray(self.options["mean"], np.float32)) / np.asarray(
            self.options["deviation"], np.float32
        )


class DigitPixels:
    """Windows of pixels, as the video features of the built-in data.

    Args:
        mean: of all pixels.
        deviation: of all pixels.
    """

    name = "digit-pixels"
    reads = "frames"
    modality = digits.MODALITIES["video"]
    rate = 1

    def __init__(self, mean: float, deviation: float) -> None:
        self.options = {"mean": mean, "deviation": deviation}

    def __call__(self, given: np.ndarray) -> np.ndarray:
        side = handwriting.FRAME_SIDE
        squares = given.reshape(len(given), side, ENLARGED, side, ENLARGED, 3).mean((2, 4, 5))
        pixels = np.round(squares).astype(np.uint8)
        return (handwriting.windows(pixels) - np.float32(self.options["mean"])) / np.float32(self.options["deviation"])


class DigitWords:
    """The word vectors of the built-in data.

    Args:
        deviation: of all values.
    """

    name = "digit-words"
    reads = "caption"
    modality = digits.MODALITIES["text"]
    rate = 0

    def __init__(self, deviation: float) -> None:
        self.options = {"deviation": deviation}

    def __call__(self, given: str) -> np.ndarray:
        vectors = np.stack([sentences.word_vector(word) for word in given.split()])
        return vectors / np.float32(self.options["deviation"])


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Dataset]:
    """The features of the data set, and those of its films."""
    folder = tmp_path_factory.mktemp("digits")
    made = digits.load(cache=folder / "cache", clips=CLIPS, progress=False)
    write_films(made, folder / "films")
    for backbone in (DigitSound, DigitPixels, DigitWords):
        media.register(backbone.name, backbone)
    standard = made.extra["standardisation"]
    backbones = {
        "audio": media.make("digit-sound", "sound", **standard["audio"]),
        "video": media.make("digit-pixels", "frames", **standard["video"]),
        "text": media.make("digit-words", "caption", deviation=standard["text"]["deviation"]),
    }
    films = folder / "films"
    media.extract(films, folder / "extracted", captions=films / "captions.csv", backbones=backbones, progress=False)
    keys = ("audio", "video", "text", "text.length", "class", "id")
    splits = {split: {key: np.asarray(made.split(split).arrays[key]) for key in keys} for split in CLIPS}
    write_store(folder / "direct", "direct", made.modalities, made.classes, splits)
    return {name: open_store(folder / name) for name in ("direct", "extracted")}


def test_films_have_the_features_of_their_clips(stores: dict[str, Dataset]) -> None:
    for split, count in CLIPS.items():
        direct, found = stores["direct"].split(split), stores["extracted"].split(split)
        assert list(found.id) == [f"{split}/{one}.mp4" for one in direct.id]
        for name in ("class", "text", "text.length"):
            assert np.array_equal(direct.arrays[name], found.arrays[name])
        for name in ("audio", "video"):
            pairs = (np.asarray(clips.arrays[name], np.float64).reshape(count * 10, -1) for clips in (direct, found))
            by_step = [np.corrcoef(ours, theirs)[0, 1] for ours, theirs in zip(*pairs, strict=True)]
            assert min(by_step) >= 0.98


@pytest.fixture(scope="module")
def runs(stores: dict[str, Dataset], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two seeds trained on the features of each store, with its name."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ["--steps=500", "--seeds=2", "--probe_tasks=classification", "--device=cpu"]
    for name in stores:
        assert train([f"--data={stores[name].path}", f"--out={folder / name}", *flags]) == 0
    return {name: folder / name for name in stores}


def test_films_train_like_their_clips(runs: dict[str, Path]) -> None:
    found = {name: json.loads((run / "summary.json").read_text())["rows"] for name, run in runs.items()}
    means = {name: np.mean([row["score"] for row in rows]) for name, rows in found.items()}
    assert abs(means["direct"] - means["extracted"]) <= 0.03, means
    assert len(found["extracted"]) == 6
    assert all(row["score"] > 2 * row["chance"] for row in found["extracted"])


def test_clips_have_the_codes_of_their_films(stores: dict[str, Dataset], runs: dict[str, Path]) -> None:
    model = load(runs["extracted"] / "seed-0")
    for name in model.names:
        codes = [encode_split(model, store.split("test"), name) for store in stores.values()]
        same = codes[0].index == codes[1].index
        assert float(same[codes[0].mask].float().mean()) >= 0.95
