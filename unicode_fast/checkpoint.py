"""Checkpoints: written atomically, read without unpickling code, refused by name when damaged."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from unicode_fast.backend import find_device
from unicode_fast.config import EXECUTION_FIELDS, Config, Modality, completed
from unicode_fast.modules import UniCode
from unicode_fast.modules.wrapped import plain_model
from unicode_fast.presets import from_saved
from unicode_fast.writing import atomic_file, path_of

FORMAT = 1
FOLDER = "checkpoints"
BEST = "best.pt"
# How the name of a state begins that a run saves when its loss is not finite.
NON_FINITE = "nonfinite-"
EXPORT_SUFFIX = ".safetensors"
_NAME = re.compile(r"step-(\d+)\.pt")


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or not ours; the message names it and what can be taken in its place."""


def config_to_dict(config: Config, modalities: Mapping[str, Modality]) -> dict[str, Any]:
    """What a model needs to be built again, in plain types."""
    shapes = {name: {"kind": kind.kind, "shape": list(kind.shape)} for name, kind in modalities.items()}
    return {"fields": config.flat(), "modalities": shapes}


def config_from_dict(saved: Mapping[str, Any], where: str = "checkpoint") -> tuple[Config, dict[str, Modality]]:
    """The inverse of `config_to_dict`, for what an older version saved too.

    Args:
        saved: the mapping.
        where: what holds it, for the message.

    Raises:
        CheckpointError: a field is unknown, missing and not of ADDED_FIELDS, or has a value that it cannot have.
    """
    try:
        config = from_saved(saved["fields"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where} is of another version or damaged: {error}") from error
    modalities = {name: Modality(item["kind"], tuple(item["shape"])) for name, item in saved["modalities"].items()}
    return config, modalities


def changed_fields(content: Mapping[str, Any], config: Config, modalities: Mapping[str, Modality]) -> dict[str, Any]:
    """The fields in which a run that goes on from a checkpoint differs from it, with the checkpoint's values.

    Args:
        content: of the checkpoint.
        config: of the run.
        modalities: of the run.

    Raises:
        CheckpointError: another model was trained: one of them is not among EXECUTION_FIELDS, or modalities differ; or
            a field of the checkpoint is unknown, or missing and not of ADDED_FIELDS.
    """
    saved, wanted = content["config"], config_to_dict(config, modalities)
    try:
        before = completed(saved["fields"])
    except ValueError as error:
        raise CheckpointError(f"checkpoint of step {content['step']} is of another version: {error}") from error
    fields = {name: value for name, value in before.items() if wanted["fields"][name] != value}
    changed = sorted({*fields} - {*EXECUTION_FIELDS})
    others = [f"{name} {fields[name]!r} instead of {wanted['fields'][name]!r}" for name in changed]
    if saved["modalities"] != wanted["modalities"]:
        others.append("other modalities or shapes")
    if others:
        raise CheckpointError(f"checkpoint must be of the run's configuration, got one with {', '.join(others)}")
    return fields


def save(path: Path, model: UniCode, extra: Mapping[str, Any] | None = None) -> None:
    """Writes a model, its configuration and whatever else a run needs, atomically.

    Args:
        path: of the file.
        model: whose parameters and buffers are written; torch.compile and DataParallel may hold it.
        extra: tensors and plain types only.

    Raises:
        TypeError: `model` is no UniCode.
        ValueError: a part of it was exchanged.
        OSError: the folder cannot be written or the disk is full; an older file stays.
    """
    model, state = plain_model(model)
    content = {
        "format": FORMAT,
        "config": config_to_dict(model.config, model.modalities),
        "model": state,
        **(extra or {}),
    }
    try:
        with atomic_file(path) as file:
            torch.save(content, file)
    except RuntimeError as error:
        # torch reports a failed write of its zip archive so, and does not say why.
        free = shutil.disk_usage(path.parent).free / 1e6
        raise OSError(
            f"checkpoint {path} could not be written, with {free:.0f} MB free there ({error}); nothing that was there "
            "before is lost"
        ) from error


def read(path: Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """The content of a checkpoint.

    Raises:
        CheckpointError: it is missing, truncated, damaged or of another format.
    """
    if not path.exists():
        raise CheckpointError(f"checkpoint {path} does not exist")
    try:
        # torch does not compare the checksums of its own archive.
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise zipfile.BadZipFile(broken)
        content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        raise CheckpointError(f"checkpoint {path} is truncated or damaged ({type(error).__name__})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {path} must be of format {FORMAT}; it was not written by unicode_fast.train")
    _check_parts(path, content, ("config", "model"))
    return content


def _check_parts(path: Path, content: Mapping[str, Any], parts: Sequence[str]) -> None:
    lacking = [name for name in parts if name not in content]
    if lacking:
        raise CheckpointError(f"checkpoint {path} is damaged, lacks {', '.join(lacking)}")


def load_model(model: UniCode, content: Mapping[str, Any], where: str) -> None:
    """Puts the parameters and buffers of a checkpoint into a model.

    Args:
        model: of the checkpoint's configuration.
        content: of the checkpoint.
        where: what holds it, for the message.

    Raises:
        CheckpointError: they are not those of the model.
    """
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        raise CheckpointError(f"{where} does not fit its configuration: {' '.join(str(error).split())}") from error


def steps_in(run: Path) -> list[int]:
    """The steps whose checkpoints a run folder holds, ascending."""
    folder = run / FOLDER
    names = (_NAME.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else iter(())
    return sorted(int(match[1]) for match in names if match)


def remove_unfinished(run: Path) -> None:
    """Deletes what a killed process had not finished writing; only while no other writes there."""
    for leftover in (run / FOLDER).glob(".*.pt.*"):
        leftover.unlink()


def step_path(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lives."""
    return run / FOLDER / f"step-{step:08d}.pt"


def default_of(run: Path) -> str:
    """What is taken of a run where nothing is asked for: "best" where validations have chosen it, else "last"."""
    return "best" if (run / FOLDER / BEST).exists() else "last"


def find(run: Path, which: str | int | None) -> Path:
    """The checkpoint file of a run.

    Args:
        run: the run folder.
        which: "best" by validation zero-shot accuracy, "last", or a step; None as `default_of` says.

    Raises:
        CheckpointError: there is none; the message lists what there is.
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
    """The content of a run's checkpoint; a damaged one is refused and those that are whole are offered.

    Args:
        run: the run folder.
        which: as in `find`.
        map_location: device of the tensors.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = find(run, which)
    try:
        return read(path, map_location)
    except CheckpointError as error:
        whole = list(_whole_besides(run, path))
        offer = (
            f"whole are {', '.join(map(str, whole))}: take one with --checkpoint {whole[0]}, in Python with "
            f"checkpoint={whole[0]!r}"
            if whole
            else "the run has no other that is whole"
        )
        raise CheckpointError(f"{error}; {offer}") from error


def _whole_besides(run: Path, damaged: Path) -> Iterator[str | int]:
    """What `find` takes to get at the other checkpoints of a run that can be read, the best first, then the latest."""
    best: list[str | int] = ["best"] if (run / FOLDER / BEST).exists() else []
    for which in (*best, *reversed(steps_in(run))):
        path = find(run, which)
        if path != damaged:
            with contextlib.suppress(CheckpointError):
                read(path)
                yield which


def read_for_resume(run: Path, step: int | None, map_location: torch.device) -> dict[str, Any]:
    """The checkpoint a run goes on from; a damaged one is refused and the one before it offered.

    Args:
        run: the run folder.
        step: None takes the last.
        map_location: device of the tensors.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = find(run, "last" if step is None else step)
    number = int(_NAME.fullmatch(path.name)[1])  # type: ignore[index]
    try:
        content = read(path, map_location)
        _check_parts(path, content, ("step", "progress", "optimizer", "club_optimizer", "rng"))
        if content["step"] != number:
            raise CheckpointError(f"checkpoint {path} is damaged, it says that it is of step {content['step']}")
        return content
    except CheckpointError as error:
        before = [other for other in steps_in(run) if other < number]
        offer = (
            f"resume from the one before it with --resume {run} --resume-step {before[-1]}"
            if before
            else "there is none before it"
        )
        raise CheckpointError(f"{error}; {offer}") from error


def export(model: UniCode, path: str | os.PathLike[str]) -> None:
    """Writes a model as one safetensors file, its configuration in the header, which `load` reads.

    What `from_cmg` keeps for `to_cmg` beside the model is not part of it.

    Args:
        model: whose parameters and buffers are written; torch.compile and DataParallel may hold it.
        path: new; ends with .safetensors.

    Raises:
        TypeError: `model` is no UniCode, or `path` no path.
        ValueError: the path exists or ends otherwise, or a part of the model was exchanged.
        OSError: it cannot be written.
    """
    model, state = plain_model(model)
    target = path_of("path", path)
    if target.suffix != EXPORT_SUFFIX or target.exists():
        raise ValueError(f"path must be a new file that ends with {EXPORT_SUFFIX}, got {str(path)!r}")
    tensors = {name: value.contiguous().cpu() for name, value in state.items()}
    header = {"unicode_fast": json.dumps({"format": FORMAT, "config": config_to_dict(model.config, model.modalities)})}
    with atomic_file(target) as file:
        file.write(safetensors.torch.save(tensors, header))


def _read_export(path: Path) -> dict[str, Any]:
    """The content of an exported file, as `read` gives that of a checkpoint."""
    if not path.exists():
        raise CheckpointError(f"file {path} does not exist")
    try:
        with safetensors.safe_open(path, "pt") as file:
            content = json.loads((file.metadata() or {})["unicode_fast"])
            content["model"] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"file {path} is truncated, damaged or not ours ({type(error).__name__})") from error
    return content


def _check_finite(model: UniCode, path: Path, where: str) -> None:
    """Refuses a model whose codes would mean nothing."""
    for name, value in model.state_dict().items():
        # A NaN is both, and this takes a twentieth of the time of isfinite on all numbers.
        if not torch.stack(value.aminmax()).isfinite().all():
            saved = "; a run saved it for inspection as its loss was not finite" * path.name.startswith(NON_FINITE)
            raise CheckpointError(f"{where} must hold finite numbers, got NaN or Inf in {name}{saved}")


def load(
    run: str | os.PathLike[str],
    checkpoint: str | int | None = None,
    device: str | torch.device = "cpu",
) -> UniCode:
    """The model of a run, in eval mode, without needing its data.

    Args:
        run: a run folder, a checkpoint file, or a file that `export` wrote.
        checkpoint: "best" by validation zero-shot accuracy averaged over
            directions, "last", or a step; not read when `run` is a file. None
            takes the best, or, with a warning, the last of a run without
            validations, which has no best.
        device: where the model is put.

    Raises:
        TypeError: `run` is no path.
        ValueError: `device` is none, or is not there.
        CheckpointError: the checkpoint is missing, truncated or not ours; the message names those of the run that can
            be taken in its place. Or it holds NaN or infinity, or a field that this version does not know, or lacks
            one that is not among `config.ADDED_FIELDS`.
    """
    path, device = path_of("run", run), find_device(device)
    where = f"checkpoint {path}"
    if path.suffix == EXPORT_SUFFIX:
        content = _read_export(path)
    elif path.is_file():
        content = read(path, device)
    else:
        content = read_of_run(path, checkpoint, device)
        where = f"checkpoint {find(path, checkpoint)}"
        if checkpoint is None and default_of(path) == "last":
            name = find(path, "last").name
            warnings.warn(f"run {path} has no best checkpoint, its last is taken, {name}", stacklevel=2)
    config, modalities = config_from_dict(content["config"], where)
    model = UniCode(modalities, config).to(device)
    load_model(model, content, where)
    _check_finite(model, path, where)
    if "cmg" in content:
        model.cmg_rest = content["cmg"]
    model.trained_on = content.get("data") or content.get("progress", {}).get("data")
    return model.eval()
