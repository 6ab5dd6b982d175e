"""The start of a run: a new folder, or the folder and checkpoint of a resumed run."""

from __future__ import annotations

import contextlib
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from unicode_fast import checkpoint
from unicode_fast.checkpoint import CheckpointError, write_config
from unicode_fast.cli import added_fields, read_yaml, resolve, resolve_saved
from unicode_fast.config import PLACE_FIELDS, Config, Modality, modality_names
from unicode_fast.data import Dataset, verify
from unicode_fast.errors import UsageError, of_command_line, one_line, say
from unicode_fast.files.locks import alone
from unicode_fast.files.writing import remove_unfinished
from unicode_fast.methods import make_model, row_name
from unicode_fast.methods.registry import check_method
from unicode_fast.presets import usual
from unicode_fast.report import pictures
from unicode_fast.training import checks
from unicode_fast.training.distributed import DistContext
from unicode_fast.training.runs import LOCK, choose_device, prepare_folder, resume_folder


class Run(NamedTuple):
    """A new or resumed run; `dataset` is None if it has finished."""

    folder: Path
    config: Config
    seeds: list[int] | None
    dataset: Dataset | None


@contextlib.contextmanager
def held(folder: Path, ranks: DistContext) -> Iterator[None]:
    """Locks a run folder for this run.

    Raises:
        InUse: another process uses it.
    """
    with contextlib.ExitStack() as stack:
        ranks.run_on_rank0(lambda: stack.enter_context(alone(folder / LOCK, f"run {folder}")))
        yield


@contextlib.contextmanager
def new_run(arguments: Namespace, flags: Mapping[str, Any], ranks: DistContext) -> Iterator[Run]:
    """A new run folder, created and locked after all checks.

    Raises:
        ValueError: a flag or field is wrong, does not fit the data, or has no effect.
    """
    if arguments.resume_step is not None:
        raise UsageError("resume_step needs --resume RUN")
    if arguments.seeds < 1:
        raise UsageError(f"seeds must be at least 1, got {arguments.seeds}")
    config = checks.with_whole_paths(resolve(arguments.config, dict(flags)))
    with of_command_line():
        checks.check_run(config)
    added = added_fields(read_yaml(arguments.config)) if arguments.config is not None else {}
    standard = (resolve_saved(arguments.config) if added else usual(config)).flat()
    if added and ranks.first:
        values = ", ".join(f"{name} {value}" for name, value in added.items())
        say(f"note: config {arguments.config!r} is of an older version; added fields: {values}", sys.stderr)
    with of_command_line():
        checks.check_flags(config, flags, standard)
    ranks.begin(config.train.rank_timeout_seconds)
    dataset = checks.open_run_data(config)
    if arguments.verify:
        ranks.run_on_rank0(lambda: verify(dataset))
    modalities = checks.check_store(config, dataset)
    with of_command_line():
        checks.check_flags(config, flags, standard, [modality.kind for modality in modalities.values()])
    checks.check_ranks(config, len(dataset.split(config.data.train_split)), ranks)
    if ranks.first:
        checks.note_labels(config, dataset)
        checks.note_lacking(config, dataset, modalities)
    with of_command_line(), torch.device("meta"):
        # Raises for sizes that do not fit, before the folder is created.
        make_model(modalities, config)
    seeds = [config.train.seed + n for n in range(arguments.seeds)] if arguments.seeds > 1 else None
    folder = ranks.run_on_rank0(lambda: prepare_folder(arguments.out, config, seeds))
    with held(folder, ranks):
        yield Run(folder, config, seeds, dataset)


@contextlib.contextmanager
def resumed_run(arguments: Namespace, flags: Mapping[str, Any], ranks: DistContext) -> Iterator[Run]:
    """The locked folder of a resumed run; new places of its data are written to its config.yaml.

    Raises:
        CheckpointError: the folder is not a run folder, or the data are not those of the run.
        InUse: another process uses it.
        ValueError: a flag has a wrong value, or cannot change.
    """
    others = {name: getattr(arguments, name) for name in ("out", "config") if getattr(arguments, name) is not None}
    others |= {"seeds": arguments.seeds} if arguments.seeds != 1 else {}
    folder, config, seeds = ranks.run_on_rank0(lambda: resume_folder(arguments.resume, flags, others))
    if seeds and arguments.resume_step is not None:
        raise UsageError(f"resume_step needs the run of one seed, such as --resume {folder / f'seed-{seeds[0]}'}")
    moved = [name for name in PLACE_FIELDS if name in flags]
    if moved:
        config = checks.with_whole_paths(config)
    with of_command_line():
        check_method(config)
        checks.check_text_fields(moved, config.data.data)

    def ended() -> bool:
        summaries = [path / checkpoint.SUMMARY for path in (folder, *(folder / f"seed-{seed}" for seed in seeds or ()))]
        return arguments.resume_step is None and ranks.run_on_rank0(lambda: all(path.exists() for path in summaries))

    with contextlib.ExitStack() as stack:
        if moved or not ended():
            stack.enter_context(held(folder, ranks))
        # The run may have finished while this process waited for the lock.
        finished = ended()
        if finished and not moved:
            if flags:
                say(f"note: the run has finished, {', '.join(flags)} did not change", file=sys.stderr)
            yield Run(folder, config, seeds, None)
            return
        if not finished:
            with of_command_line():
                checks.check_run(config)
        ranks.begin(config.train.rank_timeout_seconds)
        try:
            dataset = checks.open_run_data(config)
        except FileNotFoundError as error:
            raise CheckpointError(f"data of run {folder} are gone, {checks.MOVED}: {error}") from error
        if arguments.verify:
            ranks.run_on_rank0(lambda: verify(dataset))
        if not finished:
            checks.check_ranks(config, len(dataset.split(config.data.train_split)), ranks)
        if moved:
            places = {name: config.flat()[name] for name in moved}
            ranks.run_on_rank0(lambda: move_data(folder, seeds, places, dataset, arguments.resume_step))
        yield Run(folder, config, seeds, None if finished else dataset)


def describe(folder: Path, config: Config, seeds: Sequence[int] | None, dataset: Dataset) -> None:
    """Prints five lines about a run at its start, its folder first."""
    values, standard = config.flat(), usual(config).flat()
    changed = [f"{name} {value}" for name, value in values.items() if value != standard[name] and name != "data"]
    kinds = dataset.modalities_named(modality_names(config.data.modalities, tuple(dataset.modalities)))
    shapes = ", ".join(f"{name} ({kind.kind} {'x'.join(map(str, kind.shape))})" for name, kind in kinds.items())
    length = f"{config.train.steps} steps" if config.train.steps else f"{config.train.epochs} epochs"
    seeded = f"seeds {', '.join(map(str, seeds))}" if seeds else f"seed {config.train.seed}"
    lines = (
        f"run {folder}",
        f"data {dataset!r}; {shapes}",
        f"method {row_name(config.method.method, config.method.dcid)}, preset {config.preset}, size {config.size}"
        + (f", but {', '.join(changed)}" if changed else ""),
        f"training {length} of {config.train.batch_size} clips on {choose_device(config.train.device)}, {seeded}",
        f"configuration {folder / 'config.yaml'}",
    )
    say("\n".join(map(one_line, lines)))


def read_content(
    folder: Path,
    step: int | None,
    config: Config,
    modalities: Mapping[str, Modality],
    dataset: Dataset,
    ranks: DistContext,
) -> dict[str, Any] | None:
    """The content of the checkpoint that is resumed, with changed fields in its progress; None for a new run.

    Args:
        folder: of the run.
        step: of the checkpoint; None takes the last, if there is one.
        config: of the run.
        modalities: of the run.
        dataset: of the run.
        ranks: the ranks that train together.

    Raises:
        CheckpointError: the checkpoint does not exist, is damaged, or is of another model, other data, or a stream
            with another number of ranks; or the run has finished and has no checkpoint.
    """
    if step is None and not checkpoint.steps_in(folder):
        if (folder / checkpoint.SUMMARY).exists():
            raise CheckpointError(f"run {folder} has finished and has no checkpoint left to resume from")
        if (folder / checkpoint.METRICS).exists():
            say(f"note: run {folder} has no checkpoint, so it starts again from step 0", file=sys.stderr)
        return None
    content = checkpoint.read_for_resume(folder, step)
    before, fields = checkpoint.check_model(content, config, modalities), config.flat()
    check_digest(content, dataset)
    progress = content["progress"]
    check_ranks_of_stream(progress, dataset, ranks)
    changes = progress.setdefault("changes", [])
    for name, value in before.items():
        say(f"from step {content['step']} on {name} is {fields[name]}, no longer {value}", file=sys.stderr)
        changes.append({"step": content["step"], "field": name, "before": value, "after": fields[name]})
    return content


def check_digest(content: Mapping[str, Any], dataset: Dataset) -> None:
    """Raise CheckpointError if the data are not those of the checkpoint's run."""
    if not dataset.has_digest(content["progress"]["data"]):
        raise CheckpointError(
            f"data must be what the checkpoint of step {content['step']} was trained on, got {dataset!r}"
        )
    if content.get("preprocessor") != dataset.preprocessor:
        raise CheckpointError(
            f"preprocessor of the data must be that of the checkpoint of step {content['step']}, got another"
        )


def check_ranks_of_stream(progress: Mapping[str, Any], dataset: Dataset, ranks: DistContext) -> None:
    """Raise CheckpointError if a run on a stream does not resume with the checkpoint's number of ranks."""
    if not dataset.shares_batches and progress.get("ranks") != ranks.size:
        raise CheckpointError(
            f"number of ranks must be {progress.get('ranks')} as before, because each rank reads its own files of a "
            f"stream, got {ranks.size}"
        )


def move_data(
    folder: Path, seeds: Sequence[int] | None, places: Mapping[str, str], dataset: Dataset, step: int | None
) -> None:
    """Writes the new places of a run's data into its config.yaml and those of its seeds.

    Args:
        folder: of the run.
        seeds: of the run, if it has several.
        places: fields of PLACE_FIELDS.
        dataset: the data at these places.
        step: of the checkpoint that is resumed; None for the last.

    Raises:
        CheckpointError: the run was trained on other data.
    """
    below = [folder] if seeds is None else [folder / f"seed-{seed}" for seed in seeds]
    runs = [path for path in below if (path / "config.yaml").exists()]
    for run in runs:
        if checkpoint.steps_in(run):
            check_digest(checkpoint.read_for_resume(run, step), dataset)
    for run in dict.fromkeys((*runs, folder)):
        write_config(run, resolve_saved(str(run / "config.yaml"), places))


def clear(folder: Path, content: Mapping[str, Any] | None, resume_step: int | None) -> None:
    """Prepares a run folder for writing: removes unfinished files of killed processes, moves later work aside.

    Args:
        folder: of the run, locked by this process.
        content: of the checkpoint that is resumed; None for a new run.
        resume_step: value of `--resume_step`; None for the last.
    """
    checkpoints = folder / checkpoint.FOLDER
    for below in (folder, folder / pictures.FOLDER, checkpoints, *checkpoints.glob(f"{checkpoint.ASIDE}-*")):
        remove_unfinished(below)
    if content is None:
        return
    step, progress = content["step"], content["progress"]
    if resume_step is not None and (aside := checkpoint.set_aside(folder, step, progress["bytes"])) is not None:
        say(f"files of the run after step {step} are moved to {aside}", file=sys.stderr)
    checkpoint.keep_newest(folder)
    if progress["best"] and progress["best"]["step"] != checkpoint.step_of_best(folder):
        # A later checkpoint has replaced the best one; the same validations run again and choose it or a better one.
        progress["best"] = None
