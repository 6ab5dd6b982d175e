"""Fields and processes that the benchmarks share."""

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from unicode_fast.training.runs import git_commit

# Variables that hold each library to an instruction set of UNICODE_FAST_CPU: faiss (FAISS_OPT_LEVEL in older wheels)
# with its OpenBLAS, ATen, oneDNN and MKL. MKL ignores MKL_ENABLE_INSTRUCTIONS on processors other than Intel's.
_NAMES = ("FAISS_OPT_LEVEL", "FAISS_SIMD_LEVEL", "OPENBLAS_CORETYPE", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")
_AVX2, _AVX512 = ("AVX2", "AVX2", "Haswell", "avx2"), ("AVX512", "AVX512", "SkylakeX", "avx512")
INSTRUCTION_SETS: dict[str, dict[str, str]] = {
    name: {"UNICODE_FAST_CPU": name, **dict(zip(_NAMES, values, strict=True)), **mkl}
    for name, values, mkl in (
        ("portable", ("generic", "NONE", "Nehalem", "default", "SSE41"), {"MKL_CBWR": "COMPATIBLE"}),
        ("avx2", (*_AVX2, "AVX2"), {"MKL_ENABLE_INSTRUCTIONS": "AVX2"}),
        ("avx_vnni", (*_AVX2, "AVX2_VNNI"), {"MKL_ENABLE_INSTRUCTIONS": "AVX2"}),
        ("avx512", (*_AVX512, "AVX512_CORE"), {"MKL_ENABLE_INSTRUCTIONS": "AVX512"}),
        ("avx512_vnni", (*_AVX512, "AVX512_CORE_VNNI"), {"MKL_ENABLE_INSTRUCTIONS": "AVX512"}),
    )
}


def instruction_set() -> str:
    """The instruction set of the C++ operators in this process; "" without them."""
    extension = sys.modules.get("unicode_fast._C")
    return "" if extension is None else extension.build_info()["cpu"]


def has(instructions: str) -> bool:
    """Whether this processor and the extension have an instruction set."""
    code = "import measurement, unicode_fast; print(measurement.instruction_set())"
    options = {"cwd": Path(__file__).resolve().parent, "env": {**os.environ, "UNICODE_FAST_CPU": instructions}}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **options)
    return found.returncode == 0 and found.stdout.strip() == instructions


def processor() -> str:
    """The model name of the processor, or its architecture where Linux does not name it."""
    try:
        names = re.findall(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else f"{platform.machine()} CPU"


def times_of(milliseconds: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Median and spread of the times of calls, and their number."""
    low, median, high = (float(np.percentile(milliseconds, share)) for share in (20, 50, 80))
    return {"median_ms": median, "p20_ms": low, "p80_ms": high, "repeats": len(milliseconds)}


def origin(device: str) -> dict[str, object]:
    """The machine, the versions and the day of a measurement on "cpu" or "cuda"."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "instructions": instruction_set(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": git_commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def printed_rows(script: str, *arguments: str, variables: Mapping[str, str] | None = None) -> Iterator[dict]:
    """Rows that a script of this folder prints in a process of its own, as they come.

    Args:
        script: its file.
        arguments: of its command line.
        variables: of its environment, beside those of this process.

    Raises:
        AssertionError: the script failed; the message is its standard error.
    """
    command = [sys.executable, str(Path(__file__).resolve().parent / script), *arguments]
    environment = {**os.environ, **(variables or {})}
    with tempfile.TemporaryFile("w+") as messages:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages, text=True, env=environment) as process:
            yield from (json.loads(text) for text in process.stdout or () if text.startswith("{"))
        messages.seek(0)
        assert process.returncode == 0, messages.read()
