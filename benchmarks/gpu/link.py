"""The extension from objects that were compiled elsewhere.

`python benchmarks/gpu/link.py --kit gpu-kit --package FOLDER` compiles csrc/extension.cpp alone, for this Python.
FOLDER, for PYTHONPATH, gets the package `unicode_fast` as links into this checkout, kernels and extension included.
Objects of another torch, CUDA or source are refused. Objects of a torch without CUDA need no CUDA library.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from package import link_package  # noqa: E402 - beside this
from program import digest_of, sources  # noqa: E402

import setup as build  # noqa: E402 - of this checkout

EXTENSION = "_C" + str(sysconfig.get_config_var("EXT_SUFFIX"))
DECISION = "objects that were compiled on another machine"


class LinkError(RuntimeError):
    """The objects do not fit this machine, or compiler or linker failed."""


def link(kit: Path, folder: Path) -> Path:
    """Compiles the module, links it with the objects of a kit, and writes its record, which the package reads first.

    Args:
        kit: folder of benchmarks/prepare_gpu.py.
        folder: of the new package.

    Returns:
        The extension's file.

    Raises:
        LinkError: the objects do not fit the torch, the CUDA or the sources of this machine, or a tool failed.
    """
    import torch

    manifest = kit / "manifest.json"
    if not manifest.exists():
        raise LinkError(f"--kit must hold manifest.json, which benchmarks/prepare_gpu.py writes, got {kit}")
    made = json.loads(manifest.read_text())["objects"]
    here = {"torch": torch.__version__, "cuda": torch.version.cuda, "sources": digest_of(sources())}
    for name, value in here.items():
        if made[name] != value:
            raise LinkError(f"objects must be of {name} {value}, got {made[name]}; run benchmarks/prepare_gpu.py again")
    target = link_package(folder) / EXTENSION
    libraries = Path(torch.__file__).parent / "lib"
    record = {"torch": str(torch.__version__), "cuda": made["cuda"], "architectures": made["architectures"]}
    names = ["c10", "torch_cpu", *(("torch_cuda", "c10_cuda") if made["cuda"] else ()), "torch"]
    command = [
        *build.cxx_command(os.environ),
        *("-shared", "-fPIC", "-O3", "-g0", "-std=c++20", "-w"),
        *("-DTORCH_EXTENSION_NAME=_C", *(f"-D{name}={value}" for name, value in build.macros(record))),
        *(f"-I{path}" for path in headers(Path(torch.__file__).parent)),
        str(ROOT / "csrc" / "extension.cpp"),
        *(str(kit / "objects" / name) for name in made["files"]),
        *(f"-L{libraries}", *(f"-l{name}" for name in names), f"-Wl,-rpath,{libraries}"),
        *((str(cuda_runtime()),) if made["cuda"] else ()),
        *("-ldl", "-pthread", "-o", str(target)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        raise LinkError(f"{shlex.join(command)}\n{done.stderr}")
    decision = made.get("decision", DECISION)
    Path(f"{target}.json").write_text(json.dumps({**record, "decision": decision}, indent=1) + "\n")
    return target


def headers(torch_folder: Path) -> list[str]:
    """Folders of the headers of Python, pybind11 and, where they exist, the CUDA runtime."""
    toolkit = build.find_toolkit(os.environ)
    packaged = sorted(torch_folder.parent.glob("nvidia/cu*/include"))
    cuda = packaged if isinstance(toolkit, str) else [toolkit.home / "include"]
    pybind11 = [*build.pybind11_headers(), torch_folder / "include"]
    return [str(path) for path in (sysconfig.get_path("include"), *pybind11, *cuda)]


def cuda_runtime() -> Path:
    """The CUDA runtime that torch has loaded.

    Raises:
        LinkError: it has loaded none.
    """
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = Path(line.split(maxsplit=5)[-1])
        if path.name.startswith("libcudart.so"):
            return path
    raise LinkError("torch must have loaded libcudart.so, got none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kit", type=Path, default=ROOT / "gpu-kit")
    parser.add_argument("--package", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        print(link(arguments.kit, arguments.package.absolute()))
    except (FileExistsError, LinkError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
