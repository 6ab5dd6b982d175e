"""Run folders: creation, resume, and the files in them."""

from __future__ import annotations

import contextlib
import datetime
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unicode_fast import threads
from unicode_fast.checkpoint import SUMMARY, CheckpointError, write_config
from unicode_fast.cli import resolve_saved
from unicode_fast.config import EXECUTION_FIELDS, PLACE_FIELDS, Config
from unicode_fast.data import Dataset
from unicode_fast.data.store.write import PREPROCESSOR
from unicode_fast.errors import UsageError, say
from unicode_fast.files import untrusted
from unicode_fast.files.locks import is_held
from unicode_fast.files.writing import atomic_folder, write_json
from unicode_fast.tasks.table import Row

# File of a run folder that the process of the run locks.
LOCK = ".lock"
# Folder of a run folder with one JSON file for each row that `evaluate` has measured.
EVALUATIONS = "evaluations"


def prepare_folder(out: str | None, config: Config, seeds: Sequence[int] | None = None) -> Path:
    """A new run folder with its resolved configuration, and its seeds if it has several.

    Raises:
        ValueError: it exists already.
        OSError: it cannot be created.
    """
    if out is not None:
        if Path(out).exists():
            raise ValueError(f"out must be a folder that does not exist yet, got {out!r}; runs are never overwritten")
        make_folder(Path(out), config, seeds)
        return Path(out)
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    name, number = f"{now}-{config.preset}-{config.train.seed}", 0
    while True:
        folder = Path("runs", f"{name}-{number}" if number else name)
        # Another run may have created this folder at the same time.
        with contextlib.suppress(FileExistsError):
            make_folder(folder, config, seeds)
            return folder
        number += 1


def make_folder(folder: Path, config: Config, seeds: Sequence[int] | None = None) -> None:
    """Creates a run folder with its resolved configuration atomically.

    Raises:
        OSError: it cannot be created, or exists and is not empty.
    """
    try:
        with atomic_folder(folder) as inside:
            write_config(inside, config)
            if seeds is not None:
                write_json(inside / "seeds.json", list(seeds))
    except OSError as error:
        raise OSError(error.errno, f"run folder cannot be created: {error.strerror}", str(folder)) from error


def set_threads(folder: Path, new: bool) -> None:
    """Set the number of threads of a run; results have the same bits only with the same number.

    A new run leaves the cores to other processes that kept them busy since this command started. Its folder keeps the
    number. A resumed or evaluated run takes the number of its folder; a folder without one keeps torch's. A number that
    a variable sets goes before all.

    Args:
        folder: of the run.
        new: whether the run begins.

    Raises:
        CheckpointError: the file of the number is damaged.
        OSError: it cannot be read or written.
        ValueError: the value of a variable is no number of threads.
    """
    given, most = threads.number_is_given(), torch.get_num_threads()
    path = folder / "threads.json"
    if new:
        number = most if given else threads.idle_now(most)
        if number < most:
            say(
                f"{number} of {most} threads, because other processes use the other cores; OMP_NUM_THREADS={most} "
                "keeps all",
                file=sys.stderr,
            )
        torch.set_num_threads(number)
        write_json(path, {"threads": number})
    elif not given and path.exists():
        with run_file(path) as found:
            number = max(1, min(int(found["threads"]), most))
        if number < most:
            say(f"{number} of {most} threads, as at the start of the run", file=sys.stderr)
        torch.set_num_threads(number)


def versions() -> dict[str, str]:
    """Versions of this package, Python, torch and NumPy."""
    from unicode_fast import __version__

    return {
        "unicode_fast": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def git_commit() -> str | None:
    """The commit of the package's checkout; None outside one."""
    command, folder = ["git", "rev-parse", "HEAD"], Path(__file__).parent
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    return None


def provenance() -> dict[str, Any]:
    """Threads, versions and commit behind the numbers of a summary."""
    return {"threads": torch.get_num_threads(), "versions": versions(), "git_commit": git_commit()}


def keep_execution(folder: Path, config: Config) -> None:
    """Writes fields of EXECUTION_FIELDS that have changed to the config.yaml of a run.

    A run does this after its first step, so that it does not keep fields with which no step succeeds. One of several
    seeds that are trained together also writes to the config.yaml above them.
    """
    fields = {name: config.flat()[name] for name in EXECUTION_FIELDS}
    together = is_held(folder.parent / LOCK) and (folder.parent / "seeds.json").exists()
    for run in (folder, folder.parent)[: 1 + together]:
        if (run / "config.yaml").exists():
            saved = resolve_saved(str(run / "config.yaml"))
            if saved.replace_all(**fields) != saved:
                write_config(run, saved.replace_all(**fields))


def keep_preprocessor(folder: Path, dataset: Dataset) -> None:
    """Writes the preprocessor.json of a run folder, if the data have one.

    Raises:
        OSError: it cannot be written.
    """
    if dataset.preprocessor is not None:
        write_json(folder / PREPROCESSOR, dataset.preprocessor)


def resume_folder(
    path: str, flags: Mapping[str, Any], others: Mapping[str, Any] | None = None
) -> tuple[Path, Config, list[int] | None]:
    """A run folder, its configuration, and its seeds if it has several.

    Args:
        path: of the folder.
        flags: fields that change.
        others: the other flags that were given.

    Raises:
        CheckpointError: the folder is not a run folder.
        ValueError: a flag has a wrong value, or a resumed run does not take it.
    """
    folder = Path(path)
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(f"resume must be a run folder with a config.yaml, got {path!r}")
    changeable = (*EXECUTION_FIELDS, *PLACE_FIELDS)
    refused = {name: value for name, value in {**flags, **(others or {})}.items() if name not in changeable}
    if refused:
        saved = resolve_saved(str(folder / "config.yaml")).flat()
        kept = "".join(f", {name} {saved[name]!r}" for name in refused if name in saved)
        got = ", ".join(f"{name} {value!r:.40}" for name, value in refused.items())
        raise UsageError(
            f"resume keeps the configuration of the run{kept}, got {got}; only these may change: "
            f"{', '.join(changeable)}"
        )
    seeds = read_seeds(folder / "seeds.json") if (folder / "seeds.json").exists() else None
    return folder, resolve_saved(str(folder / "config.yaml"), flags), seeds


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary.json of a finished run.

    Raises:
        CheckpointError: it is damaged.
        OSError: it cannot be read.
    """
    with run_file(folder / SUMMARY, "; without it --resume measures the run again") as summary:
        _ = [Row.from_dict(row) for row in summary["rows"]], float(summary["seconds"])
        return summary


def read_seeds(file: Path) -> list[int]:
    """The seeds of a run of several.

    Raises:
        As `run_file`.
    """
    with run_file(file) as seeds:
        if type(seeds) is not list or not all(type(seed) is int for seed in seeds):
            raise ValueError("seeds must be a list of whole numbers")
        return seeds


@contextlib.contextmanager
def run_file(file: Path, remedy: str = "") -> Iterator[Any]:
    """Context with the content of a JSON file of a run; errors of its reader become a CheckpointError with its name.

    Raises:
        CheckpointError: its content is not that of a run or an evaluation.
        OSError: it cannot be read.
    """
    try:
        yield untrusted.read_json(file)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{file} is damaged{remedy}: {what[:150]}") from error


def places(folder: Path) -> dict[str, str]:
    """The present places of a run's data, from its config.yaml; checkpoints may hold earlier ones. {} without a run."""
    file = folder / "config.yaml"
    fields = resolve_saved(str(file)).flat() if file.is_file() else {}
    return {name: fields[name] for name in PLACE_FIELDS if fields}


def choose_device(name: str) -> torch.device:
    """The device of a run; "auto" takes a GPU where there is one.

    Raises:
        ValueError: the device is unknown or not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", name):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} is not available: torch finds no GPU; take --device cpu")
    return torch.device(name)
