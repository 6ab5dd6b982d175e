"""CoDAAR: rows of the codebook hold one block for each modality, and modalities share the index.

A modality m searches its own block E_m, (M, D); its code is a row of all blocks, (n D) for n modalities::

    k = argmin_k |z^m - E_m,k|,   row = [E_1,k ... E_n,k]

Decoders read the row, with the gradient passed on to [z^1 ... z^n] at the same position: each of them trains all
encoders. Each block has a plain EMA with counts of its own. With S(m, o)_k the sum of z^o where m chose row k::

    N_m <- g N_m + (1 - g) n^m,   W_m <- g W_m + (1 - g) sum_o a_mo S(m, o),   B_m = W_m / N_m

with a = 3 / (n + 2) for o = m, else 1 / (n + 2). After that a one-way cascade mixes the blocks: from the last to the
first, each block becomes the mean of all, the later ones already mixed. So E = C B for a fixed C, `cascade(n)`.

Commitment is 0.5 to the own codeword and 0.125 to that of each other modality in its own block. Cross-CPC and code
matching are those of Uni-Code, the latter with each modality's own block; there is no CLUB. The specific encoder of
grids has batch normalisation.

Source:
    "CoDAAR: Cross-Modal Discrete Alignment And Reconstruction", arXiv 2605.12145, and its public code,
    EMuLeMultimodal/CoDAAR. It has a = 3/4, 1/4 for two modalities and 3/5, 1/5, 1/5 for three, in the order video,
    audio, text. Our version:

    * Any number of modalities; blocks are in the order grid, vector, words, and else in that of the model.
    * Where another modality has no feature at a position, because of its length or padding, it has the clip's mean.
    * First codewords are the features of one position in all modalities; with `codebook_init` "uniform" within 1/M.
    * A row is idle by the preset's rule over all modalities. Its blocks are reset together, by the preset's rule.
    * Moments of the batch normalisation are over valid positions and all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from unicode_fast import losses
from unicode_fast.config import Modality, ModelConfig
from unicode_fast.methods.base import Draws
from unicode_fast.methods.recipe import Recipe
from unicode_fast.methods.uni_code import UniCodeMethod
from unicode_fast.modules.codebook import Quantised, straight_through
from unicode_fast.modules.cpc import clip_mean
from unicode_fast.modules.encoders import ModalityEncoder
from unicode_fast.modules.linear import Linear
from unicode_fast.modules.model import CodebookBatch, ModelOutput, UniCode, update_rule
from unicode_fast.ops import (
    BatchShard,
    CodebookState,
    EmaConfig,
    codebook_update,
    codeword_distribution,
    nearest_codeword,
)

# Order of the blocks in a row, by kind; each is mixed after those that follow it.
ORDER = ("grid", "vector", "words")
# Share of a batch's moments in the running ones, and the constant of the normalisation: torch's defaults.
MOMENTUM, SMALLEST_VARIANCE = 0.1, 1e-5


def cascade(modalities: int) -> list[list[float]]:
    """C of the mixture E = C B, (modalities, modalities): rows add up to 1.

    From the last block to the first, each one becomes the mean of all blocks, the later ones already mixed.
    """
    mixed = [[Fraction(int(row == column)) for column in range(modalities)] for row in range(modalities)]
    for place in reversed(range(modalities)):
        mixed[place] = [sum(column, Fraction(0)) / modalities for column in zip(*mixed, strict=True)]
    return [[float(weight) for weight in row] for row in mixed]


def own_share(modalities: int) -> float:
    """Weight of the own feature in the EMA; the others share the rest. It weighs three times another one."""
    return 3 / (modalities + 2)


class BlockCodebook(nn.Module):
    """M rows of blocks, one block of width D for each modality, with an EMA each.

    Buffers: `blocks` (n, M, D), W / N of each modality; `codebook` (n, M, D), their mixture, which is searched and
    read; `ema_count` (n, M), `ema_sum` (n, M, D), `idle` (n, M) int64 and `step` () int64 as in `CodebookState`.

    Args:
        names: the modalities, in the order of the blocks.
        codewords: M.
        width: D.
        rule: of the update; it is joint, since a block has one modality.
        initial_count: initial running count of every block of a row.
    """

    blocks: Tensor
    codebook: Tensor
    ema_count: Tensor
    ema_sum: Tensor
    idle: Tensor
    step: Tensor

    def __init__(
        self, names: tuple[str, ...], codewords: int, width: int, rule: EmaConfig, initial_count: float
    ) -> None:
        super().__init__()
        self.names, self.rule, self.mixture = names, replace(rule, update="joint"), cascade(len(names))
        blocks = torch.empty(len(names), codewords, width).uniform_(-1 / codewords, 1 / codewords)
        self.register_buffer("blocks", blocks)
        self.register_buffer("codebook", torch.empty_like(blocks))
        self.register_buffer("ema_count", torch.full((len(names), codewords), float(initial_count)))
        self.register_buffer("ema_sum", blocks * (initial_count or 1.0))
        self.register_buffer("idle", torch.full((len(names), codewords), -1))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._mix()

    def of(self, name: str) -> Tensor:
        """The block that a modality searches, (M, D)."""
        return self.codebook[self.names.index(name)]

    def part(self, rows: Tensor, name: str) -> Tensor:
        """The block of a modality in rows of all, (..., n D) to (..., D)."""
        return rows.unflatten(-1, (len(self.names), -1))[..., self.names.index(name), :]

    def quantise(self, semantic: Mapping[str, Tensor]) -> dict[str, Quantised]:
        """Codes of z by modality, (..., D): index (...) and row (..., n D), without gradient."""
        found = {}
        for name, z in semantic.items():
            index = nearest_codeword(z.detach(), self.of(name)).index
            rows = self.codebook[:, index].movedim(0, -2).flatten(-2).to(z.dtype)
            found[name] = Quantised(index, rows, rows)
        return found

    @torch.no_grad()
    def initialise(self, rows: Tensor) -> None:
        """Sets the rows before their mixture; counts stay, sums become the block times its count.

        Args:
            rows: (M, n D), on the device of the codebook; finite.

        Raises:
            ValueError: the shape is not (M, n D), or a number is not finite.
        """
        modalities, codewords, width = self.blocks.shape
        if rows.shape != (codewords, modalities * width):
            raise ValueError(f"rows must have shape ({codewords}, {modalities * width}), got {tuple(rows.shape)}")
        if not rows.isfinite().all():
            raise ValueError("rows must be finite, got NaN or Inf")
        self.blocks.copy_(rows.view(codewords, modalities, width).transpose(0, 1))
        count = self.ema_count.unsqueeze(-1)
        self.ema_sum.copy_(self.blocks * torch.where(count > 0, count, 1))
        self._mix()

    @torch.no_grad()
    def update(
        self,
        rows: Mapping[str, Tensor],
        index: Mapping[str, Tensor],
        mask: Mapping[str, Tensor] | None = None,
        own: slice | None = None,
    ) -> None:
        """One update of each block, resets included, then the mixture.

        Args:
            rows: features of all modalities at the positions of each one, (B, T, n D); of the whole batch.
            index: (B, T) by modality.
            mask: (B, T) bool by modality, or None.
            own: the clips of this rank, where ranks share the batch; each rank counts its own codes.
        """
        clips = slice(None) if own is None else own
        others = len(self.names) - 1

        def with_empty(tensor: Tensor) -> list[Tensor]:
            return [tensor, *[tensor[:0]] * others]

        idle = torch.where(self._used(index, mask), 0, self.idle + 1)
        for place, name in enumerate(self.names):
            # The operator resets by the idle counters of all modalities. The others have no rows in this call: it adds
            # one to their counters and changes nothing else.
            counters = torch.cat([self.idle[place : place + 1], idle[:place] - 1, idle[place + 1 :] - 1])
            blocks = rows[name][clips].detach().flatten(0, 1).unflatten(-1, (others + 1, -1))
            partners = torch.cat([blocks[:, :place], blocks[:, place + 1 :]], 1).mean(1)
            shard = None
            if own is not None:
                first, total = own.start * index[name].shape[1], index[name].numel()
                shard = BatchShard([first, *[0] * others], [total, *[0] * others])
            codebook_update(
                CodebookState(
                    self.blocks[place], self.ema_count[place], self.ema_sum[place], counters, self.step.clone()
                ),
                with_empty(blocks[:, place].contiguous()),
                with_empty(index[name][clips].flatten()),
                self.rule,
                partners=with_empty(partners),
                valid=None if mask is None else with_empty(mask[name][clips].flatten()),
                shard=shard,
            )
            self.idle[place].copy_(counters[0])
        self.step += 1
        self._mix()

    def _used(self, index: Mapping[str, Tensor], mask: Mapping[str, Tensor] | None) -> Tensor:
        """Whether a modality chose a row in the batch, (n, M) bool."""
        counts = torch.zeros_like(self.idle)
        for count, name in zip(counts, self.names, strict=True):
            valid = torch.ones_like(index[name]) if mask is None else mask[name].long()
            count.index_add_(0, index[name].flatten(), valid.flatten())
        return counts > 0

    @torch.no_grad()
    def _mix(self) -> None:
        """Sets the codebook to C B, computed in float64."""
        blocks = self.blocks.to(torch.float64)
        for mixed, weights in zip(self.codebook, self.mixture, strict=True):
            mixed.copy_(torch.stack([weight * block for weight, block in zip(weights, blocks, strict=True)]).sum(0))


class BatchNorm(nn.Module):
    """Batch normalisation of maps by moments over valid positions, cells and all ranks that share the batch.

    `forward` changes no buffer. `update` moves the running moments towards those of the last batch in training; it is
    called once per training step, so probes and validations leave them as they are.

    Args:
        channels: of the maps.

    Source:
        Ioffe and Szegedy, "Batch Normalization", ICML 2015.
    """

    running_mean: Tensor
    running_variance: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_variance", torch.ones(channels))
        # Mean and unbiased variance of the last batch.
        self.moments: tuple[Tensor, Tensor] | None = None

    def forward(self, maps: Tensor, valid: Tensor | None) -> Tensor:
        """Maps (N, C, h, w), normalised by moments over the `valid` ones, (N,) bool; None for all."""
        maps = maps.to(self.weight.dtype)
        mean, variance = self.running_mean, self.running_variance
        if self.training:
            weight = maps.new_ones(len(maps)) if valid is None else valid.to(maps.dtype)
            weight = weight.view(-1, 1, 1, 1)
            cells = weight.sum().view(1) * maps[0, 0].numel()
            number, total = sum_over_ranks(torch.cat([cells, (maps * weight).sum((0, 2, 3))])).split([1, len(mean)])
            number = number.clamp(min=1)
            mean = total / number
            variance = sum_over_ranks(((maps - mean[:, None, None]).square() * weight).sum((0, 2, 3))) / number
            self.moments = mean.detach(), variance.detach() * (number / (number - 1).clamp(min=1))
        scale = self.weight * torch.rsqrt(variance + SMALLEST_VARIANCE)
        return (maps - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]

    @torch.no_grad()
    def update(self) -> None:
        """Moves the running moments towards those of the last batch."""
        if self.moments is not None:
            self.running_mean.lerp_(self.moments[0], MOMENTUM)
            self.running_variance.lerp_(self.moments[1], MOMENTUM)
            self.moments = None


def sum_over_ranks(share: Tensor) -> Tensor:
    """Sum over the ranks where torch.distributed is initialised; the gradient is that of the losses of all ranks."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return share
    total: Tensor = _SumOverRanks.apply(share)
    return total


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor) -> Tensor:
        total = share.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class GridMapEncoder(nn.Module):
    """Two 3x3 convolutions without padding, each with batch normalisation and ReLU.

    Args:
        channels: of the grid.
        config: `grid_hidden_width` and `grid_specific_width` are read.
    """

    def __init__(self, channels: int, config: ModelConfig) -> None:
        super().__init__()
        widths = (channels, config.grid_hidden_width, config.grid_specific_width)
        self.convolutions = nn.ModuleList(nn.Conv2d(*pair, 3) for pair in zip(widths[:-1], widths[1:], strict=True))
        self.norms = nn.ModuleList(BatchNorm(width) for width in widths[1:])

    def forward(self, grids: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, H, W, C) and a (B, T) mask to the map (B, T, H-4, W-4, S)."""
        maps = grids.flatten(0, 1).permute(0, 3, 1, 2)
        valid = None if mask is None else mask.flatten()
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            maps = F.relu(norm(convolution(maps), valid))
        return maps.permute(0, 2, 3, 1).unflatten(0, grids.shape[:2])


class CodaarEncoder(ModalityEncoder):
    """The encoders of Uni-Code, but for the specific features of grids; none for CLUB.

    Args:
        modality: kind and shape.
        config: sizes.
    """

    def __init__(self, modality: Modality, config: ModelConfig) -> None:
        super().__init__(modality, config)
        if self.kind == "grid":
            self.specific = GridMapEncoder(modality.shape[-1], config)

    def encode_specific(self, read: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Specific features for the decoder, of a grid those of its re-weighted channels; and zeros, (B, T, 1)."""
        features = self.specific(self.semantic.reweighted(read), mask) if self.kind == "grid" else self.specific(read)
        return features, features.new_zeros(*features.shape[:2], 1)


class RowDecoder(nn.Module):
    """A linear layer from the row to width D, then the decoder of Uni-Code.

    Args:
        row_width: n D.
        width: D.
        decoder: of the modality.
    """

    def __init__(self, row_width: int, width: int, decoder: nn.Module) -> None:
        super().__init__()
        self.row = Linear(row_width, width)
        self.decoder = decoder

    def forward(self, row: Tensor, specific: Tensor) -> Tensor:
        """(B, T, n D) and specific features to the shape of the input."""
        decoded: Tensor = self.decoder(self.row(row), specific)
        return decoded


class CodaarModel(UniCode):
    """Encoders, decoders and Cross-CPC of two or more modalities with a codebook in blocks.

    The vector of a code is its row, (n D). `UniCode` describes the arguments.

    Raises:
        ValueError: as `UniCode`; or `ema_partner` is "attended".
    """

    codebook: BlockCodebook  # type: ignore[assignment]

    def build(self) -> None:
        """Makes the modules of Uni-Code, and replaces those that differ."""
        super().build()
        sizes, method = self.config.model, self.config.method
        if method.ema_partner == "attended":
            raise ValueError("ema_partner must be 'aligned' or 'none' with method 'codaar', got 'attended'")
        # Stable: modalities of a kind keep the model's order.
        blocks = tuple(sorted(self.names, key=lambda name: ORDER.index(self.modalities[name].kind)))
        rule = update_rule(method, self.config.train.seed)
        if method.ema_partner != "none":
            rule = replace(rule, own_weight=own_share(len(blocks)))
        self.codebook = BlockCodebook(blocks, sizes.codewords, sizes.width, rule, method.ema_initial_count)
        self.encoders = nn.ModuleDict({name: CodaarEncoder(kind, sizes) for name, kind in self.modalities.items()})
        for name, decoder in self.decoders.items():
            self.decoders[name] = RowDecoder(len(blocks) * sizes.width, sizes.width, decoder)
        self.club, self.lexicon = nn.ModuleDict(), nn.ModuleDict()

    @property
    def codebooks(self) -> tuple[Tensor, ...]:
        """The block of each modality, (M, D), in the order of a row."""
        return tuple(self.codebook.codebook)

    def quantise(self, output: ModelOutput) -> None:
        """Adds index and row of the semantic features to `output`."""
        super().quantise(output)
        output.quantised.update(self.decoder_inputs(output.semantic, output, output.clips))

    def decoder_inputs(self, vectors: Mapping[str, Tensor], whole: ModelOutput, clips: slice) -> dict[str, Tensor]:
        """Rows (b, T, n D) by modality, with the gradient passed on to the features of all modalities."""
        mask = None if whole.mask is None else {name: valid[clips] for name, valid in whole.mask.items()}
        return {
            name: straight_through(self._beside(name, vectors, mask), whole.codeword[name][clips]) for name in vectors
        }

    def codebook_batch(self, output: ModelOutput) -> CodebookBatch:
        """The features of all modalities at the positions of each one, (B, T, n D), with codes and masks."""
        rows = {name: self._beside(name, output.semantic, output.mask) for name in self.names}
        return CodebookBatch(rows, output.index, output.mask)

    def _beside(self, name: str, vectors: Mapping[str, Tensor], mask: Mapping[str, Tensor] | None) -> Tensor:
        """Features of all modalities at the positions of one, (B, T, n D).

        Another modality without a feature at a position has its mean over the clip.
        """
        parts = []
        for other in self.codebook.names:
            z, valid = vectors[other], None if mask is None else mask[other]
            same = z.shape[1] == vectors[name].shape[1]
            if other == name or (same and valid is None):
                parts.append(z)
                continue
            mean = clip_mean(z, valid).unsqueeze(1).expand(-1, vectors[name].shape[1], -1)
            parts.append(torch.where(valid.unsqueeze(-1), z, mean) if same and valid is not None else mean)
        return torch.cat(parts, -1)

    def update_codewords(self, output: ModelOutput, own: slice | None) -> None:
        """The update of all blocks."""
        self.codebook.update(*self.codebook_batch(output), own)

    @torch.no_grad()
    def update_codebook(self, output: ModelOutput, own: slice | None = None) -> None:
        """As that of `UniCode`, with the running moments of the batch normalisation."""
        super().update_codebook(output, own)
        for module in self.modules():
            if isinstance(module, BatchNorm):
                module.update()


class CodaarMethod(UniCodeMethod):
    """Commitment, Cross-CPC and code matching with codewords of each modality's own block."""

    model: CodaarModel

    def alignment(self, output: ModelOutput, draws: Draws | None = None) -> dict[str, Tensor]:
        """Commitment and code matching."""
        terms: dict[str, Tensor] = {}
        self._commitment(output, terms)
        self._code_matching(output, terms)
        return terms

    def _commitment(self, output: ModelOutput, terms: dict[str, Tensor]) -> None:
        """Distance to the own codeword, and to that of each other modality in the other's block.

        A modality with another number of positions has the mean of its codewords over the clip.
        """
        method, masks = self.config.method, self._masks(output)
        loss = partial(losses.commitment, norm=method.commitment_norm)
        chosen = {name: self.model.codebook.part(output.codeword[name], name) for name in self.model.names}
        for name, valid in masks.items():
            z = output.semantic[name]
            total = method.commitment_own * loss(z, chosen[name], valid)
            for other in self._partners(name):
                codeword, both, seen = chosen[other], valid, masks[other]
                if codeword.shape != z.shape:
                    codeword = clip_mean(codeword, seen).unsqueeze(1)
                elif valid is not None and seen is not None:
                    both = valid & seen
                total = total + method.commitment_partner * loss(z, codeword, both)
            terms[f"commitment.{name}"] = method.commitment_weight * total

    def _distributions(self, output: ModelOutput) -> dict[str, Tensor]:
        """Mean distribution of each clip over the modality's own block, (B, M) by modality."""
        temperature = self.config.method.code_matching_temperature
        return {
            name: codeword_distribution(
                output.semantic[name], self.model.codebook.of(name), valid=valid, temperature=temperature
            )
            for name, valid in self._masks(output).items()
        }


# `commitment_partner` is the factor of each other modality, 0.25 x 0.5; the errors are averaged over D.
RULES: Mapping[str, Any] = {
    "ema_partner": "aligned",
    "reconstruction_weight": 1.0,
    "commitment_weight": 0.25,
    "commitment_own": 2.0,
    "commitment_partner": 0.5,
    "commitment_partners": "all",
    "commitment_norm": "mean",
    "club_estimator": "none",
    "code_matching_weight": 0.5,
    "assignment_weight": 0.0,
    "presence_weight": 0.0,
    "grounding_weight": 0.0,
}
RECIPE: Recipe = Recipe("CoDAAR", RULES, model=CodaarModel, method=CodaarMethod, micro_batches=False)
