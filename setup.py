"""Decides what of csrc/ is compiled, and maps kernels/ into the package; everything else is in pyproject.toml."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
CUDA_HEADER = Path("include", "cuda_runtime_api.h")
CUDA_CHOICES = ("auto", "1", "0")
ARCHITECTURES = "8.0;8.6;8.9;9.0a+PTX"


def say(message: str) -> None:
    """One line of the build's output."""
    print(f"unicode_fast: {message}", file=sys.stderr)


def compiler_obstacle() -> str | None:
    """Why no C++ compiler can be used; None where one can."""
    if os.name == "nt":
        return None
    command = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if command is None:
        return "there is no C++ compiler"
    try:
        subprocess.run([*command.split(), "--version"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return f"the C++ compiler {command!r} does not run"
    return None


def find_cuda_home(guess: str | None) -> str | None:
    """The toolkit's folder, the one with its headers.

    torch guesses from the place of nvcc; where that is a wrapper script, the
    headers are elsewhere.

    Args:
        guess: what torch found, or None.
    """
    candidates = [os.environ.get("CUDA_HOME"), guess, "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc is not None and os.path.getsize(nvcc) < 4096:
        named = [word.strip("\"'") for word in Path(nvcc).read_text(errors="ignore").split()]
        candidates[2:2] = [str(Path(word).parent.parent) for word in named if word.endswith("bin/nvcc")]
    return next((home for home in candidates if home and Path(home, CUDA_HEADER).is_file()), None)


def decide_cuda(choice: str, torch_cuda: str | None, cuda_home: str | None) -> tuple[bool, str]:
    """Whether CUDA sources are compiled, and why.

    Args:
        choice: of UNICODE_FAST_CUDA: auto, 1 or 0.
        torch_cuda: the CUDA version torch was built with, or None.
        cuda_home: the toolkit's folder, or None.

    Raises:
        SystemExit: the choice is none of the three, or it is 1 and something is missing.
    """
    if choice not in CUDA_CHOICES:
        raise SystemExit(f"UNICODE_FAST_CUDA must be one of {', '.join(CUDA_CHOICES)}, got {choice!r}")
    if choice == "0":
        return False, "UNICODE_FAST_CUDA=0"
    missing = []
    if torch_cuda is None:
        missing.append("torch is a build without CUDA")
    if cuda_home is None:
        missing.append("no CUDA toolkit was found")
    if not missing:
        return True, f"toolkit {cuda_home}, torch built with CUDA {torch_cuda}"
    if choice == "1":
        raise SystemExit(f"UNICODE_FAST_CUDA=1, but {' and '.join(missing)}")
    return False, " and ".join(missing)


def extension_arguments() -> dict:
    """What setup() needs to compile the extension; nothing where that is not possible."""
    choice = os.environ.get("UNICODE_FAST_CUDA", "auto")
    if choice not in CUDA_CHOICES:
        decide_cuda(choice, None, None)
    obstacle = compiler_obstacle()
    if obstacle is None:
        try:
            import torch
        except ImportError as error:
            obstacle = f"torch cannot be imported ({error})"
    if obstacle is not None:
        if choice == "1":
            raise SystemExit(f"UNICODE_FAST_CUDA=1, but {obstacle}")
        say(f"no extension is built: {obstacle}; the reference backend is what runs")
        return {}
    from torch.utils import cpp_extension

    cuda_home = find_cuda_home(cpp_extension.CUDA_HOME)
    use_cuda, reason = decide_cuda(choice, torch.version.cuda, cuda_home)
    sources = [Path("csrc/extension.cpp"), *sorted(Path("csrc/cpu").glob("*.cpp"))]
    if use_cuda:
        sources += sorted([*Path("csrc/cuda").glob("*.cu"), *Path("csrc/cuda").glob("*.cpp")])
        os.environ["CUDA_HOME"] = cpp_extension.CUDA_HOME = cuda_home
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    say(f"extension for torch {torch.__version__}, {'with' if use_cuda else 'without'} CUDA: {reason}")

    class Build(cpp_extension.BuildExtension):
        """Leaves a note beside the extension that says which torch it belongs to."""

        def run(self) -> None:
            super().run()
            for name in [] if self.editable_mode else [self.get_ext_fullpath("unicode_fast._C")]:
                self.write_note(Path(name))
            if self.inplace or self.editable_mode:
                self.write_note(ROOT / "unicode_fast" / Path(self.get_ext_filename("unicode_fast._C")).name)

        def write_note(self, library: Path) -> None:
            library.parent.mkdir(parents=True, exist_ok=True)
            note = {"torch": torch.__version__, "cuda": torch.version.cuda if use_cuda else None}
            library.with_name(f"{library.name}.json").write_text(json.dumps(note) + "\n")

    kind = cpp_extension.CUDAExtension if any(path.suffix == ".cu" for path in sources) else cpp_extension.CppExtension
    macros = [("UNICODE_FAST_CUDA_VERSION", torch.version.cuda)] if use_cuda else []
    flags = {"cxx": ["-O3", "-std=c++20"], "nvcc": ["-O3", "-std=c++20"]}
    if os.name == "nt":
        flags["cxx"] = ["/O2", "/std:c++20"]
    return {
        "ext_modules": [
            kind("unicode_fast._C", [str(path) for path in sources], define_macros=macros, extra_compile_args=flags)
        ],
        "cmdclass": {"build_ext": Build},
    }


if __name__ == "__main__":
    setup(
        package_dir={"unicode_fast": "unicode_fast", "unicode_fast.kernels": "kernels"},
        **extension_arguments(),
    )
