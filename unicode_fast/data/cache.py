"""The folder that generated data sets are kept in, and how one is made exactly once."""

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
from unicode_fast.errors import CURES, one_line
from unicode_fast.files.locks import exclusive
from unicode_fast.files.paths import CACHE_VARIABLE
from unicode_fast.files.writing import remove, remove_unfinished


def open_or_make(folder: Path, make: Callable[[Path], None], say: Callable[[str], None]) -> Store:
    """Open the store in this folder; make it first where it is missing, unfinished or damaged.

    One process makes it while others wait; where the file system has no locks they all make it, and the first to
    finish wins. Leftovers of killed processes, and what is no store in its place, are replaced, links not followed.

    Args:
        folder: the store's folder, which nobody but this function writes.
        make: writes the store into a folder that does not exist yet.
        say: told in one line when a damaged store is made again or when another process is waited for.

    Raises:
        OSError: the folder above cannot be written, or the disk is full.
        PermissionError: another user has made it where everybody can write; see `check_ours`.
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
            # Those of another user may have to stay.
            with contextlib.suppress(OSError):
                remove_unfinished(folder.parent, folder.name)
        with contextlib.suppress(FileExistsError):
            make(folder)
        return open_store(folder)


def check_ours(folder: Path) -> None:
    """Refuse what another user but root has put where everybody can write, such as below /tmp.

    Data are read and not run, so a cache that several users share is sound where the one who owns it, and the group
    that may write it, are whom its user chose to trust. Below a folder that everybody can write nobody was chosen.

    Raises:
        PermissionError: the folder, or one that it is in, is such; the message names it.
    """
    if not hasattr(os, "geteuid"):
        return
    for place in (folder.absolute(), *folder.absolute().parents):
        if not os.path.lexists(place) or not place.parent.stat().st_mode & stat.S_IWOTH:
            continue
        if place.lstat().st_uid not in (0, os.geteuid()):
            raise PermissionError(
                errno.EPERM,
                f"another user has made this where everybody can write; set {CACHE_VARIABLE} to a folder of your own",
                str(place),
            )


def _prepare(parent: Path) -> None:
    """Make the folder above, and find out now rather than after the work whether it can be written."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=parent, prefix=".probe-"):
            pass
    except OSError as error:
        if error.errno in CURES:
            raise
        raise type(error)(
            error.errno,
            f"cache folder must be one that can be written ({error.strerror}); "
            f"set {CACHE_VARIABLE} or pass another folder",
            str(parent),
        ) from error
