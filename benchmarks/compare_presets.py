"""Scores of presets, and effects of single flags: `python benchmarks/compare_presets.py FOLDER [VARIANT ...]`.

Each variant trains on the built-in data with some seeds, in its own folder below FOLDER, and is probed on the test
split. Rows of benchmarks/results/presets.json are not measured again, so an interrupted comparison resumes.
docs/presets.md is written from them. An existing folder means that another process trains the variant; after an
interruption it must be removed.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from compare_choices import BEFORE, Fields, folder_name, reconstruction, results, shown, unmeasured

from unicode_fast import Config, checkpoint, preset
from unicode_fast.cli import resolve_saved
from unicode_fast.data import open_dataset
from unicode_fast.files.writing import write_text
from unicode_fast.many_runs import identity
from unicode_fast.train import run
from unicode_fast.training.distributed import DistContext
from unicode_fast.training.runs import make_folder

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "presets.json"
# The text before the comma is the preset.
VARIANTS: dict[str, Fields] = {
    "recommended": {},
    "recommended, as it was before codes were shared": BEFORE,
    "paper": {},
    "paper, grid_pooling attention": {"grid_pooling": "attention"},
    "paper, commitment_norm sum": {"commitment_norm": "sum"},
    "paper, codebook_init uniform": {"codebook_init": "uniform"},
    "paper, reset_after 300": {"reset_after": 300},
    "official": {},
    "official, codebook_init data": {"codebook_init": "data"},
    "official, reset_ema true": {"reset_ema": True},
    "official, club_reduction mean": {"club_reduction": "mean"},
}
TOKEN_DIRECTIONS = (
    ("audio", "video"),
    ("video", "audio"),
    ("text", "audio"),
    ("text", "video"),
    ("audio", "text"),
    ("video", "text"),
)
SHARING_CELLS = (
    ("all words", "agreement", "audio-video"),
    ("all words", "agreement_by_chance", "audio-video"),
    ("all words", "overlap", "audio-video"),
    ("content words", "overlap", "audio-text"),
    ("content words", "overlap", "video-text"),
    ("all words", "shared_event_uses", "audio"),
    ("all words", "shared_event_uses", "video"),
    ("all words", "perplexity", "audio"),
    ("all words", "perplexity", "video"),
)
EARLY_STEPS = (20, 100, 300, 600)
DIRECTIONS = (
    ("classification", "audio", "video"),
    ("classification", "video", "audio"),
    ("classification", "text", "audio"),
    ("localisation", "audio", "video"),
    ("localisation", "video", "audio"),
)

EXPLANATION = (
    "Zero-shot scores of the built-in data's test split in per cent; mean and standard deviation over seeds. Brackets "
    "hold scores of probes that read only which codes a clip uses ([Sharing](sharing.md)). Codes in use are those of "
    "the test split. Reconstruction is the sum of the three modalities' mean squared errors there. Made by `python "
    "benchmarks/compare_presets.py FOLDER`."
)
TOKENS = (
    "Classification by codes only, in per cent: first trained and tested on the same modality, then across. Brackets "
    "hold scores with only the words of a sentence that name the digit:"
)
EARLY = "Codes used in the twenty batches up to a step, audio / video / text, seed 0:"
SHARING = (
    "Code sharing of audio and video, in per cent ([Sharing](sharing.md)). *Same code* counts seconds; *by chance* is "
    "its value for independent codes. The overlap of use with text counts its content words. The columns of events "
    "are uses on shared codewords in seconds with an event. The last columns are perplexities:"
)
OFFICIAL = """## Why `official` reaches so little

It computes what the released code computes. Three of its rules leave codes unused, and one flag changes each. CLUB's
rule matters most. Its flag alone raises some scores far above chance, though modalities still share few codes. Neither
of the other flags alone does so in 600 steps.

* **CLUB.** It is summed over channels, with weight 1. By step 100 few codes are in use. `--club_reduction mean`
  averages over channels; two to eight times as many codes are then in use.
* **The first step.** Codewords start within 1/400 of zero, with counts of zero, so the first batch alone sets them. A
  chosen codeword moves onto its features. An unchosen codeword becomes its start divided by almost nothing, far away
  from all features. The second batch uses about half of the codes of the first. `--codebook_init data` starts codewords
  among the features; by step 100 few are in use all the same.
* **A reset that does not last.** After 300 batches without use a codeword is put beside one in use. Its running count
  and sum stay, and the next update restores the old codeword from them. `--reset_ema true` resets these too.

`paper` has all three changes, a tenth of CLUB's weight and a higher learning rate, and reads a grid by one linear
layer."""


def config_of(name: str, seed: int) -> Config:
    """Configuration of a variant."""
    return preset(name.split(",")[0]).replace_all(**VARIANTS[name], seed=seed)


def row_of(folder: Path) -> dict[str, Any]:
    """The row of a finished run."""
    summary = json.loads((folder / "summary.json").read_text())
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    model = checkpoint.load(folder, summary["checkpoint"]["used"], torch.device("cpu"))
    validation = [line for line in logged if line["kind"] == "validation"][-1]
    return {
        "seed": summary["seed"],
        "steps": summary["steps"],
        "rows": summary["rows"],
        "sharing": summary["sharing"],
        "last_validation": {
            "codes_in_use": validation["sharing"]["codes_in_use"],
            "audio->video": validation["audio->video"],
        },
        "codes_in_use": {
            line["step"]: line["codes_in_use"]
            for line in logged
            if line["kind"] == "train" and line["step"] in EARLY_STEPS
        },
        "reconstruction": reconstruction(model, open_dataset(model.config.data), "test"),
        "seconds": summary["seconds"],
        "threads": summary["threads"],
        "versions": summary["versions"],
    }


def cells_of(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The line of a variant from its seeds."""
    by_place = [{(row["task"], row["from"], row["to"]): row for row in one["rows"]} for one in rows]
    used = [one["sharing"]["all words"]["codes_in_use"] for one in rows]
    cells = [name, str(len(rows)), str(rows[0]["steps"])]
    cells.append(" / ".join(shown([one[modality] for one in used], 0) for modality in ("audio", "video", "text")))
    for place in DIRECTIONS:
        scores = [100 * one[place]["score"] for one in by_place]
        tokens = [100 * one[place]["token"]["score"] for one in by_place]
        cells.append(f"{shown(scores)} ({shown(tokens)})")
    cells.append(shown([sum(one["reconstruction"].values()) for one in rows], 3))
    return cells


def table(names: Sequence[str], found: Sequence[Mapping[str, Any]]) -> str:
    """Lines of measured variants, as Markdown."""
    heads = ["preset", "seeds", "steps", "codes in use, audio / video / text"]
    heads += [f"{task} {source} → {target}" for task, source, target in DIRECTIONS]
    heads.append("reconstruction")
    lines = [f"| {' | '.join(heads)} |", "| --- | ---: | ---: | --- |" + " ---: |" * (len(heads) - 4)]
    for name in names:
        mine = [row for row in found if row["variant"] == name]
        if mine:
            lines.append(f"| {' | '.join(cells_of(name, mine))} |")
    return "\n".join(lines)


def token_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Classification by tokens in every direction, text by all words and by content words."""
    heads = ["preset", "audio", "video", "text", *(f"{source} → {target}" for source, target in TOKEN_DIRECTIONS)]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for name in VARIANTS:
        mine = [row for row in found if row["variant"] == name]
        by_place = [
            {(row["from"], row["to"]): row for row in one["rows"] if row["task"] == "classification"} for one in mine
        ]
        if mine:
            cells = [name]
            for source, target in (("video", "audio"), ("audio", "video"), ("audio", "text")):
                cells.append(shown([100 * one[source, target]["token"]["same_modality"] for one in by_place]))
            for place in TOKEN_DIRECTIONS:
                cell = shown([100 * one[place]["token"]["score"] for one in by_place])
                if "text" in place:
                    cell += f" ({shown([100 * one[place]['content_token']['score'] for one in by_place])})"
                cells.append(cell)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sharing_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Measures of sharing by variant."""
    heads = ["preset", "same code", "by chance", "overlap audio-video", "audio-text", "video-text", "audio's events"]
    heads += ["video's events", "perplexity of audio", "of video"]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for name in VARIANTS:
        mine = [row["sharing"] for row in found if row["variant"] == name]
        if mine:
            cells = [name]
            for words, measure, key in SHARING_CELLS:
                percent = 1 if measure == "perplexity" else 100
                cells.append(shown([percent * one[words][measure][key] for one in mine]))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def early_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Codes in use by training step, seed 0."""
    lines = [
        f"| preset | {' | '.join(f'step {step}' for step in EARLY_STEPS)} |",
        "| --- |" + " --- |" * len(EARLY_STEPS),
    ]
    for row in found:
        if row["seed"] == 0:
            codes = [row["codes_in_use"].get(str(step), row["codes_in_use"].get(step)) for step in EARLY_STEPS]
            cells = ["-" if one is None else " / ".join(str(number) for number in one.values()) for one in codes]
            lines.append(f"| {' | '.join([row['variant'], *cells])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("variants", nargs="*", default=list(VARIANTS), help="names of variants [all]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--finished", action="store_true", help="FOLDER is that of a run of one variant with --seeds")
    arguments = parser.parse_args()
    for name in arguments.variants:
        if name not in VARIANTS:
            parser.error(f"variants must be among {'; '.join(VARIANTS)}, got {name!r}")
    if arguments.finished:
        take(arguments.folder)
        return
    for name in arguments.variants:
        for seed in arguments.seeds:
            folder = arguments.folder / folder_name(name, seed)
            with results(RESULTS, VARIANTS) as rows:
                done = any((row["variant"], row["seed"]) == (name, seed) for row in rows)
            if done or folder.exists():
                continue
            config = config_of(name, seed)
            make_folder(folder, config)
            run(config, open_dataset(config.data), folder, DistContext())
            keep(name, folder)
            write_page()


def keep(name: str, folder: Path) -> None:
    """Adds the row of a finished run, in place of an older one."""
    with results(RESULTS, VARIANTS) as rows:
        row = row_of(folder)
        rows[:] = [one for one in rows if (one["variant"], one["seed"]) != (name, row["seed"])]
        rows.append({"variant": name, "fields": dict(VARIANTS[name]), **row})


def take(folder: Path) -> None:
    """Adds the rows of the runs below a folder, which must be runs of a variant."""
    for below in sorted(folder.glob("seed-*")):
        config = resolve_saved(str(below / "config.yaml"))
        names = [name for name in VARIANTS if identity(config_of(name, config.train.seed)) == identity(config)]
        if not names:
            raise SystemExit(f"{below} must be a run of one of {'; '.join(VARIANTS)}, got another configuration")
        keep(names[0], below)
    write_page()


def write_page() -> None:
    """Writes docs/presets.md from all finished rows."""
    found = json.loads(RESULTS.read_text())
    text = ["# Presets", EXPLANATION, table(list(VARIANTS), found), TOKENS, token_table(found)]
    text += [SHARING, sharing_table(found)]
    missing = unmeasured(VARIANTS, found)
    if missing:
        text.append(f"Not measured: {'; '.join(missing)}.")
    text += [EARLY, early_table(found), OFFICIAL]
    write_text(ROOT / "docs" / "presets.md", "\n\n".join(text) + "\n")


if __name__ == "__main__":
    main()
