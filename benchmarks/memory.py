"""Peak memory of a call."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch


def peak_bytes(call: Callable[[], object], device: str) -> int | None:
    """Peak of the bytes in use during a call, beyond those in use before; None where they are not counted.

    On a GPU torch's allocator counts them; on the CPU Linux counts pages of this process.
    """
    if device == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        # Freed memory that the process keeps would be reused without a trace.
        ctypes.CDLL(None).malloc_trim(0)
        # Resets the peak to the present use.
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident_bytes()
    except (OSError, AttributeError):
        return None
    call()
    return _resident_bytes() - before


def _resident_bytes() -> int:
    """Peak memory of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
