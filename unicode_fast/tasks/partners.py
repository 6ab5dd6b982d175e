"""The data set that a task is tested on where that is not the one that a model is probed on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from unicode_fast.config import DataConfig
from unicode_fast.data import open_dataset, talking_digits
from unicode_fast.tasks.domain import Dataset
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
    """Whether the built-in data have what these tasks need beside the data of a run.

    Raises:
        ValueError: a task is unknown, or needs a second data set beside one that is not built in.
    """
    names = check_tasks(tasks, "probe_tasks")
    needy = [task for task in names if task in (*ACROSS, SEGMENTATION)]
    if needy and config.data not in talking_digits.DATASETS:
        raise ValueError(
            f"probe_tasks must be classification, localisation or retrieval beside data {config.data!r}, got "
            f"{needy[0]!r}; python -m unicode_fast.evaluate measures it"
        )


def open_partners(
    config: DataConfig, tasks: str | Sequence[str], store: Dataset, to_data: str | None = None
) -> dict[str, Dataset]:
    """The partners of `store` by task, for `Probes`.

    Of built-in data, the other domain and the one with masks, of the same seed and sizes; of other data the one that
    is named.

    Args:
        config: of `store`.
        tasks: names, as a list or separated by commas.
        store: what `config` names.
        to_data: what the tasks across data sets are tested on, or None.

    Raises:
        ValueError: a task across data sets has only one, or `to_data` is given where no task reads it.
    """
    names = check_tasks(tasks)
    across = [task for task in names if task in ACROSS]
    if to_data is not None and not across:
        raise ValueError(f"to_data is for {' and '.join(ACROSS)}, got {to_data!r} beside {', '.join(names)}")
    partners: dict[str, Dataset] = {}
    built_in = config.data in talking_digits.DATASETS
    if across:
        name = _OTHER_DOMAIN[config.data] if built_in and to_data is None else to_data
        if name is not None:
            other = open_dataset(replace(config, data=name))
            partners |= dict.fromkeys(across, other)
        elif getattr(store, "name", "") not in TWO_DOMAINS:
            raise ValueError(f"to_data must name the data set that {across[0]} is tested on, {config.data!r} holds one")
    if SEGMENTATION in names and built_in and config.data != _WITH_MASKS:
        partners[SEGMENTATION] = open_dataset(replace(config, data=_WITH_MASKS))
    return partners
