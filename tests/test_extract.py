"""From a folder of media files to a store: the table, skipped files, interruptions, and processes that die."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from media_files import beeps, flash_and_beep, write_media

from unicode_fast import Modality, media
from unicode_fast.data import StoreError, open_store
from unicode_fast.errors import UsageError
from unicode_fast.extract import main
from unicode_fast.files.locks import InUse
from unicode_fast.media import extraction
from unicode_fast.media.captions import SUFFIXES, CaptionsError, drawn_split, list_files, notes, read_captions
from unicode_fast.media.processes import Died, in_processes

CAPTION = "a small dog runs over the green grass of an old garden"
WORDS = 4


class Loudness:
    """Mean amplitude in six parts of each second."""

    name, reads, rate, modality = "loudness", "sound", 8000, Modality("vector", (6,))
    # Seconds that a call takes, and a file with one line for each call.
    delay: ClassVar[float] = 0.0
    log: ClassVar[Path | None] = None

    def __call__(self, given: np.ndarray) -> np.ndarray:
        time.sleep(self.delay)
        if self.log is not None:
            with open(self.log, "a") as file:
                file.write("call\n")
        whole = given.shape[1] // 6 * 6
        return np.abs(given[:, :whole]).reshape(len(given), 6, -1).mean(2)


class Areas:
    """Mean colour of 25 areas."""

    name, reads, rate, modality = "areas", "frames", 1, Modality("grid", (5, 5, 3))

    def __call__(self, given: np.ndarray) -> np.ndarray:
        sides = [size // 5 * 5 for size in given.shape[1:3]]
        cut = given[:, : sides[0], : sides[1]]
        return cut.reshape(len(cut), 5, sides[0] // 5, 5, sides[1] // 5, 3).mean((2, 4)).astype(np.float32) / 255


class Letters:
    """Number of each of eight letters in the first words."""

    name, reads, rate, modality = "letters", "caption", 0, Modality("words", (8,))

    def words(self, caption: str) -> list[str]:
        return caption.split()

    def __call__(self, given: str) -> np.ndarray:
        return np.array([[word.count(letter) for letter in "adegnors"] for word in given.split()[:10]], np.float32)


for one in (Loudness, Areas, Letters):
    media.register(one.name, one)


def backbones(*names: str) -> dict[str, Any]:
    made = {"audio": Loudness(), "video": Areas(), "text": Letters()}
    return {name: made[name] for name in names or made}


def write_table(file: Path, rows: list[str], header: str = "file,split,class,caption", encoding: str = "utf-8") -> Path:
    file.write_bytes("\n".join([header, *rows]).encode(encoding))
    return file


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six films of two seconds in two folders, and one of 12 s."""
    folder = tmp_path_factory.mktemp("media") / "videos"
    for number in range(6):
        (folder / f"f{number % 2}").mkdir(parents=True, exist_ok=True)
        flash_and_beep(folder / f"f{number % 2}" / f"{number}.mp4", fps=5, seconds=2, at=(number % 2,))
    flash_and_beep(folder / "long.mp4", fps=5, seconds=12, at=(11,))
    return folder


ROWS = [
    f'f{n % 2}/{n}.mp4,{("train", "train", "val", "test")[n % 4]},{("dog", "cat")[n % 2]},"{CAPTION}, {n}"'
    for n in range(6)
]


@pytest.fixture(scope="module")
def table(videos: Path) -> Path:
    return write_table(videos.parent / "captions.csv", [*ROWS, "long.mp4,train,cat,a long film"])


@pytest.fixture(scope="module")
def store(videos: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all of them, without an interruption."""
    path = tmp_path_factory.mktemp("stores") / "whole"
    media.extract(videos, path, captions=table, backbones=backbones(), progress=False)
    return path


class TestTable:
    BAD: ClassVar = {
        "no column file": (["x.mp4"], "name", "must have the columns file, separated by commas, got name"),
        "no rows": ([], "file", "must list at least one file, got none"),
        "column twice": (["long.mp4,a,b"], "file,class,class", "each column once, got 'class'"),
        "short row": (["f0/0.mp4,train"], "file,split,class", r"cut short \(line 2\)"),
        "long row": (["f0/0.mp4,train"], "file", r"has more \(line 2\)"),
        "unknown": (["f0/0.mp4", "f0/7.mp4"], "file", r"line 3: file must exist in .*, got 'f0/7.mp4'"),
        "other suffix": (["long.avi"], "file", r"line 2: .* is 'long.mp4' meant\?"),
        "other folder": (["0.mp4"], "file", r"is 'f0/0.mp4' meant\?"),
        "typo": (["f0/O.mp4"], "file", r"is 'f0/\d.mp4' meant\?"),
        "blank file": ([" ,train"], "file,split", "line 2: file must be given"),
        "a folder": (["f0"], "file", "line 2: file must exist"),
        "above": (["../videos/long.mp4"], "file", "line 2: file must be a path within"),
        "absolute": (["/etc/passwd"], "file", "line 2: file must be a path within .*, got '/etc/passwd'"),
        "twice": (["f0/0.mp4", "f0/2.mp4", "./f0/0.mp4"], "file", "line 4: each clip must have one row, .* in line 2"),
        "two splits": (["f0/0.mp4,val", "f0/0.mp4,test"], "file,split", "line 3: .* there in split 'val', here 'test'"),
        "two splits overlap": (
            ["long.mp4,test,5,", "f0/0.mp4,val,,", "long.mp4,train,0,3", "long.mp4,val,2,6"],
            "file,split,start,end",
            "line 5: clips of two splits must share no seconds, got 'long.mp4@2-6' in 'val'",
        ),
        "enclosed": (
            ["long.mp4,train,0,9", "long.mp4,train,1,2", "long.mp4,val,8,10"],
            "file,split,start,end",
            "line 4: .*, in line 2, 'long.mp4@0-9' in 'train'",
        ),
        "end before start": (["long.mp4,5,5"], "file,start,end", "line 2: end must be after start, got start 5, end 5"),
        "no number": (["long.mp4,soon"], "file,start", "line 2: start must be a number of seconds .*, got 'soon'"),
        "not finite": (["long.mp4,nan"], "file,end", "line 2: end must be a number of seconds"),
        "negative": (["long.mp4,-1"], "file,start", "line 2: start must be a number of seconds of at least 0"),
        "blank class": (["f0/0.mp4,a", "f0/2.mp4, "], "file,class", "line 3: class must be given in each row"),
        "only blank classes": (["f0/0.mp4,", "f0/2.mp4,"], "file,class", "or no column class; got only blank ones"),
        "spelling": (["f0/0.mp4,a", "f0/2.mp4,a "], "file,class", "line 3: .* spelling, got 'a' and 'a '"),
        "bad split": (["f0/0.mp4,tr/n"], "file,split", "line 2: split must consist of letters"),
        "long caption": ([f"f0/0.mp4,{'a' * 5000}"], "file,caption", "line 2: caption must have at most 4096"),
        "a quote": (['f0/0.mp4,"a', "f0/2.mp4,b"], "file,caption", "a quote is not closed"),
    }

    @pytest.mark.parametrize("name", BAD)
    def test_each_mistake_is_named(self, name: str, videos: Path, tmp_path: Path) -> None:
        rows, header, message = self.BAD[name]
        with pytest.raises(StoreError, match=message):
            read_captions(write_table(tmp_path / "t.csv", rows, header), videos)

    def test_lines_are_counted_where_captions_have_several(self, videos: Path, tmp_path: Path) -> None:
        rows = ['f0/0.mp4,"two\nlines"', "", "f0/9.mp4,x"]
        with pytest.raises(CaptionsError, match="line 5: file must exist"):
            read_captions(write_table(tmp_path / "t.csv", rows, "file,caption"), videos)

    def test_other_encodings_are_named(self, videos: Path, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match="must be in UTF-8, got byte 0xe9"):
            read_captions(write_table(tmp_path / "t.csv", ["long.mp4,café"], "file,caption", "latin-1"), videos)
        marked = write_table(tmp_path / "m.csv", ["long.mp4,café"], "\ufefffile,caption")
        assert read_captions(marked, videos).parts[0].caption == "café"

    def test_parts_of_a_file(self, videos: Path, tmp_path: Path) -> None:
        rows = ["long.mp4,0,2.50,one,a", "long.mp4,4,, ,b", "f0/0.mp4,,,three,c"]
        found = read_captions(write_table(tmp_path / "t.csv", rows, "file,start,end,caption,author"), videos)
        assert [part.id for part in found.parts] == ["long.mp4@0-2.5", "long.mp4@4-", "f0/0.mp4"]
        assert [part.caption for part in found.parts] == ["one", "", "three"]
        assert found.hashed == 3 and {part.split for part in found.parts[:2]} == {drawn_split("long.mp4")}
        assert any("columns not read: author" in line for line in notes(found, tmp_path / "t.csv"))

    def test_splits_are_drawn_from_names(self) -> None:
        drawn = [drawn_split(f"videos/{n}.mp4") for n in range(5000)]
        shares = [drawn.count(split) / 5000 for split in ("train", "val", "test")]
        assert np.allclose(shares, (0.8, 0.1, 0.1), atol=0.02)
        # The same on every machine and in every version.
        assert [drawn_split(f"{n}.mp4") for n in range(12)] == DRAWN

    def test_all_files_of_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / ".hidden").mkdir()
        (tmp_path / "b").mkdir()
        for name in ("b/x.MP4", "a.wav", "._a.wav", "notes.txt", ".hidden/c.mp4"):
            (tmp_path / name).write_bytes(b"")
        found = list_files(tmp_path)
        assert [part.file for part in found.parts] == ["a.wav", "b/x.MP4"] and found.ignored == 2
        assert any(line.startswith("2 files are ignored") for line in notes(found, None))
        (tmp_path / "a.wav").unlink()
        (tmp_path / "b/x.MP4").unlink()
        with pytest.raises(FileNotFoundError, match="a folder with a media file of a known kind"):
            list_files(tmp_path)
        assert len(set(SUFFIXES)) == len(SUFFIXES)


DRAWN = ["train", "val", "train", "val", *["train"] * 6, "val", "train"]


class TestStore:
    def test_clips(self, store: Path, videos: Path) -> None:
        data = open_store(store)
        assert {split: len(data.split(split)) for split in data.splits} == {"train": 6, "val": 1, "test": 1}
        assert list(data.modalities) == ["audio", "video", "text"] and data.classes == ["cat", "dog"]
        train = data.split("train")
        assert train.id.tolist() == ["f0/0.mp4", "f1/1.mp4", "f0/4.mp4", "f1/5.mp4", "long.mp4", "long.mp4#10"]
        assert train.arrays["file"].tolist()[-2:] == ["long.mp4", "long.mp4"]
        assert train.arrays["start"].tolist() == [0, 0, 0, 0, 0, 10]
        assert train.arrays["caption"].tolist()[1] == f"{CAPTION}, 1"
        assert train.target.tolist() == [1, 0, 1, 0, 0, 0]
        assert train.lengths["video"].tolist() == train.lengths["audio"].tolist() == [2, 2, 2, 2, 10, 2]
        assert train.lengths["text"].tolist() == [10, 10, 10, 10, 3, 3]
        for clip, part in ((0, 0), (4, 0), (5, 1)):
            file, caption = (str(train.arrays[key][clip]) for key in ("file", "caption"))
            direct = media.features(videos / file, backbones(), caption=caption)[part]
            for name, expected in direct.features.items():
                found = train.arrays[name][clip]
                assert np.array_equal(found[: len(expected)], expected) and not found[len(expected) :].any()
        # The flash and the beep of second 11 of the file.
        assert train.arrays["video"][5, :, 0, 0, 0].argmax() == train.arrays["audio"][5, :, 0].argmax() == 1

    def test_preprocessor(self, store: Path) -> None:
        content = json.loads((store / "preprocessor.json").read_text())
        assert open_store(store).preprocessor == content
        assert list(media.Preprocessor.from_dict(content).make()) == ["audio", "video", "text"]
        assert [path.name for path in store.parent.iterdir() if "extracting" in path.name] == []

    def test_parts_of_files_and_a_dtype(self, videos: Path, tmp_path: Path) -> None:
        rows = ["long.mp4,9.5,12,train", "long.mp4,3,5,test"]
        table = write_table(tmp_path / "t.csv", rows, "file,start,end,split")
        done = media.extract(
            videos, tmp_path / "s", captions=table, backbones=backbones("audio"), dtype="float16", progress=False
        )
        data = open_store(tmp_path / "s")
        assert done.clips == {"train": 1, "test": 1} and data.split("train").id.tolist() == ["long.mp4@9.5-12"]
        audio = data.split("train").arrays["audio"]
        # The beep begins 1.5 s after the start of the part.
        assert audio.dtype == np.float16 and audio[0, 0].max() < 0.01 and audio[0, 1, -1] > 0.2 > 0.01 > audio[0, 1, 0]
        assert done.absent == [] and list(data.modalities) == ["audio"] and done.media_s == 5

    def test_the_summary(self, videos: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        flags = ["--audio=loudness", "--video=areas", "--text=letters", "--workers=1"]
        assert main([str(videos), str(tmp_path / "s"), f"--captions={table}", *flags]) == 0
        out = capsys.readouterr().out.splitlines()
        assert out[0] == "7 of 7 files, 8 clips, 24 s of media"
        assert out[1] == "6 captions have more words than their backbone keeps; the rest is not read"
        assert out[2].startswith(f"{tmp_path / 's'}: clips of train 6, val 1, test 1; ")
        assert out[3] == f"next: python -m unicode_fast.train --data {tmp_path / 's'} --batch_size 6"

    def test_without_a_table(self, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        done = media.extract(videos, tmp_path / "s", backbones=backbones(), progress=False)
        assert sum(done.clips.values()) == 8 and list(open_store(tmp_path / "s").modalities) == ["audio", "video"]
        errors = capsys.readouterr().err
        assert "no file has a caption, so the store has no text" in errors
        assert "split drawn from the name of the file, 80 % train" in errors

    def test_a_modality_that_no_clip_has(self, tmp_path: Path) -> None:
        (tmp_path / "videos").mkdir()
        for name in ("a", "b"):
            write_media(tmp_path / "videos" / f"{name}.wav", sound=beeps(2, rate_hz=16000), rate_hz=16000)
        done = media.extract(tmp_path / "videos", tmp_path / "s", backbones=backbones("audio", "video"), progress=False)
        data = open_store(tmp_path / "s")
        assert done.absent == ["video"] and list(data.modalities) == ["audio"]
        assert "no clip has video, so the store has none" in done.lines()
        assert list(data.preprocessor["modalities"]) == ["audio"]

    def test_clips_that_lack_a_modality(self, tmp_path: Path) -> None:
        folder = tmp_path / "videos"
        folder.mkdir()
        flash_and_beep(folder / "both.mp4", fps=5, seconds=2, at=(1,))
        write_media(folder / "heard.wav", sound=beeps(2, rate_hz=16000), rate_hz=16000)
        write_media(folder / "seen.mp4", np.full((10, 64, 64, 3), 200, np.uint8), fps=5)
        rows = ["both.mp4,train,a dog", "heard.wav,train,", "seen.mp4,train,two words more"]
        table = write_table(tmp_path / "t.csv", rows, "file,split,caption")
        done = media.extract(folder, tmp_path / "s", captions=table, backbones=backbones(), progress=False)
        train = open_store(tmp_path / "s").split("train")
        assert {name: lengths.tolist() for name, lengths in train.lengths.items()} == {
            "audio": [2, 2, 0], "video": [2, 0, 2], "text": [2, 0, 3],
        }  # fmt: skip
        assert not any(train.arrays[name][clip].any() for name, clip in (("audio", 2), ("video", 1), ("text", 1)))
        assert done.without == {"audio": 1, "video": 1, "text": 1}
        assert "1 of 3 clips have no audio" in done.lines()

    def test_the_example_of_the_page(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        page = (Path(__file__).parents[1] / "docs" / "media.md").read_text()
        (code,) = re.findall("```python\n(.*?)```", page, re.DOTALL)
        (tmp_path / "videos").mkdir()
        flash_and_beep(tmp_path / "videos" / "first.mp4", fps=5, seconds=2, at=(1,))
        monkeypatch.chdir(tmp_path)
        names: dict[str, Any] = {}
        exec(code, names)
        assert names["clip"].features["video"].shape == (2, 5, 5, 3)
        assert list(open_store("mystore").modalities) == ["audio", "video"]


class TestSkipped:
    def test_broken_files_are_named(
        self, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "videos"
        folder.mkdir()
        for name in ("a.mp4", "b.mp4", "quiet.mp4", "deadly.mp4"):
            flash_and_beep(folder / name, fps=5, seconds=2, at={"quiet.mp4": (), "deadly.mp4": (0, 1)}.get(name, (1,)))
        (folder / "empty.mp4").write_bytes(b"")
        (folder / "text.mp4").write_bytes(b"no film " * 100)

        def called(self: Loudness, given: np.ndarray) -> np.ndarray:
            if given[0].max() > 0.1:
                os.kill(os.getpid(), signal.SIGKILL)
            if given.max() < 0.01:
                raise FloatingPointError("it is too quiet")
            return loudness(self, given)

        loudness = Loudness.__call__
        monkeypatch.setattr(Loudness, "__call__", called)
        done = media.extract(folder, tmp_path / "s", backbones=backbones("audio", "video"), progress=False)
        reasons = {one.id: (one.kind, one.reason) for one in done.skipped}
        assert list(reasons) == ["deadly.mp4", "empty.mp4", "quiet.mp4", "text.mp4"]
        assert reasons["deadly.mp4"] == (
            "end their process", "two processes ended with signal 9, as for lack of memory"
        )  # fmt: skip
        assert reasons["quiet.mp4"] == ("fail in a backbone", "FloatingPointError: it is too quiet")
        assert reasons["text.mp4"][0] == "cannot be decoded" and str(folder) not in reasons["text.mp4"][1]
        data = open_store(tmp_path / "s")
        assert sorted(name for split in data.splits for name in data.split(split).id) == ["a.mp4", "b.mp4"]
        with open(tmp_path / "s" / "skipped.csv", newline="") as file:
            assert [row["file"] for row in csv.DictReader(file)] == list(reasons)
        lines = done.lines()
        assert lines[0].startswith("2 of 6 files, 2 clips")
        assert any(line.startswith("2 skipped, cannot be decoded: empty.mp4: ") for line in lines)

    def test_no_clip_is_left(self, tmp_path: Path) -> None:
        (tmp_path / "videos").mkdir()
        (tmp_path / "videos/a.mp4").write_bytes(b"")
        with pytest.raises(StoreError, match="that can be decoded, got none of 1; a.mp4: "):
            media.extract(tmp_path / "videos", tmp_path / "s", backbones=backbones("audio"), progress=False)
        assert not (tmp_path / "s").exists()
        # It is read again once it is another file.
        flash_and_beep(tmp_path / "videos/a.mp4", fps=5, seconds=2, at=(1,))
        media.extract(tmp_path / "videos", tmp_path / "s", backbones=backbones("audio"), progress=False)

    def test_features_of_another_shape_or_not_finite(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "videos").mkdir()
        flash_and_beep(tmp_path / "videos/a.mp4", fps=5, seconds=2, at=(1,))
        for value, message in ((np.ones((2, 5)), r"must have shape \(1 to 10, 6\), got \(2, 5\)"),
                               (np.full((2, 6), np.nan), "must be finite, got NaN")):  # fmt: skip
            monkeypatch.setattr(Loudness, "__call__", lambda *_, value=value: value)
            with pytest.raises(StoreError, match=message):
                media.extract(tmp_path / "videos", tmp_path / "s", backbones=backbones("audio"), progress=False)
            extraction.remove(tmp_path / ".s.extracting")


def forked(act: Callable[[], object], log: Path | None = None) -> multiprocessing.process.BaseProcess:
    """A process forked from this one, which writes its errors to a file."""

    def run() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if log is not None:
            sys.stderr = open(log, "w", buffering=1)
        try:
            act()
        except KeyboardInterrupt:
            os._exit(130)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def slowly(videos: Path, store: Path, table: Path) -> None:
    Loudness.delay = 0.15
    media.extract(videos, store, captions=table, backbones=backbones(), progress=False)


def wait_for(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.005)


def results(store: Path) -> list[Path]:
    return sorted(store.with_name(f".{store.name}.extracting").glob("*.safetensors"))


@pytest.fixture
def interrupted(videos: Path, table: Path, tmp_path: Path) -> Path:
    """A store whose extraction was killed when two files were done."""
    path = tmp_path / "killed"
    process = forked(lambda: slowly(videos, path, table))
    wait_for(lambda: len(results(path)) >= 2)
    process.kill()
    process.join()
    return path


@pytest.fixture
def calls(tmp_path: Path) -> Iterator[Callable[[], int]]:
    """The number of calls of the backbone of sound."""
    Loudness.log = tmp_path / "calls"
    Loudness.log.write_text("")
    yield lambda: len((tmp_path / "calls").read_text().splitlines())
    Loudness.log = None


class TestInterruption:
    def test_a_killed_one_goes_on_where_it_was(
        self, interrupted: Path, store: Path, videos: Path, table: Path, calls: Callable[[], int]
    ) -> None:
        # Its processes end by themselves, and may finish no more files.
        time.sleep(1.2)
        done = len(results(interrupted))
        assert 2 <= done < 7 and not interrupted.exists()
        media.extract(videos, interrupted, captions=table, backbones=backbones(), workers=3, progress=False)
        # The film of 12 s is read in two windows.
        assert calls() <= 8 - done
        assert open_store(interrupted).digest() == open_store(store).digest()
        assert {path.name for path in interrupted.iterdir()} == {path.name for path in store.iterdir()}
        assert not interrupted.with_name(".killed.extracting").exists()

    def test_files_that_have_changed_are_computed_again(
        self, videos: Path, table: Path, tmp_path: Path, calls: Callable[[], int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "videos"
        extraction.remove(folder)
        folder.mkdir()
        for name in ("a.mp4", "b.mp4"):
            flash_and_beep(folder / name, fps=5, seconds=2, at=())

        def full(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(extraction, "pack", full)
            with pytest.raises(KeyboardInterrupt):
                media.extract(folder, tmp_path / "s", backbones=backbones("audio"), progress=False)
        assert calls() == 2
        flash_and_beep(folder / "b.mp4", fps=5, seconds=2, at=(0, 1))
        media.extract(folder, tmp_path / "s", backbones=backbones("audio"), progress=False)
        assert calls() == 3
        data = open_store(tmp_path / "s")
        loud = {str(name): float(clips.arrays["audio"][n].max()) for clips in map(data.split, data.splits)
                for n, name in enumerate(clips.id)}  # fmt: skip
        assert loud["a.mp4"] < 0.01 < 0.2 < loud["b.mp4"]

    def test_other_settings_are_refused(self, interrupted: Path, videos: Path, table: Path, tmp_path: Path) -> None:
        other = write_table(tmp_path / "other.csv", ROWS)
        with pytest.raises(StoreError, match="with other captions; repeat its command"):
            media.extract(videos, interrupted, captions=other, backbones=backbones(), progress=False)
        with pytest.raises(StoreError, match="with other backbone of video; repeat"):
            media.extract(videos, interrupted, captions=table, backbones=backbones("audio", "text"), progress=False)

    def test_ctrl_c_ends_at_once_and_says_how_to_go_on(self, videos: Path, table: Path, tmp_path: Path) -> None:
        log, path = tmp_path / "errors", tmp_path / "s"
        process = forked(lambda: slowly(videos, path, table), log)
        wait_for(lambda: len(results(path)) >= 1)
        os.kill(process.pid or 0, signal.SIGINT)
        process.join(2)
        assert process.exitcode == 130
        assert "of 7 files are done and kept in" in log.read_text()
        assert "the same command goes on with the others" in log.read_text()

    def test_two_at_once(self, videos: Path, table: Path, tmp_path: Path) -> None:
        process = forked(lambda: slowly(videos, tmp_path / "s", table))
        wait_for(lambda: len(results(tmp_path / "s")) >= 1)
        with pytest.raises(InUse, match="extraction of .* is in use by process"):
            media.extract(videos, tmp_path / "s", captions=table, backbones=backbones(), progress=False)
        process.kill()
        process.join()

    def test_foreign_files_are_kept(self, videos: Path, tmp_path: Path) -> None:
        (tmp_path / ".s.extracting").mkdir()
        (tmp_path / ".s.extracting/mine.txt").write_text("kept")
        with pytest.raises(StoreError, match=r"only files of an interrupted extraction, got 'mine.txt'"):
            media.extract(videos, tmp_path / "s", backbones=backbones(), progress=False)
        assert (tmp_path / ".s.extracting/mine.txt").read_text() == "kept"

    @pytest.mark.slow
    def test_a_campaign_of_kills(self, store: Path, videos: Path, table: Path, tmp_path: Path) -> None:
        """Killed at 40 random moments of an extraction, until it ends: the same digest."""
        chosen = random.Random(5)
        for trial in range(10):
            path = tmp_path / str(trial)
            for _ in range(4):
                process = forked(lambda path=path: slowly(videos, path, table))
                time.sleep(chosen.uniform(0.0, 1.2))
                process.kill()
                process.join()
            if not path.exists():
                media.extract(videos, path, captions=table, backbones=backbones(), progress=False)
            assert open_store(path).digest() == open_store(store).digest()


class TestProcesses:
    def test_results_and_errors(self) -> None:
        # The threads of the parent's pool must not be waited for.
        torch.randn(400, 400) @ torch.randn(400, 400)

        def work(number: int) -> float:
            if number == 5:
                raise OSError(28, "the disk is full", "a file")
            return number + (torch.ones(400, 400) @ torch.ones(400, 400)).mean().item()

        assert sorted(in_processes(work, range(4), 2, 2)) == [(n, 400.0 + n) for n in range(4)]
        with pytest.raises(OSError, match="the disk is full") as raised:
            list(in_processes(work, [5], 2, 1))
        assert raised.value.filename == "a file"

    def test_the_dead_are_tried_twice(self, tmp_path: Path) -> None:
        def work(number: int) -> int:
            if number == 1:
                os._exit(3)
            if number == 2 and not (tmp_path / "once").exists():
                (tmp_path / "once").write_text("")
                os.kill(os.getpid(), signal.SIGKILL)
            return number

        assert dict(in_processes(work, range(4), 2, 1)) == {0: 0, 1: Died(3), 2: 2, 3: 3}


class TestCommand:
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--workers=0"], "workers must be at least 1, got 0"),
            (["--workers=two"], "workers must be a whole number, got 'two'"),
            (["--recipe=ave", "--video=areas"], "recipe sets every backbone, got --video too"),
            (["--weights=vgg19=x"], "weights needs --recipe, got 'vgg19=x' alone"),
            (["--video=aeras"], "backbone must be one of .*, got 'aeras'"),
            (["--video=loudness"], "backbone 'loudness' must read frames, it reads sound"),
            (["--video=none", "--audio=none", "--text=none"], "at least one modality must have a backbone"),
            (["--dtype=int8"], "invalid choice"),
            (["--vidoe=areas"], "is --video meant"),
        ],
    )
    def test_invalid_flags(self, flags: list[str], message: str, videos: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=message):
            main([str(videos), str(tmp_path / "s"), *flags])
        assert list(tmp_path.iterdir()) == []

    def test_places(self, videos: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(FileExistsError):
            main([str(videos), str(store)])
        (tmp_path / "done").mkdir()
        (tmp_path / ".done.extracting").mkdir()
        with pytest.raises(FileExistsError):
            main([str(videos), str(tmp_path / "done")])
        assert f"note: {tmp_path / '.done.extracting'} is left of an extraction" in capsys.readouterr().err
        with pytest.raises(FileNotFoundError, match="videos must be an existing folder"):
            main([str(tmp_path / "none"), str(tmp_path / "s")])
        with pytest.raises(FileNotFoundError):
            main([str(videos), str(tmp_path / "s"), f"--captions={tmp_path / 'none.csv'}", "--audio=loudness"])
