"""The operator that updates a codebook with the rows of a batch and resets idle codewords, in place."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unicode_fast.ops import _checks, _library
from unicode_fast.ops.nearest_codeword import PreparedCodebook
from unicode_fast.reference.codebook_update import (
    RESET_ATTEMPTS,
    BatchShard,
    CodebookBatch,
    CodebookState,
    EmaConfig,
    ResetDraws,
    codebook_apply_reference,
    codebook_statistics_reference,
    first_attempts,
)

_RULE_FIELDS = tuple(field.name for field in fields(EmaConfig))


def codebook_update(  # noqa: PLR0913 - state, rows and rule are records already; the rest is optional
    state: CodebookState,
    features: Sequence[Tensor],
    index: Sequence[Tensor],
    rule: EmaConfig,
    *,
    partners: Sequence[Tensor] | None = None,
    valid: Sequence[Tensor | None] | None = None,
    draws: ResetDraws | None = None,
    group: dist.ProcessGroup | None = None,
    shard: BatchShard | None = None,
    prepared: PreparedCodebook | None = None,
    backend: str | None = None,
) -> None:
    """One MM-EMA update: codewords move towards the mean of their rows and partners, idle ones are reset.

    `unicode_fast.reference.codebook_update` has the formulas, `EmaConfig` the variants. All tensors of `state` are
    changed in place, and nothing is returned.

    Args:
        state: the codebook with its counts, sums, idle counters and step; without gradient.
        features: one (N_m, D) for each modality, float64, float32, float16 or bfloat16, on the device of the
            codebook. Gradients do not flow.
        index: one (N_m,) int64 for each modality, the codeword of each row, from `nearest_codeword`; in [0, M) at
            valid rows.
        rule: settings of the update.
        partners: one (N_m, D) for each modality, the mean of the partner vectors of each row. None takes the mean of
            the valid features in the same row of the other modalities. A row without such features uses only its own.
            With None all N_m must be equal, unless the rule uses no partners.
        valid: for each modality (N_m,) bool, the rows that count, or None for all; None for all modalities. The
            other rows may hold anything, NaN included. Either all ranks give masks or none does.
        draws: random numbers for the resets, for tests. None draws from the counter-based generator by
            `rule.seed` and `state.step`. With the source "feature" only the first attempt uses `draws`.
        group: the ranks that share a batch; None takes all ranks where torch.distributed is initialised. `state`,
            `rule` and `draws` must be the same on every rank. Then all ranks get the same bits: to rounding the
            codebook that one rank computes from the whole batch, resets included.
        shard: position of these rows in the whole batch; None for a whole batch. Several ranks need it for resets to
            features, because all ranks must draw the same rows.
        prepared: of `state.codebook`; the update also computes its operands for the next search.
        backend: None takes the fastest that can run on this device. A named backend is used or refused, never
            replaced.

    Raises:
        TypeError: an argument or a dtype is unsupported.
        ValueError: shapes, devices or numbers of modalities differ, or `shard` is missing or does not hold the rows.
            Or `prepared` is of another codebook, or a tensor of `state` requires a gradient. On CUDA also for more
            than 16 modalities or 2^31 - 1 rows.
        BackendUnavailable: `backend` cannot run here; the message has the reason.

    Precision:
        Float64, rounded once. A valid row with NaN or infinity makes its codeword not finite, and those
        of the rows whose partner it is.

    Memory:
        A float64 buffer of (M + modalities) (D + 1) numbers, with M (D + 1) more for resets to features. The reference
        also needs float64 copies of the rows. On CUDA a single rank needs only the counts of this buffer, unless state
        and rows share memory. Ranks synchronise once, in an all-reduce of the buffer. With masks and
        resets to features no rank has the masks of others, so the buffer holds all 8 rows drawn for each codeword:
        8 M (D + 1) numbers more instead of M (D + 1).

    Source:
        Xia et al., NeurIPS 2023, Eq. 7 and its released code.
    """
    _check_state(state)
    if not isinstance(rule, EmaConfig):
        raise TypeError(f"rule must be an EmaConfig, got {type(rule).__name__}")
    _check_list("features", features, state.idle.shape[0], "state.idle")
    _check_rows(state.codebook, features, index)
    partners = _checked_partners(features, partners, rule)
    valid = _checked_valid(features, valid)
    _check_prepared(state, prepared)
    _checks.check_group(group)
    choice, noise = (None, None) if draws is None else _checked_draws(state, draws)
    ranks = dist.get_world_size(group) if dist.is_initialized() else 1
    shard = _checked_shard(features, shard, needed=ranks > 1 and _resets_from_features(rule))
    device = state.codebook.device
    settings = [getattr(rule, name) for name in _RULE_FIELDS]
    rows = [feature.detach() for feature in features]
    others = [partner.detach() for partner in partners]
    if ranks == 1:
        update = _library.find_operator("codebook_update", device, backend)
        update(*state, rows, list(index), others, valid, choice, noise, *shard, *settings)
    else:
        statistics = _library.find_operator("codebook_update", device, backend, "codebook_statistics")
        apply = _library.find_operator("codebook_update", device, backend, "codebook_apply")
        every_attempt = len(valid) > 0 and _resets_from_features(rule)
        buffer = statistics(
            state.codebook, state.step, rows, list(index), others, valid, choice, *shard, every_attempt, *settings
        )
        dist.all_reduce(buffer, group=group)
        if every_attempt:
            buffer = first_attempts(buffer, state, rule)
        apply(*state, buffer, choice, noise, *settings)
    if prepared is not None:
        prepared._refresh_after_update(backend)


def UpdateRule(**fields: Any) -> EmaConfig:
    """The former name of `EmaConfig`, whose fields reset_X were named revive_X."""
    return EmaConfig(**{name.replace("revive_", "reset_"): value for name, value in fields.items()})


RevivalDraws = ResetDraws


def _check_state(state: Any) -> None:
    if not isinstance(state, CodebookState):
        raise TypeError(f"state must be a CodebookState, got {type(state).__name__}")
    codebook = state.codebook
    _checks.check_codebook("state.codebook", codebook, _checks.STATE_DTYPES)
    for name, shape in (("ema_count", codebook.shape[:1]), ("ema_sum", codebook.shape)):
        value = getattr(state, name)
        _checks.check_tensor(f"state.{name}", value, (codebook.dtype,))
        _checks.check_like(f"state.{name}", value, shape, "as the codebook has it", codebook, "state.codebook")
    _checks.check_tensor("state.idle", state.idle, (torch.int64,))
    if state.idle.dim() != 2 or state.idle.shape[0] < 1:
        raise ValueError(f"state.idle must have shape (modalities, M), modalities >= 1, got {tuple(state.idle.shape)}")
    idle_shape = (state.idle.shape[0], codebook.shape[0])
    _checks.check_like("state.idle", state.idle, idle_shape, "(modalities, M)", codebook, "state.codebook")
    _check_step(codebook, state.step)
    for name, value in zip(state._fields, state, strict=True):
        if value.requires_grad:
            raise ValueError(f"state.{name} must have requires_grad=False, as it is changed in place, got True")


def _check_step(codebook: Tensor, step: Any) -> None:
    _checks.check_tensor("state.step", step, (torch.int64,))
    _checks.check_like("state.step", step, (), "without dimensions", codebook, "state.codebook")


def _check_list(name: str, value: Any, length: int, of: str = "features") -> None:
    if isinstance(value, Tensor) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a list with one tensor for each modality, got {type(value).__name__}")
    if len(value) != length:
        raise ValueError(f"{name} must have {length} entries, one for each modality of {of}, got {len(value)}")


def _check_rows(codebook: Tensor, features: Any, index: Any) -> None:
    _check_list("index", index, len(features))
    for m, (feature, codes) in enumerate(zip(features, index, strict=True)):
        _checks.check_tensor(f"features[{m}]", feature, _checks.FEATURE_DTYPES)
        shape, width = tuple(feature.shape), codebook.shape[1]
        if len(shape) != 2 or shape[1] != width:
            raise ValueError(f"features[{m}] must have shape (N, {width}), with the D of state.codebook, got {shape}")
        _checks.check_device(f"features[{m}]", feature, codebook, "state.codebook")
        _checks.check_tensor(f"index[{m}]", codes, (torch.int64,))
        _checks.check_like(f"index[{m}]", codes, shape[:1], f"the rows of features[{m}]", codebook, "state.codebook")


def _checked_partners(features: Sequence[Tensor], partners: Any, rule: EmaConfig) -> list[Tensor]:
    """The partners for the operator; empty where the same rows of other modalities are partners."""
    if partners is None:
        rows = [feature.shape[0] for feature in features]
        if rule.own_weight < 1 and any(number != rows[0] for number in rows):
            raise ValueError(f"features must have equal numbers of rows where partners is None, got {rows}")
        return []
    _check_list("partners", partners, len(features))
    for m, (partner, feature) in enumerate(zip(partners, features, strict=True)):
        _checks.check_tensor(f"partners[{m}]", partner, _checks.FEATURE_DTYPES)
        meaning = f"that of features[{m}]"
        _checks.check_like(f"partners[{m}]", partner, feature.shape, meaning, feature, f"features[{m}]")
    return list(partners)


def _checked_valid(features: Sequence[Tensor], valid: Any) -> list[Tensor]:
    """The masks for the operator; empty where every row is valid."""
    if valid is None:
        return []
    _check_list("valid", valid, len(features))
    if all(mask is None for mask in valid):
        return []
    masks = []
    for m, (mask, feature) in enumerate(zip(valid, features, strict=True)):
        if mask is None:
            mask = torch.ones(feature.shape[0], dtype=torch.bool, device=feature.device)
        _checks.check_tensor(f"valid[{m}]", mask, (torch.bool,))
        meaning = f"the rows of features[{m}]"
        _checks.check_like(f"valid[{m}]", mask, feature.shape[:1], meaning, feature, f"features[{m}]")
        masks.append(mask)
    return masks


def _checked_draws(state: CodebookState, draws: Any) -> ResetDraws:
    if not isinstance(draws, ResetDraws):
        raise TypeError(f"draws must be ResetDraws or None, got {type(draws).__name__}")
    _check_draw("choice", draws.choice, state.codebook.shape[:1], state.codebook)
    _check_draw("noise", draws.noise, state.codebook.shape, state.codebook)
    return draws


def _check_draw(name: str, value: Any, shape: Sequence[int], codebook: Tensor) -> None:
    _checks.check_tensor(f"draws.{name}", value, (torch.float64,))
    _checks.check_like(f"draws.{name}", value, shape, "as the codebook has it", codebook, "state.codebook")


def _check_prepared(state: CodebookState, prepared: Any) -> None:
    if prepared is None:
        return
    if not isinstance(prepared, PreparedCodebook):
        raise TypeError(f"prepared must be a PreparedCodebook or None, got {type(prepared).__name__}")
    if prepared.codebook is not state.codebook:
        raise ValueError("prepared must hold state.codebook, got another tensor")


def _resets_from_features(rule: EmaConfig) -> bool:
    return rule.reset_after > 0 and rule.reset_source == "feature"


def _checked_shard(features: Sequence[Tensor], shard: Any, *, needed: bool) -> BatchShard:
    rows = [feature.shape[0] for feature in features]
    if shard is None:
        if needed:
            raise ValueError("shard must be a BatchShard where several ranks reset codewords to features, got None")
        return BatchShard([0] * len(rows), rows)
    if not isinstance(shard, BatchShard):
        raise TypeError(f"shard must be a BatchShard or None, got {type(shard).__name__}")
    first, total = list(shard.first_row), list(shard.total_rows)
    fits = len(first) == len(total) == len(rows) and all(
        0 <= start <= start + number <= whole for start, number, whole in zip(first, rows, total, strict=True)
    )
    fits = fits and sum(total) < 2**63
    if not fits:
        raise ValueError(f"shard must hold the {rows} rows of features, got first_row {first}, total_rows {total}")
    return BatchShard(first, total)


def _check_statistics(*arguments: Any) -> None:
    codebook, step, features, index, partners, valid, choice, first_row, total_rows, _, *settings = arguments
    rule = EmaConfig(*settings)
    _checks.check_codebook("state.codebook", codebook, _checks.STATE_DTYPES)
    _check_step(codebook, step)
    if not features:
        raise ValueError("features must have at least one entry, got none")
    _check_rows(codebook, features, index)
    _checked_partners(features, partners or None, rule)
    _checked_valid(features, valid or None)
    _checked_shard(features, BatchShard(first_row, total_rows), needed=False)
    if choice is not None:
        _check_draw("choice", choice, codebook.shape[:1], codebook)


def _check_apply(*arguments: Any) -> None:
    state, (statistics, choice, noise, *settings) = CodebookState(*arguments[:5]), arguments[5:]
    rule = EmaConfig(*settings)
    _check_state(state)
    _checks.check_tensor("statistics", statistics, (torch.float64,))
    size = (_statistics_size(state.codebook, state.idle.shape[0], rule),)
    _checks.check_like("statistics", statistics, size, "that of all statistics", state.codebook, "state.codebook")
    if choice is not None or noise is not None:
        _checked_draws(state, ResetDraws(choice, noise))


def _check_update(*arguments: Any) -> None:
    state, (features, index, partners, valid, choice, noise) = CodebookState(*arguments[:5]), arguments[5:11]
    first_row, total_rows, *settings = arguments[11:]
    _check_state(state)
    if state.idle.shape[0] != len(features):
        raise ValueError(f"idle must have {len(features)} rows, one for each of features, got {state.idle.shape[0]}")
    rows = (features, index, partners, valid, choice, first_row, total_rows)
    _check_statistics(state.codebook, state.step, *rows, False, *settings)
    if choice is not None or noise is not None:
        _checked_draws(state, ResetDraws(choice, noise))


def _check_apart(arguments: list[tuple[str, Tensor]]) -> None:
    """Raise where an element of the state shares its memory with another element of the arguments."""
    for number, (name, tensor) in enumerate(arguments[:-1]):
        if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
            raise ValueError(f"{name} must have a place in memory for each number, got strides {tensor.stride()}")
        for other_name, other in arguments[number + 1 :]:
            if _share_memory(tensor, other):
                raise ValueError(f"{name} must not share memory with other arguments, got that of {other_name}")


def _share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two contiguous tensors overlap in memory; False if one is not contiguous."""
    if not (one.is_contiguous() and other.is_contiguous()):
        return False
    return one.data_ptr() < other.data_ptr() + other.nbytes and other.data_ptr() < one.data_ptr() + one.nbytes


def _statistics_size(codebook: Tensor, modalities: int, rule: EmaConfig, candidates: int = 1) -> int:
    codewords, width = codebook.shape
    found = candidates * codewords * (1 + width) if _resets_from_features(rule) else 0
    return modalities * (1 + codewords) + codewords * width + found


def _statistics(*arguments: Any) -> Tensor:
    codebook, step, features, index, partners, valid, choice = arguments[:7]
    first_row, total_rows, every_attempt, *settings = arguments[7:]
    # The other fields of the state are not read.
    state = CodebookState(codebook, codebook, codebook, step.new_zeros(len(features), codebook.shape[0]), step)
    batch = CodebookBatch(features, index, partners, valid, BatchShard(first_row, total_rows), every_attempt)
    draws = None if choice is None else ResetDraws(choice, choice)
    with _checks.naming_index("index", index, valid, codebook.shape[0]):
        return codebook_statistics_reference(state, batch, EmaConfig(*settings), draws)


def _fake_statistics(*arguments: Any) -> Tensor:
    codebook, features, every_attempt, settings = arguments[0], arguments[2], arguments[9], arguments[10:]
    candidates = RESET_ATTEMPTS if every_attempt else 1
    size = _statistics_size(codebook, len(features), EmaConfig(*settings), candidates)
    return codebook.new_empty(size, dtype=torch.float64)


def _apply(*arguments: Any) -> None:
    statistics, choice, noise, *settings = arguments[5:]
    draws = None if choice is None else ResetDraws(choice, noise)
    state = CodebookState(*arguments[:5])
    _check_apart([*zip(state._fields, state, strict=True), ("statistics", statistics)])
    codebook_apply_reference(state, statistics, EmaConfig(*settings), draws)


def _fake_apply(*arguments: Any) -> None:
    return None


def _update(*arguments: Any) -> None:
    state, rows, draws, shard = arguments[:5], arguments[5:9], arguments[9:11], arguments[11:13]
    settings = arguments[13:]
    names = CodebookState._fields
    _check_apart([*zip(names, state, strict=True)])
    _apply(*state, _statistics(state[0], state[4], *rows, draws[0], *shard, False, *settings), *draws, *settings)


def _fake_update(*arguments: Any) -> None:
    return None


_RULE = (
    "float decay, float epsilon, float own_weight, str update, str smoothing, int reset_after, str reset_unless, "
    "str reset_source, float reset_noise, int reset_active_within, bool reset_ema, int seed"
)
_library.declare(
    "codebook_statistics",
    "(Tensor codebook, Tensor step, Tensor[] features, Tensor[] index, Tensor[] partners, Tensor[] valid, "
    f"Tensor? choice, int[] first_row, int[] total_rows, bool every_attempt, {_RULE}) -> Tensor",
    _check_statistics,
    _statistics,
    _fake_statistics,
)
_library.declare(
    "codebook_apply",
    "(Tensor(a!) codebook, Tensor(b!) ema_count, Tensor(c!) ema_sum, Tensor(d!) idle, Tensor(e!) step, "
    f"Tensor statistics, Tensor? choice, Tensor? noise, {_RULE}) -> ()",
    _check_apply,
    _apply,
    _fake_apply,
)
_library.declare(
    "codebook_update",
    "(Tensor(a!) codebook, Tensor(b!) ema_count, Tensor(c!) ema_sum, Tensor(d!) idle, Tensor(e!) step, "
    "Tensor[] features, Tensor[] index, Tensor[] partners, Tensor[] valid, Tensor? choice, Tensor? noise, "
    f"int[] first_row, int[] total_rows, {_RULE}) -> ()",
    _check_update,
    _update,
    _fake_update,
)
