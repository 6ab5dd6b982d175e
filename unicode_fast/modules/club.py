"""CLUB network: a Gaussian prediction of the specific features from the semantic ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unicode_fast import losses
from unicode_fast.modules import host
from unicode_fast.modules.linear import Linear


def _perceptron(width: int, hidden: int, output: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in ((width, hidden), (hidden, hidden), (hidden, hidden)):
        layers += [Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, Linear(hidden, output))


class ClubNetwork(nn.Module):
    """q(y | x) as a diagonal Gaussian; four-layer perceptrons give mean and log variance; Eq. 4.

    Args:
        width: of x, D.
        specific_width: of y.
        hidden_width: of the perceptrons.
    """

    def __init__(self, width: int, specific_width: int, hidden_width: int) -> None:
        super().__init__()
        self.mean = _perceptron(width, hidden_width, specific_width)
        self.log_variance = nn.Sequential(*_perceptron(width, hidden_width, specific_width), nn.Tanh())

    def forward(self, semantic: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D) to mean and log variance in [-1, 1], both (B, T, specific_width)."""
        return self.mean(semantic), self.log_variance(semantic)


class Perceptrons:
    """The perceptrons of networks with equal sizes, computed together with batched products.

    Args:
        networks: whose parameters have the same shapes.
    """

    def __init__(self, networks: Sequence[ClubNetwork]) -> None:
        perceptrons = [network.mean for network in networks] + [network.log_variance for network in networks]
        # A log variance has a last layer more, without parameters.
        layers = [layers for layers in zip(*perceptrons, strict=False) if isinstance(layers[0], nn.Linear)]
        self.parameters = [[[getattr(layer, name) for layer in each] for name in ("weight", "bias")] for each in layers]
        self.stacked = [[torch.stack(members) for members in layer] for layer in self.parameters]

    def forward(self, semantic: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Results and inputs of the layers.

        Args:
            semantic: (B, T, D) of each network.

        Returns:
            Means and log variances, (networks, B T, C) each; (perceptrons, B T, width) of each layer.
        """
        rows = torch.stack([*semantic, *semantic]).flatten(1, 2)
        inputs = []
        for number, (weight, bias) in enumerate(self.stacked):
            rows = F.relu(rows) if number else rows
            inputs.append(rows)
            rows = torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)
        mean, log_variance = rows.chunk(2)
        return mean, log_variance.tanh(), inputs

    def backward(self, in_mean: Tensor, in_log_variance: Tensor, log_variance: Tensor, inputs: list[Tensor]) -> None:
        """Sets the gradients of the parameters from those in the results of `forward`."""
        gradient = torch.cat([in_mean, in_log_variance * (1 - log_variance.square())])
        for number in reversed(range(len(inputs))):
            weight, bias = self.parameters[number]
            of_weight, of_bias = gradient.mT @ inputs[number], gradient.sum(1)
            for members, gradients in ((weight, of_weight), (bias, of_bias)):
                for member, own in zip(members, gradients, strict=True):
                    member.grad = own
            if number:
                gradient = torch.ops.aten.threshold_backward(gradient @ self.stacked[number][0], inputs[number], 0)


def _groups(networks: nn.ModuleDict, semantic: Mapping[str, Tensor]) -> Iterator[tuple[list[str], Perceptrons]]:
    """Names of networks with equal sizes, and their perceptrons."""
    groups: defaultdict[tuple[object, ...], list[str]] = defaultdict(list)
    for name, network in networks.items():
        sizes = tuple(parameter.shape for parameter in network.parameters())
        groups[semantic[name].shape, sizes].append(name)
    for names in groups.values():
        yield names, Perceptrons([cast(ClubNetwork, networks[name]) for name in names])


class _Inputs(NamedTuple):
    """Networks and their rows, in the order of the operators in csrc/cpu/club.cpp."""

    semantic: list[Tensor]
    specific: list[Tensor]
    valid: list[Tensor | None]
    parameters: list[nn.Parameter]

    @classmethod
    def of(
        cls,
        networks: nn.ModuleDict,
        semantic: Mapping[str, Tensor],
        specific: Mapping[str, Tensor],
        masks: Mapping[str, Tensor | None],
    ) -> _Inputs | None:
        """The operators' inputs; None where torch computes."""
        parameters = [parameter for network in networks.values() for parameter in network.parameters()]
        rows, targets = ([given[name] for name in networks] for given in (semantic, specific))
        kinds = {(tensor.dtype, tensor.device) for tensor in (*rows, *targets, *parameters)}
        if len(kinds) > 1 or not host.has_operators(rows[0]):
            return None
        return cls(rows, targets, [masks[name] for name in networks], parameters)


def predict(networks: nn.ModuleDict, semantic: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and log variance of each network by name, from (B, T, D) by name; as from the networks themselves."""
    found = {}
    for names, perceptrons in _groups(networks, semantic):
        mean, log_variance, _ = perceptrons.forward([semantic[name] for name in names])
        shape = semantic[names[0]].shape[:2]
        for name, *results in zip(names, mean, log_variance, strict=True):
            found[name] = results[0].unflatten(0, shape), results[1].unflatten(0, shape)
    return found


def closed_form(
    networks: nn.ModuleDict,
    semantic: Mapping[str, Tensor],
    specific: Mapping[str, Tensor],
    masks: Mapping[str, Tensor | None],
    *,
    reduction: str,
) -> Tensor:
    """`losses.club_closed_form` of each network, (networks,), with gradients in features and parameters.

    In float32 on a CPU one operator takes the rows through all layers and back. Its gradients have no gradient.

    Args:
        networks: `ClubNetwork` by name.
        semantic: (B, T, D) by name.
        specific: y, (B, T, C) by name.
        masks: (B, T) bool by name, or None where every position is valid.
        reduction: channels are added ("sum") or averaged ("mean").
    """
    given = _Inputs.of(networks, semantic, specific, masks)
    if given is not None:
        return torch.ops.unicode_fast_layers.club_estimate(*given, reduction == "mean")
    predicted = predict(networks, semantic)
    return torch.stack(
        [
            losses.club_closed_form(*predicted[name], specific[name], masks[name], reduction=reduction)
            for name in networks
        ]
    )


@torch.no_grad()
def set_likelihood_gradients(
    networks: nn.ModuleDict,
    semantic: Mapping[str, Tensor],
    specific: Mapping[str, Tensor],
    masks: Mapping[str, Tensor | None],
) -> None:
    """Sets the gradients of all parameters to those of the sum over networks of `losses.club_likelihood`.

    The derivatives are written out, which takes fewer operators and less memory than autograd. In float32 on a CPU one
    operator takes the rows through all layers and back.

    Args:
        networks: `ClubNetwork` by name.
        semantic: (B, T, D) by name.
        specific: y, (B, T, C) by name.
        masks: (B, T) bool by name, or None where every position is valid.
    """
    given = _Inputs.of(networks, semantic, specific, masks)
    if given is not None:
        gradients = torch.ops.unicode_fast_layers.club_likelihood_gradients(*given)
        for parameter, gradient in zip(given.parameters, gradients, strict=True):
            parameter.grad = gradient
        return
    for names, perceptrons in _groups(networks, semantic):
        mean, log_variance, inputs = perceptrons.forward([semantic[name] for name in names])
        error = mean - torch.stack([specific[name] for name in names]).flatten(1, 2)
        shares = []
        for name in names:
            valid = masks[name]
            ones = torch.ones_like(semantic[name][..., 0]) if valid is None else valid.to(mean.dtype)
            shares.append((ones / ones.sum().clamp(min=1)).flatten())
        share = torch.stack(shares).unsqueeze(-1)  # (networks, B T, 1)
        in_mean = share * error * torch.exp(-log_variance)
        perceptrons.backward(in_mean, (share - in_mean * error) / 2, log_variance, inputs)
