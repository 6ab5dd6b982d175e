"""Uni-Code: a shared discrete codebook of audio, video, text and other modalities, with fast operators."""

from unicode_fast.errors import is_starting, quiet_interrupt
from unicode_fast.threads import note_start

if is_starting():
    # The imports take seconds.
    quiet_interrupt()
    note_start()

from unicode_fast import media
from unicode_fast.backend import BackendUnavailable, available_backends
from unicode_fast.checkpoint import CheckpointError, export, load
from unicode_fast.compat import CmgFileError, from_cmg, to_cmg
from unicode_fast.config import Config, Modality
from unicode_fast.methods import make_method, make_model
from unicode_fast.modules import Codebook, CodebookOutput, Encoded, UniCode
from unicode_fast.ops import (
    BatchShard,
    CodebookState,
    CrossInfoNCE,
    EmaConfig,
    NearestCodeword,
    PreparedCodebook,
    ResetDraws,
    codebook_update,
    codeword_distribution,
    commitment_loss,
    cross_info_nce,
    nearest_codeword,
)
from unicode_fast.ops.codebook_update import RevivalDraws, UpdateRule  # noqa: F401 - former names
from unicode_fast.presets import PRESETS, preset
from unicode_fast.version import __version__

__all__ = [
    "PRESETS",
    "BackendUnavailable",
    "BatchShard",
    "CheckpointError",
    "CmgFileError",
    "Codebook",
    "CodebookOutput",
    "CodebookState",
    "Config",
    "CrossInfoNCE",
    "EmaConfig",
    "Encoded",
    "Modality",
    "NearestCodeword",
    "PreparedCodebook",
    "ResetDraws",
    "UniCode",
    "__version__",
    "available_backends",
    "codebook_update",
    "codeword_distribution",
    "commitment_loss",
    "cross_info_nce",
    "export",
    "from_cmg",
    "load",
    "make_method",
    "make_model",
    "media",
    "nearest_codeword",
    "preset",
    "to_cmg",
]
