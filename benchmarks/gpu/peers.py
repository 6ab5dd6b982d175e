"""Stage: the contenders beside ours, the most important sizes first, each size's numbers drawn once for all of them.

What takes long to start, compilation, comes after everything else. A row of others that fails says how.
"""

import common

# isort: split
# It has told where these are.
import bench_contrast
import bench_search
import contenders
import contrast
from common import KERNELS, NEEDED, TILES, Found, Stage
from shapes import CONTRAST_CASES

# Problem and shape.
SIZES = (
    ("search", "million, 8192 codewords"),
    ("update", "million"),
    ("search", "narrow"),
    ("update", "narrow"),
    ("step", "published"),
    ("search", "published"),
    ("search", "million"),
    ("search", "wide"),
    ("update", "wide"),
    ("search", "more codewords"),
    ("step", "default"),
)


def found(row: dict, line: str, wrong: bool) -> Found:
    """A row of the benchmarks as one of a stage."""
    return Found(None if "missing" in row else not wrong, " ".join(line.split()), row)


def left_out(stage: Stage, problem: str, contender: str) -> Found | None:
    """The row of ours where kernels failed before that it needs; None where none did, and for others."""
    if not contender.startswith("ours"):
        return None
    return common.left_out(stage, *NEEDED[problem], kernels=TILES if contender == "ours with mma.sync" else ())


def quantise(stage: Stage, problem: str, shape: str, contender: str) -> Found:
    """One contender on one problem of the quantiser."""
    gone = left_out(stage, problem, contender)
    if gone is not None:
        return gone
    missing = bench_search.obstacle(problem, shape, contender, stage.device)
    row = {"problem": problem, "shape": shape, "contender": contender, "missing": missing}
    if not missing:
        row = contenders.measure_or_say_why_not(problem, shape, contender, stage.device)
    ours = contender.startswith("ours")
    result = found(row, bench_search.line(row), ours and row.get("wrong_rows") != 0)
    return common.qualified(stage, result, KERNELS[problem]) if ours else result


def match(stage: Stage, shape: str, precision: str, contender: str) -> Found:
    """One contender on one size of Cross-CPC; of others, what fails is a line."""
    gone = left_out(stage, "contrast", contender)
    if gone is not None:
        return gone
    try:
        row = contrast.measure(contender, shape, precision, stage.device)
    except Exception as error:
        if contender.startswith("ours"):
            raise
        missing = f"failed: {type(error).__name__}: {error}".splitlines()[0][:120]
        row = {"shape": shape, "precision": precision, "contender": contender, "missing": missing}
    ours = contender.startswith("ours") and "missing" not in row
    wrong = ours and row["gradient_error"] > bench_contrast.LARGEST_ERRORS[precision]
    return found(row, bench_contrast.line(row), wrong)


def main() -> None:
    stage = common.begin(__doc__)
    rows = [(quantise, *size, name) for size in SIZES for name in contenders.PROBLEMS[size[0]]]
    rows += [(match, *case, name) for case in CONTRAST_CASES["cuda"] for name in contrast.CONTENDERS]
    for measure, *row in sorted(rows, key=lambda row: "compiled" in row[-1]):
        common.attempt(stage, ", ".join(row), measure, *row)


if __name__ == "__main__":
    main()
