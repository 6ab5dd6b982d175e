"""Paths of the user: `~` in flags and YAML files, and the cache folder."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

CACHE_VARIABLE = "UNICODE_FAST_CACHE"


def expanded(text: str) -> str:
    """A path, or a `LAYOUT:PATH`, with a leading `~` of the path replaced by the home folder.

    Raises:
        ValueError: the home folder is unknown.
    """
    found = re.match(r"((?:[a-z][\w-]*:)?)(~.*)", text, re.DOTALL)
    if found is None:
        return text
    try:
        return found[1] + str(Path(found[2]).expanduser())
    except RuntimeError as error:
        raise ValueError(
            f"path must begin with a known home folder, got {text!r}; set HOME or give the whole path"
        ) from error


def with_homes(argv: Sequence[str] | None) -> list[str]:
    """The arguments, None for the process's own, with each `~` replaced by the home folder, as in `--out=~/runs`.

    Raises:
        ValueError: a home folder is unknown.
    """
    given = sys.argv[1:] if argv is None else argv
    found = [re.match(r"(--[^=]+=|)(.*)", word, re.DOTALL) for word in given]
    return [one[1] + expanded(one[2]) for one in found if one is not None]


def cache_folder() -> Path:
    """The folder of generated data sets, word vectors and records of verified stores.

    UNICODE_FAST_CACHE if set, else `unicode_fast` in the platform's cache folder: XDG_CACHE_HOME or ~/.cache,
    ~/Library/Caches on macOS, %LOCALAPPDATA% on Windows.

    Raises:
        ValueError: the home folder is unknown.
    """
    if os.environ.get(CACHE_VARIABLE):
        return Path(expanded(os.environ[CACHE_VARIABLE]))
    try:
        if sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        elif sys.platform == "win32":
            base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        else:
            base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise ValueError(
            f"cache folder must be in a home folder, got a user without one; set HOME, or {CACHE_VARIABLE} to a folder"
        ) from error
    return base / "unicode_fast"
