"""Metrics of a run in training: JSON lines, TensorBoard events, and the check for non-finite losses."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from unicode_fast import health
from unicode_fast.checkpoint import METRICS
from unicode_fast.errors import say
from unicode_fast.files.untrusted import BadFile, check_count, read_bytes
from unicode_fast.files.writing import naming, sync_folder

LOG_EVERY = 20
# Losses are read this many steps late, which avoids device synchronisation.
READ_DELAY = 8


class NonFiniteLoss(RuntimeError):
    """A loss became NaN or infinite; the message names the term, the step and the clips."""


@dataclass(frozen=True)
class StepResult:
    """Tensors of one training step, on the device.

    terms: weighted losses by name; recognised: share of clips that Cross-CPC
    recognises, by direction; usage: how often each modality chose each
    codeword, (M,) by modality.
    """

    terms: dict[str, Tensor]
    recognised: dict[str, Tensor]
    usage: dict[str, Tensor]


class _Pending:
    """The numbers of a step, copied to the host asynchronously; `read` waits for the copy."""

    def __init__(self, step: int, rate: float | Tensor, clips: np.ndarray, result: StepResult) -> None:
        self.step, self.rate, self.clips = step, rate, clips
        self.names = tuple(tuple(group) for group in (result.terms, result.recognised, result.usage))
        numbers = [*result.terms.values(), *result.recognised.values(), *result.usage.values()]
        if isinstance(rate, Tensor):
            numbers.append(rate)
        packed = torch.cat([number.detach().flatten().double() for number in numbers])
        self.event = None
        if packed.is_cuda:
            self.values = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self.values.copy_(packed, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.values = packed

    def read(self) -> tuple[dict[str, float], dict[str, float], np.ndarray]:
        """Losses, shares recognised, and usage (modalities, M)."""
        if self.event is not None:
            self.event.synchronize()
        values = self.values.numpy()
        if isinstance(self.rate, Tensor):
            self.rate, values = float(values[-1]), values[:-1]
        losses, shares, names = self.names
        first, second = len(losses), len(losses) + len(shares)
        return (
            dict(zip(losses, values[:first].tolist(), strict=True)),
            dict(zip(shares, values[first:second].tolist(), strict=True)),
            values[second:].reshape(len(names), -1).copy(),
        )


class MetricsLogger:
    """Writes the metrics of a run and checks its losses.

    Args:
        folder: of the run.
        offset: bytes of metrics.jsonl to keep; a resumed run writes later lines again. A shorter file is kept whole,
            with a note on the error stream.
        step: of the checkpoint that is resumed, for TensorBoard; None for a new run.
        usage: counts since the last line, from the checkpoint, or None.
        last: the last step, which always gets a line; None for none.
        what: is counted, as in `health.collapsed`.

    Raises:
        OSError: a file cannot be written, or the disk is full; also from every method that writes.
    """

    def __init__(
        self,
        folder: Path,
        offset: int = 0,
        step: int | None = None,
        usage: Tensor | None = None,
        last: int | None = None,
        what: str = "codewords",
    ) -> None:
        self.path, self.last, self.what = folder / METRICS, last, what
        with naming(self.path):
            _keep(self.path, offset)
            self.file = self.path.open("a", encoding="utf-8", newline="")
        self.events = _Events(folder, step)
        sync_folder(folder)
        self.pending: deque[_Pending] = deque()
        self.usage: np.ndarray | None = None if usage is None else usage.cpu().numpy()
        self.shown: dict[str, str] = {}
        self.warned: set[str] = set()

    def record(self, step: int, rate: float | Tensor, clips: np.ndarray, result: StepResult) -> None:
        """Records a step; reads the numbers of the step READ_DELAY steps before it.

        Args:
            step: its number.
            rate: the learning rate of the optimiser.
            clips: of the batch.
            result: its tensors may change after this call.

        Raises:
            NonFiniteLoss: a loss of the earlier step is NaN or infinite.
        """
        self.pending.append(_Pending(step, rate, clips, result))
        if len(self.pending) > READ_DELAY:
            self._read()

    def flush(self) -> int:
        """Reads all pending steps and writes metrics.jsonl to the disk; returns its size in bytes."""
        while self.pending:
            self._read()
        with naming(self.path):
            self.file.flush()
            os.fsync(self.file.fileno())
        self.events.flush()
        return self.path.stat().st_size

    def usage_so_far(self) -> Tensor | None:
        """Counts since the last line, for the checkpoint."""
        return None if self.usage is None else torch.from_numpy(self.usage)

    def _read(self) -> None:
        pending = self.pending.popleft()
        losses, recognised, usage = pending.read()
        for name, value in losses.items():
            if not math.isfinite(value):
                raise NonFiniteLoss(
                    f"loss term {name} became {value} at step {pending.step}, in the batch of clips "
                    f"{_some(pending.clips)}"
                )
        self.usage = usage if self.usage is None else self.usage + usage
        if pending.step % LOG_EVERY and pending.step != self.last:
            return
        names = pending.names[2]
        share = self.usage / np.maximum(self.usage.sum(1, keepdims=True), 1)
        perplexity = np.exp(-(share * np.log(np.maximum(share, 1e-12))).sum(1))
        used = self.usage > 0
        codes, perplexities = (dict(zip(names, values.tolist(), strict=True)) for values in (used.sum(1), perplexity))
        self.usage = None
        warnings = self._warn(pending.step, health.collapsed(codes, perplexities, used.shape[1], self.what))
        self.write(
            {
                "step": pending.step,
                "kind": "train",
                "learning_rate": pending.rate,
                "loss": sum(losses.values()),
                "losses": losses,
                **({"recognised": recognised} if recognised else {}),
                "codes_in_use": codes,
                "codes_in_use_by_any": int(used.any(0).sum()),
                "perplexity": perplexities,
                **warnings,
            }
        )
        reconstruction = sum(value for name, value in losses.items() if name.startswith("reconstruction."))
        self.shown = {
            "loss": f"{sum(losses.values()):.2f}",
            "reconstruction": f"{reconstruction:.2f}",
            **({"cpc": f"{losses['cpc']:.2f}"} if "cpc" in losses else {}),
            "codes": str(used.any(0).sum()),
        }

    def _warn(self, step: int, found: Mapping[str, str]) -> dict[str, list[str]]:
        """Warnings of collapsed codes for a line; the error stream shows the first of each modality."""
        for name, text in found.items():
            if name not in self.warned:
                tqdm.write(f"warning: step {step}: {text}", file=sys.stderr)
        self.warned |= found.keys()
        return {"warnings": list(found.values())} if found else {}

    def write(self, line: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and its numbers as events."""
        with naming(self.path):
            self.file.write(json.dumps(line) + "\n")
        self.events.write(line)

    def close(self) -> None:
        """Closes the files without flush: a resumed run writes lines after the last checkpoint again."""
        for file in (self.file, self.events.file):
            with contextlib.suppress(OSError):
                file.close()


def _keep(path: Path, offset: int) -> None:
    """Truncates metrics.jsonl to `offset` bytes, and ends its last line if that was cut."""
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size > offset:
            file.truncate(offset)
        elif size < offset:
            say(f"note: {path} has lost lines, {size} of {offset} bytes are left; the run continues", sys.stderr)
        end = min(size, offset)
        file.seek(max(end - 1, 0))
        if file.read(1) not in (b"", b"\n"):
            file.write(b"\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without unreadable ones, which a note on the error stream counts.

    Raises:
        OSError: the file does not exist or cannot be read.
    """
    try:
        data = read_bytes(folder / METRICS)
        check_count(sum(map(data.count, (b",", b"[", b"{"))), "values")
    except BadFile as error:
        say(f"note: {folder / METRICS} is skipped: {error}", sys.stderr)
        return []
    found, unreadable = [], []
    for number, line in enumerate(data.split(b"\n"), 1):
        try:
            content = json.loads(line) if line else None
        except (ValueError, RecursionError):
            content = {}
        if isinstance(content, dict) and {"step", "kind"} <= content.keys():
            found.append(content)
        elif line:
            unreadable.append(number)
    if unreadable:
        lines = f"{len(unreadable)} unreadable lines of {folder / METRICS} are skipped"
        say(f"note: {lines}, the first is line {unreadable[0]}", sys.stderr)
    return found


class _Events:
    """Writer of TensorBoard events. It writes in this thread, so that a full disk raises an error here.

    Args:
        folder: of the run.
        step: of the checkpoint that is resumed, after which TensorBoard drops events of other files; None for a new
            run.
    """

    def __init__(self, folder: Path, step: int | None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        name = f"events.out.tfevents.{time.time_ns() // 10**9}.{platform.node()}.{os.getpid()}"
        number = sum(1 for _ in folder.glob(f"{name}.*"))
        self.path = folder / f"{name}.{number}"
        with naming(self.path):
            self.file = self.path.open("xb")
        self._records = RecordWriter(self.file)
        self._add(file_version="brain.Event:2")
        if step is not None:
            self._add(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, line: Mapping[str, Any]) -> None:
        """Writes the numbers of a line of metrics.jsonl."""
        for name, value in _scalars("", line):
            if name != "step":
                shown = self._summary.Value(tag=f"{line['kind']}/{name}", simple_value=value)
                self._add(step=line["step"], summary=self._summary(value=[shown]))

    def flush(self) -> None:
        """Writes buffered events to the file."""
        with naming(self.path):
            self.file.flush()

    def _add(self, **fields: Any) -> None:
        with naming(self.path):
            self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())


def _scalars(prefix: str, values: Mapping[str, Any]) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _scalars(f"{prefix}{name}/", value)
        elif isinstance(value, (int, float)):
            found.append((f"{prefix}{name}", value))
    return found


def _some(clips: np.ndarray) -> str:
    shown = ", ".join(map(str, clips[:8]))
    return shown if len(clips) <= 8 else f"{shown}, … ({len(clips)} in all)"
