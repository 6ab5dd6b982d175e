"""CLUB network: a Gaussian prediction of the specific features from the semantic ones."""

from __future__ import annotations

from torch import Tensor, nn

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
