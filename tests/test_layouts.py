"""The public layouts: every layout's files are read by its rules; missing and invalid files are named."""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from layout_files import (
    DIGITS,
    double,
    splits_of,
    video_id,
    write_ave,
    write_ave_avvp,
    write_avel,
    write_avsbench,
    write_avvp,
    write_checked,
    write_h5,
    write_own,
    write_rows,
    write_ucf51,
    write_ucf_vggsound,
    write_zip,
)

from unicode_fast.config import Modality
from unicode_fast.data import Batches, ClipSet, Dataset, MissingPackageError, StoreError, open_data
from unicode_fast.data.layouts import Request, ave
from unicode_fast.data.layouts.ave import H5Array
from unicode_fast.data.layouts.files import hashed_split, read_csv
from unicode_fast.data.layouts.vggsound import list_notes
from unicode_fast.data.opening import list_data
from unicode_fast.training.checks import note_shared

GRID, BANDS = Modality("grid", (7, 7, 16)), Modality("vector", (128,))
STREAMS = ("audio", "video")


def opened(layout: str, root: Path) -> Dataset:
    return open_data(f"{layout}:{root}", modalities=STREAMS)


def assert_clips(found: ClipSet, clips: ClipSet, numbers: np.ndarray | list[int]) -> None:
    """Exact features of these clips, in this order, read together and one by one."""
    for name in found.modalities:
        truth = double(clips.features[name])[numbers]
        assert found.features[name].shape == truth.shape and found.features[name].dtype == np.float64
        np.testing.assert_array_equal(found.features[name][:], truth)
        np.testing.assert_array_equal(found.features[name][np.array([2, 0])], truth[[2, 0]])
        np.testing.assert_array_equal(found.features[name][1], truth[1])


def test_vggsound_avel(tmp_path: Path, few: ClipSet) -> None:
    names = np.array(write_avel(tmp_path, few))
    found = opened("vggsound-avel40k", tmp_path)
    assert found.modalities == {"audio": BANDS, "video": GRID} and found.classes == DIGITS
    assert found.splits == ["all", "train", "val", "test"]
    places = {split: np.flatnonzero(np.array(splits_of(12)) == split) for split in ("train", "val", "test")}
    places["all"] = np.concatenate([places["train"], places["test"], places["val"]])
    for split, numbers in places.items():
        clips = found.split(split)
        assert_clips(clips, few, numbers)
        assert list(clips.id) == list(names[numbers])
        np.testing.assert_array_equal(clips.target, few.target[numbers])
        for name in STREAMS:
            np.testing.assert_array_equal(np.asarray(clips.labels[name]), few.labels["audio"][numbers])


def test_the_24k_set_is_the_train_split(tmp_path: Path, few: ClipSet) -> None:
    write_avel(tmp_path, few)
    found = opened("vggsound-avel24k", tmp_path)
    assert found.splits == ["train", "val", "test"]
    assert list(found.split("train").id) == [f"{video_id(n)}_{n:06d}" for n in range(0, 12, 2)]


@pytest.mark.parametrize("layout", ["vggsound81k", "vggsound179k"])
def test_vggsound_without_categories(tmp_path: Path, few: ClipSet, layout: str) -> None:
    names = write_checked(tmp_path, few, layout)
    found = opened(layout, tmp_path)
    assert_clips(found.split("all"), few, np.arange(12))
    assert list(found.split("all").id) == names and found.classes == [] and "class" not in found.split("all").arrays
    rest = [set(found.split(split).id) for split in found.splits[1:]]
    assert set.union(*rest) == set(names) and sum(map(len, rest)) == 12


def test_ave(tmp_path: Path, few: ClipSet) -> None:
    orders = write_ave(tmp_path, few)
    found = opened("ave", tmp_path)
    assert len(found.classes) == 28 and found.classes[2] == "Bark" and found.classes[27] == "Mandolin"
    for split, order in orders.items():
        clips = found.split(split)
        assert_clips(clips, few, order)
        np.testing.assert_array_equal(clips.id, order)
        np.testing.assert_array_equal(clips.target, few.target[order])
        for name in STREAMS:
            np.testing.assert_array_equal(clips.labels[name][..., :10], few.labels["video"][order][..., :10])
            np.testing.assert_array_equal(clips.labels[name][..., 28], few.labels["video"][order][..., 10])


def test_avvp(tmp_path: Path, spoken: ClipSet) -> None:
    names = write_avvp(tmp_path, spoken)
    found = opened("avvp", tmp_path)
    with pytest.raises(ValueError, match=r"'all' of avvp, where audio and video have separate clips; use clips\('all'"):
        found.split("all")
    for name in STREAMS:
        clips = found.clips("all", name)
        assert list(clips.modalities) == [name] and list(clips.id) == names
        assert_clips(clips, spoken, np.arange(24))
        np.testing.assert_array_equal(clips.labels[name], spoken.labels[name])
    for split in ("train", "val", "test"):
        assert list(found.clips(split, "audio").id) == list(found.clips(split, "video").id)
    ids = [set(found.clips(split, "audio").id) for split in ("train", "val", "test")]
    assert sum(map(len, ids)) == len(set.union(*ids)) == 24


def test_avvp_intervals_are_half_open_and_joined(tmp_path: Path, few: ClipSet) -> None:
    write_avvp(tmp_path, few)
    rows = [[f"{video_id(0)}_30_40", "0,2,1,9", "3,5,2,10", "two,two,five,nine"], [f"{video_id(1)}_0_10", 4, 4, "one"]]
    table = tmp_path / "AVVP_eval_audio_checked_combined.csv"
    write_rows(table, ["filename", "onset", "offset", "event_labels"], rows, "\t")
    label = open_data(f"avvp:{tmp_path}", modalities=["audio"]).clips("all", "audio").labels["audio"]
    truth = np.zeros((2, 10, 11))
    truth[0, 0:5, 2], truth[0, 1, 5], truth[0, 9, 9], truth[0, 5:9, 10], truth[1, :, 10] = 1, 1, 1, 1, 1
    np.testing.assert_array_equal(label, truth)


BAD_ROWS = {
    "onsets and offsets as events, got 2, 1 and 1 for": ["0,1", "2", "one"],
    "only classes of its category file, got 'eleven'": ["0", "2", "eleven"],
    r"seconds in \[0, 10\], got 3 to 11": ["3", "11", "one"],
    "whole seconds, got digit": ["x", "2", "one"],
}


@pytest.mark.parametrize("message", BAD_ROWS)
def test_avvp_rows_that_do_not_fit(tmp_path: Path, few: ClipSet, message: str) -> None:
    write_avvp(tmp_path, few)
    table = tmp_path / "AVVP_eval_audio_checked_combined.csv"
    columns = ["filename", "onset", "offset", "event_labels"]
    write_rows(table, columns, [[f"{video_id(0)}_30_40", *BAD_ROWS[message]]], "\t")
    with pytest.raises(StoreError, match=f"eval_audio_checked_combined.csv must .*{message}"):
        opened("avvp", tmp_path)


def test_commas_in_place_of_tabs_are_named(tmp_path: Path, few: ClipSet) -> None:
    write_avvp(tmp_path, few)
    table = tmp_path / "AVVP_eval_audio_checked_combined.csv"
    table.write_text(table.read_text().replace("\t", ";"))
    with pytest.raises(
        StoreError, match="columns filename, onset, offset, event_labels, separated by tabs, got filename;"
    ):
        opened("avvp", tmp_path)


def test_ave_avvp(tmp_path: Path, spoken: ClipSet) -> None:
    order = write_ave_avvp(tmp_path, spoken)
    found = opened("ave-avvp", tmp_path)
    assert_clips(found.split("all"), spoken, order)
    np.testing.assert_array_equal(found.split("all").labels["audio"], spoken.labels["video"][order])
    trained, validated = set(found.split("train").id), set(found.split("val").id)
    assert trained | validated == set(order) and not trained & validated and validated
    for name in STREAMS:
        assert_clips(found.clips("test", name), spoken, np.arange(24))
        np.testing.assert_array_equal(found.clips("test", name).labels[name], spoken.labels[name])
    with pytest.raises(ValueError, match="'test' of ave-avvp"):
        found.split("test")


def test_ucf_vggsound(tmp_path: Path, spoken: ClipSet) -> None:
    shown, heard = write_ucf_vggsound(tmp_path, spoken)
    found = opened("ucf-vggsound", tmp_path)
    assert found.classes == [f"saying {name}" for name in DIGITS]
    for name, ids in (("video", shown), ("audio", heard)):
        clips = found.clips("all", name)
        assert_clips(clips, spoken, np.arange(24))
        assert list(clips.id) == ids
        np.testing.assert_array_equal(clips.target, spoken.target)
        truth = np.repeat(np.eye(11)[spoken.target][:, None], 10, 1)
        np.testing.assert_array_equal(clips.labels[name], truth)
    groups = {split: {int(i.split("_g")[1][:2]) for i in found.clips(split, "video").id} for split in found.splits[1:]}
    assert groups["test"] == set(range(1, 8)) and groups["val"] == {8, 9, 10} and min(groups["train"]) == 11
    with pytest.raises(ValueError, match="'all' of ucf-vggsound"):
        found.split("all")
    with pytest.raises(ValueError, match=r"modality must be one of \['video', 'audio'\] in split 'all', got 'text'"):
        found.clips("all", "text")


def test_ucf51(tmp_path: Path, spoken: ClipSet) -> None:
    names = write_ucf51(tmp_path, spoken)
    found = opened("ucf51", tmp_path)
    assert found.classes == [name.title() for name in reversed(DIGITS)] and found.splits[0] == "all"
    clips = found.split("all")
    assert_clips(clips, spoken, np.arange(24))
    assert list(clips.id) == names
    # The file lists the classes in reverse.
    np.testing.assert_array_equal(clips.target, 9 - spoken.target)
    for name in STREAMS:
        truth = np.repeat(np.eye(11)[9 - spoken.target][:, None], 10, 1)
        np.testing.assert_array_equal(clips.labels[name], truth)
    groups = {split: {int(i.split("_g")[1][:2]) for i in found.split(split).id} for split in found.splits[1:]}
    assert groups == {"train": set(range(11, 25)), "val": {8, 9, 10}, "test": set(range(1, 8))}


def test_avsbench(tmp_path: Path, few: ClipSet) -> None:
    names = write_avsbench(tmp_path, few, few.arrays["video.frames"])
    found = opened("avsbench-s4", tmp_path)
    assert found.classes == sorted(DIGITS[c] for c in set(few.target))
    for split, first in (("train", True), ("val", False), ("test", False)):
        numbers = np.flatnonzero(np.array(splits_of(12)) == split)
        clips = found.split(split)
        assert list(clips.id) == [names[number] for number in numbers]
        np.testing.assert_array_equal(clips.features["audio"][:], double(few.features["audio"])[numbers, :5])
        frames = np.asarray(few.arrays["video.frames"])[numbers, :5]
        np.testing.assert_array_equal(clips.arrays["video.frames"][:], np.stack([frames] * 3, -1))
        masks = (frames > 127)[:, :1] if first else frames > 127
        np.testing.assert_array_equal(clips.arrays["video.mask"][:], masks)
        assert [found.classes[c] for c in clips.target] == [DIGITS[few.target[number]] for number in numbers]


def test_own_clips(tmp_path: Path, few: ClipSet) -> None:
    lengths = np.array(write_own(tmp_path / "mine", few))
    found = open_data(f"clips:{tmp_path / 'mine'}")
    assert found.name == "mine" and found.classes == DIGITS and found.splits == ["train", "val", "test"]
    assert found.modalities == {"picture": GRID, "sound": BANDS}
    numbers = np.flatnonzero(np.array(splits_of(12)) == "train")
    clips = found.split("train")
    np.testing.assert_array_equal(clips.lengths["sound"], lengths[numbers])
    np.testing.assert_array_equal(clips.target, few.target[numbers])
    mask = np.arange(10) < lengths[numbers][:, None]
    np.testing.assert_array_equal(clips.mask["picture"], mask)
    sound = double(few.features["audio"])[numbers] * mask[..., None]
    np.testing.assert_array_equal(clips.features["sound"][:], sound)
    np.testing.assert_array_equal(np.asarray(clips.labels["sound"]), few.labels["audio"][numbers] * mask[..., None])
    assert set(clips.labels) == {"sound"}


def test_own_clips_with_kinds_and_without_classes(tmp_path: Path, few: ClipSet) -> None:
    write_own(tmp_path, few)
    write_rows(tmp_path / "clips.csv", ["id", "split"], [["take-0", "train"], ["take-3", "val"]])
    write_rows(tmp_path / "modalities.csv", ["modality", "kind"], [["sound", "words"]])
    shutil.rmtree(tmp_path / "sound.labels")
    found = open_data(f"clips:{tmp_path}")
    # Modalities that the file does not list come last.
    assert list(found.modalities) == ["sound", "picture"] and found.classes == []
    assert found.modalities["sound"] == Modality("words", (128,)) and found.modalities["picture"].kind == "grid"
    assert found.split("train").features["sound"].shape == (1, 7, 128)


# How audio and video of each layout get ten positions: True if they are repeated or cut.
RULES: dict[str, tuple[Callable, str, bool, bool]] = {
    "vggsound-avel24k": (write_avel, "feature/{}/zip", True, False),
    "avvp": (write_avvp, "feature/{}/zip", True, False),
    "ucf-vggsound": (write_ucf_vggsound, "*/feature/{}/zip", True, True),
    "ucf51": (write_ucf51, "*/feature/{}/zip", True, True),
}


@pytest.mark.parametrize("layout", RULES)
def test_short_and_long_clips(tmp_path: Path, few: ClipSet, layout: str) -> None:
    write, folder, *fitted = RULES[layout]
    write(tmp_path, few)
    for name, fits in zip(STREAMS, fitted, strict=True):
        features = double(few.features[name][0])
        split = next(split for split in opened(layout, tmp_path).splits if split in ("all", "train"))
        place = opened(layout, tmp_path).clips(split, name).id[0]
        file = sorted(tmp_path.glob(f"{folder.format(name)}/{place[:11]}*"))[0]
        for count in (1, 7, 10, 12):
            array = np.concatenate([features, -features])[:count]
            write_zip(file, array)
            clips = opened(layout, tmp_path).clips(split, name)
            if fits or count == 10:
                truth = array[np.minimum(np.arange(10), count - 1)]
                np.testing.assert_array_equal(clips.features[name][0], truth)
            else:
                with pytest.raises(
                    StoreError, match=rf"{file.name} must have 10 positions, got shape \({count}, 7, 7, 16\)"
                ):
                    clips.features[name][0]
        write_zip(file, features[:0])
        with pytest.raises(StoreError, match=rf"{file.name} must have at least one position, got shape \(0,"):
            opened(layout, tmp_path).clips(split, name).features[name][0]


def test_audio_of_avsbench_gets_five_positions(tmp_path: Path, few: ClipSet) -> None:
    names = write_avsbench(tmp_path, few, few.arrays["video.frames"])
    audio = double(few.features["audio"][0])
    for count in (3, 8):
        write_zip(tmp_path / f"feature/audio/train/zip/{DIGITS[few.target[0]]}/{names[0]}.zip", audio[:count])
        found = opened("avsbench-s4", tmp_path).split("train").features["audio"][0]
        np.testing.assert_array_equal(found, audio[np.minimum(np.arange(5), count - 1)])


WRITERS: dict[str, tuple[Callable, list[str]]] = {
    "vggsound-avel40k": (write_avel, ["vggsound-avel40k.csv", "VggsoundAVEL40kCategories.txt", "feature/video/zip/"]),
    "ave": (write_ave, ["audio_feature.h5", "visual_feature.h5", "labels.h5", "val_order.h5"]),
    "avvp": (
        write_avvp,
        ["AVVP_eval_visual_checked_combined.csv", "AVVP_Categories.txt", "feature/audio/zip/"],
    ),
    "ave-avvp": (
        write_ave_avvp,
        [
            "AVE/audio_feature.h5",
            "AVE_AVVP/ave_avvp_labels.h5",
            "AVE_AVVP/ave_avvp_order.h5",
            "AVVP/feature/video/zip/",
        ],
    ),
    "ucf-vggsound": (
        write_ucf_vggsound,
        ["UCF101sameVGGSound.txt", "vggsound2ucf.csv", "UCF101/feature/video/zip/", "vggsound40k/feature/audio/zip/"],
    ),
    "ucf51": (write_ucf51, ["UCF51Categories.txt", "ucf51checked.csv", "UCF101ALL/feature/audio/zip/"]),
}


@pytest.mark.parametrize("layout", WRITERS)
def test_all_missing_files_are_named_at_once(tmp_path: Path, few: ClipSet, layout: str) -> None:
    write, expected = WRITERS[layout]
    write(tmp_path, few)
    opened(layout, tmp_path)
    for name in expected:
        path = tmp_path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FileNotFoundError) as caught:
        opened(layout, tmp_path)
    assert sorted(str(caught.value).split("missing are ")[1].split(", ")) == sorted(expected)


def test_missing_clips_are_named(tmp_path: Path, few: ClipSet) -> None:
    names = write_avel(tmp_path, few)
    for name in names[:2]:
        (tmp_path / "feature/audio/zip" / f"{name}.zip").unlink()
    (tmp_path / "feature/label/zip" / f"{names[5]}.zip").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        opened("vggsound-avel24k", tmp_path)
    assert f"label/zip/{names[5]}.zip" in str(caught.value) and f"audio/zip/{names[0]}.zip" in str(caught.value)


def test_features_of_another_shape_are_named(tmp_path: Path, few: ClipSet) -> None:
    names = write_avel(tmp_path, few)
    write_zip(tmp_path / "feature/audio/zip" / f"{names[2]}.zip", np.zeros((10, 64)))
    clips = opened("vggsound-avel24k", tmp_path).split("train")
    with pytest.raises(StoreError, match=rf"{names[2]}.zip must have shape \(T, 128\) like .*, got \(\d+, 64\)"):
        clips.features["audio"][:]
    write_zip(tmp_path / "feature/audio/zip" / f"{names[2]}.zip", np.zeros((10, 128), int))
    with pytest.raises(StoreError, match=rf"{names[2]}.zip must hold .*float.*int64"):
        clips.features["audio"][:]


def test_batches_of_lazy_clips(tmp_path: Path, few: ClipSet) -> None:
    write_avel(tmp_path, few)
    clips = opened("vggsound-avel40k", tmp_path).split("all")
    batches = Batches(clips, 5, seed=1)
    batch = batches.batch(1)
    for name in STREAMS:
        truth = np.asarray(clips.features[name])[batches.indices(1)].astype(np.float32)
        np.testing.assert_array_equal(batch.features[name].numpy(), truth)
        assert batch.mask[name].all()
    some = clips.select([7, 3]).restrict(["audio"])
    np.testing.assert_array_equal(some.features["audio"][1], clips.features["audio"][3])
    np.testing.assert_array_equal(some.index, [7, 3])


@pytest.mark.parametrize(
    ("layout", "lists"),
    [
        ("vggsound81k", "video_name_vggsound81k_checked.csv"),
        ("avvp", "AVVP_eval_*_checked_combined.csv"),
        ("ucf-vggsound", "vggsound2ucf.csv"),
    ],
)
def test_clips_of_one_video_share_a_split(tmp_path: Path, few: ClipSet, layout: str, lists: str) -> None:
    """Names consist of the video's eleven characters and the clip's time."""
    if layout == "vggsound81k":
        write_checked(tmp_path, few, layout)
    else:
        (write_avvp if layout == "avvp" else write_ucf_vggsound)(tmp_path, few)
    for table in tmp_path.glob(lists):
        heading, *rows = table.read_text().splitlines()
        more = [re.sub(r"(digit-\d{5})(_\d+)+", rf"\1_{place}_{place}", row) for row in rows for place in range(4)]
        table.write_text("\n".join([heading, *rows, *more]))
    index = list_data(f"{layout}:{tmp_path}", Request(["audio"]))
    assert index is not None
    videos: dict[str, set[str]] = {}
    for split in index.divided:
        (clips,) = index.tables[split]
        for name in clips.arrays["id"]:
            videos.setdefault(str(name)[:11], set()).add(split)
    assert len(videos) == len(few) and all(len(splits) == 1 for splits in videos.values())
    assert len({split for splits in videos.values() for split in splits}) > 1


def test_clips_that_are_trained_and_tested_on_are_named(
    tmp_path: Path, few: ClipSet, capsys: pytest.CaptureFixture[str]
) -> None:
    names = write_avel(tmp_path, few)
    table = tmp_path / "vggsound-avel40k.csv"
    note_shared(open_data(f"vggsound-avel24k:{tmp_path}", modalities=STREAMS))
    assert capsys.readouterr().err == ""
    table.write_text(f"{table.read_text()}{DIGITS[few.target[0]]},{names[0]},test\n")
    note_shared(open_data(f"vggsound-avel24k:{tmp_path}", modalities=STREAMS))
    assert f"note: 1 clips of {tmp_path} are in train and in test, such as '{names[0]}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "kinds"), [(20_000, ["bad list"]), (24_900, ["bad list"]), (40_000, []), (9, ["rows"])]
)
def test_notes_on_the_number_of_rows(rows: int, kinds: list[str]) -> None:
    assert [note.kind for note in list_notes(rows, Path("list.csv"), 40_000)] == kinds


def test_hashed_splits_stay_what_they_are() -> None:
    """Another rule would move training clips into a test split."""
    chosen = hashed_split([video_id(number) for number in range(12)])
    assert {split: np.flatnonzero(members).tolist() for split, members in chosen.items()} == HASHED


HASHED = {"train": [0, 1, 2, 4, 6, 7, 8, 9, 10], "val": [3, 5, 11], "test": []}


def test_without_h5py_the_extra_is_named(tmp_path: Path, few: ClipSet, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ave(tmp_path, few)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingPackageError, match=r"'h5py' must be installed.*pip install 'unicode_fast\[data\]'"):
        opened("ave", tmp_path)


def test_fields_of_several_lines(tmp_path: Path) -> None:
    file = tmp_path / "list.csv"
    file.write_text('id,said\n"a\nb","one, ""two""\r\nthree"\n\nc,d\n', newline="")
    assert read_csv(file, ["id"]) == [{"id": "a\nb", "said": 'one, "two"\r\nthree'}, {"id": "c", "said": "d"}]


@pytest.mark.parametrize("packing", [{}, *({"compression": name} for name in ("gzip", "lzf"))])
@pytest.mark.parametrize("more", [{}, {"shuffle": True, "fletcher32": True, "chunks": (5, 10, 50)}])
def test_hdf5_of_every_packing_and_through_links(packing: dict, more: dict, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    file = tmp_path / "audio_feature.h5"
    random = np.random.default_rng(0)
    # Half of the values compress well; chunks that do not compress are stored without lzf.
    array = np.concatenate([random.normal(size=(6, 10, 128)), np.ones((6, 10, 128))])
    with h5py.File(file, "w") as opened:
        opened.create_dataset("data/features", data=array, **packing, **more)
        opened["data/same"] = h5py.SoftLink("features")
        opened["avadataset"] = h5py.SoftLink("/data/./same")
    data = H5Array(file, "avadataset")
    np.testing.assert_array_equal(data.whole(), array)
    np.testing.assert_array_equal([data.clip(number) for number in range(12)], array)


def test_a_chunk_of_many_clips_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    h5py = pytest.importorskip("h5py")
    array = np.random.default_rng(0).integers(0, 9, (20, 10, 2000))
    with h5py.File(tmp_path / "x.h5", "w") as opened:
        opened.create_dataset("x", data=array, chunks=(10, 10, 2000), compression="gzip")
    looked, size_of = [], ave._gzip_size
    monkeypatch.setattr(ave, "_gzip_size", lambda data, most: looked.append(len(data)) or size_of(data, most))
    data = H5Array(tmp_path / "x.h5", "x")
    np.testing.assert_array_equal([data.clip(number) for number in range(20)], array)
    assert len(looked) == 2
    # HDF5 unpacks a chunk outside its cache at every read.
    assert data._data.id.get_access_plist().get_chunk_cache()[1] >= array.nbytes / 2


def test_hdf5_files_that_do_not_fit(tmp_path: Path, few: ClipSet) -> None:
    write_ave(tmp_path, few)
    for file, key, array, message in (
        ("val_order.h5", "order", np.array([0, 12]), r"val_order.h5 must hold order of \(n,\) integers in \[0, 12\)"),
        ("labels.h5", "avadataset", np.zeros((12, 10, 28)), r"labels.h5 must hold avadataset of .* 29\) 0 and 1"),
        (
            "audio_feature.h5",
            "other",
            np.zeros((12, 10, 128)),
            "with a dataset 'avadataset' of numbers: it has other",
        ),
    ):
        kept = (tmp_path / file).read_bytes()
        write_h5(tmp_path / file, key, array)
        with pytest.raises(StoreError, match=message):
            opened("ave", tmp_path)
        (tmp_path / file).write_bytes(kept)


def test_what_names_no_data(tmp_path: Path, few: ClipSet) -> None:
    with pytest.raises(FileNotFoundError, match="layout of 'avee:/data' must be one of vggsound-avel24k, .*got 'avee'"):
        open_data("avee:/data")
    with pytest.raises(FileNotFoundError, match=r"root of 'ave:/no/where' must be a folder"):
        open_data("ave:/no/where")
    with pytest.raises(FileNotFoundError, match="a feature store's folder"):
        open_data(str(tmp_path))
    write_avvp(tmp_path, few)
    with pytest.raises(ValueError, match="modalities must include one with clips in avvp:.*, got smell"):
        open_data(f"avvp:{tmp_path}", modalities=["smell"])
