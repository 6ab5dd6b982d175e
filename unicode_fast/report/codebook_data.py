"""What each codeword stands for in a split: who uses it, for which class, and in which clips most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from unicode_fast.data import ClipSet, StoreError
from unicode_fast.tasks import Evaluator, Sharing
from unicode_fast.tasks.classification import Classification
from unicode_fast.tasks.encoded import EncodedDataset
from unicode_fast.tasks.metrics.sharing import shared_codewords
from unicode_fast.tasks.probe import EncodedClips


@dataclass(frozen=True)
class Example:
    """A clip that uses a codeword.

    Attributes:
        clip: its number among the clips of the modality.
        positions: those with the codeword, ascending.
    """

    clip: int
    positions: tuple[int, ...]

    @property
    def middle(self) -> int:
        """The middle of the longest run of positions, the first one of equal runs."""
        runs = np.split(np.array(self.positions), np.flatnonzero(np.diff(self.positions) > 1) + 1)
        longest = max(runs, key=len)
        return int(longest[(len(longest) - 1) // 2])


@dataclass(frozen=True)
class Codeword:
    """A codeword with at least one use.

    Attributes:
        code: its number.
        uses: number of positions with the codeword, by modality.
        shared: at least two modalities have a fifth of the uses or more each.
        agreement: by pair of modalities, such as "audio-video": of both modalities' uses at common positions, the share
            whose partner at the same position has the same codeword. A pair without a common time axis is compared by
            clips: of both modalities' clips with the codeword, the share that has it in the other modality too.
        label: name of the most frequent class, and its share of the uses in clips with a class; None without classes.
        examples: by modality, the clips with most uses of the codeword.
    """

    code: int
    uses: dict[str, int]
    shared: bool
    agreement: dict[str, float]
    label: tuple[str, float] | None
    examples: dict[str, list[Example]]

    @property
    def group(self) -> str:
        """One of "shared", "mostly" where one modality has most uses, and "one" where no other has any."""
        if self.shared:
            return "shared"
        return "mostly" if sum(uses > 0 for uses in self.uses.values()) > 1 else "one"


@dataclass(frozen=True)
class CodebookUse:
    """The use of a codebook in one split.

    Attributes:
        split: its name.
        sharing: measures by kind of words, as in a run's summary.json.
        pairs: by key, such as "audio-video", the pairs of modalities of the same clips.
        timed: keys of pairs with a common time axis.
        counts: (modalities, codewords) uses, in the order of `names`.
        names: the modalities.
        codewords: those with uses, the most used first, as many as were asked for.
    """

    split: str
    sharing: dict[str, Sharing]
    pairs: dict[str, tuple[str, str]]
    timed: set[str]
    counts: np.ndarray
    names: list[str]
    codewords: list[Codeword]

    @property
    def used(self) -> int:
        """Number of codewords with at least one use."""
        return int(self.counts.any(0).sum())

    @property
    def dead(self) -> np.ndarray:
        """Numbers of the codewords without a use."""
        return np.flatnonzero(~self.counts.any(0))

    @property
    def lonely(self) -> dict[str, int]:
        """Number of codewords that only this modality uses."""
        alone = (self.counts > 0).sum(0) == 1
        return {name: int((alone & (uses > 0)).sum()) for name, uses in zip(self.names, self.counts, strict=True)}


def measure_codebook(
    evaluator: Evaluator,
    split: str,
    most: int,
    clips: int,
    contents: Mapping[str, Sequence[str]] | None = None,
) -> CodebookUse:
    """Measures the use of each codeword.

    Args:
        evaluator: of the model on the data.
        split: of the clips.
        most: number of codewords that are described; the most used ones, the smaller number of equals.
        clips: examples of each codeword and modality.
        contents: by modality, the content of each clip; of clips with the same content the first is shown.

    Raises:
        ValueError: the data have no such split, or a clip has no valid position.
    """
    encoded = evaluator.home
    names = encoded.names
    codes = {name: encoded.codes(split, name, "tokens") for name in names}
    of = {name: encoded.clips(split, name) for name in names}
    counts = np.stack(
        [np.bincount(one.code[one.mask].numpy(), minlength=encoded.model.codewords) for one in codes.values()]
    )
    total = counts.sum(0)
    order = np.argsort(-total, kind="stable")
    chosen = order[: min(most, int((total > 0).sum()))]
    shared = shared_codewords(counts)
    pairs = [pair for pair in combinations(names, 2) if of_one_set(encoded, split, pair)]
    timed = {pair for pair in pairs if encoded.aligned(split, *pair)}
    agreement = {
        "-".join(pair): _agreement(
            [codes[name] for name in pair], [of[name].index for name in pair], pair in timed, total
        )
        for pair in pairs
    }
    labels = _labels(codes, of, chosen)
    examples = {name: _examples(codes[name], chosen, clips, (contents or {}).get(name)) for name in names}
    return CodebookUse(
        split,
        evaluator.sharing(split),
        {"-".join(pair): pair for pair in pairs},
        {"-".join(pair) for pair in timed},
        counts,
        names,
        [
            Codeword(
                int(code),
                dict(zip(names, counts[:, code].tolist(), strict=True)),
                bool(shared[code]),
                {pair: float(share[code]) for pair, share in agreement.items() if not np.isnan(share[code])},
                labels[place] if labels else None,
                {name: found[place] for name, found in examples.items()},
            )
            for place, code in enumerate(chosen)
        ],
    )


def of_one_set(encoded: EncodedDataset, split: str, pair: tuple[str, str]) -> bool:
    """Whether two modalities are of the same clips."""
    return any(set(pair) <= set(clips.modalities) for clips in encoded.dataset.clip_sets(split))


def _agreement(
    codes: Sequence[EncodedClips], numbers: Sequence[np.ndarray], timed: bool, total: np.ndarray
) -> np.ndarray:
    """(codewords,) share of each codeword's uses, by positions or by clips, that both modalities have; NaN without any.

    Args:
        codes: of two modalities.
        numbers: of their clips in the split; some clips may have only one of the modalities.
        timed: positions are compared, else clips.
        total: (codewords,), for their number.
    """
    _, *places = np.intersect1d(numbers[0], numbers[1], return_indices=True)
    code, mask = (
        [getattr(one, key).numpy()[place] for one, place in zip(codes, places, strict=True)] for key in ("code", "mask")
    )
    size = len(total)
    if timed:
        both = mask[0] & mask[1]
        one, other = code[0][both], code[1][both]
        same = np.bincount(one[one == other], minlength=size)
        all_uses = np.bincount(one, minlength=size) + np.bincount(other, minlength=size)
    else:
        clip = np.arange(len(places[0]))[:, None]
        uses = [np.unique((clip * size + each)[valid]) for each, valid in zip(code, mask, strict=True)]
        same = np.bincount(np.intersect1d(uses[0], uses[1]) % size, minlength=size)
        all_uses = np.bincount(np.concatenate(uses) % size, minlength=size)
    return np.divide(2.0 * same, all_uses, out=np.full(size, np.nan), where=all_uses > 0)


def _places(chosen: np.ndarray, codes: EncodedClips) -> tuple[np.ndarray, np.ndarray]:
    """Place in `chosen`, and clip, of each use of a chosen codeword."""
    valid = codes.mask.numpy()
    clip, code = np.nonzero(valid)[0], codes.code.numpy()[valid]
    sorter = np.argsort(chosen, kind="stable")
    place = sorter[np.minimum(np.searchsorted(chosen, code, sorter=sorter), len(chosen) - 1)]
    found = chosen[place] == code
    return place[found], clip[found]


def _labels(
    codes: Mapping[str, EncodedClips], clips: Mapping[str, ClipSet], chosen: np.ndarray
) -> list[tuple[str, float] | None]:
    """The most frequent class of each codeword and its share; empty without classes."""
    table: np.ndarray | None = None
    for name, one in clips.items():
        try:
            truth = Classification().truth(one, name).numpy()
        except StoreError:
            continue
        if table is None:
            table = np.zeros((len(chosen), len(one.classes)), np.int64)
        place, clip = _places(chosen, codes[name])
        np.add.at(table, (place, truth[clip]), 1)
        classes = one.classes
    if table is None:
        return []
    return [(classes[int(row.argmax())], float(row.max() / row.sum())) if row.any() else None for row in table]


def _examples(
    codes: EncodedClips, chosen: np.ndarray, clips: int, contents: Sequence[str] | None
) -> list[list[Example]]:
    """By codeword, the clips with most uses; of equal ones the earlier clip."""
    place, clip = _places(chosen, codes)
    pairs, uses = np.unique(place * len(codes) + clip, return_counts=True)
    place, clip = np.divmod(pairs, len(codes))
    order = np.lexsort((clip, -uses, place))
    ends = np.searchsorted(place, np.arange(len(chosen) + 1))
    code, mask = codes.code.numpy(), codes.mask.numpy()
    found: list[list[Example]] = []
    for number, codeword in enumerate(chosen):
        shown: dict[str, int] = {}
        for one in clip[order[ends[number] : ends[number + 1]]].tolist():
            if len(shown) == clips:
                break
            shown.setdefault(str(one) if contents is None else contents[one], one)
        found.append(
            [
                Example(one, tuple(np.flatnonzero((code[one] == codeword) & mask[one]).tolist()))
                for one in shown.values()
            ]
        )
    return found
