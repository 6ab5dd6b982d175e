"""Packing: the store has the layout's content, in every dtype, after any interruption; bad values are named."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from layout_files import splits_of, write_avel, write_avsbench, write_avvp, write_own, write_zip
from test_cache import PLANTS

from unicode_fast.config import Modality
from unicode_fast.data import (
    Batches,
    ClipSet,
    DamagedStoreError,
    Dataset,
    StoreError,
    bfloat16,
    open_data,
    open_loader,
    open_store,
)
from unicode_fast.data.lazy import LazyArray
from unicode_fast.data.loader import BatchLoader, ResidentLoader
from unicode_fast.data.store.write import pack

STREAMS = ("audio", "video")
# Files of three clips of video in float32.
SHARD_BYTES = 100_000


@pytest.fixture
def avel(tmp_path: Path, spoken: ClipSet) -> Dataset:
    write_avel(tmp_path / "avel", spoken.select(np.arange(12)))
    return open_data(f"vggsound-avel40k:{tmp_path / 'avel'}", modalities=STREAMS)


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    values = (
        torch.from_numpy(array).float().to(getattr(torch, dtype)) if dtype != "float64" else torch.from_numpy(array)
    )
    return values.to(torch.float32 if dtype == "bfloat16" else values.dtype).numpy()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_everything_is_in_the_store(tmp_path: Path, avel: Dataset, dtype: str) -> None:
    pack(avel, tmp_path / "store", dtype, shard_bytes=SHARD_BYTES, progress=False)
    found = open_store(tmp_path / "store")
    assert found.splits == avel.splits and found.modalities == avel.modalities and found.classes == avel.classes
    names = [file.name for file in (tmp_path / "store").iterdir()]
    assert sum(name.startswith("all-video-") for name in names) >= 2
    # The splits that divide "all" hold only numbers.
    assert [name for name in names if name.startswith("train")] == ["train-numbers-0.npy"]
    for split in avel.splits:
        expected, clips = avel.split(split), found.split(split)
        assert set(clips.arrays) == set(expected.arrays)
        for key, array in expected.arrays.items():
            values = np.asarray(array)
            values = rounded(values, dtype) if key in STREAMS else values
            assert clips.arrays[key].dtype == values.dtype and clips.arrays[key].shape == values.shape
            np.testing.assert_array_equal(np.asarray(clips.arrays[key]), values)
        assert all(isinstance(label, np.ndarray) for label in clips.labels.values())


def test_any_order_without_the_original(tmp_path: Path, avel: Dataset) -> None:
    pack(avel, tmp_path / "store", shard_bytes=SHARD_BYTES, progress=False)
    clips = open_store(tmp_path / "store").split("all")
    whole = np.asarray(clips.features["video"])
    for numbers in ([11, 0, 5, 5, 3], [2], [], range(12)):
        chosen = np.array(numbers, np.int64)
        np.testing.assert_array_equal(clips.features["video"][chosen], whole[chosen])
    np.testing.assert_array_equal(clips.features["video"][3:8], whole[3:8])
    np.testing.assert_array_equal(clips.features["video"][-1], whole[-1])
    with pytest.raises(IndexError):
        clips.features["video"][12]
    batch = Batches(clips, 4, seed=3).batch(1)
    np.testing.assert_array_equal(batch.features["video"].numpy(), whole[batch.clips])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_are_halves_until_they_are_on_the_device(tmp_path: Path, avel: Dataset, dtype: str) -> None:
    pack(avel, tmp_path / "store", dtype, shard_bytes=SHARD_BYTES, progress=False)
    batches = Batches(open_store(tmp_path / "store").split("train"), 4, seed=3, dtype="float64")
    for name, kept in batches.batch(1, keep_halves=True).features.items():
        assert kept.dtype == getattr(torch, dtype)
        assert torch.equal(kept.double(), batches.batch(1).features[name])
    with open_loader(batches, torch.device("cpu")) as loader:
        assert type(loader) is BatchLoader  # files that are mapped need no reader
    for kind in ("direct", "prefetch", "resident"):
        with open_loader(batches, torch.device("cpu"), kind) as loader:
            for step in range(3):
                for name, found in loader.batch(step).features.items():
                    assert found.dtype == torch.float64
                    assert torch.equal(found, batches.batch(step).features[name])
            if isinstance(loader, ResidentLoader):
                assert {kept.dtype for kept in loader.features.values()} == {getattr(torch, dtype)}


def test_unpaired_clips(tmp_path: Path, spoken: ClipSet) -> None:
    write_avvp(tmp_path / "avvp", spoken)
    data = open_data(f"avvp:{tmp_path / 'avvp'}")
    pack(data, tmp_path / "store", progress=False)
    found = open_store(tmp_path / "store")
    assert found.splits == ["all", "train", "val", "test"]
    for name in STREAMS:
        clips, expected = found.clips("val", name), data.clips("val", name)
        assert list(clips.modalities) == [name] and list(clips.id) == list(expected.id)
        np.testing.assert_array_equal(clips.labels[name], expected.labels[name])
        np.testing.assert_array_equal(clips.features[name], np.asarray(expected.features[name], np.float32))
    with pytest.raises(ValueError, match="'all' of avvp, where audio and video have separate clips"):
        found.split("all")


def test_pictures_and_lengths(tmp_path: Path, spoken: ClipSet) -> None:
    few = spoken.select(np.arange(8))
    write_avsbench(tmp_path / "avs", few, few.arrays["video.frames"])
    data = open_data(f"avsbench-s4:{tmp_path / 'avs'}", modalities=["audio"])
    pack(data, tmp_path / "avs-store", shard_bytes=4000, progress=False)
    for split in data.splits:
        arrays = open_store(tmp_path / "avs-store").split(split).arrays
        assert isinstance(arrays["video.frames"], LazyArray)
        for key, array in data.split(split).arrays.items():
            np.testing.assert_array_equal(np.asarray(arrays[key]), np.asarray(array).astype(arrays[key].dtype))
    lengths = np.array(write_own(tmp_path / "own", few))
    pack(open_data(f"clips:{tmp_path / 'own'}"), tmp_path / "own-store", "bfloat16", progress=False)
    clips = open_store(tmp_path / "own-store").split("train")
    np.testing.assert_array_equal(clips.lengths["picture"], lengths[np.array(splits_of(8)) == "train"])


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


KILLED = """if True:
    import os, signal, sys
    from unicode_fast.data import open_data
    from unicode_fast.data.store import write

    begun, bytes_of = [], write._bytes

    def dying(*arguments):
        begun.append(arguments)
        for number, data in enumerate(bytes_of(*arguments)):
            yield data
            if len(begun) == 4:
                os.kill(os.getpid(), signal.SIGKILL)

    write._bytes = dying
    data = open_data(sys.argv[1], modalities=("audio", "video"))
    write.pack(data, sys.argv[2], "float32", shard_bytes=int(sys.argv[3]), progress=False)
"""


def test_goes_on_after_a_kill(tmp_path: Path, avel: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(avel, tmp_path / "whole", shard_bytes=SHARD_BYTES, progress=False)
    target = tmp_path / "store"
    command = [sys.executable, "-c", KILLED, f"vggsound-avel40k:{avel.path}", str(target), str(SHARD_BYTES)]
    done = 0
    for _ in range(2):
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        assert not target.exists()
        lines = (tmp_path / ".store.packing" / "journal.jsonl").read_text().splitlines()
        assert len(lines) == done + 3
        done = len(lines)
    # A line that was cut short is ignored.
    with open(tmp_path / ".store.packing" / "journal.jsonl", "a") as log:
        log.write('{"file": "all-vid')
    written: list[str] = []
    import unicode_fast.data.store.write as module

    write = module.atomic_file
    monkeypatch.setattr(module, "atomic_file", lambda file: written.append(file.name) or write(file))
    pack(avel, target, shard_bytes=SHARD_BYTES, progress=False)
    assert len(written) == len(files_of(target)) - 1 - done
    assert files_of(target) == files_of(tmp_path / "whole")
    assert not (tmp_path / ".store.packing").exists()


def test_only_one_chunk_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import unicode_fast.data.store.write as module

    lengths: list[int] = []

    def read(numbers: np.ndarray) -> np.ndarray:
        lengths.append(len(numbers))
        return np.repeat(numbers[:, None, None], 5, 2) + np.zeros((len(numbers), 10, 5))

    clips = ClipSet(
        {"a": LazyArray((200, 10, 5), np.float64, read)}, {"a": Modality("vector", (5,))}, [], np.arange(200)
    )
    data = Dataset(tmp_path, "many", clips.modalities, [], {"train": [clips]})
    monkeypatch.setattr(module, "_CHUNK_BYTES", 7 * 10 * 5 * 8)
    pack(data, tmp_path / "store", shard_bytes=50 * 10 * 5 * 4, progress=False)
    assert max(lengths) == 7 and sum(lengths) == 200
    found = open_store(tmp_path / "store").split("train").features["a"]
    np.testing.assert_array_equal(found[:][:, 3, 2], np.arange(200))


def test_features_that_vanish_are_named(tmp_path: Path, avel: Dataset) -> None:
    file = avel.path / "feature/video/zip" / f"{avel.split('all').id[7]}.zip"
    file.unlink()
    with pytest.raises(StoreError, match=f"'video' of split 'all' must be readable, got.*{file.name}"):
        pack(avel, tmp_path / "store", progress=False)


def test_other_data_do_not_go_on(tmp_path: Path, avel: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    import unicode_fast.data.store.write as module

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module, "publish", full)
        with pytest.raises(OSError, match="the disk is full"):
            pack(avel, tmp_path / "store", shard_bytes=SHARD_BYTES, progress=False)
    with pytest.raises(StoreError, match=r"store.packing must be of the same data, dtype"):
        pack(avel, tmp_path / "store", "bfloat16", shard_bytes=SHARD_BYTES, progress=False)
    pack(avel, tmp_path / "store", shard_bytes=SHARD_BYTES, progress=False)
    open_store(tmp_path / "store")


@pytest.mark.parametrize("plant", ["link", "hanging link", "file", "pipe", "folder of something", "pipe inside"])
def test_what_is_planted_is_not_written_through(tmp_path: Path, avel: Dataset, plant: str) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "sets" / ".store.packing"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("mine")
    folder.parent.mkdir()
    refused = plant in ("folder of something", "pipe inside")
    if plant == "folder of something":
        shutil.copytree(elsewhere, folder)
    elif plant == "pipe inside":
        folder.mkdir()
        os.mkfifo(folder / "journal.jsonl")
    else:
        PLANTS[plant](folder)
    if refused:
        with pytest.raises(StoreError, match="only the files of an interrupted pack, got '(kept|journal)"):
            pack(avel, folder.with_name("store"), progress=False)
        assert len(list(folder.iterdir())) == 1
    else:
        pack(avel, folder.with_name("store"), progress=False)
        assert not os.path.lexists(folder) and open_store(folder.with_name("store")).splits == avel.splits
    assert [file.read_text() for file in elsewhere.iterdir()] == ["mine"] and not (tmp_path / "nowhere").exists()


def test_incomplete_lines_of_the_log_are_ignored(tmp_path: Path, avel: Dataset) -> None:
    folder = tmp_path / ".store.packing"
    folder.mkdir()
    plan = json.dumps([2, avel.digest(), "float32", SHARD_BYTES])
    (folder / "plan.json").write_text(plan)
    lines = ["[1]", "null", '{"file": "all-id.npy"}', '{"file": ["x"], "bytes": 1}', "[" * 100_000]
    (folder / "journal.jsonl").write_text("\n".join(lines) + "\n")
    pack(avel, tmp_path / "store", shard_bytes=SHARD_BYTES, progress=False)
    assert open_store(tmp_path / "store").splits == avel.splits


def test_bad_values_are_named(tmp_path: Path, avel: Dataset) -> None:
    name = avel.split("all").id[4]
    bad = np.zeros((10, 128))
    for value, dtype, message in (
        (np.nan, "float32", f"{name}.zip must hold finite features"),
        (1e6, "float16", "'audio' of split 'all' must be in the range of float16, got larger values in clip 4"),
        (1e300, "bfloat16", "in the range of bfloat16, got larger values in clip 4"),
        (-1e300, "float32", "in the range of float32, got larger values in clip 4"),
    ):
        bad[3, 5] = value
        write_zip(avel.path / "feature/audio/zip" / f"{name}.zip", bad)
        with pytest.raises(StoreError, match=message):
            pack(avel, tmp_path / dtype, dtype, progress=False)
        assert not (tmp_path / dtype).exists()


def test_arguments(tmp_path: Path, avel: Dataset) -> None:
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, bfloat16, float64, got 'int8'"):
        pack(avel, tmp_path / "store", "int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shard_bytes must be at least 1, got 0"):
        pack(avel, tmp_path / "store", shard_bytes=0)
    with pytest.raises(FileExistsError, match="must not exist yet"):
        pack(avel, tmp_path)


def test_damage_is_named(tmp_path: Path, avel: Dataset) -> None:
    pack(avel, tmp_path / "store", shard_bytes=SHARD_BYTES, progress=False)
    file = tmp_path / "store" / "all-video-00001.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedStoreError, match="all-video-00001.npy.*checksum differs"):
        open_store(tmp_path / "store")
    os.truncate(file, 1000)
    with pytest.raises(DamagedStoreError, match="all-video-00001.npy.*bytes instead of"):
        open_store(tmp_path / "store", verify=False)


def test_the_manifest_lists_all_files(tmp_path: Path, avel: Dataset) -> None:
    pack(avel, tmp_path / "store", "bfloat16", progress=False)
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert manifest["format"] == 2
    assert manifest["modalities"]["video"] == {"kind": "grid", "shape": [7, 7, 16], "dtype": "bfloat16"}
    part = manifest["splits"]["all"]["parts"][0]
    assert part["arrays"]["video"]["dtype"] == "bfloat16"
    assert part["arrays"]["video"]["shards"][0]["dtype"] == "<u2"


def test_bfloat16_is_exact_when_read_and_nearest_when_written() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bfloat16.from_bits(bits)
    finite = np.isfinite(values)
    np.testing.assert_array_equal(bfloat16.to_bits(values[finite]), bits[finite])
    # The middle of 1 and the next number is rounded to the even one, a slightly larger value to the next.
    near = np.array([1 + 2**-8, 1 + 2**-8 + 2**-20, 1 + 3 * 2**-8], np.float32)
    np.testing.assert_array_equal(bfloat16.from_bits(bfloat16.to_bits(near)), [1, 1 + 2**-7, 1 + 2**-6])
