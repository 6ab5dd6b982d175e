"""Stage: the contenders beside ours, the most important sizes first. Numbers of a size are drawn once for all of them.

Contenders that compile come last, because compilation takes long, then the forms of Triton's kernels that the package
does not choose. If a contender of others fails, its row holds the reason.
"""

import functools
from unittest import mock

import common

# isort: split
# `common` has put the folders of these modules on the path.
import bench_contrast
import bench_search
import contenders
import contrast
from common import KERNELS, NEEDED, TILES, Found, Stage
from measurement import times_of
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
    ("repeated", "published"),
    ("clustered", "published"),
    ("clustered", "million"),
)
# Constants of kernels/cross_info_nce.py with the shapes that show their effect, and our contender.
FORMS = (
    ("ROW_TILES", "published", common.GRAPH),
    ("ROW_TILES", "twelve steps", common.GRAPH),
    ("FUSED", "published", common.GRAPH),
    ("WITHOUT_MASKS", "32768 clips", "ours"),
    ("BASE_TWO", "32768 clips", "ours"),
    ("DIAGONAL_APART", "32768 clips", "ours"),
    ("AHEAD", "32768 clips", "ours"),
)


def found(row: dict, line: str, wrong: bool) -> Found:
    """A row of the benchmarks as one of a stage."""
    return Found(None if "missing" in row else not wrong, " ".join(line.split()), row)


def need(stage: Stage, problem: str, contender: str) -> None:
    """Raises LeftOut for a contender of ours, where kernels failed before that it needs."""
    if contender.startswith("ours"):
        common.need(stage, *NEEDED[problem], kernels=TILES if contender == "ours with mma.sync" else ())


def quantise(stage: Stage, problem: str, shape: str, contender: str) -> Found:
    """One contender on one problem of the quantiser."""
    need(stage, problem, contender)
    missing = bench_search.obstacle(problem, shape, contender, stage.device)
    row = {"problem": problem, "shape": shape, "contender": contender}
    arguments = (problem, shape, contender, stage.device)
    row = {**row, "missing": missing} if missing else contenders.row_or_reason(row, contenders.measure, *arguments)
    ours = contender.startswith("ours")
    result = found(row, bench_search.line(row), ours and row.get("wrong_rows") != 0)
    return common.qualified(stage, result, KERNELS[problem]) if ours else result


def match(stage: Stage, shape: str, precision: str, contender: str) -> Found:
    """One contender on one size of Cross-CPC."""
    need(stage, "contrast", contender)
    row = {"shape": shape, "precision": precision, "contender": contender}
    row = contenders.row_or_reason(row, contrast.measure, contender, shape, precision, stage.device)
    ours = contender.startswith("ours") and "missing" not in row
    wrong = ours and row["gradient_error"] > bench_contrast.LARGEST_ERRORS[precision]
    return found(row, bench_contrast.line(row), wrong)


def other_form(stage: Stage, constant: str, shape: str, contender: str) -> Found:
    """Ours with the form of Triton's kernels that the package does not choose."""
    common.need_triton(stage)
    from unicode_fast.kernels import cross_info_nce as kernels

    with mock.patch.object(kernels, constant, not getattr(kernels, constant)):
        result = match(stage, shape, "bfloat16", contender)
    name = f"ours with the other {constant}{contender.removeprefix('ours')}"
    return result._replace(text=f"{name}: {result.text}", numbers={**result.numbers, "contender": name})


def column_sums(stage: Stage) -> Found:
    """Both softmaxes of a large batch with either form of COLUMN_SUMS."""
    common.need_triton(stage)
    from unicode_fast.kernels import cross_info_nce as kernels

    vectors, _ = contrast.problem("32768 clips", "bfloat16", stage.device)
    loss = functools.partial(contrast.ours, softmax_over="both")
    found, times = [], []
    for form in (True, False):
        with mock.patch.object(kernels, "COLUMN_SUMS", form):
            found.append(contrast.with_gradients(loss, *vectors))
            milliseconds = contenders.milliseconds(lambda: contrast.with_gradients(loss, *vectors)[0], stage.device)
            times.append(times_of(milliseconds)["median_ms"])
    difference = max(contrast.error(a, b) for a, b in zip(*found, strict=True))
    text = f"both softmaxes with COLUMN_SUMS {times[0]:.3g} ms, without {times[1]:.3g} ms, differ by {difference:.1e}"
    numbers = {"with_ms": times[0], "without_ms": times[1], "difference": difference}
    return Found(difference <= bench_contrast.LARGEST_ERRORS["bfloat16"], text, numbers)


def main() -> None:
    stage = common.begin(__doc__)
    rows = [(quantise, *size, name) for size in SIZES for name in contenders.PROBLEMS[size[0]]]
    rows += [(match, *case, name) for case in CONTRAST_CASES["cuda"] for name in contrast.CONTENDERS]
    for measure, *row in sorted(rows, key=lambda row: "compiled" in row[-1]):
        common.attempt(stage, ", ".join(row), measure, *row)
    for constant, shape, contender in FORMS:
        common.attempt(stage, f"other {constant}, {shape}", other_form, constant, shape, contender)
    common.attempt(stage, "either COLUMN_SUMS", column_sums)


if __name__ == "__main__":
    main()
