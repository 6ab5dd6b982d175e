"""The built-in data sets by name."""

from __future__ import annotations

from collections.abc import Mapping

from unicode_fast.data.store.read import Store
from unicode_fast.data.talking_digits import digits as talking_digits
from unicode_fast.data.talking_digits import numbers as talking_numbers

DATASETS = (*talking_digits.DATASETS, talking_numbers.NAME)
# Data sets with a transfer data set of the same classes, and with one that has masks for segmentation.
WITH_TRANSFER = talking_digits.DATASETS


def load(
    name: str, *, easy: bool = False, clips: Mapping[str, int] | None = None, seed: int = 0, progress: bool = True
) -> Store:
    """Open a built-in data set in the platform's cache; generate it if it is missing.

    Args:
        name: one of `DATASETS`.
        easy: generate the easy variant, for quick tests.
        clips: number of clips of each split; None takes 4,000 train, 500 val and 1,000 test.
        seed: seed of all random numbers.
        progress: show a progress bar on standard error while clips are made.

    Raises:
        As `talking_digits.load`.
    """
    if name == talking_numbers.NAME:
        return talking_numbers.load(easy=easy, clips=clips, seed=seed, progress=progress)
    return talking_digits.load(name, easy=easy, clips=clips, seed=seed, progress=progress)
