"""UCF-51: audio and video of the 51 classes of UCF-101 with sound."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from unicode_fast.data.layouts.files import Files, divide, read_lines
from unicode_fast.data.layouts.index import DatasetIndex
from unicode_fast.data.layouts.published import UCF51, PublishedList, count_notes
from unicode_fast.data.layouts.request import Request
from unicode_fast.data.layouts.ucf_vggsound import listed_clips, split_by_group
from unicode_fast.data.layouts.vggsound import zip_folder

_LIST, _CLASSES, _BASE = "ucf51checked.csv", "UCF51Categories.txt", "UCF101ALL/"


def list_ucf51(root: Path, request: Request) -> DatasetIndex:
    """Split "all" of the whole list, and train, val and test splits by group, as those of UCF-101 in `ucf-vggsound`.

    The released open-set code trains on the clips of "all" of the first classes, and tests on "all". Classes have the
    order of their file.
    """
    files = Files("ucf51", root)
    table, names = files.file(_LIST), files.file(_CLASSES)
    folders = {name: zip_folder(files, name, _BASE) for name in ("audio", "video") if request.includes(name)}
    files.check()
    classes = read_lines(names)
    clips = listed_clips(table, folders, classes)
    found = PublishedList({"all": len(clips)}, len(np.unique(np.asarray(clips.arrays["class"]))))
    divided = divide([split_by_group([str(name) for name in np.asarray(clips.arrays["id"])])])
    return DatasetIndex("ucf51", root, classes, {"all": [clips]}, divided, notes=count_notes(table, found, UCF51))
