"""Published recipes of features: the backbones of each modality, from files of weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from unicode_fast.files.paths import expanded
from unicode_fast.media.backbones import Backbone, make

# File or folder by network.
Weights: TypeAlias = Mapping[str, str | os.PathLike[str]]


def _ave(weights: Weights, frames_per_step: int) -> dict[str, Backbone]:
    """VGG19 and VGGish, and word vectors of a BERT where its folder is given."""
    made = {
        "audio": make("vggish", "sound", weights=weights["vggish"]),
        "video": make("vgg19", "frames", weights=weights["vgg19"], frames_per_step=frames_per_step),
    }
    return {**made, "text": make(os.fspath(weights["bert"]), "caption")} if "bert" in weights else made


# The recipe, the weights that it needs, and those that it can have.
RECIPES: dict[str, tuple[Callable[[Weights, int], dict[str, Backbone]], list[str], list[str]]] = {
    "ave": (_ave, ["vgg19", "vggish"], ["bert"]),
}


def recipe(name: str, weights: Weights, frames_per_step: int = 16) -> dict[str, Backbone]:
    """The backbones of a recipe by modality.

    Args:
        name: "ave", the features of AVE, with which those of Cross Modal Generalization are consistent.
        weights: file by network: vgg19 and vggish, and bert, a folder, for captions.
        frames_per_step: frames of a second whose features are averaged; 16 in one of AVE's scripts, 8 in another.

    Raises:
        ValueError: the recipe or a network is unknown, or a file is missing from `weights`, or is another one.
        FileNotFoundError: a file does not exist.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    build, needed, possible = RECIPES[name]
    known = [*needed, *possible]
    unknown = [network for network in weights if network not in known]
    if unknown:
        raise ValueError(f"weights must be of {', '.join(known)} for recipe {name!r}, got {unknown[0]!r}")
    lacking = [network for network in needed if network not in weights]
    if lacking:
        raise ValueError(f"weights must be given for {', '.join(needed)} by recipe {name!r}, {lacking[0]} is missing")
    for network, file in weights.items():
        if not Path(file).exists():
            raise FileNotFoundError(f"weights of {network} must exist, got {os.fspath(file)!r}")
    return build(weights, frames_per_step)


def parsed_weights(text: str) -> dict[str, str]:
    """Files by network, from vgg19=FILE,vggish=FILE.

    Raises:
        ValueError: an entry has no name or no file, or a name occurs twice.
    """
    found: dict[str, str] = {}
    for entry in text.split(","):
        network, equals, file = entry.partition("=")
        if not (network and equals and file) or network in found:
            raise ValueError(f"weights must be NAME=FILE, separated by commas, each name once, got {text!r}")
        found[network] = expanded(file)
    return found
