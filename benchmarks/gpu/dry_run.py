"""A run without a GPU: stand-ins for NVIDIA's tools, and no package that the GPU machine lacks."""

import json
import os
from importlib.metadata import distribution
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parent.parent.parent
# Kit of prepare_gpu.py for a dry run.
KIT = ROOT / "build" / "dry-kit"
# Optional packages that the GPU machine lacks.
LACKING = (
    "espeakng_loader",
    "faiss",
    "fastkmeans",
    "flash_kmeans",
    "flashlib",
    "inf_cl",
    "vector_quantize_pytorch",
    "webdataset",
)
BLOCKER = '''"""Hides packages, unless they are among the wheels that travel."""

from importlib.machinery import PathFinder
from types import MethodType

LACKING, WHEELS = {lacking!r}, {wheels!r}
find_spec = PathFinder.find_spec


def find_what_travels(finder, name, path=None, target=None):
    top = name.partition(".")[0]
    travels = find_spec(top, [WHEELS]) is not None and (name != top or path is None or WHEELS in path)
    if top in LACKING and not travels:
        return None
    return find_spec(name, path, target)


PathFinder.find_spec = MethodType(find_what_travels, PathFinder)
'''
STAND_INS = {
    # Runs its command, and finds no error.
    "compute-sanitizer": """while [ "${1#--}" != "$1" ]; do shift 2; done
"$@" && echo "========= ERROR SUMMARY: 0 errors"
""",
    "ncu": """echo "==ERROR== ERR_NVGPUCTRPERM - the user may not use the counters of this GPU"
exit 1
""",
}


def is_kit(folder: Path) -> bool:
    """True for a kit for a dry run, whose kernels run on the host."""
    try:
        return "decision" in json.loads((folder / "manifest.json").read_text())["objects"]
    except (OSError, ValueError, LookupError, TypeError):
        return False


def pack_wheel(name: str, folder: Path) -> None:
    """Packs an installed pure Python package as a wheel."""
    installed = distribution(name)
    with ZipFile(folder / f"{name}-{installed.version}-py3-none-any.whl", "w") as wheel:
        for file in installed.files or []:
            if file.parts[0].startswith(name) and file.suffix != ".pyc":
                wheel.write(str(installed.locate_file(file)), str(file))


def prepare(folder: Path, wheels: Path) -> dict[str, str]:
    """Makes the stand-ins, for PATH, and the module that hides packages, for PYTHONPATH; returns other variables.

    Args:
        folder: of stand-ins and module.
        wheels: folder of the kit's unpacked wheels.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(BLOCKER.format(lacking=LACKING, wheels=str(wheels)))
    for name, text in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}")
        (folder / name).chmod(0o755)
    os.environ["PATH"] = os.pathsep.join([str(folder), os.environ["PATH"]])
    return {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
