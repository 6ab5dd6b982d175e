"""What single choices of the recommended preset are worth: `python benchmarks/compare_choices.py FOLDER`.

Each variant changes fields of the configuration, trains on the built-in data, and is probed on the validation split, so
that the choice never sees the test split. Finished variants in FOLDER are kept, so an interrupted comparison goes on
where it was, and two processes may share FOLDER where they are given different variants.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from unicode_fast import preset
from unicode_fast.checkpoint import write_json
from unicode_fast.config import Config
from unicode_fast.data import Store, open_dataset
from unicode_fast.distributed import Ranks
from unicode_fast.runs import choose_device, versions
from unicode_fast.tasks import run_table
from unicode_fast.tasks.probe import Clips
from unicode_fast.train import Trainer, check_store, pretrain

ROOT = Path(__file__).resolve().parent.parent
# Where the comparison started: each of the lines that begin with "start" changes one thing of it.
START: dict[str, object] = {"cpc_scale": "sqrt_width", "club_weight": 1.0}
VARIANTS: dict[str, dict[str, object]] = {
    "recommended": {},
    "CLUB weighs 1": {"club_weight": 1.0},
    "without CLUB": {"club_estimator": "none"},
    "Cross-CPC at temperature 0.5": {"cpc_temperature": 0.5},
    "Cross-CPC at temperature 0.5, without CLUB": {"cpc_temperature": 0.5, "club_estimator": "none"},
    "start: Cross-CPC scores divided by sqrt(D), CLUB weighs 1": START,
    "start, 5 inner steps of CLUB": {**START, "club_inner_steps": 5},
    "start, CLUB weighs 0.1": {"cpc_scale": "sqrt_width"},
    "start, without CLUB": {"cpc_scale": "sqrt_width", "club_estimator": "none"},
    "start, CLUB may go below zero": {**START, "club_floor": False},
    "start, Cross-CPC softmax over predictions only": {**START, "cpc_softmax_over": "predictions"},
    "start, Cross-CPC without self terms": {**START, "cpc_self_weight": 0.0},
    "start, without code matching": {**START, "cmcm_weight": 0.0},
    "start, plain EMA, no partners": {**START, "ema_partner": "none"},
    "start, without revival": {**START, "revive_after": 0},
    "start, codewords by k-means": {**START, "codebook_init": "kmeans"},
    "start, dropout 0": {**START, "dropout": 0.0},
}
TASKS = ("classification", "localisation")


class ValidationOnly:
    """The splits of a store for the probes, with the validation split in the place of the test split."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def split(self, name: str) -> Clips:
        """The clips of a split."""
        return self.store.split("val" if name == "test" else name)


def measure(config: Config, folder: Path) -> dict[str, object]:
    """Trains and probes one variant."""
    store = open_dataset(config.data)
    device = choose_device(config.train.device)
    trainer = Trainer(config, check_store(config, store), device)
    progress = pretrain(trainer, store, folder, None, Ranks())
    rows = run_table(trainer.model.eval(), ValidationOnly(store), TASKS, seed=config.train.seed)
    return {
        "steps": trainer.step,
        "seed": config.train.seed,
        "seconds_per_step": progress["seconds"] / trainer.step,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "scores": {f"{row.task} {row.source}->{row.target}": row.score for row in rows},
    }


def shown(values: Sequence[float]) -> str:
    """Mean in per cent, and spread where there are several."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def write_table(folder: Path) -> None:
    """benchmarks/results/choices.json and docs/choices.md from all that is finished."""
    rows = []
    for number, (name, fields) in enumerate(VARIANTS.items()):
        for path in sorted(folder.glob(f"{number:02d}-*/result.json")):
            rows.append({"variant": name, "fields": fields, **json.loads(path.read_text())})
    write_json(ROOT / "benchmarks" / "results" / "choices.json", rows)
    keys = [f"{task} {way}" for task in TASKS for way in ("audio->video", "video->audio")]
    lines = ["| variant | seeds | " + " | ".join(keys) + " | s/step |", "|---|---:|" + "---:|" * (len(keys) + 1)]
    for name in VARIANTS:
        mine = [row for row in rows if row["variant"] == name]
        if mine:
            cells = [shown([row["scores"][key] for row in mine]) for key in keys]
            seconds = statistics.mean(row["seconds_per_step"] for row in mine)
            lines.append(f"| {name} | {len(mine)} | " + " | ".join(cells) + f" | {seconds:.2f} |")
    steps = ", ".join(map(str, sorted({row["steps"] for row in rows})))
    made = (
        f"Zero-shot scores in per cent on the validation split after {steps} steps on the built-in data, mean and "
        "standard deviation over seeds. Localisation differs by several points from seed to seed."
    )
    text = f"# Choices of the recommended preset\n\n{made}\n\n"
    (ROOT / "docs" / "choices.md").write_text(text + "\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("variants", nargs="*", default=list(VARIANTS), help="by name; all of them where none is named")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    for name in arguments.variants:
        if name not in VARIANTS:
            parser.error(f"variants must be among {', '.join(VARIANTS)}, got {name!r}")
    for seed in arguments.seeds:
        for name in arguments.variants:
            folder = arguments.folder / f"{list(VARIANTS).index(name):02d}-{seed}"
            if not (folder / "result.json").exists():
                folder.mkdir(parents=True, exist_ok=True)
                changes = {**VARIANTS[name], "steps": arguments.steps, "seed": seed, "validations": 0}
                write_json(folder / "result.json", measure(preset("recommended").replace(**changes), folder))
            write_table(arguments.folder)


if __name__ == "__main__":
    main()
