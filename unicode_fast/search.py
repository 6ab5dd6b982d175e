"""Search across modalities: `python -m unicode_fast.search RUN --data STORE --query TEXT --in video`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from unicode_fast.cli import with_underscores
from unicode_fast.codes.folder import read_codes
from unicode_fast.codes.searching import Hit, search
from unicode_fast.data import open_dataset
from unicode_fast.encode import add_run, load_run, names_of
from unicode_fast.errors import Parser, UsageError, of_command_line, one_line, program, run_main, say
from unicode_fast.files.writing import check_new_file, write_json

# Characters of a caption, of an id and of a file in the table.
_WIDEST = 60


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog=program("search"),
        description="Find the clips of one modality whose codes are nearest to those of a sentence, a file or a clip.",
    )
    add_run(parser)
    parser.add_argument("--data", help="data whose clips are searched [the run's]")
    parser.add_argument("--query", help="a sentence, a media file, or id:CLIP, a clip of the data")
    parser.add_argument("--in", dest="in", metavar="MODALITY", help="modality of the clips that are searched")
    parser.add_argument(
        "--from", dest="from", metavar="MODALITY", help="modality of the query [all it has, without the searched one]"
    )
    parser.add_argument("--top", type=int, default=10, help="number of clips [10]")
    parser.add_argument("--splits", help="splits that are searched, separated by commas [all]")
    parser.add_argument("--codes", help="folder of encode with the codes of the data [a cache file]")
    parser.add_argument("--json", metavar="FILE", help="also write the result to this new file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `python -m unicode_fast.search --help`."""
    arguments = make_parser().parse_args(with_underscores(argv))
    check_flags(arguments)
    model = load_run(arguments)
    given = {} if arguments.data is None else {"data": arguments.data}
    data = open_dataset(model.config.replace(**given, modalities="all").data)
    codes = None if arguments.codes is None else read_codes(arguments.codes)
    with of_command_line():
        hits = search(
            model,
            data,
            arguments.query,
            getattr(arguments, "in"),
            top=arguments.top,
            source=getattr(arguments, "from"),
            splits=names_of(arguments.splits),
            codes=codes,
        )
    for line in table(hits):
        say(line)
    if arguments.json is not None:
        asked = {"query": arguments.query, "in": getattr(arguments, "in"), "from": getattr(arguments, "from")}
        write_json(Path(arguments.json), {**asked, "data": data.name, "hits": [hit._asdict() for hit in hits]})
    return 0


def check_flags(arguments: Namespace) -> None:
    """Raise UsageError for flags that are missing or invalid."""
    for flag, what in (("query", "a sentence, a media file or id:CLIP"), ("in", "a modality")):
        if not (getattr(arguments, flag) or "").strip():
            raise UsageError(f"--{flag} must be {what}, got none")
    if arguments.top < 1:
        raise UsageError(f"top must be at least 1, got {arguments.top}")
    if arguments.json is not None:
        with of_command_line():
            check_new_file("json", Path(arguments.json))


def table(hits: Sequence[Hit]) -> list[str]:
    """The lines of a result."""
    rows = [["rank", "score", "clip", "file", "start", "caption"]]
    for hit in hits:
        start = "-" if hit.start_s is None else f"{hit.start_s:g}"
        named = [one_line(text, _WIDEST) if text else "-" for text in (hit.id, hit.file, start, hit.caption)]
        rows.append([str(hit.rank), f"{hit.score:.4f}", *named])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


if __name__ == "__main__":
    run_main(main)
