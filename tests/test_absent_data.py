"""Data whose clips lack modalities: stores, own files, streams, the check, training by command, and scores."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from tolerances import FLOAT64

from unicode_fast import load
from unicode_fast.data import Batches, Dataset, StoreError, open_data, open_store, write_store
from unicode_fast.data.__main__ import main as data
from unicode_fast.data.store.write import pack
from unicode_fast.data.stream import INDEX, StreamedDataset, write_shards
from unicode_fast.errors import UsageError
from unicode_fast.evaluate import main as evaluate
from unicode_fast.report import pictures
from unicode_fast.tasks import Evaluator, Row, format_legend
from unicode_fast.tasks.encoded import TEST, EncodedDataset
from unicode_fast.tasks.metrics.sharing import measure_sharing
from unicode_fast.tasks.probe import encode_batch
from unicode_fast.train import main as train
from unicode_fast.training.checks import check_store
from unicode_fast.training.trainer import initialise_codebook

NAMES = ("audio", "video", "text")
CLIPS = {"train": 60, "val": 24, "test": 24}
# Of each split every fifth clip lacks audio, every sixth lacks text, the seventh ones video; clip 5 has video alone.
GONE = {"audio": (5, 0), "text": (6, 5), "video": (7, 3)}
FLAGS = {**tiny.SIZES, "steps": 12, "batch_size": 10, "validations": 1, "learning_rate": 3e-3}


def lacks(name: str, clip: int) -> bool:
    every, first = GONE[name]
    return clip % every == first


def splits() -> dict[str, dict[str, np.ndarray]]:
    """`tiny.learnable_splits` with zeros where a clip lacks a modality."""
    found = tiny.learnable_splits(CLIPS)
    for split, arrays in found.items():
        count = len(arrays["class"])
        arrays["id"] = np.array([f"{split} {number}" for number in range(count)])
        for name in NAMES:
            gone = np.array([lacks(name, clip) for clip in range(count)])
            arrays[name][gone] = 0
            arrays[f"{name}.length"] = np.where(gone, 0, 5)
    return found


def number_without(name: str, split: str) -> int:
    return sum(lacks(name, clip) for clip in range(CLIPS[split]))


def changed(change: Callable[[dict[str, np.ndarray]], None]) -> dict[str, dict[str, np.ndarray]]:
    found = splits()
    change(found["test"])
    return found


def written(path: Path, content: dict[str, dict[str, np.ndarray]]) -> Path:
    modalities = {name: tiny.MODALITIES[name] for name in NAMES}
    write_store(path, "tiny", modalities, ["zero", "one", "two"], content)
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("absent") / "store", splits())


def test_a_store_has_clips_without_a_modality(store: Path) -> None:
    opened = open_store(store, verify="always")
    for split, count in CLIPS.items():
        assert opened.lacking(split) == {name: number_without(name, split) for name in NAMES}
        assert opened.number(split) == count
    clips = opened.split("train").having("audio")
    assert list(clips.index) == [clip for clip in range(60) if not lacks("audio", clip)]
    assert clips.mask["audio"].all() and not clips.mask["text"].all()
    batch = Batches(opened.split("train").restrict(NAMES), 60).batch(0)
    for name in NAMES:
        assert batch.mask[name].any(1).tolist() == [not lacks(name, int(clip)) for clip in batch.clips]
        assert not batch.features[name][~batch.mask[name]].any()


def test_a_clip_has_a_modality(tmp_path: Path, store: Path) -> None:
    def empty(arrays: dict[str, np.ndarray]) -> None:
        for name in NAMES:
            arrays[name][4], arrays[f"{name}.length"][4] = 0, 0

    message = r"split 'test' must have one of audio, video, text in every clip, got none in clip 4 'test 4'"
    with pytest.raises(StoreError, match=f"^{message}$"):
        written(tmp_path / "new", changed(empty))
    assert not list(tmp_path.iterdir())
    with pytest.raises(StoreError, match="must have one of audio in every clip, got none in clip 0 'train 0'"):
        opened = open_store(store)
        clips = opened.split("train").restrict(["audio"])
        clips = replace(clips, arrays={key: clips.arrays[key] for key in ("audio", "audio.length", "id")})
        alone = Dataset(store, "alone", clips.modalities, opened.classes, {"train": [clips]})
        pack(alone, tmp_path / "packed", progress=False)


def test_features_stand_where_a_clip_has_the_modality(tmp_path: Path) -> None:
    def filled(arrays: dict[str, np.ndarray]) -> None:
        arrays["audio"][5] = 1

    with pytest.raises(StoreError, match="'audio' of split 'test' must be 0 after .* in clip 5 of length 0"):
        written(tmp_path / "new", changed(filled))


def write_clips(root: Path, without: bool = True) -> None:
    """Own files of the test split, with labels, and the column that names what a clip lacks."""
    content = splits()["test"]
    for name in NAMES:
        (root / name).mkdir(parents=True)
    (root / "audio.labels").mkdir()
    lines = ["id,split,class,without" if without else "id,split,class"]
    for clip in range(24):
        gone = [name for name in NAMES if lacks(name, clip)]
        for name in NAMES:
            if name not in gone:
                np.save(root / name / f"take{clip}.npy", content[name][clip])
        if "audio" not in gone:
            np.save(root / "audio.labels" / f"take{clip}.npy", content["audio.label"][clip])
        split, named = ("train", "val", "test")[clip % 3], f",{';'.join(gone)}" if without else ""
        lines.append(f"take{clip},{split},{content['class'][clip]}{named}")
    (root / "clips.csv").write_text("\n".join(lines))
    (root / "modalities.csv").write_text("modality,kind\naudio,vector\nvideo,grid\ntext,words")


def test_own_files_name_what_a_clip_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_clips(tmp_path / "mine")
    opened = open_data(f"clips:{tmp_path / 'mine'}")
    content = splits()["test"]
    for split, start in (("train", 0), ("val", 1), ("test", 2)):
        clips, numbers = opened.split(split), np.arange(start, 24, 3)
        for name in NAMES:
            assert clips.lengths[name].tolist() == content[f"{name}.length"][numbers].tolist()
            np.testing.assert_array_equal(clips.features[name][:], content[name][numbers])
        np.testing.assert_array_equal(
            clips.labels["audio"][:], content["audio.label"][numbers] * clips.mask["audio"][..., None]
        )
    # The first training clip lacks audio: another one shows its shape.
    assert opened.modalities["audio"] == tiny.MODALITIES["audio"] and lacks("audio", 0)
    assert data(["check", f"clips:{tmp_path / 'mine'}", "--json", str(tmp_path / "report.json")]) == 0
    found = capsys.readouterr().out
    assert "train: 6 clips of audio, 7 clips of video, 8 clips of text\n" in found
    assert "train: 2 clips without audio, 1 clips without video\n" in found
    assert "test: 2 clips without audio, 1 clips without video, 4 clips without text\n" in found
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["lacking"]["test"] == {"audio": 2, "video": 1, "text": 4}
    pack(opened, tmp_path / "packed", progress=False)
    assert open_store(tmp_path / "packed").lacking("test") == report["lacking"]["test"]


def name_lacking(root: Path, clip: str, names: str) -> None:
    text = (root / "clips.csv").read_text()
    (root / "clips.csv").write_text(re.sub(rf"^({clip},.*),.*$", rf"\1,{names}", text, flags=re.MULTILINE))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda root: (root / "audio" / "take1.npy").unlink(),
            r"must hold a file for each clip .* missing are .*take1\.npy",
        ),
        (
            lambda root: np.save(root / "audio" / "take0.npy", np.zeros((5, 6), np.float32)),
            r"without in .* must name modalities of which a clip has no file, got .*audio/take0\.npy .*\(1 such",
        ),
        (
            lambda root: name_lacking(root, "take2", "smell"),
            "without in .* must name modalities of the folder, audio, video, text, .* got 'smell' for 'take2'",
        ),
        (
            lambda root: name_lacking(root, "take1", "audio; text;video"),
            "without in .* must leave each clip a modality, got all of them for 'take1'",
        ),
    ],
)
def test_own_files_that_contradict(tmp_path: Path, edit: Callable[[Path], None], message: str) -> None:
    write_clips(tmp_path)
    edit(tmp_path)
    with pytest.raises((StoreError, FileNotFoundError), match=message):
        open_data(f"clips:{tmp_path}")


def test_a_missing_file_is_no_clip_without_the_modality(tmp_path: Path) -> None:
    write_clips(tmp_path, without=False)
    with pytest.raises(FileNotFoundError, match=r"missing are .*audio/take0\.npy"):
        open_data(f"clips:{tmp_path}")


def test_a_stream_counts_what_its_clips_lack(tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("webdataset")
    opened = open_store(store)
    write_shards(opened, tmp_path / "tars", 20, progress=False)
    spec = f"webdataset:{tmp_path / 'tars'}"
    streamed = open_data(spec)
    assert isinstance(streamed, StreamedDataset)
    assert all(streamed.lacking(split) == opened.lacking(split) for split in CLIPS)
    batch = streamed.batches("train", NAMES, 10).batch(0)
    assert batch.mask["audio"].any(1).tolist() == [not lacks("audio", int(clip)) for clip in batch.clips]
    capsys.readouterr()
    assert data(["check", spec]) == 0
    assert f"train: {number_without('audio', 'train')} clips without audio" in capsys.readouterr().out
    trainer = tiny.trainer(batch_size=10)
    batches = streamed.batches("train", NAMES, 10)
    initialise_codebook(trainer, batches, torch.device("cpu"))
    given = batches.batch(0)
    result = trainer.train_step(given.features, given.mask, 1e-3)
    assert all(torch.isfinite(term) for term in result.terms.values())
    index = json.loads((tmp_path / "tars" / INDEX).read_text())
    (tmp_path / "tars" / INDEX).write_text(json.dumps({**index, "lacking": {"train": {"audio": -1}}}))
    with pytest.raises(StoreError, match="lacking clips of split 'train' must be positive numbers by modality, got"):
        open_data(spec)


def test_data_that_a_method_or_preset_refuses(store: Path, tmp_path: Path) -> None:
    for preset, method, refused_by in (
        ("recommended", "mst", "method 'mst'"),
        ("official", "uni-code", "preset 'official'"),
    ):
        given = [f"--data={store}", f"--out={tmp_path / 'run'}", f"--preset={preset}", f"--method={method}"]
        count = number_without("audio", "train")
        message = f"data must have every modality in every clip for {refused_by}, got {count} of 60 training clips "
        with pytest.raises((UsageError, ValueError), match=f"^{message}without audio$"):
            train([*given, "--batch_size=10"])
    assert not (tmp_path / "run").exists()
    # Clips of other splits are only encoded.
    content = splits()
    content["train"] = tiny.learnable_splits(CLIPS)["train"]
    content["train"] |= {"id": splits()["train"]["id"]}
    opened = open_store(written(tmp_path / "whole", content))
    assert list(check_store(tiny.config(method="mst", batch_size=10), opened)) == list(NAMES)


def test_a_split_without_a_modality(tmp_path: Path) -> None:
    def silent(arrays: dict[str, np.ndarray]) -> None:
        arrays["audio"][:], arrays["audio.length"][:] = 0, 0
        arrays["text"][:], arrays["text.length"][:] = 1, 5
        arrays["video"][:], arrays["video.length"][:] = 1, 5

    path = written(tmp_path / "silent", changed(silent))
    with pytest.raises(ValueError, match="^data must have clips with 'audio' in split 'test', got none of 24$"):
        check_store(tiny.config(batch_size=10), open_store(path))
    assert data(["check", str(path)]) == 1
    encoded = EncodedDataset(tiny.model(), open_store(path))
    with pytest.raises(ValueError, match="^split 'test' must have clips with 'audio', got none of 24$"):
        encoded.codes(TEST, "audio")


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory, short_probes: Callable, no_pictures: Callable) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    given = {**FLAGS, "data": store, "out": out, "probe_tasks": "classification,localisation,retrieval"}
    assert train([f"--{name}={value}" for name, value in given.items()]) == 0
    return out


def test_a_run_by_command(run: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["lacking"] == {split: {name: number_without(name, split) for name in NAMES} for split in CLIPS}
    rows = [Row.from_dict(row) for row in summary["rows"]]
    assert {row.task for row in rows} == {"classification", "localisation", "retrieval"}
    for row in rows:
        if row.task != "retrieval":
            left_out = number_without(row.target, "test")
        else:
            assert row.anchor is not None
            left_out = sum(lacks(row.target, clip) or lacks(row.anchor, clip) for clip in range(24))
        assert (row.clips, row.left_out) == (24 - left_out, left_out), row
        assert np.isfinite([row.score, row.same_modality]).all()
    legend = format_legend(rows)
    assert f"test clips that lack a modality are left out: {number_without('video', 'test')} without video, " in legend
    assert legend.count(", 6 to 8 clips without one of a pair in retrieval") == 1
    for line in (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()):
        assert all(np.isfinite(value) for value in line.get("losses", {}).values())
    for name in ("timeline", "retrieval", "code-usage"):
        assert (run / "plots" / f"{name}.png").exists(), name
    capsys.readouterr()
    assert evaluate([str(run), "--task=classification", "--from=audio", "--to=text"]) == 0
    assert (
        f"test clips that lack a modality are left out: {number_without('text', 'test')} without text\n"
        in capsys.readouterr().out
    )
    given = {**FLAGS, "data": store, "out": run.with_name("told"), "probe_tasks": "none", "validations": 0, "steps": 1}
    assert train([f"--{name}={value}" for name, value in given.items()]) == 0
    told = capsys.readouterr().err
    lacking = [f"{number_without(name, 'train')} lack {name}" for name in ("audio", "video", "text")]
    assert f"note: of 60 clips of train {' and '.join(lacking)}; they count without it\n" in told


def test_what_is_measured_is_of_the_clips_that_have_it(run: Path, store: Path) -> None:
    model, opened = load(run), open_store(store)
    encoded = EncodedDataset(model, opened)
    codes = {}
    for name in NAMES:
        there = np.array([clip for clip in range(24) if not lacks(name, clip)])
        found = encoded.codes(TEST, name)
        assert len(found) == len(there) == len(encoded.clips(TEST, name))
        expected = encode_batch(model, opened.split(TEST), name, there)
        assert torch.equal(found.code, expected.code)
        codes[name] = dict(zip(there.tolist(), found.code.numpy(), strict=True))
    sharing = measure_sharing(encoded, TEST)
    assert sharing.clips == {name: 24 - number_without(name, TEST) for name in NAMES}
    both = [clip for clip in codes["audio"] if clip in codes["video"]]
    same = np.mean([codes["audio"][clip] == codes["video"][clip] for clip in both])
    assert sharing.agreement["audio-video"] == pytest.approx(same, **FLOAT64)
    whole = [clip for clip in both if clip in codes["text"]]
    most = [[np.bincount(codes[name][clip]).argmax() for name in NAMES] for clip in whole]
    assert sharing.equal_clips == pytest.approx(np.mean([len(set(three)) == 1 for three in most]), **FLOAT64)
    with pytest.raises(ValueError, match="mask of 'audio' must mark at least one position of each clip, got none in"):
        encode_batch(model, opened.split(TEST), "audio", np.arange(6))


def test_a_picture_shows_clips_with_both(run: Path, store: Path, tmp_path: Path) -> None:
    """Queries and gallery are the same clips, in the same order."""
    evaluator = Evaluator(load(run), open_store(store))
    first, second = (evaluator.retrieval.shown(*names) for names in (("audio", "text"), ("text", "audio")))
    expected = [clip for clip in range(24) if not (lacks("audio", clip) or lacks("text", clip))]
    assert first.index.tolist() == second.index.tolist() == expected
    queries, gallery = evaluator.retrieval.vectors("audio", "text", None)
    assert len(queries) == len(gallery) == len(expected)
    places = evaluator.home.common(TEST, "audio", "text")
    np.testing.assert_array_equal(queries, evaluator.retrieval.embedding(TEST, "audio")[places[0]])
    pictures.draw_timelines(tmp_path, evaluator, open_store(store), "audio")
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["timeline.png"]
