"""Compiles csrc/cuda for the host, on the emulator: `python tests/cuda_on_host/build.py FOLDER`.

FOLDER/package holds the package, by links, with an extension whose operators on CPU tensors (backend "cpp") run the
CUDA kernels; FOLDER/kernels is the program of benchmarks/gpu/kernels. It takes a C++20 compiler that has
-fsanitize=thread,alignment, of which only the hooks are used, and no CUDA toolkit. What has not changed is not compiled
again.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PROGRAM = ROOT / "benchmarks" / "gpu" / "kernels"
DECISION = "csrc/cuda on the host"
CXX = shlex.split(os.environ.get("CXX") or "c++")
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-w"]
FLAGS += ["-DUNICODE_FAST_ON_HOST"]
INCLUDES = [f"-I{HERE / 'include'}", f"-I{ROOT / 'csrc'}"]
KERNELS = ["-x", "c++", "-fsanitize=thread,alignment", "-fno-threadsafe-statics", "-include", "device_on_host.h"]


def compile_all(jobs: Sequence[tuple[Path, Path, Sequence[str]]]) -> None:
    """Compile sources into objects, each with flags of its own, on all cores; the largest come first.

    Raises:
        SystemExit: one does not compile; the compiler has said why.
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


def link(target: Path, objects: Sequence[Path], flags: Sequence[str] = ()) -> None:
    """Link objects into a program or a library."""
    partial = target.with_name(f"{target.name}.partial")
    subprocess.run([*CXX, *map(str, objects), "-o", str(partial), "-ldl", "-pthread", *flags], check=True)
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
    folder.mkdir(parents=True, exist_ok=True)
    # The linker takes the first of equal inline functions: those of the kernels, mistakes included.
    objects = {source: f"{source.stem}.o" for source in kernel_sources(csrc)}
    objects |= {source: f"program_{source.stem}.o" for source in sorted(PROGRAM.glob("*.cu"))}
    jobs = [(source, folder / name, (*includes, *KERNELS)) for source, name in objects.items()]
    jobs.append((HERE / "emulator.cpp", folder / "emulator.o", ("-O2",)))
    compile_all(jobs)
    link(folder / "kernels", [target for _, target, _ in jobs])
    return folder / "kernels"


def build_package(folder: Path) -> Path:
    """Make the package with its operators on the emulator; returns the folder for PYTHONPATH."""
    import torch

    torch_folder = Path(torch.__file__).parent
    includes = [f"-I{torch_folder / 'include'}", f"-I{torch_folder / 'include/torch/csrc/api/include'}"]
    on_host = (*includes, "-DUNICODE_FAST_ON_HOST")
    jobs = [(source, folder / f"{source.stem}.o", on_host) for source in (ROOT / "csrc" / "cuda").rglob("*_op.cpp")]
    python = (*includes, f"-I{sysconfig.get_path('include')}", f'-DUNICODE_FAST_TORCH="{torch.__version__}"')
    jobs.append((HERE / "extension.cpp", folder / "extension.o", python))
    kernels = [(source, folder / f"{source.stem}.o", KERNELS) for source in kernel_sources(ROOT / "csrc")]
    jobs += [*kernels, (HERE / "emulator.cpp", folder / "emulator.o", ("-O2",))]
    compile_all(jobs)

    package = folder / "package" / "unicode_fast"
    package.mkdir(parents=True, exist_ok=True)
    for source in [*(ROOT / "unicode_fast").iterdir(), ROOT / "kernels"]:
        place = package / source.name
        if source.name != "__pycache__" and not source.name.startswith("_C.") and not place.is_symlink():
            place.symlink_to(source)
    library = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    libraries = [f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch", f"-Wl,-rpath,{torch_folder / 'lib'}"]
    link(library, [target for _, target, _ in jobs], ["-shared", *libraries])
    record = {"torch": str(torch.__version__), "cuda": None, "decision": DECISION}
    Path(f"{library}.json").write_text(json.dumps(record, indent=1) + "\n")
    return folder / "package"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where to build; may hold an earlier build")
    folder = parser.parse_args().folder.resolve()
    if shutil.which(CXX[0]) is None:
        parser.error(f"CXX must name a C++ compiler, got {CXX[0]!r}")
    make_folder(folder)
    print(f"compiling for {folder}", flush=True)
    print(f"built {build_program(folder)}")
    print(f"built {build_package(folder)}")


if __name__ == "__main__":
    main()
