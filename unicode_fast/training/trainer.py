"""A model with its optimisers, and the training step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unicode_fast import checkpoint
from unicode_fast.config import Config, Modality
from unicode_fast.data import BatchSource
from unicode_fast.methods import make_method, make_model
from unicode_fast.methods.registry import check_method, needs_every_modality
from unicode_fast.modules import ModelOutput, UniCode, host
from unicode_fast.modules.precision import float32_precision
from unicode_fast.training.acceleration import GraphedStep, accelerate, check_acceleration, keep_freed_memory
from unicode_fast.training.metrics_logger import StepResult
from unicode_fast.training.optimiser import ClippedAdam
from unicode_fast.training.shard import Shard
from unicode_fast.training.step import backward, micro_batches

# Number of feature vectors for each initial codeword, which is one of them or a mean of them.
INIT_ROWS_PER_CODEWORD = 80


class Trainer:
    """A model with its optimisers, and its training step.

    Args:
        config: of the run.
        modalities: kind and shape by name.
        device: of the model.

    Raises:
        ValueError: device or method do not support the configuration.
    """

    def __init__(self, config: Config, modalities: Mapping[str, Modality], device: torch.device) -> None:
        check_acceleration(config.train, device)
        check_method(config)
        torch.manual_seed(config.train.seed)
        self.config = config
        self.model = make_model(modalities, config).to(device)
        accelerate(self.model, config.train)
        if device.type == "cpu":
            keep_freed_memory()
        self.method = make_method(self.model)
        groups = self.model.parameter_groups().values()
        graphed = config.train.cuda_graph
        rate = torch.tensor(config.train.learning_rate, device=device) if graphed else config.train.learning_rate
        self.optimizer = ClippedAdam(groups, rate, config.train.clip_norm, capturable=graphed)
        self.club_optimizer = ClippedAdam(
            [self.model.club_parameters()], config.method.club_learning_rate, capturable=graphed
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
        """One training step, without device synchronisation. With `cuda_graph` the next call overwrites the result.

        A model in evaluation mode is put into training mode, with all its modules.

        Args:
            features: (B, T, ...) by modality.
            mask: (B, T) bool by modality, or None. A clip without a valid position lacks the modality.
            rate: the learning rate.
            shard: the clips of this rank in a batch that ranks share; None for a whole batch. Except for rounding and
                dropout, each rank gets the model that one rank would train on the whole batch.

        Raises:
            ValueError: a clip lacks a modality, and preset or method refuses that. A GPU does not check it, because the
                check would wait for the device.
        """
        self._check_complete(mask or {})
        if not self.model.training:
            self.model.train()
        if shard is not None:
            # The seed depends on the run's seed, step and rank alone, so that a run resumes with any number of ranks.
            torch.manual_seed(self._seed_of(self.step, shard.group.rank()))
        group = self.optimizer.param_groups[0]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
        with float32_precision(self.config.train, self.model.device):
            result = self.graphed(features, mask) if self.graphed else self.plain_step(features, mask, shard)
        self.step += 1
        return result

    def _check_complete(self, mask: Mapping[str, Tensor]) -> None:
        needed_by = needs_every_modality(self.config)
        for name, valid in mask.items() if needed_by else ():
            there = valid.any(1)
            if host.is_on_host(there) and not there.all():
                raise ValueError(
                    f"mask must mark at least one position of every modality in every clip for {needed_by}, got none "
                    f"of {name!r} in clip {int(there.long().argmin())} of the batch"
                )

    def plain_step(
        self, features: Mapping[str, Tensor], mask: Mapping[str, Tensor] | None, shard: Shard | None = None
    ) -> StepResult:
        """Forward, CLUB's inner steps, losses, backward, clipping, Adam, MM-EMA."""
        self.optimizer.zero_grad(set_to_none=True)
        batches = micro_batches(features, mask, self.config.train.micro_batches)
        output, result = backward(self.method, self.club_optimizer, batches, shard)
        self.optimizer.step()
        self.model.update_codebook(output, None if shard is None else shard.own)
        return StepResult(result.terms, result.recognised, usage(self.model, output))

    def _seed_of(self, step: int, rank: int) -> int:
        sequence = np.random.SeedSequence([self.config.train.seed, step, rank])
        return int(sequence.generate_state(1, np.uint64)[0])

    def state(self) -> dict[str, Any]:
        """The state beside the model that a checkpoint needs to resume bit for bit."""
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
        """Restores a checkpoint, also one of another device or with another `cuda_graph`."""
        checkpoint.load_model(self.model, content, checkpoint.where_of(content))
        # The optimisers keep their options: a CUDA graph reads the learning rate from a tensor.
        checkpoint.load_optimizer(self.optimizer, content, "optimizer")
        checkpoint.load_optimizer(self.club_optimizer, content, "club_optimizer")
        if self.graphed is not None:
            # The captured graphs hold the former tensors of the optimisers.
            self.graphed.captured.clear()
        self.step = content["step"]
        checkpoint.load_generators(content, self.model.device)


def usage(model: UniCode, output: ModelOutput) -> dict[str, Tensor]:
    """How often each modality chose each codeword in a batch: (M,) float32 by modality."""
    counts = {}
    _, codes, mask = model.codebook_batch(output)
    for name, index in codes.items():
        weight = torch.ones_like(index, dtype=torch.float32) if mask is None else mask[name].float()
        zeros = torch.zeros(model.config.model.codewords, device=index.device)
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
    """Initialises the codebook from features of the first batches, all modalities mixed, by `codebook_init`.

    These features are not normalised, even if `feature_norm` is on. Codewords far from all normalised features are soon
    reset to features of partly trained encoders, which suits words better.

    Args:
        trainer: of the codebook.
        batches: of the training split.
        device: of the model.
        ranks: number of ranks that share a batch; this rank encodes as few clips at once as each of them.
    """
    model = trainer.model
    if trainer.config.method.codebook_init != "uniform":
        generator = np.random.default_rng([trainer.config.train.seed, 7])
        model.initialise_codebook(
            _first_features(trainer, batches, device, ranks), lambda rows: _choose(trainer, rows, generator)
        )
    model.alignment.initialised(model)


def _first_features(
    trainer: Trainer, batches: BatchSource, device: torch.device, ranks: int
) -> list[dict[str, Tensor]]:
    """Features of the first batches, (N, D) by modality, until there are enough for all codewords."""
    model, found = trainer.model, list[dict[str, Tensor]]()
    enough, rows, step = INIT_ROWS_PER_CODEWORD * trainer.config.model.codewords, 0, 0
    model.eval()
    while rows < enough and step < batches.steps_per_epoch:
        batch, encoded = batches.batch(step), defaultdict[str, list[Tensor]](list)
        for micro in micro_batches(batch.features, batch.mask, trainer.config.train.micro_batches * ranks):
            features, mask = (
                {name: tensor.to(device) for name, tensor in tensors.items()}
                for tensors in (micro.features, micro.mask or {})
            )
            with torch.no_grad():
                z, _, valid = model.codebook_batch(model(features, mask))
            for name, vectors in z.items():
                encoded[name].append((vectors.flatten(0, 1) if valid is None else vectors[valid[name]]).cpu())
        # In the order of modalities, whatever the number of micro-batches, so that the same rows are drawn.
        found.append({name: torch.cat(vectors) for name, vectors in encoded.items()})
        rows += sum(map(len, found[-1].values()))
        step += 1
    return found


def _choose(trainer: Trainer, rows: Tensor, generator: np.random.Generator) -> Tensor:
    """Codewords from features, (N, D), by `codebook_init`.

    Raises:
        ValueError: there are fewer features than codewords.
    """
    codewords, seed = trainer.config.model.codewords, trainer.config.train.seed
    if len(rows) < codewords:
        raise ValueError(f"codewords must be at most the {len(rows)} vectors of an epoch, got {codewords}")
    if trainer.config.method.codebook_init == "kmeans":
        from sklearn.cluster import KMeans

        found = KMeans(codewords, n_init=1, max_iter=20, random_state=seed).fit(rows.numpy()).cluster_centers_
    else:
        found = rows.numpy()[generator.choice(len(rows), codewords, replace=False)]
    return torch.as_tensor(found, dtype=trainer.model.dtype, device=trainer.model.device)
