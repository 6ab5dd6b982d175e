"""The command `unicode-fast`, also `python -m unicode_fast`."""

from __future__ import annotations

import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib import import_module

import torch

from unicode_fast.backend import available_backends
from unicode_fast.errors import Parser, program, run_main, say
from unicode_fast.version import __version__

COMMANDS = {
    "extract": "compute features of video, sound and captions, and write a feature store",
    "train": "pre-train on paired clips, then measure how codes transfer between modalities",
    "evaluate": "measure one direction of one task on a trained run",
    "encode": "write the codes of data or media files for other programs",
    "search": "find clips of one modality by a sentence, a file, or a clip of another",
    "inspect": "write a page that shows what each codeword means",
    "report": "make the paper's tables and the figure from runs",
    "ablate": "train with each component off, with codebooks of several sizes, or each method of Table 1",
    "leaderboard": "train every method on the same data, and compare them",
    "reproduce": "print or run the commands of the paper's tables on the public features",
    "convert": "read or write checkpoints of the released code",
    "data": "check a dataset, or pack it for training",
}
# An operator of each compiled backend, and its device.
_BACKENDS = {
    "cpp": ("nearest_codeword", "cpu"),
    "cuda": ("nearest_codeword", "cuda"),
    "triton": ("cross_info_nce", "cuda"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Imports and runs one command, or prints the commands or the version."""
    parser = Parser(
        prog=program(),
        usage=f"{program()} COMMAND [--help] ...",
        epilog="commands:\n" + "\n".join(f"  {name:12}{text}" for name, text in COMMANDS.items()),
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", metavar="COMMAND", nargs="?", choices=COMMANDS, help="one of the commands below")
    parser.add_argument("--version", action="store_true", help="print versions and available backends")
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = parser.parse_args(given[:1])
    if arguments.version:
        say(f"unicode_fast {__version__}\ntorch {torch.__version__}")
        for name, (operator, device) in _BACKENDS.items():
            say(f"{name}: {available_backends(device)[operator][name]}")
    elif arguments.command is None:
        say(parser.format_help().rstrip())
    else:
        module = import_module(f"unicode_fast.{arguments.command}")
        if not hasattr(module, "main"):
            module = import_module(f"{module.__name__}.__main__")
        return int(module.main(given[1:]))
    return 0


def run() -> None:
    """Entry point of the command `unicode-fast`."""
    run_main(main)


if __name__ == "__main__":
    run()
