"""Single rows of the table again: `python -m unicode_fast.evaluate RUN --task T --from M --to M`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from unicode_fast.checkpoint import CheckpointError, load, write_json
from unicode_fast.cli import run_main
from unicode_fast.data import StoreError, open_dataset
from unicode_fast.runs import choose_device
from unicode_fast.tasks import PROTOCOLS, TASKS, check_tasks, explain, format_table, run_row


def make_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(
        prog="python -m unicode_fast.evaluate", description="Measure one direction of one task on a trained run."
    )
    parser.add_argument("run", type=str, help="run folder that unicode_fast.train has written")
    parser.add_argument("--task", type=str, default="classification", help=f"{' or '.join(TASKS)}")
    parser.add_argument("--from", type=str | None, dest="from", help="modality the probe is trained on")
    parser.add_argument("--to", type=str | None, help="modality it is tested on")
    parser.add_argument("--protocol", type=str, default="sound", help=f"{' or '.join(PROTOCOLS)}; see --explain")
    parser.add_argument("--checkpoint", type=str, default="best", help="best, last, or a step")
    parser.add_argument("--data", type=str | None, help="another dataset than the run's: a name or a store's folder")
    parser.add_argument("--seed", type=int | None, help="of the probe [the run's]")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=str | None, help="write the row as JSON to this new file")
    parser.add_argument(
        "--explain", action="store_true", help="print what the task measures under the protocol, and stop"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `python -m unicode_fast.evaluate --help`."""
    arguments = make_parser().parse_args(argv)
    check_tasks([arguments.task])
    if arguments.explain:
        print(explain(arguments.task, arguments.protocol))
        return 0
    which = int(arguments.checkpoint) if arguments.checkpoint.isdigit() else arguments.checkpoint
    if arguments.out is not None and Path(arguments.out).exists():
        raise ValueError(f"out must be a file that does not exist yet, got {arguments.out!r}")
    model = load(arguments.run, which, choose_device(arguments.device))
    for flag in ("from", "to"):
        if arguments[flag] not in model.names:
            raise ValueError(f"{flag} must be one of {', '.join(model.names)}, got {arguments[flag]!r}")
    config = model.config if arguments.data is None else model.config.replace(data=arguments.data)
    row = run_row(
        model,
        open_dataset(config.data),
        arguments.task,
        arguments["from"],
        arguments.to,
        protocol=arguments.protocol,
        seed=config.train.seed if arguments.seed is None else arguments.seed,
    )
    print(format_table([row]))
    if arguments.out is not None:
        write_json(Path(arguments.out), row.as_dict())
    return 0


if __name__ == "__main__":
    run_main(main, (ValueError, OSError, RuntimeError, CheckpointError, StoreError))
