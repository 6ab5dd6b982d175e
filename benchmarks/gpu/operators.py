"""Each operator on the device against its reference in float64, then replayed in a CUDA graph on new inputs.

`python benchmarks/gpu/operators.py --device cuda` prints one line of JSON per row, and one before the row begins. Both
hold the kernels of the row, and those that are at fault if it is wrong.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple
from unittest import mock

import common
import contenders
import contrast
import tolerances
import torch
from bench_contrast import LARGEST_ERRORS
from common import CHOSEN_SEARCHES, About, Found, Stage
from shapes import SEARCH_SHAPES
from torch import Tensor

from unicode_fast import (
    CodebookState,
    EmaConfig,
    PreparedCodebook,
    codebook_update,
    codeword_distribution,
    commitment_loss,
    cross_info_nce,
    nearest_codeword,
    preset,
)
from unicode_fast.modules.model import update_rule

# Loops of the CUDA search, with the kernel of each; "" is the free choice, tested after each single loop.
LOOPS = {
    **{name: f"search_{name}" for name in ("wgmma", "wide", "middle", "narrow", "plain")},
    "": "",
}
CHEAP = ("more codewords", "narrow", "wide")
# Only the chosen search and the one with wgmma are fast at this size.
LARGE = "million"
PRESETS = ("recommended", "paper", "official")
MODALITIES = 3
Call = Callable[..., tuple[Tensor, ...]]


def main_loop(name: str) -> Any:
    """Sets the main loop of the CUDA search; "" keeps the choice."""
    return mock.patch.dict(os.environ, {"UNICODE_FAST_MAIN_LOOP": name} if name else {})


class Sizes(NamedTuple):
    """Rows of each modality, and the codebook."""

    rows: int
    codewords: int
    width: int


def sizes_of(stage: Stage) -> Sizes:
    """Sizes of a training step."""
    return Sizes(24, 12, 16) if stage.tiny else Sizes(800, 400, 256)


def sorted_sizes_of(stage: Stage) -> Sizes:
    """Sizes of a step with sorted statistics, as rows times codewords exceed 2^24."""
    return Sizes(700, 8192, 2) if stage.tiny else Sizes(30_000, 400, 256)


def draw(stage: Stage, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers, drawn on the device."""
    generator = torch.Generator(stage.device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=stage.device).to(dtype)


def rows_and_codebook(stage: Stage, *shape: int, seed: int) -> list[Tensor]:
    """Rows of a shape, (*shape, D), and a codebook, (M, D), of a training step."""
    size = sizes_of(stage)
    return [draw(stage, *shape, size.width, seed=seed), draw(stage, size.codewords, size.width, seed=seed + 1)]


def counts_candidates(stage: Stage) -> bool:
    """True where compared_codewords is registered for the device."""
    key = "CUDA" if stage.device == "cuda" else "CPU"
    return torch._C._dispatch_has_kernel_for_dispatch_key("unicode_fast::compared_codewords", key)


def searched(stage: Stage, features: Tensor, codebook: Tensor) -> dict[str, Any]:
    """Number of wrong rows, of rows that fell back to all codewords, and mean number of candidates of the others."""
    found = nearest_codeword(features, codebook)
    wrong, checked = contenders.wrong_rows(found.index, features, codebook)
    numbers: dict[str, Any] = {"rows": len(features), "wrong": wrong, "checked": checked}
    if features.dtype == torch.float64 or not counts_candidates(stage):
        return {**numbers, "fallback": None, "candidates": None}
    compared = torch.ops.unicode_fast.compared_codewords(features, codebook)
    known = compared[compared >= 0]
    mean = float(known.double().mean()) if len(known) else None
    return {**numbers, "fallback": len(compared) - len(known), "candidates": mean}


def search(stage: Stage, loop: str) -> Found:
    """One loop at all cheap shapes, and in half precision."""
    common.need(stage, "nearest_codeword", kernels=[LOOPS[loop]])
    cases = [("published", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    cases += [(name, torch.float32) for name in (*CHEAP, *((LARGE,) if loop in ("", "wgmma") else ()))]
    results = []
    with main_loop(loop):
        for name, dtype in cases:
            rows, codewords, width = SEARCH_SHAPES[name]
            features, codebook = draw(stage, rows, width, dtype=dtype), draw(stage, codewords, width, seed=1)
            kind = str(dtype).removeprefix("torch.")
            results.append({"shape": name, "dtype": kind, **searched(stage, features, codebook)})
    # Without the failed kernels, the plain loop may be the only one.
    taken = loop or os.environ.get("UNICODE_FAST_MAIN_LOOP")
    return search_row(results, must_know=taken != "plain")


def search_row(results: Sequence[dict[str, Any]], *, must_know: bool) -> Found:
    """The row of several shapes; with `must_know`, no row may fall back to all codewords."""
    wrong, checked = (sum(case[name] for case in results) for name in ("wrong", "checked"))
    text, ok = f"{wrong} of {checked} rows wrong", wrong == 0
    if must_know and all(case["fallback"] is not None for case in results):
        fallback = sum(case["fallback"] for case in results)
        mean = max((case["candidates"] or 0.0) for case in results)
        text += f", {fallback} of {sum(case['rows'] for case in results)} fell back, at most {mean:.3f} candidates"
        ok = ok and fallback == 0 and mean <= tolerances.MOST_COMPARED
    bad = [f"{case['shape']} {case['dtype']}" for case in results if case["wrong"] or (must_know and case["fallback"])]
    text += f"; at fault: {', '.join(bad)}" if bad else ""
    # Rows that fell back are right, but slow.
    return Found(ok, text, {"cases": list(results)}, blames=wrong > 0)


def search_direct(stage: Stage) -> Found:
    """Rows in float64, and a codebook in float64."""
    common.need(stage, "nearest_codeword", kernels=["search_direct"])
    rows, codewords, width = SEARCH_SHAPES["published"]
    results = []
    for dtype, other in (
        (torch.float64, torch.float64),
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
    ):
        features, codebook = draw(stage, rows, width, dtype=dtype), draw(stage, codewords, width, seed=1, dtype=other)
        kind = f"{dtype} and {other}".replace("torch.", "")
        results.append({"shape": "published", "dtype": kind, **searched(stage, features, codebook)})
    return search_row(results, must_know=False)


def update_inputs(stage: Stage, size: Sizes) -> tuple[CodebookState, list[Tensor]]:
    """A state with codewords due for a reset, and features of each modality."""
    codebook = draw(stage, size.codewords, size.width, seed=5)
    state = contenders.new_state(codebook, MODALITIES)
    state.idle[:, ::3] = 1000
    state.step.fill_(1000)
    return state, [draw(stage, size.rows, size.width, seed=6 + m) for m in range(MODALITIES)]


def rule_of(name: str) -> EmaConfig:
    """The rule of a preset."""
    return update_rule(preset(name).method, seed=0)


def prepared(stage: Stage) -> Found:
    """Compares searches with and without a prepared codebook, before and after an update, bit by bit."""
    common.need(stage, "nearest_codeword", "codebook_update")
    state, features = update_inputs(stage, sizes_of(stage))
    made = PreparedCodebook(state.codebook)
    rows, equal = torch.cat(features), []
    for change in ("none", "update", "in place"):
        if change == "update":
            index = [nearest_codeword(x, made).index for x in features]
            codebook_update(state, features, index, rule_of("recommended"), prepared=made)
        elif change == "in place":
            state.codebook.mul_(-1)
        pairs = zip(nearest_codeword(rows, made), nearest_codeword(rows, state.codebook.clone()), strict=True)
        equal.append(all(torch.equal(a, b) for a, b in pairs))
    text = "same bits as without" if all(equal) else f"other bits than without: new, updated, changed: {equal}"
    return Found(all(equal), text)


def update(stage: Stage, name: str, *, is_sorted: bool) -> Found:
    """A preset's update against the reference, which computes in float64 and rounds once."""
    common.need(stage, "codebook_update")
    size = sorted_sizes_of(stage) if is_sorted else sizes_of(stage)
    state, features = update_inputs(stage, size)
    # Not from the search, so that this row tests the update alone; some codewords have no rows.
    index = [torch.arange(len(x), device=x.device) * (m + 7) % (size.codewords - 3) for m, x in enumerate(features)]
    truth = CodebookState(*(tensor.clone() for tensor in state))
    rule = rule_of(name)
    for each, kind in ((state, stage.compiled), (truth, "reference")):
        codebook_update(each, features, index, rule, backend=kind)
    errors = {
        field: common.largest_error(getattr(state, field), getattr(truth, field)) for field in CodebookState._fields
    }
    bound = tolerances.codebook_update(torch.float32).relative
    worst = max(errors, key=lambda field: errors[field])
    exact = errors["idle"] == errors["step"] == 0
    moved = not torch.equal(state.codebook, update_inputs(stage, size)[0].codebook)
    text = f"differs from float64 by at most {errors[worst]:.1e} ({worst}), allowed {bound:.1e}"
    return Found(errors[worst] <= bound and exact and moved, text, {"errors": errors})


def commitment_of(
    stage: Stage, features: Tensor, codebook: Tensor, valid: Tensor | None, kind: str | None
) -> list[Tensor]:
    """Loss and gradient."""
    rows = features.detach().requires_grad_()
    size = sizes_of(stage)
    index = (torch.arange(features.shape[1], device=features.device) * 7 % size.codewords).expand(MODALITIES, -1)
    weights = torch.full((MODALITIES, MODALITIES), 0.2, device=features.device).fill_diagonal_(0.6)
    loss = commitment_loss(rows, index.contiguous(), codebook, weights, valid=valid, backend=kind)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), rows)]


def commitment(stage: Stage, dtype: torch.dtype, *, masked: bool) -> Found:
    """Loss and gradient against the reference in float64."""
    common.need(stage, "commitment_loss")
    size = sizes_of(stage)
    features = draw(stage, MODALITIES, size.rows + 3, size.width, seed=11, dtype=dtype)
    codebook = draw(stage, size.codewords, size.width, seed=12)
    valid = draw(stage, MODALITIES, size.rows + 3, seed=13) > -0.5 if masked else None
    found = commitment_of(stage, features, codebook, valid, stage.compiled)
    truth = commitment_of(stage, features.double(), codebook.double(), valid, "reference")
    errors = [common.largest_error(a, b) for a, b in zip(found, truth, strict=True)]
    bound = tolerances.COMMITMENT[dtype].relative
    text = f"loss differs by {errors[0]:.1e}, gradient by {errors[1]:.1e}, allowed {bound:.1e}"
    return Found(max(errors) <= bound, text, {"loss_error": errors[0], "gradient_error": errors[1]})


def distribution_of(features: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
    """Probabilities and gradients of their squares."""
    leaves = features.detach().requires_grad_(), codebook.detach().requires_grad_()
    result = codeword_distribution(*leaves)
    return (result.detach(), *torch.autograd.grad(result.square().sum(), leaves))


def distribution(stage: Stage) -> Found:
    """The reference on the device in float32 against float64."""
    size = sizes_of(stage)
    inputs = rows_and_codebook(stage, 8, size.rows // 8, seed=14)
    truth = distribution_of(*(x.double() for x in inputs))
    errors = [common.largest_error(a, b) for a, b in zip(distribution_of(*inputs), truth, strict=True)]
    bound = tolerances.codeword_distribution_gradient(size.width, torch.float32).relative
    text = f"differs from float64 by at most {max(errors):.1e}, allowed {bound:.1e}"
    return Found(max(errors) <= bound, text, {"errors": errors})


def contrast_of(targets: Tensor, predictions: Tensor, kind: str | None) -> tuple[Tensor, ...]:
    """Loss with the softmax in both directions, and gradients."""

    def loss(a: Tensor, b: Tensor) -> Tensor:
        weights = contrast.weights(a)
        return cross_info_nce(a, b, weights, softmax_over="both", temperature=contrast.TEMPERATURE, backend=kind).loss

    return contrast.with_gradients(loss, targets, predictions)


@contextmanager
def products(precision: str) -> Any:
    """Sets the precision of float32 products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(contrast.PRECISIONS[precision][0])
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def contrast_inputs(stage: Stage, clips: int, steps: int, precision: str, seed: int = 21) -> list[Tensor]:
    """Targets and predictions; Triton's interpreter is slow."""
    shape = (1, steps, clips, 16) if stage.tiny else (MODALITIES, steps, clips, 256)
    return [draw(stage, *shape, seed=seed + n, dtype=contrast.PRECISIONS[precision][1]) for n in range(2)]


def contrast_row(stage: Stage, clips: int, steps: int, precision: str) -> Found:
    """Triton's loss and gradients against the reference in float64."""
    common.need_triton(stage)
    targets, predictions = contrast_inputs(stage, clips, steps, precision)
    with products(precision):
        found = contrast_of(targets, predictions, "triton")
    truth = contrast_of(targets.double(), predictions.double(), "reference")
    errors = [common.largest_error(a, b) for a, b in zip(found, truth, strict=True)]
    bound = LARGEST_ERRORS[precision]
    text = f"loss differs by {errors[0]:.1e}, gradients by {max(errors[1:]):.1e}, allowed {bound:.0e}"
    return Found(max(errors) <= bound, text, {"loss_error": errors[0], "gradient_error": max(errors[1:])})


def replay(stage: Stage, call: Call, first: Sequence[Tensor], second: Sequence[Tensor]) -> Found:
    """Compares a graph of a call, captured on the first inputs and replayed on the second, with the call on these."""
    held = [x.clone() for x in first]
    again = contrast.captured(lambda: call(*held))
    for memory, new in zip(held, second, strict=True):
        memory.copy_(new)
    found = [x.clone() for x in again()]
    expected = call(*(x.clone() for x in second))
    equal = [torch.equal(a, b) for a, b in zip(found, expected, strict=True)]
    same = "the bits of the call" if all(equal) else f"other bits than the call, equal: {equal}"
    return Found(all(equal), f"replayed: {same}")


def two(draw_inputs: Callable[[int], Sequence[Tensor]]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Inputs of two seeds."""
    return draw_inputs(31), draw_inputs(47)


def replayed_search(stage: Stage, loop: str) -> Found:
    common.need(stage, "nearest_codeword", kernels=[LOOPS[loop]])
    rows, codewords, width = SEARCH_SHAPES["published"]
    inputs = two(lambda seed: [draw(stage, rows, width, seed=seed), draw(stage, codewords, width, seed=seed + 1)])
    with main_loop(loop):
        return replay(stage, lambda x, e: tuple(nearest_codeword(x, e)), *inputs)


def replayed_step(stage: Stage, *, is_prepared: bool) -> Found:
    """Search and update of a training step, with all state that they change."""
    common.need(stage, "nearest_codeword", "codebook_update")
    rule = rule_of("recommended")
    prepared_of: dict[int, PreparedCodebook] = {}

    def draw_inputs(seed: int) -> list[Tensor]:
        state, features = update_inputs(stage, sizes_of(stage))
        shifted = [x + draw(stage, *x.shape, seed=seed + m) for m, x in enumerate(features)]
        return [*(tensor.clone() for tensor in state), *shifted]

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        state, features = CodebookState(*tensors[:5]), list(tensors[5:])
        made = prepared_of.setdefault(state.codebook.data_ptr(), PreparedCodebook(state.codebook))
        codebook = made if is_prepared else state.codebook
        index = [nearest_codeword(x, codebook).index for x in features]
        codebook_update(state, features, index, rule, prepared=made if is_prepared else None)
        return *(tensor.clone() for tensor in state), *index

    held, second = two(draw_inputs)
    held = [x.clone() for x in held]
    prepared_of[held[0].data_ptr()] = PreparedCodebook(held[0])
    again = contrast.captured(lambda: step(*held))
    for memory, new in zip(held, second, strict=True):
        memory.copy_(new)
    if is_prepared:
        prepared_of[held[0].data_ptr()].refresh()
    copies = [x.clone() for x in second]
    pairs = []
    # Twice, so that the second search reads the operands of the first update.
    for _ in range(2):
        found = [x.clone() for x in again()]
        pairs += list(zip(found, step(*copies), strict=True))
    equal = all(torch.equal(a, b) for a, b in pairs)
    return Found(equal, f"replayed twice: {'the' if equal else 'other'} bits {'of' if equal else 'than'} the calls")


def replayed_commitment(stage: Stage) -> Found:
    common.need(stage, "commitment_loss")
    inputs = two(lambda seed: rows_and_codebook(stage, MODALITIES, sizes_of(stage).rows, seed=seed))
    return replay(stage, lambda x, e: tuple(commitment_of(stage, x, e, None, None)), *inputs)


def replayed_distribution(stage: Stage) -> Found:
    inputs = two(lambda seed: rows_and_codebook(stage, 8, sizes_of(stage).rows // 8, seed=seed))
    return replay(stage, distribution_of, *inputs)


def replayed_contrast(stage: Stage, clips: int, precision: str) -> Found:
    common.need_triton(stage)
    inputs = two(lambda seed: contrast_inputs(stage, clips, 1, precision, seed))
    with products(precision):
        return replay(stage, lambda a, b: contrast_of(a, b, None), *inputs)


def one(*kernels: str, beside: tuple[str, ...] = ()) -> About:
    """A row about one kernel or operator."""
    return About((*beside, *kernels), kernels)


def searches(loop: str) -> About:
    """The kernels of a search; the chosen loop depends on the sizes."""
    if loop == "plain":
        return one(LOOPS[loop])
    if loop:
        return one(LOOPS[loop], beside=("operands",))
    return About(CHOSEN_SEARCHES)


COMMITMENT, CONTRAST = one("commitment"), one("cross_info_nce")
SEARCH_AND_UPDATE = About((*CHOSEN_SEARCHES, "statistics_scan", "apply"))


def main() -> None:
    stage = common.begin(__doc__)
    # Triton's interpreter takes a minute and a half for a thousand clips; 130 are more than a tile too.
    contrasts = [(80, 1), (80, 2), (130, 1)] if stage.tiny else [(80, 1), (80, 12), (1000, 1), (1000, 12)]
    precisions = list(contrast.PRECISIONS)

    def row(name: str, about: About, measure: Callable[..., Found], *arguments: Any, **options: Any) -> None:
        common.attempt(stage, name, measure, *arguments, about=about, **options)

    for loop in LOOPS:
        row(f"nearest_codeword {loop or 'as chosen'}", searches(loop), search, loop)
    row("nearest_codeword float64", one("search_direct"), search_direct)
    row("nearest_codeword prepared", SEARCH_AND_UPDATE, prepared)
    for name, is_sorted in product(PRESETS, (False, True)):
        about = one("statistics_sorted" if is_sorted else "statistics_scan", "apply")
        row(f"codebook_update {name}{', sorted' if is_sorted else ''}", about, update, name, is_sorted=is_sorted)
    for dtype, masked in product((torch.float32, torch.bfloat16), (False, True)):
        kind = str(dtype).removeprefix("torch.")
        row(f"commitment_loss {kind}{', masked' if masked else ''}", COMMITMENT, commitment, dtype, masked=masked)
    row("codeword_distribution", one(), distribution)
    for (clips, steps), precision in product(contrasts, precisions):
        # TF32 is a rare option.
        about = About(CONTRAST.kernels) if precision == "tf32" else CONTRAST
        row(f"cross_info_nce B {clips}, K {steps}, {precision}", about, contrast_row, clips, steps, precision)
    # Kernels that fail only in a graph are not left out.
    for loop in LOOPS:
        row(f"graph of nearest_codeword {loop or 'as chosen'}", About(searches(loop).kernels), replayed_search, loop)
    row("graph of search and update", SEARCH_AND_UPDATE, replayed_step, is_prepared=False)
    row("graph of search and update, prepared", SEARCH_AND_UPDATE, replayed_step, is_prepared=True)
    row("graph of commitment_loss", About(COMMITMENT.kernels), replayed_commitment)
    row("graph of codeword_distribution", one(), replayed_distribution)
    for clips in dict.fromkeys(clips for clips, _ in contrasts):
        row(f"graph of cross_info_nce B {clips}", About(CONTRAST.kernels), replayed_contrast, clips, precisions[-1])


if __name__ == "__main__":
    main()
