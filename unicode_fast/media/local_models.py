"""Backbones from a local folder with a model that transformers reads; nothing is downloaded, no code of it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unicode_fast.config import SMALLEST_GRID, Modality
from unicode_fast.data.text import WordVectors, check_folder
from unicode_fast.files.optional import need
from unicode_fast.media import networks
from unicode_fast.media.backbones import Backbone, Reads

# Kinds of models whose last states are patches of a picture, or places in a spectrogram or a sound.
_VISION = (
    "vit", "beit", "clip", "clip_vision_model", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "siglip",
    "siglip_vision_model",
)  # fmt: skip
_SOUND = ("audio-spectrogram-transformer", "clap", "clap_audio_model", "hubert", "wav2vec2", "wavlm")


def local_model(folder: str, reads: Reads, rate: int = 1) -> Backbone:
    """The backbone of a folder.

    Args:
        folder: with config.json, weights, and the preprocessor or tokeniser.
        reads: "frames" for vision transformers, "sound" for audio models, "caption" for BERT and its variants.
        rate: frames per second; only of models that read frames.

    Raises:
        ValueError: transformers cannot load it, or its features have no such form.
        MissingPackageError: transformers is not installed.
    """
    if reads == "caption":
        return LocalText(folder)
    return LocalVision(folder, rate) if reads == "frames" else LocalSound(folder)


class _LocalModel:
    """Model and preprocessor of a folder.

    Attributes:
        weights_sha256: of its files of weights, in the order of their names.
    """

    def __init__(self, folder: str, part: str, processor: str, types: tuple[str, ...]) -> None:
        transformers = need("transformers", "text")
        self.name = str(Path(folder).absolute())
        weights = sorted(Path(folder).glob("*.safetensors"))
        if not weights:
            raise ValueError(f"backbone must be a folder with weights as .safetensors, got {folder!r}")
        self.weights_sha256 = ",".join(map(networks.sha256_of, weights))
        given: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            check_folder(Path(folder), types, f"a model of {part.split('_')[0]}, such as {types[0]}")
            model = transformers.AutoModel.from_pretrained(folder, **given, use_safetensors=True)
            self.processor = getattr(transformers, processor).from_pretrained(folder, **given)
        # Damaged files can raise any exception.
        except Exception as error:
            why = [*str(error).strip().splitlines(), type(error).__name__][0]
            raise ValueError(f"backbone must be a model that transformers can load, got {folder!r}: {why}") from error
        # Of a model with two towers, such as CLIP and CLAP, only one is read.
        self.model = getattr(model, part, model).eval()
        self.options: dict[str, Any] = {}

    def _states(self, **given: Tensor) -> Tensor:
        states: Tensor = self.model(**given).last_hidden_state
        return states


class LocalVision(_LocalModel):
    """Patch tokens of a vision transformer as a grid; class and register tokens, which come first, are left out."""

    reads: Reads = "frames"

    def __init__(self, folder: str, rate: int = 1) -> None:
        super().__init__(folder, "vision_model", "AutoImageProcessor", _VISION)
        if type(rate) is not int or rate < 1:
            raise ValueError(f"rate must be a whole number of frames of at least 1, got {rate!r}")
        self.rate = rate
        self.options = {} if rate == 1 else {"rate": rate}
        shape = self(np.zeros((1, 32, 32, 3), np.uint8)).shape[1:]
        if shape[0] < SMALLEST_GRID:
            raise ValueError(
                f"backbone must give at least {SMALLEST_GRID} x {SMALLEST_GRID} patches, got {shape[0]} x {shape[1]}"
            )
        self.modality = Modality("grid", shape)

    def __call__(self, given: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) frames to (N, side, side, C)."""
        pixels = self.processor(images=list(given), return_tensors="pt")["pixel_values"]
        tokens = networks.run(lambda batch: self._states(pixel_values=batch), pixels)  # (N, tokens, C)
        patch = self.model.config.patch_size
        height, width = (size // patch for size in pixels.shape[-2:])
        return tokens[:, -height * width :].reshape(len(tokens), height, width, -1)


class LocalSound(_LocalModel):
    """The mean over each second of the last states of an audio model."""

    reads: Reads = "sound"

    def __init__(self, folder: str) -> None:
        super().__init__(folder, "audio_model", "AutoFeatureExtractor", _SOUND)
        self.rate = int(self.processor.sampling_rate)
        self.modality = Modality("vector", self(np.zeros((1, self.rate), np.float32)).shape[1:])

    def __call__(self, given: np.ndarray) -> np.ndarray:
        """(N, rate) samples to (N, C)."""
        read = self.processor(list(given), sampling_rate=self.rate, return_tensors="pt")
        key = self.processor.model_input_names[0]
        return networks.run(lambda batch: self._mean(key, batch), read[key])

    def _mean(self, key: str, batch: Tensor) -> Tensor:
        # Models that join parts of long sounds ask which ones are long; a second is not.
        fused = getattr(self.model.config, "enable_fusion", False)
        short = {"is_longer": torch.zeros(len(batch), 1, dtype=torch.bool)} if fused else {}
        states = self._states(**{key: batch}, **short)
        return states.flatten(2).mean(2) if states.dim() == 4 else states.mean(1)


class LocalText:
    """Word vectors of a BERT, as the layouts with sentences read them."""

    reads: Reads = "caption"
    rate = 0

    def __init__(self, folder: str) -> None:
        self.name = str(Path(folder).absolute())
        self.vectors = WordVectors(folder)
        weights = sorted([*Path(folder).glob("*.safetensors"), *Path(folder).glob("*.bin")])
        self.weights_sha256 = ",".join(map(networks.sha256_of, weights))
        self.modality = Modality("words", self.vectors.vectors("a").shape[1:])

    def words(self, caption: str) -> list[int]:
        """Vocabulary ids of the words of a caption, -1 for a word of several tokens; the first ten have vectors."""
        return self.vectors.ids(caption).tolist() if caption.strip() else []

    def __call__(self, given: str) -> np.ndarray:
        """A caption to (words, C); none without words."""
        return self.vectors.vectors(given) if given.strip() else np.zeros((0, *self.modality.shape), np.float32)
