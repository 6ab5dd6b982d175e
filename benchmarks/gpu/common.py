"""What the stage scripts share: their command line, rows as lines of JSON, graphs and clocks, and sizes of a dry run.

A dry run is `--device cpu --size tiny`: the same code, where a graph replays by calling, events are the clock's, and
torch.compile stops before the code of a device is generated. UNICODE_FAST_FAULT=ROW:crash|hang|wrong,... makes rows
fail, to try what reads them.
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
# Searches with mma.sync, by their tile.
TILES = ("search_wide", "search_middle", "search_narrow")
SEARCHES = ("search_wgmma", *TILES, "search_plain", "search_direct")
# Which operators call a kernel, but for the searches of nearest_codeword, which stand in for one another.
CALLERS = {
    "operands": ("nearest_codeword",),
    "statistics_scan": ("codebook_update",),
    "statistics_sorted": ("codebook_update",),
    "apply": ("codebook_update",),
    "commitment": ("commitment_loss",),
    "cross_info_nce": ("cross_info_nce",),
}
# Operators of each problem of the shared benchmarks.
NEEDED = {
    "search": ("nearest_codeword",),
    "update": ("nearest_codeword", "codebook_update"),
    "step": ("nearest_codeword", "codebook_update", "commitment_loss"),
    "contrast": ("cross_info_nce",),
}
# What may run where nearest_codeword chooses.
CHOSEN_SEARCHES = ("operands", "search_wgmma", *TILES)
# What may run in each problem, where ours chooses.
KERNELS = {
    "search": CHOSEN_SEARCHES,
    "update": (*CHOSEN_SEARCHES, "statistics_sorted", "apply"),
    "step": (*CHOSEN_SEARCHES, "statistics_scan", "apply", "commitment"),
    "contrast": ("cross_info_nce",),
}
# Of the shared benchmarks.
GRAPH = "ours in a CUDA graph"


class Stage(NamedTuple):
    """How a stage was asked to run.

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
    """What a row says.

    Attributes:
        ok: right, wrong or, None, not run.
        text: one line.
        numbers: by name.
        blames: if wrong, the kernel computes wrong numbers, and is left out later.
    """

    ok: bool | None
    text: str
    numbers: dict[str, Any] = {}
    blames: bool = True


class About(NamedTuple):
    """What a row runs.

    Attributes:
        kernels: of the native program's names, and cross_info_nce; left out later if two such rows end their process.
        at_fault: of these, the ones that a wrong row leaves out, or one that ends its process; none where it is about
            more than an operator.
    """

    kernels: tuple[str, ...] = ()
    at_fault: tuple[str, ...] = ()


NO_KERNEL = About()


def begin(description: str | None, *flags: tuple[str, dict[str, Any]]) -> Stage:
    """Reads the command line, leaves out what it names, and keeps standard output for rows.

    Args:
        description: of the script.
        flags: beyond those of every stage: name and what argparse is told.
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
    """Whatever else is printed, by libraries too, goes to standard error."""
    global _rows
    _rows = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)


def announce(name: str, **marks: Any) -> None:
    """Print that a row begins, and what it is about, for whoever has to know where this process died."""
    print(json.dumps({"begins": name, **marks}), file=_rows, flush=True)


def faulty(name: str) -> Found | None:
    """What a row finds instead of what it would, or the end of this process, where UNICODE_FAST_FAULT says so."""
    faults = os.environ.get("UNICODE_FAST_FAULT", "").split(",")
    if f"{name}:crash" in faults:
        os.abort()
    while f"{name}:hang" in faults:
        time.sleep(3600)
    return Found(False, "UNICODE_FAST_FAULT") if f"{name}:wrong" in faults else None


def emit(name: str, found: Found, **marks: Any) -> None:
    """Print a row."""
    numbers = {**found.numbers, **marks}
    if "commit" in numbers and numbers["commit"] is None:
        numbers["commit"] = _kit_commit()
    print(json.dumps({"name": name, "ok": found.ok, "text": found.text, **numbers}), file=_rows, flush=True)


def _kit_commit() -> str | None:
    """The commit that travelled, where there is no repository."""
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
    """The row that `measure` finds of a stage and more; an error is one too, and the end where the device is lost.

    It is announced first, and nothing where it is among those to skip.

    Args:
        stage: how it was asked to run.
        name: of the row.
        measure: takes the stage, `arguments` and `options`.
        arguments: further ones.
        about: what it runs; the row names what of this has not failed before.
        options: further ones, by name.

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


def leave_out(without: Collection[str], device: str) -> None:
    """Calls that name no backend go past these kernels from here on: to another search, or to the reference."""
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
    """The main loop that calls none of these searches; "" where the choice may stay free, None where there is none."""
    tiles = not set(TILES).intersection(without)
    if "search_wgmma" not in without and (tiles or hopper):
        return "" if tiles else "wgmma"
    if tiles:
        return "mma"
    return None if "search_plain" in without else "plain"


def qualified(stage: Stage, found: Found, kernels: Iterable[str] | None = None) -> Found:
    """The row of a measurement, which names those of its kernels that are left out, so that no table takes it.

    Args:
        stage: how it was asked to run.
        found: the row.
        kernels: that it would run; None for any.
    """
    gone = sorted(stage.without.intersection(stage.without if kernels is None else kernels))
    if not gone:
        return found
    return found._replace(text=f"{found.text} (without {', '.join(gone)})", numbers={**found.numbers, "without": gone})


def _shrink() -> None:
    """Sizes, repeats and what needs CUDA in the shared benchmarks, for a dry run."""
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
    # Inductor takes minutes on a CPU; what it generates there is not what it generates for a GPU.
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
    """Whether Triton is told to interpret, and can: interpreters before 3.8 cannot count loops with NumPy 2.4."""
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        return False
    import triton
    from torch.torch_version import TorchVersion

    return TorchVersion(triton.__version__) >= (3, 8) or TorchVersion(numpy.__version__) < (2, 4)


def _interpret_contrast() -> None:
    """Triton's kernels, interpreted, as an implementation for CPUs."""
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
