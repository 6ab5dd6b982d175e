"""CLUB networks computed together: the results and gradients of one network after the other."""

import pytest
import tiny
import torch
from cases import normal
from compare import assert_all_close, assert_close
from tolerances import MANY_ROWS
from torch import Tensor, nn

from unicode_fast import losses
from unicode_fast.modules import club

# Positions and width of the specific features by modality. The first two networks are computed together.
SIZES = {"audio": (4, 5), "depth": (4, 5), "video": (4, 7), "text": (2, 5)}


def inputs(leading: int = 3) -> tuple[nn.ModuleDict, dict[str, Tensor], dict[str, Tensor]]:
    """Networks, semantic features with gradient, specific features."""
    networks = nn.ModuleDict({name: club.ClubNetwork(6, width, 8) for name, (_, width) in SIZES.items()}).double()
    semantic, specific = {}, {}
    for seed, (name, (length, width)) in enumerate(SIZES.items()):
        semantic[name] = normal(leading, length, 6, seed=seed, dtype=torch.float64).requires_grad_()
        specific[name] = normal(leading, length, width, seed=9 + seed, dtype=torch.float64)
    return networks, semantic, specific


def test_predict() -> None:
    """With the gradients of features and parameters."""
    networks, semantic, specific = inputs()
    leaves = [*semantic.values(), *networks.parameters()]
    one_by_one = {name: network(semantic[name]) for name, network in networks.items()}
    gradients = []
    for results in (club.predict(networks, semantic), one_by_one):
        total = torch.stack([losses.club_likelihood(*results[name], specific[name]) for name in SIZES]).sum()
        gradients.append(torch.autograd.grad(total, leaves))
        for name in SIZES:
            assert_all_close(results[name], one_by_one[name], MANY_ROWS, name)
    assert_all_close(*gradients, MANY_ROWS)


MASKS = {
    "audio": tiny.mask_of([4, 1, 2], 4),
    "depth": None,
    "video": tiny.mask_of([0, 3, 1], 4),
    "text": tiny.mask_of([0, 0, 0], 2),
}


@pytest.mark.parametrize("masks", [dict.fromkeys(SIZES), MASKS], ids=["every position", "masks"])
def test_likelihood_gradients(masks: dict[str, Tensor | None]) -> None:
    """They replace older gradients; without a valid position they are 0."""
    networks, semantic, specific = inputs()
    likelihoods = [losses.club_likelihood(*networks[n](semantic[n]), specific[n], masks[n]) for n in SIZES]
    expected = torch.autograd.grad(torch.stack(likelihoods).sum(), list(networks.parameters()))
    for parameter in networks.parameters():
        parameter.grad = torch.ones_like(parameter)
    club.set_likelihood_gradients(networks, semantic, specific, masks)
    for (name, parameter), truth in zip(networks.named_parameters(), expected, strict=True):
        assert parameter.grad is not None and not parameter.grad.requires_grad
        assert parameter.grad.any() == (masks is not MASKS or not name.startswith("text."))
        assert_close(parameter.grad, truth, MANY_ROWS, name)
