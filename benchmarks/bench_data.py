"""Reading random batches from public zips and from packed stores; `pytest benchmarks/bench_data.py`.

Clips have the published shapes, video (10, 7, 7, 512) and audio (10, 128) float64. They are rectified noise, because
video features are rectified. Batches of all readers are compared before the timing. All files are then in the page
cache, so the times are those of decoding and copying, without the disk. Readers alternate, so other load of the machine
affects all of them.
"""

import pickle
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measurement import origin, times_of

from unicode_fast.data import Batch, Batches, open_data, open_loader, open_store
from unicode_fast.data.store.write import pack

ROWS, KEY = "data", ("contender",)
CLIPS, BATCH, REPEATS = 64, 8, 50
SHAPES = {"audio": (10, 128), "video": (10, 7, 7, 512)}
WORKERS = 2
# Below this ratio, zips would suffice.
LEAST_RATIO = 20


def write_zips(root: Path, compression: int) -> None:
    generator = np.random.default_rng(0)
    names = [f"video-{number:05d}" for number in range(CLIPS)]
    for modality, shape in SHAPES.items():
        folder = root / "feature" / modality / "zip"
        folder.mkdir(parents=True)
        for name in names:
            features = np.maximum(generator.normal(size=shape), 0)
            with zipfile.ZipFile(folder / f"{name}.zip", "w", compression) as archive:
                archive.writestr(f"{name}.pkl", pickle.dumps(features, 4))
    rows = "".join(f"{name}.mp4\n" for name in names)
    (root / "video_name_vggsound81k_checked.csv").write_text("id\n" + rows)


def times_ms(readers: dict[str, Callable[[int], Batch]]) -> dict[str, np.ndarray]:
    """(REPEATS,) for each reader, one batch of each in turn."""
    found: dict[str, list[float]] = {name: [] for name in readers}
    for step in range(REPEATS):
        for name, read in readers.items():
            begun = time.perf_counter()
            read(step)
            found[name].append(1000 * (time.perf_counter() - begun))
    return {name: np.array(values) for name, values in found.items()}


def ahead_ms(batches: Batches, workers: int) -> np.ndarray:
    """(REPEATS,) time from batch to batch, after the first."""
    with open_loader(batches, torch.device("cpu"), "prefetch", workers=workers) as loader:
        loader.batch(0)
        times = []
        for step in range(1, REPEATS + 1):
            begun = time.perf_counter()
            loader.batch(step)
            times.append(1000 * (time.perf_counter() - begun))
    return np.array(times)


def bench_reading(tmp_path: Path, keep: Callable[[dict], None]) -> None:
    datasets = {}
    for name, compression in (("zips, deflated", zipfile.ZIP_DEFLATED), ("zips, stored", zipfile.ZIP_STORED)):
        write_zips(tmp_path / name, compression)
        datasets[name] = open_data(f"vggsound81k:{tmp_path / name}", modalities=tuple(SHAPES))
    for dtype in ("float32", "float16", "bfloat16"):
        # In several files, as for large data sets.
        pack(datasets["zips, deflated"], tmp_path / dtype, dtype, shard_bytes=1 << 24, progress=False)  # type: ignore[arg-type]
        datasets[f"store, {dtype}"] = open_store(tmp_path / dtype)
    # Read as by a batch loader; halves become float32 on the device.
    readers = {
        name: partial(Batches(data.split("all"), BATCH, seed=0).batch, keep_halves=True)
        for name, data in datasets.items()
    }
    exact = readers["zips, deflated"](0)
    for name, read in readers.items():
        slack = {"store, float16": 1e-3, "store, bfloat16": 4e-3}.get(name, 0.0)
        for modality, features in read(0).features.items():
            torch.testing.assert_close(
                features.float(), exact.features[modality], rtol=slack, atol=1e-6 if slack else 0.0
            )
    found = times_ms(readers)
    zips = Batches(datasets["zips, deflated"].split("all"), BATCH, seed=0)
    for name, workers in (("a thread", 0), (f"{WORKERS} processes", WORKERS)):
        found[f"zips, deflated, ahead by {name}"] = ahead_ms(zips, workers)
    ours = float(np.median(found["store, float32"]))
    rows = [
        {
            "problem": "reading a random batch",
            "contender": name,
            "clips": BATCH,
            "shapes": SHAPES,
            **times_of(values),
            # Compared above.
            "agreement": "rounded to half" if "float16" in name else "exact",
            "times_slower_than_store_float32": float(np.median(values)) / ours,
            "page_cache": "warm",
            **origin("cpu"),
            "numpy": np.__version__,
        }
        for name, values in found.items()
    ]
    for row in rows:
        keep(row)
    ratio = float(np.median(found["zips, deflated"])) / ours
    assert ratio >= LEAST_RATIO, (
        f"the store must be {LEAST_RATIO} times as fast as deflated zips, was {ratio:.1f} times"
    )
