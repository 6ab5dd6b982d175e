"""Downstream tasks on frozen codes: probes trained on one modality and tested on another."""

from unicode_fast.tasks.explain import explain
from unicode_fast.tasks.probe import EncodedClips, encode_split
from unicode_fast.tasks.runner import PROTOCOLS, TASKS, Probes, check_tasks, run_row, run_table, zero_shot_accuracy
from unicode_fast.tasks.table import Row, aggregate, format_markdown, format_table

__all__ = [
    "PROTOCOLS",
    "TASKS",
    "EncodedClips",
    "Probes",
    "Row",
    "aggregate",
    "check_tasks",
    "encode_split",
    "explain",
    "format_markdown",
    "format_table",
    "run_row",
    "run_table",
    "zero_shot_accuracy",
]
