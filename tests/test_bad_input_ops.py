"""Bad arguments of the operators: each raises one error with the argument, what it must be and what it was."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from unicode_fast.ops import (
    CodebookState,
    EmaConfig,
    ResetDraws,
    codebook_update,
    codeword_distribution,
    cross_info_nce,
    nearest_codeword,
)

ROWS, CODEBOOK = torch.zeros(3, 4), torch.zeros(5, 4)
INTEGERS = torch.zeros(3, 4, dtype=torch.int64)
ELSEWHERE = torch.zeros(5, 4, device="meta")
CLIPS, MASK = torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
VECTORS, WEIGHTS = torch.zeros(2, 1, 3, 4), torch.ones(2, 2)
NORMAL = "temperature must be finite and at least 1.1754943508222875e-38, the smallest normal number,"


def state(**changes: Tensor) -> CodebookState:
    counts, idle, step = torch.ones(5), torch.zeros(2, 5, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    return CodebookState(CODEBOOK.clone(), counts, CODEBOOK.clone(), idle, step)._replace(**changes)


def update(current: Any = None, rule: Any = None, **changes: Any) -> None:
    options = {"features": [ROWS, ROWS], "index": [torch.zeros(3, dtype=torch.int64)] * 2, **changes}
    features, index = options.pop("features"), options.pop("index")
    codebook_update(current or state(), features, index, rule or EmaConfig(), **options)


def loss(targets: Any = VECTORS, predictions: Any = VECTORS, weights: Any = WEIGHTS, **options: Any) -> Any:
    return cross_info_nce(targets, predictions, weights, **options)


Case = tuple[Callable[[], Any], type[Exception], list[str]]

# Call, exception, and what its message must hold: name of the argument, what it must be, what it was.
CASES: dict[str, Case] = {
    "nearest, list": (
        lambda: nearest_codeword([1.0], CODEBOOK),  # type: ignore[arg-type]
        TypeError,
        ["features must be a tensor", "list"],
    ),
    "nearest, integers": (
        lambda: nearest_codeword(INTEGERS, CODEBOOK),
        TypeError,
        ["features must be float64, float32, float16 or bfloat16", "int64"],
    ),
    "nearest, half codebook": (
        lambda: nearest_codeword(ROWS, CODEBOOK.half()),
        TypeError,
        ["codebook must be float64 or float32 to match features of float32, got float16"],
    ),
    "nearest, other half": (
        lambda: nearest_codeword(ROWS.bfloat16(), CODEBOOK.half()),
        TypeError,
        ["codebook must be float64, float32 or bfloat16 to match features of bfloat16, got float16"],
    ),
    "nearest, no dimensions": (
        lambda: nearest_codeword(torch.tensor(1.0), CODEBOOK),
        ValueError,
        ["features must have shape (..., D)", "without dimensions"],
    ),
    "nearest, no width": (
        lambda: nearest_codeword(torch.zeros(3, 0), torch.zeros(5, 0)),
        ValueError,
        ["features must have a width of at least 1", "(3, 0)"],
    ),
    "nearest, other width": (
        lambda: nearest_codeword(torch.zeros(80, 10, 256), torch.zeros(400, 128)),
        ValueError,
        ["codebook must have shape (M, 256) to match features of shape (80, 10, 256), got (400, 128)"],
    ),
    "nearest, codebook of three dimensions": (
        lambda: nearest_codeword(ROWS, CODEBOOK[None]),
        ValueError,
        ["codebook must have shape (M, 4)", "(1, 5, 4)"],
    ),
    "nearest, empty codebook": (
        lambda: nearest_codeword(ROWS, CODEBOOK[:0]),
        ValueError,
        ["codebook must have at least one codeword", "(0, 4)"],
    ),
    "nearest, other device": (
        lambda: nearest_codeword(ROWS, ELSEWHERE),
        ValueError,
        ["codebook must be on the device of features, cpu", "meta"],
    ),
    "distribution, two dimensions": (
        lambda: codeword_distribution(ROWS, CODEBOOK),
        ValueError,
        ["features must have 3 dimensions", "(3, 4)"],
    ),
    "distribution, other width": (
        lambda: codeword_distribution(CLIPS, CODEBOOK[:, :3]),
        ValueError,
        ["codebook must have shape (M, 4)", "(5, 3)"],
    ),
    "distribution, float mask": (
        lambda: codeword_distribution(CLIPS, CODEBOOK, valid=MASK.float()),
        TypeError,
        ["valid must be bool", "float32"],
    ),
    "distribution, mask of other shape": (
        lambda: codeword_distribution(CLIPS, CODEBOOK, valid=MASK.T),
        ValueError,
        ["valid must have shape (2, 3)", "(3, 2)"],
    ),
    "distribution, mask elsewhere": (
        lambda: codeword_distribution(CLIPS, CODEBOOK, valid=MASK.to("meta")),
        ValueError,
        ["valid must be on the device of features, cpu", "meta"],
    ),
    "distribution, temperature 0": (
        lambda: codeword_distribution(CLIPS, CODEBOOK, temperature=0),
        ValueError,
        [NORMAL, "got 0"],
    ),
    "distribution, temperature not a number": (
        lambda: codeword_distribution(CLIPS, CODEBOOK, temperature=float("nan")),
        ValueError,
        [NORMAL, "nan"],
    ),
    "distribution, tensor temperature": (
        lambda: codeword_distribution(CLIPS, CODEBOOK, temperature=torch.tensor(1.0)),  # type: ignore[arg-type]
        TypeError,
        ["temperature must be a number", "Tensor"],
    ),
    "loss, three dimensions": (
        lambda: loss(CLIPS, CLIPS),
        ValueError,
        ["targets must have shape (modalities, K, B, D) or (B, D)", "(2, 3, 4)"],
    ),
    "loss, no width": (
        lambda: loss(VECTORS[..., :0], VECTORS[..., :0]),
        ValueError,
        ["targets must have shape (modalities, K, B, D) or (B, D), all but B at least 1", "(2, 1, 3, 0)"],
    ),
    "loss, no steps": (lambda: loss(VECTORS[:, :0], VECTORS[:, :0]), ValueError, ["targets must", "(2, 0, 3, 4)"]),
    "loss, no modalities": (lambda: loss(VECTORS[:0], VECTORS[:0]), ValueError, ["targets must", "(0, 1, 3, 4)"]),
    "loss, sets without width": (
        lambda: cross_info_nce(torch.ones(3, 0), torch.ones(3, 0)),
        ValueError,
        ["targets must have shape", "all but B at least 1", "(3, 0)"],
    ),
    "loss, operator without width": (
        lambda: torch.ops.unicode_fast.cross_info_nce_reference(
            VECTORS[..., :0], VECTORS[..., :0], WEIGHTS, None, torch.ones(()), "both", 0
        ),
        ValueError,
        ["targets must have shape (modalities, K, B, D), all but B at least 1", "(2, 1, 3, 0)"],
    ),
    "loss, other shapes": (
        lambda: loss(predictions=VECTORS[:, :, :2]),
        ValueError,
        ["predictions must have shape (2, 1, 3, 4)", "(2, 1, 2, 4)"],
    ),
    "loss, other dtypes": (
        lambda: loss(predictions=VECTORS.half()),
        TypeError,
        ["predictions must be float32", "float16"],
    ),
    "loss, other devices": (
        lambda: loss(predictions=VECTORS.to("meta")),
        ValueError,
        ["predictions must be on the device of targets, cpu", "meta"],
    ),
    "loss, weights of one pair": (
        lambda: cross_info_nce(torch.ones(3, 4), torch.ones(3, 4), torch.ones(1, 1)),
        ValueError,
        ["pair_weights must be None for targets of shape (B, D)"],
    ),
    "loss, a mask of two sets": (
        lambda: cross_info_nce(torch.ones(3, 4), torch.ones(3, 4), valid=torch.ones(4, dtype=torch.bool)),
        ValueError,
        ["valid must have shape (3,)", "(B) of targets", "(4,)"],
    ),
    "loss, sets of different sizes": (
        lambda: cross_info_nce(torch.ones(3, 4), torch.ones(5, 4)),
        ValueError,
        ["predictions must have shape (3, 4)", "(5, 4)"],
    ),
    "loss, integer weights": (lambda: loss(weights=WEIGHTS.long()), TypeError, ["pair_weights must be", "int64"]),
    "loss, too few weights": (
        lambda: loss(weights=torch.ones(2)),
        ValueError,
        ["pair_weights must have shape (2, 2)", "(target, source)", "(2,)"],
    ),
    "loss, weights with gradient": (
        lambda: loss(weights=torch.ones(2, 2, requires_grad=True)),
        ValueError,
        ["pair_weights must have requires_grad=False"],
    ),
    "loss, mask": (
        lambda: loss(valid=torch.ones(2, 3, dtype=torch.bool)),
        ValueError,
        ["valid must have shape (2, 1, 3)", "(2, 3)"],
    ),
    "loss, integer mask": (lambda: loss(valid=torch.ones(2, 1, 3).int()), TypeError, ["valid must be bool", "int32"]),
    "loss, softmax": (
        lambda: loss(softmax_over="rows"),
        ValueError,
        ["softmax_over must be one of 'predictions', 'candidates', 'both'", "'rows'"],
    ),
    "loss, negative temperature": (
        lambda: loss(temperature=-1.0),
        ValueError,
        [NORMAL, "-1.0"],
    ),
    **{
        f"loss, temperature {value}": (
            lambda value=value: loss(temperature=value),
            ValueError,
            [f"{NORMAL} in float32, got {value}"],
        )
        for value in (1e-300, 7e-46, 1e-38, 1e300, float("inf"), float("nan"))
    },
    "distribution, temperature below float32": (
        lambda: codeword_distribution(CLIPS, CODEBOOK, temperature=1e-300),
        ValueError,
        [f"{NORMAL} in float32", "1e-300"],
    ),
    "loss, temperature as text": (lambda: loss(temperature="1"), TypeError, ["temperature must be a number", "str"]),
    "loss, temperature of one dimension": (
        lambda: loss(temperature=torch.ones(1)),
        ValueError,
        ["temperature must have shape ()", "(1,)"],
    ),
    "loss, group": (lambda: loss(group=1), TypeError, ["group must be a ProcessGroup or None, got int"]),
    "update, tuple for a state": (
        lambda: update(tuple(state())),
        TypeError,
        ["state must be a CodebookState", "tuple"],
    ),
    "update, rule": (lambda: update(rule="joint"), TypeError, ["rule must be an EmaConfig", "str"]),
    "update, half codebook": (
        lambda: update(state(codebook=CODEBOOK.half())),
        TypeError,
        ["state.codebook must be float64 or float32", "float16"],
    ),
    "update, empty codebook": (
        lambda: update(state(codebook=CODEBOOK[:0])),
        ValueError,
        ["state.codebook must have shape (M, D), M and D at least 1", "(0, 4)"],
    ),
    "update, count": (
        lambda: update(state(ema_count=torch.ones(4))),
        ValueError,
        ["state.ema_count must have shape (5,)", "(4,)"],
    ),
    "update, sum of other dtype": (
        lambda: update(state(ema_sum=CODEBOOK.double())),
        TypeError,
        ["state.ema_sum must be float32", "float64"],
    ),
    "update, one idle counter": (
        lambda: update(state(idle=torch.zeros(5, dtype=torch.int64))),
        ValueError,
        ["state.idle must have shape (modalities, M)", "(5,)"],
    ),
    "update, idle of other width": (
        lambda: update(state(idle=torch.zeros(2, 4, dtype=torch.int64))),
        ValueError,
        ["state.idle must have shape (2, 5)", "(2, 4)"],
    ),
    "update, float idle": (
        lambda: update(state(idle=torch.zeros(2, 5))),
        TypeError,
        ["state.idle must be int64", "float32"],
    ),
    "update, step": (
        lambda: update(state(step=torch.zeros(1, dtype=torch.int64))),
        ValueError,
        ["state.step must have shape ()", "(1,)"],
    ),
    "update, codebook with gradient": (
        lambda: update(state(codebook=CODEBOOK.clone().requires_grad_())),
        ValueError,
        ["state.codebook must have requires_grad=False"],
    ),
    "update, features not a list": (
        lambda: update(features=ROWS),
        TypeError,
        ["features must be a list with one tensor for each modality", "Tensor"],
    ),
    "update, one modality for two": (
        lambda: update(features=[ROWS]),
        ValueError,
        ["features must have 2 entries, one for each modality of state.idle", "got 1"],
    ),
    "update, features of three dimensions": (
        lambda: update(features=[ROWS, CLIPS]),
        ValueError,
        ["features[1] must have shape (N, 4), with the D of state.codebook, got (2, 3, 4)"],
    ),
    "update, features elsewhere": (
        lambda: update(features=[ROWS, ROWS.to("meta")]),
        ValueError,
        ["features[1] must be on the device of state.codebook, cpu, got meta"],
    ),
    "update, features of other width": (
        lambda: update(features=[ROWS[:, :3], ROWS]),
        ValueError,
        ["features[0] must have shape (N, 4), with the D of state.codebook, got (3, 3)"],
    ),
    "update, integer features": (lambda: update(features=[INTEGERS] * 2), TypeError, ["features[0] must be", "int64"]),
    "update, float index": (lambda: update(index=[ROWS[:, 0]] * 2), TypeError, ["index[0] must be int64", "float32"]),
    "update, short index": (
        lambda: update(index=[torch.zeros(2, dtype=torch.int64)] * 2),
        ValueError,
        ["index[0] must have shape (3,)", "features[0]", "(2,)"],
    ),
    "update, lengths differ": (
        lambda: update(
            features=[ROWS, ROWS[:2]], index=[torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)]
        ),
        ValueError,
        ["features must have equal numbers of rows where partners is None", "[3, 2]"],
    ),
    "update, partners": (
        lambda: update(partners=[ROWS, ROWS[:2]]),
        ValueError,
        ["partners[1] must have shape (3, 4)", "(2, 4)"],
    ),
    "update, mask": (
        lambda: update(valid=[None, torch.ones(2, dtype=torch.bool)]),
        ValueError,
        ["valid[1] must have shape (3,)", "(2,)"],
    ),
    "update, masks as a tensor": (
        lambda: update(valid=torch.ones(2, 3, dtype=torch.bool)),
        TypeError,
        ["valid must be a list", "Tensor"],
    ),
    "update, draws": (
        lambda: update(draws=ResetDraws(torch.zeros(5).double(), torch.zeros(5, 3).double())),
        ValueError,
        ["draws.noise must have shape (5, 4)", "(5, 3)"],
    ),
    "update, draws of other dtype": (
        lambda: update(draws=ResetDraws(torch.zeros(5), torch.zeros(5, 4))),
        TypeError,
        ["draws.choice must be float64", "float32"],
    ),
    "update, tuple for draws": (
        lambda: update(draws=(1, 2)),
        TypeError,
        ["draws must be ResetDraws or None", "tuple"],
    ),
    "update, group": (lambda: update(group=3), TypeError, ["group must be a ProcessGroup or None, got int"]),
    "rule, update": (
        lambda: EmaConfig(update="both"),  # type: ignore[arg-type]
        ValueError,
        ["update must be one of 'joint', 'sequential'", "'both'"],
    ),
    "rule, smoothing": (
        lambda: EmaConfig(smoothing="laplace"),  # type: ignore[arg-type]
        ValueError,
        ["smoothing must be one of", "'laplace'"],
    ),
    "rule, decay": (lambda: EmaConfig(decay=1.01), ValueError, ["decay must be in [0, 1]", "1.01"]),
    "rule, own weight": (lambda: EmaConfig(own_weight=-0.1), ValueError, ["own_weight must be in [0, 1]", "-0.1"]),
    "rule, no number": (lambda: EmaConfig(decay="a"), TypeError, ["decay must be a number, got str"]),  # type: ignore[arg-type]
    "rule, epsilon": (
        lambda: EmaConfig(smoothing="transient", epsilon=0.0),
        ValueError,
        ["epsilon must be greater than 0 for smoothing 'transient'", "got 0"],
    ),
    "rule, reset_after": (
        lambda: EmaConfig(reset_after=-1),
        ValueError,
        ["reset_after must be 0 or greater", "-1"],
    ),
    "rule, reset_noise": (
        lambda: EmaConfig(reset_noise=float("inf")),
        ValueError,
        ["reset_noise must be 0 or greater and finite, got inf"],
    ),
    "rule, reset_ema": (
        lambda: EmaConfig(reset_ema=3),  # type: ignore[arg-type]
        TypeError,
        ["reset_ema must be a bool, got int"],
    ),
    "rule, reset_active_within": (
        lambda: EmaConfig(reset_active_within=1.5),  # type: ignore[arg-type]
        TypeError,
        ["reset_active_within must be an integer", "float"],
    ),
    "rule, seed": (lambda: EmaConfig(seed=2**63), ValueError, ["seed must be a signed integer of 64 bits"]),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str) -> None:
    call, exception, texts = CASES[name]
    with pytest.raises(exception) as caught:
        call()
    assert type(caught.value) is exception
    for text in texts:
        assert text in str(caught.value)


def test_the_smallest_temperature_of_each_dtype() -> None:
    assert not loss(temperature=2e-38).loss.isnan()
    assert not loss(VECTORS.double(), VECTORS.double(), temperature=1e-300).loss.isnan()


@pytest.mark.parametrize(("change", "error"), [({"partners": [ROWS]}, ValueError), ({"group": 3}, TypeError)])
def test_bad_input_leaves_the_state_alone(change: dict[str, Any], error: type[Exception]) -> None:
    current = state()
    before = [tensor.clone() for tensor in current]
    with pytest.raises(error, match=next(iter(change))):
        update(current, **change)
    assert all(torch.equal(tensor, old) for tensor, old in zip(current, before, strict=True))


def test_every_field_of_the_rule_matters() -> None:
    """Each field, changed alone from a rule in which all of them act, changes the result."""
    changes: dict[str, Any] = {
        "decay": 0.5,
        "epsilon": 0.1,
        "own_weight": 1.0,
        "update": "sequential",
        "smoothing": "none",
        "reset_after": 0,
        "reset_unless": "all",
        "reset_source": "feature",
        "reset_noise": 0.5,
        "reset_active_within": 1,
        "reset_ema": False,
        "seed": 1,
    }
    assert set(changes) == {field.name for field in fields(EmaConfig)}
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(6, 4, generator=generator) for _ in range(2)]
    codebook = torch.randn(5, 4, generator=generator)

    def result(rule: EmaConfig) -> list[Tensor]:
        idle = torch.tensor([[0, 3, 3, 9, 9], [0, 0, 9, 3, 9]])
        current = state(codebook=codebook.clone(), ema_sum=codebook.clone(), idle=idle)
        codebook_update(current, rows, [torch.tensor([0, 0, 0, 1, 1, 0]), torch.tensor([0, 0, 2, 2, 0, 0])], rule)
        return list(current)

    base = EmaConfig(smoothing="transient", reset_after=5, reset_active_within=5)
    expected = result(base)
    for name, value in changes.items():
        found = result(replace(base, **{name: value}))
        assert not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), name
