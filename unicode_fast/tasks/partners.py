"""Second data sets: those that a task is tested on in place of the data set of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from unicode_fast.config import DataConfig
from unicode_fast.data import Dataset, built_in, open_dataset
from unicode_fast.tasks.runner import SEGMENTATION, check_tasks

ACROSS = ("cross-classification", "cross-localisation")
# Data sets that hold the clips to train on and those to test on, in other modalities or splits.
TWO_DOMAINS = ("ave-avvp", "ucf-vggsound")
_OTHER_DOMAIN = {
    "talking-digits": "talking-digits-b",
    "talking-digits-b": "talking-digits",
    "talking-digits-two": "talking-digits-b",
}
_WITH_MASKS = "talking-digits-two"


def check_partners(config: DataConfig, tasks: str | Sequence[str]) -> None:
    """Checks that the data of a run suffice for these tasks.

    Raises:
        ValueError: a task is unknown, or needs a second data set that is not built in.
    """
    names = check_tasks(tasks, "probe_tasks")
    needy = [task for task in names if task in (*ACROSS, SEGMENTATION)]
    if needy and config.data in built_in.DATASETS:
        _check_built_in(config, needy[0], "probe_tasks")
    elif needy:
        raise ValueError(
            f"probe_tasks must be classification, localisation or retrieval beside data {config.data!r}, got "
            f"{needy[0]!r}; python -m unicode_fast.evaluate measures it"
        )


def _check_built_in(config: DataConfig, task: str, argument: str) -> None:
    """Checks that built-in data have a second data set for a task that needs one."""
    if config.data not in built_in.WITH_PARTNERS:
        raise ValueError(
            f"{argument} must be classification, localisation or retrieval beside data {config.data!r}, got {task!r}; "
            f"of the built-in data, {', '.join(built_in.WITH_PARTNERS)} have it"
        )


def open_partners(
    config: DataConfig, tasks: str | Sequence[str], dataset: Dataset, to_data: str | None = None
) -> dict[str, Dataset]:
    """Second data sets by task, for `Evaluator`.

    Built-in data have another domain and a set with masks, of the same seed and sizes. `to_data` names the second set
    of other data.

    Args:
        config: of `dataset`.
        tasks: names, as a list or separated by commas.
        dataset: the data set that `config` names.
        to_data: the data set that tasks across data sets are tested on, or None.

    Raises:
        ValueError: a task across data sets has no second one, no task reads `to_data`, or the built-in data have no
            second one for a task.
    """
    names = check_tasks(tasks)
    across = [task for task in names if task in ACROSS]
    if to_data is not None and not across:
        raise ValueError(f"to_data is for {' and '.join(ACROSS)}, got {to_data!r} beside {', '.join(names)}")
    partners: dict[str, Dataset] = {}
    built = config.data in built_in.DATASETS
    needy = [task for task in names if task == SEGMENTATION or (task in ACROSS and to_data is None)]
    if built and needy:
        _check_built_in(config, needy[0], "task")
    if across:
        name = _OTHER_DOMAIN[config.data] if built and to_data is None else to_data
        if name is not None:
            other = open_dataset(replace(config, data=name))
            partners |= dict.fromkeys(across, other)
        elif dataset.name not in TWO_DOMAINS:
            raise ValueError(f"to_data must name the data set that {across[0]} is tested on, {config.data!r} holds one")
    if SEGMENTATION in names and built and config.data != _WITH_MASKS:
        partners[SEGMENTATION] = open_dataset(replace(config, data=_WITH_MASKS))
    return partners
