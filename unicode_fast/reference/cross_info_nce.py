"""The contrastive loss over all pairs of modalities and prediction steps, and its gradient, in plain PyTorch."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Number of scores in memory at a time, 2 MiB in float32; the paper's batch of 80 needs one chunk.
CHUNK_ELEMENTS = 2**19


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
    valid: Tensor | None  # (modalities, K, B)
    counted: Tensor  # (target, source, K, Q), queries valid on both sides
    temperature: Tensor  # ()
    over_candidates: list[bool]  # one entry for each softmax; the second exchanges queries and keys
    offset: int


class _Block(NamedTuple):
    """The scores of some queries of every modality with all keys."""

    rows: slice  # of the queries
    number: int  # of all queries
    first_clip: int
    queries: Tensor  # (K, modalities block, D)
    keys: Tensor  # (K, modalities B, D)
    scores: Tensor  # (K, query, block, key, B)

    def diagonal(self, scores: Tensor) -> Tensor:
        """A view of the clips' scores with themselves, (K, query, block, key)."""
        return scores.diagonal(offset=self.first_clip, dim1=2, dim2=4).transpose(2, 3)


class _Sums:
    """Products of the loss's slopes in the scores, by softmax: with keys for the rows of each block, with rows."""

    def __init__(self, softmaxes: int) -> None:
        self.in_queries: list[Tensor | None] = [None] * softmaxes  # (K, query, Q, D)
        self.in_keys: list[Tensor | None] = [None] * softmaxes  # (K, key, B, D)

    def add(self, softmax: int, likelihood: Tensor, coefficient: Tensor, block: _Block) -> None:
        """Add a block.

        Args:
            softmax: its number.
            likelihood: the log softmax, (K, query, block, key, B); overwritten.
            coefficient: of the loss of each clip, (K, query, block, key).
            block: of the scores.
        """
        steps, modalities, size, _, clips = likelihood.shape
        slope = likelihood.exp_()
        block.diagonal(slope).sub_(1)
        # A clip that does not count may have a softmax of NaN.
        slope.mul_(coefficient[..., None]).masked_fill_((coefficient == 0)[..., None], 0)
        flat = slope.view(steps, modalities * size, modalities * clips)
        of_rows = (flat @ block.keys).view(steps, modalities, size, -1)
        in_queries = self.in_queries[softmax]
        if size == block.number:
            self.in_queries[softmax] = of_rows
        else:
            if in_queries is None:
                in_queries = of_rows.new_empty(steps, modalities, block.number, of_rows.shape[3])
                self.in_queries[softmax] = in_queries
            in_queries[:, :, block.rows] = of_rows
        in_keys = (flat.transpose(1, 2) @ block.queries).view(steps, modalities, clips, -1)
        before = self.in_keys[softmax]
        self.in_keys[softmax] = in_keys if before is None else before.add_(in_keys)

    def total(self, prepared: _Prepared) -> tuple[Tensor, Tensor]:
        """Sums for queries and keys of the first softmax, in their shapes."""
        totals: list[Tensor] = []
        for softmax, (in_queries, in_keys) in enumerate(zip(self.in_queries, self.in_keys, strict=True)):
            if in_queries is None or in_keys is None:  # no clips
                return torch.zeros_like(prepared.queries), torch.zeros_like(prepared.keys)
            mine = [x.transpose(0, 1) for x in _in_order(in_queries, in_keys, softmax)]
            totals = [x + y for x, y in zip(totals, mine, strict=True)] if totals else mine
        return totals[0], totals[1]


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
        Copies of the inputs and a few times max(2^19, modalities^2 K B) scores.

    Source:
        van den Oord et al., 2018; Xia et al., NeurIPS 2023, Eq. 6 ("candidates") and its released code
        ("predictions").
    """
    return _losses(_prepare(inputs), inputs, None)


def cross_info_nce_with_gradient_reference(inputs: CrossInfoNCEInputs) -> tuple[Tensor, ...]:
    """The loss and its gradient in one pass over the scores.

    Args:
        inputs: as in `cross_info_nce_reference`.

    Returns:
        loss, pair_loss and hits of `cross_info_nce_reference`, and the results of `cross_info_nce_backward_reference`
        for a gradient of 1 in the loss.

    Memory:
        Copies of the inputs and a few times max(2^19, modalities^2 K B) scores.
    """
    prepared = _prepare(inputs)
    sums = _Sums(len(prepared.over_candidates))
    return (*_losses(prepared, inputs, sums)[:3], *_gradients(sums, prepared, inputs))


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
        Copies of the inputs and a few times max(2^19, modalities^2 K B) scores.
    """
    prepared = _prepare(inputs)
    weights = gradient.to(clip_weights.dtype) * clip_weights
    sums = _Sums(len(prepared.over_candidates))
    for softmax, of_clips in enumerate(logsumexp):
        coefficient = _coefficient(prepared, weights, softmax)
        row_logsumexp = _by_row(_exchanged(of_clips, prepared.over_candidates[softmax]))[..., None]
        for block in _score_blocks(prepared, softmax):
            likelihood = block.scores - row_logsumexp[:, :, block.rows]
            sums.add(softmax, likelihood, coefficient[:, :, block.rows], block)
    return _gradients(sums, prepared, inputs)


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
        counted = queries.new_ones((len(keys), *keys.shape[:2], queries.shape[2]), dtype=torch.bool)
        queries, keys = queries.to(dtype), keys.to(dtype)
    else:
        query_valid = valid[:, :, inputs.offset : inputs.offset + queries.shape[2]]
        counted = query_valid[:, None] & query_valid[None]
        # where() and not a product: vectors that are not valid may hold NaN.
        queries = torch.where(query_valid[..., None], queries.to(dtype), 0)
        keys = torch.where(valid[..., None], keys.to(dtype), 0)
    over_candidates = {"predictions": [False], "candidates": [True], "both": [False, True]}[inputs.softmax_over]
    return _Prepared(queries, keys, valid, counted, inputs.temperature.to(dtype), over_candidates, inputs.offset)


def _losses(
    prepared: _Prepared, inputs: CrossInfoNCEInputs, sums: _Sums | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The results of `cross_info_nce_reference`; with `sums` the gradients are added to them."""
    number, weights = numbers_and_weights(inputs)
    results = [_one_softmax(prepared, softmax, weights, sums) for softmax in range(len(prepared.over_candidates))]
    losses, logsumexps, hits = zip(*results, strict=True)
    total = torch.stack(losses).mean(dim=0).sum(dim=3)  # (target, source, K)
    loss = torch.where(weights != 0, weights * total, 0).sum()
    return loss, total / number.clamp(min=1), hits[0], torch.stack(logsumexps), weights


def _one_softmax(
    prepared: _Prepared, softmax: int, weights: Tensor, sums: _Sums | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each clip and logsumexps, (target, source, K, Q), and hits, (target, source, K).

    With `sums` logsumexps are zeros, and gradients are added.
    """
    over_candidates, counted = prepared.over_candidates[softmax], prepared.counted
    coefficient = _coefficient(prepared, weights, softmax)
    lost, logsumexp = torch.zeros_like(coefficient), torch.zeros_like(coefficient)
    hit = torch.zeros_like(coefficient, dtype=torch.bool)
    for block in _score_blocks(prepared, softmax):
        own = block.diagonal(block.scores)
        clips = torch.arange(block.first_clip, block.first_clip + own.shape[2], device=own.device)
        hit[:, :, block.rows] = block.scores.argmax(dim=4) == clips[:, None]
        if sums is None:
            logsumexp[:, :, block.rows] = block.scores.logsumexp(dim=4)
            lost[:, :, block.rows] = logsumexp[:, :, block.rows] - own
        else:
            likelihood = block.scores.log_softmax(dim=4)
            lost[:, :, block.rows] = -block.diagonal(likelihood)
            sums.add(softmax, likelihood, coefficient[:, :, block.rows], block)
    # From (K, query, Q, key).
    by_pair = (_exchanged(x.permute(1, 3, 0, 2), over_candidates) for x in (lost, logsumexp, hit))
    loss, logsumexp, hit = (torch.where(counted, x, 0) for x in by_pair)
    return loss, logsumexp, hit.sum(dim=3)


def _coefficient(prepared: _Prepared, weights: Tensor, softmax: int) -> Tensor:
    """Factors of slopes, (K, query, Q, key), from the weights of clips in the loss, (target, source, K)."""
    factor = weights / (len(prepared.over_candidates) * prepared.temperature)
    of_clips = torch.where(prepared.counted, factor[..., None], 0)
    return _by_row(_exchanged(of_clips, prepared.over_candidates[softmax]))


def _gradients(sums: _Sums, prepared: _Prepared, inputs: CrossInfoNCEInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in targets, predictions and temperature from the sums of all blocks."""
    # Contiguous like the fakes of the operator's results, whatever the strides of the inputs.
    in_queries, in_keys = (x.contiguous() for x in sums.total(prepared))
    in_targets, in_predictions = _in_order(in_queries, in_keys, inputs.softmax_over == "candidates")
    # The slopes times the scores, added up over the keys first.
    in_temperature = -torch.dot(prepared.queries.reshape(-1), in_queries.view(-1)) / prepared.temperature
    return (
        in_targets.to(inputs.targets.dtype),
        in_predictions.to(inputs.predictions.dtype),
        in_temperature.to(inputs.temperature.dtype),
    )


def _by_row(by_pair: Tensor) -> Tensor:
    """(query, key, K, Q) as (K, query, Q, key)."""
    return by_pair.permute(2, 0, 3, 1)


def _in_order(first: Tensor, second: Tensor, exchange: int) -> tuple[Tensor, Tensor]:
    return (second, first) if exchange else (first, second)


def _exchanged(by_pair: Tensor, exchange: bool) -> Tensor:
    """(target, source, ...) as (source, target, ...), or back."""
    return by_pair.transpose(0, 1) if exchange else by_pair


def _score_blocks(prepared: _Prepared, softmax: int) -> Iterator[_Block]:
    """Blocks of rows of the scores of all pairs; -inf at keys not valid."""
    queries, keys = _in_order(prepared.queries, prepared.keys, softmax)
    modalities, steps, number, width = queries.shape
    clips = keys.shape[2]
    flat_keys = keys.transpose(0, 1).reshape(steps, modalities * clips, width)
    size = max(1, CHUNK_ELEMENTS // max(1, modalities**2 * steps * clips))
    for start in range(0, number, size):
        rows = slice(start, min(start + size, number))
        flat = queries[:, :, rows].transpose(0, 1).reshape(steps, -1, width)
        scores = (flat / prepared.temperature) @ flat_keys.transpose(1, 2)
        scores = scores.view(steps, modalities, rows.stop - start, modalities, clips)
        if prepared.valid is not None:
            scores.masked_fill_(~prepared.valid.transpose(0, 1)[:, None, None], -torch.inf)
        yield _Block(rows, number, prepared.offset + start, flat, flat_keys, scores)
