"""Downstream tasks on frozen codes: probes are trained on one modality and tested on another."""

from unicode_fast.data import Dataset
from unicode_fast.tasks.encoded import EncodedDataset
from unicode_fast.tasks.explain import explain
from unicode_fast.tasks.metrics.intervals import Bootstrap, Estimate
from unicode_fast.tasks.metrics.sharing import Sharing, format_sharing, mean_sharing, measure_sharing
from unicode_fast.tasks.probe import EncodedClips, FrozenModel, encode_split
from unicode_fast.tasks.retrieval import Retrieval
from unicode_fast.tasks.runner import (
    CLOSED_TASKS,
    DEFAULT_TASKS,
    OPEN_TASKS,
    PROBE_TASKS,
    RETRIEVAL,
    TASKS,
    Evaluator,
    check_tasks,
    probe_task,
    validate,
)
from unicode_fast.tasks.segmentation.backbones import BackboneChoice
from unicode_fast.tasks.segmentation.task import Segmentation
from unicode_fast.tasks.table import (
    PROTOCOLS,
    Row,
    TokenScore,
    aggregate,
    check_protocol,
    format_legend,
    format_markdown,
    format_metrics,
    format_table,
)
from unicode_fast.tasks.transfer import check_transfer, open_transfer

__all__ = [
    "CLOSED_TASKS",
    "DEFAULT_TASKS",
    "OPEN_TASKS",
    "PROBE_TASKS",
    "PROTOCOLS",
    "RETRIEVAL",
    "TASKS",
    "BackboneChoice",
    "Bootstrap",
    "Dataset",
    "EncodedDataset",
    "EncodedClips",
    "Estimate",
    "Evaluator",
    "FrozenModel",
    "Retrieval",
    "Row",
    "Segmentation",
    "Sharing",
    "TokenScore",
    "aggregate",
    "check_transfer",
    "check_protocol",
    "check_tasks",
    "encode_split",
    "explain",
    "format_markdown",
    "format_metrics",
    "format_sharing",
    "format_table",
    "format_legend",
    "mean_sharing",
    "measure_sharing",
    "open_transfer",
    "probe_task",
    "validate",
]
