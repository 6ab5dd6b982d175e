"""Entries of FCID's pre-training files in haihuangcode/CMG: their names in our model, and the shapes of unused ones."""

from __future__ import annotations

from unicode_fast.compat import cmg_names
from unicode_fast.compat.cmg_names import Shape
from unicode_fast.methods.fcid import TIMED, WORDS

# The modalities of every file, in the order of its EMA.
MODALITIES = ("audio", "video", "text")
QUANTISER = "Cross_quantizer_coarse"
CODEBOOK = f"{QUANTISER}.embedding"
IDLE = f"{QUANTISER}.unactivated_count"
# Keys beside the encoder: nothing else is saved.
OTHER_KEYS = ("epoch", "total_step")
TEMPORAL_LAYERS = 1

# Prefixes of modules that are those of Uni-Code under other names.
_RENAMED = {
    "audio_self_att": "a_self_att",
    "video_self_att": "v_self_att",
    "text_self_att": "t_self_att",
    "Audio_encoder": "a_spe_encoder",
    "Video_encoder": "v_spe_encoder",
    "video_semantic_encoder": "v_gen_encoder",
    "Cross_quantizer": QUANTISER,
}
_COARSE = {
    "va2vat.linear": f"{TIMED}.project",
    "va_gen_encoder.input_linear": f"{TIMED}.general",
    "va_spe_encoder.input_linear": f"{TIMED}.specific",
    "t2vat.linear": f"{WORDS}.project",
    "t_gen_encoder.input_linear": f"{WORDS}.general",
    "t_spe_encoder.input_linear": f"{WORDS}.specific",
}


def used_entries() -> dict[str, str]:
    """The names of all used entries in our model's state, by name in the file."""
    entries = cmg_names.quantiser_entries()
    for name in MODALITIES:
        entries |= cmg_names.encoder_entries(name, TEMPORAL_LAYERS)
    # Words have no specific encoder.
    names = {_renamed(theirs): ours for theirs, ours in entries.items() if not theirs.startswith("Text_encoder.")}
    for theirs, ours in _COARSE.items():
        names |= {f"{theirs}.{kind}": f"coarse.{ours}.{kind}" for kind in ("weight", "bias")}
    return names


def templates() -> dict[str, str]:
    """As `cmg_names.templates`."""
    return {_renamed(entry): _renamed(copy) for entry, copy in cmg_names.templates(MODALITIES).items()}


def unused_entries(width: int, channels: int) -> dict[str, Shape]:
    """Shapes of the unused entries beside `templates`, by name in the file.

    Args:
        width: D.
        channels: of the video grid.
    """
    entries = cmg_names.unused_entries(MODALITIES, width, channels)[cmg_names.ENCODER]
    return {_renamed(entry): shape for entry, shape in entries.items()}


def _renamed(entry: str) -> str:
    prefix, rest = entry.split(".", 1)
    return f"{_RENAMED.get(prefix, prefix)}.{rest}"
