"""Choose the sources of csrc/ to compile, and map kernels/ into the package. pyproject.toml has all other settings.

Environment variables:
    UNICODE_FAST_CUDA: auto (the default) compiles csrc/cuda if a CUDA toolkit, a CUDA build of torch and a visible
        GPU are found; the value 1 needs no GPU, and fails without the toolkit or a CUDA build of torch; 0 omits
        csrc/cuda.
    CUDA_HOME, CUDA_PATH: the toolkit; the default is the toolkit of nvcc, then the conventional folder.
    TORCH_CUDA_ARCH_LIST: GPU architectures; the default is those of the visible GPUs for auto, all ARCHITECTURES for 1.
    CXX, CC, MAX_JOBS: as for torch's cpp_extension and setuptools.

An editable install compiles nothing if the record beside the extension in the source folder has the same inputs (see
`inputs_of`) and the extension's checksum. To compile again, remove the record, unicode_fast/_C.*.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

EXTENSION = "unicode_fast._C"
# Suffix of the record beside the extension; unicode_fast/backend.py has the same constant.
RECORD_SUFFIX = ".json"
ROOT = Path(__file__).resolve().parent
CUDA_CHOICES = ("auto", "1", "0")
# PTX of 8.9 runs on every later GPU; PTX of 9.0a would run on none, because it is architecture-specific.
ARCHITECTURES = "8.0;8.6;8.9+PTX;9.0a"
CONVENTIONAL_TOOLKIT = Path("/usr/local/cuda")
# Prints the compute capability of each visible GPU, and the architectures of torch's own kernels, such as "sm_90".
QUERY_GPUS = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
import torch
gpus = [torch.cuda.get_device_capability(number) for number in range(torch.cuda.device_count())]
print(json.dumps([gpus, torch.cuda.get_arch_list()]))
"""
# Environment variables that may change what setuptools, torch, GCC, Clang and nvcc make.
VARIABLES = (
    r"AR|CC|CPP|CXX|LD\w*|CPATH|LIBRARY_PATH|\w+_INCLUDE_PATH|\w*FLAGS|\w*(NVCC|CUDA|TORCH)\w*"
    r"|COMPILER_PATH|GCC_EXEC_PREFIX|MACOSX_DEPLOYMENT_TARGET|SDKROOT"
)
# Commands that compile nothing; setup.py runs them before torch is installed.
METADATA_COMMANDS = {"egg_info", "dist_info", "sdist", "clean", "--version", "--help"}


class Toolkit(NamedTuple):
    """A CUDA toolkit: its folder, its version, such as "13.0", and how it was found."""

    home: Path
    version: str
    origin: str


class Sdist(sdist):
    """A source archive with all files that a build needs."""

    def make_distribution(self) -> None:
        """Add the build backend and the C++ sources, which setuptools omits if nothing is compiled."""
        sources = [str(path) for path in sorted(Path("csrc").rglob("*")) if path.is_file()]
        self.filelist.extend(["build_backend.py", *sources])
        super().make_distribution()


def cuda_choice(environment: Mapping[str, str]) -> str:
    """The value of UNICODE_FAST_CUDA.

    Raises:
        SystemExit: the value is not auto, 1 or 0.
    """
    choice = environment.get("UNICODE_FAST_CUDA", "auto")
    if choice not in CUDA_CHOICES:
        raise SystemExit(f"unicode_fast: UNICODE_FAST_CUDA must be auto, 1 or 0, got {choice!r}")
    return choice


def find_toolkit(environment: Mapping[str, str], conventional: Path = CONVENTIONAL_TOOLKIT) -> Toolkit | str:
    """The CUDA toolkit to compile with, or the reason why there is none.

    torch uses the folder above nvcc's as the toolkit. That folder has no headers if nvcc is a wrapper script, so the
    real path of nvcc is followed.

    Args:
        environment: environment variables; CUDA_HOME and CUDA_PATH come first, without a fallback to other folders.
        conventional: last folder to search.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environment.get(variable):
            home = Path(environment[variable])
            version = toolkit_version(home)
            if version is None:
                return f"{variable}={home} holds no include/cuda_runtime_api.h and bin/nvcc"
            return Toolkit(home, version, variable)
    nvcc = shutil.which("nvcc", path=environment.get("PATH", ""))
    candidates = [(conventional, "the conventional folder")]
    if nvcc is not None:
        candidates = [
            (Path(nvcc).parent.parent, f"from {nvcc}"),
            (Path(nvcc).resolve().parent.parent, f"from the link {nvcc}"),
            *[(home, f"from the wrapper {nvcc}") for home in called_toolkit(nvcc)],
            *candidates,
        ]
    for home, origin in candidates:
        version = toolkit_version(home)
        if version is not None:
            return Toolkit(home, version, origin)
    return "no CUDA toolkit was found" if nvcc is None else f"no CUDA headers were found for {nvcc}"


def toolkit_version(home: Path) -> str | None:
    """Version of the CUDA toolkit in this folder; None without a toolkit."""
    try:
        header = (home / "include" / "cuda_runtime_api.h").read_text(errors="replace")
    except OSError:
        return None
    number = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", header)
    if number is None or shutil.which("nvcc", path=str(home / "bin")) is None:
        return None
    return f"{int(number[1]) // 1000}.{int(number[1]) % 1000 // 10}"


def called_toolkit(nvcc: str) -> list[Path]:
    """The toolkit in the output of `nvcc --dryrun`; empty if the output has none."""
    try:
        command = [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]
        output = subprocess.run(command, capture_output=True, text=True, errors="replace").stderr
    except OSError:
        return []
    return [Path(top).resolve() for top in re.findall(r"^#\$ TOP=(.+)$", output, re.MULTILINE)]


def cuda_obstacle(torch_version: str, torch_cuda: str | None, toolkit: Toolkit | str) -> str | None:
    """The reason why csrc/cuda cannot be compiled; None if it can.

    Args:
        torch_version: version of torch, such as "2.13.0+cpu".
        torch_cuda: CUDA version of torch's build; None for a build without CUDA.
        toolkit: result of `find_toolkit`.
    """
    if torch_cuda is None:
        return f"torch {torch_version} is a build without CUDA"
    if isinstance(toolkit, str):
        return toolkit
    if toolkit.version.split(".")[0] != torch_cuda.split(".")[0]:
        return f"torch {torch_version} needs a CUDA {torch_cuda} toolkit, {toolkit.home} is CUDA {toolkit.version}"
    return None


def visible_architectures() -> tuple[str, str]:
    """The architectures of the visible GPUs in the form of TORCH_CUDA_ARCH_LIST, and the reason if there are none.

    The query runs in a separate process. This process would otherwise keep GPU memory while it compiles, and a broken
    driver could end it.
    """
    command = [sys.executable, "-c", QUERY_GPUS, json.dumps(sys.path)]
    query = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if query.returncode == 0:
        return architectures_of(*json.loads(query.stdout.splitlines()[-1])), "no GPU that torch can use"
    errors = query.stderr.strip().splitlines() or [f"status {query.returncode}"]
    return "", f"torch cannot list the GPUs ({errors[-1]})"


def architectures_of(capabilities: Iterable[Sequence[int]], known: Iterable[str]) -> str:
    """The architectures of these GPUs in the form of TORCH_CUDA_ARCH_LIST; empty if torch can use no GPU.

    A GPU newer than torch gets torch's newest architecture with PTX. GPUs older than torch's oldest are omitted.

    Args:
        capabilities: compute capabilities of the GPUs, such as (8, 6).
        known: architectures of torch's own kernels, such as "sm_86".
    """
    versions = [divmod(int(number), 10) for name in known for number in re.findall(r"^sm_(\d+)", name)]
    found = sorted({min(tuple(one), max(versions)) for one in capabilities if versions and tuple(one) >= min(versions)})
    names = ["9.0a" if version == (9, 0) else "{}.{}".format(*version) for version in found]
    # PTX for later GPUs; see ARCHITECTURES.
    return ";".join(names) + ("+PTX" if names and names[-1] != "9.0a" else "")


def cxx_command(environment: Mapping[str, str]) -> list[str]:
    """The command of the C++ compiler that torch uses."""
    return shlex.split(environment.get("CXX") or "c++")


def cxx_flags(command: Sequence[str]) -> list[str]:
    """Flags for C++ files.

    Without OpenMP, at::parallel_for would run on one thread. The OpenMP library is not linked, so the extension uses
    torch's loaded library and number of threads. Code of Clang would need another library. Square roots that set errno
    would be taken one by one.
    """
    macros = subprocess.run([*command, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True).stdout
    flags = ["-O3", "-fno-math-errno"]
    return flags if sys.platform != "linux" or "__clang__" in macros else [*flags, "-fopenmp"]


def compiler_obstacle(command: Sequence[str]) -> str | None:
    """The reason why this C++ compiler cannot build a Python extension, in one line; None if it can."""
    if shutil.which(command[0]) is None:
        return f"no C++ compiler was found ({command[0]})"
    headers = {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "trial.cpp")
        source.write_text("#include <vector>\n#include <Python.h>\nint main() { return 0; }\n")
        flags = [*(f"-I{path}" for path in sorted(headers)), "-fPIC", "-shared", "-o", str(Path(folder, "trial.so"))]
        trial = subprocess.run([*command, *flags, str(source)], capture_output=True, text=True, errors="replace")
    if trial.returncode == 0:
        return None
    lines = [line.strip() for line in trial.stderr.splitlines() if line.strip()]
    reason = next((line for line in lines if "error" in line), lines[0] if lines else f"status {trial.returncode}")
    return f"{shlex.join(command)} cannot compile a Python extension ({reason})"


def source_files(folder: Path, with_cuda: bool) -> list[str]:
    """The files to compile, relative to `folder`, the source tree.

    Raises:
        SystemExit: two files would have the same object file.
    """
    patterns = ["csrc/extension.cpp", "csrc/cpu/*.cpp"]
    if with_cuda:
        patterns += ["csrc/cuda/**/*.cu", "csrc/cuda/**/*.cpp"]
    files = [path.relative_to(folder) for pattern in patterns for path in sorted(folder.glob(pattern))]
    twice = [stem for stem, count in Counter(path.with_suffix("") for path in files).items() if count > 1]
    if twice:
        raise SystemExit(f"unicode_fast: source files must differ in more than their suffix, got two of {twice[0]}")
    return [str(path) for path in files]


def headers(folder: Path) -> list[str]:
    """The headers of the sources; a change of a header compiles the sources again."""
    return [str(path.relative_to(folder)) for path in sorted(folder.glob("csrc/**/*.*h"))]


def say(line: str) -> None:
    """Print a line to the build's log, which `pip -v` shows."""
    print(f"unicode_fast: {line}", flush=True)


def extension_options(environment: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of setup() for the extension; empty if it cannot be compiled.

    Raises:
        SystemExit: csrc/cuda cannot be compiled with UNICODE_FAST_CUDA=1, or torch is missing.
    """
    choice = cuda_choice(environment)
    obstacle = "csrc/ needs GCC or Clang" if os.name == "nt" else compiler_obstacle(cxx_command(environment))
    if obstacle is not None:
        if choice == "1":
            raise SystemExit(f"unicode_fast: UNICODE_FAST_CUDA=1 cannot compile csrc/cuda: {obstacle}")
        say(f"compiling nothing, only the reference backend will be available: {obstacle}")
        return {}
    try:
        import torch
    except ImportError as error:
        raise SystemExit(
            f"unicode_fast: torch must be importable to compile the extension, got: {error}. Install torch first, or "
            "omit --no-build-isolation."
        ) from error
    toolkit = find_toolkit(environment)
    obstacle = cuda_obstacle(torch.__version__, torch.version.cuda, toolkit)
    if choice == "1" and obstacle is not None:
        raise SystemExit(f"unicode_fast: UNICODE_FAST_CUDA=1 cannot compile csrc/cuda: {obstacle}")
    architectures, hint = ARCHITECTURES, ""
    if choice == "auto" and obstacle is None:
        architectures, why = visible_architectures()
        if not architectures:
            obstacle, hint = why, "; UNICODE_FAST_CUDA=1 compiles csrc/cuda for all architectures"
    use = toolkit if choice != "0" and obstacle is None and isinstance(toolkit, Toolkit) else None
    reason = f": {obstacle}" if choice == "auto" and obstacle is not None else ""
    chosen = environment.get("TORCH_CUDA_ARCH_LIST") or architectures
    return compile_options(use, chosen, f"UNICODE_FAST_CUDA={choice}{reason}", hint)


def compile_options(toolkit: Toolkit | None, architectures: str, reason: str, hint: str = "") -> dict[str, Any]:
    """The extension, and the command that compiles it against the installed torch.

    Args:
        toolkit: toolkit for csrc/cuda; None omits csrc/cuda.
        architectures: architectures of csrc/cuda, in the form of TORCH_CUDA_ARCH_LIST.
        reason: reason of the choice, for the log and for the error of a missing backend.
        hint: addition to the log's line if csrc/cuda is omitted.
    """
    if toolkit is not None:
        # torch's cpp_extension reads both variables.
        os.environ["CUDA_HOME"] = str(toolkit.home)
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
    import torch
    from torch.utils import cpp_extension

    sources = source_files(ROOT, with_cuda=toolkit is not None)
    record: dict[str, str | None] = {"torch": str(torch.__version__), "cuda": None, "decision": reason}
    if toolkit is None:
        say(f"compiling for CPUs only, with torch {torch.__version__} ({reason}){hint}")
        make = cpp_extension.CppExtension
    else:
        cpp_extension.CUDA_HOME = str(toolkit.home)
        record |= {"cuda": toolkit.version, "architectures": architectures}
        found = sum(name.endswith(".cu") for name in sources)
        say(
            f"compiling for CPUs and CUDA {toolkit.version} ({reason}; {found} CUDA sources), with torch "
            f"{torch.__version__}, {toolkit.home} ({toolkit.origin}), architectures {architectures}"
        )
        make = cpp_extension.CUDAExtension
    extension = make(
        EXTENSION,
        sources,
        include_dirs=pybind11_headers(),
        define_macros=macros(record),
        depends=headers(ROOT),
        extra_compile_args={"cxx": cxx_flags(cxx_command(os.environ)), "nvcc": ["-O3"]},
    )
    tools = [cxx_command(os.environ), *([] if toolkit is None else [[str(toolkit.home / "bin" / "nvcc")]])]
    record["inputs"] = inputs_of(record, extension.extra_compile_args, tools)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": recording(cpp_extension.BuildExtension, record)}}


def inputs_of(record: Mapping[str, str | None], flags: object, tools: Sequence[Sequence[str]]) -> str:
    """A checksum of what the extension is made from: csrc/, this file, options, compilers, Python, torch and pybind11.

    Of torch, pybind11 and the compilers versions count, and of the first two the sizes of files.

    Args:
        record: versions of torch and CUDA, and the decision.
        flags: of the compilers.
        tools: commands of the compilers.
    """
    import torch

    versions = [subprocess.run([*tool, "--version"], capture_output=True, text=True).stdout for tool in tools]
    variables = {name: value for name, value in sorted(os.environ.items()) if re.fullmatch(VARIABLES, name)}
    # Two builds of a version may differ, so their files' sizes count.
    others = [Path(torch.__file__).parent / "lib", *(Path(folder) / "pybind11" for folder in pybind11_headers())]
    files = [path for folder in others for path in sorted(folder.glob("*")) if path.is_file()]
    sizes = [(path.name, path.stat().st_size) for path in files]
    parts = [record, flags, tools, versions, variables, sizes, sys.version, torch.version.git_version]
    digest = hashlib.sha256(json.dumps(parts).encode())
    for path in (ROOT / "setup.py", *sorted(path for path in ROOT.glob("csrc/**/*") if path.is_file())):
        digest.update(f"{path.relative_to(ROOT)} {checksum(path)}\n".encode())
    return digest.hexdigest()


def checksum(path: Path) -> str:
    """The checksum of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pybind11_headers() -> list[str]:
    """The include folder of the build requirement pybind11; empty without it, for torch's own copy.

    Only csrc/extension.cpp includes pybind11, and it includes no header of torch, so the two copies do not mix.
    """
    try:
        import pybind11
    except ImportError:
        return []
    return [str(pybind11.get_include())]


def macros(record: Mapping[str, str | None]) -> list[tuple[str, str | None]]:
    """The macros of csrc/extension.cpp, as C++ string literals; entries without a value are not defined."""
    named = {f"UNICODE_FAST_{name.upper()}": value for name, value in record.items() if name != "decision"}
    return [(name, json.dumps(value)) for name, value in named.items() if value is not None]


def recording(build_ext: type, record: Mapping[str, str | None]) -> type:
    """A `build_ext` that also writes the record, a JSON file that `unicode_fast.backend` reads before the extension.

    An extension in the source folder with the same record, and the checksum of that file, is not compiled again.
    """

    def whole(library: str) -> str:
        return json.dumps({**record, "extension": checksum(Path(library))}, indent=1) + "\n"

    def is_current(library: str) -> bool:
        known = Path(library + RECORD_SUFFIX)
        return known.is_file() and Path(library).is_file() and known.read_text() == whole(library)

    class RecordingBuild(build_ext):  # type: ignore[misc,valid-type]
        def run(self) -> None:
            copies = self.get_output_mapping()
            made = [copy for copy in copies.values() if not copy.endswith(RECORD_SUFFIX)]
            asked = any(getattr(self, name, None) for name in ("force", "debug", "define", "undef"))
            if made and not asked and all(map(is_current, made)):
                say(f"compiling nothing: {', '.join(made)} is of these sources, options, compilers, Python and torch")
                for built, copy in copies.items():
                    Path(built).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(copy, built)
                return
            super().run()
            for path in {*self.get_outputs(), *copies, *copies.values()}:
                if path.endswith(RECORD_SUFFIX):
                    Path(path).write_text(whole(path.removesuffix(RECORD_SUFFIX)))

        def get_outputs(self) -> list[str]:
            libraries = [path for path in super().get_outputs() if not path.endswith(RECORD_SUFFIX)]
            return [*libraries, *(path + RECORD_SUFFIX for path in libraries)]

        def get_output_mapping(self) -> dict[str, str]:
            libraries = super().get_output_mapping()
            return libraries | {built + RECORD_SUFFIX: copy + RECORD_SUFFIX for built, copy in libraries.items()}

    return RecordingBuild


def compiles(arguments: Iterable[str]) -> bool:
    """Whether any command of setup.py's command line compiles."""
    return not METADATA_COMMANDS & set(arguments)


if __name__ == "__main__":
    cuda_choice(os.environ)
    options = extension_options(os.environ) if compiles(sys.argv[1:]) else {}
    options.setdefault("cmdclass", {})["sdist"] = Sdist
    setup(
        packages=[*find_packages(include=["unicode_fast", "unicode_fast.*"]), "unicode_fast.kernels"],
        package_dir={"unicode_fast.kernels": "kernels"},
        **options,
    )
