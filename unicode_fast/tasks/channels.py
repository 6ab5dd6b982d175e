"""TOC: the channels of a trained codebook that a probe reads, chosen without training.

Each channel has a score from the codebook alone: it is high where codewords differ and low where they agree. Probes
read the selected channels of a codeword. Its index stays, so scores of one-hot codes stay too.

Source:
    Training-free optimisation of the codebook, arXiv:2403.05168, and the code that its authors released with it. The
    criterion is that of APE: Zhu et al., "Not All Features Matter", ICCV 2023. Two choices are ours: the codewords in
    `used_rows`, and the number of channels by `choose_channels`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from unicode_fast.data import Dataset
from unicode_fast.modules.model import Encoded, UniCode
from unicode_fast.modules.wrapped import unwrapped_unicode
from unicode_fast.tasks.encoded import TRAIN, VALIDATION, WHOLE, EncodedDataset
from unicode_fast.tasks.probe import Examples, ProbeTask, learnt, probe_seed, train_probe

# w1 and w2 of the released code.
WEIGHTS = (0.7, 0.3)
Rows = Literal["all", "used"]
# Numbers of channels that the released scripts try, of 256.
SWEEP, SWEEP_WIDTH = (64, 128, 144, 168, 196, 224), 256


def toc_scores(codebook: Tensor, weights: Sequence[float] = WEIGHTS, rows: Tensor | None = None) -> Tensor:
    """Score of each channel: -w1 times the mean product of two different codewords, plus w2 times their variance.

    With mean mu_d and unbiased variance var_d over M codewords, the mean product over ordered pairs is
    mu_d^2 - var_d / M, so that score_d = -w1 mu_d^2 + (w2 + w1 / M) var_d. Sums over pairs are not needed.

    Args:
        codebook: (M, D).
        weights: w1 and w2, finite and at least 0, not both 0.
        rows: (M,) bool, the codewords to read; None reads all.

    Returns:
        (D,) float64.

    Raises:
        ValueError: the codebook is no matrix of at least two codewords, or there are not two such weights.
    """
    if codebook.dim() != 2 or rows is not None and rows.shape != codebook.shape[:1]:
        got = tuple(codebook.shape) if rows is None else f"{tuple(codebook.shape)} with rows {tuple(rows.shape)}"
        raise ValueError(f"codebook must have shape (M, D), and rows (M,), got {got}")
    if len(weights) != 2 or not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ValueError(f"weights must be two finite numbers of at least 0, not both 0, got {tuple(weights)}")
    chosen = (codebook if rows is None else codebook[rows]).double()
    if len(chosen) < 2:
        raise ValueError(f"codebook must have at least two codewords that are read, got {len(chosen)}")
    first, second = map(float, weights)
    return (second + first / len(chosen)) * chosen.var(0) - first * chosen.mean(0).square()


def toc_channels(
    codebook: Tensor,
    channels: int,
    lowest: Sequence[int] = (1, 0),
    weights: Sequence[float] = WEIGHTS,
    rows: Tensor | None = None,
    argument: str = "channels",
) -> Tensor:
    """The channels with the highest scores, then those with the lowest; among equal scores the first.

    Args:
        codebook: (M, D).
        channels: K, the number of channels.
        lowest: a and b: of a + b channels, a have the highest and b the lowest scores.
        weights: of `toc_scores`.
        rows: of `toc_scores`.
        argument: name of `channels` in errors.

    Returns:
        (K,) int64, different channels.

    Raises:
        ValueError: K is not from 1 to D, the shares are no whole numbers of at least 0 with a sum above 0, or K is no
            multiple of their sum; or as `toc_scores`.
    """
    if len(lowest) != 2 or min(lowest) < 0 or sum(lowest) == 0:
        raise ValueError(f"lowest must be two shares of at least 0, not both 0, got {':'.join(map(str, lowest))}")
    scores = toc_scores(codebook, weights, rows)
    if not 1 <= channels <= len(scores):
        raise ValueError(f"{argument} must be from 1 to the codebook's width {len(scores)}, got {channels}")
    if channels % sum(lowest):
        raise ValueError(
            f"{argument} must be a multiple of {sum(lowest)} for shares {lowest[0]}:{lowest[1]}, got {channels}"
        )
    most = channels // sum(lowest) * lowest[0]
    highest = scores.argsort(descending=True, stable=True)[:most]
    least = scores.argsort(stable=True)
    # Among equal scores a channel must not be taken twice.
    return torch.cat([highest, least[~torch.isin(least, highest)][: channels - most]])


class Selected:
    """A frozen model whose vectors have selected channels only; the search for codewords reads all channels.

    Args:
        model: a UniCode.
        channels: (K,) int64, of the vectors of `encode`.
    """

    def __init__(self, model: UniCode, channels: Tensor) -> None:
        self.model = unwrapped_unicode(model)
        self.channels = channels.to(self.model.device)
        self.names, self.codewords, self.code_sizes = self.model.names, self.model.codewords, self.model.code_sizes
        self.dtype, self.device, self.buffers = self.model.dtype, self.model.device, self.model.buffers

    def encode(self, name: str, features: Tensor, mask: Tensor | None = None, *, dropout: bool = False) -> Encoded:
        """Index (B, T) of the whole codewords, and their selected channels (B, T, K)."""
        index, vector = self.model.encode(name, features, mask, dropout=dropout)
        return Encoded(index, vector[..., self.channels])


@dataclass(frozen=True)
class TocRule:
    """Which channels `evaluate` selects.

    Attributes:
        channels: K, of each codebook; None chooses it by `choose_channels` from `sweep`.
        lowest: of `toc_channels`.
        weights: of `toc_scores`.
        rows: the codewords that are read: all, or those of `used_rows`.
    """

    channels: int | None
    lowest: tuple[int, int] = (1, 0)
    weights: tuple[float, float] = WEIGHTS
    rows: Rows = "all"

    @classmethod
    def from_text(
        cls, channels: str, lowest: str | None = None, weights: str | None = None, rows: str | None = None
    ) -> TocRule:
        """The rule of command-line values such as "64", "3:1", "0.7,0.3" and "used"; None takes the default.

        Raises:
            ValueError: a value has another form.
        """
        shares, numbers = lowest or "1:0", weights or "0.7,0.3"
        if channels != "auto" and not re.fullmatch("[1-9][0-9]{0,8}", channels):
            raise ValueError(f"toc_channels must be a whole number of at least 1, or auto, got {channels!r}")
        if not re.fullmatch("[0-9]{1,4}:[0-9]{1,4}", shares) or not any(map(int, shares.split(":"))):
            raise ValueError(f"toc_lowest must be two whole numbers such as 3:1, not both 0, got {shares!r}")
        two = re.fullmatch(r"[0-9]+(\.[0-9]+)?,[0-9]+(\.[0-9]+)?", numbers)
        if not two or not 0 < sum(map(float, numbers.split(","))) < math.inf:
            raise ValueError(f"toc_weights must be two numbers such as 0.7,0.3, not both 0, got {numbers!r}")
        if rows not in (None, *get_args(Rows)):
            raise ValueError(f"toc_rows must be one of {', '.join(get_args(Rows))}, got {rows!r}")
        (most, least), (first, second) = map(int, shares.split(":")), map(float, numbers.split(","))
        kept: Rows = "used" if rows == "used" else "all"
        return cls(None if channels == "auto" else int(channels), (most, least), (first, second), kept)


def select(model: UniCode, dataset: Dataset, rule: TocRule, task: ProbeTask, source: str, seed: int) -> Selected:
    """The model with the channels of a rule.

    Args:
        model: trained. Channels are selected in each of its codebooks, as in the released code.
        dataset: its training clips are read where `rows` is "used"; where K is chosen, also those of validation.
        rule: which channels.
        task: whose probe chooses K.
        source: the modality that the probe is trained on.
        seed: of the probes.

    Raises:
        ValueError: codes of the model are of several codebooks, or the rule does not fit its width.
    """
    plain = unwrapped_unicode(model)
    encoded = EncodedDataset(plain, dataset)
    used = used_rows(encoded) if rule.rows == "used" else []
    numbers = sweep(plain.config.model.width, rule.lowest) if rule.channels is None else [rule.channels]
    candidates = [channels_of(plain, number, rule, used) for number in numbers]
    chosen = candidates[0] if len(candidates) == 1 else choose_channels(encoded, task, source, candidates, seed)
    return Selected(plain, chosen)


def channels_of(model: UniCode, number: int, rule: TocRule, used: Sequence[Tensor] = ()) -> Tensor:
    """The selected channels of the vectors of `encode`, int64: a number of channels of each codebook.

    Args:
        model: trained.
        number: K, of each codebook.
        rule: shares and weights.
        used: of `used_rows`; () reads all codewords. Codebooks with a common index share the rows in use.
    """
    found = []
    for place, codebook in enumerate(model.codebooks):
        rows = used[min(place, len(used) - 1)].to(codebook.device) if used else None
        channels = toc_channels(codebook, number, rule.lowest, rule.weights, rows, "toc_channels")
        found.append(place * codebook.shape[1] + channels.cpu())
    return torch.cat(found)


def used_rows(encoded: EncodedDataset) -> list[Tensor]:
    """(M,) bool for each size of a code: the codewords that some modality of the training clips uses."""
    sizes, split = encoded.model.code_sizes, encoded.first_of((TRAIN, WHOLE))
    used = [torch.zeros(size, dtype=torch.bool) for size in sizes]
    for name in encoded.names:
        codes = encoded.codes(split, name)
        for rows, chosen in zip(used, torch.unravel_index(codes.code[codes.mask], sizes), strict=True):
            rows[chosen] = True
    return used


def sweep(width: int, lowest: Sequence[int] = (1, 0)) -> list[int]:
    """Numbers of channels to choose from: the shares of the released scripts, as multiples of the shares' sum."""
    found = {width * channels // SWEEP_WIDTH // sum(lowest) * sum(lowest) for channels in SWEEP}
    return sorted(found - {0}) or [width]


def choose_channels(
    encoded: EncodedDataset, task: ProbeTask, source: str, candidates: Sequence[Tensor], seed: int
) -> Tensor:
    """The channels with the best probe on validation clips of its own modality; among equals, the most channels.

    No label of another modality, and no test clip, is read. The released scripts choose on the target's test clips.

    Args:
        encoded: the codes with all channels.
        task: whose probe is trained.
        source: the modality.
        candidates: (K,) int64 each, at least one.
        seed: of the probes.

    Raises:
        ValueError: there are no candidates.
    """

    def narrowed(split: str, channels: Tensor) -> Examples:
        codes, truth = encoded.examples(task, split, source)
        return Examples(replace(codes, table=codes.table[:, channels]), truth)

    best: tuple[tuple[float, int], Tensor] | None = None
    for channels in candidates:
        held, columns = narrowed(VALIDATION, channels), task.columns(encoded.clips(TRAIN, source))
        generator = torch.Generator().manual_seed(probe_seed(seed, task.name, source))
        head = train_probe(task, columns, narrowed(TRAIN, channels), held, generator)
        known = learnt(task, held)
        rank = task.judge(task.output(head, known.codes), known.truth, known.codes.mask), len(channels)
        if best is None or rank > best[0]:
            best = rank, channels
    if best is None:
        raise ValueError("candidates must be at least one choice of channels, got none")
    return best[1]
