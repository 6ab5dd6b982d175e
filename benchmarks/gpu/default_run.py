"""The default run on a GPU beside a CPU's: `python benchmarks/gpu/default_run.py --data gpu-kit/store`.

It trains with the default configuration, then with a CUDA graph, then in bfloat16. It prints the differences of scores
from cpu-scores.json beside the data, whose runs have the same fields. Last, it interrupts and resumes a run.
"""

import contextlib
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import common
import numpy as np
import torch
from common import Found, Stage

from unicode_fast import checkpoint, train
from unicode_fast.report import pictures as report_pictures
from unicode_fast.training.trainer import Trainer

# Half the default's, because three runs must end within a minute. The learning rate falls over the same number.
STEPS = 300
# In points, on 240 test clips: training magnifies rounding. The mean is more robust than any single direction.
LARGEST_MEAN_DIFFERENCE = 3.0
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "in a CUDA graph": {"cuda_graph": True},
    "bfloat16": {"precision": "bfloat16"},
}
# Largest ratio of a resumed run's difference to that of two whole runs.
LEAST_SPREAD_FACTOR = 10.0
RESUMED_STEPS = 20


def run_train(*arguments: str, pictures: bool = False) -> None:
    """Runs the training command; its output goes to standard error, and pictures, which take seconds, are left out."""
    drawing = contextlib.nullcontext() if pictures else mock.patch.object(report_pictures, "draw_run")
    with contextlib.redirect_stdout(sys.stderr), drawing:
        train.main(arguments)


def flags_of(fields: dict[str, Any]) -> list[str]:
    """Fields as flags."""
    return [word for name, value in fields.items() for word in (f"--{name}", str(value))]


def trained(
    store: Path, folder: Path, device: str, fields: dict[str, Any], *, pictures: bool = False
) -> dict[str, Any]:
    """Scores and seconds of a run, which is resumed if it was interrupted.

    Args:
        store: with the training data.
        folder: of the run.
        device: of the training.
        fields: of the configuration that differ from the default.
        pictures: draw them too.
    """
    if not (folder / "summary.json").exists():
        new = ["--data", str(store), "--out", str(folder), *flags_of({"device": device, **fields})]
        run_train(*(["--resume", str(folder)] if folder.exists() else new), pictures=pictures)
    summary = json.loads((folder / "summary.json").read_text())
    scores = {f"{row['task']} {row['from']} to {row['to']}": row["score"] for row in summary["rows"]}
    kept = ("seconds", "seconds_of_pretraining", "threads", "git_commit")
    return {**{name: summary[name] for name in kept}, "torch": str(torch.__version__), "scores": scores}


def beside_cpu(found: dict[str, float], cpu: list[dict[str, float]]) -> dict[str, Any]:
    """Differences from the mean of the CPU's scores, and of its own seeds, in percentage points."""
    means = {name: float(np.mean([scores[name] for scores in cpu])) for name in found}
    points = {name: round(100 * (found[name] - means[name]), 2) for name in found}
    spread = max(abs(scores[name] - means[name]) for scores in cpu for name in found)
    return {"points": points, "cpu_spread_points": round(100 * spread, 2), "cpu_scores": means}


def compare(stage: Stage, cpu: list[dict[str, float]], folder: Path, name: str, base: dict[str, Any]) -> Found:
    """The row of one variant."""
    store, fields = Path(stage.options.data), {**base, **VARIANTS[name]}
    if stage.device == "cpu":
        fields.pop("cuda_graph", None)
    else:
        torch.cuda.reset_peak_memory_stats()
    drawn = not stage.tiny and not VARIANTS[name]
    found = trained(store, folder, stage.device, fields, pictures=drawn)
    peak = torch.cuda.max_memory_allocated() if stage.device == "cuda" else None
    numbers = {**found, "peak_bytes": peak}
    memory = "" if peak is None else f", peak {peak / 2**20:.0f} MiB"
    spent = f"{found['seconds']:.1f} s, {found['seconds_of_pretraining']:.1f} of them steps{memory}"
    if not cpu:
        return common.qualified(stage, Found(True, f"{spent}; no scores of a CPU to compare with", numbers))
    differences = beside_cpu(found["scores"], cpu)
    mean = float(np.mean(list(differences["points"].values())))
    extremes = min(differences["points"].values()), max(differences["points"].values())
    text = (
        f"{spent}; scores differ from the CPU's by {mean:+.2f} points in the mean, {extremes[0]:+.1f} to "
        f"{extremes[1]:+.1f}, the CPU's seeds by {differences['cpu_spread_points']:.1f}"
    )
    found = Found(mean >= -LARGEST_MEAN_DIFFERENCE, text, {**numbers, **differences, "mean_points": mean})
    return common.qualified(stage, found)


def final_state(folder: Path) -> dict[str, Any]:
    """The model at the end of a run."""
    content = checkpoint.read(checkpoint.find(folder, "last"))
    return content["model"]


def difference(first: dict[str, Any], second: dict[str, Any]) -> float:
    """Largest difference of two states of a model, relative to the largest number of each tensor; 0 for equal bits."""
    pairs = [(value, second[name]) for name, value in first.items()]
    return max(0.0 if torch.equal(a, b) else max(common.largest_error(a, b), 1e-300) for a, b in pairs)


def resumed(stage: Stage, folder: Path, base: dict[str, Any]) -> Found:
    """A run that is interrupted and resumed, beside two whole runs."""
    steps = base["steps"]
    fields = {**base, "validations": 0, "probe_tasks": "none", "device": stage.device}
    new = ["--data", str(stage.options.data), *flags_of(fields)]
    for name in ("whole", "again"):
        run_train(*new, "--out", str(folder / name))
    cut, step = folder / "cut", Trainer.train_step

    def step_or_stop(trainer: Trainer, *arguments: Any) -> Any:
        if trainer.step == steps // 2:
            raise KeyboardInterrupt
        return step(trainer, *arguments)

    # Checkpoints often, so that one lies between the first step and the interruption.
    with mock.patch.object(Trainer, "train_step", step_or_stop), contextlib.suppress(KeyboardInterrupt):
        run_train(*new, "--out", str(cut), "--checkpoint_seconds", "0.001")
    begun = checkpoint.steps_in(cut)[-1]
    run_train("--resume", str(cut), "--checkpoint_seconds", "20")
    states = {name: final_state(folder / name) for name in ("whole", "again", "cut")}
    found, spread = difference(states["cut"], states["whole"]), difference(states["again"], states["whole"])
    numbers = {"difference": found, "spread": spread, "resumed_at": begun, "steps": steps}
    text = f"resumed at step {begun} of {steps}: " + ("the same bits" if found == 0 else f"differs by {found:.1e}")
    if found:
        text += ", two whole runs " + ("have the same bits" if spread == 0 else f"differ by {spread:.1e}")
    return Found(found <= LEAST_SPREAD_FACTOR * spread, text, numbers)


def main() -> None:
    data = ("--data", {"type": Path, "default": common.KIT / "store", "help": "store of the kit"})
    stage = common.begin(__doc__, data)
    folder = Path(tempfile.mkdtemp(prefix="unicode-fast-default-run-"))
    base: dict[str, Any] = {"steps": STEPS}
    cpu: list[dict[str, float]] = []
    file = stage.options.data.parent / "cpu-scores.json"
    if file.exists():
        made = json.loads(file.read_text())
        base = made.get("fields", base)
        cpu = [run["scores"] for run in made["runs"]]
    try:
        for name in VARIANTS:
            place = folder / name.replace(" ", "-")
            common.attempt(stage, name, compare, cpu, place, name, base)
        short = {**base, "steps": 4 if stage.tiny else RESUMED_STEPS}
        common.attempt(stage, "resume", resumed, folder, short)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"{time.monotonic() - started:.1f} s", file=sys.stderr)
