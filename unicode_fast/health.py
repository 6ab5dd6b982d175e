"""Warnings about doubtful numbers of a run, with what to check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unicode_fast.tasks import Row

LEAST_PERPLEXITY = 2.0
# What is learned without transfer, then what a score at chance means, there and for zero-shot transfer.
_CLOSED = (
    "even if trained and tested on the same modality",
    "labels are learned within the modality",
    "Labels are not learned, so zero-shot scores mean nothing. Check the labels of those clips, the codes in use, and "
    "the number of training clips",
    "The modalities share no codes for it. Check the overlap of use, and train longer",
)
_OPEN = (
    *_CLOSED[:2],
    "Known classes are not learned, or clips of unknown classes are as confident as known ones. evaluate shows which: "
    "os_star for the first, unk and auroc for the second",
    "Known classes are not transferred, or the threshold of one modality does not suit the other. evaluate shows "
    "which: oscr needs no threshold",
)
_RETRIEVAL = (
    "even with a head trained on the tested pair",
    "a head trained on the tested pair finds clips",
    "The codes do not tell clips apart, so zero-shot R@10 means nothing. Check that the clips are paired, the codes in "
    "use, and the number of training clips",
    _CLOSED[3],
)


def collapsed(
    used: Mapping[str, float], perplexity: Mapping[str, float], codewords: int, what: str = "codewords"
) -> dict[str, str]:
    """Modalities with a collapsed codebook, with a warning each.

    The perplexity p of a modality's codeword usage bounds its information. The mutual information of a code and a class
    is at most log p. Below 2 this is less than one bit a position, the information of two equally frequent codewords.
    The limit does not depend on the number of classes, because the positions of a clip add up. Ten positions of 20
    codewords are enough for 100 classes. Each modality is checked alone, because modalities that have collapsed to one
    codeword each use several together. Good training never fell below 3.8 on the built-in data. Text of the preset
    official collapses and is at 1 to 2. Data whose events fill less than about a tenth of the time, with one codeword
    for the rest, cause a warning too.

    Args:
        used: codewords in use, by modality.
        perplexity: exponential of the entropy of codeword usage, by modality.
        codewords: M.
        what: is counted, for a model of several codebooks.
    """
    return {
        name: f"the codebook has collapsed for {name}: {used[name]:.4g} of {codewords} {what} in use, perplexity "
        f"{perplexity[name]:.2f}, below {LEAST_PERPLEXITY:g}, less than one bit a code. Check the range and variety of "
        f"{name}'s features, then learning_rate, codewords, codebook_init and reset_after"
        for name in used
        # Without a use, no clip had the modality.
        if used[name] and perplexity[name] < LEAST_PERPLEXITY
    }


def at_chance(rows: Sequence[Row]) -> list[str]:
    """Warnings for tasks of a table: nothing is learned within a modality, or zero-shot scores are at chance.

    Args:
        rows: of one table.
    """
    warnings = []
    for task, protocol in dict.fromkeys((row.task, row.protocol) for row in rows):
        measure = " R@10" if task == "retrieval" else ""
        texts = _RETRIEVAL if measure else _OPEN if task.endswith("open-classification") else _CLOSED
        upper, learned, unlearned_means, carried_means = texts
        those = [row for row in rows if (row.task, row.protocol) == (task, protocol)]
        unlearned = {_without_transfer(row): row for row in those if not row.learnable}
        if unlearned:
            scores = ", ".join(
                f"{name} {_beside_chance(row.same_modality, row.same_interval, row.chance)}"
                for name, row in unlearned.items()
            )
            warnings.append(f"{task}:{measure} not above chance {upper} ({scores}). {unlearned_means}")
        carried = [row for row in those if row.learnable and not row.above_chance]
        if carried:
            scores = ", ".join(
                f"{row.direction} {_beside_chance(row.score, row.interval, row.chance)}" for row in carried
            )
            warnings.append(
                f"{task}: zero-shot{measure} not above chance ({scores}), though {learned}. {carried_means}"
            )
    return warnings


def _without_transfer(row: Row) -> str:
    """The modality, or of retrieval the pair of modalities, of a row's same-modality score."""
    if row.task != "retrieval":
        return row.target
    return row.direction if row.anchor is None else f"{row.target}->{row.anchor}"


def _beside_chance(score: float, interval: tuple[float, float] | None, chance: float) -> str:
    """A score, its interval and chance in per cent; a score above chance has one, even if its ends are not known."""
    if interval is None:
        inside = ", inside the score's 95 % interval" if score > chance else ""
        return f"{100 * score:.1f} % against {100 * chance:.1f} %{inside}"
    low, high = (100 * end for end in interval)
    return f"{100 * score:.1f} %, 95 % interval {low:.1f} to {high:.1f} %, against {100 * chance:.1f} %"
