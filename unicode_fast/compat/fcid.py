"""Checkpoints of FCID's pre-training in haihuangcode/CMG: encoders and codebook, read into the `official` preset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch

from unicode_fast.compat import cmg, fcid_names
from unicode_fast.compat.cmg_names import ENCODER, Shape
from unicode_fast.config import Config, Modality
from unicode_fast.methods.fcid import FcidModel
from unicode_fast.modules import UniCode
from unicode_fast.presets import preset


def recognises(content: Mapping[str, Any]) -> bool:
    """Whether the content of a file has the codebook of FCID."""
    encoder = content.get(ENCODER)
    return isinstance(encoder, Mapping) and fcid_names.CODEBOOK in encoder


def model_of(content: Mapping[str, Any], dtype: torch.dtype | None) -> tuple[UniCode, str]:
    """The model, and a message about missing networks; `cmg.from_cmg` describes arguments and errors."""
    cmg.check_keys(content, (ENCODER,), fcid_names.OTHER_KEYS)
    file_dtype = cmg.entry_of(content, ENCODER, fcid_names.CODEBOOK, 2).dtype
    shapes = cmg.model_of_sizes(file_dtype, dtype, lambda: _sizes(content))
    used = fcid_names.used_entries()
    expected = {ENCODER: _expected_shapes(cast(FcidModel, shapes))}
    cmg.check_entries(content, expected, {ENCODER: used}, file_dtype, fcid_names.IDLE, "an FCID checkpoint of CMG")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(shapes.config.train.seed)
        model = FcidModel(shapes.modalities, shapes.config)
        state = model.state_dict()
        for entry, name in used.items():
            state[name].copy_(content[ENCODER][entry])
    return model, "the file has no decoders, Cross-CPC and CLUB networks: these start from random values"


def _sizes(content: Mapping[str, Any]) -> tuple[dict[str, Modality], Config]:
    def size(entry: str, dimensions: int, axis: int) -> int:
        return cmg.entry_of(content, ENCODER, entry, dimensions).shape[axis]

    modalities = {
        "audio": Modality("vector", (size("a_spe_encoder.audio_linear.weight", 2, 1),)),
        "video": Modality("grid", (*cmg.GRID, size("v_spe_encoder.conv_stack.0.weight", 4, 1))),
        "text": Modality("words", (size("t_self_att.affine_matrix.weight", 2, 1),)),
    }
    config = preset("official", "paper", "fcid").replace(
        **{**cmg.ARCHITECTURE, "temporal_layers": fcid_names.TEMPORAL_LAYERS},
        modalities=",".join(fcid_names.MODALITIES),
        codewords=size(fcid_names.CODEBOOK, 2, 0),
        width=size(fcid_names.CODEBOOK, 2, 1),
        vector_specific_width=size("a_spe_encoder.audio_linear.weight", 2, 0),
        feedforward_width=size("a_self_att.encoder.layers.0.linear1.weight", 2, 0),
        grid_hidden_width=size("v_spe_encoder.conv_stack.0.weight", 4, 0),
        grid_specific_width=size("v_spe_encoder.conv_stack.2.weight", 4, 0),
        grid_club_width=size("v_spe_encoder.feed_forward.2.weight", 2, 0),
        squeeze_width=size("v_gen_encoder.se_layer.0.weight", 2, 0),
    )
    return modalities, config


def _expected_shapes(model: FcidModel) -> dict[str, Shape]:
    """All entries of a file of these sizes."""
    state = model.state_dict()
    expected: dict[str, Shape] = {entry: tuple(state[name].shape) for entry, name in fcid_names.used_entries().items()}
    expected[fcid_names.IDLE] = (model.config.model.codewords,)
    expected |= {entry: expected[copy] for entry, copy in fcid_names.templates().items()}
    return expected | fcid_names.unused_entries(model.config.model.width, model.modalities["video"].shape[-1])
