"""In-tree build backend: setuptools, compiling against the installed torch of the target environment.

Build isolation hides that torch, and an extension works only with the torch of its build. This backend therefore adds
the packages of the target environment to the import path of the build, after the isolated packages. Only without a
usable torch there, torch is a build requirement.

`python -m build` isolates with a virtual environment, whose interpreter does not lead to a target environment. There
torch is always a build requirement. The extension records its torch version, and `unicode_fast.backend` does not load
it with another version.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from importlib.util import find_spec
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

# The lower bound of the run-time dependency in pyproject.toml, which cannot be read here: Python 3.10 has no tomllib.
OLDEST_TORCH = (2, 10)
TORCH_REQUIREMENT = f"torch>={OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}"

Settings = Mapping[str, Any] | None


def target_paths(executable: str = sys.executable) -> list[str]:
    """The import path of the target environment, without build isolation.

    pip isolates through environment variables. Without them, the interpreter has its normal path. It includes
    site-packages, those of the user and of the system if enabled, and folders of path configuration files.

    Args:
        executable: the target environment's interpreter.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [executable, "-c", "import json, sys; print(json.dumps(sys.path))"]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return [path for path in json.loads(output.splitlines()[-1]) if path]


def usable_torch(paths: Sequence[str]) -> str | None:
    """The version of the torch in these folders; None if it is missing or too old."""
    found = next(iter(distributions(name="torch", path=list(paths))), None)
    release = re.match(r"(\d+)\.(\d+)", found.version) if found else None
    return found.version if found and release and (int(release[1]), int(release[2])) >= OLDEST_TORCH else None


def torch_requirements(paths: Sequence[str]) -> list[str]:
    """The requirement of torch for the build; empty if these folders have a usable torch."""
    return [] if usable_torch(paths) else [TORCH_REQUIREMENT]


def show_torch() -> None:
    """Append the target environment's import path to this process's path, unless torch can already be imported."""
    if find_spec("torch") is None:
        sys.path.extend(path for path in target_paths() if path not in sys.path)


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """Build requirements of a wheel, in addition to pyproject.toml."""
    return build_meta.get_requires_for_build_wheel(config_settings) + torch_requirements(target_paths())


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """Build requirements of an editable install, in addition to pyproject.toml."""
    return build_meta.get_requires_for_build_editable(config_settings) + torch_requirements(target_paths())


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    """Compile and pack a wheel."""
    show_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """Compile in the source folder, and pack a wheel that refers to it."""
    show_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
