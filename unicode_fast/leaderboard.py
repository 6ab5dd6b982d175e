"""One leaderboard of all methods: `python -m unicode_fast.leaderboard --out FOLDER`.

Every row is trained on the same data with the same steps, batches and optimiser. The rules of its method differ, and so
do some encoders and probes, which the page names. Every run is one of `unicode_fast.train` in its own folder, so an
interrupted call resumes. A finished run is a row of one file, `--record FILE`, and its folder can be deleted.
"""

from __future__ import annotations

import re
import sys
import time
from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from unicode_fast.checkpoint import default_of, load
from unicode_fast.cli import (
    changed_flags,
    check_read,
    given_fields,
    make_parser,
    read_yaml,
    resolve_methods,
    shown,
    with_underscores,
)
from unicode_fast.config import FIELDS, Config, Kind, Modality, modality_names
from unicode_fast.data import built_in, open_dataset
from unicode_fast.data.talking_digits.digits import MODALITIES
from unicode_fast.errors import UsageError, of_command_line, run_main, say
from unicode_fast.files.writing import write_text
from unicode_fast.many_runs import (
    Record,
    Unit,
    add_arguments,
    check_arguments,
    check_steps,
    checked_unit,
    held,
    run_all,
)
from unicode_fast.methods import METHODS
from unicode_fast.modules import UniCode
from unicode_fast.presets import of_method, preset, usual
from unicode_fast.report import leaderboard as board
from unicode_fast.tasks import RETRIEVAL, Evaluator, Row
from unicode_fast.tasks.channels import Selected, TocRule, channels_of
from unicode_fast.tasks.probe import one_thread
from unicode_fast.tasks.runner import SEGMENTATION
from unicode_fast.training.checks import check_run, check_store, open_run_data, tasks_of
from unicode_fast.training.runs import provenance, read_summary

HEADING = "# Leaderboard"
# What a call takes without other flags. There is no choice of a checkpoint: the last step is measured.
DEFAULTS: Mapping[str, Any] = {
    "data": "talking-numbers",
    "steps": 600,
    "validations": 0,
    "probe_tasks": "classification,localisation,open-classification,retrieval",
}
# The losses of the paper as the released code has them, in place of those by which `recommended` shares codes.
_OFFICIAL = preset("official").flat()
PAPER_LOSSES: Mapping[str, Any] = {
    name: _OFFICIAL[name]
    for name in (
        *("assignment_weight", "presence_weight", "grounding_weight"),
        *("commitment_weight", "commitment_own", "commitment_partner", "commitment_partners", "commitment_norm"),
    )
}


# Parts that no field shows.
_PARTS = (
    "MST shares the transformers of all modalities. FCID has no LSTM of words, and projections of clips. CoDAAR has "
    "another encoder of grids, with batch normalisation. A probe's input is as wide as the vectors of its row: the "
    "model's width, twice that for H-DCID, for CoDAAR times the number of modalities, and half of it for TOC. Tokens "
    "of H-DCID have one place for each codeword of its two layers."
)


@dataclass(frozen=True)
class Entry:
    """A row of the leaderboard.

    Attributes:
        label: its name.
        fields: of the configuration, beside those of all rows.
        measures: the row whose runs it measures again, with selected channels; "" for one with runs of its own.
    """

    label: str
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)
    measures: str = ""

    @property
    def folder(self) -> str:
        """The folder of its runs, relative to that of the leaderboard."""
        return re.sub(r"[^a-z0-9+]+", "-", (self.measures or self.label).lower()).strip("-")


def entries(names: Sequence[str]) -> list[Entry]:
    """All rows.

    Args:
        names: the modalities of the data; without a third there is no row of two modalities.
    """
    compared = {name: {"method": name.lower()} for name in board.COMPARED}
    found = [Entry(board.BASELINE, {"method": "baseline"})]
    found += [Entry(label, fields) for label, fields in compared.items()]
    found += [Entry(f"DCID+{label}", {**fields, "dcid": True}) for label, fields in compared.items()]
    found += [Entry(board.UNI_CODE, PAPER_LOSSES), Entry(board.RECOMMENDED)]
    for label in board.LATER:
        recipe = METHODS[label.lower()]
        losses = {name: value for name, value in PAPER_LOSSES.items() if name not in recipe.rules}
        found.append(Entry(label, {"method": label.lower(), **losses}))
    found.append(Entry(board.TOC, PAPER_LOSSES, board.UNI_CODE))
    if len(names) > 2:
        found.append(Entry(board.two_modalities(names), {**PAPER_LOSSES, "modalities": ",".join(names[:2])}))
    return found


@dataclass(frozen=True)
class Plan:
    """What a leaderboard trains and measures.

    Attributes:
        out: the folder of the runs.
        base: configuration of the recommended row.
        names: the modalities of the data.
        rows: configuration of each row, except for the seed.
        seeds: of each row.
        others: given fields that only other methods read.
    """

    out: Path
    base: Config
    names: Sequence[str]
    rows: Mapping[Entry, Config]
    seeds: Sequence[int]
    others: Mapping[str, Any] = field(default_factory=dict)

    def units(self, record: Record, chosen: Sequence[Entry]) -> list[Unit]:
        """The runs that some rows still need, all rows of a seed before those of the next seed.

        Raises:
            ValueError: the folder of a run exists with another configuration.
        """
        found: dict[Path, Unit] = {}
        for seed in self.seeds:
            for entry in chosen:
                config = self.rows[entry].replace(seed=seed)
                if record.run(config, entry.label) is None:
                    folder = self.out / entry.folder / f"seed-{seed}"
                    found[folder] = checked_unit(folder, config)
        return list(found.values())

    def keep(self, record: Record, unit: Unit) -> None:
        """Adds the rows of a finished run to the record."""
        summary = read_summary(unit.folder)
        for entry in [entry for entry in self.rows if self.out / entry.folder == unit.folder.parent]:
            if record.run(unit.config, entry.label) is None:
                model = load(unit.folder, default_of(unit.folder), torch.device("cpu"))
                if entry.measures:
                    record.add(unit.config, with_half_the_channels(model, unit.config), entry.label)
                else:
                    step_seconds = summary["seconds_of_pretraining"] / summary["steps"]
                    costs = {"parameters": trained_parameters(model), "step_seconds": step_seconds}
                    record.add(unit.config, summary, entry.label, **costs)

    def standings(self, record: Record) -> tuple[list[board.Standing], list[str]]:
        """Rows with at least one finished seed, and the names of unfinished ones."""
        found, missing = [], []
        for entry, config in self.rows.items():
            there, lacking = record.seeds(config, self.seeds, entry.label, entry.label)
            missing += lacking
            if there:
                scores = {seed: [Row.from_dict(row) for row in run["rows"]] for seed, run in there.items()}
                found.append(board.Standing(entry.label, scores, there))
        return found, missing

    def run_missing(self, record: Record, chosen: Sequence[Entry], jobs: int, page: Path) -> list[str]:
        """Trains and measures what some rows still need, and writes the page after each run.

        Returns:
            A line for each failed run.
        """
        failures: list[str] = []
        with held(self.out):
            for unit in [unit for unit in self.units(record, chosen) if unit.finished]:
                self.keep(record, unit)
            for unit in run_all(self.units(record, chosen), jobs, 1, "leaderboard", failures):
                self.keep(record, unit)
                self.write_page(record, page)
        return failures

    def write_page(self, record: Record, page: Path) -> None:
        """Writes the page and, with at least one finished run, its picture."""
        standings, missing = self.standings(record)
        if standings:
            board.draw(standings, page.with_suffix(".png"))
        text = board.page(HEADING, self.introduction(record), standings, missing, self.names, f"{page.stem}.png")
        write_text(page, text)

    def introduction(self, record: Record) -> list[str]:
        """What all rows have in common, and what tells them apart."""
        base, train = self.base, self.base.train
        measured = "The checkpoint with the best validation" if train.validations else "The model of the last step"
        paragraphs = [
            f"Every row is pre-trained on {base.data.data} for {train.steps} steps of {train.batch_size} clips, with "
            f"{len(self.seeds)} seed{'s' * (len(self.seeds) > 1)}. Data, splits, number of codewords, batches, "
            "optimiser and rules of the probes are the same. "
            f"The preset is `{base.preset}`, its size `{base.size}`. {measured} is measured. "
            f"`{self.command()}` writes this page.{record.times()}",
            "The methods are our versions; their pages state each choice that is in no source. Losses and codebook "
            f"follow the method, and so do these parts. {_PARTS}",
            f"`{board.UNI_CODE}` has the commitment of the paper, as released, and neither assignment nor grounding. "
            f"It is not the preset `official`: of model and method it differs in {self.unlike_official()}. Later "
            f"methods have these losses too, unless their own differ. `{board.TOC}` measures the runs of "
            f"`{board.UNI_CODE}` with half of the channels; this number is fixed, so that nothing is chosen on test "
            "clips.",
        ]
        tuned = f"`{board.RECOMMENDED}` is the preset `{base.preset}` with the changes of the call. "
        if base.preset == "recommended":
            tuned += (
                "It was chosen by its scores on built-in data (`docs/choices.md`), which favours it. No other row was "
                "tuned; fields that a row does not set are those of the preset."
            )
        return [*paragraphs, tuned]

    def command(self) -> str:
        """The command that writes the page, with every field that differs from the usual leaderboard."""
        usual_fields = usual(self.base).replace_all(**DEFAULTS).flat() | {"preset": "recommended", "size": "small"}
        flags = changed_flags(self.base, usual_fields, self.others)
        return f"python -m unicode_fast.leaderboard --out FOLDER --seeds {len(self.seeds)}{flags}"

    def unlike_official(self) -> str:
        """The fields of model and method by which the row Uni-Code differs from the released code."""
        row = next(config for entry, config in self.rows.items() if entry.label == board.UNI_CODE)
        theirs, unread = preset("official", row.size).flat(), row.unread_fields()
        differing = (
            f"`{name} {shown(value)}`"
            for name, value in row.flat().items()
            if FIELDS.get(name) in ("model", "method") and name not in unread and value != theirs[name]
        )
        return ", ".join(differing) or "nothing"


def planned(arguments: Namespace) -> Plan:
    """The plan of a command line.

    Raises:
        ValueError: a flag or a field has a wrong value, or a field differs between rows.
    """
    given, config = given_fields(arguments), arguments.config
    content = read_yaml(config) if config else {}
    for name in [name for name in ("method", "dcid") if name in {**content, **given}]:
        raise UsageError(f"{name} differs between rows, got one for all; --only names rows")
    flags = {**{name: value for name, value in DEFAULTS.items() if name not in content}, **given}
    base, others = resolve_methods(config, flags)
    check_steps(base)
    # Kinds of built-in modalities are known without their data.
    made = base.data.data in built_in.DATASETS
    modalities: Mapping[str, Modality] = MODALITIES if made else check_store(base, open_dataset(base.data))
    names = modality_names(base.data.modalities, tuple(modalities))
    rows = {}
    for entry in entries(names):
        trained = entry.fields.get("modalities", ",".join(names)).split(",")
        rows[entry] = row_config(base, entry, [modalities[name].kind for name in trained], others)
    with of_command_line():
        for row in rows.values():
            check_run(row)
    check_read(others, rows.values())
    seeds = [base.train.seed + number for number in range(arguments.seeds)]
    return Plan(Path(arguments.out), base, names, rows, seeds, others)


def row_config(base: Config, entry: Entry, kinds: Collection[Kind], others: Mapping[str, Any]) -> Config:
    """The configuration of a row: rules of its method, with the changes of `base` that the method accepts.

    Args:
        base: of the recommended row.
        entry: the row.
        kinds: of its modalities.
        others: changes of fields that only other methods read.
    """
    own = {**others, **entry.fields}
    return of_method(base, own.pop("method", "uni-code"), own.pop("dcid", False), own, kinds)


def trained_parameters(model: UniCode) -> int:
    """Number of parameters that a run trains: without those of losses that are off, and without teachers."""
    method = model.config.method
    off = {"cpc": method.cpc_weight == 0, "club": method.club_estimator == "none"}
    named = [(name.partition(".")[0], parameter) for name, parameter in model.named_parameters()]
    return sum(parameter.numel() for part, parameter in named if parameter.requires_grad and not off.get(part))


def with_half_the_channels(model: UniCode, config: Config) -> dict[str, Any]:
    """Scores of probes that read half of the channels, those that TOC selects; in the form of a run's summary."""
    begun = time.monotonic()
    channels = channels_of(model, config.model.width // 2, TocRule(None))
    tasks = [task for task in tasks_of(config) if task not in (RETRIEVAL, SEGMENTATION)]
    with one_thread():
        evaluator = Evaluator(Selected(model, channels), open_run_data(config), config.train.seed)
        rows = [row.as_dict() for row in evaluator.table(tasks, progress=False)]
        return {"rows": rows, "seconds": time.monotonic() - begun, **provenance()}


def chosen_entries(rows: Sequence[Entry], only: str | None) -> list[Entry]:
    """The rows of `--only`; all without it.

    Raises:
        ValueError: a name is unknown.
    """
    by_name = {entry.label.lower(): entry for entry in rows}
    names = list(by_name) if only is None else [name.strip().lower() for name in only.split(",")]
    for name in [name for name in names if name not in by_name]:
        raise UsageError(f"only must be among {', '.join(entry.label for entry in rows)}, got {name!r}")
    return [by_name[name] for name in dict.fromkeys(names)]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `python -m unicode_fast.leaderboard --help`."""
    parser = make_parser("leaderboard", "Train every method on the same data, and compare them.")
    add_arguments(parser, "the leaderboard; runs have one thread each")
    parser.add_argument("--page", default="", help="folder for the page and its picture [that of the runs]")
    parser.add_argument("--only", help="train these rows only, separated by commas [all]")
    parser.add_argument("--no_runs", action="store_true", help="train nothing; write the page from the record")
    arguments = parser.parse_args(with_underscores(argv))
    page = Path(arguments.page or arguments.out or "") / "leaderboard.md"
    file = check_arguments(arguments, page, HEADING, "page", "a leaderboard")
    if arguments.no_runs and arguments.record and not file.exists():
        raise ValueError(f"record must be an existing file beside no_runs, got {arguments.record!r}")
    plan = planned(arguments)
    chosen, record = chosen_entries(list(plan.rows), arguments.only), Record(file, plan.base, "a leaderboard")
    failures = [] if arguments.no_runs else plan.run_missing(record, chosen, arguments.jobs, page)
    plan.write_page(record, page)
    say(page.read_text(encoding="utf-8").rstrip())
    say(page)
    for failure in failures:
        say(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    run_main(main)
