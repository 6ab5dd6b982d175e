"""The codebook as a module of its own: any modalities, codewords and width, features with any leading dimensions."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import tolerances
import torch
from cases import normal
from compare import assert_close
from tolerances import EXACT
from torch import Tensor

import unicode_fast
from unicode_fast import Codebook, CodebookState, EmaConfig
from unicode_fast.modules.cpc import clip_mean
from unicode_fast.ops import codebook_update
from unicode_fast.reference import nearest_codeword_reference
from unicode_fast.reference.codebook_update import CodebookBatch, codebook_update_reference

NAN = float("nan")
CLOSE = tolerances.codebook_update(torch.float64)
NAMES = ["audio", "video", "depth"]
RULE = EmaConfig(decay=0.9, smoothing="transient", reset_after=0)
BUFFERS = {"codebook", "ema_count", "ema_sum", "idle", "step"}


def make(names: list[str] | None = None, dtype: torch.dtype = torch.float64, **options: object) -> Codebook:
    """Nine codewords of width 4, apart from each other."""
    codebook = Codebook(names or NAMES, 9, 4, RULE, **options).to(dtype)  # type: ignore[arg-type]
    codebook.initialise(normal(9, 4, seed=99, dtype=dtype))
    return codebook


def features(*shape: int, names: list[str] | None = None, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {name: normal(*shape, 4, seed=seed, dtype=dtype) for seed, name in enumerate(names or NAMES)}


def copied(codebook: Codebook) -> CodebookState:
    return CodebookState(*(value.clone() for value in codebook.state()))


def assert_state(found: Codebook, expected: CodebookState, tolerance: tolerances.Tolerance = EXACT) -> None:
    for name, value in zip(expected._fields, expected, strict=True):
        assert_close(getattr(found, name), value, tolerance, name)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_against_the_reference(masked: bool, dtype: torch.dtype) -> None:
    codebook, given = make(dtype=dtype), features(5, 3, dtype=dtype)
    mask = {
        name: tiny.mask_of(lengths, 3) for name, lengths in zip(NAMES, ([3] * 5, [3, 1, 2, 3, 3], [2] * 5), strict=True)
    }
    valid = {name: mask[name] if masked else torch.ones(5, 3, dtype=torch.bool) for name in NAMES}
    table, state = codebook.codebook.clone(), copied(codebook)
    vector, index, commitment = codebook(given, mask if masked else None)
    for name, z in given.items():
        here = valid[name]
        expected = nearest_codeword_reference(z.flatten(0, 1), table)[0].view(5, 3)
        assert torch.equal(index[name][here], expected[here])
        assert_close(vector[name][here], table[expected][here], tolerances.COMMITMENT[dtype])
        distances = [(z - table[index[other]]).double().square().mean(-1)[here & valid[other]] for other in NAMES]
        weights = [1.0 if other == name else 0.25 for other in NAMES]
        own = sum(weight * distance.mean() for weight, distance in zip(weights, distances, strict=True))
        assert_close(commitment[name], own, tolerances.COMMITMENT[dtype])
    rows = [[by_name[name].flatten(0, 1) for name in NAMES] for by_name in (given, index, valid)]
    codebook_update_reference(state, CodebookBatch(rows[0], rows[1], [], rows[2]), RULE, None)
    assert_state(codebook, state, tolerances.codebook_update(dtype))


@pytest.mark.parametrize("shape", [(), (12,), (4, 3), (2, 3, 2, 1), (0,), (2, 0)])
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    """Features of modalities at the same position belong together in any arrangement of positions."""
    one, other = make(), make()
    given = features(*shape)
    found = one(given)
    flat = other({name: z.reshape(-1, 1, 4) for name, z in given.items()})
    for name, z in given.items():
        assert (found.vector[name].shape, found.index[name].shape) == (z.shape, shape)
        assert found.commitment[name].shape == ()
        assert torch.equal(found.index[name].flatten(), flat.index[name].flatten())
        assert torch.equal(found.vector[name].flatten(), flat.vector[name].flatten())
        if z.numel():
            assert_close(found.commitment[name], flat.commitment[name], EXACT)
    assert_state(one, CodebookState(*other.state()))
    assert one.step == 1


@pytest.mark.parametrize("partner", ["aligned", "attended"])
def test_modalities_of_different_dimensions(partner: str) -> None:
    """Partners are means or attention over the clip; the commitment is to own codewords."""
    names = ["audio", "video"]
    codebook = make(names, partner=partner)
    given = {"audio": normal(5, 4, dtype=torch.float64), "video": normal(5, 2, 3, 4, seed=1, dtype=torch.float64)}
    table, state = codebook.codebook.clone(), copied(codebook)
    vector, index, commitment = codebook(given)
    for name in names:
        assert_close(commitment[name], (given[name] - table[index[name]]).square().mean(), CLOSE)
    audio, video = given["audio"].unsqueeze(1), given["video"].flatten(1, 2)
    seen = clip_mean(video, None).unsqueeze(1)
    if partner == "attended":
        seen = (audio @ video.transpose(1, 2) / 2).softmax(-1) @ video
    partners = [seen.flatten(0, 1), audio.expand(5, 6, 4).flatten(0, 1)]
    rows = [given[name].reshape(-1, 4) for name in names]
    codebook_update(state, rows, [index[name].flatten() for name in names], RULE, partners=partners)
    assert_state(codebook, state, CLOSE)


def test_one_modality_is_plain_ema() -> None:
    for options in ({}, {"partner": "attended"}):
        alone, state = make(["audio"], **options), copied(make(["audio"]))
        index = alone({"audio": normal(6, 4, dtype=torch.float64)}).index["audio"]
        plain = EmaConfig(decay=0.9, smoothing="transient", reset_after=0, own_weight=1.0)
        codebook_update(state, [normal(6, 4, dtype=torch.float64)], [index], plain)
        assert_state(alone, state, CLOSE)


def test_evaluation_changes_nothing_and_takes_any_modality() -> None:
    codebook, given = make(), features(5, 3)
    before = copied(codebook)
    expected = codebook(given)
    assert not torch.equal(codebook.codebook, before.codebook)
    codebook = make().eval()
    for name in NAMES:
        found = codebook({name: given[name]})
        assert list(found.index) == [name]
        assert torch.equal(found.index[name], expected.index[name])
        assert torch.equal(found.vector[name], expected.vector[name])
    codebook(given)
    assert_state(codebook, before)


def test_gradients() -> None:
    """Straight through to the features, and of the commitment; none to the codewords."""
    codebook = make()
    given = {name: z.requires_grad_() for name, z in features(5, 3).items()}
    table = codebook.codebook.clone()
    vector, index, _ = codebook(given)
    sum((3 * value).sum() for value in vector.values()).backward()
    assert all(torch.equal(z.grad, torch.full_like(z, 3.0)) for z in given.values())
    assert list(codebook.parameters()) == [] and not codebook.codebook.requires_grad
    codebook = make()
    z = given["audio"].detach().requires_grad_()
    codebook({**given, "audio": z}, partners=0.0).commitment["audio"].backward()
    expected = 2 * (z.detach() - table[index["audio"]]) / z.numel()
    assert_close(z.grad, expected, CLOSE)


@pytest.mark.parametrize("partner", ["aligned", "attended"])
@pytest.mark.parametrize("steps", [3, 4])
def test_what_a_mask_leaves_out_may_hold_anything(partner: str, steps: int) -> None:
    names, found = ["audio", "video"], []
    mask = {"audio": tiny.mask_of([3, 1, 2], 3), "video": tiny.mask_of([2, 3, 3], steps)}
    for padding in (0.0, NAN):
        codebook = make(names, partner=partner)
        given = {"audio": features(3, 3)["audio"], "video": features(3, steps)["video"]}
        given = {name: z.masked_fill(~mask[name].unsqueeze(-1), padding).requires_grad_() for name, z in given.items()}
        output = codebook(given, mask)
        sum(output.commitment.values()).backward()
        assert all(
            z.grad.isfinite().all() and vector.isfinite().all()
            for z, vector in zip(given.values(), output.vector.values(), strict=True)
        )
        found.append((codebook, output, [z.grad for z in given.values()]))
    (one, first, gradients), (other, second, others) = found
    assert all(torch.equal(first.commitment[name], second.commitment[name]) for name in names)
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
    assert_state(one, CodebookState(*other.state()))


def test_half_precision_features() -> None:
    codebook, given = make(dtype=torch.float32), features(5, 3, dtype=torch.bfloat16)
    vector, index, commitment = codebook(given)
    assert {value.dtype for value in vector.values()} == {torch.bfloat16}
    assert {value.dtype for value in commitment.values()} == {torch.float32}
    assert codebook.codebook.dtype == torch.float32 and codebook.codebook.isfinite().all()


def test_state_comes_back() -> None:
    codebook, given = make(), features(5, 3)
    codebook(given)
    assert set(codebook.state_dict()) == BUFFERS
    assert BUFFERS == {name.removeprefix("codebook.") for name in tiny.model().state_dict() if "codebook." in name}
    again = Codebook(NAMES, 9, 4, RULE).double()
    again.load_state_dict(codebook.state_dict())
    assert torch.equal(again(given).index["audio"], codebook(given).index["audio"])
    assert_state(again, CodebookState(*codebook.state()))


def test_the_example_of_the_docstring() -> None:
    lines = [line.strip() for line in str(Codebook.__doc__).splitlines() if line.startswith(" " * 8)]
    start = next(number for number, line in enumerate(lines) if line.startswith("codebook ="))
    names = {"torch": torch, "unicode_fast": unicode_fast}
    exec("\n".join(lines[start : start + 2]), names)
    assert {name: tuple(value.shape) for name, value in names["vector"].items()} == {
        "audio": (8, 10, 64),
        "video": (8, 10, 64),
    }


@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize("names", [["audio"], ["audio", "video"]])
def test_a_value_that_is_not_finite_reaches_codewords_in_training(names: list[str], value: float) -> None:
    codebook, given = make(names), features(5, names=names)
    given["audio"][2, 1] = value
    index = codebook(given).index
    spoilt = (~codebook.codebook.isfinite()).any(1).nonzero().flatten()
    assert set(spoilt.tolist()) == {codes[2].item() for codes in index.values()}


@pytest.mark.parametrize("partners", ["x", -1, NAN, float("inf"), True])
def test_bad_partners_change_nothing(partners: Any) -> None:
    codebook = make()
    before = copied(codebook)
    with pytest.raises(ValueError, match=f"partners must be a number of at least 0, got {partners!r}"):
        codebook(features(5), partners=partners)
    assert_state(codebook, before)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (torch.full((9, 4), torch.nan), ValueError, "rows must be finite in the dtype of .*, got NaN or Inf in row 0"),
        (torch.ones(9, 4).double().index_fill(0, torch.tensor(3), 1e200), ValueError, "got NaN or Inf in row 3"),
        (torch.ones(8, 4), ValueError, r"rows must have shape \(9, 4\), that of the codebook, got \(8, 4\)"),
        (torch.ones(9, 4, device="meta"), ValueError, "rows must be on the device of the codebook, cpu, got meta"),
        (torch.ones(9, 4).tolist(), TypeError, "rows must be a tensor, got list"),
    ],
)
def test_bad_codewords_change_nothing(rows: Any, error: type[Exception], message: str) -> None:
    codebook = make(dtype=torch.float32)
    before = copied(codebook)
    with pytest.raises(error, match=message):
        codebook.initialise(rows)
    assert_state(codebook, before)


ONES = torch.ones(5, 3, dtype=torch.bool)
BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "names": (lambda: Codebook("audio", 9, 4), TypeError, "names must be a list of modalities, got 'audio'"),
    "no names": (lambda: Codebook([], 9, 4), ValueError, r"names must be one or more different modalities, got \[\]"),
    "a name twice": (lambda: Codebook(["a", "a"], 9, 4), ValueError, "different modalities, got"),
    "codewords": (lambda: Codebook(["a"], 0, 4), ValueError, "codewords must be at least 1, got 0"),
    "width": (lambda: Codebook(["a"], 9, 4.0), TypeError, "width must be an integer, got float"),  # type: ignore
    "rule": (lambda: Codebook(["a"], 9, 4, 0.9), TypeError, "rule must be an EmaConfig or None"),  # type: ignore
    "partner": (lambda: make(partner="mean"), ValueError, "partner must be one of 'aligned', 'attended', got 'mean'"),
    "count": (lambda: make(initial_count=-1), ValueError, "initial_count must be a number of at least 0, got -1"),
    "a tensor": (lambda: make()(torch.ones(5, 4)), TypeError, "features must be a mapping .*, got Tensor"),
    "missing": (
        lambda: make()(features(5, names=["audio"])),
        ValueError,
        "features must be of all of the modalities audio, video, depth, got audio$",
    ),
    "unknown": (
        lambda: make().eval()(features(5, names=["smell"])),
        ValueError,
        "features must be of any of the modalities audio, video, depth, got smell$",
    ),
    "none": (lambda: make().eval()({}), ValueError, "features must be of any .*, got none"),
    "another width": (
        lambda: make()({**features(5), "video": torch.ones(5, 3)}),
        ValueError,
        r"features of 'video' must have shape \(5, 4\), .*, got \(5, 3\)",
    ),
    "integers": (
        lambda: make()({**features(5), "video": torch.ones(5, 4, dtype=torch.int64)}),
        TypeError,
        "features of 'video' must be float64, .*, got int64",
    ),
    "no tensor": (lambda: make()({**features(5), "video": [1.0]}), TypeError, "'video' must be a tensor, got list"),
    "another device": (
        lambda: make()({**features(5), "video": torch.ones(5, 4, device="meta")}),
        ValueError,
        "features of 'video' must be on the device of the codebook, cpu, got meta",
    ),
    "other clips": (
        lambda: make()({**features(5, 3), "video": torch.ones(4, 3, 4)}),
        ValueError,
        "features must hold the same clips in every modality, got .*'video': 4",
    ),
    "a mask of one": (
        lambda: make()(features(5, 3), {"audio": ONES}),
        ValueError,
        "mask must be of the modalities audio, video, depth, got audio$",
    ),
    "a mask as a tensor": (lambda: make()(features(5, 3), ONES), TypeError, "mask must be a mapping .*, got Tensor"),
    "update, index of one": (
        lambda: make().update(features(5), {"audio": ONES}),
        ValueError,
        "index must be of the modalities audio, video, depth, got audio$",
    ),
    "update, features of one": (
        lambda: make().update(features(5, names=["audio"]), {}),
        ValueError,
        "semantic must be of the modalities audio, video, depth, got audio$",
    ),
    "update, no mapping": (
        lambda: make().update(features(5), ONES),
        TypeError,
        "index must be a mapping from modalities to tensors, got Tensor",
    ),
    "update, a mask of one": (
        lambda: make().update(features(5), dict.fromkeys(NAMES, ONES), {"audio": ONES}),
        ValueError,
        "mask must be of the modalities audio, video, depth, got audio$",
    ),
    "a mask of another shape": (
        lambda: make()(features(5, 3), {**dict.fromkeys(NAMES, ONES), "video": ONES[:, :2]}),
        ValueError,
        r"mask of 'video' must have shape \(5, 3\), .*, got \(5, 2\)",
    ),
    "a mask of numbers": (
        lambda: make()(features(5, 3), {**dict.fromkeys(NAMES, ONES), "video": ONES.long()}),
        TypeError,
        "mask of 'video' must be bool, got int64",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
