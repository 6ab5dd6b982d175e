"""cross_info_nce: hand-written values, an independent oracle, gradients, masks, ties and extreme scores."""

import itertools
from math import log

import numpy as np
import pytest
import tolerances
import torch
from cases import Place, generator, normal, places, strided
from compare import LargestTensor, assert_all_close, assert_close, assert_no_worse, to_float64
from memory import peak_bytes
from tolerances import EXACT, GRADCHECK
from torch import Tensor

import unicode_fast
from unicode_fast.ops import CrossInfoNCE, cross_info_nce
from unicode_fast.reference import cross_info_nce as reference_module
from unicode_fast.reference import cross_info_nce_backward_reference, cross_info_nce_reference
from unicode_fast.reference.cross_info_nce import CrossInfoNCEInputs

NAN, INFINITY = float("nan"), float("inf")
SOFTMAXES = ["predictions", "candidates", "both"]


class Oracle:
    """Loss, pair losses and hits, score by score, in float64 NumPy."""

    def __init__(
        self,
        targets: Tensor,
        predictions: Tensor,
        pair_weights: Tensor,
        valid: Tensor | None,
        softmax_over: str,
        temperature: float,
    ) -> None:
        modalities, steps, clips, _ = targets.shape
        target, source, weights = to_float64(targets), to_float64(predictions), to_float64(pair_weights)
        mask = np.ones((modalities, steps, clips), dtype=bool) if valid is None else valid.cpu().numpy()
        self.loss = 0.0
        self.pair_loss = np.zeros((modalities, modalities, steps))
        self.hits = np.zeros((modalities, modalities, steps), dtype=int)
        for t in range(modalities):
            for s in range(modalities):
                used = []
                for k in range(steps):
                    both = [i for i in range(clips) if mask[t, k, i] and mask[s, k, i]]
                    losses: list[float] = []
                    for i in both:
                        row = {
                            j: target[t, k, i] @ source[s, k, j] / temperature for j in range(clips) if mask[s, k, j]
                        }
                        column = {
                            j: target[t, k, j] @ source[s, k, i] / temperature for j in range(clips) if mask[t, k, j]
                        }
                        scored = {"predictions": [row], "candidates": [column], "both": [row, column]}[softmax_over]
                        losses.append(np.mean([self.term(scores, i) for scores in scored]))
                        self.hits[t, s, k] += min(scored[0], key=lambda j, x=scored[0]: (-x[j], j)) == i
                    if both:
                        self.pair_loss[t, s, k] = np.mean(losses)
                        used.append(self.pair_loss[t, s, k])
                if used and weights[t, s] != 0:
                    self.loss += weights[t, s] * np.mean(used)

    @staticmethod
    def term(scores: dict[int, float], i: int) -> float:
        largest = max(scores.values())
        return largest + np.log(sum(np.exp(score - largest) for score in scores.values())) - scores[i]


def random_inputs(
    modalities: int, steps: int, clips: int, width: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (modalities, steps, clips, width)
    weights = torch.rand(modalities, modalities, generator=generator(5), dtype=torch.float64) + 0.1
    return normal(*shape, dtype=dtype), normal(*shape, seed=1, dtype=dtype), weights.to(dtype)


def assert_result(
    result: CrossInfoNCE, oracle: Oracle, tolerance: tolerances.Tolerance, check_hits: bool = True
) -> None:
    assert_close(result.pair_loss, oracle.pair_loss, tolerance, "pair_loss")
    assert_close(result.loss, np.array(oracle.loss), tolerance, "loss")
    assert result.hits.dtype == torch.int64
    if check_hits:
        assert result.hits.tolist() == oracle.hits.tolist()


def run(place: Place, targets: Tensor, predictions: Tensor, weights: Tensor, **options: object) -> CrossInfoNCE:
    moved = {name: v.to(place.device) if isinstance(v, Tensor) else v for name, v in options.items()}
    tensors = [tensor.to(place.device) for tensor in (targets, predictions, weights)]
    return cross_info_nce(*tensors, backend=place.backend, **moved)  # type: ignore[arg-type]


@places("cross_info_nce")
def test_hand_written(place: Place) -> None:
    """One modality, two clips, scores log 2, 0 / log 3, log 4: along rows 2/3, 4/7; along columns 2/5, 4/5."""
    targets = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]], dtype=torch.float64)
    predictions = torch.tensor([[[[log(2), log(3)], [0.0, log(4)]]]], dtype=torch.float64)
    weight = torch.tensor([[2.0]], dtype=torch.float64)
    rows, columns = -(log(2 / 3) + log(4 / 7)) / 2, -(log(2 / 5) + log(4 / 5)) / 2
    tolerance = tolerances.cross_info_nce(log(4), torch.float64)
    for softmax_over, loss, hits in (
        ("predictions", rows, 2),
        ("candidates", columns, 1),
        ("both", (rows + columns) / 2, 2),
    ):
        result = run(place, targets, predictions, weight, softmax_over=softmax_over)
        assert_close(result.pair_loss, np.full((1, 1, 1), loss), tolerance)
        assert_close(result.loss, np.array(2 * loss), tolerance)
        assert result.hits.tolist() == [[[hits]]]


@places("cross_info_nce")
def test_hand_written_mask(place: Place) -> None:
    """Two modalities; clip 1 of the second is missing: it is no positive there, and no negative as a prediction."""
    targets, predictions = torch.zeros(2, 1, 3, 1), torch.zeros(2, 1, 3, 1)
    valid = torch.tensor([[[True, True, True]], [[True, False, True]]])
    result = run(place, targets, predictions, torch.eye(2) + 1, valid=valid)
    # All scores are 0, so a row's loss is the log of the number of valid predictions.
    expected = np.array([[log(3), log(2)], [log(3), log(2)]])
    tolerance = tolerances.cross_info_nce(0, torch.float32)
    assert_close(result.pair_loss[:, :, 0], expected, tolerance)
    assert_close(result.loss, np.array(3 * log(3) + 3 * log(2)), tolerance)
    assert result.hits[:, :, 0].tolist() == [[1, 1], [1, 1]]


@places("cross_info_nce")
@pytest.mark.parametrize("softmax_over", SOFTMAXES)
@pytest.mark.parametrize("masked", [False, True])
def test_two_sets_of_vectors(softmax_over: str, masked: bool, place: Place) -> None:
    """(B, D) each: values and gradients are those of torch's own cross entropy in float64."""
    dtype = torch.float32 if place.backend == "triton" else torch.float64
    images, texts = normal(7, 5, dtype=dtype), normal(7, 5, seed=1, dtype=dtype)
    valid = torch.tensor([True, True, False, True, True, False, True]) if masked else None
    given = [x.to(place.device).requires_grad_() for x in (images, texts)]
    moved = None if valid is None else valid.to(place.device)
    options = {"softmax_over": softmax_over, "temperature": 0.07, "backend": place.backend}
    result = cross_info_nce(*given, valid=moved, **options)
    result.loss.backward()

    truth = [x.double().requires_grad_() for x in (images, texts)]
    first, second = truth if valid is None else [x[valid] for x in truth]
    scores, own = first @ second.T / 0.07, torch.arange(len(first))
    rows, columns = (torch.nn.functional.cross_entropy(x, own) for x in (scores, scores.T))
    expected = {"predictions": rows, "candidates": columns, "both": (rows + columns) / 2}[softmax_over]
    expected.backward()
    largest = float(scores.detach().abs().max())
    tolerance = tolerances.cross_info_nce(largest, dtype)
    assert (result.pair_loss.shape, result.hits.shape) == ((), ())
    assert_close(result.loss.detach(), expected.detach(), tolerance)
    assert_close(result.pair_loss, expected.detach(), tolerance)
    along = scores.argmax(dim=0 if softmax_over == "candidates" else 1)
    assert result.hits.item() == (along == own).sum().item()
    for found, true in zip(given, truth, strict=True):
        assert_close(found.grad, true.grad, tolerances.cross_info_nce_gradient(largest, dtype))


def test_the_example_of_the_docstring() -> None:
    lines = [line.strip() for line in str(cross_info_nce.__doc__).splitlines() if line.startswith(" " * 8)]
    start = next(number for number, line in enumerate(lines) if line.startswith("images, texts ="))
    names = {"torch": torch, "unicode_fast": unicode_fast}
    exec("\n".join(lines[start : start + 2]), names)
    scores, own = names["images"] @ names["texts"].T / 0.07, torch.arange(8)
    clip = sum(torch.nn.functional.cross_entropy(x, own) for x in (scores, scores.T)) / 2
    assert_close(names["loss"], clip, tolerances.cross_info_nce(1 / 0.07, torch.float32))


def test_without_weights_every_pair_counts_one() -> None:
    targets, predictions, _ = random_inputs(3, 2, 5, 4)
    ones = torch.ones(3, 3, dtype=torch.float64)
    for found, expected in zip(
        cross_info_nce(targets, predictions), cross_info_nce(targets, predictions, ones), strict=True
    ):
        assert torch.equal(found, expected)


SIZES = [(1, 1, 1, 1), (2, 1, 1, 5), (2, 2, 2, 3), (3, 4, 7, 17), (4, 1, 11, 64), (5, 2, 6, 30), (2, 12, 3, 4)]


@places("cross_info_nce")
@pytest.mark.parametrize("softmax_over", SOFTMAXES)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_against_oracle(size: tuple[int, int, int, int], softmax_over: str, place: Place) -> None:
    inputs = random_inputs(*size)
    valid = torch.rand(size[:3], generator=generator()) < 0.7
    options = {"softmax_over": softmax_over, "temperature": 0.7}
    for dtype, mask in ((torch.float64, None), (torch.float64, valid), (torch.float32, valid)):
        tensors = [tensor.to(dtype) for tensor in inputs]
        oracle = Oracle(*tensors, mask, softmax_over, 0.7)
        result = run(place, *tensors, valid=mask, **options)
        largest = float((tensors[0].flatten(0, 2) @ tensors[1].flatten(0, 2).T).abs().max()) / 0.7
        assert_result(result, oracle, tolerances.cross_info_nce(largest, dtype))


@places("cross_info_nce")
@pytest.mark.parametrize("softmax_over", SOFTMAXES)
@pytest.mark.parametrize("clips", [79, 80, 127, 128, 129, 1000])
def test_training_batches(clips: int, softmax_over: str, place: Place) -> None:
    """Against torch's own cross entropy, one pair and step after the other."""
    dtype = torch.float32 if place.backend == "triton" else torch.float64
    inputs = random_inputs(3, 2, clips, 32, dtype)
    result = run(place, *inputs, softmax_over=softmax_over)
    targets, predictions, _ = (tensor.double() for tensor in inputs)
    truth = torch.arange(clips)
    for t, s, k in ((t, s, k) for t in range(3) for s in range(3) for k in range(2)):
        scores = targets[t, k] @ predictions[s, k].T
        rows, columns = (torch.nn.functional.cross_entropy(x, truth) for x in (scores, scores.T))
        expected = {"predictions": rows, "candidates": columns, "both": (rows + columns) / 2}[softmax_over]
        assert_close(result.pair_loss[t, s, k], expected, tolerances.cross_info_nce(50, dtype))
        along = scores.argmax(dim=0 if softmax_over == "candidates" else 1)
        assert result.hits[t, s, k].item() == (along == truth).sum().item()


@places("cross_info_nce")
@pytest.mark.parametrize("softmax_over", SOFTMAXES)
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(softmax_over: str, masked: bool, place: Place) -> None:
    targets, predictions, weights = (tensor.to(place.device) for tensor in random_inputs(3, 2, 4, 3))
    temperature = torch.tensor(0.8, dtype=torch.float64, device=place.device, requires_grad=True)
    valid = (torch.rand(3, 2, 4, generator=generator()) < 0.6).to(place.device) if masked else None

    def loss(targets: Tensor, predictions: Tensor, temperature: Tensor) -> Tensor:
        options = {"valid": valid, "softmax_over": softmax_over, "temperature": temperature}
        return cross_info_nce(targets, predictions, weights, backend=place.backend, **options).loss  # type: ignore

    inputs = (targets.requires_grad_(), predictions.requires_grad_(), temperature)
    assert torch.autograd.gradcheck(loss, inputs, rtol=GRADCHECK.relative, atol=GRADCHECK.absolute)


@places("cross_info_nce")
@pytest.mark.parametrize("softmax_over", SOFTMAXES)
@pytest.mark.parametrize("clips", [80, 700])
def test_gradient_of_autograd(clips: int, softmax_over: str, place: Place) -> None:
    """At the paper's batch, and at one of several blocks, against torch's automatic gradient of the same loss."""
    dtype = torch.float32 if place.backend == "triton" else torch.float64
    targets, predictions, weights = random_inputs(3, 1, clips, 24, dtype)
    found, expected = [], []
    for results, device in ((found, place.device), (expected, "cpu")):
        a, b = targets.to(device).requires_grad_(), predictions.to(device).requires_grad_()
        if results is found:
            loss = run(place, a, b, weights, softmax_over=softmax_over).loss
        else:
            scores = a[:, None, 0] @ b[None, :, 0].transpose(2, 3)
            terms = [scores.log_softmax(3), scores.log_softmax(2)]
            chosen = {"predictions": terms[:1], "candidates": terms[1:], "both": terms}[softmax_over]
            loss = -(weights * torch.stack(chosen).mean(0).diagonal(dim1=2, dim2=3).mean(2)).sum()
        results += torch.autograd.grad(loss, (a, b))
    assert_all_close(found, expected, tolerances.cross_info_nce_gradient(50, dtype), "gradient")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available")
@pytest.mark.parametrize("clips", [80, 200])
def test_replays_from_a_cuda_graph(clips: int) -> None:
    """With other numbers in the same memory."""
    first, second = ([tensor.cuda() for tensor in random_inputs(3, 2, clips, 24, torch.float32)] for _ in range(2))
    second[0] = second[0].flip(2)
    leaves = [tensor.clone().requires_grad_() for tensor in first[:2]]

    def step() -> list[Tensor]:
        result = cross_info_nce(*leaves, first[2], softmax_over="both")
        return [*result, *torch.autograd.grad(result.loss, leaves)]

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    with torch.no_grad():
        for leaf, tensor in zip(leaves, second, strict=False):
            leaf.copy_(tensor)
    graph.replay()
    assert_all_close(found, step(), EXACT)


@places("cross_info_nce")
def test_masked_vectors_may_hold_anything(place: Place) -> None:
    inputs = random_inputs(2, 3, 5, 4)
    valid = torch.rand(2, 3, 5, generator=generator()) < 0.6
    valid[0, 1] = False
    results = []
    for filling in (0.0, NAN):
        tensors = [torch.where(valid[..., None], tensor, filling) for tensor in inputs[:2]]
        leaves = [tensor.to(place.device).requires_grad_() for tensor in tensors]
        result = run(place, *leaves, inputs[2], valid=valid, softmax_over="both")
        results.append([*result, *torch.autograd.grad(result.loss, leaves)])
    assert_all_close(*results, EXACT)
    assert not results[1][3].cpu()[~valid].any()
    assert not results[1][4].cpu()[~valid].any()


@places("cross_info_nce")
def test_steps_without_valid_clips(place: Place) -> None:
    """A step in which a pair shares no clip does not enter that pair's mean; with none at all the loss is 0."""
    targets, predictions, weights = random_inputs(2, 2, 3, 4)
    valid = torch.ones(2, 2, 3, dtype=torch.bool)
    valid[0, 1] = False
    result = run(place, targets, predictions, weights, valid=valid)
    assert_result(
        result,
        Oracle(targets, predictions, weights, valid, "predictions", 1.0),
        tolerances.cross_info_nce(20, torch.float64),
    )
    leaves = [tensor.to(place.device).requires_grad_() for tensor in (targets, predictions)]
    nothing = run(place, *leaves, weights, valid=torch.zeros_like(valid), softmax_over="both")
    assert nothing.loss.item() == 0
    assert not nothing.hits.any()
    assert all(not gradient.any() for gradient in torch.autograd.grad(nothing.loss, leaves))


@places("cross_info_nce")
def test_no_clips(place: Place) -> None:
    leaves = [torch.zeros(2, 3, 0, 4, device=place.device, requires_grad=True) for _ in range(2)]
    result = run(place, *leaves, torch.ones(2, 2), softmax_over="both")
    assert result.loss.item() == 0
    assert result.pair_loss.tolist() == [[[0.0] * 3] * 2] * 2
    assert [gradient.shape for gradient in torch.autograd.grad(result.loss, leaves)] == [(2, 3, 0, 4)] * 2


@places("cross_info_nce")
def test_one_clip(place: Place) -> None:
    """Without negatives: loss 0, a hit, no gradient."""
    targets, predictions, weights = random_inputs(3, 2, 1, 8)
    leaves = [tensor.to(place.device).requires_grad_() for tensor in (targets, predictions)]
    result = run(place, *leaves, weights)
    assert_close(result.loss, np.array(0.0), tolerances.cross_info_nce(20, torch.float64))
    assert (result.hits == 1).all()
    for gradient in torch.autograd.grad(result.loss, leaves):
        assert_close(gradient, np.zeros((3, 2, 1, 8)), tolerances.cross_info_nce_gradient(20, torch.float64))


@places("cross_info_nce")
@pytest.mark.parametrize("softmax_over", SOFTMAXES)
def test_identical_rows(softmax_over: str, place: Place) -> None:
    """All clips are equal: the loss is log B, and the first of equal scores is the only hit.

    The numbers are small integers, so that a matrix product in any order of sums gives equal scores.
    """
    targets, predictions = ((normal(2, 1, 1, 16, seed=s) * 2).round().expand(2, 1, 9, 16) for s in (0, 1))
    result = run(place, targets, predictions, torch.ones(2, 2), softmax_over=softmax_over)
    assert_close(result.pair_loss, np.full((2, 2, 1), log(9)), tolerances.cross_info_nce(20, torch.float32))
    assert (result.hits == 1).all()


@places("cross_info_nce")
@pytest.mark.parametrize("scale", [1e-20, 1e3, 1e15])
def test_extreme_scores(scale: float, place: Place) -> None:
    targets, predictions, weights = random_inputs(2, 1, 6, 8, torch.float32)
    leaves = [(tensor * scale).to(place.device).requires_grad_() for tensor in (targets, predictions)]
    result = run(place, *leaves, weights, softmax_over="both")
    largest = 60 * scale**2
    expected = Oracle(*leaves, weights, None, "both", 1.0)
    assert_result(result, expected, tolerances.cross_info_nce(largest, torch.float32), check_hits=scale > 1)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(result.loss, leaves))


@pytest.mark.parametrize("clips", [17, 500], ids=["one block", "several blocks"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("softmax_over", SOFTMAXES)
def test_infinite_scores_on_a_cpu(softmax_over: str, dtype: torch.dtype, masked: bool, clips: int) -> None:
    """Some, or all of a softmax, of both signs, beside NaN too: finite, infinite and NaN where the reference is."""
    targets, predictions, weights = random_inputs(2, 2, clips, 4, dtype)
    predictions[1, ..., 0].abs_()
    targets[0, 0, 3, 0], targets[0, 1, 5, 0], targets[1, 0, 2, 0] = INFINITY, -INFINITY, INFINITY
    predictions[0, 1, 4, 1], predictions[1, 1, 1, 1], predictions[1, 0, 6, 2] = INFINITY, -INFINITY, NAN
    valid = torch.rand(2, 2, clips, generator=generator()) < 0.7 if masked else None
    inputs = CrossInfoNCEInputs(targets, predictions, weights, valid, torch.ones((), dtype=dtype), softmax_over)
    for name in ("", "_with_gradient"):
        found = getattr(torch.ops.unicode_fast, f"cross_info_nce{name}")(*inputs)
        expected = getattr(reference_module, f"cross_info_nce{name}_reference")(inputs)
        assert name or expected[1].isinf().any()
        assert_all_close(found, expected, tolerances.cross_info_nce_gradient(20, dtype))


@places("cross_info_nce")
def test_weight_zero_leaves_a_pair_out(place: Place) -> None:
    """Even a pair whose own loss is not finite; its vectors get no gradient from it."""
    targets, predictions, weights = random_inputs(2, 1, 4, 3)
    predictions[1, 0, 2, 0] = NAN
    weights[:, 1] = 0
    leaves = [tensor.to(place.device).requires_grad_() for tensor in (targets, predictions)]
    result = run(place, *leaves, weights)
    assert result.pair_loss[:, 1].isnan().all()
    assert result.loss.isfinite()
    in_targets, in_predictions = torch.autograd.grad(result.loss, leaves)
    assert in_predictions[0].isfinite().all()
    assert in_targets.shape == in_predictions.shape


@places("cross_info_nce")
@pytest.mark.parametrize("softmax_over", SOFTMAXES)
def test_masks_in_several_blocks(softmax_over: str, place: Place) -> None:
    """As the reference in float64, and the same bits each time."""
    inputs = random_inputs(3, 2, 500, 24, torch.float32)
    valid = torch.rand(3, 2, 500, generator=generator()) < 0.7

    def compute(where: Place, dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(dtype).to(where.device).requires_grad_() for tensor in inputs[:2]]
        temperature = torch.tensor(0.8, dtype=dtype, device=where.device, requires_grad=True)
        options = {"valid": valid, "softmax_over": softmax_over, "temperature": temperature}
        result = run(where, *leaves, inputs[2].to(dtype), **options)
        return [*result, *torch.autograd.grad(result.loss, [*leaves, temperature])]

    found, truth = compute(place, torch.float32), compute(Place(place.operator, "cpu", "reference"), torch.float64)
    assert_all_close(found, truth, tolerances.cross_info_nce_gradient(50, torch.float32))
    assert_all_close(found, compute(place, torch.float32), EXACT)


@places("cross_info_nce")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, place: Place) -> None:
    """Half-precision inputs are computed in float32, and their gradients rounded once; in Triton their slopes too."""
    targets, predictions, weights = random_inputs(3, 2, 10, 24, torch.float32)
    halves = [tensor.to(dtype).to(place.device).requires_grad_() for tensor in (targets, predictions)]
    result = run(place, *halves, weights, softmax_over="both")
    assert result.loss.dtype == result.pair_loss.dtype == torch.float32
    oracle = Oracle(halves[0], halves[1], weights, None, "both", 1.0)
    assert_result(result, oracle, tolerances.cross_info_nce(40, torch.float32))
    singles = [half.detach().float().requires_grad_() for half in halves]
    expected = torch.autograd.grad(run(place, *singles, weights, softmax_over="both").loss, singles)
    rounding = tolerances.UNIT_ROUNDOFF[dtype]
    smallest = torch.finfo(dtype).smallest_normal * rounding
    for gradient, truth in zip(torch.autograd.grad(result.loss, halves), expected, strict=True):
        assert gradient.dtype == dtype
        tolerance = tolerances.Tolerance(rounding, smallest)
        if place.backend == "triton":
            tolerance = tolerances.cross_info_nce_half_gradient(dtype, float(truth.abs().max()))
        assert_close(gradient, truth, tolerance)


@places("cross_info_nce")
def test_autocast_is_as_for_losses_of_torch(place: Place) -> None:
    """The result of each pair of dtypes, equal or not, has the dtype of torch's own losses."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    for first, second in itertools.product(dtypes, dtypes):
        targets, predictions, weights = random_inputs(2, 2, 10, 24)
        leaves = [targets.to(place.device, first), predictions.to(place.device, second)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        with torch.autocast(place.device, dtype=torch.bfloat16):
            result = run(place, *leaves, weights)
            assert result.loss.dtype == torch.nn.functional.mse_loss(*leaves).dtype
        gradients = torch.autograd.grad(result.loss, leaves)
        assert [gradient.dtype for gradient in gradients] == [first, second]
        oracle = Oracle(*leaves, weights, None, "predictions", 1.0)
        assert_result(result, oracle, tolerances.cross_info_nce(40, result.loss.dtype))


@places("cross_info_nce")
def test_autocast_changes_nothing(place: Place) -> None:
    def compute() -> list[Tensor]:
        targets, predictions, weights = random_inputs(2, 2, 10, 24, torch.float32)
        leaves = [tensor.to(place.device).requires_grad_() for tensor in (targets, predictions)]
        result = run(place, *leaves, weights)
        return [*result, *torch.autograd.grad(result.loss, leaves)]

    expected = compute()
    with torch.autocast(place.device, dtype=torch.bfloat16):
        found = compute()
    for tensor, truth in zip(found, expected, strict=True):
        assert tensor.dtype == truth.dtype
        assert_close(tensor, truth, EXACT)


@places("cross_info_nce")
def test_strided(place: Place) -> None:
    targets, predictions, weights = random_inputs(3, 2, 5, 7)
    expected = run(place, targets, predictions, weights)
    found = run(place, strided(targets), predictions.transpose(0, 2).contiguous().transpose(0, 2), strided(weights))
    assert_all_close(found, expected, tolerances.cross_info_nce(20, torch.float64))


@places("cross_info_nce")
def test_only_the_loss_has_a_gradient(place: Place) -> None:
    targets, predictions, weights = random_inputs(2, 1, 4, 3)
    result = run(place, targets.requires_grad_(), predictions, weights)
    assert result.loss.requires_grad
    assert not result.pair_loss.requires_grad
    assert not result.hits.requires_grad


@places("cross_info_nce")
def test_second_gradient_is_refused(place: Place) -> None:
    targets, predictions, weights = random_inputs(2, 1, 4, 3)
    leaf = targets.to(place.device).requires_grad_()
    (gradient,) = torch.autograd.grad(run(place, leaf, predictions, weights).loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="cross_info_nce can be differentiated once"):
        gradient.sum().backward()


@places("cross_info_nce")
def test_no_worse_than_reference(place: Place) -> None:
    inputs = random_inputs(3, 2, 40, 64, torch.float32)

    def compute(where: Place, dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(dtype).to(where.device).requires_grad_() for tensor in inputs[:2]]
        result = run(where, *leaves, inputs[2].to(dtype), softmax_over="both")
        return [result.loss, result.pair_loss, *torch.autograd.grad(result.loss, leaves)]

    home = Place(place.operator, "cpu", "reference")
    truth, own = compute(home, torch.float64), compute(home, torch.float32)
    slack = tolerances.Tolerance(tolerances.UNIT_ROUNDOFF[torch.float32])
    for tensor, own_part, true_part in zip(compute(place, torch.float32), own, truth, strict=True):
        assert_no_worse(tensor, own_part, true_part, slack)


@pytest.mark.parametrize("softmax_over", SOFTMAXES)
@pytest.mark.parametrize("elements", [1, 100, 333])
def test_chunks_change_nothing(elements: int, softmax_over: str, monkeypatch: pytest.MonkeyPatch) -> None:
    targets, predictions, weights = random_inputs(2, 2, 7, 5)
    valid = torch.rand(2, 2, 7, generator=generator()) < 0.8

    def compute() -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (targets, predictions)]
        temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        options = {"valid": valid, "softmax_over": softmax_over, "temperature": temperature}
        result = cross_info_nce(*leaves, weights, backend="reference", **options)  # type: ignore[arg-type]
        return [*result, *torch.autograd.grad(result.loss, [*leaves, temperature])]

    expected = compute()
    monkeypatch.setattr(reference_module, "CHUNK_ELEMENTS", elements)
    assert_all_close(compute(), expected, tolerances.cross_info_nce_gradient(20, torch.float64))


@pytest.mark.parametrize("softmax_over", SOFTMAXES)
def test_large_batches_never_hold_all_scores(softmax_over: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on machines without a GPU: with chunks of 2^16 scores, and 2^22 of them in each pair and step."""
    monkeypatch.setattr(reference_module, "CHUNK_ELEMENTS", 2**16)
    modalities, steps, clips, width = 2, 1, 2**11, 4
    targets, predictions, weights = random_inputs(modalities, steps, clips, width, torch.float32)
    temperature = torch.ones(())
    inputs = CrossInfoNCEInputs(targets, predictions, weights, None, temperature, softmax_over)
    with LargestTensor() as largest:
        loss, _, _, *saved = cross_info_nce_reference(inputs)
        cross_info_nce_backward_reference(torch.ones_like(loss), *saved, inputs)
    copies = modalities * targets.numel()
    assert clips < largest.bytes // 4 <= max(2**16, modalities**2 * steps * clips, copies)


@places("cross_info_nce")
@pytest.mark.parametrize("softmax_over", SOFTMAXES)
def test_peak_memory(softmax_over: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the system's or the allocator's count, forward and backward need less than half the memory of all scores."""
    monkeypatch.setattr(reference_module, "CHUNK_ELEMENTS", 2**20)
    clips = 2**13
    *vectors, weights = random_inputs(1, 1, clips, 4, torch.float32)
    leaves = [tensor.to(place.device).requires_grad_() for tensor in vectors]

    def compute(clips: int) -> None:
        own = [leaf[:, :, :clips] for leaf in leaves]
        run(place, *own, weights, softmax_over=softmax_over).loss.backward()

    compute(2)  # The memory that the first call allocates and keeps.
    peak = peak_bytes(lambda: compute(clips), place.device)
    if peak is None:
        pytest.skip("this system does not say how much memory is in use")
    assert peak < 4 * clips**2 / 2
