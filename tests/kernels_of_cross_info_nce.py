"""The Triton kernels of cross_info_nce beside the reference in float64; run by test_cross_info_nce_triton.py.

With TRITON_INTERPRET=1 they run on the CPU, in Triton's interpreter, else on a GPU. The interpreter multiplies float32
exactly at any precision, so most tests there set the precision with the largest tiles. It cannot multiply bfloat16. The
log of 0, where a softmax is over nothing, is intended.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tolerances
import torch
from cases import generator, normal, strided
from compare import LargestTensor, assert_all_close, assert_close
from tolerances import EXACT
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from unicode_fast.kernels import cross_info_nce as kernels

from unicode_fast.reference.cross_info_nce import (
    CrossInfoNCEInputs,
    cross_info_nce_backward_reference,
    cross_info_nce_reference,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
NAN = float("nan")
KERNELS = ("small_forward_kernel", "small_rows_kernel", "forward_kernel", "backward_kernel")
NAMES = ("loss", "pair_loss", "hits", "logsumexp", "clip_weights")


@pytest.fixture(autouse=True)
def large_tiles() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if INTERPRETED else "highest")
    yield
    torch.set_float32_matmul_precision(before)


def make_inputs(
    size: tuple[int, int, int, int],
    softmax_over: str = "predictions",
    masked: bool = False,
    dtype: torch.dtype = torch.float32,
) -> CrossInfoNCEInputs:
    modalities, _, _, width = size
    weights = (torch.rand(modalities, modalities, generator=generator(5)) + 0.1).to(DEVICE)
    valid = (torch.rand(size[:3], generator=generator()) < 0.7).to(DEVICE) if masked else None
    targets, predictions = (normal(*size, seed=seed, dtype=dtype).to(DEVICE) for seed in (0, 1))
    # Scores of order one, whatever the width.
    temperature = torch.tensor(width**0.5, device=DEVICE)
    return CrossInfoNCEInputs(targets, predictions, weights, valid, temperature, softmax_over)


def assert_as_reference(
    inputs: CrossInfoNCEInputs, check_hits: bool = True, check_gradients: bool = True
) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients of the kernels, after comparing both with the reference in float64."""
    gradient = torch.tensor(1.7, device=DEVICE)
    truth_inputs = in_float64(inputs)
    found = kernels.cross_info_nce_triton(inputs)
    expected = cross_info_nce_reference(truth_inputs)
    scores = inputs.targets.double().flatten(0, 2).norm(dim=1).amax() * inputs.predictions.double().norm(dim=3).amax()
    largest = float(scores / inputs.temperature.double())
    for name, tensor, truth in zip(NAMES, found, expected, strict=True):
        if name != "hits":
            assert_close(tensor, truth, tolerances.cross_info_nce(largest, torch.float32), name)
        elif check_hits:
            assert_close(tensor, truth, EXACT, name)
    arguments = found[3], found[4], inputs
    gradients = kernels.cross_info_nce_backward_triton(gradient, *arguments)
    truths = cross_info_nce_backward_reference(gradient.double(), expected[3], expected[4], truth_inputs)
    for tensor, truth in zip(gradients, truths, strict=True):
        tolerance = tolerances.cross_info_nce_gradient(largest, torch.float32)
        if tensor.dtype != torch.float32:
            tolerance = tolerances.cross_info_nce_half_gradient(tensor.dtype, float(truth.abs().max()))
        if check_gradients:
            assert_close(tensor, truth, tolerance, "gradient")
    return list(found), list(gradients)


def in_float64(inputs: CrossInfoNCEInputs) -> CrossInfoNCEInputs:
    return CrossInfoNCEInputs(
        *(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)  # type: ignore[arg-type]
    )


SMALL = [
    ((2, 1, 1, 16), "predictions", False),
    ((5, 2, 2, 5), "both", True),
    ((2, 12, 2, 3), "candidates", True),
    ((3, 1, 79, 24), "candidates", True),
    ((3, 1, 80, 40), "predictions", False),
    ((4, 1, 80, 40), "both", True),
    ((2, 2, 96, 24), "both", False),
]
LARGE = [
    ((1, 1, 97, 24), "both", True),
    ((2, 1, 127, 33), "both", False),
    ((2, 1, 128, 130), "predictions", True),
    ((2, 1, 129, 40), "both", True),
    ((2, 1, 129, 17), "candidates", False),
    ((1, 2, 300, 130), "predictions", True),
    ((1, 1, 1000, 8), "both", True),
]


@pytest.mark.parametrize(("size", "softmax_over", "masked"), [*SMALL, *LARGE])
def test_against_float64(size: tuple[int, int, int, int], softmax_over: str, masked: bool) -> None:
    assert_as_reference(make_inputs(size, softmax_over, masked))


@pytest.mark.parametrize(("size", "softmax_over", "masked"), SMALL)
def test_whole_pairs_in_a_program(
    size: tuple[int, int, int, int], softmax_over: str, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "ROW_TILES", False)
    assert_as_reference(make_inputs(size, softmax_over, masked))


@pytest.mark.parametrize("form", ["WITHOUT_MASKS", "BASE_TWO", "FUSED", "COLUMN_SUMS", "DIAGONAL_APART"])
@pytest.mark.parametrize(("clips", "softmax_over"), [(80, "both"), (130, "both"), (130, "predictions")])
def test_earlier_forms(clips: int, softmax_over: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forms that the package does not choose, each without the others."""
    monkeypatch.setattr(kernels, form, False)
    assert_as_reference(make_inputs((2, 1, clips, 24), softmax_over))


@pytest.mark.parametrize(
    ("capability", "ahead", "masked"),
    [((8, 0), False, True), ((9, 0), False, True), ((9, 0), True, True), ((9, 0), True, False)],
)
@pytest.mark.parametrize(("size", "own"), [((2, 1, 140, 200), slice(5, 139)), ((1, 2, 200, 256), slice(0, 200))])
def test_tiles_of_a_whole_width(
    size: tuple[int, int, int, int],
    own: slice,
    capability: tuple[int, int],
    ahead: bool,
    masked: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tiles of other GPUs: an odd and an even number of them, two at a time with `AHEAD`."""
    if not INTERPRETED and torch.cuda.get_device_capability() < capability:
        pytest.skip("the GPU has less shared memory")
    monkeypatch.setattr(kernels, "AHEAD", ahead)
    monkeypatch.setattr(kernels, "_capability", lambda tensor: capability)
    inputs = make_inputs(size, masked=masked, dtype=torch.float16)._replace(offset=own.start)
    assert_as_reference(inputs._replace(targets=inputs.targets[:, :, own]))


@pytest.mark.parametrize("softmax_over", ["predictions", "both"])
def test_exact_float32(softmax_over: str) -> None:
    """The tiles for float32 without loss of bits."""
    torch.set_float32_matmul_precision("highest")
    assert_as_reference(make_inputs((1, 1, 40, 20), softmax_over, masked=True))


@pytest.mark.parametrize(
    ("size", "softmax_over"), [((2, 2, 80, 200), "both"), ((1, 1, 140, 256), "candidates"), ((1, 1, 130, 300), "both")]
)
@pytest.mark.parametrize("dtype", [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16])
def test_half_precision(size: tuple[int, int, int, int], softmax_over: str, dtype: torch.dtype) -> None:
    assert_as_reference(make_inputs(size, softmax_over, masked=True, dtype=dtype))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter multiplies exactly")
@pytest.mark.parametrize("clips", [80, 1000])
def test_tf32(clips: int) -> None:
    """Scores and gradients lose as many bits as their factors, not more."""
    torch.set_float32_matmul_precision("high")
    inputs = make_inputs((2, 1, clips, 256), "both")
    found = kernels.cross_info_nce_triton(inputs)
    truth = cross_info_nce_reference(in_float64(inputs))
    assert_close(found[0], truth[0], tolerances.CROSS_INFO_NCE_TF32)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes minutes")
@pytest.mark.parametrize("softmax_over", ["predictions", "both"])
@pytest.mark.parametrize("clips", [1000, 5000])
def test_large_batches(clips: int, softmax_over: str) -> None:
    assert_as_reference(make_inputs((2, 1, clips, 256), softmax_over, masked=True), check_hits=False)


def test_float16_of_small_weights() -> None:
    """Slopes far below the range of float16 are not lost."""
    inputs = make_inputs((2, 1, 140, 20), "both", dtype=torch.float16)
    inputs = inputs._replace(pair_weights=inputs.pair_weights * 1e-6)
    gradient = torch.tensor(2.0**20, device=DEVICE)
    found = kernels.cross_info_nce_triton(inputs)
    result = kernels.cross_info_nce_backward_triton(gradient, found[3], found[4], inputs)[0]
    truth = cross_info_nce_backward_reference(gradient, found[3], found[4], inputs)[0]
    largest = float(truth.abs().max())
    assert_close(result, truth, tolerances.cross_info_nce_half_gradient(torch.float16, largest))


def test_several_tiles_of_rows_in_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """With "both", a program adds the columns of its tiles to its earlier sums."""
    monkeypatch.setattr(kernels, "MOST_GROUPS", 2)
    assert_as_reference(make_inputs((1, 1, 420, 16), "both", masked=True))


@pytest.mark.parametrize("softmax_over", ["predictions", "candidates"])
@pytest.mark.parametrize(("clips", "own"), [(60, slice(20, 47)), (150, slice(130, 150)), (150, slice(3, 140))])
def test_some_queries_of_the_batch(clips: int, own: slice, softmax_over: str) -> None:
    """Rows of queries and columns of keys differ in number, and the diagonal starts at an offset."""
    inputs = make_inputs((2, 1, clips, 8), softmax_over, masked=True)._replace(offset=own.start)
    queries = {"predictions": "targets", "candidates": "predictions"}[softmax_over]
    inputs = inputs._replace(**{queries: getattr(inputs, queries)[:, :, own]})
    assert_as_reference(inputs)


@pytest.mark.parametrize("clips", [9, 130])
@pytest.mark.parametrize("softmax_over", ["predictions", "candidates", "both"])
def test_identical_rows(clips: int, softmax_over: str) -> None:
    """The first of equal scores is the only hit, also where it is in another tile."""
    vectors = [(normal(1, 1, 1, 16, seed=seed) * 2).round().expand(1, 1, clips, 16).to(DEVICE) for seed in (0, 1)]
    inputs = make_inputs((1, 1, clips, 16), softmax_over)._replace(targets=vectors[0], predictions=vectors[1])
    found, _ = assert_as_reference(inputs)
    assert found[2].item() == 1


@pytest.mark.parametrize("clips", [6, 130])
@pytest.mark.parametrize("scale", [1e-20, 30, 1e15])
def test_extreme_scores(scale: float, clips: int) -> None:
    inputs = make_inputs((1, 1, clips, 8), "both")
    inputs = inputs._replace(targets=inputs.targets * scale, predictions=inputs.predictions * scale)
    _, gradients = assert_as_reference(inputs, check_hits=False, check_gradients=scale < 1e15)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("clips", [7, 130])
def test_masked_vectors_may_hold_anything(clips: int) -> None:
    inputs = make_inputs((2, 1, clips, 8), "both", masked=True)
    assert inputs.valid is not None
    results = []
    for filling in (0.0, NAN):
        vectors = [torch.where(inputs.valid[..., None], x, filling) for x in (inputs.targets, inputs.predictions)]
        found = kernels.cross_info_nce_triton(inputs._replace(targets=vectors[0], predictions=vectors[1]))
        results.append(
            [*found, *kernels.cross_info_nce_backward_triton(torch.ones((), device=DEVICE), found[3], found[4], inputs)]
        )
    assert_all_close(*results, EXACT)
    assert not results[1][5][~inputs.valid].any()


def test_weight_zero_leaves_a_pair_out() -> None:
    inputs = make_inputs((2, 1, 4, 3))
    inputs.predictions[1, 0, 2, 0] = NAN
    inputs.pair_weights[:, 1] = 0
    found = kernels.cross_info_nce_triton(inputs)
    assert found[0].isfinite()
    assert found[1][:, 1].isnan().all()
    in_targets, in_predictions, _ = kernels.cross_info_nce_backward_triton(
        torch.tensor(1.0), found[3], found[4], inputs
    )
    assert in_targets.isfinite().all()
    assert in_predictions.isfinite().all()


@pytest.mark.parametrize("clips", [7, 130])
@pytest.mark.parametrize("softmax_over", ["predictions", "both"])
def test_not_a_number_stays_one(clips: int, softmax_over: str) -> None:
    """The gradient of a loss that is NaN is not finite."""
    inputs = make_inputs((1, 1, clips, 8), softmax_over)
    inputs.predictions[0, 0, 3, 2] = NAN
    found = kernels.cross_info_nce_triton(inputs)
    assert found[0].isnan()
    gradients = kernels.cross_info_nce_backward_triton(torch.ones((), device=DEVICE), found[3], found[4], inputs)
    assert all(gradient.isnan().all() for gradient in gradients)


class Launches:
    """A kernel that counts how often it is launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.number = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.number += 1
        return self.kernel[grid]


@pytest.mark.parametrize(
    ("clips", "rows", "forward"),
    [(5, True, "small_rows_kernel"), (5, False, "small_forward_kernel"), (130, True, "forward_kernel")],
)
def test_one_launch_each_way(clips: int, rows: bool, forward: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All pairs and steps in one kernel, their gradient in another."""
    monkeypatch.setattr(kernels, "ROW_TILES", rows)
    counted = {name: Launches(getattr(kernels, name)) for name in KERNELS}
    for name, kernel in counted.items():
        monkeypatch.setattr(kernels, name, kernel)
    assert_as_reference(make_inputs((2, 2, clips, 3), "both", masked=True))
    expected = {forward: 1, "backward_kernel": 1}
    assert {name: kernel.number for name, kernel in counted.items() if kernel.number} == expected


class Operators(TorchDispatchMode):
    """Counts the operators of torch by name."""

    def __init__(self) -> None:
        super().__init__()
        self.number: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number[str(function)] += 1
        return function(*args, **(kwargs or {}))


class Launched:
    """A kernel whose launches are counted, and not what Triton's interpreter calls for them."""

    def __init__(self, name: str, operators: Operators) -> None:
        self.kernel, self.name, self.operators = getattr(kernels, name), name, operators

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            self.operators.number[self.name] += 1
            with _disable_current_modes():
                self.kernel[grid](*arguments, **options)

        return launch


# Operators of torch that launch nothing.
LAUNCHING_NOTHING = ("aten.new_empty.default", "aten.empty_like.default", "aten.alias.default")


@pytest.mark.parametrize("fused", [False, True])
def test_two_launches_in_all(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of a small batch: no operator of torch computes or copies, if fused; else one fills and one adds up."""
    monkeypatch.setattr(kernels, "FUSED", fused)
    inputs = make_inputs((2, 1, 5, kernels.TILE_WIDTH), "both")
    assert_as_reference(inputs)  # Makes the counts of programs.
    gradient = torch.ones((), device=DEVICE)
    operators = Operators()
    for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
        monkeypatch.setattr(kernels, name, Launched(name, operators))
    with operators:
        found = kernels.cross_info_nce_triton(inputs)
        kernels.cross_info_nce_backward_triton(gradient, found[3], found[4], inputs)
    launched = {name: number for name, number in operators.number.items() if name not in LAUNCHING_NOTHING}
    unfused = {} if fused else {"aten.new_zeros.default": 1, "aten.sum.default": 1}
    assert launched == {"small_rows_kernel": 1, "backward_kernel": 1, **unfused}


def test_counts_of_graphs_stay_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph holds no tensor of its counts, so nothing else may get their memory."""
    like = torch.zeros((), device=DEVICE)
    kernels._arrived(like)
    unused = kernels._UNUSED_COUNTS[like.device]
    memory = StorageWeakRef(unused[0].untyped_storage())
    monkeypatch.setattr(kernels, "_captured", lambda like: True)
    for _ in range(len(unused)):
        kernels._arrived(like)
    assert not unused
    assert not memory.expired()


@pytest.mark.skipif(INTERPRETED, reason="a graph needs a GPU")
def test_graphs_keep_their_counts() -> None:
    """A graph between other kernels, and more graphs than there are unused counts."""
    inputs = make_inputs((3, 1, 80, 256), "both")

    def both_ways() -> list[Tensor]:
        found = kernels.cross_info_nce_triton(inputs)
        gradient = torch.ones((), device=DEVICE)
        return [*found, *kernels.cross_info_nce_backward_triton(gradient, found[3], found[4], inputs)]

    expected = both_ways()
    for _ in range(40):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = both_ways()
        for _ in range(2):
            graph.replay()
            assert_all_close([*both_ways(), *captured], [*expected, *expected], EXACT)


@pytest.mark.parametrize("softmax_over", ["predictions", "both"])
def test_never_holds_all_scores(softmax_over: str) -> None:
    clips, width = 600, 4
    inputs = make_inputs((1, 1, clips, width), softmax_over)
    with LargestTensor() as largest:
        found = kernels.cross_info_nce_triton(inputs)
        kernels.cross_info_nce_backward_triton(torch.ones((), device=DEVICE), found[3], found[4], inputs)
    assert largest.bytes == 4 * clips * kernels.TILE_WIDTH < 4 * clips**2


@pytest.mark.parametrize("clips", [79, 131])
def test_reads_nothing_beside_its_inputs(clips: int) -> None:
    """Vectors of whole tiles are read where they are, here amid NaN."""
    inputs = make_inputs((2, 1, clips, kernels.TILE_WIDTH), "both")
    amid = []
    for vectors in (inputs.targets, inputs.predictions):
        wide = torch.full((2 * vectors.numel(),), NAN, device=DEVICE)
        start = vectors.numel() // 2 // 4 * 4
        view = wide[start : start + vectors.numel()].view(vectors.shape)
        view.copy_(vectors)
        amid.append(view)
    results = []
    for case in (inputs, inputs._replace(targets=amid[0], predictions=amid[1])):
        found = kernels.cross_info_nce_triton(case)
        gradient = torch.ones((), device=DEVICE)
        results.append([*found, *kernels.cross_info_nce_backward_triton(gradient, found[3], found[4], case)])
    for clean, found_amid in zip(*results, strict=True):
        assert clean.isfinite().all()
        assert_close(found_amid, clean, EXACT)


def test_nothing_valid() -> None:
    inputs = make_inputs((2, 2, 5, 3), "both")._replace(valid=torch.zeros(2, 2, 5, dtype=torch.bool, device=DEVICE))
    found, gradients = assert_as_reference(inputs)
    assert found[0].item() == 0
    assert not any(gradient.any() for gradient in gradients)


def test_strided_and_misaligned() -> None:
    inputs = make_inputs((2, 2, 5, 128), "both")
    shifted = torch.zeros(inputs.predictions.numel() + 1, device=DEVICE)[1:].view(inputs.predictions.shape)
    shifted.copy_(inputs.predictions)
    weights = strided(inputs.pair_weights)
    assert_as_reference(inputs._replace(targets=strided(inputs.targets), predictions=shifted, pair_weights=weights))


def test_repeatable() -> None:
    inputs = make_inputs((3, 1, 80, 24), "both", masked=True)
    first, second = (assert_as_reference(inputs) for _ in range(2))
    assert_all_close([*first[0], *first[1]], [*second[0], *second[1]], EXACT)
