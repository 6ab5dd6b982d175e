"""Checks of the arrays of a feature store; every public function raises `StoreError` or returns nothing."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from unicode_fast.config import Modality
from unicode_fast.data.lazy import ClipArray

FEATURE_DTYPES = ("float16", "float32", "float64")
# Arrays are checked in chunks of about this many values, so a memory-mapped array may exceed the memory.
_CHUNK_VALUES = 1 << 22


class StoreError(ValueError):
    """The contents of a feature store are invalid."""


class DamagedStoreError(StoreError):
    """A file of a feature store is missing, cut short, or differs from its checksum."""


def check_names(modalities: Mapping[str, Modality], classes: Sequence[str]) -> None:
    """Raise unless there are modalities and all names are valid."""
    if len(modalities) == 0:
        raise StoreError("modalities must name at least one modality, got none")
    for name, modality in modalities.items():
        check_name("a modality name", name, "_-")
        if not isinstance(modality, Modality):
            raise StoreError(f"modality {name!r} must be a Modality, got {type(modality).__name__}")
    if isinstance(classes, str):
        raise StoreError(f"classes must be a list of names, got str {classes!r}")
    if len(set(classes)) != len(classes) or not all(isinstance(name, str) for name in classes):
        raise StoreError(f"classes must be different strings, got {list(classes)}")


def check_name(what: str, name: str, others: str) -> None:
    """Raise unless a name consists of ASCII letters, digits and the characters in `others`."""
    if not isinstance(name, str) or not re.fullmatch(rf"[A-Za-z0-9{re.escape(others)}]+", name):
        raise StoreError(f"{what} must consist of letters, digits and any of {others!r}, got {name!r}")


def check_split(
    split: str, arrays: Mapping[str, ClipArray], modalities: Mapping[str, Modality], classes: Sequence[str]
) -> None:
    """Raise unless keys, dtypes and shapes of one split are consistent."""
    check_name("a split name", split, "_.")
    for name in modalities:
        if name not in arrays:
            raise StoreError(f"split {split!r} must hold features of modality {name!r}, got keys {sorted(arrays)}")
    clips = len(arrays[next(iter(modalities))]) if arrays[next(iter(modalities))].ndim else 0
    if clips == 0:
        raise StoreError(f"split {split!r} must hold at least one clip, got none")
    for key, array in arrays.items():
        check_name(f"a key of split {split!r}", key, "_-.")
        where = f"array {key!r} of split {split!r}"
        if array.dtype.hasobject:
            raise StoreError(f"{where} must have a plain dtype, got {array.dtype}")
        if array.ndim == 0 or len(array) != clips:
            raise StoreError(f"{where} must have {clips} clips first, got shape {array.shape}")
    for name, modality in modalities.items():
        _check_features(f"array {name!r} of split {split!r}", arrays[name], modality)
    for key in arrays:
        _check_companion(split, key, arrays, modalities, classes)


def _check_features(where: str, array: ClipArray, modality: Modality) -> None:
    if array.dtype.name not in FEATURE_DTYPES:
        raise StoreError(f"{where} must be one of {', '.join(FEATURE_DTYPES)}, got {array.dtype}")
    if array.ndim < 2 or array.shape[2:] != modality.shape or array.shape[1] == 0:
        expected = ", ".join(str(size) for size in ("clips", "T >= 1", *modality.shape))
        raise StoreError(f"{where} must have shape ({expected}), got {array.shape}")


def _check_companion(
    split: str,
    key: str,
    arrays: Mapping[str, ClipArray],
    modalities: Mapping[str, Modality],
    classes: Sequence[str],
) -> None:
    """Check "class", "<modality>.label" and "<modality>.length"."""
    array, where = arrays[key], f"array {key!r} of split {split!r}"
    owner, _, role = key.rpartition(".")
    if role in ("label", "length") and owner not in modalities:
        raise StoreError(f"{where} must belong to one of the modalities {sorted(modalities)}, got {owner!r}")
    if key == "class" and (array.dtype != np.int64 or array.ndim != 1):
        raise StoreError(f"{where} must be (clips,) int64, got {array.shape} {array.dtype}")
    if role == "length" and (array.dtype != np.int64 or array.ndim != 1):
        raise StoreError(f"{where} must be (clips,) int64, got {array.shape} {array.dtype}")
    if role == "label":
        expected = (len(array), arrays[owner].shape[1], len(classes) + 1)
        if array.shape != expected or array.dtype.name not in ("uint8", "float32"):
            raise StoreError(f"{where} must be {expected} uint8 or float32, got {array.shape} {array.dtype}")


def check_values(
    split: str, arrays: Mapping[str, ClipArray], modalities: Mapping[str, Modality], classes: Sequence[str]
) -> None:
    """Raise unless features are finite, labels in [0, 1], lengths in [0, T], classes in [0, C), no clip is empty."""
    positions = {name: arrays[name].shape[1] for name in modalities}
    for key, array in arrays.items():
        check_array_values(split, key, array, positions, len(classes))
    check_present(split, arrays, modalities)


def check_present(split: str, arrays: Mapping[str, ClipArray], modalities: Mapping[str, Modality]) -> None:
    """Raise if a clip has none of the modalities: each may have length 0 in some clips, but not all in one."""
    keys = [f"{name}.length" for name in modalities]
    if all(key in arrays for key in keys):
        empty = np.all([np.asarray(arrays[key]) == 0 for key in keys], axis=0)
        if empty.any():
            clip = int(empty.argmax())
            name = f" {np.asarray(arrays['id'])[clip].item()!r}" if "id" in arrays else ""
            raise StoreError(
                f"split {split!r} must have one of {', '.join(modalities)} in every clip, got none in clip {clip}{name}"
            )


def check_written(split: str, arrays: Mapping[str, np.ndarray], modalities: Mapping[str, Modality]) -> None:
    """Raise unless ids are unique and features are zero after the end of a clip.

    Public data sets may violate these rules; stores from arrays must not.
    """
    if "id" in arrays:
        names, counts = np.unique(arrays["id"], return_counts=True)
        if len(names) < len(arrays["id"]):
            twice = names[counts > 1][0].item()
            raise StoreError(f"array 'id' of split {split!r} must name each clip once, got {twice!r} more than once")
    for name in modalities:
        if f"{name}.length" not in arrays:
            continue
        features, lengths = arrays[name], arrays[f"{name}.length"]
        for clip in np.flatnonzero(lengths < features.shape[1]):
            if np.any(features[clip, lengths[clip] :]):
                raise StoreError(
                    f"array {name!r} of split {split!r} must be 0 after the end of a clip, got other values in clip "
                    f"{clip} of length {lengths[clip]}"
                )


def check_array_values(
    split: str, key: str, array: ClipArray, positions: Mapping[str, int], classes: int, first: int = 0
) -> None:
    """Raise unless the values of an array, or of some of its clips, satisfy `check_values`.

    Args:
        split: name of the split, for the error.
        key: key of the array.
        array: clips first.
        positions: T by modality.
        classes: C.
        first: number of the array's first clip in the split.
    """
    owner, _, role = key.rpartition(".")
    must = ""
    good: Callable[[np.ndarray], np.ndarray] | None = None
    if key in positions:
        must, good = "hold finite values", np.isfinite
    elif key == "class":
        must, good = f"lie in [0, {classes})", functools.partial(_is_within, low=0, top=classes - 1)
    elif role == "label":
        must, good = "lie in [0, 1]", functools.partial(_is_within, low=0, top=1)
    elif role == "length":
        must, good = f"lie in [0, {positions[owner]}]", functools.partial(_is_within, low=0, top=positions[owner])
    if good is not None:
        _check_each_clip(f"array {key!r} of split {split!r}", array, must, good, first)


def _is_within(chunk: np.ndarray, low: int, top: int) -> np.ndarray:
    return (chunk >= low) & (chunk <= top)


def _check_each_clip(
    where: str, array: ClipArray, must: str, is_good: Callable[[np.ndarray], np.ndarray], first: int
) -> None:
    """Raise with the number of the first clip with a bad value, and that value."""
    count = max(1, _CHUNK_VALUES // max(1, int(np.prod(array.shape[1:]))))
    for start in range(0, len(array), count):
        chunk = np.asarray(array[start : start + count])
        good = is_good(chunk)
        if not good.all():
            place = np.unravel_index(np.argmin(good), good.shape)
            raise StoreError(f"{where} must {must}, got {chunk[place]} in clip {first + start + int(place[0])}")
