"""Puts measured numbers into the README: `python benchmarks/update_readme.py [RUN]`.

The speed table is made from benchmarks/results/; with RUN, the table of results and the pictures from that run.
"""

import argparse
import json
import platform
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from shapes import SEARCH_SHAPES, SHAPES, UPDATE_SHAPES, SearchShape, Shape

from unicode_fast.tasks import Row, format_markdown

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ("zero-shot.png", "code-usage.png", "timeline.png")


PROBLEMS = {"search": "nearest codeword", "update": "search and update", "step": "quantiser step"}
SHAPES_OF: dict[str, Mapping[str, SearchShape | Shape]] = {
    "search": SEARCH_SHAPES,
    "update": {name: SEARCH_SHAPES[name] for name in UPDATE_SHAPES},
    "step": SHAPES,
}
DEVICES = ("cpu", "cuda")


def replace_part(name: str, text: str) -> None:
    """Put text between the README's markers of this name."""
    readme = ROOT / "README.md"
    pattern = re.compile(rf"(<!-- {name} -->\n).*(<!-- /{name} -->)", re.DOTALL)
    readme.write_text(pattern.sub(lambda found: f"{found[1]}{text}\n{found[2]}", readme.read_text()))


def size_of(row: dict) -> str:
    """The sizes of a row's problem."""
    if "rows" in row:
        return f"N {row['rows']}, M {row['codewords']}, D {row['width']}"
    return f"{row['modalities']} x {row['clips'] * row['steps']} rows, M {row['codewords']}, D {row['width']}"


def speed_table() -> str:
    """One line for each device, problem and shape: our time and that of each contender with the ratio to ours."""
    lines = ["| where | problem | size | ours | others |", "| --- | --- | --- | ---: | --- |"]
    notes = []
    for device in DEVICES:
        path = ROOT / "benchmarks" / "results" / f"quantiser-{device}.json"
        rows = json.loads(path.read_text()) if path.exists() else []
        for problem, shapes in SHAPES_OF.items():
            for name, shape in shapes.items():
                group = [row for row in rows if (row["problem"], row["shape"]) == (problem, name)]
                lines.append(speed_line(device, problem, size_of(shape._asdict()), group))
        if not rows:
            continue
        one = next(row for row in rows if "missing" not in row)
        wrong = sum(row.get("wrong_rows", 0) for row in rows if row["contender"].startswith("ours"))
        checked = sum(row.get("checked_rows", 0) for row in rows if row["contender"].startswith("ours"))
        notes.append(
            f"{device}: {one['device']}, {one['threads']} threads, torch {one['torch']}, {one['date']}, commit "
            f"`{(one['commit'] or 'unknown')[:12]}`; of {checked} rows that ours found, {wrong} differ from float64."
        )
    return "\n".join(lines) + "\n\n" + " ".join(["Medians, float32.", *notes])


def speed_line(device: str, problem: str, size: str, group: list[dict]) -> str:
    """The line of one device, problem and shape, from the rows that were measured or given up."""
    ours = next((row for row in group if row["contender"] == "ours"), {"missing": "not run yet"})
    if "missing" in ours:
        return f"| {device} | {PROBLEMS[problem]} | {size} | {ours['missing']} | |"
    others = [text for row in group if row is not ours and "not run on" not in (text := other(row, ours))]
    return f"| {ours['device']} | {PROBLEMS[problem]} | {size} | {ours['median_ms']:.3g} ms | {', '.join(others)} |"


def other(row: dict, ours: dict) -> str:
    """A contender's time, its ratio to ours and its wrong rows, or why it has none."""
    if "missing" in row:
        return f"{row['contender']}: {row['missing']}"
    wrong = f", {row['wrong_rows']} of {row['checked_rows']} rows wrong" if row["wrong_rows"] else ""
    return f"{row['contender']} {row['median_ms']:.3g} ms ({row['median_ms'] / ours['median_ms']:.1f}x{wrong})"


def put_run(run: Path) -> None:
    """Table and pictures of a finished run."""
    summary = json.loads((run / "summary.json").read_text())
    rows = [Row.from_dict(row) for row in summary["rows"]]
    seeds = summary.get("seeds", [summary.get("seed")])
    below = run / f"seed-{seeds[0]}" if len(seeds) > 1 else run
    for name in PICTURES:
        source = run / "plots" / name if (run / "plots" / name).exists() else below / "plots" / name
        shutil.copy(source, ROOT / "docs" / name)
    minutes = summary["seconds"] / len(seeds) / 60
    text = (
        f"{format_markdown(rows)}\n\n"
        f"Mean and standard deviation of {len(seeds)} seed(s), {minutes:.1f} minutes each on {platform.machine()} with "
        f"{summary['threads']} threads, torch {summary['versions']['torch']}, commit "
        f"`{(summary['git_commit'] or 'unknown')[:12]}`."
    )
    replace_part("results", text)
    stored = ROOT / "benchmarks" / "results" / "default-run.json"
    stored.write_text(json.dumps(summary, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="?", help="run folder, usually of --seeds 3")
    run = parser.parse_args().run
    if run is not None:
        put_run(run)
    replace_part("speed", speed_table())


if __name__ == "__main__":
    main()
