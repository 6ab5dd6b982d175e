"""Which codewords a word lets one expect, learnt beside the encoders."""

from __future__ import annotations

from torch import Tensor, nn

# Adam moves every weight by about the learning rate; times this the lexicon learns faster than the encoders it guides.
SCALE = 10.0


class Lexicon(nn.Linear):
    """Logarithms of the codewords that a word vector, on its own, lets one expect; all alike at first.

    Args:
        input_width: E, of a word vector.
        codewords: M.
    """

    def __init__(self, input_width: int, codewords: int) -> None:
        super().__init__(input_width, codewords)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, words: Tensor) -> Tensor:
        """(B, T, E) to (B, T, M), whose exponentials add up to one."""
        return (SCALE * super().forward(words)).log_softmax(-1)
