"""Tables of an ablation beside the paper's, and the effect of each removal."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy import stats

from unicode_fast import health
from unicode_fast.files.writing import write_text
from unicode_fast.report import plots
from unicode_fast.report.markdown import grid, linked, markdown
from unicode_fast.report.published import LABEL, TASKS, Published, published
from unicode_fast.tasks import Row, aggregate
from unicode_fast.tasks.table import token_cell

TITLES = {
    "table1": "Table 1: methods, pre-trained on two modalities",
    "table2": "Table 2: removed components, pre-trained on two modalities",
    "table3": "Table 3: removed components, pre-trained on all modalities",
    "figure3": "Figure 3: number of codewords",
}
# Table and pre-training data of the published numbers beside each table.
PUBLISHED = {"table1": (1, "AV 40K"), "table2": (2, "AV 40K"), "table3": (3, "AVT 40K")}
FINDINGS = (
    "An interval around zero is undecided if it contains the paper's change too. If not, the change is less here, or "
    "none. An interval on one side of zero is as in the paper if it contains the paper's change. Otherwise it is less, "
    "more, or the other way."
)


@dataclass(frozen=True)
class Line:
    """A line of a table: its label and the scores of each finished seed, at least one."""

    label: str
    by_seed: dict[int, list[Row]]

    @property
    def rows(self) -> list[Row]:
        """Means over seeds."""
        return aggregate(list(self.by_seed.values()))


def _place(row: Row | Published) -> str:
    return f"{row.task if isinstance(row, Row) else row.dataset} {row.source} → {row.target}"


def _shown(row: Row) -> str:
    return f"{100 * row.score:.1f}" + ("" if row.std is None else f" ± {100 * row.std:.1f}")


def _papers(experiment: str, label: str, dataset: str | None = None) -> list[Published]:
    """The paper's numbers of a line, of one data set or all; none for Figure 3."""
    removal = "Uni-Code" if label == "none" else f"without {label}"
    method = label if experiment == "table1" else removal
    found = [one for one in published() if (one.table, one.pretraining) == PUBLISHED.get(experiment)]
    return [one for one in found if one.method == method and dataset in (None, one.dataset)]


def _corner(experiment: str) -> str:
    return {"table1": "method", "figure3": "codewords"}.get(experiment, "removed")


def table_cells(experiment: str, lines: Sequence[Line]) -> list[list[str]]:
    """Heading and lines of a table, numbers in per cent, with the spread over seeds where there are several."""
    corner = [_corner(experiment), "seeds"]
    cells = [([line.label, str(len(line.by_seed))], {_place(row): _shown(row) for row in line.rows}) for line in lines]
    return grid(corner, [head for _, ours in cells for head in ours], cells)


def token_cells(experiment: str, lines: Sequence[Line]) -> list[list[str]] | None:
    """Heading and lines of token scores, content words in brackets; None where no run has any."""
    cells = [
        ([line.label], {_place(row): token_cell(row.token, row.content_token) for row in line.rows if row.token})
        for line in lines
    ]
    heads = [head for _, ours in cells for head in ours]
    return grid([_corner(experiment)], heads, cells) if heads else None


def published_cells(experiment: str, lines: Sequence[Line]) -> list[list[str]]:
    """Heading and the same lines of the paper's numbers, which are of other data; nothing for Figure 3."""
    complete = "Uni-Code" if experiment == "table1" else "none"
    beside = [one for one in _papers(experiment, complete) if one.source != one.target]
    datasets = list(dict.fromkeys(one.dataset for one in beside))
    # Directions in the order of ours.
    beside.sort(key=lambda one: (datasets.index(one.dataset), one.source, one.target))
    cells = [
        ([line.label], {_place(one): f"{one.score:g}" for one in _papers(experiment, line.label)}) for line in lines
    ]
    return grid([_corner(experiment)], map(_place, beside), cells) if beside else []


@dataclass(frozen=True)
class Change:
    """The change of one task by a removal, in per cent points, mean over directions between modalities.

    Attributes:
        label: the removed component.
        task: classification or localisation.
        by_seed: the change of each seed against the complete method with the same seed.
        tokens: the same for token scores; NaN where there are none.
        paper: the published change.
    """

    label: str
    task: str
    by_seed: list[float]
    tokens: list[float]
    paper: float

    @property
    def finding(self) -> str:
        """Comparison with the paper's change by the 95 % interval over seeds; FINDINGS defines it."""
        interval = t_interval(self.by_seed)
        if interval is None:
            return "one seed decides nothing"
        low, high = interval
        inside = low <= self.paper <= high
        if low <= 0 <= high:
            return "undecided" if inside else "unlike the paper: less or none"
        if inside:
            return "as in the paper"
        if (low > 0) != (self.paper > 0):
            return "unlike the paper: the other way"
        return f"as in the paper, but {'less' if abs(low + high) / 2 < abs(self.paper) else 'more'}"


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's 95 % interval of a mean; None below two values."""
    if len(values) < 2:
        return None
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    mean = statistics.mean(values)
    return mean - half, mean + half


def changes(experiment: str, lines: Sequence[Line]) -> list[Change]:
    """Changes of each removal against the complete method, for common seeds, where the paper has both numbers."""
    complete = next((line.by_seed for line in lines if line.label == "none"), {})
    found = []
    for line in (line for line in lines if line.label != "none"):
        common = [seed for seed in line.by_seed if seed in complete]
        for dataset, (task, _) in TASKS.items():
            papers = [_papers(experiment, label, dataset) for label in ("none", line.label)]
            pairs = [(_scores(complete[seed], task), _scores(line.by_seed[seed], task)) for seed in common]
            if pairs and all(papers) and all(map(all, pairs)):
                ours, tokens = ([100 * (now[n] - then[n]) for then, now in pairs] for n in (0, 1))
                before, after = (statistics.mean(one.score for one in those) for those in papers)
                found.append(Change(line.label, task, ours, tokens, after - before))
    return found


def _scores(rows: Sequence[Row], task: str) -> list[float]:
    """Means of scores and of token scores between audio and video, as in the paper's tables; empty without rows."""
    those = [row for row in rows if row.task == task and {row.source, row.target} == {"audio", "video"}]
    tokens = [row.token.score if row.token else float("nan") for row in those]
    return [statistics.mean(row.score for row in those), statistics.mean(tokens)] if those else []


def change_cells(found: Sequence[Change]) -> list[list[str]]:
    """Heading and lines of changes."""
    cells = [["removed", "task", "seeds", "change", "95 % interval", "of tokens", "published, other data", "finding"]]
    for change in found:
        interval, tokens = t_interval(change.by_seed), statistics.mean(change.tokens)
        points = [
            f"{statistics.mean(change.by_seed):+.1f}",
            "-" if interval is None else f"{interval[0]:+.1f} to {interval[1]:+.1f}",
            f"{tokens:+.1f}" if tokens == tokens else "-",
            f"{change.paper:+.1f}",
        ]
        cells.append([change.label, change.task, str(len(change.by_seed)), *points, change.finding])
    return cells


def write_experiment(experiment: str, lines: Sequence[Line], out: Path, kind: str) -> list[str]:
    """Returns paragraphs on an experiment in Markdown, and writes its table as CSV and its figure.

    Args:
        experiment: a key of TITLES.
        lines: finished lines, at least one.
        out: the folder.
        kind: of the figure, one of `plots.FORMATS`.
    """
    cells, theirs = table_cells(experiment, lines), published_cells(experiment, lines)
    text = [markdown(cells)]
    tokens = token_cells(experiment, lines)
    if tokens is not None:
        text += [
            "Token scores: the same for probes on one-hot codes. After a slash, the probe is trained and tested on the "
            "target. In brackets, it reads only the words of a sentence that name a class:",
            markdown(tokens),
        ]
    if theirs:
        text += [
            f"The same in the paper, {LABEL}. The paper pre-trains on VGGSound-AVEL 40K and tests on the data sets in "
            "the headings. Data and measures differ, so the numbers are not comparable with those above.",
            markdown(theirs),
        ]
    if compared := changes(experiment, lines):
        text += [
            "Change by a removal between audio and video, in points, mean of both directions. Each seed is compared "
            "with the complete method of the same seed; intervals are Student's over seeds. The paper's "
            "changes are those of its columns AVE (classification) and AVVP (localisation):",
            markdown(change_cells(compared)),
            FINDINGS,
        ]
    table = io.StringIO()
    beside = [line[1:] for line in theirs] or [[]] * len(cells)
    beside[0] = [f"{LABEL}, {head}" for head in beside[0]]
    writer = csv.writer(table, lineterminator="\n")
    writer.writerows([*one, *other] for one, other in zip(cells, beside, strict=True))
    write_text(out / f"{experiment}.csv", table.getvalue())
    if experiment == "figure3":
        points = {int(line.label): line.rows for line in lines}
        plots.save_figure(plots.codebook_sizes(points), out / f"figure3.{kind}")
        text.append(linked("Zero-shot scores over the number of codewords", f"figure3.{kind}"))
    warnings = [f"- {line.label}: {warning}" for line in lines for warning in health.at_chance(line.rows)]
    return [*text, "Doubtful scores:", "\n".join(warnings)] if warnings else text
