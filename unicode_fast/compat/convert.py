"""Checkpoints from and to haihuangcode/CMG: `python -m unicode_fast.convert`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from unicode_fast import checkpoint
from unicode_fast.checkpoint import write_config
from unicode_fast.compat import from_cmg, to_cmg
from unicode_fast.compat.cmg import REST
from unicode_fast.errors import Parser, UsageError, program, say
from unicode_fast.files.paths import with_homes
from unicode_fast.files.writing import atomic_file, atomic_folder
from unicode_fast.modules import UniCode

# Key of a checkpoint for the data that `to_cmg` needs beside the model.
EXTRA_KEY = "cmg"


def read_cmg(source: str | Path, folder: str | Path, dtype: torch.dtype | None = None) -> UniCode:
    """Writes a CMG checkpoint as a run folder that `unicode_fast.load` and `evaluate` read.

    Args:
        source: file of the released pre-training, of Uni-Code or FCID.
        folder: new; written whole or not at all.
        dtype: as in `from_cmg`.

    Returns:
        The written model.

    Raises:
        ValueError: `folder` exists, or the file is no CMG checkpoint.
        OSError: the file cannot be read or the folder cannot be written.
    """
    folder = Path(folder)
    _refuse_existing(folder)
    model = from_cmg(source, dtype)
    with atomic_folder(folder) as inside:
        write_config(inside, model.config)
        rest = getattr(model, REST, None)
        extra = {} if rest is None else {EXTRA_KEY: rest}
        checkpoint.save(inside / checkpoint.FOLDER / checkpoint.BEST, model, extra)
    return model


def write_cmg(run: str | Path, file: str | Path, *, which: str | None = None, epoch: int = 0) -> None:
    """Writes a run's model as a checkpoint of the released pre-training.

    Args:
        run: run folder, or checkpoint file.
        file: new.
        which: "best", "last" or a training step; ignored when `run` is a file. None takes the best, or the last where
            there is none.
        epoch: as in `to_cmg`.

    Raises:
        ValueError: `file` exists, or the model is none of the release's.
        CheckpointError: the run has no such checkpoint.
        OSError: the file cannot be written.
    """
    run, file = Path(run), Path(file)
    _refuse_existing(file)
    name = which if which in (None, "best", "last") else int(which)
    path = run if run.is_file() else checkpoint.find(run, name)
    rest = checkpoint.read(path).get(EXTRA_KEY)
    model = checkpoint.load(path)
    if rest is not None:
        setattr(model, REST, rest)
    content = to_cmg(model, epoch=epoch)
    with atomic_file(file) as stream:
        torch.save(content, stream)


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise ValueError(f"OUT must be a new path, got {path}, which exists")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `python -m unicode_fast.convert --help`."""
    parser = Parser(prog=program("convert"), description=__doc__)
    ways = parser.add_mutually_exclusive_group(required=True)
    ways.add_argument("--from-cmg", metavar="FILE", help="CMG checkpoint to be written as run folder OUT")
    ways.add_argument("--to-cmg", metavar="RUN", help="run folder or checkpoint to be written as CMG checkpoint OUT")
    parser.add_argument("out", metavar="OUT", help="new folder or file")
    parser.add_argument("--dtype", choices=("float32", "float64"), help="of the model [the file's], for --from-cmg")
    parser.add_argument("--checkpoint", help="best, last or a step [best, or last where there is none], for --to-cmg")
    parser.add_argument("--epoch", type=int, default=0, help="epoch to write for a run from no CMG file [0]")
    arguments = parser.parse_args(with_homes(argv))
    _refuse_existing(Path(arguments.out))
    if arguments.to_cmg is not None:
        if arguments.checkpoint not in (None, "best", "last") and not arguments.checkpoint.isdigit():
            raise UsageError(f"checkpoint must be best, last or a step, got {arguments.checkpoint!r}")
        if not Path(arguments.to_cmg).exists():
            raise ValueError(f"to-cmg must be a run folder or a checkpoint file, got {arguments.to_cmg!r}")
        write_cmg(arguments.to_cmg, arguments.out, which=arguments.checkpoint, epoch=arguments.epoch)
    else:
        if not Path(arguments.from_cmg).is_file():
            raise ValueError(f"from-cmg must be a file of the released pre-training, got {arguments.from_cmg!r}")
        dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always", UserWarning)
            model = read_cmg(arguments.from_cmg, arguments.out, dtype)
        for note in notes:
            say(f"note: {note.message}")
        for name, modality in model.modalities.items():
            say(f"{name}: {modality.kind}, (B, T, {', '.join(map(str, modality.shape))})")
    say(arguments.out)
    return 0
