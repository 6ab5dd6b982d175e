"""Problem sizes by name, and where each comes from."""

from typing import NamedTuple


class Shape(NamedTuple):
    """B clips of T steps in each of the modalities, M codewords of width D."""

    clips: int
    steps: int
    modalities: int
    codewords: int
    width: int


SHAPES = {
    # Pre-training as published: 80 clips of ten seconds, 400 codewords of width 256.
    "published": Shape(80, 10, 3, 400, 256),
    # The default run on the built-in data.
    "default": Shape(80, 10, 3, 128, 128),
}
