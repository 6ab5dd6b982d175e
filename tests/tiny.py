"""A model, a batch, a store and a voice small enough for tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from unicode_fast import Config, Modality, UniCode, preset
from unicode_fast.data import write_store
from unicode_fast.data.talking_digits import digits, sound
from unicode_fast.methods import make_model
from unicode_fast.training.trainer import Trainer

MODALITIES = {
    "audio": Modality("vector", (6,)),
    "video": Modality("grid", (5, 5, 4)),
    "text": Modality("words", (8,)),
    "depth": Modality("vector", (3,)),
}
SIZES = {
    "width": 16,
    "codewords": 12,
    "vector_specific_width": 8,
    "word_width": 8,
    "grid_hidden_width": 4,
    "grid_specific_width": 6,
    "grid_club_width": 4,
    "grid_semantic_width": 12,
    "squeeze_width": 2,
    "temporal_layers": 1,
    "temporal_heads": 2,
    "feedforward_width": 16,
    "club_hidden_width": 8,
}


def config(name: str = "recommended", *, method: str = "uni-code", dcid: bool = False, **fields: object) -> Config:
    return preset(name, method=method, dcid=dcid).replace_all(**{**SIZES, **fields})


def model(name: str = "recommended", names: str = "audio,video,text", seed: int = 0, **fields: object) -> UniCode:
    torch.manual_seed(seed)
    return make_model({key: MODALITIES[key] for key in names.split(",")}, config(name, **fields))


def trainer(
    name: str = "recommended", names: str = "audio,video,text", device: str = "cpu", **fields: object
) -> Trainer:
    return Trainer(config(name, **fields), {key: MODALITIES[key] for key in names.split(",")}, torch.device(device))


def batch(
    owner: UniCode, clips: int = 6, positions: int = 5, lengths: dict[str, int] | None = None, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random features in the model's dtype; `lengths` gives single modalities another number of positions."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(
            clips, (lengths or {}).get(name, positions), *kind.shape, generator=generator, dtype=torch.float64
        ).to(owner.dtype)
        for name, kind in owner.modalities.items()
    }


def mask_of(lengths: list[int], positions: int) -> torch.Tensor:
    return torch.arange(positions) < torch.tensor(lengths)[:, None]


def learnable_splits(clips: dict[str, int], names: str = "audio,video,text", positions: int = 5, seed: int = 0) -> dict:
    """Arrays of a store whose modalities show the same class, each in its own way, in noise."""
    generator = np.random.default_rng(seed)
    prototypes = {name: generator.normal(size=(3, *MODALITIES[name].shape)) for name in names.split(",")}
    splits = {}
    for split, count in clips.items():
        target = generator.integers(3, size=count)
        arrays = {
            name: (
                2 * shown[target][:, None] + generator.normal(size=(count, positions, *shown.shape[1:])) * 0.5
            ).astype(np.float32)
            for name, shown in prototypes.items()
        }
        label = np.zeros((count, positions, 4), np.float32)
        label[np.arange(count), :, target] = 1
        arrays.update({f"{name}.label": label for name in names.split(",") if name != "text"})
        splits[split] = {**arrays, "class": target.astype(np.int64)}
    return splits


def write(path: Path, clips: dict[str, int] | None = None, names: str = "audio,video,text", **options: int) -> Path:
    """A store of `learnable_splits` on the disk."""
    splits = learnable_splits(clips or {"train": 60, "val": 24, "test": 24}, names, **options)
    write_store(path, "tiny", {key: MODALITIES[key] for key in names.split(",")}, ["zero", "one", "two"], splits)
    return path


@contextmanager
def quick_speech() -> Iterator[pytest.MonkeyPatch]:
    """Fewer voices, one recording of each word, few clips for the standardisation: synthesis takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sound, "_VARIANTS", 1)
        patch.setattr(sound, "_ENGLISH", sound._ENGLISH[::3])
        patch.setattr(sound, "_FRENCH", sound._FRENCH[::2])
        patch.setattr(digits, "_CALIBRATION_CLIPS", 20)
        yield patch
