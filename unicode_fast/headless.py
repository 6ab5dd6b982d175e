"""matplotlib without the backend that the environment names.

A notebook passes its MPLBACKEND on to every command that it starts, where that backend may not be there, and matplotlib
then cannot be imported. Pictures are drawn on canvases of their own and need none.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def any_backend() -> Iterator[None]:
    """Imports of matplotlib inside succeed whatever MPLBACKEND holds; a backend that is there stays chosen."""
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
