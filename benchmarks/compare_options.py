"""What the options of a training step do to the scores: `python benchmarks/compare_options.py FOLDER [OPTION ...]`.

Each option trains the default run with three seeds in FOLDER; what has ended there is kept. Table and data,
docs/options.md and results/options.json, set them beside the run of results/default-run.json. Ends with status 1
where a score is further from that run's than the spreads of both add up to.
"""

import argparse
import json
import sys
from pathlib import Path

from unicode_fast import preset
from unicode_fast.checkpoint import write_json
from unicode_fast.distributed import Ranks
from unicode_fast.runs import make_folder
from unicode_fast.train import run_seeds

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
OPTIONS: dict[str, dict[str, object]] = {
    "bfloat16": {"precision": "bfloat16"},
    "channels_last": {"channels_last": True},
    "compile": {"compile": True},
}
SEEDS = (0, 1, 2)
EXPLANATION = (
    "The default run with one option of the training step each, mean and standard deviation over the seeds 0, 1 and 2, "
    "test split, zero-shot, in per cent. The first line is the run of the README. The columns are the directions whose "
    "scores are not all 100; text to the others and localisation are in benchmarks/results/options.json. Made by "
    "benchmarks/compare_options.py, which ends with an error where a mean is further from the first than the two "
    "standard deviations add up to, in any direction."
)
SHOWN = (
    ("classification", "audio", "video"),
    ("classification", "video", "audio"),
    ("classification", "text", "audio"),
    ("localisation", "audio", "video"),
    ("localisation", "video", "audio"),
)


def scores(summary: dict) -> dict[tuple[str, str, str], tuple[float, float]]:
    """Mean and spread by task and direction."""
    return {(row["task"], row["from"], row["to"]): (row["score"], row["std"]) for row in summary["rows"]}


def beyond_the_spread(summary: dict, plain: dict) -> list[str]:
    """Where the mean differs by more than the spreads add up to."""
    truth = scores(plain)
    return [
        f"{task} {source} to {target}: {100 * mean:.1f} against {100 * truth[key][0]:.1f}"
        for key, (mean, spread) in scores(summary).items()
        for task, source, target in [key]
        if abs(mean - truth[key][0]) > spread + truth[key][1]
    ]


def trained(folder: Path, name: str) -> dict:
    """The summary of an option, trained where it has not been."""
    below = folder / name
    if (below / "summary.json").exists():
        return json.loads((below / "summary.json").read_text())
    config = preset("recommended").replace(**OPTIONS[name])
    if not below.exists():
        make_folder(below, config, list(SEEDS))
    return run_seeds(config, below, SEEDS, Ranks())


def write_table(summaries: dict[str, dict]) -> None:
    """docs/options.md from what has been trained."""
    head = [f"{task} {source} → {target}" for task, source, target in SHOWN]
    lines = ["| option | " + " | ".join(head) + " | commit |", "|---|" + "---:|" * len(head) + "---|"]
    for name, summary in summaries.items():
        found = scores(summary)
        cells = [f"{100 * found[key][0]:.1f} ± {100 * found[key][1]:.1f}" for key in SHOWN]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | `{(summary['git_commit'] or 'unknown')[:12]}` |")
    text = f"# Options of a training step\n\n{EXPLANATION}\n\n" + "\n".join(lines) + "\n"
    (ROOT / "docs" / "options.md").write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("options", nargs="*", default=list(OPTIONS), help="all of them where none is named")
    arguments = parser.parse_args()
    for name in arguments.options:
        if name not in OPTIONS:
            parser.error(f"options must be among {', '.join(OPTIONS)}, got {name!r}")
    plain = json.loads((RESULTS / "default-run.json").read_text())
    summaries = {name: trained(arguments.folder, name) for name in arguments.options}
    write_json(RESULTS / "options.json", summaries)
    write_table({"float32 (default)": plain, **summaries})
    status = 0
    for name, summary in summaries.items():
        for difference in beyond_the_spread(summary, plain):
            print(f"{name}: {difference}")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
