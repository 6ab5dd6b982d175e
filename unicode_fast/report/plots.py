"""Pictures of a run, drawn from saved numbers: losses, code usage, codebook health, timelines, zero-shot scores.

Figures use matplotlib's object interface: they change no global state and need no display.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unicode_fast.data import ClipSet
from unicode_fast.files.writing import atomic_file
from unicode_fast.headless import any_backend
from unicode_fast.tasks import Row
from unicode_fast.tasks.metrics.sharing import shared_codewords
from unicode_fast.tasks.table import counted

with any_backend():
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

# Okabe and Ito's palette; its colours are distinct for people with any common colour blindness.
BLUE, RED, GREEN, PINK, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
BLACK, GREY = "#000000", "#9A9A9A"
_PALETTE = (BLUE, RED, GREEN, PINK, ORANGE, SKY)
# Colours of modalities in every picture. Video, audio and shared codewords are as in Figure 4 of the paper; other
# modalities have the unused colours of the second line, in order.
_OF_MODALITY, SHARED = {"video": BLUE, "audio": RED, "text": PINK}, GREEN
_OF_OTHERS = (ORANGE, SKY, BLACK, PINK, RED, BLUE)
_MARKERS = ("s", "^", "v", "D", "P", "X")
_DPI = 110
_LARGEST_BYTES = 150_000
FORMATS = ("png", "pdf", "svg")
FORMAT_HELP = f"of pictures: {', '.join(FORMATS)} [png]"
# Opacity of the tint at probability 1.
_OPACITY = 0.85
_NOT_SCORES = ("step", "kind", "mean", "token", "sharing", "content_sharing")
_METRICS = {
    ("classification", "held_out"): "accuracy",
    ("classification", "official"): "accuracy",
    ("localisation", "held_out"): "micro-F1",
    ("localisation", "official"): "precision",
    ("cross-classification", "held_out"): "accuracy",
    ("cross-classification", "official"): "accuracy",
    ("cross-localisation", "held_out"): "micro-F1",
    ("cross-localisation", "official"): "F1",
    ("open-classification", "held_out"): "HOS",
    ("open-classification", "official"): "H",
    ("cross-open-classification", "held_out"): "HOS",
    ("cross-open-classification", "official"): "H",
    ("segmentation", "held_out"): "mIoU",
    ("segmentation", "official"): "mIoU",
    ("retrieval", "held_out"): "R@10",
    ("retrieval", "official"): "R@10",
}


@dataclass(frozen=True)
class CodeUsage:
    """The picture of code usage by modality, and its numbers.

    Attributes:
        figure: one dot per codeword.
        table: CSV text, one line per codeword: its number, uses by modality, group.
        shares: by group ("shared", the modalities, "unused") its share of all codewords.
    """

    figure: Figure
    table: str
    shares: dict[str, float]


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure atomically, in the format of its suffix, one of FORMATS; equal figures have equal bytes.

    Raises:
        OSError: the folder cannot be written or the disk is full.
    """
    kind = path.suffix[1:]
    no_date = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
    # Outline fonts in a PDF, which journals require, and constant names in an SVG.
    with rc_context({"pdf.fonttype": 42, "svg.hashsalt": "unicode_fast"}), io.BytesIO() as drawn:
        FigureCanvasAgg(figure).print_figure(drawn, format=kind, dpi=_DPI, facecolor="white", metadata=no_date)
        content = _in_few_colours(drawn) if kind == "png" and drawn.tell() > _LARGEST_BYTES else drawn.getvalue()
    with atomic_file(path) as file:
        file.write(content)


def _in_few_colours(png: io.BytesIO) -> bytes:
    """A smaller picture of 256 colours, enough for lines and letters."""
    with io.BytesIO() as smaller:
        Image.open(png).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(smaller, "png", optimize=True)
        return smaller.getvalue()


def check_format(kind: str) -> str:
    """The format itself.

    Raises:
        ValueError: it is none of FORMATS.
    """
    if kind not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {kind!r}")
    return kind


def losses(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """Every loss term over training steps, one panel per family, then Cross-CPC's recognised clips and accuracy.

    Args:
        metrics: lines of metrics.jsonl, "kind" train or validation.

    Raises:
        ValueError: there is no line of kind train.
    """
    lines = [line for line in metrics if line["kind"] == "train"]
    if not lines:
        raise ValueError("metrics must hold at least one line of kind train, got none")
    validation = [line for line in metrics if line["kind"] == "validation"]
    families: dict[str, list[str]] = {}
    for term in lines[0]["losses"]:
        families.setdefault(term.split(".")[0], []).append(term)
    steps = [line["step"] for line in lines]
    tokens = [line for line in validation if "token" in line]
    count = 1 + len(families) + ("recognised" in lines[0]) + bool(validation) + bool(tokens)
    figure, axes = _grid(count, columns=min(4, count), panel=(2.9, 2.7))
    _curves(axes[0], "sum of all terms", "weighted loss", steps, {"": [line["loss"] for line in lines]})
    for axis, (family, terms) in zip(axes[1:], families.items(), strict=False):
        curves = {term.partition(".")[2]: [line["losses"][term] for line in lines] for term in terms}
        _curves(axis, _spaced(family), "weighted loss", steps, curves)
    if "recognised" in lines[0]:
        directions = {key: [line["recognised"][key] for line in lines] for key in lines[0]["recognised"]}
        _fractions(axes[len(families) + 1], "clips that CPC recognises", "share of clips", steps, directions)
    if validation:
        accuracy = {key: [line[key] for line in validation] for key in validation[0] if key not in _NOT_SCORES}
        axis = axes[-2 if tokens else -1]
        _fractions(axis, "zero-shot, validation clips", "accuracy", [line["step"] for line in validation], accuracy)
    if tokens:
        accuracy = {key: [line["token"][key] for line in tokens] for key in tokens[0]["token"]}
        _fractions(axes[-1], "the same of tokens", "accuracy", [line["step"] for line in tokens], accuracy)
    return figure


def _layer_note(layers: int) -> str:
    """Words of a title where numbers are those of the first of several codebooks; "" for one codebook."""
    return f" (layer 1 of {layers})" if layers > 1 else ""


def code_usage(counts: Mapping[str, np.ndarray], layers: int = 1) -> CodeUsage:
    """Code usage by modality: one dot per codeword, after Figure 4 of the paper.

    A codeword is shared where at least two modalities have 20 % or more of its uses each. Else it belongs to the
    modality with most of its uses. A codeword without uses is unused.

    Args:
        counts: (M,) uses of each codeword by modality.
        layers: codebooks of a model whose codes are tuples; the uses are those of the first.

    Raises:
        ValueError: there are fewer than two modalities, or their lengths differ.
    """
    names = list(counts)
    lengths = {name: len(count) for name, count in counts.items()}
    if len(names) < 2 or len(set(lengths.values())) > 1 or not lengths[names[0]]:
        raise ValueError(f"counts must hold the same codewords for at least two modalities, got {lengths}")
    table = np.stack([np.asarray(counts[name]) for name in names])  # (modalities, M)
    total = table.sum(0)
    share = table / np.maximum(total, 1)
    group = np.where(shared_codewords(table), len(names), table.argmax(0))
    group = np.array([*names, "shared", "unused"])[np.where(total > 0, group, len(names) + 1)]
    shares = {name: float((group == name).mean()) for name in ("shared", *names, "unused")}
    figure = _usage_figure(names, total, share, group, shares)
    note, shown = _layer_note(layers), ", ".join(f"{100 * value:.0f} % {label}" for label, value in shares.items())
    # A longer title would reach into the legend.
    figure.axes[0].set_title(f"{len(total)} codewords{note}:" + ("\n" if note else " ") + shown)
    return CodeUsage(figure, _usage_csv(names, table, group), shares)


def _usage_csv(names: Sequence[str], table: np.ndarray, group: np.ndarray) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["codeword", *names, "group"])
    for number, (uses, label) in enumerate(zip(table.T.tolist(), group, strict=True)):
        writer.writerow([number, *uses, label])
    return text.getvalue()


def _usage_figure(
    names: Sequence[str], total: np.ndarray, share: np.ndarray, group: np.ndarray, shares: Mapping[str, float]
) -> Figure:
    colours = modality_colours(names)
    labels = np.array(list(shares))
    order = np.lexsort((-total, (group[:, None] == labels).argmax(1)))  # by group, most used first
    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    dots, strip = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.1))
    styles = {
        "shared": (SHARED, "o"),
        **{name: (colours[name], marker) for name, marker in zip(names, itertools.cycle(_MARKERS), strict=False)},
        "unused": (GREY, "x"),
    }
    for label, (colour, marker) in styles.items():
        place = np.flatnonzero(group[order] == label)
        # An unused codeword is drawn below the smallest count, because the axis is logarithmic.
        height = np.maximum(total[order][place], 0.5)
        dots.scatter(place, height, s=24, c=colour, marker=marker, linewidths=1, label=label, clip_on=False)
    dots.set_yscale("log")
    dots.set_ylabel("uses on the test split\n(logarithmic)")
    figure.legend(*dots.get_legend_handles_labels(), loc="outside right upper", frameon=False, handletextpad=0.2)
    bottom = np.zeros(len(total))
    for name, values in zip(names, share[:, order], strict=True):
        strip.bar(np.arange(len(total)), values, 1.0, bottom, color=colours[name])
        bottom += values
    strip.set_ylim(0, 1)
    strip.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    strip.set_ylabel("share of uses")
    strip.set_xlabel("codewords by group, most used first")
    strip.set_xlim(-1, len(total))
    _plain(dots)
    _plain(strip)
    return figure


def codebook_health(
    steps: Sequence[int],
    used: Mapping[str, Sequence[float]],
    perplexity: Mapping[str, Sequence[float]],
    layers: int = 1,
) -> Figure:
    """Codewords in use and perplexity by modality over the steps of pre-training.

    Args:
        steps: (n,) training steps.
        used: (n,) codewords in use since the previous line, by modality, and by "any" of them.
        perplexity: (n,) exponential of the entropy of the code usage, by modality.
        layers: as in `code_usage`.
    """
    figure, axes = _grid(2, columns=2, panel=(4.1, 2.8))
    for axis, title, curves in zip(
        axes, ("codewords in use", "perplexity of the use"), (used, perplexity), strict=True
    ):
        _curves(axis, f"{title}{_layer_note(layers)}", "codewords", steps, curves, logarithmic=False)
        axis.set_ylim(bottom=0)
    return figure


def event_timeline(  # noqa: PLR0913 - the content of the picture, and its labels
    truth: Mapping[str, np.ndarray],
    probability: Mapping[str, np.ndarray],
    classes: Sequence[str],
    *,
    trained_on: str,
    frames: Mapping[str, np.ndarray] | None = None,
    second: bool = True,
    title: str = "",
) -> Figure:
    """Predicted probabilities of one clip over time, the truth outlined, one panel per modality.

    Args:
        truth: (T, C+1) 0/1 by modality, background last.
        probability: (T, C+1) in [0, 1] by modality.
        classes: C names.
        trained_on: the modality that the probe was trained on; the others are zero-shot.
        frames: (T, H, W) pictures above a modality's panel, one per position, for any of the modalities.
        second: True where a position is a second; else the axis counts positions.
        title: of the figure.

    Raises:
        ValueError: the modalities or shapes of truth and probability differ.
    """
    rows = len(classes) + 1
    for name in {*truth, *probability}:
        shapes = [np.shape(each[name]) if name in each else None for each in (truth, probability)]
        if shapes[0] is None or shapes[0] != shapes[1] or shapes[0][1:] != (rows,):
            raise ValueError(f"truth and probability of {name!r} must both have shape (T, {rows}), got {shapes}")
    figure = Figure(figsize=(4.2 * len(truth) + 0.6, 0.21 * rows + (1.9 if frames else 1.2)), layout="constrained")
    axes = figure.subplots(
        2 if frames else 1, len(truth), squeeze=False, height_ratios=(1, 0.42 * rows) if frames else (1,)
    )
    for column, name in zip(axes.T, truth, strict=True):
        axis = column[-1]
        if frames:
            _strip(column[0], frames.get(name))
            if name == next(iter(truth)):
                column[0].set_ylabel("input", rotation=0, ha="right", va="center")
        role = "the probe was trained here" if name == trained_on else f"zero-shot, trained on {trained_on}"
        column[0].set_title(f"{name}: {role}")
        image = axis.imshow(np.asarray(probability[name]).T, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        _outline(axis, np.asarray(truth[name]) > 0)
        # Ticks between the positions, from 0 to T.
        every = -(-len(probability[name]) // 10)
        axis.set_xticks(np.arange(0, len(probability[name]) + 1, every) - 0.5)
        axis.set_xticklabels(range(0, len(probability[name]) + 1, every))
        axis.set_yticks(range(rows), [*classes, "background"] if axis is axes[-1, 0] else [""] * rows)
        axis.set_xlabel("time (s)" if second else "positions of the clip")
        axis.tick_params(axis="y", length=0)
        axis.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes[:, -1], shrink=0.7, aspect=25)
    bar.set_label("predicted probability (truth outlined)")
    bar.outline.set_visible(False)
    figure.suptitle(title)
    return figure


def _strip(axis: Axes, frames: np.ndarray | None) -> None:
    """Pictures side by side, each above its position."""
    _bare(axis)
    if frames is None:
        return
    low, high = np.percentile(frames, (1, 99))
    for position, frame in enumerate(frames):
        axis.imshow(
            frame,
            cmap="gray",
            vmin=low,
            vmax=max(high, low + 1e-6),
            extent=(position - 0.46, position + 0.46, 0, 1),
            aspect="auto",
        )
    axis.set_xlim(-0.5, len(frames) - 0.5)
    axis.set_ylim(0, 1)


def _outline(axis: Axes, truth: np.ndarray) -> None:
    """A frame around each run of true cells (T, C+1) of a row."""
    for row, column in enumerate(truth.T):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], column.astype(np.int8), [0]])))
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            frame = Rectangle((start - 0.5, row - 0.5), stop - start, 1, fill=False, edgecolor=RED, linewidth=2)
            frame.set_clip_on(False)
            axis.add_patch(frame)


def zero_shot_bars(rows: Sequence[Row]) -> Figure:
    """Zero-shot score beside the same-modality score and chance, for each direction of each task.

    Args:
        rows: at least one. Error bars are the standard deviation over seeds, or the interval over clips.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("rows must hold at least one row, got none")
    tasks = list(dict.fromkeys((row.task, row.protocol) for row in rows))
    groups = [[row for row in rows if (row.task, row.protocol) == task] for task in tasks]
    widths = [len(group) + 0.6 for group in groups]
    figure = Figure(figsize=(max(4.5, 1.05 * sum(widths) + 0.6), 3.5), layout="constrained")
    axes = figure.subplots(1, len(groups), sharey=True, squeeze=False, width_ratios=widths)[0]
    for axis, group, (task, protocol) in zip(axes, groups, tasks, strict=True):
        _bars(axis, group)
        metric = _METRICS.get((task, protocol), "score")
        axis.set_title(f"{task}{'' if protocol == 'held_out' else f' ({protocol})'}: {metric}")
    axes[0].set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes[0].set_ylabel("score on the test split")
    handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    order = ["zero-shot", "same modality", "chance"]
    shown, note = [handles[key] for key in order], error_bars(rows)
    if note:
        shown, order = [*shown, Line2D([], [], color=BLACK, marker="_", linestyle="none")], [*order, note]
    figure.legend(shown, order, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def error_bars(rows: Sequence[Row]) -> str:
    """Legend of error bars with the number of seeds or clips; "" where rows have none."""
    notes = []
    if any(row.std is not None for row in rows):
        notes.append(
            "sample standard deviation over " + counted({row.seeds for row in rows if row.std is not None}, "seeds")
        )
    if any(row.std is None and row.interval for row in rows):
        clips = counted({row.clips for row in rows if row.std is None and row.interval}, "test clips")
        notes.append(f"95 % bootstrap interval over {clips}")
    return "error bars: " + "; ".join(notes) if notes else ""


def _spread(row: Row) -> tuple[float, float] | None:
    """Lengths of an error bar below and above a score."""
    if row.std is not None:
        return row.std, row.std
    # A percentile interval of few clips may not contain the score.
    return row.interval and (max(0.0, row.score - row.interval[0]), max(0.0, row.interval[1] - row.score))


def report_bars(
    series: Mapping[str, Mapping[tuple[str, str], tuple[float, float | None]]], hatched: Collection[str] = ()
) -> Figure:
    """Scores of several series side by side, one panel per task, one group of bars per direction.

    Args:
        series: by name, then by (task, direction): score and its standard deviation, if any.
        hatched: names of series with hatched bars, such as published numbers.

    Raises:
        ValueError: there are no scores.
    """
    keys = list(dict.fromkeys(key for scores in series.values() for key in scores))
    if not keys:
        raise ValueError("series must hold at least one score, got none")
    tasks = list(dict.fromkeys(task for task, _ in keys))
    groups = [[direction for name, direction in keys if name == task] for task in tasks]
    columns = max(len(group) for group in groups)
    height = 2.2 * len(tasks) + 0.24 * len(series) + 0.6
    # Bars are wide enough for their hatch, and numbers are upright where bars are narrow.
    figure = Figure(figsize=(max(6.0, max(1.4, 0.14 * len(series)) * columns + 1), height), layout="constrained")
    axes = figure.subplots(len(tasks), 1, squeeze=False)[:, 0]
    styles = _bar_styles([name for name in series if name not in hatched], list(hatched))
    width, upright = 0.8 / len(series), len(series) > 8
    for axis, task, group in zip(axes, tasks, groups, strict=True):
        for number, (name, scores) in enumerate(series.items()):
            found = [(place, scores[task, key]) for place, key in enumerate(group) if (task, key) in scores]
            places = [place - 0.4 + width * (number + 0.5) for place, _ in found]
            values = [score for _, (score, _) in found]
            spread = [std or 0 for _, (_, std) in found]
            axis.bar(places, values, 0.92 * width, **styles[name])
            bars = [
                (place, score, std) for place, (_, (score, std)) in zip(places, found, strict=True) if std is not None
            ]
            if bars:
                axis.errorbar(*zip(*bars, strict=True), fmt="none", ecolor=BLACK, elinewidth=1, capsize=2)
            for place, value, std in zip(places, values, spread, strict=True):
                label = {"ha": "center", "va": "bottom", "fontsize": 6 if upright else 7, "rotation": 90 * upright}
                axis.text(place, value + std + (0.03 if upright else 0.015), f"{100 * value:.0f}", **label)
        axis.set_xticks(range(len(group)), [re.sub(r" (?=→|\()|(?<=,) ", "\n", key) for key in group], fontsize=8)
        axis.set_xlim(-0.6, columns - 0.4)
        axis.set_ylim(0, 1.2 if upright else 1.12)
        axis.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"])
        axis.tick_params(axis="x", length=0)
        axis.set_ylabel("zero-shot score", fontsize=8)
        axis.set_title(task, fontsize=10, loc="left")
        _plain(axis)
    handles: list[Any] = [Rectangle((0, 0), 1, 1, **styles[name]) for name in series]
    labels = list(series)
    if any(std is not None for scores in series.values() for _, std in scores.values()):
        handles.append(Line2D([], [], color=BLACK, marker="|", linestyle="none"))
        labels.append("error bars: sample standard deviation over n seeds")
    figure.legend(handles, labels, loc="outside lower center", ncols=1, frameon=False, fontsize=8)
    return figure


def _bar_styles(runs: Sequence[str], hatched: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Different bars for 24 runs, in four fills of each colour, and for 35 hatched series, which are white."""
    styles: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(runs):
        colour = _PALETTE[number % len(_PALETTE)]
        light = "#" + "".join(f"{255 - (255 - int(colour[at : at + 2], 16)) * 2 // 5:02X}" for at in (1, 3, 5))
        styles[name] = (
            {"facecolor": colour, "edgecolor": colour},
            {"facecolor": light, "edgecolor": colour},
            {"facecolor": colour, "edgecolor": "white", "hatch": "////"},
            {"facecolor": light, "edgecolor": BLACK, "hatch": "...."},
        )[number // len(_PALETTE) % 4]
    for number, name in enumerate(hatched):
        hatch, colour = "/.x-\\"[number % 5], (GREY, *_PALETTE)[number // 5 % 7]
        styles[name] = {"facecolor": "white", "edgecolor": colour, "hatch": hatch * 3}
    return styles


def metric_of(task: str, protocol: str = "held_out") -> str:
    """The name of a task's score."""
    return _METRICS.get((task, protocol), "score")


def method_bars(
    scores: Mapping[str, Mapping[str, Mapping[str, tuple[float, float | None]]]], chance: Mapping[str, float]
) -> Figure:
    """Mean zero-shot scores of methods, a panel per task, a line per method.

    Args:
        scores: by task, method and view ("codewords", "tokens"): score and half of its interval, if any.
        chance: by task.

    Raises:
        ValueError: there are no scores.
    """
    methods = list(dict.fromkeys(name for found in scores.values() for name in found))
    if not methods:
        raise ValueError("scores must hold at least one method, got none")
    figure = Figure(figsize=(2.4 + 2.3 * len(scores), 0.9 + 0.27 * len(methods)), layout="constrained")
    axes = figure.subplots(1, len(scores), sharey=True, squeeze=False)[0]
    for axis, (task, found) in zip(axes, scores.items(), strict=True):
        for place, name in enumerate(methods):
            for view, (shift, colour, marker) in {"codewords": (0.12, BLUE, "o"), "tokens": (-0.12, RED, "s")}.items():
                if view in found.get(name, {}):
                    score, half = found[name][view]
                    label = view if place == 0 else ""
                    axis.errorbar(
                        score,
                        place - shift,
                        xerr=half,
                        color=colour,
                        marker=marker,
                        markersize=4,
                        capsize=2,
                        label=label,
                    )
        axis.axvline(chance[task], color=ORANGE, linestyle="--", linewidth=1, label="chance")
        axis.set_yticks(range(len(methods)), methods, fontsize=8)
        axis.set_xlim(0, 1)
        axis.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"], fontsize=8)
        axis.set_title(f"{task}:\n{metric_of(task)}", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#E5E5E5", linewidth=0.7)
        axis.set_axisbelow(True)
    axes[0].set_ylim(len(methods) - 0.5, -0.5)
    handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    if any(half is not None for found in scores.values() for views in found.values() for _, half in views.values()):
        handles["error bars: Student's 95 % interval over seeds"] = Line2D(
            [], [], color=BLACK, marker="|", linestyle=""
        )
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def codebook_sizes(points: Mapping[int, Sequence[Row]]) -> Figure:
    """Zero-shot score over the number of codewords, a panel per task, a line per direction; after the paper's Figure 3.

    Args:
        points: rows by number of codewords M; rows of several seeds have a standard deviation.

    Raises:
        ValueError: there are no points, or one has no rows.
    """
    if not points or not all(points.values()):
        raise ValueError(f"points must hold rows for at least one number of codewords, got {list(points)}")
    sizes = sorted(points)
    tasks = list(dict.fromkeys(row.task for size in sizes for row in points[size]))
    figure, axes = _grid(len(tasks), columns=min(3, len(tasks)), panel=(4.6, 3.2))
    colours = _in_order(f"{row.source} → {row.target}" for rows in points.values() for row in rows)
    for axis, task in zip(axes, tasks, strict=True):
        lines: dict[str, list[tuple[int, Row]]] = {}
        for size in sizes:
            for row in points[size]:
                if row.task == task:
                    lines.setdefault(f"{row.source} → {row.target}", []).append((size, row))
        for (label, line), marker in zip(lines.items(), itertools.cycle(("o", *_MARKERS)), strict=False):
            axis.errorbar(
                [size for size, _ in line],
                [row.score for _, row in line],
                [row.std or 0 for _, row in line],
                color=colours[label],
                marker=marker,
                markersize=4,
                linewidth=1.4,
                capsize=2,
                label=label,
            )
        chance = lines[next(iter(lines))][0][1].chance
        axis.axhline(chance, color=ORANGE, linestyle="--", linewidth=1, label="chance")
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.set_ylim(0, 1.02)
        axis.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
        axis.set_title(f"{task}: {_METRICS.get((task, 'held_out'), 'score')}", fontsize=10)
        axis.set_xlabel("codewords in the codebook (logarithmic)")
        axis.set_ylabel("zero-shot score")
        axis.legend(fontsize=7, frameon=False)
        _plain(axis)
    figure.supxlabel(error_bars([row for size in sizes for row in points[size] if row.std is not None]), fontsize=8)
    return figure


def _bars(axis: Axes, rows: Sequence[Row]) -> None:
    for place, row in enumerate(rows):
        named = ("zero-shot", "same modality", "chance") if place == 0 else ("", "", "")
        axis.bar(place - 0.2, row.score, 0.38, color=BLUE, label=named[0])
        spread = _spread(row)
        if spread is not None:
            axis.errorbar(place - 0.2, row.score, [[spread[0]], [spread[1]]], fmt="none", ecolor=BLACK, capsize=3)
        axis.bar(place + 0.2, row.same_modality, 0.38, color="#C9DDEB", edgecolor=BLUE, label=named[1])
        axis.hlines(row.chance, place - 0.42, place + 0.42, colors=ORANGE, linestyles="--", label=named[2])
        for offset, value, above in ((-0.2, row.score, spread[1] if spread else 0), (0.2, row.same_modality, 0)):
            axis.text(place + offset, value + above + 0.015, f"{100 * value:.0f}", ha="center", va="bottom", fontsize=8)
    axis.set_xticks(range(len(rows)), [f"{row.source}\n→ {row.target}" for row in rows])
    axis.set_xlabel("probe trained on → tested on", fontsize=9)
    axis.set_ylim(0, 1.1)
    axis.tick_params(axis="x", length=0)
    _plain(axis)


@dataclass(frozen=True)
class ShownClip:
    """Content of a clip in one modality, for a picture.

    Attributes:
        content: a sentence; (T, H, W) pictures, one per position; or (T, D) features.
        caption: text above the content.
    """

    content: str | np.ndarray
    caption: str = ""


def segmentation_overlays(
    frames: np.ndarray,
    truth: np.ndarray,
    probability: Mapping[str, np.ndarray],
    captions: Sequence[str],
    iou: Mapping[str, Sequence[float]],
    title: str = "",
) -> Figure:
    """Frames with their true masks, and below them the masks of a segmenter for several queries.

    Args:
        frames: (n, H, W) or (n, H, W, 3) uint8, at least one.
        truth: (n, H, W) bool.
        probability: (n, H, W) in [0, 1] by the name of a row.
        captions: (n,) above the frames.
        iou: (n,) fractions by the name of a row, above its pictures.
        title: of the figure.

    Raises:
        ValueError: the shapes differ.
    """
    shapes = {"truth": truth.shape, **{name: each.shape for name, each in probability.items()}}
    wrong = [name for name, shape in shapes.items() if shape != frames.shape[:3]]
    if wrong or not len(frames) or len(captions) != len(frames):
        raise ValueError(
            f"truth and probability must have the shape of frames, {frames.shape[:3]}, and captions one for each, got "
            f"{shapes} and {len(captions)} captions"
        )
    rows = ["frame, truth outlined", *probability]
    figure = Figure(figsize=(0.95 * len(frames) + 1.5, 1.18 * len(rows) + 0.95), layout="constrained")
    axes = figure.subplots(len(rows), len(frames), squeeze=False)
    for column, (frame, mask) in enumerate(zip(frames, truth, strict=True)):
        axes[0, column].set_title(captions[column], fontsize=9)
        for line, name in enumerate(rows):
            axis = axes[line, column]
            _bare(axis)
            axis.imshow(frame, cmap="gray", vmin=0, vmax=255)
            if line:
                _tint(axis, probability[name][column])
                axis.set_title(f"IoU {100 * iou[name][column]:.0f} %", fontsize=7, pad=2)
            _contour(axis, mask)
            if column == 0:
                axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    handles = [Line2D([], [], color=ORANGE), Rectangle((0, 0), 1, 1, color=BLUE, alpha=_OPACITY)]
    labels = ("outline of the true mask", "predicted, opacity by probability; IoU counts pixels above 0.5")
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def _tint(axis: Axes, probability: np.ndarray) -> None:
    """A probability as the opacity of blue."""
    red, green, blue = (int(BLUE[place : place + 2], 16) / 255 for place in (1, 3, 5))
    layer = np.empty((*probability.shape, 4))
    layer[...] = red, green, blue, 0
    layer[..., 3] = _OPACITY * np.clip(probability, 0, 1)
    axis.imshow(layer)


def _contour(axis: Axes, mask: np.ndarray) -> None:
    """A line along the edges of a mask."""
    padded = np.pad(mask.astype(np.int8), 1)
    across, along = np.nonzero(np.diff(padded, axis=0)), np.nonzero(np.diff(padded, axis=1))
    lines = [((x - 1.5, x - 0.5), (y - 0.5, y - 0.5)) for y, x in zip(*across, strict=True)]
    lines += [((x - 0.5, x - 0.5), (y - 1.5, y - 0.5)) for y, x in zip(*along, strict=True)]
    axis.add_collection(
        LineCollection([list(zip(xs, ys, strict=True)) for xs, ys in lines], colors=ORANGE, linewidths=1.1)
    )


# Frame and legend of results, by mark.
_MARKS = {
    "pair": (GREEN, "the paired clip"),
    "class": (SKY, "another clip of its class"),
    "": (GREY, "a clip of another class"),
}


def retrieval_examples(
    queries: Sequence[ShownClip],
    results: Sequence[Sequence[ShownClip]],
    marks: Sequence[Sequence[str]],
    title: str = "",
) -> Figure:
    """Queries, one per line, and the results of each, best first.

    Args:
        queries: at least one.
        results: for each query the same number of clips.
        marks: for each result "pair", "class" or "": the frame colour of the paired clip, of its class, or of others.
        title: of the figure.

    Raises:
        ValueError: there are no queries, or their results and marks differ in number.
    """
    counts = {len(each) for each in (*results, *marks)}
    if not queries or len(counts) != 1 or not len(queries) == len(results) == len(marks):
        raise ValueError(
            f"results and marks must have the same length for each of {len(queries)} queries, got {sorted(counts)}"
        )
    figure = Figure(figsize=(1.75 * (1 + counts.pop()) + 0.3, 1.12 * len(queries) + 0.95), layout="constrained")
    axes = figure.subplots(len(queries), 1 + len(results[0]), squeeze=False, width_ratios=[1.1, *[1] * len(results[0])])
    for line, query in enumerate(queries):
        _show_clip(axes[line, 0], query, BLACK)
        for axis, result, mark in zip(axes[line, 1:], results[line], marks[line], strict=True):
            _show_clip(axis, result, _MARKS[mark][0])
    shown = [(BLACK, "query"), *(_MARKS[mark] for mark in _MARKS if any(mark in line for line in marks))]
    handles = [Rectangle((0, 0), 1, 1, fill=False, edgecolor=colour, linewidth=2) for colour, _ in shown]
    labels = [label for _, label in shown]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def _show_clip(axis: Axes, clip: ShownClip, colour: str) -> None:
    _bare(axis)
    if clip.caption:
        axis.set_title(clip.caption, fontsize=8)
    axis.spines[:].set_visible(True)
    axis.spines[:].set_color(colour)
    axis.spines[:].set_linewidth(1 if colour == GREY else 2)
    if isinstance(clip.content, str):
        axis.text(0.5, 0.5, textwrap.fill(clip.content, 22), ha="center", va="center", fontsize=7.5)
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1)
    elif clip.content.ndim == 3:
        axis.imshow(_mosaic(clip.content), cmap="gray", aspect="auto", interpolation="nearest")
    else:
        axis.imshow(clip.content.T, cmap="magma", aspect="auto", origin="lower", interpolation="nearest")


def _mosaic(pictures: np.ndarray) -> np.ndarray:
    """(T, H, W) in two lines, in reading order, with white edges."""
    edged = np.pad(pictures, ((0, pictures.shape[0] % 2), (0, 1), (0, 1)), constant_values=pictures.max())
    return np.concatenate([np.concatenate(list(line), 1) for line in np.split(edged, 2)])[:-1, :-1]


def _bare(axis: Axes) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)


def _in_order(labels: Iterable[str]) -> dict[str, str]:
    """One colour of the palette per label."""
    return dict(zip(dict.fromkeys(labels), itertools.cycle(_PALETTE), strict=False))


def modality_colours(names: Iterable[str]) -> dict[str, str]:
    """One colour per modality or pair of them, the same for the same modalities."""
    fixed = {name: _OF_MODALITY.get(name) for name in names}
    left = itertools.cycle([colour for colour in _OF_OTHERS if colour not in fixed.values()])
    return {name: colour or next(left) for name, colour in fixed.items()}


def _curves(
    axis: Axes,
    title: str,
    unit: str,
    steps: Sequence[int],
    curves: Mapping[str, Sequence[float]],
    *,
    logarithmic: bool = True,
) -> None:
    """Draws lines; the axis is logarithmic where all values are positive and span a factor above ten.

    Labels are modalities, "any" for all of them together, or "" for a single line.
    """
    colours = {**modality_colours(curves), "any": GREY, "": BLACK}
    dashes = _dashes([colours[label] for label in curves])
    for (label, curve), dash in zip(curves.items(), dashes, strict=True):
        axis.plot(*(steps, curve, dash), color=colours[label], linewidth=1.4, label=label or None, **_dots(steps))
    values = np.concatenate([np.asarray(curve, float) for curve in curves.values()])
    if logarithmic and values.min() > 0 and values.max() > 10 * values.min():
        axis.set_yscale("log")
        unit = f"{unit} (logarithmic)"
    _finish(axis, title, unit)


def _fractions(axis: Axes, title: str, unit: str, steps: Sequence[int], curves: Mapping[str, Sequence[float]]) -> None:
    """Draws fractions: a thin line per direction, and a bold line for their mean."""
    single = {key: values for key, values in curves.items() if key != "mean"}
    colours = _in_order(single)
    for (key, values), dash in zip(single.items(), _dashes(list(colours.values())), strict=True):
        axis.plot(*(steps, values, dash), color=colours[key], linewidth=1, label=key.replace("->", " → "))
    mean = np.mean(list(single.values()), axis=0)
    axis.plot(steps, mean, color=BLACK, linewidth=1.8, label="mean", **_dots(steps))
    axis.set_ylim(0, 1.02)
    axis.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    _finish(axis, title, unit)


def _dashes(colours: Sequence[str]) -> list[str]:
    """Dash patterns that differ between lines of one colour."""
    return [("-", "--", ":", "-.")[list(colours[:place]).count(colour) % 4] for place, colour in enumerate(colours)]


def _dots(steps: Sequence[int]) -> dict[str, Any]:
    """Markers for lines of few points."""
    return {"marker": "o", "markersize": 3} if len(steps) < 20 else {}


def _finish(axis: Axes, title: str, unit: str) -> None:
    """Title, axes, and a legend below them, so that it covers no curve."""
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("training step")
    axis.set_ylabel(unit, fontsize=8)
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        # The padding is in font sizes; the legend is below the ticks and their label.
        axis.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, 0),
            borderaxespad=4.5,
            ncols=len(handles) if sum(map(len, labels)) < 20 else 2,
            fontsize=7,
            frameon=False,
            handlelength=1.8,
            columnspacing=1,
        )
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    _plain(axis)


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#E5E5E5", linewidth=0.7)
    axis.set_axisbelow(True)


def _grid(count: int, *, columns: int, panel: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels of this size in inches."""
    lines = -(-count // columns)
    figure = Figure(figsize=(panel[0] * columns, panel[1] * lines), layout="constrained")
    axes = [figure.add_subplot(lines, columns, number + 1) for number in range(count)]
    return figure, axes


def _spaced(name: str) -> str:
    return {"cpc": "Cross-CPC", "club": "CLUB"}.get(name, name.replace("_", " "))


def position_pictures(clips: ClipSet, name: str, clip: int) -> np.ndarray:
    """One picture per position of a clip, for `event_timeline`.

    Args:
        clips: a split.
        name: the modality.
        clip: its number in the split.

    Returns:
        (T, H, W): the array "<name>.frames" where the split has one, else the features. A grid is shown by its channel
        mean, and a vector by a column with its first channel at the bottom.
    """
    if f"{name}.frames" in clips.arrays:
        return np.asarray(clips.arrays[f"{name}.frames"][clip])
    features = np.asarray(clips.features[name][clip])
    return features.mean(-1) if features.ndim > 2 else features[:, ::-1, None]


def clip_content(clips: ClipSet, name: str, clip: int) -> str | np.ndarray:
    """Content of a `ShownClip`: the sentence where the split has one, (T, H, W) pictures, or (T, D) features.

    Args:
        clips: a split.
        name: the modality.
        clip: its number in the split.
    """
    arrays, chosen = clips.arrays, np.array([clip])
    if f"{name}.sentence" in arrays:
        return str(arrays[f"{name}.sentence"][chosen][0])
    if f"{name}.frames" in arrays:
        frames = np.asarray(arrays[f"{name}.frames"][chosen])[0]
        return frames if frames.ndim == 3 else frames.mean(-1)
    features = np.asarray(clips.features[name][chosen])[0]
    if features.ndim > 2:
        return features.mean(-1)
    # Neighbouring channels are averaged, because more than about thirty lines cannot be distinguished.
    return np.stack([group.mean(1) for group in np.array_split(features, min(32, features.shape[1]), axis=1)], 1)
