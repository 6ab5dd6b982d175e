"""Compiles csrc/cuda for the host, on the emulator: `python tests/cuda_on_host/build.py FOLDER`.

FOLDER/package holds the package, by links, with an extension whose operators on CPU tensors (backend "cpp") run the
CUDA kernels. FOLDER/kernels is the program of benchmarks/gpu/kernels. Both come from FOLDER/objects, with a manifest
like that of benchmarks/prepare_gpu.py. From it benchmarks/gpu/link.py makes the extension. The script needs a C++20
compiler with -fsanitize=thread,alignment, whose hooks alone are used, and no CUDA toolkit. Files without a change are
not compiled again.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
GPU = ROOT / "benchmarks" / "gpu"
sys.path.insert(0, str(GPU))

import program  # noqa: E402 - of benchmarks/gpu

PROGRAM = GPU / "kernels"
DECISION = "csrc/cuda on the host"
CXX = shlex.split(os.environ.get("CXX") or "c++")
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-w"]
FLAGS += ["-DUNICODE_FAST_ON_HOST"]
INCLUDES = [f"-I{HERE / 'include'}", f"-I{ROOT / 'csrc'}"]
KERNELS = ["-x", "c++", "-fsanitize=thread,alignment", "-fno-threadsafe-statics", "-include", "device_on_host.h"]


def compile_all(jobs: Sequence[tuple[Path, Path, Sequence[str]]]) -> None:
    """Compile sources into objects, each with flags of its own, on all cores; the largest come first.

    Raises:
        SystemExit: one does not compile; the compiler has printed the reason.
    """
    headers = [path for folder in (ROOT / "csrc", PROGRAM, HERE) for path in folder.rglob("*.*h")] + [Path(__file__)]
    newest = max(path.stat().st_mtime for path in headers)

    def run(job: tuple[Path, Path, Sequence[str]]) -> int:
        source, target, flags = job
        if target.exists() and target.stat().st_mtime > max(newest, source.stat().st_mtime):
            return 0
        command = [*CXX, *FLAGS, *INCLUDES, *flags, "-c", str(source), "-o", str(target)]
        return subprocess.run(command, check=False).returncode

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        if any(pool.map(run, sorted(jobs, key=lambda job: -job[0].stat().st_size))):
            raise SystemExit("tests/cuda_on_host: a source does not compile")


def link(target: Path, objects: Sequence[Path]) -> None:
    """Link objects into a program."""
    partial = target.with_name(f"{target.name}.partial")
    subprocess.run([*CXX, *map(str, objects), "-o", str(partial), "-ldl", "-pthread"], check=True)
    partial.replace(target)


def make_folder(folder: Path) -> None:
    """Make the folder to build in, unless it is there.

    Raises:
        SystemExit: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"error: {folder} must be a folder that can be written to: {error.strerror}") from error


def kernel_sources(csrc: Path) -> list[Path]:
    """The CUDA sources below a copy of csrc."""
    return sorted((csrc / "cuda").rglob("*.cu"))


def build_program(folder: Path, csrc: Path = ROOT / "csrc", includes: Sequence[str] = ()) -> Path:
    """Compile benchmarks/gpu/kernels with the kernels below `csrc`; returns the program."""
    places = folder / "objects"
    places.mkdir(parents=True, exist_ok=True)
    # The linker takes the first of equal inline functions: those of the kernels, mistakes included.
    objects = {source: f"{source.stem}.o" for source in kernel_sources(csrc)}
    objects |= {source: f"program_{source.stem}.o" for source in sorted(PROGRAM.glob("*.cu"))}
    jobs = [(source, places / name, (*includes, *KERNELS)) for source, name in objects.items()]
    jobs.append((HERE / "emulator.cpp", places / "emulator.o", ("-O2",)))
    compile_all(jobs)
    link(folder / "kernels", [target for _, target, _ in jobs])
    return folder / "kernels"


def build_package(folder: Path) -> Path:
    """Make the package with its operators on the emulator, beside the program; returns the folder for PYTHONPATH."""
    import torch

    headers = Path(torch.__file__).parent / "include"
    includes = (f"-I{headers}", f"-I{headers / 'torch/csrc/api/include'}")
    places = folder / "objects"
    jobs = [(source, places / f"{source.stem}.o", includes) for source in (ROOT / "csrc" / "cuda").rglob("*_op.cpp")]
    # csrc/extension.cpp reports the name of the CPU's kernels; nothing else uses them.
    jobs.append((ROOT / "csrc" / "cpu" / "kernels.cpp", places / "cpu_kernels.o", includes))
    compile_all(jobs)
    names = [target.name for _, target, _ in jobs]
    names += ["emulator.o", *(f"{source.stem}.o" for source in kernel_sources(ROOT / "csrc"))]
    objects = {"torch": str(torch.__version__), "cuda": None, "architectures": None, "decision": DECISION}
    objects |= {"files": sorted(names), "sources": program.digest_of(program.sources())}
    manifest = {"objects": objects, "kernels": program.inputs(on_host=True)}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    package = folder / "package"
    command = [sys.executable, str(GPU / "link.py"), "--kit", str(folder), "--package", str(package)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return package


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where to build; may hold an earlier build")
    parser.add_argument("--program", action="store_true", help="build only the program of benchmarks/gpu/kernels")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    if shutil.which(CXX[0]) is None:
        parser.error(f"CXX must name a C++ compiler, got {CXX[0]!r}")
    make_folder(folder)
    print(f"compiling for {folder}", flush=True)
    print(f"built {build_program(folder)}")
    if not arguments.program:
        print(f"built {build_package(folder)}")


if __name__ == "__main__":
    main()
