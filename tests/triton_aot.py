"""Compile a Triton kernel for a GPU that is not there, and count what the compiler did.

Usage (TRITON_INTERPRET must be unset when the kernel's module is imported):

    from triton_aot import report
    report(kernel, types={"z_ptr": "*fp32", "rows": "i32"}, constants={"BLOCK": 64}, num_warps=4, num_stages=2)

`types` gives every run-time argument ("*fp32", "*bf16", "i32", "fp32", ...); arguments not named there are constexpr and
their values come from `constants`. Returns a dict: registers, stack bytes, local loads and stores (spills), dynamic shared
memory in bytes (a block may have 232448 on Hopper; the compiler does not check it), tensor-core and FFMA instruction counts.
A healthy kernel has stack == 0 and local_loads == local_stores == 0. Never judge by registers alone: a kernel spilled
entirely can show 32 registers and kilobytes of stack.

Tried with triton 3.6, 3.8 and 3.9; cuobjdump and nvdisasm come with triton's own wheel, no CUDA toolkit is needed.
"""

import os
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BINARIES = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


def report(kernel, types, constants, num_warps=4, num_stages=2, capability=90):
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    # At run time the JIT specialises on 16-byte alignment of pointers; without this, loads are scalar and the counts mislead.
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name == "width"
    }
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        sass = _run("nvdisasm", "-c", file.name)
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    count = lambda pattern: len(re.findall(pattern, sass))
    return {
        "registers": used["REG"],
        "stack_bytes": used["STACK"],
        "local_loads": count(r"\bLDL"),
        "local_stores": count(r"\bSTL"),
        "shared_bytes": compiled.metadata.shared,
        "hgmma": count(r"HGMMA"),
        "hmma": count(r"\bHMMA"),
        "ffma": count(r"\bFFMA"),
    }


def _run(program, *arguments):
    return subprocess.run(
        [os.path.join(BINARIES, program), *arguments], capture_output=True, text=True, check=True
    ).stdout
