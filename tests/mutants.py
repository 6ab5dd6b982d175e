"""Damaged copies of a file: a reader refuses them by name, reads the same values, or other values of the same form."""

from __future__ import annotations

import os
import random
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

# Seconds for each reader: in the tests (the variable sets another number), and in the long tests.
QUICK, LONG = float(os.environ.get("UNICODE_FAST_FUZZ_SECONDS", "0.15")), 20.0
SECONDS = [pytest.param(QUICK, id="short"), pytest.param(LONG, id="long", marks=pytest.mark.slow)]
# Bytes at either end of a file, its header and its directory, which are damaged as often as all others together.
END = 400


def mutant(data: bytes, draw: random.Random) -> bytes:
    """One to three flips, cuts, splices, insertions or extreme numbers, each as often in header, end and payload."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 3))):
        draw.choice(_DAMAGES)(changed, draw)
    return bytes(changed)


def _place(data: bytearray, draw: random.Random) -> int:
    size = len(data)
    first, last = draw.choice(((0, min(END, size)), (max(0, size - END), size), (0, size)))
    return draw.randrange(first, last) if last > first else 0


def _flip(data: bytearray, draw: random.Random) -> None:
    if data:
        data[_place(data, draw)] ^= 1 << draw.randrange(8)


def _byte(data: bytearray, draw: random.Random) -> None:
    if data:
        data[_place(data, draw)] = draw.choice((0, 10, 34, 255, draw.randrange(256)))


def _number(data: bytearray, draw: random.Random) -> None:
    place, width = _place(data, draw), draw.choice((1, 2, 4, 8))
    value = draw.choice((0, 1, 1 << (8 * width - 1), (1 << (8 * width - 1)) - 1, (1 << 8 * width) - 1))
    data[place : place + width] = value.to_bytes(width, "little")


def _cut(data: bytearray, draw: random.Random) -> None:
    place = _place(data, draw)
    del data[place : draw.choice((len(data), place + draw.randrange(1, 9), place + draw.randrange(1, 600)))]


def _splice(data: bytearray, draw: random.Random) -> None:
    source, place, length = _place(data, draw), _place(data, draw), draw.choice((1, 2, 4, 8, 16, 64, 512))
    data[place : place + length] = data[source : source + length]


def _insert(data: bytearray, draw: random.Random) -> None:
    source, place, length = _place(data, draw), _place(data, draw), draw.choice((1, 2, 4, 8, 16, 64, 512))
    data[place:place] = draw.choice((data[source : source + length], draw.randbytes(length)))


_DAMAGES = (_flip, _flip, _byte, _number, _cut, _splice, _insert)


def equal(one: Any, other: Any) -> bool:
    """Whether two results are the same, bit for bit in their arrays."""
    return _compared(one, other, values=True)


def alike(one: Any, other: Any) -> bool:
    """Whether two results have equal names, types, shapes and dtypes, whatever their values."""
    return _compared(one, other, values=False)


def _compared(one: Any, other: Any, values: bool) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        same = list(one) == list(other)
        return same and all(_compared(one[name], other[name], values) for name in one)
    if isinstance(one, (np.ndarray, torch.Tensor)):
        same = one.shape == other.shape and one.dtype == other.dtype
        if not same or not values:
            return same
        one, other = (_bytes(array) if torch.is_tensor(array) else array for array in (one, other))
        return one.tobytes() == other.tobytes()
    if isinstance(one, Sequence) and not isinstance(one, (str, bytes)):
        return len(one) == len(other) and all(_compared(a, b, values) for a, b in zip(one, other, strict=True))
    return bool(one == other) if values else True


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor of any dtype, because NumPy lacks some dtypes."""
    return tensor.reshape(-1).contiguous().view(torch.uint8).numpy()


def fuzz(  # noqa: PLR0913 - what is damaged, how it is read, what may come of it, and for how long
    file: Path,
    read: Callable[[], Any],
    errors: type[Exception] | tuple[type[Exception], ...],
    *,
    seconds: float,
    seed: int = 0,
    may_be: Callable[[Any, Any], bool] = equal,
) -> str:
    """Read damaged copies of a file for some seconds; returns the number of each outcome.

    Args:
        file: a valid file; each mutant replaces it, and it is restored.
        read: reads it, and returns plain values, arrays, or mappings and sequences of them.
        errors: those of the package that may refuse a mutant; their messages must have the file's name.
        seconds: duration.
        seed: of the damages.
        may_be: whether a result may differ in this way from that of the valid file: `alike` for a format without a
            checksum.

    Raises:
        AssertionError: a mutant raised anything else, or gave another result; the message has its number.
    """
    data, draw, number = file.read_bytes(), random.Random(seed), 0
    expected, counts, longest = read(), {"refused": 0, "equal": 0, "other values": 0}, 0.0
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            number += 1
            # A file that is mapped must not be cut short.
            file.unlink()
            file.write_bytes(mutant(data, draw))
            began = time.monotonic()
            try:
                found = read()
            except errors as error:
                assert file.name in str(error), f"mutant {number} of seed {seed}: {error!r} does not name {file.name}"
                counts["refused"] += 1
            except Exception as error:
                raise AssertionError(
                    f"mutant {number} of seed {seed} of {file.name}:\n{traceback.format_exc()}"
                ) from error
            else:
                same = equal(found, expected)
                assert same or may_be(found, expected), f"mutant {number}, seed {seed}, of {file.name} became {found!r}"
                counts["equal" if same else "other values"] += 1
            longest = max(longest, time.monotonic() - began)
    finally:
        file.unlink()
        file.write_bytes(data)
    assert longest < 60
    said = ", ".join(f"{count} {name}" for name, count in counts.items())
    return f"{file.name}: {number} mutants, {said}; the slowest took {longest:.2f} s"
