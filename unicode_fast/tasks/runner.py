"""The table of zero-shot scores, single rows of it, and the quick form for pre-training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from unicode_fast.tasks.classification import Classification, OfficialClassification
from unicode_fast.tasks.localisation import Localisation, OfficialLocalisation
from unicode_fast.tasks.official import official_scores
from unicode_fast.tasks.probe import (
    Clips,
    EncodedClips,
    Examples,
    FrozenModel,
    ProbeHead,
    ProbeRule,
    ProbeTask,
    encode_split,
    one_thread,
    probe_seed,
    train_probe,
)
from unicode_fast.tasks.table import Row

TASKS = ("classification", "localisation")
PROTOCOLS = ("sound", "official")
TRAIN, VALIDATION, TEST = "train", "val", "test"
QUICK_CLIPS = 1000
QUICK_RULE = ProbeRule(epochs=10, batch_size=100, learning_rate=4e-3, least_steps=200)

_KINDS: dict[tuple[str, str], ProbeTask] = {
    (task.name, task.protocol): task
    for task in (Classification(), OfficialClassification(), Localisation(), OfficialLocalisation())
}


class Splits(Protocol):
    """What the tasks need of a data set; `unicode_fast.data.Store` has it."""

    def split(self, name: str) -> Clips:
        """The clips of train, val or test."""


def check_tasks(tasks: str | Sequence[str]) -> list[str]:
    """Names of tasks, as a list or separated by commas.

    Raises:
        ValueError: there are none, or one is unknown.
    """
    names = [name.strip() for name in (tasks.split(",") if isinstance(tasks, str) else tasks)]
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names:
        raise ValueError(f"tasks must be among {', '.join(TASKS)}, got {unknown[0] if unknown else 'none'!r}")
    return list(dict.fromkeys(names))


def probe_task(task: str, protocol: str = "sound") -> ProbeTask:
    """The definition of a task under a protocol.

    Raises:
        ValueError: one of them is unknown.
    """
    check_tasks([task])
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    return _KINDS[task, protocol]


class Probes:
    """Probes of one frozen model on one data set: everything is computed once, when it is first asked for.

    A probe depends on (seed, task, modality it is trained on) and on nothing that ran before, so a row by itself has
    the same numbers as in the whole table.

    Args:
        model: encodes in evaluation mode; its mode, its buffers and the global random numbers stay as they are.
        store: with splits train, val and test.
        seed: of the probes.
    """

    def __init__(self, model: FrozenModel, store: Splits, seed: int = 0) -> None:
        self.model, self.store, self.seed = model, store, seed
        self._codes: dict[tuple[str, str], EncodedClips] = {}
        self._heads: dict[tuple[str, str], ProbeHead] = {}
        self._official: dict[tuple[str, str], dict[str, float]] = {}

    def codes(self, split: str, name: str) -> EncodedClips:
        """Codes of a modality, all clips of a split."""
        if (split, name) not in self._codes:
            self._codes[split, name] = encode_split(self.model, self.store.split(split), [name])[name]
        return self._codes[split, name]

    def modalities(self, task: str) -> list[str]:
        """The model's modalities that a task can be probed on."""
        return probe_task(task).modalities(self.store.split(TEST), self.model.names)

    def head(self, task: str, source: str) -> ProbeHead:
        """The probe that is trained on one modality, sound protocol."""
        if (task, source) not in self._heads:
            kind = probe_task(task)
            self._heads[task, source] = train_probe(
                kind,
                kind.columns(self.store.split(TRAIN)),
                self._examples(kind, TRAIN, source),
                self._examples(kind, VALIDATION, source),
                torch.Generator().manual_seed(probe_seed(self.seed, task, source)),
            )
        return self._heads[task, source]

    def output(self, task: str, source: str, target: str, split: str = TEST) -> Tensor:
        """Logits on `target` of the probe that is trained on `source`, all clips of a split, clips first."""
        head, codes = self.head(task, source), self.codes(split, target).to(torch.float32)
        with one_thread():
            return probe_task(task).output(head, codes)

    def score(self, task: str, source: str, target: str, protocol: str = "sound") -> float:
        """Of the probe that is trained on `source` and tested on `target`, which may be the same."""
        kind = probe_task(task, protocol)
        if protocol == "official":
            return self._official_scores(kind, source)[target]
        examples = self._examples(kind, TEST, target)
        return kind.score(self.output(task, source, target), examples.truth, examples.codes.mask)

    def row(self, task: str, source: str, target: str, protocol: str = "sound") -> Row:
        """One direction.

        Raises:
            ValueError: task, protocol or modality is unknown, the modality has no labels for the task, or source and
                target are the same.
        """
        kind, able = probe_task(task, protocol), self.modalities(task)
        for argument, name in (("source", source), ("target", target)):
            if name not in self.model.names:
                raise ValueError(f"{argument} must be one of {', '.join(self.model.names)}, got {name!r}")
            if name not in able:
                raise ValueError(
                    f"{argument} of {task} must have labels at each step, which {', '.join(able) or 'none'} has, "
                    f"got {name!r}"
                )
        if source == target:
            raise ValueError(f"target must be another modality than source, got {target!r} for both")
        return Row(
            task=task,
            source=source,
            target=target,
            score=self.score(task, source, target, protocol),
            same_modality=self.score(task, target, target, protocol),
            chance=kind.chance(self.store.split(TEST if protocol == "sound" else TRAIN), target),
            protocol=protocol,
        )

    def table(self, tasks: str | Sequence[str] = TASKS, *, protocol: str = "sound", progress: bool = True) -> list[Row]:
        """All directions, as `run_table` says."""
        directions = [
            (task, source, target)
            for task in check_tasks(tasks)
            for source in self.modalities(task)
            for target in self.modalities(task)
            if source != target
        ]
        shown = tqdm(directions, desc="probes", unit="row", disable=not progress, dynamic_ncols=True)
        return [self.row(task, source, target, protocol) for task, source, target in shown]

    def _examples(self, kind: ProbeTask, split: str, name: str) -> Examples:
        return Examples(self.codes(split, name), kind.truth(self.store.split(split), name))

    def _official_scores(self, kind: ProbeTask, source: str) -> dict[str, float]:
        if (kind.name, source) not in self._official:
            codes = {name: self.codes(TRAIN, name) for name in self.modalities(kind.name)}
            self._official[kind.name, source] = official_scores(
                kind, self.model, self.store.split(TRAIN), source, codes, self.seed
            )
        return self._official[kind.name, source]


def run_table(
    model: FrozenModel,
    store: Splits,
    tasks: str | Sequence[str] = TASKS,
    *,
    seed: int = 0,
    protocol: str = "sound",
    progress: bool = True,
) -> list[Row]:
    """All directions of some tasks.

    A task that fewer than two modalities have labels for gives no rows.

    Args:
        model: the frozen encoder; nothing in it changes.
        store: with splits train, val and test.
        tasks: names, as a list or separated by commas.
        seed: of the probes.
        protocol: sound, or official as `explain` describes it.
        progress: a bar on the error stream.

    Returns:
        Rows by task, then source, then target, in the order of the model's modalities.

    Raises:
        ValueError: a task or the protocol is unknown.
    """
    return Probes(model, store, seed).table(tasks, protocol=protocol, progress=progress)


def run_row(  # noqa: PLR0913 - the words of one line of the table
    model: FrozenModel,
    store: Splits,
    task: str,
    source: str,
    target: str,
    *,
    protocol: str = "sound",
    seed: int = 0,
) -> Row:
    """One row of the table by itself, with the same numbers.

    Args:
        model: the frozen encoder; nothing in it changes.
        store: with splits train, val and test.
        task: classification or localisation.
        source: the modality the probe is trained on.
        target: the modality it is tested on.
        protocol: sound or official.
        seed: of the probes.

    Raises:
        ValueError: as `Probes.row` says.
    """
    return Probes(model, store, seed).row(task, source, target, protocol)


def zero_shot_accuracy(model: FrozenModel, store: Splits, *, seed: int = 0) -> dict[str, float]:
    """Quick zero-shot classification on the validation split, for choosing a checkpoint during pre-training.

    A probe of a few epochs on at most 1000 training clips of each modality is scored on the validation clips of the
    others. The numbers are a little below those of the table.

    Args:
        model: any mode, which is restored; nothing in it changes, nor do the global random numbers.
        store: with splits train and val.
        seed: of the probes and the choice of clips.

    Returns:
        Accuracy by direction, such as "audio->video", and "mean" over directions.
    """
    kind = probe_task("classification")
    train, validation = store.split(TRAIN), store.split(VALIDATION)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(probe_seed(seed, "quick clips")))
    numbers = np.sort(order[:QUICK_CLIPS].numpy())
    codes = encode_split(model, train, model.names, numbers=numbers)
    held_out = encode_split(model, validation, model.names)
    scores: dict[str, float] = {}
    for source in model.names:
        examples = Examples(codes[source], kind.truth(train, source)[torch.from_numpy(numbers)])
        generator = torch.Generator().manual_seed(probe_seed(seed, "quick", source))
        head = train_probe(kind, kind.columns(train), examples, None, generator, QUICK_RULE)
        for target in model.names:
            if target != source:
                logits = kind.output(head, held_out[target].to(torch.float32))
                truth = kind.truth(validation, target)
                scores[f"{source}->{target}"] = kind.score(logits, truth, held_out[target].mask)
    return {"mean": float(np.mean(list(scores.values()))), **scores}
