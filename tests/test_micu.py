"""MICU against its formulas: loops over clips and pairs of modalities, and explicit orders of the jigsaw's parts."""

import itertools
import math
from collections.abc import Callable, Mapping

import pytest
import tiny
import torch
from compare import assert_close
from tolerances import EXACT, FLOAT64, Tolerance
from torch import Tensor
from torch.nn import functional as F

from unicode_fast import UniCode, preset
from unicode_fast.methods import make_model
from unicode_fast.methods.micu import JIGSAW_STREAM, MASK_STREAM, Jigsaw, Micu, fine_contrast
from unicode_fast.modules import ModelOutput

CLOSE = Tolerance(FLOAT64["rel"], FLOAT64["abs"])
CLIPS, TAU = 6, 0.1
# Number of positions by modality, and whether clips have padding.
CASES: dict[str, tuple[dict[str, int], bool]] = {
    "two": ({"audio": 5, "video": 5}, False),
    "three": ({"audio": 5, "video": 5, "text": 5}, False),
    "masks": ({"audio": 5, "video": 5, "text": 5}, True),
    "unequal": ({"text": 3, "audio": 5, "video": 5}, False),
    "unequal, masks": ({"text": 3, "audio": 5, "video": 5}, True),
    "all unequal, masks": ({"audio": 5, "text": 3}, True),
}


def model_of(lengths: Mapping[str, int], **fields: object) -> UniCode:
    torch.manual_seed(0)
    config = preset("recommended", method="micu").replace_all(**tiny.SIZES, dtype="float64", dropout=0.0, **fields)
    return make_model({name: tiny.MODALITIES[name] for name in lengths}, config)


def output_of(case: str) -> ModelOutput:
    """Random features and quantised vectors, also in padding."""
    lengths, masked = CASES[case]
    generator = torch.Generator().manual_seed(len(case))
    output = ModelOutput({} if masked else None)
    for name, length in lengths.items():
        shape = (CLIPS, length, tiny.SIZES["width"])
        output.semantic[name] = torch.randn(shape, generator=generator, dtype=torch.float64)
        output.quantised[name] = torch.randn(shape, generator=generator, dtype=torch.float64)
        if output.mask is not None:
            valid = torch.randint(1, length + 1, (CLIPS,), generator=generator)
            output.mask[name] = tiny.mask_of(valid.tolist(), length)
        output.semantic[name].requires_grad_()
        output.quantised[name].requires_grad_()
    return output


def valid_of(output: ModelOutput, name: str) -> Tensor:
    if output.mask is None:
        return torch.ones(output.semantic[name].shape[:2], dtype=torch.bool)
    return output.mask[name]


def draws_of(kept: Tensor, modality: Tensor | None = None) -> Callable[[int, tuple[int, ...]], Tensor]:
    """Draws that mask all but `kept`, and choose `modality` for the parts."""

    def draw(stream: int, shape: tuple[int, ...]) -> Tensor:
        if stream == MASK_STREAM:
            assert shape == kept.shape
            return kept.to(torch.float64) * 0.9
        assert stream == JIGSAW_STREAM and modality is not None and shape == modality.shape
        return modality

    return draw


def nce(queries: Tensor, keys: Tensor) -> Tensor:
    """Cross-entropy of the rows of cosines, as info-nce-pytorch computes it."""
    scores = F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).T / TAU
    return F.cross_entropy(scores, torch.arange(len(scores)))


@pytest.mark.parametrize("case", CASES)
def test_contrastive_terms_are_those_of_loops(case: str) -> None:
    output = output_of(case)
    names, longest = list(output.semantic), max(CASES[case][0].values())
    kept = torch.rand(CLIPS, longest, generator=torch.Generator().manual_seed(2)) > 0.3
    kept[1] = False
    fine, coarse = [], []
    for one, other in itertools.product(names, names):
        z, keys = output.semantic[one], output.semantic[other]
        masked = z * kept[:, : z.shape[1], None]
        if z.shape[1] == keys.shape[1]:
            for clip in range(CLIPS):
                allowed = valid_of(output, other)[clip]
                both = torch.nonzero(valid_of(output, one)[clip] & allowed).flatten()
                # Prefixes: the key of query t is row t of the allowed ones.
                scores = F.normalize(masked[clip, both], dim=-1) @ F.normalize(keys[clip, allowed], dim=-1).T / TAU
                fine.append(F.cross_entropy(scores, both) / CLIPS)
        means = [
            torch.stack([x[clip, valid_of(output, name)[clip]].mean(0) for clip in range(CLIPS)])
            for name, x in ((one, masked), (other, keys))
        ]
        coarse.append(nce(*means))
    expected = {"micu.fine": torch.stack(fine).sum(), "micu.coarse": torch.stack(coarse).sum()}
    model = model_of(CASES[case][0], align_weight=0.5)
    found = model.alignment.batch_terms(model, output, draws_of(kept))
    assert list(found) == list(expected)
    for name, term in expected.items():
        assert_close(found[name], 0.5 * term, CLOSE, name)
        leaves = list(output.semantic.values())
        gradients = [torch.autograd.grad(each, leaves, retain_graph=True) for each in (found[name], 0.5 * term)]
        for ours, theirs in zip(*gradients, strict=True):
            assert_close(ours, theirs, CLOSE, name)


def test_masked_queries_add_a_constant() -> None:
    """A masked query has equal similarity with all keys."""
    output = output_of("three")
    model = model_of(CASES["three"][0])
    found = model.alignment.batch_terms(model, output, draws_of(torch.zeros(CLIPS, 5, dtype=torch.bool)))
    assert found["micu.fine"].item() == pytest.approx(9 * math.log(5), **FLOAT64)
    assert found["micu.coarse"].item() == pytest.approx(9 * math.log(CLIPS), **FLOAT64)
    sum(found.values()).backward()
    assert all((z.grad == 0).all() for z in output.semantic.values())


def test_a_fine_loss_by_hand() -> None:
    """Orthogonal seconds, equal in both modalities, one masked: cosine 1 with the key, 0 with the other."""
    z = torch.eye(2, dtype=torch.float64).expand(2, 1, 2, 2)
    kept = torch.tensor([[True, False]])
    expected = 4 * (math.log(1 + math.exp(-1 / TAU)) + math.log(2)) / 2
    assert fine_contrast(z, kept, TAU).item() == pytest.approx(expected, **FLOAT64)


def test_the_mask_is_drawn_once_for_all_modalities() -> None:
    model, calls = model_of(CASES["unequal"][0], micu_mask=0.25), []

    def draw(stream: int, shape: tuple[int, ...]) -> Tensor:
        calls.append((stream, shape))
        return torch.full(shape, 0.25, dtype=torch.float64)

    kept = model.alignment.batch_terms(model, output_of("unequal"), draw)
    assert calls == [(MASK_STREAM, (CLIPS, 5))]
    none = model_of(CASES["unequal"][0], micu_mask=0.0)
    for name, term in none.alignment.batch_terms(none, output_of("unequal"), draw).items():
        assert_close(kept[name], term.detach(), EXACT, name)


def test_some_queries_must_stay() -> None:
    with pytest.raises(ValueError, match="micu_mask must be below 1, .*, got 1"):
        model_of(CASES["unequal"][0], micu_mask=1.0)


def rows_of(output: ModelOutput, first: str, name: str) -> Tensor:
    """Vectors of a modality at the positions of another: its mean over the clip where it has none."""
    vectors, positions = output.quantised[name], output.quantised[first].shape[1]
    rows = []
    for clip, valid in enumerate(valid_of(output, name)):
        mean = vectors[clip, valid].mean(0)
        same = vectors.shape[1] == positions
        rows += [vectors[clip, t] if same and valid[t] else mean for t in range(positions)]
    return torch.stack(rows).unflatten(0, (CLIPS, positions))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("parts", [2, 4])
def test_the_jigsaw_is_that_of_explicit_orders(case: str, parts: int) -> None:
    output, lengths = output_of(case), CASES[case][0]
    model = model_of(lengths, jigsaw_parts=parts, jigsaw_permutations=2 * (parts - 1), jigsaw_hidden=7)
    jigsaw, names = model.alignment.jigsaw, list(lengths)
    first = "audio"
    chosen = torch.rand(parts, generator=torch.Generator().manual_seed(parts), dtype=torch.float64)
    drawn = [names[int(number * len(names))] for number in chosen.tolist()]
    width = tiny.SIZES["width"] // parts
    pieces = [rows_of(output, first, name)[..., i * width : (i + 1) * width] for i, name in enumerate(drawn)]
    valid = valid_of(output, first)
    errors = []
    for label, order in enumerate(jigsaw.permutations.tolist()):
        logits = jigsaw.classifier(torch.cat([pieces[i] for i in order], -1)[valid])
        errors.append(F.cross_entropy(logits, torch.full((len(logits),), label)))
    expected = torch.stack(errors).mean()
    draw = draws_of(torch.empty(0), chosen)
    found = model.alignment.clip_terms(model, output, draw, None)["micu.jigsaw"]
    assert_close(found, expected, CLOSE)
    read = [output.quantised[name] for name in dict.fromkeys(drawn)] + list(jigsaw.classifier.parameters())
    gradients = [torch.autograd.grad(each, read) for each in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        assert_close(ours, theirs, CLOSE)
    # Micro-batches of unequal size add up.
    parts_of = []
    for clips in (slice(0, 1), slice(1, 6)):
        masks = {name: valid_of(output, name) for name in names}
        own = ModelOutput(None if output.mask is None else {name: mask[clips] for name, mask in masks.items()})
        own.quantised.update({name: vectors[clips] for name, vectors in output.quantised.items()})
        shares = {name: mask[clips].sum().double() / mask.sum() for name, mask in masks.items()}
        parts_of.append(model.alignment.clip_terms(model, own, draw, shares)["micu.jigsaw"])
    assert torch.stack(parts_of).sum().item() == pytest.approx(found.item(), **FLOAT64)


def test_orders_are_distinct_and_fixed_by_the_seed() -> None:
    every = Jigsaw(12, 3, 6, 4, seed=0).permutations
    assert {tuple(order) for order in every.tolist()} == set(itertools.permutations(range(3)))
    some = [Jigsaw(16, 8, 100, 4, seed=seed).permutations for seed in (5, 5, 6)]
    assert torch.equal(some[0], some[1]) and not torch.equal(some[0], some[2])
    assert some[0].unique(dim=0).shape == (100, 8) and torch.equal(
        some[0].sort(1).values, torch.arange(8).expand(100, 8)
    )
    assert "alignment.jigsaw.permutations" in model_of({"audio": 5, "video": 5}).state_dict()


def test_guesses_lose_the_logarithm_of_the_orders() -> None:
    """With equal parts all orders are equal, and the least loss is that of a guess."""
    jigsaw = Jigsaw(12, 3, 5, 4, seed=0).double()
    vectors = torch.randn(2, 3, 4, 4, dtype=torch.float64).repeat(1, 1, 1, 3)
    drawn = torch.tensor([0, 0, 0])
    assert (jigsaw(vectors, drawn) >= math.log(5)).all()
    with torch.no_grad():
        jigsaw.classifier[2].weight.zero_()
        jigsaw.classifier[2].bias.zero_()
    assert_close(jigsaw(vectors, drawn), torch.full((3, 4), math.log(5), dtype=torch.float64), CLOSE)


def test_the_largest_draw_chooses_the_last_modality() -> None:
    """A draw in float32 may round to one."""
    output = output_of("two")
    model = model_of(CASES["two"][0])
    terms = [
        model.alignment.clip_terms(model, output, draws_of(torch.empty(0), torch.full((2,), number)), None)
        for number in (1.0, 0.75)
    ]
    assert terms[0] == terms[1]


def test_the_released_head_has_its_size_and_one_part_leaves_it_out() -> None:
    assert sum(parameter.numel() for parameter in Jigsaw(256, 2, 2, 512, seed=0).parameters()) == 132_610
    model = model_of(CASES["two"][0], jigsaw_parts=1)
    assert not list(model.alignment.parameters())
    assert model.alignment.clip_terms(model, output_of("two"), draws_of(torch.empty(0)), None) == {}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((16, 3, 2, 4), r"jigsaw_parts must be a divisor of width \(16\), got 3"),
        ((16, 2, 3, 4), "jigsaw_permutations must be at most 2, the orders of 2 parts, got 3"),
    ],
)
def test_sizes_that_do_not_fit(sizes: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Jigsaw(*sizes, seed=0)


@pytest.mark.parametrize("name", ["official", "paper", "recommended"])
def test_its_rules_keep_codebook_and_commitment_of_the_preset(name: str) -> None:
    changed = {
        key: value for key, value in preset(name, method="micu").flat().items() if value != preset(name).flat()[key]
    }
    assert changed.pop("method") == "micu"
    assert changed.pop("club_estimator") == "none" and set(changed.values()) == {0.0}
    rest = {"cpc_weight", "code_matching_weight", "assignment_weight", "presence_weight", "grounding_weight"}
    assert set(changed) <= rest and {"cpc_weight", "code_matching_weight"} <= set(changed)
    assert isinstance(model_of({"audio": 5, "video": 5}).alignment, Micu)
