"""The cache folder of generated data sets; each data set is generated once."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from unicode_fast.data.store.checks import StoreError
from unicode_fast.data.store.read import Store, open_store
from unicode_fast.errors import REMEDIES, one_line
from unicode_fast.files.locks import exclusive
from unicode_fast.files.paths import CACHE_VARIABLE
from unicode_fast.files.writing import remove, remove_unfinished


def open_or_make(folder: Path, make: Callable[[Path], None], say: Callable[[str], None]) -> Store:
    """Open the store in this folder; make it first if it is missing, unfinished or damaged.

    One process makes the store while others wait. Without file locks every process makes it, and the first to finish
    wins. Leftovers of killed processes, and anything else at this path, are replaced; links are not followed.

    Args:
        folder: the store's folder; only this function writes it.
        make: writes the store into a folder that does not exist yet.
        say: called with one line when a damaged store is made again, or while another process makes it.

    Raises:
        OSError: the parent folder cannot be written, or the disk is full.
        PermissionError: another user made the folder in a world-writable place; see `check_ours`.
    """
    check_ours(folder)
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
            say(one_line(f"making {folder.name} again: {error}"))
        remove(folder)
        if held:
            # Another user's leftovers may not be removable.
            with contextlib.suppress(OSError):
                remove_unfinished(folder.parent, folder.name)
        with contextlib.suppress(FileExistsError):
            make(folder)
        return open_store(folder)


def check_ours(folder: Path) -> None:
    """Refuse a folder that another user, not root, made in a world-writable place such as /tmp.

    Files of a cache are data, never run as code. Users can share a cache if its owner and its group are trusted. In a
    world-writable place the owner can be anybody.

    Raises:
        PermissionError: the folder or one of its parents is such a folder; the message names it.
    """
    if not hasattr(os, "geteuid"):
        return
    for place in (folder.absolute(), *folder.absolute().parents):
        if not os.path.lexists(place) or not place.parent.stat().st_mode & stat.S_IWOTH:
            continue
        if place.lstat().st_uid not in (0, os.geteuid()):
            raise PermissionError(
                errno.EPERM,
                f"cache folder in a world-writable place must be your own, got another user's; set {CACHE_VARIABLE}",
                str(place),
            )


def _prepare(parent: Path) -> None:
    """Make the parent folder, and check before the work that it is writable."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=parent, prefix=".probe-"):
            pass
    except OSError as error:
        if error.errno in REMEDIES:
            raise
        raise type(error)(
            error.errno,
            f"cache folder must be writable ({error.strerror}); set {CACHE_VARIABLE} or pass another folder",
            str(parent),
        ) from error
