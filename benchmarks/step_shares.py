"""Share of each operator in a training step: `python benchmarks/step_shares.py`.

It runs the default configuration on the CPU and writes results/step-shares-cpu.json: milliseconds of each operator in a
step, forward and backward, and their share.
"""

import time
from pathlib import Path

import torch
from measurement import origin
from torch.profiler import ProfilerActivity, profile

from unicode_fast.config import Config
from unicode_fast.data import Batches, open_dataset
from unicode_fast.files.writing import write_json
from unicode_fast.training.checks import check_store
from unicode_fast.training.trainer import Trainer

WARM_UP_STEPS, STEPS = 5, 20
NAMESPACE = "unicode_fast::"


def main() -> None:
    config = Config()
    dataset = open_dataset(config.data)
    trainer = Trainer(config, check_store(config, dataset), torch.device("cpu"))
    clips = dataset.split("train").restrict(trainer.model.names)
    batches = Batches(clips, config.train.batch_size, config.train.seed)

    def steps(first: int, number: int) -> None:
        for step in range(first, first + number):
            batch = batches.batch(step)
            trainer.train_step(batch.features, batch.mask, config.train.learning_rate)

    steps(0, WARM_UP_STEPS)
    # Without the profiler, which slows a step down.
    begin = time.perf_counter()
    steps(WARM_UP_STEPS, STEPS)
    step_ms = 1000 * (time.perf_counter() - begin) / STEPS
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        steps(WARM_UP_STEPS + STEPS, STEPS)
    milliseconds: dict[str, float] = {}
    for event in profiler.key_averages():
        if event.key.startswith(NAMESPACE):
            milliseconds[event.key.removeprefix(NAMESPACE)] = event.cpu_time_total / 1000 / STEPS
    operators = {name: {"step_ms": value, "share": value / step_ms} for name, value in sorted(milliseconds.items())}
    for name, row in operators.items():
        print(f"{name:32} {row['step_ms']:7.2f} ms {100 * row['share']:5.1f} %")
    print(f"{'whole step':32} {step_ms:7.2f} ms")
    target = Path(__file__).resolve().parent / "results" / "step-shares-cpu.json"
    write_json(target, {"step_ms": step_ms, "steps": STEPS, "operators": operators, **origin("cpu")})


if __name__ == "__main__":
    main()
