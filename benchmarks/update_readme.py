"""Puts measured numbers into the README: `python benchmarks/update_readme.py [RUN]`.

The speed table is made from benchmarks/results/; with RUN, the table of results and the pictures from that run.
"""

import argparse
import json
import platform
import re
import shutil
from pathlib import Path

from unicode_fast.tasks import Row, format_markdown

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ("zero-shot.png", "code-usage.png", "timeline.png")


PROBLEMS = {"search": "nearest codeword", "step": "quantiser step"}
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
        if not path.exists():
            lines.append(f"| {device} | all | | not run yet | |")
            continue
        rows = json.loads(path.read_text())
        groups: dict[tuple[str, str], list[dict]] = {}
        for row in rows:
            groups.setdefault((row["problem"], row["shape"]), []).append(row)
        for (problem, _), group in groups.items():
            ours = next(row for row in group if row["contender"] == "ours")
            if "missing" in ours:
                lines.append(f"| {device} | {PROBLEMS[problem]} | {ours['shape']} | {ours['missing']} | |")
                continue
            others = [other(row, ours) for row in group if row is not ours and "not run on" not in other(row, ours)]
            time = f"{ours['median_ms']:.3g} ms"
            lines.append(f"| {device} | {PROBLEMS[problem]} | {size_of(ours)} | {time} | {', '.join(others)} |")
        one = next(row for row in rows if "missing" not in row)
        wrong = sum(row.get("wrong_rows", 0) for row in rows if row["contender"].startswith("ours"))
        checked = sum(row.get("checked_rows", 0) for row in rows if row["contender"].startswith("ours"))
        notes.append(
            f"{device}: {one['device']}, {one['threads']} threads, torch {one['torch']}, {one['date']}, commit "
            f"`{(one['commit'] or 'unknown')[:12]}`; of {checked} rows that ours found, {wrong} differ from float64."
        )
    return "\n".join(lines) + "\n\n" + " ".join(["Medians, float32.", *notes])


def other(row: dict, ours: dict) -> str:
    """A contender's time, its ratio to ours and its wrong rows, or why it has none."""
    if "missing" in row:
        return f"{row['contender']}: {row['missing']}"
    wrong = f", {row['wrong_rows']} of {row['checked_rows']} rows wrong" if row["wrong_rows"] else ""
    return f"{row['contender']} {row['median_ms']:.3g} ms ({row['median_ms'] / ours['median_ms']:.1f}x{wrong})"


def reading_sentence() -> str:
    """What a random batch costs from zips and from stores."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "data-cpu.json").read_text())
    times = ", ".join(
        f"{row['contender']}: {row['median_ms']:.3g} ms ({row['times_slower_than_store_float32']:.2g}x)" for row in rows
    )
    one = rows[0]
    return (
        f"A random batch of {one['clips']} clips of the published shapes, in the page cache, and its time over that of "
        f"a float32 store: {times}.\nMedians of {one['repeats']}, {one['device']}, {one['threads']} thread(s), torch "
        f"{one['torch']}, {one['date']}, commit `{(one['commit'] or 'unknown')[:12]}`."
    )


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
    replace_part("reading", reading_sentence())


if __name__ == "__main__":
    main()
