"""A page that shows what codewords mean: `python -m unicode_fast.inspect RUN --data DATA --media FOLDER --out FILE`."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from unicode_fast import tasks
from unicode_fast.checkpoint import CheckpointError, default_of, load
from unicode_fast.config import Config
from unicode_fast.data import Dataset, open_dataset
from unicode_fast.errors import Parser, UsageError, few, of_command_line, program, run_main, say
from unicode_fast.evaluate import check_data
from unicode_fast.files.paths import with_homes
from unicode_fast.files.writing import check_new_file, write_text
from unicode_fast.modules import UniCode
from unicode_fast.report.codebook_advice import advise
from unicode_fast.report.codebook_data import measure_codebook
from unicode_fast.report.codebook_examples import Source, collect, sources
from unicode_fast.report.codebook_page import MOST_CARDS, Heading, page, room_for
from unicode_fast.training.checks import MOVED
from unicode_fast.training.runs import choose_device, places, set_threads, versions

_OUT = "codebook.html"
_CLIPS, _MOST_CLIPS = 4, 50


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog=program("inspect"),
        description="Write one HTML page that shows the pictures, sounds and words that use each codeword most.",
    )
    parser.add_argument("run", nargs="?", help="run folder, checkpoint or exported model")
    parser.add_argument("--data", help="a built-in name, a feature store's folder or LAYOUT:ROOT [the run's]")
    parser.add_argument("--media", metavar="FOLDER", help="the media files of a store of extract [none: ids and words]")
    parser.add_argument("--out", default=_OUT, metavar="FILE", help=f"new file [{_OUT}]")
    parser.add_argument("--split", default=tasks.encoded.TEST, help="split of the clips [test]")
    parser.add_argument("--codewords", type=int, help=f"only the N most used codewords [all, at most {MOST_CARDS}]")
    parser.add_argument("--clips", type=int, default=_CLIPS, help=f"examples of a codeword and modality [{_CLIPS}]")
    parser.add_argument("--checkpoint", help="best, last, or a training step [best, else last]")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `python -m unicode_fast.inspect --help`."""
    parser = make_parser()
    arguments = parser.parse_args(with_homes(argv))
    if arguments.run is None:
        parser.error("run must be a run folder, a checkpoint or an exported model, got none")
    with of_command_line():
        check_flags(arguments)
        device = choose_device(arguments.device)
    set_threads(Path(arguments.run), new=False)
    which = arguments.checkpoint or default_of(Path(arguments.run))
    model = load(arguments.run, int(which) if which.isdigit() else which, device)
    dataset = open_data_of(model, arguments)
    if arguments.split not in dataset.splits:
        raise UsageError(f"split must be one of {', '.join(dataset.splits)} of {dataset.path}, got {arguments.split!r}")
    text = describe(model, dataset, arguments, which)
    write_text(Path(arguments.out), text)
    say(f"{arguments.out} ({len(text.encode()) / 1e6:.1f} MB); open it in a browser")
    return 0


def check_flags(arguments: Namespace) -> None:
    """Raise ValueError for an invalid value, before anything is read."""
    for flag, most in (("codewords", MOST_CARDS), ("clips", _MOST_CLIPS)):
        value = getattr(arguments, flag)
        if value is not None and not 1 <= value <= most:
            raise ValueError(f"{flag} must be in 1..{most}, got {value}")
    given = arguments.checkpoint
    if given not in (None, "best", "last") and not given.isdecimal():
        raise ValueError(f"checkpoint must be best, last or a training step, got {given!r}")
    if arguments.media is not None and not Path(arguments.media).is_dir():
        raise ValueError(f"media must be an existing folder, got {arguments.media!r}")
    check_new_file("out", Path(arguments.out))


def open_data_of(model: UniCode, arguments: Namespace) -> Dataset:
    """The data of the page.

    Raises:
        ValueError: they do not fit the model, or have no files for the media.
        CheckpointError: the data of the run are gone.
    """
    # The data may have been moved since the checkpoint was written.
    config: Config = model.config.replace_all(**places(Path(arguments.run)))
    if arguments.data is not None:
        config = config.replace(data=arguments.data)
    try:
        dataset = open_dataset(config.data)
    except FileNotFoundError as error:
        if arguments.data is not None:
            raise
        raise CheckpointError(f"data of the run are gone, {MOVED}: {error}") from error
    check_data(model, dataset, arguments)
    if arguments.media is not None:
        clips = dataset.clip_sets(dataset.splits[0])
        if not all("file" in one.arrays for one in clips):
            raise UsageError(f"media needs data with the files of clips, as extract writes them, got {dataset.path}")
    return dataset


def describe(model: UniCode, dataset: Dataset, arguments: Namespace, which: str) -> str:
    """The page.

    Args:
        model: of the run.
        dataset: with the split.
        arguments: of the command line.
        which: name of the checkpoint.
    """
    split = arguments.split
    evaluator = tasks.Evaluator(model, dataset)
    encoded = evaluator.home
    for name in tqdm(encoded.names, "encoding", unit="modality", dynamic_ncols=True, leave=False):
        encoded.codes(split, name)
    media = None if arguments.media is None else Path(arguments.media)
    of = sources({name: encoded.clips(split, name) for name in encoded.names}, dataset.preprocessor, media)
    contents = {name: one.captions for name, one in of.items() if one.captions is not None}
    most = arguments.codewords or MOST_CARDS
    clips, pictured = room_for(min(most, model.codewords), arguments.clips, of.values())
    use = measure_codebook(evaluator, split, most, clips, contents)
    codes = {name: encoded.codes(split, name, "tokens") for name in encoded.names}
    examples = collect(use, of, codes, pictured)
    notes = notes_of(use.used, len(use.codewords), (arguments.clips, clips), pictured, of)
    if examples.unread:
        listed = few([f"{file}: {reason}" for file, reason in examples.unread.items()], "; ", 400)
        notes.append(f"{len(examples.unread):,} media files could not be read: {listed}")
    for note in notes:
        say(f"note: {note}", file=sys.stderr)
    facts = {
        "run": Path(arguments.run).absolute().name,
        **({"checkpoint": which} if Path(arguments.run).is_dir() else {}),
        "method": f"{model.config.method.method}, preset {model.config.preset}",
        # The page may be given to others: no folders.
        "data": " in ".join(dict.fromkeys([dataset.name, dataset.path.name])),
        "split": split,
        **{name: value for name, value in versions().items() if name in ("unicode_fast", "torch")},
    }
    sizes = model.code_sizes
    return page(use, examples, Heading(facts, sizes, notes), advise(use, model.config, sizes))


def notes_of(used: int, shown: int, clips: tuple[int, int], pictured: int, of: dict[str, Source]) -> list[str]:
    """What the page leaves out.

    Args:
        used: number of codewords in use.
        shown: number of codewords on the page.
        clips: examples of a codeword and modality that were asked for, and those on the page.
        pictured: number of codewords with pictures and sound.
        of: the sources by modality.
    """
    notes = []
    if shown < used:
        notes.append(f"The page shows the {shown:,} most used of {used:,} codewords.")
    if clips[1] < clips[0]:
        notes.append(
            f"The codebook is large: each codeword has {clips[1]} examples of a modality instead of {clips[0]}, so "
            "that the page stays below 20 MB. --codewords shows fewer codewords with more examples."
        )
    if pictured < shown:
        notes.append(f"Pictures and sound are shown for the {pictured:,} most used codewords.")
    lacking = [
        name for name, one in of.items() if one.reads != "caption" and "file" in one.clips.arrays and not one.media
    ]
    if lacking:
        notes.append(
            f"Examples of {', '.join(lacking)} are ids and seconds. --media FOLDER shows their frames and sound."
        )
    return notes


if __name__ == "__main__":
    run_main(main)
