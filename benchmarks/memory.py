"""How much memory a call takes while it runs; the only measure of it in the folder."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch


def peak_bytes(call: Callable[[], object], device: str) -> int | None:
    """Bytes that are in use at one time, at most, beyond those in use before; None where nobody counts them.

    On a GPU torch's allocator counts, on the CPU Linux does, in whole pages of this process.
    """
    if device == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        # What was freed but kept would be used again unseen.
        ctypes.CDLL(None).malloc_trim(0)
        # Makes the most so far the present.
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident_bytes()
    except (OSError, AttributeError):
        return None
    call()
    return _resident_bytes() - before


def _resident_bytes() -> int:
    """Most memory of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
