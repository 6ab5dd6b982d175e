"""Single rows of the table again: `python -m unicode_fast.evaluate RUN --task T --from M --to M`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from jsonargparse import ArgumentParser

from unicode_fast.checkpoint import CheckpointError, load, write_json
from unicode_fast.cli import run_main
from unicode_fast.data import StoreError, open_dataset
from unicode_fast.runs import choose_device
from unicode_fast.tasks import PROTOCOLS, TASKS, Row, check_tasks, explain, format_table, run_row


def make_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(
        prog="python -m unicode_fast.evaluate", description="Measure one direction of one task on a trained run."
    )
    parser.add_argument("run", type=str, help="run folder that unicode_fast.train has written")
    parser.add_argument("--task", type=str, default="classification", help=f"{' or '.join(TASKS)}")
    parser.add_argument("--from", type=Optional[str], dest="from", help="modality the probe is trained on")
    parser.add_argument("--to", type=Optional[str], help="modality it is tested on")
    parser.add_argument("--protocol", type=str, default="sound", help=f"{' or '.join(PROTOCOLS)}; see --explain")
    parser.add_argument("--checkpoint", type=str, default="best", help="best, last, or a step")
    parser.add_argument("--data", type=Optional[str], help="another dataset than the run's: a name or a store's folder")
    parser.add_argument("--seed", type=Optional[int], help="of the probe [the run's]")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Optional[str], help="write the row as JSON to this new file")
    parser.add_argument("--explain", action="store_true", help="print what the task measures under the protocol, and stop")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `python -m unicode_fast.evaluate --help`."""
    arguments = make_parser().parse_args(argv)
    check_tasks([arguments.task])
    if arguments.explain:
        print(explain(arguments.task, arguments.protocol))
        return 0
    row = evaluate(
        Path(arguments.run),
        (arguments.task, arguments["from"], arguments.to),
        protocol=arguments.protocol,
        checkpoint=int(arguments.checkpoint) if arguments.checkpoint.isdigit() else arguments.checkpoint,
        data=arguments.data,
        seed=arguments.seed,
        device=arguments.device,
    )
    print(format_table([row]))
    if arguments.out is not None:
        if Path(arguments.out).exists():
            raise ValueError(f"out must be a file that does not exist yet, got {arguments.out!r}")
        write_json(Path(arguments.out), row.as_dict())
    return 0


def evaluate(
    run: Path,
    direction: tuple[str, str | None, str | None],
    *,
    protocol: str = "sound",
    checkpoint: str | int = "best",
    data: str | None = None,
    seed: int | None = None,
    device: str = "auto",
) -> Row:
    """One row of a run's table.

    Args:
        run: the run folder.
        direction: task, modality the probe is trained on, modality it is tested on.
        protocol: "sound" or "official".
        checkpoint: "best", "last" or a step.
        data: a dataset's name or folder; None takes the run's.
        seed: of the probe; None takes the run's, which repeats the run's own row.
        device: "auto", "cpu" or "cuda".

    Raises:
        CheckpointError: the run or the checkpoint is not there.
        ValueError: the task, a modality or the protocol is unknown.
        StoreError: the data do not fit.
    """
    task, source, target = direction
    model = load(run, checkpoint, choose_device(device))
    for flag, name in (("from", source), ("to", target)):
        if name not in model.names:
            raise ValueError(f"{flag} must be one of {', '.join(model.names)}, got {name!r}")
    config = model.config if data is None else model.config.replace(data=data)
    store = open_dataset(config.data)
    return run_row(
        model,
        store,
        task,
        source,  # type: ignore[arg-type]
        target,  # type: ignore[arg-type]
        protocol=protocol,
        seed=config.train.seed if seed is None else seed,
    )


if __name__ == "__main__":
    run_main(main, (ValueError, OSError, CheckpointError, StoreError))
