"""Codes of media files, by the backbones that computed the features of a model's training data."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Collection, Mapping

import numpy as np
import torch

from unicode_fast.media.backbones import Backbone
from unicode_fast.media.features import Preprocessor, features
from unicode_fast.modules.model import Encoded, EncodedClip, UniCode


def encode_file(  # noqa: PLR0913 - a file, its part, its words and its modalities
    model: UniCode,
    file: str | os.PathLike[str],
    caption: str | None = None,
    names: Collection[str] | None = None,
    *,
    start_s: float = 0.0,
    end_s: float | None = None,
) -> list[EncodedClip]:
    """Codes of a media file, or of a part of it, in some modalities; see `UniCode.encode_file`."""
    clips = features(file, backbones_of(model, names), caption=caption, start_s=start_s, end_s=end_s)
    return [EncodedClip(clip.start_s, encode_features(model, clip.features)) for clip in clips]


def encode_features(model: UniCode, given: Mapping[str, np.ndarray]) -> dict[str, Encoded]:
    """Codes of one clip's features, (T, ...) by modality."""
    return {
        name: model.encode_clip(name, torch.from_numpy(np.array(values)).to(model.device, model.dtype))
        for name, values in given.items()
    }


def backbones_of(model: UniCode, names: Collection[str] | None = None) -> dict[str, Backbone]:
    """The backbones of a model's modalities, each made once.

    Args:
        model: has a preprocessor.
        names: some of its modalities; None for all.

    Raises:
        ValueError: the model has no preprocessor, or a backbone differs from that of the training.
        MissingPackageError: a package is not installed.
    """
    if model.preprocessor is None:
        raise ValueError(
            "model must be trained on features of `extract` to encode media files, got one without a preprocessor"
        )
    described = Preprocessor.from_dict(model.preprocessor).backbones
    chosen = model.names if names is None else names
    return {name: _made(name, json.dumps(one)) for name, one in described.items() if name in chosen}


# Those of a few models; a backbone can be large.
@functools.lru_cache(maxsize=8)
def _made(name: str, described: str) -> Backbone:
    return Preprocessor({name: json.loads(described)}).make()[name]
