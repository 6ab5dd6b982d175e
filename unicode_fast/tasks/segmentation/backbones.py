"""Pyramids of picture features: a light backbone, and those of timm with weights from a file."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from unicode_fast.files.checked_torch import read_torch
from unicode_fast.files.tensor_files import read_foreign_tensors
from unicode_fast.files.untrusted import BadFile

LIGHT = "light"


@dataclass(frozen=True)
class PyramidSettings:
    """Sizes and training rule of a segmenter.

    Attributes:
        width: channels of every stage in the head.
        dilations: of the convolutions that reduce a stage to this width.
        batch_size: clips per step.
        learning_rate: of Adam, per step.
        epochs: passes over the training clips, used where `steps` is 0.
        steps: of training; 0 uses `epochs`.
        decay: True lowers the learning rate to zero along half a cosine; False keeps it constant.
        query_share: initial scale of a query's contribution to the maps; AVSBench starts from 0.
        dilated_deviation: of the initial weights of the dilated convolutions; None for torch's own.
    """

    width: int
    dilations: tuple[int, ...]
    batch_size: int
    learning_rate: float
    epochs: int = 0
    steps: int = 0
    decay: bool = False
    query_share: float = 0.0
    dilated_deviation: float | None = None


# The light settings suit pictures of about sixteen pixels and minutes on two cores; the others are AVSBench's.
LIGHT_SETTINGS = PyramidSettings(24, (1, 2), 12, 3e-3, steps=600, decay=True, query_share=1.0)
TIMM_SETTINGS = PyramidSettings(256, (3, 6, 12, 18), 4, 1e-4, epochs=15, dilated_deviation=0.01)


@dataclass(frozen=True)
class BackboneChoice:
    """Choice of the pyramid.

    Attributes:
        name: "light", or a model of timm with features of several stages, such as pvt_v2_b5.
        weights: file of pre-trained weights for a model of timm, or folder with one such file; None starts from random
            weights. Nothing is downloaded.
    """

    name: str = LIGHT
    weights: str | None = None
    settings: PyramidSettings = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", LIGHT_SETTINGS if self.name == LIGHT else TIMM_SETTINGS)
        if self.name == LIGHT and self.weights is not None:
            raise ValueError(f"weights are for a backbone of timm, got {self.weights!r} beside 'light'")


class LightPyramid(nn.Module):
    """Three stages of two 3x3 convolutions each, at 1, 1/2 and 1/4 of the picture's sides.

    Args:
        channels: of the pictures.
    """

    widths = (16, 32, 64)
    strides = (1, 2, 4)
    multiple = 4

    def __init__(self, channels: int) -> None:
        super().__init__()
        inputs = (channels, *self.widths)
        self.stages = nn.ModuleList(
            nn.Sequential(
                _convolution(inputs[number], width, stride=1 if number == 0 else 2), _convolution(width, width)
            )
            for number, width in enumerate(self.widths)
        )

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """(N, channels, H, W) to one map per stage, the finest first."""
        maps = []
        for stage in self.stages:
            pictures = stage(pictures)
            maps.append(pictures)
        return maps


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class TimmPyramid(nn.Module):
    """The stages of a model of timm.

    Args:
        name: of the model.
        channels: of the pictures, 3.

    Raises:
        ValueError: the model is unknown or has no stages, or pictures do not have 3 channels.
        ModuleNotFoundError: timm is not installed.
        ImportError: timm or torchvision does not work with this torch.
    """

    def __init__(self, name: str, channels: int) -> None:
        super().__init__()
        timm = _import_timm()
        if channels != 3:
            raise ValueError(f"frames must have 3 channels for the backbone {name!r}, got {channels}")
        check_backbone(name)
        self.model = timm.create_model(name, pretrained=False, features_only=True)
        self.widths = tuple(self.model.feature_info.channels())
        self.strides = tuple(self.model.feature_info.reduction())
        self.multiple = self.strides[-1]

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """(N, 3, H, W) to one map per stage, the finest first."""
        return self.model(pictures)

    def load_weights(self, path: str) -> None:
        """Loads pre-trained weights from a file, which must hold all layers except the classifier's.

        Args:
            path: a .safetensors, .pth, .pt or .bin file, or a folder with exactly one.

        Raises:
            FileNotFoundError: there is no such file, or the folder has none or several.
            ValueError: the file holds other layers, or is damaged.
        """
        from timm.models.pvt_v2 import checkpoint_filter_fn

        file = _weights_file(path)
        state = read_weights(file)
        if "patch_embed1.proj.weight" in state:
            # Names of the PVT v2 release.
            state = checkpoint_filter_fn(state, self.model)
        # timm's stages are a list in the whole model and separate modules in its pyramid.
        state = {name.replace("stages.", "stages_"): value for name, value in state.items()}
        fill(self.model, state, file)


def fill(model: nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    """Loads the layers of a model from the tensors of a file.

    Raises:
        ValueError: the file lacks a layer, or has it in another shape.
    """
    own = model.state_dict()
    unfit = [name for name in own if name not in state or own[name].shape != state[name].shape]
    if unfit:
        raise ValueError(f"weights must hold every layer of the backbone, {str(file)!r} has no fitting {unfit[0]!r}")
    model.load_state_dict({name: state[name] for name in own})


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of torch weights, by name.

    Args:
        file: .safetensors, or of torch.save: a dictionary of tensors, or one under "state_dict" or "model".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds other values than tensors.
    """
    try:
        content = read_foreign_tensors(file) if file.suffix == ".safetensors" else read_torch(file)
        kept = [content[key] for key in ("state_dict", "model") if key in content] if type(content) is dict else []
        state = kept[0] if kept else content
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise BadFile("it holds other values than tensors")
    except BadFile as error:
        raise ValueError(f"weights must be a whole file of tensors, {str(file)!r} is not: {error}") from error
    # Wrappers of several devices and torch.compile add these prefixes.
    return {str(name).removeprefix("module.").removeprefix("_orig_mod."): value for name, value in state.items()}


def check_backbone(name: str) -> None:
    """Raises ValueError if timm has no model of this name; without timm nothing is checked."""
    with contextlib.suppress(ImportError):
        if name != LIGHT and not _import_timm().is_model(name):
            raise ValueError(f"backbone must be {LIGHT!r} or the name of a model of timm, got {name!r}")


def _import_timm() -> ModuleType:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"a backbone of timm needs the extra 'segmentation' ({error}), and pip must keep torch: "
            f"pip install 'unicode_fast[segmentation]' torch=={version('torch')}"
        ) from error
    except RuntimeError as error:
        # torchvision built for another torch fails on import with a RuntimeError.
        raise ImportError(
            f"timm needs a torchvision that was built for torch {torch.__version__}, of the same index: {error}"
        ) from error
    return timm


def _weights_file(path: str) -> Path:
    given = Path(path)
    if given.is_file():
        return given
    found = sorted(file for file in given.glob("*") if file.suffix in (".safetensors", ".pth", ".bin", ".pt"))
    if len(found) != 1:
        raise FileNotFoundError(
            f"backbone weights must be a file, or a folder with one .safetensors, .pth, .pt or .bin file, got {path!r}"
            + (f" with {len(found)}" if found else "")
        )
    return found[0]


def make_pyramid(name: str, channels: int) -> LightPyramid | TimmPyramid:
    """The pyramid of this name, random weights.

    Args:
        name: "light" or a model of timm.
        channels: of the pictures.
    """
    return LightPyramid(channels) if name == LIGHT else TimmPyramid(name, channels)
