"""Loss terms as pure functions of tensors; their weights are fields of the configuration."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unicode_fast.modules import host
from unicode_fast.modules.absent import mean_over
from unicode_fast.modules.linear import linear

# Inside the logarithm and in the denominator of the released code matching loss.
OFFICIAL_LOG_OFFSET = 1e-10
OFFICIAL_SUM_OFFSET = 1e-5
# Temperature of soft assignments. A codeword nearer by this mean squared error than another is e times as likely.
ASSIGNMENT_TEMPERATURE = 0.05
# Slope of a word's grounding weight, per nat of information about the clip's codewords.
GROUNDING_SLOPE = 2.0


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the valid positions and all trailing elements.

    Args:
        values: (B, T, ...).
        mask: (B, T) bool, or None where every position is valid.

    Returns:
        A scalar; 0 where no position is valid.
    """
    if mask is None:
        return values.mean()
    means = values.flatten(2).mean(2) if values.dim() > 2 else values
    return torch.where(mask, means, 0).sum() / mask.sum().clamp(min=1)


def reconstruction(decoded: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error over the elements of valid positions; paper section 3.2.

    Args:
        decoded: (B, T, ...).
        target: the same shape.
        mask: (B, T) bool, or None.
    """
    if host.has_operators(decoded) and target.dtype == decoded.dtype:
        error: Tensor = torch.ops.unicode_fast_layers.squared_error(decoded, target, mask)
        return error
    return masked_mean((decoded - target).square(), mask)


def commitment(semantic: Tensor, codeword: Tensor, mask: Tensor | None = None, *, norm: str = "mean") -> Tensor:
    """Squared distance of features to fixed codewords, over valid positions; one term of Eq. 8.

    Args:
        semantic: z, (B, T, D).
        codeword: (B, T, D), the own or a partner's codewords; gets no gradient.
        mask: (B, T) bool, or None.
        norm: "mean" averages the squared differences over D, "sum" adds them.
    """
    squared = (semantic - codeword.detach()).square()
    return masked_mean(squared.mean(-1) if norm == "mean" else squared.sum(-1), mask)


def club_likelihood(mean: Tensor, log_variance: Tensor, specific: Tensor, mask: Tensor | None = None) -> Tensor:
    """Negative log likelihood of a CLUB network, up to a constant.

    Args:
        mean: of q(y | x), (B, T, C).
        log_variance: of q(y | x), (B, T, C).
        specific: y, (B, T, C).
        mask: (B, T) bool, or None.

    Returns:
        The mean over valid positions of the sum over channels.
    """
    terms = ((mean - specific).square() * torch.exp(-log_variance) + log_variance) / 2
    return masked_mean(terms.sum(-1), mask)


def club_official(
    mean: Tensor, log_variance: Tensor, specific: Tensor, permutation: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The mutual information estimate of the released code.

    It averages squared error and log variance over time, and divides the error by the exponential of the log variance.
    The negatives are one permutation of the batch, fixed points included.

    Args:
        mean: (B, T, C).
        log_variance: (B, T, C).
        specific: y, (B, T, C).
        permutation: (B,) int64, the negative of each clip.
        mask: (B, T) bool, or None; a negative counts where both clips are valid, a clip where its negative does.
    """

    def over_time(values: Tensor, valid: Tensor | None) -> Tensor:
        if valid is None:
            return values.mean(1)
        weight = valid.unsqueeze(-1).to(values.dtype)
        return (values * weight).sum(1) / weight.sum(1).clamp(min=1)

    spread = torch.exp(over_time(log_variance, mask))  # (B, C)
    both = None if mask is None else mask & mask[permutation]
    positive = -over_time((mean - specific).square(), mask) / spread
    negative = -over_time((mean - specific[permutation]).square(), both) / spread
    return mean_over((positive - negative).sum(-1), None if both is None else both.any(1)) / 2


def club_closed_form(
    mean: Tensor, log_variance: Tensor, specific: Tensor, mask: Tensor | None = None, *, reduction: str = "sum"
) -> Tensor:
    """The CLUB bound over all pairs of clips, without forming the pairs; Eq. 5.

    At each position, mean_j (y_j - mu_i)^2 = (mu_i - ybar)^2 + Var(y), so the
    average over negatives needs only the first two moments of y. The centred
    form keeps its precision in float32.

    Args:
        mean: mu(x), (B, T, C).
        log_variance: (B, T, C).
        specific: y, (B, T, C).
        mask: (B, T) bool, or None; moments and means are over valid positions.
        reduction: channels are added ("sum") or averaged ("mean").

    Returns:
        The mean over valid positions of log q(y_i | x_i) - mean_j log q(y_j | x_i).
    """
    if mask is None:
        centre = specific.mean(0)  # (T, C)
        spread = (specific - centre).square().mean(0)
    else:
        weight = mask.unsqueeze(-1).to(specific.dtype)
        count = weight.sum(0).clamp(min=1)  # (T, 1)
        centre = (specific * weight).sum(0) / count
        spread = ((specific - centre).square() * weight).sum(0) / count
    gap = (mean - centre).square() + spread - (specific - mean).square()
    terms = gap * torch.exp(-log_variance) / 2
    return masked_mean(terms.sum(-1) if reduction == "sum" else terms.mean(-1), mask)


def assignment_scores(semantic: Tensor, codebook: Tensor) -> Tensor:
    """Logits of a soft assignment: minus the mean squared difference over D, divided by `ASSIGNMENT_TEMPERATURE`.

    Args:
        semantic: z, (B, T, D).
        codebook: (M, D), without gradient.

    Returns:
        (B, T, M).

    Precision:
        That of the inputs, under autocast too.
    """
    with torch.autocast(semantic.device.type, enabled=False):
        factor = -1 / (ASSIGNMENT_TEMPERATURE * semantic.shape[-1])
        products = linear(semantic, codebook * (-2 * factor), codebook.square().sum(-1) * factor)
        return products + semantic.square().sum(-1, keepdim=True) * factor


def soft_cross_entropy(scores: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of a distribution over codewords and the softmax of scores.

    Args:
        scores: logits, (..., M).
        target: (..., M), without gradient.

    Returns:
        (...), nats.
    """
    if host.has_operators(scores):
        rows = scores.flatten(0, -2), target.to(scores.dtype).flatten(0, -2)
        return torch.ops.unicode_fast_layers.soft_cross_entropy(*rows).view(scores.shape[:-1])
    return -(target * scores.log_softmax(-1)).sum(-1)


@torch.no_grad()
def balanced_assignment(
    scores: Tensor,
    weights: Tensor | None = None,
    *,
    totals: Tensor | None = None,
    sharpness: float = 2.0,
    rounds: int = 3,
) -> Tensor:
    """Soft assignment of rows to codewords with given totals per codeword, by the algorithm of Sinkhorn and Knopp.

    Args:
        scores: logits, (N, M).
        weights: (N,), weight of each row, bool or float, or None for equal weights; the result is undefined for rows of
            weight 0.
        totals: (M,), the codewords' uses, up to a factor; None for equal ones.
        sharpness: factor of the scores.
        rounds: number of times that columns and then rows are scaled to these sums.

    Returns:
        (N, M) without gradient; rows add up to 1.

    Source:
        Asano, Rupprecht and Vedaldi, ICLR 2020; Caron et al., "SwAV", NeurIPS 2020.
    """
    if host.has_operators(scores):
        given = (None if each is None else each.to(scores.dtype) for each in (weights, totals))
        return torch.ops.unicode_fast_layers.balanced_assignment(scores, *given, sharpness, rounds)
    logits = scores * sharpness
    log_totals = 0 if totals is None else totals.clamp(min=1e-6).log()
    for _ in range(rounds):
        counted = logits if weights is None else logits + weights.to(logits.dtype).log().unsqueeze(1)
        # If all weights are 0, a column adds up to 0.
        logits = logits + (log_totals - counted.logsumexp(0).nan_to_num(neginf=0.0))
        logits = logits - logits.logsumexp(1, keepdim=True)
    return logits.softmax(1)


def presence(used: Tensor, scores: Tensor, mask: Tensor | None = None, clips: Tensor | None = None) -> Tensor:
    """Loss for codewords to occur in a clip: minus sum_k P_k log(1 - prod_t (1 - p_tk)), mean over clips.

    One position with a codeword suffices; the others may have any. So words of a sentence get codewords of the clip's
    other modalities, and these modalities get the codewords of words.

    Args:
        used: P, (B, M), the codewords that should occur; gets no gradient. Its sum may be below one.
        scores: logits of p, (B, T, M).
        mask: (B, T) bool, or None.
        clips: (B,) bool, the clips that count, or None.

    Source:
        The noisy-or of multiple-instance learning, Maron and Lozano-Perez, NeurIPS 1997.
    """
    if host.has_operators(scores):
        return mean_over(torch.ops.unicode_fast_layers.presence(used.detach().to(scores.dtype), scores, mask), clips)
    # The clamp keeps the slope of the logarithm finite.
    missing = torch.log1p(-scores.softmax(-1).clamp(max=1 - 1e-4))
    if mask is not None:
        missing = torch.where(mask.unsqueeze(-1), missing, 0)
    held = -torch.expm1(missing.sum(1))  # (B, M)
    return mean_over(-(used.detach() * (held + 1e-6).log()).sum(1), clips)


class Grounding(NamedTuple):
    """Results of a lexicon for the words of a batch.

    Attributes:
        surprise: (B, T), nats, cross-entropy between the clip's codewords and the lexicon's prediction from the word.
        weight: (B, T) in 0..1, without gradient: how well the word predicts the other modalities' codewords.
        meaning: (B, T, M), without gradient, distribution of the word over codewords of the clip.
    """

    surprise: Tensor
    weight: Tensor
    meaning: Tensor


def grounding(expected: Tensor, used: Tensor, average: Tensor, mask: Tensor | None = None) -> Grounding:
    """Grounding of words: how well a word predicts the codewords of the other modalities, and which of them it means.

    A grounded word predicts the clip's codewords better than their average over clips does. A word with g nats less
    surprise than the average has weight 1 - exp(-2 g).

    Args:
        expected: log probabilities of the codewords, predicted by a lexicon from each word, (B, T, M).
        used: distribution of the clip's other modalities over the codewords, (B, M), without gradient.
        average: mean of `used` over clips, (M,).
        mask: (B, T) bool, or None.

    Source:
        Model 1 of Brown et al., "The Mathematics of Statistical Machine Translation", 1993, with codewords as the
        second language, trained by gradient descent.
    """
    surprise = -(used.unsqueeze(1) * expected).sum(-1)
    with torch.no_grad():
        by_average = -(used * (average + 1e-6).log()).sum(-1, keepdim=True)  # (B, 1)
        weight = -torch.expm1(-GROUNDING_SLOPE * (by_average - surprise).clamp(min=0))
        if mask is not None:
            weight = torch.where(mask, weight, 0)
        meaning = (used.clamp(min=1e-9).log().unsqueeze(1) + expected).softmax(-1)
    return Grounding(surprise, weight, meaning)


def code_matching(
    first: Tensor,
    second: Tensor,
    *,
    pairing: str = "symmetric",
    directions: str = "both",
    valid: Tensor | None = None,
) -> Tensor:
    """The code matching loss: each clip identifies its partner among the batch by their codewords.

    With P the distributions over codewords, the score of clips i and j is
    S_ij = sum_k P1_ik log P2_jk + sum_k P2_jk log P1_ik. The loss is the
    cross-entropy of the diagonal.

    Args:
        first: (..., B, M), rows sum to one.
        second: (..., B, M), the same clips in another modality.
        pairing: "symmetric" as above; "official" takes sum_k P2_ik log P1_jk
            as the second term and adds 1e-5 to the sum of exponentials, as released.
        directions: softmax along "rows" only, or the mean of rows and columns
            ("both").
        valid: (..., B) bool, the clips that both modalities have, or None for all. The others are neither positives nor
            negatives.

    Returns:
        The loss of each pair of modalities, (...), mean over the clips that count; 0 where none does.

    Precision:
        That of the inputs, under autocast too.
    """
    with torch.autocast(first.device.type, enabled=False):
        log_first, log_second = ((used + OFFICIAL_LOG_OFFSET).log() for used in (first, second))
        scores = first @ log_second.mT  # (..., B, B)
        if pairing == "official":
            scores = scores + second @ log_first.mT
            counted = scores if valid is None else scores.masked_fill(~_both(valid), torch.inf)
            # Without a clip that counts, any finite number.
            scores = scores - counted.amin((-2, -1), keepdim=True).nan_to_num(posinf=0.0)
            offset = scores.new_full((), OFFICIAL_SUM_OFFSET).log()
        else:
            scores = scores + log_first @ second.mT
        if valid is not None:
            scores = scores.masked_fill(~_both(valid), torch.finfo(scores.dtype).min)
        sums = [scores.logsumexp(axis) for axis in (-1, -2)]
        if pairing == "official":
            sums = [torch.logaddexp(each, offset) for each in sums]
        along, across = (mean_over(each - scores.diagonal(dim1=-2, dim2=-1), valid, -1) for each in sums)
        return along if directions == "rows" else (along + across) / 2


def _both(valid: Tensor) -> Tensor:
    """(..., B, B), the pairs of clips that count, from (..., B)."""
    return valid.unsqueeze(-1) & valid.unsqueeze(-2)


def info_nce(queries: Tensor, keys: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
    """InfoNCE of all pairs of modalities, for each query: -log softmax_j(cos(q_i, k_j) / temperature) at j = i.

    A query that is zero has cosine 0 with each key, so its loss is the logarithm of their number, without a gradient.

    Args:
        queries: (M, ..., N, D), M modalities.
        keys: (L, ..., N, D), L modalities; row i has the key of query i, the other rows are its negatives.
        temperature: positive.
        valid: (L, ..., N) bool, the keys that count, or None. The loss of a query whose own key does not is undefined.

    Returns:
        (M, L, ..., N).

    Source:
        van den Oord, Li and Vinyals, arXiv 1807.03748, Eq. 4, with cosines as scores.
    """
    scores = torch.einsum("m...td,l...sd->ml...ts", F.normalize(queries, dim=-1), F.normalize(keys, dim=-1))
    scores = scores / temperature
    if valid is not None:
        scores = scores.masked_fill(~valid.unsqueeze(-2), torch.finfo(scores.dtype).min)
    return scores.logsumexp(-1) - scores.diagonal(dim1=-2, dim2=-1)
