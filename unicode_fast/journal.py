"""What a run writes while it trains: JSON lines, TensorBoard events, and the check for non-finite losses."""

from __future__ import annotations

import json
import math
import sys
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

LOG_EVERY = 20
# Losses are read this many steps late, so that a device is never waited for.
READ_DELAY = 8


class NonFiniteLoss(RuntimeError):
    """A loss became NaN or infinite; the message names the term, the step and the clips."""


@dataclass(frozen=True)
class StepResult:
    """Tensors of one training step, none of them read yet.

    terms: weighted losses by name; recognised: share of clips that Cross-CPC
    recognises, by direction; usage: how often each modality chose each
    codeword, (M,) by modality.
    """

    terms: dict[str, Tensor]
    recognised: dict[str, Tensor]
    usage: dict[str, Tensor]


class _Pending:
    """The numbers of a step on their way to the host; nothing waits for them until they are read."""

    def __init__(self, step: int, rate: float | Tensor, clips: np.ndarray, result: StepResult) -> None:
        self.step, self.rate, self.clips = step, rate, clips
        self.names = tuple(tuple(part) for part in (result.terms, result.recognised, result.usage))
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


class Journal:
    """Writes what happens in a run and watches its losses.

    Args:
        folder: of the run.
        offset: bytes of metrics.jsonl that are kept; what a killed run wrote after its last checkpoint is made again.
        step: of the checkpoint that is resumed, for TensorBoard; None for a new run.
        usage: counts since the last line, from the checkpoint, or None.
        last: the step that gets a line in any case; None for none.
    """

    def __init__(
        self,
        folder: Path,
        offset: int = 0,
        step: int | None = None,
        usage: Tensor | None = None,
        last: int | None = None,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path, self.last = folder / "metrics.jsonl", last
        with self.path.open("ab") as file:
            file.truncate(offset)
        self.file = self.path.open("a", encoding="utf-8")
        self.events = SummaryWriter(str(folder), purge_step=None if step is None else step + 1)
        self.pending: deque[_Pending] = deque()
        self.usage: np.ndarray | None = None if usage is None else usage.cpu().numpy()
        self.shown: dict[str, str] = {}
        self.warned: set[str] = set()

    def record(self, step: int, rate: float | Tensor, clips: np.ndarray, result: StepResult) -> None:
        """Notes a step; reads the one READ_DELAY steps before it.

        Args:
            step: its number.
            rate: the learning rate, as the optimiser holds it.
            clips: of the batch.
            result: its tensors may change after this call.

        Raises:
            NonFiniteLoss: that one had a loss that is NaN or infinite.
        """
        self.pending.append(_Pending(step, rate, clips, result))
        if len(self.pending) > READ_DELAY:
            self._read()

    def flush(self) -> int:
        """Reads all that is pending; returns the size of metrics.jsonl in bytes."""
        while self.pending:
            self._read()
        self.file.flush()
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
        warnings = self._warn(pending.step, health.collapsed(codes, perplexities, used.shape[1]))
        self.write(
            {
                "step": pending.step,
                "kind": "train",
                "learning_rate": pending.rate,
                "loss": sum(losses.values()),
                "losses": losses,
                "recognised": recognised,
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
            "cpc": f"{losses['cpc']:.2f}",
            "codes": str(used.any(0).sum()),
        }

    def _warn(self, step: int, found: Mapping[str, str]) -> dict[str, list[str]]:
        """What a line says of collapsed codes; on the error stream once for each modality."""
        for name, text in found.items():
            if name not in self.warned:
                tqdm.write(f"warning: step {step}: {text}", file=sys.stderr)
        self.warned |= found.keys()
        return {"warnings": list(found.values())} if found else {}

    def write(self, line: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and its numbers as events."""
        self.file.write(json.dumps(line) + "\n")
        for name, value in _scalars("", line):
            if name != "step":
                self.events.add_scalar(f"{line['kind']}/{name}", value, line["step"])

    def close(self) -> None:
        """Everything is on the disk afterwards."""
        self.file.close()
        self.events.close()


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
