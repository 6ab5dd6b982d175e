"""The table of zero-shot scores, its rows, and the quick validation scores of pre-training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from unicode_fast.data import Dataset
from unicode_fast.tasks.classification import (
    Classification,
    CrossClassification,
    OfficialClassification,
    OfficialCrossClassification,
)
from unicode_fast.tasks.encoded import TEST, TRAIN, VALIDATION, WHOLE, EncodedDataset, View, check_classes
from unicode_fast.tasks.localisation import (
    CrossLocalisation,
    Localisation,
    OfficialCrossLocalisation,
    OfficialLocalisation,
)
from unicode_fast.tasks.metrics.intervals import Bootstrap, Estimate
from unicode_fast.tasks.metrics.sharing import Sharing, measure_sharing
from unicode_fast.tasks.official import OfficialBest, official_probe
from unicode_fast.tasks.open_set import (
    CrossOpenClassification,
    OfficialCrossOpenClassification,
    OfficialOpenClassification,
    OpenClassification,
)
from unicode_fast.tasks.probe import (
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
from unicode_fast.tasks.retrieval import Retrieval
from unicode_fast.tasks.segmentation.backbones import BackboneChoice
from unicode_fast.tasks.segmentation.task import Segmentation
from unicode_fast.tasks.table import Row, TokenScore, check_protocol

CLOSED_TASKS = ("classification", "localisation", "cross-classification", "cross-localisation")
OPEN_TASKS = ("open-classification", "cross-open-classification")
PROBE_TASKS = (*CLOSED_TASKS, *OPEN_TASKS)
RETRIEVAL, SEGMENTATION = "retrieval", "segmentation"
TASKS = (*PROBE_TASKS, SEGMENTATION, RETRIEVAL)
DEFAULT_TASKS = ("classification", "localisation")
_Measured = TypeVar("_Measured")
QUICK_CLIPS = 1000
QUICK_RULE = ProbeRule(epochs=10, batch_size=100, learning_rate=4e-3, least_steps=200)

_PROBED = (
    *(Classification(), Localisation(), CrossClassification(), CrossLocalisation()),
    *(OfficialClassification(), OfficialLocalisation(), OfficialCrossClassification(), OfficialCrossLocalisation()),
    *(OpenClassification(), CrossOpenClassification()),
    *(OfficialOpenClassification(), OfficialCrossOpenClassification()),
)
_KINDS: dict[tuple[str, str], ProbeTask] = {(task.name, task.protocol): task for task in _PROBED}


def check_tasks(tasks: str | Sequence[str], argument: str = "tasks") -> list[str]:
    """Checked names of tasks, from a list or separated by commas; errors name `argument`.

    Raises:
        ValueError: a name is unknown, or there is none.
    """
    names = [name.strip() for name in (tasks.split(",") if isinstance(tasks, str) else tasks)]
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names:
        raise ValueError(f"{argument} must be among {', '.join(TASKS)}, got {unknown[0] if unknown else 'none'!r}")
    return list(dict.fromkeys(names))


def probe_task(task: str, protocol: str = "held_out") -> ProbeTask:
    """The definition of a task under a protocol.

    Raises:
        ValueError: the task or the protocol is unknown.
    """
    check_tasks([task])
    return _KINDS[task, check_protocol(protocol)]


class Evaluator:
    """Probes of one frozen model on one data set; each result is computed once, on first use.

    A probe depends only on the seed, the task and the modality that it is trained on. A single row therefore has the
    same numbers as in the whole table.

    Args:
        model: encodes in evaluation mode; its mode, its buffers and the global random numbers stay as they are.
        dataset: with splits train, val and test.
        seed: of the probes.
        transfer: data sets to test on, by task; other tasks are tested on `dataset`.
        backbone: of segmentation; None takes the light one.
        segmenter_steps: of a segmenter's training; None takes the backbone's own rule.
        known: number of known classes in open-set tasks; None takes half of the classes.

    Raises:
        ValueError: a transfer data set for a probe task has other classes than `dataset`.
    """

    def __init__(  # noqa: PLR0913 - options of single tasks
        self,
        model: FrozenModel,
        dataset: Dataset,
        seed: int = 0,
        *,
        transfer: Mapping[str, Dataset] | None = None,
        backbone: BackboneChoice | None = None,
        segmenter_steps: int | None = None,
        known: int | None = None,
    ) -> None:
        self.dataset, self.seed, self._known = dataset, seed, known
        self._backbone, self._segmenter_steps = backbone, segmenter_steps
        self.home = EncodedDataset(model, dataset)
        self.model = self.home.model
        self.transfer = {task: EncodedDataset(model, other) for task, other in (transfer or {}).items()}
        self._heads: dict[tuple[str, str, bool, View], ProbeHead] = {}
        self._official: dict[tuple[str, str, bool, View], dict[str, OfficialBest]] = {}
        self._bootstraps: dict[int, Bootstrap] = {}
        for task, other in self.transfer.items():
            if task in PROBE_TASKS:
                check_classes(dataset.classes, other.dataset.classes)

    def kind(self, task: str, protocol: str = "held_out") -> ProbeTask:
        """The definition of a task on this data set.

        Raises:
            ValueError: the task or the protocol is unknown, or `known` does not fit the classes.
        """
        return probe_task(task, protocol).adapted(self.dataset, self._known)

    def encoded(self, task: str) -> EncodedDataset:
        """The encoded data set that a task is tested on."""
        return self.transfer.get(task, self.home)

    @cached_property
    def retrieval(self) -> Retrieval:
        """Retrieval on `dataset`."""
        return Retrieval(self.home, self.seed)

    @cached_property
    def segmentation(self) -> Segmentation:
        """Segmentation on the data set that the task is tested on.

        Raises:
            ValueError: the data set has no frames with masks.
        """
        return Segmentation(self.encoded(SEGMENTATION), self.seed, self._backbone, self._segmenter_steps)

    def sharing(self) -> dict[str, Sharing]:
        """Code sharing on the test split of `dataset`, by all words of a sentence and by content words."""
        found = {"all words": measure_sharing(self.home, TEST)}
        if any(map(self.home.has_content, self.home.names)):
            found["content words"] = measure_sharing(self.home, TEST, content=True)
        return found

    def modalities(self, task: str) -> list[str]:
        """The model's modalities that a task can be measured on."""
        if task == RETRIEVAL:
            return self.home.names
        if task == SEGMENTATION:
            return self.segmentation.queries
        kind, encoded = self.kind(task), self.encoded(task)
        return [name for name in encoded.names if kind.fits(encoded.clips(TEST, name), name)]

    def head(self, task: str, source: str, *, at_home: bool = True, view: View = "codewords") -> ProbeHead:
        """The probe that is trained on one modality, held_out protocol.

        Args:
            task: name of the task.
            source: the modality.
            at_home: train on `dataset`, else on the data set that the task is tested on.
            view: what the probe reads of a code.
        """
        at_home = at_home or self.encoded(task) is self.home
        kind, encoded = self.kind(task), self.home if at_home else self.encoded(task)
        if view == "content" and not encoded.has_content(source):
            view = "tokens"
        if (task, source, at_home, view) not in self._heads:
            self._heads[task, source, at_home, view] = train_probe(
                kind,
                kind.columns(encoded.clips(TRAIN, source)),
                encoded.examples(kind, TRAIN, source, view),
                encoded.examples(kind, VALIDATION, source, view),
                torch.Generator().manual_seed(probe_seed(self.seed, task, source)),
            )
        return self._heads[task, source, at_home, view]

    def output(self, task: str, source: str, target: str, view: View = "codewords") -> Tensor:
        """Logits on `target` of the probe that is trained on `source`, for all test clips, clips first.

        If both are the same modality, the probe is trained on the data set that it is tested on.
        """
        codes = self.encoded(task).codes(TEST, target, view).to(torch.float32)
        head = self.head(task, source, at_home=source != target, view=view)
        with one_thread():
            return self.kind(task).output(head, codes)

    def score(self, task: str, source: str, target: str, protocol: str = "held_out", view: View = "codewords") -> float:
        """Score of the probe that is trained on `source` and tested on `target`, which may be the same."""
        kind = self.kind(task, protocol)
        if protocol == "official":
            return self._best(kind, source, target, view).score
        examples = self.encoded(task).examples(kind, TEST, target, view)
        return kind.score(self.output(task, source, target, view), examples.truth, examples.codes.mask)

    def _token_score(self, task: str, source: str, target: str, protocol: str, view: View) -> TokenScore:
        return TokenScore(*(self.score(task, name, target, protocol, view) for name in (source, target)))

    def row(  # noqa: PLR0913 - the fields of one row
        self,
        task: str,
        source: str,
        target: str,
        protocol: str = "held_out",
        *,
        anchor: str | None = None,
        details: bool = False,
    ) -> Row:
        """The row of one direction.

        Args:
            task: name of the task.
            source: the modality that the probe is trained on.
            target: the modality that it is tested on.
            protocol: held_out or official.
            anchor: of retrieval; None takes the data set's third modality.
            details: with other metrics.

        Raises:
            ValueError: task, protocol or modality is unknown, the modality has no labels for the task, or source and
                target are the same.
        """
        protocol = check_protocol(protocol)
        self.check_direction(task, source, target)
        if anchor is not None and task != RETRIEVAL:
            raise ValueError(f"anchor is for {RETRIEVAL}, got {anchor!r} beside {task}")
        if task in (RETRIEVAL, SEGMENTATION):
            if task == RETRIEVAL:
                row = self.retrieval.row(source, target, protocol, anchor)
            else:
                row = self.segmentation.row(source, target, protocol)
            return row if details else replace(row, metrics={})
        kind = self.kind(task, protocol)
        score, same = (self._measured(kind, name, target, kind.estimate) for name in (source, target))
        chance = kind.chance(self.encoded(task).clips(self._tested_split(kind), target), target)
        named = protocol == "held_out" and any(self.encoded(task).has_content(name) for name in (source, target))
        return Row(
            task=task,
            source=source,
            target=target,
            score=self.score(task, source, target, protocol),
            same_modality=self.score(task, target, target, protocol),
            chance=chance,
            protocol=protocol,
            interval=score.interval,
            metrics=self._details(kind, source, target) if details else {},
            token=self._token_score(task, source, target, protocol, "tokens"),
            content_token=self._token_score(task, source, target, protocol, "content") if named else None,
            clips=len(self.encoded(task).clips(self._tested_split(kind), target)),
            left_out=self.encoded(task).left_out(self._tested_split(kind), target),
            at_chance=same.reaches(chance),
            same_interval=same.interval,
        )

    def check_direction(self, task: str, source: str, target: str) -> None:
        """Raises ValueError where a modality is unknown or unfit for the task, or both are the same."""
        check_tasks([task])
        able = self.modalities(task)
        for argument, name in (("source", source), ("target", target)):
            if name not in self.model.names:
                raise ValueError(f"{argument} must be one of {', '.join(self.model.names)}, got {name!r}")
            there = list(self.encoded(task).dataset.modalities)
            if name not in there:
                raise ValueError(f"{argument} must be a modality of the data, {', '.join(there)}, got {name!r}")
            if name not in able:
                needs = "labels at each position" if task.endswith("localisation") else "clips that can be encoded"
                found = ", ".join(able) or "none"
                raise ValueError(f"{argument} of {task} must have {needs} (in the data: {found}), got {name!r}")
        if source == target:
            raise ValueError(f"target must be another modality than source, got {target!r} for both")

    def table(self, tasks: str | Sequence[str] = DEFAULT_TASKS, **options: Any) -> list[Row]:
        """The list of `rows`."""
        return list(self.rows(tasks, **options))

    def rows(
        self,
        tasks: str | Sequence[str] = DEFAULT_TASKS,
        *,
        protocol: str = "held_out",
        details: bool = False,
        progress: bool = True,
    ) -> Iterator[Row]:
        """All directions of some tasks; a task with fewer than two fitting modalities has no rows.

        Args:
            tasks: names, as a list or separated by commas.
            protocol: held_out or official.
            details: with other metrics.
            progress: show a bar on the error stream.

        Yields:
            Rows by task, then source, then target, in the order of the model's modalities.

        Raises:
            ValueError: a task or the protocol is unknown.
        """
        directions = [
            (task, source, target)
            for task in check_tasks(tasks)
            for source in self.modalities(task)
            for target in self.modalities(task)
            if source != target
        ]
        with tqdm(directions, desc="probes", unit="row", disable=not progress, dynamic_ncols=True) as bar:
            for task, source, target in bar:
                yield self.row(task, source, target, protocol, details=details)

    def _measured(self, kind: ProbeTask, source: str, target: str, measure: Callable[..., _Measured]) -> _Measured:
        """`kind.estimate` or `kind.metrics` of a probe on its test clips."""
        examples = self.encoded(kind.name).examples(kind, self._tested_split(kind), target)
        if kind.protocol == "official":
            logits = self._best(kind, source, target).logits
        else:
            logits = self.output(kind.name, source, target)
        if len(logits) not in self._bootstraps:
            self._bootstraps[len(logits)] = Bootstrap(len(logits), probe_seed(self.seed, "bootstrap"))
        return measure(logits, examples.truth, examples.codes.mask, self._bootstraps[len(logits)])

    def _details(self, kind: ProbeTask, source: str, target: str) -> dict[str, Estimate]:
        """The metrics of a probe, and their limits by the classes that it can learn."""
        trained, tested = self.home.clips(self._trained_split(kind), source), self.encoded(kind.name)
        limits = kind.limits(
            kind.truth(trained, source), kind.truth(tested.clips(self._tested_split(kind), target), target)
        )
        return {**self._measured(kind, source, target, kind.metrics), **limits}

    def _trained_split(self, kind: ProbeTask) -> str:
        return TRAIN if kind.protocol == "held_out" else self.home.first_of((WHOLE, TRAIN))

    def _tested_split(self, kind: ProbeTask) -> str:
        return self.encoded(kind.name).first_of(kind.tested)

    def _best(self, kind: ProbeTask, source: str, target: str, view: View = "codewords") -> OfficialBest:
        """Official protocol; the same-modality probe across data sets is trained on the tested one."""
        tested, elsewhere = self.encoded(kind.name), source == target and kind.across
        key = kind.name, source, elsewhere, view
        if key not in self._official:
            split = self._tested_split(kind)
            names = [target] if elsewhere else self.modalities(kind.name)
            clips = tested.clips(split, source) if elsewhere else self.home.clips(self._trained_split(kind), source)
            scored = {name: tested.examples(kind, split, name, view) for name in names}
            tokens = view != "codewords"
            self._official[key] = official_probe(kind, self.model, clips, source, scored, self.seed, tokens=tokens)
        return self._official[key][target]


def validate(model: FrozenModel, dataset: Dataset, *, seed: int = 0) -> dict[str, Any]:
    """Quick zero-shot classification on the validation split, which pre-training logs.

    A probe is trained for a few epochs on at most 1000 training clips of each modality. It is scored on validation
    clips of the others. The scores are a little below those of the table.

    Args:
        model: in any mode; the model and the global random numbers stay as they are.
        dataset: with splits train and val.
        seed: of the probes and the choice of clips.

    Returns:
        Accuracy by direction, such as "audio->video", and its "mean". "token": the same for one-hot codes. "sharing":
        the attributes of `Sharing`. "content_sharing": those by content words, where these are marked.
    """
    encoded = EncodedDataset(model, dataset)
    scores = _quick_scores(encoded, seed)
    return {
        **scores["codewords"],
        "token": scores["tokens"],
        "sharing": measure_sharing(encoded, VALIDATION).as_dict(),
        **(
            {"content_sharing": measure_sharing(encoded, VALIDATION, content=True).as_dict()}
            if any(map(encoded.has_content, encoded.names))
            else {}
        ),
    }


def _quick_scores(encoded: EncodedDataset, seed: int) -> dict[View, dict[str, float]]:
    kind, model = probe_task("classification"), encoded.model
    scores: dict[View, dict[str, float]] = {"codewords": {}, "tokens": {}}
    for source in model.names:
        train = encoded.clips(TRAIN, source)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(probe_seed(seed, "quick clips")))
        numbers = np.sort(order[:QUICK_CLIPS].numpy())
        codes = encode_split(model, train, source, numbers=numbers)
        truth = kind.truth(train, source)[torch.from_numpy(numbers)]
        for view in scores:
            examples = Examples(codes if view == "codewords" else codes.tokens(model.code_sizes), truth)
            generator = torch.Generator().manual_seed(probe_seed(seed, "quick", source))
            head = train_probe(kind, kind.columns(train), examples, None, generator, QUICK_RULE)
            for target in model.names:
                if target != source:
                    held = encoded.examples(kind, VALIDATION, target, view)
                    logits = kind.output(head, held.codes.to(torch.float32))
                    scores[view][f"{source}->{target}"] = kind.score(logits, held.truth, held.codes.mask)
    return {view: {"mean": float(np.mean(list(found.values()))), **found} for view, found in scores.items()}
