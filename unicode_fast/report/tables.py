"""The paper's tables from runs: `python -m unicode_fast.report RUN... --out FOLDER`.

Rows are runs, averaged over seeds; columns are tasks and directions. Published numbers of the same data set are below
the runs; those of other data sets are in a separate table. The input is run folders of `unicode_fast.train` and
`unicode_fast.evaluate`.
"""

from __future__ import annotations

import csv
import io
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from unicode_fast import health
from unicode_fast.checkpoint import CheckpointError
from unicode_fast.cli import resolve_saved
from unicode_fast.config import EXECUTION_FIELDS, Config
from unicode_fast.errors import Parser, of_command_line, program, say
from unicode_fast.files.paths import with_homes
from unicode_fast.files.writing import atomic_folder, write_text
from unicode_fast.methods import row_name
from unicode_fast.presets import usual
from unicode_fast.report import plots
from unicode_fast.report.markdown import grid, linked, markdown
from unicode_fast.report.published import LABEL, LAYOUTS, TASKS, UNI_CODE, Published, published
from unicode_fast.tasks import Row, TokenScore
from unicode_fast.tasks.table import mean_token, token_cell
from unicode_fast.training.runs import EVALUATIONS, read_seeds, run_file

# Fields without influence on what is trained.
_NOT_IN_LABELS = ("seed", "validations", "probe_tasks", *EXECUTION_FIELDS)
# Pictures of a run to copy into a report, if they exist.
_PICTURES = ("timeline", "segmentation", "retrieval", "code-usage")


@dataclass(frozen=True)
class Column:
    """The column of a number: task, direction, protocol, and other flags."""

    task: str
    source: str
    target: str
    protocol: str
    note: str = ""
    # The published data set of the number, by its layout.
    dataset: str | None = None

    def __str__(self) -> str:
        notes = [self.note, "" if self.protocol == "held_out" else self.protocol]
        note = ", ".join(note for note in notes if note)
        return f"{self.task} {self.source} → {self.target}" + (f" ({note})" if note else "")


@dataclass(frozen=True)
class Cell:
    """Fractions: mean and sample standard deviation of the zero-shot score over seeds, and other scores.

    second: the task's other published measure, if every seed's row has it. measure: the name of `second`. token,
    content_token: as in a row, if every seed's row has them.
    """

    score: float
    std: float | None
    seeds: int
    same_modality: float
    chance: float
    second: float | None = None
    measure: str = ""
    token: TokenScore | None = None
    content_token: TokenScore | None = None

    def __str__(self) -> str:
        mean = f"{100 * self.score:.1f}" + ("" if self.std is None else f" ± {100 * self.std:.1f}")
        return mean if self.second is None else f"{mean} ({self.measure} {100 * self.second:.1f})"


@dataclass(frozen=True)
class Line:
    """Runs that differ only in their seeds.

    label: what differs from the other lines. common: what all lines have.
    """

    label: str
    folders: list[Path]
    cells: dict[Column, Cell]
    method: str = UNI_CODE
    common: str = ""


def single_runs(paths: Iterable[str]) -> list[Path]:
    """The folders of single runs; a folder of several seeds is replaced by its runs.

    Raises:
        CheckpointError: a folder is no finished run.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not (path / "config.yaml").is_file():
            raise CheckpointError(f"run must be a run folder with a config.yaml, got {str(path)!r}")
        seeds = path / "seeds.json"
        below = [path / f"seed-{seed}" for seed in read_seeds(seeds)] if seeds.exists() else [path]
        for folder in below:
            if not (folder / "summary.json").is_file():
                raise CheckpointError(f"run must be finished, {str(folder)!r} has no summary.json; use --resume")
        found += below
    once: dict[Path, Path] = {}
    for folder in found:
        once.setdefault(folder.resolve(), folder)
    return list(once.values())


def run_config(folder: Path) -> Config:
    """The configuration of a run."""
    return resolve_saved(str(folder / "config.yaml"))


def parts_of(config: Config) -> dict[str, str]:
    """What a label can say of a run: its method, preset and size, and read fields with other values than theirs."""
    standard, values, unread = usual(config).flat(), config.flat(), config.unread_fields()
    values["data"] = short(values["data"])
    rules = config.preset if config.size == "small" else f"{config.preset} ({config.size} size)"
    parts = {"method": row_name(config.method.method, config.method.dcid), "preset": rules}
    changed = (name for name in values if values[name] != standard[name])
    return parts | {name: f"{name} {values[name]}" for name in changed if name not in (*_NOT_IN_LABELS, *unread)}


def labels_of(configs: Sequence[Config]) -> tuple[list[str], str]:
    """Labels of runs with the parts that differ between them, and the parts in common.

    A run without such a part has its preset as its label, and a single run all its parts, but for the method Uni-Code.
    """
    parts = [parts_of(config) for config in configs]
    if len(configs) == 1:
        return [", ".join(parts[0].values()).removeprefix(f"{UNI_CODE}, ")], ""
    values = [{**config.flat(), "data": short(config.data.data)} for config in configs]
    differing = {name for one in values for name in one if one[name] != values[0][name]}
    differing |= {part for part, name in (("method", "dcid"), ("preset", "size")) if name in differing}
    labels = [", ".join(text for name, text in one.items() if name in differing) or one["preset"] for one in parts]
    common = {name: text for one in parts for name, text in one.items() if name not in differing}
    return labels, ", ".join(common.values())


def rows_of(folder: Path) -> dict[Column, Row]:
    """All scores of a run folder: those of its summary and those measured later."""
    found = {}
    data = run_config(folder).data.data
    with run_file(folder / "summary.json") as summary:
        own = summary.get("dataset", short(data))
        for values in summary["rows"]:
            row = Row.from_dict(values)
            found[Column(row.task, row.source, row.target, row.protocol, dataset=published_as(row.task, own))] = row
    for file in sorted((folder / EVALUATIONS).glob("*.json")):
        with run_file(file) as content:
            row = Row.from_dict(content["row"])
            # Shares such as 3:1 are no layout with its folder.
            flags = {k: f"{v}" if k.startswith("toc_") else short(f"{v}") for k, v in content["flags"].items()}
            note = ", ".join(f"{name} {value}" for name, value in flags.items())
            dataset = published_as(row.task, content.get("dataset", flags.get("data", own)))
        column = Column(row.task, row.source, row.target, row.protocol, note, dataset)
        if column in found and note:
            # Data folders of the same name.
            column = replace(column, note=", ".join(f"{name} {value}" for name, value in content["flags"].items()))
        found[column] = row
    return found


def short(value: str) -> str:
    """A layout without its folder, or the name of a folder without its parents."""
    layout, colon, _ = value.partition(":")
    return layout if colon else Path(value).name


def published_as(task: str, name: str) -> str | None:
    """The published data set of this name; None for other data, such as the built-in sets."""
    dataset = LAYOUTS.get(name)
    return dataset if dataset is not None and TASKS[dataset][0] == task else None


def collect(folders: Sequence[Path]) -> list[Line]:
    """One line for runs that differ only in their seed, in the order given."""
    groups: dict[tuple[str, ...], list[Path]] = {}
    for folder in folders:
        groups.setdefault(tuple(parts_of(run_config(folder)).values()), []).append(folder)
    labels, common = labels_of([run_config(members[0]) for members in groups.values()])
    lines = []
    for label, members in zip(labels, groups.values(), strict=True):
        by_seed: dict[int, Path] = {}
        for folder in members:
            seed = run_config(folder).train.seed
            if seed in by_seed:
                raise CheckpointError(
                    f"runs that differ in nothing else must differ in their seed, {str(by_seed[seed])!r} and "
                    f"{str(folder)!r} both have seed {seed}"
                )
            by_seed[seed] = folder
        rows = [rows_of(folder) for folder in members]
        empty = [folder for folder, found in zip(members, rows, strict=True) if not found]
        if empty:
            raise CheckpointError(
                f"run must have scores, {str(empty[0])!r} has none, as with --probe_tasks none; "
                "measure them with unicode_fast.evaluate"
            )
        columns = dict.fromkeys(column for one in rows for column in one)
        cells = {column: cell_of([one[column] for one in rows if column in one]) for column in columns}
        method = run_config(members[0]).method
        lines.append(Line(label, members, cells, row_name(method.method, method.dcid), common))
    return lines


def cell_of(rows: Sequence[Row]) -> Cell:
    """One direction of several seeds."""
    scores = [row.score for row in rows]
    measure, key = second_measure(rows[0])
    second = [row.metrics[key].value for row in rows if key in row.metrics]
    return Cell(
        statistics.fmean(scores),
        statistics.stdev(scores) if len(scores) > 1 else None,
        len(scores),
        statistics.fmean(row.same_modality for row in rows),
        statistics.fmean(row.chance for row in rows),
        statistics.fmean(second) if len(second) == len(rows) else None,
        measure,
        mean_token([row.token for row in rows]),
        mean_token([row.content_token for row in rows]),
    )


def second_measure(row: Row) -> tuple[str, str]:
    """The other published measure of a row's task, and its key in the row's metrics; "" for none.

    Precision of localisation follows the published formula, background included.
    """
    if row.task == "localisation" and row.protocol == "held_out":
        return "precision", "official_precision"
    if row.task == "segmentation":
        return "F-score", "f_score" if row.protocol == "held_out" else "official_f_score"
    if row.task == "retrieval":
        query, gallery = (row.source, row.target) if row.anchor is None else (row.target, row.anchor)
        return "R@5", f"{query}->{gallery} R@5"
    return "", ""


def published_lines(lines: Iterable[Line]) -> dict[str, dict[Column, list[Published]]]:
    """The paper's numbers of the lines' methods by pre-training data and method, each in its nearest column.

    The main measure of a task is the first in its column.
    """
    lines = list(lines)
    methods, nearest = {line.method for line in lines}, dict[tuple[str | None, str, str], Column]()
    for column in sorted((column for line in lines for column in line.cells), key=_distance):
        nearest.setdefault((column.dataset, column.source, column.target), column)
    found: dict[str, dict[Column, list[Published]]] = {}
    for number in published():
        place = (number.dataset, number.source, number.target)
        if place in nearest and number.method in methods and number.table != 2:
            who = number.pretraining + (f", {number.method}" if methods != {UNI_CODE} else "")
            found.setdefault(who, {}).setdefault(nearest[place], []).append(number)
    return found


def shown_published(numbers: Sequence[Published], named: bool = True) -> str:
    """The paper's numbers of a column, in per cent.

    Args:
        numbers: at least one.
        named: with data set and measure of the first. Several numbers always have their measures.
    """
    first, *others = numbers
    if not named:
        return "; ".join(f"{number.measure} {number.score:g}" for number in numbers) if others else f"{first.score:g}"
    words = [f"{first.dataset}, {first.measure}", *(f"{number.measure} {number.score:g}" for number in others)]
    return f"{first.score:g} ({'; '.join(words)})"


def _distance(column: Column) -> tuple[bool, int]:
    """Distance of a column from the paper's setting: another protocol, then flags."""
    return column.protocol != "official", len(column.note)


def other_published(lines: Iterable[Line]) -> list[list[str]] | None:
    """Heading and lines of the paper's numbers of the same tasks on data sets without a column; None for none.

    Numbers of Uni-Code come first, then those of the lines' other methods.
    """
    lines = list(lines)
    methods = list(dict.fromkeys([UNI_CODE, *(line.method for line in lines)]))
    columns = [column for line in lines for column in line.cells]
    tasks, datasets = ({getattr(column, name) for column in columns} for name in ("task", "dataset"))
    found = [
        number
        for number in published()
        if number.method in methods and number.table != 2 and number.task in tasks and number.dataset not in datasets
    ]
    if not found:
        return None
    found.sort(key=lambda number: methods.index(number.method))
    heads = [f"{number.dataset} {number.source} → {number.target}" for number in found]
    shown: dict[tuple[str, str], dict[str, str]] = {}
    for head, number in zip(heads, found, strict=True):
        cells = shown.setdefault((number.method, number.pretraining), {})
        score = f"{number.measure} {number.score:g}"
        cells[head] = f"{cells[head]}; {score}" if head in cells else score
    return grid(["method", "pre-trained on"], heads, shown.items())


def shown_of(cell: Cell, seeds: int) -> str:
    """A cell of the table, with its number of seeds if the line has more."""
    return f"{cell}" if cell.seeds == seeds else f"{cell} ({cell.seeds} of {seeds} seeds)"


def wide_table(lines: Sequence[Line]) -> list[list[str]]:
    """Heading and lines: runs, then published numbers of the same data sets; numbers in per cent."""
    shown = []
    for line in lines:
        seeds = max(cell.seeds for cell in line.cells.values())
        shown.append(([line.label, str(seeds)], {column: shown_of(cell, seeds) for column, cell in line.cells.items()}))
    columns = [column for line in lines for column in line.cells]
    for pretraining, numbers in published_lines(lines).items():
        theirs = {column: shown_published(several) for column, several in numbers.items()}
        shown.append(([f"{LABEL}, {pretraining}", "-"], theirs))
    return grid(["run", "seeds"], columns, shown)


def token_table(lines: Sequence[Line]) -> list[list[str]] | None:
    """Heading and lines of token scores, content words in brackets; None where no run has any."""
    shown = []
    for line in lines:
        cells = {at: token_cell(cell.token, cell.content_token) for at, cell in line.cells.items() if cell.token}
        shown.append(([line.label], cells))
    columns = [column for _, cells in shown for column in cells]
    return grid(["run"], columns, shown) if columns else None


def long_table(lines: Sequence[Line]) -> list[list[str]]:
    """One line per number, in fractions, with published numbers of the same data sets; for a spreadsheet."""
    heading = "run,task,source,target,protocol,note,measure,seeds,score,std,same_modality,chance"
    cells = [heading.split(",")]
    for line in lines:
        for column, cell in line.cells.items():
            where = [column.task, column.source, column.target, column.protocol, column.note, ""]
            numbers = [cell.score, "" if cell.std is None else cell.std, cell.same_modality, cell.chance]
            cells.append([line.label, *where, str(cell.seeds), *map(str, numbers)])
            if cell.second is not None:
                cells.append([line.label, *where[:-1], cell.measure, str(cell.seeds), str(cell.second), "", "", ""])
            for name, token in (("token", cell.token), ("token of content words", cell.content_token)):
                if token is not None:
                    std = "" if token.std is None else str(token.std)
                    shares = [str(token.score), std, str(token.same_modality), str(cell.chance)]
                    cells.append([line.label, *where[:-1], name, str(cell.seeds), *shares])
    for pretraining, found in published_lines(lines).items():
        for number in (number for several in found.values() for number in several):
            where = [number.task, number.source, number.target, "official", number.dataset, number.measure]
            cells.append([f"{LABEL}, {pretraining}", *where, "", f"{number.score / 100:g}", "", "", ""])
    return cells


def warnings_of(line: Line) -> list[str]:
    """Warnings about the scores of runs, each once; those of scores at chance are found anew, with later scores."""
    found = []
    for folder in line.folders:
        with run_file(folder / "summary.json") as summary:
            saved = map(str, summary.get("warnings", []))
            found += [warning for warning in saved if "not above chance" not in warning]
        found += health.at_chance(list(rows_of(folder).values()))
    return list(dict.fromkeys(found))


def copy_pictures(lines: Sequence[Line], out: Path) -> list[str]:
    """Copies the pictures of the first run of each line into the report, and returns Markdown links to them.

    Raises:
        CheckpointError: a picture is no file, or a link, which could point to any file of this machine.
    """
    shown = []
    for number, line in enumerate(lines):
        for name in _PICTURES:
            files = (line.folders[0] / "plots").glob(f"{name}*.*")
            for file in sorted(file for file in files if file.suffix[1:] in plots.FORMATS):
                copy = f"{number}-{file.name}"
                if file.is_symlink() or not file.is_file():
                    raise CheckpointError(f"picture {file} must be a file of the run itself, got a link or no file")
                shutil.copyfile(file, out / copy)
                shown.append(linked(f"{name} of {line.label}", copy))
    return shown


def write_report(lines: Sequence[Line], out: Path, kind: str = "png") -> None:
    """report.md, report.csv, the figure, in one of `plots.FORMATS`, and the runs' pictures, in a new folder."""
    with atomic_folder(out) as inside:
        _write_files(lines, inside, kind)


def _write_files(lines: Sequence[Line], out: Path, kind: str) -> None:
    note = (
        "Zero-shot scores in per cent: mean and, for several seeds, sample standard deviation. Scores are accuracy "
        "of classification, micro-F1 of localisation, HOS (official: H) of open-set classification, mIoU of "
        "segmentation, R@10 of retrieval. Brackets hold the "
        "paper's other measures, if `evaluate` has measured them: precision of localisation by the paper's formula, "
        "background included; F-score; R@5."
    )
    if published_lines(lines):
        note += (
            f" Lines called {LABEL} have the data set and the measure in brackets; some are taken on training clips. "
            "Each number stands once, in a column of the same data set, of the official protocol if there is one."
        )
    unknown = sorted({line.method for line in lines} - {number.method for number in published()})
    if unknown:
        note += f" Published numbers of {', '.join(unknown)} are not known to this library."
    text = [
        "# Report",
        *([f"All runs: {lines[0].common}."] if lines[0].common else []),
        markdown(wide_table(lines)),
        note,
    ]
    tokens = token_table(lines)
    if tokens is not None:
        text += [
            markdown(tokens),
            "Token scores: the same for probes on one-hot codes. After a slash, the probe is trained and tested on the "
            "target. In brackets, it reads only the words of a sentence that name a class.",
        ]
    warnings = [f"- {line.label}: {warning}" for line in lines for warning in warnings_of(line)]
    if warnings:
        text += ["Doubtful scores:", "\n".join(warnings)]
    text.append(linked("Scores", f"report.{kind}"))
    series = figure_series(lines)
    theirs = [name for name in series if name.startswith(LABEL)]
    plots.save_figure(plots.report_bars(series, hatched=theirs), out / f"report.{kind}")
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(long_table(lines))
    write_text(out / "report.csv", table.getvalue())
    text += copy_pictures(lines, out)
    others = other_published(lines)
    if others is not None:
        text += [
            "## Published numbers of other data sets",
            f"These numbers, {LABEL}, are those of Uni-Code and of the methods above. They are of other data sets than "
            "the scores above, and are not comparable with them.",
            markdown(others),
        ]
    write_text(out / "report.md", "\n\n".join(text) + "\n")


def figure_series(lines: Sequence[Line]) -> Mapping[str, Mapping[tuple[str, str], tuple[float, float | None]]]:
    """Score and spread by series, then by (task, direction): runs, then published numbers of the same data sets."""
    series: dict[str, dict[tuple[str, str], tuple[float, float | None]]] = {}

    def place(column: Column) -> tuple[str, str]:
        return column.task, str(column).removeprefix(f"{column.task} ")

    for line in lines:
        every = sorted({cell.seeds for cell in line.cells.values()})
        seeds = " to ".join(map(str, dict.fromkeys((every[0], every[-1]))))
        series[f"{line.label}, n = {seeds}"] = {
            place(column): (cell.score, cell.std) for column, cell in line.cells.items()
        }
    for pretraining, numbers in published_lines(lines).items():
        series[f"{LABEL}, {pretraining}"] = {
            place(column): (several[0].score / 100, None) for column, several in numbers.items()
        }
    return series


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `python -m unicode_fast.report --help`."""
    parser = Parser(prog=program("report"), description="The paper's tables, made from runs.")
    parser.add_argument("runs", nargs="+", help="run folders that unicode_fast.train has written")
    parser.add_argument("--out", help="new folder of the report (required)")
    parser.add_argument("--format", default="png", help=plots.FORMAT_HELP)
    arguments = parser.parse_args(with_homes(argv))
    with of_command_line():
        plots.check_format(arguments.format)
    if arguments.out is None:
        parser.error("the following arguments are required: --out")
    out = Path(arguments.out)
    if out.exists():
        raise ValueError(f"out must be a folder that does not exist yet, got {arguments.out!r}")
    lines = collect(single_runs(arguments.runs))
    write_report(lines, out, arguments.format)
    say((out / "report.md").read_text(encoding="utf-8").rstrip())
    say(out)
    return 0
