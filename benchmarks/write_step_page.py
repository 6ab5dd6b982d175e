"""Writes docs/training-step.md from results/: `python benchmarks/write_step_page.py`."""

import json
from pathlib import Path
from typing import Any

from comparison import machine

from unicode_fast.files.writing import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DEVICES = ("cpu", "cuda")
TITLE = """# A training step

This page shows the time of each section of a step, the effect of the options, and the released code's step.
`benchmarks/write_step_page.py` makes it from `benchmarks/results/`. `pytest benchmarks/bench_train_step.py --all-steps`
and `pytest benchmarks/bench_loader.py` fill that folder with `--results benchmarks/results`, on a machine with a GPU
with `--device cuda` too.

- *published* has the sizes of the paper's audio-video-text pre-training, on a CPU with four clips in place of eighty.
- *default* is the default run on the built-in data.
- *Time* and the ratio to the original's are by the clock. *Processor time* is the sum over all cores; it is the better
  measure on a busy machine.
- Rows named *before* are of an earlier commit. The text below the table names the machine and commit of each row.
"""


def read(name: str) -> Any:
    """A file of results; an empty list without the file."""
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else []


def steps_table(rows: list[dict]) -> list[str]:
    """Times of whole steps, each with its ratio to the original's."""
    lines = [
        "| size | step | time | 20 to 80 % | processor time | clips/s | the original's time by it | commit |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        if "missing" in row:
            lines.append(f"| {row['size']} | {row['contender']} | {row['missing']} | | | | | |")
            continue
        original = next((r for r in rows if r["contender"] == "the original" and r["size"] == row["size"]), None)
        # Rows of other commits can be from other machines.
        same = original is not None and "missing" not in original and original["commit"] == row["commit"]
        ratio = f"{original['median_ms'] / row['median_ms']:.2f}" if same else ""
        lines.append(
            f"| {row['size']}, B {row['clips']} | {row['contender']} | {row['median_ms']:.4g} ms | "
            f"{row['p20_ms']:.4g} to {row['p80_ms']:.4g} | {row['processor_ms']:.4g} ms | "
            f"{row['clips_per_second']:.4g} | {ratio} | `{(row['commit'] or 'unknown')[:12]}` |"
        )
    return lines


def sections_table(columns: dict[str, dict]) -> list[str]:
    """The share of each section in a step, forward and backward, of several profiles side by side.

    Shares are shown because other load of a machine slows all sections alike.
    """
    lines = [
        "| section | " + " | ".join(f"{name}: forward | backward" for name in columns) + " |",
        "|---|" + "---:|---:|" * len(columns),
    ]
    whole = {name: sum(one["forward_ms"] + one["backward_ms"] for one in row["parts"]) for name, row in columns.items()}
    for section in list(columns.values())[-1]["parts"]:
        cells = []
        for name, row in columns.items():
            # Earlier steps have fewer sections.
            mine = next((one for one in row["parts"] if one["part"] == section["part"]), None)
            for way in ("forward_ms", "backward_ms"):
                cells.append("-" if mine is None else f"{100 * mine[way] / whole[name]:.1f} %")
        lines.append(f"| {section['part']} | " + " | ".join(cells) + " |")
    return lines


def loader_table(rows: list[dict]) -> list[str]:
    """The batch loader, the step, and the loop."""
    lines = [
        "| size | loader | loader alone | step alone | loop | of the smaller | of the loop's time in the loader |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['size']}, B {row['clips']} | {row['feed']} | {row['feed_clips_per_second']:.4g} clips/s | "
        f"{row['step_clips_per_second']:.4g} clips/s | {row['loop_clips_per_second']:.4g} clips/s | "
        f"{100 * row['share_of_the_smaller']:.1f} % | {100 * row['share_of_the_loop_in_the_feed']:.2f} % |"
        for row in rows
    ]
    return lines


def main() -> None:
    lines = [TITLE]
    for device in DEVICES:
        rows, loaders = read(f"train-step-{device}.json"), read(f"loader-{device}.json")
        lines.append(f"## On {device}\n")
        if not rows and not loaders:
            lines.append("Not run yet.\n")
            continue
        if rows:
            machines = dict.fromkeys(machine(row) for row in rows if "missing" not in row)
            before = {row["size"]: row for row in read(f"train-step-{device}-before.json")}
            older = [{**r, "contender": f"{r['contender']}, before, `{r['commit'][:12]}`"} for r in before.values()]
            lines += [*steps_table([*older, *rows]), "", f"Medians. {'; '.join(machines)}.", ""]
            lines += [f"Before, {size}: {machine(row)}.\n" for size, row in before.items()]
            for size in dict.fromkeys(row["size"] for row in rows):
                columns = {row["contender"]: row for row in rows if row["size"] == size and "parts" in row}
                if size in before:
                    columns = {f"before, `{before[size]['commit'][:12]}`": before[size], **columns}
                if columns:
                    lines += [f"Shares of a step by torch.profiler, {size}:", "", *sections_table(columns), ""]
        if loaders:
            lines += [*loader_table(loaders), "", f"{machine(loaders[0])}.", ""]
    write_text(ROOT / "docs" / "training-step.md", "\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
