"""What single choices of the recommended preset are worth: `python benchmarks/compare_choices.py FOLDER`.

Each variant changes fields of the configuration, trains on the built-in data with the same seed, and is probed like
any run. Finished variants in FOLDER are kept, so an interrupted comparison goes on where it was.
"""

import argparse
import json
from pathlib import Path

from unicode_fast import preset
from unicode_fast.checkpoint import write_json
from unicode_fast.runs import write_config
from unicode_fast.train import run

ROOT = Path(__file__).resolve().parent.parent
VARIANTS: dict[str, dict[str, object]] = {
    "recommended": {},
    "without CLUB": {"club_estimator": "none"},
    "CLUB may go below zero": {"club_floor": False},
    "5 inner steps of CLUB": {"club_inner_steps": 5},
    "Cross-CPC softmax over predictions only": {"cpc_softmax_over": "predictions"},
    "Cross-CPC scores not divided": {"cpc_scale": "one"},
    "without code matching": {"cmcm_weight": 0.0},
    "plain EMA, no partners": {"ema_partner": "none"},
    "without revival": {"revive_after": 0},
    "codewords start by k-means": {"codebook_init": "kmeans"},
    "dropout 0": {"dropout": 0.0},
}
DIRECTIONS = (("audio", "video"), ("video", "audio"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--variants", type=int, default=len(VARIANTS), help="only the first so many")
    arguments = parser.parse_args()
    rows = []
    for number, (name, fields) in enumerate(list(VARIANTS.items())[: arguments.variants]):
        folder = arguments.folder / f"{number:02d}"
        if not (folder / "summary.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            config = preset("recommended").replace(**fields, steps=arguments.steps, validations=0)
            write_config(folder, config)
            run(config, folder)
        summary = json.loads((folder / "summary.json").read_text())
        scores = {(row["task"], row["from"], row["to"]): row["score"] for row in summary["rows"]}
        row = {"variant": name, "fields": fields, "steps": arguments.steps, "versions": summary["versions"]}
        row["threads"] = summary["threads"]
        for task in ("classification", "localisation"):
            for source, target in DIRECTIONS:
                row[f"{task} {source}->{target}"] = scores[task, source, target]
        row["seconds_per_step"] = summary["seconds_of_pretraining"] / arguments.steps
        rows.append(row)
    write_json(ROOT / "benchmarks" / "results" / "choices.json", rows)
    keys = [key for key in rows[0] if "->" in key]
    lines = ["| variant | " + " | ".join(keys) + " | s/step |", "|---|" + "---:|" * (len(keys) + 1)]
    for row in rows:
        shown = " | ".join(f"{100 * row[key]:.1f} %" for key in keys)
        lines.append(f"| {row['variant']} | {shown} | {row['seconds_per_step']:.2f} |")
    made = f"One seed, {arguments.steps} steps each, {rows[0]['threads']} thread(s): small differences mean nothing."
    text = f"# Choices of the recommended preset\n\n{made}\n\n"
    (ROOT / "docs" / "choices.md").write_text(text + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
