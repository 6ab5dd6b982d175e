"""Estimated time of a training step on many GPUs: `python benchmarks/scaling.py` prints the tables.

Bytes and floating point operations are counted while the code runs, on the CPU and without weights. The speed of one
GPU comes from results/train-step-cuda.json and loader-cuda.json, if they exist. Else it comes from data sheets or
assumptions, like that of links and disks. With `--write` the tables of docs/scaling.md are replaced.
"""

import argparse
import contextlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from unicode_fast import Config, Modality, UniCode, preset
from unicode_fast.files.writing import write_text
from unicode_fast.modules import host
from unicode_fast.training.shard import Shard
from unicode_fast.training.trainer import Trainer

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"
RESULTS = Path(__file__).resolve().parent / "results"
# Features of the published experiments: VGGish, VGG-19 maps, BERT words; ten positions per clip.
MODALITIES = {
    "audio": Modality("vector", (128,)),
    "video": Modality("grid", (7, 7, 512)),
    "text": Modality("words", (768,)),
}
POSITIONS = 10
CLIPS_PER_GPU = 80
CLIPS = {"40 K": 40_000, "179 K": 179_000, "10 M": 10_000_000}
GPUS = (1, 8, 64)


@dataclass(frozen=True)
class Input:
    """A number, its unit, and its source."""

    value: float
    unit: str
    source: str


INPUTS = {
    "tf32": Input(494e12, "FLOP/s", "data sheet of an H200, dense"),
    "bfloat16": Input(989e12, "FLOP/s", "data sheet of an H200, dense"),
    "tf32_reached": Input(0.4, "of the peak", "assumed, not measured"),
    "bfloat16_reached": Input(0.4, "of the peak", "assumed, not measured"),
    "launch": Input(5e-6, "s of the host for an operation, outside a CUDA graph", "assumed, not measured"),
    "gpu_memory": Input(141e9, "bytes", "data sheet of an H200"),
    "resident_share": Input(0.6, "of the GPU's memory for resident features", "assumed, not measured"),
    "gpus": Input(8, "GPUs in a machine", "data sheet of an HGX H200"),
    "nvlink": Input(450e9, "bytes/s each way", "data sheet, between GPUs of a machine"),
    "network": Input(400e9, "bytes/s each way", "data sheet, 400 Gbit/s for each of a machine's GPUs, used together"),
    "link_reached": Input(0.8, "of a link", "assumed, not measured"),
    "latency": Input(30e-6, "s for a small collective in a machine", "assumed, not measured"),
    "network_latency": Input(80e-6, "s for a small collective between machines", "assumed, not measured"),
    "host_memory": Input(1.5e12, "bytes for cached features in a machine", "assumed, not measured"),
    "memory_read": Input(40e9, "bytes/s from a machine's memory, gathered and pinned", "assumed, not measured"),
    "disk_read": Input(20e9, "bytes/s from the disks of a machine", "assumed, not measured"),
}


# By the name of the replaced input: the peak, of which it is a share, and the contenders, of which the fastest counts.
MEASURED_STEPS = {
    "tf32_reached": ("tf32", ("recommended, tf32",)),
    "bfloat16_reached": (
        "bfloat16",
        (
            "recommended, bfloat16",
            "recommended, bfloat16, channels last",
            "recommended, bfloat16, channels last, compiled, in a CUDA graph",
        ),
    ),
}


def number(name: str) -> float:
    return INPUTS[name].value


def measured(results: Path, flops_per_clip: float, clip_bytes: int) -> dict[str, Input]:
    """Inputs that have been measured on a GPU at the published sizes."""
    found: dict[str, Input] = {}
    steps, loaders = (_published_rows(results / name) for name in ("train-step-cuda.json", "loader-cuda.json"))
    for name, (peak, contenders) in MEASURED_STEPS.items():
        rows = [row for row in steps if row["contender"] in contenders]
        if rows:
            row = max(rows, key=lambda row: row["clips_per_second"])
            value = row["clips_per_second"] * flops_per_clip / number(peak)
            found[name] = Input(value, INPUTS[name].unit, f"measured, {row['device']}, {row['contender']}")
    rows = [row for row in loaders if row["feed"] == "prefetch"]
    if rows:
        value = rows[0]["feed_clips_per_second"] * clip_bytes
        found["memory_read"] = Input(value, INPUTS["memory_read"].unit, f"measured, {rows[0]['device']}, one process")
    return found


def _published_rows(path: Path) -> list[dict]:
    rows = json.loads(path.read_text()) if path.exists() else []
    return [row for row in rows if row["size"] == "published" and "missing" not in row]


@dataclass(frozen=True)
class Counts:
    """Counts of one training step.

    Attributes:
        parameters: of the main optimiser.
        flops_per_clip: of encoders and decoders, forward and backward, in convolutions and matrix products.
        losses: by loss, operations of each rank for each clip of the whole batch and for each pair of clips.
        operations: those that PyTorch dispatches.
        collectives: those beside that of the gradient.
        bytes_fixed: of these collectives through a link, for a batch of no clips.
        bytes_per_clip: the same for each clip of the whole batch.
        clip_bytes: float32 features of a clip.
    """

    parameters: int
    flops_per_clip: float
    losses: dict[str, tuple[float, float]]
    operations: int
    collectives: int
    bytes_fixed: float
    bytes_per_clip: float
    clip_bytes: int


def published_config(**fields: object) -> Config:
    return preset("recommended", "paper").replace_all(**fields)


def random_batch(owner: UniCode, clips: int, device: str) -> dict[str, torch.Tensor]:
    return {name: torch.rand(clips, POSITIONS, *kind.shape, device=device) for name, kind in owner.modalities.items()}


def count_arithmetic() -> tuple[int, float]:
    """Parameters, and operations of a clip forward and backward, of a model without weights in memory."""
    with torch.device("meta"):
        owner = UniCode(MODALITIES, published_config())
        features = random_batch(owner, 2, "meta")
    forward = FlopCounterMode(display=False)
    with forward:
        for name, values in features.items():
            z, own = owner.encode_features(name, values, None)
            owner.decode_vectors(name, z, own.specific)
    parameters = sum(parameter.numel() for group in owner.parameter_groups().values() for parameter in group)
    # The gradients of weights and of inputs each cost as much as the forward pass.
    return parameters, 3 * forward.get_total_flops() / 2


def count_losses() -> dict[str, tuple[float, float]]:
    """Operations of matrix products by loss: for each clip of the batch, and for each pair of clips.

    The gradients of weights and of inputs each cost as much as the product. Contrastive scores are computed once more
    for their gradient.
    """
    with torch.device("meta"):
        owner = UniCode(MODALITIES, published_config())
        z = {name: torch.rand(1, POSITIONS, owner.config.model.width) for name in owner.names}
        word = torch.rand(1, POSITIONS, *MODALITIES["text"].shape)
        position = torch.zeros(())
    sizes, method, names = owner.config.model, owner.config.method, len(MODALITIES)

    def products(call: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    contexts = 3 * products(lambda: owner.cpc._predictions(z, None, position))
    networks = products(lambda: [owner.club[name](z[name]) for name in owner.names])
    distances = 2 * names * POSITIONS * sizes.codewords * sizes.width
    pairs = names * (names - 1) / 2
    softmaxes = 2 if method.cpc_softmax_over == "both" else 1
    return {
        "Cross-CPC": (contexts, 4 * softmaxes * names**2 * sizes.cpc_steps * 2 * sizes.width),
        "CLUB": (networks * (2 * method.club_inner_steps + 3), 0.0),
        # A product and its gradient in the features alone, because codewords have none.
        "code matching": (2 * distances, 3 * 2 * pairs * 2 * sizes.codewords),
        "assignment": (2 * distances + 3 * products(lambda: owner.lexicon["text"](word)), 0.0),
        "search": (distances, 0.0),
    }


class _Operations(TorchDispatchMode):
    """Counts operations that compute, not views."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        self.number += not operator.is_view
        return operator(*args, **(kwargs or {}))


def count_step(clips: int) -> tuple[int, int, float]:
    """Operations of a step, its collectives beside that of the gradient, and bytes of these, with thin convolutions.

    As on a GPU, the host does not read masks. Bytes are those of an all-reduce of equal time; a gather moves half as
    many.
    """
    thin = {"grid_hidden_width": 4, "grid_specific_width": 4}
    modalities = {**MODALITIES, "video": Modality("grid", (5, 5, 4))}
    trainer = Trainer(published_config(**thin), modalities, torch.device("cpu"))
    features = random_batch(trainer.model, clips, "cpu")
    masks = {name: torch.ones(clips, POSITIONS, dtype=torch.bool) for name in features}
    seen: list[float] = []
    operations = _Operations()

    def counted(name: str, moved: Callable[..., float]) -> contextlib.AbstractContextManager[object]:
        real: Callable[..., object] = getattr(dist, name)

        def call(*arguments: torch.Tensor, **options: object) -> object:
            seen.append(moved(*arguments))
            return real(*arguments, **options)

        return mock.patch.object(dist, name, call)

    with (
        counted("all_reduce", lambda tensor: tensor.nbytes),
        counted("all_gather", lambda whole, _: sum(block.nbytes for block in whole) / 2),
        mock.patch.object(host, "is_on_host", lambda _: False),
        operations,
    ):
        trainer.train_step(features, masks, 1e-3, Shard(clips, dist.group.WORLD))
    # The last is the gradient's. With one rank the codebook's update reduces nothing, so its float64 buffer is added.
    modalities_here, codewords, width = len(MODALITIES), *trainer.model.codebook.codebook.shape
    statistics = 8 * (modalities_here * (1 + codewords) + codewords * width + codewords * (1 + width))
    # To hundreds, because versions of PyTorch differ a little.
    return round(operations.number, -2), len(seen), sum(seen[:-1]) + statistics


def count() -> Counts:
    """All counts, in a process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        operations, calls, few = count_step(8)
        _, _, many = count_step(16)
    finally:
        dist.destroy_process_group()
    per_clip = (many - few) / 8
    clip_bytes = 4 * POSITIONS * sum(torch.Size(kind.shape).numel() for kind in MODALITIES.values())
    return Counts(*count_arithmetic(), count_losses(), operations, calls, few - 8 * per_clip, per_clip, clip_bytes)


def all_reduce_seconds(size: float, gpus: int) -> float:
    """A ring moves 2 (W - 1) / W of the bytes through the slowest link: between GPUs, or between machines."""
    link = number("nvlink") if gpus <= number("gpus") else number("network")
    return 2 * (gpus - 1) / gpus * size / (link * number("link_reached"))


@dataclass(frozen=True)
class Step:
    """Seconds of a step by cause. Launches run beside arithmetic and losses, loading beside all."""

    arithmetic: float
    losses: float
    launches: float
    gradient: float
    others: float
    loading: float

    @property
    def total(self) -> float:
        return max(max(self.arithmetic + self.losses, self.launches) + self.gradient + self.others, self.loading)

    @property
    def limit(self) -> str:
        if self.loading == self.total:
            return "loading"
        names = ("arithmetic", "losses", "launches", "gradient", "others")
        return max(names, key=lambda name: getattr(self, name)).replace("others", "gathers and small sums")


def place_of(counts: Counts, clips: int) -> str:
    """Place of the features in a machine."""
    size = clips * counts.clip_bytes
    if size <= number("resident_share") * number("gpu_memory"):
        return "GPU"
    return "memory" if size <= number("host_memory") else "disk"


def loss_seconds(counts: Counts, name: str, gpus: int, per_gpu: float, precision: str) -> float:
    """A loss on each rank, in TF32. Cross-CPC has contexts in `precision`, and compares own clips with all."""
    a_clip, a_pair = counts.losses[name]
    rates = {rate: number(rate) * number(f"{rate}_reached") for rate in (precision, "tf32")}
    clips = gpus * per_gpu
    contexts, own = (precision, per_gpu) if name == "Cross-CPC" else ("tf32", clips)
    return clips * a_clip / rates[contexts] + clips * own * a_pair / rates["tf32"]


def step_of(counts: Counts, gpus: int, clips: int, per_gpu: float, precision: str) -> Step:
    arithmetic = per_gpu * counts.flops_per_clip / (number(precision) * number(f"{precision}_reached"))
    batch = per_gpu * gpus
    latency = number("latency") if gpus <= number("gpus") else number("network_latency")
    others = 0.0
    if gpus > 1:
        size = counts.bytes_fixed + counts.bytes_per_clip * batch
        others = counts.collectives * latency + all_reduce_seconds(size, gpus)
    place = place_of(counts, clips)
    rate = {"GPU": float("inf"), "memory": number("memory_read"), "disk": number("disk_read")}[place]
    loading = per_gpu * min(gpus, number("gpus")) * counts.clip_bytes / rate
    gradient = all_reduce_seconds(4 * counts.parameters, gpus) if gpus > 1 else 0.0
    # One GPU replays a graph; several cannot.
    launches = counts.operations * number("launch") if gpus > 1 else 0.0
    losses = sum(loss_seconds(counts, name, gpus, per_gpu, precision) for name in counts.losses)
    return Step(arithmetic, losses, launches, gradient, others, loading)


def inputs_table(counts: Counts) -> str:
    lines = ["| what | number | from |", "| --- | ---: | --- |"]
    counted = {
        "parameters of the main optimiser": f"{counts.parameters / 1e6:.1f} M",
        "its gradient, float32": f"{4 * counts.parameters / 1e6:.0f} MB",
        "forward and backward of a clip, encoders and decoders": f"{counts.flops_per_clip / 1e9:.1f} GFLOP",
        "operations of a step": f"{counts.operations}",
        "collectives of a step beside the gradient's": f"{counts.collectives}",
        "what they move, for any batch": f"{counts.bytes_fixed / 1e6:.2f} MB",
        "and more for each clip of the whole batch": f"{counts.bytes_per_clip / 1e3:.1f} kB",
        "float32 features of a clip": f"{counts.clip_bytes / 1e6:.2f} MB",
    }
    lines += [f"| {what} | {value} | counted |" for what, value in counted.items()]
    lines += [f"| {name}: {item.unit} | {item.value:.4g} | {item.source} |" for name, item in INPUTS.items()]
    return "\n".join(lines)


def steps_table(counts: Counts, per_gpu: Callable[[int], float]) -> str:
    lines = [
        "| GPUs | batch | clips | features in | precision | arithmetic | losses | launches | gradient | others | "
        "loading | step | limit | epoch |",
        "| ---: | ---: | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for gpus in GPUS:
        for name, clips in CLIPS.items():
            for precision in ("tf32", "bfloat16"):
                step = step_of(counts, gpus, clips, per_gpu(gpus), precision)
                batch = per_gpu(gpus) * gpus
                seconds = (step.arithmetic, step.losses, step.launches, step.gradient, step.others, step.loading)
                times = " | ".join(f"{1e3 * each:.1f} ms" for each in (*seconds, step.total))
                epoch = clips / batch * step.total
                shown = f"{epoch:.1f} s" if epoch < 600 else f"{epoch / 3600:.1f} h"
                lines.append(
                    f"| {gpus} | {batch:.0f} | {name} | {place_of(counts, clips)} | {precision} | {times} | "
                    f"{step.limit} | {shown} |"
                )
    return "\n".join(lines)


def losses_table(counts: Counts) -> str:
    """Each loss on every one of 64 GPUs with 80 clips each, and its time if every rank computed all pairs."""
    gpus, lines = GPUS[-1], ["| loss | precision | a rank | share of the step | with all pairs on every rank |"]
    lines.append("| --- | --- | ---: | ---: | ---: |")
    for name, (_, a_pair) in counts.losses.items():
        for precision in ("tf32", "bfloat16"):
            step = step_of(counts, gpus, CLIPS["40 K"], CLIPS_PER_GPU, precision)
            seconds = loss_seconds(counts, name, gpus, CLIPS_PER_GPU, precision)
            # Both softmaxes are of the same scores there.
            more = gpus * CLIPS_PER_GPU**2 * a_pair * (gpus / 2 - 1) / (number("tf32") * number("tf32_reached"))
            lines.append(
                f"| {name} | {precision} | {1e3 * seconds:.2f} ms | {100 * seconds / step.total:.1f} % | "
                + (f"{1e3 * (seconds + more):.2f} ms |" if name == "Cross-CPC" else "the same |")
            )
    return "\n".join(lines)


def limits_table(counts: Counts) -> str:
    """Sizes from which each cause limits a step, in bfloat16."""
    arithmetic = counts.flops_per_clip / (number("bfloat16") * number("bfloat16_reached"))
    lines = ["| what takes as long as the arithmetic | eight GPUs | many machines |", "| --- | ---: | ---: |"]
    gradient, negatives, reads = [], [], []
    for gpus in GPUS[1:]:
        gradient.append(f"{all_reduce_seconds(4 * counts.parameters, gpus) / arithmetic:.0f} clips on each")
        batch = CLIPS_PER_GPU * arithmetic / all_reduce_seconds(counts.bytes_per_clip, gpus)
        negatives.append(f"{batch:.0f} clips in the batch")
    for name in ("memory_read", "disk_read"):
        reads.append(f"{number('gpus') * counts.clip_bytes / arithmetic / number(name):.2f} of it")
    lines += [
        f"| the gradient's all-reduce: at most | {' | '.join(gradient)} |",
        f"| the gather of features and their gradient, {CLIPS_PER_GPU} clips on each: from | {' | '.join(negatives)} |",
        f"| reading features from a machine's memory takes | {reads[0]} | {reads[0]} |",
        f"| reading them from its disks takes | {reads[1]} | {reads[1]} |",
    ]
    return "\n".join(lines)


def tables(counts: Counts) -> dict[str, str]:
    """Tables by the name of their markers in docs/scaling.md."""
    INPUTS.update(measured(RESULTS, counts.flops_per_clip, counts.clip_bytes))
    return {
        "inputs": inputs_table(counts),
        "more": steps_table(counts, lambda gpus: CLIPS_PER_GPU),
        "same": steps_table(counts, lambda gpus: CLIPS_PER_GPU / gpus),
        "losses": losses_table(counts),
        "limits": limits_table(counts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the tables of docs/scaling.md")
    write = parser.parse_args().write
    text = PAGE.read_text() if write else ""
    for name, table in tables(count()).items():
        print(f"{name}\n\n{table}\n")
        if write:
            pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
            text = pattern.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text)
    if write:
        write_text(PAGE, text)


if __name__ == "__main__":
    main()
