"""The contrastive loss over all pairs of modalities and prediction steps, and its gradient, in plain PyTorch."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Number of scores in memory at a time. 2^22 float32 numbers are 16 MiB; the paper's batch of 80 needs one chunk.
CHUNK_ELEMENTS = 2**22


class CrossInfoNCEInputs(NamedTuple):
    """Inputs of the loss and of its gradient.

    Each query is scored against all keys, of which one belongs to its own clip; the softmax is over the keys. The
    queries may be some clips of the batch: clips offset, offset + 1, ... of the B clips of the keys.

    Attributes:
        targets: (modalities, K, B, D) float64, float32, float16 or bfloat16; the queries of "predictions".
        predictions: like `targets`; the queries of "candidates".
        pair_weights: (target, source) floating point.
        valid: (modalities, K, B) bool, or None where every vector is valid.
        temperature: () floating point.
        softmax_over: "predictions", "candidates" or "both"; with "both" the queries are the whole batch.
        offset: index in the batch of the first query.
    """

    targets: Tensor
    predictions: Tensor
    pair_weights: Tensor
    valid: Tensor | None
    temperature: Tensor
    softmax_over: str
    offset: int = 0

    def queries_and_keys(self) -> tuple[Tensor, Tensor]:
        """Queries and keys of the first softmax."""
        if self.softmax_over == "candidates":
            return self.predictions, self.targets
        return self.targets, self.predictions


class _Prepared(NamedTuple):
    """Inputs in the dtype of the computation, and the directions of the softmaxes."""

    queries: Tensor  # (modalities, K, Q, D), zeros where not valid; of the first softmax
    keys: Tensor  # (modalities, K, B, D), zeros where not valid; of the first softmax
    valid: Tensor  # (modalities, K, B)
    counted: Tensor  # (target, source, K, Q), queries valid on both sides
    temperature: Tensor  # ()
    over_candidates: list[bool]  # one entry for each softmax; the second exchanges queries and keys
    offset: int


def cross_info_nce_reference(inputs: CrossInfoNCEInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, loss of each pair and step, hits, log-sum-exps, and the weight of a clip in the loss.

    For target modality t, source modality s and prediction step k, with V the clips valid in both, w the pair
    weights and::

        S_ij = targets[t, k, i] . predictions[s, k, j] / temperature

    the loss of clip i is, by `softmax_over`::

        "predictions"  l_i = log sum_j exp S_ij - S_ii    over the j that are valid in s
        "candidates"   l_i = log sum_j exp S_ji - S_ii    over the j that are valid in t
        "both"         the mean of the two

    and::

        pair_loss[t, s, k] = 1/|V| sum_(i in V) l_i, 0 where V is empty
        loss = sum_(t, s) w[t, s] mean over the k with V not empty of pair_loss[t, s, k]

    A pair of weight 0 adds nothing to the loss, even if its own loss is not finite. If the queries are some clips of
    the batch, sums over V are over these clips, but |V| is that of the batch. So results add up to that of the batch.

    Args:
        inputs: see `CrossInfoNCEInputs`. Vectors that are not valid may hold anything.

    Returns:
        loss: (); pair_loss: (target, source, K); hits: (target, source, K) int64, the number of i in V whose own score
        is the first largest of their softmax ("both": over predictions);
        logsumexp: (softmaxes, target, source, K, Q), the log sum of exponentials of each l_i, 0 outside V;
        clip_weights: (target, source, K), the factor of each l_i in the loss.
        Floating point results are float32 for half-precision inputs, else in the dtype of `targets`.

    Memory:
        Copies of the inputs and a few times max(2^22, modalities^2 K B) scores.

    Source:
        van den Oord et al., 2018; Xia et al., NeurIPS 2023, Eq. 6 ("candidates") and its released code
        ("predictions").
    """
    prepared = _prepare(inputs)
    results = [_one_softmax(prepared, softmax) for softmax in range(len(prepared.over_candidates))]
    losses, logsumexps, hits = zip(*results, strict=True)
    number, weights = numbers_and_weights(inputs)
    total = torch.stack(losses).mean(dim=0).sum(dim=3)  # (target, source, K)
    loss = torch.where(weights != 0, weights * total, 0).sum()
    return loss, total / number.clamp(min=1), hits[0], torch.stack(logsumexps), weights


def cross_info_nce_backward_reference(
    gradient: Tensor, logsumexp: Tensor, clip_weights: Tensor, inputs: CrossInfoNCEInputs
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the loss in targets, predictions and temperature; the scores are recomputed.

    Let g be the gradient in the loss and p the softmax over predictions. With c_i = g w[t, s] / (|V| number of steps k
    with V not empty) for the clips i in V and 0 elsewhere::

        G_ij = c_i (p_ij - [i = j])                       the gradient in S_ij, which sums to 0 over j
        grad targets[t, k] = sum_s G predictions[s, k] / temperature
        grad predictions[s, k] = sum_t G^T targets[t, k] / temperature
        grad temperature = -sum G_ij (S_ij - S_ii) / temperature

    The softmax over candidates is the same with targets and predictions exchanged; "both" is the mean.

    Args:
        gradient: (), the gradient in the loss.
        logsumexp: from the forward pass.
        clip_weights: from the forward pass.
        inputs: as in the forward pass.

    Returns:
        Gradients in the shapes and dtypes of targets, predictions and temperature; zeros at vectors not valid.

    Memory:
        Copies of the inputs and a few times max(2^22, modalities^2 K B) scores.
    """
    prepared = _prepare(inputs)
    queries, keys = prepared.queries, prepared.keys
    weight = gradient.to(clip_weights.dtype) * clip_weights / len(prepared.over_candidates)  # (target, source, K)
    coefficient = torch.where(prepared.counted, weight[..., None], 0)
    # Contiguous like the fakes of the operator's results, whatever the strides of the inputs.
    in_first = queries.new_zeros(queries.shape), keys.new_zeros(keys.shape)
    in_temperature = torch.zeros_like(prepared.temperature)
    for softmax, (sums, over_candidates) in enumerate(zip(logsumexp, prepared.over_candidates, strict=True)):
        queries, keys = _in_order(prepared.queries, prepared.keys, softmax)
        in_queries, in_keys = _in_order(*in_first, softmax)
        row_coefficient = _exchanged(coefficient, over_candidates)[..., None]  # (query, key, K, Q, 1)
        row_logsumexp = _exchanged(sums, over_candidates)[..., None]
        for block, scores, own in _score_blocks(queries, keys, prepared):
            slope = (scores - row_logsumexp[:, :, :, block]).exp()  # (query, key, K, block, B)
            slope.diagonal(offset=prepared.offset + block.start, dim1=3, dim2=4).sub_(1)
            slope = torch.where(row_coefficient[:, :, :, block] != 0, slope * row_coefficient[:, :, :, block], 0)
            in_queries[:, :, block] += (slope @ keys).sum(dim=1)
            in_keys += (slope.transpose(3, 4) @ queries[:, None, :, block]).sum(dim=0)
            in_temperature -= torch.where(slope != 0, slope * (scores - own[..., None]), 0).sum()
    scale = 1 / prepared.temperature
    in_targets, in_predictions = _in_order(*in_first, inputs.softmax_over == "candidates")
    return (
        (in_targets * scale).to(inputs.targets.dtype),
        (in_predictions * scale).to(inputs.predictions.dtype),
        (in_temperature * scale).to(inputs.temperature.dtype),
    )


def numbers_and_weights(inputs: CrossInfoNCEInputs) -> tuple[Tensor, Tensor]:
    """Number of clips of the batch that count, and the weight of each in the loss: (target, source, K)."""
    targets, valid = inputs.targets, inputs.valid
    dtype = torch.promote_types(targets.dtype, torch.float32)
    modalities, steps = targets.shape[:2]
    if valid is None:
        clips = inputs.queries_and_keys()[1].shape[2]
        number = torch.full((modalities, modalities, steps), clips, device=targets.device)
    else:
        number = (valid[:, None] & valid[None]).sum(dim=3)
    used = number > 0
    weights = inputs.pair_weights.to(dtype)[:, :, None] / used.sum(dim=2, keepdim=True).clamp(min=1)
    return number, torch.where(used, weights / number.clamp(min=1), 0)


def _prepare(inputs: CrossInfoNCEInputs) -> _Prepared:
    dtype = torch.promote_types(inputs.targets.dtype, torch.float32)
    queries, keys = inputs.queries_and_keys()
    valid = inputs.valid
    if valid is None:
        valid = torch.ones(keys.shape[:3], dtype=torch.bool, device=keys.device)
    query_valid = valid[:, :, inputs.offset : inputs.offset + queries.shape[2]]
    # where() and not a product: vectors that are not valid may hold NaN.
    queries = torch.where(query_valid[..., None], queries.to(dtype), 0)
    keys = torch.where(valid[..., None], keys.to(dtype), 0)
    over_candidates = {"predictions": [False], "candidates": [True], "both": [False, True]}[inputs.softmax_over]
    counted = query_valid[:, None] & query_valid[None]
    return _Prepared(queries, keys, valid, counted, inputs.temperature.to(dtype), over_candidates, inputs.offset)


def _one_softmax(prepared: _Prepared, softmax: int) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each clip and logsumexps, (target, source, K, Q), and hits, (target, source, K)."""
    queries, keys = _in_order(prepared.queries, prepared.keys, softmax)
    over_candidates = prepared.over_candidates[softmax]
    logsumexp = torch.zeros_like(prepared.counted, dtype=queries.dtype)  # (query, key, K, Q)
    diagonal, hit = torch.zeros_like(logsumexp), torch.zeros_like(prepared.counted)
    for block, scores, own in _score_blocks(queries, keys, prepared):
        logsumexp[:, :, :, block] = scores.logsumexp(dim=4)
        diagonal[:, :, :, block] = own
        clip = prepared.offset + torch.arange(block.start, block.stop, device=scores.device)
        hit[:, :, :, block] = scores.argmax(dim=4) == clip
    logsumexp = torch.where(prepared.counted, _exchanged(logsumexp, over_candidates), 0)
    loss = torch.where(prepared.counted, logsumexp - _exchanged(diagonal, over_candidates), 0)
    hits = (prepared.counted & _exchanged(hit, over_candidates)).sum(dim=3)
    return loss, logsumexp, hits


def _in_order(first: Tensor, second: Tensor, exchange: int) -> tuple[Tensor, Tensor]:
    return (second, first) if exchange else (first, second)


def _exchanged(by_pair: Tensor, exchange: bool) -> Tensor:
    """(target, source, ...) as (source, target, ...), or back."""
    return by_pair.transpose(0, 1) if exchange else by_pair


def _score_blocks(queries: Tensor, keys: Tensor, prepared: _Prepared) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of rows of the scores, (query, key, K, block, B), with their diagonals; -inf at keys not valid."""
    modalities, steps, number, _ = queries.shape
    clips = keys.shape[2]
    size = max(1, CHUNK_ELEMENTS // max(1, modalities**2 * steps * clips))
    for start in range(0, number, size):
        block = slice(start, min(start + size, number))
        scores = queries[:, None, :, block] @ keys.transpose(2, 3) / prepared.temperature
        scores = torch.where(prepared.valid[:, :, None], scores, -torch.inf)
        yield block, scores, scores.diagonal(offset=prepared.offset + start, dim1=3, dim2=4)
