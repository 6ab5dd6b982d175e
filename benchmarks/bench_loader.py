"""The batch loader, the step, and the loop of both, in clips per second; `pytest benchmarks/bench_loader.py`.

Each loader must first return the correct batches of some steps. Rows are saved in results/loader-<device>.json. The
clips are those of the built-in data, and on CUDA also random clips of the published shapes.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from measurement import origin
from shapes import TRAIN_SHAPES

from unicode_fast import preset
from unicode_fast.config import Config
from unicode_fast.data import Batches, ClipSet, open_dataset, open_loader
from unicode_fast.training.trainer import Trainer

ROWS, KEY = "loader", ("size", "feed")
KINDS = ("direct", "prefetch", "resident")
CLIPS_AS_PUBLISHED = 1600
STEPS = {"cpu": 25, "cuda": 200}
LOADER_SECONDS = 1.0
# Share of the smaller of both rates that the loop with the loader of "auto" must reach.
LEAST_SHARE = 0.95


def clips_of(size: str, folder: Path) -> tuple[Config, ClipSet]:
    """The configuration of a size, and clips to train on."""
    if size == "default":
        config = preset("recommended")
        return config, open_dataset(config.data).split("train")
    shape = TRAIN_SHAPES["cuda"][size]
    config = preset("recommended", shape.size).replace(precision="bfloat16", channels_last=True)
    arrays: dict[str, np.ndarray] = {}
    generator = np.random.default_rng(0)
    for name, modality in shape.modalities().items():
        whole = (CLIPS_AS_PUBLISHED, shape.positions, *modality.shape)
        array = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, whole)
        for start in range(0, CLIPS_AS_PUBLISHED, 100):
            array[start : start + 100] = generator.random((100, *whole[1:]), np.float32)
        arrays[name] = array
    return config, ClipSet(arrays, shape.modalities(), [], np.arange(CLIPS_AS_PUBLISHED))


@pytest.mark.parametrize("size", ["default", "published"])
@pytest.mark.parametrize("kind", KINDS)
def bench_loader(
    request: pytest.FixtureRequest, keep: Callable[[dict], None], tmp_path: Path, kind: str, size: str
) -> None:
    device = torch.device(request.config.getoption("--device"))
    if size not in TRAIN_SHAPES[device.type]:
        pytest.skip("for GPUs")
    config, clips = clips_of(size, tmp_path)
    batches = Batches(clips, config.train.batch_size)
    trainer = Trainer(config, clips.modalities, device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    with open_loader(batches, device, kind, workers=config.train.loader_workers) as loader:
        for step in (0, 7):
            truth, found = batches.batch(step), loader.batch(step).to("cpu")
            assert all(torch.equal(found.features[name], truth.features[name]) for name in truth.features)
        loaded = loader_rate(loader, wait)
        fixed = loader.batch(0)
        step_rate = rate(lambda _: trainer.train_step(fixed.features, fixed.mask, 1e-3), STEPS[device.type], wait)
        waiting: list[float] = []

        def loop(step: int) -> None:
            begun = time.perf_counter()
            batch = loader.batch(step)
            waiting.append(time.perf_counter() - begun)
            trainer.train_step(batch.features, batch.mask, 1e-3)

        seconds = time.perf_counter()
        looped = rate(loop, STEPS[device.type], wait)
        seconds = time.perf_counter() - seconds
    clips_each = config.train.batch_size
    row: dict[str, Any] = {
        "size": size,
        "feed": kind,
        "workers": config.train.loader_workers if kind == "prefetch" else 0,
        "clips": clips_each,
        "feed_clips_per_second": loaded * clips_each,
        "step_clips_per_second": step_rate * clips_each,
        "loop_clips_per_second": looped * clips_each,
        "share_of_the_smaller": looped / min(loaded, step_rate),
        "share_of_the_loop_in_the_feed": sum(waiting) / seconds,
        "agreement": "exact",
        **origin(device.type),
    }
    keep(row)
    with open_loader(batches, device, "auto") as taken:
        assert type(loader) is not type(taken) or row["share_of_the_smaller"] >= LEAST_SHARE


def loader_rate(loader: Any, wait: Any) -> float:
    """Batches per second of a loader without other work."""
    loader.batch(0)
    wait()
    step, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < LOADER_SECONDS:
        step += 1
        loader.batch(step)
    wait()
    return step / (time.perf_counter() - begun)


def rate(call: Any, number: int, wait: Any) -> float:
    """Calls per second, from the median time of groups of five, which excludes pauses of the machine."""
    for step in range(3):
        call(step)
    wait()
    times = []
    for group in range(max(number // 5, 1)):
        begun = time.perf_counter()
        for step in range(5):
            call(3 + 5 * group + step)
        wait()
        times.append((time.perf_counter() - begun) / 5)
    return 1 / float(np.median(times))
