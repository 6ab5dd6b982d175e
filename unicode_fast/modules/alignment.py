"""What a method adds to a model: own parameters, teachers and queues, and the loss terms that read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from unicode_fast.config import Config, Modality

if TYPE_CHECKING:
    from unicode_fast.modules.model import ModelOutput, UniCode

# Uniform numbers in [0, 1) of a shape, on the device and in the dtype of the model. The stream, the run's seed and the
# number of codebook updates determine them. The first rows do not depend on the number of rows.
Draw = Callable[[int, tuple[int, ...]], Tensor]


class Alignment(nn.Module):
    """The part of a method that a model owns as `alignment`; this one is empty.

    Its parameters with a gradient form the group "alignment" of the main optimiser. Teachers without gradient and
    buffers, such as queues, are state of the model: of its checkpoints, its ranks and its CUDA graphs. A hook may not
    synchronise with the device, and draws random numbers by `draw` alone.

    Args:
        modalities: kind and shape by name.
        config: of the model.

    Attributes:
        observes: whether `observe` gives features of each clip to the losses.
        trains_codebook: whether the method trains the codewords itself, in place of the EMA.
    """

    observes: bool = False

    def __init__(self, modalities: Mapping[str, Modality], config: Config) -> None:
        super().__init__()
        self.names = tuple(modalities)
        self.config = config
        self.trains_codebook = False

    def attach(self, model: UniCode) -> None:
        """Changes or copies modules of a new model."""

    def initialised(self, model: UniCode) -> None:
        """Takes over the first codewords of a run."""

    def observe(self, model: UniCode, name: str, features: Tensor, mask: Tensor | None) -> Tensor:
        """Features without gradient of one modality of a micro-batch, (b, ...), such as a teacher's.

        The losses of the whole batch read them as `output.observed[name]`.
        """
        raise NotImplementedError

    def batch_terms(self, model: UniCode, output: ModelOutput, draw: Draw) -> dict[str, Tensor]:
        """Weighted terms of the features and codes of the whole batch, by name; none by default.

        With several ranks each of them computes the terms of all clips.
        """
        return {}

    def clip_terms(
        self, model: UniCode, output: ModelOutput, draw: Draw, shares: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        """Weighted terms that compare no clips, by name; none by default.

        Args:
            model: that owns this module.
            output: of a micro-batch, with `target`, `decoded`, `quantised`; `output.clips` are its clips in the batch.
            draw: random numbers, equal for all micro-batches of a batch.
            shares: the micro-batch's share of the valid positions, by modality; None for a whole batch. The terms of
                all micro-batches add up to those of the batch.
        """
        return {}

    def after_step(self, model: UniCode, output: ModelOutput) -> None:
        """Updates teachers and queues from the whole batch, after the optimiser and the codebook; no gradient."""
