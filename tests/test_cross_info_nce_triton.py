"""The Triton kernels of cross_info_nce: compiled ahead of time, interpreted, and run on a GPU if there is one."""

import itertools
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from packaging.version import Version
from processes import python

pytest.importorskip("triton")

import triton
from triton_aot import Compiled, compile_ahead
from unicode_fast.kernels import cross_info_nce as kernels

from unicode_fast.reference.cross_info_nce import CrossInfoNCEInputs

# Bytes of shared memory that a program can have.
SHARED_BYTES = {80: 166912, 86: 101376, 90: 232448}
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
OTHER_POINTERS = {"valid_ptr": "*i1", "hit_ptr": "*i1", "hits_ptr": "*i64"}
OTHER_POINTERS |= dict.fromkeys(("number_ptr", "share_hits_ptr", "arrived_ptr"), "*i32")
# Triton 3.7 and 3.8, unlike 3.6 and 3.9, keep up to four numbers a thread of one program in memory.
SPILLS = Version(triton.__version__).release[:2] in ((3, 7), (3, 8))
SPILLING = ("backward", 90, True, True)
KERNELS = ("small_forward", "small_rows", "forward", "backward", "small_backward")
VECTORS = ("queries_ptr", "keys_ptr", "in_queries_ptr", "in_keys_ptr")
PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
SOFTMAXES = ("one softmax", "both softmaxes")
PARTS = {"small_forward": "up to 128 clips, forward", "forward": "more clips, forward", "backward": "gradient"}


class Compilation(NamedTuple):
    kernel: str
    capability: int
    dtype: torch.dtype
    both: bool
    configuration: kernels.Configuration

    def __str__(self) -> str:
        chosen = self.configuration
        kind = str(self.dtype).removeprefix("torch.") + (f"-{chosen.precision}" if self.dtype == torch.float32 else "")
        return f"{self.kernel}-sm_{self.capability}-{kind}-{'whole' if chosen.whole else 'chunks'}-{self.both}"


def compilations() -> list[Compilation]:
    """All that can be chosen at run time."""
    found = {}
    for capability, dtype, width, both in itertools.product(SHARED_BYTES, POINTERS, (128, 256, 384), (False, True)):
        for kernel, precision in itertools.product(KERNELS, ("highest", "high")):
            chosen = kernels.configuration(kernel, dtype, width, divmod(capability, 10), precision, both)
            compilation = Compilation(kernel, capability, dtype, both, chosen)
            found[str(compilation)] = compilation
    return list(found.values())


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets here and compiles nothing")
@pytest.mark.parametrize("all_valid", [False, True], ids=["masked", "all_valid"])
@pytest.mark.parametrize("compilation", compilations(), ids=str)
def test_compiles_without_spills(compilation: Compilation, all_valid: bool) -> None:
    check_compilation(compilation, all_valid)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets here and compiles nothing")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_ahead_compile(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "AHEAD", True)
    chosen = kernels.configuration("forward", dtype, 256, (9, 0), "highest", both=False)
    assert chosen.ahead
    compilation = Compilation("forward", 90, dtype, False, chosen)
    check_compilation(compilation, all_valid=True)
    if dtype == torch.bfloat16:
        check_page("`AHEAD`", f"loop take {compiled_for(compilation, all_valid=True).usual_loop} instructions")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets here and compiles nothing")
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kernel", ["small_forward", "forward", "backward"])
def test_forms_take_fewer_instructions(kernel: str, both: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the whole small kernel and of the usual passes of the others' loops, as docs/performance.md has them."""
    counts = []
    for form in (False, True):
        for name in ("WITHOUT_MASKS", "BASE_TWO", "COLUMN_SUMS", "DIAGONAL_APART"):
            monkeypatch.setattr(kernels, name, form)
        compiled = compiled_for(chosen_on_hopper(kernel, both), all_valid=True)
        counts.append(compiled.instructions if kernel == "small_forward" else compiled.usual_loop)
    check_page(f"| {PARTS[kernel]}, {SOFTMAXES[both]} |", f"| {counts[0]} | {counts[1]} |")
    assert counts[1] < counts[0]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets here and compiles nothing")
@pytest.mark.parametrize("both", [False, True])
def test_rows_of_80_clips_take_fewer_instructions(both: bool) -> None:
    """Warp instructions of a pair's forward pass, width 256, without the sum over pairs in the last program."""
    counts, texts = [], []
    for kernel, programs in (("small_forward", 1), ("small_rows", 3 * (1 + both))):
        compilation = chosen_on_hopper(kernel, both)
        compiled, chosen = compiled_for(compilation, all_valid=True), compilation.configuration
        program = compiled.path + (256 // chosen.chunk - 1) * compiled.loop
        counts.append(programs * chosen.warps * program)
        texts.append(f"{programs} x {chosen.warps} x {program} = {counts[-1]}")
    check_page(f"| forward, a pair with {SOFTMAXES[both]} |", f"| {texts[0]} | {texts[1]} |")
    assert counts[1] < counts[0]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets here and compiles nothing")
@pytest.mark.parametrize("both", [False, True])
def test_rows_of_80_clips_spread_a_gradient(both: bool) -> None:
    """Warp instructions of one slab's gradient, three modalities, width 256: more in all, fewer in each program."""
    counts, texts = [], []
    for kernel in ("backward", "small_backward"):
        compilation = chosen_on_hopper(kernel, both)
        compiled, chosen = compiled_for(compilation, all_valid=True), compilation.configuration
        passes = triton.cdiv(80, chosen.columns)
        program = compiled.path + (3 * passes - 1) * compiled.loop + 2 * (compiled.outer_loop - compiled.loop)
        programs = triton.cdiv(80, chosen.rows)
        counts.append(chosen.warps * program)
        texts.append(f"{programs} x {chosen.warps} x {program} = {programs * counts[-1]}")
    check_page(f"| gradient, {SOFTMAXES[both]} |", f"| {texts[0]} | {texts[1]} |")
    # Two programs on one multiprocessor take less than the one that they replace.
    assert 2 * counts[1] < counts[0]


def check_page(*parts: str) -> None:
    """Prints parts of a line of docs/performance.md, and looks for it if the page is of this version of Triton."""
    sys.stdout.write(f"{' '.join(parts)}\n")
    page = PAGE.read_text()
    (version,) = re.findall(r"compiled with Triton (\d+\.\d+)", " ".join(page.split()))
    if Version(version).release == Version(triton.__version__).release[:2]:
        assert any(all(part in line for part in parts) for line in page.splitlines()), parts


def chosen_on_hopper(kernel: str, both: bool) -> Compilation:
    chosen = kernels.configuration(kernel, torch.bfloat16, 256, (9, 0), "highest", both)
    return Compilation(kernel, 90, torch.bfloat16, both, chosen)


def compiled_for(compilation: Compilation, all_valid: bool) -> Compiled:
    kernel = getattr(kernels, compilation.kernel.replace("small_backward", "backward") + "_kernel")
    chosen = compilation.configuration
    sizes = {"small_forward": chosen.small, "small_rows": chosen.small_rows}.get(compilation.kernel, chosen.tiles)
    fixed = {**sizes, "BOTH": compilation.both} | kernels.forms(compilation.kernel, chosen, all_valid)
    types = {name: "i32" for name in kernel.arg_names if name not in fixed}
    types |= {name: OTHER_POINTERS.get(name, "*fp32") for name in types if name.endswith("_ptr")}
    types |= {name: POINTERS[compilation.dtype] for name in VECTORS if name in types}
    return compile_ahead(kernel, types, fixed, chosen.options, compilation.capability)


def check_compilation(compilation: Compilation, all_valid: bool) -> None:
    compiled = compiled_for(compilation, all_valid)
    chosen = compilation.configuration
    if (compilation.kernel, compilation.capability, compilation.both, chosen.whole) == SPILLING and SPILLS:
        # Smaller tiles would cost more.
        assert compiled.stack_bytes <= 16 and max(compiled.local_loads, compiled.local_stores) <= 3, compiled
    else:
        assert (compiled.stack_bytes, compiled.local_loads, compiled.local_stores) == (0, 0, 0), compiled
    assert compiled.shared_bytes <= SHARED_BYTES[compilation.capability]
    # Only float32 without permission to lose bits does not use tensor cores.
    exact = compilation.dtype == torch.float32 and chosen.precision == "ieee"
    assert (compiled.tensor_core == 0) == exact


def test_precision_is_that_of_torch() -> None:
    """Float32 is never rounded by default; "medium" has the meaning of torch's own products on a GPU."""
    for kernel, width in itertools.product(KERNELS, (128, 256, 1024)):
        for precision, name in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
            chosen = kernels.configuration(kernel, torch.float32, width, (9, 0), precision, both=False)
            assert chosen.precision == name


def test_reference_computes_sizes_beyond_a_grid() -> None:
    for modalities, steps, taken in ((2, 16383, True), (2, 16384, False), (1, 32767, True), (1, 32768, False)):
        vectors = torch.zeros(modalities, steps, 1, 1)
        weights = torch.ones(modalities, modalities)
        inputs = CrossInfoNCEInputs(vectors, vectors, weights, None, torch.ones(()), "both")
        assert kernels._kernels_take(inputs) == taken


def test_precision_is_that_of_cuda() -> None:
    """After settings for CUDA alone torch.get_float32_matmul_precision() raises or is out of date."""
    try:
        for precision, name in (("high", "high"), ("medium", "high"), ("highest", "highest")):
            torch.set_float32_matmul_precision(precision)
            assert kernels._float32_precision() == name
        for setting, name in (("tf32", "high"), ("ieee", "highest")):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert kernels._float32_precision() == name
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(
    Version(triton.__version__) < Version("3.8") and Version(np.__version__) >= Version("2.4"),
    reason="interpreters before 3.8 cannot count loops with NumPy 2.4",
)
def test_in_the_interpreter() -> None:
    """OpenBLAS would start threads for tiles too small for them."""
    run_kernels(TRITON_INTERPRET="1", OPENBLAS_NUM_THREADS="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available")
def test_on_the_gpu() -> None:
    run_kernels(TRITON_INTERPRET="0")


def run_kernels(**variables: str) -> None:
    """In a process of its own: Triton reads its variable when the kernels are imported."""
    tests = Path(__file__).with_name("kernels_of_cross_info_nce.py")
    result = python("-m", "pytest", "-q", "-p", "no:cacheprovider", tests, folder=tests.parent.parent, **variables)
    assert result.returncode == 0, result.stdout + result.stderr
