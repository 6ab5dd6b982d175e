"""`python -m unicode_fast.data`: `check DATA`, and `pack DATA STORE` or `shards DATA STORE` to write for training."""

from __future__ import annotations

import argparse
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from unicode_fast.config import TEXT_FIELDS, TextPadding
from unicode_fast.data.check import check
from unicode_fast.data.dataset import Dataset
from unicode_fast.data.findings import flags, train_command
from unicode_fast.data.layouts import LAYOUTS, Request, has_sentences
from unicode_fast.data.layouts.request import BERT
from unicode_fast.data.opening import open_data
from unicode_fast.data.store.write import PackedDtype, check_new, pack
from unicode_fast.data.stream import CLIPS_PER_SHARD, SPEC, write_shards
from unicode_fast.errors import Parser, UsageError, escaped, program, run_main
from unicode_fast.files.paths import with_homes
from unicode_fast.files.writing import check_new_file, write_json


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog=program("data"),
        description="Check a data set, or write it for training. DATA is a built-in name, a feature store's folder, "
        f"LAYOUT:ROOT with a layout of {', '.join(LAYOUTS)}, or {SPEC}FOLDER with tar files that `shards` wrote.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    checked = commands.add_parser("check", help="read everything once; exit status 0 if training can start, 1 if not")
    checked.add_argument("--json", metavar="FILE", help="also write the report to this file")
    packed = commands.add_parser("pack", help="write a feature store; a second call resumes an interrupted one")
    packed.add_argument("--dtype", choices=get_args(PackedDtype), default="float32", help="dtype of features [float32]")
    streamed = commands.add_parser("shards", help="write WebDataset tar files, which `--data webdataset:STORE` streams")
    streamed.add_argument("--clips", type=int, default=CLIPS_PER_SHARD, help=f"clips per file [{CLIPS_PER_SHARD}]")
    streamed.add_argument("--splits", help='separated by commas [every split, but "all" only if no other divides it]')
    for command in (checked, packed, streamed):
        command.add_argument("data", metavar="DATA", help="data set to read")
        command.add_argument("--modalities", help="modalities of a layout, separated by commas [all]")
        command.add_argument("--text_model", help=f"BERT for sentences: a name or a folder [{BERT}]")
        command.add_argument("--text_whitelist", help="file with the ids of the words to keep, such as cnt.pkl")
        command.add_argument(
            "--text_padding", choices=get_args(TextPadding), help="zeros after a sentence's last word [masked]"
        )
    for command in (packed, streamed):
        command.add_argument("store", metavar="STORE", help="new folder")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `python -m unicode_fast.data --help`."""
    parser = make_parser()
    arguments = parser.parse_args(with_homes(argv))
    if arguments.modalities is not None and arguments.data.partition(":")[0] not in LAYOUTS:
        parser.error(f"modalities applies to layouts only, got data {arguments.data!r}")
    for flag in TEXT_FIELDS:
        if getattr(arguments, flag) is not None and not has_sentences(arguments.data):
            parser.error(f"{flag} applies to layouts with sentences only, got data {arguments.data!r}")
    if arguments.command == "shards" and arguments.clips < 1:
        parser.error(f"clips must be at least 1, got {arguments.clips}")
    names = None if arguments.modalities is None else tuple(name.strip() for name in arguments.modalities.split(","))
    request = Request(
        names, arguments.text_model or BERT, arguments.text_whitelist or "", arguments.text_padding or "masked"
    )
    if arguments.command in ("pack", "shards"):
        check_new(arguments.store)
        data = open_data(arguments.data, **vars(request))
        unknown = [name for name in names or () if name not in data.modalities]
        if unknown:
            raise UsageError(
                f"modalities must be among {', '.join(data.modalities)} for {arguments.data}, got {unknown[0]!r}"
            )
        begun = time.monotonic()
        if arguments.command == "pack":
            pack(data, arguments.store, arguments.dtype)
            written = data.splits
        else:
            splits = None if arguments.splits is None else arguments.splits.split(",")
            written = write_shards(data, arguments.store, arguments.clips, splits)
        spec = arguments.store if arguments.command == "pack" else f"{SPEC}{arguments.store}"
        say_written(data, spec, written, time.monotonic() - begun)
        return 0
    if arguments.json is not None:
        check_new_file("json", Path(arguments.json))
    report = check(arguments.data, request)
    for line in report.lines():
        print(line)
    if arguments.json is not None:
        write_json(Path(arguments.json), report.as_dict())
    if report.can_start:
        print(escaped(f"next: {train_command(arguments.data, with_request(report.flags, arguments))}"))
    return 0 if report.can_start else 1


def with_request(given: str, arguments: argparse.Namespace) -> str:
    """The flags for modalities and text, then the given flags of training."""
    chosen = {name: getattr(arguments, name) for name in ("modalities", *TEXT_FIELDS)}
    return " ".join([*(f"--{name} {shlex.quote(value)}" for name, value in chosen.items() if value is not None), given])


def say_written(data: Dataset, spec: str, splits: Sequence[str], seconds: float) -> None:
    """Print what was written, and the usual next command.

    Args:
        data: what was written, or has the same clips.
        spec: the written data, as `--data` takes them.
        splits: that were written.
        seconds: that it took.
    """
    clips = {split: {name: len(one) for one in data.clip_sets(split) for name in one.modalities} for split in splits}
    counts = ", ".join(f"{split} {max(of.values())}" for split, of in clips.items())
    folder = spec.removeprefix(SPEC)
    sizes = [entry.stat().st_size for entry in os.scandir(folder)]
    size = f"{sum(sizes):,} bytes in {len(sizes)} files"
    print(escaped(f"{folder}: clips of {counts}; {size}; {seconds:.1f} s"))
    print(escaped(f"next: {train_command(spec, flags(clips, data.classes))}"))


if __name__ == "__main__":
    run_main(main)
