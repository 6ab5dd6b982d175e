"""The commands of the paper's tables on the public features: `python -m unicode_fast.reproduce --table 1`.

Without `--run` it prints them in order, with estimates and the published numbers. With `--run` it checks the data, runs
every command that has not finished in a process of its own, and writes our scores beside the published ones.
"""

from __future__ import annotations

import math
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from unicode_fast.cli import given_fields, make_parser, read_yaml, resolve, shown, with_underscores
from unicode_fast.config import EXECUTION_FIELDS, Config, Modality
from unicode_fast.errors import Parser, UsageError, few, of_command_line, program, run_main, say
from unicode_fast.files.writing import write_text
from unicode_fast.many_runs import held
from unicode_fast.report.markdown import grid, markdown
from unicode_fast.report.published import LABEL, Published
from unicode_fast.report.tables import cell_of, shown_published
from unicode_fast.table_commands import FLAGS, LABELLED, OWN_FIELDS, Command, Table, column_of, fields_of
from unicode_fast.tasks import PROTOCOLS, Row
from unicode_fast.tasks.runner import PROBE_TASKS, SEGMENTATION, probe_task
from unicode_fast.tasks.segmentation.backbones import check_backbone
from unicode_fast.training.estimates import Contents, look, probe_clips, run_gigabytes, seconds_per_step

# The forward pass of one modality, as a share of a training step.
_FORWARD = 1 / 3


class Estimate:
    """Hours and gigabytes of commands.

    Args:
        table: whose commands they are.
        contents: of its data sets, by spec.
        seconds: of a training step; None measures it when it is first needed.

    Attributes:
        how: a text on the seconds of a step, by modalities; "" for all.
    """

    def __init__(self, table: Table, contents: Mapping[str, Contents], seconds: float | None) -> None:
        self.table, self.contents, self.seconds = table, contents, seconds
        self.how = {} if seconds is None else {"": f"{seconds:g} s, given by --seconds_per_step"}
        self._measured: dict[str, float] = {}

    def step(self, config: Config) -> float:
        """Seconds of a step of Uni-Code on the modalities of a run; NaN where the memory is too small."""
        names = config.data.modalities
        if self.seconds is not None:
            return self.seconds
        if names not in self._measured:
            fields = self.table.read(names.split(","), {})
            complete = resolve(None, {**fields, "data": config.data.data, "modalities": names})
            try:
                self._measured[names], how = seconds_per_step(complete, self.shapes(config))
                self.how[names] = f"{self._measured[names]:.3g} s of {names}, {how}"
            except (MemoryError, RuntimeError) as error:
                self._measured[names], self.how[names] = math.nan, f"of {names} not measured: {error!s:.80}"
        return self._measured[names]

    def shapes(self, config: Config) -> dict[str, Modality]:
        """Kinds and shapes of the modalities of a run."""
        shapes = self.contents[config.data.data].shapes
        return {name: shapes[name] for name in config.data.modalities.split(",")}

    def training(self, config: Config) -> tuple[int, float, float]:
        """Steps, hours and gigabytes of the folder of a run."""
        contents, size = self.contents[config.data.data], config.train.batch_size
        clips = contents.splits.get(config.data.train_split, max(contents.clips.values(), default=0))
        epoch = -(-clips // size) if config.train.keep_last_batch else clips // size
        steps = config.train.steps or config.train.epochs * epoch
        return steps, steps * self.step(config) / 3600, run_gigabytes(config, self.shapes(config))

    def evaluation(self, command: Command, config: Config) -> float:
        """Hours of the encoder for the zero-shot score and that of the same modality; NaN is unknown."""
        task, official = command.arguments.task, self.table.protocol == "official"
        epochs = probe_task(task, "official").rule.epochs if task in PROBE_TASKS and official else 1
        clips = probe_clips(self.contents[command.arguments.data or config.data.data])
        return 2 * epochs * (clips or math.nan) / config.train.batch_size * _FORWARD * self.step(config) / 3600


def plan(table: Table, contents: Mapping[str, Contents], seconds: float | None) -> Iterator[str]:
    """The commands of a table as lines of a shell, with estimates, published numbers and finished scores."""
    estimate, commands = Estimate(table, contents, seconds), list(table.commands())
    yield f"# Table {table.number} of the paper, protocol {table.protocol}"
    hours: list[float] = []
    runs: list[float] = []
    config: Config | None = None
    lines = []
    for number, command in enumerate(commands, 1):
        notes = []
        if command.module == "train":
            config = command.config
            steps, more, size = estimate.training(config)
            notes = [f"{steps:,} steps", amount([more], "h"), f"{amount([size], 'GB')} in its folder"]
            hours, runs = [*hours, more], [*runs, size]
        elif command.module == "evaluate" and config is not None:
            hours.append(estimate.evaluation(command, config))
            notes = [amount(hours[-1:], "h"), f"published {shown_published(command.theirs, False)}"]
        row = command.row() if command.module == "evaluate" else None
        if row is not None:
            notes.append(f"ours {cell_of([row])}")
        elif command.module != "evaluate" and command.finished:
            notes.append("finished")
        lines.append(f"# [{number}/{len(commands)}] {command.title}: {', '.join(notes)}".removesuffix(": "))
        lines.append(shlex.join(["python", *command.line()]))
    sizes = []
    for spec, names in table.checked():
        found = contents[spec]
        count = ", ".join(f"{clips:,} {name}" for name, clips in found.clips.items()) or "unknown"
        sizes.append(found.gigabytes(names))
        why = f"; as published, because {found.missing}" if found.missing else ""
        yield f"# {spec}: clips {count}; {amount(sizes[-1:], 'GB')}{why}"
    yield (f"# all commands: {amount(hours, 'h')}; run folders {amount(runs, 'GB')}, features {amount(sizes, 'GB')}")
    yield from (f"# {line}" for line in RULES)
    yield f"# a training step: {'; '.join(estimate.how.values()) or 'not needed'}"
    without = sorted({one.method for one in table.numbers if fields_of(one.method) is None} - {LABELLED})
    if without:
        yield f"# no command trains {', '.join(without)}"
    yield from lines


def amount(values: Sequence[float], unit: str) -> str:
    """The sum of some numbers with its unit; NaN are unknown, and counted beside the sum of the others."""
    known = [value for value in values if not math.isnan(value)]
    unknown = len(values) - len(known)
    if values and not known:
        return f"unknown {unit}"
    total = sum(known)
    text = f"{total:,.0f} {unit}" if total >= 100 else f"{total:.3g} {unit}"
    return f"{text} and {unknown} unknown" if unknown else text


RULES = (
    "Gigabytes of features: clips × 10 positions × values × 8 bytes. Zips are smaller; frames are not counted.",
    "Gigabytes of a run folder: two checkpoints, each with the weights and Adam's two moments.",
    "Hours of a training: steps × seconds of a step of Uni-Code. Reading data is not counted.",
    "Hours of an evaluation: two probes × epochs that encode × clips / batch × a third of a step. Segmenters and "
    "retrieval heads are not counted.",
)


def check_data(contents: Mapping[str, Contents]) -> None:
    """Prints what is missing and raises FileNotFoundError if a data set is not at hand."""
    missing = {spec: found.missing for spec, found in contents.items() if found.missing}
    for spec, why in missing.items():
        say(f"missing, {spec}: {why}", sys.stderr)
    if missing:
        raise FileNotFoundError(f"data must be complete before --run, not at hand are {few(list(missing))}")


def run_command(command: Command) -> int:
    """Runs a command in a process of its own, which writes to this terminal; returns its status."""
    process = subprocess.Popen([sys.executable, *command.line()])
    try:
        return process.wait()
    except KeyboardInterrupt:
        # The process saves its state and ends.
        process.terminate()
        process.wait()
        raise


def run_all(table: Table) -> None:
    """Runs every command that has not finished, and writes the table after each evaluation.

    Raises:
        RuntimeError: a command failed; a later call resumes with it.
    """
    commands = list(table.commands())
    for number, command in enumerate(commands, 1):
        if command.finished:
            continue
        say(f"[{number}/{len(commands)}] {command.title}", sys.stderr)
        if command.module == "data":
            command.folder.parent.mkdir(parents=True, exist_ok=True)
            command.folder.unlink(missing_ok=True)
        status = run_command(command)
        if status or not command.finished:
            raise RuntimeError(
                f"{command.title} ended with status {status}; the same call of {program('reproduce')} resumes with it"
            )
        if command.module == "evaluate":
            write_table(table)


def write_table(table: Table) -> str:
    """Writes our scores and, in a table of its own, the published ones; returns the text."""
    theirs: dict[tuple[str, str], dict[tuple[str, str, str], list[Published]]] = {}
    for one in table.numbers:
        theirs.setdefault((one.pretraining, one.method), {}).setdefault(column_of(one), []).append(one)
    rows: dict[tuple[str, str], dict[tuple[str, str, str], list[Row]]] = {key: {} for key in theirs}
    evaluations = [command for command in table.commands() if command.module == "evaluate"]
    found = [(command, row) for command in evaluations if (row := command.row()) is not None]
    for command, row in found:
        for one in {one.method: one for one in command.theirs}.values():
            scored = replace(row, score=row.same_modality, metrics={}) if one.method == LABELLED else row
            rows[one.pretraining, one.method].setdefault(column_of(one), []).append(scored)
    seeds = f"{table.seeds.start} to {table.seeds.stop - 1}" if len(table.seeds) > 1 else f"{table.seeds.start}"
    given = {name: value for name, value in table.fields.items() if name not in EXECUTION_FIELDS}
    fields = ", ".join(f"{name} {shown(value)}" for name, value in given.items())
    text = [
        f"# Table {table.number}",
        f"## Ours: protocol {table.protocol}, {fields}, seed {seeds}",
        _scores(
            {key: {at: str(cell_of(several)) for at, several in cells.items()} for key, cells in rows.items()}, theirs
        ),
        f"{len(found)} of {len(evaluations)} evaluations have finished. Zero-shot scores are in per cent. The last "
        "checkpoint of each run is measured. Comparison methods are our versions.",
        f"## The paper's, {LABEL}",
        _scores(
            {
                key: {at: shown_published(several, False) for at, several in cells.items()}
                for key, cells in theirs.items()
            },
            theirs,
        ),
    ]
    content = "\n\n".join(text) + "\n"
    write_text(table.out / f"table{table.number}.md", content)
    return content


def _scores(
    lines: Mapping[tuple[str, str], Mapping[tuple[str, str, str], str]],
    columns: Mapping[tuple[str, str], Mapping[tuple[str, str, str], Any]],
) -> str:
    """Lines of a table as Markdown, with all columns of the published table."""
    heads = {column: "{} {} → {}".format(*column) for cells in columns.values() for column in cells}
    lines_of = ((key, {heads[column]: cell for column, cell in cells.items()}) for key, cells in lines.items())
    return markdown(grid(["pre-trained on", "method"], heads.values(), lines_of))


def listed(text: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in text.split(",")]


def make_own_parser() -> Parser:
    """The command line."""
    parser = make_parser(
        "reproduce", "Print, or run, the commands of one of the paper's tables on the public features."
    )
    parser.add_argument("--table", type=int, choices=range(1, 6), help="table of the paper (required)")
    parser.add_argument("--root", default="data", help="folder of all data sets [%(default)s]")
    for flag, folder in FLAGS.items():
        parser.add_argument(f"--{flag}", help=f"folder of this data set, or a packed store [ROOT/{folder}]")
    parser.add_argument("--out", default="reproduction", help="folder of runs and tables [%(default)s]")
    parser.add_argument("--run", action="store_true", help="check the data, then run what has not finished")
    parser.add_argument("--dry_run", action="store_true", help="print the commands and run none, which is the default")
    parser.add_argument(
        "--only", type=listed, action="extend", metavar="ROW,ROW", help="rows of the table, such as Uni-Code [all]"
    )
    parser.add_argument("--pretraining", type=listed, action="extend", help="such as 24K,81K [all]")
    parser.add_argument("--tests", type=listed, action="extend", metavar="DATASET,DATASET", help="such as AVE [all]")
    parser.add_argument("--protocol", default="official", help=f"{' or '.join(PROTOCOLS)} [%(default)s]")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of each row, from --seed on [%(default)s]")
    parser.add_argument("--seconds_per_step", type=float, help="for the estimate [measured on this machine]")
    parser.add_argument("--backbone", default="pvt_v2_b5", help="of segmentation, as in evaluate [%(default)s]")
    parser.add_argument("--backbone_weights", help="of segmentation, as in evaluate")
    parser.add_argument("--segmenter_steps", type=int, help="of segmentation, as in evaluate")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `python -m unicode_fast.reproduce --help`."""
    parser = make_own_parser()
    given = parser.parse_args(with_underscores(argv))
    if given.table is None:
        parser.error("the following arguments are required: --table")
    if given.run and given.dry_run:
        parser.error("run must not be given beside dry_run")
    if given.seeds < 1:
        raise UsageError(f"seeds must be at least 1, got {given.seeds}")
    if given.seconds_per_step is not None and not 0 < given.seconds_per_step < math.inf:
        raise UsageError(f"seconds_per_step must be a number above 0, got {given.seconds_per_step:g}")
    fields = {
        "preset": "official",
        "size": "paper",
        **(read_yaml(given.config) if given.config is not None else {}),
        **given_fields(given),
    }
    own = [name for name in OWN_FIELDS if name in fields]
    if own:
        raise UsageError(f"{own[0]} must be left to the rows of the table, got {fields[own[0]]!r}")
    table = Table(given.table, given, fields)
    if any(one.task == SEGMENTATION for one in table.numbers):
        with of_command_line():
            check_backbone(given.backbone)
    contents = {
        spec: look(spec, names, place.clips, splits) for spec, (place, names, splits) in table.sources().items()
    }
    if not given.run:
        for line in plan(table, contents, given.seconds_per_step):
            say(line)
        return 0
    check_data(contents)
    with held(table.out):
        run_all(table)
        say(write_table(table).rstrip())
    return 0


if __name__ == "__main__":
    run_main(main)
