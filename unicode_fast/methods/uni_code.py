"""Uni-Code: its loss terms, and the inner steps of CLUB."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unicode_fast import losses
from unicode_fast.methods.base import Draws, Method
from unicode_fast.methods.recipe import Recipe
from unicode_fast.modules import club
from unicode_fast.modules.absent import having, mean_over
from unicode_fast.modules.cpc import clip_mean
from unicode_fast.modules.model import ModelOutput, UniCode
from unicode_fast.ops import codeword_distribution, commitment_loss

# Streams of the counter-based generator; resets of codewords have their own.
CPC_STREAM, CLUB_STREAM = 101, 102


class ClubFeatures(NamedTuple):
    """Input of CLUB networks by their names: x (B, T, D), specific y (B, T, Y), mask (B, T) or None."""

    given: Mapping[str, Tensor]
    specific: Mapping[str, Tensor]
    masks: Mapping[str, Tensor | None]


class UniCodeMethod(Method):
    """Losses of a model and the training of its CLUB networks; equations 3 to 8. `Method` describes the arguments.

    Args:
        model: the model to train; its configuration has the weights and variants of the losses.

    Raises:
        TypeError: the model is no UniCode.
        ValueError: the model's method has losses of its own, which `make_method` gives.
    """

    def __init__(self, model: UniCode) -> None:
        # The registry imports this module.
        from unicode_fast.methods.registry import recipe_of

        super().__init__(model)
        name = self.config.method.method
        recipe = recipe_of(name)
        if recipe.method is not None and type(self.model) is recipe.model and not isinstance(self, recipe.method):
            raise ValueError(
                f"model must be of a method with the losses of {type(self).__name__}, got method {name!r}; "
                "unicode_fast.make_method gives its losses"
            )

    def fit_club(
        self,
        output: ModelOutput,
        optimizer: torch.optim.Optimizer,
        average: Callable[[Sequence[nn.Parameter]], None] | None = None,
    ) -> None:
        """Inner steps: the CLUB networks learn to predict specific features, from detached features of this batch."""
        method = self.config.method
        if method.club_estimator == "none":
            return
        for _ in range(method.club_inner_steps):
            self._set_club_gradients(output)
            if average is not None:
                average(self.model.club_parameters())
            optimizer.step()

    def alignment(self, output: ModelOutput, draws: Draws | None = None) -> dict[str, Tensor]:
        """Commitment, CLUB, assignment with grounding, code matching, and the terms of the model's `alignment`."""
        terms: dict[str, Tensor] = {}
        self._commitment(output, terms)
        self._club(output, draws or Draws(), terms)
        self._assignment(output, terms)
        self._code_matching(output, terms)
        return {**terms, **self.model.alignment.batch_terms(self.model, output, self.draw)}

    def contrast(
        self, output: ModelOutput, draws: Draws | None = None, rows: slice = slice(None)
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Cross-CPC, and the share of clips that it recognises by direction; nothing with `cpc_weight` 0."""
        if not self.config.method.cpc_weight:
            return {}, {}
        given = (draws or Draws()).cpc_position
        position = self.draw(CPC_STREAM, ()) if given is None else given
        result = self.model.cpc(output.semantic, output.mask, position, rows)
        names = self.model.cpc.names
        return {"cpc": result.loss}, {
            f"{source}->{target}": result.recognised[row, column]
            for row, target in enumerate(names)
            for column, source in enumerate(names)
        }

    def _set_club_gradients(self, output: ModelOutput) -> None:
        """Sets the gradients of the CLUB networks' parameters for one inner step."""
        club.set_likelihood_gradients(self.model.club, *self._club_features(output))

    def _club_features(self, output: ModelOutput) -> ClubFeatures:
        given = output.quantised if self.config.method.club_input == "quantised" else output.semantic
        return ClubFeatures(given, output.club, self._masks(output))

    def _commitment(self, output: ModelOutput, terms: dict[str, Tensor]) -> None:
        method, names, masks = self.config.method, self.model.names, self._masks(output)
        own = method.commitment_weight * method.commitment_own
        partners = method.commitment_weight * method.commitment_partner
        if len({output.codeword[name].shape[1] for name in names}) == 1:
            size, device = (len(names), len(names)), self.model.device
            weights = torch.zeros(size, dtype=torch.float64, device=device)
            for row, name in enumerate(names):
                others = self._partners(name)
                for other in others:
                    weights[row, names.index(other)] = partners / len(others)
            weights.fill_diagonal_(own)
            weights = weights / (self.config.model.width if method.commitment_norm == "mean" else 1)
            valid = None if output.mask is None else torch.stack([output.mask[name].flatten() for name in names])
            by_modality = commitment_loss(
                torch.stack([output.semantic[name].flatten(0, 1) for name in names]),
                torch.stack([output.index[name].flatten() for name in names]),
                self.model.codebook.codebook,
                weights,
                valid=valid,
            )
            terms.update({f"commitment.{name}": by_modality[m] for m, name in enumerate(names)})
        else:
            loss = partial(losses.commitment, norm=method.commitment_norm)
            means = {name: clip_mean(output.codeword[name], masks[name]).unsqueeze(1) for name in names}
            for name in names:
                z, valid = output.semantic[name], masks[name]
                total = own * loss(z, output.codeword[name], valid)
                distances = []
                for other in self._partners(name):
                    both = valid if output.mask is None else output.mask[name] & having(output.mask, other).unsqueeze(1)
                    distances.append(loss(z, means[other], both))
                if distances:
                    total = total + partners * torch.stack(distances).mean(0)
                terms[f"commitment.{name}"] = total

    def _timed(self) -> list[str]:
        """The modalities with a time axis; words of a sentence have only an order."""
        return [name for name in self.model.names if self.model.modalities[name].kind != "words"]

    def _partners(self, name: str) -> list[str]:
        """The modalities whose codewords are targets of a modality's commitment, beside its own."""
        others = [other for other in self.model.names if other != name]
        if self.config.method.commitment_partners == "all":
            return others
        timed = self._timed()
        return [other for other in others if name in timed and other in timed]

    def _club(self, output: ModelOutput, draws: Draws, terms: dict[str, Tensor]) -> None:
        method = self.config.method
        if method.club_estimator == "none" or not method.club_weight:
            return
        features = self._club_features(output)
        if method.club_estimator == "closed_form":
            reduction = method.club_reduction
            estimates = club.closed_form(self.model.club, *features, reduction=reduction)
        else:
            estimates = torch.stack(self._official_estimates(features, draws))
        if method.club_floor:
            estimates = estimates.clamp(min=0)
        names = self.model.club
        terms.update({f"club.{name}": e for name, e in zip(names, method.club_weight * estimates, strict=True)})

    def _official_estimates(self, features: ClubFeatures, draws: Draws) -> list[Tensor]:
        predicted, estimates = club.predict(self.model.club, features.given), []
        for number, name in enumerate(self.model.club):
            specific = features.specific[name]
            if draws.club_permutation is None:
                order = self.draw(CLUB_STREAM + number, (len(specific),)).argsort()
            else:
                order = draws.club_permutation[name]
            estimates.append(self._official_estimate(name, (*predicted[name], specific), order, features.masks[name]))
        return estimates

    def _official_estimate(
        self, name: str, predicted: tuple[Tensor, Tensor, Tensor], permutation: Tensor, mask: Tensor | None
    ) -> Tensor:
        """The estimate of a network from mean, log variance and specific features, (B, T, Y)."""
        estimate = losses.club_official(*predicted, permutation, mask)
        return estimate / predicted[0].shape[-1] if self.config.method.club_reduction == "mean" else estimate

    def _code_matching(self, output: ModelOutput, terms: dict[str, Tensor]) -> None:
        method = self.config.method
        if not method.code_matching_weight:
            return
        used = self._distributions(output)
        pairs = list(combinations(self.model.names, 2))
        first, second = (torch.stack([used[name] for name in names]) for names in zip(*pairs, strict=True))
        have = None if output.mask is None else torch.stack([having(output.mask, *names) for names in pairs])
        found = losses.code_matching(
            first, second, pairing=method.code_matching_pairing, directions=method.code_matching_directions, valid=have
        )
        for pair, loss in zip(pairs, found.unbind(), strict=True):
            terms["code_matching." + "-".join(pair)] = method.code_matching_weight * loss

    def _distributions(self, output: ModelOutput) -> dict[str, Tensor]:
        """Mean distribution over codewords of each clip, (B, M) by modality."""
        used: dict[str, Tensor] = {}
        for names in self._of_equal_length(output, self.model.names):
            found = codeword_distribution(
                torch.cat([output.semantic[name] for name in names]),
                self.model.codebook.codebook,
                valid=None if output.mask is None else torch.cat([output.mask[name] for name in names]),
                temperature=self.config.method.code_matching_temperature,
            )
            used.update(zip(names, found.chunk(len(names)), strict=True))
        return used

    def _assignment(self, output: ModelOutput, terms: dict[str, Tensor]) -> None:
        """Common codewords of a clip's modalities: by position if they have a time axis, by clip for words."""
        method, timed, masks = self.config.method, self._timed(), self._masks(output)
        lengths = {output.semantic[name].shape[1] for name in timed}
        by_position = bool(method.assignment_weight) and len(timed) > 1 and len(lengths) == 1
        with_words = timed and (method.presence_weight or method.grounding_weight)
        words = [name for name in self.model.names if name not in timed] if with_words else []
        if not by_position and not words:
            return
        scores: dict[str, Tensor] = {}
        for names in self._of_equal_length(output, [*timed, *words]):
            found = losses.assignment_scores(
                torch.cat([output.semantic[name] for name in names]), self.model.codebook.codebook
            )
            scores.update(zip(names, found.chunk(len(names)), strict=True))
        if by_position:
            self._by_position(output, {name: scores[name] for name in timed}, terms)
        given = timed if words else []
        used = {name: clip_mean(scores[name].detach().softmax(-1), masks[name]) for name in given}
        for name in words:
            if method.presence_weight:
                errors = [
                    losses.presence(one, scores[name], masks[name], self._have(output, name, other))
                    for other, one in used.items()
                ]
                terms[f"presence.{name}"] = method.presence_weight * torch.stack(errors).sum()
            if method.grounding_weight:
                surprise, grounding = self._grounding(output, name, used, scores)
                terms[f"lexicon.{name}"] = surprise
                terms[f"grounding.{name}"] = method.grounding_weight * grounding

    def _grounding(
        self, output: ModelOutput, name: str, used_by: Mapping[str, Tensor], scores: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The loss of a lexicon, and the grounding loss of words and of the other modalities.

        Balanced assignment gives each grounded word a target among the codewords of its meaning, each codeword used in
        proportion to the meanings of the batch. The other modalities should have these words' codewords at some
        position. A clip counts that has words and another modality.
        """
        masks, mask, clips, seen = self._masks(output), None, None, None
        if output.mask is not None:
            seen = torch.stack([output.mask[other].any(1) for other in used_by])  # (timed, B)
            clips = having(output.mask, name) & seen.any(0)
            mask = output.mask[name] & clips.unsqueeze(1)
        used = mean_over(torch.stack(list(used_by.values())), None if seen is None else seen.unsqueeze(-1))  # (B, M)
        average = mean_over(used, None if clips is None else clips.unsqueeze(-1))
        expected = self.model.lexicon[name](output.words[name])
        found = losses.grounding(expected, used, average, mask)
        with torch.no_grad():
            totals = (found.weight.unsqueeze(-1) * found.meaning).sum((0, 1))
            logits = (found.meaning + 1e-6).log() + scores[name]
            target = losses.balanced_assignment(logits.flatten(0, 1), found.weight.flatten(), totals=totals)
            counted = found.weight.unsqueeze(-1) * scores[name].softmax(-1)
            means = counted.sum(1) / found.weight.sum(1, keepdim=True).clamp(min=1e-3)  # (B, M), of grounded words
        errors = losses.soft_cross_entropy(scores[name], target.view_as(logits))
        meant = mean_over((found.weight * errors).sum(1), clips)
        held = [
            losses.presence(means, scores[other], masks[other], self._have(output, name, other)) for other in used_by
        ]
        return losses.masked_mean(found.surprise, mask), meant + torch.stack(held).sum()

    def _by_position(self, output: ModelOutput, scores: Mapping[str, Tensor], terms: dict[str, Tensor]) -> None:
        """A position counts that all modalities of its clip have, for each of them."""
        there = valid = None
        if output.mask is not None:
            masks = torch.stack([output.mask[name] for name in scores])  # (timed, B, T)
            there = masks.any(2, keepdim=True)
            valid = (masks | ~there).all(0) & there.any(0)  # (B, T)
        given = torch.stack([one.detach() for one in scores.values()])
        mean = mean_over(given, None if there is None else there.unsqueeze(-1))  # (B, T, M)
        target = losses.balanced_assignment(mean.flatten(0, 1), None if valid is None else valid.flatten())
        for number, (name, one) in enumerate(scores.items()):
            counted = valid if there is None or valid is None else valid & there[number]
            error = losses.masked_mean(losses.soft_cross_entropy(one, target.view_as(mean)), counted)
            terms[f"assignment.{name}"] = self.config.method.assignment_weight * error

    def _have(self, output: ModelOutput, *names: str) -> Tensor | None:
        """The clips that have all of these modalities, (B,) bool; None where every clip has all."""
        return None if output.mask is None else having(output.mask, *names)

    def _of_equal_length(self, output: ModelOutput, names: Sequence[str]) -> list[list[str]]:
        """The modalities, those with as many positions together."""
        groups: defaultdict[int, list[str]] = defaultdict(list)
        for name in names:
            groups[output.semantic[name].shape[1]].append(name)
        return list(groups.values())


RECIPE: Recipe = Recipe("Uni-Code", incomplete=True)
