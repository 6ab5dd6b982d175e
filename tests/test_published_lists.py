"""Lists with the published counts give no note; other lists, class tables and missing classes are named."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from layout_files import DIGITS, video_id, write_ave_avvp, write_avel, write_h5, write_rows, write_ucf_vggsound

from unicode_fast.data import ClipSet
from unicode_fast.data.check import _ceilings, check
from unicode_fast.data.layouts import Request, published
from unicode_fast.data.layouts.ave import CLASSES
from unicode_fast.data.layouts.index import DatasetIndex
from unicode_fast.data.opening import list_data

STREAMS = Request(("audio", "video"))
# Clips and classes of the published lists.
TOTALS = (
    (published.AVEL_40K, 40_801, 141),
    (published.AVEL_90K, 87_323, 141),
    (published.AVE, 4_143, None),
    (published.AVE_AVVP_TRAIN, 1_831, 12),
    (published.UCF_VGGSOUND["video"], 2_003, 15),
    (published.UCF_VGGSOUND["audio"], 4_813, 15),
    (published.UCF51, 6_831, 51),
)
# Clips of one class each: frisbee is only in UCF-101's list, bowling only in VGGSound's.
FRISBEE, BOWLING = 126, 206


def listed(layout: str, root: Path) -> DatasetIndex:
    # The long lists of VGGSound are read for one modality, because each clip's file is looked for.
    request = Request(("audio",)) if layout.startswith("vggsound") else STREAMS
    index = list_data(f"{layout}:{root}", request)
    assert index is not None
    return index


def notes(layout: str, root: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for note in listed(layout, root).notes:
        assert not note.bad
        found.setdefault(note.kind, []).append(note.text)
    return found


def spread(clips: int, names: Sequence[str]) -> list[str]:
    """As many names as clips, each name at least once."""
    return [names[number % len(names)] for number in range(clips)]


def folders(root: Path) -> None:
    for base in ("", "AVVP/", "UCF101/", "UCF101ALL/", "vggsound40k/"):
        for modality in ("audio", "video"):
            (root / f"{base}feature/{modality}/zip").mkdir(parents=True)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    folders(tmp_path)
    yield tmp_path


def test_the_tables_are_those_of_the_lists() -> None:
    for known, clips, classes in TOTALS:
        assert (sum(known.clips.values()), known.classes) == (clips, classes)
    assert {ave for ave, _ in published.AVE_AVVP_CLASSES.values()} < set(CLASSES)
    assert len(published.UCF_VGGSOUND_CLASSES) == 16
    assert published.UCF_VGGSOUND_CLASSES[6] == ("FrisbeeCatch", "playing frisbee")
    assert published.UCF_VGGSOUND_CLASSES[10] == ("Bowling", "bowling impact")


@pytest.mark.parametrize(
    ("layout", "file", "known"),
    [
        ("vggsound-avel40k", "vggsound-avel40k.csv", published.AVEL_40K),
        ("vggsound-avel90k", "vggsound-avel90k-new.csv", published.AVEL_90K),
    ],
)
def test_vggsound(root: Path, layout: str, file: str, known: published.PublishedList) -> None:
    categories = [f"category {number}" for number in range(141)]
    (root / "VggsoundAVEL40kCategories.txt").write_text("\n".join(categories))
    splits = [split for split, count in known.clips.items() for _ in range(count)]
    names = spread(len(splits), categories)
    rows = [[name, video_id(number), split] for number, (name, split) in enumerate(zip(names, splits, strict=True))]
    write_rows(root / file, ["category", "video_id", "split"], rows)
    assert list(notes(layout, root)) == ["labels"]
    if known is published.AVEL_90K:
        return
    write_rows(root / file, ["category", "video_id", "split"], rows[1:])
    (text,) = notes(layout, root)["rows"]
    fewer = str(known).replace(f"{sum(known.clips.values()):,}", f"{sum(known.clips.values()) - 1:,}")
    fewer = fewer.replace(f"train {known.clips['train']:,}", f"train {known.clips['train'] - 1:,}")
    assert text == f"{root / file} has {fewer}; the published list has {known}"


def write_events(file: Path, clips: int, classes: Sequence[str]) -> None:
    rows = [[f"{video_id(number)}_30_40", 0, 10, name] for number, name in enumerate(spread(clips, classes))]
    write_rows(file, ["filename", "onset", "offset", "event_labels"], rows, "\t")


def test_avvp(root: Path) -> None:
    (root / "AVVP_Categories.txt").write_text("\n".join(DIGITS))
    for word, clips in (("audio", 1846), ("visual", 1661)):
        write_events(root / f"AVVP_eval_{word}_checked_combined.csv", clips, DIGITS)
    assert notes("avvp", root) == {}
    file = root / "AVVP_eval_visual_checked_combined.csv"
    write_events(file, 1846, DIGITS)
    assert notes("avvp", root) == {"rows": [f"{file} has 1,846 clips; the published list has 1,661 clips"]}


def one_hot(target: np.ndarray, classes: int) -> np.ndarray:
    label = np.zeros((len(target), 10, classes + 1), np.uint8)
    label[np.arange(len(target)), :, target] = 1
    return label


def write_published_ave_avvp(root: Path) -> np.ndarray:
    """Lists with the published counts; returns the class of each of AVE's clips in AVE's own labels."""
    counts = [clips for _, clips in published.AVE_AVVP_CLASSES.values()]
    target = np.repeat(np.arange(12), counts)
    own = np.zeros(4143, np.int64)
    own[:1831] = [CLASSES.index(ave) for ave, clips in published.AVE_AVVP_CLASSES.values() for _ in range(clips)]
    for name in ("audio", "visual"):
        write_h5(root / f"AVE/{name}_feature.h5", "avadataset", np.zeros((4143, 10, 1)))
    write_h5(root / "AVE/labels.h5", "avadataset", one_hot(own, 28))
    write_h5(root / "AVE_AVVP/ave_avvp_order.h5", "order", np.arange(1831)[::-1].copy())
    write_h5(root / "AVE_AVVP/ave_avvp_labels.h5", "avadataset", one_hot(np.resize(target, 4143), 12))
    (root / "AVE_AVVP/AVE_AVVP_Categories.txt").write_text("\n".join(published.AVE_AVVP_CLASSES))
    for word, clips in (("audio", 1085), ("visual", 1032)):
        file = root / f"AVE_AVVP/AVE_AVVP_eval_{word}_checked_combined.csv"
        write_events(file, clips, list(published.AVE_AVVP_CLASSES))
    return own


def test_ave_to_avvp(root: Path) -> None:
    own = write_published_ave_avvp(root)
    assert notes("ave-avvp", root) == {}
    own[170:172] = [0, 1]
    write_h5(root / "AVE/labels.h5", "avadataset", one_hot(own, 28))
    (text,) = notes("ave-avvp", root)["class names"]
    assert text.startswith("2 clips of ") and text.endswith("such as Car for Male speech, man speaking")
    (root / "AVE/labels.h5").unlink()
    order = root / "AVE_AVVP/ave_avvp_order.h5"
    write_h5(order, "order", np.array([171, *range(1, 1831)]))
    (text,) = notes("ave-avvp", root)["rows"]
    assert text == f"{order} has other clips per class than published: Dog 170 instead of 171, Car 189 instead of 188"


def test_ave_avvp_class_table(root: Path) -> None:
    write_published_ave_avvp(root)
    file = root / "AVE_AVVP/AVE_AVVP_Categories.txt"
    file.write_text(file.read_text().replace("Car", "Speech"))
    for word in ("audio", "visual"):
        listed_file = root / f"AVE_AVVP/AVE_AVVP_eval_{word}_checked_combined.csv"
        listed_file.write_text(listed_file.read_text().replace("Car", "Speech"))
    text = f"class 1 of {file} is 'Speech', in the published table 'Car'"
    assert notes("ave-avvp", root) == {"class names": [text]}


def write_published_ucf_vggsound(root: Path) -> None:
    ucf, vggsound = (list(names) for names in zip(*published.UCF_VGGSOUND_CLASSES, strict=True))
    (root / "UCF101sameVGGSound.txt").write_text("\n".join(ucf).replace("Bowling", "Bowling\tbowling"))
    (root / "VGGSoundsameUCF101.txt").write_text("\n".join(vggsound))
    others = [name for number, name in enumerate(ucf) if number not in (6, 10)]
    names = ["FrisbeeCatch"] * FRISBEE + spread(2003 - FRISBEE, others)
    rows = [[name, f"v_{name}_g{number % 25 + 1:02d}_c{number}"] for number, name in enumerate(names)]
    write_rows(root / "ucf2vggsound.csv", ["category", "video_id"], rows)
    others = [name for number, name in enumerate(vggsound) if number not in (6, 10)]
    names = ["bowling impact"] * BOWLING + spread(4813 - BOWLING, others)
    rows = [[name, f"{video_id(number)}_000000", "train"] for number, name in enumerate(names)]
    write_rows(root / "vggsound2ucf.csv", ["category", "video_id", "split"], rows)


def test_ucf_vggsound_and_its_ceilings(root: Path) -> None:
    write_published_ucf_vggsound(root)
    assert notes("ucf-vggsound", root) == {}
    found = [finding for finding in _ceilings(listed("ucf-vggsound", root)) if " on all: " in finding.text]
    audio, video = sorted(found, key=lambda finding: finding.clips)
    assert audio.text == (
        "zero-shot accuracy video → audio is at most 95.7 % on all: 206 of 4,813 clips of audio are of classes without "
        "video in all"
    )
    assert audio.clips == ["bowling impact"] and not audio.bad
    assert "audio → video is at most 93.7 % on all: 126 of 2,003 clips of video" in video.text
    assert video.clips == ["playing frisbee"]


def test_ucf51(root: Path) -> None:
    classes = [f"Class{number}" for number in range(51)]
    (root / "UCF51Categories.txt").write_text("\n".join(classes))
    rows = [[name, f"v_{name}_g{n % 25 + 1:02d}_c{n}"] for n, name in enumerate(spread(6831, classes))]
    file = root / "ucf51checked.csv"
    write_rows(file, ["category", "video_id"], rows)
    assert notes("ucf51", root) == {}
    write_rows(file, ["category", "video_id"], [row for row in rows if row[0] != "Class50"])
    text = f"{file} has 6,698 clips of 50 classes; the published list has 6,831 clips of 51 classes"
    assert notes("ucf51", root) == {"rows": [text]}


def test_ceilings_follow_from_the_lists(tmp_path: Path, spoken: ClipSet) -> None:
    write_ucf_vggsound(tmp_path, spoken)
    assert not any(" on all: " in finding.text for finding in _ceilings(listed("ucf-vggsound", tmp_path)))
    file = tmp_path / "vggsound2ucf.csv"
    kept = [line for line in file.read_text().splitlines() if "saying three" not in line]
    file.write_text("\n".join(kept))
    clips = int((spoken.target == 3).sum())
    text = f"zero-shot accuracy audio → video is at most {100 * (1 - clips / 24):.1f} % on all: {clips} of 24 clips"
    report = check(f"ucf-vggsound:{tmp_path}", STREAMS, progress=False)
    ceilings = [finding for finding in report.findings if finding.kind == "ceiling" and text in finding.text]
    assert [finding.clips for finding in ceilings] == [["saying three"]] and report.can_start


def test_smaller_lists_are_notes(tmp_path: Path, few: ClipSet) -> None:
    for layout, write in (
        ("vggsound-avel40k", write_avel),
        ("ave-avvp", write_ave_avvp),
        ("ucf-vggsound", write_ucf_vggsound),
    ):
        write(tmp_path / layout, few)
        report = check(f"{layout}:{tmp_path / layout}", STREAMS, progress=False)
        rows = [finding for finding in report.findings if finding.kind == "rows"]
        assert report.can_start and rows and all("12 clips" in finding.text for finding in rows)
