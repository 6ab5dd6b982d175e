"""Frozen codes of a split, computed once, and the training of small probes on them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag
from torch.nn.utils import clip_grad_norm_, skip_init

from unicode_fast.data import ClipSet
from unicode_fast.modules.model import UniCode
from unicode_fast.modules.wrapped import unwrapped
from unicode_fast.tasks.metrics.intervals import Bootstrap, Estimate

ENCODE_BATCH = 250


@dataclass(frozen=True)
class EncodedClips:
    """Codes of one modality for many clips, on the CPU.

    A probe reads codewords only, and there are far fewer of them than segments: what is linear in a codeword is
    computed once for each row of `table` and looked up by `index`.

    Attributes:
        index: (clips, T) int64 rows of `table`. A step outside `mask` repeats the clip's first valid code, so that a
            maximum over all steps is one over the valid steps.
        table: (rows, D), the codewords, rows up to the largest index; zeros where no clip chose the codeword.
        mask: (clips, T) bool.
    """

    index: Tensor
    table: Tensor
    mask: Tensor

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.index)

    @property
    def vector(self) -> Tensor:
        """(clips, T, D), the codeword of every step."""
        return self.table[self.index]

    def select(self, clips: Tensor) -> EncodedClips:
        """The clips of these numbers, (n,) int64, with the same table."""
        return EncodedClips(self.index[clips], self.table, self.mask[clips])

    def tokens(self, codewords: int) -> EncodedClips:
        """The same codes as one-hot vectors, (codewords, codewords): nothing of where their codewords lie."""
        return EncodedClips(self.index, torch.eye(codewords, dtype=self.table.dtype), self.mask)

    def only(self, steps: Tensor) -> EncodedClips:
        """The same clips with some of their steps, (clips, T) bool, at least one valid step of each clip among them."""
        mask = self.mask & steps
        first = self.index.gather(1, mask.long().argmax(1, keepdim=True))  # (clips, 1)
        return EncodedClips(torch.where(mask, self.index, first), self.table, mask)

    def to(self, dtype: torch.dtype) -> EncodedClips:
        """The same codes with a table of this dtype."""
        return EncodedClips(self.index, self.table.to(dtype), self.mask)


def all_clips(array: np.ndarray) -> np.ndarray:
    """The values of all clips of an array that may be read only when it is indexed."""
    return np.asarray(array[np.arange(len(array))])


@torch.no_grad()
def encode_batch(
    model: UniCode, clips: ClipSet, name: str, numbers: np.ndarray, *, dropout: bool = False
) -> EncodedClips:
    """Codes of some clips.

    Args:
        model: encodes in its own dtype on its own device.
        clips: the split.
        name: the modality.
        numbers: (n,) positions in `clips`.
        dropout: of the encoder, drawn from torch's generator.

    Raises:
        ValueError: a clip has no valid step, or steps of the same index have different vectors.
    """
    features = torch.from_numpy(np.array(clips.features[name][numbers])).to(model.device, model.dtype)
    mask = torch.from_numpy(np.array(clips.mask[name][numbers]))
    if not mask.any(1).all():
        clip = int(numbers[int(mask.any(1).long().argmin())])
        raise ValueError(f"mask of {name!r} must mark at least one step of each clip, got none in clip {clip}")
    encoded = model.encode(name, features, mask.to(model.device), dropout=dropout)
    return _encoded_clips(name, encoded.index.cpu(), encoded.vector.cpu(), mask)


def _encoded_clips(name: str, index: Tensor, vector: Tensor, mask: Tensor) -> EncodedClips:
    first = index.gather(1, mask.long().argmax(1, keepdim=True))  # (clips, 1)
    index = torch.where(mask, index, first)
    table = vector.new_zeros(int(index.max()) + 1, vector.shape[-1])
    table[index[mask]] = vector[mask]
    _check_codewords(name, torch.equal(table[index[mask]], vector[mask]))
    return EncodedClips(index, table, mask)


def _check_codewords(name: str, equal: bool) -> None:
    if not equal:
        raise ValueError(f"vector of {name!r} must be the same wherever index is, got different ones for one index")


def encode_split(
    model: UniCode, clips: ClipSet, name: str, batch_size: int = ENCODE_BATCH, numbers: np.ndarray | None = None
) -> EncodedClips:
    """Codes of all clips of a split, encoder frozen.

    Args:
        model: in any mode.
        clips: at least one clip.
        name: the modality.
        batch_size: clips that are encoded together.
        numbers: (n,) positions of the clips to take, None takes all.

    Raises:
        ValueError: there are no clips, the batch size is below 1, or as `encode_batch` says.
    """
    model = unwrapped(model)
    numbers = np.arange(len(clips)) if numbers is None else numbers
    if len(numbers) == 0:
        raise ValueError("clips must be at least one, got none")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    pieces = [numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)]
    return _joined(name, [encode_batch(model, clips, name, piece) for piece in pieces])


def _joined(name: str, parts: Sequence[EncodedClips]) -> EncodedClips:
    """One table for all parts, which must agree on every codeword that they share."""
    table = parts[0].table.new_zeros(max(len(part.table) for part in parts), parts[0].table.shape[1])
    known = torch.zeros(len(table), dtype=torch.bool)
    for part in parts:
        used = part.index.unique()
        shared = used[known[used]]
        _check_codewords(name, torch.equal(table[shared], part.table[shared]))
        table[used], known[used] = part.table[used], True
    return EncodedClips(torch.cat([part.index for part in parts]), table, torch.cat([part.mask for part in parts]))


@contextmanager
def one_thread() -> Iterator[None]:
    """Operations inside run on one thread.

    Probes multiply matrices of some hundred rows: a second thread costs more than it brings, several times more when
    cores are busy, and on one thread the scores do not depend on the number of cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Global random numbers start from `seed`; afterwards they are what they were."""
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield


def probe_seed(seed: int, *purpose: str) -> int:
    """A seed in [0, 2^63) that depends on these alone, the same on every machine."""
    digest = hashlib.blake2b("/".join((str(seed), *purpose)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def center_and_scale(codes: EncodedClips) -> tuple[Tensor, Tensor]:
    """Mean (D,) of the codewords of all valid steps, and their root mean square around it, 1 where that is 0."""
    steps = codes.index[codes.mask]
    share = torch.bincount(steps, minlength=len(codes.table)).to(codes.table.dtype) / len(steps)
    center = share @ codes.table
    spread = (share @ (codes.table - center).square()).mean().sqrt()
    return center, torch.where(spread > 0, spread, 1.0)


class ProbeHead(nn.Module):
    """Linear(D, D), then Linear(D, columns), with nothing between them but a maximum over time where a task takes one.

    Args:
        width: D.
        columns: of the output.
        generator: of the initial weights, uniform within 1 / sqrt(D) as torch's own; the global one is not used.
        dtype: float32 or float64.
    """

    def __init__(self, width: int, columns: int, generator: torch.Generator, dtype: torch.dtype) -> None:
        super().__init__()
        self.project = skip_init(nn.Linear, width, width, dtype=dtype)
        self.classify = skip_init(nn.Linear, width, columns, dtype=dtype)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.uniform_(-(width**-0.5), width**-0.5, generator=generator)
        self.center = torch.zeros(width, dtype=dtype)
        self.scale = torch.ones((), dtype=dtype)

    def standardise(self, codes: EncodedClips) -> None:
        """Codewords are centred and divided by one number from now on.

        The first linear layer could do the same, so the set of functions stays; but one learning rate then suits
        codebooks of any scale. One number for all channels leaves codewords that `codes` never holds at their place.

        Args:
            codes: of the clips that the probe is trained on.
        """
        self.center, self.scale = center_and_scale(codes)

    def projected(self, codes: EncodedClips) -> Tensor:
        """(rows, D), the first linear layer of each codeword."""
        return self.project((codes.table - self.center) / self.scale)

    def of_clips(self, codes: EncodedClips) -> Tensor:
        """(clips, columns): maximum over the valid steps between the two layers."""
        return self.classify(embedding_bag(codes.index, self.projected(codes), mode="max"))

    def of_steps(self, codes: EncodedClips) -> Tensor:
        """(clips, T, columns): every step by itself."""
        return self.classify(self.projected(codes))[codes.index]


@dataclass(frozen=True)
class ProbeRule:
    """How a probe is trained.

    Attributes:
        epochs: how often the probe is judged; one pass over the clips each.
        batch_size: clips per step; the last batch of an epoch may be smaller.
        learning_rate: of Adam, per step.
        halve_at: epochs before which the learning rate is halved.
        clip_norm: largest gradient norm of the head; None does not clip.
        least_steps: an epoch has several passes where the clips are too few for this many steps in all epochs.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    halve_at: tuple[int, ...] = ()
    clip_norm: float | None = None
    least_steps: int = 0

    def passes(self, clips: int) -> int:
        """Passes over this many clips in one epoch, more than one only for the sake of `least_steps`."""
        steps = self.epochs * -(-clips // self.batch_size)
        return max(1, -(-self.least_steps // steps))


def probe_epochs(
    head: ProbeHead,
    rule: ProbeRule,
    clips: int,
    generator: torch.Generator,
    loss_of: Callable[[Tensor], Tensor],
    extra: Iterable[nn.Parameter] = (),
) -> Iterator[int]:
    """Trains by Adam on shuffled batches and yields after every epoch, so that the caller can judge the head.

    Args:
        head: trained in place.
        rule: how.
        clips: number of clips.
        generator: of the order of the clips.
        loss_of: the loss of the clips of these numbers, (n,) int64.
        extra: parameters that are trained with the head but not clipped.

    Yields:
        The number of the epoch that just ended.
    """
    optimizer = torch.optim.Adam([*head.parameters(), *extra], rule.learning_rate, fused=True)
    for epoch in range(rule.epochs):
        optimizer.param_groups[0]["lr"] = rule.learning_rate * 0.5 ** sum(epoch >= at for at in rule.halve_at)
        orders = (torch.randperm(clips, generator=generator) for _ in range(rule.passes(clips)))
        for numbers in itertools.chain.from_iterable(order.split(rule.batch_size) for order in orders):
            optimizer.zero_grad(set_to_none=True)
            loss_of(numbers).backward()
            if rule.clip_norm is not None:
                clip_grad_norm_(head.parameters(), rule.clip_norm)
            optimizer.step()
        yield epoch


class ProbeTask(Protocol):
    """What is asked of a probe: its head's output, its loss, its score."""

    @property
    def name(self) -> str:
        """As people call the task."""

    @property
    def protocol(self) -> str:
        """One of held_out and official."""

    @property
    def across(self) -> bool:
        """The probe is tested on another data set, or on another domain of the same one."""

    @property
    def tested(self) -> tuple[str, ...]:
        """Splits to score on; the first of them that the data set has is taken."""

    @property
    def rule(self) -> ProbeRule:
        """How its probes are trained."""

    def fits(self, clips: ClipSet, name: str) -> bool:
        """Whether a modality has what the task needs."""

    def columns(self, clips: ClipSet) -> int:
        """Columns of the output."""

    def truth(self, clips: ClipSet, name: str) -> Tensor:
        """What the probe should say of each clip, clips first."""

    def output(self, head: ProbeHead, codes: EncodedClips) -> Tensor:
        """Logits of each clip, clips first."""

    def make_loss(self, columns: int, dtype: torch.dtype) -> nn.Module:
        """A module of (logits, truth, mask) whose parameters, if any, are trained with the head."""

    def score(self, logits: Tensor, truth: Tensor, mask: Tensor) -> float:
        """In [0, 1], more is better."""

    def chance(self, clips: ClipSet, name: str) -> float:
        """The score without looking at the clips."""

    def estimate(self, logits: Tensor, truth: Tensor, mask: Tensor, bootstrap: Bootstrap) -> Estimate:
        """The score with its interval, where it has one."""

    def further(self, logits: Tensor, truth: Tensor, mask: Tensor, bootstrap: Bootstrap) -> dict[str, Estimate]:
        """The score and further numbers of the same predictions, by name."""


class Examples(NamedTuple):
    """Codes of some clips and what a probe should say of them, clips first."""

    codes: EncodedClips
    truth: Tensor


def train_probe(
    task: ProbeTask,
    columns: int,
    training: Examples,
    validation: Examples | None,
    generator: torch.Generator,
    rule: ProbeRule | None = None,
) -> ProbeHead:
    """A probe on the codes of one modality, float32.

    The epoch is the one with the best score on validation clips of the same modality, and the lower validation loss
    among equals. Labels of another modality would not be at hand where a zero-shot probe is needed, so they have no
    part in the choice.

    Args:
        task: what it learns.
        columns: of its output.
        training: the clips it learns from.
        validation: clips of the same modality; None takes the last epoch.
        generator: of initial weights and the order of the clips.
        rule: how it is trained; None takes the task's own.
    """
    codes, truth = training.codes.to(torch.float32), training.truth
    head = ProbeHead(codes.table.shape[1], columns, generator, torch.float32)
    head.standardise(codes)
    loss = task.make_loss(columns, torch.float32)

    def loss_of(numbers: Tensor) -> Tensor:
        part = codes.select(numbers)
        return loss(task.output(head, part), truth[numbers], part.mask)

    best: tuple[tuple[float, float], dict[str, Tensor]] | None = None
    with one_thread():
        for _ in probe_epochs(head, rule or task.rule, len(codes), generator, loss_of, loss.parameters()):
            if validation is not None:
                rank = _rank(task, head, loss, validation)
                if best is None or rank > best[0]:
                    best = rank, {key: value.clone() for key, value in head.state_dict().items()}
    if best is not None:
        head.load_state_dict(best[1])
    return head.requires_grad_(False)


@torch.no_grad()
def _rank(task: ProbeTask, head: ProbeHead, loss: nn.Module, held_out: Examples) -> tuple[float, float]:
    """Score, then negative loss: the larger, the better."""
    codes = held_out.codes.to(torch.float32)
    logits = task.output(head, codes)
    return task.score(logits, held_out.truth, codes.mask), -float(loss(logits, held_out.truth, codes.mask))
