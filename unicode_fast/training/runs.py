"""Run folders: made new, written once, found again."""

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

from unicode_fast.checkpoint import SUMMARY, CheckpointError, write_config
from unicode_fast.cli import resolve_saved
from unicode_fast.config import EXECUTION_FIELDS, PLACE_FIELDS, Config
from unicode_fast.files import untrusted
from unicode_fast.files.writing import atomic_folder, write_json
from unicode_fast.tasks.table import Row

# In a run folder: locked by the process that works on the run.
LOCK = ".lock"
# Below a run folder: one JSON file for each row that was measured after training.
EVALUATIONS = "evaluations"


def prepare_folder(out: str | None, config: Config, seeds: Sequence[int] | None = None) -> Path:
    """A new run folder with its resolved configuration, and its seeds if it has several.

    Raises:
        ValueError: it exists already.
        OSError: it cannot be made.
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
        # One that another run makes at the same time has its name when both are ready.
        with contextlib.suppress(FileExistsError):
            make_folder(folder, config, seeds)
            return folder
        number += 1


def make_folder(folder: Path, config: Config, seeds: Sequence[int] | None = None) -> None:
    """A run folder with its resolved configuration, which `--config` reads; it appears whole or not at all.

    Raises:
        OSError: it cannot be made, or exists and is not empty.
    """
    try:
        with atomic_folder(folder) as inside:
            write_config(inside, config)
            if seeds is not None:
                write_json(inside / "seeds.json", list(seeds))
    except OSError as error:
        raise OSError(error.errno, f"run could not be made: {error.strerror}", str(folder)) from error


def versions() -> dict[str, str]:
    """What the numbers were made with."""
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
    """The part of a summary on how its numbers were made."""
    return {"threads": torch.get_num_threads(), "versions": versions(), "git_commit": git_commit()}


def resume_folder(
    path: str, flags: Mapping[str, Any], others: Sequence[str] = ()
) -> tuple[Path, Config, list[int] | None]:
    """A run folder, its configuration, and its seeds if it has several.

    Args:
        path: of the folder.
        flags: fields with which the run goes on.
        others: names of flags beside it that are no fields.

    Raises:
        CheckpointError: it is no run folder.
        ValueError: a flag has a wrong value, or is not read beside the run's configuration.
    """
    folder = Path(path)
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(f"resume must be a run folder with a config.yaml, got {path!r}")
    refused = [name for name in (*flags, *others) if name not in (*EXECUTION_FIELDS, *PLACE_FIELDS)]
    if refused:
        raise ValueError(
            f"resume takes the run's own configuration, got {', '.join(refused)} beside it; only these may change: "
            f"{', '.join((*EXECUTION_FIELDS, *PLACE_FIELDS))}"
        )
    seeds = read_seeds(folder / "seeds.json") if (folder / "seeds.json").exists() else None
    return folder, resolve_saved(str(folder / "config.yaml"), flags), seeds


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary.json of a run that has ended.

    Raises:
        CheckpointError: it is none.
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
def run_file(file: Path, cure: str = "") -> Iterator[Any]:
    """The content of a JSON file of a run; what its reader finds wrong with it becomes an error that names it.

    Raises:
        CheckpointError: it holds something else than a run or an evaluation writes.
        OSError: it cannot be read.
    """
    try:
        yield untrusted.read_json(file)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{file} is damaged{cure}: {what[:150]}") from error


def places(folder: Path) -> dict[str, str]:
    """Where the data of a run lie now, which its checkpoints may have been written before; empty for no run folder."""
    file = folder / "config.yaml"
    fields = resolve_saved(str(file)).flat() if file.is_file() else {}
    return {name: fields[name] for name in PLACE_FIELDS if fields}


def choose_device(name: str) -> torch.device:
    """The device of a run; "auto" takes a GPU where there is one.

    Raises:
        ValueError: the name is no device, or the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", name):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} is not there: torch sees no GPU; take --device cpu")
    return torch.device(name)
