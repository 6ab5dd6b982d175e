"""Rows of the result table, their mean over seeds, and the table as text or Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from unicode_fast.tasks.metrics.intervals import Estimate

PROTOCOLS = ("held_out", "official")
_HEADINGS = ("task", "direction", "zero-shot", "same modality", "chance", "ratio")
_INTERVALS = ("interval", "same_interval")
_TOKENS = {"token": "tokens / same", "content_token": "content words / same"}


class TokenScore(NamedTuple):
    """Scores of probes on one-hot codes, which show only the codes that a clip uses; fractions.

    score: zero-shot. same_modality: trained and tested on the target. std: sample standard deviation of `score` over
    seeds, None for a single seed.
    """

    score: float
    same_modality: float
    std: float | None = None

    def as_dict(self) -> dict[str, float]:
        """Plain values for a summary, without `std` where there is none."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    def __str__(self) -> str:
        """In per cent, the same-modality score after a slash."""
        return f"{_percent(self.score, self.std)} / {_percent(self.same_modality)}"


def check_protocol(protocol: str) -> str:
    """The checked name of a protocol; earlier versions called held_out "sound".

    Raises:
        ValueError: it is unknown.
    """
    name = "held_out" if protocol == "sound" else protocol
    if name not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    return name


@dataclass(frozen=True)
class Row:
    """One direction of one task; scores are fractions.

    Attributes:
        task: one of `TASKS`.
        source: the modality that the probe was trained on.
        target: the modality that it was tested on.
        score: on the target, without any of its labels.
        same_modality: score of a probe that was trained and tested on the target.
        chance: score of a prediction that ignores the clip.
        protocol: held_out or official.
        std: sample standard deviation of `score` over seeds; None for a single seed.
        anchor: the modality that source and target are matched with in retrieval; None elsewhere.
        interval: 95 % bootstrap interval of `score` over test clips; None where it was not measured.
        metrics: other metrics of the same predictions by name.
        token: scores with one-hot codes for codewords; None in a task without them.
        content_token: the same with content words of a sentence only; None without a sentence, or where content words
            are not marked.
        clips: number of test clips; None where unknown.
        left_out: number of further test clips that lack the target, in retrieval a modality of the pair.
        seeds: number of seeds behind the mean `score`; None for a single seed.
        at_chance: True where the 95 % interval of `same_modality` includes `chance` or lies below it.
        same_interval: this interval; None where it was not measured, or was not kept, as in rows of older versions.
    """

    task: str
    source: str
    target: str
    score: float
    same_modality: float
    chance: float
    protocol: str = "held_out"
    std: float | None = None
    anchor: str | None = None
    interval: tuple[float, float] | None = None
    metrics: Mapping[str, Estimate] = field(default_factory=dict)
    token: TokenScore | None = None
    content_token: TokenScore | None = None
    clips: int | None = None
    seeds: int | None = None
    at_chance: bool = False
    same_interval: tuple[float, float] | None = None
    left_out: int = 0

    @property
    def learnable(self) -> bool:
        """True where the same-modality score is above chance, interval included."""
        return self.same_modality > self.chance and not self.at_chance

    @property
    def above_chance(self) -> bool:
        """True where the zero-shot score, and its interval if any, is above chance."""
        return not Estimate(self.score, *(self.interval or ())).reaches(self.chance)

    @property
    def ratio(self) -> float:
        """Zero-shot over same-modality score; NaN where the latter is at chance."""
        return self.score / self.same_modality if self.learnable else math.nan

    @property
    def direction(self) -> str:
        """Source and target in one word, such as audio->video."""
        return f"{self.source}->{self.target}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a summary, without attributes at their default."""
        values: dict[str, Any] = {
            "task": self.task,
            "from": self.source,
            "to": self.target,
            "score": self.score,
            "same_modality": self.same_modality,
            "chance": self.chance,
        }
        if self.std is not None:
            values["std"] = self.std
        if self.protocol != "held_out":
            values["protocol"] = self.protocol
        if self.anchor is not None:
            values["anchor"] = self.anchor
        values |= {name: list(ends) for name in _INTERVALS if (ends := getattr(self, name)) is not None}
        if self.metrics:
            values["metrics"] = {name: estimate.as_dict() for name, estimate in self.metrics.items()}
        values |= {name: getattr(self, name) for name in ("clips", "seeds") if getattr(self, name) is not None}
        if self.left_out:
            values["left_out"] = self.left_out
        if self.at_chance:
            values["at_chance"] = True
        for name in _TOKENS:
            score: TokenScore | None = getattr(self, name)
            if score is not None:
                values[name] = score.as_dict()
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        """The inverse of `as_dict`.

        Raises:
            ValueError: a key is missing or unknown, or a value of another type.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"a row must be a mapping, got {type(values).__name__}")
        renamed = {{"from": "source", "to": "target"}.get(key, key): value for key, value in values.items()}
        if "protocol" in renamed:
            renamed["protocol"] = check_protocol(renamed["protocol"])
        try:
            renamed |= {name: tuple(renamed[name]) for name in _INTERVALS if name in renamed}
            if "metrics" in renamed:
                renamed["metrics"] = {name: Estimate(**value) for name, value in renamed["metrics"].items()}
            renamed |= {name: TokenScore(**renamed[name]) for name in _TOKENS if name in renamed}
            row = cls(**renamed)
            numbers: list[Any] = [row.score, row.same_modality, row.chance, row.std, row.clips, row.seeds, row.left_out]
            intervals = [ends for ends in (row.interval, row.same_interval) if ends is not None]
            several = (*intervals, *row.metrics.values(), row.token or (), row.content_token or ())
            numbers += [number for those in several for number in those]
        except (TypeError, AttributeError) as error:
            raise ValueError(f"a row must have the keys of Row.as_dict, got {sorted(values)}") from error
        wrong = [number for number in numbers if type(number) not in (int, float, type(None))]
        wrong += [text for text in (row.task, row.source, row.target, row.protocol) if type(text) is not str]
        wrong += [one for one in (row.anchor,) if type(one) not in (str, type(None))]
        if wrong or None in numbers[:3] or any(len(ends) != 2 or None in ends for ends in intervals):
            raise ValueError(f"a row must have values of the types of Row.as_dict, got {wrong!s:.80}")
        return row


def aggregate(rows_of_seeds: Sequence[Sequence[Row]]) -> list[Row]:
    """Mean scores over seeds, row by row, with the standard deviation of the zero-shot score.

    Common metrics of all seeds are averaged too. Intervals belong to one model and are left out.

    Args:
        rows_of_seeds: the rows of each seed, the same directions in all of them, in any order.

    Returns:
        Rows in the order of the first seed. The deviation divides by n - 1; one seed has none.

    Raises:
        ValueError: there are no seeds, or their directions differ.
    """
    if not rows_of_seeds:
        raise ValueError("rows_of_seeds must hold at least one seed, got none")
    keyed = [{_key(row): row for row in rows} for rows in rows_of_seeds]
    for number, rows in enumerate(keyed):
        if set(rows) != set(keyed[0]) or len(rows) != len(rows_of_seeds[number]):
            raise ValueError(
                f"rows_of_seeds must hold the same directions once for every seed, number {number} differs"
            )
    return [_mean([rows[key] for rows in keyed]) for key in keyed[0]]


def _key(row: Row) -> tuple[str, ...]:
    return row.task, row.source, row.target, row.protocol, row.anchor or ""


def _mean(rows: Sequence[Row]) -> Row:
    if len(rows) == 1:
        return rows[0]
    scores = [row.score for row in rows]
    shared = [name for name in rows[0].metrics if all(name in row.metrics for row in rows)]
    return replace(
        rows[0],
        score=statistics.fmean(scores),
        same_modality=statistics.fmean(row.same_modality for row in rows),
        chance=statistics.fmean(row.chance for row in rows),
        std=statistics.stdev(scores),
        seeds=len(rows),
        at_chance=all(row.at_chance for row in rows),
        interval=None,
        same_interval=None,
        metrics={name: Estimate(statistics.fmean(row.metrics[name].value for row in rows)) for name in shared},
        token=mean_token([row.token for row in rows]),
        content_token=mean_token([row.content_token for row in rows]),
    )


def token_cell(token: TokenScore | None, content_token: TokenScore | None) -> str:
    """Both scores in one cell of a table, content words in brackets; a dash for no score."""
    if token is None:
        return "-"
    return f"{token}" if content_token is None else f"{token} ({content_token})"


def mean_token(scores: Sequence[TokenScore | None]) -> TokenScore | None:
    """Mean over seeds; None where a seed has none, as in runs of older versions."""
    found = [score for score in scores if score is not None]
    if len(found) < len(scores):
        return None
    values = [score.score for score in found]
    return TokenScore(
        statistics.fmean(values),
        statistics.fmean(score.same_modality for score in found),
        statistics.stdev(values) if len(values) > 1 else None,
    )


def format_table(rows: Sequence[Row]) -> str:
    """Aligned columns for a terminal, in ASCII but for the sign of a standard deviation."""
    return with_rule(_lines(rows, "->"))


def counted(numbers: Collection[int | None], things: str) -> str:
    """Text such as "1 seed" or "3 to 5 seeds"; no number where one is unknown."""
    given = sorted({number for number in numbers if number is not None})
    if not given or None in numbers:
        return things
    if given == [1]:
        return f"1 {things.removesuffix('s')}"
    return f"{given[0]} {things}" if len(given) == 1 else f"{given[0]} to {given[-1]} {things}"


def format_legend(rows: Sequence[Row]) -> str:
    """Legend of a table: spread, intervals and missing ratios."""
    notes = []
    if any(row.std is not None for row in rows):
        spread = counted({row.seeds for row in rows if row.std is not None}, "seeds")
        notes.append(f"zero-shot: mean ± sample standard deviation over {spread}")
    if any(row.interval for row in rows):
        clips = counted({row.clips for row in rows if row.interval}, "test clips")
        notes.append(f"zero-shot, in brackets: 95 % bootstrap interval over {clips}, the model fixed")
    lacking = [row for row in rows if row.left_out]
    if lacking:
        left_out = {row.target: row.left_out for row in lacking if row.task != "retrieval"}
        listed = [f"{count} without {name}" for name, count in left_out.items()]
        if pairs := {row.left_out for row in lacking if row.task == "retrieval"}:
            listed.append(f"{counted(pairs, 'clips')} without one of a pair in retrieval")
        notes.append(f"test clips that lack a modality are left out: {', '.join(listed)}")
    if any(not row.learnable for row in rows):
        notes.append("ratio -: the same-modality score is not above chance")
    return "\n".join(notes)


def format_metrics(row: Row) -> str:
    """Metrics of a row with their 95 % intervals, aligned; fractions in per cent, ranks as numbers."""
    lines = [("measure", "value", "95 % interval")]
    for name, (value, low, high) in row.metrics.items():
        scale, unit = (1, "") if "rank" in name else (100, " %")
        interval = "-" if low is None or high is None else _interval(low, high, scale)
        lines.append((name, f"{scale * value:.1f}{unit}", interval))
    return with_rule(lines, left=1)


def _interval(low: float, high: float, scale: float = 100) -> str:
    return f"{scale * low:.1f}-{scale * high:.1f}"


def with_rule(lines: Sequence[Sequence[str]], left: int = 2) -> str:
    """Aligned columns, with a rule beneath the headings; the first `left` columns are left-aligned."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    aligned = [_aligned(line, widths, left) for line in lines]
    return "\n".join([aligned[0], "  ".join("-" * width for width in widths), *aligned[1:]])


def format_markdown(rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    heading, *lines = _lines(rows, "→")
    rule = ["---", "---", *["---:"] * (len(heading) - 2)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (heading, rule, *lines))


def _lines(rows: Sequence[Row], arrow: str) -> list[tuple[str, ...]]:
    """Heading and rows; columns of token scores where a row has one."""
    lines = [_HEADINGS, *(_cells(row, arrow) for row in rows)]
    if any(row.interval for row in rows):
        lines[0] = (*_HEADINGS[:2], "zero-shot (95 % interval)", *_HEADINGS[3:])
    for name, heading in _TOKENS.items():
        scores: list[TokenScore | None] = [getattr(row, name) for row in rows]
        if any(score is not None for score in scores):
            lines = [(*line, cell) for line, cell in zip(lines, [heading, *map(_token_cell, scores)], strict=True)]
    return lines


def _token_cell(token: TokenScore | None) -> str:
    return "-" if token is None else f"{token} %"


def _percent(score: float, std: float | None = None) -> str:
    return f"{100 * score:.1f}" if std is None else f"{100 * score:.1f} ± {100 * std:.1f}"


def _aligned(line: Sequence[str], widths: Sequence[int], left: int) -> str:
    """The first columns left-aligned, numbers right-aligned."""
    cells = [
        cell.ljust(width) if column < left else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def _cells(row: Row, arrow: str) -> tuple[str, ...]:
    task = row.task if row.anchor is None else f"{row.task} of {row.anchor}"
    task = task if row.protocol == "held_out" else f"{task} ({row.protocol})"
    ratio = "-" if math.isnan(row.ratio) else f"{row.ratio:.2f}"
    return (
        task,
        f"{row.source} {arrow} {row.target}",
        f"{_percent(row.score, row.std)}{'' if row.interval is None else f' ({_interval(*row.interval)})'} %",
        f"{_percent(row.same_modality)} %",
        f"{_percent(row.chance)} %",
        ratio,
    )
