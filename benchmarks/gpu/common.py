"""Shared code of the stage scripts: command line, rows as lines of JSON, graphs and clocks, and sizes of a dry run.

A dry run is `--device cpu --size tiny`. The code is the same, but a graph replays by a call, the clock replaces events,
and torch.compile generates no code. UNICODE_FAST_FAULT=ROW:crash|hang|wrong,... makes rows fail, for tests of their
readers.
"""

import argparse
import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# Modules of the benchmarks, then the tests' tolerances and tiny data.
sys.path += [str(HERE.parent), str(ROOT / "tests")]

import numpy  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

KIT = Path(os.environ.get("UNICODE_FAST_KIT", ROOT / "gpu-kit"))
# Searches with mma.sync, by tile.
TILES = ("search_wide", "search_middle", "search_narrow")
SEARCHES = ("search_wgmma", *TILES, "search_plain", "search_direct")
# Operators that call a kernel, without the searches of nearest_codeword, which replace one another.
CALLERS = {
    "operands": ("nearest_codeword",),
    "statistics_scan": ("codebook_update",),
    "statistics_sorted": ("codebook_update",),
    "apply": ("codebook_update",),
    "commitment": ("commitment_loss",),
    "cross_info_nce": ("cross_info_nce",),
}
# Operators of each problem of the benchmarks.
NEEDED = {
    "search": ("nearest_codeword",),
    "repeated": ("nearest_codeword",),
    "clustered": ("nearest_codeword",),
    "update": ("nearest_codeword", "codebook_update"),
    "step": ("nearest_codeword", "codebook_update", "commitment_loss"),
    "contrast": ("cross_info_nce",),
}
# Kernels among which nearest_codeword chooses.
CHOSEN_SEARCHES = ("operands", "search_wgmma", *TILES)
# Kernels that can run in each problem.
KERNELS = {
    "search": CHOSEN_SEARCHES,
    "repeated": CHOSEN_SEARCHES,
    "clustered": CHOSEN_SEARCHES,
    "update": (*CHOSEN_SEARCHES, "statistics_sorted", "apply"),
    "step": (*CHOSEN_SEARCHES, "statistics_scan", "apply", "commitment"),
    "contrast": ("cross_info_nce",),
}
# A contender of the benchmarks.
GRAPH = "ours in a CUDA graph"


class Stage(NamedTuple):
    """Options of a stage.

    Attributes:
        device: "cuda" or "cpu".
        tiny: with the sizes of a dry run.
        without: kernels to leave out.
        options: the whole command line.
    """

    device: str
    tiny: bool
    without: frozenset[str]
    options: argparse.Namespace

    @property
    def compiled(self) -> str:
        """The backend of the compiled operators."""
        return "cuda" if self.device == "cuda" else "cpp"


class Found(NamedTuple):
    """The content of a row.

    Attributes:
        ok: right, wrong or, None, not run.
        text: one line.
        numbers: by name.
        blames: if wrong, the kernel computes wrong numbers, and later stages leave it out.
    """

    ok: bool | None
    text: str
    numbers: dict[str, Any] = {}
    blames: bool = True


class About(NamedTuple):
    """Kernels of a row.

    Attributes:
        kernels: names of the native program, and cross_info_nce; left out later if two such rows end their process.
        at_fault: those of `kernels` that are left out later if the row is wrong or ends its process. Rows on several
            operators have none.
    """

    kernels: tuple[str, ...] = ()
    at_fault: tuple[str, ...] = ()


NO_KERNEL = About()


def begin(description: str | None, *flags: tuple[str, dict[str, Any]]) -> Stage:
    """Reads the command line, leaves out the named kernels, and reserves standard output for rows.

    Args:
        description: of the script.
        flags: of the script alone: name and options of argparse.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("target", "tiny"), default="target")
    parser.add_argument("--without", default="", help="kernels to leave out, separated by commas")
    parser.add_argument("--skip", type=json.loads, default=[], help="a JSON list of rows that are done")
    for name, options in flags:
        parser.add_argument(name, **options)
    arguments = parser.parse_args()
    without = frozenset(filter(None, arguments.without.split(",")))
    unknown = without - {*SEARCHES, *CALLERS}
    if unknown:
        parser.error(f"without must be among {', '.join((*SEARCHES, *CALLERS))}, got {', '.join(sorted(unknown))}")
    stage = Stage(arguments.device, arguments.size == "tiny", without, arguments)
    _keep_output_for_rows()
    leave_out(without, stage.device)
    if stage.tiny:
        _shrink()
    if stage.device == "cpu" and _interprets():
        _interpret_contrast()
    return stage


_rows = sys.stdout


def _keep_output_for_rows() -> None:
    """Sends all other output, of libraries too, to standard error."""
    global _rows
    _rows = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)


def announce(name: str, **marks: Any) -> None:
    """Prints that a row begins, and its marks, so that the reader can name the row that ended the process."""
    print(json.dumps({"begins": name, **marks}), file=_rows, flush=True)


def faulty(name: str) -> Found | None:
    """A wrong row, or the end of this process, where UNICODE_FAST_FAULT has the row's name."""
    faults = os.environ.get("UNICODE_FAST_FAULT", "").split(",")
    if f"{name}:crash" in faults:
        os.abort()
    while f"{name}:hang" in faults:
        time.sleep(3600)
    return Found(False, "UNICODE_FAST_FAULT") if f"{name}:wrong" in faults else None


def emit(name: str, found: Found, **marks: Any) -> None:
    """Prints a row."""
    numbers = {**found.numbers, **marks}
    if "commit" in numbers and numbers["commit"] is None:
        numbers["commit"] = _kit_commit()
    print(json.dumps({"name": name, "ok": found.ok, "text": found.text, **numbers}), file=_rows, flush=True)


def _kit_commit() -> str | None:
    """The commit of the kit, for a machine without a repository."""
    manifest = KIT / "manifest.json"
    return json.loads(manifest.read_text()).get("commit") if manifest.exists() else None


def attempt(
    stage: Stage,
    name: str,
    measure: Callable[..., Found],
    *arguments: Any,
    about: About = NO_KERNEL,
    **options: Any,
) -> bool | None:
    """Announces a row, measures it and prints it, unless it is among those to skip.

    An error becomes a wrong row. The process ends where the device is lost.

    Args:
        stage: the options.
        name: of the row.
        measure: takes the stage, `arguments` and `options`.
        arguments: of `measure`.
        about: kernels of the row; the printed marks name those that have not failed before.
        options: of `measure`, by name.

    Returns:
        Whether the row is right; None where it did not run.
    """
    if name in stage.options.skip:
        return None
    named = {field: [each for each in names if each not in stage.without] for field, names in about._asdict().items()}
    marks = {field: names for field, names in named.items() if names}
    announce(name, **marks)
    try:
        found = faulty(name) or measure(stage, *arguments, **options)
    except LeftOut as reason:
        found = Found(None, str(reason))
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        text = f"failed: {type(error).__name__}: {error}".splitlines()[0][:200]
        found = Found(False, text, blames=not isinstance(error, torch.OutOfMemoryError))
    if found.ok is False and not found.blames:
        marks.pop("at_fault", None)
    emit(name, found, **marks)
    if found.ok is False and stage.device == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            sys.exit(f"the device is lost after {name}: {error}")
    return found.ok


class LeftOut(Exception):
    """A row cannot run, which is no fault; the message is its text."""


def need(stage: Stage, *operators: str, kernels: Collection[str] = ()) -> None:
    """Raises LeftOut where one of the kernels failed, or an operator has none left."""
    from unicode_fast import backend

    gone = {operator for operator in operators if backend.IMPLEMENTATIONS[operator] == ("reference",)}
    named = {kernel for kernel in stage.without if gone.intersection(CALLERS.get(kernel, ("nearest_codeword",)))}
    named |= stage.without.intersection(kernels)
    if named:
        raise LeftOut(f"left out: {', '.join(sorted(named))} failed")


def need_triton(stage: Stage) -> None:
    """Raises LeftOut where Triton's kernels do not run."""
    from unicode_fast import backend

    need(stage, "cross_info_nce")
    if backend.choose_backend("cross_info_nce", torch.device(stage.device), None) != "triton":
        raise LeftOut("Triton's kernels do not run here")


def leave_out(without: Collection[str], device: str) -> None:
    """Makes calls without a backend avoid these kernels: they use another search, or the reference."""
    from unicode_fast import backend

    operators = {operator for kernel in without for operator in CALLERS.get(kernel, ())}
    loop = other_loop(without, hopper=device == "cpu" or torch.cuda.get_device_capability() == (9, 0))
    if loop is None:
        operators.add("nearest_codeword")
    elif loop:
        os.environ["UNICODE_FAST_MAIN_LOOP"] = loop
    for operator in operators:
        backend.IMPLEMENTATIONS[operator] = ("reference",)


def other_loop(without: Collection[str], *, hopper: bool) -> str | None:
    """The main loop without these searches; "" for a free choice, None where there is none."""
    tiles = not set(TILES).intersection(without)
    if "search_wgmma" not in without and (tiles or hopper):
        return "" if tiles else "wgmma"
    if tiles:
        return "mma"
    return None if "search_plain" in without else "plain"


def qualified(stage: Stage, found: Found, kernels: Iterable[str] | None = None) -> Found:
    """The row of a measurement, marked with the kernels that are left out; no table includes a marked row.

    Args:
        stage: the options.
        found: the row.
        kernels: of the row; None for any.
    """
    gone = sorted(stage.without.intersection(stage.without if kernels is None else kernels))
    if not gone:
        return found
    return found._replace(text=f"{found.text} (without {', '.join(gone)})", numbers={**found.numbers, "without": gone})


def _shrink() -> None:
    """Replaces sizes, repeats and CUDA code of the benchmarks for a dry run."""
    import bench_search
    import contenders
    import contrast
    import shapes
    import tiny
    import train_steps

    from unicode_fast import Config, preset

    for number, name in enumerate(shapes.SEARCH_SHAPES):
        shapes.SEARCH_SHAPES[name] = shapes.SearchShape(24 + number, 19 + number, 16)
    for name in shapes.SHAPES:
        shapes.SHAPES[name] = shapes.Shape(3, 4, 3, 12, 16)
    for name, shape in shapes.CONTRAST_SHAPES.items():
        shapes.CONTRAST_SHAPES[name] = shape._replace(steps=min(shape.steps, 2), clips=6, width=16)
    small = shapes.TrainShape(4, 4, "small", (12,), (5, 5, 4), (8,))
    for device in shapes.TRAIN_SHAPES:
        shapes.TRAIN_SHAPES[device] = {"default": small, "published": small}
    train_steps.LONGEST_SECONDS["cpu"] = 0.0

    def config_of(shape: shapes.TrainShape, rules: str, **fields: Any) -> Config:
        precision = fields.get("precision", "float32")
        on_cpu = {"cuda_graph": False, "precision": "float32" if precision == "tf32" else precision}
        return preset(rules, shape.size).replace_all(batch_size=shape.clips, **{**tiny.SIZES, **fields, **on_cpu})

    train_steps.config_of = config_of
    contenders.milliseconds = contrast.milliseconds = _milliseconds_once
    train_steps.LEAST_REPEATS = 1
    # Inductor takes minutes on a CPU, and generates other code there than for a GPU.
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    contenders.replayed = lambda make, features, codebook: make(contenders.new_state(codebook, len(features)), features)
    contrast.captured = lambda call: call
    bench_search.CPU_SHAPES = tuple(shapes.SEARCH_SHAPES)
    for known in (contrast.CONTENDERS, *contenders.PROBLEMS.values()):
        for name, contender in known.items():
            if not contender.module:
                known[name] = contender._replace(devices=("cpu", "cuda"))
    # Triton's interpreter has no bfloat16.
    contrast.PRECISIONS["bfloat16"] = ("highest", torch.float16)


def _milliseconds_once(call: Callable[[], Tensor], device: str) -> list[float]:
    """The time of one call, in place of fifty."""
    begun = time.perf_counter()
    call()
    synchronize(device)
    return [1000 * (time.perf_counter() - begun)]


def _interprets() -> bool:
    """True where Triton is set to interpret and can: interpreters before 3.8 cannot count loops with NumPy 2.4."""
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        return False
    import triton
    from torch.torch_version import TorchVersion

    return TorchVersion(triton.__version__) >= (3, 8) or TorchVersion(numpy.__version__) < (2, 4)


def _interpret_contrast() -> None:
    """Registers Triton's interpreted kernels for CPUs."""
    from unicode_fast import backend
    from unicode_fast.ops import _library, cross_info_nce

    module = sys.modules[cross_info_nce.__module__]
    _library.implement("cross_info_nce", "CPU", module._check_arguments, module._triton)
    _library.implement("cross_info_nce_backward", "CPU", module._check_backward, module._backward_triton)
    backend._DEVICES["triton"] = "cpu"


def synchronize(device: str) -> None:
    """Waits for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def largest_error(found: Tensor, truth: Tensor) -> float:
    """Largest difference, relative to the largest number of the truth."""
    if truth.numel() == 0:
        return 0.0
    scale = float(truth.double().abs().max())
    return float((found.double() - truth.double()).abs().max()) / (scale or 1.0)
