"""The targets of single operators, G1 to G6, ours alone: `python benchmarks/gpu/targets.py --device cuda`.

A row is one of benchmarks/results/quantiser-cuda.json or contrast-cuda.json, with the target and whether it was met.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import common
import contenders
import contrast
import torch
from bench_contrast import LARGEST_ERRORS
from common import KERNELS, NEEDED, About, Found, Stage

from unicode_fast.ops.nearest_codeword import _operand_bytes

# Beyond inputs, outputs and named workspaces, relative to inputs and outputs.
LARGEST_EXCESS = 0.1
# Workspace of the search for each row: a record and a bound.
RECORD_BYTES, BOUND_BYTES = 32, 4


class Target(NamedTuple):
    """A target.

    Attributes:
        name: of the target.
        problem: of contenders.PROBLEMS, or "contrast".
        shape: by its name.
        contender: ours, or ours in a CUDA graph.
        most_ms: largest median; None for a row without a target.
        precision: of the contrast.
        memory: True where the peak of the memory has a target too.
    """

    name: str
    problem: str
    shape: str
    contender: str
    most_ms: float | None
    precision: str = "float32"
    memory: bool = False


# The most important ones come first, because time may run out.
TARGETS = (
    Target("G1", "search", "million, 8192 codewords", "ours", 7.0, memory=True),
    Target("G2", "update", "million", "ours", 1.3),
    Target("G3", "update", "narrow", common.GRAPH, 0.040),
    Target("G4", "step", "published", common.GRAPH, 0.020),
    Target("G5 K 1", "contrast", "published", common.GRAPH, 0.020, "bfloat16"),
    Target("G5 K 12", "contrast", "twelve steps", common.GRAPH, 0.020, "bfloat16"),
    Target("G6", "contrast", "32768 clips", "ours", 8.0, "bfloat16", memory=True),
    Target("G5 K 1 tf32", "contrast", "published", common.GRAPH, 0.020, "tf32"),
    Target("G5 K 12 tf32", "contrast", "twelve steps", common.GRAPH, 0.020, "tf32"),
    Target("G5 K 1 float32", "contrast", "published", common.GRAPH, None, "float32"),
    Target("G5 K 12 float32", "contrast", "twelve steps", common.GRAPH, None, "float32"),
    Target("G6 tf32", "contrast", "32768 clips", "ours", None, "tf32"),
    # Eager calls of those in graphs, and sizes without a target.
    Target("G2 in a graph", "update", "million", common.GRAPH, 1.3),
    Target("G3 eager", "update", "narrow", "ours", None),
    Target("G4 eager", "step", "published", "ours", None),
    Target("G4 default sizes", "step", "default", common.GRAPH, None),
    Target("default sizes eager", "step", "default", "ours", None),
    Target("G5 K 1 eager", "contrast", "published", "ours", None, "bfloat16"),
    Target("G5 K 12 eager", "contrast", "twelve steps", "ours", None, "bfloat16"),
    Target("search published", "search", "published", "ours", None),
    Target("search more codewords", "search", "more codewords", "ours", None),
    Target("search narrow", "search", "narrow", "ours", None),
    Target("search wide", "search", "wide", "ours", None),
    Target("search million", "search", "million", "ours", None),
    Target("update wide", "update", "wide", "ours", None),
    Target("1024 clips", "contrast", "1024 clips", "ours", None, "bfloat16"),
    Target("131072 clips", "contrast", "131072 clips", "ours", None, "bfloat16"),
)
# Any search can cause a wrong row of the quantiser.
ABOUT = {problem: About(kernels, kernels if problem == "contrast" else ()) for problem, kernels in KERNELS.items()}


def in_time(median_ms: float) -> str:
    """A time as text."""
    return f"{median_ms:.3g} ms" if median_ms >= 1 else f"{1000 * median_ms:.3g} us"


def search_memory(row: dict[str, Any]) -> tuple[float, str]:
    """Unnamed memory of a search, relative to inputs and outputs; and the named memory as text."""
    rows, codewords, width = row["rows"], row["codewords"], row["width"]
    outputs, inputs = 12 * rows, 4 * width * (rows + codewords)
    named = {
        "outputs": outputs,
        "records": RECORD_BYTES * rows,
        "bounds": BOUND_BYTES * rows,
        "operands": _operand_bytes(torch.empty(codewords, width, device="meta")),
    }
    excess = (row["peak_bytes"] - sum(named.values())) / (inputs + outputs)
    return excess, ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in named.items())


def contrast_memory(row: dict[str, Any]) -> tuple[float, str]:
    """The same for the contrastive loss, whose gradients have the size of its inputs."""
    named = {"gradients": row["gradient_bytes"], **(row["workspace_bytes"] or {})}
    excess = (row["peak_bytes"] - sum(named.values())) / (2 * row["gradient_bytes"])
    return excess, ", ".join(f"{name} {size / 2**20:.2f} MiB" for name, size in named.items())


def measure(stage: Stage, target: Target) -> Found:
    """The row of one target."""
    common.need(stage, *NEEDED[target.problem])
    if target.problem == "contrast":
        row = contrast.measure(target.contender, target.shape, target.precision, stage.device)
        if "missing" in row:
            return Found(None, f"{target.name} {row['missing']}", row)
        bound = LARGEST_ERRORS[target.precision]
        right = row["gradient_error"] <= bound
        exact = f"gradients differ by {row['gradient_error']:.1e} of the largest, allowed {bound:.0e}"
    else:
        row = contenders.measure(target.problem, target.shape, target.contender, stage.device)
        right = row["wrong_rows"] == 0
        exact = f"{row['wrong_rows']} of {row['checked_rows']} rows wrong"
    time = f"{in_time(row['median_ms'])} ({in_time(row['p20_ms'])} to {in_time(row['p80_ms'])})"
    # Times of a dry run have no meaning.
    judged = target.most_ms if not stage.tiny else None
    met = None if judged is None else row["median_ms"] <= judged
    verdict = "" if judged is None else f", target {in_time(judged)}, {'met' if met else 'MISSED'}"
    text = f"{target.name} {time}{verdict}, {exact}"
    numbers = {**row, "target_ms": target.most_ms, "met": met}
    if target.memory and row["peak_bytes"] is not None and not stage.tiny:
        memory = search_memory if target.problem == "search" else contrast_memory
        numbers["excess"], named = memory(row)
        fits = numbers["excess"] <= LARGEST_EXCESS
        text += f"; M1 peak {row['peak_bytes'] / 2**20:.1f} MiB ({named}), unnamed {100 * numbers['excess']:.1f} % of "
        text += f"inputs and outputs, target 10 %, {'met' if fits else 'MISSED'}"
    # A missed target is no fault; a wrong row is.
    return common.qualified(stage, Found(right, text, numbers), KERNELS[target.problem])


def syncs(stage: Stage) -> Found:
    """Checks with torch's debug mode that a quantiser step does not wait for the device."""
    common.need(stage, *NEEDED["step"])
    features, codebook = contenders.inputs("step", "published", stage.device)
    calls: dict[str, Callable[[], Any]] = {
        "called": contenders.step_of(contenders.new_state(codebook, len(features)), features),
        "replayed": contenders.replayed(contenders.step_of, features, codebook),
    }
    waited = []
    for name, call in calls.items():
        call()
        common.synchronize(stage.device)
        try:
            if stage.device == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            call()
        except RuntimeError as error:
            waited.append(f"{name}: {error}".splitlines()[0][:120])
        finally:
            if stage.device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    text = (
        f"G4 waits for the device: {'; '.join(waited)}" if waited else "G4 waits for the device nowhere, target 0, met"
    )
    return Found(not waited, text)


def main() -> None:
    stage = common.begin(__doc__)
    for target in TARGETS:
        common.attempt(stage, target.name, measure, target, about=ABOUT[target.problem])
        if stage.device == "cuda":
            torch.cuda.empty_cache()
        if target.name == "G4":
            common.attempt(stage, "G4 syncs", syncs, about=ABOUT["step"])


if __name__ == "__main__":
    main()
