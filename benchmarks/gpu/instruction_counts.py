r"""Counts the instructions of a CUDA kernel by line: `python benchmarks/gpu/instruction_counts.py KERNEL FILE.cu ...`.

KERNEL is a part of the kernel's name. The script compiles FILE.cu with line numbers and prints how many instructions
come from each section of a function. Further options go to nvcc: -DNAME=0 chooses a form. It needs nvcc and nvdisasm;
Triton's wheel holds the latter. The counts are static: a loop's body or one side of a branch counts once. Code that is
instantiated for several types counts once for each. The example counts what docs/performance.md has of keep_candidates:

    python benchmarks/gpu/instruction_counts.py hopper_search_kernelILi1 \
        csrc/cuda/nearest_codeword/nearest_codeword.cu --source csrc/cuda/nearest_codeword/half_search.cuh \
        --function "void keep_candidates" --operations \
        --sections "if (!__any_sync(~0u, own_low" "float low = fminf(own_low" "bool hit = " "int up_to = hits"

KERNEL hopper_search_kernelILi2 is that of a persistent grid.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

_PLACE = re.compile(r'//## File "([^"]+)", line (\d+)')
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\S+)")


def find_nvdisasm() -> str:
    """The program, from PATH or from Triton.

    Raises:
        SystemExit: there is none.
    """
    found = shutil.which("nvdisasm")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        found = shutil.which("nvdisasm", path=str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    if found is None:
        raise SystemExit("nvdisasm must be on PATH or in an installed Triton")
    return found


def disassemble(source: Path, architecture: str, flags: list[str]) -> list[str]:
    """The lines of the assembly of `source`, with the places that each instruction comes from."""
    home = os.environ.get("CUDA_HOME")
    nvcc = str(Path(home) / "bin" / "nvcc") if home else "nvcc"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
        command = [nvcc, "-std=c++20", "-O3", "-lineinfo", target, *flags, "-cubin", str(source), "-o", str(cubin)]
        subprocess.run(command, check=True)
        shown = subprocess.run([find_nvdisasm(), "-gi", str(cubin)], check=True, capture_output=True, text=True)
    return shown.stdout.splitlines()


def instructions(lines: list[str], kernel: str) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """Each instruction of the kernels of this name: its operation and its places, the innermost first."""
    inside, places, fresh = False, [], True
    for line in lines:
        if line.startswith(".text."):
            inside = kernel in line
        if not inside:
            continue
        if place := _PLACE.search(line):
            places = [] if fresh else places
            fresh = False
            places.append((Path(place[1]).name, int(place[2])))
        elif found := _INSTRUCTION.match(line):
            fresh = True
            if found[1] not in ("NOP", "NOP;"):
                yield found[1].rstrip(";"), list(places)


def section_of(starts: dict[int, str], line: int) -> str:
    """The section of a line: the last that begins at or before it."""
    return starts[max(start for start in starts if start <= line)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel")
    parser.add_argument("file", type=Path)
    parser.add_argument("--architecture", default="90a")
    parser.add_argument("--source", type=Path, required=True, help="the file whose lines are counted")
    parser.add_argument("--function", required=True, help="text in the line where the function begins")
    parser.add_argument("--sections", nargs="*", default=[], help="texts in the lines where further sections begin")
    parser.add_argument("--operations", action="store_true", help="print the commonest operations too")
    arguments, flags = parser.parse_known_args()
    text = arguments.source.read_text().splitlines()
    first = next(i for i, line in enumerate(text, 1) if arguments.function in line)
    last = next(i for i, line in enumerate(text, 1) if i > first and line == "}")
    starts = {first: "start"}
    for section in arguments.sections:
        starts[next(i for i, line in enumerate(text, 1) if first < i < last and section in line)] = section
    counts: dict[str, Counter[str]] = {name: Counter() for name in starts.values()}
    for operation, places in instructions(disassemble(arguments.file, arguments.architecture, flags), arguments.kernel):
        for name, line in places:
            if name == arguments.source.name and first <= line <= last:
                counts[section_of(starts, line)][operation.split(".")[0]] += 1
                break
    for name, operations in counts.items():
        print(f"{operations.total():6d}  {name}")
        if arguments.operations:
            print("        " + ", ".join(f"{number} {operation}" for operation, number in operations.most_common(12)))
    print(f"{sum(found.total() for found in counts.values()):6d}  all")


if __name__ == "__main__":
    main()
