"""The codebook that all modalities share, and its MM-EMA update."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unicode_fast.config import MethodConfig, ModelConfig
from unicode_fast.modules.cpc import clip_mean
from unicode_fast.ops import (
    BatchShard,
    CodebookState,
    PreparedCodebook,
    RevivalDraws,
    UpdateRule,
    codebook_update,
    nearest_codeword,
)

# Half width of the uniform initial codewords, whatever the size of the codebook, as released.
UNIFORM_INIT = 1 / 400


class Quantised(NamedTuple):
    """Codewords chosen for a batch of one modality.

    index (B, T) int64; codeword (B, T, D) without gradient; vector (B, T, D)
    equal to the codeword, its gradient passed straight through to the features.
    """

    index: Tensor  # type: ignore[assignment]
    codeword: Tensor
    vector: Tensor


class Codebook(nn.Module):
    """M codewords of width D, with running counts and sums, and idle counters per modality.

    Args:
        names: the modalities, in the order of the sequential EMA.
        config: `codewords` and `width` are read.
        method: the `ema_` and `revive_` fields are read, and `unequal_lengths`.
        seed: of the draws that revive codewords.
    """

    codebook: Tensor
    ema_count: Tensor
    ema_sum: Tensor
    idle: Tensor
    step: Tensor

    def __init__(self, names: tuple[str, ...], config: ModelConfig, method: MethodConfig, seed: int) -> None:
        super().__init__()
        self.names = names
        self.partner = method.ema_partner
        self.rule = UpdateRule(
            decay=method.ema_decay,
            epsilon=method.ema_epsilon,
            own_weight=1.0 if method.ema_partner == "none" else method.ema_own_weight,
            update=method.ema_update,
            smoothing=method.ema_smoothing,
            revive_after=method.revive_after,
            revive_unless=method.revive_unless,
            revive_source=method.revive_source,
            revive_noise=method.revive_noise,
            revive_active_within=method.revive_active_within,
            revive_ema=method.revive_ema,
            seed=seed,
        )
        codebook = torch.empty(config.codewords, config.width).uniform_(-UNIFORM_INIT, UNIFORM_INIT)
        self.register_buffer("codebook", codebook)
        self.register_buffer("ema_count", torch.full((config.codewords,), method.ema_initial_count))
        self.register_buffer("ema_sum", codebook * (method.ema_initial_count or 1.0))
        self.register_buffer("idle", torch.full((len(names), config.codewords), -1))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        # No buffer: what it holds depends on the machine, so ranks must not be sent that of another.
        self._prepared: PreparedCodebook | None = None

    def state(self) -> CodebookState:
        """The buffers that an update changes."""
        return CodebookState(self.codebook, self.ema_count, self.ema_sum, self.idle, self.step)

    def prepared(self) -> PreparedCodebook:
        """The codebook for searches; another one after a move, which gives the module another tensor."""
        if self._prepared is None or self._prepared.codebook is not self.codebook:
            self._prepared = PreparedCodebook(self.codebook)
        return self._prepared

    def quantise(self, semantic: Mapping[str, Tensor]) -> dict[str, Quantised]:
        """Nearest codewords of z by modality, (B, T, D), in one search; no buffer changes."""
        rows = {name: z.detach().flatten(0, 1) for name, z in semantic.items()}
        index = nearest_codeword(torch.cat(list(rows.values())), self.prepared()).index
        found = {}
        for (name, z), codes in zip(semantic.items(), index.split([len(x) for x in rows.values()]), strict=True):
            codeword = self.codebook[codes].to(z.dtype).view_as(z)
            found[name] = Quantised(codes.view(z.shape[:2]), codeword, straight_through(z, codeword))
        return found

    @torch.no_grad()
    def initialise(self, rows: Tensor) -> None:
        """Sets the codewords; counts keep their start, sums become codeword times count (the codeword for count 0).

        Args:
            rows: (M, D).

        Raises:
            ValueError: the shape is another one.
        """
        if rows.shape != self.codebook.shape:
            raise ValueError(f"rows must have shape {tuple(self.codebook.shape)}, got {tuple(rows.shape)}")
        self.codebook.copy_(rows)
        count = self.ema_count.unsqueeze(1)
        self.ema_sum.copy_(rows * torch.where(count > 0, count, 1))
        self.prepared().refresh()

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        # Captured graphs read the operands without looking at the codebook's version.
        self.prepared().refresh()

    @torch.no_grad()
    def update(
        self,
        semantic: Mapping[str, Tensor],
        index: Mapping[str, Tensor],
        mask: Mapping[str, Tensor] | None = None,
        draws: RevivalDraws | None = None,
        shard: BatchShard | None = None,
    ) -> None:
        """One MM-EMA step with the codes of this batch, idle counters and revival included; Eq. 7.

        Args:
            semantic: z by modality, (B, T, D).
            index: codes by modality, (B, T).
            mask: (B, T) bool by modality, or None.
            draws: random numbers of the revival; None draws them from the seed and the step.
            shard: which rows of a batch that is split between ranks these are; None for all of it.
        """
        partners = self._partners(semantic, mask)
        codebook_update(
            self.state(),
            [semantic[name].detach().flatten(0, 1) for name in self.names],
            [index[name].flatten() for name in self.names],
            self.rule,
            partners=None if partners is None else [partners[name].flatten(0, 1) for name in self.names],
            valid=None if mask is None else [mask[name].flatten() for name in self.names],
            draws=draws,
            shard=shard,
            prepared=self.prepared(),
        )

    def _partners(self, semantic: Mapping[str, Tensor], mask: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
        """Mean partner vector of every row, (B, T, D) by modality; None where rows are partners by position."""
        if self.rule.own_weight == 1:
            return {name: semantic[name].detach() for name in self.names}
        if self.partner == "attended":
            return {name: self._attended_mean(name, semantic, mask) for name in self.names}
        if len({semantic[name].shape[1] for name in self.names}) == 1:
            return None
        means = {name: clip_mean(semantic[name].detach(), None if mask is None else mask[name]) for name in self.names}
        return {
            name: mean_of_others(name, self.names, means.__getitem__).unsqueeze(1).expand_as(semantic[name])
            for name in self.names
        }

    def _attended_mean(self, name: str, semantic: Mapping[str, Tensor], mask: Mapping[str, Tensor] | None) -> Tensor:
        query = semantic[name].detach()

        def from_other(other: str) -> Tensor:
            return attended(query, semantic[other].detach(), None if mask is None else mask[other])

        return mean_of_others(name, self.names, from_other)


def straight_through(semantic: Tensor, codeword: Tensor) -> Tensor:
    """The codewords, with the gradient passed on to z."""
    return semantic + (codeword - semantic).detach()


def mean_of_others(name: str, names: tuple[str, ...], value: Callable[[str], Tensor]) -> Tensor:
    """Mean of `value(other)` over the other modalities."""
    others = [value(other) for other in names if other != name]
    return torch.stack(others).mean(0)


def attended(query: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D)) k over the valid steps of the same clip, without parameters.

    Args:
        query: (B, T, D).
        keys: (B, S, D), which are the values too.
        mask: (B, S) bool, or None.

    Returns:
        (B, T, D).
    """
    scores = query @ keys.transpose(1, 2) / math.sqrt(query.shape[-1])  # (B, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(1), -math.inf)
    return scores.softmax(-1) @ keys
