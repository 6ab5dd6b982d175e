"""Codes of data or media files by a trained model: `python -m unicode_fast.encode RUN DATA CODES`."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from unicode_fast.checkpoint import default_of, load
from unicode_fast.cli import with_underscores
from unicode_fast.codes.files import backbones_of, move_weights
from unicode_fast.codes.folder import CLIPS_PER_SHARD, CodesFolder, encode_to_folder
from unicode_fast.codes.formats import Format
from unicode_fast.codes.sources import ClipSource, FileSource, Source, modalities_of, splits_of
from unicode_fast.data import open_dataset
from unicode_fast.data.store.write import MANIFEST, check_new
from unicode_fast.errors import Parser, UsageError, few, of_command_line, program, run_main, say
from unicode_fast.media.captions import Part, list_files, read_captions
from unicode_fast.media.recipes import parsed_weights
from unicode_fast.modules import UniCode
from unicode_fast.training.runs import choose_device, places, set_threads


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog=program("encode"),
        description="Write the codes of clips or media files for other programs. A second call resumes an interrupted "
        "one.",
    )
    add_run(parser)
    parser.add_argument(
        "data",
        metavar="DATA",
        help="what --data of train takes, or a media file, or a folder of them; files need a run on data of extract",
    )
    parser.add_argument("codes", metavar="CODES", help="new folder")
    parser.add_argument("--format", choices=get_args(Format), default="npz", help="of the shards [npz]")
    parser.add_argument("--splits", help="separated by commas [all]")
    parser.add_argument("--modalities", help="separated by commas [all that model and data have]")
    parser.add_argument("--vectors", action="store_true", help="write the codewords beside the codes")
    parser.add_argument("--captions", metavar="FILE", help="CSV of a folder of media files, as extract reads it")
    parser.add_argument("--caption", metavar="TEXT", help="words of a single media file")
    parser.add_argument(
        "--clips_per_shard", type=int, default=CLIPS_PER_SHARD, help=f"clips or files of a shard [{CLIPS_PER_SHARD}]"
    )
    return parser


def add_run(parser: Parser) -> None:
    """The arguments that choose a model."""
    parser.add_argument("run", metavar="RUN", help="run folder, checkpoint, or file of export")
    parser.add_argument("--checkpoint", help="best, last, or a training step of a run folder [best, else last]")
    parser.add_argument("--device", default="cpu", help="auto, cpu or cuda [cpu]")
    parser.add_argument(
        "--weights", metavar="NAME=FILE,...", help="where the weights of the run's backbones are on this machine"
    )


def load_run(arguments: Namespace) -> UniCode:
    """The model of the arguments, with the present place of its data."""
    run, which = Path(arguments.run), arguments.checkpoint
    if which is not None and which not in ("best", "last") and not which.isdigit():
        raise UsageError(f"checkpoint must be best, last or a training step, got {which!r}")
    with of_command_line():
        device = choose_device(arguments.device)
    which = which or (default_of(run) if run.is_dir() else None)
    model = load(run, int(which) if which and which.isdigit() else which, device)
    # The data may have been moved since the checkpoint was written.
    model.config = model.config.replace_all(**places(run))
    if run.is_dir():
        set_threads(run, new=False)
    if arguments.weights is not None:
        with of_command_line():
            move_weights(model, parsed_weights(arguments.weights))
    return model


def names_of(flag: str | None) -> list[str] | None:
    """The names in a flag, separated by commas; None without the flag."""
    return None if flag is None else [name.strip() for name in flag.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `python -m unicode_fast.encode --help`."""
    arguments = make_parser().parse_args(with_underscores(argv))
    if arguments.clips_per_shard < 1:
        raise UsageError(f"clips_per_shard must be at least 1, got {arguments.clips_per_shard}")
    check_new(arguments.codes)
    model = load_run(arguments)
    source = source_of(model, arguments)
    begun = time.monotonic()
    written = encode_to_folder(
        model, source, arguments.codes, arguments.format, clips_per_shard=arguments.clips_per_shard
    )
    for line in lines(written, source, time.monotonic() - begun):
        say(line)
    return 0


def source_of(model: UniCode, arguments: Namespace) -> Source:
    """The clips or files of the arguments.

    Raises:
        UsageError: a flag is invalid, or does not apply to these data.
    """
    path = Path(arguments.data)
    is_folder = path.is_dir() and not (path / MANIFEST).exists()
    if not path.is_file() and not is_folder:
        unread = [flag for flag in ("captions", "caption") if getattr(arguments, flag) is not None]
        if unread:
            raise UsageError(f"{unread[0]} applies to media files, got data {arguments.data!r}")
        data = open_dataset(model.config.replace(data=arguments.data, modalities="all").data)
        with of_command_line():
            splits = splits_of(data, names_of(arguments.splits))
            names = modalities_of(model, data.modalities, names_of(arguments.modalities))
            return ClipSource(data, splits, names, arguments.vectors)
    if model.preprocessor is None:
        raise UsageError(
            f"run must be trained on features of `extract` to encode media files such as {arguments.data!r}, "
            f"got {arguments.run!r}, whose features are of unknown origin"
        )
    with of_command_line():
        names = modalities_of(model, model.modalities, names_of(arguments.modalities))
        backbones_of(model, names)
    wrong = "captions" if path.is_file() else "caption"
    if getattr(arguments, wrong) is not None:
        kind = "a folder of media files" if wrong == "captions" else "a single media file"
        raise UsageError(f"{wrong} applies to {kind}, got {arguments.data!r}")
    if path.is_file():
        if arguments.splits is not None:
            raise UsageError(f"splits applies to data sets and folders, got {arguments.data!r}")
        return FileSource(model, path.parent, [Part(path.name, "all", caption=arguments.caption or "")], names,
                          arguments.vectors)  # fmt: skip
    parts = (list_files(path) if arguments.captions is None else read_captions(Path(arguments.captions), path)).parts
    there = list(dict.fromkeys(part.split for part in parts))
    splits = names_of(arguments.splits) or there
    unknown = [split for split in splits if split not in there]
    if unknown:
        raise UsageError(f"splits must be among {', '.join(there)}, got {unknown[0]!r}")
    return FileSource(model, path, [part for part in parts if part.split in splits], names, arguments.vectors)


def lines(written: CodesFolder, source: Source, seconds: float) -> list[str]:
    """What was written, in a few lines."""
    header = written.header
    shards, skipped = len(header["shards"]), header["skipped"]
    size = sum(shard["bytes"] for shard in header["shards"])
    found = [
        f"{written.path}: codes of {header['clips']:,} clips in {', '.join(header['modalities'])}; {shards} "
        f"{'file' if shards == 1 else 'files'} of {header['files']}, {size:,} bytes; {seconds:.1f} s"
    ]
    if skipped:
        named = few([f"{one['id']}: {one['reason']}" for one in skipped])
        found.append(f"{len(skipped):,} of {len(source):,} files skipped, listed in codes.json: {named}")
    return found


if __name__ == "__main__":
    run_main(main)
