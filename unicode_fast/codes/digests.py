"""Checksums that tell whether codes are of a model."""

from __future__ import annotations

import json

from unicode_fast.config import EXECUTION_FIELDS, PLACE_FIELDS
from unicode_fast.files.tensor_files import checksum_of
from unicode_fast.modules.model import UniCode


def codebook_digest(model: UniCode) -> str:
    """SHA-256 of the codebooks: models with the same one have the same vector for a code."""
    return checksum_of("", {f"{number:02d}": book for number, book in enumerate(model.codebooks)})


def model_digest(model: UniCode) -> str:
    """SHA-256 of parameters, buffers, modalities and configuration: such models give the same codes.

    Fields of the configuration that only say where and how a run is computed do not count.
    """
    unread = {*EXECUTION_FIELDS, *PLACE_FIELDS}
    fields = {name: value for name, value in model.config.flat().items() if name not in unread}
    shapes = {name: [kind.kind, *kind.shape] for name, kind in model.modalities.items()}
    return checksum_of(json.dumps([fields, shapes]), {name: value.cpu() for name, value in model.state_dict().items()})
