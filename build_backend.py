"""Build backend: setuptools, compiling against the torch that the target environment already has.

Build isolation hides the installed packages, and an extension built against
another torch than the one at run time cannot be loaded. So this backend looks
into the environment that it installs into, and asks for torch as a build
requirement only where there is none.
"""

from __future__ import annotations

import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

TORCH = "torch>=2.10"


def target_paths() -> list[str]:
    """Site-packages of the environment that is installed into, those of its base included where it shows them."""
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    settings = Path(sys.prefix, "pyvenv.cfg")
    if settings.is_file() and "include-system-site-packages = true" in settings.read_text().lower():
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        paths += [sysconfig.get_path(name, vars=base) for name in ("purelib", "platlib")]
    return list(dict.fromkeys(paths))


def needed_torch(paths: list[str]) -> list[str]:
    """The build requirement that stands for torch: none where one of the paths holds it."""
    return [] if PathFinder.find_spec("torch", paths) else [TORCH]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """What pip puts into the isolated environment beside pyproject's list."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *needed_torch(target_paths())]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """The same for an editable install."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *needed_torch(target_paths())]


# Appended, so that what the isolated environment brings goes first.
sys.path.extend(path for path in target_paths() if path not in sys.path)
