"""CODIS: a teacher's assignment of clips to codewords guides the student of the other modality.

Of clip i in modality m, z^m_i is the unit-normalised mean of the student's semantic features, t^m_i that of its
teacher, an exponential moving average of the student. c_k are unit-normalised codewords, <,> is the scalar product:

    P^m_i     = softmax_k(<z^m_i, c_k> / gamma)                                   student's codes
    T^m       = argmin_T sum_ik T_ik (1 - <t^m_i, c_k>) - epsilon H(T), with T 1 = 1/B, T^T 1 = 1/M
    code      = -sum_ik T^a_ik log P^b_ik - sum_ik T^b_ik log P^a_ik              cross-view prediction
    transport = sum_m sum_ik T^m_ik (1 - <z^m_i, c_k>)
    contrast  = 1/4 sum of InfoNCE(z^a, t^a), (z^b, t^b), (z^a, t^b), (z^b, t^a)  momentum contrast

with InfoNCE(z, t) = -mean_i log softmax_j(<z_i, t_j> / tau)_i, where j also counts a queue of former teacher features.
The loss is the sum of the three terms. T has no gradient.

Source:
    Duan et al., "Multi-modal Alignment using Representation Codebook", CVPR 2022 (teacher of one view, student of the
    other, codebook of cluster centres, optimal transport); it has no public code. Our version: the formulas above.
    Sinkhorn and Knopp's algorithm in the log domain finds T, with columns first and rows last. Momentum contrast as in
    Li et al., "ALBEF", NeurIPS 2021. The losses of the method's fusion encoder have no counterpart here. More than two
    modalities average the loss over pairs. With `feature_norm` "batch" the moments of its own batch normalise the
    teacher's features. The codebook of the model holds the codewords. With `codis_codebook` "gradient" the loss trains
    their directions, without EMA and reset; their common length follows the mean length of semantic features, so that
    the nearest codeword is that of the largest cosine. With "ema" they follow the frame, as in the default with DCID.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import permutations
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from unicode_fast.config import Config, Modality
from unicode_fast.losses import balanced_assignment, masked_mean, soft_cross_entropy
from unicode_fast.methods.recipe import Recipe, compared
from unicode_fast.modules.alignment import Alignment, Draw
from unicode_fast.modules.cpc import clip_directions
from unicode_fast.modules.encoders import ModalityEncoder
from unicode_fast.modules.model import ModelOutput, UniCode, in_mode
from unicode_fast.modules.precision import autocast_context


class TeacherCodes(Alignment):
    """Teachers, queue, codewords trained by gradient, and the losses of CODIS.

    Attributes:
        teacher: the semantic half of each modality's encoder, without gradient.
        codewords: (M, D) of length 1, where `codis_codebook` is "gradient".
        length: (), that of the codewords in the codebook of the model, where `codis_codebook` is "gradient".
        queue: (modalities, Q, D), teacher features of former batches, where `codis_queue` is not 0.
        queued: (), the number of clips that the queue has received.
    """

    observes = True
    length: Tensor
    queue: Tensor
    queued: Tensor

    def __init__(self, modalities: Mapping[str, Modality], config: Config) -> None:
        super().__init__(modalities, config)
        method, sizes = config.method, config.model
        self.teacher = nn.ModuleDict()
        self.trains_codebook = method.codis_codebook == "gradient"
        if self.trains_codebook:
            self.codewords = nn.Parameter(torch.empty(sizes.codewords, sizes.width))
            self.register_buffer("length", torch.empty(()))
        if method.codis_queue:
            self.register_buffer("queue", torch.zeros(len(self.names), method.codis_queue, sizes.width))
            self.register_buffer("queued", torch.zeros((), dtype=torch.int64))

    def attach(self, model: UniCode) -> None:
        """Copies the encoders and the codewords."""
        for name, encoder in model.encoders.items():
            self.teacher[name] = copy.deepcopy(encoder).requires_grad_(False)
            del self.teacher[name].specific
        self.initialised(model)

    @torch.no_grad()
    def initialised(self, model: UniCode) -> None:
        """Takes over the directions of the codewords, and their mean length."""
        if self.trains_codebook:
            self.codewords.copy_(model.codebook.codebook)
            self.length.copy_(self.codewords.norm(dim=-1).mean())
            self._write_codebook(model)

    def observe(self, model: UniCode, name: str, features: Tensor, mask: Tensor | None) -> Tensor:
        """The teacher's semantic features, (b, T, D), before their normalisation; without dropout in every mode."""
        encoder = cast(ModalityEncoder, self.teacher[name])
        with in_mode(encoder, False), autocast_context(self.config.train, model.device):
            return encoder.encode_semantic(encoder.read_words(features, mask), mask).to(model.dtype)

    def batch_terms(self, model: UniCode, output: ModelOutput, draw: Draw) -> dict[str, Tensor]:
        """The terms "codis.code", "codis.transport" and "codis.contrast"."""
        method, names = self.config.method, self.names
        pairs = list(permutations(names, 2))
        student, teacher = clip_directions(output.semantic, output.mask), self._teacher_vectors(model, output)
        codewords = F.normalize(self.codewords if self.trains_codebook else model.codebook.codebook, dim=-1)
        scores = {name: z @ codewords.T for name, z in student.items()}  # (B, M)
        # B T, whose rows add up to 1.
        plan = {
            name: balanced_assignment(
                z @ codewords.T, sharpness=1 / method.codis_epsilon, rounds=method.codis_iterations
            )
            for name, z in teacher.items()
        }
        code = [soft_cross_entropy(scores[other] / method.codis_gamma, plan[one]).mean() for one, other in pairs]
        transport = [(plan[name] * (1 - scores[name])).sum(1).mean() for name in names]
        within = [self._contrast(student[name], name, teacher) for name in names]
        between = [self._contrast(student[one], other, teacher) for one, other in pairs]
        weight = method.align_weight
        return {
            "codis.code": 2 * weight * torch.stack(code).mean(),
            "codis.transport": 2 * weight * torch.stack(transport).mean(),
            "codis.contrast": weight * (torch.stack(within).mean() + torch.stack(between).mean()) / 2,
        }

    def after_step(self, model: UniCode, output: ModelOutput) -> None:
        """Updates queue, teachers and the codebook of the model."""
        method = self.config.method
        if method.codis_queue:
            vectors = torch.stack(list(self._teacher_vectors(model, output).values()))[:, -method.codis_queue :]
            places = (self.queued + torch.arange(vectors.shape[1], device=vectors.device)) % method.codis_queue
            self.queue.index_copy_(1, places, vectors)
            self.queued += vectors.shape[1]
        teachers, students = dict(self.teacher.named_parameters()), dict(model.encoders.named_parameters())
        update = get_ema_multi_avg_fn(method.codis_teacher_decay)
        update(list(teachers.values()), [students[name] for name in teachers], 1)
        if self.trains_codebook:
            masks = output.mask or dict.fromkeys(self.names)
            lengths = [masked_mean(output.semantic[name].norm(dim=-1), masks[name]) for name in self.names]
            self.length.lerp_(torch.stack(lengths).mean(), 1 - method.ema_decay)
            self._write_codebook(model)

    def _write_codebook(self, model: UniCode) -> None:
        """Scales the codewords to length 1, and writes them with their common length to the codebook of the model."""
        self.codewords.copy_(F.normalize(self.codewords, dim=-1))
        model.codebook.codebook.copy_(self.length * self.codewords)
        model.codebook.prepared().refresh()

    def _teacher_vectors(self, model: UniCode, output: ModelOutput) -> dict[str, Tensor]:
        """Unit-normalised teacher features of clips, (B, D) by modality."""
        seen = output.observed
        if model.norms:
            masks = output.mask or dict.fromkeys(seen)
            seen = {name: model.norms[name](z, masks[name])[0] for name, z in seen.items()}
        return clip_directions(seen, output.mask)

    def _contrast(self, student: Tensor, name: str, teacher: Mapping[str, Tensor]) -> Tensor:
        """InfoNCE of one modality's student, (B, D), and the teacher of the modality `name`."""
        scores = student @ teacher[name].T  # (B, B)
        if self.config.method.codis_queue:
            queue = self.queue[self.names.index(name)]
            empty = torch.arange(len(queue), device=queue.device) >= self.queued
            scores = torch.cat([scores, (student @ queue.T).masked_fill(empty, -torch.inf)], 1)  # (B, B + Q)
        clips = torch.arange(len(scores), device=scores.device)
        return F.cross_entropy(scores / self.config.method.align_temperature, clips)


RECIPE: Recipe = compared("CODIS", TeacherCodes, with_dcid={"codis_codebook": "ema"})
