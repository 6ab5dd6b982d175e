"""The contrastive loss over all pairs of modalities and prediction steps, and its gradient, in plain PyTorch."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Scores held at once. 2^22 float32 numbers are 16 MiB; the paper's batch of 80 needs one chunk.
CHUNK_ELEMENTS = 2**22


class CrossInfoNCEInputs(NamedTuple):
    """What the loss and its gradient read.

    Attributes:
        targets: (modalities, K, B, D) float64, float32, float16 or bfloat16.
        predictions: like `targets`.
        pair_weights: (target, source) floating point.
        valid: (modalities, K, B) bool, or None where every vector is valid.
        temperature: () floating point.
        softmax_over: "predictions", "candidates" or "both".
    """

    targets: Tensor
    predictions: Tensor
    pair_weights: Tensor
    valid: Tensor | None
    temperature: Tensor
    softmax_over: str


class _Prepared(NamedTuple):
    """Inputs in the dtype of the computation, and the two directions in which a row can be read."""

    targets: Tensor  # (modalities, K, B, D), zeros where not valid
    predictions: Tensor  # (modalities, K, B, D), zeros where not valid
    valid: Tensor  # (modalities, K, B)
    counted: Tensor  # (target, source, K, B), clips valid on both sides
    temperature: Tensor  # ()
    over_candidates: list[bool]  # one entry for each softmax


def cross_info_nce_reference(inputs: CrossInfoNCEInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, loss of each pair and step, hits, and the softmax's normalisers.

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

    A pair of weight 0 adds nothing to the loss, even where its own loss is not finite.

    Args:
        inputs: see `CrossInfoNCEInputs`. Vectors that are not valid may hold anything.

    Returns:
        loss: (); pair_loss: (target, source, K); hits: (target, source, K) int64, the number of i in V whose score
        with themselves is the first largest one of their softmax (of "both": of the one over predictions);
        log_normaliser: (softmaxes, target, source, K, B), the log sum of exponentials of each l_i, 0 outside V.
        Floating point results are float32 for half-precision inputs, else in the dtype of `targets`.

    Memory:
        Copies of the inputs and a few times max(2^22, modalities^2 K B) scores.

    Source:
        van den Oord et al., 2018; Xia et al., NeurIPS 2023, Eq. 6 ("candidates") and its released code
        ("predictions").
    """
    prepared = _prepare(inputs)
    results = [_one_softmax(prepared, over_candidates) for over_candidates in prepared.over_candidates]
    losses, normalisers, hits = zip(*results, strict=True)
    number = prepared.counted.sum(dim=3).clamp(min=1)  # (target, source, K)
    pair_loss = torch.stack(losses).mean(dim=0).sum(dim=3) / number
    weight = _step_weights(inputs.pair_weights, prepared)
    loss = torch.where(weight != 0, weight * pair_loss, 0).sum()
    return loss, pair_loss, hits[0], torch.stack(normalisers)


def cross_info_nce_backward_reference(
    gradient: Tensor, log_normaliser: Tensor, inputs: CrossInfoNCEInputs
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the loss in targets, predictions and temperature; the scores are computed anew.

    With g the gradient that arrives at the loss, c_i = g w[t, s] / (|V| number of steps k with V not empty) for the
    clips i in V and 0 elsewhere, and p the softmax over predictions::

        G_ij = c_i (p_ij - [i = j])                       the gradient in S_ij, which sums to 0 over j
        grad targets[t, k] = sum_s G predictions[s, k] / temperature
        grad predictions[s, k] = sum_t G^T targets[t, k] / temperature
        grad temperature = -sum G_ij (S_ij - S_ii) / temperature

    The softmax over candidates is the same with targets and predictions exchanged; "both" is the mean.

    Args:
        gradient: (), the gradient in the loss.
        log_normaliser: from the forward pass.
        inputs: as in the forward pass.

    Returns:
        Gradients in the shapes and dtypes of targets, predictions and temperature; zeros at vectors not valid.

    Memory:
        Copies of the inputs and a few times max(2^22, modalities^2 K B) scores.
    """
    prepared = _prepare(inputs)
    weight = _step_weights(inputs.pair_weights, prepared) / prepared.counted.sum(dim=3).clamp(min=1)
    weight = gradient.to(weight.dtype) * weight / len(prepared.over_candidates)  # (target, source, K)
    coefficient = torch.where(prepared.counted, weight[..., None], 0)
    in_targets, in_predictions = torch.zeros_like(prepared.targets), torch.zeros_like(prepared.predictions)
    in_temperature = torch.zeros_like(prepared.temperature)
    for normaliser, over_candidates in zip(log_normaliser, prepared.over_candidates, strict=True):
        queries, keys, in_queries, in_keys = prepared.predictions, prepared.targets, in_predictions, in_targets
        if not over_candidates:
            queries, keys, in_queries, in_keys = keys, queries, in_keys, in_queries
        row_coefficient = _exchanged(coefficient, over_candidates)[..., None]  # (query, key, K, B, 1)
        row_normaliser = _exchanged(normaliser, over_candidates)[..., None]
        for block, scores, own in _score_blocks(queries, keys, prepared):
            slope = (scores - row_normaliser[:, :, :, block]).exp()  # (query, key, K, block, B)
            slope.diagonal(offset=block.start, dim1=3, dim2=4).sub_(1)
            slope = torch.where(row_coefficient[:, :, :, block] != 0, slope * row_coefficient[:, :, :, block], 0)
            in_queries[:, :, block] += (slope @ keys).sum(dim=1)
            in_keys += (slope.transpose(3, 4) @ queries[:, None, :, block]).sum(dim=0)
            in_temperature -= torch.where(slope != 0, slope * (scores - own[..., None]), 0).sum()
    scale = 1 / prepared.temperature
    return (
        (in_targets * scale).to(inputs.targets.dtype),
        (in_predictions * scale).to(inputs.predictions.dtype),
        (in_temperature * scale).to(inputs.temperature.dtype),
    )


def _prepare(inputs: CrossInfoNCEInputs) -> _Prepared:
    dtype = torch.promote_types(inputs.targets.dtype, torch.float32)
    valid = inputs.valid
    if valid is None:
        valid = torch.ones(inputs.targets.shape[:3], dtype=torch.bool, device=inputs.targets.device)
    # where() and not a product: vectors that are not valid may hold NaN.
    targets = torch.where(valid[..., None], inputs.targets.to(dtype), 0)
    predictions = torch.where(valid[..., None], inputs.predictions.to(dtype), 0)
    over_candidates = {"predictions": [False], "candidates": [True], "both": [False, True]}[inputs.softmax_over]
    temperature = inputs.temperature.to(dtype)
    return _Prepared(targets, predictions, valid, valid[:, None] & valid[None], temperature, over_candidates)


def _step_weights(pair_weights: Tensor, prepared: _Prepared) -> Tensor:
    """Weight of each pair and step in the loss: (target, source, K)."""
    used = prepared.counted.any(dim=3)
    weight = pair_weights.to(prepared.targets.dtype)[:, :, None] / used.sum(dim=2, keepdim=True).clamp(min=1)
    return torch.where(used, weight, 0)


def _one_softmax(prepared: _Prepared, over_candidates: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each clip and normalisers, (target, source, K, B), and hits, (target, source, K)."""
    queries, keys = prepared.targets, prepared.predictions
    if over_candidates:
        queries, keys = keys, queries
    normaliser = torch.zeros_like(prepared.counted, dtype=queries.dtype)  # (query, key, K, B)
    diagonal, hit = torch.zeros_like(normaliser), torch.zeros_like(prepared.counted)
    for block, scores, own in _score_blocks(queries, keys, prepared):
        normaliser[:, :, :, block] = scores.logsumexp(dim=4)
        diagonal[:, :, :, block] = own
        clip = torch.arange(block.start, block.stop, device=scores.device)
        hit[:, :, :, block] = scores.argmax(dim=4) == clip
    normaliser = torch.where(prepared.counted, _exchanged(normaliser, over_candidates), 0)
    loss = torch.where(prepared.counted, normaliser - _exchanged(diagonal, over_candidates), 0)
    hits = (prepared.counted & _exchanged(hit, over_candidates)).sum(dim=3)
    return loss, normaliser, hits


def _exchanged(by_pair: Tensor, exchange: bool) -> Tensor:
    """(target, source, ...) as (source, target, ...), or back."""
    return by_pair.transpose(0, 1) if exchange else by_pair


def _score_blocks(queries: Tensor, keys: Tensor, prepared: _Prepared) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of rows of the scores, (query, key, K, block, B), with their diagonals; -inf at keys not valid."""
    modalities, steps, clips, _ = queries.shape
    size = max(1, CHUNK_ELEMENTS // max(1, modalities**2 * steps * clips))
    for start in range(0, clips, size):
        block = slice(start, min(start + size, clips))
        scores = queries[:, None, :, block] @ keys.transpose(2, 3) / prepared.temperature
        scores = torch.where(prepared.valid[:, :, None], scores, -torch.inf)
        yield block, scores, scores.diagonal(offset=start, dim1=3, dim2=4)
