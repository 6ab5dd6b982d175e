"""Losses: by hand, against float64 NumPy loops, gradients, masks."""

import math

import numpy as np
import pytest
import tiny
import torch
from compare import assert_all_close, assert_close
from tolerances import FLOAT64, MANY_ROWS

from unicode_fast import losses


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class TestByHand:
    def test_reconstruction(self) -> None:
        decoded = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
        target = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
        assert losses.reconstruction(decoded, target).item() == pytest.approx((4 + 9 + 16) / 4)
        assert losses.reconstruction(decoded, target, torch.tensor([[True, False]])).item() == pytest.approx(2.0)

    def test_commitment_mean_and_sum(self) -> None:
        z, codeword = torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[0.0, 4.0]]])
        assert losses.commitment(z, codeword).item() == pytest.approx(12.5)
        assert losses.commitment(z, codeword, norm="sum").item() == pytest.approx(25.0)

    def test_commitment_has_no_gradient_into_the_codeword(self) -> None:
        z, codeword = torch.ones(1, 1, 2, requires_grad=True), torch.zeros(1, 1, 2, requires_grad=True)
        losses.commitment(z, codeword, norm="sum").backward()
        assert codeword.grad is None
        assert torch.equal(z.grad, torch.full((1, 1, 2), 2.0))

    def test_club_likelihood_of_a_perfect_guess_is_half_the_log_variance(self) -> None:
        y = torch.tensor([[[1.0, 2.0]]])
        assert losses.club_likelihood(y, torch.full_like(y, 0.5), y).item() == pytest.approx(0.5)

    def test_code_matching_of_identical_one_hot_clips(self) -> None:
        share = torch.eye(2, dtype=torch.float64)
        score = 2 * math.log(losses.OFFICIAL_LOG_OFFSET)
        expected = math.log1p(math.exp(score))
        assert losses.code_matching(share, share).item() == pytest.approx(expected, abs=1e-15)

    def test_code_matching_under_autocast(self) -> None:
        shares = torch.rand(2, 6, 40, generator=torch.Generator().manual_seed(0)).softmax(-1)
        with torch.autocast("cpu", torch.bfloat16):
            found = losses.code_matching(*shares)
        assert torch.equal(found, losses.code_matching(*shares))

    def test_masked_mean_without_a_valid_position_is_zero(self) -> None:
        assert losses.masked_mean(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)).item() == 0


class TestAgainstLoops:
    def test_club_closed_form_is_the_mean_over_all_pairs(self) -> None:
        mean, spread, y = normal(5, 3, 4), normal(5, 3, 4, seed=1).tanh(), normal(5, 3, 4, seed=2)
        mu, lv, obs = mean.numpy(), spread.numpy(), y.numpy()

        def log_q(i: int, j: int, t: int) -> float:
            return float(sum(-((obs[j, t, c] - mu[i, t, c]) ** 2) / math.exp(lv[i, t, c]) / 2 for c in range(4)))

        pairs = [log_q(i, i, t) - np.mean([log_q(i, j, t) for j in range(5)]) for i in range(5) for t in range(3)]
        assert losses.club_closed_form(mean, spread, y).item() == pytest.approx(np.mean(pairs), **FLOAT64)
        assert losses.club_closed_form(mean, spread, y, reduction="mean").item() == pytest.approx(
            np.mean(pairs) / 4, **FLOAT64
        )

    def test_club_official(self) -> None:
        mean, spread, y = normal(4, 3, 2), normal(4, 3, 2, seed=1).tanh(), normal(4, 3, 2, seed=2)
        order = [2, 1, 3, 0]
        mu, lv, obs = mean.numpy(), spread.numpy(), y.numpy()
        total = 0.0
        for b in range(4):
            for c in range(2):
                variance = math.exp(np.mean(lv[b, :, c]))
                own = np.mean([(mu[b, t, c] - obs[b, t, c]) ** 2 for t in range(3)])
                other = np.mean([(mu[b, t, c] - obs[order[b], t, c]) ** 2 for t in range(3)])
                total += (-own + other) / variance / 2 / 4
        assert losses.club_official(mean, spread, y, torch.tensor(order)).item() == pytest.approx(total, **FLOAT64)

    @pytest.mark.parametrize("pairing", ["official", "symmetric"])
    @pytest.mark.parametrize("directions", ["rows", "both"])
    def test_code_matching(self, pairing: str, directions: str) -> None:
        first, second = normal(4, 6).softmax(1), normal(4, 6, seed=1).softmax(1)
        p, q, offset = first.numpy(), second.numpy(), losses.OFFICIAL_LOG_OFFSET
        scores = np.zeros((4, 4))
        for i in range(4):
            for j in range(4):
                scores[i, j] = sum(p[i, k] * math.log(q[j, k] + offset) for k in range(6))
                if pairing == "official":
                    scores[i, j] += sum(q[i, k] * math.log(p[j, k] + offset) for k in range(6))
                else:
                    scores[i, j] += sum(q[j, k] * math.log(p[i, k] + offset) for k in range(6))
        grown = np.exp(scores - scores.min())
        extra = losses.OFFICIAL_SUM_OFFSET if pairing == "official" else 0.0
        rows = np.mean([-math.log(grown[i, i] / (grown[i].sum() + extra)) for i in range(4)])
        columns = np.mean([-math.log(grown[i, i] / (grown[:, i].sum() + extra)) for i in range(4)])
        expected = rows if directions == "rows" else (rows + columns) / 2
        got = losses.code_matching(first, second, pairing=pairing, directions=directions)
        assert got.item() == pytest.approx(expected, **FLOAT64)

    @pytest.mark.parametrize("pairing", ["official", "symmetric"])
    @pytest.mark.parametrize("directions", ["rows", "both"])
    def test_code_matching_of_many_pairs(self, pairing: str, directions: str) -> None:
        given = [normal(2, 3, 5, 7, seed=seed).softmax(-1).requires_grad_() for seed in (0, 1)]
        options = {"pairing": pairing, "directions": directions}
        pairs = zip(*(shares.flatten(0, 1) for shares in given), strict=True)
        expected = torch.stack([losses.code_matching(*pair, **options) for pair in pairs]).view(2, 3)
        found, weights = losses.code_matching(*given, **options), normal(2, 3, seed=2)
        assert_close(found, expected, MANY_ROWS)
        gradients = [torch.autograd.grad((weights * result).sum(), given) for result in (found, expected)]
        assert_all_close(*gradients, MANY_ROWS)


class TestMasks:
    """Padded positions never count: the masked loss of a padded batch is the loss of the valid positions."""

    mask = tiny.mask_of([2, 2, 2], 4)

    def padded(self, *shape: int, seed: int = 0) -> torch.Tensor:
        values = normal(*shape, seed=seed)
        values[:, 2:] = 1e6
        return values

    def test_reconstruction_and_commitment(self) -> None:
        x, y = self.padded(3, 4, 5), normal(3, 4, 5, seed=1)
        for loss in (losses.reconstruction, losses.commitment):
            assert loss(x, y, self.mask).item() == pytest.approx(loss(x[:, :2], y[:, :2]).item(), **FLOAT64)

    def test_club(self) -> None:
        mean, spread, y = self.padded(3, 4, 5), normal(3, 4, 5, seed=1).tanh(), self.padded(3, 4, 5, seed=2)
        short = (mean[:, :2], spread[:, :2], y[:, :2])
        order = torch.tensor([1, 2, 0])
        for loss in (losses.club_likelihood, losses.club_closed_form):
            assert loss(mean, spread, y, self.mask).item() == pytest.approx(loss(*short).item(), **FLOAT64)
        got = losses.club_official(mean, spread, y, order, self.mask)
        assert got.item() == pytest.approx(losses.club_official(*short, order).item(), **FLOAT64)


class TestGradients:
    def test_all(self) -> None:
        mask = tiny.mask_of([3, 1], 3)
        arguments = [normal(2, 3, 2, seed=n).requires_grad_() for n in range(3)]
        order = torch.tensor([1, 0])
        for loss in (
            lambda a, b, c: losses.club_closed_form(a, b, c, mask),
            lambda a, b, c: losses.club_official(a, b, c, order, mask),
            lambda a, b, c: losses.club_likelihood(a, b, c, mask),
            lambda a, b, c: losses.reconstruction(a, b, mask) + losses.commitment(a, c, mask) * 0,
            lambda a, b, c: losses.code_matching(a.mean(1).softmax(1), b.mean(1).softmax(1), pairing="official"),
            lambda a, b, c: losses.code_matching(a.mean(1).softmax(1), b.mean(1).softmax(1)),
        ):
            assert torch.autograd.gradcheck(loss, arguments)

    def test_closed_form_keeps_its_digits_at_a_large_offset(self) -> None:
        mean, y = normal(64, 1, 8) + 1000, normal(64, 1, 8, seed=1) + 1000
        zero = torch.zeros_like(mean)
        exact = losses.club_closed_form(mean, zero, y).item()
        single = losses.club_closed_form(mean.float(), zero.float(), y.float()).item()
        assert single == pytest.approx(exact, rel=1e-3)
