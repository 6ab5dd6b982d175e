"""Facts of the published lists: their counts, the names of their classes, and the classes that two data sets share.

Source:
    The lists in the public repository EMuLeMultimodal/CoDAAR, which are those of haihuangcode/CMG and one of 90K clips;
    that of UCF-51 in haihuangcode/CMG, ICCV25-OSCMG; the splits of AVE (Tian et al., ECCV 2018).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unicode_fast.data.layouts.index import Note


@dataclass(frozen=True)
class PublishedList:
    """Counts of a published list.

    Attributes:
        clips: number of clips by split; one entry with any name for a list without splits.
        classes: number of classes with clips; None if the list has none.
    """

    clips: Mapping[str, int]
    classes: int | None = None

    def __str__(self) -> str:
        splits = ", ".join(f"{split} {count:,}" for split, count in self.clips.items())
        classes = "" if self.classes is None else f" of {self.classes} classes"
        return f"{sum(self.clips.values()):,} clips{f' ({splits})' if len(self.clips) > 1 else ''}{classes}"


AVEL_40K = PublishedList({"train": 24_515, "val": 8_171, "test": 8_115}, 141)
AVEL_90K = PublishedList({"train": 53_598, "val": 16_858, "test": 16_867}, 141)
AVE = PublishedList({"train": 3_339, "val": 402, "test": 402})
AVVP = {"audio": PublishedList({"test": 1_846}), "video": PublishedList({"test": 1_661})}
AVE_AVVP_TEST = {"audio": PublishedList({"test": 1_085}), "video": PublishedList({"test": 1_032})}
UCF_VGGSOUND = {"video": PublishedList({"all": 2_003}, 15), "audio": PublishedList({"all": 4_813}, 15)}
UCF51 = PublishedList({"all": 6_831}, 51)

# The classes of AVE→AVVP in the order of AVE_AVVP_Categories.txt, each with its class of AVE and its clips there.
AVE_AVVP_CLASSES: Mapping[str, tuple[str, int]] = {
    "Dog": ("Bark", 171),
    "Car": ("Race car, auto racing", 188),
    "Helicopter": ("Helicopter", 178),
    "Violin_fiddle": ("Violin, fiddle", 187),
    "Frying_(food)": ("Frying (food)", 182),
    "Motorcycle": ("Motorcycle", 99),
    "Acoustic_guitar": ("Acoustic guitar", 186),
    "Banjo": ("Banjo", 183),
    "Baby_cry_infant_cry": ("Baby cry, infant cry", 83),
    "Chainsaw": ("Chainsaw", 160),
    "Cat": ("Cat", 60),
    "Accordion": ("Accordion", 154),
}
AVE_AVVP_TRAIN = PublishedList({"train": sum(clips for _, clips in AVE_AVVP_CLASSES.values())}, len(AVE_AVVP_CLASSES))
# The number of clips in AVE's feature and label files.
AVE_CLIPS = sum(AVE.clips.values())

# The common classes of UCF-101 and VGGSound in the order of their files. The published UCF-101 file has "Bowling" with
# a tab and a second word, which no row of its list matches: that list has no bowling, and VGGSound's no frisbee.
UCF_VGGSOUND_CLASSES = (
    ("PlayingGuitar", "playing acoustic guitar"),
    ("PlayingCello", "playing cello"),
    ("Skiing", "skiing"),
    ("TableTennisShot", "playing table tennis"),
    ("Typing", "typing on typewriter"),
    ("JumpRope", "rope skipping"),
    ("FrisbeeCatch", "playing frisbee"),
    ("PlayingFlute", "playing flute"),
    ("PlayingPiano", "playing piano"),
    ("Basketball", "basketball bounce"),
    ("Bowling", "bowling impact"),
    ("PlayingSitar", "playing sitar"),
    ("VolleyballSpiking", "playing volleyball"),
    ("PlayingTabla", "playing tabla"),
    ("SkateBoarding", "skateboarding"),
    ("PlayingViolin", "playing violin"),
)


def count_notes(file: Path | str, found: PublishedList, published: PublishedList) -> list[Note]:
    """A note if a list has other counts than the published one.

    Args:
        file: the list, for the note.
        found: its counts.
        published: those of the published list.
    """
    if found == published:
        return []
    return [Note("rows", f"{file} has {found}; the published list has {published}", False)]


def class_notes(file: Path, found: Sequence[str], published: Sequence[str]) -> list[Note]:
    """A note on the first class with another name than in the published table.

    Args:
        file: the file of the classes, for the note.
        found: its names; what follows a tab is no part of a name.
        published: the names of the table.
    """
    names = [name.partition("\t")[0] for name in found]
    for number in range(max(len(names), len(published))):
        ours, theirs = (some[number] if number < len(some) else None for some in (names, published))
        if ours != theirs:
            text = f"class {number} of {file} is {ours!r}, in the published table {theirs!r}"
            return [Note("class names", text, False)]
    return []


def ave_avvp_notes(
    file: Path, target: np.ndarray, classes: Sequence[str], ave: np.ndarray, names: Sequence[str]
) -> list[Note]:
    """Notes on the training clips of AVE→AVVP: another number of a class, and another class than in AVE.

    Args:
        file: the order, for the note.
        target: (n,) int64, the class of each clip.
        classes: names of these classes; others than the published ones give no note.
        ave: (n,) int64, the class of the same clips in AVE's own labels; (0,) if they are not at hand.
        names: names of AVE's classes.
    """
    if list(classes) != list(AVE_AVVP_CLASSES):
        return []
    counts = np.bincount(target, minlength=len(classes)).tolist()
    others = [
        f"{name} {count} instead of {clips}"
        for (name, (_, clips)), count in zip(AVE_AVVP_CLASSES.items(), counts, strict=True)
        if count != clips
    ]
    notes = (
        [Note("rows", f"{file} has other clips per class than published: {', '.join(others)}", False)] if others else []
    )
    if len(ave):
        pairs = Counter(zip((classes[n] for n in target), (names[n] for n in ave), strict=True))
        wrong = {pair: count for pair, count in pairs.items() if AVE_AVVP_CLASSES[pair[0]][0] != pair[1]}
        if wrong:
            (ours, theirs), _ = max(wrong.items(), key=lambda one: one[1])
            text = (
                f"{sum(wrong.values())} clips of {file} have another class in AVE's labels, such as {ours} for {theirs}"
            )
            notes.append(Note("class names", text, False))
    return notes
