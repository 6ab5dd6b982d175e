"""Compiles a Triton kernel for a GPU that this machine lacks, and counts its registers, memory and instructions.

Triton includes the tools that disassemble a compiled kernel, so no CUDA toolkit is needed. A kernel that spills can
have few registers. So tests use `stack_bytes` and the loads and stores, never `registers` alone.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Compiled(NamedTuple):
    """A compiled kernel: bytes of a program's shared memory, of a thread's stack, and counts of instructions.

    `loop` counts those of the innermost loop with products of matrices, `usual_loop` those of them that no branch
    skips, and `outer_loop` those of the loop around it; 0 without one. `path` counts those before the atomic operation
    by which a program reports that it is done.
    """

    registers: int
    stack_bytes: int
    local_loads: int
    local_stores: int
    shared_bytes: int
    tensor_core: int
    instructions: int
    path: int
    loop: int
    usual_loop: int
    outer_loop: int


def compile_ahead(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], options: dict[str, int], capability: int
) -> Compiled:
    """Compile for one architecture.

    Args:
        kernel: decorated with triton.jit, while TRITON_INTERPRET was not set.
        types: of the arguments that are known at run time, as "*fp32", "*bf16", "i32".
        constants: the others.
        options: of the compiler, as num_warps.
        capability: 90 for sm_90.
    """
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    # As at run time for addresses and sizes that are multiples of 16; otherwise each load would be of a single number.
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name == "width"]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    loads, stores, products = (len(re.findall(pattern, code)) for pattern in (r"\bLDL", r"\bSTL", r"\bHG?MMA"))
    counts = _instructions(code)
    return Compiled(used["REG"], used["STACK"], loads, stores, compiled.metadata.shared, products, *counts)


def _instructions(code: str) -> tuple[int, int, int, int, int]:
    """The last five numbers of `Compiled`."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for label, instruction in re.findall(r"^(\.L_\w+):|^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", code, re.MULTILINE):
        if label:
            labels[label] = len(instructions)
        elif not re.search(r"\bNOP\b", instruction):
            instructions.append(instruction)
    branches = {
        place: labels[target[1]]
        for place, instruction in enumerate(instructions)
        if (target := re.search(r"\bBRA\b.*`\((\.L_\w+)\)", instruction))
    }
    loops = [range(target, place + 1) for place, target in branches.items() if target < place]
    loops = sorted((x for x in loops if any(re.search(r"\bHG?MMA", instructions[i]) for i in x)), key=len)
    innermost, around = (*loops, range(0), range(0))[:2]
    skips = [range(place + 1, branches[place]) for place in innermost if branches.get(place, 0) - 1 in innermost]
    skipped = set().union(*skips)
    path = next((place for place, text in enumerate(instructions) if "ATOMG" in text), len(instructions))
    return len(instructions), path, len(innermost), len(innermost) - len(skipped), len(around)


def _run(program: str, *arguments: str) -> str:
    command = [str(_BINARIES / program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
