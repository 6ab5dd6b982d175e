"""The preprocessor in files: of stores, runs, checkpoints and exported models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from unicode_fast.config import Modality
from unicode_fast.files.untrusted import BadFile
from unicode_fast.media.features import Preprocessor

# Values and characters of a preprocessor.
_MOST = 1 << 16


def checked_preprocessor(content: Any, modalities: Mapping[str, Modality], *, exactly: bool) -> dict[str, Any] | None:
    """The content of a preprocessor.json, or the entry of a checkpoint; None if there is none.

    Args:
        content: from an untrusted file, or None.
        modalities: of the store or model.
        exactly: the preprocessor must have no other modalities; a model may be trained on some of a store's.

    Raises:
        BadFile: it is not of plain values, too large, or of other modalities.
    """
    if content is None:
        return None
    check_plain(content)
    try:
        theirs = Preprocessor.from_dict(content).modalities
    except (TypeError, ValueError) as error:
        raise BadFile(f"its preprocessor is invalid: {error}") from error
    found = theirs if exactly else {name: one for name, one in theirs.items() if name in modalities}
    if found != dict(modalities):
        own = ", ".join(f"{name} ({one.kind} {one.shape})" for name, one in modalities.items())
        others = ", ".join(f"{name} ({one.kind} {one.shape})" for name, one in theirs.items())
        raise BadFile(f"its preprocessor must be of the modalities {own}, got {others:.200}")
    return content


def check_plain(content: Any) -> None:
    """Raise BadFile unless it is a dictionary of few JSON values; objects that contain themselves are refused."""
    if type(content) is not dict:
        raise BadFile(f"its preprocessor must be a dictionary, got {type(content).__name__}")
    room, rest = _MOST, [content]
    while rest:
        value = rest.pop()
        room -= 1 + (len(value) if type(value) in (dict, list, str) else 0)
        if room < 0:
            raise BadFile(f"its preprocessor must have at most {_MOST} values and characters")
        if type(value) is dict:
            rest += [*value, *value.values()]
            if not all(type(name) is str for name in value):
                raise BadFile("keys of its preprocessor must be text")
        elif type(value) is list:
            rest += value
        elif value is not None and type(value) not in (str, int, bool):
            if type(value) is not float or not math.isfinite(value):
                raise BadFile(f"its preprocessor must hold plain values, got {value!r:.40}")
