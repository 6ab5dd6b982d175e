"""`python -m unicode_fast.data`: problems are counted and named; the exit status is 0 if training can start."""

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from layout_files import DIGITS, double, write_ave, write_avel, write_avvp, write_own, write_rows, write_zip
from processes import python
from test_store import flip_bit
from test_zip_pickle import RAN, Calls, record_run

from unicode_fast.cli import resolve
from unicode_fast.config import DataConfig
from unicode_fast.data import ClipSet, StoreError, open_data, open_dataset, open_store, write_store
from unicode_fast.data.__main__ import main
from unicode_fast.data.check import check
from unicode_fast.data.findings import Finding, Report
from unicode_fast.data.layouts import Request
from unicode_fast.data.layouts import clips as clips_layout
from unicode_fast.data.opening import absolute
from unicode_fast.errors import TooManyFiles, UsageError
from unicode_fast.files.untrusted import BadFile

STREAMS = Request(("audio", "video"))


# With a dozen clips, lists are short, and few classes are in every split.
OF_FEW = ("rows", "unseen classes", "single clips")


def others(report: Report) -> list[Finding]:
    """All findings except those of any data set of a dozen clips."""
    return [finding for finding in report.findings if finding.kind not in OF_FEW]


def kinds(spec: str) -> dict[str, list[str]]:
    """The same findings by kind."""
    return {finding.kind: finding.clips for finding in others(check(spec, STREAMS, progress=False))}


@pytest.mark.parametrize(
    ("layout", "write"), [("vggsound-avel40k", write_avel), ("ave", write_ave), ("avvp", write_avvp)]
)
def test_whole_data_can_start(tmp_path: Path, few: ClipSet, layout: str, write: Callable) -> None:
    write(tmp_path, few)
    report = check(f"{layout}:{tmp_path}", STREAMS, progress=False)
    assert report.can_start and kinds(f"{layout}:{tmp_path}") == {}
    assert report.clips["train"]["audio"] == report.clips["train"]["video"] > 0


PROBLEMS: dict[str, tuple[bool, Callable[[Path, np.ndarray], None]]] = {
    "missing": (True, lambda file, array: file.unlink()),
    "unreadable": (True, lambda file, array: file.write_bytes(b"PK broken")),
    "empty": (True, lambda file, array: write_zip(file, array[:0])),
    "short": (False, lambda file, array: write_zip(file, array[:7])),
    "truncated": (False, lambda file, array: write_zip(file, np.concatenate([array, array]))),
    "non-finite": (True, lambda file, array: write_zip(file, np.where(array == array[3, 3], np.inf, array))),
    "shape": (True, lambda file, array: write_zip(file, array[:, :64])),
    "dtype": (False, lambda file, array: write_zip(file, array.astype(np.float32))),
}


@pytest.mark.parametrize("kind", PROBLEMS)
def test_each_problem_is_the_only_finding(
    tmp_path: Path, few: ClipSet, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    bad, spoil = PROBLEMS[kind]
    name = write_avel(tmp_path, few)[5]
    file = tmp_path / "feature/audio/zip" / f"{name}.zip"
    spoil(file, double(few.features["audio"][5]))
    spec = f"vggsound-avel40k:{tmp_path}"
    found = kinds(spec)
    assert list(found) == [kind] and len(found[kind]) == 1 and found[kind][0].startswith(str(file))
    status = main(["check", spec, "--modalities", "audio,video", "--json", str(tmp_path / "report.json")])
    assert status == int(bad)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["can_start"] is not bad
    assert {entry["kind"]: entry["count"] for entry in report["findings"] if entry["kind"] not in OF_FEW} == {kind: 1}
    shown = capsys.readouterr().out
    assert str(file) in shown and f"{'ERROR' if bad else 'note'} {kind} (1)" in shown
    last = shown.splitlines()[-1 if bad else -2]
    assert last == "training cannot start" if bad else last.startswith("training can start, with ")


def test_short_video_cannot_start(tmp_path: Path, few: ClipSet) -> None:
    name = write_avel(tmp_path, few)[5]
    write_zip(tmp_path / "feature/video/zip" / f"{name}.zip", double(few.features["video"][5])[:9])
    assert list(kinds(f"vggsound-avel40k:{tmp_path}")) == ["positions"]


def test_duplicates_and_overlaps(tmp_path: Path, few: ClipSet) -> None:
    names = write_avel(tmp_path, few)
    rows = [[DIGITS[few.target[0]], names[number], split] for number, split in ((0, "train"), (0, "train"), (0, "val"))]
    write_rows(tmp_path / "vggsound-avel40k.csv", ["category", "video_id", "split"], rows)
    found = kinds(f"vggsound-avel24k:{tmp_path}")
    overlap = [f"{names[0]} in train and val"]
    assert found == {"one class": [], "duplicate": [f"{names[0]} in train"], "overlap": overlap}


def test_copies_under_other_names_are_found(tmp_path: Path, few: ClipSet) -> None:
    names = write_avel(tmp_path, few)
    for name in (names[1], names[3]):
        write_zip(tmp_path / "feature/audio/zip" / f"{name}.zip", double(few.features["audio"][1]))
    (copy,) = kinds(f"vggsound-avel40k:{tmp_path}")["copies"]
    assert sorted(Path(file).stem for file in copy.split(": as ")) == [names[1], names[3]]


def test_the_list_with_half_of_the_rows(tmp_path: Path, few: ClipSet, monkeypatch: pytest.MonkeyPatch) -> None:
    # A dozen clips, each many times.
    monkeypatch.setattr("unicode_fast.data.check._read_labels", lambda index, bad: {})
    names = write_avel(tmp_path, few)
    rows = [[DIGITS[few.target[n % 12]], names[n % 12], "train"] for n in range(20_000)]
    write_rows(tmp_path / "vggsound-avel40k.csv", ["category", "video_id", "split"], rows)
    report = check(f"vggsound-avel40k:{tmp_path}", STREAMS, progress=False)
    bad = next(finding for finding in report.findings if finding.kind == "bad list")
    assert bad.bad and "20000 rows" in bad.text and not report.can_start


def test_missing_lists_are_a_finding(tmp_path: Path, few: ClipSet) -> None:
    write_ave(tmp_path, few)
    (tmp_path / "labels.h5").unlink()
    (tmp_path / "val_order.h5").write_bytes(b"no hdf5")
    assert kinds(f"ave:{tmp_path}") == {"missing": ["labels.h5"]}
    write_ave(tmp_path / "other", few)
    (tmp_path / "other/val_order.h5").write_bytes(b"no hdf5")
    report = check(f"ave:{tmp_path / 'other'}", STREAMS, progress=False)
    assert "val_order.h5 must be a whole HDF5 file" in report.findings[0].text and not report.can_start


def test_an_attack_is_a_finding_and_is_not_run(tmp_path: Path, few: ClipSet) -> None:
    name = write_avel(tmp_path, few)[5]
    write_zip(tmp_path / "feature/audio/zip" / f"{name}.zip", Calls(record_run, "check"))
    found = kinds(f"vggsound-avel40k:{tmp_path}")
    assert list(found) == ["unreadable"] and "names test_zip_pickle.record_run" in found["unreadable"][0] and RAN == []


def test_own_data(tmp_path: Path, few: ClipSet) -> None:
    write_own(tmp_path, few)
    assert others(check(f"clips:{tmp_path}", progress=False)) == []
    np.save(tmp_path / "sound" / "take-1.npy", np.zeros((0, 128)))
    (tmp_path / "picture" / "take-2.npy").write_bytes(pickle.dumps("no array"))
    (tmp_path / "picture" / "take-3.npy").unlink()
    report = check(f"clips:{tmp_path}", progress=False)
    found = {
        finding.kind: [Path(clip.split(" ")[0].rstrip(":")).name for clip in finding.clips]
        for finding in others(report)
    }
    truth = {"missing": ["take-3.npy"], "unreadable": ["take-2.npy"], "empty": ["take-1.npy"], "dtype": ["take-1.npy"]}
    assert found == truth


@pytest.mark.parametrize(("renamed", "bad"), [("some", False), ("all", True)])
def test_a_misspelt_split_is_found(
    tmp_path: Path, few: ClipSet, renamed: str, bad: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training cannot start if no clip is left in train."""
    write_own(tmp_path, few)
    table = tmp_path / "clips.csv"
    clips = table.read_text().count(",train,")
    table.write_text(table.read_text().replace(",train,", ",trian,", 1 if renamed == "some" else clips))
    assert main(["check", f"clips:{tmp_path}"]) == int(bad)
    shown = capsys.readouterr().out
    moved = clips if bad else 1
    assert f"trian: {moved} clips of " in shown
    kind = "ERROR" if bad else "note"
    assert f"{kind} splits (1): not among train, val, test, all: no task uses them" in shown
    assert f"    trian: {moved} clips, a misspelt train?" in shown
    assert ("ERROR no training clips: no split 'train'; --train_split may name one of trian, " in shown) is bad


def test_flags_that_training_needs(tmp_path: Path, few: ClipSet, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a split for scores, or without classes; with a misspelt split, training would be refused."""
    write_own(tmp_path, few)
    assert main(["check", f"clips:{tmp_path}"]) == 0
    shown = capsys.readouterr().out
    assert "train: 5 classes of 1 to 2 clips" in shown
    assert "train: 6 clips are fewer than the usual batch of 80; --batch_size 6 fits" in shown
    command = f"next: python -m unicode_fast.train --data clips:{tmp_path}"
    assert shown.endswith(f"\ntraining can start, with --batch_size 6\n{command} --batch_size 6\n")
    table = (tmp_path / "clips.csv").read_text()
    (tmp_path / "clips.csv").write_text(table.replace(",test,", ",tset,"))
    assert main(["check", f"clips:{tmp_path}"]) == 1
    assert "a misspelt test?" in capsys.readouterr().out
    (tmp_path / "clips.csv").write_text(table.replace(",test,", ",train,"))
    assert main(["check", f"clips:{tmp_path}"]) == 0
    flags = "--validations 0 --probe_tasks none --batch_size 9"
    why = "there is no split test: training is not validated, and no task is measured"
    assert capsys.readouterr().out.endswith(f"\n{why}\ntraining can start, with {flags}\n{command} {flags}\n")


def test_a_folder_of_a_layout_without_its_name(tmp_path: Path) -> None:
    (tmp_path / "clips.csv").touch()
    with pytest.raises(FileNotFoundError, match=f"data in layout clips must be given as clips:{tmp_path}, got"):
        open_data(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="data must be an existing folder, got '.*/none'"):
        open_data(str(tmp_path / "none"))


def test_bad_usage(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="root of 'ave:/no/where' must be a folder"):
        main(["check", "ave:/no/where"])
    with pytest.raises(FileNotFoundError):
        main(["check", str(tmp_path)])
    for wrong in (["inspect"], ["check", str(tmp_path), "--modalities", "a"], ["check", "ave:/x", "--text_model", "y"]):
        with pytest.raises(UsageError):
            main(wrong)


def test_pack_then_check_by_command(tmp_path: Path, few: ClipSet) -> None:
    write_avel(tmp_path / "avel", few)
    spec, store = f"vggsound-avel24k:{tmp_path / 'avel'}", str(tmp_path / "store")
    command = ("-m", "unicode_fast.data", "pack", spec, store)
    done = python(*command, "--dtype", "float16", "--modalities", "audio,video")
    assert done.returncode == 0, done.stderr
    assert open_store(store).split("train").features["video"].dtype == np.float16
    assert main(["check", store]) == 0
    again = python(*command)
    assert again.returncode == 1 and "must not exist yet" in again.stderr and "Traceback" not in again.stderr


BAD_LISTS = {
    "none": ("id,split,class\n", "must list at least one clip"),
    "long": ("id,split,class\na,train,x,y\n", "must have 3 fields in each row, row 1 has more"),
    "short": ("id,split,class\na,train\n", "row 1 is cut short"),
    "no class": ("id,split,class\na,train,\n", "class in .*clips.csv must be given for every clip, got none for 'a'"),
    "two splits": ("id,split\na,train\na,test\n", "must be in one split only, got 'a' in two"),
    "split": ("id,split\na,train set\n", "split in .*clips.csv must consist of letters, .*got 'train set'"),
    "no split": ("id,split\na,\n", "split in .*clips.csv must be given for every clip, got none for 'a'"),
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_bad_lists_of_clips(tmp_path: Path, case: str) -> None:
    text, message = BAD_LISTS[case]
    (tmp_path / "clips.csv").write_text(text)
    (tmp_path / "radar").mkdir()
    np.save(tmp_path / "radar" / "a.npy", np.zeros((3, 4)))
    report = check(f"clips:{tmp_path}", progress=False)
    assert not report.can_start
    with pytest.raises(StoreError, match=message):
        open_data(f"clips:{tmp_path}")


def test_a_list_in_another_encoding_and_a_name_that_no_model_takes(tmp_path: Path) -> None:
    (tmp_path / "clips.csv").write_bytes("id,split\nübung,train\n".encode("latin-1"))
    (tmp_path / "my radar").mkdir()
    for message in ("clips.csv must be in UTF-8, got byte 0xfc at 9", "that begins with no digit, got 'my radar'"):
        report = check(f"clips:{tmp_path}", progress=False)
        assert not report.can_start and message in report.findings[0].text
        (tmp_path / "clips.csv").write_text("id,split\na,train\n")


@pytest.mark.parametrize("command", ["check", "pack"])
def test_an_unknown_modality_is_refused(tmp_path: Path, command: str) -> None:
    (tmp_path / "clips.csv").write_text("id,split\na,train\n")
    (tmp_path / "radar").mkdir()
    np.save(tmp_path / "radar" / "a.npy", np.zeros((3, 4)))
    words = [command, f"clips:{tmp_path}", *([str(tmp_path / "store")] if command == "pack" else [])]
    with pytest.raises(UsageError, match=", got 'foo'"):
        main([*words, "--modalities", "radar,foo"])
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.full((7, 12), 0.5)[:3], "must have shape"),
        (np.full((7, 12), np.nan), r"must lie in \[0, 1\], got nan"),
        (np.full((7, 12), 7), r"must lie in \[0, 1\], got 7"),
        (np.full((7, 12), "one"), "must hold numbers, got <U3"),
    ],
)
def test_labels_that_do_not_fit_are_named(tmp_path: Path, few: ClipSet, value: np.ndarray, message: str) -> None:
    lengths = write_own(tmp_path, few)
    file = tmp_path / "sound.labels/take-0.npy"
    columns = np.load(file).shape[1]
    np.save(file, np.resize(value, (len(value) if "shape" in message else lengths[0], columns)))
    (finding,) = others(check(f"clips:{tmp_path}", progress=False))
    assert finding.kind == "labels" and finding.bad and re.search(f"take-0.npy {message}", finding.clips[0])
    with pytest.raises(StoreError, match=f"take-0.npy {message}"):
        np.asarray(open_data(f"clips:{tmp_path}").split("train").labels["sound"])


def test_what_training_would_refuse_cannot_start(tmp_path: Path, few: ClipSet) -> None:
    write_own(tmp_path, few)
    write_rows(tmp_path / "modalities.csv", ["modality", "kind"], [["sound", "grid"], ["picture", "grid"]])
    report = check(f"clips:{tmp_path}", progress=False)
    assert not report.can_start and "shape of a grid modality must be" in others(report)[0].text
    (tmp_path / "modalities.csv").unlink()
    shutil.rmtree(tmp_path / "picture")
    (finding,) = others(check(f"clips:{tmp_path}", progress=False))
    assert finding.bad and finding.text == "training needs two, got sound"


def write_small(root: Path, rows: list[str], columns: str = "id,split,class", steps: int = 3) -> str:
    """Own data of two modalities, one clip per row; returns the data for `check`."""
    root.mkdir(exist_ok=True)
    (root / "clips.csv").write_text("\n".join([columns, *rows]))
    generator = np.random.default_rng(0)
    for name in ("radar", "sonar"):
        (root / name).mkdir(exist_ok=True)
        for number, row in enumerate(rows):
            values = generator.normal(size=(steps + number % 2, 4)).astype(np.float32)
            np.save(root / name / f"{row.split(',')[0]}.npy", values)
    return f"clips:{root}"


def clips(*classes: str, split: str = "train", first: int = 0) -> list[str]:
    return [f"{split}{first + number},{split},{name}" for number, name in enumerate(classes)]


WRONG_CLASSES = {
    "two for a clip": (
        ["a,train,walk", "b,train,talk", "a,train,talk"],
        "class in .*clips.csv must be one for each clip, got 'walk' and 'talk' for 'a'",
    ),
    "spaces": (
        clips("walk", "walk ", "talk"),
        "class in .*clips.csv must always have the same spelling, got 'walk' and 'walk '",
    ),
}


@pytest.mark.parametrize("case", WRONG_CLASSES)
def test_classes_that_contradict_are_refused(tmp_path: Path, case: str) -> None:
    rows, message = WRONG_CLASSES[case]
    spec = write_small(tmp_path, rows)
    (finding,) = check(spec, progress=False).findings
    assert finding.bad and re.search(message, finding.text)
    with pytest.raises(StoreError, match=message):
        open_data(spec)


BOTH = clips("walk", "talk", "walk", "talk")
NOTES: dict[str, tuple[list[str], str, dict[str, list[str]], str]] = {
    "several in one": (
        clips("walk;talk", "walk", "walk;talk", "walk"),
        "class names: a clip has one class, so each of these is one name; .*: 'walk;talk'$",
        {"class names": []},
        "",
    ),
    "several with commas": (
        clips("walk", "walk, talk", "walk", "walk, talk"),
        "class names: .*each of these is one name.*'walk, talk'$",
        {"class names": []},
        "",
    ),
    "padded": (
        clips("walk ", "talk", "walk ", "talk"),
        "class names: with spaces.*: 'walk '$",
        {"class names": []},
        "",
    ),
    "capitals": (clips("walk", "Walk", "walk", "Walk"), "'Walk' and 'walk' are two classes$", {"class names": []}, ""),
    "regression": (
        clips("0.5", "0.25", "0.5", "1e-3"),
        "numbers: 3 numbers are the classes of 4 clips of train: .*regression is not supported",
        {"numbers": []},
        "--validations 0 --probe_tasks none",
    ),
    "single clips": (
        clips("walk", "talk"),
        "single clips: each class of train has one clip",
        {"single clips": []},
        "--validations 0 --probe_tasks none",
    ),
    "one class": (
        clips("walk", "walk"),
        "one class: all clips of train are of class 'walk'",
        {"one class": []},
        "--validations 0 --probe_tasks none",
    ),
    "unseen": (
        [*BOTH, *clips("walk", "jump", "run", split="test")],
        r"unseen classes \(2\): classes of test without a clip in train",
        {"unseen classes": ["jump", "run"]},
        "",
    ),
    "sound": ([*BOTH, *clips("talk", split="test")], "", {}, ""),
    "comma in a name": (clips('"a, b"', "c", '"a, b"', "c"), "", {}, ""),
}


@pytest.mark.parametrize("case", NOTES)
def test_classes_that_cannot_be_learned_are_found(tmp_path: Path, case: str) -> None:
    rows, line, found, flags = NOTES[case]
    rows = [*rows, *([] if any(",test," in row for row in rows) else clips(rows[0].split(",", 2)[2], split="test"))]
    rows = [row if row.count(",") == 2 or '"' in row else re.sub(",([^,]*, [^,]*)$", r',"\1"', row) for row in rows]
    spec = write_small(tmp_path, [*rows, *clips(rows[0].split(",", 2)[2], split="val")])
    report = check(spec, progress=False)
    assert {finding.kind: finding.clips for finding in report.findings} == found and report.can_start
    assert not line or any(re.search(f"note {line}" if ":" in line else line, shown) for shown in report.lines())
    assert report.flags == f"{flags} --batch_size {report.clips['train']['radar']}".strip()
    open_data(spec)


def test_columns_that_are_not_read_are_named(tmp_path: Path) -> None:
    rows = [f"{row},some words,3" for row in BOTH]
    (finding,) = check(write_small(tmp_path, rows, "id,split,class,caption,target"), progress=False).findings
    assert (finding.kind, finding.bad) == ("columns", False) and "not read: caption, target;" in finding.text


def test_labels_of_background_only_are_found(tmp_path: Path) -> None:
    spec = write_small(tmp_path, BOTH)
    (tmp_path / "radar.labels").mkdir()
    for number, row in enumerate(BOTH):
        np.save(tmp_path / "radar.labels" / f"{row.split(',')[0]}.npy", np.eye(3)[[2] * (3 + number % 2)])
    assert {finding.kind: finding.clips for finding in check(spec, progress=False).findings} == {
        "background": ["radar"]
    }
    np.save(tmp_path / "radar.labels" / "train0.npy", np.eye(3)[[2, 0, 2]])
    assert check(spec, progress=False).findings == []


def test_labels_of_positions_without_training_clips_are_found(tmp_path: Path, spoken: ClipSet) -> None:
    arrays = {
        key: np.asarray(array) for key, array in spoken.arrays.items() if key in ("audio", "video", "audio.label")
    }
    digit = np.asarray(spoken.target)
    splits = {
        name: {key: array[np.isin(digit, of)] for key, array in arrays.items()}
        for name, of in (("train", [0, 1, 2, 3]), ("test", [0, 4, 5]))
    }
    kinds_of = {name: spoken.modalities[name] for name in ("audio", "video")}
    write_store(tmp_path / "store", "few", kinds_of, spoken.classes, splits)
    expected = [str(number) for number in (4, 5) if number in digit]
    (finding,) = check(str(tmp_path / "store"), progress=False).findings
    assert expected and (finding.kind, finding.clips) == ("unseen classes", expected)


@pytest.mark.parametrize(("count", "size"), [(30, 30), (80, 80), (95, 80)])
def test_whether_the_usual_batch_fits(tmp_path: Path, count: int, size: int) -> None:
    report = check(
        write_small(tmp_path, clips(*["walk", "talk"] * (count // 2), *["walk"] * (count % 2))), progress=False
    )
    assert report.as_dict()["batch"] == {"train": {"fits": size == 80, "usual": 80, "batch_size": size}}
    assert ("--batch_size 30" in report.flags) is (size == 30) and ("batch_size" in report.flags) is (size < 80)
    line = f"train: {size} clips are fewer than the usual batch of 80; --batch_size {size} fits"
    assert (line in report.lines()) is (size < 80)


@pytest.mark.parametrize("form", ["layout", "float32", "bfloat16", "stream"])
def test_kind_shape_and_length_of_each_modality(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    spec = write_small(tmp_path / "own", [*BOTH, *clips("walk", split="val", first=4)])
    for number in range(4):
        np.save(tmp_path / "own" / "sonar" / f"train{number}.npy", np.ones((2, 5, 5, 1)) * number)
    np.save(tmp_path / "own" / "sonar" / "val4.npy", np.ones((2, 5, 5, 1)) * 9)
    if form in ("float32", "bfloat16"):
        assert main(["pack", spec, str(tmp_path / "store"), "--dtype", form]) == 0
        spec = str(tmp_path / "store")
    elif form == "stream":
        assert main(["shards", spec, str(tmp_path / "tars"), "--clips", "3"]) == 0
        spec = f"webdataset:{tmp_path / 'tars'}"
    capsys.readouterr()
    assert main(["check", spec, "--json", str(tmp_path / "report.json")]) == 0
    found = json.loads((tmp_path / "report.json").read_text())["modalities"]
    radar, sonar = (
        ("float32", "float64") if form == "layout" else (("bfloat16",) * 2 if form == "bfloat16" else ("float32",) * 2)
    )
    vector = {"kind": "vector", "shape": [4], "dtype": radar, "positions": 4, "steps": 4}
    grid = {"kind": "grid", "shape": [5, 5, 1], "dtype": sonar, "positions": 2, "steps": 2, "shortest": 2, "longest": 2}
    assert found == {
        "train": {"radar": {**vector, "shortest": 3, "longest": 4}, "sonar": grid},
        "val": {"radar": {**vector, "shortest": 3, "longest": 3}, "sonar": grid},
    }
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "train: 4 clips of radar, 4 clips of sonar"
    assert shown[1:3] == [
        f"    radar: vector (4,) of {radar}, 4 positions, 3 to 4 valid",
        f"    sonar: grid (5, 5, 1) of {sonar}, 2 positions",
    ]
    assert "train: 2 classes of 2 to 2 clips" in shown and "val: 1 classes of 1 to 1 clips" in shown


@pytest.mark.parametrize("command", ["pack", "shards"])
def test_what_was_written_and_the_next_command_come_last(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = write_small(tmp_path / "own", [*BOTH, *clips("walk", split="val", first=4)])
    store = tmp_path / "a store"
    assert main([command, spec, str(store)]) == 0
    written = [file.stat().st_size for file in store.iterdir()]
    first, last = capsys.readouterr().out.splitlines()
    size = f"{sum(written):,} bytes in {len(written)} files"
    assert re.fullmatch(rf"{re.escape(str(store))}: clips of train 4, val 1; {size}; [0-9.]+ s", first)
    prefix = "webdataset:" if command == "shards" else ""
    assert last == (
        f"next: python -m unicode_fast.train --data '{prefix}{store}' --validations 0 --probe_tasks none --batch_size 4"
    )


def test_every_damaged_clip_is_a_finding_and_names_reach_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the first clip of a modality, and errors that no reader should raise."""
    evil = "evil\x1b[2J"
    rows = [f"{evil},train,walk", *BOTH]
    spec = write_small(tmp_path, rows)
    (tmp_path / "radar" / f"{evil}.npy").write_bytes(b"no array")
    (tmp_path / "radar" / "train1.npy").unlink()
    (tmp_path / "radar" / "train1.npy").mkdir()
    read = clips_layout.read_npy

    def failing(file: Path) -> np.ndarray:
        if file.name == "train2.npy":
            raise KeyError("unforeseen")
        if file == tmp_path / "sonar" / "train3.npy":
            raise BadFile("it is cut short")
        return read(file)

    monkeypatch.setattr(clips_layout, "read_npy", failing)
    assert main(["check", spec, "--json", str(tmp_path / "report.json")]) == 1
    shown = capsys.readouterr().out
    (finding,) = (
        one for one in json.loads((tmp_path / "report.json").read_text())["findings"] if one["kind"] != "copies"
    )
    assert finding["kind"] == "unreadable" and finding["count"] == 5
    for place, name in enumerate(
        (f"radar/{evil}.npy", "radar/train1.npy", "radar/train2.npy", "sonar/train2.npy", "sonar/train3.npy")
    ):
        assert str(tmp_path / name) in finding["clips"][place]
    assert "KeyError: 'unforeseen'" in finding["clips"][2] and finding["clips"][4].endswith(
        "train3.npy: it is cut short"
    )
    assert "\x1b" not in shown and r"evil\x1b[2J.npy" in shown and "\x1b" not in (tmp_path / "report.json").read_text()


@pytest.mark.parametrize(
    "content", [b'id,split\n"a,train\n', b"id,split\na,train,more\n", b"\xff\xfe", b"", b"\0" * 50]
)
def test_a_damaged_list_is_a_finding(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    spec = write_small(tmp_path, BOTH)
    (tmp_path / "clips.csv").write_bytes(content)
    assert main(["check", spec]) == 1
    printed = capsys.readouterr()
    assert "ERROR contents: " in printed.out and "error:" not in printed.err and "Traceback" not in printed.err


def test_check_compares_every_file_of_a_store_and_names_all_that_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pack", write_small(tmp_path / "own", BOTH), str(tmp_path / "store")]) == 0
    store = tmp_path / "store"
    open_store(store)
    assert main(["check", str(store)]) == 0
    for name in ("train-radar.npy", "train-class.npy"):
        flip_bit(store / name)
    (store / "train-id.npy").unlink()
    capsys.readouterr()
    assert main(["check", str(store)]) == 1
    shown = capsys.readouterr().out
    assert "ERROR damaged (3): files that changed since they were written" in shown
    for name, what in (("radar", "its checksum differs"), ("class", "its checksum differs"), ("id", "it is missing")):
        assert re.search(rf"train-{name}\.npy' must be as written, but {what}", shown)


def test_check_reads_the_values_of_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["pack", write_small(tmp_path / "own", BOTH), str(tmp_path / "store")]) == 0
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    for name in ("radar", "sonar"):
        file = tmp_path / "store" / f"train-{name}.npy"
        values = np.load(file)
        values[2, 0, 1] = np.nan
        np.save(file, values)
        (shard,) = manifest["splits"]["train"]["parts"][0]["arrays"][name]["shards"]
        shard["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (tmp_path / "store" / "manifest.json").write_text(json.dumps(manifest))
    (finding,) = (one for one in check(str(tmp_path / "store"), progress=False).findings if one.bad)
    assert len(finding.clips) == 2 and all("must hold finite values, got nan in clip 2" in one for one in finding.clips)


def test_check_goes_on_with_the_other_files_of_a_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = write_small(tmp_path / "own", clips(*["walk", "talk"] * 4))
    assert main(["shards", spec, str(tmp_path / "tars"), "--clips", "2"]) == 0
    (tmp_path / "tars" / "train-000000.tar").write_bytes(b"no tar file at all, of some length" * 40)
    (tmp_path / "tars" / "train-000002.tar").unlink()
    capsys.readouterr()
    assert main(["check", f"webdataset:{tmp_path / 'tars'}"]) == 1
    shown = capsys.readouterr().out
    assert "ERROR missing (1)" in shown and "train-000002.tar" in shown
    assert "ERROR unreadable (1)" in shown and "    train-000000.tar: " in shown
    assert "train: 2 classes of 2 to 2 clips" in shown and "train: 8 clips of radar, 8 clips of sonar" in shown


def test_home_folders_in_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_small(tmp_path / "own", BOTH)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["check", "clips:~/own", "--json=~/report.json"]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["can_start"]
    assert main(["pack", "clips:~/own", "~/store"]) == 0
    assert main(["shards", "~/store", "~/tars"]) == 0
    (tmp_path / "run.yaml").write_text("data: clips:~/own\ntext_whitelist: ~/cnt.pkl\n")
    config = resolve(str(tmp_path / "run.yaml"), {})
    assert (config.data.data, config.data.text_whitelist) == (f"clips:{tmp_path}/own", f"{tmp_path}/cnt.pkl")
    for spec in ("~/store", "clips:~/own", "webdataset:~/tars"):
        assert open_data(spec).splits == ["train"] and open_dataset(DataConfig(data=spec)).splits == ["train"]
        assert absolute(spec).endswith(f"{tmp_path}/{spec.partition('~/')[2]}")


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_too_many_open_files_are_no_damage(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = write_small(tmp_path / "own", BOTH)
    assert main(["pack", spec, str(tmp_path / "store")]) == 0
    opened = os.open

    def full(path: str, *more: object, **keywords: object) -> int:
        if str(path).endswith(("radar.npy", "train1.npy")):
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *more, **keywords)

    monkeypatch.setattr(os, "open", full)
    for call in (lambda of: check(of, progress=False), open_data):
        for data in (spec, str(tmp_path / "store")):
            with pytest.raises(TooManyFiles, match=r"may open no more files; .*(ulimit -n|fs.file-max).*, got '/"):
                call(data)
