"""The page of the leaderboard: tables, a picture, and the paper's claims in words that follow from the rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unicode_fast.report import plots
from unicode_fast.report.ablation import t_interval
from unicode_fast.report.markdown import grid, linked, markdown
from unicode_fast.tasks import Row

# Points of mean zero-shot accuracy by which a method must be above the Baseline; fixed before the first run.
MARGIN = 5.0
BASELINE, UNI_CODE, RECOMMENDED = "Baseline", "Uni-Code", "Uni-Code (recommended)"
TOC = "Uni-Code + TOC"
LATER = ("MICU", "FCID", "CoDAAR", "H-DCID")
COMPARED = ("S-MiT", "MST", "CODIS", "TURN", "CMCM")
PUBLISHED = (BASELINE, *COMPARED, *(f"DCID+{name}" for name in COMPARED), UNI_CODE)
MAIN = "classification"
RULE = (
    "Each seed of one row is compared with the same seed of the other, over the directions that both have. The 95 % "
    "interval is Student's over seeds, not corrected for the number of comparisons. A row is better if the interval of "
    "the difference in mean zero-shot accuracy of classification is above zero, worse if it is below zero, and else "
    "undecided."
)


@dataclass(frozen=True)
class Standing:
    """A row of the leaderboard.

    Attributes:
        label: of the method.
        by_seed: scores of each finished seed, at least one.
        numbers: of each finished seed: `parameters`, `step_seconds`, `seconds`, where known.
    """

    label: str
    by_seed: dict[int, list[Row]]
    numbers: Mapping[int, Mapping[str, Any]]

    def number(self, name: str) -> float | None:
        """Median over seeds; None where no seed has it."""
        found = [numbers[name] for numbers in self.numbers.values() if name in numbers]
        return statistics.median(found) if found else None

    def directions(self, task: str) -> set[str]:
        """The directions of a task."""
        return {row.direction for rows in self.by_seed.values() for row in rows if row.task == task}

    def means(self, task: str, *, tokens: bool = False, directions: set[str] | None = None) -> dict[int, float]:
        """By seed, the mean score of a task over directions in per cent; seeds without such a score are left out.

        Args:
            task: its name.
            tokens: scores of one-hot codes.
            directions: such as audio->video; None takes all.
        """
        found = {}
        for seed, rows in self.by_seed.items():
            those = [row for row in rows if row.task == task and (directions is None or row.direction in directions)]
            scores = [_score(row, tokens) for row in those]
            if scores and None not in scores:
                found[seed] = 100 * statistics.fmean(score for score in scores if score is not None)
        return found


def _score(row: Row, tokens: bool) -> float | None:
    if not tokens:
        return row.score
    return None if row.token is None else row.token.score


@dataclass(frozen=True)
class Difference:
    """A comparison of two rows, in points, over the seeds of both.

    Attributes:
        what: the comparison in words.
        by_seed: differences of mean zero-shot accuracy of classification.
        tokens: the same for token scores.
        localisation: the same for localisation; empty where there is none.
    """

    what: str
    by_seed: list[float]
    tokens: list[float]
    localisation: list[float]

    @property
    def finding(self) -> str:
        """By RULE: better, worse, undecided, or that there are too few seeds."""
        interval = t_interval(self.by_seed)
        if interval is None:
            return "one seed decides nothing" if self.by_seed else "not run yet"
        low, high = interval
        return "better" if low > 0 else "worse" if high < 0 else "undecided"


def difference(what: str, one: Standing | None, other: Standing | None) -> Difference:
    """`one` minus `other`, over the directions of both; without numbers where one is missing."""

    def points(task: str, tokens: bool = False) -> list[float]:
        if one is None or other is None:
            return []
        both = one.directions(task) & other.directions(task)
        first, second = (standing.means(task, tokens=tokens, directions=both) for standing in (one, other))
        return [first[seed] - second[seed] for seed in first if seed in second]

    return Difference(what, points(MAIN), points(MAIN, True), points("localisation"))


def difference_cells(found: Sequence[Difference]) -> list[list[str]]:
    """Heading and lines of comparisons."""
    heading = ["comparison", "seeds", "classification", "95 % interval", "tokens", "localisation", "finding"]
    lines = []
    for one in found:
        interval = t_interval(one.by_seed)
        shown = [_signed(one.by_seed), "-" if interval is None else f"{interval[0]:+.1f} to {interval[1]:+.1f}"]
        others = [_signed(one.tokens), _signed(one.localisation)]
        lines.append([one.what, str(len(one.by_seed)), *shown, *others, one.finding])
    return [heading, *lines]


def _signed(points: Sequence[float]) -> str:
    return f"{statistics.fmean(points):+.1f}" if points else "-"


def spread(values: Iterable[float], digits: int = 1) -> str:
    """Mean and half of Student's 95 % interval; a single value without it, and a dash for none."""
    values = list(values)
    if not values:
        return "-"
    interval, mean = t_interval(values), statistics.fmean(values)
    return f"{mean:.{digits}f}" + ("" if interval is None else f" ± {interval[1] - mean:.{digits}f}")


def tasks_of(standings: Sequence[Standing]) -> list[str]:
    """The tasks of all rows, in their order."""
    rows = (row for standing in standings for rows in standing.by_seed.values() for row in rows)
    return list(dict.fromkeys(row.task for row in rows))


def has_tokens(standings: Sequence[Standing], task: str) -> bool:
    """Whether some row has token scores of a task."""
    return any(standing.means(task, tokens=True) for standing in standings)


def summary_cells(standings: Sequence[Standing]) -> list[list[str]]:
    """Heading and lines of means over directions, with costs."""
    tasks, lines = tasks_of(standings), []
    for standing in standings:
        cells = {}
        for task in tasks:
            cells[task] = spread(standing.means(task).values())
            if has_tokens(standings, task):
                cells[f"{task}, tokens"] = spread(standing.means(task, tokens=True).values())
        parameters, step, seconds = map(standing.number, ("parameters", "step_seconds", "seconds"))
        cells["parameters"] = "-" if parameters is None else f"{parameters / 1e6:.2f} M"
        cells["seconds a step"] = "-" if step is None else f"{step:.3f}"
        # A row without steps of its own measures another row's runs.
        cells["minutes a run"] = "-" if seconds is None or step is None else f"{seconds / 60:.1f}"
        lines.append(([standing.label, str(len(standing.by_seed))], cells))
    return grid(["method", "seeds"], [head for _, cells in lines for head in cells], lines)


def direction_cells(standings: Sequence[Standing], task: str, tokens: bool = False) -> list[list[str]]:
    """Heading and lines of the scores of a task, a column for each direction; the last line is chance."""
    lines, chance = [], {}
    for standing in standings:
        scores: dict[str, list[float]] = {}
        for row in (row for rows in standing.by_seed.values() for row in rows if row.task == task):
            score = _score(row, tokens)
            if score is not None:
                scores.setdefault(f"{row.source} → {row.target}", []).append(100 * score)
                chance[f"{row.source} → {row.target}"] = f"{100 * row.chance:.1f}"
        lines.append(([standing.label], {place: spread(values) for place, values in scores.items()}))
    return grid(["method"], chance, [*lines, (["chance"], chance)])


def dcid_claim(found: Mapping[str, Standing]) -> list[str]:
    """Whether CLUB and Cross-CPC help every comparison method."""
    compared = [difference(f"DCID+{name} − {name}", found.get(f"DCID+{name}"), found.get(name)) for name in COMPARED]
    by_finding = _grouped(compared, lambda one: one.what.partition(" − ")[2])
    if set(by_finding) == {"better"}:
        answer = "Yes: it is better with DCID for each of the five methods."
    elif "worse" in by_finding:
        answer = f"No: it is worse with DCID for {by_finding['worse']}."
    else:
        answer = "Not shown for every method."
    return [
        "### Does DCID help every method?",
        f"{answer} {_sentence(by_finding)}",
        markdown(difference_cells(compared)),
    ]


def first_claim(found: Mapping[str, Standing], label: str, others: Sequence[str], among: str) -> list[str]:
    """Whether a row is first among others."""
    title = f"### Is {label} first among {among}?"
    means = {name: statistics.fmean(found[name].means(MAIN).values()) for name in (label, *others) if name in found}
    if label not in means:
        return [title, f"{label} is not run yet."]
    compared = [difference(f"{label} − {name}", found[label], found.get(name)) for name in others]
    by_finding = _grouped(compared, lambda one: one.what.partition(" − ")[2])
    rank = 1 + sum(mean > means[label] for mean in means.values())
    place = f"Its mean is number {rank} of {len(means)}."
    if "worse" in by_finding:
        answer = f"No: it is worse than {by_finding['worse']}."
    elif rank == 1 and set(by_finding) == {"better"}:
        answer = "Yes: it is better than each of them."
    else:
        answer = "Not decided."
    return [title, f"{answer} {place} {_sentence(by_finding)}", markdown(difference_cells(compared))]


def pair_claim(title: str, compared: Difference, note: str) -> list[str]:
    """Whether one row is better than another."""
    answers = {"better": "Yes.", "worse": "No: the scores are lower with it.", "undecided": "Not decided."}
    answer = answers.get(compared.finding, f"Not decided: {compared.finding}.")
    return [title, f"{answer} {note}", markdown(difference_cells([compared]))]


def two_modalities(names: Sequence[str]) -> str:
    """Label of the row with the first two modalities."""
    return f"{UNI_CODE} ({' and '.join(names[:2])})"


def margin_claim(found: Mapping[str, Standing]) -> list[str]:
    """Which rows are above the Baseline by MARGIN."""
    title = f"### Which methods are above the {BASELINE} by {MARGIN:g} points?"
    if BASELINE not in found:
        return [title, f"{BASELINE} is not run yet."]
    cells = [["method", "seeds", "above the Baseline", "95 % interval", f"{MARGIN:g} points"]]
    for name in (name for name in found if name != BASELINE):
        points = difference(name, found[name], found[BASELINE]).by_seed
        if points:
            interval = t_interval(points)
            shown = "-" if interval is None else f"{interval[0]:+.1f} to {interval[1]:+.1f}"
            met = "one seed decides nothing"
            if interval is not None:
                met = "met" if statistics.fmean(points) >= MARGIN and interval[0] > 0 else "not met"
            cells.append([name, str(len(points)), _signed(points), shown, met])
    rule = (
        f"The margin was fixed beforehand: {MARGIN:g} points of mean zero-shot accuracy over directions and seeds. It "
        "is met if the mean difference reaches it and the interval of the difference is above zero."
    )
    missed = [line[0] for line in cells[1:] if line[-1] == "not met"]
    return [title, f"{rule} Not met by: {', '.join(missed) or 'none with two seeds'}.", markdown(cells)]


def _grouped(compared: Sequence[Difference], name: Callable[[Difference], str]) -> dict[str, str]:
    """Names of the other rows by finding."""
    found: dict[str, list[str]] = {}
    for one in compared:
        found.setdefault(one.finding, []).append(name(one))
    return {finding: ", ".join(names) for finding, names in found.items()}


def _sentence(by_finding: Mapping[str, str]) -> str:
    return " ".join(f"{finding.capitalize()}: {names}." for finding, names in by_finding.items())


def page(  # noqa: PLR0913 - what the page is about
    heading: str,
    introduction: Sequence[str],
    standings: Sequence[Standing],
    missing: Sequence[str],
    names: Sequence[str],
    picture: str,
) -> str:
    """The page in Markdown.

    Args:
        heading: its first line.
        introduction: paragraphs after it.
        standings: finished rows.
        missing: names of unfinished ones, with their seeds.
        names: the modalities of the data.
        picture: its file.
    """
    text = [heading, *introduction]
    if missing:
        text.append(f"Not run yet: {'; '.join(missing)}.")
    if not standings:
        return "\n\n".join(text) + "\n"
    found = {standing.label: standing for standing in standings}
    text += [linked("Mean zero-shot scores of each method", picture), "## Means over directions"]
    text += [markdown(summary_cells(standings)), _NOTE, "## Claims", RULE, *dcid_claim(found)]
    table_1 = [name for name in PUBLISHED if name != UNI_CODE]
    text += first_claim(found, UNI_CODE, table_1, "the methods of the paper's Table 1")
    title = f"### Is {UNI_CODE} better than the later methods?"
    text += [title, *first_claim(found, UNI_CODE, LATER, "the later methods")[1:]]
    text += first_claim(found, RECOMMENDED, [*PUBLISHED, *LATER], "all methods")
    if len(names) > 2:
        two = found.get(two_modalities(names))
        third = difference(f"{UNI_CODE}, {len(names)} modalities − two", found.get(UNI_CODE), two)
        note = f"Scores are those between {' and '.join(names[:2])}."
        text += pair_claim("### Does a third modality help?", third, note)
    toc = difference(f"{TOC} − {UNI_CODE}", found.get(TOC), found.get(UNI_CODE))
    text += pair_claim("### Does a selection of channels (TOC) help?", toc, "Token scores do not depend on it.")
    text += margin_claim(found)
    for task in tasks_of(standings):
        text += [f"## {task.capitalize()}: {plots.metric_of(task)} by direction"]
        text.append(markdown(direction_cells(standings, task)))
        if has_tokens(standings, task):
            text += ["Token scores:", markdown(direction_cells(standings, task, True))]
    return "\n\n".join(text) + "\n"


_NOTE = (
    "Scores are zero-shot, in per cent: means over directions and seeds, and half of Student's 95 % interval over "
    "seeds. A row of two modalities has their directions only. Token scores are those of probes on one-hot codes. "
    "Parameters are those that a run trains. Times are medians over seeds; a step's is that of pre-training, a run's "
    "includes the probes. With `--jobs` above 1, runs share the machine, and times include that."
)


def draw(standings: Sequence[Standing], path: Path) -> None:
    """Writes the picture: classification and localisation of each row, codewords and tokens."""
    scores: dict[str, dict[str, dict[str, tuple[float, float | None]]]] = {}
    chance: dict[str, float] = {}
    for task in tasks_of(standings):
        for standing in standings:
            for kind, tokens in (("codewords", False), ("tokens", True)):
                values = [value / 100 for value in standing.means(task, tokens=tokens).values()]
                interval = t_interval(values)
                if values:
                    mean = statistics.fmean(values)
                    half = None if interval is None else interval[1] - mean
                    scores.setdefault(task, {}).setdefault(standing.label, {})[kind] = mean, half
        chances = [r.chance for one in standings for rows in one.by_seed.values() for r in rows if r.task == task]
        chance[task] = statistics.fmean(chances) if chances else math.nan
    plots.save_figure(plots.method_bars(scores, chance), path)
