"""Fields and processes that the benchmarks share."""

import datetime
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from unicode_fast.training.runs import git_commit


def times_of(milliseconds: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Median and spread of the times of calls, and their number."""
    low, median, high = (float(np.percentile(milliseconds, share)) for share in (20, 50, 80))
    return {"median_ms": median, "p20_ms": low, "p80_ms": high, "repeats": len(milliseconds)}


def origin(device: str) -> dict[str, object]:
    """The machine, the versions and the day of a measurement on "cpu" or "cuda"."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": git_commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def printed_rows(script: str, *arguments: str) -> Iterator[dict]:
    """Rows that a script of this folder prints in a process of its own, as they come.

    Raises:
        AssertionError: the script failed; the message is its standard error.
    """
    command = [sys.executable, str(Path(__file__).resolve().parent / script), *arguments]
    with tempfile.TemporaryFile("w+") as messages:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages, text=True) as process:
            yield from (json.loads(text) for text in process.stdout or () if text.startswith("{"))
        messages.seek(0)
        assert process.returncode == 0, messages.read()
