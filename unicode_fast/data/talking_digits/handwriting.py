"""Pictures of digits: real handwriting, printed type faces for the second domain, and their frames."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from unicode_fast.headless import any_backend

FRAME_SIDE = 16
GRID_SIDE, CHANNELS = 7, 16
SMALL_SIDE = 8
_FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "DejaVuSerif-BoldItalic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "STIXGeneralBolIta",
    "cmr10",
    "cmss10",
    "cmtt10",
)
_PICTURES_PER_FACE_AND_DIGIT = 12


class Pictures(NamedTuple):
    """Digit pictures.

    pixels: (P, 8, 8) float32 in [0, 1], 1 is ink; digit: (P,) int64; group: (P,) int64, each group in one split only.
    """

    pixels: np.ndarray
    digit: np.ndarray
    group: np.ndarray


@functools.cache
def handwritten_pictures() -> Pictures:
    """The 1,797 handwritten digits of scikit-learn, each a separate group."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images / 16).astype(np.float32)
    return Pictures(pixels, digits.target.astype(np.int64), np.arange(len(pixels), dtype=np.int64))


@functools.cache
def printed_pictures() -> Pictures:
    """Digits in 18 type faces of matplotlib, rotated and stretched; a face is a group.

    The distortions have a fixed seed, so the pictures are always the same.
    """
    generator = np.random.default_rng(5)
    pixels, digit, group = [], [], []
    for face_number, face in enumerate(_FACES):
        for value in range(10):
            glyph = _glyph(face, str(value))
            for _ in range(_PICTURES_PER_FACE_AND_DIGIT):
                pixels.append(_distorted(glyph, generator))
                digit.append(value)
                group.append(face_number)
    return Pictures(np.stack(pixels).astype(np.float32), np.array(digit), np.array(group))


def _glyph(face: str, character: str) -> np.ndarray:
    """(64, 64) float32 in [0, 1], the character centred, 48 pixels high."""
    with any_backend():
        from matplotlib import get_data_path
        from matplotlib.ft2font import FT2Font
    from scipy import ndimage

    font = FT2Font(f"{get_data_path()}/fonts/ttf/{face}.ttf")
    font.set_size(48, 72)
    font.set_text(character)
    font.draw_glyphs_to_bitmap()
    bitmap = np.asarray(font.get_image(), np.float32) / 255
    rows, columns = np.flatnonzero(bitmap.max(1)), np.flatnonzero(bitmap.max(0))
    ink = bitmap[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    ink = ndimage.zoom(ink, 48 / len(ink), order=1)[:, :60]
    top, left = (64 - ink.shape[0]) // 2, (64 - ink.shape[1]) // 2
    page = np.zeros((64, 64), np.float32)
    page[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return page


def _distorted(glyph: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """(8, 8): the glyph rotated by up to 15 degrees, stretched, moved by up to 4 of 64 pixels, and downsampled."""
    from scipy import ndimage

    angle = np.deg2rad(generator.uniform(-15, 15))
    stretch = generator.uniform(0.8, 1.1, 2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / stretch
    offset = 31.5 - turn @ (31.5 + generator.uniform(-4, 4, 2))
    moved = ndimage.affine_transform(glyph, turn, offset, order=1)
    return np.clip(moved.reshape(SMALL_SIDE, 8, SMALL_SIDE, 8).mean((1, 3)) * 1.2, 0, 1)


def enlarged(pixels: np.ndarray) -> np.ndarray:
    """(P, 8, 8) to (P, 16, 16), bilinear between the centres of the pixels."""
    position = np.clip((np.arange(FRAME_SIDE) + 0.5) / 2 - 0.5, 0, SMALL_SIDE - 1)
    weights = np.maximum(0, 1 - np.abs(position[:, None] - np.arange(SMALL_SIDE))).astype(np.float32)  # (16, 8)
    return weights @ pixels @ weights.T


def side_by_side(left: np.ndarray, right: np.ndarray, top: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two small pictures in one frame.

    Args:
        left: (F, 8, 8).
        right: (F, 8, 8).
        top: (F, 2) int64 in [0, 8], first row of the left and of the right picture.

    Returns:
        frames: (F, 16, 16); ink: (F, 2, 16, 16) bool, pixels of the left and the right picture with more than a quarter
        of full ink.
    """
    halves = np.zeros((len(left), 2, FRAME_SIDE, FRAME_SIDE), np.float32)
    frame = np.arange(len(left))[:, None]
    rows = top[:, :, None] + np.arange(SMALL_SIDE)  # (F, 2, 8)
    halves[frame, 0, rows[:, 0], : FRAME_SIDE // 2] = left
    halves[frame, 1, rows[:, 1], FRAME_SIDE // 2 :] = right
    return halves.sum(1), halves > 0.25


def windows(frames: np.ndarray) -> np.ndarray:
    """The 4 x 4 windows of each frame at stride 2, as a grid with raw pixels as channels.

    Args:
        frames: (..., 16, 16) uint8.

    Returns:
        (..., 7, 7, 16) float32 in [0, 1].
    """
    views = np.lib.stride_tricks.sliding_window_view(frames, (4, 4), axis=(-2, -1))[..., ::2, ::2, :, :]
    return views.reshape(*frames.shape[:-2], GRID_SIDE, GRID_SIDE, CHANNELS).astype(np.float32) / np.float32(255)
