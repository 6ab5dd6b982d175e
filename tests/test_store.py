"""The feature store: written arrays are read back; invalid contents are refused; damaged files are named."""

import errno
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from unicode_fast.config import Modality
from unicode_fast.data import (
    DamagedStoreError,
    Dataset,
    StoreError,
    open_store,
    verify,
    write_store,
)
from unicode_fast.data.store import read as store
from unicode_fast.train import main as train

CLASSES = [str(digit) for digit in range(10)]
MODALITIES = {"picture": Modality("grid", (8, 8, 1)), "line": Modality("vector", (8,))}
POSITIONS, LINES = 3, 5


def arrays(first: int, clips: int, dtype: type = np.float32) -> dict[str, np.ndarray]:
    """Clips of three handwritten digits, and up to five rows of the first digit."""
    digits = load_digits()
    images = (digits.images[first : first + clips * POSITIONS] / 16).astype(dtype).reshape(clips, POSITIONS, 8, 8, 1)
    target = digits.target[first : first + clips * POSITIONS].astype(np.int64).reshape(clips, POSITIONS)
    lengths = np.arange(clips, dtype=np.int64) % LINES + 1
    lines = images[:, 0, :LINES, :, 0] * (np.arange(LINES) < lengths[:, None])[..., None]
    return {
        "picture": images,
        "line": lines.astype(dtype),
        "line.length": lengths,
        "picture.label": np.eye(11, dtype=np.uint8)[target],
        "class": target[:, 0],
        "id": np.array([f"clip {number}" for number in range(clips)]),
        "writer": np.arange(clips) % 2 == 0,
    }


def splits() -> dict[str, dict[str, np.ndarray]]:
    return {"train": arrays(0, 12), "val": arrays(36, 4)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "deep" / "digits"
    write_store(path, "digits", MODALITIES, CLASSES, splits(), {"source": "handwriting"})
    return path


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_what_is_written_is_read(folder: Path) -> None:
    found = open_store(folder)
    assert found.name == "digits" and found.classes == CLASSES and found.extra == {"source": "handwriting"}
    assert found.splits == ["train", "val"] and found.modalities == MODALITIES
    assert list(found.modalities) == ["picture", "line"]
    for split, expected in splits().items():
        clips = found.split(split)
        assert set(clips.arrays) == set(expected)
        for key, array in expected.items():
            assert clips.arrays[key].dtype == array.dtype
            np.testing.assert_array_equal(clips.arrays[key], array)
    assert "digits" in repr(found) and "12" in repr(found)


def test_arrays_are_mapped_and_cannot_be_changed(folder: Path) -> None:
    features = open_store(folder).split("train").features["picture"]
    assert isinstance(features, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        features[0] = 0


def test_plain_numpy_reads_every_file(folder: Path) -> None:
    picture = np.load(folder / "val-picture.npy", allow_pickle=False)
    np.testing.assert_array_equal(picture, splits()["val"]["picture"])


def test_masks_and_lengths(folder: Path) -> None:
    clips = open_store(folder).split("train")
    assert clips.mask["picture"].shape == (12, POSITIONS) and clips.mask["picture"].all()
    assert clips.mask["line"].shape == (12, LINES)
    np.testing.assert_array_equal(clips.mask["line"][:3], np.tri(3, LINES, dtype=bool))
    np.testing.assert_array_equal(clips.lengths["line"][:6], [1, 2, 3, 4, 5, 1])
    np.testing.assert_array_equal(clips.lengths["picture"], np.full(12, POSITIONS))


def test_select_keeps_everything_aligned(folder: Path) -> None:
    clips = open_store(folder).split("train")
    some = clips.select([7, 2])
    assert len(some) == 2
    np.testing.assert_array_equal(some.index, [7, 2])
    for key, array in clips.arrays.items():
        np.testing.assert_array_equal(some.arrays[key], array[[7, 2]])
    np.testing.assert_array_equal(some.select(np.array([False, True])).index, [2])
    for wrong in ([12], [-1]):
        with pytest.raises(IndexError, match=r"indices must lie in \[0, 12\)"):
            clips.select(wrong)


def test_restrict_orders_and_refuses(folder: Path) -> None:
    clips = open_store(folder).split("train")
    assert list(clips.restrict(["line", "picture"]).features) == ["line", "picture"]
    assert list(clips.restrict(["line"]).mask) == ["line"] and not clips.restrict(["line"]).labels
    with pytest.raises(ValueError, match="modalities must be of the data set, such as .*picture, line.*, got 'smell'"):
        clips.restrict(["smell"])
    assert open_store(folder).modalities_named(["line"]) == {"line": MODALITIES["line"]}


def test_unknown_split_and_missing_classes(tmp_path: Path) -> None:
    contents = splits()
    for split in contents.values():
        del split["class"], split["id"]
    write_store(tmp_path / "new", "digits", MODALITIES, CLASSES, contents)
    found = open_store(tmp_path / "new")
    with pytest.raises(ValueError, match=r"split must be one of \['train', 'val'\], got 'test'"):
        found.split("test")
    with pytest.raises(StoreError, match="must include 'class'"):
        _ = found.split("val").target
    np.testing.assert_array_equal(found.split("val").id, np.arange(4))


def replaced(key: str, change) -> dict[str, dict[str, np.ndarray]]:
    contents = splits()
    contents["val"][key] = change(contents["val"].get(key, np.zeros(4)))
    return contents


def with_value(value: float):
    def change(array: np.ndarray) -> np.ndarray:
        changed = array.copy()
        changed[2].reshape(-1)[0] = value
        return changed

    return change


def set_at(value: int):
    def change(array: np.ndarray) -> np.ndarray:
        changed = array.copy()
        changed[3] = value
        return changed

    return change


def without(key: str) -> dict[str, dict[str, np.ndarray]]:
    contents = splits()
    del contents["val"][key]
    return contents


BAD_CONTENTS = {
    "nan": (replaced("picture", with_value(np.nan)), "'picture' of split 'val' must hold finite.*nan in clip 2"),
    "infinite": (replaced("line", with_value(-np.inf)), "'line' of split 'val' must hold finite.*-inf in clip 2"),
    "no modality": (without("line"), "split 'val' must hold features of modality 'line'"),
    "integers": (replaced("line", lambda array: array.astype(np.int64)), "'line'.*float16, float32, float64.*int64"),
    "other dtype": (replaced("line", lambda array: array.astype(np.float64)), "same number of positions and dtype"),
    "other steps": (replaced("line", lambda array: array[:, :2]), "same number of positions and dtype"),
    "width": (replaced("line", lambda array: array[..., :7]), r"'line'.*must have shape \(clips, T >= 1, 8\)"),
    "no steps": (replaced("picture", lambda array: array[:, :0]), r"\(clips, T >= 1, 8, 8, 1\)"),
    "fewer clips": (replaced("line", lambda array: array[:3]), "'line'.*must have 4 clips first"),
    "no clips": ({"val": {key: value[:0] for key, value in arrays(0, 4).items()}}, "at least one clip, got none"),
    "no splits": ({}, "at least one split"),
    "objects": (replaced("id", lambda array: array.astype(object)), "'id'.*plain dtype"),
    "scalar": (replaced("writer", lambda array: np.float32(1)), "'writer'.*4 clips first"),
    "class dtype": (replaced("class", lambda array: array.astype(np.int32)), "'class'.*int64"),
    "class value": (replaced("class", set_at(10)), r"'class'.*\[0, 10\), got 10 in clip 3"),
    "length value": (replaced("line.length", set_at(6)), r"'line.length'.*\[0, 5\], got 6 in clip 3"),
    "length below zero": (replaced("line.length", set_at(-1)), "'line.length'.*got -1 in clip 3"),
    "length zero": (replaced("line.length", set_at(0)), "'line'.*must be 0 after .*in clip 3 of length 0"),
    "length dtype": (replaced("line.length", lambda array: array.astype(np.float32)), "'line.length'.*int64"),
    "label width": (replaced("picture.label", lambda array: array[..., :10]), r"'picture.label'.*\(4, 3, 11\)"),
    "label value": (replaced("picture.label", set_at(2)), r"'picture.label'.*\[0, 1\], got 2 in clip 3"),
    "label owner": (replaced("smell.label", lambda array: array), "'smell.label'.*must belong to one of.*'smell'"),
    "id twice": (replaced("id", lambda array: array[[0, 1, 2, 1]]), "'id' of split 'val'.*once, got 'clip 1' more"),
    "padding": (replaced("line", set_at(1)), "'line' of split 'val' must be 0 after .*in clip 3 of length 4"),
    "key": (replaced("../id", lambda array: array), "key of split 'val' must consist of.*'../id'"),
    "split name": ({"a/b": arrays(0, 4)}, "split name must consist of.*'a/b'"),
}


@pytest.mark.parametrize("case", BAD_CONTENTS)
def test_bad_contents_are_refused_and_leave_nothing(case: str, tmp_path: Path) -> None:
    contents, message = BAD_CONTENTS[case]
    with pytest.raises(StoreError, match=message):
        write_store(tmp_path / "new", "digits", MODALITIES, CLASSES, contents)
    assert list(tmp_path.iterdir()) == []


def test_bad_descriptions_are_refused(tmp_path: Path) -> None:
    new, good = tmp_path / "new", splits()
    with pytest.raises(StoreError, match="at least one modality"):
        write_store(new, "digits", {}, CLASSES, good)
    with pytest.raises(StoreError, match="modality name must consist of.*'a.b'"):
        write_store(new, "digits", {"a.b": Modality("vector", (8,))}, CLASSES, good)
    with pytest.raises(StoreError, match="'line' must be a Modality, got tuple"):
        write_store(new, "digits", {"line": (8,)}, CLASSES, good)  # type: ignore[dict-item]
    with pytest.raises(StoreError, match="classes must be different strings"):
        write_store(new, "digits", MODALITIES, ["a", "a"], good)
    with pytest.raises(StoreError, match="classes must be a list of names, got str '0123456789'"):
        write_store(new, "digits", MODALITIES, "0123456789", good)
    with pytest.raises(StoreError, match="extra must be JSON-serialisable"):
        write_store(new, "digits", MODALITIES, CLASSES, good, {"array": np.zeros(2)})
    assert list(tmp_path.iterdir()) == []


def test_an_existing_store_is_not_overwritten(folder: Path) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(FileExistsError, match="must not exist yet"):
        write_store(folder, "digits", MODALITIES, CLASSES, splits())
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_the_loser_of_a_race_raises_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "new"
    rename = os.rename

    def other_first(source: Path, destination: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        write_store(target, "the other's", MODALITIES, CLASSES, splits())
        rename(source, destination)

    monkeypatch.setattr(os, "rename", other_first)
    with pytest.raises(FileExistsError, match="another process"):
        write_store(target, "digits", MODALITIES, CLASSES, splits())
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert open_store(target).name == "the other's"


@pytest.mark.parametrize("call", ["fsync", "mkdir"])
def test_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    before = sorted(folder.parent.iterdir())

    def full(*arguments: object, **keywords: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((os, "fsync", full) if call == "fsync" else (Path, "mkdir", full)))
    with pytest.raises(OSError, match="disk is full; free some space") as caught:
        write_store(folder.parent / "new", "digits", MODALITIES, CLASSES, splits())
    assert caught.value.errno == errno.ENOSPC and "new" in str(caught.value)
    monkeypatch.undo()
    assert sorted(folder.parent.iterdir()) == before
    open_store(folder)


def test_a_file_in_the_way_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("something else")
    with pytest.raises(OSError, match="could not be written.*choose a writable folder"):
        write_store(tmp_path / "file" / "new", "digits", MODALITIES, CLASSES, splits())
    assert (tmp_path / "file").read_text() == "something else"


@pytest.mark.parametrize("verified", [False, True])
def test_a_changed_file_is_named(folder: Path, verified: bool) -> None:
    if verified:
        open_store(folder)
    damage(folder / "val-line.npy")
    with pytest.raises(DamagedStoreError, match="val-line.npy.*checksum differs.*Copy the store again"):
        open_store(folder)


def test_a_truncated_file_is_named_even_without_verification(folder: Path) -> None:
    file = folder / "train-picture.npy"
    os.truncate(file, file.stat().st_size - 100)
    for looked_at in (True, False):
        with pytest.raises(DamagedStoreError, match="train-picture.npy.*bytes instead of"):
            open_store(folder, verify=looked_at)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "train-class.npy").unlink()
    with pytest.raises(DamagedStoreError, match="train-class.npy.*missing"):
        open_store(folder)


def test_a_file_that_is_no_array_is_named(folder: Path) -> None:
    file = folder / "train-class.npy"
    file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(DamagedStoreError, match="train-class.npy.*no .npy file"):
        open_store(folder)


def edit_manifest(folder: Path, change) -> None:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_manifest_that_does_not_fit_is_named(folder: Path) -> None:
    def at(manifest: dict) -> dict:
        return manifest["splits"]["val"]["parts"][0]["arrays"]["class"]["shards"][0]

    def resized(manifest: dict, shape: list[int]) -> None:
        at(manifest).update(shape=shape)
        manifest["splits"]["val"]["parts"][0]["arrays"]["class"].update(shape=shape)

    def many(manifest: dict, clips: int = 10**9) -> None:
        val = manifest["splits"]["val"]["parts"][0]
        val["clips"] = clips
        for array in val["arrays"].values():
            for one in (array, *array["shards"]):
                one["shape"][0] = clips

    def again(manifest: dict) -> None:
        """The same files as clips of many splits, each of which takes memory."""
        many(manifest, 10**6)
        manifest["splits"].update({f"val{number}": manifest["splits"]["val"] for number in range(60)})

    changes = {
        r"clips must be few enough for \d+ bytes of files, got 6\d{7}": again,
        r"clips must be few enough .*, got 1\d{9}.*manifest.json": many,
        "clips of split 'val' must be the length .*manifest.json": lambda manifest: resized(manifest, [5]),
        "val-class.npy.*instead of": lambda manifest: at(manifest).update(dtype="<f8"),
        "must be a plain file name": lambda manifest: at(manifest).update(file="../secret.npy"),
        "files of array 'class' of split 'val' must have the joint": lambda manifest: at(manifest).update(shape=[5]),
        "entry is missing": lambda manifest: at(manifest).pop("sha256"),
        "format .* must be 1 or 2, got 3": lambda manifest: manifest.update(format=3),
        "missing or malformed": lambda manifest: manifest["modalities"]["line"].update(kind="smell"),
    }
    original = (folder / "manifest.json").read_bytes()
    for message, change in changes.items():
        edit_manifest(folder, change)
        with pytest.raises(StoreError, match=message):
            open_store(folder)
        (folder / "manifest.json").write_bytes(original)
    (folder / "manifest.json").write_bytes(original[:100])
    with pytest.raises(DamagedStoreError, match="manifest.json.*no JSON"):
        open_store(folder)


def test_nan_in_a_store_made_elsewhere_is_named(folder: Path) -> None:
    file = folder / "val-picture.npy"
    np.save(file, with_value(np.nan)(np.load(file)))

    def signed(manifest: dict) -> None:
        shard = manifest["splits"]["val"]["parts"][0]["arrays"]["picture"]["shards"][0]
        shard["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()

    edit_manifest(folder, signed)
    for _ in range(2):
        with pytest.raises(StoreError, match="'picture' of split 'val' must hold finite values, got nan in clip 2"):
            open_store(folder)


def test_what_was_verified_is_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_store(folder)
    monkeypatch.setattr(store, "_check_digest", lambda *arguments: pytest.fail("verified twice"))
    open_store(folder)
    os.utime(folder / "val-line.npy")
    with pytest.raises(pytest.fail.Exception):
        open_store(folder)


def stamps(cache: Path) -> list[Path]:
    return sorted((cache / "verified").iterdir())


def flip_bit(file: Path) -> None:
    """Flip a bit and restore the modification time."""
    state = file.stat()
    damage(file)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.fixture
def record(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The record of the store's first opening."""
    monkeypatch.setenv("UNICODE_FAST_CACHE", str(tmp_path / "cache"))
    open_store(folder)
    (file,) = stamps(tmp_path / "cache")
    return file


def test_changed_bits_of_the_disk_are_found_with_always(folder: Path, tmp_path: Path, record: Path) -> None:
    flip_bit(folder / "val-line.npy")
    # A disk that loses bits leaves the inode unchanged.
    recorded = json.loads(record.read_text())
    recorded["files"]["val-line.npy"][2] = (folder / "val-line.npy").stat().st_ctime_ns
    record.write_text(json.dumps(recorded))
    open_store(folder)
    for read in (
        lambda: open_store(folder, verify="always"),
        lambda: verify(open_store(folder)),
        lambda: train([f"--data={folder}", f"--out={tmp_path / 'run'}", "--verify"]),
    ):
        with pytest.raises(DamagedStoreError, match=r"val-line.npy.*checksum differs"):
            read()
    assert not (tmp_path / "run").exists()
    flip_bit(folder / "val-line.npy")
    verify(open_store(folder))
    with pytest.raises(ValueError, match="data must be a feature store, .*, got 'digits'"):
        verify(Dataset(folder, "digits", MODALITIES, CLASSES, {}))


def test_a_record_inside_the_store_is_ignored(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNICODE_FAST_CACHE", str(tmp_path / "cache"))
    damage(folder / "val-line.npy")
    states = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in folder.iterdir()}
    (folder / "verified.json").write_text(json.dumps(states))
    with pytest.raises(DamagedStoreError, match=r"val-line.npy.*checksum differs"):
        open_store(folder)
    damage(folder / "val-line.npy")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    open_store(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_record_that_others_can_write_is_ignored(folder: Path, record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.chmod(record, 0o666)
    monkeypatch.setattr(store, "_check_digest", lambda *arguments: pytest.fail("verified again"))
    with pytest.raises(pytest.fail.Exception):
        open_store(folder)
    os.chmod(record, 0o644)
    open_store(folder)
    # The record of another store at this one's path.
    record.write_text(record.read_text().replace("digits", "others"))
    with pytest.raises(pytest.fail.Exception):
        open_store(folder)


@pytest.mark.parametrize("way", ["a file", "no home", "a link", "a pipe"])
def test_without_a_cache_folder_a_store_is_verified_each_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("UNICODE_FAST_CACHE", "~nobody-of-this-name/cache" if way == "no home" else str(cache))
    if way == "a file":
        cache.touch()
    elif way == "a link":
        cache.mkdir()
        (tmp_path / "elsewhere").mkdir()
        (cache / "verified").symlink_to(tmp_path / "elsewhere")
    elif way == "a pipe":
        (cache / "verified").mkdir(parents=True)
        os.mkfifo(store._stamp_file(folder))
    before = sorted(folder.iterdir())
    checked = []
    check = store._check_digest
    monkeypatch.setattr(store, "_check_digest", lambda *arguments: checked.append(arguments) or check(*arguments))
    for times in (1, 2):
        assert len(open_store(folder).split("val")) == 4
        assert len(checked) == (14 if way == "a pipe" else 14 * times)
    assert sorted(folder.iterdir()) == before
    assert not list((tmp_path / "elsewhere").iterdir()) if way == "a link" else True


def test_not_a_store(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "nothing", tmp_path, tmp_path / "file"):
        with pytest.raises(FileNotFoundError, match="path must be the folder of a feature store"):
            open_store(path)
