"""The paper's numbers, in per cent, as printed.

Source:
    Xia et al., "Achieving Cross Modal Generalization with Multimodal Unified Representation", NeurIPS 2023, Tables 1 to
    5. The measures differ between tasks. The released code measures some on the training split or on the best test
    epoch. `python -m unicode_fast.evaluate --task TASK --protocol official --explain` prints the definitions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Label of these numbers; "paper" is a preset and a size.
UNI_CODE = "Uni-Code"
LABEL = "published (Xia et al., 2023)"
V2A, A2V = ("video", "audio"), ("audio", "video")
# Columns of Tables 1 to 3, as (data set of the task, direction).
AVE_AVVP = (("AVE", V2A), ("AVE", A2V), ("AVVP", V2A), ("AVVP", A2V))
ALL_TASKS = (
    *AVE_AVVP,
    ("AVE→AVVP", V2A),
    ("AVE→AVVP", A2V),
    ("UCF↔VGG", V2A),
    ("UCF↔VGG", A2V),
)
SIZES = ("24K", "40K", "81K")

# Task of this library for each data set, and its first printed measure.
TASKS: Mapping[str, tuple[str, str]] = {
    "AVE": ("classification", "accuracy"),
    "AVVP": ("localisation", "precision"),
    "AVE→AVVP": ("cross-localisation", "F1"),
    "UCF↔VGG": ("cross-classification", "accuracy"),
    "AVS-S4": ("segmentation", "mIoU"),
    "retrieval": ("retrieval", "R@10"),
}
# Published data set of each layout.
LAYOUTS: Mapping[str, str] = {
    "ave": "AVE",
    "avvp": "AVVP",
    "ave-avvp": "AVE→AVVP",
    "ucf-vggsound": "UCF↔VGG",
    "avsbench-s4": "AVS-S4",
}

_TABLE_1: Mapping[str, tuple[tuple[float, ...], ...]] = {
    "Baseline": ((4.4, 5.9, 7.6, 8.4), (5.5, 5.4, 6.9, 8.7), (7.1, 9.3, 5.6, 7.2)),
    "S-MiT": ((12.7, 16.9, 17.2, 22.8), (14.4, 15.9, 19.0, 22.3), (13.4, 17.0, 20.9, 22.8)),
    "MST": ((13.3, 19.0, 25.7, 29.1), (19.5, 23.1, 22.7, 24.5), (18.6, 20.5, 19.1, 24.8)),
    "CODIS": ((18.5, 22.0, 29.4, 33.7), (20.8, 26.4, 35.1, 37.9), (28.5, 30.2, 34.0, 37.8)),
    "TURN": ((17.7, 21.0, 29.4, 32.4), (19.1, 24.3, 36.9, 39.3), (27.6, 31.4, 33.8, 38.1)),
    "CMCM": ((28.9, 35.9, 42.6, 50.4), (32.7, 36.8, 41.9, 45.1), (31.1, 34.0, 39.3, 44.8)),
    "DCID+S-MiT": ((28.1, 32.3, 45.9, 49.2), (32.2, 34.0, 47.8, 53.0), (34.8, 37.6, 51.9, 53.5)),
    "DCID+MST": ((31.2, 35.0, 50.7, 52.1), (34.9, 37.8, 54.4, 59.1), (33.5, 35.4, 57.1, 59.2)),
    "DCID+TURN": ((29.4, 35.3, 53.4, 56.0), (29.7, 36.9, 55.2, 58.2), (31.9, 36.8, 56.2, 60.9)),
    "DCID+CODIS": ((33.4, 36.0, 53.8, 60.2), (36.7, 41.0, 52.6, 62.0), (35.9, 40.1, 54.3, 59.0)),
    "DCID+CMCM": ((34.1, 38.8, 57.6, 60.8), (36.4, 42.9, 58.7, 62.8), (38.8, 41.4, 57.5, 60.5)),
    "Uni-Code": ((44.0, 49.7, 61.9, 65.7), (47.7, 52.3, 64.0, 65.6), (41.2, 45.6, 60.5, 61.7)),
}
# By removal, at 24K and 40K.
_TABLE_2: Mapping[str, tuple[tuple[float, ...], ...]] = {
    "none": ((44.0, 49.7, 61.9, 65.7), (47.7, 52.3, 64.0, 65.6)),
    "CLUB": ((34.9, 35.1, 50.6, 54.0), (37.2, 40.3, 52.9, 59.5)),
    "Cross-CPC": ((4.6, 5.8, 10.9, 24.6), (5.2, 7.1, 12.3, 24.1)),
    "CLUB + Cross-CPC": ((29.8, 34.6, 30.4, 32.5), (35.2, 36.9, 32.3, 34.0)),
    "MM-EMA": ((34.1, 38.8, 57.6, 60.8), (36.4, 42.9, 58.7, 62.8)),
    "reset": ((37.8, 41.2, 59.1, 61.5), (38.9, 40.3, 55.4, 62.1)),
    "code matching": ((39.7, 42.6, 58.2, 62.1), (41.3, 46.0, 58.7, 62.8)),
    "MM-EMA + reset": ((28.2, 30.9, 41.4, 49.2), (31.5, 33.8, 46.0, 48.3)),
}
_TABLE_3: Mapping[str, tuple[float, ...]] = {
    "none": (54.1, 55.0, 63.4, 71.0, 53.0, 52.4, 67.1, 60.6),
    "CLUB": (50.2, 51.8, 62.4, 66.2, 50.1, 51.2, 9.87, 9.59),
    "Cross-CPC": (43.8, 49.2, 59.3, 61.1, 45.5, 50.6, 60.6, 54.6),
    "MM-EMA": (52.9, 49.9, 62.0, 67.3, 48.1, 46.8, 66.5, 60.5),
    "reset": (50.8, 47.8, 56.4, 61.1, 47.9, 50.4, 60.0, 49.8),
    "code matching": (52.4, 54.5, 57.5, 72.9, 50.5, 48.7, 69.9, 59.7),
    "MM-EMA + reset": (33.0, 35.5, 56.7, 61.2, 7.4, 12.6, 43.3, 35.2),
}


@dataclass(frozen=True)
class Published:
    """One number of the paper.

    Attributes:
        table: 1 to 5.
        pretraining: modalities and size, such as "AV 40K".
        method: a row of Table 1, 4 or 5, or "without X" of Tables 2 and 3.
        dataset: a key of `TASKS`.
        source: the modality that the probe was trained on.
        target: the modality that it was tested on; equal to `source` for scores without transfer.
        score: in per cent.
        measure: name of the score.
    """

    table: int
    pretraining: str
    method: str
    dataset: str
    source: str
    target: str
    score: float
    measure: str

    @property
    def task(self) -> str:
        """The task of this library."""
        return TASKS[self.dataset][0]


def _without(removed: str) -> str:
    return "Uni-Code" if removed == "none" else f"without {removed}"


def published() -> list[Published]:
    """Every number of Tables 1 to 5."""
    found = []

    def add(
        table: int, pretraining: str, method: str, columns: tuple, scores: tuple[float, ...], measure: str = ""
    ) -> None:
        for (dataset, (source, target)), score in zip(columns, scores, strict=True):
            what = measure or TASKS[dataset][1]
            found.append(Published(table, pretraining, method, dataset, source, target, score, what))

    for method, by_size in _TABLE_1.items():
        for size, scores in zip(SIZES, by_size, strict=True):
            add(1, f"AV {size}", method, AVE_AVVP, scores)
    for removed, by_size in _TABLE_2.items():
        for size, scores in zip(SIZES, by_size, strict=False):
            add(2, f"AV {size}", _without(removed), AVE_AVVP, scores)
    for removed, scores in _TABLE_3.items():
        add(3, "AVT 40K", _without(removed), ALL_TASKS, scores)
    labelled = tuple((dataset, (target, target)) for dataset, (_, target) in ALL_TASKS if dataset != "AVE→AVVP")
    add(3, "AVT 40K", "labelled modality", labelled, (64.8, 65.8, 71.0, 72.9, 80.0, 85.4))
    queries = (("AVS-S4", ("audio", "text")), ("AVS-S4", ("text", "audio")))
    same = (("AVS-S4", ("audio", "audio")),)
    for method, columns, overlap, score in (
        ("Baseline", queries, (69.8, 69.9), (81.4, 81.3)),
        ("Uni-Code", queries, (78.0, 77.7), (87.1, 86.7)),
        ("SST", same, (60.3,), (80.1,)),
        ("AVS", same, (78.7,), (87.9,)),
    ):
        add(4, "AVT 40K", method, columns, overlap)
        add(4, "AVT 40K", method, columns, score, "F-score")
    pairs = (("retrieval", ("video", "text")), ("retrieval", ("text", "video")))
    for method, five, ten in (("Baseline", (0.47, 0.62), (1.03, 0.85)), ("Uni-Code", (10.3, 8.47), (21.9, 16.7))):
        add(5, "VT 24K", method, pairs, ten)
        add(5, "VT 24K", method, pairs, five, "R@5")
    return found
