"""Stage: the GPU, its driver, torch, Triton, the compilers, and which packages are missing."""

import argparse
import json
import platform
import shutil
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from dry_run import LACKING

QUERY = "name,driver_version,memory.total,memory.used,clocks.max.sm,power.limit,mig.mode.current"
# Limit of one program, so that a loaded machine does not end the stage.
SLOWEST_SECONDS = 4.0
USED = ("triton", "numpy", "sklearn", "pytest", "pytest_timeout", "tensorboard", "safetensors", "pybind11", "ninja")


def output_of(*command: str) -> str:
    """The last line that a program prints; "" where it fails, takes too long or is not installed."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=SLOWEST_SECONDS, check=False)
    except (subprocess.TimeoutExpired, OSError):
        return ""
    return (found.stdout.strip().splitlines() or [""])[-1] if found.returncode == 0 else ""


def installed(name: str) -> bool:
    """True where a package is installed outside the wheels, which an earlier run may have unpacked on this path."""
    own = [path for path in sys.path if Path(path).name != "wheels"]
    return PathFinder.find_spec(name, own) is not None


def add(name: str, ok: bool | None, text: str) -> None:
    print(json.dumps({"name": name, "ok": ok, "text": text}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--size", choices=("target", "tiny"), required=True)
    parser.add_argument("--without", default="")
    device = parser.parse_args().device
    gpu = output_of("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader")
    add("gpu", bool(gpu) or None, gpu or "nvidia-smi prints nothing")
    for name, command in {"nvcc": ("nvcc", "--version"), "c++": ("c++", "-dumpfullversion")}.items():
        add(name, bool(found := output_of(*command)) or None, found or "not on PATH")
    missing = [name for name in (*LACKING, *USED) if not installed(name)]
    add("packages", True, f"missing but for the wheels: {', '.join(missing) or 'none'}")
    import torch

    usable = device == "cpu" or torch.cuda.is_available()
    here = (
        f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_capability()}" if device == "cuda" and usable else ""
    )
    python = f"{platform.python_implementation()} {sys.version.split()[0]}"
    add("torch", usable, f"{torch.__version__}, CUDA {torch.version.cuda}, {python}, {here or 'no GPU'}")


if __name__ == "__main__":
    main()
