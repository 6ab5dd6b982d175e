"""MICU: contrastive losses with masked queries (FCMI), and a jigsaw of codewords of all modalities (CUJP).

One mask w of positions is drawn for all modalities. Each modality's features z find those of every modality n, its own
included, at the same position among the positions of the clip, and by their means among the clips of the batch:

    L_fine   = sum_{m,n} mean_{b,t} -log softmax_s(cos(w_bt z^m_bt, z^n_bs) / tau) at s = t
    L_coarse = sum_{m,n} mean_b     -log softmax_j(cos(mean_t w_bt z^m_bt, mean_t z^n_jt) / tau) at j = b

A masked query is the zero vector. It adds the logarithm of the number of keys and no gradient.

For the jigsaw, quantised vectors are cut into parts along D. For each part a modality is drawn, for the whole batch.
The parts are put together in P orders, and a classifier recognises the order:

    L_jig = mean_{b,t} mean_p -log softmax(classifier(order p of the parts)) at p

Source:
    Huang et al., "Open-set Cross Modal Generalization via Multimodal Unified Representation", ICCV 2025, and its
    released code. As released: mask 0.3, tau 0.1, cosine, softmax along rows, pairs added with weight 1, two parts, two
    orders, a hidden layer of 512; encoders, codebook, MM-EMA and commitment of Uni-Code; neither CLUB, Cross-CPC nor
    code matching.
    Our version: padding is neither query nor key nor jigsaw, and a clip's mean is over its valid positions. Only
    modalities with the same number of positions are compared by position. The jigsaw has the valid positions of the
    first modality with the most frequent number of positions. There, a modality without features has its mean over the
    clip. The classifier's gradient is clipped like that of every group.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from unicode_fast import losses
from unicode_fast.config import Config, Modality
from unicode_fast.methods.recipe import WITHOUT_DCID, WITHOUT_SHARING, Recipe
from unicode_fast.modules.alignment import Alignment, Draw
from unicode_fast.modules.cpc import at_positions, clip_mean
from unicode_fast.modules.linear import Linear
from unicode_fast.modules.model import ModelOutput, UniCode

# Streams of the counter-based generator.
MASK_STREAM, JIGSAW_STREAM = 220, 221


class Micu(Alignment):
    """FCMI as terms of the batch, CUJP as a term of the clips.

    Raises:
        ValueError: `micu_mask` is 1.
    """

    def __init__(self, modalities: Mapping[str, Modality], config: Config) -> None:
        super().__init__(modalities, config)
        method = config.method
        if method.micu_mask == 1:
            raise ValueError("micu_mask must be below 1, because masked queries have no gradient, got 1.0")
        self.jigsaw: Jigsaw | None = None
        if method.jigsaw_parts > 1:
            sizes = (method.jigsaw_parts, method.jigsaw_permutations, method.jigsaw_hidden)
            self.jigsaw = Jigsaw(config.model.width, *sizes, seed=config.train.seed)

    def batch_terms(self, model: UniCode, output: ModelOutput, draw: Draw) -> dict[str, Tensor]:
        """The terms "micu.fine" and "micu.coarse"."""
        method, semantic, masks = self.config.method, output.semantic, output.mask
        clips, longest = len(semantic[self.names[0]]), max(z.shape[1] for z in semantic.values())
        kept = draw(MASK_STREAM, (clips, longest)) >= method.micu_mask
        fine = []
        for length in dict.fromkeys(z.shape[1] for z in semantic.values()):
            names = [name for name in self.names if semantic[name].shape[1] == length]
            valid = None if masks is None else torch.stack([masks[name] for name in names])
            z = torch.stack([semantic[name] for name in names])
            fine.append(fine_contrast(z, kept[:, :length], method.micu_temperature, valid))
        means, queries = [], []
        for name, z in semantic.items():
            valid = None if masks is None else masks[name]
            means.append(clip_mean(z, valid))
            queries.append(clip_mean(z, kept[:, : z.shape[1]] if valid is None else kept[:, : z.shape[1]] & valid))
        coarse = losses.info_nce(torch.stack(queries), torch.stack(means), method.micu_temperature)
        return {
            "micu.fine": method.align_weight * torch.stack(fine).sum(),
            "micu.coarse": method.align_weight * coarse.mean(-1).sum(),
        }

    def clip_terms(
        self, model: UniCode, output: ModelOutput, draw: Draw, shares: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        """The term "micu.jigsaw", unless `jigsaw_parts` is 1."""
        if self.jigsaw is None:
            return {}
        lengths = {name: output.quantised[name].shape[1] for name in self.names}
        positions = Counter(lengths.values()).most_common(1)[0][0]
        first = next(name for name, length in lengths.items() if length == positions)
        masks = {name: None if output.mask is None else output.mask[name] for name in self.names}
        vectors = [at_positions(output.quantised[name], masks[name], positions) for name in self.names]
        numbers = draw(JIGSAW_STREAM, (self.jigsaw.parts,)) * len(self.names)
        # A draw in float32 may round to 1.
        drawn = numbers.long().clamp(max=len(self.names) - 1)
        error = losses.masked_mean(self.jigsaw(torch.stack(vectors), drawn), masks[first])
        weighted = self.config.method.align_weight * error
        return {"micu.jigsaw": weighted if shares is None else shares[first] * weighted}


def fine_contrast(semantic: Tensor, kept: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
    """L_fine of modalities with the same number of positions.

    Args:
        semantic: z, (M, B, T, D), M modalities.
        kept: (B, T) bool, the queries that are not masked.
        temperature: tau.
        valid: (M, B, T) bool, or None. A position counts where it is valid in both modalities; the loss is the mean
            over these positions of a clip, then over clips.

    Returns:
        (), the sum over ordered pairs.
    """
    queries = semantic * kept.unsqueeze(-1).to(semantic.dtype)
    errors = losses.info_nce(queries, semantic, temperature, valid)  # (M, M, B, T)
    if valid is None:
        return errors.mean((-2, -1)).sum()
    both = valid.unsqueeze(1) & valid
    by_clip = torch.where(both, errors, 0).sum(-1) / both.sum(-1).clamp(min=1)
    return by_clip.mean(-1).sum()


class Jigsaw(nn.Module):
    """A classifier that recognises the order of a vector's parts; CUJP.

    Args:
        width: D.
        parts: a divisor of D, 2 to 20.
        permutations: P, the number of orders, at most parts!.
        hidden: width of the hidden layer.
        seed: chooses the orders.

    Raises:
        ValueError: a size does not fit the others.
    """

    permutations: Tensor

    def __init__(self, width: int, parts: int, permutations: int, hidden: int, *, seed: int) -> None:
        super().__init__()
        if width % parts:
            raise ValueError(f"jigsaw_parts must be a divisor of width ({width}), got {parts}")
        if permutations > math.factorial(parts):
            raise ValueError(
                f"jigsaw_permutations must be at most {math.factorial(parts)}, the orders of {parts} parts, "
                f"got {permutations}"
            )
        self.parts = parts
        ranks = random.Random(seed).sample(range(math.factorial(parts)), permutations)
        self.register_buffer("permutations", torch.tensor([_permutation(rank, parts) for rank in ranks]))
        self.classifier = nn.Sequential(Linear(width, hidden), nn.ReLU(), Linear(hidden, permutations))

    def forward(self, vectors: Tensor, drawn: Tensor) -> Tensor:
        """The cross-entropy of the classifier at each position, mean over the orders.

        Args:
            vectors: (M, B, T, D), M modalities.
            drawn: (parts,) int64, the modality of each part.

        Returns:
            (B, T).
        """
        pieces = vectors.unflatten(-1, (self.parts, -1)).movedim(-2, 1).flatten(0, 1)  # (M·parts, B, T, D/parts)
        chosen = pieces.index_select(0, drawn * self.parts + torch.arange(self.parts, device=drawn.device))
        ordered = chosen.index_select(0, self.permutations.flatten()).unflatten(0, self.permutations.shape)
        logits = self.classifier(ordered.movedim(1, -2).flatten(-2))  # (P, B, T, P)
        return -logits.log_softmax(-1).diagonal(dim1=0, dim2=-1).mean(-1)


def _permutation(rank: int, parts: int) -> list[int]:
    """The permutation of a rank in lexicographic order."""
    left, order = list(range(parts)), []
    for size in range(parts - 1, -1, -1):
        place, rank = divmod(rank, math.factorial(size))
        order.append(left.pop(place))
    return order


RECIPE: Recipe = Recipe("MICU", {**WITHOUT_DCID, **WITHOUT_SHARING}, alignment=Micu)
