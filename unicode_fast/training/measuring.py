"""The end of a run: its table of zero-shot scores, summary, warnings and pictures."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unicode_fast import checkpoint, health, tasks
from unicode_fast.data import Dataset
from unicode_fast.errors import say
from unicode_fast.files.writing import write_json
from unicode_fast.report import pictures
from unicode_fast.training.checks import note_shared, splits_of, tasks_of
from unicode_fast.training.metrics_logger import read_metrics
from unicode_fast.training.runs import provenance
from unicode_fast.training.trainer import Trainer


def measure(
    trainer: Trainer, dataset: Dataset, folder: Path, progress: Mapping[str, Any], seconds: float, kind: str
) -> dict[str, Any]:
    """Measures the tasks on the best model of a trained run, and writes summary and pictures.

    Args:
        trainer: at the end of pre-training.
        dataset: of the run.
        folder: of the run.
        progress: from `pretrain`.
        seconds: duration of the run without pre-training and this call.
        kind: format of the pictures, one of `plots.FORMATS`.

    Returns:
        The content of summary.json.
    """
    begun, config, measured = time.monotonic(), trainer.config, tasks_of(trainer.config)
    used = "best" if progress["best"] else "last"
    model = checkpoint.load(folder, used, trainer.model.device)
    transfer = tasks.open_transfer(config.data, measured, dataset) if measured else None
    evaluator = tasks.Evaluator(model, dataset, config.train.seed, transfer=transfer)
    rows: list[tasks.Row] = []
    try:
        for row in evaluator.rows(measured) if measured else ():
            rows.append(row)
    except BaseException:
        if rows:
            say(f"measured before the error:\n{tasks.format_table(rows)}")
        raise
    for task in [task for task in measured if all(row.task != task for row in rows)]:
        say(f"note: {task} is skipped, two modalities must have what it reads; see evaluate --explain", sys.stderr)
    summary: dict[str, Any] = {"rows": [row.as_dict() for row in rows]}
    if rows:
        sharing = evaluator.sharing()
        # The first entry covers all words of a sentence, the second content words alone.
        codes = next(iter(sharing.values()))
        layers = len(model.code_sizes)
        what = "pairs of codewords" if layers > 1 else "codewords"
        collapsed = health.collapsed(codes.codes_in_use, codes.perplexity, model.codewords, what)
        summary |= {"sharing": {name: found.as_dict() for name, found in sharing.items()}, "layers": layers}
        warnings = [*collapsed.values(), *health.at_chance(rows)]
        note_shared(dataset)
    else:
        logged = [line for line in read_metrics(folder) if line["kind"] == "train"]
        warnings = logged[-1].get("warnings", []) if logged else []
    if lacking := {split: counts for split in splits_of(config) if (counts := dataset.lacking(split))}:
        summary["lacking"] = lacking
    summary |= {
        "warnings": warnings,
        "dataset": dataset.name,
        "checkpoint": {"used": used, **(progress["best"] or {"step": trainer.step})},
        "steps": trainer.step,
        "changes": progress["changes"],
        "seconds": progress["seconds"] + seconds + time.monotonic() - begun,
        "seconds_of_pretraining": progress["seconds"],
        "seed": config.train.seed,
        **provenance(),
    }
    if measured:
        pictures.draw_run(folder, evaluator, dataset, rows, config.model.codewords, kind)
    write_json(folder / checkpoint.SUMMARY, summary)
    return summary


def summarise_seeds(
    folder: Path, seeds: Sequence[int], summaries: Sequence[Mapping[str, Any]], kind: str
) -> dict[str, Any]:
    """Writes the summary.json above the seeds, with means over them, and its picture; returns its content."""
    rows = tasks.aggregate([[tasks.Row.from_dict(row) for row in summary["rows"]] for summary in summaries])
    # Summaries of older versions have no sharing.
    found = [summary.get("sharing", {}) for summary in summaries]
    sharing = {
        name: tasks.mean_sharing([tasks.Sharing(**one[name]) for one in found]).as_dict()
        for name in found[0]
        if all(name in one for one in found)
    }
    summary = {
        "rows": [row.as_dict() for row in rows],
        **({"sharing": sharing, "layers": summaries[0].get("layers", 1)} if sharing else {}),
        "warnings": [
            f"seed {seed}: {text}"
            for seed, summary in zip(seeds, summaries, strict=True)
            for text in summary.get("warnings", [])
        ],
        "seed": seeds[0],
        "seeds": list(seeds),
        "seconds": sum(summary["seconds"] for summary in summaries),
        **provenance(),
    }
    pictures.draw_bars(folder, rows, kind)
    write_json(folder / checkpoint.SUMMARY, summary)
    return summary


def show_summary(summary: Mapping[str, Any], folder: Path, seeds: Sequence[int] | None) -> None:
    """Prints the table of a run, the sharing of its codes, warnings, and a next command."""
    next_command = f"report {shlex.quote(str(folder))} --out {shlex.quote(f'{folder}-report')}"
    if summary["rows"]:
        rows = [tasks.Row.from_dict(row) for row in summary["rows"]]
        say(f"{tasks.format_table(rows)}\n{tasks.format_legend(rows)}".rstrip())
        sharing = summary.get("sharing", {})
        pairs = ", pairs of codewords of layers 1 and 2" if summary.get("layers", 1) != 1 else ""
        for words, values in sharing.items():
            which = f", {words}" if len(sharing) > 1 else ""
            say(f"\ncodes on the test split{pairs}{which}\n{tasks.format_sharing(tasks.Sharing(**values))}\n")
    else:
        one = folder / f"seed-{seeds[0]}" if seeds else folder
        next_command = f"evaluate {shlex.quote(str(one))} --task TASK --from MODALITY --to MODALITY"
    for warning in summary.get("warnings", []):
        say(f"warning: {warning}")
    say(f"next: python -m unicode_fast.{next_command}")
