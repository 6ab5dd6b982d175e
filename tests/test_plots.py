"""Content of the pictures: groups of codewords, titles, data of the drawn artists, size of the files."""

import csv
import io
import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from unicode_fast.report import plots
from unicode_fast.tasks import Row

LARGEST_BYTES = 200_000


def png(figure: Figure, folder: Path) -> bytes:
    """The file as it is written, its size and signature checked."""
    plots.save_figure(figure, folder / "plots" / "picture.png")
    content = (folder / "plots" / "picture.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert 2_000 < len(content) < LARGEST_BYTES
    return content


def metrics(steps: int = 50, validations: int = 5) -> list[dict[str, Any]]:
    """Lines in the form of a run's log."""
    generator = np.random.default_rng(0)
    names = ("audio", "video", "text")
    lines: list[dict[str, Any]] = []
    for number in range(steps):
        decay = float(np.exp(-number / 10))
        terms = {f"reconstruction.{name}": 0.1 + 5 * decay * generator.uniform(0.9, 1.1) for name in names}
        terms |= {f"club.{name}": float(generator.normal()) for name in names} | {"cpc": 3.0 + decay}
        recognised = {f"{one}->{other}": 1 - decay for one in names for other in names}
        lines.append(
            {
                "step": 20 * number,
                "kind": "train",
                "loss": sum(terms.values()),
                "losses": terms,
                "recognised": recognised,
            }
        )
        if validations and number % (steps // validations) == 0:
            lines.append(
                {"step": 20 * number, "kind": "validation", "mean": 0.5, "audio->video": 0.4, "video->audio": 0.6}
            )
    return lines


def test_code_usage_by_hand() -> None:
    """Figure 4's rule for three modalities, each group once, exact fifths included."""
    counts = {
        "audio": np.array([8, 80, 79, 0, 3, 0, 10]),
        "video": np.array([2, 10, 1, 0, 3, 5, 1]),
        "text": np.array([0, 10, 20, 0, 3, 0, 1]),
    }
    groups = ["shared", "audio", "shared", "unused", "shared", "video", "audio"]
    usage = plots.code_usage(counts)
    rows = list(csv.DictReader(io.StringIO(usage.table)))
    assert [row["group"] for row in rows] == groups
    assert rows[2] == {"codeword": "2", "audio": "79", "video": "1", "text": "20", "group": "shared"}
    assert list(usage.shares) == ["shared", "audio", "video", "text", "unused"]
    assert usage.shares == {name: groups.count(name) / 7 for name in usage.shares}
    assert usage.figure.axes[0].get_title() == "7 codewords: 43 % shared, 29 % audio, 14 % video, 0 % text, 14 % unused"
    assert (
        plots.code_usage(counts, 2).figure.axes[0].get_title().startswith("7 codewords (layer 1 of 2):\n43 % shared,")
    )


def test_code_usage_of_two_modalities() -> None:
    usage = plots.code_usage({"audio": np.array([81, 80, 20, 19, 0]), "video": np.array([19, 20, 80, 81, 1])})
    rows = list(csv.DictReader(io.StringIO(usage.table)))
    assert [row["group"] for row in rows] == ["audio", "shared", "shared", "video", "video"]


def test_code_usage_draws_every_codeword_once() -> None:
    generator = np.random.default_rng(0)
    counts = {name: generator.integers(0, 3, 40) * generator.integers(0, 50, 40) for name in ("audio", "video", "text")}
    dots, strip = plots.code_usage(counts).figure.axes
    places = np.concatenate([points.get_offsets()[:, 0] for points in dots.collections])
    assert sorted(places) == list(range(40))
    assert len(strip.patches) == 3 * 40
    heights = np.array([bar.get_height() for bar in strip.patches]).reshape(3, 40).sum(0)
    used = int((sum(counts.values()) > 0).sum())
    np.testing.assert_allclose(heights, [1] * used + [0] * (40 - used))


@pytest.mark.parametrize(
    "counts",
    [{"audio": np.ones(3)}, {"audio": np.ones(3), "video": np.ones(4)}, {"audio": np.ones(0), "video": np.ones(0)}],
)
def test_code_usage_refuses(counts: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="counts must hold the same codewords for at least two modalities, got"):
        plots.code_usage(counts)


def test_losses_have_a_panel_a_family(tmp_path: Path) -> None:
    figure = plots.losses(metrics())
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == [
        "sum of all terms",
        "reconstruction",
        "CLUB",
        "Cross-CPC",
        "clips that CPC recognises",
        "zero-shot, validation clips",
    ]
    assert {axis.get_xlabel() for axis in figure.axes} == {"training step"}
    assert [axis.get_ylabel() for axis in figure.axes] == [
        "weighted loss",
        "weighted loss (logarithmic)",
        "weighted loss",
        "weighted loss",
        "share of clips",
        "accuracy",
    ]
    reconstruction = figure.axes[1]
    assert [line.get_label() for line in reconstruction.lines] == ["audio", "video", "text"]
    assert reconstruction.get_yscale() == "log" and figure.axes[2].get_yscale() == "linear"
    lines = [line for line in metrics() if line["kind"] == "train"]
    expected = [line["losses"]["reconstruction.video"] for line in lines]
    np.testing.assert_array_equal(reconstruction.lines[1].get_ydata(), expected)
    mean = figure.axes[-1].lines[2]
    assert [line.get_label() for line in figure.axes[-1].lines] == ["audio → video", "video → audio", "mean"]
    # Nine directions with different lines, and their mean.
    styles = [(to_hex(line.get_color()), line.get_linestyle()) for line in figure.axes[-2].lines]
    assert len(set(styles)) == len(styles) == 10
    np.testing.assert_allclose(mean.get_ydata(), 0.5)
    png(figure, tmp_path)
    legends = [axis.get_legend() for axis in figure.axes]
    assert [legend is not None for legend in legends] == [False, True, True, False, True, True]
    for legend in filter(None, legends):
        assert not any(legend.get_window_extent().overlaps(axis.get_window_extent()) for axis in figure.axes)


def test_losses_of_one_line_without_validation(tmp_path: Path) -> None:
    png(plots.losses(metrics(1, 0)), tmp_path)
    with pytest.raises(ValueError, match="metrics must hold at least one line of kind train, got none"):
        plots.losses([])


def test_codebook_health(tmp_path: Path) -> None:
    steps = [20, 40, 60]
    figure = plots.codebook_health(steps, {"audio": [5, 6, 7], "any": [8, 9, 10]}, {"audio": [2.0, 3.0, 4.0]})
    used, perplexity = figure.axes
    assert [line.get_label() for line in used.lines] == ["audio", "any"]
    assert used.lines[0].get_color() == perplexity.lines[0].get_color() != used.lines[1].get_color()
    assert used.get_ylim()[0] == 0
    png(figure, tmp_path)
    layered = plots.codebook_health(steps, {"any": [8, 9, 10]}, {"audio": [2.0, 3.0, 4.0]}, 2)
    assert [axis.get_title() for axis in layered.axes] == [
        "codewords in use (layer 1 of 2)",
        "perplexity of the use (layer 1 of 2)",
    ]


def test_a_modality_has_one_colour_in_all_pictures() -> None:
    """Named modalities have fixed colours; others have colours in order, never that of shared codewords."""
    for names in (("text", "video", "audio"), ("audio", "depth", "video", "radar"), ("radar", "depth", "lidar")):
        curves = {name: [1.0, 2.0] for name in names}
        terms = {f"reconstruction.{name}": 1.0 for name in names}
        terms |= {f"code_matching.{one}-{other}": 1.0 for one, other in itertools.combinations(names, 2)}
        line = {"step": 0, "kind": "train", "loss": 3.0, "losses": terms}
        dots = plots.code_usage(dict(zip(names, np.eye(len(names), dtype=int), strict=True))).figure.axes[0]
        shown = [
            {points.get_label(): to_hex(points.get_facecolor()[0]) for points in dots.collections[:-1]},
            *(
                {curve.get_label(): to_hex(curve.get_color()) for curve in axis.lines}
                for axis in (plots.losses([line]).axes[1], *plots.codebook_health([0, 1], curves, curves).axes)
            ),
        ]
        colours = [{name: picture[name] for name in names} for picture in shown]
        assert all(picture == colours[0] for picture in colours)
        assert len({*colours[0].values(), shown[0]["shared"]}) == len(names) + 1
        fixed = {"audio": plots.RED, "video": plots.BLUE, "text": plots.PINK}
        assert all(colours[0][name] == fixed[name].lower() for name in names if name in fixed)


def timeline(**options: Any) -> tuple[Figure, dict[str, np.ndarray], dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    truth = {}
    for name, (start, stop) in {"audio": (2, 6), "video": (3, 7)}.items():
        truth[name] = np.zeros((8, 4))
        truth[name][:, 3] = 1
        truth[name][start:stop] = [0, 1, 0, 0]
    probability = {name: generator.random((8, 4)) for name in truth}
    return plots.event_timeline(truth, probability, ["a", "b", "c"], **options), truth, probability


def test_titles_of_the_timeline_name_zero_shot_panels(tmp_path: Path) -> None:
    figure, truth, probability = timeline(trained_on="audio", title="test clip 7")
    titles = [axis.get_title() for axis in figure.axes[:2]]
    assert titles == ["audio: the probe was trained here", "video: zero-shot, trained on audio"]
    for axis, name in zip(figure.axes[:2], truth, strict=True):
        np.testing.assert_array_equal(axis.images[0].get_array(), probability[name].T)
        framed = np.zeros((8, 4))
        for patch in axis.patches:
            assert isinstance(patch, Rectangle)
            first, row = int(patch.get_x() + 0.5), int(patch.get_y() + 0.5)
            framed[first : first + int(patch.get_width()), row] = 1
        np.testing.assert_array_equal(framed, truth[name])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b", "c", "background"]
    assert [axis.get_xlabel() for axis in figure.axes[:2]] == ["time (s)"] * 2
    ticks = figure.axes[0]
    assert [label.get_text() for label in ticks.get_xticklabels()] == [str(second) for second in range(9)]
    assert ticks.get_xticks().tolist() == [second - 0.5 for second in range(9)]
    png(figure, tmp_path)
    assert timeline(trained_on="audio", second=False)[0].axes[0].get_xlabel() == "positions of the clip"


def test_timeline_with_pictures(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (8, 16, 16)).astype(np.uint8)
    figure, _, _ = timeline(trained_on="video", frames={"video": frames})
    audio, video = figure.axes[:2]
    assert (len(audio.images), len(video.images)) == (0, 8)
    assert video.get_title() == "video: the probe was trained here"
    png(figure, tmp_path)


def test_timeline_refuses_shapes_that_differ() -> None:
    ones = np.ones((5, 3))
    for truth, probability in (
        ({"audio": ones}, {"video": ones}),
        ({"audio": ones}, {"audio": np.ones((4, 3))}),
        ({"audio": np.ones((5, 2))}, {"audio": np.ones((5, 2))}),
    ):
        with pytest.raises(ValueError, match=r"truth and probability of '\w+' must both have shape \(T, 3\), got"):
            plots.event_timeline(truth, probability, ["a", "b"], trained_on="audio")


def test_bars_show_the_rows(tmp_path: Path) -> None:
    rows = [
        Row("classification", "audio", "video", 0.8, 0.9, 0.1, std=0.02),
        Row("classification", "video", "audio", 0.7, 0.85, 0.1, std=0.01),
        Row("localisation", "audio", "video", 0.6, 0.65, 0.12, protocol="official"),
    ]
    figure = plots.zero_shot_bars(rows)
    first, second = figure.axes
    assert [axis.get_title() for axis in figure.axes] == [
        "classification: accuracy",
        "localisation (official): precision",
    ]
    assert [bar.get_height() for bar in first.patches] == [0.8, 0.9, 0.7, 0.85]
    assert [bar.get_height() for bar in second.patches] == [0.6, 0.65]
    assert [text.get_text() for text in first.texts] == ["80", "90", "70", "85"]
    assert [label.get_text() for label in first.get_xticklabels()] == ["audio\n→ video", "video\n→ audio"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "zero-shot",
        "same modality",
        "chance",
        "error bars: sample standard deviation over seeds",
    ]
    assert first.get_xlabel() == "probe trained on → tested on" and first.get_ylabel() == "score on the test split"
    png(figure, tmp_path)
    with pytest.raises(ValueError, match="rows must hold at least one row, got none"):
        plots.zero_shot_bars([])


def test_the_legend_defines_error_bars() -> None:
    row = Row("classification", "audio", "video", 0.8, 0.9, 0.1, interval=(0.75, 0.875), clips=400)
    assert plots.error_bars([row]) == "error bars: 95 % bootstrap interval over 400 test clips"
    (bar,) = plots.zero_shot_bars([row]).axes[0].containers[1].lines[2]
    np.testing.assert_allclose(bar.get_segments()[0][:, 1], [0.75, 0.875])
    assert plots.error_bars([replace(row, clips=1)]).endswith(" over 1 test clip")
    mean = replace(row, interval=None, std=0.1, seeds=3)
    assert plots.error_bars([mean]) == "error bars: sample standard deviation over 3 seeds"
    assert plots.error_bars([replace(row, interval=None)]) == ""
    series = {"run, n = 3": {("classification", "audio → video"): (0.8, 0.1)}}
    labels = [text.get_text() for text in plots.report_bars(series).legends[0].get_texts()]
    assert labels == ["run, n = 3", "error bars: sample standard deviation over n seeds"]


def test_every_run_of_a_report_has_a_bar_of_its_own(tmp_path: Path) -> None:
    """24 runs and 12 published series; bars are wide enough for their hatch, and numbers do not overlap."""
    series = {f"run {number}": {("classification", "audio → video"): (0.5, None)} for number in range(36)}
    figure = plots.report_bars(series, hatched=[name for name in series if int(name[4:]) % 3 == 0])
    png(figure, tmp_path)
    bars = figure.axes[0].patches
    fills = {(to_hex(bar.get_facecolor()), to_hex(bar.get_edgecolor()), bar.get_hatch()) for bar in bars}
    assert len(fills) == len(bars) == 36
    drawn = [label.get_window_extent() for label in figure.axes[0].texts]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(drawn, 2))
    assert min(bar.get_window_extent().width for bar in bars) > 7


@pytest.mark.parametrize("methods", [1, 2, 20])
def test_every_marker_of_a_method_is_inside(methods: int) -> None:
    found = {f"method {number}": {"codewords": (0.5, 0.1), "tokens": (0.4, None)} for number in range(methods)}
    (axis,) = plots.method_bars({"classification": found}, {"classification": 0.1}).axes
    low, high = sorted(axis.get_ylim())
    assert low <= -0.4 and high >= methods - 1 + 0.4 and axis.yaxis_inverted()


@pytest.mark.parametrize(("kind", "start"), [("pdf", b"%PDF"), ("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_formats(kind: str, start: bytes, tmp_path: Path) -> None:
    """Each has the format of its name, and the same bytes every time."""
    rows, content = [Row("classification", "audio", "video", 0.8, 0.9, 0.1)], set()
    for number in range(2):
        plots.save_figure(plots.zero_shot_bars(rows), tmp_path / f"{number}.{plots.check_format(kind)}")
        content.add((tmp_path / f"{number}.{kind}").read_bytes())
    assert len(content) == 1 and content.pop().startswith(start)
    with pytest.raises(ValueError, match="format must be one of png, pdf, svg, got 'gif'"):
        plots.check_format("gif")


def test_a_large_picture_is_kept_in_few_colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = plots.zero_shot_bars([Row("classification", "audio", "video", 0.8, 0.9, 0.1)])
    whole = png(figure, tmp_path)
    monkeypatch.setattr(plots, "_LARGEST_BYTES", 1000)
    small = png(figure, tmp_path)
    assert len(small) < len(whole) / 2
    pixels = [np.asarray(Image.open(io.BytesIO(one)).convert("RGB"), int) for one in (whole, small)]
    assert pixels[0].shape == pixels[1].shape and np.abs(pixels[0] - pixels[1]).mean() < 1


def test_position_pictures() -> None:
    generator = np.random.default_rng(0)
    grid, vector, frames = (
        generator.random((3, 4, 7, 7, 2)),
        generator.random((3, 4, 5)),
        generator.random((3, 4, 8, 8)),
    )
    clips: Any = SimpleNamespace(
        features={"video": grid, "audio": vector, "film": grid}, arrays={"film.frames": frames}
    )
    np.testing.assert_array_equal(plots.position_pictures(clips, "film", 1), frames[1])
    np.testing.assert_array_equal(plots.position_pictures(clips, "video", 1), grid[1].mean(-1))
    column = plots.position_pictures(clips, "audio", 2)
    assert column.shape == (4, 5, 1)
    np.testing.assert_array_equal(column[:, -1, 0], vector[2, :, 0])


def test_pictures_are_the_same_every_time(tmp_path: Path) -> None:
    counts = {"audio": np.arange(30), "video": np.arange(30)[::-1].copy()}
    first, second = (png(plots.code_usage(counts).figure, tmp_path) for _ in range(2))
    assert first == second


def test_nothing_global_in_matplotlib_changes(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    png(plots.losses(metrics()), tmp_path)
    assert dict(matplotlib.rcParams) == before
    from matplotlib import pyplot

    assert pyplot.get_fignums() == []
