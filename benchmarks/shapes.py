"""Problem sizes by name, and their sources."""

from typing import NamedTuple

from unicode_fast.config import Modality


class Shape(NamedTuple):
    """B clips of T positions in each of the modalities, M codewords of width D."""

    clips: int
    positions: int
    modalities: int
    codewords: int
    width: int


SHAPES = {
    # Pre-training as published: 80 clips of ten seconds, 400 codewords of width 256.
    "published": Shape(80, 10, 3, 400, 256),
    # The default run on the built-in data.
    "default": Shape(80, 10, 3, 128, 128),
}


class SearchShape(NamedTuple):
    """N rows and M codewords of width D."""

    rows: int
    codewords: int
    width: int


# First the size of training, 3 modalities of 80 clips of ten seconds, or one of them. There calls take longer than
# arithmetic.
SEARCH_SHAPES = {
    "published": SearchShape(2400, 400, 256),
    "one modality": SearchShape(800, 400, 256),
    "more codewords": SearchShape(2400, 1024, 256),
    "narrow": SearchShape(65536, 1024, 64),
    "wide": SearchShape(65536, 1024, 256),
    "one row": SearchShape(1, 1, 16),
    # For GPUs.
    "million": SearchShape(1_000_000, 1024, 256),
    "million, 8192 codewords": SearchShape(1_000_000, 8192, 256),
}
# Sizes of search and update together.
UPDATE_SHAPES = ("narrow", "wide", "million")
CPU_SHAPES = ("published", "one modality", "more codewords", "narrow", "wide", "one row")
# Sizes of a search without candidates that the bound can tell apart, by 40 distinct codewords or 40 tight clusters.
COLLAPSED_SHAPES = ("published", "million")
DISTINCT, SPREAD = 40, 1e-6


class ContrastShape(NamedTuple):
    """B clips at K prediction steps in each of the modalities, vectors of width D."""

    modalities: int
    steps: int
    clips: int
    width: int


# Cross-CPC: pre-training as published, with more prediction steps, and of the default run; then large batches of one
# pair.
CONTRAST_SHAPES = {
    "published": ContrastShape(3, 1, 80, 256),
    "twelve steps": ContrastShape(3, 12, 80, 256),
    "default": ContrastShape(3, 1, 80, 128),
    "1024 clips": ContrastShape(1, 1, 1024, 256),
    "4096 clips": ContrastShape(1, 1, 4096, 256),
    "8192 clips": ContrastShape(1, 1, 8192, 256),
    "32768 clips": ContrastShape(1, 1, 32768, 256),
    "131072 clips": ContrastShape(1, 1, 131072, 256),
}
# Two of them, whose peak memory on a CPU is compared: B·D doubles, B·B becomes fourfold.
GROWTH_SHAPES = ("4096 clips", "8192 clips")
# Measured shapes and precisions, by device.
CONTRAST_CASES = {
    "cpu": [(shape, "float32") for shape in CONTRAST_SHAPES],
    "cuda": [
        *(
            (shape, precision)
            for shape in ("published", "twelve steps")
            for precision in ("bfloat16", "tf32", "float32")
        ),
        ("32768 clips", "bfloat16"),
        ("32768 clips", "tf32"),
        ("1024 clips", "bfloat16"),
        ("131072 clips", "bfloat16"),
    ],
}


class TrainShape(NamedTuple):
    """B clips of T positions, in the sizes of a preset and the three modalities of a dataset.

    Attributes:
        clips: B.
        positions: T.
        size: of the preset, "small" or "paper".
        audio: shape of one position.
        video: shape of one position.
        text: shape of one word.
    """

    clips: int
    positions: int
    size: str
    audio: tuple[int, ...]
    video: tuple[int, ...]
    text: tuple[int, ...]

    def modalities(self) -> dict[str, Modality]:
        """Kinds and shapes by name."""
        return {
            "audio": Modality("vector", self.audio),
            "video": Modality("grid", self.video),
            "text": Modality("words", self.text),
        }


# The whole step: as published (VGGish audio, VGG-19 grids, BERT words), and of the default run on the built-in data. A
# clip of the published sizes needs 77 GFLOP, so a CPU gets only four of them.
_DEFAULT = TrainShape(80, 10, "small", (128,), (7, 7, 16), (128,))
_PUBLISHED = TrainShape(80, 10, "paper", (128,), (7, 7, 512), (768,))
TRAIN_SHAPES = {
    "cpu": {"default": _DEFAULT, "published, 4 clips": _PUBLISHED._replace(clips=4)},
    "cuda": {"default": _DEFAULT, "published": _PUBLISHED},
}
