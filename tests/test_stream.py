"""Tar files as a stream: equal numbers of batches by rank, each clip at most once per epoch, exact resume."""

import errno
import functools
import http.server
import json
import shutil
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from layout_files import write_avel, write_avvp, write_own

from unicode_fast.data import ClipSet, Dataset, StoreError, open_data, open_loader
from unicode_fast.data.__main__ import main
from unicode_fast.data.loader import PrefetchLoader
from unicode_fast.data.stream import StreamBatches, StreamedDataset, open_stream, write_shards
from unicode_fast.errors import UsageError

STREAMS = ("audio", "video")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, spoken: ClipSet) -> Dataset:
    root = tmp_path_factory.mktemp("own") / "clips"
    write_own(root, spoken)
    return open_data(f"clips:{root}")


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory, own: Dataset) -> StreamedDataset:
    """Twelve training clips in files of 3, 3, 3 and 3; six for validation in two files."""
    folder = tmp_path_factory.mktemp("stream") / "shards"
    write_shards(own, folder, 3, progress=False)
    found = open_data(f"webdataset:{folder}")
    assert isinstance(found, StreamedDataset)
    return found


def drawn(batches: StreamBatches, epoch: int) -> list[int]:
    steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
    return [int(clip) for step in steps for clip in batches.batch(step).clips]


def test_what_is_written_is_read(streamed: StreamedDataset, own: Dataset) -> None:
    assert streamed.modalities == own.modalities and streamed.classes == own.classes
    assert streamed.splits == ["train", "val", "test"]
    counts = ", ".join(f"{split}: {len(own.split(split))}" for split in own.splits if split != "all")
    assert repr(open_stream(streamed.root)).endswith(f", {counts})")
    for split in streamed.splits:
        found, expected = streamed.split(split), own.split(split)
        assert set(found.arrays) == set(expected.arrays)
        for key, array in expected.arrays.items():
            values = np.asarray(array)
            values = values.astype(np.float32) if key in own.modalities else values
            assert found.arrays[key].dtype == values.dtype
            np.testing.assert_array_equal(found.arrays[key], values)


def test_plain_tar_reads_the_files(streamed: StreamedDataset) -> None:
    with tarfile.open(Path(streamed.root) / "train-000000.tar") as archive:
        names = archive.getnames()
    assert "000000000.sound.npy" in names and "000000002.class.npy" in names
    index = json.loads((Path(streamed.root) / "shards.json").read_text())
    assert index["shards"]["train"] == {f"train-{number:06d}.tar": 3 for number in range(4)}


@pytest.mark.parametrize(("world", "batch_size", "steps"), [(1, 4, 3), (2, 2, 3), (2, 4, 1), (3, 3, 1), (4, 3, 1)])
def test_every_rank_gets_equal_batches(streamed: StreamedDataset, world: int, batch_size: int, steps: int) -> None:
    for epoch in range(3):
        ranks = [
            StreamBatches(streamed, "train", ["sound"], batch_size, seed=5, rank=rank, world=world)
            for rank in range(world)
        ]
        assert [batches.steps_per_epoch for batches in ranks] == [steps] * world
        ids = [clip for batches in ranks for clip in drawn(batches, epoch)]
        assert len(ids) == len(set(ids)) == world * steps * batch_size


def test_files_of_different_sizes_leave_ranks_equal(tmp_path: Path, own: Dataset) -> None:
    write_shards(own, tmp_path / "shards", 5, progress=False)
    data = open_stream(str(tmp_path / "shards"))
    assert list(data.index["shards"]["train"].values()) == [5, 5, 2]
    for epoch in range(6):
        for rank in range(3):
            batches = StreamBatches(data, "train", ["sound"], 2, rank=rank, world=3)
            assert batches.steps_per_epoch == 1 and len(drawn(batches, epoch)) == 2


def test_ranks_come_from_the_environment(streamed: StreamedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        batches = streamed.batches("train", ["sound", "picture"], 6, seed=1)
        assert batches.steps_per_epoch == 2
        ids += drawn(batches, 0)
        with pytest.raises(ValueError, match="batch_size of a stream must be a multiple of its 2 ranks, got 5"):
            streamed.batches("train", ["sound"], 5)
    assert len(set(ids)) == 12


def test_order_and_resume(streamed: StreamedDataset) -> None:
    def batches(seed: int = 1) -> StreamBatches:
        return StreamBatches(streamed, "train", ["picture", "sound"], 4, seed=seed, shuffle_clips=5)

    whole = [batches().batch(0), *(batches_of.batch(step) for batches_of in [batches()] for step in range(1, 7))]
    assert sorted(drawn(batches(), 1)) == list(range(12))
    assert drawn(batches(), 0) != drawn(batches(), 1) and drawn(batches(), 0) != drawn(batches(2), 0)
    # Another object that starts in the middle, continues, and goes back.
    resumed = batches()
    for step in (4, 5, 6, 2):
        found = resumed.batch(step)
        np.testing.assert_array_equal(found.clips, whole[step].clips)
        for name in ("picture", "sound"):
            assert torch.equal(found.features[name], whole[step].features[name])


def test_a_batch_holds_its_clips(streamed: StreamedDataset, own: Dataset) -> None:
    batch = StreamBatches(streamed, "train", ["sound"], 4, dtype="float64").batch(0)
    clips = own.split("train")
    assert list(batch.features) == ["sound"] and list(batch.labels) == ["sound"]
    expected = np.asarray(clips.features["sound"]).astype(np.float32)[batch.clips]
    np.testing.assert_array_equal(batch.features["sound"].numpy(), expected)
    np.testing.assert_array_equal(batch.mask["sound"].numpy(), clips.mask["sound"][batch.clips])
    assert batch.target is not None
    np.testing.assert_array_equal(batch.target.numpy(), clips.target[batch.clips])
    assert list(batch.id) == list(clips.id[batch.clips])


def test_errors(tmp_path: Path, streamed: StreamedDataset, spoken: ClipSet) -> None:
    with pytest.raises(ValueError, match="shards of split 'train' must be at least one for each of 5 ranks, got 4"):
        StreamBatches(streamed, "train", ["sound"], 1, world=5)
    with pytest.raises(ValueError, match="at least one batch of 4 for each of 4 ranks, got 3"):
        StreamBatches(streamed, "train", ["sound"], 4, world=4)
    with pytest.raises(ValueError, match=r"rank must lie in \[0, 2\), got 2"):
        StreamBatches(streamed, "train", ["sound"], 4, rank=2, world=2)
    with pytest.raises(ValueError, match="split must be one of .*'train', 'val', 'test'.*got 'all'"):
        StreamBatches(streamed, "all", ["sound"], 4)
    with pytest.raises(ValueError, match="keep_last_batch must be False for a stream"):
        streamed.batches("train", ["sound"], 4, drop_last=False)
    with pytest.raises(FileNotFoundError, match="data must be a folder with an index shards.json"):
        open_data(f"webdataset:{tmp_path}")
    index = {**streamed.index, "name": 3}
    for content, why in (({}, "KeyError: 'format'"), (index, "name must be a str, got int")):
        (tmp_path / "shards.json").write_text(json.dumps(content))
        with pytest.raises(StoreError, match=f"shards.json must be an index of write_shards, but .*: {why}$"):
            open_data(f"webdataset:{tmp_path}")
    write_avvp(tmp_path / "avvp", spoken)
    with pytest.raises(ValueError, match="'train' of avvp, where audio and video have separate clips"):
        write_shards(open_data(f"avvp:{tmp_path / 'avvp'}"), tmp_path / "none", progress=False)
    assert not (tmp_path / "none").exists()


def test_one_process_reads_a_stream(streamed: StreamedDataset) -> None:
    batches = streamed.batches("train", ["sound", "picture"], 4)
    with open_loader(batches, torch.device("cpu"), "prefetch", workers=3) as loader:
        assert isinstance(loader, PrefetchLoader) and loader.workers == 1


def test_files_with_fewer_clips_than_they_should_have_are_named(tmp_path: Path, own: Dataset) -> None:
    write_shards(own, tmp_path / "shards", 3, progress=False)
    index = tmp_path / "shards" / "shards.json"
    index.write_text(index.read_text().replace('"train-000000.tar": 3', '"train-000000.tar": 9'))
    batches = StreamBatches(open_stream(str(tmp_path / "shards")), "train", ["sound"], 18)
    with pytest.raises(StoreError, match="train-000000.tar must hold the 9 clips in shards.json, got 3"):
        batches.batch(0)


def test_shards_appear_whole_or_not_at_all(tmp_path: Path, own: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("unicode_fast.data.stream.json.dumps", full)
    with pytest.raises(OSError, match="could not be written: the disk is full") as caught:
        write_shards(own, tmp_path / "shards", progress=False)
    assert caught.value.filename == str(tmp_path / "shards")
    assert not list(tmp_path.glob("*shards*"))


def test_a_pickled_array_in_a_tar_is_refused(tmp_path: Path, own: Dataset) -> None:
    write_shards(own, tmp_path / "shards", 30, progress=False)
    import io

    import webdataset

    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}], object), allow_pickle=True)
    with webdataset.TarWriter(str(tmp_path / "shards" / "train-000000.tar")) as writer:
        writer.write({"__key__": "000000000", "sound.npy": stream.getvalue()})
    with pytest.raises(StoreError, match="sound.npy of clip 000000000 in .*train-000000.tar must be a .npy file"):
        open_stream(str(tmp_path / "shards")).split("train")


def test_shards_by_command(tmp_path: Path, spoken: ClipSet, capsys: pytest.CaptureFixture[str]) -> None:
    write_avel(tmp_path / "avel", spoken.select(np.arange(8)))
    spec = f"vggsound-avel24k:{tmp_path / 'avel'}"
    assert main(["shards", spec, str(tmp_path / "shards"), "--clips", "2", "--modalities", "audio,video"]) == 0
    assert len(list((tmp_path / "shards").glob("train-*.tar"))) == 2
    assert main(["check", f"webdataset:{tmp_path / 'shards'}"]) == 0
    assert "train: 4 clips of audio, 4 clips of video" in capsys.readouterr().out
    with pytest.raises(UsageError, match="clips must be at least 1, got 0"):
        main(["shards", spec, str(tmp_path / "none"), "--clips", "0"])
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "webdataset:FOLDER" in capsys.readouterr().out
    file = tmp_path / "shards" / "val-000000.tar"
    data = file.read_bytes()
    for spoil, message in (
        (lambda: file.write_bytes(b"x" * 3000), "val-000000.tar must be a whole tar file"),
        (
            lambda: file.write_bytes((tmp_path / "shards" / "empty.tar").read_bytes()),
            "val-000000.tar must hold the 2 clips in shards.json, got 0",
        ),
        (file.unlink, "ERROR missing"),
    ):
        with tarfile.open(tmp_path / "shards" / "empty.tar", "w"):
            pass
        file.write_bytes(data)
        spoil()
        assert main(["check", f"webdataset:{tmp_path / 'shards'}"]) == 1
        assert message in capsys.readouterr().out


@pytest.fixture
def served(streamed: StreamedDataset) -> Iterator[str]:
    """The address of a server of the shards, which redirects some requests."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            """Write no log."""

        def do_GET(self) -> None:
            for name, place in (("/file/", f"file://{streamed.root}/shards.json"), ("/ftp/", "ftp://127.0.0.1/x")):
                if self.path.startswith(name):
                    self.send_response(302)
                    self.send_header("Location", place)
                    self.end_headers()
                    return
            super().do_GET()

    handler = functools.partial(Handler, directory=streamed.root)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_shards_are_fetched_from_a_server(
    streamed: StreamedDataset, served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subprocess.Popen", lambda *arguments, **options: pytest.fail("a program is called"))
    monkeypatch.setattr("unicode_fast.data.stream._PAUSE", 0.0)
    data = open_data(f"webdataset:{served}")
    assert isinstance(data, StreamedDataset) and data.digest() == streamed.digest()
    for split in streamed.splits:
        for key, array in streamed.split(split).arrays.items():
            np.testing.assert_array_equal(data.split(split).arrays[key], array)
    assert drawn(data.batches("train", ["sound"], 4), 1) == drawn(streamed.batches("train", ["sound"], 4), 1)
    with pytest.raises(FileNotFoundError, match="data must be a folder with an index shards.json"):
        open_data(f"webdataset:{served}/nowhere")
    for elsewhere in ("file", "ftp"):
        with pytest.raises(OSError, match="the URL must be available, .*(not allowed|unknown url type)"):
            open_data(f"webdataset:{served}/{elsewhere}")


def test_a_folder_with_a_colon_is_a_folder(
    tmp_path: Path, streamed: StreamedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("my:shards", "pipe:touch ran"):
        shutil.copytree(streamed.root, name)
        assert len(open_data(f"webdataset:{name}").split("val")) == len(streamed.split("val"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my:shards", "pipe:touch ran"]
