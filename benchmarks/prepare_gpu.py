"""The kit of `benchmarks/on_gpu.sh` for a machine with a GPU and without network.

`python benchmarks/prepare_gpu.py --torch-python PYTHON` makes gpu-kit/. PYTHON has the torch of that machine, and
CUDA_HOME is a toolkit of its CUDA. The kit holds objects of csrc/, the native program, and this program with each
switch of forms.h at its other value. It also holds wheels that the machine lacks, a float16 store of the built-in data,
and the default run's scores on a CPU. A second call makes only outdated files again, and an interrupted run continues.

`--host FOLDER`, of tests/cuda_on_host/build.py, makes a small kit in build/dry-kit/ for a dry run without a GPU.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path += [str(HERE / "gpu"), str(ROOT / "tests")]

import tiny  # noqa: E402 - of the tests
from default_run import STEPS, trained  # noqa: E402 - beside the other stages
from dry_run import KIT as DRY_KIT  # noqa: E402
from dry_run import is_kit, pack_wheel  # noqa: E402
from program import FORMS, SEARCH, SOURCES, digest_of, flags, inputs, sources, switches  # noqa: E402

from unicode_fast.config import DataConfig  # noqa: E402
from unicode_fast.data import open_dataset, open_store  # noqa: E402
from unicode_fast.data.store.write import pack  # noqa: E402
from unicode_fast.files.paths import CACHE_VARIABLE  # noqa: E402
from unicode_fast.files.writing import write_json  # noqa: E402
from unicode_fast.training.runs import git_commit  # noqa: E402

# Intermediate files, which git ignores.
WORK = ROOT / "build" / "gpu-kit"
MOST_BYTES = 40 * 10**6
# Python of the machine with the GPU.
PYTHON_VERSION = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "any")
# Packages that the machine lacks: for streams, then contenders of the benchmarks with their dependencies.
WHEELS = (
    *("webdataset", "braceexpand"),
    "flash-kmeans",
    *("vector-quantize-pytorch", "einx", "frozendict", "loguru", "torch-einops-utils"),
    "inf-cl",
)


class Size(NamedTuple):
    """Size of the default run.

    Attributes:
        clips: fields with numbers of clips of the built-in data.
        fields: of the configuration that differ from the default.
        seeds: of the scores on a CPU.
    """

    clips: dict[str, int]
    fields: dict[str, Any]
    seeds: tuple[int, ...]


WHOLE = Size({"train_clips": 640, "val_clips": 120, "test_clips": 240}, {"steps": STEPS}, (0, 1))
FEW_STEPS = {"steps": 2, "batch_size": 4, "validations": 1, "probe_tasks": "localisation"}
TINY = Size({"train_clips": 8, "val_clips": 6, "test_clips": 6}, {**tiny.SIZES, **FEW_STEPS}, (0,))


def say(line: str) -> None:
    print(line, flush=True)


def make_objects(out: Path, python: str) -> dict[str, Any]:
    """Compiles csrc/ under another Python's torch; returns the manifest's entry."""
    if shutil.which(python) is None:
        sys.exit(f"error: --torch-python must be a Python, got {python}")
    say(f"compiling csrc/ with {python}")
    command = [python, str(HERE / "gpu" / "compile_objects.py"), str(WORK)]
    environment = {**os.environ, "UNICODE_FAST_CUDA": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode != 0:
        sys.exit(
            f"{done.stdout[-4000:]}\nerror: --torch-python must have a torch for CUDA, ninja and pybind11: {python}"
        )
    made = json.loads(done.stdout.splitlines()[-1])
    folder = out / "objects"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    files = []
    for path in map(Path, made.pop("objects")):
        files.append("-".join(path.relative_to(WORK / "objects" / "csrc").parts))
        shutil.copy(path, folder / files[-1])
    return {**made, "files": files, "sources": digest_of(sources())}


def make_programs(out: Path, objects: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """The native program of the kernels' objects; and packed, those with one switch at its other value."""
    made = inputs()
    if before == made and all((out / name).exists() for name in ("kernels", FORMS)):
        return made
    folder = WORK / f"program-{made['inputs'][:12]}"
    folder.mkdir(parents=True, exist_ok=True)

    def make(name: str, *words: str) -> str:
        target, partial = folder / name, folder / f"partial-{name}"
        if not target.exists():
            say(f"making {name}")
            subprocess.run([objects["nvcc"], *flags(objects["architectures"]), *words, "-o", str(partial)], check=True)
            partial.replace(target)
        return str(target)

    own = [(f"{source.stem}.o", "-c", str(source)) for source in sorted(SOURCES.glob("*.cu"))]
    search = [(f"{name}.o", f"-DUNICODE_FAST_{name}={value}", "-c", str(SEARCH)) for name, value in switches().items()]
    with ThreadPoolExecutor(2) as pool:
        files = list(pool.map(lambda job: make(*job), [*own, *search]))
    cases, searches = files[: len(own)], files[len(own) :]
    kernels = [
        str(out / "objects" / name) for name in objects["files"] if name.startswith("cuda-") and "_op" not in name
    ]
    shutil.copy(make("kernels", *kernels, *cases), out / "kernels")
    others = [file for file in kernels if not file.endswith(f"{SEARCH.stem}.o")]
    with tarfile.open(out / FORMS, "w:xz") as archive:
        for name, file in zip(switches(), searches, strict=True):
            # The linker takes the first of equal inline functions.
            archive.add(make(name, file, *others, *cases), name)
    return made


def take_from(host: Path, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Copies objects and program for the host, and a wheel for streams; returns the manifest's entries."""
    for name in ("objects", "wheels"):
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).mkdir(parents=True)
    made = json.loads((host / "manifest.json").read_text())
    for name in made["objects"]["files"]:
        shutil.copy(host / "objects" / name, out / "objects")
    shutil.copy(host / "kernels", out / "kernels")
    pack_wheel("webdataset", out / "wheels")
    return made["objects"], made["kernels"]


def make_wheels(out: Path) -> None:
    """Downloads missing wheels, and prints those that fail."""
    folder = out / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    for name in WHEELS:
        if any(wheel.name.lower().startswith(name.replace("-", "_") + "-") for wheel in folder.glob("*.whl")):
            continue
        platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps", "--dest"]
        command += [str(folder), "--only-binary=:all:", "--python-version", PYTHON_VERSION, "--implementation", "cp"]
        done = subprocess.run([*command, *platforms, name], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            say(f"wheels: {name} cannot be downloaded: {(errors or ['no message of pip'])[-1][:150]}")


def make_store(out: Path, size: Size) -> Path:
    """Packs fewer clips of the built-in data, in float16."""
    folder = out / "store"
    if not folder.exists():
        os.environ.setdefault(CACHE_VARIABLE, str(WORK / "cache"))
        data = open_dataset(DataConfig(**size.clips))  # type: ignore[arg-type]
        pack(data, folder, "float16")
        # Verified here, so that the other machine can skip the check; the lock is of this machine.
        open_store(folder)
        folder.with_name(f".{folder.name}.lock").unlink(missing_ok=True)
    return folder


def make_scores(out: Path, store: Path, size: Size) -> None:
    """Writes the default run's scores on a CPU for each seed."""
    target = out / "cpu-scores.json"
    expected = {"data": open_store(store).digest(), "fields": size.fields}
    if target.exists():
        before = json.loads(target.read_text())
        if {name: before.get(name) for name in expected} == expected:
            return
        target.unlink()
    runs = []
    for seed in size.seeds:
        inputs_of_run = json.dumps([expected, seed], sort_keys=True).encode()
        folder = WORK / f"cpu-run-{hashlib.sha256(inputs_of_run).hexdigest()[:12]}"
        runs.append({"seed": seed, **trained(store, folder, "cpu", {**size.fields, "seed": seed})})
    write_json(target, {**expected, "runs": runs})


def checksums(out: Path) -> dict[str, dict[str, Any]]:
    """Size and checksum of each file of the kit."""
    files = {}
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.name != "manifest.json":
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            files[str(path.relative_to(out))] = {"bytes": path.stat().st_size, "sha256": digest}
    return files


def print_table(files: dict[str, dict[str, Any]]) -> int:
    """Prints sizes by folder; returns their sum."""
    folders: dict[str, list[int]] = {}
    for name, file in files.items():
        folders.setdefault(name.partition("/")[0], []).append(file["bytes"])
    for folder, sizes in folders.items():
        say(f"{folder:16} {len(sizes):3} files {sum(sizes) / 1e6:8.2f} MB")
    total = sum(map(sum, folders.values()))
    say(f"{'all':16} {len(files):3} files {total / 1e6:8.2f} MB")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the kit [gpu-kit, with --host build/dry-kit]")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--torch-python", help="Python with the torch of the machine with the GPU")
    source.add_argument("--host", type=Path, help="folder of tests/cuda_on_host/build.py, for a dry run")
    parser.add_argument("--skip-scores", action="store_true", help="leave cpu-scores.json as it is")
    arguments = parser.parse_args()
    if arguments.host and not (arguments.host / "manifest.json").is_file():
        parser.error(f"--host must be a folder of tests/cuda_on_host/build.py, got {arguments.host}")
    out = (arguments.out or (DRY_KIT if arguments.host else ROOT / "gpu-kit")).resolve()
    if out.exists() and not out.is_dir():
        parser.error(f"--out must be a folder, got {out}")
    if arguments.host and out == arguments.host.resolve():
        parser.error(f"--out must be another folder than --host, got {out} for both")
    if (out / "manifest.json").exists() and is_kit(out) != bool(arguments.host):
        parser.error(f"--out must be a new folder, or hold a kit of the same kind, got {out}")
    out.mkdir(parents=True, exist_ok=True)
    manifest = out / "manifest.json"
    before = json.loads(manifest.read_text()) if manifest.exists() else {}
    if arguments.host:
        objects, program = take_from(arguments.host, out)
    else:
        objects = make_objects(out, arguments.torch_python)
        program = make_programs(out, objects, before.get("kernels", {}))
        del objects["nvcc"]
        make_wheels(out)
    size = TINY if arguments.host else WHOLE
    store = make_store(out, size)
    if not arguments.skip_scores:
        make_scores(out, store, size)
    files = checksums(out)
    write_json(manifest, {"commit": git_commit(), "objects": objects, "kernels": program, "files": files})
    if print_table(files) > MOST_BYTES:
        sys.exit(f"error: the kit must be at most {MOST_BYTES / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
