"""Comparison of methods, and ablation of components and codebook sizes: `python -m unicode_fast.ablate --out FOLDER`.

It makes the paper's Tables 1 to 3 and Figure 3 on the built-in data or any other. Every run is one of
`unicode_fast.train` in its own folder, so an interrupted ablation resumes. A finished run is a row of one file,
`--record FILE`, and its folder can be deleted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import torch

from unicode_fast.cli import changed_flags, check_read, given_fields, make_parser, resolve_methods, with_underscores
from unicode_fast.config import Config, Kind, modality_names
from unicode_fast.data import built_in, open_dataset
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
from unicode_fast.methods.registry import form_of
from unicode_fast.presets import of_method, usual
from unicode_fast.report import plots
from unicode_fast.report.ablation import PUBLISHED, TITLES, Line, write_experiment
from unicode_fast.report.published import published
from unicode_fast.tasks import CLOSED_TASKS, Row
from unicode_fast.training.checks import check_run, check_store
from unicode_fast.training.runs import read_summary

# Without MM-EMA, neither the EMA nor the commitment loss reads another modality.
_WITHOUT_MM_EMA = {"ema_partner": "none", "commitment_partner": 0.0}
_WITHOUT_RESET = {"reset_after": 0}
_WITHOUT_CLUB = {"club_estimator": "none"}
_WITHOUT_CPC = {"cpc_weight": 0.0}
COMPONENTS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "CLUB": _WITHOUT_CLUB,
    "Cross-CPC": _WITHOUT_CPC,
    "CLUB + Cross-CPC": {**_WITHOUT_CLUB, **_WITHOUT_CPC},
    "MM-EMA": _WITHOUT_MM_EMA,
    "reset": _WITHOUT_RESET,
    "code matching": {"code_matching_weight": 0.0},
    "MM-EMA + reset": {**_WITHOUT_MM_EMA, **_WITHOUT_RESET},
}
EXPERIMENTS = tuple(TITLES)
DEFAULT_EXPERIMENTS = "table2,table3,figure3"
SIZES = "16,32,64,128,256,512"
HEADING = "# Ablations"


@dataclass(frozen=True)
class Variant:
    """One line of a table or point of the figure.

    Attributes:
        experiment: one of EXPERIMENTS.
        label: the removed component, or the number of codewords.
        config: of its runs, except for the seed.
        folder: of its runs, relative to that of the ablation; the same for equal configurations.
    """

    experiment: str
    label: str
    config: Config
    folder: str


def check_experiments(experiments: Iterable[str]) -> None:
    """Raise ValueError if an experiment is unknown."""
    for experiment in experiments:
        if experiment not in EXPERIMENTS:
            raise UsageError(f"experiments must be among {', '.join(EXPERIMENTS)}, got {experiment!r}")


def variants(
    base: Config,
    names: Sequence[str],
    experiments: Sequence[str],
    codewords: Sequence[int],
    kinds: Collection[Kind] = get_args(Kind),
    others: Mapping[str, Any] = MappingProxyType({}),
) -> list[Variant]:
    """All lines and points of some experiments.

    Args:
        base: configuration of the complete model.
        names: the modalities of the data; Tables 1 and 2 take the first two of them.
        experiments: some of EXPERIMENTS.
        codewords: the points of Figure 3.
        kinds: of the first two modalities.
        others: as in `table_1`.

    Raises:
        ValueError: an experiment is unknown, or no line reads a field of `others`.
    """
    found = []
    check_experiments(experiments)
    for experiment in experiments:
        modalities = ",".join(names[:2] if experiment in ("table1", "table2") else names)
        if experiment == "table1":
            found += table_1(base.replace(modalities=modalities), kinds, others)
            continue
        changes: dict[str, Mapping[str, Any]] = dict(COMPONENTS)
        if experiment == "table3":
            del changes["CLUB + Cross-CPC"]  # which the paper's table does not have
        if experiment == "figure3":
            changes = {str(number): {"codewords": number} for number in codewords}
        for label, fields in changes.items():
            config = base.replace(modalities=modalities, **fields)
            changed = [f"{name}={value}" for name, value in fields.items() if base.flat()[name] != value]
            folder = f"{modalities.replace(',', '-')}/{','.join(changed) or 'complete'}"
            found.append(Variant(experiment, label, config, folder))
    check_read(others, (variant.config for variant in found))
    return found


def table_1(
    base: Config, kinds: Collection[Kind] = get_args(Kind), others: Mapping[str, Any] = MappingProxyType({})
) -> list[Variant]:
    """The methods of Table 1, alone and with DCID, with the changes that a configuration makes to its usual one.

    Args:
        base: configuration of Uni-Code, with the modalities of the table.
        kinds: of these modalities.
        others: fields that only other methods read, with their values in each row that reads them.
    """
    found = []
    titles = dict.fromkeys(one.method for one in published() if one.table == 1)
    for title, (method, dcid) in ((title, form) for title in titles if (form := form_of(title))):
        config = of_method(base, method, dcid, others, kinds)
        folder = "complete" if config == base else f"method={method}{',dcid=True' * dcid}"
        found.append(Variant("table1", title, config, f"{base.data.modalities.replace(',', '-')}/{folder}"))
    return found


def units(out: Path, found: Sequence[Variant], seeds: Sequence[int]) -> list[Unit]:
    """The runs, all variants of a seed before those of the next seed; an interruption then leaves whole tables.

    Raises:
        ValueError: a folder exists whose run has another configuration.
    """
    runs = {}
    for seed in seeds:
        for variant in found:
            folder = out / variant.folder / f"seed-{seed}"
            runs[folder] = checked_unit(folder, variant.config.replace(seed=seed))
    return list(runs.values())


def collect(
    record: Record, found: Sequence[Variant], seeds: Sequence[int], experiment: str
) -> tuple[list[Line], list[str]]:
    """The lines of an experiment with at least one finished seed, and the names of unfinished runs."""
    lines, missing = [], []
    for variant in found:
        if variant.experiment == experiment:
            there, lacking = record.seeds(variant.config, seeds, variant.label)
            missing += lacking
            if there:
                rows = {seed: [Row.from_dict(row) for row in run["rows"]] for seed, run in there.items()}
                lines.append(Line(variant.label, rows))
    return lines, missing


def own_losses(base: Config) -> str:
    """A sentence on the losses of the row Uni-Code that the other rows of Table 1 do not have."""
    values, others = base.flat(), of_method(base, "baseline").flat()
    names = ("assignment_weight", "presence_weight", "grounding_weight", "commitment_partner")
    extra = [f"`{name} {values[name]}`" for name in names if values[name] != others[name]]
    return (
        f"The row Uni-Code is the configuration of this call, preset `{base.preset}`; it alone has "
        f"{', '.join(extra)}, as far as its modalities read them."
        if extra
        else f"The row Uni-Code is the configuration of this call, preset `{base.preset}`."
    )


def write_results(  # noqa: PLR0913 - the finished runs, and the format of the page
    out: Path,
    record: Record,
    found: Sequence[Variant],
    seeds: Sequence[int],
    base: Config,
    kind: str = "png",
    flags: str = "",
) -> None:
    """Writes tables of all finished runs as Markdown and CSV, their figure, and the names of the other runs.

    Args:
        out: the folder of the ablation.
        record: of finished runs.
        found: all lines.
        seeds: of each line.
        base: configuration of the complete model.
        kind: format of the figure.
        flags: the changed fields of the call.
    """
    text = [
        HEADING,
        f"Zero-shot scores in per cent on {base.data.data}, preset {base.preset}, {base.train.steps} steps; mean and "
        "sample standard deviation over seeds."
        + (f" Fields with other values than usual: `{flags.strip()}`." if flags else "")
        + record.times(),
    ]
    if any(variant.experiment in PUBLISHED and variant.experiment != "table1" for variant in found):
        single = {label: fields for label, fields in COMPONENTS.items() if fields and " + " not in label}
        removed = (f"{label}: {', '.join(f'{k} {v}' for k, v in fields.items())}" for label, fields in single.items())
        text.append(f"Fields of the configuration that remove a component: {'; '.join(removed)}. All else stays.")
    for experiment in dict.fromkeys(variant.experiment for variant in found):
        lines, missing = collect(record, found, seeds, experiment)
        text.append(f"## {TITLES[experiment]}")
        if experiment == "table1":
            text.append(own_losses(base))
        if missing:
            text.append(f"Not run yet: {'; '.join(missing)}.")
        if lines:
            text += write_experiment(experiment, lines, out, kind)
    write_text(out / "ablation.md", "\n\n".join(text) + "\n")


def numbers(text: str, argument: str) -> list[int]:
    """Whole numbers separated by commas.

    Raises:
        ValueError: a number is not whole, or is below 2.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and int(word) >= 2 for word in words):
        raise UsageError(f"{argument} must be whole numbers of at least 2 separated by commas, got {text!r}")
    return sorted({int(word) for word in words})


def with_all_columns(base: Config, flags: Mapping[str, Any]) -> Config:
    """The configuration with the tasks across data sets of Table 3, if the built-in data have a transfer data set.

    Args:
        base: of the runs.
        flags: given fields; given tasks do not change.
    """
    named = "probe_tasks" in flags or base.train.probe_tasks != usual(base).train.probe_tasks
    if named or base.data.data not in built_in.WITH_TRANSFER:
        return base
    return base.replace(probe_tasks=",".join(CLOSED_TASKS))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `python -m unicode_fast.ablate --help`."""
    parser = make_parser(
        "ablate", "Train with each component off, with codebooks of several sizes, or each method of Table 1."
    )
    add_arguments(parser, "the ablation")
    parser.add_argument(
        "--experiments", help=f"some of {', '.join(EXPERIMENTS)}, separated by commas [{DEFAULT_EXPERIMENTS}]"
    )
    parser.add_argument("--table", type=int, help="one table alone, 1 to 3, in place of --experiments")
    parser.add_argument("--sizes", default=SIZES, help="numbers of codewords in Figure 3 [%(default)s]")
    parser.add_argument("--format", default="png", help=f"format of Figure 3: {', '.join(plots.FORMATS)} [png]")
    arguments = parser.parse_args(with_underscores(argv))
    with of_command_line():
        plots.check_format(arguments.format)
    page = Path(arguments.out or "") / "ablation.md"
    file = check_arguments(arguments, page, HEADING, "out", "an ablation")
    if arguments.table is not None and arguments.experiments is not None:
        raise UsageError(f"table must not be given together with experiments, got {arguments.table} beside it")
    if arguments.table not in (None, 1, 2, 3):
        raise UsageError(f"table must be 1, 2 or 3, got {arguments.table}")
    chosen = f"table{arguments.table}" if arguments.table else arguments.experiments or DEFAULT_EXPERIMENTS
    experiments = list(dict.fromkeys(chosen.split(",")))
    check_experiments(experiments)
    flags = given_fields(arguments)
    base, others = resolve_methods(arguments.config, flags)
    changed = changed_flags(base, usual(base).flat() | {"size": "small"}, others)
    base = with_all_columns(base, flags)
    if base.method.method != "uni-code":
        raise UsageError(f"method must be uni-code, whose components are removed, got {base.method.method!r}")
    with of_command_line():
        check_run(base)
    check_steps(base)
    modalities = check_store(base, open_dataset(base.data))
    names = modality_names(base.data.modalities, tuple(modalities))
    kinds = [modalities[name].kind for name in names[:2]]
    found = variants(base, names, experiments, numbers(arguments.sizes, "sizes"), kinds, others)
    seeds = [base.train.seed + number for number in range(arguments.seeds)]
    out = Path(arguments.out)
    threads = max(1, torch.get_num_threads() // arguments.jobs)
    record = Record(file, base)
    with held(out):
        runs = units(out, found, seeds)
        for unit in runs:
            if unit.finished:
                record.add(unit.config, read_summary(unit.folder))
        for unit in run_all([unit for unit in runs if record.find(unit.config) is None], arguments.jobs, threads):
            record.add(unit.config, read_summary(unit.folder))
            write_results(out, record, found, seeds, base, arguments.format, changed)
        write_results(out, record, found, seeds, base, arguments.format, changed)
    say((out / "ablation.md").read_text(encoding="utf-8").rstrip())
    say(out)
    return 0


if __name__ == "__main__":
    run_main(main)
