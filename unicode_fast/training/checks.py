"""Checks of a run before it starts: its flags, device, data and ranks; notes on valid but doubtful data."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from unicode_fast.config import TEXT_FIELDS, Config, Kind, Modality, modality_names
from unicode_fast.data import Dataset, built_in, open_dataset
from unicode_fast.data.findings import classes_of, unlearnable
from unicode_fast.data.layouts import has_sentences
from unicode_fast.data.opening import absolute
from unicode_fast.errors import few, say
from unicode_fast.methods.registry import check_method, needs_every_modality
from unicode_fast.tasks import OPEN_TASKS, PROBE_TASKS, RETRIEVAL, check_tasks, check_transfer, probe_task
from unicode_fast.training.acceleration import check_acceleration
from unicode_fast.training.distributed import DistContext
from unicode_fast.training.runs import choose_device

NO_TASKS = "none"
BUILT_IN_MODALITIES = ("audio", "video", "text")
_BUILT_IN_FIELDS = ("easy", "train_clips", "val_clips", "test_clips", "data_seed")
MOVED = "--data sets their new place"
VERIFY_HELP = "compare the checksums of a feature store again; its first opening compares them too"


def tasks_of(config: Config) -> list[str]:
    """The tasks that are measured after pre-training.

    Raises:
        ValueError: a task is unknown.
    """
    return [] if config.train.probe_tasks == NO_TASKS else check_tasks(config.train.probe_tasks, "probe_tasks")


def splits_of(config: Config) -> list[str]:
    """The splits that a run reads, the training split first."""
    measured = ["train", "val", "test"] if tasks_of(config) else ["train", "val"] if config.train.validations else []
    return list(dict.fromkeys([config.data.train_split, *measured]))


def with_whole_paths(config: Config) -> Config:
    """The same configuration with absolute paths, so that a run resumes and is evaluated from any folder."""
    model, whitelist = (Path(place) for place in (config.data.text_model, config.data.text_whitelist))
    return config.replace(
        data=absolute(config.data.data),
        text_model=str(model.absolute() if model.is_dir() else config.data.text_model),
        text_whitelist=str(whitelist.absolute() if whitelist.is_file() else config.data.text_whitelist),
    )


def open_run_data(config: Config) -> Dataset:
    """The data of a run; for retrieval all modalities of a layout, because its anchor is another modality."""
    anchored = RETRIEVAL in tasks_of(config)
    return open_dataset(replace(config.data, modalities="all") if anchored else config.data)


def check_run(config: Config) -> None:
    """Checks that need no data.

    Raises:
        ValueError: device or method do not support it, or built-in data lack a task, a modality or clips.
    """
    check_acceleration(config.train, choose_device(config.train.device))
    check_method(config)
    if tasks := tasks_of(config):
        check_transfer(config.data, tasks)
    if config.data.data in built_in.DATASETS:
        names = modality_names(config.data.modalities, BUILT_IN_MODALITIES)
        if not set(names) <= set(BUILT_IN_MODALITIES):
            raise ValueError(f"modalities must be among {', '.join(BUILT_IN_MODALITIES)}, got {', '.join(names)}")
        check_batch_size(config.train.batch_size, config.data.train_clips)


def check_batch_size(batch_size: int, clips: int) -> None:
    """Raise ValueError if the training split has fewer clips than a batch."""
    if batch_size > clips:
        remedy = f"take --batch_size {clips} or less"
        raise ValueError(f"batch_size must be at most the {clips} training clips, got {batch_size}; {remedy}")


def check_text_fields(given: Collection[str], *data: str) -> None:
    """Refuses fields about sentences if no data have sentences.

    Args:
        given: names of fields.
        data: the data of the run, then others.

    Raises:
        ValueError: a field is in TEXT_FIELDS, and no data have sentences.
    """
    unread = [name for name in TEXT_FIELDS if name in given]
    if unread and not any(map(has_sentences, data)):
        raise ValueError(f"{unread[0]} needs data of a layout with sentences, got data {data[0]!r}")


def check_flags(
    config: Config, flags: Collection[str], standard: Mapping[str, Any], kinds: Collection[Kind] = get_args(Kind)
) -> None:
    """Refuses flags, and changes of the standard values, that have no effect in this configuration.

    Args:
        config: of the run.
        flags: names of the fields that flags have set.
        standard: standard value of every field.
        kinds: kinds of the modalities; all kinds if they are unknown.

    Raises:
        ValueError: a flag is about the built-in data, and other data are named; or another field switches a field off,
            or no modality has the kind that a field is about.
    """
    unread = [name for name in _BUILT_IN_FIELDS if name in flags and config.data.data not in built_in.DATASETS]
    if unread:
        raise ValueError(f"{unread[0]} needs built-in data, got data {config.data.data!r}")
    check_text_fields(flags, config.data.data)
    values = config.flat()
    for name, reason in config.unread_fields(kinds).items():
        if name in flags or values[name] != standard[name]:
            raise ValueError(f"{name} {reason}, got {name} {values[name]!r} beside it")


def check_store(config: Config, dataset: Dataset) -> dict[str, Modality]:
    """The modalities of a run, after a check that its data have all that the run needs.

    Raises:
        ValueError: a modality or a split is missing, or clips are fewer than a batch, too short, or without classes. Or
            clips lack a modality that preset or method needs, or all clips of a split lack one.
    """
    train_split, needed = config.data.train_split, splits_of(config)
    if train_split not in dataset.splits:
        there = ", ".join(dataset.splits)
        raise ValueError(f"train_split must be one of {there} of {dataset.path}, got {train_split!r}")
    if not set(needed) <= set(dataset.splits):
        raise ValueError(
            f"data must have splits {', '.join(needed)}, {dataset.path} has {', '.join(dataset.splits)}; "
            f"with --validations 0 --probe_tasks {NO_TASKS} only the training split is needed"
        )
    clips = dataset.split(train_split)
    modalities = dataset.modalities_named(modality_names(config.data.modalities, tuple(clips.modalities)))
    check_batch_size(config.train.batch_size, len(clips))
    _check_lacking(config, dataset, modalities)
    _check_targets(config, dataset, modalities)
    _check_open_task(config, dataset, modalities)
    shortest = min(clips.features[name].shape[1] for name in modalities)
    least = config.method.cpc_earliest + 1 + config.model.cpc_steps
    if config.model.cpc_steps > 1 and shortest < least:
        raise ValueError(
            f"cpc_steps {config.model.cpc_steps} needs clips of at least {least} positions, got one of {shortest}"
        )
    return modalities


def _check_lacking(config: Config, dataset: Dataset, modalities: Collection[str]) -> None:
    needed_by = needs_every_modality(config)
    for split in splits_of(config):
        clips = dataset.number(split)
        for name, count in dataset.lacking(split).items():
            if name in modalities and count == clips:
                raise ValueError(f"data must have clips with {name!r} in split {split!r}, got none of {clips}")
            if name in modalities and needed_by and split == config.data.train_split:
                raise ValueError(
                    f"data must have every modality in every clip for {needed_by}, got {count} of {clips} training "
                    f"clips without {name}"
                )


def _check_targets(config: Config, dataset: Dataset, modalities: Collection[str]) -> None:
    tasks = tasks_of(config)
    probed, others = ([task for task in tasks if (task in PROBE_TASKS) == probe] for probe in (True, False))
    # What needs classes, and the flag that turns it off.
    needs = {"the zero-shot accuracy of validations": "--validations 0"} if config.train.validations else {}
    if probed:
        needs[f"the tasks {', '.join(probed)}"] = f"--probe_tasks {','.join(others) or NO_TASKS}"
    keys = {split: dataset.split(split).arrays.keys() for split in splits_of(config)}
    labels = {f"{name}.label" for name in modalities}
    without = [split for split, found in keys.items() if "class" not in found and not labels <= found]
    if needs and without:
        raise ValueError(
            f"data must have a class for each clip, or a label for each position of every modality, for "
            f"{' and '.join(needs)}, {dataset.path} has neither in {', '.join(without)}; "
            f"{' '.join(needs.values())} trains without"
        )


def _check_open_task(config: Config, dataset: Dataset, modalities: Collection[str]) -> None:
    """Raise ValueError if no test clip of a modality is of a known class, or of an unknown one."""
    task = OPEN_TASKS[0]
    if task not in tasks_of(config):
        return
    clips, kind = dataset.split("test"), probe_task(task).adapted(dataset, None)
    for name in (name for name in modalities if kind.fits(clips, name)):
        try:
            kind.chance(clips, name)
        except ValueError as error:
            raise ValueError(f"probe_tasks must be tasks that the data can measure, got {task!r}: {error}") from error


def check_ranks(config: Config, clips: int, ranks: DistContext) -> None:
    """Checks that each rank and each micro-batch gets a clip of every batch, and that `cuda_graph` has one rank.

    Raises:
        ValueError: a batch has fewer clips, or there are several ranks and `cuda_graph`.
    """
    train, last = config.train, clips % config.train.batch_size
    if train.batch_size < ranks.size:
        raise ValueError(f"batch_size must be at least the {ranks.size} ranks, got {train.batch_size}")
    if train.keep_last_batch and 0 < last < ranks.size:
        raise ValueError(
            f"keep_last_batch needs {ranks.size} clips in the last batch, one a rank, got {last}: "
            f"{clips} clips in batches of {train.batch_size}"
        )
    smallest = train.batch_size // ranks.size
    if train.micro_batches > smallest:
        raise ValueError(f"micro_batches must be at most the {smallest} clips of a rank, got {train.micro_batches}")
    if train.cuda_graph and ranks.size > 1:
        raise ValueError(f"cuda_graph needs one rank, got {ranks.size}")


def note_shared(dataset: Dataset) -> None:
    """Notes on the error stream which clips are in two splits, one for training or choices, one for scores."""
    for first, second in (("train", "test"), ("val", "test"), ("train", "val")):
        if shared := dataset.shared(first, second):
            say(
                f"note: {len(shared)} clips of {dataset.path} are in {first} and in {second}, such as {shared[0]!r}: "
                "scores are not of unseen clips",
                file=sys.stderr,
            )


def note_lacking(config: Config, dataset: Dataset, modalities: Collection[str]) -> None:
    """Notes on the error stream how many clips lack a modality."""
    for split in splits_of(config):
        lacking = {name: count for name, count in dataset.lacking(split).items() if name in modalities}
        if lacking:
            counts = " and ".join(f"{count} lack {name}" for name, count in lacking.items())
            say(f"note: of {dataset.number(split)} clips of {split} {counts}; they count without it", sys.stderr)


def note_labels(config: Config, dataset: Dataset) -> None:
    """Notes on the error stream which classes of clips cannot be learned, before a run spends hours on them."""
    splits = {name: dataset.split(name) for name in splits_of(config)}
    if len(splits) == 1:
        return
    classes = {name: classes_of(one.target, one.classes) for name, one in splits.items() if "class" in one.arrays}
    for finding in unlearnable(classes):
        named = f" ({few(finding.clips, room=80)})" if finding.clips else ""
        say(f"note: {finding.text}{named}", file=sys.stderr)
