"""Cross-CPC InfoNCE in Triton: scores stay in register tiles for any batch; all sums have a fixed order.

Each *query* has a softmax over *keys*: queries are targets and keys predictions, or the reverse for "candidates". A
*slab* is one modality at one prediction step, (rows, D). A *pair* is a query modality, a key modality and a step. A
clip *counts* for it if it is valid in both modalities.

Up to `SMALL_BATCH` clips one program computes both softmaxes of a pair, up to `ROWS_BATCH` clips some rows of one
softmax; the last program adds up the loss. Beyond that a program takes rows of queries and runs along the keys with a
running log-sum-exp. The gradient is one kernel for any batch: a program computes rows of one gradient and recomputes
the scores for them.
"""

# Triton functions have no annotations but tl.constexpr:
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from unicode_fast.reference.cross_info_nce import (
    CrossInfoNCEInputs,
    cross_info_nce_backward_reference,
    cross_info_nce_reference,
    numbers_and_weights,
)

SMALL_BATCH = 128
# Tiles have powers of two as sizes. Two of them hold the scores of some rows with this many clips.
LEFT_COLUMNS = tl.constexpr(64)
RIGHT_COLUMNS = tl.constexpr(32)
ROWS_BATCH = LEFT_COLUMNS.value + RIGHT_COLUMNS.value
# Rows of partial sums of columns for each pair with "both": twice the memory of one float32 input of width 256.
MOST_GROUPS = 512
# A gradient has smaller tiles up to this many programs, two for each multiprocessor of an H100 or H200.
FEW_PROGRAMS = 264
# Limit of all but the first dimension of a grid.
MOST_PROGRAMS = 65535
# Slopes are at most 2 before their product in float16, whose range ends at 65504; it loses bits below 6e-5.
SLOPE_SCALE = tl.constexpr(4096.0)
# The last program reads the results of the others in tiles of this many pairs and steps.
PAIR_TILE = tl.constexpr(32)
STEP_TILE = tl.constexpr(16)
PLACE_TILE = tl.constexpr(128)
SHARE_TILE = tl.constexpr(1024)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# Forms of the kernels that no GPU has timed yet, chosen by counts of instructions and launches; False is the earlier
# form. Without masks, where all clips are valid, no kernel reads `valid`, and only the last keys of a batch are tested
# for its end by the forward pass of one softmax.
WITHOUT_MASKS = True
# Exponentials and logarithms to base 2; log2(e) is part of the scale of the scores.
BASE_TWO = True
# The last program of a kernel clears the count of programs. That of the gradient also adds up the temperature's.
FUSED = True
# A batch of up to ROWS_BATCH clips has tiles of 32 rows: 80 clips are padded to 96, not to 128. Each pair has several
# programs, and a gradient too where it has FEW_PROGRAMS.
ROW_TILES = True
# With both softmaxes the forward pass keeps the largest score and the sum of each column; logarithms come afterwards.
COLUMN_SUMS = True
# The gradient of one softmax looks for the own place of a row only in tiles that may have it.
DIAGONAL_APART = True
# The forward pass on sm_90 begins the product of a second tile before the exponentials of the first one. Only Triton
# 3.9 overlaps the two, and only without masks.
AHEAD = False

_UNSPECIALISED = ["modalities", "steps", "rows", "clips", "offset", "query_stride", "key_stride", "masked"]


@triton.jit
def _exists(valid_ptr, slab, clip, clips, masked, NO_MASK: tl.constexpr):
    """Whether a slab has vectors for these clips."""
    if NO_MASK:
        return clip < clips
    stored = tl.load(valid_ptr + slab.to(tl.int64) * clips + clip, mask=clip < clips * masked, other=1)
    return (clip < clips) & (stored != 0)


@triton.jit
def _tile(slab_ptr, first, rows, start, width, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """BLOCK_ROWS rows of a slab from `first` on, zeros beyond its end; BLOCK_WIDTH columns from `start` on."""
    row = first + tl.arange(0, BLOCK_ROWS)
    pointer = (slab_ptr + row.to(tl.int64) * width)[:, None] + (start + tl.arange(0, BLOCK_WIDTH))[None, :]
    return tl.load(pointer, mask=(row < rows)[:, None], other=0.0)


@triton.jit
def _scores(
    rows_ptr,
    rows_tile,
    first_row,
    rows,
    columns_ptr,
    columns_tile,
    first_column,
    columns,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHUNK: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products of rows of two slabs; with WHOLE from the given tiles, which hold the whole width."""
    scores = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    if WHOLE:
        scores = tl.dot(rows_tile, tl.trans(columns_tile), scores, input_precision=PRECISION)
    else:
        for start in range(0, width, BLOCK_CHUNK):
            a = _tile(rows_ptr, first_row, rows, start, width, BLOCK_ROWS, BLOCK_CHUNK)
            b = _tile(columns_ptr, first_column, columns, start, width, BLOCK_COLUMNS, BLOCK_CHUNK)
            scores = tl.dot(a, tl.trans(b), scores, input_precision=PRECISION)
    return scores


@triton.jit
def _exp(exponent, BASE_TWO: tl.constexpr):
    return tl.exp2(exponent) if BASE_TWO else tl.exp(exponent)


@triton.jit
def _log(value, BASE_TWO: tl.constexpr):
    return tl.log2(value) if BASE_TWO else tl.log(value)


@triton.jit
def _log_sum_exp(scores, axis: tl.constexpr, BASE_TWO: tl.constexpr):
    """Largest score and log of the sum of exponentials relative to it, along an axis; -inf if all scores are."""
    largest = tl.max(scores, axis)
    base = tl.where(largest == -float("inf"), 0.0, largest)
    return base, _log(tl.sum(_exp(scores - tl.expand_dims(base, axis), BASE_TWO), axis), BASE_TWO)


@triton.jit
def _probability(gap, BASE_TWO: tl.constexpr):
    """Exponential of a score less its logsumexp; at most 1, even if a huge recomputed score is larger."""
    return _exp(tl.minimum(gap, 0.0, propagate_nan=tl.PropagateNan.ALL), BASE_TWO)


@triton.jit
def _slope(gap, row_clip, clip, on_diagonal, BASE_TWO: tl.constexpr, DIAGONAL_APART: tl.constexpr):
    """Derivative of a negative log softmax at the row's own place, by the scores."""
    slope = _probability(gap, BASE_TWO)
    if DIAGONAL_APART:
        if on_diagonal:
            slope = tl.where(row_clip[:, None] == clip[None, :], slope - 1.0, slope)
    else:
        slope -= (row_clip[:, None] == clip[None, :]).to(tl.float32)
    return slope


@triton.jit
def _log_add_exp(a, b, BASE_TWO: tl.constexpr):
    largest = tl.maximum(a, b)
    base = tl.where(largest == -float("inf"), 0.0, largest)
    return base + _log(_exp(a - base, BASE_TWO) + _exp(b - base, BASE_TWO), BASE_TWO)


@triton.jit
def _is_last(arrived_ptr, programs, FUSED: tl.constexpr):
    """Whether all other programs have called this; the last one clears the count with FUSED."""
    # All threads write before one counts the program as done; the last one then reads the results of all programs.
    tl.debug_barrier()
    arrived = tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    last = arrived == programs - 1
    if FUSED & last:
        tl.store(arrived_ptr, 0)
    return last


@triton.jit(do_not_specialize=_UNSPECIALISED)
def small_forward_kernel(
    queries_ptr,  # (modalities, steps, rows, width)
    keys_ptr,  # (modalities, steps, clips, width)
    valid_ptr,  # (modalities, steps, clips), read where `masked`
    pair_weights_ptr,  # (target, source)
    temperature_ptr,  # ()
    loss_ptr,  # ()
    pair_loss_ptr,  # (target, source, steps)
    hits_ptr,  # (target, source, steps)
    logsumexp_ptr,  # (softmaxes, target, source, steps, rows)
    clip_weights_ptr,  # (target, source, steps)
    number_ptr,  # (target, source, steps)
    arrived_ptr,  # (), zero; also afterwards with FUSED
    modalities,
    steps,
    rows,
    clips,
    width,
    offset,
    query_stride,
    key_stride,
    masked,
    BOTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    NO_MASK: tl.constexpr,
    BASE_TWO: tl.constexpr,
    FUSED: tl.constexpr,
):
    """One pair in each program: all its scores, both softmaxes, its hits; then, in the last program, the loss."""
    program = tl.program_id(0)
    step = program % steps
    key = program // steps % modalities
    query = program // steps // modalities
    pair = query * query_stride + key * key_stride + step
    query_slab, key_slab = query * steps + step, key * steps + step
    query_ptr = queries_ptr + query_slab.to(tl.int64) * rows * width
    key_ptr = keys_ptr + key_slab.to(tl.int64) * clips * width
    row = tl.arange(0, BLOCK)
    clip = tl.arange(0, BLOCK)  # of the key

    scores = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        queries = _tile(query_ptr, 0, rows, start, width, BLOCK, BLOCK_WIDTH)
        keys = _tile(key_ptr, 0, clips, start, width, BLOCK, BLOCK_WIDTH)
        scores = tl.dot(queries, tl.trans(keys), scores, input_precision=PRECISION)

    key_exists = _exists(valid_ptr, key_slab, clip, clips, masked, NO_MASK)
    query_exists = _exists(valid_ptr, query_slab, offset + row, clips, masked, NO_MASK) & (row < rows)
    counted = query_exists & _exists(valid_ptr, key_slab, offset + row, clips, masked, NO_MASK)
    counted_key = key_exists & _exists(valid_ptr, query_slab, clip, clips, masked, NO_MASK)
    number = tl.sum(counted_key.to(tl.int32), 0)
    own_place = (offset + row)[:, None] == clip[None, :]
    exists = query_exists[:, None] & key_exists[None, :]
    # Scores and their exponentials are in this unit, results are natural logarithms.
    unit = LN_2 if BASE_TWO else 1.0
    scores = tl.where(exists, scores * (1 / (unit * tl.load(temperature_ptr))), -float("inf"))

    own = tl.sum(tl.where(own_place, scores, 0.0), 1)
    largest, log_sum = _log_sum_exp(scores, 1, BASE_TWO)
    tl.store(logsumexp_ptr + pair * rows + row, tl.where(counted, unit * (largest + log_sum), 0.0), mask=row < rows)
    total = tl.sum(tl.where(counted, log_sum + (largest - own), 0.0), 0)
    largest_earlier = tl.max(tl.where(clip[None, :] < (offset + row)[:, None], scores, -float("inf")), 1)
    hits = tl.sum((counted & (largest_earlier < own) & (largest <= own)).to(tl.int32), 0)
    if BOTH:
        own_of_key = tl.sum(tl.where(own_place, scores, 0.0), 0)
        largest_of_key, log_sum_of_key = _log_sum_exp(scores, 0, BASE_TWO)
        second_ptr = logsumexp_ptr + tl.num_programs(0) * rows
        logsumexp = tl.where(counted_key, unit * (largest_of_key + log_sum_of_key), 0.0)
        tl.store(second_ptr + pair * rows + clip, logsumexp, mask=clip < clips)
        loss_of_key = log_sum_of_key + (largest_of_key - own_of_key)
        total = (total + tl.sum(tl.where(counted_key, loss_of_key, 0.0), 0)) / 2
    tl.store(pair_loss_ptr + pair, unit * total / tl.maximum(number, 1))
    tl.store(hits_ptr + pair, hits)
    tl.store(number_ptr + pair, number)

    if _is_last(arrived_ptr, tl.num_programs(0), FUSED):
        _finish(loss_ptr, pair_loss_ptr, clip_weights_ptr, number_ptr, pair_weights_ptr, modalities * modalities, steps)


@triton.jit
def _columns(
    scores, start, place, scale, valid_ptr, key_slab, clips, masked, BLOCK: tl.constexpr, NO_MASK: tl.constexpr
):
    """Scores by temperature, each row's score at its own place, and its largest before that."""
    clip = start + tl.arange(0, BLOCK)
    key_exists = _exists(valid_ptr, key_slab, clip, clips, masked, NO_MASK)
    scores = tl.where(key_exists[None, :], scores * scale, -float("inf"))
    own = tl.sum(tl.where(clip[None, :] == place[:, None], scores, 0.0), 1)
    return scores, own, tl.max(tl.where(clip[None, :] < place[:, None], scores, -float("inf")), 1)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def small_rows_kernel(
    queries_ptr,  # (modalities, steps, rows, width)
    keys_ptr,  # (modalities, steps, clips, width)
    valid_ptr,  # (modalities, steps, clips), read where `masked`
    pair_weights_ptr,  # (target, source)
    temperature_ptr,  # ()
    loss_ptr,  # ()
    pair_loss_ptr,  # (target, source, steps)
    hits_ptr,  # (target, source, steps)
    logsumexp_ptr,  # (softmaxes, target, source, steps, rows)
    clip_weights_ptr,  # (target, source, steps)
    number_ptr,  # (target, source, steps)
    share_ptr,  # (softmaxes, row tiles, target, source, steps), sums of the losses of rows
    share_hits_ptr,  # (softmaxes, row tiles, target, source, steps)
    arrived_ptr,  # (), zero; also afterwards with FUSED
    modalities,
    steps,
    rows,
    clips,
    width,
    offset,
    query_stride,
    key_stride,
    masked,
    BOTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    NO_MASK: tl.constexpr,
    BASE_TWO: tl.constexpr,
    FUSED: tl.constexpr,
):
    """Some rows of one softmax of a pair in each program, with all keys; then, in the last program, the loss.

    The second softmax has programs of its own, for which queries and keys change places.
    """
    key = tl.program_id(0) % modalities
    query = tl.program_id(0) // modalities
    step = tl.program_id(1)
    tile = tl.program_id(2)
    softmax = 0
    if BOTH:
        softmax = tile // (tl.num_programs(2) // 2)
        tile = tile % (tl.num_programs(2) // 2)
        if softmax != 0:
            queries_ptr, keys_ptr = keys_ptr, queries_ptr
            query_stride, key_stride = key_stride, query_stride
    pairs = tl.num_programs(0) * steps
    pair = query * query_stride + key * key_stride + step
    query_slab, key_slab = query * steps + step, key * steps + step
    query_ptr = queries_ptr + query_slab.to(tl.int64) * rows * width
    key_ptr = keys_ptr + key_slab.to(tl.int64) * clips * width
    first = tile * BLOCK_ROWS
    row = first + tl.arange(0, BLOCK_ROWS)
    place = offset + row

    left = tl.zeros((BLOCK_ROWS, LEFT_COLUMNS), tl.float32)
    right = tl.zeros((BLOCK_ROWS, RIGHT_COLUMNS), tl.float32)
    for start in range(0, width, BLOCK_CHUNK):
        queries = _tile(query_ptr, first, rows, start, width, BLOCK_ROWS, BLOCK_CHUNK)
        keys = _tile(key_ptr, 0, clips, start, width, LEFT_COLUMNS, BLOCK_CHUNK)
        left = tl.dot(queries, tl.trans(keys), left, input_precision=PRECISION)
        keys = _tile(key_ptr, LEFT_COLUMNS, clips, start, width, RIGHT_COLUMNS, BLOCK_CHUNK)
        right = tl.dot(queries, tl.trans(keys), right, input_precision=PRECISION)

    query_exists = _exists(valid_ptr, query_slab, place, clips, masked, NO_MASK) & (row < rows)
    counted = query_exists & _exists(valid_ptr, key_slab, place, clips, masked, NO_MASK)
    number = clips
    if not NO_MASK:
        clip = tl.arange(0, 2 * LEFT_COLUMNS)
        counted_key = _exists(valid_ptr, key_slab, clip, clips, masked, NO_MASK)
        counted_key = counted_key & _exists(valid_ptr, query_slab, clip, clips, masked, NO_MASK)
        number = tl.sum(counted_key.to(tl.int32), 0)
    unit = LN_2 if BASE_TWO else 1.0
    scale = 1 / (unit * tl.load(temperature_ptr))
    left, own_left, earlier_left = _columns(
        left, 0, place, scale, valid_ptr, key_slab, clips, masked, LEFT_COLUMNS, NO_MASK
    )
    right, own_right, earlier_right = _columns(
        right, LEFT_COLUMNS, place, scale, valid_ptr, key_slab, clips, masked, RIGHT_COLUMNS, NO_MASK
    )
    own = own_left + own_right
    largest_earlier = tl.maximum(earlier_left, earlier_right)
    largest = tl.maximum(tl.max(left, 1), tl.max(right, 1))
    base = tl.where(largest == -float("inf"), 0.0, largest)[:, None]
    log_sum = _log(tl.sum(_exp(left - base, BASE_TWO), 1) + tl.sum(_exp(right - base, BASE_TWO), 1), BASE_TWO)

    logsumexp_ptr += (softmax * pairs + pair) * rows
    tl.store(logsumexp_ptr + row, tl.where(counted, unit * (largest + log_sum), 0.0), mask=row < rows)
    total = tl.sum(tl.where(counted, log_sum + (largest - own), 0.0), 0)
    hits = tl.sum((counted & (largest_earlier < own) & (largest <= own)).to(tl.int32), 0)
    share = tl.program_id(2) * pairs + pair
    tl.store(share_ptr + share, unit * total / (2 if BOTH else 1))
    tl.store(share_hits_ptr + share, tl.where(softmax == 0, hits, 0))
    tl.store(number_ptr + pair, number)

    if _is_last(arrived_ptr, pairs * tl.num_programs(2), FUSED):
        _add_shares(pair_loss_ptr, hits_ptr, number_ptr, share_ptr, share_hits_ptr, pairs, tl.num_programs(2))
        _finish(loss_ptr, pair_loss_ptr, clip_weights_ptr, number_ptr, pair_weights_ptr, modalities * modalities, steps)


@triton.jit
def _add_shares(pair_loss_ptr, hits_ptr, number_ptr, share_ptr, share_hits_ptr, pairs, shares):
    """The loss and hits of each pair and step, whose shares always have the same order."""
    for first in range(0, pairs, PLACE_TILE):
        pair = first + tl.arange(0, PLACE_TILE)
        total = tl.zeros((PLACE_TILE,), tl.float32)
        hits = tl.zeros((PLACE_TILE,), tl.int32)
        for share in range(0, shares):
            total += tl.load(share_ptr + share * pairs + pair, mask=pair < pairs, other=0.0)
            hits += tl.load(share_hits_ptr + share * pairs + pair, mask=pair < pairs, other=0)
        number = tl.load(number_ptr + pair, mask=pair < pairs, other=0)
        tl.store(pair_loss_ptr + pair, total / tl.maximum(number, 1), mask=pair < pairs)
        tl.store(hits_ptr + pair, hits, mask=pair < pairs)
    # Other threads of this program read the losses again.
    tl.debug_barrier()


@triton.jit
def _finish(loss_ptr, pair_loss_ptr, clip_weights_ptr, number_ptr, pair_weights_ptr, pairs, steps):
    """The loss, and the weight of each clip in it, from the results of all pairs."""
    loss = 0.0
    for first in range(0, pairs, PAIR_TILE):
        pair = first + tl.arange(0, PAIR_TILE)
        used = tl.zeros((PAIR_TILE,), tl.int32)
        for start in range(0, steps, STEP_TILE):
            step = start + tl.arange(0, STEP_TILE)
            inside = (pair < pairs)[:, None] & (step < steps)[None, :]
            number = tl.load(number_ptr + pair[:, None] * steps + step[None, :], mask=inside, other=0)
            used += tl.sum((number > 0).to(tl.int32), 1)
        weight = tl.load(pair_weights_ptr + pair, mask=pair < pairs, other=0.0) / tl.maximum(used, 1)
        for start in range(0, steps, STEP_TILE):
            step = start + tl.arange(0, STEP_TILE)
            inside = (pair < pairs)[:, None] & (step < steps)[None, :]
            place = pair[:, None] * steps + step[None, :]
            number = tl.load(number_ptr + place, mask=inside, other=0)
            pair_loss = tl.load(pair_loss_ptr + place, mask=inside, other=0.0)
            clip_weight = tl.where(number > 0, weight[:, None] / tl.maximum(number, 1), 0.0)
            tl.store(clip_weights_ptr + place, clip_weight, mask=inside)
            loss += tl.sum(tl.sum(tl.where(clip_weight != 0, weight[:, None] * pair_loss, 0.0), 1), 0)
    tl.store(loss_ptr, loss)


@triton.jit
def _add_columns(
    scores,
    start,
    largest,
    total,
    own,
    largest_earlier,  # of the keys before the own one
    partial_ptr,
    partial_total_ptr,
    written,  # columns of partial_ptr that hold sums of earlier rows
    valid_ptr,
    key_slab,
    query_exists,
    place,  # of the queries' own keys
    clips,
    masked,
    scale,
    unit,
    BOTH: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    NO_MASK: tl.constexpr,
    BASE_TWO: tl.constexpr,
    AHEAD: tl.constexpr,
    COLUMN_SUMS: tl.constexpr,
):
    """The running sums of each row's softmax after BLOCK_COLUMNS more columns; with AHEAD some may be below 0."""
    clip = start + tl.arange(0, BLOCK_COLUMNS)
    scores *= scale
    key_exists = _exists(valid_ptr, key_slab, clip, clips, masked, NO_MASK)
    if AHEAD:
        key_exists = key_exists & (clip >= 0)
    if BOTH:
        scores = tl.where(query_exists[:, None] & key_exists[None, :], scores, -float("inf"))
    elif not NO_MASK:
        scores = tl.where(key_exists[None, :], scores, -float("inf"))
    elif (start < 0) | (start + BLOCK_COLUMNS > clips):
        scores = tl.where(key_exists[None, :], scores, -float("inf"))
    if (start <= tl.max(place, 0)) & (start + BLOCK_COLUMNS > tl.min(place, 0)):
        here = (place >= start) & (place < start + BLOCK_COLUMNS)
        before = tl.max(tl.where(clip[None, :] < place[:, None], scores, -float("inf")), 1)
        largest_earlier = tl.where(here, tl.maximum(largest, before), largest_earlier)
        own = tl.where(here, tl.sum(tl.where(clip[None, :] == place[:, None], scores, 0.0), 1), own)
    new_largest = tl.maximum(largest, tl.max(scores, 1))
    base = tl.where(new_largest == -float("inf"), 0.0, new_largest)
    total = total * _exp(largest - base, BASE_TWO) + tl.sum(_exp(scores - base[:, None], BASE_TWO), 1)
    if BOTH and COLUMN_SUMS:
        largest_of_key = tl.max(scores, 0)
        base = tl.where(largest_of_key == -float("inf"), 0.0, largest_of_key)
        total_of_key = tl.sum(_exp(scores - base[None, :], BASE_TWO), 0)
        if written != 0:
            before = tl.load(partial_ptr + clip, mask=clip < clips, other=-float("inf"))
            total_before = tl.load(partial_total_ptr + clip, mask=clip < clips, other=0.0)
            largest_of_rows = largest_of_key
            largest_of_key = tl.maximum(largest_of_rows, before)
            base = tl.where(largest_of_key == -float("inf"), 0.0, largest_of_key)
            total_of_key *= _exp(largest_of_rows - base, BASE_TWO)
            total_of_key += total_before * _exp(before - base, BASE_TWO)
        tl.store(partial_ptr + clip, largest_of_key, mask=clip < clips)
        tl.store(partial_total_ptr + clip, total_of_key, mask=clip < clips)
    elif BOTH:
        largest_of_key, log_sum_of_key = _log_sum_exp(scores, 0, BASE_TWO)
        partial = unit * (largest_of_key + log_sum_of_key)
        before = tl.load(partial_ptr + clip, mask=clip < written, other=-float("inf"))
        partial = _log_add_exp(partial, before, False)
        tl.store(partial_ptr + clip, partial, mask=clip < clips)
    return new_largest, total, own, largest_earlier


@triton.jit(do_not_specialize=_UNSPECIALISED)
def forward_kernel(
    queries_ptr,  # (modalities, steps, rows, width)
    keys_ptr,  # (modalities, steps, clips, width)
    valid_ptr,  # (modalities, steps, clips), read where `masked`
    temperature_ptr,  # ()
    logsumexp_ptr,  # (softmaxes, target, source, steps, rows); only the first softmax is written
    own_ptr,  # (target, source, steps, rows), scores at the queries' own keys
    hit_ptr,  # (target, source, steps, rows)
    partial_ptr,  # (groups, target, source, steps, clips), of the second softmax; written where BOTH. (2, groups, ...)
    # with COLUMN_SUMS: largest scores, then sums of exponentials.
    modalities,
    steps,
    rows,
    clips,
    width,
    offset,
    query_stride,
    key_stride,
    masked,
    BOTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_CHUNK: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    NO_MASK: tl.constexpr,
    BASE_TWO: tl.constexpr,
    AHEAD: tl.constexpr,
    COLUMN_SUMS: tl.constexpr,
):
    """Tiles of rows of one pair's queries in each program, one after the other, each along all keys.

    A program adds the exponentials of each column, over its own rows, to its own row of `partial`.
    """
    group = tl.program_id(0)
    step = tl.program_id(1) % steps
    key = tl.program_id(1) // steps % modalities
    query = tl.program_id(1) // steps // modalities
    pair = (query * query_stride + key * key_stride + step).to(tl.int64)
    query_slab, key_slab = query * steps + step, key * steps + step
    width = BLOCK_WIDTH if WHOLE else width
    query_ptr = queries_ptr + query_slab.to(tl.int64) * rows * width
    key_ptr = keys_ptr + key_slab.to(tl.int64) * clips * width
    partial_ptr += (group.to(tl.int64) * tl.num_programs(1) + pair) * clips
    partial_total_ptr = partial_ptr + tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * clips
    unit = LN_2 if BASE_TWO else 1.0
    scale = 1 / (unit * tl.load(temperature_ptr))

    for first in range(group * BLOCK_ROWS, rows, tl.num_programs(0) * BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        query_exists = _exists(valid_ptr, query_slab, offset + row, clips, masked, NO_MASK) & (row < rows)
        queries = _tile(query_ptr, first, rows, 0, width, BLOCK_ROWS, BLOCK_WIDTH)
        largest = tl.full((BLOCK_ROWS,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_ROWS,), tl.float32)
        own = tl.zeros((BLOCK_ROWS,), tl.float32)
        largest_earlier = largest  # of the keys before the own one
        place = offset + row
        written = tl.where(first > group * BLOCK_ROWS, clips, 0)
        behind = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        # With AHEAD a pass has two tiles, without the second softmax. The product of the second tile may run during the
        # exponentials of the first one, and of the second one of the pass before.
        tl.static_assert(not (AHEAD and BOTH))
        end = clips + BLOCK_COLUMNS if AHEAD else clips
        for start in range(0, end, 2 * BLOCK_COLUMNS if AHEAD else BLOCK_COLUMNS):
            keys = _tile(key_ptr, start, clips, 0, width, BLOCK_COLUMNS, BLOCK_WIDTH)
            scores = _scores(
                query_ptr,
                queries,
                first,
                rows,
                key_ptr,
                keys,
                start,
                clips,
                width,
                BLOCK_ROWS,
                BLOCK_COLUMNS,
                BLOCK_CHUNK,
                WHOLE,
                PRECISION,
            )
            if AHEAD:
                before = behind
                second = start + BLOCK_COLUMNS
                keys = _tile(key_ptr, second, clips, 0, width, BLOCK_COLUMNS, BLOCK_WIDTH)
                behind = _scores(
                    query_ptr,
                    queries,
                    first,
                    rows,
                    key_ptr,
                    keys,
                    second,
                    clips,
                    width,
                    BLOCK_ROWS,
                    BLOCK_COLUMNS,
                    BLOCK_CHUNK,
                    WHOLE,
                    PRECISION,
                )
                largest, total, own, largest_earlier = _add_columns(
                    before,
                    start - BLOCK_COLUMNS,
                    largest,
                    total,
                    own,
                    largest_earlier,
                    partial_ptr,
                    partial_total_ptr,
                    written,
                    valid_ptr,
                    key_slab,
                    query_exists,
                    place,
                    clips,
                    masked,
                    scale,
                    unit,
                    BOTH,
                    BLOCK_COLUMNS,
                    NO_MASK,
                    BASE_TWO,
                    AHEAD,
                    COLUMN_SUMS,
                )
            largest, total, own, largest_earlier = _add_columns(
                scores,
                start,
                largest,
                total,
                own,
                largest_earlier,
                partial_ptr,
                partial_total_ptr,
                written,
                valid_ptr,
                key_slab,
                query_exists,
                place,
                clips,
                masked,
                scale,
                unit,
                BOTH,
                BLOCK_COLUMNS,
                NO_MASK,
                BASE_TWO,
                AHEAD,
                COLUMN_SUMS,
            )
        counted = query_exists & _exists(valid_ptr, key_slab, offset + row, clips, masked, NO_MASK)
        hit = counted & (largest_earlier < own) & (largest <= own)
        place = pair * rows + row
        logsumexp = unit * (largest + _log(total, BASE_TWO))
        tl.store(logsumexp_ptr + place, tl.where(counted, logsumexp, 0.0), mask=row < rows)
        tl.store(own_ptr + place, tl.where(counted, unit * own, 0.0), mask=row < rows)
        tl.store(hit_ptr + place, hit, mask=row < rows)
        # Other threads of this program read the columns again.
        tl.debug_barrier()


@triton.jit(do_not_specialize=_UNSPECIALISED)
def backward_kernel(
    gradient_ptr,  # ()
    queries_ptr,  # (modalities, steps, rows, width)
    keys_ptr,  # (modalities, steps, clips, width)
    valid_ptr,  # (modalities, steps, clips), read where `masked`
    temperature_ptr,  # ()
    logsumexp_ptr,  # (softmaxes, target, source, steps, rows)
    clip_weights_ptr,  # (target, source, steps)
    in_queries_ptr,  # (modalities, steps, rows, width)
    in_keys_ptr,  # (modalities, steps, clips, width)
    in_temperature_ptr,  # (modalities, steps, row tiles), shares of the gradient
    temperature_sum_ptr,  # (), written with FUSED
    arrived_ptr,  # (), zero before and after; read with FUSED
    modalities,
    steps,
    rows,
    clips,
    width,
    offset,
    query_stride,
    key_stride,
    masked,
    BOTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_CHUNK: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    NO_MASK: tl.constexpr,
    BASE_TWO: tl.constexpr,
    FUSED: tl.constexpr,
    DIAGONAL_APART: tl.constexpr,
):
    """Some rows and columns of one slab's gradient in each program: first the slabs of queries, then those of keys.

    Rows of the tiles of scores are those of the slab, columns those of the other side, one modality after the other.
    """
    slabs = modalities * steps
    of_queries = tl.program_id(1) < slabs
    own_slab = tl.where(of_queries, tl.program_id(1), tl.program_id(1) - slabs)
    step = own_slab % steps
    own_modality = own_slab // steps
    if of_queries:
        own_ptr, other_ptr, in_own_ptr = queries_ptr, keys_ptr, in_queries_ptr
    else:
        own_ptr, other_ptr, in_own_ptr = keys_ptr, queries_ptr, in_keys_ptr
    own_rows, other_rows = tl.where(of_queries, rows, clips), tl.where(of_queries, clips, rows)
    own_offset, other_offset = tl.where(of_queries, offset, 0), tl.where(of_queries, 0, offset)
    own_stride = tl.where(of_queries, query_stride, key_stride)
    other_stride = tl.where(of_queries, key_stride, query_stride)
    # Logsumexps of the softmaxes along a row and along a column of a tile of scores. Without BOTH only the queries have
    # some; the other side reads 0.
    row_logsumexp_ptr, column_logsumexp_ptr = logsumexp_ptr, logsumexp_ptr
    logsumexp_rows, logsumexp_columns = tl.where(of_queries, rows, 0), tl.where(of_queries, 0, rows)
    if BOTH:
        softmax_size = (modalities * slabs).to(tl.int64) * rows
        row_logsumexp_ptr += tl.where(of_queries, 0, softmax_size)
        column_logsumexp_ptr += tl.where(of_queries, softmax_size, 0)
        logsumexp_rows, logsumexp_columns = rows, rows

    first = tl.program_id(0) * BLOCK_ROWS
    row = first + tl.arange(0, BLOCK_ROWS)
    row_clip = own_offset + row
    row_exists = _exists(valid_ptr, own_slab, row_clip, clips, masked, NO_MASK) & (row < own_rows)
    width = BLOCK_WIDTH if WHOLE else width
    start_width = tl.program_id(2) * BLOCK_WIDTH
    slab_ptr = own_ptr + own_slab.to(tl.int64) * own_rows * width
    own = _tile(slab_ptr, first, own_rows, 0, width, BLOCK_ROWS, BLOCK_WIDTH)
    unit = LN_2 if BASE_TWO else 1.0
    natural_scale = 1 / tl.load(temperature_ptr)
    scale = 1 / (unit * tl.load(temperature_ptr))
    weight_ptr = clip_weights_ptr + own_modality * own_stride + step
    largest_weight = 0.0
    for other in range(0, modalities):
        largest_weight = tl.maximum(largest_weight, tl.abs(tl.load(weight_ptr + other * other_stride)))
    weight_scale = tl.where(largest_weight > 0, SLOPE_SCALE / largest_weight, 0.0)

    result = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
    in_temperature = tl.zeros((BLOCK_ROWS,), tl.float32)
    for other in range(0, modalities):
        other_slab = other * steps + step
        pair = (own_modality * own_stride + other * other_stride + step).to(tl.int64)
        weight = tl.load(weight_ptr + other * other_stride) * weight_scale
        other_slab_ptr = other_ptr + other_slab.to(tl.int64) * other_rows * width
        row_counted = row_exists & _exists(valid_ptr, other_slab, row_clip, clips, masked, NO_MASK)
        row_logsumexp = tl.load(row_logsumexp_ptr + pair * rows + row, mask=row < logsumexp_rows, other=0.0)
        row_logsumexp *= 1 / unit
        # A pair of weight 0 is skipped, whatever its scores are.
        for start in range(0, tl.where(weight != 0, other_rows, 0), BLOCK_COLUMNS):
            column = start + tl.arange(0, BLOCK_COLUMNS)
            clip = other_offset + column
            others = _tile(other_slab_ptr, start, other_rows, start_width, width, BLOCK_COLUMNS, BLOCK_WIDTH)
            scores = _scores(
                slab_ptr,
                own,
                first,
                own_rows,
                other_slab_ptr,
                others,
                start,
                other_rows,
                width,
                BLOCK_ROWS,
                BLOCK_COLUMNS,
                BLOCK_CHUNK,
                WHOLE,
                PRECISION,
            )
            column_exists = _exists(valid_ptr, other_slab, clip, clips, masked, NO_MASK) & (column < other_rows)
            column_counted = column_exists & _exists(valid_ptr, own_slab, clip, clips, masked, NO_MASK)
            place = column_logsumexp_ptr + pair * rows + column
            column_logsumexp = tl.load(place, mask=column < logsumexp_columns, other=0.0) * (1 / unit)
            distance = other_offset + start - own_offset - first
            on_diagonal = (distance < BLOCK_ROWS) & (distance > -BLOCK_COLUMNS)
            if BOTH:
                gap = scores * scale - row_logsumexp[:, None]
                slope = _slope(gap, row_clip, clip, on_diagonal, BASE_TWO, False)
                slope = tl.where(row_counted[:, None] & column_exists[None, :], slope, 0.0)
                in_temperature += weight * tl.sum(slope * gap, 1)
                gap = scores * scale - column_logsumexp[None, :]
                added = _slope(gap, row_clip, clip, on_diagonal, BASE_TWO, False)
                added = tl.where(row_exists[:, None] & column_counted[None, :], added, 0.0)
                in_temperature += weight * tl.sum(added * gap, 1)
                slope += added
            else:
                # One of the two logsumexps belongs to the softmax, the other is 0.
                gap = scores * scale - row_logsumexp[:, None] - column_logsumexp[None, :]
                here_row = tl.where(of_queries, row_counted, row_exists)
                here_column = tl.where(of_queries, column_exists, column_counted)
                slope = _slope(gap, row_clip, clip, on_diagonal, BASE_TWO, DIAGONAL_APART)
                slope = tl.where(here_row[:, None] & here_column[None, :], slope, 0.0)
                in_temperature += weight * tl.sum(slope * gap, 1)
            result = tl.dot((slope * weight).to(others.dtype), others, result, input_precision=PRECISION)
    factor = tl.load(gradient_ptr) * largest_weight * natural_scale / SLOPE_SCALE
    if BOTH:
        factor /= 2
    pointer = in_own_ptr + (own_slab.to(tl.int64) * own_rows + row) * width
    pointer = pointer[:, None] + (start_width + tl.arange(0, BLOCK_WIDTH))[None, :]
    tl.store(pointer, result * factor, mask=(row < own_rows)[:, None])
    if of_queries & (tl.program_id(2) == 0):
        share = -factor * unit * tl.sum(in_temperature, 0)
        tl.store(in_temperature_ptr + own_slab * tl.num_programs(0) + tl.program_id(0), share)
        if FUSED:
            shares = slabs * tl.num_programs(0)
            if _is_last(arrived_ptr, shares, FUSED):
                total = tl.zeros((SHARE_TILE,), tl.float32)
                for start in range(0, shares, SHARE_TILE):
                    place = start + tl.arange(0, SHARE_TILE)
                    total += tl.load(in_temperature_ptr + place, mask=place < shares, other=0.0)
                tl.store(temperature_sum_ptr, tl.sum(total, 0))


class Configuration(NamedTuple):
    """Tile sizes and compiler options of a kernel.

    Attributes:
        rows: of a tile of scores.
        columns: of a tile of scores.
        warps: of a program.
        stages: of the pipeline that loads tiles ahead.
        chunk: columns of the vectors in one partial product of the scores, unless `whole`.
        width: columns of the vectors that a program holds.
        whole: whether `width` is the whole width; then scores are one product.
        precision: of products of float32, by Triton's name.
        ahead: whether the forward kernel multiplies a tile during the exponentials of another.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    chunk: int
    width: int = 128
    whole: bool = False
    precision: str = "ieee"
    ahead: bool = False

    @property
    def small(self) -> dict[str, int | str]:
        """Compile-time constants of the small forward kernel."""
        return {"BLOCK": self.rows, "BLOCK_WIDTH": self.chunk, "PRECISION": self.precision}

    @property
    def small_rows(self) -> dict[str, int | str]:
        """Compile-time constants of the kernel for rows of a small batch, without the softmax."""
        return {"BLOCK_ROWS": self.rows, "BLOCK_CHUNK": self.chunk, "PRECISION": self.precision}

    @property
    def tiles(self) -> dict[str, int | bool | str]:
        """Compile-time constants of the other kernels, without the softmax."""
        sizes = {"BLOCK_ROWS": self.rows, "BLOCK_COLUMNS": self.columns, "BLOCK_WIDTH": self.width}
        return {**sizes, "BLOCK_CHUNK": self.chunk, "WHOLE": self.whole, "PRECISION": self.precision}

    @property
    def options(self) -> dict[str, int | bool]:
        """Options of the compiler. By default it aims at more concurrent programs, and spills a register or two."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": 255, "enable_fp_fusion": True}


def forms(kernel: str, chosen: Configuration, all_valid: bool) -> dict[str, bool]:
    """Compile-time constants of a kernel that choose between its forms."""
    own = {"AHEAD": chosen.ahead, "COLUMN_SUMS": COLUMN_SUMS} if kernel == "forward" else {"FUSED": FUSED}
    if kernel.endswith("backward"):
        # Small batches have few other tiles.
        own["DIAGONAL_APART"] = DIAGONAL_APART and kernel == "backward"
    return {"NO_MASK": WITHOUT_MASKS and all_valid, "BASE_TWO": BASE_TWO, **own}


# Vectors are padded to a multiple of this, so tiles hold whole columns.
TILE_WIDTH = 128
# The largest tiles found that compile for sm_80, sm_86 and sm_90 without register spills.
_CHUNKED = {
    ("small_forward", "half"): Configuration(SMALL_BATCH, SMALL_BATCH, 8, 2, 64),
    ("small_forward", "tf32"): Configuration(SMALL_BATCH, SMALL_BATCH, 8, 2, 32),
    ("small_forward", "ieee"): Configuration(SMALL_BATCH, SMALL_BATCH, 8, 1, 16),
    ("small_rows", "half"): Configuration(32, ROWS_BATCH, 2, 2, 64),
    ("small_rows", "tf32"): Configuration(32, ROWS_BATCH, 2, 2, 32),
    ("small_rows", "ieee"): Configuration(32, ROWS_BATCH, 4, 1, 16),
    ("forward", "half"): Configuration(128, 64, 8, 3, 64),
    ("forward", "tf32"): Configuration(128, 64, 8, 2, 32),
    ("forward", "ieee"): Configuration(32, 32, 4, 1, 16),
    ("backward", "half"): Configuration(128, 32, 8, 2, 64),
    ("backward", "tf32"): Configuration(128, 32, 8, 2, 32),
    ("backward", "ieee"): Configuration(32, 32, 4, 1, 16),
    ("small_backward", "half"): Configuration(32, 32, 4, 1, 64),
    ("small_backward", "tf32"): Configuration(32, 32, 4, 1, 32),
    ("small_backward", "ieee"): Configuration(32, 32, 4, 1, 16),
}
# For widths of 129 to 256: one load of a tile of vectors serves the scores and the gradient.
_WHOLE_WIDTH = 2 * TILE_WIDTH
_WHOLE = {
    ("forward", "half"): Configuration(64, 64, 8, 2, 64),
    ("backward", "half"): Configuration(64, 32, 8, 2, 64),
    ("small_backward", "half"): Configuration(32, 32, 4, 2, 64),
}
# The same with the 227 KiB of shared memory of sm_90 and sm_100.
_WHOLE_LARGE = {
    ("forward", "half"): Configuration(128, 64, 8, 3, 64),
    ("forward", "tf32"): Configuration(128, 32, 8, 2, 32),
    ("backward", "half"): Configuration(128, 32, 8, 2, 64),
    ("small_backward", "half"): Configuration(32, 32, 4, 2, 64),
}
# The same for sm_90, without the second softmax of "both", whose sums need the registers.
_AHEAD = {("forward", "half"): Configuration(128, 64, 8, 2, 64, ahead=True)}


def configuration(
    kernel: str, dtype: torch.dtype, width: int, capability: tuple[int, int], precision: str, both: bool
) -> Configuration:
    """The configuration of a kernel for a dtype, width, GPU and precision.

    Args:
        kernel: "small_forward", "small_rows", "forward", "backward", or "small_backward", which is "backward" with
            smaller tiles.
        dtype: of targets and predictions; not float64.
        width: of the vectors, padded.
        capability: compute capability of the GPU, (8, 0) at least.
        precision: as from torch.get_float32_matmul_precision(). In torch's own products on GPUs "medium" is "high".
        both: whether there are two softmaxes.
    """
    kind = "half" if dtype != torch.float32 else "ieee" if precision == "highest" else "tf32"
    products = "tf32" if kind == "tf32" else "ieee"
    choices = _WHOLE_LARGE if capability[0] in (9, 10) else _WHOLE
    if AHEAD and capability[0] == 9 and not both:
        choices = {**choices, **_AHEAD}
    whole = choices.get((kernel, kind))
    if whole is None or width != _WHOLE_WIDTH:
        return _CHUNKED[kernel, kind]._replace(precision=products)
    return whole._replace(width=width, whole=True, precision=products)


class _Ready(NamedTuple):
    """Inputs in the layout of the kernels, and their sizes."""

    queries: Tensor  # (modalities, K, Q, width), zeros where not valid and beyond D
    keys: Tensor  # (modalities, K, B, width), likewise
    valid: Tensor  # (modalities, K, B); not read if all are valid
    temperature: Tensor  # () float32
    sizes: tuple[int, ...]  # modalities to masked, in the kernels' order

    @property
    def pairs(self) -> tuple[int, int, int]:
        return self.queries.shape[0], self.queries.shape[0], self.queries.shape[1]


def cross_info_nce_triton(inputs: CrossInfoNCEInputs) -> tuple[Tensor, ...]:
    """As `cross_info_nce_reference`, which computes what the kernels do not: float64, empty inputs, older GPUs."""
    if not _kernels_take(inputs):
        return cross_info_nce_reference(inputs)
    with torch.cuda.device_of(inputs.targets):
        if inputs.queries_and_keys()[1].shape[2] <= SMALL_BATCH:
            return _small_forward(inputs, _ready(inputs))
        return _forward(inputs, _ready(inputs))


def cross_info_nce_backward_triton(
    gradient: Tensor, logsumexp: Tensor, clip_weights: Tensor, inputs: CrossInfoNCEInputs
) -> tuple[Tensor, ...]:
    """As `cross_info_nce_backward_reference`, which computes all cases without a kernel."""
    if not _kernels_take(inputs):
        return cross_info_nce_backward_reference(gradient, logsumexp, clip_weights, inputs)
    with torch.cuda.device_of(inputs.targets):
        return _backward(gradient, logsumexp, clip_weights, inputs, _ready(inputs))


def _kernels_take(inputs: CrossInfoNCEInputs) -> bool:
    targets = inputs.targets
    modalities, steps = targets.shape[:2]
    return (
        targets.dtype != torch.float64
        and inputs.targets.numel() > 0
        and inputs.predictions.numel() > 0
        and max(modalities, 2) * modalities * steps <= MOST_PROGRAMS
        and torch.version.hip is None
        and _capability(targets) >= (8, 0)
    )


def _capability(tensor: Tensor) -> tuple[int, int]:
    # Triton's interpreter runs on the CPU.
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (8, 0)


def _choose(kernel: str, ready: _Ready, both: bool) -> Configuration:
    """The configuration for these inputs on their device."""
    keys = ready.keys
    return configuration(kernel, keys.dtype, keys.shape[3], _capability(keys), _float32_precision(), both)


def _float32_precision() -> str:
    """As in torch's own products on a GPU, set by torch.set_float32_matmul_precision() or for CUDA alone.

    torch.get_float32_matmul_precision() reflects only the first: after the second it raises, or is out of date.
    """
    return "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"


def _ready(inputs: CrossInfoNCEInputs) -> _Ready:
    queries, keys = inputs.queries_and_keys()
    modalities, steps, rows, _ = queries.shape
    clips = keys.shape[2]
    valid = inputs.valid
    masked = int(valid is not None)
    if valid is None:
        valid = keys.new_empty((), dtype=torch.bool)
    else:
        valid = valid.contiguous()
        query_valid = valid[:, :, inputs.offset : inputs.offset + rows]
        queries, keys = torch.where(query_valid[..., None], queries, 0), torch.where(valid[..., None], keys, 0)
    queries, keys = _aligned(queries), _aligned(keys)
    by_target, by_source = modalities * steps, steps
    strides = (by_source, by_target) if inputs.softmax_over == "candidates" else (by_target, by_source)
    sizes = (modalities, steps, rows, clips, keys.shape[3], inputs.offset, *strides, masked)
    return _Ready(queries, keys, valid, inputs.temperature.float(), sizes)


def _aligned(vectors: Tensor) -> Tensor:
    """Contiguous vectors in whole tiles, at addresses aligned for vector loads."""
    missing = -vectors.shape[3] % TILE_WIDTH
    vectors = torch.nn.functional.pad(vectors, (0, missing)) if missing else vectors.contiguous()
    return vectors if vectors.data_ptr() % 16 == 0 else vectors.clone()


# Counts of programs, zero between kernels: of each device and stream, and unused ones for the kernels of graphs. The
# memory of those in use stays reserved, because a graph holds no tensors.
_COUNTS: dict[tuple[torch.device, int], Tensor] = {}
_UNUSED_COUNTS: dict[torch.device, list[Tensor]] = {}
_COUNTS_OF_GRAPHS: list[Tensor] = []


def _captured(like: Tensor) -> bool:
    return like.is_cuda and torch.cuda.is_current_stream_capturing()


def _arrived(like: Tensor) -> Tensor:
    """A count of programs that no kernel at the same time uses: zero, () int32.

    A kernel of a graph keeps its own, because the graph may run on another stream than it was captured on.
    """
    device = like.device
    if not FUSED:
        return like.new_zeros((), dtype=torch.int32)
    if _captured(like):
        unused = _UNUSED_COUNTS.get(device)
        return unused.pop() if unused else like.new_zeros((), dtype=torch.int32)
    if not _UNUSED_COUNTS.get(device):
        counts = torch.zeros(64, dtype=torch.int32, device=device)
        _COUNTS_OF_GRAPHS.append(counts)
        _UNUSED_COUNTS[device] = list(counts)
        if like.is_cuda:
            # The graph's stream does not wait for this one.
            torch.cuda.current_stream(device).synchronize()
    stream = torch.cuda.current_stream(device).cuda_stream if like.is_cuda else 0
    if (device, stream) not in _COUNTS:
        _COUNTS[device, stream] = like.new_zeros((), dtype=torch.int32)
    return _COUNTS[device, stream]


def _small_forward(inputs: CrossInfoNCEInputs, ready: _Ready) -> tuple[Tensor, ...]:
    both = inputs.softmax_over == "both"
    new = ready.keys.new_empty
    loss, pair_loss = new((), dtype=torch.float32), new(ready.pairs, dtype=torch.float32)
    hits = new(ready.pairs, dtype=torch.int64)
    logsumexp = new((1 + both, *ready.pairs, ready.queries.shape[2]), dtype=torch.float32)
    clip_weights = new(ready.pairs, dtype=torch.float32)
    number = new(ready.pairs, dtype=torch.int32)
    weights = inputs.pair_weights.float().contiguous()
    tensors = [ready.queries, ready.keys, ready.valid, weights, ready.temperature]
    tensors += [loss, pair_loss, hits, logsumexp, clip_weights, number]
    rows, clips = ready.queries.shape[2], ready.keys.shape[2]
    kernel = "small_rows" if ROW_TILES and clips <= ROWS_BATCH else "small_forward"
    chosen = _choose(kernel, ready, both)
    chosen_forms = {**forms(kernel, chosen, inputs.valid is None), **chosen.options}
    if kernel == "small_rows":
        modalities, _, steps = ready.pairs
        tiles = (1 + both) * triton.cdiv(rows, chosen.rows)
        shares = new((tiles, *ready.pairs), dtype=torch.float32)
        tensors += [shares, torch.empty_like(shares, dtype=torch.int32), _arrived(ready.keys)]
        grid = (modalities * modalities, steps, tiles)
        small_rows_kernel[grid](*tensors, *ready.sizes, BOTH=both, **chosen.small_rows, **chosen_forms)
    else:
        tensors.append(_arrived(ready.keys))
        small_forward_kernel[(pair_loss.numel(),)](*tensors, *ready.sizes, BOTH=both, **chosen.small, **chosen_forms)
    return loss, pair_loss, hits, logsumexp, clip_weights


def _forward(inputs: CrossInfoNCEInputs, ready: _Ready) -> tuple[Tensor, ...]:
    both = inputs.softmax_over == "both"
    modalities, _, steps = ready.pairs
    rows, clips = ready.queries.shape[2], ready.keys.shape[2]
    new = ready.keys.new_empty
    logsumexp = new((1 + both, *ready.pairs, rows), dtype=torch.float32)
    own = new((*ready.pairs, rows), dtype=torch.float32)
    hit = new((*ready.pairs, rows), dtype=torch.bool)
    chosen = _choose("forward", ready, both)
    groups = triton.cdiv(rows, chosen.rows)
    sums = 1 + COLUMN_SUMS
    groups = min(groups, MOST_GROUPS // sums) if both else groups
    partial = new((sums, groups if both else 0, *ready.pairs, clips), dtype=torch.float32)
    forward_kernel[(groups, modalities * modalities * steps)](
        ready.queries,
        ready.keys,
        ready.valid,
        ready.temperature,
        logsumexp,
        own,
        hit,
        partial,
        *ready.sizes,
        BOTH=both,
        **chosen.tiles,
        **forms("forward", chosen, inputs.valid is None),
        **chosen.options,
    )
    if both:
        columns = partial[-1]
        if COLUMN_SUMS:
            columns.log_().add_(partial[0], alpha=LN_2.value if BASE_TWO else 1)
        torch.logsumexp(columns, 0, out=logsumexp[1])
        if inputs.valid is not None:
            logsumexp[1].masked_fill_(~(inputs.valid[:, None] & inputs.valid[None]), 0)
    number, weights = numbers_and_weights(inputs)
    total = (logsumexp.mean(0) - own).sum(3)  # (target, source, K)
    loss = torch.where(weights != 0, weights * total, 0).sum()
    return loss, total / number.clamp(min=1), hit.sum(3), logsumexp, weights


def _backward(
    gradient: Tensor, logsumexp: Tensor, clip_weights: Tensor, inputs: CrossInfoNCEInputs, ready: _Ready
) -> tuple[Tensor, ...]:
    modalities, steps, rows, width = ready.queries.shape
    clips, both = ready.keys.shape[2], inputs.softmax_over == "both"
    kernel = "small_backward" if ROW_TILES and clips <= ROWS_BATCH else "backward"
    chosen = _choose(kernel, ready, both)
    if triton.cdiv(clips, chosen.rows) * 2 * modalities * steps * (width // chosen.width) > FEW_PROGRAMS:
        kernel, chosen = "backward", _choose("backward", ready, both)
    tiles = triton.cdiv(max(rows, clips), chosen.rows)
    in_queries, in_keys = torch.empty_like(ready.queries), torch.empty_like(ready.keys)
    in_temperature = ready.keys.new_empty((modalities, steps, tiles), dtype=torch.float32)
    temperature_sum = torch.empty_like(inputs.temperature)
    backward_kernel[(tiles, 2 * modalities * steps, width // chosen.width)](
        gradient.float(),
        ready.queries,
        ready.keys,
        ready.valid,
        ready.temperature,
        logsumexp,
        clip_weights,
        in_queries,
        in_keys,
        in_temperature,
        temperature_sum,
        _arrived(ready.keys) if FUSED else in_temperature,
        *ready.sizes,
        BOTH=both,
        **chosen.tiles,
        **forms(kernel, chosen, inputs.valid is None),
        **chosen.options,
    )
    in_targets, in_predictions = in_queries, in_keys
    if inputs.softmax_over == "candidates":
        in_targets, in_predictions = in_keys, in_queries
    real = slice(inputs.targets.shape[3])
    return (
        in_targets[..., real].contiguous(),
        in_predictions[..., real].contiguous(),
        temperature_sum if FUSED else in_temperature.sum().to(inputs.temperature.dtype),
    )
