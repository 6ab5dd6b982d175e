"""The objective of Uni-Code: what is minimised, and the inner steps of CLUB."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from unicode_fast import losses
from unicode_fast.config import Config
from unicode_fast.modules.codebook import mean_of_others
from unicode_fast.modules.cpc import clip_mean
from unicode_fast.modules.model import ModelOutput, UniCode
from unicode_fast.ops import codeword_distribution, commitment_loss
from unicode_fast.reference.counter_random import uniform

# Streams of the counter-based generator; the codebook's revival has its own.
CPC_STREAM, CLUB_STREAM = 101, 102


@dataclass(frozen=True)
class Draws:
    """Random numbers of one step, for tests that inject them.

    cpc_position: scalar in [0, 1) that chooses the time step of Cross-CPC.
    club_permutation: (B,) int64 by modality, the negatives of the released CLUB estimate.
    """

    cpc_position: Tensor | None = None
    club_permutation: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Losses:
    """The total, its weighted terms by name, and the share of clips that Cross-CPC recognises by direction."""

    total: Tensor
    terms: dict[str, Tensor]
    recognised: dict[str, Tensor]


class UniCodeMethod:
    """Losses of a model and the training of its CLUB networks; equations 3 to 8.

    Args:
        model: the model that is trained; its configuration decides the rules.
    """

    def __init__(self, model: UniCode) -> None:
        self.model = model
        self.config: Config = model.config

    def fit_club(self, output: ModelOutput, optimizer: torch.optim.Optimizer) -> None:
        """Inner steps: the CLUB networks learn to guess specific features, on detached ones of this batch."""
        method = self.config.method
        if method.club_estimator == "none":
            return
        inputs = {name: value.detach() for name, value in self._club_input(output).items()}
        for _ in range(method.club_inner_steps):
            optimizer.zero_grad(set_to_none=True)
            total = torch.zeros((), dtype=self.model.dtype, device=self.model.device)
            for name, valid in self._masks(output).items():
                mean, log_variance = self.model.club[name](inputs[name])
                total = total + losses.club_likelihood(mean, log_variance, output.club[name].detach(), valid)
            total.backward()
            optimizer.step()

    def losses(self, output: ModelOutput, draws: Draws | None = None) -> Losses:
        """All terms for a batch, weighted.

        Args:
            output: of the model in training mode.
            draws: None draws from the seed and the number of codebook updates so far.
        """
        draws = draws or Draws()
        terms: dict[str, Tensor] = {}
        self._reconstruction(output, terms)
        self._commitment(output, terms)
        self._club(output, draws, terms)
        recognised = self._cpc(output, draws, terms)
        self._code_matching(output, terms)
        return Losses(torch.stack(list(terms.values())).sum(), terms, recognised)

    def _masks(self, output: ModelOutput) -> dict[str, Tensor | None]:
        return {name: None if output.mask is None else output.mask[name] for name in self.model.names}

    def _club_input(self, output: ModelOutput) -> dict[str, Tensor]:
        return output.quantised if self.config.method.club_input == "quantised" else output.semantic

    def _reconstruction(self, output: ModelOutput, terms: dict[str, Tensor]) -> None:
        for name, valid in self._masks(output).items():
            error = losses.reconstruction(output.decoded[name], output.target[name], valid)
            terms[f"reconstruction.{name}"] = self.config.method.reconstruction_weight * error

    def _commitment(self, output: ModelOutput, terms: dict[str, Tensor]) -> None:
        method, names, masks = self.config.method, self.model.names, self._masks(output)
        own = method.commitment_weight * method.commitment_own
        partners = method.commitment_weight * method.commitment_partner
        if len({output.codeword[name].shape[1] for name in names}) == 1:
            shares, device = partners / (len(names) - 1), self.model.device
            weights = torch.full((len(names), len(names)), shares, dtype=torch.float64, device=device)
            weights.fill_diagonal_(own)
            found = commitment_loss(
                torch.stack([output.semantic[name].flatten(0, 1) for name in names]),
                torch.stack([output.index[name].flatten() for name in names]),
                self.model.codebook.codebook,
                weights / (self.config.model.width if method.commitment_norm == "mean" else 1),
                valid=None if output.mask is None else torch.stack([output.mask[name].flatten() for name in names]),
            )
            terms.update({f"commitment.{name}": found[m] for m, name in enumerate(names)})
            return
        for name in names:
            z, valid = output.semantic[name], masks[name]

            def to_partner(other: str, z: Tensor = z, valid: Tensor | None = valid) -> Tensor:
                mean = clip_mean(output.codeword[other], masks[other]).unsqueeze(1)
                return losses.commitment(z, mean, valid, norm=method.commitment_norm)

            total = own * losses.commitment(z, output.codeword[name], valid, norm=method.commitment_norm)
            terms[f"commitment.{name}"] = total + partners * mean_of_others(name, names, to_partner)

    def _club(self, output: ModelOutput, draws: Draws, terms: dict[str, Tensor]) -> None:
        method = self.config.method
        if method.club_estimator == "none" or not method.club_weight:
            return
        inputs = self._club_input(output)
        for number, (name, valid) in enumerate(self._masks(output).items()):
            mean, log_variance = self.model.club[name](inputs[name])
            specific = output.club[name]
            if method.club_estimator == "closed_form":
                estimate = losses.club_closed_form(mean, log_variance, specific, valid, reduction=method.club_reduction)
            else:
                if draws.club_permutation is None:
                    order = self._uniform(CLUB_STREAM + number, (specific.shape[0],)).argsort()
                else:
                    order = draws.club_permutation[name]
                estimate = losses.club_official(mean, log_variance, specific, order, valid)
                if method.club_reduction == "mean":
                    estimate = estimate / specific.shape[-1]
            if method.club_floor:
                estimate = estimate.clamp(min=0)
            terms[f"club.{name}"] = method.club_weight * estimate

    def _cpc(self, output: ModelOutput, draws: Draws, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        names = self.model.names
        position = self._uniform(CPC_STREAM, ()) if draws.cpc_position is None else draws.cpc_position
        result = self.model.cpc(output.semantic, output.mask, position)
        terms["cpc"] = result.loss
        return {
            f"{source}->{target}": result.recognised[row, column]
            for row, target in enumerate(names)
            for column, source in enumerate(names)
        }

    def _code_matching(self, output: ModelOutput, terms: dict[str, Tensor]) -> None:
        method = self.config.method
        if not method.cmcm_weight:
            return
        shares = {
            name: codeword_distribution(
                output.semantic[name],
                self.model.codebook.codebook,
                valid=valid,
                temperature=method.cmcm_temperature,
            )
            for name, valid in self._masks(output).items()
        }
        for first, second in combinations(self.model.names, 2):
            loss = losses.code_matching(
                shares[first], shares[second], pairing=method.cmcm_pairing, directions=method.cmcm_directions
            )
            terms[f"code_matching.{first}-{second}"] = method.cmcm_weight * loss

    def _uniform(self, stream: int, shape: tuple[int, ...]) -> Tensor:
        return uniform(self.config.train.seed, self.model.codebook.step, stream, shape)
