"""Many runs of `unicode_fast.train`, each in its own process and folder, and the record of finished ones."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from tqdm import tqdm

from unicode_fast.checkpoint import METRICS, SUMMARY
from unicode_fast.cli import resolve_saved
from unicode_fast.config import EXECUTION_FIELDS, OTHER_METHODS_FIELDS, Config, completed
from unicode_fast.errors import UsageError, few, say
from unicode_fast.files.locks import alone, exclusive
from unicode_fast.files.untrusted import UNPACKED_VARIABLE, read_bytes, read_json
from unicode_fast.files.writing import check_writable, write_text
from unicode_fast.tasks import Row
from unicode_fast.training.runs import LOCK

_POLL_SECONDS = 0.5


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


def checked_unit(folder: Path, config: Config) -> Unit:
    """A run, new or of the same configuration.

    Raises:
        ValueError: the folder exists, and its run has another configuration.
    """
    check_folder(folder, config, EXECUTION_FIELDS)
    return Unit(folder, config)


def check_folder(folder: Path, config: Config, free: Sequence[str]) -> None:
    """Raises ValueError if the folder holds a run of another configuration; fields of `free` may differ."""
    file = folder / "config.yaml"
    if not file.exists():
        return
    before, now = resolve_saved(str(file)).flat(), config.flat()
    if others := [name for name in now if name not in free and now[name] != before[name]]:
        raise ValueError(
            f"out must be new or of the same configuration, {folder} was trained with another {few(others)}"
        )


def add_arguments(parser: ArgumentParser, of: str) -> None:
    """Adds the flags of `check_arguments`."""
    parser.add_argument("--out", help=f"folder of {of} (required); finished runs in it are kept")
    parser.add_argument(
        "--record", default="", help="JSON file of finished runs, which are skipped [runs.json in the folder]"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each row, from --seed on [%(default)s]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time [%(default)s]")


def check_arguments(arguments: Namespace, page: Path, heading: str, place: str, of: str) -> Path:
    """The file of the record of a command with the flags of `add_arguments`.

    Args:
        arguments: parsed ones.
        page: the file that the command writes.
        heading: its first line.
        place: the flag that names its folder.
        of: the experiment, for errors.

    Raises:
        UsageError: there is no `--out`, or a number is too small.
        ValueError: a folder is empty or cannot be written, or the page is another file.
    """
    if arguments.out is None:
        # Not by argparse, which would name this before an unknown flag.
        raise UsageError("the following arguments are required: --out")
    if not arguments.out:
        raise ValueError("out must be a folder, got ''")
    record = Path(arguments.record or Path(arguments.out) / "runs.json")
    for name, path in ((place, page), ("record", record)):
        check_writable(name, path)
    if page.exists() and not page.read_bytes().startswith(heading.encode()):
        raise ValueError(f"{place} must be a new folder or one of {of}, {page} is another file")
    for name in ("seeds", "jobs"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"{name} must be at least 1, got {getattr(arguments, name)}")
    return record


@contextlib.contextmanager
def held(out: Path) -> Iterator[None]:
    """Makes the folder of the runs, and locks it for this process.

    Raises:
        InUse: another process trains in it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with alone(out / LOCK, f"folder {out}"):
        yield


def check_steps(base: Config) -> None:
    """Raises UsageError if the number of steps follows from the data."""
    if not base.train.steps:
        raise UsageError("steps must be above 0, so that all runs have the same number, got 0")


class Record:
    """The finished runs of an experiment, one row each, in a JSON file.

    Args:
        path: the file; it is created if it does not exist.
        base: configuration of the complete model; rows hold the fields with other values.
        of: the experiment, for errors.

    Attributes:
        runs: rows with `fields` of other values, `seed`, `rows` of scores, `seconds` and `versions`; also `name` where
            one was given, and further numbers.

    Raises:
        ValueError: the file is no record of such an experiment, or of one with another configuration.
    """

    def __init__(self, path: Path, base: Config, of: str = "an ablation") -> None:
        self.path, self.of = path, of
        self.config = base
        self.runs: list[dict[str, Any]] = []
        if path.exists():
            try:
                content = read_json(path)
                before, self.runs = completed(content["config"]), list(content["runs"])
                _check_runs(self.runs)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"record must be a new file or one of {of}, got {str(path)!r}: {type(error).__name__}: {error}"
                ) from error
            differing = [
                f"{name} {before.get(name)!r} instead of {value!r}"
                for name, value in identity(base).items()
                if before.get(name) != value
            ]
            if differing:
                raise ValueError(f"record must be new or of the same configuration, {path} has {', '.join(differing)}")

    def run(self, config: Config, name: str = "") -> dict[str, Any] | None:
        """The row of a run; None if it is not finished."""
        key = (*self._key(config), name)
        return next((run for run in self.runs if (run["fields"], run["seed"], run.get("name", "")) == key), None)

    def find(self, config: Config, name: str = "") -> list[Row] | None:
        """The scores of a run; None if it is not finished."""
        run = self.run(config, name)
        return None if run is None else [Row.from_dict(row) for row in run["rows"]]

    def seeds(
        self, config: Config, seeds: Sequence[int], label: str, name: str = ""
    ) -> tuple[dict[int, dict[str, Any]], list[str]]:
        """The rows of finished seeds, and a line on the others, if any, that begins with a label."""
        runs = {seed: self.run(config.replace(seed=seed), name) for seed in seeds}
        lacking = [str(seed) for seed, run in runs.items() if run is None]
        there = {seed: run for seed, run in runs.items() if run is not None}
        return there, [f"{label} (seed {', '.join(lacking)})"] if lacking else []

    def add(self, config: Config, summary: Mapping[str, Any], name: str = "", **more: Any) -> None:
        """Adds a finished run, from its summary, and writes the file; a second call changes nothing.

        Runs added by other processes are kept.

        Args:
            config: of the run.
            summary: its summary.json.
            name: tells apart what was measured on one run.
            more: further numbers of the row.
        """
        fields, seed = self._key(config)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(self.path.with_name(f".{self.path.name}.lock"), lambda line: say(line, sys.stderr)):
            self.runs = Record(self.path, self.config, self.of).runs
            if self.run(config, name) is None:
                kept = {key: summary[key] for key in ("rows", "seconds", "threads", "versions") if key in summary}
                named = {"name": name} if name else {}
                self.runs.append({**named, "fields": fields, "seed": seed, **kept, **more})
                self.write()

    def write(self) -> None:
        """Writes the file atomically, a line for each run."""
        lines = ",\n".join(json.dumps(run, ensure_ascii=False) for run in self.runs)
        write_text(self.path, f'{{"config": {json.dumps(self.config.flat())},\n"runs": [\n{lines}\n]}}\n')

    def times(self) -> str:
        """A sentence on the duration of runs; empty if it is unknown.

        Where some rows have the seconds of a step, the others only measure a run again, and do not count.
        """
        trained = [run for run in self.runs if "step_seconds" in run] or self.runs
        minutes = [run["seconds"] / 60 for run in trained if "seconds" in run]
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
        base = self.config.flat()
        fields = {name: value for name, value in identity(config).items() if value != base[name]}
        return fields, config.train.seed


def _check_runs(runs: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError, KeyError or TypeError if the rows of a record are not finished runs, each once."""
    found = set()
    for number, run in enumerate(runs):
        key = json.dumps([dict(run["fields"]), int(run["seed"]), run.get("name")], sort_keys=True)
        if key in found:
            raise ValueError(f"run {number} is a duplicate")
        found.add(key)
        for row in run["rows"]:
            score = Row.from_dict(row).score
            if not isinstance(score, (int, float)) or not 0 <= score <= 1:
                raise ValueError(f"scores must be numbers from 0 to 1, run {number} has {score!r}")


def identity(config: Config) -> dict[str, Any]:
    """All fields that decide what a run computes, except the seed; of Uni-Code without those of other methods."""
    others = OTHER_METHODS_FIELDS if config.method.method == "uni-code" else ()
    return {name: value for name, value in config.flat().items() if name not in (*EXECUTION_FIELDS, "seed", *others)}


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


def cause_in(log: Path) -> str:
    """The error in the log of a failed run, else its last line; a progress bar may stand before or after it."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line[line.index("error: ") + len("error: ") :] for line in lines if "error: " in line]
    return (errors or lines or ["its log is empty"])[-1]


def run_all(
    runs: Sequence[Unit], jobs: int, threads: int, of: str = "ablation", failures: list[str] | None = None
) -> Iterator[Unit]:
    """Runs the unfinished runs, `jobs` at a time, with one progress bar; yields each run at its end.

    Args:
        runs: finished ones are counted only.
        jobs: number of processes at a time.
        threads: of each process.
        of: the experiment, for the bar.
        failures: gets a line for each failed run, and the others go on; None stops them.

    Raises:
        RuntimeError: a run failed; the others are stopped, and their checkpoints are kept.
    """
    waiting = [unit for unit in runs if not unit.finished]
    running: dict[subprocess.Popen[bytes], Unit] = {}
    steps = sum(unit.config.train.steps for unit in runs)
    bar = tqdm(total=steps, initial=sum(unit.steps_done() for unit in runs), desc=of, unit="step")
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                unit = waiting.pop(0)
                running[start(unit, threads)] = unit
            time.sleep(_POLL_SECONDS)
            for process in [process for process in running if process.poll() is not None]:
                unit = running.pop(process)
                if not unit.finished:
                    failure = f"the run in {unit.folder} failed: {cause_in(unit.log)}; its log is {unit.log}"
                    if failures is None:
                        raise RuntimeError(failure)
                    failures.append(failure)
                else:
                    yield unit
            bar.set_postfix(runs=f"{sum(unit.finished for unit in runs)}/{len(runs)}", refresh=False)
            bar.update(sum(unit.steps_done() for unit in runs) - bar.n)
    finally:
        bar.close()
        for process in running:
            process.terminate()
            process.wait()
