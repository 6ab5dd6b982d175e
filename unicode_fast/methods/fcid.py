"""FCID: disentanglement at two levels, seconds and clips, with one codebook over clips.

Fine level: each second of the timed modalities, such as audio and video, is disentangled by CLUB, and Cross-CPC
connects these modalities. Features of seconds are not quantised. Coarse level: the mean of a clip passes a projector,
one for all timed modalities, another one for words; two layers part the result into general and specific features.
CLUB disentangles the two, InfoNCE connects the general features of timed modalities with those of words, and the
codebook holds the general features of all.

Source:
    Huang et al., Findings of ACL 2025, arXiv 2403.05168v3, and its released code, folder ACL25-FCID&TOC of
    haihuangcode/CMG. Preset `official` follows the code. It differs from the paper's figure in two points: audio and
    video pass their projector one after the other, not concatenated, and Cross-CPC predicts one step, not two.

Our version:
    Means over a clip and attention leave padding out, and modalities may differ in length. Without words, InfoNCE
    connects each pair of timed modalities. With one timed modality Cross-CPC predicts that modality alone. Where
    `code_matching_directions` is "both", InfoNCE has both directions; released are rows. Where `fcid_target` is
    "fixed", the target of the coarse decoders has no gradient, so a projector cannot shrink it. A reset codeword
    gets uniform noise of both signs; the released noise is one constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations, product
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unicode_fast import losses
from unicode_fast.config import Config, Modality
from unicode_fast.methods.base import Draws
from unicode_fast.methods.recipe import Recipe
from unicode_fast.methods.uni_code import ClubFeatures, UniCodeMethod
from unicode_fast.modules.club import ClubNetwork
from unicode_fast.modules.cpc import CrossCPC, clip_mean
from unicode_fast.modules.decoders import VectorDecoder
from unicode_fast.modules.encoders import ModalityEncoder
from unicode_fast.modules.linear import Linear
from unicode_fast.modules.model import CodebookBatch, ModelOutput, UniCode
from unicode_fast.ops import cross_info_nce

# Modalities with a common projector: those with a time axis, and sentences.
TIMED, WORDS = "timed", "words"
# The level of clips in `ModelOutput.levels`.
COARSE = "coarse"


class CoarseFeatures(NamedTuple):
    """Features of clips, (..., D): projected h, general g >= 0, specific c >= 0."""

    projected: Tensor
    general: Tensor
    specific: Tensor


class CoarseEncoder(nn.Module):
    """Projector, and the layers that part its result into general and specific features.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = Linear(width, width)
        self.general = Linear(width, width)
        self.specific = Linear(width, width)

    def forward(self, z: Tensor) -> CoarseFeatures:
        """Features of z, (..., D)."""
        projected = self.project(z)
        return CoarseFeatures(projected, F.relu(self.general(projected)), F.relu(self.specific(projected)))


class WordsEncoder(ModalityEncoder):
    """Words enter the temporal layers without LSTM, and have no specific features at the fine level."""

    def __init__(self, modality: Modality, config: Config) -> None:
        super().__init__(Modality("vector", modality.shape), config.model)
        del self.specific

    def encode_specific(self, read: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features of width 0."""
        empty = read.new_empty(*read.shape[:2], 0)
        return empty, empty


class FcidModel(UniCode):
    """The two levels of FCID. Decoders of timed modalities read z, those of clips a codeword and specific features.

    `encode` gives a codeword to each second of a timed modality: projector and general layer read z of that second, as
    in the released probes. A sentence has one codeword, that of its mean, repeated at each position.

    Raises:
        ValueError: all modalities are of kind "words".
    """

    def build(self) -> None:
        """Makes the modules."""
        super().build()
        sizes, method = self.config.model, self.config.method
        kinds = {TIMED: [], WORDS: []}  # type: dict[str, list[str]]
        for name, modality in self.modalities.items():
            kinds[WORDS if modality.kind == "words" else TIMED].append(name)
        if not kinds[TIMED]:
            raise ValueError(f"modalities must have one with a time axis, got {', '.join(self.names)} of kind words")
        self.groups = {group: names for group, names in kinds.items() if names}
        for name in kinds[WORDS]:
            self.encoders[name] = WordsEncoder(self.modalities[name], self.config)
            del self.decoders[name], self.club[name]
        self.lexicon = nn.ModuleDict()
        self.cpc = CrossCPC(tuple(kinds[TIMED]), sizes, method, self.config.train)
        self.coarse = nn.ModuleDict({group: CoarseEncoder(sizes.width) for group in self.groups})
        self.coarse_decoders = nn.ModuleDict(
            {name: VectorDecoder(sizes.width, sizes.width, sizes.width) for name in self.names}
        )
        for group in self.groups:
            self.club[club_of(group)] = ClubNetwork(sizes.width, sizes.width, sizes.club_hidden_width)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """As in `UniCode`; projectors belong to the encoders, decoders of both levels together."""
        groups = super().parameter_groups()
        groups["encoders"] += self.coarse.parameters()
        groups["decoders"] += self.coarse_decoders.parameters()
        return groups

    def quantise(self, output: ModelOutput) -> None:
        """Adds the level of clips to `output`, (B, 1, D) by modality, and its indices and codewords."""
        coarse = ModelOutput(None)
        for name, z in output.semantic.items():
            mean = clip_mean(z, None if output.mask is None else output.mask[name]).unsqueeze(1)
            projected, coarse.semantic[name], coarse.club[name] = self._coarse(name)(mean)
            moving = self.config.method.fcid_target == "moving"
            coarse.target[name] = projected if moving else projected.detach()
        super().quantise(coarse)
        for name, vector in coarse.quantised.items():
            coarse.decoded[name] = self.coarse_decoders[name](vector, coarse.club[name])
        output.levels[COARSE] = coarse
        output.index.update(coarse.index)
        output.codeword.update(coarse.codeword)

    def decoder_inputs(self, vectors: Mapping[str, Tensor], whole: ModelOutput, clips: slice) -> dict[str, Tensor]:
        """Z of timed modalities; words have no decoder at the fine level."""
        return {name: vectors[name] for name in self.groups[TIMED]}

    def decoder_vectors(self, name: str, codes: Tensor) -> Tensor:
        """None: decoders of positions read z, and those of codes give a clip's projected mean.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"method must have a decoder from codes to features of {name!r}, got method 'fcid'")

    def codebook_batch(self, output: ModelOutput) -> CodebookBatch:
        """General features and indices of clips."""
        coarse = output.levels[COARSE]
        return CodebookBatch(coarse.semantic, coarse.index, None)

    def code_features(self, name: str, z: Tensor, mask: Tensor | None) -> Tensor:
        """General features of each second, or of a sentence at each of its positions."""
        if name not in self.groups[TIMED]:
            z = clip_mean(z, mask).unsqueeze(1).expand_as(z)
        return self._coarse(name)(z).general

    def _coarse(self, name: str) -> CoarseEncoder:
        return cast(CoarseEncoder, self.coarse[TIMED if name in self.groups[TIMED] else WORDS])


def club_of(group: str) -> str:
    """Name of the CLUB network of clips; it is no identifier, so no modality has it."""
    return f"{COARSE}-{group}"


class FcidMethod(UniCodeMethod):
    """Losses of FCID: those of Uni-Code's frame at the coarse level, with CLUB and Cross-CPC at the fine level too.

    Args:
        model: an `FcidModel`.
    """

    model: FcidModel

    def alignment(self, output: ModelOutput, draws: Draws | None = None) -> dict[str, Tensor]:
        """Commitment, code matching, reconstruction and InfoNCE of clips, and CLUB of both levels."""
        method, coarse = self.config.method, output.levels[COARSE]
        terms: dict[str, Tensor] = {}
        self._commitment(coarse, terms)
        self._code_matching(coarse, terms)
        self._club(output, draws or Draws(), terms)
        for name, decoded in coarse.decoded.items():
            error = losses.reconstruction(decoded, coarse.target[name])
            terms[f"coarse_reconstruction.{name}"] = method.reconstruction_weight * error
        terms["fcid"] = method.align_weight * self._between_clips(coarse)
        return terms

    def contrast(
        self, output: ModelOutput, draws: Draws | None = None, rows: slice = slice(None)
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Cross-CPC of timed modalities."""
        return super().contrast(self._fine(output), draws, rows)

    def _fine(self, output: ModelOutput) -> ModelOutput:
        """The timed modalities of an output."""

        def timed(values: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: values[name] for name in self.model.groups[TIMED]}

        mask = None if output.mask is None else timed(output.mask)
        return ModelOutput(mask, semantic=timed(output.semantic), club=timed(output.club))

    def _club_features(self, output: ModelOutput) -> ClubFeatures:
        """Z and specific features of timed modalities, then those of clips, of the modalities of a group together."""
        fine, coarse = self._fine(output), output.levels[COARSE]
        given, specific, masks = dict(fine.semantic), dict(fine.club), dict[str, Tensor | None](fine.mask or {})
        for group, names in self.model.groups.items():
            given[club_of(group)] = torch.cat([coarse.semantic[name] for name in names])
            specific[club_of(group)] = torch.cat([coarse.club[name] for name in names])
        return ClubFeatures(given, specific, {name: masks.get(name) for name in given})

    def _official_estimate(
        self, name: str, predicted: tuple[Tensor, Tensor, Tensor], permutation: Tensor, mask: Tensor | None
    ) -> Tensor:
        if name in self.model.names:
            return super()._official_estimate(name, predicted, permutation, mask)
        mean, log_variance, specific = (tensor.squeeze(1) for tensor in predicted)
        return club_of_clips(mean, log_variance, specific, permutation)

    def _between_clips(self, coarse: ModelOutput) -> Tensor:
        """Sum over pairs of InfoNCE, with cosine similarity and the batch's other clips as negatives."""
        method, names = self.config.method, self.model.names
        timed, words = (self.model.groups.get(group, []) for group in (TIMED, WORDS))
        weights = torch.zeros(len(names), len(names), device=self.model.device)
        for query, key in product(timed, words) if words else combinations(timed, 2):
            weights[names.index(query), names.index(key)] = 1
        unit = F.normalize(torch.stack([coarse.semantic[name] for name in names]), dim=-1).transpose(1, 2)
        return cross_info_nce(
            unit,
            unit,
            weights,
            softmax_over="predictions" if method.code_matching_directions == "rows" else "both",
            temperature=method.fcid_temperature,
        ).loss


def club_of_clips(mean: Tensor, log_variance: Tensor, specific: Tensor, permutation: Tensor) -> Tensor:
    """The mutual information estimate of the released code for vectors of clips, which have no time axis.

    The code takes their channels for time and the clips for channels. So it averages over channels and adds clips:
    sum_i [mean_c (mu_ic - y_jc)^2 - mean_c (mu_ic - y_ic)^2] / (2 exp(mean_c log var_ic)) with j = permutation(i).

    Args:
        mean: mu, (N, C).
        log_variance: (N, C).
        specific: y, (N, C).
        permutation: (N,) int64, the negative of each clip.
    """
    own, other = ((mean - one).square().mean(1) for one in (specific, specific[permutation]))
    return ((other - own) / log_variance.mean(1).exp()).sum() / 2


RECIPE: Recipe = Recipe(
    "FCID",
    {"temporal_layers": 1, "commitment_partners": "all"},
    model=FcidModel,
    method=FcidMethod,
)
