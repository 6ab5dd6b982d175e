"""The interface of a method: what a training step, and a loop of your own, call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unicode_fast import losses
from unicode_fast.config import Config
from unicode_fast.modules.model import ModelOutput, UniCode
from unicode_fast.modules.wrapped import unwrapped_unicode
from unicode_fast.reference.counter_random import uniform


@dataclass(frozen=True)
class Draws:
    """Random numbers of one step, for tests that inject them.

    cpc_position: scalar in [0, 1) that chooses the last position of the context of Cross-CPC.
    club_permutation: (B,) int64 by modality, the negatives of the released CLUB estimate.
    """

    cpc_position: Tensor | None = None
    club_permutation: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Losses:
    """The total, its weighted terms by name, and the share of clips that Cross-CPC recognises, by direction."""

    total: Tensor
    terms: dict[str, Tensor]
    recognised: dict[str, Tensor]


class Method(ABC):
    """The losses of a model. A subclass adds the terms that align modalities; every method reconstructs.

    Terms are weighted, and the total is their sum. A training step calls `fit_club`, `alignment` and `contrast` with
    the whole batch, `reconstruction` with each micro-batch. They train the parameters of `UniCode.parameter_groups`.

    Args:
        model: the model to train; its configuration has the weights and variants of the losses.

    Raises:
        TypeError: the model is no UniCode.
    """

    def __init__(self, model: UniCode) -> None:
        self.model = unwrapped_unicode(model)
        self.config: Config = self.model.config

    @abstractmethod
    def alignment(self, output: ModelOutput, draws: Draws | None = None) -> dict[str, Tensor]:
        """The terms of the features and codes of the whole batch, by name; reads nothing decoded.

        Args:
            output: of the whole batch.
            draws: None draws by the seed and the number of codebook updates.
        """

    def contrast(
        self, output: ModelOutput, draws: Draws | None = None, rows: slice = slice(None)
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Contrastive terms of some clips against all, and the shares of clips recognised; none by default.

        Args:
            output: of the whole batch.
            draws: None draws by the seed and the number of codebook updates.
            rows: the clips that are contrasted with all. The results of all clips add up to those of the batch.
        """
        return {}, {}

    def fit_club(  # noqa: B027
        self,
        output: ModelOutput,
        optimizer: torch.optim.Optimizer,
        average: Callable[[Sequence[nn.Parameter]], None] | None = None,
    ) -> None:
        """Inner steps before the losses; none by default.

        Args:
            output: of the whole batch.
            optimizer: of the model's CLUB networks.
            average: called before each inner step with the parameters, which have their gradients.
        """

    def losses(self, output: ModelOutput, draws: Draws | None = None) -> Losses:
        """All weighted terms of a batch.

        Args:
            output: of the model in training mode.
            draws: None draws by the seed and the number of codebook updates.
        """
        contrast, recognised = self.contrast(output, draws)
        terms = {**self.reconstruction(output), **self.alignment(output, draws), **contrast}
        return Losses(torch.stack(list(terms.values())).sum(), terms, recognised)

    def reconstruction(self, output: ModelOutput, shares: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The terms that compare no clips.

        Args:
            output: of a batch or of a micro-batch.
            shares: the micro-batch's share of the valid positions, by modality; None for a whole batch. The terms of
                all micro-batches add up to those of the batch.
        """
        terms = {}
        masks = self._masks(output)
        for name, decoded in output.decoded.items():
            error = losses.reconstruction(decoded, output.target[name], masks[name])
            weighted = self.config.method.reconstruction_weight * error
            terms[f"reconstruction.{name}"] = weighted if shares is None else shares[name] * weighted
        return {**terms, **self.model.alignment.clip_terms(self.model, output, self.draw, shares)}

    def draw(self, stream: int, shape: tuple[int, ...]) -> Tensor:
        """Uniform numbers in [0, 1) by the seed, the number of codebook updates and a stream."""
        return uniform(self.config.train.seed, self.model.codebook.step, stream, shape)

    def share(self, output: ModelOutput, rows: slice) -> float:
        """The share of `rows` in the clips of the batch."""
        clips = len(output.index[self.model.names[0]])
        return len(range(clips)[rows]) / clips

    def valid_positions(self, output: ModelOutput) -> Tensor:
        """Number of valid positions by modality, (modalities,) in the model's dtype."""
        if output.mask is None:
            # torch.full fills on the device; a tensor from a list would be copied there.
            numbers = [output.index[name].numel() for name in self.model.names]
            dtype, device = self.model.dtype, self.model.device
            return torch.stack([torch.full((), number, dtype=dtype, device=device) for number in numbers])
        return torch.stack([output.mask[name].sum() for name in self.model.names]).to(self.model.dtype)

    def _masks(self, output: ModelOutput) -> dict[str, Tensor | None]:
        return {name: None if output.mask is None else output.mask[name] for name in self.model.names}
