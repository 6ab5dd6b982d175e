"""Ablation of components and codebook sizes: `python -m unicode_fast.ablate --out FOLDER`.

It makes the paper's Tables 1 to 3 and Figure 3 on the built-in data or any other. Every run is one of
`unicode_fast.train` in its own folder, so an interrupted ablation resumes. A finished run is a row of one file,
`--record FILE`, and its folder can be deleted.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from tqdm import tqdm

from unicode_fast.checkpoint import METRICS, SUMMARY
from unicode_fast.cli import given_fields, make_parser, resolve, resolve_saved, with_underscores
from unicode_fast.config import EXECUTION_FIELDS, Config, completed, modality_names
from unicode_fast.data import built_in, open_dataset
from unicode_fast.errors import run_main, say
from unicode_fast.files.locks import exclusive
from unicode_fast.files.untrusted import UNPACKED_VARIABLE, read_bytes, read_json
from unicode_fast.files.writing import check_writable, write_text
from unicode_fast.methods import METHODS, row_name
from unicode_fast.presets import preset, usual
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
_POLL_SECONDS = 0.5


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


class Unit(NamedTuple):
    """One run: its folder and its configuration."""

    folder: Path
    config: Config

    @property
    def finished(self) -> bool:
        """True where its summary exists."""
        return (self.folder / SUMMARY).exists()

    @property
    def log(self) -> Path:
        """File with the output of its process."""
        return self.folder.with_suffix(".log")

    def steps_done(self) -> int:
        """Number of training steps so far, from metrics.jsonl."""
        if self.finished:
            return self.config.train.steps
        path = self.folder / METRICS
        for line in reversed(read_bytes(path, UNPACKED_VARIABLE).splitlines() if path.is_file() else []):
            # Skips an incomplete or damaged line.
            with contextlib.suppress(ValueError, KeyError, TypeError):
                return int(json.loads(line)["step"])
        return 0


def variants(base: Config, names: Sequence[str], experiments: Iterable[str], codewords: Sequence[int]) -> list[Variant]:
    """All lines and points of some experiments.

    Args:
        base: configuration of the complete model.
        names: the modalities of the data; Tables 1 and 2 take the first two of them.
        experiments: some of EXPERIMENTS.
        codewords: the points of Figure 3.

    Raises:
        ValueError: an experiment is unknown.
    """
    found = []
    for experiment in experiments:
        if experiment not in EXPERIMENTS:
            raise ValueError(f"experiments must be among {', '.join(EXPERIMENTS)}, got {experiment!r}")
        modalities = ",".join(names[:2] if experiment in ("table1", "table2") else names)
        if experiment == "table1":
            found += table_1(base.replace(modalities=modalities))
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
    return found


def table_1(base: Config) -> list[Variant]:
    """The methods of Table 1, alone and with DCID, with the changes that a configuration makes to its usual one.

    Args:
        base: configuration of Uni-Code, with the modalities of the table.
    """
    standard, values, found = usual(base).flat(), base.flat(), []
    changes = {name: value for name, value in values.items() if value != standard[name]}
    rows = {row_name(name, dcid): (name, dcid) for name in METHODS for dcid in (False, True)}
    for title in dict.fromkeys(one.method for one in published() if one.table == 1):
        method, dcid = rows[title]
        config = preset(base.preset, base.size, method, dcid).replace_all(**changes)
        folder = "complete" if config == base else f"method={method}{',dcid=True' * dcid}"
        found.append(Variant("table1", title, config, f"{base.data.modalities.replace(',', '-')}/{folder}"))
    return found


class Record:
    """The finished runs of an ablation, one row each, in a JSON file.

    Args:
        path: the file; it is created if it does not exist.
        base: configuration of the complete model; rows hold the fields with other values.

    Attributes:
        runs: rows with `fields` of other values, `seed`, `rows` of scores, `seconds` and `versions`.

    Raises:
        ValueError: the file is no record of an ablation, or of one with another configuration.
    """

    def __init__(self, path: Path, base: Config) -> None:
        self.path = path
        self.config = base
        self.runs: list[dict[str, Any]] = []
        if path.exists():
            try:
                content = read_json(path)
                before, self.runs = completed(content["config"]), list(content["runs"])
                _check_runs(self.runs)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"record must be a new file or one of an ablation, got {str(path)!r}: "
                    f"{type(error).__name__}: {error}"
                ) from error
            differing = [
                f"{name} {before.get(name)!r} instead of {value!r}"
                for name, value in identity(base).items()
                if before.get(name) != value
            ]
            if differing:
                raise ValueError(f"record must be new or of the same configuration, {path} has {', '.join(differing)}")

    def find(self, config: Config) -> list[Row] | None:
        """The scores of a run; None if it is not finished."""
        fields, seed = self._key(config)
        rows = [run["rows"] for run in self.runs if (run["fields"], run["seed"]) == (fields, seed)]
        return [Row.from_dict(row) for row in rows[0]] if rows else None

    def add(self, config: Config, summary: Mapping[str, Any]) -> None:
        """Adds a finished run, from its summary, and writes the file; a second call changes nothing.

        Runs added by other processes are kept.
        """
        fields, seed = self._key(config)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(self.path.with_name(f".{self.path.name}.lock"), lambda line: say(line, sys.stderr)):
            self.runs = Record(self.path, self.config).runs
            if self.find(config) is None:
                kept = {name: summary[name] for name in ("rows", "seconds", "threads", "versions") if name in summary}
                self.runs.append({"fields": fields, "seed": seed, **kept})
                self.write()

    def write(self) -> None:
        """Writes the file atomically, a line for each run."""
        lines = ",\n".join(json.dumps(run, ensure_ascii=False) for run in self.runs)
        write_text(self.path, f'{{"config": {json.dumps(self.config.flat())},\n"runs": [\n{lines}\n]}}\n')

    def times(self) -> str:
        """A sentence on the duration of runs; empty if it is unknown."""
        minutes = [run["seconds"] / 60 for run in self.runs if "seconds" in run]
        threads = sorted({run["threads"] for run in self.runs if "threads" in run})
        if not minutes or not threads:
            return ""
        torch_versions = sorted({run["versions"]["torch"] for run in self.runs if "versions" in run})
        return (
            f" Pre-training and probing took {statistics.median(minutes):.1f} minutes a run (median) with "
            f"{' or '.join(map(str, threads))} thread(s)"
            + (f", torch {' or '.join(torch_versions)}." if torch_versions else ".")
        )

    def _key(self, config: Config) -> tuple[dict[str, Any], int]:
        base = identity(self.config)
        fields = {name: value for name, value in identity(config).items() if value != base[name]}
        return fields, config.train.seed


def _check_runs(runs: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError, KeyError or TypeError if the rows of a record are not finished runs, each once."""
    found = set()
    for number, run in enumerate(runs):
        key = json.dumps([dict(run["fields"]), int(run["seed"])], sort_keys=True)
        if key in found:
            raise ValueError(f"run {number} is a duplicate")
        found.add(key)
        for row in run["rows"]:
            score = Row.from_dict(row).score
            if not isinstance(score, (int, float)) or not 0 <= score <= 1:
                raise ValueError(f"scores must be numbers from 0 to 1, run {number} has {score!r}")


def identity(config: Config) -> dict[str, Any]:
    """All fields that decide what a run computes, except the seed."""
    return {name: value for name, value in config.flat().items() if name not in (*EXECUTION_FIELDS, "seed")}


def units(out: Path, found: Sequence[Variant], seeds: Sequence[int]) -> list[Unit]:
    """The runs, all variants of a seed before those of the next seed; an interruption then leaves whole tables.

    Raises:
        ValueError: a folder exists whose run has another configuration.
    """
    runs = {}
    for seed in seeds:
        for variant in found:
            unit = Unit(out / variant.folder / f"seed-{seed}", variant.config.replace(seed=seed))
            written = unit.folder / "config.yaml"
            before, now = resolve_saved(str(written)).flat() if written.exists() else {}, unit.config.flat()
            if before and before != {**now, **{name: before.get(name) for name in EXECUTION_FIELDS}}:
                raise ValueError(
                    f"out must be new or of the same configuration, {unit.folder} was trained with another"
                )
            runs[unit.folder] = unit
    return list(runs.values())


def start(unit: Unit, threads: int) -> subprocess.Popen[bytes]:
    """Starts or resumes a run in its own process, with a log beside its folder."""
    unit.folder.parent.mkdir(parents=True, exist_ok=True)
    fields = unit.config.flat()
    if unit.folder.exists():
        how = ["--resume", str(unit.folder), *(f"--{name}={fields[name]}" for name in EXECUTION_FIELDS)]
    else:
        file = unit.folder.with_suffix(".yaml")
        write_text(file, yaml.safe_dump(fields, sort_keys=False))
        how = ["--config", str(file), "--out", str(unit.folder)]
    command = [sys.executable, "-m", "unicode_fast.train", *how]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with unit.log.open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)


def run_all(runs: Sequence[Unit], jobs: int, threads: int) -> Iterator[Unit]:
    """Runs the unfinished runs, `jobs` at a time, with one progress bar; yields each run at its end.

    Raises:
        RuntimeError: a run failed; the others are stopped, and their checkpoints are kept.
    """
    waiting = [unit for unit in runs if not unit.finished]
    running: dict[subprocess.Popen[bytes], Unit] = {}
    steps = sum(unit.config.train.steps for unit in runs)
    bar = tqdm(total=steps, initial=sum(unit.steps_done() for unit in runs), desc="ablation", unit="step")
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                unit = waiting.pop(0)
                running[start(unit, threads)] = unit
            time.sleep(_POLL_SECONDS)
            for process in [process for process in running if process.poll() is not None]:
                unit = running.pop(process)
                if not unit.finished:
                    log = unit.log.read_text(encoding="utf-8", errors="replace").splitlines() or ["its log is empty"]
                    raise RuntimeError(f"the run in {unit.folder} failed: {log[-1]}; its log is {unit.log}")
                yield unit
            bar.set_postfix(runs=f"{sum(unit.finished for unit in runs)}/{len(runs)}", refresh=False)
            bar.update(sum(unit.steps_done() for unit in runs) - bar.n)
    finally:
        bar.close()
        for process in running:
            process.terminate()
            process.wait()


def collect(
    record: Record, found: Sequence[Variant], seeds: Sequence[int], experiment: str
) -> tuple[list[Line], list[str]]:
    """The lines of an experiment with at least one finished seed, and the names of unfinished runs."""
    lines, missing = [], []
    for variant in found:
        if variant.experiment == experiment:
            by_seed = {seed: record.find(variant.config.replace(seed=seed)) for seed in seeds}
            there = {seed: rows for seed, rows in by_seed.items() if rows is not None}
            if there:
                lines.append(Line(variant.label, there))
            if len(there) < len(seeds):
                lacking = ", ".join(str(seed) for seed in seeds if seed not in there)
                missing.append(f"{variant.label} (seed {lacking})")
    return lines, missing


def write_results(  # noqa: PLR0913 - the finished runs, and the format of the page
    out: Path, record: Record, found: Sequence[Variant], seeds: Sequence[int], base: Config, kind: str = "png"
) -> None:
    """Writes tables of all finished runs as Markdown and CSV, their figure, and the names of the other runs."""
    text = [
        HEADING,
        f"Zero-shot scores in per cent on {base.data.data}, preset {base.preset}, {base.train.steps} steps; mean and "
        "sample standard deviation over seeds." + record.times(),
    ]
    if any(variant.experiment in PUBLISHED and variant.experiment != "table1" for variant in found):
        single = {label: fields for label, fields in COMPONENTS.items() if fields and " + " not in label}
        removed = (f"{label}: {', '.join(f'{k} {v}' for k, v in fields.items())}" for label, fields in single.items())
        text.append(f"Fields of the configuration that remove a component: {'; '.join(removed)}. All else stays.")
    for experiment in dict.fromkeys(variant.experiment for variant in found):
        lines, missing = collect(record, found, seeds, experiment)
        text.append(f"## {TITLES[experiment]}")
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
        raise ValueError(f"{argument} must be whole numbers of at least 2 separated by commas, got {text!r}")
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
    parser = make_parser("ablate", "Train with each component off, and with codebooks of several sizes.")
    parser.add_argument("--out", help="folder of the ablation (required); finished runs in it are kept")
    parser.add_argument(
        "--experiments", help=f"some of {', '.join(EXPERIMENTS)}, separated by commas [{DEFAULT_EXPERIMENTS}]"
    )
    parser.add_argument("--table", type=int, help="one table alone, 1 to 3, in place of --experiments")
    parser.add_argument("--sizes", default=SIZES, help="numbers of codewords in Figure 3 [%(default)s]")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each line, from --seed on [%(default)s]")
    parser.add_argument(
        "--record",
        default="",
        help="JSON file of finished runs, which are skipped [runs.json in the folder]",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="parallel runs, which share the processor's cores [%(default)s]"
    )
    parser.add_argument("--format", default="png", help=f"format of Figure 3: {', '.join(plots.FORMATS)} [png]")
    arguments = parser.parse_args(with_underscores(argv))
    plots.check_format(arguments.format)
    if arguments.out is None:
        parser.error("the following arguments are required: --out")
    if not arguments.out:
        raise ValueError("out must be a folder, got ''")
    page = Path(arguments.out) / "ablation.md"
    check_writable("out", page)
    if page.exists() and not page.read_bytes().startswith(HEADING.encode()):
        raise ValueError(f"out must be a new folder or one of an ablation, {page} is another file")
    if arguments.record:
        check_writable("record", Path(arguments.record))
    for name in ("seeds", "jobs"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(arguments, name)}")
    flags = given_fields(arguments)
    base = with_all_columns(resolve(arguments.config, flags), flags)
    check_run(base)
    if not base.train.steps:
        raise ValueError("steps must be above 0, so that all runs have the same number, got 0")
    names = modality_names(base.data.modalities, tuple(check_store(base, open_dataset(base.data))))
    if arguments.table is not None and arguments.experiments is not None:
        raise ValueError(f"table must not be given together with experiments, got {arguments.table} beside it")
    if arguments.table not in (None, 1, 2, 3):
        raise ValueError(f"table must be 1, 2 or 3, got {arguments.table}")
    if base.method.method != "uni-code":
        raise ValueError(f"method must be uni-code, whose components are removed, got {base.method.method!r}")
    chosen = f"table{arguments.table}" if arguments.table else arguments.experiments or DEFAULT_EXPERIMENTS
    experiments = list(dict.fromkeys(chosen.split(",")))
    found = variants(base, names, experiments, numbers(arguments.sizes, "sizes"))
    seeds = [base.train.seed + number for number in range(arguments.seeds)]
    out = Path(arguments.out)
    threads = max(1, torch.get_num_threads() // arguments.jobs)
    record = Record(Path(arguments.record or out / "runs.json"), base)
    runs = units(out, found, seeds)
    for unit in runs:
        if unit.finished:
            record.add(unit.config, read_summary(unit.folder))
    out.mkdir(parents=True, exist_ok=True)
    for unit in run_all([unit for unit in runs if record.find(unit.config) is None], arguments.jobs, threads):
        record.add(unit.config, read_summary(unit.folder))
        write_results(out, record, found, seeds, base, arguments.format)
    write_results(out, record, found, seeds, base, arguments.format)
    say((out / "ablation.md").read_text(encoding="utf-8").rstrip())
    say(out)
    return 0


if __name__ == "__main__":
    run_main(main)
