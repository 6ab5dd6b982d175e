"""Puts the table and picture of a finished run into the README: `python benchmarks/update_readme.py RUN`."""

import argparse
import json
import platform
import re
import shutil
from pathlib import Path

from unicode_fast.tasks import Row, format_markdown

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ("zero-shot.png", "code-usage.png", "timeline.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder, usually of --seeds 3")
    run = parser.parse_args().run
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
    readme = ROOT / "README.md"
    pattern = re.compile(r"(<!-- results -->\n).*(<!-- /results -->)", re.DOTALL)
    readme.write_text(pattern.sub(lambda found: f"{found[1]}{text}\n{found[2]}", readme.read_text()))
    stored = ROOT / "benchmarks" / "results" / "default-run.json"
    stored.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
