"""Effects of the options of a training step on scores: `python benchmarks/compare_options.py FOLDER [OPTION ...]`.

Each option trains the default run with some seeds in FOLDER; finished runs are kept. docs/options.md and
results/options.json compare them with results/default-run.json. The status is 1 if a mean is below that run's by more
than twice the standard deviation of its seeds. An option with only one seed also gives status 1.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from compare_presets import DIRECTIONS

from unicode_fast import preset
from unicode_fast.data import open_dataset
from unicode_fast.files.writing import write_json, write_text
from unicode_fast.train import run_seeds
from unicode_fast.training.distributed import DistContext
from unicode_fast.training.runs import make_folder

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
OPTIONS: dict[str, dict[str, object]] = {
    "bfloat16": {"precision": "bfloat16"},
    "channels_last": {"channels_last": True},
    "compile": {"compile": True},
    "tf32": {"precision": "tf32"},
    "cuda_graph": {"cuda_graph": True},
}
CUDA_ONLY = ("tf32", "cuda_graph")
EXPLANATION = (
    "Each line is the default run with one option of the training step. Scores are zero-shot, on the test split, in "
    "per cent: mean and standard deviation over seeds. The first line is the default run when the options were "
    "measured. The file `benchmarks/results/options.json` has every direction. `benchmarks/compare_options.py` makes "
    "the table. It fails if a mean is below the first line's by more than twice the standard deviation of that line."
)


def scores(summary: dict) -> dict[tuple[str, str, str], tuple[float, float]]:
    """Mean and spread by task and direction."""
    return {(row["task"], row["from"], row["to"]): (row["score"], row.get("std")) for row in summary["rows"]}


def below_the_spread(summary: dict, plain: dict) -> list[str]:
    """Scores whose mean is lower by more than two standard deviations of the plain run; one seed decides nothing."""
    truth = scores(plain)
    if len(summary["seeds"]) < 2:
        return ["one seed only"]
    return [
        f"{task} {source} to {target}: {100 * mean:.1f} against {100 * truth[task, source, target][0]:.1f}"
        for (task, source, target), (mean, _) in scores(summary).items()
        if mean < truth[task, source, target][0] - 2 * truth[task, source, target][1]
    ]


def train(below: Path, name: str, seeds: list[int]) -> None:
    """Trains an option with the seeds that have no finished run."""
    config = preset("recommended").replace(**OPTIONS[name])
    if not below.exists():
        make_folder(below, config, seeds)
    summary = run_seeds(config, open_dataset(config.data), below, seeds, DistContext())
    commits = {json.loads((below / f"seed-{seed}" / "summary.json").read_text())["git_commit"] for seed in seeds}
    write_json(below / "summary.json", {**summary, "git_commit": " ".join(sorted(filter(None, commits)))})


def write_table(summaries: dict[str, dict]) -> None:
    """Writes docs/options.md from finished runs."""
    head = [f"{task} {source} → {target}" for task, source, target in DIRECTIONS]
    lines = ["| option | seeds | " + " | ".join(head) + " | commit |", "|---|---:|" + "---:|" * len(head) + "---|"]
    for name, summary in summaries.items():
        cells = []
        for key in DIRECTIONS:
            mean, spread = scores(summary)[key]
            cells.append(f"{100 * mean:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}"))
        commit = (summary["git_commit"] or "unknown")[:12]
        lines.append(f"| {name} | {len(summary['seeds'])} | " + " | ".join(cells) + f" | `{commit}` |")
    lines += [
        f"| {name} | not run{', needs a GPU' if name in CUDA_ONLY else ''} |" + " |" * len(DIRECTIONS) + " |"
        for name in OPTIONS
        if name not in summaries
    ]
    text = f"# Options of a training step\n\n{EXPLANATION}\n\n" + "\n".join(lines) + "\n"
    write_text(ROOT / "docs" / "options.md", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("options", nargs="*", help="names of options [all that run here]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    here = [name for name in OPTIONS if torch.cuda.is_available() or name not in CUDA_ONLY]
    for name in arguments.options or here:
        if name not in here:
            parser.error(f"options must be among {', '.join(here)} on this machine, got {name!r}")
        train(arguments.folder / name, name, arguments.seeds)
    plain = json.loads((RESULTS / "default-run.json").read_text())
    there = [name for name in OPTIONS if (arguments.folder / name / "summary.json").exists()]
    summaries = {name: json.loads((arguments.folder / name / "summary.json").read_text()) for name in there}
    write_json(RESULTS / "options.json", summaries)
    write_table({"float32 (default)": plain, **summaries})
    differences = [f"{name}: {text}" for name in there for text in below_the_spread(summaries[name], plain)]
    print("\n".join(differences))
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
