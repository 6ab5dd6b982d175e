"""Terms for code sharing: normalised features, partners with a time axis, agreed assignments, grounding."""

import math
from itertools import combinations

import pytest
import tiny
import torch
from tolerances import FLOAT64
from torch import Tensor, nn
from torch.testing import assert_close

from unicode_fast import codeword_distribution, losses
from unicode_fast.methods import UniCodeMethod
from unicode_fast.modules import UniCode
from unicode_fast.modules.cpc import clip_mean
from unicode_fast.modules.feature_norm import MOMENTUM, FeatureNorm
from unicode_fast.modules.lexicon import Lexicon

POSITIONS = 5


def features(seed: int = 0, clips: int = 6, width: int = 4) -> Tensor:
    return torch.randn(clips, POSITIONS, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestFeatureNorm:
    def test_it_is_batch_normalisation_over_valid_positions(self) -> None:
        z, mask = 3 * features() + 1, tiny.mask_of([5, 5, 2, 1, 4, 3], POSITIONS)
        norm, reference = FeatureNorm(4).double(), nn.BatchNorm1d(4, affine=False, dtype=torch.float64)
        ours, theirs = (z.clone().requires_grad_() for _ in range(2))
        normalised, moments = norm(ours, mask)
        expected = reference(theirs[mask])
        assert_close(normalised[mask], expected, rtol=1e-12, atol=1e-12)
        weights = features(1)[mask]
        (normalised[mask] * weights).sum().backward()
        (expected * weights).sum().backward()
        assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
        assert_close(moments.mean, z[mask].mean(0))
        assert_close(moments.variance, z[mask].var(0, correction=0))

    def test_running_moments_follow(self) -> None:
        norm = FeatureNorm(4).double()
        assert_close(norm.by_running_moments(features()), features() / math.sqrt(1 + 1e-5), rtol=1e-12, atol=0)
        _, moments = norm(features())
        assert norm.mean.abs().max() == 0  # until they are updated
        norm.update(moments)
        assert_close(norm.mean, MOMENTUM * moments.mean)
        assert_close(norm.variance, 1 - MOMENTUM + MOMENTUM * moments.variance)

    def test_a_model_trains_on_the_batch_and_encodes_by_running_moments(self) -> None:
        model = tiny.model(dtype="float64", dropout=0.0)
        batch = tiny.batch(model, clips=20)
        output = model(batch)
        for z in output.semantic.values():
            assert_close(z.mean((0, 1)), torch.zeros(16, dtype=torch.float64), rtol=0, atol=1e-12)
            assert_close(z.var((0, 1), correction=0), torch.ones(16, dtype=torch.float64), rtol=0, atol=0.01)
        for _ in range(400):
            model.update_codebook(output)
        model.eval()
        whole = model(batch)
        for name, z in whole.semantic.items():
            assert_close(z, output.semantic[name], rtol=1e-6, atol=1e-6)
            alone = model.encode(name, batch[name][:1])
            assert torch.equal(alone.index, whole.index[name][:1])
        assert whole.moments == {}

    def test_without_it_nothing_is_added_to_a_checkpoint(self) -> None:
        assert not any("norms" in key for key in tiny.model(feature_norm="none").state_dict())
        assert "norms.audio.mean" in tiny.model().state_dict()


class TestAssignment:
    def test_scores_are_distances(self) -> None:
        z, codebook = features(), features(1, 1).squeeze(0)
        expected = -((z.unsqueeze(2) - codebook).square().mean(-1)) / losses.ASSIGNMENT_TEMPERATURE
        assert_close(losses.assignment_scores(z, codebook), expected, rtol=1e-10, atol=1e-10)

    def test_balanced_assignments_use_all_codewords(self) -> None:
        scores = torch.randn(600, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        scores[:, 0] += 3
        plain, balanced = (2 * scores).softmax(1), losses.balanced_assignment(scores, rounds=50)
        assert_close(balanced.sum(1), torch.ones(600, dtype=torch.float64))
        assert plain.mean(0).max() > 0.8
        assert_close(balanced.mean(0), torch.full((6,), 1 / 6, dtype=torch.float64), rtol=1e-6, atol=1e-6)
        # Three rounds do most of it.
        assert losses.balanced_assignment(scores).mean(0).max() < 0.25

    def test_invalid_positions_are_left_out(self) -> None:
        scores = torch.randn(40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        valid = torch.arange(40) < 25
        padded = torch.where(valid.unsqueeze(1), scores, 100)
        assert_close(losses.balanced_assignment(padded, valid)[valid], losses.balanced_assignment(scores[:25]))

    def test_codewords_are_used_as_required_by_weighted_positions(self) -> None:
        generator = torch.Generator().manual_seed(2)
        scores = torch.randn(300, 4, generator=generator, dtype=torch.float64)
        weights = torch.rand(300, generator=generator, dtype=torch.float64)
        weights[:50] = 0
        totals = torch.tensor([4.0, 3, 2, 1], dtype=torch.float64)
        found = losses.balanced_assignment(scores, weights, totals=totals, rounds=60)
        used = (weights.unsqueeze(1) * found).sum(0)
        assert_close(used / used.sum(), totals / 10, rtol=1e-6, atol=1e-6)
        assert_close(found.sum(1), torch.ones(300, dtype=torch.float64))

    def test_presence_by_hand(self) -> None:
        """One word means codeword 0, another 1 or 2 with equal probability."""
        certain = torch.tensor([[0.0, -1000, -1000], [-1000, 0, 0]], dtype=torch.float64)
        used = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
        expected = -(0.5 * math.log(1 - 1e-4 + 1e-6) + 0.5 * math.log(0.5 + 1e-6))
        assert float(losses.presence(used, certain[None])) == pytest.approx(expected, **FLOAT64)
        # A third word of padding changes nothing; a valid third word of codeword 1 does.
        more = torch.cat([certain, torch.tensor([[-1000.0, 0, -1000]], dtype=torch.float64)])[None]
        padding = torch.tensor([[True, True, False]])
        assert float(losses.presence(used, more, padding)) == pytest.approx(expected, **FLOAT64)
        assert float(losses.presence(used, more)) < 0.01

    def test_presence_of_certain_words_has_finite_gradients(self) -> None:
        scores = torch.tensor([[[1000.0, 0.0]]], requires_grad=True)
        losses.presence(torch.tensor([[0.5, 0.5]]), scores).backward()
        assert torch.isfinite(scores.grad).all()


class TestGrounding:
    def test_by_hand(self) -> None:
        """The first of three words names one of two codewords of the clip, the second none; the third is padding."""
        used = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        sure, unsure = torch.tensor([0.9, 0.1]).log().double(), torch.tensor([0.5, 0.5]).log().double()
        expected = torch.stack([torch.stack([sure, unsure, sure]), torch.stack([sure.flip(0), unsure, sure])])
        mask = torch.tensor([[True, True, False], [True, True, True]])
        found = losses.grounding(expected, used, torch.tensor([0.5, 0.5], dtype=torch.float64), mask)
        assert_close(found.surprise[0], -torch.tensor([0.9, 0.5, 0.9]).log().double(), rtol=1e-6, atol=0)
        gain = math.log(0.9) - math.log(0.5 + 1e-6)
        weight = 1 - math.exp(-losses.GROUNDING_SLOPE * gain)
        # A misleading word has no lower weight than a word without information.
        assert_close(found.weight, torch.tensor([[weight, 0, 0], [weight, 0, 0]]).double(), rtol=1e-6, atol=1e-5)
        assert_close(found.meaning[0, :2], used[:1].expand(2, 2), rtol=0, atol=1e-8)

    def test_a_word_means_the_codewords_of_its_clip_that_the_lexicon_expects(self) -> None:
        used = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
        expected = torch.tensor([0.1, 0.1, 0.8], dtype=torch.float64).log()[None, None]
        found = losses.grounding(expected, used, torch.full((3,), 1 / 3, dtype=torch.float64))
        product = torch.tensor([0.05, 0.03, 0.16], dtype=torch.float64)
        assert_close(found.meaning[0, 0], product / product.sum(), rtol=1e-6, atol=1e-8)

    def test_the_lexicon_learns_the_words_for_the_codewords_of_others(self) -> None:
        """One word of each sentence of two decides the most frequent codeword of the clip."""
        generator = torch.Generator().manual_seed(0)
        vocabulary = torch.randn(8, 16, generator=generator)
        name, filler = torch.randint(4, (2, 200), generator=generator)
        words = torch.stack([vocabulary[4 + filler], vocabulary[name]], 1)
        used = 0.05 + 0.8 * nn.functional.one_hot(name, 4)
        lexicon = Lexicon(16, 4)
        assert_close(lexicon(words), torch.full((200, 2, 4), -math.log(4)))
        optimizer = torch.optim.Adam(lexicon.parameters(), 1e-3)
        for _ in range(200):
            optimizer.zero_grad()
            found = losses.grounding(lexicon(words), used, used.mean(0))
            found.surprise.mean().backward()
            optimizer.step()
        assert found.weight[:, 1].min() > 0.7 and found.weight[:, 0].max() < 0.25
        assert torch.equal(found.meaning[:, 1].argmax(-1), name)

    def test_words_learn_the_codewords_of_the_others(self) -> None:
        """Words of either of two codewords take one each, three to one as the balance requires."""
        scores = 0.1 * torch.randn(400, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        totals = torch.tensor([3.0, 1.0], dtype=torch.float64)
        for _ in range(2000):
            scores += 0.1 * (losses.balanced_assignment(scores, totals=totals) - scores.softmax(1))
        assert scores.softmax(1).max(1).values.min() > 0.9
        assert (scores.argmax(1) == 0).double().mean() == pytest.approx(0.75, abs=0.05)

    def test_without_valid_positions_all_stays_finite(self) -> None:
        scores = features(width=3).flatten(0, 1)
        found = losses.balanced_assignment(scores, torch.zeros(len(scores)), totals=torch.zeros(3).double())
        assert torch.isfinite(found).all()

    def test_nothing_is_added_without_words_or_others(self) -> None:
        for owner in (tiny.model(grounding_weight=0.0), tiny.model(names="audio,video")):
            assert not list(owner.lexicon.parameters()) and "lexicon" not in owner.parameter_groups()
        owner = tiny.model()
        assert [tuple(parameter.shape) for parameter in owner.parameter_groups()["lexicon"]] == [
            (12, owner.modalities["text"].shape[-1]),
            (12,),
        ]

    def test_what_padding_holds_is_not_read(self) -> None:
        owner = tiny.model(dtype="float64", dropout=0.0)
        mask = {name: tiny.mask_of([3] * 4 + [5] * 4, 5) for name in owner.names}
        batch = tiny.batch(owner, clips=8)
        spoiled = {name: values.clone() for name, values in batch.items()}
        spoiled["text"][:4, 3:] = math.nan
        owner.train()
        method = UniCodeMethod(owner)
        plain, other = (method.losses(owner(one, mask)).terms for one in (batch, spoiled))
        for name in ("lexicon.text", "grounding.text"):
            assert torch.equal(plain[name], other[name]) and torch.isfinite(other[name])


def terms(owner: UniCode, mask: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    owner.train()
    return UniCodeMethod(owner).losses(owner(tiny.batch(owner), mask)).terms


class TestTerms:
    def test_each_weight_switches_its_own(self) -> None:
        grounded = {"lexicon.text", "grounding.text"}
        found = terms(tiny.model(presence_weight=0.3))
        assert {"assignment.audio", "assignment.video", "presence.text", *grounded} <= found.keys()
        assert "assignment.text" not in found
        without = terms(tiny.model(assignment_weight=0.0))
        assert grounded <= without.keys() and "assignment.audio" not in without and "presence.text" not in without
        without = terms(tiny.model(grounding_weight=0.0))
        assert not grounded & without.keys() and "assignment.audio" in without
        assert not grounded & terms(tiny.model(names="audio,video", grounding_weight=1.0)).keys()
        assert "presence.text" not in terms(tiny.model(names="audio,video", presence_weight=0.3))

    def test_modalities_of_other_lengths_are_not_assigned_by_second(self) -> None:
        owner = tiny.model()
        found = UniCodeMethod(owner).losses(owner(tiny.batch(owner, lengths={"audio": 4}))).terms
        assert "assignment.audio" not in found and "grounding.text" in found

    def test_weights_are_factors(self) -> None:
        fixed: dict[str, object] = {"dtype": "float64", "dropout": 0.0}
        once = terms(tiny.model(**fixed, presence_weight=0.3))
        twice = terms(tiny.model(**fixed, assignment_weight=2.0, presence_weight=0.6, grounding_weight=2.0))
        for name in ("assignment.audio", "assignment.video", "presence.text", "grounding.text"):
            assert float(twice[name]) == pytest.approx(2 * float(once[name]), **FLOAT64)
        assert float(twice["lexicon.text"]) == float(once["lexicon.text"])

    @pytest.mark.parametrize("lengths", [None, {"text": 4}])
    def test_partners_with_a_time_axis(self, lengths: dict[str, int] | None) -> None:
        """Text is drawn to its own codewords only, and audio to video's, whatever text uses."""
        owner = tiny.model(dtype="float64", commitment_partners="timed")
        owner.train()
        output = owner(tiny.batch(owner, lengths=lengths))
        found = {name: term for name, term in UniCodeMethod(owner).losses(output).terms.items() if "commit" in name}
        method = owner.config.method

        def distance(name: str, other: str) -> float:
            return float(losses.commitment(output.semantic[name], output.codeword[other]))

        if lengths is None:
            for name, other in (("audio", "video"), ("video", "audio")):
                expected = method.commitment_own * distance(name, name) + method.commitment_partner * distance(
                    name, other
                )
                assert float(found[f"commitment.{name}"]) == pytest.approx(
                    method.commitment_weight * expected, **FLOAT64
                )
        own = method.commitment_weight * method.commitment_own * distance("text", "text")
        assert float(found["commitment.text"]) == pytest.approx(own, **FLOAT64)

    @pytest.mark.parametrize("lengths", [{}, {"text": 4}, {"video": 4, "text": 3}])
    def test_each_term_is_that_of_its_modalities_alone(self, lengths: dict[str, int]) -> None:
        """Modalities of equal length are computed together."""
        weights = {"code_matching_weight": 0.7, "assignment_weight": 0.6, "presence_weight": 0.3}
        owner = tiny.model(names="audio,video,text,depth", dtype="float64", **weights).train()
        positions = {name: lengths.get(name, 5) for name in owner.names}
        mask = {name: tiny.mask_of([3, 1, 2, 3, 3, 2], length) for name, length in positions.items()}
        mask["audio"][3, 1:] = False
        output, method = owner(tiny.batch(owner, lengths=lengths), mask), owner.config.method
        found = {name: float(term) for name, term in UniCodeMethod(owner).losses(output).terms.items()}
        codebook, expected = owner.codebook.codebook, {}
        used = {
            name: codeword_distribution(z, codebook, valid=mask[name], temperature=method.code_matching_temperature)
            for name, z in output.semantic.items()
        }
        for one, other in combinations(owner.names, 2):
            error = losses.code_matching(
                used[one], used[other], pairing=method.code_matching_pairing, directions=method.code_matching_directions
            )
            expected[f"code_matching.{one}-{other}"] = 0.7 * error
        scores = {name: losses.assignment_scores(z, codebook) for name, z in output.semantic.items()}
        timed = ("audio", "video", "depth")
        shares = [clip_mean(scores[name].softmax(-1), mask[name]) for name in timed]
        errors = [losses.presence(share, scores["text"], mask["text"]) for share in shares]
        expected["presence.text"] = 0.3 * torch.stack(errors).sum()
        if "video" not in lengths:
            valid = torch.stack([mask[name] for name in timed]).all(0)
            mean = torch.stack([scores[name] for name in timed]).mean(0).flatten(0, 1)
            target = losses.balanced_assignment(mean, valid.flatten()).view(*valid.shape, -1)
            for name in timed:
                agreed = (target * scores[name].log_softmax(-1)).sum(-1)
                expected[f"assignment.{name}"] = -0.6 * losses.masked_mean(agreed, valid)
        for name, error in expected.items():
            assert found[name] == pytest.approx(float(error), **FLOAT64), name

    def test_agreement_is_of_all_and_has_no_gradient_itself(self) -> None:
        """For modalities with the same features, the loss is the entropy of the target, its minimum."""
        owner = tiny.model(names="audio,depth", dtype="float64", dropout=0.0)
        owner.train()
        output = owner(tiny.batch(owner))
        output.semantic["depth"] = output.semantic["audio"]
        scores = losses.assignment_scores(output.semantic["audio"], owner.codebook.codebook).flatten(0, 1)
        target = losses.balanced_assignment(scores)
        found = UniCodeMethod(owner).losses(output).terms
        expected = float(-(target * scores.log_softmax(1)).sum(1).mean())
        assert float(found["assignment.audio"]) == pytest.approx(expected, **FLOAT64)
        assert float(found["assignment.depth"]) == pytest.approx(expected, **FLOAT64)
