"""What there is to run: `python -m unicode_fast`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "pre-train on paired clips, then measure what codes carry from modality to modality",
    "evaluate": "measure one direction of one task on a trained run",
    "report": "make the paper's tables and the figure from runs",
    "ablate": "train with each component off, and with codebooks of several sizes",
    "convert": "read or write checkpoints of the released code",
    "data": "check a data set, or write it for training",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the commands; each is a module of its own."""
    given = sys.argv[1:] if argv is None else argv
    print("usage: python -m unicode_fast.COMMAND [--help] ...\n")
    for name, text in COMMANDS.items():
        print(f"  {name:10}{text}")
    if not given or given[0] in ("-h", "--help"):
        return 0
    print(f"\nerror: a command follows a dot, as in python -m unicode_fast.train, got {given[0]!r}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
