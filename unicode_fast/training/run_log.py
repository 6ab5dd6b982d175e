"""What the first rank writes and shows while a run trains: metrics, progress bar, validations and checkpoints."""

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
from unicode_fast.training.distributed import Ranks
from unicode_fast.training.metrics_logger import LOG_EVERY, Journal, NonFiniteLoss, StepResult
from unicode_fast.training.trainer import Trainer


class RunLog:
    """Metrics, progress bar, validations and checkpoints of a run that trains.

    Args:
        trainer: fresh, or restored from `content`.
        store: the data, with val where there are validations.
        folder: of the run.
        content: of the checkpoint that is resumed, or None.
        ranks: that train together.
        total: steps of the run.

    Attributes:
        progress: plain facts that each checkpoint holds: best step with its validation accuracy, seconds, bytes of
            metrics.jsonl, digest of the data, fields that changed, number of ranks.
    """

    def __init__(
        self, trainer: Trainer, store: Dataset, folder: Path, content: dict[str, Any] | None, ranks: Ranks, total: int
    ) -> None:
        self.trainer, self.store, self.folder = trainer, store, folder
        before = content or {"progress": {}, "usage": None}
        new: dict[str, Any] = {"best": None, "seconds": 0.0, "bytes": 0, "data": store.digest(), "changes": []}
        self.progress = {**new, **before["progress"], "ranks": ranks.size}
        # The step of the newest checkpoint.
        self.saved = trainer.step if content else None
        self.metrics = Journal(folder, self.progress["bytes"], self.saved, before["usage"], total)
        self.bar = tqdm(total=total, initial=trainer.step, desc="pre-training", unit="step", dynamic_ncols=True)
        self.closed = threading.Event()
        if sys.stderr.isatty():
            threading.Thread(target=self._tick, daemon=True).start()
        self.saved_at = time.monotonic()
        self.started = self.saved_at - self.progress["seconds"]

    def _tick(self) -> None:
        # The clock of the bar goes on during a step that takes long, as one that compiles.
        while not self.closed.wait(1.0):
            self.bar.refresh()

    def close(self) -> None:
        """Closes files and leaves the bar as it is."""
        self.closed.set()
        self.bar.close()
        self.metrics.close()

    def record(self, clips: np.ndarray, result: StepResult) -> None:
        """Logs a step on a batch of these clips.

        Raises:
            NonFiniteLoss: a loss of a step before was NaN or infinite.
        """
        step = self.trainer.step
        self.metrics.record(step, self.trainer.optimizer.param_groups[0]["lr"], clips, result)
        self.bar.update()
        if step % LOG_EVERY == 0:
            self.bar.set_postfix(self.metrics.shown)

    def validate(self) -> None:
        """Scores the model on the validation split, keeps it where it is the best so far, and saves a checkpoint."""
        self.metrics.flush()
        step, model = self.trainer.step, self.trainer.model
        found = validate(model, self.store, seed=self.trainer.config.train.seed)
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
        """Writes the checkpoint of this step, if it is not there."""
        if self.saved != self.trainer.step:
            self._write(checkpoint.step_path(self.folder, self.trainer.step))
            self.saved, self.saved_at = self.trainer.step, time.monotonic()
            checkpoint.keep_newest(self.folder)

    def save_non_finite(self) -> Path:
        """Writes the state after a loss that is not finite, for inspection; the file."""
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
    trainer: Trainer, store: Dataset, folder: Path, content: dict[str, Any] | None, ranks: Ranks, total: int
) -> Iterator[RunLog | None]:
    """The `RunLog` of a run, which saves its first and its last step; None on ranks after the first.

    Raises:
        NonFiniteLoss: after the state has been saved as nonfinite-step-N.pt.
    """
    if not ranks.first:
        yield None
        return
    log = RunLog(trainer, store, folder, content, ranks, total)
    try:
        log.save()
        yield log
        log.save()
        log.bar.set_postfix(log.metrics.shown)
    except NonFiniteLoss as error:
        # Before the others miss this rank.
        ranks.fails_first()
        raise NonFiniteLoss(f"{error}; the state is saved as {log.save_non_finite()}") from error
    finally:
        log.close()
