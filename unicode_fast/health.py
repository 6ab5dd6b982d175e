"""What the numbers of a run give reason to doubt, as sentences that name what to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unicode_fast.tasks import Row

LEAST_PERPLEXITY = 2.0


def collapsed(used: Mapping[str, float], perplexity: Mapping[str, float], codewords: int) -> dict[str, str]:
    """Modalities whose codes say next to nothing, with a sentence each.

    The perplexity p of a modality's use of the codebook bounds what a code can say: the information between a code and
    a class, or anything else, is at most log p. Below 2 that is less than one bit a step, less than two equally
    frequent codewords say. It is no fraction of the classes, as a clip's steps add up: ten steps of 20 codewords are
    enough for 100 classes. Modalities count one by one, for those that have collapsed to a codeword each use several
    together. Training that went well never came below 3.8 on the built-in data; text of the preset official, which
    collapses, is at 1 to 2. Data whose events fill under about a tenth of the time, all else being one codeword, are
    named too.

    Args:
        used: codewords in use, by modality.
        perplexity: exponential of the entropy of the use, by modality.
        codewords: M.
    """
    return {
        name: f"the codebook has collapsed for {name}: {used[name]:.4g} of {codewords} codewords in use, perplexity "
        f"{perplexity[name]:.2f}, below {LEAST_PERPLEXITY:g}, so that a code says less than one bit; look at the range "
        f"and variety of {name}'s features, then at learning_rate, codewords, codebook_init and revive_after"
        for name in used
        if perplexity[name] < LEAST_PERPLEXITY
    }


def at_chance(rows: Sequence[Row]) -> list[str]:
    """What the scores of a table do not show, a sentence for each task: labels not learned, nothing carried over.

    Args:
        rows: of one table.
    """
    said = []
    for task, protocol in dict.fromkeys((row.task, row.protocol) for row in rows):
        those = [row for row in rows if (row.task, row.protocol) == (task, protocol)]
        unlearned = {row.target: row for row in those if not row.learnable}
        if unlearned:
            scores = ", ".join(f"{name} {_beside_chance(row.same_modality, row)}" for name, row in unlearned.items())
            said.append(
                f"{task}: not above chance even where trained and tested on the same modality ({scores}), so its "
                "labels are not learned and zero-shot scores say nothing; look at the labels of those clips, at the "
                "codes in use, and at the number of training clips"
            )
        carried = [row for row in those if row.learnable and not row.above_chance]
        if carried:
            scores = ", ".join(f"{row.direction} {_beside_chance(row.score, row)}" for row in carried)
            said.append(
                f"{task}: zero-shot not above chance ({scores}), though labels are learned within the modality; the "
                "modalities do not share codes for it: look at the overlap of use, and train longer"
            )
    return said


def _beside_chance(score: float, row: Row) -> str:
    return f"{100 * score:.1f} % against {100 * row.chance:.1f} %"
