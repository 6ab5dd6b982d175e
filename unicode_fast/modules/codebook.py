"""The shared codebook of all modalities, and its MM-EMA update."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from unicode_fast.modules.absent import mean_over
from unicode_fast.modules.cpc import clip_mean
from unicode_fast.ops import (
    BatchShard,
    CodebookState,
    EmaConfig,
    PreparedCodebook,
    ResetDraws,
    _checks,
    codebook_update,
    commitment_loss,
    nearest_codeword,
)

# Half width of the uniform initial codewords for any size of the codebook, as released.
UNIFORM_INIT = 1 / 400

Partner = Literal["aligned", "attended"]


class Quantised(NamedTuple):
    """Codewords chosen for a batch of one modality.

    Attributes:
        index: (...) int64, usually (B, T).
        codeword: (..., D), without gradient.
        vector: (..., D), equal to the codeword, with the gradient passed straight through to the features.
    """

    index: Tensor  # type: ignore[assignment]
    codeword: Tensor
    vector: Tensor


class CodebookOutput(NamedTuple):
    """Codes and commitment loss of a batch, by modality.

    Attributes:
        vector: (..., D) by modality, the chosen codewords, with the gradient passed straight through to the features.
        index: (...) int64 by modality, the indices of these codewords.
        commitment: () by modality, the commitment loss, to be weighted.
    """

    vector: dict[str, Tensor]
    index: dict[str, Tensor]  # type: ignore[assignment]
    commitment: dict[str, Tensor]


class Codebook(nn.Module):
    """M codewords of width D, shared by modalities and updated by MM-EMA; they have no gradient.

    Features have any leading dimensions; the first one counts the clips. Features of modalities at the same position
    are partners. If the dimensions differ, the partner in the update is the mean of each other modality over the clip.
    The codewords start uniform in +-1/400; `initialise` sets others, such as features of a batch::

        codebook = unicode_fast.Codebook(["audio", "video"], codewords=512, width=64)
        vector, index, commitment = codebook({"audio": torch.randn(8, 10, 64), "video": torch.randn(8, 10, 64)})

    Each forward pass in training mode ends with one update, from all modalities and, with torch.distributed, all ranks.
    To update at another time call `quantise` and `update`.

    Args:
        names: the modalities, one or more, in the order of the sequential EMA.
        codewords: M.
        width: D.
        rule: of the update; None takes `EmaConfig()`. With its `own_weight` 1 it is the plain EMA.
        partner: vector of the other modalities at a position: their features there ("aligned"), or attention over all
            their positions in the same clip ("attended").
        initial_count: initial running count of every codeword.

    Raises:
        TypeError: names are no list of texts, a size no integer, or `rule` no EmaConfig.
        ValueError: names are missing or equal, a size is below 1, `partner` is unknown, or the count is negative.

    Source:
        Xia et al., NeurIPS 2023, Eq. 2, 7 and 8.
    """

    codebook: Tensor
    ema_count: Tensor
    ema_sum: Tensor
    idle: Tensor
    step: Tensor

    def __init__(
        self,
        names: Sequence[str],
        codewords: int,
        width: int,
        rule: EmaConfig | None = None,
        *,
        partner: Partner = "aligned",
        initial_count: float = 1.0,
    ) -> None:
        super().__init__()
        if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(one, str) for one in names):
            raise TypeError(f"names must be a list of modalities, got {names!r}")
        if not names or len(set(names)) < len(names):
            raise ValueError(f"names must be one or more different modalities, got {list(names)}")
        for size, value in (("codewords", codewords), ("width", width)):
            if not isinstance(value, int):
                raise TypeError(f"{size} must be an integer, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{size} must be at least 1, got {value}")
        if not isinstance(rule, EmaConfig | None):
            raise TypeError(f"rule must be an EmaConfig or None, got {type(rule).__name__}")
        _checks.check_choice("partner", partner, get_args(Partner))
        _check_not_negative("initial_count", initial_count)
        self.names = tuple(names)
        self.partner = partner
        self.rule = EmaConfig() if rule is None else rule
        codebook = torch.empty(codewords, width).uniform_(-UNIFORM_INIT, UNIFORM_INIT)
        self.register_buffer("codebook", codebook)
        self.register_buffer("ema_count", torch.full((codewords,), float(initial_count)))
        self.register_buffer("ema_sum", codebook * (initial_count or 1.0))
        self.register_buffer("idle", torch.full((len(self.names), codewords), -1))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        # Not a buffer: its content depends on the machine, so a rank must not receive that of another rank.
        self._prepared: PreparedCodebook | None = None

    def state(self) -> CodebookState:
        """The buffers that an update changes."""
        return CodebookState(self.codebook, self.ema_count, self.ema_sum, self.idle, self.step)

    def prepared(self) -> PreparedCodebook:
        """The prepared codebook for searches; a new object if the codebook is a new tensor, as after a move."""
        if self._prepared is None or self._prepared.codebook is not self.codebook:
            self._prepared = PreparedCodebook(self.codebook)
        return self._prepared

    def forward(
        self, features: Mapping[str, Tensor], mask: Mapping[str, Tensor] | None = None, *, partners: float = 0.5
    ) -> CodebookOutput:
        """Quantises the features of modalities and, in training mode, updates the codebook.

        Args:
            features: (..., D) by modality: all modalities in training mode, else any of them. float64, float32, float16
                or bfloat16, on the device of the codebook. In training mode NaN or infinity at a valid position makes
                its codeword not finite, and those of its partners with an `own_weight` below 1. The values are not
                checked.
            mask: (...) bool by modality, the valid positions; None for all. The others may hold anything, and count as
                zeros. A clip without a valid position lacks the modality.
            partners: weight of the mean commitment to the codewords of the other modalities at the same position; own
                codewords have weight 1. It is 0 if modalities differ in leading dimensions or dtype.

        Returns:
            vector, index and commitment by modality. The commitment is the mean squared difference over positions and
            D.

        Raises:
            TypeError: features or masks are no mapping of tensors, or of an unsupported dtype.
            ValueError: a modality is unknown or missing, a width, shape or device does not fit, or `partners` is no
                number of at least 0. Or modalities that are partners differ in the number of clips.
        """
        self._check(features, mask)
        _check_not_negative("partners", partners)
        if mask is not None:
            features = {name: torch.where(mask[name].unsqueeze(-1), z, 0) for name, z in features.items()}
        found = self.quantise(features)
        commitment = self._commitment(features, {name: found[name].index for name in features}, mask, partners)
        output = CodebookOutput(
            {name: quantised.vector for name, quantised in found.items()},
            {name: quantised.index for name, quantised in found.items()},
            commitment,
        )
        if self.training:
            self.update(features, output.index, mask)
        return output

    def _check(self, features: Mapping[str, Tensor], mask: Mapping[str, Tensor] | None) -> None:
        _check_mapping("features", features)
        expected = set(self.names) if self.training else set(features) & set(self.names)
        if not features or set(features) != expected:
            which = "all" if self.training else "any"
            got = ", ".join(map(str, features)) or "none"
            raise ValueError(f"features must be of {which} of the modalities {', '.join(self.names)}, got {got}")
        if mask is not None:
            _check_modalities("mask", mask, features)
        for name, z in features.items():
            _checks.check_tensor(f"features of {name!r}", z, _checks.FEATURE_DTYPES)
            shape = (*z.shape[:-1], self.codebook.shape[1])
            like = (self.codebook, "the codebook")
            _checks.check_like(f"features of {name!r}", z, shape, "(..., D) with the D of the codebook", *like)
            if mask is not None:
                _checks.check_tensor(f"mask of {name!r}", mask[name], (torch.bool,))
                _checks.check_like(f"mask of {name!r}", mask[name], z.shape[:-1], "that of its features", *like)
        clips = {name: len(_as_clips(z)) for name, z in features.items()}
        if self.training and self.rule.own_weight < 1 and len(set(clips.values())) > 1:
            raise ValueError(f"features must hold the same clips in every modality, got {clips}")

    def _commitment(
        self,
        features: Mapping[str, Tensor],
        index: Mapping[str, Tensor],
        mask: Mapping[str, Tensor] | None,
        partners: float,
    ) -> dict[str, Tensor]:
        """Commitment with partners if all modalities have the same positions, else of each modality alone."""
        names = list(features)
        if len({(_as_clips(z).shape, z.dtype) for z in features.values()}) > 1:
            return {name: self._commitment({name: features[name]}, index, mask, 0.0)[name] for name in names}
        rows = torch.stack([features[name].reshape(-1, self.codebook.shape[1]) for name in names])
        others = partners / max(1, len(names) - 1)
        weights = torch.full((len(names), len(names)), others, dtype=torch.float64, device=rows.device)
        weights = weights.fill_diagonal_(1) / self.codebook.shape[1]
        valid = None if mask is None else torch.stack([mask[name].flatten() for name in names])
        codes = torch.stack([index[name].flatten() for name in names])
        loss = commitment_loss(rows, codes, self.codebook, weights, valid=valid)
        return dict(zip(names, loss, strict=True))

    def quantise(self, semantic: Mapping[str, Tensor]) -> dict[str, Quantised]:
        """Nearest codewords of z by modality, (..., D), in one search; no buffer changes."""
        rows = {name: z.detach().reshape(-1, z.shape[-1]) for name, z in semantic.items()}
        index = nearest_codeword(torch.cat(list(rows.values())), self.prepared()).index
        found = {}
        for (name, z), codes in zip(semantic.items(), index.split([len(x) for x in rows.values()]), strict=True):
            codeword = self.codebook[codes].to(z.dtype).view_as(z)
            found[name] = Quantised(codes.view(z.shape[:-1]), codeword, straight_through(z, codeword))
        return found

    @torch.no_grad()
    def initialise(self, rows: Tensor) -> None:
        """Sets the codewords; counts stay, sums become codeword times count (the codeword for count 0).

        Args:
            rows: (M, D), float64, float32, float16 or bfloat16, on the device of the codebook; finite in its dtype.

        Raises:
            TypeError: the rows are no tensor or their dtype is unsupported.
            ValueError: the shape is not (M, D), the device differs, or a number is not finite.
        """
        _checks.check_tensor("rows", rows, _checks.FEATURE_DTYPES)
        _checks.check_like("rows", rows, self.codebook.shape, "that of the codebook", self.codebook, "the codebook")
        finite = rows.to(self.codebook.dtype).isfinite().all(1)
        if not finite.all():
            first = int(finite.logical_not().nonzero()[0])
            raise ValueError(f"rows must be finite in the dtype of the codebook, got NaN or Inf in row {first}")
        self.codebook.copy_(rows)
        count = self.ema_count.unsqueeze(1)
        self.ema_sum.copy_(rows * torch.where(count > 0, count, 1))
        self.prepared().refresh()

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        # Captured graphs read the operands without a check of the codebook's version.
        if self._prepared is not None:
            self.prepared().refresh()

    @torch.no_grad()
    def update(
        self,
        semantic: Mapping[str, Tensor],
        index: Mapping[str, Tensor],
        mask: Mapping[str, Tensor] | None = None,
        draws: ResetDraws | None = None,
        shard: BatchShard | None = None,
        absent: Tensor | None = None,
    ) -> None:
        """One MM-EMA update with the codes of a batch, idle counters and resets included; Eq. 7.

        The partner of a row is the mean over the other modalities that its clip has. A clip with no other modality
        counts with its own features alone.

        Args:
            semantic: z by modality, (..., D), usually (B, T, D). NaN or infinity at a valid position makes its codeword
                not finite, as in `forward`.
            index: codes by modality, (...).
            mask: (...) bool by modality, or None.
            draws: random numbers of the resets; None draws them by the seed and the number of updates.
            shard: position of these rows in a batch that ranks share; None for a whole batch.
            absent: (modalities,) bool, the modalities that no clip of the whole batch has: the batch does not count in
                their idle counters. None for none.

        Raises:
            TypeError: an argument or a dtype is unsupported.
            ValueError: an argument is not of all modalities, or a shape or device does not fit.
        """
        for what, given in (("semantic", semantic), ("index", index), ("mask", mask)):
            if given is not None or what != "mask":
                _check_modalities(what, given, self.names)
        semantic = {name: _as_clips(semantic[name]) for name in self.names}
        if mask is not None:
            mask = {name: mask[name].reshape(semantic[name].shape[:2]) for name in self.names}
        partners = self._partners(semantic, mask)
        if absent is not None:
            # The update adds 1 to each counter of an unused codeword.
            self.idle.sub_(absent.unsqueeze(1).to(self.idle.dtype))
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
        """Mean partner vector of every row, (B, T, D) by modality; None if rows at the same position are partners."""
        if self.rule.own_weight == 1 or len(self.names) == 1:
            return {name: semantic[name].detach() for name in self.names}
        detached = {name: semantic[name].detach() for name in self.names}
        masks = dict.fromkeys(self.names) if mask is None else mask
        if self.partner == "attended":
            found = {}
            for name, z in detached.items():
                others = (other for other in self.names if other != name)
                vectors = {other: attended(z, detached[other], masks[other]) for other in others}
                found[name] = self._mean_partner(name, z, vectors, mask)
            return found
        if len({z.shape[1] for z in detached.values()}) == 1:
            return None
        means = {name: clip_mean(z, masks[name]).unsqueeze(1) for name, z in detached.items()}
        return {name: self._mean_partner(name, z, means, mask) for name, z in detached.items()}

    def _mean_partner(
        self, name: str, own: Tensor, vectors: Mapping[str, Tensor], mask: Mapping[str, Tensor] | None
    ) -> Tensor:
        """Mean vector of the other modalities that a clip has, (B, T, D); its own features where it has no other.

        Args:
            name: a modality.
            own: its features, (B, T, D).
            vectors: of the others, (B, T, D) or (B, 1, D).
            mask: as in `update`.
        """
        others = [other for other in self.names if other != name]
        there = None if mask is None else torch.stack([mask[other].any(1) for other in others])[..., None, None]
        mean = mean_over(torch.stack([vectors[other] for other in others]), there)
        return mean.expand_as(own) if there is None else torch.where(there.any(0), mean, own)


def _check_mapping(name: str, given: Any) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"{name} must be a mapping from modalities to tensors, got {type(given).__name__}")


def _check_modalities(name: str, given: Any, expected: Iterable[str]) -> None:
    _check_mapping(name, given)
    if set(given) != set(expected):
        got = ", ".join(map(str, given)) or "none"
        raise ValueError(f"{name} must be of the modalities {', '.join(expected)}, got {got}")


def _check_not_negative(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a number of at least 0, got {value!r}")


def _as_clips(z: Tensor) -> Tensor:
    """(..., D) as (B, T, D): the first dimension counts clips, those between it and D positions of a clip."""
    return z.reshape(1, 1, -1) if z.dim() == 1 else z.unsqueeze(1) if z.dim() == 2 else z.flatten(1, -2)


def straight_through(semantic: Tensor, codeword: Tensor) -> Tensor:
    """The codewords, with the gradient passed on to z."""
    return semantic + (codeword - semantic).detach()


def attended(query: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D)) k over the valid positions of the same clip, without parameters.

    Args:
        query: (B, T, D).
        keys: (B, S, D), also the values.
        mask: (B, S) bool, or None.

    Returns:
        (B, T, D); NaN for a clip without a valid position.
    """
    scores = query @ keys.transpose(1, 2) / math.sqrt(query.shape[-1])  # (B, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(1), -math.inf)
    return scores.softmax(-1) @ keys
