"""The folder that generated data sets are kept in, and how one is made exactly once."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from unicode_fast.data.store import Store, StoreError, open_store
from unicode_fast.locks import exclusive
from unicode_fast.writing import remove, remove_unfinished

CACHE_VARIABLE = "UNICODE_FAST_CACHE"


def cache_folder() -> Path:
    """Where generated data sets are kept.

    UNICODE_FAST_CACHE if set, else `unicode_fast` in the platform's cache folder: XDG_CACHE_HOME or ~/.cache,
    ~/Library/Caches on macOS, %LOCALAPPDATA% on Windows.
    """
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE]).expanduser()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "unicode_fast"


def open_or_make(folder: Path, make: Callable[[Path], None], say: Callable[[str], None]) -> Store:
    """Open the store in this folder; make it first where it is missing, unfinished or damaged.

    One process makes it while others wait; where the file system has no locks they all make it, and the first to
    finish wins.

    Args:
        folder: the store's folder, which nobody but this function writes.
        make: writes the store into a folder that does not exist yet.
        say: told in one line when a damaged store is made again or when another process is waited for.

    Raises:
        OSError: the folder above cannot be written, or the disk is full.
    """
    try:
        return open_store(folder)
    except (FileNotFoundError, StoreError):
        pass
    _prepare(folder.parent)
    with exclusive(folder.with_name(f".{folder.name}.lock"), say) as held:
        try:
            return open_store(folder)
        except FileNotFoundError:
            pass
        except StoreError as error:
            say(f"making {folder.name} again: {error}")
        remove(folder)
        if held:
            remove_unfinished(folder.parent, folder.name)
        with contextlib.suppress(FileExistsError):
            make(folder)
        return open_store(folder)


def _prepare(parent: Path) -> None:
    """Make the folder above, and find out now rather than after the work whether it can be written."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=parent, prefix=".probe-"):
            pass
    except OSError as error:
        raise type(error)(
            error.errno,
            f"cache folder must be one that can be written ({error.strerror}); "
            f"set {CACHE_VARIABLE} or pass another folder",
            str(parent),
        ) from error
