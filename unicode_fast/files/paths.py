"""Where files of the user lie: `~` in what a flag or a YAML file names, and the cache folder."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

CACHE_VARIABLE = "UNICODE_FAST_CACHE"


def expanded(text: str) -> str:
    """A path, or a `LAYOUT:PATH`, with the home folder that a `~` at the path's beginning stands for.

    Raises:
        ValueError: nobody knows that home folder.
    """
    found = re.match(r"((?:[a-z][\w-]*:)?)(~.*)", text, re.DOTALL)
    if found is None:
        return text
    try:
        return found[1] + str(Path(found[2]).expanduser())
    except RuntimeError as error:
        raise ValueError(
            f"path must begin with a home folder that is known, got {text!r}; set HOME or write the whole path"
        ) from error


def with_homes(argv: Sequence[str] | None) -> list[str]:
    """The arguments, None for the process's own, with home folders where shells leave a `~`, as in `--out=~/runs`.

    Raises:
        ValueError: nobody knows such a folder.
    """
    given = sys.argv[1:] if argv is None else argv
    parts = [re.match(r"(--[^=]+=|)(.*)", word, re.DOTALL) for word in given]
    return [part[1] + expanded(part[2]) for part in parts if part is not None]


def cache_folder() -> Path:
    """Where generated data sets, word vectors and notes on verified stores are kept.

    UNICODE_FAST_CACHE if set, else `unicode_fast` in the platform's cache folder: XDG_CACHE_HOME or ~/.cache,
    ~/Library/Caches on macOS, %LOCALAPPDATA% on Windows.

    Raises:
        ValueError: it lies in a home folder that nobody knows.
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
            f"cache folder must lie in a home folder, and this user has none; set HOME, or {CACHE_VARIABLE} to a folder"
        ) from error
    return base / "unicode_fast"
