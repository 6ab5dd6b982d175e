"""Packages that only some uses need."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingPackageError(RuntimeError):
    """A package for these data is not installed."""


def need(package: str, extra: str) -> ModuleType:
    """Import an optional package.

    Raises:
        MissingPackageError: it is not installed; the message names its extra.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"package {package!r} must be installed to read these data: pip install 'unicode_fast[{extra}]'"
        ) from error
