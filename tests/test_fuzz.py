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
import torch
from layout_files import write_rows, write_zip
from mutants import SECONDS, alike, equal, fuzz
from safetensors.torch import save_file

from unicode_fast import preset
from unicode_fast.checkpoint import CheckpointError, write_config
from unicode_fast.config import Modality
from unicode_fast.data import Dataset, StoreError, open_data, open_store
from unicode_fast.data.layouts.ave import h5_features, read_labels, read_order
from unicode_fast.data.layouts.avsbench import _pictures
from unicode_fast.data.layouts.files import read_csv, read_lines
from unicode_fast.data.layouts.zip_pickle import read_zipped_array, unpickle_array, unpickle_counts
from unicode_fast.data.store.checks import DamagedStoreError
from unicode_fast.data.store.write import pack
from unicode_fast.data.stream import open_stream, write_shards
from unicode_fast.data.text import _read_vectors
from unicode_fast.files.untrusted import BadFile
from unicode_fast.files.writing import write_json
from unicode_fast.report.tables import rows_of
from unicode_fast.tasks import Row
from unicode_fast.tasks.metrics.intervals import Estimate
from unicode_fast.tasks.segmentation.backbones import LIGHT_SETTINGS, fill, read_weights
from unicode_fast.tasks.segmentation.segmenter import Segmenter, load_segmenter, save_segmenter
from unicode_fast.training.metrics_logger import read_metrics
from unicode_fast.training.runs import read_seeds, read_summary


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
        for number, part in enumerate(data.clip_sets(split))
        for key, array in part.arrays.items()
    }


def same_kinds(one: Any, other: Any) -> bool:
    """Of texts in which names and numbers of items stand like values: each item of a kind that the valid file has."""
    return type(one) is type(other) and kinds(one) <= kinds(other)


def kinds(value: Any) -> set[str]:
    """Types of what a result consists of, of arrays dtype and shape but for the number of rows."""
    if isinstance(value, np.ndarray):
        return {f"{value.dtype.kind}{'' if value.dtype.kind == 'U' else value.dtype.itemsize} {value.shape[1:]}"}
    items = list(value.values()) if isinstance(value, dict) else value
    if isinstance(items, (list, tuple)):
        return {kind for item in items for kind in kinds(item)}
    return {"number" if isinstance(value, (int, float)) else type(value).__name__}


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

    return Reader(
        root / "clips.csv", lambda: content(open_data(f"clips:{root}")), (StoreError, FileNotFoundError), same_kinds
    )


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
    return Reader(file, lambda: read_lines(file), may_be=same_kinds)


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


def hdf5(folder: Path, packing: str | None) -> Reader:
    h5py = pytest.importorskip("h5py")
    file, array = folder / "audio_feature.h5", np.random.default_rng(0).normal(size=(5, 10, 8)).round(1)
    more = {"chunks": (2, 10, 8), "compression": packing, "shuffle": True, "fletcher32": True} if packing else {}
    with h5py.File(file, "w") as opened:
        opened.create_dataset("avadataset", data=array, **more)

    return Reader(file, lambda: h5_features(file, 5).array(Modality("vector", (8,)))[:], may_be=alike)


def hdf5_numbers(folder: Path, labels: bool) -> Reader:
    h5py = pytest.importorskip("h5py")
    file = folder / "numbers.h5"
    with h5py.File(file, "w") as opened:
        opened["avadataset" if labels else "order"] = np.eye(4, dtype=np.int64)[None] if labels else np.arange(40)
    return Reader(file, lambda: read_labels(file, 3) if labels else read_order(file, 40), may_be=alike)


def picture(folder: Path, name: str) -> Reader:
    """One of two frames; a JPEG has no checksum, but must be as large as the others."""
    image = pytest.importorskip("PIL.Image")
    first, file = folder / "first.png", folder / f"frame.{name}"
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    image.fromarray(pixels).save(first)
    image.fromarray(pixels).save(file, format=name)
    return Reader(file, lambda: _pictures([[first, file]], mask=False)[:], may_be=alike if name == "jpeg" else equal)


def shard(folder: Path) -> Reader:
    pytest.importorskip("webdataset")
    write_shards(open_data(f"clips:{own_clips(folder)}"), folder / "shards", 2, progress=False)
    root = folder / "shards"
    return Reader(root / "train-000000.tar", lambda: content(open_stream(str(root))), may_be=alike)


def shards_json(folder: Path) -> Reader:
    file = shard(folder).file.with_name("shards.json")
    return Reader(file, lambda: content(open_stream(str(file.parent))), (StoreError, FileNotFoundError), same_kinds)


def packed_store(folder: Path) -> Path:
    pack(open_data(f"clips:{own_clips(folder)}"), folder / "store", progress=False)
    return folder / "store"


def manifest(folder: Path) -> Reader:
    root = packed_store(folder)
    return Reader(root / "manifest.json", lambda: content(open_store(root)), may_be=same_kinds)


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


def backbone(folder: Path, suffix: str, zipped: bool = True) -> Reader:
    """Weights of a backbone of timm; changed numbers cannot be told but where a zip has checksums."""
    file, model = folder / f"pvt.{suffix}", torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    if suffix == "safetensors":
        save_file(model.state_dict(), file, {"format": "pt"})
    else:
        torch.save({"state_dict": model.state_dict()}, file, _use_new_zipfile_serialization=zipped)

    def read() -> dict[str, torch.Tensor]:
        fill(model, read_weights(file), file)
        return {name: value.clone() for name, value in model.state_dict().items()}

    return Reader(file, read, (ValueError,), equal if suffix == "pth" and zipped else alike)


def run_summary(folder: Path) -> Reader:
    row = Row("localisation", "audio", "video", 0.4, 0.6, 0.1, interval=(0.3, 0.5), metrics={"map": Estimate(0.3, 0.2)})
    write_json(folder / "summary.json", {"rows": [row.as_dict()] * 3, "seconds": 1.0, "versions": {"torch": "2"}})
    return Reader(folder / "summary.json", lambda: read_summary(folder), (CheckpointError,), may_be=same_kinds)


def run_seeds(folder: Path) -> Reader:
    write_json(folder / "seeds.json", [0, 1, 2, 17])
    return Reader(folder / "seeds.json", lambda: read_seeds(folder / "seeds.json"), (CheckpointError,), same_kinds)


def evaluation(folder: Path) -> Reader:
    """A row that was measured later, as a report reads it beside the run's own."""
    row = Row("retrieval", "audio", "video", 0.4, 0.6, 0.1, anchor="text", metrics={"R@1": Estimate(0.3, 0.2, 0.4)})
    write_config(folder, preset("recommended"))
    write_json(folder / "summary.json", {"rows": [replace(row, task="classification").as_dict()]})
    file = folder / "evaluations" / "retrieval.json"
    write_json(file, {"row": row.as_dict(), "dataset": "talking-digits", "flags": {"seed": 3}})
    return Reader(file, lambda: rows_of(folder), (CheckpointError,), same_kinds)


def metrics(folder: Path) -> Reader:
    """Lines that cannot be read are left out."""
    file = folder / "metrics.jsonl"
    file.write_text(
        "".join(json.dumps({"step": n, "kind": "train", "losses": {"cpc": n / 7}}) + "\n" for n in range(9))
    )
    return Reader(file, lambda: read_metrics(folder), (CheckpointError,), same_kinds)


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
    "hdf5": lambda folder: hdf5(folder, None),
    **{f"hdf5 {packing}": lambda folder, packing=packing: hdf5(folder, packing) for packing in ("gzip", "lzf")},
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
    "backbone safetensors": lambda folder: backbone(folder, "safetensors"),
    "backbone pth": lambda folder: backbone(folder, "pth"),
    "backbone pth of before 1.6": lambda folder: backbone(folder, "pth", zipped=False),
    "summary.json": run_summary,
    "seeds.json": run_seeds,
    "evaluation": evaluation,
    "metrics.jsonl": metrics,
}


@pytest.mark.parametrize("seconds", SECONDS)
@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused_by_name(
    name: str, seconds: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, read, errors, may_be = READERS[name](tmp_path)
    found = fuzz(file, read, errors, seconds=seconds, may_be=may_be)
    with capsys.disabled():
        print(f"\n{name}: {found}", end="")  # noqa: T201 - for the log
