"""S-MiT: the adaptive mean margin against its formula, and InfoNCE as its special case."""

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn import functional as F

from unicode_fast.methods import make_method
from unicode_fast.methods.s_mit import adaptive_mean_margin


def by_formula(similarity: Tensor, margins: Tensor) -> Tensor:
    """Eq. 2 of Monfort et al., clip by clip."""
    terms = []
    for i in range(len(similarity)):
        positive = torch.exp(similarity[i, i] - margins[i])
        negatives = sum(torch.exp(similarity[i, j]) for j in range(len(similarity)) if j != i)
        terms.append(-torch.log(positive / (positive + negatives)))
    return torch.stack(terms).mean()


def margins_of(similarity: Tensor, alpha: float) -> Tensor:
    """Eq. 3, clip by clip."""
    number = len(similarity)
    return torch.stack(
        [
            alpha * (similarity[i, i] - sum(similarity[i, j] for j in range(number) if j != i) / (number - 1))
            for i in range(number)
        ]
    )


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_formula(alpha: float, shared: bool) -> None:
    similarity = torch.randn(7, 7, dtype=torch.float64, requires_grad=True)
    rows, columns = margins_of(similarity, alpha), margins_of(similarity.T, alpha)
    expected = by_formula(similarity, rows) + by_formula(similarity.T, rows if shared else columns)
    found = adaptive_mean_margin(similarity, alpha, shared)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    gradients = [torch.autograd.grad(loss, similarity, retain_graph=True)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-13)


def test_without_margin_it_is_info_nce() -> None:
    similarity, clips = torch.randn(5, 5, dtype=torch.float64), torch.arange(5)
    expected = F.cross_entropy(similarity, clips) + F.cross_entropy(similarity.T, clips)
    torch.testing.assert_close(adaptive_mean_margin(similarity, 0.0), expected, rtol=1e-14, atol=0)


def test_the_largest_margin_leaves_the_positive_without_gradient() -> None:
    similarity = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(adaptive_mean_margin(similarity, 1.0), similarity)
    assert gradient.diagonal().abs().max() < 1e-16 and gradient.abs().max() > 0.01


def test_the_term_is_the_mean_over_pairs_of_pooled_cosines() -> None:
    fields = {"align_weight": 2.0, "align_temperature": 0.2, "smit_alpha": 0.25, "dtype": "float64"}
    model = tiny.model(method="s-mit", **fields).train()
    features = tiny.batch(model)
    mask = {name: tiny.mask_of([5, 1, 2, 3, 4, 5], 5) for name in features}
    output = model(features, mask)
    pooled = []
    for name in model.names:
        means = [z[valid].mean(0) for z, valid in zip(output.semantic[name], mask[name], strict=True)]
        pooled.append(torch.stack([mean / mean.norm() for mean in means]))
    losses = [
        adaptive_mean_margin(pooled[one] @ pooled[other].T / 0.2, 0.25) for one, other in ((0, 1), (0, 2), (1, 2))
    ]
    found = make_method(model).alignment(output)["s-mit"]
    torch.testing.assert_close(found, 2 * sum(losses) / 3, rtol=1e-12, atol=0)
