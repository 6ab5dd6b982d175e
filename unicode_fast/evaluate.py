"""Single rows of the table for a trained run: `python -m unicode_fast.evaluate RUN --task T --from M --to M`."""

from __future__ import annotations

import hashlib
import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from unicode_fast import health, tasks
from unicode_fast.checkpoint import CheckpointError, default_of, load
from unicode_fast.cli import with_underscores
from unicode_fast.config import TEXT_FIELDS, Config
from unicode_fast.data import Dataset, open_dataset, verify
from unicode_fast.errors import Parser, UsageError, of_command_line, program, run_main, say
from unicode_fast.files.writing import check_new_file, write_json
from unicode_fast.modules import UniCode
from unicode_fast.report import pictures, plots
from unicode_fast.tasks.channels import TocRule, select
from unicode_fast.training.checks import MOVED, VERIFY_HELP, check_text_fields, note_shared, open_run_data
from unicode_fast.training.runs import EVALUATIONS, choose_device, places, set_threads

# Flags of a single task.
_OF_SEGMENTATION = ("backbone", "backbone_weights", "save_segmenter", "load_segmenter", "segmenter_steps")
_OF_TASK: dict[str, tuple[str, ...]] = {
    "anchor": ("retrieval",),
    "known": tasks.OPEN_TASKS,
    **dict.fromkeys(_OF_SEGMENTATION, ("segmentation",)),
}
_OF_TOC = ("toc_lowest", "toc_weights", "toc_rows")
# Tasks whose heads read whole codewords.
_WITHOUT_TOC = ("retrieval", "segmentation")
# File systems allow 255 bytes; the name of an unfinished file is longer than that of its target.
_LONGEST_STEM = 220
# The modalities of a direction.
_ROLES = {"from": "modality the probe is trained on", "to": "modality the probe is tested on"}


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(prog=program("evaluate"), description="Measure one direction of one task on a trained run.")
    parser.add_argument("run", nargs="?", help="run folder of unicode_fast.train; --explain needs none")
    parser.add_argument("--task", default="classification", help=f"{', '.join(tasks.TASKS[:-1])} or {tasks.TASKS[-1]}")
    parser.add_argument("--from", dest="from", help=_ROLES["from"])
    parser.add_argument("--to", help=_ROLES["to"])
    parser.add_argument("--protocol", default="held_out", help=f"{' or '.join(tasks.PROTOCOLS)}; see --explain")
    parser.add_argument("--checkpoint", help="best, last, or a training step [best, else last]")
    parser.add_argument("--data", help="name or folder of another dataset [the run's]")
    parser.add_argument("--to_data", help="transfer dataset of a cross- task [the built-in data's other domain]")
    parser.add_argument("--text_model", help="BERT for sentences of a layout: a name or a folder [the run's]")
    parser.add_argument("--text_whitelist", help="file with the ids of words to keep [the run's]")
    parser.add_argument("--text_padding", help="masked or read: zeros after a sentence's last word [the run's]")
    parser.add_argument("--anchor", help="retrieval: the modality that both are matched with [the dataset's third]")
    parser.add_argument("--known", type=int, help="open-classification: the first K classes are known [half of them]")
    parser.add_argument("--backbone", help="segmentation: light, or a model of timm such as pvt_v2_b5 [light]")
    parser.add_argument("--backbone_weights", help="segmentation: file or folder of its pre-trained weights")
    parser.add_argument("--segmenter_steps", type=int, help="segmentation: most training steps")
    parser.add_argument("--save_segmenter", help="segmentation: write the trained segmenter to this new file")
    parser.add_argument(
        "--load_segmenter",
        help="segmentation: read the segmenter from this file, and train only that of the same modality",
    )
    parser.add_argument("--toc_channels", help="TOC: the probe reads K channels of a codeword: a number, or auto [all]")
    parser.add_argument("--toc_lowest", help="TOC: shares of channels with the highest and the lowest scores [1:0]")
    parser.add_argument("--toc_weights", help="TOC: weights of similarity and variance [0.7,0.3]")
    parser.add_argument("--toc_rows", help="TOC: the codewords that are scored, all or used [all]")
    parser.add_argument("--pictures", help="folder for examples of segmentation or retrieval [the run's plots]")
    parser.add_argument("--format", help=plots.FORMAT_HELP)
    parser.add_argument("--seed", type=int, help="of the probe [the run's]")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--verify", action="store_true", help=VERIFY_HELP)
    parser.add_argument("--out", help="write the row and all its numbers as JSON to this new file")
    parser.add_argument(
        "--explain", action="store_true", help="print what the task measures under the protocol, and stop"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `python -m unicode_fast.evaluate --help`."""
    parser = make_parser()
    arguments = parser.parse_args(with_underscores(argv))
    if arguments.task not in tasks.TASKS:
        raise UsageError(f"task must be one of {', '.join(tasks.TASKS)}, got {arguments.task!r}")
    with of_command_line():
        arguments.protocol = tasks.check_protocol(arguments.protocol)
    if arguments.explain:
        say(tasks.explain(arguments.task, arguments.protocol))
        return 0
    if arguments.run is None:
        parser.error("run must be a run folder of unicode_fast.train, got none")
    with of_command_line():
        check_flags(arguments)
        device = choose_device(arguments.device)
    check_files(arguments)
    set_threads(Path(arguments.run), new=False)
    which = arguments.checkpoint or default_of(Path(arguments.run))
    model = load(arguments.run, int(which) if which.isdigit() else which, device)
    if arguments.checkpoint is None and which == "last" and Path(arguments.run).is_dir():
        say("note: the run has no best checkpoint, as without validations; the last is measured", file=sys.stderr)
    for flag in ("from", "to"):
        if getattr(arguments, flag) not in model.names:
            got = "none" if getattr(arguments, flag) is None else repr(getattr(arguments, flag))
            raise UsageError(f"--{flag} must name the {_ROLES[flag]}, one of {', '.join(model.names)}, got {got}")
    given = {name: getattr(arguments, name) for name in ("data", *TEXT_FIELDS) if getattr(arguments, name) is not None}
    # The data may have been moved since the checkpoint was written.
    model.config = model.config.replace_all(**places(Path(arguments.run)))
    with of_command_line():
        config = model.config.replace(**given)
        check_text_fields(given, config.data.data, arguments.to_data or "")
    if arguments.task == "retrieval":
        # The anchor may be a modality that the run did not train on.
        config = config.replace(modalities="all")
    row, evaluator = measure(model, config, arguments)
    say(f"{tasks.format_table([row])}\n{tasks.format_legend([row])}".rstrip())
    if row.metrics:
        say(f"\n{tasks.format_metrics(row)}")
    for warning in health.at_chance([row]):
        say(f"\nwarning: {warning}")
    if arguments.out is not None:
        write_json(Path(arguments.out), row.as_dict())
    if Path(arguments.run).is_dir():
        keep(Path(arguments.run), row, evaluator.dataset.name, arguments)
    if arguments.save_segmenter is not None:
        evaluator.segmentation.save(Path(arguments.save_segmenter), row.source, row.target, row.protocol)
    picture = picture_file(row, arguments)
    if picture is not None:
        pictures.DRAWN[row.task](picture, evaluator, row)
        say(f"\nexamples: {picture}")
    return 0


def keep(run: Path, row: tasks.Row, dataset_name: str, arguments: Namespace) -> None:
    """Writes a row to the run folder, for `unicode_fast.report`; the same flags give the same file."""
    (run / EVALUATIONS).mkdir(exist_ok=True)
    content = {"row": row.as_dict(), "dataset": dataset_name, "flags": changed_flags(arguments)}
    write_json(run / EVALUATIONS / f"{file_stem(row, arguments)}.json", content)
    if row.protocol == "held_out":
        # A report would also read the same row with the protocol's old name.
        old = file_stem(replace(row, protocol="sound"), arguments)
        (run / EVALUATIONS / f"{old}.json").unlink(missing_ok=True)


def changed_flags(arguments: Namespace) -> dict[str, Any]:
    """The given flags beside task, direction and protocol that change a row."""
    usual = {"checkpoint": default_of(Path(arguments.run)), "toc_lowest": "1:0", "toc_weights": "0.7,0.3"}
    usual["toc_rows"] = "all"
    names = (
        *("data", "to_data", *TEXT_FIELDS, "checkpoint", "anchor", "known"),
        *("backbone", "backbone_weights", "segmenter_steps", "load_segmenter", "seed"),
        *("toc_channels", *_OF_TOC),
    )
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) not in (None, usual.get(name))}


def file_stem(row: tasks.Row, arguments: Namespace) -> str:
    """The stem of a row's files in the run folder; a long one is cut and ends with a checksum of the whole."""
    flags = [f"{name} {value}" for name, value in changed_flags(arguments).items()]
    stem = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join([row.task, row.source, row.target, row.protocol, *flags]))
    if len(stem) <= _LONGEST_STEM:
        return stem
    return f"{stem[: _LONGEST_STEM - 17]}-{hashlib.sha256(stem.encode()).hexdigest()[:16]}"


def picture_file(row: tasks.Row, arguments: Namespace) -> Path | None:
    """The file for the examples of a row: in the given folder, else in the run's plots, which a report includes."""
    kind = arguments.format or "png"
    if arguments.pictures is not None:
        return Path(arguments.pictures) / f"{row.task}.{kind}"
    if row.task in pictures.DRAWN and Path(arguments.run).is_dir():
        return Path(arguments.run) / pictures.FOLDER / f"{file_stem(row, arguments)}.{kind}"
    return None


def check_flags(arguments: Namespace) -> None:
    """Checks flags before anything is read.

    Raises:
        ValueError: the task does not read a flag, or a value is invalid.
    """
    given = {flag: value for flag, value in vars(arguments).items() if value is not None}
    for flag, able in _OF_TASK.items():
        if flag in given and arguments.task not in able:
            raise ValueError(f"{flag} needs task {' or '.join(able)}, got {arguments.task}")
    for flag, least in (("segmenter_steps", 1), ("known", 1), ("seed", 0)):
        if given.get(flag, least) < least:
            raise ValueError(f"{flag} must be at least {least}, got {given[flag]}")
    if not re.fullmatch("best|last|[0-9]+", given.get("checkpoint", "best")):
        raise ValueError(f"checkpoint must be best, last or a training step, got {given['checkpoint']!r}")
    if "from" in given and given["from"] == arguments.to:
        raise ValueError(f"to must be another modality than from, got {arguments.to!r} for both")
    if "load_segmenter" in given:
        unread = [flag for flag in ("save_segmenter", "backbone_weights") if flag in given]
        if unread:
            raise ValueError(f"{unread[0]} needs training, got load_segmenter")
    toc_rule(arguments)
    for flag in ("pictures", "format"):
        if flag in given and arguments.task not in pictures.DRAWN:
            raise ValueError(f"{flag} needs task segmentation or retrieval, got {arguments.task}")
    if "format" in given:
        plots.check_format(arguments.format)


def check_files(arguments: Namespace) -> None:
    """Raise ValueError if a file to write exists or cannot be written, or a file to read does not exist."""
    for flag in ("out", "save_segmenter"):
        if getattr(arguments, flag) is not None:
            check_new_file(flag, Path(getattr(arguments, flag)))
    if arguments.load_segmenter is not None and not Path(arguments.load_segmenter).is_file():
        raise ValueError(f"load_segmenter must be a file of --save_segmenter, got {arguments.load_segmenter!r}")


def toc_rule(arguments: Namespace) -> TocRule | None:
    """The rule of the flags for TOC; None without them.

    Raises:
        ValueError: a flag needs another one or another task, or has a wrong value.
    """
    given = {flag: getattr(arguments, flag) for flag in ("toc_channels", *_OF_TOC)}
    if given["toc_channels"] is None:
        for flag in [flag for flag, value in given.items() if value is not None]:
            raise ValueError(f"{flag} needs toc_channels, got none")
        return None
    if arguments.task in _WITHOUT_TOC:
        raise ValueError(f"toc_channels needs a task with a linear probe, got {arguments.task}")
    return TocRule.from_text(*given.values())


def check_data(model: UniCode, dataset: Dataset, arguments: Namespace) -> None:
    """Checks that the data fit the model, and that they are the run's, unless others are named.

    Raises:
        ValueError: clips have another shape than those of the run, or the data of the run have changed.
    """
    for name in model.names:
        if name in dataset.modalities and dataset.modalities[name].shape != model.modalities[name].shape:
            raise ValueError(
                f"data must have {name!r} of shape {model.modalities[name].shape} at each position, as in training, "
                f"got {dataset.modalities[name].shape} in {dataset.path}"
            )
    if arguments.data is None and model.trained_on is not None and not dataset.has_digest(model.trained_on):
        # Retrieval opens more modalities than training, which changes the digest.
        if not open_run_data(model.config).has_digest(model.trained_on):
            raise ValueError(
                f"data of the run must be those of its training, {dataset.path} has changed since; "
                f"--data {model.config.data.data} measures on the changed data"
            )


def measure(model: UniCode, config: Config, arguments: Namespace) -> tuple[tasks.Row, tasks.Evaluator]:
    """The row of the arguments with all its numbers, and what measured it."""
    task, source, target = arguments.task, getattr(arguments, "from"), arguments.to
    try:
        dataset = open_dataset(config.data)
    except FileNotFoundError as error:
        if arguments.data is not None:
            raise
        raise CheckpointError(f"data of the run are gone, {MOVED}: {error}") from error
    if arguments.verify:
        verify(dataset)
    check_data(model, dataset, arguments)
    if arguments.protocol == "held_out":
        note_shared(dataset)
    seed = config.train.seed if arguments.seed is None else arguments.seed
    transfer = tasks.open_transfer(config.data, task, dataset, arguments.to_data)
    backbone = tasks.BackboneChoice(arguments.backbone or "light", arguments.backbone_weights)
    steps = arguments.segmenter_steps
    frozen: tasks.FrozenModel = model
    rule = toc_rule(arguments)
    with of_command_line():
        kind = tasks.probe_task(task).adapted(dataset, arguments.known) if task in tasks.PROBE_TASKS else None
        chosen = None if rule is None or kind is None else select(model, dataset, rule, kind, source, seed)
    if chosen is not None:
        frozen = chosen
        whole = sum(codebook.shape[1] for codebook in model.codebooks)
        say(f"note: the probe reads {len(chosen.channels)} of {whole} channels", file=sys.stderr)
    evaluator = tasks.Evaluator(
        frozen, dataset, seed, transfer=transfer, backbone=backbone, segmenter_steps=steps, known=arguments.known
    )
    if arguments.load_segmenter is not None:
        evaluator.segmentation.load(Path(arguments.load_segmenter), source, target, arguments.protocol)
    return evaluator.row(task, source, target, arguments.protocol, anchor=arguments.anchor, details=True), evaluator


if __name__ == "__main__":
    run_main(main)
