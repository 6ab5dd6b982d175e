"""H-DCID: Uni-Code, and a second layer that finds shared codes in what the first layer left as modality-specific.

Layer 1 is Uni-Code without code matching. Layer 2 reads its specific features y (the vectors of CLUB) and is trained by
the same losses: z2 = temporal2(y), spec2 = relu(Linear(y)), one codebook for all modalities, and a decoder back to y::

    L1 = reconstruction + commitment + CLUB + Cross-CPC
    L2 = |decoder2(zq2, spec2) - y|^2 + commitment2 + CLUB(zq2, spec2) + Cross-CPC2
    L  = L1 in the warm start, L1 + 0.3 L2 afterwards

As released: the layers and terms, whose weights are those of the preset; the gradient of layer 2's reconstruction in
its target y; the EMA of codebook 2 in the warm start, when layer 2 has its first parameters; CLUB networks of layer 2
that train after the warm start.

Our version:

* The warm start is a share of the run's steps, `hdcid_warmup`, where the released one is three of five epochs.
* Until its end the losses of layer 2 have weight 0, so Adam counts these steps for its parameters too.
* One EMA update per step. The released inner steps of CLUB encode the batch again, and each encoding updates.
* Codebook 2 starts uniform in any preset.
* A token is a pair of codes.

Source:
    Huang et al., "Unlocking the Potential of Multimodal Unified Discrete Representation through Training-Free Codebook
    Optimization and Hierarchical Alignment", arXiv 2403.05168v1; haihuangcode/TOC_H-DCID. SRCID (arXiv 2412.19128)
    has two layers too; that they are these is inferred.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from unicode_fast.config import Config, Modality, ModelConfig
from unicode_fast.methods.base import Draws
from unicode_fast.methods.recipe import WITHOUT_SHARING, Recipe
from unicode_fast.methods.uni_code import UniCodeMethod
from unicode_fast.modules.encoders import TemporalRelation, VectorSpecificEncoder
from unicode_fast.modules.feature_norm import FeatureNorm
from unicode_fast.modules.linear import Linear
from unicode_fast.modules.model import Encoded, ModelOutput, Specific, UniCode, as_read, in_mode
from unicode_fast.modules.precision import autocast_context

# Of the output of layer 2 in `ModelOutput.levels`, and of its loss terms.
SECOND = "second"


class ResidualEncoder(nn.Module):
    """Encoder of layer 2 for one modality.

    Args:
        specific_width: Y, of layer 1's specific features.
        config: sizes.
    """

    def __init__(self, specific_width: int, config: ModelConfig) -> None:
        super().__init__()
        self.temporal = TemporalRelation(specific_width, config)
        self.specific = VectorSpecificEncoder(specific_width, specific_width)

    def forward(self, specific: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, T, Y) to z2, (B, T, D), and spec2, (B, T, Y)."""
        return self.temporal(specific, mask), self.specific(specific)


class ResidualDecoder(nn.Module):
    """Linear(2Y, Y) of [Linear(D, Y)(zq2), spec2]."""

    def __init__(self, specific_width: int, width: int) -> None:
        super().__init__()
        self.code = Linear(width, specific_width)
        self.output = Linear(2 * specific_width, specific_width)

    def forward(self, codeword: Tensor, specific: Tensor) -> Tensor:
        """(B, T, D) and (B, T, Y) to (B, T, Y)."""
        return self.output(torch.cat([self.code(codeword), specific], -1))


class SecondLayer(UniCode):
    """Layer 2: a Uni-Code model of specific features, without code matching, assignment and lexicon.

    Args:
        modalities: kind and shape by name, as of layer 1.
        config: of the whole model.
    """

    def __init__(self, modalities: Mapping[str, Modality], config: Config) -> None:
        # Another seed gives the layers different draws of resets, contexts and permutations.
        super().__init__(modalities, config.replace_all(**WITHOUT_SHARING, seed=config.train.seed ^ (1 << 62)))

    def build(self) -> None:
        """Makes the modules: those of Uni-Code with encoders and decoders of specific features."""
        super().build()
        sizes = self.config.model
        widths = {
            name: sizes.grid_club_width if kind.kind == "grid" else sizes.vector_specific_width
            for name, kind in self.modalities.items()
        }
        self.encoders = nn.ModuleDict({name: ResidualEncoder(width, sizes) for name, width in widths.items()})
        self.decoders = nn.ModuleDict({name: ResidualDecoder(width, sizes.width) for name, width in widths.items()})

    def output(self, first: ModelOutput) -> ModelOutput:
        """The output of layer 2 for a batch, from that of layer 1; the target of its decoders keeps its gradient."""
        output = ModelOutput(first.mask, target=dict(first.club))
        for name, (z, specific) in first.more.items():
            output.semantic[name], output.club[name] = self.normalise(name, z, output), specific
        self.quantise(output)
        for name, vector in output.quantised.items():
            output.decoded[name] = self.decode_vectors(name, vector, output.club[name])
        return output


class HDcidModel(UniCode):
    """Uni-Code with a second layer; `encode` returns pairs of codes.

    Attributes:
        second: layer 2.
        second_from: () int64, number of steps of the warm start.
    """

    second_from: Tensor

    def build(self) -> None:
        """Makes the modules of both layers."""
        super().build()
        self.second = SecondLayer(self.modalities, self.config)
        self.register_buffer("second_from", torch.zeros((), dtype=torch.int64))
        self.begin(self.config.train.steps)

    def begin(self, steps: int) -> None:
        """Sets the warm start by the number of steps of the run; 0 leaves none."""
        self.second_from.fill_(round(self.config.method.hdcid_warmup * steps))

    @property
    def code_sizes(self) -> tuple[int, ...]:
        """(M, M), of the codes of both layers."""
        return (self.config.model.codewords,) * 2

    @property
    def codebooks(self) -> tuple[Tensor, ...]:
        """Those of both layers, (M, D) each."""
        return self.codebook.codebook, self.second.codebook.codebook

    @property
    def counts(self) -> Tensor:
        """() in the model's dtype: 0 in the warm start, 1 afterwards."""
        return (self.codebook.step >= self.second_from).to(self.dtype)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """As in `UniCode`. Encoders of both layers are clipped together, decoders too; each Cross-CPC alone."""
        groups = super().parameter_groups()
        for name, parameters in self.second.parameter_groups().items():
            key = f"{SECOND}.cpc" if name == "cpc" else name
            groups[key] = [*groups.get(key, []), *parameters]
        return groups

    def club_parameters(self) -> list[nn.Parameter]:
        """Those of both layers."""
        return [*super().club_parameters(), *self.second.club_parameters()]

    def encode_features(self, name: str, features: Tensor, mask: Tensor | None) -> tuple[Tensor, Specific]:
        """As in `UniCode`; `more` holds z2 before its normalisation, (B, T, D), and spec2, (B, T, Y)."""
        z, own = super().encode_features(name, features, mask)
        return z, own._replace(more=self._with_checkpoint(self._encode_second, name, own.club, mask))

    def _encode_second(self, name: str, club: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        with autocast_context(self.config.train, self.device):
            z, specific = self.second.encoders[name](*as_read(club, mask))
        return z.to(self.dtype), specific.to(self.dtype)

    def quantise(self, output: ModelOutput) -> None:
        """Adds the nearest codewords of layer 1, and the output of layer 2 in `levels`."""
        super().quantise(output)
        output.levels[SECOND] = self.second.output(output)

    @torch.no_grad()
    def update_codebook(self, output: ModelOutput, own: slice | None = None) -> None:
        """As in `UniCode`, for both layers."""
        super().update_codebook(output, own)
        self.second.update_codebook(output.levels[SECOND], own)

    @torch.no_grad()
    def encode(
        self,
        name: str,
        features: Tensor,
        mask: Tensor | None = None,
        *,
        check_values: bool = True,
        dropout: bool = False,
    ) -> Encoded:
        """As in `UniCode`: index i1 M + i2, (B, T), and the codewords of both layers joined, (B, T, 2D)."""
        first = super().encode(name, features, mask, check_values=check_values, dropout=dropout)
        encoder, residual, (given, mask) = self._encoder(name), self.second.encoders[name], as_read(features, mask)
        with in_mode(encoder, dropout), in_mode(residual, dropout):
            _, specific = encoder.encode_specific(encoder.read_words(given, mask))
            z, _ = residual(specific, mask)
        if self.second.norms:
            z = cast(FeatureNorm, self.second.norms[name]).by_running_moments(z)
        second = self.second.codebook.quantise({name: z})[name]
        index = first.index * self.config.model.codewords + second.index
        return Encoded(index, torch.cat([first.vector, second.codeword], -1))

    def decoder_vectors(self, name: str, codes: Tensor) -> Tensor:
        """The codewords of layer 1, (..., D); the decoder of layer 2 gives no features of the modality."""
        return self.codebook.codebook[self.choices(codes)[..., 0]]


class HDcidMethod(UniCodeMethod):
    """Losses of both layers; terms of layer 2 begin with "second."."""

    model: HDcidModel

    def __init__(self, model: UniCode) -> None:
        super().__init__(model)
        self.second = UniCodeMethod(self.model.second)

    def _set_club_gradients(self, output: ModelOutput) -> None:
        """As in `UniCodeMethod`, for both layers; the networks of layer 2 have gradient 0 in the warm start."""
        super()._set_club_gradients(output)
        self.second._set_club_gradients(output.levels[SECOND])
        counts = self.model.counts
        for parameter in self.model.second.club.parameters():
            parameter.grad = cast(Tensor, parameter.grad) * counts

    def alignment(self, output: ModelOutput, draws: Draws | None = None) -> dict[str, Tensor]:
        """Terms of layer 1, and those of layer 2 with its reconstruction, which compares vectors only."""
        level = output.levels[SECOND]
        second = {**self.second.reconstruction(level), **self.second.alignment(level, draws)}
        return {**super().alignment(output, draws), **self._weighted(second)}

    def contrast(
        self, output: ModelOutput, draws: Draws | None = None, rows: slice = slice(None)
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Cross-CPC of both layers, and the share of clips that each recognises."""
        terms, recognised = super().contrast(output, draws, rows)
        second, shares = self.second.contrast(output.levels[SECOND], draws, rows)
        recognised |= {f"{SECOND} {direction}": share for direction, share in shares.items()}
        return {**terms, **self._weighted(second)}, recognised

    def _weighted(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        weight = self.config.method.hdcid_weight * self.model.counts
        return {f"{SECOND}.{name}": weight * term for name, term in terms.items()}


RECIPE: Recipe = Recipe("H-DCID", WITHOUT_SHARING, model=HDcidModel, method=HDcidMethod, micro_batches=False)
