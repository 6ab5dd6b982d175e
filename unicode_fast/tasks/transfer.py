"""Transfer data sets: a task is tested on them in place of the data set of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from unicode_fast.config import DataConfig
from unicode_fast.data import Dataset, built_in, open_dataset
from unicode_fast.tasks.runner import SEGMENTATION, check_tasks

ACROSS = ("cross-classification", "cross-localisation", "cross-open-classification")
_AT_HOME = "classification, localisation, open-classification or retrieval"
# Data sets that hold both the training clips and the test clips of a task across data sets.
TWO_DOMAINS = ("ave-avvp", "ucf-vggsound")
_OTHER_DOMAIN = {
    "talking-digits": "talking-digits-b",
    "talking-digits-b": "talking-digits",
    "talking-digits-two": "talking-digits-b",
}
_WITH_MASKS = "talking-digits-two"


def check_transfer(config: DataConfig, tasks: str | Sequence[str]) -> None:
    """Checks that the data of a run suffice for these tasks.

    Raises:
        ValueError: a task is unknown, or needs a transfer data set that is not built in.
    """
    names = check_tasks(tasks, "probe_tasks")
    needy = [task for task in names if task in (*ACROSS, SEGMENTATION)]
    if needy and config.data in built_in.DATASETS:
        _check_built_in(config, needy[0], "probe_tasks")
    elif needy:
        raise ValueError(
            f"probe_tasks must be {_AT_HOME} beside data {config.data!r}, got {needy[0]!r}; "
            "python -m unicode_fast.evaluate measures it"
        )


def _check_built_in(config: DataConfig, task: str, argument: str) -> None:
    """Checks that built-in data have a transfer data set for this task."""
    if config.data not in built_in.WITH_TRANSFER:
        raise ValueError(
            f"{argument} must be {_AT_HOME} beside data {config.data!r}, got {task!r}; "
            f"of the built-in data, {', '.join(built_in.WITH_TRANSFER)} have it"
        )


def open_transfer(
    config: DataConfig, tasks: str | Sequence[str], dataset: Dataset, to_data: str | None = None
) -> dict[str, Dataset]:
    """Transfer data sets by task, for `Evaluator`.

    Built-in data have another domain and a set with masks, of the same seed and sizes. For other data, `to_data` names
    the transfer data set.

    Args:
        config: of `dataset`.
        tasks: names, as a list or separated by commas.
        dataset: the data set that `config` names.
        to_data: the transfer data set of tasks across data sets, or None.

    Raises:
        ValueError: a task has no transfer data set, or no task reads `to_data`.
    """
    names = check_tasks(tasks)
    across = [task for task in names if task in ACROSS]
    if to_data is not None and not across:
        raise ValueError(f"to_data is for {' and '.join(ACROSS)}, got {to_data!r} beside {', '.join(names)}")
    transfer: dict[str, Dataset] = {}
    built = config.data in built_in.DATASETS
    needy = [task for task in names if task == SEGMENTATION or (task in ACROSS and to_data is None)]
    if built and needy:
        _check_built_in(config, needy[0], "task")
    if across:
        name = _OTHER_DOMAIN[config.data] if built and to_data is None else to_data
        if name is not None:
            other = open_dataset(replace(config, data=name))
            transfer |= dict.fromkeys(across, other)
        elif dataset.name not in TWO_DOMAINS:
            raise ValueError(f"to_data must name the test data set of {across[0]} beside {config.data!r}, got None")
    if SEGMENTATION in names and built and config.data != _WITH_MASKS:
        transfer[SEGMENTATION] = open_dataset(replace(config, data=_WITH_MASKS))
    return transfer
