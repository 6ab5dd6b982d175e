"""The package as a whole: a silent import, imports only from lower layers, and the decisions of its build."""

import ast
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from processes import python

import unicode_fast
from unicode_fast.__main__ import COMMANDS
from unicode_fast.__main__ import main as commands
from unicode_fast.__main__ import run as run_command
from unicode_fast.errors import SCRIPT, UsageError, run_main

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "unicode_fast"

# Lowest first: a sub-package imports from its own layer or a lower one, never from a higher one.
LAYERS = [
    {"version", "errors", "threads", "files", "headless", "backend", "config"},
    {"reference", "kernels"},
    {"ops"},
    {"modules", "losses"},
    {"methods", "presets", "tasks", "data", "media", "codes", "compat", "checkpoint", "checked_state", "health"},
    {"cli", "report", "training", "train", "evaluate", "convert", "ablate", "leaderboard", "many_runs"}
    | {"extract", "encode", "search", "inspect", "reproduce", "table_commands", "__main__"},
]
# A convenience of the model for whole files, which it imports when it is called.
UPWARD = {("unicode_fast.modules.model", "unicode_fast.codes.files")}
HEIGHT = {part: height for height, layer in enumerate(LAYERS) for part in layer}


def source(name: str) -> ModuleType:
    """A module of the repository's root, imported without installation."""
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location(f"root_{name}", ROOT / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    """setup.py."""
    return source("setup")


@pytest.fixture(scope="module")
def build_backend() -> ModuleType:
    """build_backend.py."""
    return source("build_backend")


def run(code: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a separate process with this process's import path."""
    paths = os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH")) if path)
    return python("-c", code, folder=folder, PYTHONPATH=paths, **variables)


class TestImport:
    def test_is_silent_and_needs_no_gpu_triton_or_compiler(self, tmp_path: Path) -> None:
        code = """
import sys, torch
before = set(sys.modules)
import subprocess
subprocess.Popen = None
import unicode_fast
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert not new & {"triton", "setuptools", "ninja", "matplotlib", "sklearn", "tensorboard"}, new
assert "torch.utils.cpp_extension" not in sys.modules
assert not torch.cuda.is_initialized()
"""
        result = run(code, tmp_path, PATH="", CUDA_VISIBLE_DEVICES="")
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")

    def test_kernels_are_found_from_any_folder(self, tmp_path: Path) -> None:
        try:
            importlib.metadata.distribution("unicode_fast")
        except importlib.metadata.PackageNotFoundError:
            pytest.skip("the package is not installed, so nothing maps kernels/ into it")
        if importlib.util.find_spec("unicode_fast.kernels") is None:
            pytest.skip("this is the source folder of a package that is installed elsewhere or by a wheel")
        result = run("import unicode_fast.kernels", tmp_path)
        assert (result.returncode, result.stderr) == (0, "")

    def test_version_is_one(self) -> None:
        try:
            installed = importlib.metadata.version("unicode_fast")
        except importlib.metadata.PackageNotFoundError:
            pytest.skip("the package is not installed")
        assert unicode_fast.__version__ == installed


def layer_of(module: str) -> str:
    """The sub-package of a module, such as "ops" for "unicode_fast.ops.codebook_update"."""
    return module.split(".")[1]


def public_homes() -> dict[str, str]:
    """The sub-package of each name in unicode_fast/__init__.py."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "." in str(node.module)]
    return {alias.name: layer_of(str(node.module)) for node in imports for alias in node.names}


def imported_modules(path: Path, name: str) -> set[str]:
    """Full names of a file's imports from the package, including imports inside functions."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            if module == "unicode_fast":
                homes = public_homes()
                found |= {f"unicode_fast.{homes.get(alias.name, alias.name)}" for alias in node.names}
            else:
                found.add(module)
    return {each for each in found if each.startswith("unicode_fast.")}


def package_files() -> list[tuple[str, Path]]:
    """Every file of the package except __init__.py, and its module name."""
    files = [(("unicode_fast", *path.relative_to(PACKAGE).parts), path) for path in sorted(PACKAGE.rglob("*.py"))]
    files += [(("unicode_fast", "kernels", path.name), path) for path in sorted((ROOT / "kernels").glob("*.py"))]
    names = [(".".join(parts).removesuffix(".py").removesuffix(".__init__"), path) for parts, path in files]
    return [(name, path) for name, path in names if name != "unicode_fast"]


class TestCommands:
    def test_all_are_listed(self, capsys: pytest.CaptureFixture[str]) -> None:
        guarded = [path for path in PACKAGE.glob("*.py") if '\nif __name__ == "__main__":' in path.read_text()]
        found = {path.stem for path in guarded} - {"__main__"} | {
            path.parent.name for path in PACKAGE.glob("*/__main__.py")
        }
        assert set(COMMANDS) == found
        assert commands([]) == 0
        shown = capsys.readouterr().out
        assert all(f"  {name} " in shown and text in shown for name, text in COMMANDS.items())

    def test_a_misspelt_one_is_answered_with_the_near_one(self) -> None:
        with pytest.raises(UsageError, match=r"'trian' .*, is train meant\?; .*see python -m unicode_fast --help"):
            commands(["trian"])

    @pytest.mark.parametrize(
        ("called", "name"),
        [
            ("/usr/bin/unicode-fast", "unicode-fast report"),
            (PACKAGE / "__main__.py", "python -m unicode_fast report"),
            (PACKAGE / "report" / "__main__.py", "python -m unicode_fast.report"),
            ("pytest", "python -m unicode_fast.report"),
        ],
    )
    def test_usage_names_how_it_was_called(
        self, called: str | Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "argv", [str(called)])
        with pytest.raises(SystemExit, match="0"):
            commands(["report", "--help"])
        assert capsys.readouterr().out.startswith(f"usage: {name} [-h]")

    def test_version_lists_backends_and_imports_no_command(self, tmp_path: Path) -> None:
        code = """
import sys
from unicode_fast.__main__ import main
main(["--version"])
assert not {"unicode_fast.train", "unicode_fast.evaluate", "matplotlib"} & set(sys.modules)
"""
        lines = run(code, tmp_path).stdout.splitlines()
        assert lines[:2] == [f"unicode_fast {unicode_fast.__version__}", f"torch {torch.__version__}"]
        assert [line.partition(": ")[0] for line in lines[2:]] == ["cpp", "cuda", "triton"]
        assert lines[2].partition(": ")[2] == unicode_fast.available_backends()["nearest_codeword"]["cpp"]

    def test_the_installed_command_is_that_of_the_package(self) -> None:
        entry = f'\n{SCRIPT} = "{run_command.__module__}:{run_command.__name__}"\n'
        assert entry in (ROOT / "pyproject.toml").read_text()


class TestLayers:
    @pytest.mark.parametrize(
        ("name", "path"), package_files(), ids=lambda value: value if isinstance(value, str) else ""
    )
    def test_arrows_point_downward(self, name: str, path: Path) -> None:
        assert layer_of(name) in HEIGHT, f"{name} has no place in LAYERS"
        for module in imported_modules(path, name) - {module for owner, module in UPWARD if owner == name}:
            assert HEIGHT[layer_of(module)] <= HEIGHT[layer_of(name)], f"{name} imports {module}, which is above it"

    def test_an_upward_arrow_is_found(self, tmp_path: Path) -> None:
        path = tmp_path / "upward.py"
        path.write_text("def late():\n    from ..modules import codebook\n    from unicode_fast import Config, load\n")
        assert imported_modules(path, "unicode_fast.ops.upward") == {
            "unicode_fast.modules",
            "unicode_fast.config",
            "unicode_fast.checkpoint",
        }


class TestBuildBackend:
    @pytest.mark.parametrize(
        ("version", "requirements"),
        [("2.13.0+cpu", []), ("2.10.0", []), ("3.0", []), ("2.9.1", ["torch>=2.10"]), (None, ["torch>=2.10"])],
    )
    def test_torch_is_required_without_a_usable_one(
        self, build_backend: ModuleType, tmp_path: Path, version: str | None, requirements: list[str]
    ) -> None:
        if version is not None:
            folder = tmp_path / f"torch-{version}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        assert build_backend.torch_requirements([str(tmp_path)]) == requirements

    def test_the_requirement_is_that_of_the_package(self, build_backend: ModuleType) -> None:
        assert f'"{build_backend.TORCH_REQUIREMENT}",\n' in (ROOT / "pyproject.toml").read_text()

    def test_the_commands_of_the_readme_install_torch_once(self, build_backend: ModuleType) -> None:
        first = f"python3 -m venv .venv && .venv/bin/pip install '{build_backend.TORCH_REQUIREMENT}' && "
        readme = (ROOT / "README.md").read_text()
        for name in ("run", "test"):
            assert f"<!-- {name}-command -->\n```bash\n{first}.venv/bin/pip install -e " in readme

    def test_finds_packages_outside_isolation(
        self, build_backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setenv("PYTHONNOUSERSITE", "1")
        (tmp_path / "sitecustomize.py").write_text("import sys; sys.path[:] = [sys.path[0]]; print('noise')")
        paths = build_backend.target_paths()
        assert str(tmp_path) not in paths
        assert build_backend.usable_torch(paths) == importlib.metadata.version("torch")

    def test_has_every_hook(self, build_backend: ModuleType) -> None:
        from setuptools import build_meta

        hooks = {name for name in dir(build_meta) if name.startswith(("build_", "get_requires_", "prepare_metadata_"))}
        assert hooks <= set(build_backend.__all__)
        assert all(callable(getattr(build_backend, name)) for name in build_backend.__all__)


def make_toolkit(home: Path, version: int = 13000, wrapper_of: Path | None = None) -> Path:
    """A folder with the files of a CUDA toolkit, or only with a wrapper of its nvcc."""
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    top = home if wrapper_of is None else wrapper_of
    nvcc.write_text(f"#!/bin/sh\necho '#$ TOP={top}/bin/..' >&2\n")
    nvcc.chmod(0o755)
    if wrapper_of is None:
        (home / "include").mkdir()
        (home / "include" / "cuda_runtime_api.h").write_text(f"#define CUDART_VERSION  {version}\n")
    return home


@pytest.mark.skipif(os.name == "nt", reason="the toolkit made here has shell scripts for programs")
class TestToolkit:
    def test_named_by_a_variable(self, setup: ModuleType, tmp_path: Path) -> None:
        home, other = make_toolkit(tmp_path / "named", 12080), make_toolkit(tmp_path / "other")
        environment = {"CUDA_HOME": str(home), "PATH": str(other / "bin")}
        assert setup.find_toolkit(environment, other) == (home, "12.8", "CUDA_HOME")

    def test_a_named_folder_without_toolkit_is_not_replaced(self, setup: ModuleType, tmp_path: Path) -> None:
        other = make_toolkit(tmp_path / "other")
        found = setup.find_toolkit({"CUDA_HOME": str(tmp_path), "PATH": str(other / "bin")}, other)
        assert found == f"CUDA_HOME={tmp_path} holds no include/cuda_runtime_api.h and bin/nvcc"

    def test_around_nvcc(self, setup: ModuleType, tmp_path: Path) -> None:
        home = make_toolkit(tmp_path / "toolkit")
        assert setup.find_toolkit({"PATH": str(home / "bin")}, tmp_path / "none")[:2] == (home, "13.0")

    def test_behind_a_link(self, setup: ModuleType, tmp_path: Path) -> None:
        home = make_toolkit(tmp_path / "toolkit")
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "nvcc").symlink_to(home / "bin" / "nvcc")
        assert setup.find_toolkit({"PATH": str(tmp_path / "bin")}, tmp_path / "none")[:2] == (home, "13.0")

    def test_behind_a_wrapper(self, setup: ModuleType, tmp_path: Path) -> None:
        home = make_toolkit(tmp_path / "toolkit")
        wrapper = make_toolkit(tmp_path / "local", wrapper_of=home)
        found = setup.find_toolkit({"PATH": str(wrapper / "bin")}, tmp_path / "none")
        assert found == (home, "13.0", f"from the wrapper {wrapper}/bin/nvcc")

    def test_in_the_conventional_folder(self, setup: ModuleType, tmp_path: Path) -> None:
        home = make_toolkit(tmp_path / "toolkit")
        wrapper = make_toolkit(tmp_path / "local", wrapper_of=tmp_path / "gone")
        for path in ("", str(wrapper / "bin")):
            assert setup.find_toolkit({"PATH": path}, home) == (home, "13.0", "the conventional folder")

    def test_nowhere(self, setup: ModuleType, tmp_path: Path) -> None:
        wrapper = make_toolkit(tmp_path / "local", wrapper_of=tmp_path / "gone")
        assert setup.find_toolkit({"PATH": ""}, tmp_path / "none") == "no CUDA toolkit was found"
        found = setup.find_toolkit({"PATH": str(wrapper / "bin")}, tmp_path / "none")
        assert found == f"no CUDA headers were found for {wrapper}/bin/nvcc"

    def test_a_folder_without_nvcc_is_none(self, setup: ModuleType, tmp_path: Path) -> None:
        home = make_toolkit(tmp_path / "toolkit")
        (home / "bin" / "nvcc").unlink()
        assert setup.toolkit_version(home) is None


class TestSetup:
    @pytest.mark.parametrize("value", ["auto", "1", "0"])
    def test_choices(self, setup: ModuleType, value: str) -> None:
        assert setup.cuda_choice({"UNICODE_FAST_CUDA": value}) == value
        assert setup.cuda_choice({}) == "auto"

    @pytest.mark.parametrize("value", ["", "yes", "2", "AUTO"])
    def test_other_choices_are_refused(self, setup: ModuleType, value: str) -> None:
        with pytest.raises(SystemExit, match=f"UNICODE_FAST_CUDA must be auto, 1 or 0, got '{value}'"):
            setup.cuda_choice({"UNICODE_FAST_CUDA": value})

    @pytest.mark.parametrize(
        ("torch_cuda", "version", "obstacle"),
        [
            ("13.0", "13.0", None),
            ("13.0", "13.1", None),
            ("13.0", "12.8", "needs a CUDA 13.0 toolkit, /cuda is CUDA 12.8"),
            ("13.0", None, "no toolkit"),
            (None, "13.0", "torch 2.13.0 is a build without CUDA"),
            (None, None, "torch 2.13.0 is a build without CUDA"),
        ],
    )
    def test_cuda_needs_a_fitting_toolkit_and_torch(
        self, setup: ModuleType, torch_cuda: str | None, version: str | None, obstacle: str | None
    ) -> None:
        toolkit = "no toolkit" if version is None else setup.Toolkit(Path("/cuda"), version, "here")
        found = setup.cuda_obstacle("2.13.0", torch_cuda, toolkit)
        assert found is None if obstacle is None else obstacle in found

    @pytest.mark.skipif(torch.version.cuda is not None, reason="needs a torch that CUDA cannot be compiled for")
    def test_cuda_is_left_out_or_refused_without_a_cuda_torch(
        self, setup: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(setup, "compiler_obstacle", lambda command: None)
        for choice in ("auto", "0"):
            options = setup.extension_options({"UNICODE_FAST_CUDA": choice})
            assert [each.name for each in options["ext_modules"]] == ["unicode_fast._C"]
            line = capsys.readouterr().out
            assert line.count("\n") == 1
            assert f"compiling for CPUs only, with torch {torch.__version__} (UNICODE_FAST_CUDA={choice}" in line
        with pytest.raises(SystemExit, match="UNICODE_FAST_CUDA=1 cannot compile csrc/cuda: .* build without CUDA"):
            setup.extension_options({"UNICODE_FAST_CUDA": "1"})

    @pytest.mark.skipif(os.name == "nt", reason="nothing is compiled there")
    @pytest.mark.parametrize(
        ("choice", "gpus", "given", "expected"),
        [
            ("auto", "[]", "", "no GPU that torch can use"),
            ("auto", "[]", "8.6", "no GPU that torch can use"),
            ("auto", "[[8, 6]]", "", "8.6+PTX"),
            ("auto", "[[8, 6]]", "8.0;9.0a", "8.0;9.0a"),
            ("auto", "broken", "", "torch cannot list the GPUs (NameError: name 'broken' is not defined)"),
            ("1", "broken", "", "8.0;8.6;8.9+PTX;9.0a"),
            ("1", "broken", "8.6", "8.6"),
            ("0", "[[8, 6]]", "", ""),
        ],
    )
    def test_cuda_is_for_the_visible_gpus(
        self,
        setup: ModuleType,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        choice: str,
        gpus: str,
        given: str,
        expected: str,
    ) -> None:
        (tmp_path / "torch.py").write_text(
            f"""
class cuda:
    device_count = lambda: len({gpus})
    get_device_capability = lambda number: {gpus}[number]
    get_arch_list = lambda: ["sm_80", "sm_90", "compute_90"]
print("noise")
"""
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(setup, "compiler_obstacle", lambda command: None)
        facts = {}
        monkeypatch.setattr(setup, "recording", lambda build_ext, record: facts.update(record))
        toolkit = make_toolkit(tmp_path / "toolkit")
        monkeypatch.setenv("CUDA_HOME", str(toolkit))
        monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
        setup.extension_options({"UNICODE_FAST_CUDA": choice, "CUDA_HOME": str(toolkit), "TORCH_CUDA_ARCH_LIST": given})
        line = capsys.readouterr().out
        assert line.count("\n") == 1
        if facts["cuda"]:
            assert facts["architectures"] == os.environ["TORCH_CUDA_ARCH_LIST"] == expected
            assert line.endswith(f"architectures {expected}\n")
        elif choice == "auto":
            assert facts["decision"] == f"UNICODE_FAST_CUDA=auto: {expected}"
            assert line.endswith("; UNICODE_FAST_CUDA=1 compiles csrc/cuda for all architectures\n")
        else:
            assert (facts["decision"], expected) == ("UNICODE_FAST_CUDA=0", "")

    @pytest.mark.parametrize(
        ("gpus", "expected"),
        [
            ([(8, 6), (8, 0), (8, 6)], "8.0;8.6+PTX"),
            ([(9, 0)], "9.0a"),
            ([(9, 0), (12, 0)], "9.0a;12.0+PTX"),
            ([(12, 1), (13, 0)], "12.0+PTX"),
            ([(7, 0)], ""),
            ([(7, 0), (7, 5)], "7.5+PTX"),
        ],
    )
    def test_architectures_that_torch_can_use(
        self, setup: ModuleType, gpus: list[tuple[int, int]], expected: str
    ) -> None:
        known = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
        assert setup.architectures_of(gpus, known) == expected
        assert setup.architectures_of(gpus, []) == ""

    def test_no_compiler(self, setup: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
        if os.name == "nt":
            pytest.skip("setuptools chooses the compiler there")
        assert setup.extension_options({"CXX": "no-such-compiler"}) == {}
        line = capsys.readouterr().out
        assert line.count("\n") == 1
        assert "compiling nothing" in line
        assert "no C++ compiler was found (no-such-compiler)" in line
        with pytest.raises(SystemExit, match="UNICODE_FAST_CUDA=1 cannot compile csrc/cuda: no C.. compiler"):
            setup.extension_options({"CXX": "no-such-compiler", "UNICODE_FAST_CUDA": "1"})

    def test_a_compiler_that_fails_is_none(self, setup: ModuleType, tmp_path: Path) -> None:
        compiler = tmp_path / "compiler"
        compiler.write_text("#!/bin/sh\necho 'trial.cpp:2: fatal error: Python.h: No such file' >&2\nexit 1\n")
        compiler.chmod(0o755)
        assert "fatal error: Python.h" in setup.compiler_obstacle([str(compiler)])

    @pytest.mark.skipif(sys.platform != "linux", reason="flags of Linux")
    @pytest.mark.parametrize(("macro", "more"), [("__GNUC__", ["-fopenmp"]), ("__clang__", [])])
    def test_openmp_is_that_of_gcc(self, setup: ModuleType, tmp_path: Path, macro: str, more: list[str]) -> None:
        compiler = tmp_path / "compiler"
        compiler.write_text(f"#!/bin/sh\necho '#define {macro} 1'\n")
        compiler.chmod(0o755)
        flags = ["-O3", "-fno-math-errno", *more]
        assert setup.cxx_flags(setup.cxx_command({"CXX": str(compiler)})) == flags

    def test_sources(self, setup: ModuleType, tmp_path: Path) -> None:
        for name in ("extension.cpp", "cpu/a.cpp", "cuda/a/a.cu", "cuda/a/a_op.cpp", "cuda/reduce.cuh"):
            (tmp_path / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "csrc" / name).touch()
        cpu = ["csrc/extension.cpp", "csrc/cpu/a.cpp"]
        assert setup.source_files(tmp_path, with_cuda=False) == cpu
        assert setup.source_files(tmp_path, with_cuda=True) == [*cpu, "csrc/cuda/a/a.cu", "csrc/cuda/a/a_op.cpp"]
        assert setup.headers(tmp_path) == ["csrc/cuda/reduce.cuh"]
        (tmp_path / "csrc" / "cuda" / "a" / "a.cpp").touch()
        with pytest.raises(SystemExit, match="differ in more than their suffix, got two of csrc/cuda/a/a"):
            setup.source_files(tmp_path, with_cuda=True)

    @pytest.mark.skipif(os.name == "nt", reason="nothing is compiled there")
    def test_inputs_of_the_extension(self, setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every source, header, flag, compiler, version and decision counts; other variables do not."""
        for name in ("setup.py", "csrc/a.cpp", "csrc/cuda/a.cuh"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("1")
        compiler = tmp_path / "compiler"
        compiler.write_text("#!/bin/sh\necho 1\n")
        compiler.chmod(0o755)
        monkeypatch.setattr(setup, "ROOT", tmp_path)
        record = {"torch": "2.13", "cuda": None, "decision": "auto"}

        def inputs(flags: object = ("-O3",), **changes: str) -> str:
            return setup.inputs_of({**record, **changes}, flags, [[str(compiler)]])

        first = inputs()
        monkeypatch.setenv("PATH", os.environ["PATH"] + os.pathsep + str(tmp_path))
        assert inputs() == first
        found = [first, inputs(["-O2"]), inputs(torch="2.14"), inputs(cuda="13.0"), inputs(decision="0")]
        for name in ("csrc/a.cpp", "csrc/cuda/a.cuh", "csrc/new.h", "setup.py"):
            (tmp_path / name).write_text("2")
            found.append(inputs())
        compiler.write_text("#!/bin/sh\necho 2\n")
        found.append(inputs())
        for name in ("CFLAGS", "CXX", "TORCH_CUDA_ARCH_LIST", "NVCC_APPEND_FLAGS", "CPLUS_INCLUDE_PATH"):
            monkeypatch.setenv(name, "2")
            found.append(inputs())
        monkeypatch.setattr(sys, "version", "2")
        found.append(inputs())
        (tmp_path / "torch" / "lib").mkdir(parents=True)
        monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
        found.append(inputs())
        assert len(set(found)) == len(found) == 17

    def test_an_extension_of_the_same_inputs_is_not_compiled_again(
        self, setup: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        library, calls = tmp_path / "package" / "_C.so", []
        library.parent.mkdir()

        def build(inputs: str, inplace: bool = True, **options: bool) -> bool:
            """Whether it compiled."""
            built = tmp_path / str(len(calls)) / "_C.so"
            calls.append(inputs)

            class Build:
                def run(self) -> None:
                    for path in (built, *([library] if inplace else [])):
                        path.parent.mkdir(exist_ok=True)
                        path.write_text(f"{len(calls)}")

                def get_outputs(self) -> list[str]:
                    return [str(built)]

                def get_output_mapping(self) -> dict[str, str]:
                    return {str(built): str(library)} if inplace else {}

            capsys.readouterr()
            command = setup.recording(Build, {"torch": "2.13", "inputs": inputs})()
            vars(command).update(options)
            command.run()
            # Whether compiled or not, the build has the extension and its record.
            assert not inplace or built.read_bytes() == library.read_bytes()
            record = Path(f"{built}.json").read_text()
            assert not inplace or record == Path(f"{library}.json").read_text()
            assert f'"inputs": "{inputs}"' in record
            compiled = built.read_text() == str(len(calls))
            assert compiled != (f"compiling nothing: {library}" in capsys.readouterr().out)
            return compiled

        assert build("a")
        assert not build("a")
        assert not build("a", force=False)
        assert build("a", force=True)
        assert build("a", debug=True)
        assert build("a", inplace=False)
        assert build("b")
        library.write_text("of another build")
        assert build("b")
        record = Path(f"{library}.json")
        for ruin in (
            lambda: record.write_text(record.read_text().replace("2.13", "2.12")),
            record.unlink,
            library.unlink,
        ):
            ruin()
            assert build("b")
        assert not build("b")

    def test_metadata_compiles_nothing(self, setup: ModuleType) -> None:
        for command in (["egg_info"], ["dist_info", "--output-dir", "x"], ["sdist"]):
            assert not setup.compiles(command)
        for command in (["bdist_wheel"], ["editable_wheel", "--dist-dir", "x"], ["build_ext", "--inplace"]):
            assert setup.compiles(command)


def test_a_hidden_package_is_an_error_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same as a start of Python in the folder above a checkout."""
    monkeypatch.setattr(unicode_fast, "__file__", None)
    with pytest.raises(SystemExit, match="1"):
        run_main(lambda _: 0)
    assert "hides the package; change to another folder" in capsys.readouterr().err
