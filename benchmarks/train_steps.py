"""Whole training steps, and their profile: `python benchmarks/train_steps.py CONTENDER SIZE` prints a line of JSON.

`bench_train_step.py` calls it, each contender in its own process. With `--profile` the line holds the time of every
section of the step, forward and backward, by torch.profiler.
"""

import argparse
import functools
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from measurement import origin, times_of
from original import OriginalStep
from shapes import TRAIN_SHAPES, TrainShape
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from unicode_fast import preset, threads
from unicode_fast.config import Config
from unicode_fast.methods import Draws
from unicode_fast.training.trainer import Trainer

RATE = 4e-4
# A step is repeated for this many seconds, and at least this many times. The first step warms up, and a second one
# where it is short.
LONGEST_SECONDS, LEAST_REPEATS, LONG_SECONDS = {"cpu": 5.0, "cuda": 3.0}, 5, 1.0
Features = dict[str, Tensor]


def config_of(shape: TrainShape, rules: str, **fields: object) -> Config:
    """The configuration of a contender at the sizes of a shape."""
    return preset(rules, shape.size).replace_all(batch_size=shape.clips, **fields)


class Contender(NamedTuple):
    """A contender.

    Attributes:
        make: from shape and device to an object with a `model` and a `train_step`.
        devices: devices of the benchmark; the script accepts any.
    """

    make: Callable[[TrainShape, torch.device], Any]
    devices: tuple[str, ...] = ("cpu", "cuda")


def ours(rules: str, *devices: str, **fields: object) -> Contender:
    """A trainer of this library with these rules and options."""
    return Contender(
        lambda shape, device: Trainer(config_of(shape, rules, **fields), shape.modalities(), device),
        devices or ("cpu", "cuda"),
    )


# Inductor compiles for minutes on a CPU. The most important contenders are first, because a time limit can end the run.
CONTENDERS: dict[str, Contender] = {
    "the original": Contender(
        lambda shape, device: OriginalStep(config_of(shape, "official"), shape.modalities(), device)
    ),
    "recommended, bfloat16, channels last, compiled, in a CUDA graph": ours(
        "recommended", "cuda", precision="bfloat16", channels_last=True, compile=True, cuda_graph=True
    ),
    "recommended, in a CUDA graph": ours("recommended", "cuda", cuda_graph=True),
    "official, float64": ours("official"),
    "official, float32": ours("official", dtype="float32"),
    "recommended, float32": ours("recommended"),
    "recommended, channels last": ours("recommended", channels_last=True),
    "recommended, tf32": ours("recommended", "cuda", precision="tf32"),
    "recommended, bfloat16": ours("recommended", precision="bfloat16"),
    "recommended, bfloat16, channels last": ours("recommended", precision="bfloat16", channels_last=True),
    "recommended, compiled": ours("recommended", "cuda", compile=True),
}
# Contenders with a profile.
PROFILED = ("recommended, float32", "recommended, bfloat16, channels last")


def disagreement() -> float:
    """Largest difference between the losses of the original and of preset official, over three steps of a small model.

    Both start from one seed and have the same draws; float64, without dropout.
    """
    shape = TRAIN_SHAPES["cpu"]["default"]._replace(clips=6, positions=5)
    config = config_of(shape, "official", dropout=0.0)
    trainer = Trainer(config, shape.modalities(), torch.device("cpu"))
    original = OriginalStep(config, shape.modalities(), torch.device("cpu"))
    features, _ = inputs(shape, torch.device("cpu"), torch.float64)
    order = {name: torch.randperm(shape.clips) for name in features}
    losses = {name: getattr(trainer.method, name) for name in ("alignment", "contrast")}
    largest = 0.0
    for last in (1, 2, 3):
        draws = Draws(torch.tensor((last - 0.5) / 3), order)
        drawn = {name: functools.partial(loss, draws=draws) for name, loss in losses.items()}
        with mock.patch.multiple(trainer.method, **drawn):
            ours_found = trainer.train_step(features, None, RATE).terms
        theirs = original.step(features, last, order, RATE)
        largest = max(largest, *(abs(float(term - theirs[name])) for name, term in ours_found.items()))
    return largest


def inputs(shape: TrainShape, device: torch.device, dtype: torch.dtype) -> tuple[Features, Features]:
    """Random features and masks of a batch; sentences differ in length, as in the built-in data."""
    generator = torch.Generator().manual_seed(0)
    features, mask = {}, {}
    for name, modality in shape.modalities().items():
        features[name] = torch.randn(*shape[:2], *modality.shape, generator=generator).to(device, dtype)
        lengths = torch.full((shape.clips,), shape.positions)
        if modality.kind == "words":
            lengths = torch.randint(3, shape.positions + 1, (shape.clips,), generator=generator)
        mask[name] = (torch.arange(shape.positions) < lengths[:, None]).to(device)
    return features, mask


def make(contender: str, shape: TrainShape, device: torch.device) -> tuple[Any, Callable[[], object]]:
    """The trainer of a contender, and its step on one batch."""
    torch.manual_seed(0)
    trainer = CONTENDERS[contender].make(shape, device)
    features, mask = inputs(shape, device, trainer.model.dtype)
    return trainer, lambda: trainer.train_step(features, mask, RATE)


def milliseconds(
    step: Callable[[], object], device: torch.device, seconds: float | None = None
) -> tuple[list[float], list[float]]:
    """Times of single steps after a warm-up: by the clock, and of all cores together."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    started = time.perf_counter()
    step()
    if device.type == "cuda" or time.perf_counter() - started < LONG_SECONDS:
        step()
    wait()
    longest = LONGEST_SECONDS[device.type] if seconds is None else seconds
    times, busy = [], []
    started = time.perf_counter()
    while len(times) < LEAST_REPEATS or (len(times) < 200 and time.perf_counter() - started < longest):
        begun, cores = time.perf_counter(), time.process_time()
        step()
        wait()
        times.append(1000 * (time.perf_counter() - begun))
        busy.append(1000 * (time.process_time() - cores))
    return times, busy


# Sections of a step: object of the trainer, method. The forward time of a section is that of its methods. The
# backward time is that of the gradients of their operators.
SECTIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "encoders": tuple(("model.encoders.{name}", f) for f in ("read_words", "encode_semantic", "encode_specific")),
    "decoders": (("model.decoders.{name}", "forward"),),
    "reconstruction": (("method", "reconstruction"),),
    "quantiser": (("model.codebook", "quantise"), ("method", "_commitment")),
    "Cross-CPC": (("method", "contrast"),),
    "code matching": (("method", "_code_matching"),),
    "assignment and grounding": (("method", "_assignment"),),
    "CLUB estimates": (("method", "_club"),),
    "CLUB inner steps": (("method", "fit_club"),),
    "codebook update": (("model", "update_codebook"),),
    "optimiser": (("optimizer", "step"),),
}


@contextmanager
def marked(trainer: Trainer) -> Iterator[None]:
    """Gives methods of SECTIONS spans with their section's name in a profile."""

    def spanning(section: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            with record_function(section):
                return function(*arguments, **options)

        return call

    with ExitStack() as patches:
        for section, methods in SECTIONS.items():
            for path, method in methods:
                for name in trainer.model.names if "{name}" in path else ("",):
                    owner: Any = trainer
                    for field in path.format(name=name).split("."):
                        owner = owner[field] if isinstance(owner, torch.nn.ModuleDict) else getattr(owner, field)
                    call = spanning(section, getattr(owner, method))
                    patches.enter_context(mock.patch.object(owner, method, call))
        yield


def profiled(trainer: Trainer, step: Callable[[], object], device: torch.device, steps: int) -> list[dict[str, Any]]:
    """Milliseconds of each section in one step, mean over some: forward, backward, calls of torch operators."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with marked(trainer):
        step()
        step()
        with profile(activities=activities) as recorded:
            for _ in range(steps):
                with record_function("step"):
                    step()
            if device.type == "cuda":
                torch.cuda.synchronize()
    events = list(recorded.events())
    on_gpu = device.type == "cuda"
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name, event.device_time_total if on_gpu else None)
        for event in events
        if event.name in SECTIONS and event.device_type.name == "CPU"
    )
    starts = [start for start, *_ in spans]

    def section_at(time: float) -> str | None:
        place = int(np.searchsorted(starts, time, side="right")) - 1
        return spans[place][2] if place >= 0 and time < spans[place][1] else None

    forward, backward, calls = defaultdict(float), defaultdict(float), defaultdict(int)
    for start, end, section, device_time in spans:
        forward[section] += end - start if device_time is None else device_time
    made_in: dict[int, str] = {}
    cpu = sorted((event for event in events if event.device_type.name == "CPU"), key=lambda e: e.time_range.start)
    for event in cpu:
        section = section_at(event.time_range.start)
        if event.name.startswith("aten::"):
            calls[section or "other"] += 1
        if event.name.startswith("autograd::engine::evaluate_function"):
            # The span of CLUB's inner steps covers their own backward pass.
            if section is None:
                owner = made_in.get(event.sequence_nr, "other")
                backward[owner] += event.device_time_total if on_gpu else event.time_range.elapsed_us()
        elif section is not None and event.sequence_nr >= 0 and event.scope != 1:
            made_in[event.sequence_nr] = section
    whole = sum(
        event.device_time_total if on_gpu else event.time_range.elapsed_us() for event in cpu if event.name == "step"
    )
    forward["other"] = whole - sum(forward.values()) - sum(backward.values())
    return [
        {
            "part": name,
            "forward_ms": forward[name] / 1000 / steps,
            "backward_ms": backward[name] / 1000 / steps,
            "operator_calls": calls[name] / steps,
        }
        for name in (*SECTIONS, "other")
    ]


def measure(
    contender: str, size: str, device_name: str, *, profile_it: bool = False, seconds: float | None = None
) -> dict[str, Any]:
    """One row of the results."""
    device, shape = torch.device(device_name), TRAIN_SHAPES[device_name][size]
    trainer, step = make(contender, shape, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, busy = milliseconds(step, device, seconds)
    row = {
        "contender": contender,
        "size": size,
        "clips": shape.clips,
        "steps": shape.positions,
        **times_of(times),
        "processor_ms": float(np.median(busy)),
        "clips_per_second": 1000 * shape.clips / float(np.median(times)),
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        **origin(device_name),
    }
    if profile_it:
        row["parts"] = profiled(trainer, step, device, 10 if size == "default" else 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("size", choices=sorted({size for sizes in TRAIN_SHAPES.values() for size in sizes}))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--seconds", type=float, help=f"repeat the step for this long {LONGEST_SECONDS}")
    parser.add_argument("--idle-threads", action="store_true", help="as many threads as a new run of train takes")
    arguments = parser.parse_args()
    if arguments.idle_threads:
        threads.note_start()
        time.sleep(1)
        torch.set_num_threads(threads.idle_now(torch.get_num_threads()))
    row = measure(
        arguments.contender,
        arguments.size,
        arguments.device,
        profile_it=arguments.profile,
        seconds=arguments.seconds,
    )
    print(json.dumps(row))


if __name__ == "__main__":
    main()
