"""Choice of an operator's backend on a device, and the reasons why a backend cannot run; no other module checks them.

The import loads the compiled extension if there is one for the imported torch. The extension registers its operators;
it initialises no GPU, compiles nothing and prints nothing. With UNICODE_FAST_BACKEND=reference every operator uses its
reference, unless a call names another backend.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Mapping
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple, get_args

import torch

Backend = Literal["reference", "cpp", "cuda", "triton"]
BACKENDS: tuple[str, ...] = get_args(Backend)

# The implementations of each operator, fastest first. A new implementation adds its name here.
IMPLEMENTATIONS: dict[str, tuple[Backend, ...]] = {
    "nearest_codeword": ("cuda", "cpp", "reference"),
    "codebook_update": ("cuda", "cpp", "reference"),
    "codeword_distribution": ("cpp", "reference"),
    "commitment_loss": ("cuda", "cpp", "reference"),
    "cross_info_nce": ("triton", "cpp", "reference"),
}

# The kind of device of each backend; the reference runs on any.
_DEVICES = {"cpp": "cpu", "cuda": "cuda", "triton": "cuda"}
_LANGUAGES = {"cpp": "C++", "cuda": "CUDA", "triton": "Triton"}
_EXTENSION = "unicode_fast._C"
_PACKAGE = Path(__file__).parent


class BackendUnavailable(RuntimeError):
    """A call names a backend that cannot run; the message has the reason and the remedy."""


class Extension(NamedTuple):
    """The compiled extension, or why it is not loaded.

    Attributes:
        module: None if it is not loaded.
        cuda: version of the CUDA toolkit that compiled it; None for an extension without CUDA.
        decision: why setup.py built it with or without CUDA.
        problem: why it is not loaded; empty if it is.
    """

    module: ModuleType | None = None
    cuda: str | None = None
    decision: str = ""
    problem: str = ""


def choose_backend(operator: str, device: torch.device, backend: str | None) -> str:
    """The backend of an operator for tensors on a device.

    Args:
        operator: its name, such as "nearest_codeword".
        device: of the tensors.
        backend: None takes the fastest that can run there. A named backend is used or refused, never replaced.

    Raises:
        ValueError: there is no such operator or backend.
        BackendUnavailable: the named backend cannot run this operator there; the message has the reason.
    """
    if backend is None:
        return _fastest(operator, device.type)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(BACKENDS)}, got {backend!r}")
    obstacles = _all_obstacles(operator, backend, device.type)
    if obstacles:
        raise BackendUnavailable(
            f"backend {backend!r} is not available for {operator} on {device.type}: {'; '.join(obstacles)}"
        )
    return backend


def available_backends(device: torch.device | str = "cpu") -> dict[str, dict[str, str]]:
    """The backends of each operator on a device, each "available" or with the reason why it cannot run.

    Args:
        device: of the tensors.
    """
    kind = torch.device(device).type
    return {
        operator: {name: "; ".join(_all_obstacles(operator, name, kind)) or "available" for name in BACKENDS}
        for operator in IMPLEMENTATIONS
    }


def compiled() -> bool:
    """Whether the C++ extension is loaded and UNICODE_FAST_BACKEND allows its operators."""
    return EXTENSION.module is not None and not _FORCED


def find_device(device: torch.device | str) -> torch.device:
    """A device by its name.

    Raises:
        ValueError: it is no device, or torch does not find it.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be cpu or cuda, got {device!r}") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be cpu where torch finds no GPU, got {str(device)!r}")
    return found


def load_extension(folder: Path = _PACKAGE, torch_version: str = torch.__version__) -> Extension:
    """Load the compiled extension from the package's folder, unless it was built with another torch.

    A record of setup.py beside the extension has the version of torch that built it. An extension of another torch must
    not be opened, because its symbols may be missing or differ.

    Args:
        folder: of the extension.
        torch_version: version of the imported torch, such as "2.13.0+cpu".
    """
    spec = PathFinder.find_spec(_EXTENSION, [str(folder)])
    if spec is None or spec.origin is None or spec.loader is None:
        return Extension(problem="the package was installed without its C++ extension, which needs a C++ compiler")
    try:
        record = json.loads(Path(f"{spec.origin}.json").read_text(encoding="utf-8"))
        built_with, cuda, decision = record["torch"], record.get("cuda"), record.get("decision", "")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return Extension(problem=f"{spec.origin} has no record of the torch that it was built with ({error!r})")
    if built_with != torch_version:
        return Extension(
            problem=f"the C++ extension was built with torch {built_with}, but torch {torch_version} is imported"
        )
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        return Extension(problem=f"the C++ extension cannot be loaded ({error})")
    sys.modules[_EXTENSION] = module
    return Extension(module, cuda, decision)


def rebuild_command() -> str:
    """The shell command that rebuilds the extension with the torch of this environment."""
    pip = [sys.executable, "-m", "pip", "install", "--no-deps"]
    checkout = _PACKAGE.resolve().parent
    if (checkout / "build_backend.py").is_file():
        return shlex.join([*pip, "-e", str(checkout)])
    return shlex.join([*pip, "--force-reinstall", "--no-cache-dir", _installed_from()])


def _installed_from() -> str:
    """The requirement with which pip installs the package from its origin."""
    try:
        origin = json.loads(distribution("unicode_fast").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        origin = {}
    if "vcs_info" in origin:
        revision = origin["vcs_info"]
        return f"unicode_fast @ {revision['vcs']}+{origin['url']}@{revision['commit_id']}"
    return f"unicode_fast @ {origin['url']}" if "url" in origin else "unicode_fast"


def _implementations(operator: str) -> tuple[Backend, ...]:
    if operator not in IMPLEMENTATIONS:
        raise ValueError(f"operator must be one of {', '.join(IMPLEMENTATIONS)}, got {operator!r}")
    return IMPLEMENTATIONS[operator]


def _fastest(operator: str, kind: str) -> str:
    # torch.compile traces this function, so it only compares names.
    implementations = _implementations(operator)
    if _FORCED:
        return "reference"
    for backend in implementations:
        if backend != "reference" and kind == _DEVICES[backend] and _installed(backend):
            return backend
    return "reference"


def _installed(backend: str) -> bool:
    """Whether the software of a backend other than the reference is installed."""
    if backend == "triton":
        return _TRITON_INSTALLED
    return EXTENSION.module is not None if backend == "cpp" else EXTENSION.cuda is not None


def _all_obstacles(operator: str, backend: str, kind: str) -> list[str]:
    """Why a backend cannot run an operator on a kind of device, a missing implementation included."""
    missing = [] if backend in _implementations(operator) else [_no_implementation(backend, operator)]
    return missing + _obstacles(backend, kind)


def _no_implementation(backend: str, operator: str) -> str:
    return f"this version has no {_LANGUAGES[backend]} implementation of {operator}"


def _obstacles(backend: str, kind: str) -> list[str]:
    """Why a backend cannot run on a kind of device, whatever the operator; empty if it can."""
    if backend == "reference":
        return []
    obstacles = []
    if kind != _DEVICES[backend]:
        obstacles.append(f"it runs on {_DEVICES[backend]} tensors, these are on {kind}")
    if _DEVICES[backend] == "cuda" and not torch.cuda.is_available():
        obstacles.append("torch finds no CUDA device here")
    if not _installed(backend):
        obstacles.append(_cure(backend))
    return obstacles


def _cure(backend: str) -> str:
    """The missing software, and the command that installs it."""
    if backend == "triton":
        return "Triton is not installed; install it with: pip install triton"
    if EXTENSION.problem:
        return f"{EXTENSION.problem}; build it with: {rebuild_command()}"
    return (
        f"the package has no CUDA extension ({EXTENSION.decision}); "
        f"build it for all architectures with: UNICODE_FAST_CUDA=1 {rebuild_command()}"
    )


def forced_backend(environment: Mapping[str, str]) -> str:
    """The value of UNICODE_FAST_BACKEND: "reference", or empty for the fastest backend.

    Raises:
        ValueError: it is another value.
    """
    forced = environment.get("UNICODE_FAST_BACKEND", "")
    if forced not in ("", "reference"):
        raise ValueError(f"UNICODE_FAST_BACKEND must be reference or empty, got {forced!r}")
    return forced


EXTENSION = load_extension()
_FORCED = forced_backend(os.environ)
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
