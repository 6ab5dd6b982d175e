"""Prediction of codewords from single words, trained together with the encoders."""

from __future__ import annotations

from torch import Tensor, nn

from unicode_fast.modules.linear import Linear

# Adam changes each weight by about the learning rate; the factor trains the lexicon faster than the encoders.
SCALE = 10.0


class Lexicon(Linear):
    """Log probabilities of the codewords given one word vector; uniform at first.

    Args:
        input_width: E, width of a word vector.
        codewords: M.
    """

    def __init__(self, input_width: int, codewords: int) -> None:
        super().__init__(input_width, codewords)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, words: Tensor) -> Tensor:
        """(B, T, E) to log probabilities (B, T, M)."""
        return (SCALE * super().forward(words)).log_softmax(-1)
