"""The log of a run in training, on the first rank: metrics, progress bar, validations and checkpoints."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from unicode_fast import checkpoint
from unicode_fast.data import Dataset
from unicode_fast.tasks import validate
from unicode_fast.training.distributed import DistContext
from unicode_fast.training.metrics_logger import LOG_EVERY, MetricsLogger, NonFiniteLoss, StepResult
from unicode_fast.training.runs import keep_execution
from unicode_fast.training.trainer import Trainer


class RunLog:
    """Metrics, progress bar, validations and checkpoints of a run in training.

    Args:
        trainer: new, or restored from `content`.
        dataset: has val if the run has validations.
        folder: of the run.
        content: of the checkpoint that is resumed, or None.
        ranks: the ranks that train together.
        total: number of training steps.

    Attributes:
        progress: entry of each checkpoint: best step with its validation accuracy, seconds, bytes of metrics.jsonl,
            digest of the data, changed fields, number of ranks.
    """

    def __init__(
        self,
        trainer: Trainer,
        dataset: Dataset,
        folder: Path,
        content: dict[str, Any] | None,
        ranks: DistContext,
        total: int,
    ) -> None:
        self.trainer, self.dataset, self.folder = trainer, dataset, folder
        before = content or {"progress": {}, "usage": None}
        new: dict[str, Any] = {"best": None, "seconds": 0.0, "bytes": 0, "data": dataset.digest(), "changes": []}
        self.progress = {**new, **before["progress"], "ranks": ranks.size}
        # The step of the newest checkpoint.
        self.saved = trainer.step if content else None
        self.first = trainer.step + 1
        what = "codewords of layer 1" if len(trainer.model.code_sizes) > 1 else "codewords"
        self.metrics = MetricsLogger(folder, self.progress["bytes"], self.saved, before["usage"], total, what)
        self.bar = tqdm(total=total, initial=trainer.step, desc="pre-training", unit="step", dynamic_ncols=True)
        self.closed = threading.Event()
        self.ticking = threading.Thread(target=self._tick, daemon=True)
        if sys.stderr.isatty():
            self.ticking.start()
        self.saved_at = time.monotonic()
        self.started = self.saved_at - self.progress["seconds"]

    def _tick(self) -> None:
        # Updates the clock of the bar during long steps, such as those that compile.
        while not self.closed.wait(1.0):
            self.bar.refresh()

    def close(self) -> None:
        """Closes files and the progress bar, which stays visible."""
        self.closed.set()
        if self.ticking.is_alive():
            self.ticking.join()
        self.bar.close()
        self.metrics.close()

    def record(self, clips: np.ndarray, result: StepResult) -> None:
        """Logs a step and the clips of its batch.

        Raises:
            NonFiniteLoss: a loss of an earlier step is NaN or infinite.
        """
        step = self.trainer.step
        self.metrics.record(step, self.trainer.optimizer.param_groups[0]["lr"], clips, result)
        self.bar.update()
        if step == self.first:
            keep_execution(self.folder, self.trainer.config)
        if step % LOG_EVERY == 0:
            self.bar.set_postfix(self.metrics.shown)

    def validate(self) -> None:
        """Scores the model on the validation split, saves it as best if it is, and saves a checkpoint."""
        self.metrics.flush()
        step, model = self.trainer.step, self.trainer.model
        found = validate(model, self.dataset, seed=self.trainer.config.train.seed)
        if self.progress["best"] is None or found["mean"] > self.progress["best"]["accuracy"]:
            self.progress["best"] = {"step": step, "accuracy": found["mean"]}
            path = self.folder / checkpoint.FOLDER / checkpoint.BEST
            checkpoint.save(path, model, {"step": step, "data": self.progress["data"]})
        self.metrics.write({"step": step, "kind": "validation", **found})
        self.save()

    @property
    def save_is_due(self) -> bool:
        """Whether the newest checkpoint is older than `checkpoint_seconds`."""
        return time.monotonic() - self.saved_at > self.trainer.config.train.checkpoint_seconds

    def save(self) -> None:
        """Writes the checkpoint of this step unless it exists."""
        if self.saved != self.trainer.step:
            self._write(checkpoint.step_path(self.folder, self.trainer.step))
            self.saved, self.saved_at = self.trainer.step, time.monotonic()
            checkpoint.keep_newest(self.folder)

    def save_non_finite(self) -> Path:
        """Writes the state after a non-finite loss, for inspection; returns the file."""
        self.metrics.pending.clear()
        name = f"{checkpoint.NON_FINITE}step-{self.trainer.step:08d}.pt"
        return self._write(self.folder / checkpoint.FOLDER / name)

    def _write(self, path: Path) -> Path:
        self.progress.update(bytes=self.metrics.flush(), seconds=time.monotonic() - self.started)
        extra = {**self.trainer.state(), "progress": self.progress, "usage": self.metrics.usage_so_far()}
        checkpoint.save(path, self.trainer.model, extra)
        return path


@contextlib.contextmanager
def run_log(
    trainer: Trainer, dataset: Dataset, folder: Path, content: dict[str, Any] | None, ranks: DistContext, total: int
) -> Iterator[RunLog | None]:
    """Context of the `RunLog` of a run, which saves its first and its last step; None on ranks after the first.

    Raises:
        NonFiniteLoss: after the state has been saved as nonfinite-step-N.pt.
    """
    if not ranks.first:
        yield None
        return
    log = RunLog(trainer, dataset, folder, content, ranks, total)
    try:
        log.save()
        yield log
        log.save()
        keep_execution(folder, trainer.config)
        log.bar.set_postfix(log.metrics.shown)
    except NonFiniteLoss as error:
        # Before the other ranks time out, so that this rank prints the error.
        ranks.fails_first()
        raise NonFiniteLoss(f"{error}; the state is saved as {log.save_non_finite()}") from error
    finally:
        log.close()
