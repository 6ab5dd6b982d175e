"""The pictures of a run, from what it saved and what its probes say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from unicode_fast import plots
from unicode_fast.checkpoint import atomic_file
from unicode_fast.data import Dataset
from unicode_fast.tasks import Probes, Row

FOLDER = "plots"


def draw_run(folder: Path, probes: Probes, store: Dataset, rows: Sequence[Row], codewords: int) -> None:
    """Losses, codebook health, code usage, bars and an event timeline, as PNG files under plots/.

    Args:
        folder: of the run; its metrics.jsonl is read.
        probes: of the model that the summary reports.
        store: with a test split.
        rows: of the summary.
        codewords: M.
    """
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in metrics if line["kind"] == "train"]
    if lines:
        plots.save_png(plots.losses(metrics), folder / FOLDER / "losses.png")
        used = {name: [line["codes_in_use"][name] for line in lines] for name in lines[0]["codes_in_use"]}
        used["any"] = [line["codes_in_use_by_any"] for line in lines]
        perplexity = {name: [line["perplexity"][name] for line in lines] for name in lines[0]["perplexity"]}
        health = plots.codebook_health([line["step"] for line in lines], used, perplexity)
        plots.save_png(health, folder / FOLDER / "codebook-health.png")
    usage = plots.code_usage(code_counts(probes, codewords))
    plots.save_png(usage.figure, folder / FOLDER / "code-usage.png")
    with atomic_file(folder / FOLDER / "code-usage.csv", "w") as file:
        file.write(usage.table)
    draw_bars(folder, rows)
    timed = probes.modalities("localisation")
    if len(timed) > 1 and any(row.task == "localisation" for row in rows):
        draw_timelines(folder, probes, store, timed[0])


def draw_bars(folder: Path, rows: Sequence[Row]) -> None:
    """Zero-shot score beside same-modality score and chance."""
    if rows:
        plots.save_png(plots.zero_shot_bars(rows), folder / FOLDER / "zero-shot.png")


def code_counts(probes: Probes, codewords: int) -> dict[str, np.ndarray]:
    """How often each modality uses each codeword on the test split: (M,) by modality."""
    counts = {}
    for name in probes.model.names:
        codes = probes.codes("test", name)
        used = codes.index[codes.mask].numpy()
        counts[name] = np.bincount(used, minlength=codewords)
    return counts


def draw_timelines(folder: Path, probes: Probes, store: Dataset, trained_on: str) -> None:
    """Truth and prediction of one test clip in every modality with a time axis, the probe trained on one of them.

    The clip is the one whose error is the median of all, neither the best nor the worst.
    """
    clips = store.split("test")
    names = probes.modalities("localisation")
    outputs = {name: torch.sigmoid(probes.output("localisation", trained_on, name)).numpy() for name in names}
    truth = {name: np.asarray(clips.labels[name]) for name in names}
    errors = sum(np.abs(outputs[name] - truth[name]).mean((1, 2)) for name in names)
    clip = int(np.argsort(errors)[len(errors) // 2])
    frames = {name: clips.arrays[f"{name}.frames"][clip] for name in names if f"{name}.frames" in clips.arrays}
    figure = plots.event_timeline(
        {name: truth[name][clip] for name in names},
        {name: outputs[name][clip] for name in names},
        clips.classes,
        trained_on=trained_on,
        frames=frames,
        title=f"test clip {clip}",
    )
    plots.save_png(figure, folder / FOLDER / "timeline.png")
