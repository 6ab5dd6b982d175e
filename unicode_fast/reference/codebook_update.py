"""One MM-EMA update of the shared codebook in plain PyTorch: statistics of the batch, then their application."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from unicode_fast.reference import counter_random

# Rows drawn for the reset of one idle codeword; if none is valid, the next batch draws again.
RESET_ATTEMPTS = 8
# One stream of the counter-based generator for each purpose.
CHOICE_STREAM, NOISE_STREAM, ROW_STREAM = 0, 1, 2

_CHOICES = {
    "update": ("joint", "sequential"),
    "smoothing": ("none", "transient", "compounding"),
    "reset_unless": ("any", "all"),
    "reset_source": ("codeword", "feature"),
}


class CodebookState(NamedTuple):
    """The tensors that an update of a codebook reads and changes.

    Attributes:
        codebook: (M, D) float32 or float64, the codewords.
        ema_count: (M,), dtype of `codebook`, the decayed number of rows of each codeword.
        ema_sum: (M, D), dtype of `codebook`, the decayed sum of the mixed rows of each codeword.
        idle: (modalities, M) int64, batches since a modality last chose a codeword.
        step: () int64, number of updates so far; a counter of the random draws.
    """

    codebook: Tensor
    ema_count: Tensor
    ema_sum: Tensor
    idle: Tensor
    step: Tensor


class BatchShard(NamedTuple):
    """The rows of one rank in a batch that ranks share: consecutive rows of each modality.

    Attributes:
        first_row: for each modality the index, in the whole batch, of the first row of this rank.
        total_rows: for each modality the rows of the whole batch.
    """

    first_row: list[int]
    total_rows: list[int]


@dataclass(frozen=True)
class CodebookBatch:
    """The rows of one batch, one list entry for each modality.

    Attributes:
        features: (N_m, D) each.
        index: (N_m,) int64 each, the codeword of each row.
        partners: (N_m, D) each, the mean partner of each row; empty if the same rows of other modalities are partners.
        valid: (N_m,) bool each; empty where every row is valid.
        shard: position of these rows in the whole batch; None for a whole batch.
        every_attempt: whether the statistics hold every row drawn for the reset of a codeword. Ranks need that if they
            have masks, because no rank has the masks of others. Else they hold the first valid row, where rows of other
            ranks count as valid. Only resets to features read it.
    """

    features: list[Tensor]
    index: list[Tensor]
    partners: list[Tensor]
    valid: list[Tensor]
    shard: BatchShard | None = None
    every_attempt: bool = False


class ResetDraws(NamedTuple):
    """Given random numbers for the resets of codewords.

    Attributes:
        choice: (M,) float64 in [0, 1), picks the active codeword or the row to which codeword k is reset. A number
            outside picks the first or the last.
        noise: (M, D) float64 in [-1, 1), added to a copied codeword after scaling with `EmaConfig.reset_noise`.
    """

    choice: Tensor
    noise: Tensor


@dataclass(frozen=True)
class EmaConfig:
    """Settings of a codebook update. The order of the fields is that of the operator's schema.

    Attributes:
        decay: factor of counts and sums from one update to the next, in [0, 1].
        epsilon: constant of the smoothing, added to each count; greater than 0 with smoothing.
        own_weight: weight of a row's own feature, in [0, 1]; its partner has the rest. 1 is the plain EMA.
        update: "joint", one update from all modalities, or "sequential", one after the other in their order.
        smoothing: Laplace smoothing of the counts. "transient" smooths them for the division, "compounding" keeps the
            smoothed counts.
        reset_after: a codeword is reset if it was idle for more batches than this; 0 never resets.
        reset_unless: a codeword stays if "any" modality, or if "all" modalities, chose it within `reset_after`
            batches.
        reset_source: a codeword is reset to another, active "codeword" plus noise, or to a "feature" of the batch.
        reset_noise: half width of the uniform noise on a copied codeword.
        reset_active_within: a codeword is active if modalities (any or all, as in `reset_unless`) chose it less than
            this many batches ago.
        reset_ema: a reset sets the count to 1 and the sum to the new vector. Without it the next update restores the
            old vector, unless that batch chooses the codeword.
        seed: of the draws; any integer of 64 bits.

    Raises:
        TypeError: a number of batches or the seed is no integer, `reset_ema` no bool, or another field no number.
        ValueError: a field is outside its range.
    """

    decay: float = 0.99
    epsilon: float = 1e-5
    own_weight: float = 0.5
    update: Literal["joint", "sequential"] = "joint"
    smoothing: Literal["none", "transient", "compounding"] = "none"
    reset_after: int = 300
    reset_unless: Literal["any", "all"] = "any"
    reset_source: Literal["codeword", "feature"] = "codeword"
    reset_noise: float = 1 / 1024
    reset_active_within: int = 100
    reset_ema: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(repr, choices))}, got {getattr(self, name)!r:.60}"
                )
        for name in ("reset_after", "reset_active_within", "seed"):
            if not isinstance(getattr(self, name), int):
                raise TypeError(f"{name} must be an integer, got {type(getattr(self, name)).__name__}")
        for name in ("decay", "own_weight", "epsilon", "reset_noise"):
            if not isinstance(getattr(self, name), (int, float)):
                raise TypeError(f"{name} must be a number, got {type(getattr(self, name)).__name__}")
        for name in ("decay", "own_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not isinstance(self.reset_ema, bool):
            raise TypeError(f"reset_ema must be a bool, got {type(self.reset_ema).__name__}")
        for name in ("epsilon", "reset_after", "reset_noise", "reset_active_within"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or greater and finite, got {getattr(self, name)}")
        if self.smoothing != "none" and self.epsilon == 0:
            raise ValueError(f"epsilon must be greater than 0 for smoothing {self.smoothing!r}, got 0")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must be a signed integer of 64 bits, got {self.seed}")


class CodebookStatistics(NamedTuple):
    """Views of the flat buffer of `codebook_statistics_reference`; all are sums over rows, so ranks add them up.

    Attributes:
        row_count: (modalities,), valid rows.
        codeword_count: (modalities, M), valid rows of each codeword.
        mixed_sum: (M, D), the mixed rows of each codeword, each modality with its weight in the update.
        candidate_found: (M,), 1 where there is a row for the reset of codeword k.
        candidate: (M, D), that row, or zeros.
    """

    row_count: Tensor
    codeword_count: Tensor
    mixed_sum: Tensor
    candidate_found: Tensor
    candidate: Tensor


def codebook_update_reference(
    state: CodebookState, batch: CodebookBatch, rule: EmaConfig, draws: ResetDraws | None
) -> None:
    """Move every codeword towards the mean of its rows, and reset idle codewords, in place.

    Let n^m_k be the number of rows of modality m with codeword k, and R_m the number of its valid rows. With x a row,
    p its partner, w the own weight, g the decay and::

        D^m_k = sum over rows of modality m with codeword k of  w x + (1 - w) p

    one update of counts N, their total t and sums O from modality m is::

        N <- g N + (1 - g) n^m,  t <- g t + (1 - g) R_m,  O <- g O + (1 - g) D^m,  E = O / N'

    with N' = N, or with smoothing N' = (N + eps) t / (t + M eps); "compounding" also writes N' to N. Smoothing keeps
    the total, so t depends on numbers of rows alone. The joint update is one such update with the sums over all
    modalities as n, R and D. A codeword with N' = 0 keeps its vector in the joint update.

    Without given partners p is the mean of the valid features in the same row of the other modalities. A row without
    such features enters D as x alone.

    The sequential update is one such update for each of the n modalities, with the codewords of all rows fixed. So only
    the last E counts, and the sums are affine in the D^m. Unrolling the recurrence gives::

        O <- g^n O + (1 - g) sum_m g^(n - m) D^m

    So one pass over the rows, weighted with g^(n - m), suffices for all modalities. Unrolled likewise, with
    s_m = t_m / (t_m + M eps), the compounding counts are::

        N <- g^n (prod_l s_l) N + sum_m g^(n - m) (prod_(l >= m) s_l) [(1 - g) n^m + eps]

    Args:
        state: changed in place.
        batch: the rows and their codewords, found with the codebook before the update.
        rule: settings of the update.
        draws: random numbers for the resets, or None for the counter-based generator.

    Precision:
        Statistics and update are computed in float64 and rounded once, to the dtype of the state.

    Memory:
        A float64 copy of the rows and the flat buffer of `codebook_statistics_reference`.

    Source:
        Xia et al., NeurIPS 2023, Eq. 7; the sequential form and resets to codewords are those of its released code.
    """
    buffer = codebook_statistics_reference(state, batch, rule, draws)
    codebook_apply_reference(state, buffer, rule, draws)


def codebook_statistics_reference(
    state: CodebookState, batch: CodebookBatch, rule: EmaConfig, draws: ResetDraws | None
) -> Tensor:
    """The statistics of a batch for an update, as one flat buffer that ranks can add up.

    The buffers of ranks add up to that of the whole batch. All ranks draw the same rows of the whole batch for resets;
    the rank that holds a row writes it, the others write zeros. If ranks have masks, no rank has the masks of others.
    Then each rank writes all drawn rows that it holds, by attempt, and `first_attempts` finds the first valid ones.

    Args:
        state: only its sizes and its step are read.
        batch: the rows and their codewords.
        rule: settings of the update.
        draws: random numbers for the resets, or None for the counter-based generator.

    Returns:
        float64: the fields of `CodebookStatistics` one after the other. Candidates exist only if the rule resets to
        features, and RESET_ATTEMPTS times with `batch.every_attempt`.
    """
    codewords = state.codebook.shape[0]
    valid = batch.valid or [torch.ones_like(index, dtype=torch.bool) for index in batch.index]
    # where() and not a product: rows that are not valid may hold anything, NaN and foreign indices included.
    rows = [torch.where(v[:, None], x.to(torch.float64), 0) for x, v in zip(batch.features, valid, strict=True)]
    index = [torch.where(v, i, 0) for i, v in zip(batch.index, valid, strict=True)]
    count = torch.stack([_sum_by_codeword(v[:, None], i, codewords)[:, 0] for i, v in zip(index, valid, strict=True)])
    mixed = _mixed_rows(rows, batch.partners, valid, rule.own_weight)
    last = len(rows) - 1
    weight = [rule.decay ** (last - m) if rule.update == "sequential" else 1.0 for m in range(len(rows))]
    weighted = torch.cat([w * x for w, x in zip(weight, mixed, strict=True)])
    fields = [count.sum(dim=1), count, _sum_by_codeword(weighted, torch.cat(index), codewords)]
    if _resets_from_features(rule):
        fields += _candidates(rows, valid, batch, state, rule, draws)
    return torch.cat([values.reshape(-1) for values in fields])


def split_statistics(buffer: Tensor, state: CodebookState, rule: EmaConfig) -> CodebookStatistics:
    """Views of a flat buffer; those of candidates are empty where the rule does not use them."""
    modalities = state.idle.shape[0]
    codewords, width = state.codebook.shape
    candidates = codewords if _resets_from_features(rule) else 0
    shapes = [(modalities,), (modalities, codewords), (codewords, width), (candidates,), (candidates, width)]
    fields = buffer.split([torch.Size(shape).numel() for shape in shapes])
    return CodebookStatistics(*(values.view(shape) for values, shape in zip(fields, shapes, strict=True)))


def first_attempts(buffer: Tensor, state: CodebookState, rule: EmaConfig) -> Tensor:
    """A buffer with the first valid candidate of each codeword, from one with every attempt."""
    codewords, width = state.codebook.shape
    flags, rows = codewords * RESET_ATTEMPTS, codewords * RESET_ATTEMPTS * width
    sums, found, candidate = buffer.split([buffer.numel() - flags - rows, flags, rows])
    found, candidate = found.view(RESET_ATTEMPTS, -1), candidate.view(RESET_ATTEMPTS, codewords, width)
    first = found.argmax(dim=0)  # (M,)
    chosen = candidate[first, torch.arange(codewords, device=buffer.device)]  # (M, D)
    return torch.cat([sums, found.amax(dim=0), chosen.flatten()])


def codebook_apply_reference(state: CodebookState, buffer: Tensor, rule: EmaConfig, draws: ResetDraws | None) -> None:
    """Update a codebook from the statistics of a batch, in place; equal buffers give equal codebooks on all ranks.

    Args:
        state: changed in place.
        buffer: from `codebook_statistics_reference`, added up over ranks.
        rule: settings of the update, as for the statistics.
        draws: random numbers for the resets, or None for the counter-based generator.
    """
    statistics = split_statistics(buffer, state, rule)
    count, divisor, ema_sum = _decayed(state, statistics, rule)
    codebook = ema_sum / divisor[:, None]
    if rule.update == "joint":
        codebook = torch.where(divisor[:, None] > 0, codebook, state.codebook.to(torch.float64))
    idle = torch.where(statistics.codeword_count > 0, 0, state.idle + 1)  # (modalities, M)
    if rule.reset_after > 0:
        reset, vector = _reset(codebook, idle, state.step, statistics, rule, draws)
        codebook = torch.where(reset[:, None], vector, codebook)
        idle = torch.where(reset, 0, idle)
        if rule.reset_ema:
            count = torch.where(reset, 1, count)
            ema_sum = torch.where(reset[:, None], vector, ema_sum)
    state.codebook.copy_(codebook)
    state.ema_count.copy_(count)
    state.ema_sum.copy_(ema_sum)
    state.idle.copy_(idle)
    state.step.add_(1)


def _decayed(state: CodebookState, statistics: CodebookStatistics, rule: EmaConfig) -> tuple[Tensor, Tensor, Tensor]:
    """New counts, divisors of the sums, and new sums, in float64."""
    step_counts, step_totals = statistics.codeword_count, statistics.row_count
    if rule.update == "joint":
        step_counts, step_totals = step_counts.sum(dim=0, keepdim=True), step_totals.sum(dim=0, keepdim=True)
    count = divisor = state.ema_count.to(torch.float64)
    total = count.sum()
    for step_count, step_total in zip(step_counts, step_totals, strict=True):
        count = divisor = rule.decay * count + (1 - rule.decay) * step_count
        total = rule.decay * total + (1 - rule.decay) * step_total
        if rule.smoothing != "none":
            divisor = (count + rule.epsilon) * (total / (total + count.shape[0] * rule.epsilon))
        if rule.smoothing == "compounding":
            count = divisor
    kept = rule.decay ** len(step_counts)
    return count, divisor, kept * state.ema_sum.to(torch.float64) + (1 - rule.decay) * statistics.mixed_sum


def _sum_by_codeword(rows: Tensor, index: Tensor, codewords: int) -> Tensor:
    """Sums of the rows of each codeword in row order, float64: (M, D)."""
    sums = torch.zeros(codewords, rows.shape[1], dtype=torch.float64, device=rows.device)
    return sums.index_add(0, index, rows.to(torch.float64))


def _mixed_rows(rows: list[Tensor], partners: list[Tensor], valid: list[Tensor], own_weight: float) -> list[Tensor]:
    """Each row mixed with its partner; rows that are not valid are zeros."""
    if own_weight == 1 or (len(rows) == 1 and not partners):
        return rows
    if partners:
        given = [torch.where(v[:, None], p.to(torch.float64), 0) for p, v in zip(partners, valid, strict=True)]
        return [own_weight * x + (1 - own_weight) * p for x, p in zip(rows, given, strict=True)]
    mixed = []
    for m, (row, own_valid) in enumerate(zip(rows, valid, strict=True)):
        others = [other for other in range(len(rows)) if other != m]
        number = torch.stack([valid[other] for other in others]).sum(dim=0)[:, None]  # (N, 1)
        partner = torch.stack([rows[other] for other in others]).sum(dim=0) / number.clamp(min=1)
        both = own_weight * row + (1 - own_weight) * partner
        mixed.append(torch.where(own_valid[:, None], torch.where(number > 0, both, row), 0))
    return mixed


def _resets_from_features(rule: EmaConfig) -> bool:
    return rule.reset_after > 0 and rule.reset_source == "feature"


def _candidates(
    rows: list[Tensor],
    valid: list[Tensor],
    batch: CodebookBatch,
    state: CodebookState,
    rule: EmaConfig,
    draws: ResetDraws | None,
) -> list[Tensor]:
    """Whether this rank holds the row drawn for each codeword, or each attempt and codeword, and that row."""
    codewords, width = state.codebook.shape
    held = [x.shape[0] for x in rows]
    first_row, total_rows = batch.shard or BatchShard([0] * len(rows), held)
    total = sum(total_rows)
    if sum(held) == 0:
        places = codewords * (RESET_ATTEMPTS if batch.every_attempt else 1)
        return [state.codebook.new_zeros(size, dtype=torch.float64) for size in (places, places * width)]
    shape = (codewords, RESET_ATTEMPTS)
    drawn = counter_random.integers(total, rule.seed, state.step, ROW_STREAM, shape)
    if draws is not None:
        given = (draws.choice.nan_to_num() * total).clamp(0, total - 1).to(torch.int64).clamp(0, total - 1)
        drawn = torch.cat([given[:, None], drawn[:, 1:]], dim=1)
    here, place = torch.zeros_like(drawn, dtype=torch.bool), torch.zeros_like(drawn)
    start, own_start = 0, 0
    for number, first, all_rows in zip(held, first_row, total_rows, strict=True):
        local = drawn - start - first
        inside = (local >= 0) & (local < number) & (drawn < start + all_rows)
        here, place = here | inside, torch.where(inside, local + own_start, place)
        start, own_start = start + all_rows, own_start + number
    found = here & torch.cat(valid)[place]  # (M, attempts)
    if batch.every_attempt:
        found, place = found.T, place.T
    else:
        attempt = (found | ~here).to(torch.uint8).argmax(dim=1, keepdim=True)
        found, place = found.gather(1, attempt)[:, 0], place.gather(1, attempt)[:, 0]
    return [found.to(torch.float64), torch.where(found[..., None], torch.cat(rows)[place], 0)]


def _reset(
    codebook: Tensor,
    idle: Tensor,
    step: Tensor,
    statistics: CodebookStatistics,
    rule: EmaConfig,
    draws: ResetDraws | None,
) -> tuple[Tensor, Tensor]:
    """The codewords to reset, (M,) bool, and the new vector of each, (M, D)."""
    idle_for_rule = idle.amin(dim=0) if rule.reset_unless == "any" else idle.amax(dim=0)
    dead = idle_for_rule > rule.reset_after
    if rule.reset_source == "feature":
        return dead & (statistics.candidate_found > 0), statistics.candidate
    if draws is None:
        choice = counter_random.uniform(rule.seed, step, CHOICE_STREAM, dead.shape)
        noise = 2 * counter_random.uniform(rule.seed, step, NOISE_STREAM, codebook.shape) - 1
    else:
        choice, noise = draws
    active = (idle_for_rule >= 0) & (idle_for_rule < rule.reset_active_within)
    rank = active.cumsum(dim=0)  # of an active codeword among the active ones, from 1
    place = (choice.nan_to_num() * rank[-1]).clamp(min=0).minimum(rank[-1] - 1).to(torch.int64)
    # The first codeword whose rank exceeds the place; M, out of range, where none is active.
    source = torch.searchsorted(rank, place, right=True).clamp(max=rank.shape[0] - 1)
    return dead & (rank[-1] > 0), codebook[source] + rule.reset_noise * noise
