"""A feature store from a folder of media files: `python -m unicode_fast.extract VIDEOS STORE --captions FILE`."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from unicode_fast.data import open_store
from unicode_fast.data.__main__ import say_written
from unicode_fast.data.store.write import PackedDtype
from unicode_fast.errors import Parser, UsageError, of_command_line, program, run_main, say
from unicode_fast.files.paths import with_homes
from unicode_fast.media.backbones import Backbone, make
from unicode_fast.media.extraction import check_target, extract
from unicode_fast.media.features import DEFAULTS
from unicode_fast.media.recipes import parsed_weights, recipe

NONE = "none"


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog=program("extract"),
        description="Compute the features of video, sound and captions, and write a feature store. A second call "
        "resumes an interrupted one.",
    )
    parser.add_argument("videos", metavar="VIDEOS", help="folder of media files")
    parser.add_argument("store", metavar="STORE", help="new folder")
    parser.add_argument(
        "--captions",
        metavar="FILE",
        help="CSV with the columns file, split, class, caption, start, end; only file is needed [all media files]",
    )
    for modality, (name, _) in DEFAULTS.items():
        parser.add_argument(
            f"--{modality}", metavar="BACKBONE", help=f"a name, a local folder with a model, or {NONE} [{name}]"
        )
    parser.add_argument("--recipe", help="published features instead of these backbones: ave")
    parser.add_argument("--weights", metavar="NAME=FILE,...", help="files of the recipe's weights: vgg19, vggish, bert")
    parser.add_argument("--workers", type=int, default=2, help="processes, each for one file at a time [2]")
    parser.add_argument("--dtype", choices=get_args(PackedDtype), default="float32", help="dtype of features [float32]")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `python -m unicode_fast.extract --help`."""
    arguments = make_parser().parse_args(with_homes(argv))
    if arguments.workers < 1:
        raise UsageError(f"workers must be at least 1, got {arguments.workers}")
    check_target(arguments.store)
    if not Path(arguments.videos).is_dir():
        raise FileNotFoundError(f"videos must be an existing folder, got {arguments.videos!r}")
    begun = time.monotonic()
    with of_command_line():
        backbones = backbones_of(arguments)
    done = extract(
        arguments.videos,
        arguments.store,
        captions=arguments.captions,
        backbones=backbones,
        workers=arguments.workers,
        dtype=arguments.dtype,
    )
    for line in done.lines():
        say(line)
    say_written(open_store(arguments.store, verify=False), arguments.store, list(done.clips), time.monotonic() - begun)
    return 0


def backbones_of(arguments: Namespace) -> dict[str, Backbone] | None:
    """The backbones of the flags by modality; None for the defaults.

    Raises:
        ValueError: a flag is invalid, or flags do not go together.
    """
    chosen = {modality: getattr(arguments, modality) for modality in DEFAULTS}
    given = [f"--{modality}" for modality, name in chosen.items() if name is not None]
    if arguments.recipe is not None:
        if given:
            raise ValueError(f"recipe sets every backbone, got {given[0]} too")
        return recipe(arguments.recipe, parsed_weights(arguments.weights) if arguments.weights else {})
    if arguments.weights is not None:
        raise ValueError(f"weights needs --recipe, got {arguments.weights!r} alone")
    if not given:
        return None
    made = {
        modality: make(chosen[modality] or name, reads)
        for modality, (name, reads) in DEFAULTS.items()
        if chosen[modality] != NONE
    }
    if not made:
        raise ValueError(f"at least one modality must have a backbone, got {NONE} for {', '.join(DEFAULTS)}")
    return made


if __name__ == "__main__":
    run_main(main)
