"""In-tree build backend: setuptools, compiling against the torch that the target environment already has.

Build isolation hides that torch, and an extension compiled against another one cannot be used beside it. So this
backend looks the target environment's packages up, lets the compiling stage import them after those of the isolated
one, and asks for torch as a build requirement only where the target environment has none that will do.

An isolated environment that is a virtual environment of its own (`python -m build` makes such ones) does not say what
it builds for. There torch is always a build requirement; the extension remembers which torch it was built with, and
`unicode_fast.backend` does not load it beside another.
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
    """Where the environment that is installed into keeps its packages: what its interpreter searches, left to itself.

    pip isolates through environment variables; without them the interpreter shows its own site-packages, those of the
    user and of the system where it uses them, and the folders that path configuration files add.

    Args:
        executable: the target environment's interpreter.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [executable, "-c", "import json, sys; print(json.dumps(sys.path))"]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return [path for path in json.loads(output.splitlines()[-1]) if path]


def usable_torch(paths: Sequence[str]) -> str | None:
    """The version of the torch that these folders hold; None without one, or with one that is too old to be kept."""
    found = next(iter(distributions(name="torch", path=list(paths))), None)
    release = re.match(r"(\d+)\.(\d+)", found.version) if found else None
    return found.version if found and release and (int(release[1]), int(release[2])) >= OLDEST_TORCH else None


def torch_requirements(paths: Sequence[str]) -> list[str]:
    """What has to be installed for the build so that torch can be imported."""
    return [] if usable_torch(paths) else [TORCH_REQUIREMENT]


def show_torch() -> None:
    """Let this process import the target environment's packages, after its own, unless it has a torch already."""
    if find_spec("torch") is None:
        sys.path.extend(path for path in target_paths() if path not in sys.path)


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """Build requirements of a wheel beyond those of pyproject.toml."""
    return build_meta.get_requires_for_build_wheel(config_settings) + torch_requirements(target_paths())


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """Build requirements of an editable install beyond those of pyproject.toml."""
    return build_meta.get_requires_for_build_editable(config_settings) + torch_requirements(target_paths())


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    """Compile and pack a wheel."""
    show_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """Compile into the source folder and pack a wheel that points to it."""
    show_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
