"""What makes modalities share codes: normalised features, partners with a time axis, agreed assignments, presence."""

import math

import pytest
import tiny
import torch
from tolerances import FLOAT64
from torch import Tensor, nn
from torch.testing import assert_close

from unicode_fast import losses
from unicode_fast.methods import UniCodeMethod
from unicode_fast.modules import UniCode
from unicode_fast.modules.feature_norm import MOMENTUM, FeatureNorm

STEPS = 5


def features(seed: int = 0, clips: int = 6, width: int = 4) -> Tensor:
    return torch.randn(clips, STEPS, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestFeatureNorm:
    def test_it_is_batch_normalisation_over_valid_steps(self) -> None:
        z, mask = 3 * features() + 1, tiny.mask_of([5, 5, 2, 1, 4, 3], STEPS)
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

    def test_steps_that_are_not_valid_do_not_count(self) -> None:
        scores = torch.randn(40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        valid = torch.arange(40) < 25
        padded = torch.where(valid.unsqueeze(1), scores, 100)
        assert_close(losses.balanced_assignment(padded, valid)[valid], losses.balanced_assignment(scores[:25]))

    def test_presence_by_hand(self) -> None:
        """One word surely means codeword 0, another 1 or 2 with equal chance."""
        certain = torch.tensor([[0.0, -1000, -1000], [-1000, 0, 0]], dtype=torch.float64)
        used = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
        expected = -(0.5 * math.log(1 - 1e-4 + 1e-6) + 0.5 * math.log(0.5 + 1e-6))
        assert float(losses.presence(used, certain[None])) == pytest.approx(expected, **FLOAT64)
        # A third word that is padding changes nothing, a valid one that means codeword 1 does.
        more = torch.cat([certain, torch.tensor([[-1000.0, 0, -1000]], dtype=torch.float64)])[None]
        padding = torch.tensor([[True, True, False]])
        assert float(losses.presence(used, more, padding)) == pytest.approx(expected, **FLOAT64)
        assert float(losses.presence(used, more)) < 0.01

    def test_presence_of_certain_words_has_finite_gradients(self) -> None:
        scores = torch.tensor([[[1000.0, 0.0]]], requires_grad=True)
        losses.presence(torch.tensor([[0.5, 0.5]]), scores).backward()
        assert torch.isfinite(scores.grad).all()


def terms(owner: UniCode, mask: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    owner.train()
    return UniCodeMethod(owner).losses(owner(tiny.batch(owner), mask)).terms


class TestTerms:
    def test_each_weight_switches_its_own(self) -> None:
        assert {"assignment.audio", "assignment.video", "presence.text"} <= terms(tiny.model()).keys()
        assert "assignment.text" not in terms(tiny.model())
        without = terms(tiny.model(assignment_weight=0.0))
        assert "presence.text" in without and "assignment.audio" not in without
        without = terms(tiny.model(presence_weight=0.0))
        assert "presence.text" not in without and "assignment.audio" in without
        assert "presence.text" not in terms(tiny.model(names="audio,video", presence_weight=0.3))

    def test_modalities_of_other_lengths_are_not_assigned_by_second(self) -> None:
        owner = tiny.model()
        found = UniCodeMethod(owner).losses(owner(tiny.batch(owner, lengths={"audio": 4}))).terms
        assert "assignment.audio" not in found and "presence.text" in found

    def test_weights_are_factors(self) -> None:
        once = terms(tiny.model(dtype="float64", dropout=0.0))
        twice = terms(tiny.model(dtype="float64", dropout=0.0, assignment_weight=2.0, presence_weight=0.6))
        for name in ("assignment.audio", "assignment.video", "presence.text"):
            weight = 2 if name.startswith("assignment") else 0.6 / tiny.config().method.presence_weight
            assert float(twice[name]) == pytest.approx(weight * float(once[name]), **FLOAT64)

    @pytest.mark.parametrize("lengths", [None, {"text": 4}])
    def test_partners_with_a_time_axis(self, lengths: dict[str, int] | None) -> None:
        """By name: text is drawn to its own codewords only, and audio to video's, whatever text uses."""
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

    def test_agreement_is_of_all_and_has_no_gradient_itself(self) -> None:
        """Modalities with the same features have the entropy of the target for a loss, at its least."""
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
