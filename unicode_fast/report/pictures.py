"""The pictures of a run, from its saved metrics and its evaluator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from unicode_fast.data import ClipSet, Dataset, built_in
from unicode_fast.data.layouts import LAYOUTS
from unicode_fast.files.writing import write_text
from unicode_fast.report import plots
from unicode_fast.tasks import Evaluator, Row
from unicode_fast.tasks.encoded import TEST
from unicode_fast.tasks.metrics.masks import frame_scores
from unicode_fast.tasks.metrics.ranking import cosine, rank_by_cosine
from unicode_fast.tasks.segmentation.task import another_clip
from unicode_fast.tasks.table import counted
from unicode_fast.training.metrics_logger import read_metrics

FOLDER = "plots"
OVERLAYS = 9
QUERIES, FOUND = 4, 5
TIMELINE_CLASSES = 12


def draw_run(  # noqa: PLR0913 - the content, and the format
    folder: Path, evaluator: Evaluator, dataset: Dataset, rows: Sequence[Row], codewords: int, kind: str = "png"
) -> None:
    """Losses, codebook health, code usage, bars and an event timeline, under plots/.

    Args:
        folder: of the run; its metrics.jsonl is read.
        evaluator: of the model that the summary reports.
        dataset: with a test split.
        rows: of the summary.
        codewords: M.
        kind: of the files, one of `plots.FORMATS`.
    """
    metrics, layers = read_metrics(folder), len(evaluator.model.code_sizes)
    lines = [line for line in metrics if line["kind"] == "train"]
    if lines:
        plots.save_figure(plots.losses(metrics), folder / FOLDER / f"losses.{kind}")
        used = {name: [line["codes_in_use"][name] for line in lines] for name in lines[0]["codes_in_use"]}
        used["any"] = [line["codes_in_use_by_any"] for line in lines]
        perplexity = {name: [line["perplexity"][name] for line in lines] for name in lines[0]["perplexity"]}
        health = plots.codebook_health([line["step"] for line in lines], used, perplexity, layers)
        plots.save_figure(health, folder / FOLDER / f"codebook-health.{kind}")
    usage = plots.code_usage(code_counts(evaluator, codewords), layers)
    plots.save_figure(usage.figure, folder / FOLDER / f"code-usage.{kind}")
    write_text(folder / FOLDER / "code-usage.csv", usage.table)
    draw_bars(folder, rows, kind)
    timed = evaluator.modalities("localisation")
    if len(timed) > 1 and any(row.task == "localisation" for row in rows):
        draw_timelines(folder, evaluator, dataset, timed[0], kind)
    for task, draw in DRAWN.items():
        for row in [row for row in rows if row.task == task][:1]:
            draw(folder / FOLDER / f"{task}.{kind}", evaluator, row)


def draw_bars(folder: Path, rows: Sequence[Row], kind: str = "png") -> None:
    """Zero-shot score beside same-modality score and chance."""
    if rows:
        plots.save_figure(plots.zero_shot_bars(rows), folder / FOLDER / f"zero-shot.{kind}")


def code_counts(evaluator: Evaluator, codewords: int) -> dict[str, np.ndarray]:
    """Uses of each codeword on the test split, of the first codebook if there are several: (M,) by modality."""
    counts = {}
    for name in evaluator.model.names:
        codes = evaluator.home.codes(TEST, name)
        used = codes.code[codes.mask].numpy() // (evaluator.model.codewords // codewords)
        counts[name] = np.bincount(used, minlength=codewords)
    return counts


def draw_timelines(folder: Path, evaluator: Evaluator, dataset: Dataset, trained_on: str, kind: str = "png") -> None:
    """Truth and prediction of one test clip in every modality with a time axis, the probe trained on one of them.

    The clip has the median error of those that have all these modalities; without any nothing is drawn. At most
    TIMELINE_CLASSES classes are drawn.
    """
    names = evaluator.modalities("localisation")
    places = dict(zip(names, evaluator.home.common(TEST, *names), strict=True))
    if not len(places[trained_on]):
        return
    outputs = {
        name: torch.sigmoid(evaluator.output("localisation", trained_on, name)).numpy()[places[name]] for name in names
    }
    whole = dataset.split("test")
    numbers = np.flatnonzero(np.all([whole.has(name) for name in names], axis=0))
    clips = whole.select_unread(numbers)
    truth = {name: np.asarray(clips.labels[name]) for name in names}
    errors = sum(np.abs(outputs[name] - truth[name]).mean((1, 2)) for name in names)
    clip = int(np.argsort(errors)[len(errors) // 2])
    frames = {name: plots.position_pictures(clips, name, clip) for name in names}
    # Of many classes, those in the truth and those with the largest probabilities.
    largest = np.max([np.maximum(truth[name][clip], outputs[name][clip]).max(0) for name in names], 0)[:-1]
    shown = np.sort(np.argsort(-largest, kind="stable")[:TIMELINE_CLASSES])
    rows = [*shown, -1]  # and the background
    figure = plots.event_timeline(
        {name: truth[name][clip][:, rows] for name in names},
        {name: outputs[name][clip][:, rows] for name in names},
        [clips.classes[number] for number in shown],
        trained_on=trained_on,
        frames=frames,
        second=dataset.name in built_in.DATASETS or dataset.name in LAYOUTS.keys() - {"clips"},
        title=f"test clip {numbers[clip]}, {_shown_class(clips, clip, truth)}"
        + (f", {len(shown)} of {len(clips.classes)} classes" if len(shown) < len(clips.classes) else ""),
    )
    plots.save_figure(figure, folder / FOLDER / f"timeline.{kind}")


def draw_segmentation(file: Path, evaluator: Evaluator, row: Row) -> None:
    """Test frames with their masks, segmented by the queries of a row.

    The clips are evenly spaced by their score with the zero-shot query, from the worst to the best.

    Args:
        file: of the picture.
        evaluator: of the row.
        row: of segmentation.
    """
    measured = evaluator.segmentation
    segmenter = measured.segmenter_of(row.source, row.target, row.protocol)
    masks = measured.masks(TEST)
    scores = measured.scores(segmenter, row.target)
    labelled = masks.mask.shape[1]
    clip_iou = scores.iou.reshape(len(masks), labelled).mean(1)
    by_clip = np.argsort(clip_iou, kind="stable")
    clips = by_clip[np.linspace(0, len(by_clip) - 1, min(OVERLAYS, len(by_clip))).round().astype(int)]
    frame = labelled // 2
    other = another_clip(len(masks), evaluator.seed)[clips]
    shown = {
        f"{row.source} query\n(trained)": (row.source, None),
        f"{row.target} query\n(zero-shot)": (row.target, None),
        f"{row.target} query\nof another clip": (row.target, other),
    }
    truth, queried = masks.truth(clips)[:, frame], evaluator.encoded("segmentation").clips(TEST, row.target)
    probability = {
        name: measured.probabilities(segmenter, query, TEST, clips, query_clips)[:, frame]
        for name, (query, query_clips) in shown.items()
    }
    figure = plots.segmentation_overlays(
        np.asarray(masks.frames[clips])[:, frame],
        truth,
        probability,
        [f"{_class_of(queried, clip)}\nclip {100 * clip_iou[clip]:.0f} %".lstrip() for clip in clips],
        {name: frame_scores(one, truth, clips).iou.tolist() for name, one in probability.items()},
        title=f"segmentation, frame {frame + 1} of test clips from the worst to the best; above them the class and "
        "the zero-shot IoU of all frames",
    )
    plots.save_figure(figure, file)


def draw_retrieval(file: Path, evaluator: Evaluator, row: Row) -> None:
    """Test queries and their five best results.

    Queries are evenly spaced by the rank of their paired clip, from the tenth to the ninetieth percentile.

    Args:
        file: of the picture.
        evaluator: of the row.
        row: of retrieval.
    """
    measured = evaluator.retrieval
    vectors, gallery = measured.vectors(row.source, row.target, row.anchor)
    names = (row.source, row.target) if row.anchor is None else (row.target, row.anchor)
    queried, searched = measured.shown(*names), measured.shown(*reversed(names))
    ranks = rank_by_cosine(vectors, gallery).rank
    places = np.linspace(0.1, 0.9, QUERIES) * (len(ranks) - 1)
    queries = np.argsort(ranks, kind="stable")[places.round().astype(int)]
    results, marks, captions = [], [], []
    for query, similarity in zip(queries, cosine(vectors[queries], gallery), strict=True):
        found = np.argsort(-similarity, kind="stable")[:FOUND]
        name = _class_of(queried, query)
        same = [name != "" and name == _class_of(searched, clip) for clip in found]
        marks.append(["pair" if clip == query else "class" if of else "" for clip, of in zip(found, same, strict=True)])
        results.append([plots.ShownClip(plots.clip_content(searched, names[1], clip)) for clip in found])
        captions.append(f"{name}, pair at rank {ranks[query]:.0f}".removeprefix(", "))
    figure = plots.retrieval_examples(
        [
            plots.ShownClip(plots.clip_content(queried, names[0], query), caption)
            for query, caption in zip(queries, captions, strict=True)
        ],
        results,
        marks,
        title=f"{names[0]} queries among {counted({len(ranks)}, f'{names[1]} clips')}, the first {FOUND} found"
        + (f"; the head was trained on {row.source} and {row.anchor}" if row.anchor else ""),
    )
    plots.save_figure(figure, file)


def _shown_class(clips: ClipSet, clip: int, truth: Mapping[str, np.ndarray]) -> str:
    """The class of a clip or, where clips have none, the classes of its events."""
    name = _class_of(clips, clip)
    if name:
        return f"class {name}"
    there = np.any([one[clip][:, :-1].any(0) for one in truth.values()], 0)
    events = [clips.classes[number] for number in np.flatnonzero(there).tolist()]
    return f"events {', '.join(events)}" if events else "no event"


# Functions that draw a row, by task.
DRAWN = {"segmentation": draw_segmentation, "retrieval": draw_retrieval}


def _class_of(clips: ClipSet, clip: int) -> str:
    """The name of a clip's class; "" where clips have none."""
    return clips.classes[int(clips.target[clip])] if "class" in clips.arrays else ""
