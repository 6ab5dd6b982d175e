"""One MM-EMA step of the shared codebook in plain PyTorch: statistics of the batch, then their application."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from unicode_fast.reference import counter_random

# Rows tried for one idle codeword before it has to wait for the next batch.
REVIVAL_ATTEMPTS = 8
# One stream of the counter-based generator for each purpose.
CHOICE_STREAM, NOISE_STREAM, ROW_STREAM = 0, 1, 2

_CHOICES = {
    "update": ("joint", "sequential"),
    "smoothing": ("none", "transient", "compounding"),
    "revive_unless": ("any", "all"),
    "revive_source": ("codeword", "feature"),
}


class CodebookState(NamedTuple):
    """What the update of a codebook reads and changes.

    Attributes:
        codebook: (M, D) float32 or float64, the codewords.
        ema_count: (M,), dtype of `codebook`, the decayed number of rows of each codeword.
        ema_sum: (M, D), dtype of `codebook`, the decayed sum of the mixed rows of each codeword.
        idle: (modalities, M) int64, batches since a modality last chose a codeword.
        step: () int64, batches seen; numbers the random draws.
    """

    codebook: Tensor
    ema_count: Tensor
    ema_sum: Tensor
    idle: Tensor
    step: Tensor


class BatchShard(NamedTuple):
    """Which rows of a batch that is split between ranks a rank holds: consecutive ones of each modality.

    Attributes:
        first_row: for each modality the number, in the whole batch, of the first row held here.
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
        partners: (N_m, D) each, the mean partner of each row; empty for the rows at the same place.
        valid: (N_m,) bool each; empty where every row is valid.
        shard: which rows of the whole batch these are; None where they are all of it.
        every_attempt: whether each row drawn for a codeword to revive it from gets a place of its own in the
            statistics, which a rank needs that knows nothing of the masks of others. Else the first valid one gets the
            only place, and rows that are not held here count as valid. Read by revival from features only.
    """

    features: list[Tensor]
    index: list[Tensor]
    partners: list[Tensor]
    valid: list[Tensor]
    shard: BatchShard | None = None
    every_attempt: bool = False


class RevivalDraws(NamedTuple):
    """Random numbers for the revival of codewords, given instead of drawn.

    Attributes:
        choice: (M,) float64 in [0, 1), picks the active codeword or the row that codeword k is revived from; a number
            outside picks the first or the last.
        noise: (M, D) float64 in [-1, 1), is added to it after scaling with `UpdateRule.revive_noise`.
    """

    choice: Tensor
    noise: Tensor


@dataclass(frozen=True)
class UpdateRule:
    """Which update a codebook gets. The order of the fields is that of the operator's schema.

    Attributes:
        decay: what stays of counts and sums from one update to the next, in [0, 1].
        epsilon: added to each count by smoothing; greater than 0 where there is smoothing.
        own_weight: of a row's own feature, in [0, 1]; its partner has the rest. 1 is the plain EMA.
        update: one update from all modalities together, or one after the other in their order.
        smoothing: of the counts towards each other (Laplace). "transient" smooths them for the division,
            "compounding" keeps the smoothed counts.
        revive_after: a codeword is revived once it was idle for more batches than this; 0 for never.
        revive_unless: whether a codeword stays if "any" modality chose it within `revive_after` batches, or if "all"
            did.
        revive_source: a revived codeword becomes another, active "codeword" with noise, or a "feature" of the batch.
        revive_noise: half the width of the uniform noise that is added to a codeword's copy.
        revive_active_within: a codeword is active if any or all modalities, as `revive_unless` says, chose it less than
            this many batches ago.
        revive_ema: whether a revived codeword's count becomes 1 and its sum its vector. If not, the next update
            brings its old vector back unless the codeword is chosen at once.
        seed: of the draws; any integer of 64 bits.

    Raises:
        TypeError: a number of batches or the seed is no integer, or another field no number.
        ValueError: a field is outside its range.
    """

    decay: float = 0.99
    epsilon: float = 1e-5
    own_weight: float = 0.5
    update: Literal["joint", "sequential"] = "joint"
    smoothing: Literal["none", "transient", "compounding"] = "none"
    revive_after: int = 300
    revive_unless: Literal["any", "all"] = "any"
    revive_source: Literal["codeword", "feature"] = "codeword"
    revive_noise: float = 1 / 1024
    revive_active_within: int = 100
    revive_ema: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(repr, choices))}, got {getattr(self, name)!r:.60}"
                )
        for name in ("revive_after", "revive_active_within", "seed"):
            if not isinstance(getattr(self, name), int):
                raise TypeError(f"{name} must be an integer, got {type(getattr(self, name)).__name__}")
        for name in ("decay", "own_weight", "epsilon", "revive_noise"):
            if not isinstance(getattr(self, name), (int, float)):
                raise TypeError(f"{name} must be a number, got {type(getattr(self, name)).__name__}")
        for name in ("decay", "own_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("epsilon", "revive_after", "revive_noise", "revive_active_within"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or greater, got {getattr(self, name)}")
        if self.smoothing != "none" and self.epsilon == 0:
            raise ValueError(f"epsilon must be greater than 0 for smoothing {self.smoothing!r}, got 0")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must be a signed integer of 64 bits, got {self.seed}")


class CodebookStatistics(NamedTuple):
    """Views of the flat buffer of `codebook_statistics_reference`; every part is a sum over rows, so ranks add theirs.

    Attributes:
        row_count: (modalities,), valid rows.
        codeword_count: (modalities, M), valid rows of each codeword.
        mixed_sum: (M, D), the mixed rows of each codeword, each modality weighted as the rule demands.
        candidate_found: (M,), 1 where a row was found to revive codeword k from.
        candidate: (M, D), that row, or zeros.
    """

    row_count: Tensor
    codeword_count: Tensor
    mixed_sum: Tensor
    candidate_found: Tensor
    candidate: Tensor


def codebook_update_reference(
    state: CodebookState, batch: CodebookBatch, rule: UpdateRule, draws: RevivalDraws | None
) -> None:
    """Move every codeword towards the mean of its rows and revive those that stay idle, in place.

    With n^m_k the rows of modality m whose codeword is k, R_m its valid rows, x a row, p its partner, w the own
    weight, g the decay and::

        D^m_k = sum over rows of modality m with codeword k of  w x + (1 - w) p

    one update of counts N, their total t and sums O from modality m is::

        N <- g N + (1 - g) n^m,  t <- g t + (1 - g) R_m,  O <- g O + (1 - g) D^m,  E = O / N'

    with N' = N, or with smoothing N' = (N + eps) t / (t + M eps); "compounding" also writes N' to N. Smoothing keeps
    the total, so t follows from numbers of rows alone. The joint update is one such step with the sums over all
    modalities in place of n, R and D; there a codeword with N' = 0 keeps its vector.

    Without given partners p is the mean of the valid features of the other modalities at the same place; a row for
    which there is none enters D with x alone.

    The sequential update takes one step for each of the n modalities with the codewords of all rows fixed, so only
    the last E counts, and the sums are affine in the D^m: unrolling the recurrence gives::

        O <- g^n O + (1 - g) sum_m g^(n - m) D^m

    One pass over the rows, weighted with g^(n - m), therefore serves all modalities. Unrolled likewise, with
    s_m = t_m / (t_m + M eps), the compounding counts are::

        N <- g^n (prod_l s_l) N + sum_m g^(n - m) (prod_(l >= m) s_l) [(1 - g) n^m + eps]

    Args:
        state: changed in place.
        batch: the rows and their codewords, found with the codebook before the update.
        rule: which update.
        draws: random numbers for the revival, or None for the counter-based generator.

    Precision:
        Statistics and update are computed in float64 and rounded once, to the dtype of the state.

    Memory:
        A float64 copy of the rows and the flat buffer of `codebook_statistics_reference`.

    Source:
        Xia et al., NeurIPS 2023, Eq. 7; the sequential form and revival from codewords are those of its released code.
    """
    buffer = codebook_statistics_reference(state, batch, rule, draws)
    codebook_apply_reference(state, buffer, rule, draws)


def codebook_statistics_reference(
    state: CodebookState, batch: CodebookBatch, rule: UpdateRule, draws: RevivalDraws | None
) -> Tensor:
    """What an update needs to know of a batch, as one flat buffer that ranks can add up.

    Ranks that hold the shards of a batch add up to the buffer of the whole batch: the rows that idle codewords could
    be revived from are drawn from the whole batch on all ranks alike, the rank that holds a row writes it, the others
    write zeros. Where ranks have masks, none knows which of the rows drawn before its own are valid, so each writes all
    that it holds, by attempt, and `first_attempts` finds the first valid ones in the sum.

    Args:
        state: read for its sizes and its step only.
        batch: the rows and their codewords.
        rule: which update.
        draws: random numbers for the revival, or None for the counter-based generator.

    Returns:
        float64: the parts of `CodebookStatistics` one after the other, those about candidates only where the rule
        revives from features, and REVIVAL_ATTEMPTS times with `batch.every_attempt`.
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
    parts = [count.sum(dim=1), count, _sum_by_codeword(weighted, torch.cat(index), codewords)]
    if _revives_from_features(rule):
        parts += _candidates(rows, valid, batch, state, rule, draws)
    return torch.cat([part.reshape(-1) for part in parts])


def split_statistics(buffer: Tensor, state: CodebookState, rule: UpdateRule) -> CodebookStatistics:
    """The parts of a flat buffer as views; the two about candidates are empty where the rule does not use them."""
    modalities = state.idle.shape[0]
    codewords, width = state.codebook.shape
    candidates = codewords if _revives_from_features(rule) else 0
    shapes = [(modalities,), (modalities, codewords), (codewords, width), (candidates,), (candidates, width)]
    parts = buffer.split([torch.Size(shape).numel() for shape in shapes])
    return CodebookStatistics(*(part.view(shape) for part, shape in zip(parts, shapes, strict=True)))


def first_attempts(buffer: Tensor, state: CodebookState, rule: UpdateRule) -> Tensor:
    """The buffer with one candidate for each codeword, the first that was found, of one with every attempt."""
    codewords, width = state.codebook.shape
    flags, rows = codewords * REVIVAL_ATTEMPTS, codewords * REVIVAL_ATTEMPTS * width
    sums, found, candidate = buffer.split([buffer.numel() - flags - rows, flags, rows])
    found, candidate = found.view(REVIVAL_ATTEMPTS, -1), candidate.view(REVIVAL_ATTEMPTS, codewords, width)
    first = found.argmax(dim=0)  # (M,)
    chosen = candidate[first, torch.arange(codewords, device=buffer.device)]  # (M, D)
    return torch.cat([sums, found.amax(dim=0), chosen.flatten()])


def codebook_apply_reference(
    state: CodebookState, buffer: Tensor, rule: UpdateRule, draws: RevivalDraws | None
) -> None:
    """Update a codebook from the statistics of a batch, in place; the same buffer gives the same codebook on all ranks.

    Args:
        state: changed in place.
        buffer: from `codebook_statistics_reference`, added up over ranks.
        rule: the one that the statistics were made with.
        draws: random numbers for the revival, or None for the counter-based generator.
    """
    statistics = split_statistics(buffer, state, rule)
    count, divisor, ema_sum = _decayed(state, statistics, rule)
    codebook = ema_sum / divisor[:, None]
    if rule.update == "joint":
        codebook = torch.where(divisor[:, None] > 0, codebook, state.codebook.to(torch.float64))
    idle = torch.where(statistics.codeword_count > 0, 0, state.idle + 1)  # (modalities, M)
    if rule.revive_after > 0:
        revived, vector = _revival(codebook, idle, state.step, statistics, rule, draws)
        codebook = torch.where(revived[:, None], vector, codebook)
        idle = torch.where(revived, 0, idle)
        if rule.revive_ema:
            count = torch.where(revived, 1, count)
            ema_sum = torch.where(revived[:, None], vector, ema_sum)
    state.codebook.copy_(codebook)
    state.ema_count.copy_(count)
    state.ema_sum.copy_(ema_sum)
    state.idle.copy_(idle)
    state.step.add_(1)


def _decayed(state: CodebookState, statistics: CodebookStatistics, rule: UpdateRule) -> tuple[Tensor, Tensor, Tensor]:
    """New counts, what the sums are divided by, and new sums, in float64."""
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


def _revives_from_features(rule: UpdateRule) -> bool:
    return rule.revive_after > 0 and rule.revive_source == "feature"


def _candidates(
    rows: list[Tensor],
    valid: list[Tensor],
    batch: CodebookBatch,
    state: CodebookState,
    rule: UpdateRule,
    draws: RevivalDraws | None,
) -> list[Tensor]:
    """For each codeword, or each attempt and codeword, whether this rank holds the row drawn for it, and that row."""
    codewords, width = state.codebook.shape
    held = [x.shape[0] for x in rows]
    first_row, total_rows = batch.shard or BatchShard([0] * len(rows), held)
    total = sum(total_rows)
    if sum(held) == 0:
        places = codewords * (REVIVAL_ATTEMPTS if batch.every_attempt else 1)
        return [state.codebook.new_zeros(size, dtype=torch.float64) for size in (places, places * width)]
    shape = (codewords, REVIVAL_ATTEMPTS)
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


def _revival(
    codebook: Tensor,
    idle: Tensor,
    step: Tensor,
    statistics: CodebookStatistics,
    rule: UpdateRule,
    draws: RevivalDraws | None,
) -> tuple[Tensor, Tensor]:
    """Which codewords are revived, (M,) bool, and the vector that each of them would get, (M, D)."""
    idle_for_rule = idle.amin(dim=0) if rule.revive_unless == "any" else idle.amax(dim=0)
    dead = idle_for_rule > rule.revive_after
    if rule.revive_source == "feature":
        return dead & (statistics.candidate_found > 0), statistics.candidate
    if draws is None:
        choice = counter_random.uniform(rule.seed, step, CHOICE_STREAM, dead.shape)
        noise = 2 * counter_random.uniform(rule.seed, step, NOISE_STREAM, codebook.shape) - 1
    else:
        choice, noise = draws
    active = (idle_for_rule >= 0) & (idle_for_rule < rule.revive_active_within)
    rank = active.cumsum(dim=0)  # an active codeword's own place, from 1
    place = (choice.nan_to_num() * rank[-1]).clamp(min=0).minimum(rank[-1] - 1).to(torch.int64)
    # The first codeword whose rank exceeds the place; M, out of range, where none is active.
    source = torch.searchsorted(rank, place, right=True).clamp(max=rank.shape[0] - 1)
    return dead & (rank[-1] > 0), codebook[source] + rule.revive_noise * noise
