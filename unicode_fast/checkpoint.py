"""Checkpoints: atomic writes, reads without unpickling code, and errors that name a damaged file."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from unicode_fast import checked_state
from unicode_fast.backend import find_device
from unicode_fast.config import EXECUTION_FIELDS, PLACE_FIELDS, Config, Modality, completed
from unicode_fast.errors import few
from unicode_fast.files.checked_torch import read_torch
from unicode_fast.files.tensor_files import read_tensors, write_tensors
from unicode_fast.files.untrusted import BadFile, open_file
from unicode_fast.files.writing import atomic_file, path_of, sync_folder, write_text
from unicode_fast.modules import UniCode
from unicode_fast.modules.wrapped import plain_model
from unicode_fast.presets import from_saved

FORMAT = 1
FOLDER = "checkpoints"
BEST = "best.pt"
# Prefix of the state that a run saves after a non-finite loss.
NON_FINITE = "nonfinite-"
# Key of the checkpoint's name for messages, beside the keys of the file.
WHERE = "where"
# Prefix of folders with the later files of a run that has resumed from an earlier step.
ASIDE = "aside"
SUMMARY = "summary.json"
METRICS = "metrics.jsonl"
EXPORT_SUFFIX = ".safetensors"
_NAME = re.compile(r"step-(\d+)\.pt")


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged or of another program; the message names the file and one to use instead."""


def write_config(folder: Path, config: Config) -> None:
    """Writes the config.yaml of a run folder atomically.

    Raises:
        OSError: it cannot be written.
    """
    write_text(folder / "config.yaml", yaml.safe_dump(config.flat(), sort_keys=False))


def config_to_dict(config: Config, modalities: Mapping[str, Modality]) -> dict[str, Any]:
    """The configuration and modalities of a model, in plain types."""
    shapes = {name: {"kind": kind.kind, "shape": list(kind.shape)} for name, kind in modalities.items()}
    return {"fields": config.flat(), "modalities": shapes}


def config_from_dict(saved: Mapping[str, Any], where: str = "checkpoint") -> tuple[Config, dict[str, Modality]]:
    """The inverse of `config_to_dict`, also for mappings of older versions.

    Args:
        saved: the mapping.
        where: name of its file, for the message.

    Raises:
        CheckpointError: a field is unknown, missing and not in ADDED_FIELDS, or has an invalid value.
    """
    try:
        checked_state.check_config(saved)
        shapes = saved["modalities"]
        modalities = {name: Modality(item["kind"], tuple(item["shape"])) for name, item in shapes.items()}
        return from_saved(saved["fields"]), modalities
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where} is of another version or damaged: {error}") from error


def changed_fields(content: Mapping[str, Any], config: Config, modalities: Mapping[str, Modality]) -> dict[str, Any]:
    """The fields in which a resumed run differs from its checkpoint, with the values of the checkpoint.

    Args:
        content: of the checkpoint.
        config: of the run.
        modalities: of the run.

    Raises:
        CheckpointError: the model differs, because a changed field is not in EXECUTION_FIELDS or PLACE_FIELDS, or
            modalities differ. Or a field of the checkpoint is unknown, or missing and not in ADDED_FIELDS.
    """
    saved, own = content["config"], config_to_dict(config, modalities)
    try:
        before = completed(saved["fields"])
    except ValueError as error:
        raise CheckpointError(f"{where_of(content)} is of another version: {error}") from error
    fields = {name: value for name, value in before.items() if own["fields"][name] != value}
    changed = sorted({*fields} - {*EXECUTION_FIELDS, *PLACE_FIELDS})
    others = [f"{name} {fields[name]!r} instead of {own['fields'][name]!r}" for name in changed]
    if saved["modalities"] != own["modalities"]:
        others.append("other modalities or shapes")
    if others:
        raise CheckpointError(f"{where_of(content)} must have the run's configuration, got {few(others)}")
    return fields


def save(path: Path, model: UniCode, extra: Mapping[str, Any] | None = None) -> None:
    """Writes a model, its configuration and other entries atomically.

    Args:
        path: of the file.
        model: a UniCode, or torch.compile's or DataParallel's wrapper of one.
        extra: other entries, tensors and plain types only.

    Raises:
        TypeError: `model` is not a UniCode.
        ValueError: a layer of the model was replaced.
        OSError: the folder cannot be written or the disk is full; an older file stays.
    """
    model, state = plain_model(model)
    content = {
        "format": FORMAT,
        "config": config_to_dict(model.config, model.modalities),
        "model": state,
        **_preprocessor_of(model),
        **(extra or {}),
    }
    try:
        with atomic_file(path) as file:
            torch.save(content, file)
    except RuntimeError as error:
        # torch reports a failed write of its zip archive without the reason.
        free = shutil.disk_usage(path.parent).free / 1e6
        raise OSError(
            f"checkpoint {path} cannot be written, with {free:.0f} MB free on the disk ({error}); older files are kept"
        ) from error


def _preprocessor_of(model: UniCode) -> dict[str, Any]:
    return {} if model.preprocessor is None else {"preprocessor": model.preprocessor}


def read(path: Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """The content of a checkpoint.

    Raises:
        CheckpointError: it is missing, truncated, damaged or of another format.
    """
    try:
        content = read_torch(path, map_location)
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {path} does not exist") from error
    except (BadFile, OSError) as error:
        raise CheckpointError(f"checkpoint {path} is truncated or damaged: {error}") from error
    version = content.get("format") if isinstance(content, dict) else None
    if type(version) is not int or version != FORMAT:
        raise CheckpointError(f"checkpoint {path} must be of format {FORMAT}, as unicode_fast.train writes it")
    _check_entries(path, content, ("config", "model"))
    with _named(f"checkpoint {path} is damaged:"):
        checked_state.check_config(content["config"])
        checked_state.check_tensors(content["model"])
    return content


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """Turns a BadFile into a CheckpointError that names the file."""
    try:
        yield
    except BadFile as error:
        raise CheckpointError(f"{where} {error}") from error


def _check_entries(path: Path, content: Mapping[str, Any], names: Sequence[str]) -> None:
    lacking = [name for name in names if name not in content]
    if lacking:
        raise CheckpointError(f"checkpoint {path} is damaged: it lacks {', '.join(lacking)}")


def load_model(model: UniCode, content: Mapping[str, Any], where: str) -> None:
    """Loads the parameters and buffers of a checkpoint into a model.

    Args:
        model: of the checkpoint's configuration.
        content: of the checkpoint.
        where: name of its file, for the message.

    Raises:
        CheckpointError: they do not fit the model.
    """
    with _named(where):
        checked_state.check_state(model, content["model"])
    model.load_state_dict(content["model"])


def check_model(content: Mapping[str, Any], config: Config, modalities: Mapping[str, Modality]) -> dict[str, Any]:
    """Raise CheckpointError if a checkpoint does not fit the model of a run, before that model is allocated.

    Returns:
        As `changed_fields`.
    """
    changed = changed_fields(content, config, modalities)
    with _named(where_of(content)):
        checked_state.unfilled_model(config, modalities, content["model"])
        checked_state.check_preprocessor(content.get("preprocessor"), modalities)
    return changed


def load_optimizer(optimizer: torch.optim.Optimizer, content: Mapping[str, Any], name: str) -> None:
    """Loads the state of an optimiser from a checkpoint; the optimiser keeps its options.

    Args:
        optimizer: Adam.
        content: of the checkpoint.
        name: key of the optimiser in `content`.

    Raises:
        CheckpointError: the state is of other parameters.
    """
    groups = optimizer.state_dict()["param_groups"]
    with _named(f"{where_of(content)} is damaged:"):
        checked_state.check_optimizer(
            name, content[name], [one for group in optimizer.param_groups for one in group["params"]]
        )
    optimizer.load_state_dict({"state": content[name]["state"], "param_groups": groups})


def load_generators(content: Mapping[str, Any], device: torch.device) -> None:
    """Restores torch's generators from a checkpoint, that of a GPU for a run on one.

    Raises:
        CheckpointError: an entry is not the state of a generator.
    """
    with _named(f"{where_of(content)} is damaged:"):
        checked_state.check_generator("rng", content["rng"], torch.device("cpu"))
        torch.set_rng_state(content["rng"].cpu())
        if "cuda_rng" in content and device.type == "cuda":
            checked_state.check_generator("cuda_rng", content["cuda_rng"], device)
            torch.cuda.set_rng_state(content["cuda_rng"].cpu(), device)


def where_of(content: Mapping[str, Any]) -> str:
    """The name of a checkpoint in messages."""
    return str(content.get(WHERE, f"checkpoint of step {content.get('step')}"))


def steps_in(run: Path) -> list[int]:
    """The steps of the checkpoints in a run folder, ascending."""
    folder = run / FOLDER
    names = (_NAME.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else iter(())
    return sorted(int(match[1]) for match in names if match)


def keep_newest(run: Path) -> None:
    """Deletes all step checkpoints except those of the two highest steps, the newest ones after `set_aside`."""
    for step in steps_in(run)[:-2]:
        step_path(run, step).unlink()


def set_aside(run: Path, step: int, offset: int) -> Path | None:
    """Moves the files of a run after a step to a new folder, and deletes none; the run will repeat these steps.

    The run can resume after an interruption of this call.

    Args:
        run: the run folder.
        step: the step to resume from.
        offset: bytes of its metrics.jsonl at that step.

    Returns:
        The folder with later checkpoints, lines of metrics.jsonl and the summary; None if there is nothing later.

    Raises:
        OSError: the folder cannot be created, or the disk is full.
        CheckpointError: metrics.jsonl is not a regular file.
    """
    folder = run / FOLDER
    moved = [step_path(run, later) for later in reversed(steps_in(run)) if later > step]
    if (best := step_of_best(run)) is None or best > step:
        moved.append(folder / BEST)
    moved = [path for path in moved if path.exists()]
    lines = b""
    with contextlib.suppress(FileNotFoundError), _named(f"file {run / METRICS} must be a file of JSON lines:"):
        with open_file(run / METRICS) as log:
            log.seek(offset)
            lines = log.read()
    if not moved and not lines and not (run / SUMMARY).exists():
        return None
    aside = next(path for n in itertools.count(1) if not any((path := folder / f"{ASIDE}-{n}").glob("*")))
    aside.mkdir(exist_ok=True)
    if (run / SUMMARY).exists():
        # First, because a run with a summary has finished.
        os.rename(run / SUMMARY, aside / SUMMARY)
    if lines:
        with atomic_file(aside / METRICS) as file:
            file.write(lines)
    for path in moved:
        os.rename(path, aside / path.name)
    for changed in (aside, folder, run):
        sync_folder(changed)
    return aside


def step_of_best(run: Path) -> int | None:
    """The step of the best checkpoint; None if it does not exist or cannot be read."""
    path = run / FOLDER / BEST
    try:
        step = read(path)["step"] if path.exists() else None
    except (CheckpointError, KeyError):
        return None
    return step if isinstance(step, int) else None


def step_path(run: Path, step: int) -> Path:
    """The file of the checkpoint of a step."""
    return run / FOLDER / f"step-{step:08d}.pt"


def default_of(run: Path) -> str:
    """The default checkpoint of a run: "best" if validations have chosen one, else "last"."""
    return "best" if (run / FOLDER / BEST).exists() else "last"


def find(run: Path, which: str | int | None) -> Path:
    """The checkpoint file of a run.

    Args:
        run: the run folder.
        which: "best" by validation zero-shot accuracy, "last", or a step; None for `default_of`.

    Raises:
        CheckpointError: it does not exist; the message lists those that do.
    """
    if not run.is_dir():
        raise CheckpointError(f"run folder {run} does not exist")
    if (run / "seeds.json").exists():
        raise CheckpointError(f"run {run} holds several seeds; take one of them, such as {run / 'seed-0'}")
    steps = steps_in(run)
    there = ", ".join(map(str, steps)) or "none"
    which = default_of(run) if which is None else which
    if which == "best":
        path = run / FOLDER / BEST
        if not path.exists():
            raise CheckpointError(
                f"run {run} has no best checkpoint, which validations choose; take last, or a step of {there}"
            )
        return path
    if which == "last":
        if not steps:
            raise CheckpointError(f"run {run} has no checkpoint")
        return step_path(run, steps[-1])
    if not isinstance(which, int) or isinstance(which, bool):
        raise CheckpointError(f"checkpoint must be 'best', 'last' or a step, got {which!r}")
    if which not in steps:
        raise CheckpointError(f"run {run} has no checkpoint of step {which}; steps saved: {there}")
    return step_path(run, which)


def read_of_run(run: Path, which: str | int | None, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """The content of a run's checkpoint; the error for a damaged file lists the undamaged files.

    Args:
        run: the run folder.
        which: as in `find`.
        map_location: device of the tensors.

    Raises:
        CheckpointError: it does not exist or is damaged.
    """
    path = find(run, which)
    try:
        return read(path, map_location)
    except CheckpointError as error:
        whole = list(_whole_besides(run, path))
        offer = (
            f"undamaged are {', '.join(map(str, whole))}: take one with --checkpoint {whole[0]}, in Python with "
            f"checkpoint={whole[0]!r}"
            if whole
            else "the run has no undamaged checkpoint"
        )
        raise CheckpointError(f"{error}; {offer}") from error


def _whole_besides(run: Path, damaged: Path) -> Iterator[str | int]:
    """Arguments of `find` for the other readable checkpoints of a run, the best first, then the latest."""
    best: list[str | int] = ["best"] if (run / FOLDER / BEST).exists() else []
    for which in (*best, *reversed(steps_in(run))):
        path = find(run, which)
        if path != damaged:
            with contextlib.suppress(CheckpointError):
                read(path)
                yield which


def read_for_resume(run: Path, step: int | None) -> dict[str, Any]:
    """The content of the checkpoint to resume from, on the CPU; the error for a damaged file names an earlier one.

    Args:
        run: the run folder.
        step: None takes the last.

    Raises:
        CheckpointError: it does not exist or is damaged.
    """
    path = find(run, "last" if step is None else step)
    number = int(_NAME.fullmatch(path.name)[1])  # type: ignore[index]
    try:
        content = read(path)
        _check_entries(path, content, ("step", "progress", "optimizer", "club_optimizer", "rng"))
        if type(content["step"]) is not int or content["step"] != number:
            raise CheckpointError(f"checkpoint {path} is damaged: its step is {content['step']!r:.40}")
        with _named(f"checkpoint {path} is damaged:"):
            checked_state.check_resumed(content)
        return {**content, WHERE: f"checkpoint {path}"}
    except CheckpointError as error:
        before = [other for other in steps_in(run) if other < number]
        offer = (
            f"resume from the checkpoint before it with --resume {run} --resume-step {before[-1]}"
            if before
            else "there is no checkpoint before it"
        )
        raise CheckpointError(f"{error}; {offer}") from error


def export(model: UniCode, path: str | os.PathLike[str]) -> None:
    """Writes a model for `load` as one safetensors file, with its configuration and a checksum in the header.

    `load` refuses a file with a wrong checksum; files of older versions have none. The file leaves out the entries
    that `from_cmg` keeps for `to_cmg`.

    Args:
        model: a UniCode, or torch.compile's or DataParallel's wrapper of one.
        path: a new file that ends with .safetensors.

    Raises:
        TypeError: `model` is not a UniCode, or `path` is not a path.
        ValueError: the path exists or ends otherwise, or a layer of the model was replaced.
        OSError: it cannot be written.
    """
    model, state = plain_model(model)
    target = path_of("path", path)
    if target.suffix != EXPORT_SUFFIX or target.exists():
        raise ValueError(f"path must be a new file that ends with {EXPORT_SUFFIX}, got {str(path)!r}")
    content = {
        "format": FORMAT,
        "config": config_to_dict(model.config, model.modalities),
        **_preprocessor_of(model),
    }
    write_tensors(target, state, content)


def _read_export(path: Path) -> dict[str, Any]:
    """The content of an exported file, in the form that `read` returns."""
    try:
        content, tensors = read_tensors(path)
        if type(content) is not dict or type(content.get("format")) is not int or content["format"] != FORMAT:
            raise BadFile(f"it is not of format {FORMAT}")
        checked_state.check_config(content.get("config"))
    except FileNotFoundError as error:
        raise CheckpointError(f"file {path} does not exist") from error
    except (BadFile, OSError) as error:
        raise CheckpointError(f"file {path} is truncated, damaged or not an export: {error}") from error
    return {"config": content["config"], "model": tensors, "preprocessor": content.get("preprocessor")}


def _check_finite(model: UniCode, path: Path, where: str) -> None:
    """Raise CheckpointError if a parameter or buffer is not finite."""
    for name, value in model.state_dict().items():
        # aminmax returns NaN for NaN, and takes a twentieth of the time of isfinite on all numbers.
        if not torch.stack(value.aminmax()).isfinite().all():
            saved = "; a run saved it for inspection after a non-finite loss" * path.name.startswith(NON_FINITE)
            raise CheckpointError(f"{where} must hold finite numbers, got NaN or Inf in {name}{saved}")


def load(
    run: str | os.PathLike[str],
    checkpoint: str | int | None = None,
    device: str | torch.device = "cpu",
) -> UniCode:
    """The model of a run, in eval mode. It needs no data.

    Args:
        run: a run folder, a checkpoint file, or a file of `export`.
        checkpoint: "best" by validation zero-shot accuracy averaged over directions, "last", or a step; ignored if
            `run` is a file. None takes the best. A run without validations has no best, so None takes its last, with
            a warning.
        device: of the model.

    Raises:
        TypeError: `run` is not a path.
        ValueError: `device` is unknown or not available.
        CheckpointError: the checkpoint is missing, truncated or of another program; the message names the checkpoints
            of the run to use instead. Or it contains NaN, infinity or an unknown field. Or it lacks a field that is
            not in `config.ADDED_FIELDS`.
    """
    path, device = path_of("run", run), find_device(device)
    where = f"checkpoint {path}"
    if path.suffix == EXPORT_SUFFIX:
        content = _read_export(path)
    # `read` refuses what is neither a folder nor a regular file.
    elif path.exists() and not path.is_dir():
        content = read(path, device)
    else:
        content = read_of_run(path, checkpoint, device)
        where = f"checkpoint {find(path, checkpoint)}"
        if checkpoint is None and default_of(path) == "last":
            name = find(path, "last").name
            warnings.warn(f"run {path} has no best checkpoint; loading its last, {name}", stacklevel=2)
    config, modalities = config_from_dict(content["config"], where)
    with _named(where):
        model = checked_state.unfilled_model(config, modalities, content["model"])
        preprocessor = checked_state.check_preprocessor(content.get("preprocessor"), modalities)
    load_model(model.to_empty(device=device), content, where)
    _check_finite(model, path, where)
    if "cmg" in content:
        model.cmg_rest = content["cmg"]
    progress = content.get("progress")
    digests = (content.get("data"), progress.get("data") if isinstance(progress, dict) else None)
    model.preprocessor = preprocessor
    model.trained_on = next((digest for digest in digests if isinstance(digest, str) and digest), None)
    return model.eval()
