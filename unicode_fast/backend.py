"""Which backend can run an operator on a device, and why another cannot; nothing else asks about CUDA, Triton or _C."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sysconfig
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import torch

Backend = Literal["reference", "cpp", "cuda", "triton"]
OPERATORS = ("nearest_codeword", "codebook_update", "codeword_distribution", "cross_info_nce")
REBUILD = "pip install --force-reinstall --no-deps -e ."

# The device each backend runs on, faster ones first.
_DEVICES: dict[str, str] = {"cuda": "cuda", "triton": "cuda", "cpp": "cpu"}


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot run here; the message says why, and the cure where there is one."""


@cache
def choose_backend(operator: str, device: torch.device, backend: str | None = None) -> str:
    """The backend that a call goes to.

    Args:
        operator: one of OPERATORS.
        device: of the tensors.
        backend: None takes the fastest that can run; a name is obeyed or refused, never replaced.

    Returns:
        "reference", "cpp", "cuda" or "triton".

    Raises:
        ValueError: there is no backend of this name.
        BackendUnavailable: it cannot run this operator on this device.
    """
    if backend is None:
        return next((name for name in _DEVICES if _obstacle(name, operator, device.type) is None), "reference")
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be None or one of {', '.join(get_args(Backend))}, got {backend!r}")
    obstacle = None if backend == "reference" else _obstacle(backend, operator, device.type)
    if obstacle is not None:
        raise BackendUnavailable(f"backend {backend!r} is not available for {operator} on {device.type}: {obstacle}")
    return backend


def available_backends(device: str | torch.device = "cpu") -> dict[str, dict[str, str]]:
    """What can run where: for each operator each backend with "available" or the reason why not.

    Args:
        device: of the tensors.
    """
    kind = torch.device(device).type
    return {
        operator: {
            name: "available" if name == "reference" else _obstacle(name, operator, kind) or "available"
            for name in get_args(Backend)
        }
        for operator in OPERATORS
    }


def _obstacle(backend: str, operator: str, device: str) -> str | None:
    """Why a backend cannot run an operator; None where it can."""
    if device != _DEVICES[backend]:
        return f"it runs on {_DEVICES[backend]} tensors only"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed. Install it with pip install triton"
        if importlib.util.find_spec(f"unicode_fast.kernels.{operator}") is None:
            return "this version has no Triton kernel for it"
        return None
    missing = extension_obstacle()
    if missing is not None:
        return missing
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"unicode_fast::{operator}", device.upper()):
        return f"this build has no {'CUDA' if backend == 'cuda' else 'C++'} implementation of it"
    return None


@cache
def extension_obstacle() -> str | None:
    """Why the compiled extension is not loaded; None where it is, after loading it.

    An extension that was built against another torch is never opened: its
    symbols need not fit.
    """
    folder = Path(__file__).parent
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    library, note = folder / f"_C{suffix}", folder / f"_C{suffix}.json"
    if not library.exists() or not note.exists():
        return f"the package was installed without its extension. With a C++ compiler at hand, rebuild it: {REBUILD}"
    built = json.loads(note.read_text())["torch"]
    if built != torch.__version__:
        return f"its extension was built against torch {built}, but torch is {torch.__version__}. Rebuild it: {REBUILD}"
    importlib.import_module("unicode_fast._C")
    return None
