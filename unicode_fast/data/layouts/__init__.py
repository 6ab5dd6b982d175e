"""The layouts of public feature sets, and one for own data; one file per family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from unicode_fast.data.layouts.ave import list_ave
from unicode_fast.data.layouts.avsbench import list_avsbench
from unicode_fast.data.layouts.avvp import list_ave_avvp, list_avvp
from unicode_fast.data.layouts.clips import list_clips
from unicode_fast.data.layouts.index import DatasetIndex
from unicode_fast.data.layouts.request import Request
from unicode_fast.data.layouts.ucf51 import list_ucf51
from unicode_fast.data.layouts.ucf_vggsound import list_ucf_vggsound
from unicode_fast.data.layouts.vggsound import avel_lister, checked_lister
from unicode_fast.files.paths import expanded

LAYOUTS: Mapping[str, Callable[[Path, Request], DatasetIndex]] = {
    "vggsound-avel24k": avel_lister("vggsound-avel24k", whole=False),
    "vggsound-avel40k": avel_lister("vggsound-avel40k", whole=True),
    "vggsound-avel90k": avel_lister("vggsound-avel90k", whole=True, size="90k"),
    "vggsound81k": checked_lister("vggsound81k"),
    "vggsound179k": checked_lister("vggsound179k"),
    "ave": list_ave,
    "avvp": list_avvp,
    "ave-avvp": list_ave_avvp,
    "ucf-vggsound": list_ucf_vggsound,
    "ucf51": list_ucf51,
    "avsbench-s4": list_avsbench,
    "clips": list_clips,
}

# Layouts with options on text.
WITH_SENTENCES = ("vggsound-avel24k", "vggsound-avel40k", "vggsound-avel90k", "avsbench-s4")

__all__ = ["LAYOUTS", "WITH_SENTENCES", "Request", "find_layout", "has_sentences"]


def has_sentences(spec: str) -> bool:
    """Whether `spec` names a layout with sentences."""
    return spec.partition(":")[0] in WITH_SENTENCES


def find_layout(spec: str) -> tuple[str, Path] | None:
    """Layout and root folder of a `LAYOUT:ROOT`, or None if `spec` names no layout.

    Raises:
        FileNotFoundError: the root is not a folder.
    """
    name, _, root = spec.partition(":")
    if name not in LAYOUTS or not root:
        return None
    folder = Path(expanded(root)).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"root of {spec!r} must be a folder, got {str(folder)!r}")
    return name, folder
