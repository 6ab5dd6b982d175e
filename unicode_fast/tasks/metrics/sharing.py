"""Measures of code sharing: the same codeword for the same event in all modalities.

`docs/sharing.md` explains the measures beside the paper's Figure 4 and the released code's equal_num.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Any

import numpy as np
import torch
from scipy.stats import entropy
from sklearn.metrics import accuracy_score, mutual_info_score

from unicode_fast.data import ClipSet, StoreError
from unicode_fast.tasks.classification import Classification
from unicode_fast.tasks.encoded import EncodedDataset, View
from unicode_fast.tasks.probe import EncodedClips, all_clips
from unicode_fast.tasks.table import with_rule


@dataclass(frozen=True)
class Sharing:
    """Measures of one split, by modality, such as "audio", or by a pair of modalities.

    Attributes:
        clips: those of the split that have a modality, by modality.
        codes_in_use: codewords with at least one use.
        perplexity: exponential of the entropy of a modality's uses.
        shared_codewords: codewords of which at least two modalities have a fifth of the uses or more each.
        shared_uses: share of a modality's uses on shared codewords.
        shared_event_uses: the same at positions with an event, for modalities with labels per position.
        overlap: sum over codewords of the smaller of two modalities' shares of uses, by "audio-video".
        agreement: share of positions where two modalities with a common time axis have the same code, in clips that
            have both.
        agreement_by_chance: the same for independent draws from each modality's uses.
        class_information: mutual information in nats of the class of a clip and a modality's code at a position.
            "audio->video" maps each code of video to audio's most frequent class of this code.
        class_entropy: in nats, weighted by the clips' positions; the upper bound of the information.
        equal_clips: share of clips with the same most frequent code in all modalities, of those that have all; None
            without any, and for unpaired clips.
    """

    clips: dict[str, float]
    codes_in_use: dict[str, float]
    perplexity: dict[str, float]
    shared_codewords: float
    shared_uses: dict[str, float]
    shared_event_uses: dict[str, float]
    overlap: dict[str, float]
    agreement: dict[str, float]
    agreement_by_chance: dict[str, float]
    class_information: dict[str, float]
    class_entropy: dict[str, float]
    equal_clips: float | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a summary."""
        return dataclasses.asdict(self)


def mean_sharing(several: Sequence[Sharing]) -> Sharing:
    """Means over seeds, for the entries of all seeds."""

    def mean(values: Sequence[Any]) -> Any:
        if isinstance(values[0], dict):
            return {key: mean([one[key] for one in values]) for key in values[0] if all(key in one for one in values)}
        return None if None in values else statistics.fmean(values)

    found = [one.as_dict() for one in several]
    return Sharing(**{name: mean([one[name] for one in found]) for name in found[0]})


def shared_codewords(counts: np.ndarray) -> np.ndarray:
    """Codewords of which at least two modalities have a fifth of the uses or more each.

    Args:
        counts: (modalities, M) integers.

    Returns:
        (M,) bool.
    """
    # Integers are compared, because a fifth is no binary fraction.
    return ((counts * 5 >= counts.sum(0)) & (counts > 0)).sum(0) >= 2


def measure_sharing(encoded: EncodedDataset, split: str, *, content: bool = False) -> Sharing:
    """Code sharing on a split, encoder frozen.

    Args:
        encoded: the model's codes of a data set.
        split: of the clips.
        content: count only content words, where the data mark them.
    """
    names, tokens = encoded.names, encoded.model.codewords
    view: View = "content" if content else "tokens"
    codes = {name: encoded.codes(split, name, view) for name in names}
    clips = {name: encoded.clips(split, name) for name in names}
    counts = np.stack([np.bincount(_uses(codes[name]), minlength=tokens) for name in names])  # (modalities, M)
    share = dict(zip(names, counts / counts.sum(1, keepdims=True), strict=True))
    shared = shared_codewords(counts)
    events = {
        name: _uses(codes[name], np.any(all_clips(each.labels[name])[..., :-1] > 0, axis=-1))
        for name, each in clips.items()
        if name in each.labels
    }
    pairs = list(combinations(names, 2))
    paired = [pair for pair in pairs if encoded.paired(split, *pair)]
    aligned = [pair for pair in paired if encoded.aligned(split, *pair)]
    same = {pair: _same_positions(*_common(encoded, split, pair, codes)) for pair in aligned}
    same = {pair: both for pair, both in same.items() if len(both[0])}
    whole = _common(encoded, split, names, codes) if paired == pairs else []
    information, most = _class_information(codes, {name: _classes(each, name) for name, each in clips.items()}, tokens)
    return Sharing(
        clips={name: len(each) for name, each in clips.items()},
        codes_in_use=dict(zip(names, (counts > 0).sum(1).tolist(), strict=True)),
        perplexity={name: float(np.exp(entropy(one))) for name, one in share.items()},
        shared_codewords=int(shared.sum()),
        shared_uses={name: float(shared[_uses(codes[name])].mean()) for name in names},
        shared_event_uses={name: float(shared[uses].mean()) for name, uses in events.items() if uses.size},
        overlap={f"{one}-{other}": float(np.minimum(share[one], share[other]).sum()) for one, other in pairs},
        agreement={"-".join(pair): float(accuracy_score(*both)) for pair, both in same.items()},
        agreement_by_chance={"-".join(pair): _by_chance(*both, tokens) for pair, both in same.items()},
        class_information=information,
        class_entropy=most,
        equal_clips=_equal_clips(whole) if whole and len(whole[0]) else None,
    )


def _uses(codes: EncodedClips, positions: np.ndarray | None = None) -> np.ndarray:
    """(uses,) int64, the code at every valid position within (clips, T) `positions`."""
    mask = codes.mask.numpy()
    return codes.code.numpy()[mask if positions is None else mask & positions]


def _common(
    encoded: EncodedDataset, split: str, names: Sequence[str], codes: Mapping[str, EncodedClips]
) -> list[EncodedClips]:
    """The codes of the clips that have all of some paired modalities."""
    places = encoded.common(split, *names)
    return [codes[name].select(torch.from_numpy(own)) for name, own in zip(names, places, strict=True)]


def _same_positions(one: EncodedClips, other: EncodedClips) -> tuple[np.ndarray, np.ndarray]:
    """(positions,) int64 twice, the codes at positions that are valid in both."""
    both = (one.mask & other.mask).numpy()
    return one.code.numpy()[both], other.code.numpy()[both]


def _by_chance(one: np.ndarray, other: np.ndarray, tokens: int) -> float:
    first, second = (np.bincount(uses, minlength=tokens) / len(uses) for uses in (one, other))
    return float(first @ second)


def _classes(clips: ClipSet, name: str) -> np.ndarray | None:
    """(clips,) int64; None where clips have no classes."""
    try:
        return Classification().truth(clips, name).numpy()
    except StoreError:
        return None


def _class_information(
    codes: Mapping[str, EncodedClips], classes: Mapping[str, np.ndarray | None], tokens: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Information about the class by modality and by pair, and the entropy of the class by modality."""
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, truth in classes.items():
        if truth is not None:
            mask = codes[name].mask.numpy()
            found[name] = _uses(codes[name]), np.broadcast_to(truth[:, None], mask.shape)[mask]
    information = {name: float(mutual_info_score(truth, uses)) for name, (uses, truth) in found.items()}
    for source, target in permutations(found, 2):
        uses, truth = found[source]
        table = np.zeros((tokens, truth.max() + 1), np.int64)
        np.add.at(table, (uses, truth), 1)
        majority = np.where(table.any(1), table.argmax(1), -1)  # -1: a code that the source never uses
        uses, truth = found[target]
        information[f"{source}->{target}"] = float(mutual_info_score(truth, majority[uses]))
    return information, {name: float(entropy(np.bincount(truth))) for name, (_, truth) in found.items()}


def _equal_clips(codes: Sequence[EncodedClips]) -> float:
    """Share of clips with the same most frequent code in all modalities; ties take the smallest number."""
    most = [
        [np.bincount(clip[valid]).argmax() for clip, valid in zip(one.code.numpy(), one.mask.numpy(), strict=True)]
        for one in codes
    ]
    return float(np.mean([all(code == codes[0] for code in codes) for codes in zip(*most, strict=True)]))


def format_sharing(sharing: Sharing) -> str:
    """Two tables for a terminal: one line per modality, and one per pair."""
    percent = "{:.0f} %".format
    modalities = [("modality", "codes", "perplexity", "shared uses", "with an event", "class information")]
    for name in sharing.clips:
        event = sharing.shared_event_uses.get(name)
        modalities.append(
            (
                name,
                f"{sharing.codes_in_use[name]:.4g}",
                f"{sharing.perplexity[name]:.1f}",
                percent(100 * sharing.shared_uses[name]),
                "-" if event is None else percent(100 * event),
                _of_entropy(sharing, name, name),
            )
        )
    pairs = [("pair", "overlap of use", "same code", "by chance", "information ->", "information <-")]
    for name, overlap in sharing.overlap.items():
        one, other = name.split("-")
        same = sharing.agreement.get(name)
        pairs.append(
            (
                name,
                percent(100 * overlap),
                "-" if same is None else percent(100 * same),
                "-" if same is None else percent(100 * sharing.agreement_by_chance[name]),
                _of_entropy(sharing, f"{one}->{other}", other),
                _of_entropy(sharing, f"{other}->{one}", one),
            )
        )
    return f"{with_rule(modalities, left=1)}\n\n{with_rule(pairs, left=1)}"


def _of_entropy(sharing: Sharing, key: str, modality: str) -> str:
    """Information and its upper bound, in nats."""
    if key not in sharing.class_information:
        return "-"
    return f"{sharing.class_information[key]:.2f} of {sharing.class_entropy[modality]:.2f}"
