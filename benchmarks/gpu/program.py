"""The native program of benchmarks/gpu/kernels: the kit's where it fits, else compiled on this machine.

`python benchmarks/gpu/program.py --kit gpu-kit --out FOLDER` makes FOLDER/kernels, starts it once, and writes a record
of its sources beside it. If that fails, the error has the reasons. Only `--host` accepts a program of
tests/cuda_on_host/build.py in the kit.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = ROOT / "benchmarks" / "gpu" / "kernels"
SEARCH = ROOT / "csrc" / "cuda" / "nearest_codeword" / "nearest_codeword.cu"
# Programs of the kit with one switch of forms.h at its other value, by its name; packed, as they have most in common.
FORMS = "forms.tar.xz"
ARCHITECTURES = "9.0a"
# Exit status of the program for wrong arguments.
USAGE_STATUS = 64


class ProgramError(RuntimeError):
    """There is no program; the message has the reason."""


def digest_of(files: Iterable[Path]) -> str:
    """A checksum of the names and contents of files of the checkout."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def sources() -> list[Path]:
    """Sources of the extension."""
    return [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]


def switches() -> dict[str, int]:
    """The value of each switch of forms.h that is not chosen."""
    found = re.findall(r"^#define UNICODE_FAST_(\w+) ([01])$", SEARCH.with_name("forms.h").read_text(), re.MULTILINE)
    return {name: 1 - int(chosen) for name, chosen in found}


def inputs(*, on_host: bool = False) -> dict[str, str]:
    """Checksum of the program's sources, and its architecture: the manifest's entry."""
    return {"inputs": digest_of([*SOURCES.iterdir(), *sources()]), "for": "the host" if on_host else ARCHITECTURES}


def record(folder: Path) -> Path:
    """Path of the checksum of a folder's program."""
    return folder / "kernels.json"


def is_current(folder: Path, *, on_host: bool = False) -> bool:
    """True where the folder's program is of these sources."""
    file = record(folder)
    made = json.loads(file.read_text()) if (folder / "kernels").exists() and file.exists() else None
    return made == inputs(on_host=on_host)


def starts(program: Path) -> None:
    """Runs the program with the name of no kernel; the program refuses it, and a stand-in accepts it.

    Raises:
        ProgramError: it does not run here.
    """
    try:
        done = subprocess.run([str(program), "--only", "none"], capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise ProgramError(f"{program} cannot be started: {error}") from error
    if done.returncode not in (0, USAGE_STATUS):
        raise ProgramError(f"{program} cannot be started: status {done.returncode}")


def flags(architectures: str) -> list[str]:
    """Flags of nvcc, to compile and to link."""
    major, minor = architectures.split(".")
    code = f"arch=compute_{major}{minor},code=sm_{major}{minor}"
    prefix = f"-ffile-prefix-map={ROOT}=.,-pthread"
    return ["-std=c++20", "-O3", "-gencode", code, "-cudart", "static", "-Xcompiler", prefix]


def of_kit(kit: Path, name: str, *, on_host: bool) -> Path:
    """A file of the kit with programs.

    Raises:
        ProgramError: the kit lacks it, or it is of other sources or for another machine.
    """
    manifest = kit / "manifest.json"
    if not manifest.exists() or not (kit / name).exists():
        raise ProgramError("the kit has no native program")
    if json.loads(manifest.read_text()).get("kernels") != inputs(on_host=on_host):
        raise ProgramError("the kit's native program is of other sources; run benchmarks/prepare_gpu.py again")
    return kit / name


def take(kit: Path, target: Path, *, on_host: bool) -> None:
    """Copies the kit's program, and makes the copy executable.

    Raises:
        ProgramError: the kit has no program, or one of other sources or for another machine, or it does not run here.
    """
    shutil.copyfile(of_kit(kit, "kernels", on_host=on_host), target)
    target.chmod(0o755)
    starts(target)


def compiler() -> str:
    """Path of nvcc.

    Raises:
        ProgramError: nvcc is not installed.
    """
    homes = [home for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    path = os.pathsep.join([f"{homes[0]}/bin", os.environ.get("PATH", ""), f"{homes[-1]}/bin"])
    found = shutil.which("nvcc", path=path)
    if found is None:
        raise ProgramError("nvcc is not installed")
    return found


def compile_program(target: Path, nvcc: str) -> None:
    """Compiles all sources, as many at a time as there are cores, and links them.

    Raises:
        ProgramError: the compiler failed, or the program does not run here.
    """
    objects = target.with_name("kernels-objects")
    objects.mkdir(parents=True, exist_ok=True)
    files = sorted(
        [*SOURCES.glob("*.cu"), *(ROOT / "csrc" / "cuda").rglob("*.cu")], key=lambda file: -file.stat().st_size
    )
    made = [objects / f"{file.parent.name}-{file.stem}.o" for file in files]
    commands = [
        [nvcc, *flags(ARCHITECTURES), "-c", str(file), "-o", str(each)] for file, each in zip(files, made, strict=True)
    ]
    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
        # Reading the results raises the first exception; the other compilations end by themselves.
        list(pool.map(call, commands))
    call([nvcc, *flags(ARCHITECTURES), *map(str, made), "-o", str(target)])
    starts(target)


def call(command: Sequence[str]) -> None:
    """Runs a compiler.

    Raises:
        ProgramError: it failed.
    """
    try:
        subprocess.run(command, capture_output=True, text=True, errors="replace", check=True)
    except subprocess.CalledProcessError as error:
        errors = [line for line in (error.stderr or "").splitlines() if "error" in line] or [f"exit {error.returncode}"]
        raise ProgramError(f"nvcc failed: {errors[0][:150]}") from error
    except OSError as error:
        raise ProgramError(f"nvcc cannot be started: {error}") from error


def make(kit: Path, folder: Path, *, on_host: bool = False) -> str:
    """Makes a program in a folder; returns its origin as text.

    Raises:
        ProgramError: it can neither be copied nor compiled.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "kernels"
    for old in (target, record(folder)):
        old.unlink(missing_ok=True)
    try:
        take(kit, target, on_host=on_host)
        how = "the kit's"
    except ProgramError as reason:
        target.unlink(missing_ok=True)
        print(f"{reason}; compiling", flush=True)
        try:
            compile_program(target, compiler())
        except ProgramError as error:
            target.unlink(missing_ok=True)
            raise ProgramError(f"{reason}; {error}") from error
        how = f"compiled here, as {reason}"
    record(folder).write_text(json.dumps(inputs(on_host=on_host)))
    return how


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kit", type=Path, default=ROOT / "gpu-kit")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--host", action="store_true", help="in a dry run")
    arguments = parser.parse_args()
    try:
        print(make(arguments.kit, arguments.out, on_host=arguments.host))
    except ProgramError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
