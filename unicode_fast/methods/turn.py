"""TURN: a contrastive loss of pooled features, and masked positions rebuilt from the codes of the other modalities.

    L_contrast = mean over pairs m != n of mean_i -log softmax_j(cos(mean_t z^m_it, mean_t z^n_jt) / tau) at j = i
    L_masked   = sum_m mean over masked positions of |x^m_t - D^m(x^m with zeros at masked positions, q^n, n != m)_t|

D^m is one layer of a transformer decoder. Its queries are a linear layer of the masked input. It attends to q, the
quantised vectors of the other modalities, whose gradient passes straight through to their encoders.

Source:
    Zhao et al., "Towards Effective Multi-Modal Interchanges in Zero-Resource Sounding Object Localization", NeurIPS
    2022: the alignment stream, Eq. 7 with the missing sign, in the frame of Uni-Code.
    Our version: weights 1, tau 0.07 and mask 0.3 (public code, AwalkZY/TURN: 0.1, 0.1 and 0.5 growing to 1); both
    directions of the contrastive loss (theirs: one); one codebook (theirs: two groups). Every modality is rebuilt in l1
    (theirs: words by cross-entropy) from its own masked input and the codes of all others together. Their decoders read
    one code of the clip, ours one of each position; masked positions are zeros. Queries and codes have sinusoidal
    codes of their positions, because masked positions are equal otherwise. A grid is read and rebuilt as the mean of
    its cells. Targets have no gradient, and decoders no dropout. The error is divided by the expected number of masked
    positions, so that micro-batches add up. `turn_decoder` "reuse" masks nothing: the model's decoders rebuild each
    modality from its specific features and the codes of each other one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from unicode_fast import losses
from unicode_fast.config import Config, Modality, ModelConfig
from unicode_fast.methods.recipe import Recipe, compared
from unicode_fast.modules.alignment import Alignment, Draw
from unicode_fast.modules.cpc import at_positions, clip_mean
from unicode_fast.modules.linear import Linear
from unicode_fast.modules.model import ModelOutput, UniCode
from unicode_fast.modules.precision import autocast_context

# Streams of the counter-based generator, one for each modality from this one on.
MASK_STREAM = 210


class Turn(Alignment):
    """The contrastive loss as a term of the batch, cross-modal reconstruction as terms of the clips.

    Raises:
        ValueError: `turn_mask` is 0 where `turn_decoder` is "masked".
    """

    def __init__(self, modalities: Mapping[str, Modality], config: Config) -> None:
        super().__init__(modalities, config)
        self.kinds = {name: modality.kind for name, modality in modalities.items()}
        self.decoders = nn.ModuleDict()
        if config.method.turn_decoder == "masked":
            if config.method.turn_mask == 0:
                raise ValueError("turn_mask must be above 0 where turn_decoder is 'masked', got 0.0")
            for name, modality in modalities.items():
                by_lstm = modality.kind == "words" and config.method.word_target == "lstm"
                channels = config.model.word_width if by_lstm else modality.shape[-1]
                self.decoders[name] = MaskedDecoder(channels, config.model)

    def batch_terms(self, model: UniCode, output: ModelOutput, draw: Draw) -> dict[str, Tensor]:
        """The term "turn.contrast"."""
        method, masks = self.config.method, self._masks(output)
        pooled = torch.stack([clip_mean(output.semantic[name], masks[name]) for name in self.names])
        return {"turn.contrast": method.align_weight * pooled_contrast(pooled, method.align_temperature)}

    def clip_terms(
        self, model: UniCode, output: ModelOutput, draw: Draw, shares: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        """The terms "turn.reconstruction.NAME"."""
        terms = {}
        for number, name in enumerate(self.names):
            if self.config.method.turn_decoder == "reuse":
                error = self._reused(model, output, name)
            else:
                error = self._masked(model, output, name, draw, MASK_STREAM + number)
            weighted = self.config.method.align_weight * error
            terms[f"turn.reconstruction.{name}"] = weighted if shares is None else shares[name] * weighted
        return terms

    def _masked(self, model: UniCode, output: ModelOutput, name: str, draw: Draw, stream: int) -> Tensor:
        """Mean error of masked positions: over valid positions, divided by the probability of a mask."""
        masks, others = self._masks(output), [other for other in self.names if other != name]
        target = output.target[name].detach()
        if self.kinds[name] == "grid":
            target = target.mean((2, 3))
        probability = self.config.method.turn_mask
        clips = len(target) if output.clips.stop is None else output.clips.stop
        hidden = draw(stream, (clips, target.shape[1]))[output.clips] < probability  # (b, T)
        decoder = cast(MaskedDecoder, self.decoders[name])
        with autocast_context(model.config.train, model.device):
            decoded = decoder(
                target.masked_fill(hidden.unsqueeze(-1), 0),
                [output.quantised[other] for other in others],
                masks[name],
                None if output.mask is None else [output.mask[other] for other in others],
            )
        error = (decoded.to(target.dtype) - target).abs().mean(-1)
        return losses.masked_mean(error * hidden, masks[name]) / probability

    def _reused(self, model: UniCode, output: ModelOutput, name: str) -> Tensor:
        """Mean error of the model's decoder with the codes of another modality, mean over the others."""
        masks, target, errors = self._masks(output), output.target[name].detach(), []
        for other in self.names:
            if other != name:
                codes = at_positions(output.quantised[other], masks[other], target.shape[1])
                decoded = model.decode_vectors(name, codes, output.specific[name]).to(target.dtype)
                errors.append(losses.masked_mean((decoded - target).abs(), masks[name]))
        return torch.stack(errors).mean()

    def _masks(self, output: ModelOutput) -> dict[str, Tensor | None]:
        return {name: None if output.mask is None else output.mask[name] for name in self.names}


def pooled_contrast(pooled: Tensor, temperature: float) -> Tensor:
    """L_contrast: InfoNCE of clips, mean over ordered pairs of different modalities.

    Args:
        pooled: (M, B, D), one vector for each clip and modality; M is at least 2.
        temperature: tau.

    Returns:
        ().
    """
    by_pair = losses.info_nce(pooled, pooled, temperature).mean(-1)  # (M, M)
    number = len(by_pair)
    return (by_pair.sum() - by_pair.diagonal().sum()) / (number * (number - 1))


class MaskedDecoder(nn.Module):
    """One layer of a transformer decoder, from masked input and codes of other modalities to the input.

    Args:
        channels: of the input.
        config: `width`, `temporal_heads` and `feedforward_width` are read.
    """

    def __init__(self, channels: int, config: ModelConfig) -> None:
        super().__init__()
        self.read = Linear(channels, config.width)
        self.layer = nn.TransformerDecoderLayer(
            config.width, config.temporal_heads, config.feedforward_width, dropout=0.0, batch_first=True
        )
        self.output = Linear(config.width, channels)

    def forward(
        self, masked: Tensor, codes: Sequence[Tensor], valid: Tensor | None, valid_codes: Sequence[Tensor] | None
    ) -> Tensor:
        """The reconstruction.

        Args:
            masked: input with zeros at masked positions, (B, T, C).
            codes: quantised vectors of each other modality, (B, its T, D).
            valid: (B, T) bool, or None.
            valid_codes: (B, its T) bool of each other modality, or None.

        Returns:
            (B, T, C).
        """
        queries = self.read(masked)
        decoded = self.layer(
            queries + position_codes(queries),
            torch.cat([vectors + position_codes(vectors) for vectors in codes], 1),
            tgt_key_padding_mask=None if valid is None else ~valid,
            memory_key_padding_mask=None if valid_codes is None else ~torch.cat(list(valid_codes), 1),
        )
        rebuilt: Tensor = self.output(decoded)
        return rebuilt


def position_codes(sequence: Tensor) -> Tensor:
    """Sines and cosines of the positions, (T, D), for a sequence (B, T, D).

    Source:
        Vaswani et al., NeurIPS 2017, section 3.5, with all sines before all cosines.
    """
    positions, width = sequence.shape[1:]
    half = (width + 1) // 2
    exponents = torch.arange(half, device=sequence.device, dtype=sequence.dtype) * (-2 / width)
    angles = torch.arange(positions, device=sequence.device, dtype=sequence.dtype)[:, None] * 10000**exponents
    return torch.cat([angles.sin(), angles.cos()], -1)[:, :width]


RECIPE: Recipe = compared("TURN", Turn)
