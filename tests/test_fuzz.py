"""Every reader of data files, given damaged ones: they are refused by name, or give what the valid file gives.

Readers of checkpoints, runs and configurations are in test_fuzz_checkpoint.py.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from mutants import LONG, QUICK, alike, equal, fuzz
from published import write_rows, write_zip

from unicode_fast import preset
from unicode_fast.checkpoint import CheckpointError
from unicode_fast.data import Dataset, StoreError, open_data, open_store
from unicode_fast.data.files import read_csv, read_lines
from unicode_fast.data.layouts.ave import h5_source, read_labels, read_order
from unicode_fast.data.layouts.avsbench import read_picture
from unicode_fast.data.pack import pack
from unicode_fast.data.store_checks import DamagedStoreError
from unicode_fast.data.stream import open_stream, write_shards
from unicode_fast.data.text import _read_vectors
from unicode_fast.data.zip_pickle import read_zipped_array, unpickle_array, unpickle_counts
from unicode_fast.journal import read_metrics
from unicode_fast.report import rows_of
from unicode_fast.runs import read_seeds, read_summary, write_config
from unicode_fast.tasks import Row
from unicode_fast.tasks.backbones import LIGHT_SETTINGS
from unicode_fast.tasks.intervals import Estimate
from unicode_fast.tasks.segmenter import Segmenter, load_segmenter, save_segmenter
from unicode_fast.untrusted import BadFile
from unicode_fast.writing import write_json


class Reader(NamedTuple):
    """A valid file, what reads it, what it may be refused with, and what it may become besides."""

    file: Path
    read: Callable[[], Any]
    errors: tuple[type[Exception], ...] = (StoreError,)
    may_be: Callable[[Any, Any], bool] = equal


def content(data: Dataset) -> dict[str, Any]:
    """All that a data set holds."""
    return {
        f"{split}.{number}.{key}": np.asarray(array)
        for split in data.splits
        for number, part in enumerate(data.parts(split))
        for key, array in part.arrays.items()
    }


def same_type(one: Any, other: Any) -> bool:
    """Of texts that say what names and numbers there are: others of the same kind."""
    return type(one) is type(other)


def own_clips(folder: Path) -> Path:
    """Five clips of a feature, with classes and labels."""
    root, random = folder / "own", np.random.default_rng(0)
    for name in "abcde":
        for modality, array in (("sound", random.normal(size=(6, 4))), ("sound.labels", np.eye(4)[np.arange(6) % 4])):
            (root / modality).mkdir(parents=True, exist_ok=True)
            np.save(root / modality / f"{name}.npy", array)
    (root / "classes.txt").write_text("one\ntwo\nthree\n")
    rows = [["a", "train", "one"], ["b", "train", "two"], ["c", "val", "three"], ["d", "test", "one"]]
    write_rows(root / "clips.csv", ["id", "split", "class"], [*rows, ["e", "train", "three"]])
    return root


def npy(folder: Path) -> Reader:
    root = own_clips(folder)
    return Reader(root / "sound" / "b.npy", lambda: content(open_data(f"clips:{root}")), may_be=alike)


def labels_npy(folder: Path) -> Reader:
    root = own_clips(folder)
    return Reader(root / "sound.labels" / "b.npy", lambda: content(open_data(f"clips:{root}")), may_be=alike)


def clips_csv(folder: Path) -> Reader:
    """The list of clips, all that it names read; damage can name other splits, and files that are not there."""
    root = own_clips(folder)

    def read() -> dict[str, Any]:
        try:
            return content(open_data(f"clips:{root}"))
        except (StoreError, FileNotFoundError) as error:
            # The files that it names, or no longer does, are compared with it, and named.
            raise StoreError(f"clips.csv: {error}") from error

    return Reader(root / "clips.csv", read, may_be=same_type)


def rows_csv(folder: Path) -> Reader:
    file = folder / "list.csv"
    write_rows(
        file, ["id", "start", "event"], [[f"clip {n}", n, 'a "b", c' if n % 2 else "d\te"] for n in range(40)], "\t"
    )

    def columns(one: Any, other: Any) -> bool:
        return all(list(row) == ["id", "start", "event"] for row in one)

    return Reader(file, lambda: read_csv(file, ["id", "start", "event"], "\t"), may_be=columns)


def names_list(folder: Path) -> Reader:
    file = folder / "classes.txt"
    file.write_text("\n".join(f"class number {number} ä" for number in range(40)))
    return Reader(file, lambda: read_lines(file), may_be=same_type)


def zipped_pickle(folder: Path) -> Reader:
    file = folder / "clip.zip"
    write_zip(file, np.random.default_rng(0).normal(size=(10, 16)))
    return Reader(file, lambda: read_zipped_array(file))


def bare_pickle(folder: Path, protocol: int) -> Reader:
    """Without the checksum of a zip, in which there is any array of numbers or texts."""
    file = folder / "array.pkl"
    file.write_bytes(pickle.dumps(np.random.default_rng(0).normal(size=(10, 16)), protocol))

    def plain(one: Any, other: Any) -> bool:
        return isinstance(one, np.ndarray) and one.dtype.kind in "biufU" and len(str(one)) >= 0

    return Reader(file, lambda: unpickle_array(file.read_bytes(), str(file)), may_be=plain)


def word_counts(folder: Path) -> Reader:
    file = folder / "cnt.pkl"
    file.write_bytes(pickle.dumps({number * 37: number % 5 for number in range(300)}))

    def integers(one: Any, other: Any) -> bool:
        return type(one) is dict and all(type(number) is int for item in one.items() for number in item)

    return Reader(file, lambda: unpickle_counts(file), may_be=integers)


def word_vectors(folder: Path) -> Reader:
    file = folder / "words.npz"
    np.savez(file, ids=np.arange(7), vectors=np.random.default_rng(0).normal(size=(7, 12)).astype(np.float32))

    def read() -> Any:
        try:
            return _read_vectors(file)
        except BadFile as error:
            raise StoreError(f"{file}: {error}") from error

    return Reader(file, read)


def hdf5(folder: Path, packed: bool) -> Reader:
    h5py = pytest.importorskip("h5py")
    file, array = folder / "audio_feature.h5", np.random.default_rng(0).normal(size=(5, 10, 8))
    more = {"chunks": (2, 10, 8), "compression": "gzip", "shuffle": True, "fletcher32": True} if packed else {}
    with h5py.File(file, "w") as opened:
        opened.create_dataset("avadataset", data=array, **more)

    def read() -> list[np.ndarray]:
        source = h5_source(file, 5)
        return [source.raw(clip) for clip in range(5)]

    return Reader(file, read, may_be=alike)


def hdf5_numbers(folder: Path, labels: bool) -> Reader:
    h5py = pytest.importorskip("h5py")
    file = folder / "numbers.h5"
    with h5py.File(file, "w") as opened:
        opened["avadataset" if labels else "order"] = np.eye(4, dtype=np.int64)[None] if labels else np.arange(40)
    return Reader(file, lambda: read_labels(file, 3) if labels else read_order(file, 40), may_be=alike)


def picture(folder: Path, name: str) -> Reader:
    image = pytest.importorskip("PIL.Image")
    file = folder / f"frame.{name}"
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    image.fromarray(pixels).save(file, format=name)

    def colours(one: Any, other: Any) -> bool:
        return one.ndim == 3 and one.shape[2] == 3 and one.dtype == np.uint8

    return Reader(file, lambda: read_picture(file, mask=False), may_be=colours if name == "jpeg" else equal)


def shard(folder: Path) -> Reader:
    pytest.importorskip("webdataset")
    write_shards(open_data(f"clips:{own_clips(folder)}"), folder / "shards", 2, progress=False)
    root = folder / "shards"
    return Reader(root / "train-000000.tar", lambda: content(open_stream(str(root))), may_be=alike)


def shards_json(folder: Path) -> Reader:
    file = shard(folder).file.with_name("shards.json")

    def read() -> Any:
        data = open_stream(str(file.parent))
        try:
            return content(data)
        except (StoreError, FileNotFoundError) as error:
            raise StoreError(f"{file}: {error}") from error

    return Reader(file, read, (StoreError, FileNotFoundError), may_be=same_type)


def packed_store(folder: Path) -> Path:
    pack(open_data(f"clips:{own_clips(folder)}"), folder / "store", progress=False)
    return folder / "store"


def manifest(folder: Path) -> Reader:
    root = packed_store(folder)

    def read() -> Any:
        try:
            return content(open_store(root))
        except (StoreError, FileNotFoundError) as error:
            # What the manifest says of other files is compared with them, and they are named.
            raise StoreError(f"manifest.json: {error}") from error

    return Reader(root / "manifest.json", read, may_be=same_type)


def store_npy(folder: Path, verify: bool) -> Reader:
    root = packed_store(folder)
    return Reader(
        root / "train-sound.npy",
        lambda: content(open_store(root, verify=verify)),
        (DamagedStoreError,),
        may_be=equal if verify else alike,
    )


def segmenter(folder: Path) -> Reader:
    file, sizes = folder / "segmenter.safetensors", {"channels": 1, "frames": 2, "query_steps": 3, "query_width": 4}
    written = Segmenter("light", **sizes, settings=LIGHT_SETTINGS)
    save_segmenter(written, file, {"source": "audio"})

    def read() -> Any:
        expected = {**written.description, "source": "audio"}
        return dict(load_segmenter(file, LIGHT_SETTINGS, expected).state_dict())

    return Reader(file, read, (CheckpointError, ValueError))


def run_summary(folder: Path) -> Reader:
    row = Row("localisation", "audio", "video", 0.4, 0.6, 0.1, interval=(0.3, 0.5), metrics={"map": Estimate(0.3, 0.2)})
    write_json(folder / "summary.json", {"rows": [row.as_dict()] * 3, "seconds": 1.0, "versions": {"torch": "2"}})
    return Reader(folder / "summary.json", lambda: read_summary(folder), (CheckpointError,), may_be=same_type)


def run_seeds(folder: Path) -> Reader:
    write_json(folder / "seeds.json", [0, 1, 2, 17])
    return Reader(folder / "seeds.json", lambda: read_seeds(folder / "seeds.json"), (CheckpointError,), same_type)


def evaluation(folder: Path) -> Reader:
    """A row that was measured later, as a report reads it beside the run's own."""
    row = Row("retrieval", "audio", "video", 0.4, 0.6, 0.1, anchor="text", metrics={"R@1": Estimate(0.3, 0.2, 0.4)})
    write_config(folder, preset("recommended"))
    write_json(folder / "summary.json", {"rows": [replace(row, task="classification").as_dict()]})
    file = folder / "evaluations" / "retrieval.json"
    write_json(file, {"row": row.as_dict(), "dataset": "talking-digits", "flags": {"seed": 3}})
    return Reader(file, lambda: rows_of(folder), (CheckpointError,), same_type)


def metrics(folder: Path) -> Reader:
    """Lines that cannot be read are left out."""
    file = folder / "metrics.jsonl"
    file.write_text(
        "".join(json.dumps({"step": n, "kind": "train", "losses": {"cpc": n / 7}}) + "\n" for n in range(9))
    )
    return Reader(file, lambda: read_metrics(folder), (CheckpointError,), same_type)


READERS: dict[str, Callable[[Path], Reader]] = {
    "npy": npy,
    "labels npy": labels_npy,
    "clips.csv": clips_csv,
    "csv": rows_csv,
    "list": names_list,
    "zip": zipped_pickle,
    "pickle 0": lambda folder: bare_pickle(folder, 0),
    "pickle 2": lambda folder: bare_pickle(folder, 2),
    "pickle 5": lambda folder: bare_pickle(folder, 5),
    "cnt.pkl": word_counts,
    "word vectors": word_vectors,
    "hdf5": lambda folder: hdf5(folder, packed=False),
    "hdf5 packed": lambda folder: hdf5(folder, packed=True),
    "hdf5 labels": lambda folder: hdf5_numbers(folder, labels=True),
    "hdf5 order": lambda folder: hdf5_numbers(folder, labels=False),
    "png": lambda folder: picture(folder, "png"),
    "jpeg": lambda folder: picture(folder, "jpeg"),
    "tar": shard,
    "shards.json": shards_json,
    "manifest.json": manifest,
    "store npy": lambda folder: store_npy(folder, verify=True),
    "store npy unverified": lambda folder: store_npy(folder, verify=False),
    "segmenter": segmenter,
    "summary.json": run_summary,
    "seeds.json": run_seeds,
    "evaluation": evaluation,
    "metrics.jsonl": metrics,
}


def fuzz_reader(name: str, folder: Path, seconds: float, seed: int) -> str:
    file, read, errors, may_be = READERS[name](folder)
    return fuzz(file, read, errors, seconds=seconds, seed=seed, may_be=may_be)


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused_by_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = fuzz_reader(name, tmp_path, QUICK, seed=0)
    with capsys.disabled():
        print(f"\n{name}: {found}", end="")  # noqa: T201 - for the log


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_damaged_files_are_refused_by_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = fuzz_reader(name, tmp_path, LONG, seed=1)
    with capsys.disabled():
        print(f"\n{name}: {found}", end="")  # noqa: T201 - for the log
