"""TURN against its formulas: loops over pairs of modalities, and clips decoded one by one without padding."""

import itertools
import math
from collections.abc import Mapping
from unittest import mock

import pytest
import tiny
import torch
from compare import assert_close
from tolerances import EXACT, FLOAT64, Tolerance
from torch import Tensor
from torch.nn import functional as F

from unicode_fast import UniCode, preset
from unicode_fast.methods import make_model
from unicode_fast.methods.turn import MASK_STREAM, MaskedDecoder, pooled_contrast, position_codes
from unicode_fast.modules import ModelOutput
from unicode_fast.reference.counter_random import uniform

CLOSE = Tolerance(FLOAT64["rel"], FLOAT64["abs"])
CLIPS = 6
# Number of positions by modality, and whether clips have padding.
CASES: dict[str, tuple[dict[str, int], bool]] = {
    "two": ({"audio": 5, "depth": 5}, False),
    "three": ({"audio": 5, "video": 5, "text": 5}, False),
    "masks": ({"audio": 5, "video": 5, "text": 5}, True),
    "unequal": ({"text": 3, "audio": 5, "video": 5}, False),
    "unequal, masks": ({"text": 3, "audio": 5, "video": 5}, True),
}


def model_of(lengths: Mapping[str, int], name: str = "recommended", **fields: object) -> UniCode:
    torch.manual_seed(0)
    config = preset(name, method="turn").replace_all(
        **tiny.SIZES, dtype="float64", dropout=0.0, unequal_lengths="means", **fields
    )
    return make_model({name: tiny.MODALITIES[name] for name in lengths}, config)


def output_of(model: UniCode, case: str) -> ModelOutput:
    """Of random clips."""
    lengths, masked = CASES[case]
    features, mask = tiny.batch(model, CLIPS, lengths=lengths), None
    if masked:
        generator = torch.Generator().manual_seed(len(case))
        mask = {
            name: tiny.mask_of(torch.randint(1, length + 1, (CLIPS,), generator=generator).tolist(), length)
            for name, length in lengths.items()
        }
    return model(features, mask)


def valid_of(output: ModelOutput, name: str) -> Tensor:
    if output.mask is None:
        return torch.ones(output.semantic[name].shape[:2], dtype=torch.bool)
    return output.mask[name]


def draw(stream: int, shape: tuple[int, ...]) -> Tensor:
    return uniform(0, torch.tensor(3), stream, shape)


def check_gradients(found: Tensor, expected: Tensor, model: UniCode) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [
        torch.autograd.grad(each, parameters, retain_graph=True, allow_unused=True) for each in (found, expected)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert_close(ours, theirs, CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_the_contrastive_term_is_that_of_loops(case: str) -> None:
    model = model_of(CASES[case][0], align_weight=0.5, align_temperature=0.2)
    output, names = output_of(model, case), list(CASES[case][0])
    pooled = {
        name: torch.stack([z[clip, valid_of(output, name)[clip]].mean(0) for clip in range(CLIPS)])
        for name, z in output.semantic.items()
    }
    terms = []
    for one, other in itertools.combinations(names, 2):
        scores = F.cosine_similarity(pooled[one][:, None], pooled[other], dim=-1) / 0.2
        terms += [F.cross_entropy(each, torch.arange(CLIPS)) / 2 for each in (scores, scores.T)]
    expected = 0.5 * 2 * torch.stack(terms).mean()
    found = model.alignment.batch_terms(model, output, draw)
    assert list(found) == ["turn.contrast"]
    assert_close(found["turn.contrast"], expected, CLOSE)
    check_gradients(found["turn.contrast"], expected, model)


def test_a_contrastive_loss_by_hand() -> None:
    pooled = torch.eye(2, dtype=torch.float64).expand(3, 2, 2)
    assert pooled_contrast(pooled, 0.5).item() == pytest.approx(math.log(1 + math.exp(-2)), **FLOAT64)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["recommended", "official"])
def test_masked_positions_are_rebuilt_clip_by_clip(case: str, name: str) -> None:
    """Official words are targets as LSTM output."""
    model = model_of(CASES[case][0], name, align_weight=0.5, turn_mask=0.4)
    output, names = output_of(model, case), list(CASES[case][0])
    found = model.alignment.clip_terms(model, output, draw, None)
    assert list(found) == [f"turn.reconstruction.{name}" for name in names]
    for number, (one, term) in enumerate(zip(names, found.values(), strict=True)):
        target = output.target[one].detach()
        target = target.mean((2, 3)) if one == "video" else target
        hidden = draw(MASK_STREAM + number, (CLIPS, target.shape[1])) < 0.4
        decoder, errors = model.alignment.decoders[one], []
        for clip in range(CLIPS):
            own = valid_of(output, one)[clip]
            seen = torch.where(hidden[clip, own, None], 0, target[clip, own])
            codes = [output.quantised[other][clip, valid_of(output, other)[clip]] for other in names if other != one]
            decoded = decoder(seen[None], [rows[None] for rows in codes], None, None)[0]
            errors.append((decoded - target[clip, own])[hidden[clip, own]].abs().mean(-1).sum())
        expected = 0.5 * torch.stack(errors).sum() / (0.4 * valid_of(output, one).sum().double())
        assert_close(term, expected, CLOSE, one)
        check_gradients(term, expected, model)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["recommended", "official"])
def test_reused_decoders_cross_reconstruct(case: str, name: str) -> None:
    """Nothing is masked: plain reconstruction from the codes of each other modality."""
    model = model_of(CASES[case][0], name, turn_decoder="reuse")
    output, names = output_of(model, case), list(CASES[case][0])
    found = model.alignment.clip_terms(model, output, draw, None)
    for one in names:
        target, own, errors = output.target[one].detach(), valid_of(output, one), []
        for other in (each for each in names if each != one):
            vectors, valid = output.quantised[other], valid_of(output, other)
            codes = torch.zeros(*target.shape[:2], vectors.shape[-1], dtype=torch.float64)
            for clip, t in itertools.product(range(CLIPS), range(target.shape[1])):
                there = vectors.shape[1] == target.shape[1] and valid[clip, t]
                codes[clip, t] = vectors[clip, t] if there else vectors[clip, valid[clip]].mean(0)
            decoded = model.decoders[one](codes, output.specific[one])
            errors.append((decoded - target)[own].abs().mean())
        expected = torch.stack(errors).mean()
        term = found[f"turn.reconstruction.{one}"]
        assert_close(term, expected, CLOSE, one)
        check_gradients(term, expected, model)
    assert not list(model.alignment.parameters())


@pytest.mark.parametrize("decoder", ["masked", "reuse"])
@pytest.mark.parametrize("case", ["two", "unequal, masks"])
def test_micro_batches_add_up(case: str, decoder: str) -> None:
    model = model_of(CASES[case][0], turn_decoder=decoder)
    output, names = output_of(model, case), list(CASES[case][0])
    whole = model.alignment.clip_terms(model, output, draw, None)
    sums: dict[str, Tensor] = dict.fromkeys(whole, torch.zeros((), dtype=torch.float64))
    masks = {name: valid_of(output, name) for name in names}
    for clips in (slice(0, 1), slice(1, 4), slice(4, 6)):
        valid = None if output.mask is None else {name: mask[clips] for name, mask in masks.items()}
        own = ModelOutput(valid, clips=clips)
        for group in ("quantised", "target", "specific"):
            getattr(own, group).update({name: values[clips] for name, values in getattr(output, group).items()})
        shares = {name: mask[clips].sum().double() / mask.sum() for name, mask in masks.items()}
        for name, term in model.alignment.clip_terms(model, own, draw, shares).items():
            sums[name] = sums[name] + term
    for name, term in whole.items():
        assert_close(sums[name], term, CLOSE, name)


def test_decoders_never_read_what_they_rebuild() -> None:
    model = model_of(CASES["three"][0], turn_mask=0.5)
    output, seen = output_of(model, "three"), []
    with mock.patch.object(MaskedDecoder, "forward", lambda _, masked, *rest: seen.append(masked) or masked):
        model.alignment.clip_terms(model, output, draw, None)
    masks = []
    for number, masked in enumerate(seen):
        hidden = draw(MASK_STREAM + number, (CLIPS, 5)) < 0.5
        assert torch.equal((masked == 0).all(-1), hidden)
        masks.append(hidden)
    assert not torch.equal(masks[0], masks[1])


def test_equal_inputs_at_two_positions_are_told_apart() -> None:
    """Two masked positions have the same query but for the code of the position, and the order of codes counts."""
    torch.manual_seed(0)
    decoder = MaskedDecoder(3, tiny.config().model).double()
    masked, codes = torch.zeros(1, 2, 3).double(), torch.randn(1, 2, 16).double()
    decoded, swapped = (decoder(masked, [each], None, None)[0] for each in (codes, codes.flip(1)))
    assert (decoded[0] - decoded[1]).abs().max() > 1e-3
    assert (decoded - swapped).abs().max() > 1e-3


@pytest.mark.parametrize("width", [4, 5])
def test_position_codes_by_hand(width: int) -> None:
    found = position_codes(torch.zeros(2, 3, width, dtype=torch.float64))
    for position in range(3):
        angles = [position / 10000 ** (2 * i / width) for i in range((width + 1) // 2)]
        expected = [*map(math.sin, angles), *map(math.cos, angles)][:width]
        assert found[position].tolist() == pytest.approx(expected, **FLOAT64)


def test_a_decoder_needs_masked_positions() -> None:
    with pytest.raises(ValueError, match="turn_mask must be above 0 where turn_decoder is 'masked', got 0"):
        model_of(CASES["two"][0], turn_mask=0.0)
    model_of(CASES["two"][0], turn_mask=0.0, turn_decoder="reuse")


@pytest.mark.parametrize("dcid", [False, True])
def test_its_rules_are_plain_ema_with_or_without_dcid(dcid: bool) -> None:
    chosen, usual = preset("official", method="turn", dcid=dcid).method, preset("official").method
    assert (chosen.ema_partner, chosen.commitment_partner, chosen.code_matching_weight) == ("none", 0, 0)
    frame = (chosen.club_estimator, chosen.cpc_weight)
    assert frame == ((usual.club_estimator, usual.cpc_weight) if dcid else ("none", 0))


def test_targets_have_no_gradient() -> None:
    """An LSTM that is its own target would learn to be easy to rebuild."""
    model = model_of(CASES["three"][0], "official")
    output = output_of(model, "three")
    term = model.alignment.clip_terms(model, output, draw, None)["turn.reconstruction.text"]
    words = list(model.encoders["text"].words.parameters())
    assert torch.autograd.grad(term, words, allow_unused=True) == (None,) * len(words)
    assert torch.autograd.grad(term, list(output.quantised.values()), allow_unused=True)[0] is not None
    assert_close(term, term.detach(), EXACT)
