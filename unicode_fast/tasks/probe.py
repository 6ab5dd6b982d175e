"""Frozen codes of a split, computed once, and the training of small probes on them."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, one_hot
from torch.nn.utils import clip_grad_norm_, skip_init

from unicode_fast.data import ClipSet, Dataset
from unicode_fast.modules.model import Encoded, one_thread
from unicode_fast.modules.wrapped import unwrapped
from unicode_fast.tasks.metrics.intervals import Bootstrap, Estimate

ENCODE_BATCH = 250
# Largest number of codes for which a table has a row for each of them; with more, it has rows for used codes alone.
MOST_ROWS = 1 << 12


class FrozenModel(Protocol):
    """What tasks read of a model: a UniCode, or one with selected channels."""

    @property
    def names(self) -> tuple[str, ...]:
        """The modalities."""

    @property
    def codewords(self) -> int:
        """The number of different codes, above each index."""

    @property
    def code_sizes(self) -> tuple[int, ...]:
        """As in `UniCode`."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of features."""

    @property
    def device(self) -> torch.device:
        """The device of features."""

    def encode(self, name: str, features: Tensor, mask: Tensor | None = None, *, dropout: bool = False) -> Encoded:
        """As `UniCode.encode`; the vector is a function of the index."""

    def buffers(self) -> Iterator[Tensor]:
        """Tensors that encoding may change, although it should not."""


@dataclass(frozen=True)
class EncodedClips:
    """Codes of one modality for many clips, on the CPU.

    A probe reads codewords only, and these are far fewer than positions. A function of a codeword is therefore computed
    once for each row of `table` and gathered by `index`.

    Attributes:
        index: (clips, T) int64 rows of `table`. A position outside `mask` repeats the clip's first valid code,
            so the maximum over all positions is that over valid positions.
        table: (rows, D) codewords up to the largest index; zeros for codewords that no clip uses.
        mask: (clips, T) bool.
        codes: (rows,) int64, ascending, the code of each row; None where row k is that of code k.
    """

    index: Tensor
    table: Tensor
    mask: Tensor
    codes: Tensor | None = None

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.index)

    @property
    def vector(self) -> Tensor:
        """(clips, T, D), the codeword of every position."""
        return self.table[self.index]

    @property
    def code(self) -> Tensor:
        """(clips, T) int64, the code of every position."""
        return self.index if self.codes is None else self.codes[self.index]

    def select(self, clips: Tensor) -> EncodedClips:
        """The clips of these numbers, (n,) int64; the table is the same, or one of their codes alone."""
        if self.codes is None:
            return EncodedClips(self.index[clips], self.table, self.mask[clips])
        rows, index = self.index[clips].unique(return_inverse=True)
        return EncodedClips(index, self.table[rows], self.mask[clips], self.codes[rows])

    def tokens(self, sizes: Sequence[int]) -> EncodedClips:
        """The same codes with one-hot vectors in place of codewords, one for each of `UniCode.code_sizes`."""
        code = torch.arange(math.prod(sizes)) if self.codes is None else self.codes
        hot = []
        for size in reversed(sizes):
            hot.append(one_hot(code % size, size))
            code = code // size
        return replace(self, table=torch.cat(hot[::-1], 1).to(self.table.dtype))

    def only(self, positions: Tensor) -> EncodedClips:
        """The same clips at some positions, (clips, T) bool, at least one valid position of each clip."""
        mask = self.mask & positions
        first = self.index.gather(1, mask.long().argmax(1, keepdim=True))  # (clips, 1)
        return replace(self, index=torch.where(mask, self.index, first), mask=mask)

    def to(self, dtype: torch.dtype) -> EncodedClips:
        """The same codes with a table of this dtype."""
        return replace(self, table=self.table.to(dtype))


def all_clips(array: np.ndarray) -> np.ndarray:
    """The values of all clips; indexing reads a lazy array."""
    return np.asarray(array[np.arange(len(array))])


@torch.no_grad()
def encode_batch(
    model: FrozenModel, clips: ClipSet, name: str, numbers: np.ndarray, *, dropout: bool = False
) -> EncodedClips:
    """Codes of some clips.

    Args:
        model: encodes in its own dtype on its own device.
        clips: the split.
        name: the modality.
        numbers: (n,) int64, of the clips.
        dropout: of the encoder, drawn from torch's generator.

    Raises:
        ValueError: a clip has no valid position, or positions of the same index have different vectors.
    """
    features = torch.from_numpy(np.array(clips.features[name][numbers])).to(model.device, model.dtype)
    mask = torch.from_numpy(np.array(clips.mask[name][numbers]))
    if not mask.any(1).all():
        clip = int(numbers[int(mask.any(1).long().argmin())])
        raise ValueError(f"mask of {name!r} must mark at least one position of each clip, got none in clip {clip}")
    encoded = model.encode(name, features, mask.to(model.device), dropout=dropout)
    return _encoded_clips(name, encoded.index.cpu(), encoded.vector.cpu(), mask, model.codewords > MOST_ROWS)


def _encoded_clips(name: str, index: Tensor, vector: Tensor, mask: Tensor, many: bool) -> EncodedClips:
    first = index.gather(1, mask.long().argmax(1, keepdim=True))  # (clips, 1)
    index, codes = torch.where(mask, index, first), None
    if many:
        codes, index = index.unique(return_inverse=True)
    table = vector.new_zeros(int(index.max()) + 1, vector.shape[-1])
    table[index[mask]] = vector[mask]
    _check_codewords(name, torch.equal(table[index[mask]], vector[mask]))
    return EncodedClips(index, table, mask, codes)


def _check_codewords(name: str, equal: bool) -> None:
    if not equal:
        raise ValueError(f"vector of {name!r} must be equal at equal index, got different vectors for one index")


def encode_split(
    model: FrozenModel, clips: ClipSet, name: str, batch_size: int = ENCODE_BATCH, numbers: np.ndarray | None = None
) -> EncodedClips:
    """Codes of all clips of a split, encoder frozen.

    Args:
        model: in any mode.
        clips: at least one clip.
        name: the modality.
        batch_size: clips that are encoded together.
        numbers: (n,) int64, of the clips to encode; None encodes all.

    Raises:
        ValueError: there are no clips, the batch size is below 1, or `encode_batch` fails.
    """
    model = unwrapped(model)
    numbers = np.arange(len(clips)) if numbers is None else numbers
    if len(numbers) == 0:
        raise ValueError("clips must be at least one, got none")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    batches = (numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size))
    return _joined(name, [encode_batch(model, clips, name, batch) for batch in batches])


def _joined(name: str, batches: Sequence[EncodedClips]) -> EncodedClips:
    """One table for all batches, which must have equal vectors for a codeword."""
    found = [batch.codes for batch in batches if batch.codes is not None]
    codes = torch.cat(found).unique() if found else None
    rows = max(len(batch.table) for batch in batches) if codes is None else len(codes)
    table, index = batches[0].table.new_zeros(rows, batches[0].table.shape[1]), []
    filled = torch.zeros(rows, dtype=torch.bool)
    for batch in batches:
        if codes is None or batch.codes is None:
            place = torch.arange(len(batch.table))
        else:
            place = torch.searchsorted(codes, batch.codes)
        used = batch.index.unique()
        at = place[used]
        shared = filled[at]
        _check_codewords(name, torch.equal(table[at[shared]], batch.table[used[shared]]))
        table[at], filled[at] = batch.table[used], True
        index.append(place[batch.index])
    return EncodedClips(torch.cat(index), table, torch.cat([batch.mask for batch in batches]), codes)


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seeds the global random numbers, and restores their state afterwards."""
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield


def probe_seed(seed: int, *purpose: str) -> int:
    """A seed in [0, 2^63): a hash of the arguments, equal on every machine."""
    digest = hashlib.blake2b("/".join((str(seed), *purpose)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def center_and_scale(codes: EncodedClips) -> tuple[Tensor, Tensor]:
    """Mean (D,) of the codewords at all valid positions, and their root mean square around it; 1 in place of 0."""
    used = codes.index[codes.mask]
    share = torch.bincount(used, minlength=len(codes.table)).to(codes.table.dtype) / len(used)
    center = share @ codes.table
    spread = (share @ (codes.table - center).square()).mean().sqrt()
    return center, torch.where(spread > 0, spread, 1.0)


class ProbeHead(nn.Module):
    """Linear(D, D) and Linear(D, columns); some tasks take the maximum over time between them.

    Args:
        width: D.
        columns: of the output.
        generator: of the initial weights, uniform within 1 / sqrt(D) as torch's own, in place of the global one.
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
        # Clips of less confidence are of no known class; only open-set tasks read it.
        self.threshold = 0.0

    def standardise(self, codes: EncodedClips) -> None:
        """Sets the centre and the scale that standardise codewords.

        The first linear layer can represent the same map, so the set of functions stays. One learning rate then suits
        codebooks of any scale. All channels have one scale, which keeps the geometry of codewords outside `codes`.

        Args:
            codes: of the clips that the probe is trained on.
        """
        self.center, self.scale = center_and_scale(codes)

    def projected(self, codes: EncodedClips) -> Tensor:
        """(rows, D): the first linear layer, applied to each codeword."""
        return self.project((codes.table - self.center) / self.scale)

    def of_clips(self, codes: EncodedClips) -> Tensor:
        """(clips, columns): maximum over the valid positions between the two layers."""
        return self.classify(embedding_bag(codes.index, self.projected(codes), mode="max"))

    def of_positions(self, codes: EncodedClips) -> Tensor:
        """(clips, T, columns): every position by itself."""
        return self.classify(self.projected(codes))[codes.index]


@dataclass(frozen=True)
class ProbeRule:
    """Training rule of a probe.

    Attributes:
        epochs: number of epochs; the probe is scored after each.
        batch_size: clips per step; the last batch of an epoch may be smaller.
        learning_rate: of Adam, per step.
        halve_at: epochs before which the learning rate is halved.
        clip_norm: largest gradient norm of the head; None does not clip.
        least_steps: of all epochs together; an epoch over few clips has several passes to reach it.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    halve_at: tuple[int, ...] = ()
    clip_norm: float | None = None
    least_steps: int = 0

    def passes(self, clips: int) -> int:
        """Passes over this many clips in one epoch; more than one only to reach `least_steps`."""
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
    """Trains by Adam on shuffled batches, and yields after every epoch for the caller to score the head.

    Args:
        head: trained in place.
        rule: of the training.
        clips: number of clips.
        generator: of the order of the clips.
        loss_of: from numbers of clips, (n,) int64, to their loss.
        extra: parameters to train with the head, without clipping.

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
    """Definition of a task: the output, the loss and the score of its probes.

    Methods with a body are those that most tasks share.
    """

    @property
    def name(self) -> str:
        """Name of the task."""

    @property
    def protocol(self) -> str:
        """One of held_out and official."""

    @property
    def across(self) -> bool:
        """True for a test on another data set, or on another domain of the same one."""

    @property
    def tested(self) -> tuple[str, ...]:
        """Splits to score on; the first one in the data set is used."""

    @property
    def rule(self) -> ProbeRule:
        """Training rule of its probes."""

    def fits(self, clips: ClipSet, name: str) -> bool:
        """True where the task can be measured on a modality."""

    def columns(self, clips: ClipSet) -> int:
        """Columns of the output."""

    def truth(self, clips: ClipSet, name: str) -> Tensor:
        """Target of each clip, clips first."""

    def output(self, head: ProbeHead, codes: EncodedClips) -> Tensor:
        """Logits of each clip, clips first."""

    def make_loss(self, columns: int, dtype: torch.dtype) -> nn.Module:
        """A module of (logits, truth, mask) whose parameters, if any, are trained with the head."""

    def score(self, logits: Tensor, truth: Tensor, mask: Tensor) -> float:
        """Score in [0, 1], larger is better."""

    def chance(self, clips: ClipSet, name: str) -> float:
        """The score of a prediction that ignores the clips."""

    def estimate(self, logits: Tensor, truth: Tensor, mask: Tensor, bootstrap: Bootstrap) -> Estimate:
        """The score with its interval, where it has one."""

    def metrics(self, logits: Tensor, truth: Tensor, mask: Tensor, bootstrap: Bootstrap) -> dict[str, Estimate]:
        """The score and other metrics of the same predictions, by name."""

    def adapted(self, dataset: Dataset, known: int | None) -> ProbeTask:
        """The definition on a data set, with `known` known classes in an open-set task."""
        return self

    def learnt(self, truth: Tensor) -> Tensor:
        """Numbers of the clips, (n,) int64, that a probe learns from, and whose validation clips choose its epoch."""
        return torch.arange(len(truth))

    def judge(self, logits: Tensor, truth: Tensor, mask: Tensor) -> float:
        """Score of validation clips that chooses the epoch."""
        return self.score(logits, truth, mask)

    def calibrate(self, head: ProbeHead, validation: Examples) -> None:
        """Sets what else of a trained head is chosen by validation clips, which are those of `learnt`."""
        return

    def limits(self, trained: Tensor, tested: Tensor) -> dict[str, Estimate]:
        """The largest reachable measures by name, from the truth of clips to learn from and of scored clips."""
        return {}


class Examples(NamedTuple):
    """Codes and targets of some clips, clips first."""

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
    """Trains a probe on the codes of one modality, float32.

    The kept epoch has the best score on validation clips of the same modality; among equals, the lowest validation
    loss. Labels of other modalities do not enter the choice, because zero-shot use has none.

    Args:
        task: the definition.
        columns: of the output.
        training: the clips to train on.
        validation: clips of the same modality; None keeps the last epoch.
        generator: of initial weights and the order of the clips.
        rule: of the training; None takes the task's own.
    """
    (codes, truth), validation = learnt(task, training), None if validation is None else learnt(task, validation)
    head = ProbeHead(codes.table.shape[1], columns, generator, torch.float32)
    head.standardise(codes)
    loss = task.make_loss(columns, torch.float32)

    def loss_of(numbers: Tensor) -> Tensor:
        batch = codes.select(numbers)
        return loss(task.output(head, batch), truth[numbers], batch.mask)

    best: tuple[tuple[float, float], dict[str, Tensor]] | None = None
    with one_thread():
        for _ in probe_epochs(head, rule or task.rule, len(codes), generator, loss_of, loss.parameters()):
            if validation is not None:
                rank = _rank(task, head, loss, validation)
                if best is None or rank > best[0]:
                    best = rank, {key: value.clone() for key, value in head.state_dict().items()}
    if best is not None:
        head.load_state_dict(best[1])
    head.requires_grad_(False)
    if validation is not None:
        with one_thread():
            task.calibrate(head, validation)
    return head


def learnt(task: ProbeTask, examples: Examples) -> Examples:
    """The examples that a probe learns from, codes in float32."""
    numbers = task.learnt(examples.truth)
    return Examples(examples.codes.select(numbers).to(torch.float32), examples.truth[numbers])


@torch.no_grad()
def _rank(task: ProbeTask, head: ProbeHead, loss: nn.Module, held_out: Examples) -> tuple[float, float]:
    """Score, then negative loss; larger is better."""
    codes, truth = held_out
    logits = task.output(head, codes)
    return task.judge(logits, truth, codes.mask), -float(loss(logits, truth, codes.mask))
