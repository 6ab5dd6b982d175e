"""MST: transformer layers that all modalities share, and a contrastive loss of pooled features.

Attention and perceptron of the temporal layers belong to all modalities; each has its own input layers and LayerNorms.
With the cosine c_ij of clip i in one modality and clip j in another one, S = e^s c has a learnable scale e^s:

    L = -1/2 mean_i [ log softmax_j(S_ij) + log softmax_j(S_ji) ] at j = i

Source:
    You et al., "Learning Visual Representation from Modality-Shared Contrastive Language-Image Pre-training" (MS-CLIP),
    ECCV 2022, and the share list of the public repository Hxyou/MSCLIP: input and output projections of attention, and
    the perceptron. Radford et al., "CLIP", ICML 2021: the loss, the scale's initial value 1 / 0.07 and its limit 100.
    Our version: all temporal layers are shared, because the input layers before them are the modality's own; features
    are means over valid positions; pairs of modalities are averaged; the shared layers start as those of the first
    modality, and are clipped together with the scale.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unicode_fast.config import Config, Modality, ModelConfig
from unicode_fast.methods.recipe import Recipe, compared
from unicode_fast.modules.alignment import Alignment, Draw
from unicode_fast.modules.cpc import clip_directions
from unicode_fast.modules.encoders import ModalityEncoder
from unicode_fast.modules.model import ModelOutput, UniCode
from unicode_fast.modules.transformer import TransformerLayer

# Parts of a transformer layer that modalities share.
SHARED = ("self_attn", "linear1", "linear2")
LARGEST_LOG_SCALE = math.log(100)


class SharedTransformers(Alignment):
    """The shared parts of the temporal layers, the learnable scale, and the loss of MST over all pairs of modalities.

    Attributes:
        shared: attention and perceptron of each temporal layer.
        log_scale: s, ().
    """

    def __init__(self, modalities: dict[str, Modality], config: Config) -> None:
        super().__init__(modalities, config)
        self.shared = nn.ModuleList()
        start = -math.log(config.method.align_temperature)
        self.log_scale = nn.Parameter(torch.tensor(min(start, LARGEST_LOG_SCALE)))

    def attach(self, model: UniCode) -> None:
        """Takes the shared parts of the first modality, and replaces the temporal layers of all by `TiedLayer`."""
        stacks = [cast(ModalityEncoder, encoder).temporal.layers for encoder in model.encoders.values()]
        self.shared.extend(nn.ModuleDict({part: getattr(layer, part) for part in SHARED}) for layer in stacks[0])
        for layers in stacks:
            for number, shared in enumerate(self.shared):
                layers[number] = TiedLayer(cast(nn.ModuleDict, shared), self.config.model)

    def batch_terms(self, model: UniCode, output: ModelOutput, draw: Draw) -> dict[str, Tensor]:
        """The term "mst"."""
        scale = self.log_scale.exp()
        pooled = clip_directions(output.semantic, output.mask)
        terms = [
            symmetric_info_nce(scale * pooled[one] @ pooled[other].T) for one, other in combinations(self.names, 2)
        ]
        return {"mst": self.config.method.align_weight * torch.stack(terms).mean()}

    def after_step(self, model: UniCode, output: ModelOutput) -> None:
        """Limits the scale to 100."""
        self.log_scale.clamp_(max=LARGEST_LOG_SCALE)


class TiedLayer(TransformerLayer):
    """A transformer layer with its own LayerNorms, and attention and perceptron that another module owns.

    Args:
        shared: the parts by the names of `SHARED`.
        config: `width`, `temporal_heads`, `feedforward_width` and `dropout` are read.
    """

    def __init__(self, shared: nn.ModuleDict, config: ModelConfig) -> None:
        super().__init__(config.width, config.temporal_heads, config.feedforward_width, config.dropout)
        for name, part in shared.items():
            delattr(self, name)
            # A registered part would have a second name in the state dict.
            object.__setattr__(self, name, part)

    def _sa_block(
        self, x: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool = False
    ) -> Tensor:
        """As torch's, with dropout by the mode of this layer: the owner may be in another one."""
        layer, rows = self.self_attn, x.transpose(0, 1)
        attended, _ = F.multi_head_attention_forward(
            *(rows, rows, rows, layer.embed_dim, layer.num_heads, layer.in_proj_weight, layer.in_proj_bias),
            *(None, None, False, layer.dropout, layer.out_proj.weight, layer.out_proj.bias, self.training),
            key_padding_mask=key_padding_mask,
            need_weights=False,
            attn_mask=attn_mask,
            is_causal=is_causal,
        )
        return self.dropout1(attended.transpose(0, 1))


def symmetric_info_nce(scores: Tensor) -> Tensor:
    """Mean cross-entropy of rows and of columns, whose positives are on the diagonal; (B, B) to ()."""
    clips = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, clips) + F.cross_entropy(scores.T, clips)) / 2


RECIPE: Recipe = compared("MST", SharedTransformers)
