"""A model with its optimisers, and the training step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from unicode_fast import checkpoint
from unicode_fast.config import Config, Modality
from unicode_fast.data import BatchSource
from unicode_fast.methods import UniCodeMethod
from unicode_fast.modules import ModelOutput, UniCode
from unicode_fast.modules.precision import float32_products
from unicode_fast.training.acceleration import GraphedStep, accelerate, check_acceleration
from unicode_fast.training.metrics_logger import StepResult
from unicode_fast.training.shard import Shard
from unicode_fast.training.step import backward, micro_batches

# Vectors that initial codewords are chosen or computed from, for each codeword.
INIT_ROWS_PER_CODEWORD = 80


class Trainer:
    """A model with its optimisers, and the step that changes them.

    Args:
        config: of the run.
        modalities: kind and shape by name.
        device: where it trains.

    Raises:
        ValueError: the configuration asks for what this device does not have.
    """

    def __init__(self, config: Config, modalities: Mapping[str, Modality], device: torch.device) -> None:
        check_acceleration(config.train, device)
        torch.manual_seed(config.train.seed)
        self.config = config
        self.model = UniCode(modalities, config).to(device)
        accelerate(self.model, config.train)
        self.method = UniCodeMethod(self.model)
        self.parts = self.model.parameter_groups()
        self.parameters = [parameter for part in self.parts.values() for parameter in part]
        graphed = config.train.cuda_graph
        rate = torch.tensor(config.train.learning_rate, device=device) if graphed else config.train.learning_rate
        self.optimizer = torch.optim.Adam(self.parameters, rate, fused=True, capturable=graphed)
        self.club_optimizer = torch.optim.Adam(
            self.model.club.parameters(), config.method.club_learning_rate, fused=True, capturable=graphed
        )
        optimizers = (self.optimizer, self.club_optimizer)
        self.graphed = GraphedStep(self.plain_step, self.model, optimizers) if graphed else None
        self.step = 0

    def train_step(
        self,
        features: Mapping[str, Tensor],
        mask: Mapping[str, Tensor] | None,
        rate: float,
        shard: Shard | None = None,
    ) -> StepResult:
        """One batch at a learning rate; nothing is read back. With `cuda_graph` the next call overwrites the result.

        Args:
            features: (B, T, ...) by modality.
            mask: (B, T) bool by modality, or None.
            rate: the learning rate.
            shard: which clips of a batch that ranks share these are; None for all of it. Each rank ends with the model
                that one would have from the whole batch, to rounding and but for dropout.
        """
        self.model.train()
        if shard is not None:
            # Of seed, step and rank alone, so that a run goes on with any number of ranks.
            torch.manual_seed(self._seed_of(self.step, shard.group.rank()))
        group = self.optimizer.param_groups[0]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
        with float32_products(self.config.train, self.model.device):
            result = self.graphed(features, mask) if self.graphed else self.plain_step(features, mask, shard)
        self.step += 1
        return result

    def plain_step(
        self, features: Mapping[str, Tensor], mask: Mapping[str, Tensor] | None, shard: Shard | None = None
    ) -> StepResult:
        """Forward, CLUB's inner steps, losses, backward, clipping, Adam, MM-EMA."""
        self.optimizer.zero_grad(set_to_none=True)
        pieces = micro_batches(features, mask, self.config.train.micro_batches)
        output, result = backward(self.method, self.club_optimizer, pieces, shard)
        for group in self.parts.values():
            clip_grad_norm_(group, self.config.train.clip_norm)
        self.optimizer.step()
        self.model.update_codebook(output, None if shard is None else shard.own)
        return StepResult(result.terms, result.recognised, usage(output, self.config.model.codewords))

    def _seed_of(self, step: int, rank: int) -> int:
        sequence = np.random.SeedSequence([self.config.train.seed, step, rank])
        return int(sequence.generate_state(1, np.uint64)[0])

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the model, to go on bit for bit."""
        state: dict[str, Any] = {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "club_optimizer": self.club_optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        if self.model.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.model.device)
        return state

    def restore(self, content: Mapping[str, Any]) -> None:
        """Continues from a checkpoint, which may have been written on another device, by steps in a graph or not."""
        checkpoint.load_model(self.model, content, checkpoint.where_of(content))
        # Their options stay those of this trainer: a graph reads the learning rate from a tensor.
        checkpoint.load_optimizer(self.optimizer, content, "optimizer")
        checkpoint.load_optimizer(self.club_optimizer, content, "club_optimizer")
        if self.graphed is not None:
            # The optimisers have other tensors now.
            self.graphed.captured.clear()
        self.step = content["step"]
        checkpoint.load_generators(content, self.model.device)


def usage(output: ModelOutput, codewords: int) -> dict[str, Tensor]:
    """How often each modality chose each codeword in a batch: (M,) float32 by modality."""
    counts = {}
    for name, index in output.index.items():
        weight = torch.ones_like(index, dtype=torch.float32) if output.mask is None else output.mask[name].float()
        zeros = torch.zeros(codewords, device=index.device)
        counts[name] = zeros.index_add_(0, index.flatten(), weight.flatten())
    return counts


def learning_rate(config: Config, step: int, total: int, epoch_steps: int) -> float:
    """The rate of a step: linear warm-up, then constant, cosine to a hundredth, or halved after epochs 10, 20, 30."""
    train = config.train
    rate = train.learning_rate * min(1.0, (step + 1) / max(train.warmup_steps, 1))
    if train.schedule == "cosine":
        progress = max(0, step - train.warmup_steps) / max(1, total - train.warmup_steps)
        return rate * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)
    if train.schedule == "multistep":
        return rate * 0.5 ** sum(step // epoch_steps >= epoch for epoch in (10, 20, 30))
    return rate


def initialise_codebook(trainer: Trainer, batches: BatchSource, device: torch.device, ranks: int = 1) -> None:
    """Codewords from the features of the first batches, all modalities mixed, as `codebook_init` says.

    Where features are normalised, these are not yet: codewords that no normalised feature is near are soon revived from
    features that the encoders have begun to learn, which serves words better.

    Args:
        trainer: whose codebook it is.
        batches: that it will train on.
        device: of the model.
        ranks: how many will share a batch; this one encodes as few clips at once as each of them will.
    """
    method, sizes = trainer.config.method, trainer.config.model
    if method.codebook_init == "uniform":
        return
    rows: list[np.ndarray] = []
    wanted, step = INIT_ROWS_PER_CODEWORD * sizes.codewords, 0
    trainer.model.eval()
    while sum(map(len, rows)) < wanted and step < batches.steps_per_epoch:
        batch = batches.batch(step)
        encoded: dict[str, list[Tensor]] = {name: [] for name in trainer.model.names}
        for micro in micro_batches(batch.features, batch.mask, trainer.config.train.micro_batches * ranks):
            features, mask = (
                {name: tensor.to(device) for name, tensor in tensors.items()}
                for tensors in (micro.features, micro.mask or {})
            )
            with torch.no_grad():
                output = trainer.model(features, mask)
            for name, z in output.semantic.items():
                encoded[name].append(z.cpu())
        # Modality after modality, however many parts there are, so that the same rows are drawn.
        rows += [torch.cat(encoded[name])[batch.mask[name]].numpy() for name in encoded]
        step += 1
    data = np.concatenate(rows)
    generator = np.random.default_rng([trainer.config.train.seed, 7])
    if len(data) < sizes.codewords:
        raise ValueError(f"codewords must be at most the {len(data)} vectors of an epoch, got {sizes.codewords}")
    if method.codebook_init == "kmeans":
        from sklearn.cluster import KMeans

        chosen = KMeans(sizes.codewords, n_init=1, max_iter=20, random_state=trainer.config.train.seed).fit(data)
        codewords = chosen.cluster_centers_
    else:
        codewords = data[generator.choice(len(data), sizes.codewords, replace=False)]
    trainer.model.codebook.initialise(torch.as_tensor(codewords, dtype=trainer.model.dtype, device=device))
