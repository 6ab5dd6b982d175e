"""The released code's protocol: probes train on codes with dropout and are scored on their training clips."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from unicode_fast.data import ClipSet
from unicode_fast.tasks.probe import (
    Examples,
    FrozenModel,
    ProbeHead,
    ProbeTask,
    encode_batch,
    probe_epochs,
    probe_seed,
    seeded,
)


@contextmanager
def seeded_dropout(model: FrozenModel, seed: int) -> Iterator[None]:
    """Draws the model's dropout from `seed`, then restores its buffers and the global random numbers."""
    kept = [buffer.clone() for buffer in model.buffers()]
    with seeded(model.device, seed):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in zip(model.buffers(), kept, strict=True):
                    buffer.copy_(before)


class OfficialBest(NamedTuple):
    """The best score over epochs, and the logits of that epoch, clips first."""

    score: float
    logits: Tensor


def official_probe(  # noqa: PLR0913 - what is learnt from what, and how it is scored
    task: ProbeTask,
    model: FrozenModel,
    clips: ClipSet,
    source: str,
    scored: Mapping[str, Examples],
    seed: int,
    *,
    tokens: bool = False,
) -> dict[str, OfficialBest]:
    """Trains a probe on one modality by the released code's rules and scores it on others after every epoch.

    The encoder's dropout is on while the probe trains, so every batch is encoded anew. Scores are of codes without
    dropout. Codes and probe are float64. A bar on the error stream shows the epochs.

    Args:
        task: one of the official variants.
        model: the frozen encoder; its buffers and the global random numbers stay as they are.
        clips: the clips to train on.
        source: the modality that the probe is trained on.
        scored: codes without dropout and truth of the clips to score on, by modality.
        seed: of this probe.
        tokens: the probe reads one-hot vectors in place of codewords.

    Returns:
        The best epoch by modality, by the score on the scored clips.
    """
    generator = torch.Generator().manual_seed(probe_seed(seed, "official", task.name, source))
    columns, truth = task.columns(clips), task.truth(clips, source)
    learnt = task.learnt(truth)
    held = {name: Examples(each.codes.to(torch.float64), each.truth) for name, each in scored.items()}
    width = next(iter(held.values())).codes.table.shape[1]
    head = ProbeHead(width, columns, generator, torch.float64)
    loss = task.make_loss(columns, torch.float64)
    best: dict[str, OfficialBest] = {}

    def loss_of(places: Tensor) -> Tensor:
        numbers = learnt[places]
        batch = encode_batch(model, clips, source, numbers.numpy(), dropout=True).to(torch.float64)
        batch = batch.tokens(model.code_sizes) if tokens else batch
        return loss(task.output(head, batch), truth[numbers], batch.mask)

    dropout_seed = probe_seed(seed, "official dropout", task.name, source)
    with seeded_dropout(model, dropout_seed):
        epochs = probe_epochs(head, task.rule, len(learnt), generator, loss_of, loss.parameters())
        for _ in tqdm(epochs, f"{task.name} on {source}", task.rule.epochs, leave=False):
            for name, (codes, target) in held.items():
                with torch.no_grad():
                    logits = task.output(head, codes)
                score = task.score(logits, target, codes.mask)
                if name not in best or score > best[name].score:
                    best[name] = OfficialBest(score, logits)
    return best
