"""The commands of the paper's tables, as data: trainings, evaluations and checks, with their published numbers."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from unicode_fast import evaluate
from unicode_fast.ablate import COMPONENTS
from unicode_fast.checkpoint import SUMMARY
from unicode_fast.cli import check_read, given_fields, make_parser, resolve, resolve_methods, shown, with_underscores
from unicode_fast.config import EXECUTION_FIELDS, PLACE_FIELDS, TEXT_FIELDS, Config
from unicode_fast.data.layouts import has_sentences, published
from unicode_fast.data.store.write import MANIFEST
from unicode_fast.errors import UsageError
from unicode_fast.many_runs import check_folder
from unicode_fast.methods.registry import form_of
from unicode_fast.presets import accepted, preset
from unicode_fast.report.published import LAYOUTS, TASKS, Published
from unicode_fast.report.published import published as published_numbers
from unicode_fast.tasks import Row, check_protocol
from unicode_fast.tasks.runner import SEGMENTATION
from unicode_fast.training.estimates import SHAPES
from unicode_fast.training.runs import EVALUATIONS, run_file

# The row of Table 3 whose probes are trained with labels of the tested modality; it needs no run of its own.
LABELLED = "labelled modality"
# Fields that differ between the commands of a table.
OWN_FIELDS = ("data", "train_split", "modalities", "method", "dcid")
# No validation and no task beside the published ones; the last checkpoint is measured.
_USUAL = {"validations": 0, "probe_tasks": "none"}


class Place(NamedTuple):
    """A data set: flag of its folder, folder below --root, layout, and published clips by modality."""

    flag: str
    folder: str
    layout: str
    clips: Mapping[str, int]
    split: str = "train"


def _paired(clips: int) -> dict[str, int]:
    return {"audio": clips, "video": clips}


_TRAIN = published.AVEL_40K.clips["train"]
_WHOLE = sum(published.AVEL_40K.clips.values())
# Where each pre-training of the tables takes its clips, after its modalities.
PRETRAINING: Mapping[str, Place] = {
    "24K": Place("vggsound40k", "vggsound40k", "vggsound-avel24k", _paired(_TRAIN)),
    "40K": Place("vggsound40k", "vggsound40k", "vggsound-avel40k", _paired(_WHOLE), "all"),
    "81K": Place("vggsound81k", "vggsound81k", "vggsound81k", _paired(81_000), "all"),
}
MODALITIES = {"AV": ("audio", "video"), "AVT": ("audio", "video", "text"), "VT": ("video", "text")}
_LAYOUTS = {dataset: layout for layout, dataset in LAYOUTS.items()}
TESTS: Mapping[str, Place] = {
    "AVE": Place("ave", "AVE", _LAYOUTS["AVE"], _paired(published.AVE_CLIPS)),
    "AVVP": Place(
        "avvp", "AVVP", _LAYOUTS["AVVP"], {name: sum(one.clips.values()) for name, one in published.AVVP.items()}
    ),
    "AVE→AVVP": Place(
        "ave_avvp",
        ".",
        _LAYOUTS["AVE→AVVP"],
        {
            name: sum(published.AVE_AVVP_TRAIN.clips.values()) + sum(one.clips.values())
            for name, one in published.AVE_AVVP_TEST.items()
        },
    ),
    "UCF↔VGG": Place(
        "ucf_vggsound",
        ".",
        _LAYOUTS["UCF↔VGG"],
        {name: sum(one.clips.values()) for name, one in published.UCF_VGGSOUND.items()},
    ),
    "AVS-S4": Place("avsbench", "AVSBench", _LAYOUTS["AVS-S4"], {}),
    # Retrieval is tested on the clips of its pre-training data, and needs their third modality.
    "retrieval": PRETRAINING["24K"],
}
FLAGS = {place.flag: place.folder for place in (*PRETRAINING.values(), *TESTS.values())}


@dataclass(frozen=True)
class Command:
    """One command of a table.

    Attributes:
        module: train, evaluate or data.
        words: its arguments, without those that name new files.
        title: what it does.
        folder: of the run, or the report of a check.
        theirs: the published numbers of an evaluation.
    """

    module: str
    words: tuple[str, ...]
    title: str
    folder: Path
    theirs: tuple[Published, ...] = ()

    @cached_property
    def arguments(self) -> Namespace:
        """The parsed arguments of an evaluation."""
        return evaluate.make_parser().parse_args(with_underscores(self.words))

    @cached_property
    def config(self) -> Config:
        """The configuration of a training."""
        return resolve(None, given_fields(make_parser("train", "").parse_args(with_underscores(self.words))))

    def row(self) -> Row | None:
        """The row of a finished evaluation.

        Raises:
            CheckpointError: its file is damaged.
        """
        if not (self.folder / SUMMARY).is_file():
            return None
        given = self.arguments
        empty = Row(given.task, getattr(given, "from"), given.to, 0.0, 0.0, 0.0, check_protocol(given.protocol))
        file = self.folder / EVALUATIONS / f"{evaluate.file_stem(empty, given)}.json"
        if not file.is_file():
            return None
        with run_file(file) as content:
            return Row.from_dict(content["row"]) if content["flags"] == evaluate.changed_flags(given) else None

    @property
    def finished(self) -> bool:
        """True where the files of an earlier call hold its result.

        Raises:
            CheckpointError: a file is damaged.
            ValueError: the run in its folder has another configuration.
        """
        if self.module == "evaluate":
            return self.row() is not None
        if self.module == "train":
            check_folder(self.folder, self.config, (*EXECUTION_FIELDS, *PLACE_FIELDS))
            return (self.folder / SUMMARY).is_file()
        if not self.folder.is_file():
            return False
        with run_file(self.folder) as report:
            return bool(report["can_start"]) and report["data"] == self.words[1]

    def line(self) -> list[str]:
        """The arguments of Python's process: those of a first call, or of one that resumes a training."""
        words = list(self.words)
        if self.module == "train":
            words = ["--resume", str(self.folder)] if self.folder.exists() else [*words, "--out", str(self.folder)]
        if self.module == "data":
            words += ["--json", str(self.folder)]
        return ["-m", f"unicode_fast.{self.module}", *words]


class Table:
    """The commands of one table of the paper.

    Args:
        number: 1 to 5.
        given: the parsed arguments of this module.
        fields: configuration fields of every training.

    Raises:
        UsageError: a row, a pre-training or a data set is not in the table.
        ValueError: a field is unknown, has a wrong value, or is not read in the preset.
    """

    def __init__(self, number: int, given: Namespace, fields: Mapping[str, Any]) -> None:
        self.number, self.given, self.fields = number, given, dict(fields)
        self.out, self.protocol = Path(given.out), check_protocol(given.protocol)
        _, others = resolve_methods(None, self.fields)
        if "epochs" in self.fields:
            self.fields.setdefault("steps", 0)
        first = int(self.fields.pop("seed", 0))
        self.seeds = range(first, first + given.seeds)
        self.numbers = [one for one in published_numbers() if one.table == number]
        chosen = (
            ("method", given.only, True),
            ("pretraining", given.pretraining, False),
            ("dataset", given.tests, False),
        )
        for name, wanted, whole in chosen:
            there = list(dict.fromkeys(getattr(one, name) for one in self.numbers))
            found = [one for one in there if not wanted or any(_fits(one, word, whole) for word in wanted)]
            unknown = [word for word in wanted or () if not any(_fits(one, word, whole) for one in there)]
            if unknown:
                flag = {"method": "only", "dataset": "tests"}.get(name, name)
                raise UsageError(f"{flag} must be among {', '.join(there)} for table {number}, got {unknown[0]!r}")
            self.numbers = [one for one in self.numbers if getattr(one, name) in found]
        trainings = (self.train(*row, first) for row in self.trainings()) if others else ()
        check_read(others, (command.config for command in trainings))

    def folder(self, pretraining: str, method: str, seed: int) -> Path:
        """The folder of a run."""
        names = (name.replace(" + ", "+").replace(" ", "-") for name in (pretraining, method))
        return self.out.joinpath(*names, f"seed-{seed}")

    def spec(self, place: Place) -> str:
        """A data set as `--data` takes it: a packed store, or a layout with its folder."""
        folder = getattr(self.given, place.flag) or str(Path(self.given.root, place.folder))
        return folder if (Path(folder) / MANIFEST).exists() else f"{place.layout}:{folder}"

    def text(self, spec: str, names: Sequence[str]) -> dict[str, Any]:
        """The given fields on sentences, if the data have sentences that are read."""
        read = "text" in names and has_sentences(spec)
        return {name: self.fields[name] for name in TEXT_FIELDS if name in self.fields and read}

    def read(self, names: Sequence[str], own: Mapping[str, Any]) -> dict[str, Any]:
        """The given fields that a row with these modalities and own fields accepts, without those on sentences."""
        rules = (self.fields["preset"], self.fields["size"], own.get("method", "uni-code"), own.get("dcid", False))
        read = accepted(preset(*rules), {**self.fields, **own}, {SHAPES[name].kind for name in names})
        return {name: value for name, value in self.fields.items() if name in read and name not in TEXT_FIELDS}

    def trainings(self) -> Iterator[tuple[str, str]]:
        """Pre-training and method of each row with a run."""
        rows = dict.fromkeys((one.pretraining, one.method) for one in self.numbers)
        for pretraining, method in rows:
            if method == LABELLED and (pretraining, "Uni-Code") not in rows:
                yield pretraining, "Uni-Code"
            elif method != LABELLED and fields_of(method) is not None:
                yield pretraining, method

    def train(self, pretraining: str, method: str, seed: int) -> Command:
        """The training of a row."""
        names, place = self.data_of(pretraining)
        spec, own = self.spec(place), fields_of(method) or {}
        fields = {**_USUAL, **self.read(names, own), **self.text(spec, names)}
        fields |= {"data": spec, "modalities": ",".join(names), **own, "seed": seed}
        if place.split != "train":
            fields["train_split"] = place.split
        words = [word for name, value in fields.items() for word in (f"--{name}", shown(value))]
        title = f"pre-train {pretraining}, {method}, seed {seed}"
        return Command("train", tuple(words), title, self.folder(pretraining, method, seed))

    def data_of(self, pretraining: str) -> tuple[tuple[str, ...], Place]:
        """Modalities and data set of a pre-training such as "AV 40K"."""
        names, _, size = pretraining.partition(" ")
        return MODALITIES[names], PRETRAINING[size]

    def evaluations(self, pretraining: str, method: str, seed: int) -> Iterator[Command]:
        """The evaluations of a row, in the order of the table."""
        rows = [one for one in self.numbers if one.pretraining == pretraining]
        wanted = [one for one in rows if one.method == method or (one.method == LABELLED and method == "Uni-Code")]
        by_place: dict[tuple[str, str, str], list[Published]] = {}
        for one in wanted:
            by_place.setdefault(column_of(one), []).append(one)
        for (dataset, source, target), theirs in by_place.items():
            folder = self.folder(pretraining, method, seed)
            words = [str(folder), "--task", TASKS[dataset][0], "--from", source, "--to", target]
            words += ["--protocol", self.protocol]
            spec = self.spec(TESTS[dataset])
            if dataset != "retrieval":
                words += ["--data", spec]
                text = self.text(spec, (source, target))
                words += [word for name, value in text.items() for word in (f"--{name}", shown(value))]
            if TASKS[dataset][0] == SEGMENTATION:
                given = {
                    name: getattr(self.given, name) for name in ("backbone", "backbone_weights", "segmenter_steps")
                }
                words += [
                    word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))
                ]
            title = f"{dataset} {source} → {target} of {pretraining}, {method}, seed {seed}"
            yield Command("evaluate", tuple(words), title, folder, tuple(theirs))

    def sources(self) -> dict[str, tuple[Place, tuple[str, ...], list[str]]]:
        """By spec: each data set of the table, the modalities that are read, and the splits that are trained on."""
        found: dict[str, tuple[Place, tuple[str, ...], list[str]]] = {}

        def add(place: Place, names: Sequence[str], splits: Sequence[str]) -> None:
            before = found.get(self.spec(place), (place, (), []))
            every = tuple(name for name in MODALITIES["AVT"] if name in (*before[1], *names))
            found[self.spec(place)] = (place, every, [*before[2], *splits])

        for pretraining, _ in self.trainings():
            names, place = self.data_of(pretraining)
            add(place, names, [place.split])
        for one in self.numbers:
            if TASKS[one.dataset][0] != "retrieval":
                add(TESTS[one.dataset], (one.source, one.target), ())
            else:
                add(TESTS[one.dataset], MODALITIES["AVT"], ())
        return found

    def checked(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Spec and modalities of each data set; the 24K set is a split of the 40K set and not repeated beside it."""
        sources = self.sources()
        for spec, (_, names, _) in sources.items():
            if spec.replace(PRETRAINING["24K"].layout, PRETRAINING["40K"].layout) in {*sources} - {spec}:
                continue
            yield spec, names

    def checks(self) -> Iterator[Command]:
        """The check of each data set."""
        for spec, names in self.checked():
            words = ["check", spec]
            if ":" in spec:
                words += ["--modalities", ",".join(names)]
                words += [word for key, value in self.text(spec, names).items() for word in (f"--{key}", shown(value))]
            file = re.sub(r"[^A-Za-z0-9]+", "-", f"{spec.partition(':')[0]} {' '.join(names)}").strip("-")
            yield Command("data", tuple(words), f"check {spec}", self.out / "checks" / f"{file}.json")

    def commands(self) -> Iterator[Command]:
        """All commands in order: checks, then each row's training and evaluations, every row before the next seed."""
        yield from self.checks()
        for seed in self.seeds:
            for pretraining, method in self.trainings():
                yield self.train(pretraining, method, seed)
                yield from self.evaluations(pretraining, method, seed)


def _fits(name: str, word: str, whole: bool) -> bool:
    """Whether a word of a flag names this row, or for other columns its last part such as 24K."""
    return word.lower() in (name.lower(), "" if whole else name.lower().rpartition(" ")[2])


def column_of(one: Published) -> tuple[str, str, str]:
    """Data set, source and target of a number; a score of labels stands in the column of the same target."""
    if one.method == LABELLED:
        return one.dataset, "video" if one.target == "audio" else "audio", one.target
    return one.dataset, one.source, one.target


def fields_of(method: str) -> dict[str, Any] | None:
    """The configuration fields of a published row; None for the systems of other papers.

    Args:
        method: a row of Tables 1, 4 or 5, or "without X" of Tables 2 and 3.
    """
    if method == "Uni-Code":
        return {}
    if method.startswith("without "):
        return dict(COMPONENTS[method.removeprefix("without ")])
    form = form_of(method)
    if form is None:
        return None
    name, dcid = form
    return {"method": name, "dcid": True} if dcid else {"method": name}
