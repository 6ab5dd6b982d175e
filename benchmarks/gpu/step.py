"""Whole training steps and their batch loader, G7: `python benchmarks/gpu/step.py --device cuda`.

Rows are those of benchmarks/results/train-step-cuda.json and loader-cuda.json; the compiled step comes last.
"""

import functools
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common

# isort: split
# `common` has put the folder of these modules on the path.
import bench_loader
import torch
import train_steps
from common import Found, Stage
from shapes import TRAIN_SHAPES

from unicode_fast.data import Batches, ClipSet, open_loader

SIZE = "published"
FASTEST = "recommended, bfloat16, channels last, compiled, in a CUDA graph"
ORIGINAL = "the original"
CONTENDERS = (
    "recommended, in a CUDA graph",
    "recommended, bfloat16, channels last",
    ORIGINAL,
    "recommended, float32",
    "recommended, tf32",
    # Its compilation may take all remaining time.
    FASTEST,
)
# Clips per second of the whole step, its loader included.
TARGET = 4000.0
# Enough batches for the order to matter, at a megabyte per clip; bench_loader makes them by the hundred.
CLIPS = 400
LOOP_STEPS = 40
LOADERS = ("resident", "prefetch")


def rate_of_one_call(call: Callable[[int], object], number: int, wait: Callable[[], object]) -> float:
    """Calls per second, in a dry run."""
    begun = time.perf_counter()
    call(0)
    wait()
    return 1 / (time.perf_counter() - begun)


def measure(stage: Stage, contender: str, trainers: list[tuple[float, Any]]) -> Found:
    """The row of one contender; its median in ms and its trainer are kept in `trainers`."""
    kept: list[Any] = []
    make = train_steps.make

    def keeping(*arguments: Any) -> tuple[Any, Any]:
        made = make(*arguments)
        kept.append(made[0])
        return made

    train_steps.make = keeping
    try:
        row = train_steps.measure(contender, SIZE, stage.device)
    finally:
        train_steps.make = make
    trainers.append((row["median_ms"], kept[0]))
    text = (
        f"{row['median_ms']:.3g} ms ({row['p20_ms']:.3g} to {row['p80_ms']:.3g}), {row['clips_per_second']:.0f} clips/s"
    )
    if row["peak_bytes"] is not None:
        text += f", peak {row['peak_bytes'] / 2**30:.1f} GiB"
    found = Found(True, text, row)
    return found if contender == ORIGINAL else common.qualified(stage, found)


@functools.cache
def clips_in(folder: Path) -> ClipSet:
    """Clips of the published shapes."""
    return bench_loader.clips_of(SIZE, folder)[1]


def with_loader(stage: Stage, trainer: Any, folder: Path) -> Found:
    """Clips per second of a trainer with the loader of a run, from clips of the published shapes."""
    clips = clips_in(folder)
    batches = Batches(clips, TRAIN_SHAPES[stage.device][SIZE].clips)
    wait = torch.cuda.synchronize if stage.device == "cuda" else lambda: None
    with open_loader(batches, torch.device(stage.device), "auto") as taken:

        def step(number: int) -> None:
            batch = taken.batch(number)
            trainer.train_step(batch.features, batch.mask, train_steps.RATE)

        looped = bench_loader.rate(step, 5 if stage.tiny else LOOP_STEPS, wait) * batches.batch_size
        kind = type(taken).__name__
    met = None if stage.tiny else looped >= TARGET
    text = f"{looped:.0f} clips/s, loader included ({kind})"
    text += "" if met is None else f", target {TARGET:.0f}, {'met' if met else 'MISSED'}"
    return common.qualified(stage, Found(True, text, {"loop_rate": looped, "met": met}))


def loader(stage: Stage, kind: str, folder: Path) -> Found:
    """The loader alone, the step alone, and the loop."""
    options = {"--device": stage.device}
    request: Any = SimpleNamespace(config=SimpleNamespace(getoption=options.__getitem__))
    rows: list[dict] = []
    missed = ""
    try:
        bench_loader.bench_loader(request, rows.append, folder, kind, SIZE)
    except AssertionError:
        # After a row the failed check is the last one: the share that a loader must reach.
        if not rows:
            raise
        missed = ", too little"
    row = rows[0]
    text = (
        f"loader {row['feed_clips_per_second']:.0f} clips/s, step {row['step_clips_per_second']:.0f}, loop "
        f"{row['loop_clips_per_second']:.0f}: {100 * row['share_of_the_smaller']:.0f} % of the smaller{missed}"
    )
    return common.qualified(stage, Found(True, text, row))


def main() -> None:
    stage = common.begin(__doc__)
    bench_loader.CLIPS_AS_PUBLISHED = 100 if stage.tiny else CLIPS
    if stage.tiny:
        bench_loader.rate = rate_of_one_call
        bench_loader.preset = lambda rules, _: train_steps.config_of(TRAIN_SHAPES["cpu"][SIZE], rules)
    bench_loader.STEPS = {"cpu": 5, "cuda": LOOP_STEPS}
    bench_loader.LOADER_SECONDS = 0.1 if stage.tiny else 1.0
    with tempfile.TemporaryDirectory(prefix="unicode-fast-loader-") as folder:
        place = Path(folder)
        fastest_ms = math.inf
        for contender in CONTENDERS:
            if contender == FASTEST:
                for kind in LOADERS:
                    common.attempt(stage, f"loader {kind}", loader, kind, place)
            trainers: list[tuple[float, Any]] = []
            common.attempt(stage, contender, measure, contender, trainers)
            if contender != ORIGINAL and trainers and trainers[0][0] < fastest_ms:
                # Each new fastest one, because a later one may take all remaining time.
                fastest_ms = trainers[0][0]
                common.attempt(stage, f"G7 {contender}", with_loader, trainers[0][1], place)
            trainers.clear()
            if stage.device == "cuda":
                torch.cuda.empty_cache()
        if fastest_ms == math.inf and not stage.options.skip:
            common.emit("G7", Found(None, "not run: no contender ran"))


if __name__ == "__main__":
    main()
