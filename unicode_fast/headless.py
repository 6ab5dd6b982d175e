"""Import of matplotlib without the backend of the environment.

A notebook sets MPLBACKEND for every command that it starts. If that backend is not installed, matplotlib cannot be
imported. This package draws on its own canvases and needs no backend.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def any_backend() -> Iterator[None]:
    """Context in which matplotlib can be imported whatever MPLBACKEND is; an installed backend stays chosen."""
    name = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if name is not None:
            os.environ["MPLBACKEND"] = name
    if name:
        import matplotlib

        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = name
